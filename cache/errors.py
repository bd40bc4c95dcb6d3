"""Every error that a user can cause, each also the matching built-in.

    CarryOnError
    |- InputError (ValueError)             a value or file given by the user is wrong
    |  |- KnownDataError                   data to append are in the store already
    |  |- NothingRightError                no sampled answer is right, or none of them is new
    |  |- DamagedFileError                 a file of a run or carry-on is not as it was written
    |- MissingError (FileNotFoundError)    a path that should be there is not
    |- MissingExtraError (ImportError)     an optional package is not installed
    |- EngineError (RuntimeError)          an inference engine failed, or does not answer
    |- DiskFullError (OSError)             the disk is full; what was finished is kept
    |- StoreError (ValueError)             something is wrong with a store
       |- DamagedStoreError                bytes differ from what was written
       |  |- UnsafePathError               a link, folder or device lies where a file was written
       |- UnfinishedStoreError             units are still to be extracted
       |- SettingMismatchError             the store was made with other settings
       |- StoreBusyError                   another process is writing to it, or to a run

Programs print these as one line and exit 2. Anything else is a bug and keeps its traceback.
"""


class CarryOnError(Exception):
    """Root of the tree; catch it to catch everything a user can cause."""


class InputError(CarryOnError, ValueError):
    """A value or a file given by the user is wrong."""


class KnownDataError(InputError):
    """Data to append to a store are in it already."""


class NothingRightError(InputError):
    """A corpus of sampled answers would be empty."""


class DamagedFileError(InputError):
    """A file of a run, lineage or carry-on is not as it was written."""


class MissingError(CarryOnError, FileNotFoundError):
    """A path that should exist does not."""


class MissingExtraError(CarryOnError, ImportError):
    """A package of an optional extra is not installed."""


class EngineError(CarryOnError, RuntimeError):
    """An inference engine failed, or does not answer; everything committed before is kept."""


class DiskFullError(CarryOnError, OSError):
    """The disk is full; everything committed before is kept."""


class StoreError(CarryOnError, ValueError):
    """Something is wrong with a store."""


class DamagedStoreError(StoreError):
    """Stored bytes differ from what was written."""

    def __init__(self, problem: str, *, fix: str = "carryon verify, then carryon repair") -> None:
        """Say what is damaged, and what to do."""
        super().__init__(f"{problem}. Fix: {fix}")
        self.problem = problem


class UnsafePathError(DamagedStoreError):
    """A link, folder, pipe or device lies where a regular file was written; also in a run."""


class UnfinishedStoreError(StoreError):
    """The store has units that are planned but not extracted."""


class SettingMismatchError(StoreError):
    """The store was made with other settings than the ones given."""


class StoreBusyError(StoreError):
    """Another process is writing to the store, run, sweep or lineage."""
