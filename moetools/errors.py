"""Errors that are addressed to the user.

    MoEToolsError            the input or the request is wrong: one line, exit code 2
    ├── RequestError         options that do not fit together or name nothing
    ├── CheckpointError      a checkpoint folder is missing, damaged or of a kind that is refused
    ├── ArchitectureError    the model's routers cannot be found or recorded exactly
    ├── DataError            texts, columns or ids are missing or unusable
    ├── TraceError           a trace is unreadable, incomplete, or of another format
    ├── RoutingError         a recorded router produced values that cannot be trusted
    ├── EditError            an edit does not belong here: a patch or undo of other weights
    ├── OutputError          the output folder may not be written
    └── MachineError         the machine failed, not the input (disk full, no memory): exit code 1

A message says what was expected, what was found and what to do, in the words the user typed.
Library callers get `ValueError` for arguments that no user input can cause.
"""


class MoEToolsError(Exception):
    """Base of every error that the command line prints without a traceback."""

    exit_code = 2


class RequestError(MoEToolsError):
    """Options that do not fit together, or a name that nothing answers to."""


class CheckpointError(MoEToolsError):
    """A checkpoint folder is missing, damaged, or of a kind that is refused."""


class ArchitectureError(MoEToolsError):
    """The routers of a model cannot be found or recorded exactly."""


class DataError(MoEToolsError):
    """Texts, columns or ids are missing or unusable."""


class TraceError(MoEToolsError):
    """A trace is unreadable, incomplete, or of another format version."""


class RoutingError(MoEToolsError):
    """A router produced values that cannot be trusted (NaN logits, ids out of range)."""


class EditError(MoEToolsError):
    """A patch is damaged or of another checkpoint, or an edit cannot be undone."""


class OutputError(MoEToolsError):
    """The output folder may not be written."""


class MachineError(MoEToolsError):
    """The machine failed, not the input: disk full, out of memory."""

    exit_code = 1
