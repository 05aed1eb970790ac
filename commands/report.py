"""Analyse traces: a page to read, the numbers and the full tables."""

from pathlib import Path
from typing import Annotated

import typer

from moetools import registry
from moetools.options import JsonOption, OutOption, OverwriteOption, SeedOption


def report(
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACE", help="Trace folders; several are compared.")
    ],
    out: OutOption,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="NAME",
            help=f"Run this analysis. Repeatable. Names: {', '.join(registry.names('analyses'))}.",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", metavar="NAME", help="Leave it out. Repeatable."),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Read what is there of an incomplete trace.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="The traced checkpoint, for analyses that need weights. Repeatable.",
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            "--scores",
            help="json object or csv (group, score): accuracy of each language, to be set against "
            "its routing.",
        ),
    ] = None,
    step_from: Annotated[
        str | None,
        typer.Option(
            "--step-from",
            metavar="name|manifest",
            help="The traces follow one training run; the step is the last number in the trace's "
            "name, or in the traced model's.",
        ),
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Write the tables as CSV too.")] = False,
    expert_intervals: Annotated[
        bool,
        typer.Option("--expert-intervals", help="Intervals for single experts too; takes longer."),
    ] = False,
    seed: SeedOption = 0,
    json: JsonOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Run all analyses that the traces allow; write report.html, metrics.json and tables.

    Example: moetools report trace/ --out report/
    """
    from moetools import console
    from moetools.reporting import summary
    from moetools.reporting.report import report as write_report

    written = write_report(
        traces,
        out=out,
        only=only or (),
        skip=skip or (),
        partial=partial,
        csv=csv,
        expert_intervals=expert_intervals,
        seed=seed,
        models=model or (),
        scores=scores if scores is not None else {},
        step_from=step_from,
        overwrite=overwrite,
    )
    if json:
        console.show_json(summary.as_json(written))
    else:
        console.show(*summary.lines(written))
