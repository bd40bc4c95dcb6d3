"""Steps on an accelerator: what it saves that the host does not wait for each of them.

The speeds of a loss, a step and an extraction on an accelerator are those of the benchmarks for any
device, at larger sizes.
"""

from collections.abc import Callable

from carryon.tools.bench.job import Job, in_turn, timed
from carryon.tools.bench.loss import in_fastest_way, make_loss_input
from carryon.tools.bench.step import make_step
from carryon.train.trainer.step import read_steps

AHEAD_TARGET = 1.0


def measure_steps(
    job: Job,
    *,
    tokens: int = 8192,
    width: int = 2048,
    vocabulary: int = 131_072,
    steps: int = 10,
    rounds: int = 5,
) -> None:
    """Report the speed of steps whose figures are read together against steps read one by one.

    A CPU has them at once, so there both are equal.
    """
    given = make_loss_input(positions=tokens, width=width, vocabulary=vocabulary)
    head = in_fastest_way(given.head, positions=tokens)
    step = make_step(given, head)

    def run(*, is_read: bool) -> Callable[[], None]:
        return lambda: read_steps([step(is_read) for _ in range(steps)])

    ways = {"one by one": run(is_read=True), "together": run(is_read=False)}
    seconds = in_turn({name: timed(way) for name, way in ways.items()}, rounds=rounds)
    job.report(
        "gpu.ahead",
        seconds["one by one"] / seconds["together"],
        "of the speed of steps that are read one by one",
        at_least=AHEAD_TARGET,
        device=str(head.device),
        seconds=seconds,
        steps=steps,
        tokens=2 * tokens,
        supervised=tokens,
        tokens_per_second=2 * tokens * steps / seconds["together"],
    )
