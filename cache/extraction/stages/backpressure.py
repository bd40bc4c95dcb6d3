"""Which stage of an extraction holds up the others, from what the forward passes waited for."""

from collections.abc import Mapping

FORWARD = "forward"
_LEAST_RATIO = 0.05


def limiting_stage(waited_s: Mapping[str, float], elapsed_s: float) -> str:
    """Return the stage that is the limit; empty where no time has passed.

    Queues between the stages are bounded, so the forward passes wait for whichever is slower than
    they are: `read` (tokens to batches), `encode` (compress) or `write` (to the disk). Where they
    hardly wait, the limit is `forward`.

    Args:
        waited_s: seconds that the forward passes waited, by stage.
        elapsed_s: seconds that they took, waits and all.
    """
    if elapsed_s <= 0:
        return ""
    slowest = max(waited_s, key=lambda stage: waited_s[stage])
    return slowest if waited_s[slowest] > _LEAST_RATIO * elapsed_s else FORWARD


def stage_seconds(waited_s: Mapping[str, float], elapsed_s: float) -> dict[str, float]:
    """Return the seconds of the forward passes, and those they waited for each other stage."""
    forward_s = max(0.0, elapsed_s - sum(waited_s.values()))
    return {FORWARD: round(forward_s, 3)} | {k: round(v, 3) for k, v in waited_s.items()}
