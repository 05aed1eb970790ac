"""`moetools demo`: the whole tour on the embedded checkpoint and text, offline."""

from pathlib import Path
from typing import Annotated

import typer

from moetools.options import JsonOption


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("moetools-demo"),
    json: JsonOption = False,
) -> None:
    """Trace the embedded checkpoint on the embedded text and report, offline, in about a minute.

    Replaces the folder of an earlier demo.
    """
    from dataclasses import replace

    from moetools import console
    from moetools.files import output_folder
    from moetools.reporting import summary
    from moetools.reporting.report import open_traces, write
    from moetools.tracing import TraceOptions, record

    with output_folder(out, kind="demo", overwrite=True) as folder:
        trace = folder.path / "trace"
        record(TraceOptions(model="demo", data=("demo",), out=trace))
        written = write(open_traces([trace]), folder.path)
    written = replace(written, path=out)
    if json:
        console.show_json(summary.as_json(written))
        return
    console.show(*summary.lines(written))
    console.show(
        "Next, on your own model:",
        "  moetools inspect MODEL",
        "  moetools trace MODEL --data DATA --group-column lang --id-column id --out trace/",
        "  moetools report trace/ --out report/",
    )
