"""Files that the steps read, by their digests: one that was edited between two calls is noticed."""

import sys
from collections.abc import Mapping
from pathlib import Path

from carryon.cache.files.documents import digest_of
from carryon.tools.improve.plan import Plan
from carryon.train.settings_file import PRESETS

Files = Mapping[str, str]
"""File or folder as typed -> digest."""


def digest_inputs(plan: Plan) -> dict[str, Files]:
    """Return for each command the digests of the files that it reads and no command has made.

    Raises:
        InputError: a wrong rule, or a file that cannot be read.
    """
    questions = {place: _digest_data(place) for place in plan.data}
    questions |= _digest_rule(plan.rule)
    known = {place: digest for place, digest in questions.items() if digest}
    return {
        "sample": known,
        "score": known,
        "extract": _digest_config(plan.extract_config),
        "train": _digest_config(plan.train_config),
    }


def _digest_data(place: str) -> str:
    """Return the digest of a file or folder; empty for a data set on the hub."""
    from carryon.cache.corpus.sources import describe_file, list_files

    path = next(
        (path for path in map(Path, (place, place.partition(":")[0])) if path.exists()), None
    )
    if path is None:
        return ""
    files = {
        str(file.relative_to(path)): describe_file(file)["sha256"] for file in list_files([path])
    }
    return digest_of(files)


def _digest_rule(rule: str) -> dict[str, str]:
    """Return the digest of the module of a rule; of another rule nothing."""
    from carryon.train.inference.scoring.problems import AUTO
    from carryon.train.inference.scoring.rules import parse_rule

    if rule == AUTO or parse_rule(rule).module is None:
        return {}
    file = getattr(sys.modules[str(parse_rule(rule).module)], "__file__", None)
    return {rule: _digest_data(file)} if file else {}


def _digest_config(config: str) -> dict[str, str]:
    path = Path(config) if Path(config).is_file() else PRESETS.get(config)
    return {config: _digest_data(str(path))} if path else {}
