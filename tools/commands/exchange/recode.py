"""`carryon recode`: a store in another profile."""

from dataclasses import asdict
from typing import Any, Literal

from carryon.tools.cli.output import print_result


def recode(
    store: str,
    /,
    *,
    out: str,
    profile: Literal["exact", "raw", "near", "compact"],
) -> dict[str, Any]:
    """Write a copy of a store in another profile, without its base.

    The copy has the same samples, ids, marks, head and probe. `exact` and `raw` hold the same
    bits, both ways. A lossy store can only be copied as `raw`; carryon inspect then says whose
    rounding its states have. After an interruption the same command resumes. The last line on
    stdout is a JSON line.

    Example:
        carryon recode store --out store-raw --profile raw

    Args:
        store: Folder of a finished store, which is not changed.
        out: A new folder, or that of an interrupted recoding of the same store.
        profile: Profile of the copy: `exact` keeps every bit; `raw` too, not compressed; `near`
            and `compact` are smaller and record their error.
    """
    from carryon.cache.exchange.recoding import recode as recode_store

    report = recode_store(store, out=out, profile=profile)
    return print_result(
        asdict(report),
        f"{report.store}: profile {report.profile}, {report.num_tokens:,} tokens in "
        f"{report.num_units:,} units, {report.recoded_units:,} written now in "
        f"{report.elapsed_s:,.0f} s; {report.stored_bytes / 1e6:,.1f} MB of "
        f"{report.raw_bytes / 1e6:,.1f} MB raw",
    )
