"""Every error that edgekd raises on purpose.

* EdgekdError            the user can mend it: printed as one line, exit code 1
  - ModelError           a model cannot be read, or is of a kind we do not know
    + VocabularyError    teacher and student do not share their tokens
  - DataError            training or evaluation text is missing, empty or malformed
  - RecipeError          a setting is unknown or out of range
  - OutputError          a result cannot be written where it was asked for
  - ExportError          a model cannot be written in the requested format
  - VerificationError    an artifact is not what it claims to be
  - EngineError          an engine cannot load or run a model
    + QueueFullError     too many requests wait for it already
    + EngineUnavailableError  it is loading, restarting or stopped
  - MissingExtraError    an optional package is not installed
  - DownloadError        something could not be fetched, or is not what was pinned
  - DeviceError          a device is unknown, or what describes it cannot be used
"""


class EdgekdError(Exception):
    """A failure the user can mend; the CLI prints the message and exits with 1."""


class ModelError(EdgekdError):
    """A model cannot be read, or is of a kind that edgekd does not know."""


class VocabularyError(ModelError):
    """Teacher and student do not give the same ids to the same text."""


class DataError(EdgekdError):
    """Training or evaluation text is missing, empty or malformed."""


class RecipeError(EdgekdError):
    """A setting is unknown or out of range."""


class OutputError(EdgekdError):
    """A result cannot be written where it was asked for."""


class ExportError(EdgekdError):
    """A model cannot be written in the requested format."""


class VerificationError(EdgekdError):
    """An artifact is not what it claims to be."""


class EngineError(EdgekdError):
    """An engine cannot load or run a model."""


class QueueFullError(EngineError):
    """Too many requests wait for the engine already; a later try may succeed."""


class EngineUnavailableError(EngineError):
    """The engine is loading, restarting or stopped; a later try may succeed."""


class MissingExtraError(EdgekdError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        """Name the missing ``package`` and the ``extra`` that brings it."""
        super().__init__(f"{package} is not installed; run: pip install 'edgekd[{extra}]'")


class DownloadError(EdgekdError):
    """Something could not be fetched, or is not what was pinned."""


class DeviceError(EdgekdError):
    """A device is unknown, or what describes or measures it cannot be used."""
