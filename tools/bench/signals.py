"""What the signals of a run cost: evaluations on the way, against the steps."""

from carryon.tools.bench.job import Job
from carryon.train.trainer.metrics import read_metrics
from carryon.train.trainer.trainer import train

EVALUATION_TARGET = 0.1


def measure_evaluation(job: Job, *, epochs: int = 3, sampled: int = 2048) -> None:
    """Report the seconds of evaluations during a run, per second of its steps.

    The steps sample the softmax, as they should on a large vocabulary; evaluations never do.
    """
    out = job.work / "run"
    report = train(job.open_store().root, out=out, epochs=epochs, sampled_softmax=sampled)
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "held_out_nll" in line]
    during = lines[:-1]  # the last one is on all samples, once the run is finished
    job.report(
        "evaluation.ratio",
        report.evaluate_s / report.train_s,
        "of the training time",
        at_most=EVALUATION_TARGET,
        evaluate_s=report.evaluate_s,
        train_s=report.train_s,
        last_evaluate_s=report.last_evaluate_s,
        evaluations=len(during),
        samples=during[0]["held_out_samples"],
        targets=during[0]["held_out_targets"],
        standard_error=during[-1]["held_out_nll_se"],
        held_out_samples=report.held_out_samples,
        held_out_targets=report.held_out_targets,
    )
