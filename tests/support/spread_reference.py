"""The rule of projection written down plainly, for tiny vocabularies."""

from collections.abc import Sequence

Vocabulary = Sequence[bytes | None]


def project_plainly(
    source_probs: Sequence[float],
    anchor_probs: Sequence[float],
    source: Vocabulary,
    anchor: Vocabulary,
    *,
    covered: bytes = b"",
    last: int | None = None,
    source_stops: Sequence[int] = (),
    anchor_stops: Sequence[int] = (),
) -> list[float]:
    """Return the mass of each token of the anchor, one token of the source after the other."""
    out = [0.0] * len(anchor)
    texts = {t for n, t in enumerate(source) if t and n not in source_stops}
    pieces = {n: t for n, t in enumerate(anchor) if t and n not in anchor_stops}

    def best(text: bytes) -> bytes | None:
        fits = [t for t in texts if text.startswith(t) and len(t) > len(covered)]
        return max(fits, key=len, default=None)

    for number, mass in enumerate(source_probs):
        token = source[number] if number not in source_stops else None
        if covered and not (token and token.startswith(covered) and token != covered):
            continue
        if covered and last is not None and token:
            before = anchor[last] or b""
            after = token[len(covered) :]
            letters = len(after) - len(after.lstrip(b"abc"))
            is_one = letters and before + after[:letters] in pieces.values()
            if before and before[-1:] in b"abc" and is_one:
                continue
        members: Sequence[int] = range(len(anchor))
        if number in source_stops and anchor_stops:
            members = sorted(set(anchor_stops))
        elif token:
            rest = token[len(covered) :]
            members = [n for n, piece in pieces.items() if best(covered + piece) == token]
            firsts = [piece for piece in pieces.values() if rest.startswith(piece)]
            first = max(firsts, key=len, default=None)
            members = members or [n for n, piece in pieces.items() if piece == first]
            members = members or range(len(anchor))
        total = sum(anchor_probs[n] for n in members)
        for n in members:
            out[n] += mass * anchor_probs[n] / total
    return out
