"""Data sets on the Hugging Face hub, as tables in its own cache; none of their code is run."""

import hashlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carryon.cache.corpus.reading.file_kinds import has_known_suffix
from carryon.cache.corpus.reading.tables import Table, list_arrow
from carryon.cache.errors import CarryOnError, InputError, MissingError
from carryon.cache.files.full_disk import disk_full_named

_WORD = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(
    rf"(?P<repo>{_WORD}/{_WORD})(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.-]+))?"
)
_PROBE_SECONDS = 10


@dataclass(frozen=True, slots=True)
class HubName:
    """A data set on the hub."""

    repo: str
    revision: str
    """Branch, tag or commit; empty for the newest."""
    split: str
    """Empty for all of them."""

    @property
    def name(self) -> str:
        """Return the name without its split."""
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


@dataclass(frozen=True, slots=True)
class HubSplit:
    """One split of a data set on the hub."""

    split: str
    table: Table
    digest: str
    """Of repository, commit, configuration and split."""


def parse_hub_name(text: str) -> HubName | None:
    """Return the data set that `name/repo`, `@revision` and `:split` name; None: it is no such.

    A name that ends as a file does, such as data/train.jsonl, is one of a file.
    """
    match = _NAME.fullmatch(text)
    if not match or has_known_suffix(match["repo"]):
        return None
    return HubName(match["repo"], match["revision"] or "", match["split"] or "")


def load_splits(
    name: HubName,
    *,
    config: str,
    choose: Callable[[Sequence[str]], Sequence[str]],
    folder: Path,
) -> list[HubSplit]:
    """Download splits of a data set, or find them in the hub's cache, also without a network.

    Args:
        name: of the data set.
        config: its configuration; empty for the only one.
        choose: takes the names of all splits and returns those to load.
        folder: of the tables.

    Raises:
        MissingError: the hub cannot be reached, or has no such data set or revision.
        InputError: the data set has no such configuration, or needs code of its own.
    """
    try:
        with disk_full_named(folder), _quiet(), _offline_if_unreachable(name):
            return _load(name, config, choose, folder)
    except CarryOnError:
        raise
    except Exception as error:  # of any library between here and the hub
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        if isinstance(error, ConnectionError):
            reason = "the hub cannot be reached, and its cache does not hold it"
        if isinstance(error, FileNotFoundError | ConnectionError):
            raise _missing(name, reason) from error
        raise InputError(
            f"{name.name}: expected a data set that can be loaded from the hub, got: {reason}"
        ) from error


def _load(
    name: HubName,
    config: str,
    choose: Callable[[Sequence[str]], Sequence[str]],
    folder: Path,
) -> list[HubSplit]:
    import datasets

    builder: Any = datasets.load_dataset_builder(
        name.repo, name=config or None, revision=name.revision or None
    )
    if name.revision and datasets.config.HF_HUB_OFFLINE and builder.hash != name.revision:
        raise _missing(name, f"the cache holds {builder.hash}, and the hub cannot be reached")
    known = list(builder.info.splits or builder.config.data_files or ())
    if known:
        choose(known)  # refused before anything is downloaded
    builder.download_and_prepare()
    loaded = []
    for split in choose(list(builder.info.splits)):
        dataset = builder.as_dataset(split=split)
        made_of = [name.repo, str(builder.hash), builder.config.name, split]
        digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        files = [Path(file["filename"]) for file in dataset.cache_files]
        table = list_arrow(files, name=f"{name.name}:{split}", digest=digest, folder=folder)
        loaded.append(HubSplit(split, table, digest))
    return loaded


@contextmanager
def _offline_if_unreachable(name: HubName) -> Iterator[None]:
    """Ask the hub for the data set once; if it does not answer, look into its cache only.

    The libraries would try again for half a minute, then do the same.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    before = datasets.config.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(name.repo, revision=name.revision or None, timeout=_PROBE_SECONDS)
    except GatedRepoError as error:
        fix = "accept its terms on the hub, then hf auth login"
        raise _missing(name, "its access is restricted", fix=fix) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403, 404):
            what = "revision" if "revision" in type(error).__name__.lower() else "data set"
            raise _missing(name, f"the hub has no such {what}") from error
        datasets.config.HF_HUB_OFFLINE = True
    except Exception:  # whatever the network has, it is not there
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _missing(name: HubName, reason: str, *, fix: str = "") -> MissingError:
    return MissingError(
        f"{name.name}: expected a file, folder or data set on the hub, got none: {reason}. "
        f"Fix: {fix or 'check the name, the folder and the connection'}"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Show progress bars of the hub's libraries on a terminal only."""
    import datasets
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty():
        yield
        return
    were_on = datasets.utils.is_progress_bar_enabled(), not are_progress_bars_disabled()
    with warnings.catch_warnings(action="ignore"):  # an environment variable may forbid it
        datasets.utils.disable_progress_bars()
        disable_progress_bars()
    try:
        yield
    finally:
        with warnings.catch_warnings(action="ignore"):
            if were_on[0]:
                datasets.utils.enable_progress_bars()
            if were_on[1]:
                enable_progress_bars()
