"""Report on a corpus: how many records were read and kept, and what was lost for which reason."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from carryon.cache.errors import InputError

WARN_ABOVE = 0.01
"""Fraction of records or tokens that are lost above which a loss is a warning."""

FIXES = {
    "bad row": "correct them; with --bad-rows skip they are listed in skipped.jsonl",
    "unfit for the chat template": "--chat-template FILE with one that writes every message",
    "too long, cut off": "--max-tokens N, or --long split",
    "too long, left out": "--max-tokens N, or --long split",
    "prompt longer than a sample": "--max-tokens N",
    "no file of states": "write the missing files again",
    "no target": "check --mask, --max-tokens and the records",
}
"""Reason for a loss -> the option that mends it."""
LOST_HELD_OUT = "marked held out, but gave no sample"
NOTES = {
    LOST_HELD_OUT: "check --mask and --max-tokens, or mark other records",
    "split into pieces": "",
    "one sample per turn, as the chat template rewrites earlier turns": "--turns last learns fewer",
    "turn left out, its prompt longer than a sample": "",
    "turn whose prompt is not the beginning of the finished turn": "",
    "turn that the chat template does not mark, not learned": "",
    "turn with reasoning that the chat template cuts out, learned as generation has it": "",
    "empty assistant text, not learned": "",
    "assistant speaks first, turn not learned": "",
    "control tokens within the text of a message": "",
    "target without an end token": "the model may not learn to stop: use a chat template that "
    "writes an end token of the base, or the instruct version of the base",
}
"""What happened to records without a further loss -> advice."""
_WARNED = (LOST_HELD_OUT, "target without an end token")


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Records that met one fate."""

    reason: str
    records: int
    tokens: int
    """Tokens lost; 0 where they were never counted."""
    first: str
    """Place of the first one."""

    @property
    def fix(self) -> str:
        """Return the option that mends it; empty for none."""
        return FIXES.get(self.reason) or NOTES.get(self.reason, "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Summary of reading a corpus."""

    records: int
    """Rows read, good or bad."""
    kept: int
    """Records that gave at least one sample."""
    tokens: int
    """Tokens kept."""
    losses: list[Loss] = field(default_factory=list)
    notes: list[Loss] = field(default_factory=list)
    """Counts without a loss."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        """Build from plain values.

        Raises:
            InputError: not the values of a report.
        """
        try:
            losses, notes = ([Loss(**each) for each in values[key]] for key in ("losses", "notes"))
            for item in (*losses, *notes):
                _check_counts(records=item.records, tokens=item.tokens)
                if not isinstance(item.reason, str) or not isinstance(item.first, str):
                    raise TypeError(f"reason and place of {item.reason!a:.80} as texts")
            _check_counts(**{name: values[name] for name in ("records", "kept", "tokens")})
            return cls(**{**values, "losses": losses, "notes": notes})
        except (TypeError, KeyError) as error:
            raise InputError(f"report: expected the counts of a corpus, got {error}") from error


def _check_counts(**counts: object) -> None:
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            raise TypeError(f"{name}: {count!a:.80}")


class Tally:
    """Counts while reading; tallies of consecutive shards are merged in order."""

    def __init__(self) -> None:
        """Begin at nothing."""
        self.records = self.kept = self.tokens = 0
        self._counts: dict[str, list[Any]] = {}  # reason -> records, tokens, first place

    def count(self, reason: str, *, where: str, records: int = 1, tokens: int = 0) -> None:
        """Count a record under a reason, one of FIXES or NOTES."""
        entry = self._counts.setdefault(reason, [0, 0, where])
        entry[0] += records
        entry[1] += tokens

    def merge(self, other: "Tally") -> None:
        """Add the counts of rows behind those counted so far."""
        self.records += other.records
        self.kept += other.kept
        self.tokens += other.tokens
        for reason, (records, tokens, where) in other._counts.items():
            self.count(reason, where=where, records=records, tokens=tokens)

    def report(self) -> Report:
        """Return the report, its reasons in a fixed order."""
        listed = [
            [
                Loss(reason=reason, records=entry[0], tokens=entry[1], first=entry[2])
                for reason in reasons
                if (entry := self._counts.get(reason))
            ]
            for reasons in (FIXES, NOTES)
        ]
        return Report(
            records=self.records,
            kept=self.kept,
            tokens=self.tokens,
            losses=listed[0],
            notes=listed[1],
        )


def merge_reports(reports: Sequence[Report]) -> Report:
    """Return the report on several corpora, such as the parts of a store."""
    tally = Tally()
    for report in reports:
        tally.records += report.records
        tally.kept += report.kept
        tally.tokens += report.tokens
        for loss in (*report.losses, *report.notes):
            tally.count(loss.reason, where=loss.first, records=loss.records, tokens=loss.tokens)
    return tally.report()


def format_report(report: Report) -> str:
    """Return the table that people read: records, kept, and each reason for a loss."""
    rows = [("", "count", "share", "tokens", "first")]
    rows.append(("records read", f"{report.records:,}", "", "", ""))
    share = _share(report.kept, report.records)
    rows.append(("records kept", f"{report.kept:,}", share, f"{report.tokens:,}", ""))
    for loss in (*report.losses, *report.notes):
        tokens = f"{loss.tokens:,} lost" if loss.tokens else ""
        share = _share(loss.records, report.records) if loss in report.losses else ""
        rows.append((loss.reason, f"{loss.records:,}", share, tokens, loss.first))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers, first in rows:
        cells = [value.rjust(width) for value, width in zip(numbers, widths[1:-1], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells, first]).rstrip())
    return "\n".join(lines)


def warnings(report: Report) -> list[str]:
    """Return a line for each loss of over 1 % of the records or tokens, for held-out records
    without a sample, and for targets without an end token."""
    lines = []
    all_tokens = report.tokens + sum(loss.tokens for loss in report.losses)
    for loss in report.losses:
        records, tokens = loss.records / report.records, loss.tokens / max(all_tokens, 1)
        if max(records, tokens) > WARN_ABOVE:
            lost = f", {loss.tokens:,} tokens ({tokens:.1%}) lost" if loss.tokens else ""
            lines.append(
                f"{loss.reason}: {loss.records:,} of {report.records:,} records{lost}, the first "
                f"is {loss.first}. Fix: {loss.fix}"
            )
    lines += [
        f"{note.reason}: {note.records:,} of them, the first is {note.first}. Fix: {note.fix}"
        for note in report.notes
        if note.reason in _WARNED
    ]
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""
