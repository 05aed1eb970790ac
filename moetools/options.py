"""Option types shared by subcommands; one spelling and one help text for each."""

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Checkpoint folder, hub id org/name\\[@revision], or 'demo'."
    ),
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)]
DataOption = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="[GROUP=]DATA",
        help="jsonl, json, csv, parquet or txt file, a folder of them, a hub data set "
        "org/name\\[:config]\\[@split], or 'demo'. Repeatable.",
        show_default=False,
    ),
]
TextColumnOption = Annotated[str, typer.Option("--text-column", help="Column of the text.")]
GroupColumnOption = Annotated[
    str | None,
    typer.Option(
        "--group-column",
        help="Column of what to compare: language, domain. Groups take turns up to --max-tokens.",
        show_default=False,
    ),
]
IdColumnOption = Annotated[
    str | None,
    typer.Option(
        "--id-column",
        help="Column of ids: texts of different groups with the same id are translations of each "
        "other. Others are dropped and counted.",
        show_default=False,
    ),
]
SequenceLengthOption = Annotated[
    int | None,
    typer.Option(
        "--sequence-length",
        help="Longer texts are cut into consecutive sequences. Default 512, or what the model "
        "takes.",
        show_default=False,
    ),
]
BatchTokensOption = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens",
        help="Tokens of a batch with padding. Default 2,048 on a CPU, 16,384 on a GPU.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output folder that moetools wrote.")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted run with the same options.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda\\[:n] or mps.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
TrustRemoteCodeOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint."),
]
InterventionOption = Annotated[
    Path | None,
    typer.Option(
        "--intervention",
        metavar="FILE",
        help="Steer the routers while the model runs, as the file of 'moetools steer' says.",
        show_default=False,
    ),
]
LinkOption = Annotated[
    bool,
    typer.Option(
        "--link",
        help="Hard-link weight files without changes. Writing into one of them later changes the "
        "input too.",
    ),
]
CarryAllOption = Annotated[
    bool,
    typer.Option(
        "--carry-all",
        help="Keep weights in other forms (original/, *.gguf, *.bin, ...), which are not edited.",
    ),
]
KeepOriginalsOption = Annotated[
    bool,
    typer.Option(
        "--keep-originals", help="Keep what 'revert' needs even where it is larger than 1 GiB."
    ),
]
PatchOption = Annotated[
    Path | None,
    typer.Option(
        "--patch",
        metavar="FILE",
        help="Write the edit to a small file too, for 'moetools apply'.",
        show_default=False,
    ),
]
