"""Projected distributions against plain sums, and against all texts that a source can write."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support.spread_reference import project_plainly
from torch import Tensor

from carryon.cache.errors import InputError
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.mixing.healing import HealingStates, heal_from_stable
from carryon.train.mixing.projection import FEATURES, Heads, project_full, project_targets
from carryon.train.mixing.vocabulary_map import VocabularyMap

SOURCE: list[bytes | None] = [b"a", b"b", b"ab", b"abc", b"c", None, b"ca", b"cab", b"", b"bb"]
ANCHOR: list[bytes | None] = [b"a", b"b", b"c", b"bc", b"abb", b"ca", b"ca", None, b"cc", None]
STOPS = (5,), (7, 9)
WIDTHS = 6, 5
COVERED = [b"", b"a", b"ab", b"c", b"", b"ca", b"cc"]
LAST = torch.tensor([0, 0, 1, 2, 3, -1, 8])
"""Tokens of the anchor that end there."""


def make_frozen(rows: Tensor, dtype: torch.dtype = torch.float32) -> FrozenHead:
    return FrozenHead(
        weight=rows.to(dtype),
        bias=None,
        logit_scale=1.0,
        softcap=None,
        dtype=dtype,
        device=torch.device("cpu"),
        block_rows=4,
    )


def make_case(dtype: torch.dtype = torch.float32) -> tuple[Heads, VocabularyMap, Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    source = make_frozen(torch.randn(len(SOURCE), WIDTHS[0], generator=random), dtype)
    anchor = make_frozen(torch.randn(len(ANCHOR), WIDTHS[1], generator=random), dtype)
    vocabulary_map = VocabularyMap(
        source=SOURCE, anchor=ANCHOR, source_stops=STOPS[0], anchor_stops=STOPS[1]
    )
    states = torch.randn(len(COVERED), WIDTHS[0], generator=random)
    anchors = torch.randn(len(COVERED), WIDTHS[1], generator=random)
    return Heads(anchor=anchor, source=source), vocabulary_map, states, anchors


def make_stable(vocabulary_map: VocabularyMap) -> HealingStates:
    random = torch.Generator().manual_seed(4)
    states = torch.randn(len(COVERED), WIDTHS[0], generator=random)
    return heal_from_stable(states, COVERED, LAST, vocabulary_map)


def project_whole(
    heads: Heads,
    vocabulary_map: VocabularyMap,
    states: Tensor,
    anchors: Tensor,
    healing: HealingStates | None,
) -> tuple[Tensor, Tensor]:
    """Return the distributions and features of a case."""
    return project_full(
        exact_states=states,
        healing=healing,
        anchor_states=anchors,
        heads=heads,
        vocabulary_map=vocabulary_map,
    )


def probabilities(states: Tensor, head: FrozenHead) -> Tensor:
    return torch.softmax(states.double() @ head.weight.double().T, dim=-1)


def project_one(
    heads: Heads,
    exact: Tensor,
    anchor: Tensor,
    healing: Sequence[tuple[Tensor, bytes, int]],
    last: int | None = None,
) -> list[float]:
    """Return one projected distribution by plain sums in float64."""
    own = probabilities(anchor, heads.anchor).tolist()
    reach, parts = 1.0, []
    for state, covered, token in healing:
        probs = probabilities(state, heads.source).tolist()
        part = project_plainly(
            probs, own, SOURCE, ANCHOR, covered=covered, last=last, source_stops=STOPS[0]
        )
        parts.append([reach * each for each in part])
        reach *= probs[token]
    last = project_plainly(
        probabilities(exact, heads.source).tolist(),
        own,
        SOURCE,
        ANCHOR,
        source_stops=STOPS[0],
        anchor_stops=STOPS[1],
    )
    parts.append([reach * each for each in last])
    sums = [sum(column) for column in zip(*parts, strict=True)]
    return [each / sum(sums) for each in sums]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stable_and_exact_states_are_joined_as_by_plain_sums(dtype: torch.dtype) -> None:
    heads, vocabulary_map, states, anchors = make_case(dtype)
    healing = make_stable(vocabulary_map)
    found, features = project_whole(heads, vocabulary_map, states, anchors, healing)

    for row in range(len(COVERED)):
        own = [n for n, at in enumerate(healing.rows.tolist()) if at == row]
        steps = [(healing.states[n], healing.covered[n], int(healing.next_tokens[n])) for n in own]
        last = int(LAST[row])
        expected = project_one(heads, states[row], anchors[row], steps, last if last >= 0 else None)
        assert found[row].tolist() == pytest.approx(expected, abs=2e-6)
    assert found.sum(dim=1) == pytest.approx(torch.ones(len(COVERED)), abs=1e-5)
    assert features[:, FEATURES.index("top")].tolist() == found.amax(dim=1).tolist()
    entropy = -(found * found.log()).nan_to_num().sum(dim=1)
    assert features[:, 0].tolist() == pytest.approx(entropy.tolist(), abs=1e-5)
    assert features[0, 2] == features[4, 2] == features[6, 2] == 0  # no token begins with cc
    assert features[2, 2] == 0  # bc: the anchor would have written it
    assert all(0 < each < 1 for each in features[[1, 3, 5], 2].tolist())


def test_several_states_of_a_position_are_joined_along_its_branch() -> None:
    heads, vocabulary_map, states, anchors = make_case()
    random = torch.Generator().manual_seed(9)
    branch = torch.randn(4, WIDTHS[0], generator=random)
    covered, tokens = [b"abc", b"c", b"ca", b"a"], [2, 4, 4, 0]
    healing = HealingStates(
        rows=torch.tensor([1, 1, 3, 3]),
        states=branch,
        covered=covered,
        next_tokens=torch.tensor(tokens),
        anchor_tokens=torch.full((4,), -1),
    )
    found, _ = project_whole(heads, vocabulary_map, states, anchors, healing)

    for row, at in ((0, []), (1, [0, 1]), (3, [2, 3])):
        steps = [(branch[n], covered[n], tokens[n]) for n in at]
        expected = project_one(heads, states[row], anchors[row], steps)
        assert found[row].tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("written", [b"a", b"b", b"ab"])
def test_the_next_byte_is_that_of_all_texts_that_the_source_can_write(written: bytes) -> None:
    # Each history of tokens has a state of its own. ab is cut in one way only: a, b.
    source = [b"a", b"b", b"c", b"bc", b"abc", b"abca", b"bb", b"aa"]
    anchor = [b"a", b"b", b"c"]
    histories: list[tuple[int, ...]] = [()]
    for _ in range(3):
        histories += [(*h, t) for h in histories for t in range(len(source))]
    histories = list(dict.fromkeys(histories))
    random = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(len(source), len(histories), generator=random)
    of = {history: torch.softmax(logits[:, n], dim=0) for n, history in enumerate(histories)}
    next_bytes = dict.fromkeys(anchor, 0.0)

    def extend(history: tuple[int, ...], text: bytes, mass: float) -> None:
        if len(text) > len(written):
            if text.startswith(written):
                next_bytes[text[len(written) :][:1]] += mass
            return
        if written.startswith(text):
            for token, probability in enumerate(of[history].tolist()):
                extend((*history, token), text + source[token], mass * probability)

    extend((), b"", 1.0)
    branch = tuple(source.index(bytes([byte])) for byte in written)
    states = torch.eye(len(histories))
    at = [histories.index(branch[:n]) for n in range(len(branch))]
    vocabulary_map = VocabularyMap(source=source, anchor=anchor, source_stops=(), anchor_stops=())
    found, _ = project_full(
        exact_states=states[[histories.index(branch)]],
        healing=HealingStates(
            rows=torch.zeros(len(at), dtype=torch.int64),
            states=states[at],
            covered=[written[n:] for n in range(len(branch))],
            next_tokens=torch.tensor(branch),
            anchor_tokens=torch.full((len(at),), -1),
        ),
        anchor_states=torch.randn(1, 4, generator=random),
        heads=Heads(
            anchor=make_frozen(torch.randn(3, 4, generator=random)), source=make_frozen(logits)
        ),
        vocabulary_map=vocabulary_map,
    )

    total = sum(next_bytes.values())
    assert found[0].tolist() == pytest.approx([x / total for x in next_bytes.values()], rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 0])
def test_targets_are_those_of_the_whole_distributions_in_chunks_of_any_size(chunk: int) -> None:
    heads, vocabulary_map, states, anchors = make_case()
    targets = torch.tensor([0, 3, 2, 7, 9, 5, 8])
    full, features = project_whole(
        heads, vocabulary_map, states, anchors, make_stable(vocabulary_map)
    )
    found = project_targets(
        exact_states=states,
        healing=make_stable(vocabulary_map),
        anchor_states=anchors,
        heads=heads,
        vocabulary_map=vocabulary_map,
        targets=targets,
        chunk_positions=chunk,
    )

    expected = full[torch.arange(len(targets)), targets].log()
    torch.testing.assert_close(found.log_probs, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.features, features, rtol=1e-5, atol=1e-6)


def test_no_positions_give_no_targets() -> None:
    heads, vocabulary_map, states, anchors = make_case()
    found = project_targets(
        exact_states=states[:0],
        healing=None,
        anchor_states=anchors[:0],
        heads=heads,
        vocabulary_map=vocabulary_map,
        targets=torch.zeros(0, dtype=torch.int64),
    )

    assert found.log_probs.shape == (0,)
    assert found.features.shape == (0, len(FEATURES))


def test_with_equal_vocabularies_it_is_the_sources_own_distribution() -> None:
    tokens = [b"a", b"ab", b"abc", b"b", b"c", b"ca"]
    vocabulary_map = VocabularyMap(source=tokens, anchor=tokens, source_stops=(), anchor_stops=())
    random = torch.Generator().manual_seed(6)
    heads = Heads(
        anchor=make_frozen(9 * torch.randn(6, 4, generator=random)),
        source=make_frozen(3 * torch.randn(6, 4, generator=random)),
    )
    states = torch.randn(5, 4, generator=random)
    found, _ = project_full(
        exact_states=states,
        healing=None,
        anchor_states=torch.randn(5, 4, generator=random),
        heads=heads,
        vocabulary_map=vocabulary_map,
    )

    torch.testing.assert_close(
        found.double(), probabilities(states, heads.source), rtol=1e-5, atol=0
    )


def test_no_mass_of_stop_tokens_is_lost() -> None:
    heads, vocabulary_map, states, anchors = make_case()
    # a token of the source that stands for no text would share its mass with the stop tokens
    source = [each or b"a" for each in SOURCE]
    vocabulary_map = VocabularyMap(
        source=source, anchor=ANCHOR, source_stops=STOPS[0], anchor_stops=STOPS[1]
    )
    found, _ = project_whole(heads, vocabulary_map, states, anchors, None)

    stops = probabilities(states, heads.source)[:, STOPS[0][0]]
    assert found[:, STOPS[1]].sum(dim=1).tolist() == pytest.approx(stops.tolist(), rel=1e-5)


def test_parts_too_unlikely_for_float32_are_joined_all_the_same() -> None:
    heads, vocabulary_map, states, anchors = make_case()
    heads = replace(heads, source=replace(heads.source, logit_scale=60.0))
    found, features = project_full(
        exact_states=states,
        healing=make_stable(vocabulary_map),
        anchor_states=40 * anchors,
        heads=heads,
        vocabulary_map=vocabulary_map,
    )

    assert torch.isfinite(found).all()
    assert torch.isfinite(features).all()
    assert found.sum(dim=1).tolist() == pytest.approx([1.0] * len(COVERED), abs=1e-5)


def test_what_does_not_fit_together_is_refused() -> None:
    heads, vocabulary_map, states, anchors = make_case()
    small = replace(heads, source=make_frozen(torch.zeros(4, WIDTHS[0])))
    for given, match in (
        ((states[:2], None, heads), "expected 7 exact states, one for each position"),
        ((states, None, small), "source: expected a vocabulary of 4 tokens, one for each row"),
    ):
        with pytest.raises(InputError, match=match):
            project_full(
                exact_states=given[0],
                healing=given[1],
                anchor_states=anchors,
                heads=given[2],
                vocabulary_map=vocabulary_map,
            )
    healing = make_stable(vocabulary_map)
    with pytest.raises(InputError, match="healing states: expected rows below 3, got 6"):
        project_full(
            exact_states=states[:3],
            healing=healing,
            anchor_states=anchors[:3],
            heads=heads,
            vocabulary_map=vocabulary_map,
        )
