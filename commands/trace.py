"""`moetools trace MODEL --data DATA --out DIR`: run a model and record its routing."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetools import console
from moetools.options import (
    BatchTokensOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    GroupColumnOption,
    IdColumnOption,
    InterventionOption,
    JsonOption,
    ModelArgument,
    OutOption,
    OverwriteOption,
    ResumeOption,
    SeedOption,
    SequenceLengthOption,
    TextColumnOption,
    TrustRemoteCodeOption,
)

if TYPE_CHECKING:
    from moetools.tracing import TraceRun


def trace(
    model: ModelArgument,
    data: DataOption,
    out: OutOption,
    text_column: TextColumnOption = "text",
    group_column: GroupColumnOption = None,
    id_column: IdColumnOption = None,
    reference_group: Annotated[
        str | None,
        typer.Option(
            help="Group that the others are compared with; en, eng and eng_Latn are found.",
            show_default=False,
        ),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Wrap each text as the turn of a user.")
    ] = False,
    pack: Annotated[bool, typer.Option("--pack", help="Join short texts of a group.")] = False,
    sequence_length: SequenceLengthOption = None,
    max_sequences: Annotated[
        int | None, typer.Option(help="Stop there; groups take turns.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Stop there; groups take turns. Hub data sets stop at 1,000,000 by themselves.",
            show_default=False,
        ),
    ] = None,
    batch_tokens: BatchTokensOption = None,
    part_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a file of the trace, the most that a killed run loses. Default 16,384 "
            "on a CPU, 65,536 on a GPU.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Keep more: logits, inputs (of the router), norms (of expert outputs), outputs "
            "(norms, largest channels, shares, collinearity), predictions, nll. Repeatable.",
            show_default=False,
        ),
    ] = None,
    keep_tokens: Annotated[
        int | None,
        typer.Option(
            help="Keep logits, inputs, norms and outputs of so many tokens, drawn at random.",
            show_default=False,
        ),
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    intervention: InterventionOption = None,
    experts_implementation: Annotated[
        str | None,
        typer.Option(
            help="eager, batched_mm or grouped_mm; chosen by default.", show_default=False
        ),
    ] = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    allow_nan: Annotated[
        bool, typer.Option("--allow-nan", help="Record NaN in router logits instead of stopping.")
    ] = False,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Run a model over texts and record which experts every router selects.

    Example: moetools trace demo --data demo --out trace/
    """
    from moetools.tracing import TraceOptions, record

    console.settings.resume_hint = "Continue with the same command and --resume."
    run = record(
        TraceOptions(
            model=model,
            data=tuple(data),
            out=out,
            text_column=text_column,
            group_column=group_column,
            id_column=id_column,
            reference_group=reference_group,
            chat_template=chat_template,
            pack=pack,
            sequence_length=sequence_length,
            max_sequences=max_sequences,
            max_tokens=max_tokens,
            batch_tokens=batch_tokens,
            part_tokens=part_tokens,
            keep=tuple(keep or ()),
            keep_tokens=keep_tokens,
            seed=seed,
            device=device,
            dtype=dtype,
            intervention=intervention,
            experts_implementation=experts_implementation,
            trust_remote_code=trust_remote_code,
            allow_nan=allow_nan,
            resume=resume,
            overwrite=overwrite,
        )
    )
    if json:
        console.show_json(summary(run))
    else:
        console.show(*lines(run, out))


def summary(run: "TraceRun") -> dict[str, Any]:
    """What was recorded, as plain values; bytes and seconds."""
    manifest = run.store.manifest
    return {
        "trace": str(run.store.path),
        "model": manifest.model,
        "coverage": manifest.coverage,
        "num_routers": len(manifest.routers),
        "num_tokens": manifest.num_tokens,
        "num_sequences": manifest.num_sequences,
        "groups": list(manifest.groups),
        "reference_group": manifest.reference_group,
        "num_dropped": manifest.data["num_dropped"],
        "stopped": manifest.data["stopped"],
        "unknown_rules": [router.name for router in manifest.routers if router.rule is None],
        "notes": list(manifest.notes),
        "dtype": manifest.dtype,
        "device": manifest.device,
        "intervention": manifest.intervention,
        "tokens_bytes": _size(run.store.path / "tokens"),
        "sequences_bytes": _size(run.store.path / "sequences"),
        "recorded_tokens": run.num_tokens,
        "seconds": round(run.seconds, 3),
    }


def lines(run: "TraceRun", out: Path) -> list[str]:
    """The summary in words, with the next command to type."""
    found = summary(run)
    selections = sum(router.top_k for router in run.store.routers) * found["num_tokens"]
    sequences = f"{found['num_sequences']:,} sequences"
    groups = found["groups"]
    if groups:
        sequences += f" in {len(groups)} groups ({_some(groups)}"
        reference = found["reference_group"]
        sequences += f"; reference {reference})" if reference else ")"
    per_expert = f" ({found['tokens_bytes'] / selections:.2f} bytes per selected expert)"
    if set(run.store.manifest.keep) - {"nll"}:
        per_expert = f" with {', '.join(run.store.manifest.keep)}"
    shown = [
        f"[bold]{run.store.manifest.title}[/bold] on {found['device']} in {found['dtype']}",
        f"  coverage   {found['coverage']}",
        f"  data       {sequences}",
        f"  size       {console.bytes_text(found['tokens_bytes'])} for tokens{per_expert}, "
        f"{console.bytes_text(found['sequences_bytes'])} for sequences",
    ]
    if found["seconds"] > 0:
        rate = found["recorded_tokens"] / found["seconds"]
        shown.append(f"  speed      {rate:,.0f} tokens/s")
    if found["num_dropped"]:
        shown.append(
            f"  dropped    {found['num_dropped']:,} texts whose id occurs in one group only"
        )
    if found["stopped"]:
        shown.append(f"  stopped    early in {_some(found['stopped'])}; --max-tokens reads more")
    if found["unknown_rules"]:
        shown.append(
            f"  rule       unknown for routers {_some(found['unknown_rules'])}: selections and "
            "weights are recorded, probabilities and margins are not"
        )
    shown += [f"  note       {note}" for note in found["notes"]]
    return [*shown, f"Next: moetools report {out} --out report/"]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _some(names: list[str], shown: int = 8) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
