"""`moetools apply MODEL PATCH`: make the edit of a patch file on the checkpoint it is for."""

from pathlib import Path
from typing import Annotated

import typer

from moetools.options import (
    CarryAllOption,
    JsonOption,
    KeepOriginalsOption,
    LinkOption,
    ModelArgument,
    OutOption,
    OverwriteOption,
)


def apply(
    model: ModelArgument,
    patch: Annotated[Path, typer.Argument(metavar="PATCH", help="File that --patch wrote.")],
    out: OutOption,
    link: LinkOption = False,
    carry_all: CarryAllOption = False,
    keep_originals: KeepOriginalsOption = False,
    json: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Write the checkpoint that an edit made, from MODEL and the edit's patch file.

    The result is byte for byte what the edit wrote. A patch that was made for other tensors than
    MODEL has in their place is refused; the rest of MODEL is taken as it is.

    Example: moetools apply demo steered.patch --out steered/
    """
    from moetools import console
    from moetools.applying import apply as apply_patch
    from moetools.writing import WriteOptions, as_json, summary

    options = WriteOptions(
        overwrite=overwrite, link=link, carry_all=carry_all, keep_originals=keep_originals
    )
    written = apply_patch(model, patch, out=out, options=options)
    if json:
        console.show_json(as_json(written))
    else:
        console.show(*summary(written))
