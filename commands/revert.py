"""`moetools revert DIR`: undo the last edit of a checkpoint."""

from typing import Annotated

import typer

from moetools.options import JsonOption, OutOption, OverwriteOption


def revert(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="Checkpoint that an edit of moetools wrote.")
    ],
    out: OutOption,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="The input of the edit, where the edit did not keep the originals.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Undo the last edit: what is written is the edit's input, byte for byte.

    What the edit changed is checked by its sha256, before and after; the rest is taken as it is.
    Files that the edit did not carry cannot be given back; they are listed.

    Example: moetools revert steered/ --out as-before/
    """
    from moetools import console
    from moetools.reverting import revert as write_reverted
    from moetools.writing import as_json, summary

    written = write_reverted(model, out=out, base=base, overwrite=overwrite)
    if json:
        console.show_json(as_json(written))
    else:
        console.show(*summary(written))
