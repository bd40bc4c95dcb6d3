"""Projection of a source's next-token distribution onto the vocabulary of the anchor.

At a position the anchor has written the bytes P. The source's state over its own tokens of exactly
P, the *exact* state, gives the distribution of what follows if a token of the source ends there.
Often one would not: P may end inside a word that the source writes as one token, and in text it
never ends a token there, so its exact distribution is off. Token healing steps back to a state
before it, with P up to some bytes c, and takes the tokens that begin with c and are longer.

Both are joined by their probabilities. Behind the last token that no later byte can change, the
source's tokens of P are t_1 .. t_K; s_0 is the state before t_1, s_k the one after t_k, s_K the
exact state, and c_k the bytes of P behind s_k. Then

    reach_k = P(t_1 | s_0) * ... * P(t_k | s_(k-1))
    cross_k = sum of P(b | s_k) over the tokens b that begin with c_k, are longer, and are not
              contradicted by the anchor's last token
    mass    = sum_(k<K) reach_k * cross_k + reach_K

and each part is given to the anchor's tokens by the rule of `vocabulary_map`, weighted by its part
of `mass`. That is the distribution of what follows given the bytes P, over all paths that leave
t_1 .. t_K only to cross the position. Two approximations: other cuts of the same bytes into tokens
are left out, which a tokenizer of one canonical cut hardly ever writes; and where only s_0 is known
and K > 1, t_2 .. t_K are taken as certain, and tokens that cross from between them left out. For
K = 1 nothing but other cuts is left out.

Letters: n positions, m healing states, V_A tokens of the anchor, V_B of the source.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from carryon.cache.errors import InputError
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.mixing.healing import HealingStates
from carryon.train.mixing.logits import log_probabilities
from carryon.train.mixing.vocabulary_map import Spread, VocabularyMap

CHUNK_BYTES = 256 << 20
"""Of the distributions that are held at one time; a position takes 4 (V_A + 2 V_B) and copies."""
LEAST = 1e-30
"""Probability that the anchor's tokens are taken to have at least, so that parts of it divide."""
FEATURES = ("entropy", "top", "crossing", "anchor_entropy", "anchor_top")
"""Of a position: entropy (nats) and highest probability of the projected distribution, the part of
`mass` whose token crosses the position, and entropy and highest probability of the anchor."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Heads:
    """Heads of both bases."""

    anchor: FrozenHead
    source: FrozenHead


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProjectedTargets:
    """What is kept of a projection: small numbers for each position."""

    log_probs: Tensor
    """[n] float32, on the host: log-probability of the target, at least log(LEAST)."""
    features: Tensor
    """[n, FEATURES] float32, on the host."""


@torch.no_grad()
def project_targets(
    *,
    exact_states: Tensor,
    healing: HealingStates | None,
    anchor_states: Tensor,
    heads: Heads,
    vocabulary_map: VocabularyMap,
    targets: Tensor,
    chunk_positions: int = 0,
) -> ProjectedTargets:
    """Return the projected log-probability of each target, in chunks; see `project_full`.

    Args:
        exact_states: [n, D_B] of the source.
        healing: states before them; None heals nothing.
        anchor_states: [n, D_A] of the anchor at the same positions.
        heads: of both.
        vocabulary_map: of source and anchor.
        targets: [n] int64: the anchor's next token.
        chunk_positions: positions of a chunk. 0: as many as fit CHUNK_BYTES.
    """
    _check(exact_states, healing, anchor_states, heads, vocabulary_map)
    size = chunk_positions or positions_at_once(heads)
    log_probs, features = [], []
    for start in range(0, len(exact_states), size):
        stop = min(start + size, len(exact_states))
        projected, part = _project(
            exact_states[start:stop],
            None if healing is None else healing.between(start, stop),
            anchor_states[start:stop],
            heads,
            vocabulary_map,
        )
        at = targets[start:stop].to(projected.device, torch.int64).unsqueeze(1)
        log_probs.append(projected.gather(1, at).squeeze(1).clamp_min_(LEAST).log_().cpu())
        features.append(part.cpu())
    empty = torch.zeros(0)
    return ProjectedTargets(
        log_probs=torch.cat([*log_probs, empty]),
        features=torch.cat([*features, empty.reshape(0, len(FEATURES))]),
    )


@torch.no_grad()
def project_full(
    *,
    exact_states: Tensor,
    healing: HealingStates | None,
    anchor_states: Tensor,
    heads: Heads,
    vocabulary_map: VocabularyMap,
) -> tuple[Tensor, Tensor]:
    """Return the projected distributions [n, V_A] float32 that sum to 1, and [n, FEATURES].

    Positions are independent: a part of them gives the same rows up to the rounding of the matrix
    products. On an accelerator sums are in no fixed order. Arguments are those of
    `project_targets`; all positions are held at one time.
    """
    _check(exact_states, healing, anchor_states, heads, vocabulary_map)
    states = [exact_states] if healing is None else [exact_states, healing.states]
    wide = [each.to(heads.source.device, torch.float32) for each in states]
    # one product: for a few rows it takes as long as reading the weights
    logs = log_probabilities(torch.cat(wide), heads.source)
    return _project(exact_states, healing, anchor_states, heads, vocabulary_map, source_logs=logs)


def positions_at_once(heads: Heads) -> int:
    """Return how many positions a chunk has."""
    each = 4 * (heads.anchor.vocab_size + 2 * heads.source.vocab_size)
    return max(1, CHUNK_BYTES // each)


def _project(
    exact_states: Tensor,
    healing: HealingStates | None,
    anchor_states: Tensor,
    heads: Heads,
    vocabulary_map: VocabularyMap,
    *,
    source_logs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `project_full` does; `source_logs` [n + m, V_B] are overwritten, None: computed.

    They are of the exact states, then of those before them.
    """
    logs = log_probabilities(anchor_states, heads.anchor)
    anchor_entropy = _entropy(logs)
    anchor = logs.exp_()
    anchor_top = anchor.amax(dim=1)
    anchor.clamp_min_(LEAST)
    device = anchor.device
    crossing = torch.zeros(len(anchor), device=device)
    out = torch.zeros_like(anchor)
    if healing is not None and len(healing.rows):
        known = None if source_logs is None else source_logs[len(anchor) :]
        crossing = _add_crossing_(out, healing, anchor, heads.source, vocabulary_map, known=known)
    if source_logs is None:
        exact = log_probabilities(exact_states, heads.source)
    else:
        exact = source_logs[: len(anchor)]
    exact = exact.exp_().to(device)
    _add_spread_(
        out,
        torch.arange(len(out), device=device),
        exact,
        1 - crossing,
        anchor,
        vocabulary_map.whole,
    )
    # what rounding and the least probability have added
    out.div_(out.sum(dim=1, keepdim=True))
    features = [_entropy(out.log()), out.amax(dim=1), crossing, anchor_entropy, anchor_top]
    return out, torch.stack(features, dim=1)


def _add_crossing_(
    out: Tensor,
    healing: HealingStates,
    anchor: Tensor,
    head: FrozenHead,
    vocabulary_map: VocabularyMap,
    *,
    known: Tensor | None,
) -> Tensor:
    """Add the parts that cross the positions to `out`; return their share of `mass`, [n].

    `known` are log-probabilities of the healing states, [m, V_B]; None: computed.
    """
    num_positions, device = len(out), out.device
    size = max(1, num_positions)  # as many as the exact states, so that no more is held
    parts: list[tuple[Tensor, Spread, Tensor]] = []
    log_next = torch.empty(len(healing.rows), dtype=torch.float64)
    log_cross = torch.full((len(healing.rows),), -torch.inf, dtype=torch.float64)
    for start in range(0, len(healing.rows), size):
        stop = min(start + size, len(healing.rows))
        if known is None:
            logs = log_probabilities(healing.states[start:stop], head)
        else:
            logs = known[start:stop]
        tokens = healing.next_tokens[start:stop].to(logs.device).unsqueeze(1)
        log_next[start:stop] = logs.gather(1, tokens).squeeze(1).double().cpu()
        by_bytes: dict[tuple[bytes, int], list[int]] = {}
        for number in range(start, stop):
            key = healing.covered[number], int(healing.anchor_tokens[number])
            by_bytes.setdefault(key, []).append(number)
        for (covered, anchor_token), numbers in by_bytes.items():
            spread = vocabulary_map.spread(covered)
            if not len(spread.sources):
                continue
            at = torch.tensor(numbers)
            columns = torch.from_numpy(spread.sources).to(logs.device)
            chosen = logs[(at - start).to(logs.device)[:, None], columns]
            if anchor_token >= 0:
                is_out = vocabulary_map.contradicted(covered, anchor_token)
                if is_out.all():
                    continue
                chosen[:, torch.from_numpy(is_out).to(chosen.device)] = -torch.inf
            log_sums = torch.logsumexp(chosen, dim=1, keepdim=True)
            log_cross[at] = log_sums.squeeze(1).double().cpu()
            # of total 1, however unlikely all of them are
            parts.append((at, spread, chosen.sub_(log_sums).exp_().to(device)))
    weights, crossing = _weights(healing.rows, log_next, log_cross, num_positions)
    for at, spread, mass in parts:
        scale = weights[at].float().to(device)
        _add_spread_(out, healing.rows[at].to(device), mass, scale, anchor, spread)
    return crossing.float().to(device)


def _weights(
    rows: Tensor, log_next: Tensor, log_cross: Tensor, num_positions: int
) -> tuple[Tensor, Tensor]:
    """Return the part of `mass` of each healing state, [m], and the sum of a position's, [n].

    Computed from logarithms: after some tokens that the source did not expect both parts are tiny.
    """
    total = log_next.cumsum(0)
    before = total - log_next
    # log reach_k: without what was summed before the position's first state
    starts = torch.searchsorted(rows, rows)
    log_reach = before - before[starts]
    log_parts = log_reach + log_cross
    last = torch.full((num_positions,), -torch.inf, dtype=torch.float64)
    ends = torch.searchsorted(rows, rows, right=True) - 1
    last[rows] = (total - before[starts])[ends]
    top = last.scatter_reduce(0, rows, log_parts, "amax")
    part = (log_parts - top[rows]).exp()
    whole = torch.zeros_like(last).index_add_(0, rows, part)
    has_any = torch.isfinite(top)
    rest = torch.where(has_any, (last - top).exp(), 1.0)
    mass = whole + rest
    return part / mass[rows], whole / mass


def _add_spread_(
    out: Tensor, rows: Tensor, mass: Tensor, scale: Tensor, anchor: Tensor, spread: Spread
) -> None:
    """Add the mass of tokens of the source to the anchor's tokens in some rows of `out`.

    Args:
        out: [n, V_A].
        rows: [r] int64 rows, each once, increasing.
        mass: [r, tokens of the spread].
        scale: [r] factor of each row.
        anchor: [n, V_A] the anchor's own probabilities.
        spread: where the mass goes.
    """
    device, num_rows = out.device, len(rows)
    places, members, groups = (
        torch.from_numpy(array).to(device)
        for array in (spread.places, spread.members, spread.groups)
    )
    given = torch.zeros(num_rows, spread.num_groups + 1, device=device)
    given.scatter_add_(1, places.expand(num_rows, -1), mass)
    given.mul_(scale.unsqueeze(1))
    own = anchor[rows[:, None], members] if num_rows < len(out) else anchor[:, members]
    held = torch.zeros(num_rows, spread.num_groups, device=device)
    held.scatter_add_(1, groups.expand(num_rows, -1), own)
    own.mul_(given[:, :-1].div_(held)[:, groups])
    if num_rows == len(out):  # without an index for each number
        out.scatter_add_(1, members.expand(num_rows, -1), own)
    else:
        at = (rows * out.shape[1]).unsqueeze(1) + members
        out.view(-1).index_add_(0, at.view(-1), own.view(-1))
    rest = given[:, -1]
    if bool((rest > 0).any()):
        out[rows] += rest.unsqueeze(1) * anchor[rows]


def own_features(logs: Tensor) -> Tensor:
    """Return the features of a base as a source of itself, [n, FEATURES].

    Args:
        logs: [n, V] log-probabilities.
    """
    entropy, top = _entropy(logs), logs.amax(dim=1).exp()
    return torch.stack([entropy, top, torch.zeros_like(top), entropy, top], dim=1)


def _entropy(logs: Tensor) -> Tensor:
    """Return the entropy in nats, [n], of log-probabilities [n, V]; those of 0 may be -inf."""
    kept = logs.clamp_min(-1e4)
    return -(kept.exp() * kept).sum(dim=1)


def _check(
    exact_states: Tensor,
    healing: HealingStates | None,
    anchor_states: Tensor,
    heads: Heads,
    vocabulary_map: VocabularyMap,
) -> None:
    if len(exact_states) != len(anchor_states):
        raise InputError(
            f"projection: expected {len(anchor_states):,} exact states, one for each position of "
            f"the anchor, got {len(exact_states):,}"
        )
    sizes = (
        ("source", heads.source, vocabulary_map.source),
        ("anchor", heads.anchor, vocabulary_map.anchor),
    )
    for name, head, tokens in sizes:
        if head.vocab_size != len(tokens):
            raise InputError(
                f"{name}: expected a vocabulary of {head.vocab_size:,} tokens, one for each row of "
                f"its head, got {len(tokens):,}. Fix: pass vocab_size to token_bytes"
            )
    if healing is None:
        return
    counts = {
        len(healing.rows),
        len(healing.states),
        len(healing.covered),
        len(healing.next_tokens),
    }
    if len(counts) > 1:
        raise InputError(f"healing states: expected equal lengths, got {sorted(counts)}")
    if len(healing.rows) and int(healing.rows[-1]) >= len(exact_states):
        raise InputError(
            f"healing states: expected rows below {len(exact_states):,}, got "
            f"{int(healing.rows[-1]):,}"
        )
