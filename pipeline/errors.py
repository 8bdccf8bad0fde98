"""The kinds of failure that a user can mend; each message says what went wrong, where, and how to fix it."""

from pipeline.redaction import redact


class PipelineError(Exception):
    """A run can't go on. The command line prints the message as one line and exits with 1.

    Messages name files, and a URL may hold credentials: they are masked here, wherever the message goes.
    """

    exit_code = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class UsageError(PipelineError):
    """The command or its settings are wrong: nothing was started. Exits with 2."""

    exit_code = 2


class StorageError(PipelineError):
    """A file can't be read or written where it is: refused, no room, no such bucket."""


class StorageFullError(StorageError):
    """There is no room for a file: the disk is full, a quota is used up, or a file may not grow so large."""


class StorageUnavailableError(StorageError):
    """A server can't be reached or keeps failing; the same command may succeed later."""


class LostProcessError(PipelineError):
    """A process that works for this one, or together with it, died or answers no more; what was finished is kept."""


class ManifestError(PipelineError):
    """A dataset's manifest, class list or segments file is missing, malformed or contradicts itself."""


class ShardError(PipelineError):
    """A tar shard is missing, damaged, or not what the manifest says it is."""


class DecodeError(PipelineError):
    """One clip's bytes can't be turned into a waveform; `reason` is a short fixed phrase that can be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["DecodeError"], tuple[str, str]]:
        return DecodeError, (self.reason, self.detail)


class LogitStoreError(PipelineError):
    """A logit store is missing, damaged, or was made for something else."""


class ForeignLogitsError(PipelineError):
    """Logits that another program made can't be taken over: damaged, contradictory, or not of these clips."""


class CheckpointError(PipelineError):
    """A checkpoint is missing, damaged, or does not fit the model it is loaded into."""


class TooManyFailuresError(PipelineError):
    """More clips failed than the run allows. Everything that could be done was done and is kept."""


class VerificationError(PipelineError):
    """A dataset, a store or a run is not as it should be; the faults were listed."""


class TrainingDivergedError(PipelineError):
    """A loss or a gradient is no longer a finite number; the weights and checkpoints from before it are kept."""
