"""Repair: put right what `verify` found, and nothing else.

Damaged or missing units are computed again from the tokens in the store. Documents come from the
manifest, the manifest from its copy. Damaged tokens, tables, head or probe need the corpus and
the base again; they are made anew and must have the digests that planning recorded.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from carryon.cache.atomic import json_bytes, sweep_partials, write_file
from carryon.cache.base import Base, read_head
from carryon.cache.corpus import read_corpus
from carryon.cache.errors import DamagedStoreError, InputError
from carryon.cache.layout import ROW_ARRAYS, receipt_path
from carryon.cache.lock import write_lock
from carryon.cache.manifest import BACKUP_PATH, Manifest, manifest_path, read_manifest, sha256_hex
from carryon.cache.pilot import make_probe
from carryon.cache.plan import plan_units
from carryon.cache.plan_writer import documents, plan_files, unit_rows
from carryon.cache.resume import refuse_other_base
from carryon.cache.run_units import run_units
from carryon.cache.spec import CorpusSettings, StoreSettings
from carryon.cache.verify import Problem, VerifyReport, verify


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairReport:
    """What a repair did."""

    store: str
    problems: list[Problem]
    """What was wrong before."""
    computed_units: list[int]
    rewritten_files: list[str]
    """Files of the plan that were made anew."""
    is_complete: bool
    """Whether a full verification afterwards found nothing."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)
