"""Make the edit of a patch file again on the checkpoint that it was made for."""

from pathlib import Path

from moetools.checkpoint import Checkpoint
from moetools.patches import Patch
from moetools.writing import WriteOptions, WrittenCheckpoint, check_destination, write_checkpoint


def apply(
    model: str | Path, patch: str | Path, *, out: str | Path, options: WriteOptions | None = None
) -> WrittenCheckpoint:
    """Write the checkpoint that an edit made, from the edit's patch; byte for byte the same.

    Args:
        model: The checkpoint that the patch was made for: a folder, a hub id or `demo`.
        patch: The patch file.
        out: The new folder.
        options: How it is written.

    Raises:
        EditError: The patch is damaged, no patch, or was made for another checkpoint.
        MoEToolsError: The output may not be written, or the model is refused.
    """
    opened = Patch(Path(patch))
    checkpoint = Checkpoint.open(str(model), trust_remote_code=True)  # none of it is run here
    inputs = (opened.path,)
    check_destination(checkpoint, Path(out), options, inputs=inputs)
    plan = opened.plan(checkpoint)
    return write_checkpoint(plan, Path(out), options=options, inputs=inputs)
