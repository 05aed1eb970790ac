"""What a steering run is asked for: options, strengths and the routers of the named layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moetools.architectures import RouterSpec
from moetools.errors import ArchitectureError, RequestError
from moetools.probe_plan import parse_layers

AUTO: Literal["auto"] = "auto"
SPLIT_COLUMN = "split"
MAX_TOKENS = 20_000
DEFAULT_STRENGTH = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class SteerOptions:
    """What to steer and how; the options of `moetools steer`.

    Attributes:
        model: Checkpoint folder, hub id or `demo`.
        target: DATA each: texts of the task whose experts are promoted.
        generic: DATA each: texts that the task is compared with.
        layers: `A:B` (both included) or `A`, several with commas.
        tau: Smallest difference in selection frequency; `auto` takes what stands out of the noise.
        strengths: Of `soft`, in standard deviations of a token's logits, 0 to 1; several are a
            sweep, none is `DEFAULT_STRENGTH`.
        mode: `soft` adds to the logits, `hard` makes them the largest (or smallest).
        deactivate: Demote the experts that the target uses less, instead of promoting those that
            it uses more.
        tasks: Multiple-choice items to choose a strength by and to report on.
        group_column, id_column: Of these items, see `read_items`.
        split_column: Where the items say `dev` or `test`; None takes `split` where there is one.
        target_where, generic_where: `COLUMN=VALUE` each: rows of the texts to read.
        out: Folder of the new checkpoint; None writes none.
        patch: File for the edit as a patch; None writes none.
        save_intervention: File for the hook; None writes none.
        link, carry_all, keep_originals: As in `WriteOptions`.
        force: Write an edit that does not do what the hook does.
        overwrite: Replace a checkpoint or file that moetools wrote.
        text_column: Column of the texts.
        max_tokens: Tokens of target and of generic texts, each.
        sequence_length, batch_tokens, device, dtype, trust_remote_code: As in `TraceOptions`.
        seed: Of what is held out, of the halves of `tasks` and of intervals.
    """

    model: str
    target: tuple[str, ...]
    generic: tuple[str, ...]
    layers: str
    tau: float | Literal["auto"] = AUTO
    strengths: tuple[float, ...] = ()
    mode: Literal["soft", "hard"] = "soft"
    deactivate: bool = False
    tasks: str | None = None
    group_column: str | None = None
    id_column: str | None = None
    split_column: str | None = None
    target_where: tuple[str, ...] = ()
    generic_where: tuple[str, ...] = ()
    out: Path | None = None
    patch: Path | None = None
    save_intervention: Path | None = None
    link: bool = False
    carry_all: bool = False
    keep_originals: bool = False
    force: bool = False
    overwrite: bool = False
    text_column: str = "text"
    max_tokens: int = MAX_TOKENS
    sequence_length: int | None = None
    batch_tokens: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False

    @property
    def tried(self) -> tuple[float, ...]:
        """Strengths to try, smallest first; hard steering has 1."""
        if self.mode == "hard":
            return (1.0,)
        return tuple(sorted(self.strengths)) or (DEFAULT_STRENGTH,)

    @property
    def writes(self) -> bool:
        """Whether anything is written."""
        return any((self.out, self.patch, self.save_intervention))

    @property
    def changes_weights(self) -> bool:
        """Whether steering is to be folded into weights."""
        return self.out is not None or self.patch is not None


def parse_strengths(text: str) -> tuple[float, ...]:
    """Strengths as `0.5` or `0.25,0.5,1`.

    Raises:
        RequestError: Not numbers.
    """
    strengths = []
    for part in text.split(","):
        try:
            strengths.append(float(part))
        except ValueError:
            raise RequestError(
                f"--strength {text}: '{part.strip()}' is not a number. Pass one from 0 to 1, or "
                "several, such as 0.25,0.5,1."
            ) from None
    return tuple(strengths)


def parse_tau(text: str) -> float | Literal["auto"]:
    """Tau as `auto` or a number.

    Raises:
        RequestError: Neither.
    """
    if text == AUTO:
        return AUTO
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"--tau {text}: expected auto, or a number such as 0.3.") from None


def parse_mode(text: str) -> Literal["soft", "hard"]:
    """`soft` or `hard`.

    Raises:
        RequestError: Neither.
    """
    modes: dict[str, Literal["soft", "hard"]] = {"soft": "soft", "hard": "hard"}
    if text not in modes:
        raise RequestError(f"--mode {text}: expected soft or hard.")
    return modes[text]


def parse_where(pairs: Sequence[str], flag: str) -> dict[str, str]:
    """`COLUMN=VALUE` each.

    Raises:
        RequestError: Anything else.
    """
    found = {}
    for pair in pairs:
        column, separator, value = pair.partition("=")
        if not separator or not column:
            raise RequestError(f"{flag} {pair}: expected COLUMN=VALUE, such as lang=en.")
        found[column] = value
    return found


def check_options(options: SteerOptions) -> None:
    """Options that are in range and fit together.

    Raises:
        RequestError: Others.
    """
    for flag, data in (("--target", options.target), ("--generic", options.generic)):
        if not data:
            raise RequestError(f"No {flag.removeprefix('--')} texts: name them with {flag}.")
    parse_layers(options.layers)
    for flag, where in (
        ("--target-where", options.target_where), ("--generic-where", options.generic_where),
    ):  # fmt: skip
        parse_where(where, flag)
    if options.tau != AUTO and not 0 < float(options.tau) < 1:
        raise RequestError(
            f"--tau {options.tau}: expected auto, or a difference in frequency between 0 and 1."
        )
    parse_mode(options.mode)
    _check_strengths(options)
    if options.mode == "hard" and options.changes_weights:
        flag = "--out" if options.out is not None else "--patch"
        raise RequestError(
            f"{flag}: hard steering depends on every token's largest logit, which no tensor of a "
            "checkpoint can hold. Use --save-intervention, or --mode soft."
        )
    for name in ("max_tokens", "sequence_length", "batch_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise RequestError(f"--{name.replace('_', '-')} {value}: expected at least 1.")
    if options.seed < 0:
        raise RequestError(f"--seed {options.seed}: expected at least 0.")
    if options.tasks is None:
        for name in ("group_column", "id_column", "split_column"):
            if getattr(options, name) is not None:
                raise RequestError(f"--{name.replace('_', '-')} describes --tasks; add them.")


def _check_strengths(options: SteerOptions) -> None:
    shown = ",".join(f"{each:g}" for each in options.strengths)
    if options.mode == "hard" and options.strengths:
        raise RequestError(f"--strength {shown}: hard steering has none. Leave it out.")
    for strength in options.strengths:
        if not (math.isfinite(strength) and 0 < strength <= 1):
            hint = " --deactivate demotes experts." if strength < 0 else ""
            raise RequestError(
                f"--strength {strength:g}: expected more than 0 and at most 1 (standard deviations "
                f"of a token's logits).{hint}"
            )
    if len(set(options.strengths)) < len(options.strengths):
        raise RequestError(f"--strength {shown}: a strength occurs twice.")
    if len(options.strengths) > 1 and options.tasks is None and options.writes:
        raise RequestError(
            f"--strength {shown}: nothing to choose a strength by. Add --tasks, or name one "
            "strength."
        )


def pick_routers(
    specs: Sequence[RouterSpec], num_layers: int, options: SteerOptions
) -> tuple[RouterSpec, ...]:
    """The routers of the named layers that send tokens to experts of the MLP.

    Raises:
        RequestError: A layer that the model does not have, or no layer with such a router.
    """
    wanted = parse_layers(options.layers)
    known = [spec.layer for spec in specs if spec.kind == "mlp"]
    if not known:
        raise ArchitectureError(f"{options.model}: no router sends tokens to experts of an MLP.")
    if max(wanted) >= num_layers:
        raise RequestError(
            f"--layers {options.layers}: {options.model} has layers 0 to {num_layers - 1}."
        )
    chosen = tuple(spec for spec in specs if spec.layer in wanted and spec.kind == "mlp")
    if not chosen:
        raise RequestError(
            f"--layers {options.layers}: no MoE layer there. Layers with a router: "
            f"{', '.join(map(str, known))}."
        )
    return chosen
