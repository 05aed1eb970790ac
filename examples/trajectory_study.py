"""How the load of the embedded checkpoint's experts evolved: one page with pictures, offline.

    python examples/trajectory_study.py --out examples/trajectory-study

Fits gamma_eff, as defined by moetools, to the additive statistics of the checkpoints of one
training run (`examples/demo-trajectory/*.parquet`), and reports the traces of eight of them, which
hold logits. Every answer on the page is computed from the numbers of the run.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import moetools
from moetools import analysis
from moetools.analyses.congestion import (
    ANALYSIS,
    QUALITIES,
    LayerSums,
    draw_steps,
    step_axis,
    tabulate,
)
from moetools.analysis import select, single
from moetools.reporting import style

DATA = Path(__file__).parent / "demo-trajectory"
COLUMNS = {
    "selections": "selections",
    "probs": "softmax",
    "logprob": "log_softmax",
    "gate": "gate",
    "contribution": "contribution_norm",
}
COEFFICIENT = 0.01
"""Of the balancing loss in `examples/train_demo.py`, whose loads sum to 1 in each layer."""
AGREEMENT = 0.89
CLOSE = 0.02
PNG_DPI = 110


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A question of the study, its answer in a word, and the numbers behind it."""

    question: str
    verdict: str
    numbers: str


def checkpoint_sums(path: Path) -> tuple[list[LayerSums], np.ndarray]:
    """The layers of one checkpoint, and the tokens of each batch."""
    frame = pd.read_parquet(path).sort_values(["batch", "layer", "expert"])
    shape = tuple(frame[name].nunique() for name in ("batch", "layer", "expert"))
    sums = {
        name: frame[column].to_numpy(np.float64).reshape(shape) for name, column in COLUMNS.items()
    }
    tokens = frame.groupby("batch")["tokens"].first().to_numpy(np.int64)
    top_k = round(sums["selections"][:, 0].sum() / tokens.sum())
    layers = [
        LayerSums(
            layer=layer,
            top_k=top_k,
            sums={name: values[:, layer] for name, values in sums.items()},
        )
        for layer in range(shape[1])
    ]
    return layers, tokens


def trajectory(paths: Sequence[Path]) -> pd.DataFrame:
    """The table of the analysis `congestion` over the checkpoints, with the phases."""
    parts = []
    for path in paths:
        layers, tokens = checkpoint_sums(path)
        table = tabulate(layers, tokens, coefficient=COEFFICIENT)
        step = int(path.stem.removeprefix("step"))
        parts.append(analysis.tidy([table], trace=path.stem, step=step))
    table = pd.concat(parts, ignore_index=True)
    phases = ANALYSIS.across(table)
    assert phases is not None
    return analysis.typed([table, phases])


def by_step(table: pd.DataFrame, metric: str, quality: str | None = None) -> pd.DataFrame:
    """Rows of a metric over all layers, by step; of any quality if the metric has but one."""
    wanted = {} if quality is None else {"quality": quality}
    found = select(table, metric=metric, scope="model", **wanted)
    return found.set_index("step").sort_index()


def spelled(row: pd.Series, digits: int = 2) -> str:
    """A value with its interval."""
    if not np.isfinite(row["value"]):
        return "not determined"
    text = f"{row['value']:.{digits}f}"
    if pd.isna(row["low"]):
        return text
    return f"{text} ({row['low']:.{digits}f} to {row['high']:.{digits}f})"


def verdict(count: int, total: int, words: tuple[str, str, str] = ("yes", "no", "in part")) -> str:
    """What `count` of `total` tests with a positive outcome say."""
    return words[0] if count == total else words[1] if count == 0 else words[2]


def flatter(table: pd.DataFrame) -> Answer:
    """Whether gamma_eff is above 0, and the temperature that tells both sides."""
    gamma, temperature = by_step(table, "gamma_eff", "q1"), by_step(table, "temperature", "q1")
    above, sharper = int((gamma["low"] > 0).sum()), int((temperature["high"] < 1).sum())
    lowest, last = temperature.loc[temperature["value"].idxmin()], temperature.iloc[-1]
    return Answer(
        question="Is the load flatter than the router's own preferences (gamma_eff under q1)?",
        verdict=verdict(above, len(gamma)),
        numbers=(
            f"gamma_eff lies above 0 at {above} of {len(gamma)} checkpoints. At {sharper} of them "
            "the load is sharper than the mean probabilities: its temperature is "
            f"{spelled(lowest)} at step {lowest.name} and {spelled(last)} at step {last.name}."
        ),
    )


def phase(table: pd.DataFrame, name: str) -> tuple[Answer, int]:
    """Whether a phase of gamma_eff is resolved, under each quality; and under how many it is."""
    said, resolved = [], 0
    for quality in QUALITIES:
        row = by_step(table, name, quality).reset_index().iloc[0]
        clear = single(table, f"{name}_resolved", quality=quality) == 1
        resolved += clear
        bound = by_step(table, "at_upper_bound", quality)["value"]
        bounded = bound.loc[[int(row["from_step"]), row["step"]]].max() > 0
        word = "not resolved" + (" (layers at the upper bound of gamma)" if bounded else "")
        said.append(
            f"{quality}: none"
            if row["from_step"] == row["step"]
            else f"{quality}: step {row['from_step']:.0f} to {row['step']}, {spelled(row)}, "
            f"{'resolved' if clear else word}"
        )
    what = {"surge": "rise to its largest value", "relaxation": "fall after its largest value"}
    answer = Answer(
        question=f"Does gamma_eff {what[name]} ({name})?",
        verdict=verdict(resolved, len(QUALITIES), ("resolved", "not resolved", "in part")),
        numbers=f"Resolved under {resolved} of {len(QUALITIES)} qualities. {'; '.join(said)}.",
    )
    return answer, resolved


def plateau(table: pd.DataFrame) -> tuple[Answer, bool]:
    """Whether B stays where it is for three checkpoints or more."""
    row = by_step(table, "stabilisation").reset_index().iloc[0]
    clear = single(table, "stabilisation_resolved") == 1
    b = by_step(table, "b_load")
    return Answer(
        question="Does the imbalance B of the load stay the same for a while (stabilisation)?",
        verdict="resolved" if clear else "not resolved",
        numbers=(
            f"The longest run of checkpoints whose intervals of B all overlap goes from step "
            f"{row['from_step']:.0f}, {spelled(b.loc[row['from_step']])}, to step {row['step']}, "
            f"{spelled(b.loc[row['step']])}."
        ),
    ), clear


def shape(surge: int, plateau_resolved: bool, relaxation: int) -> Answer:
    """Whether the published shape is seen under every quality."""
    total = len(QUALITIES)
    everywhere = surge == total and plateau_resolved and relaxation == total
    nowhere = surge == 0 and relaxation == 0
    return Answer(
        question="Does the run have the published shape: surge, stabilisation, relaxation?",
        verdict="yes" if everywhere else "no" if nowhere else "not as a whole",
        numbers=(
            f"Surge under {surge}, relaxation under {relaxation} of {total} qualities, "
            f"stabilisation of B {'' if plateau_resolved else 'not '}resolved. The shape was "
            "published for two models of 7 and 8 billion parameters."
        ),
    )


def over_all(table: pd.DataFrame) -> Answer:
    """Whether the load is flatter at the end than at the start, by the temperature."""
    said, clear = [], 0
    for quality in QUALITIES:
        temperature = by_step(table, "temperature", quality)
        first, last = temperature.iloc[0], temperature.iloc[-1]
        rises = last["low"] > first["high"]
        clear += rises
        word = "rises" if rises else "falls" if last["high"] < first["low"] else "not told apart"
        said.append(f"{quality}: {spelled(first)} to {spelled(last)}, {word}")
    return Answer(
        question="Is the load flatter, against the qualities, at the end than at the start?",
        verdict=verdict(clear, len(QUALITIES)),
        numbers=(
            "Temperature of the load, which unlike gamma_eff has no bound at 1, at the first and "
            f"the last checkpoint: {'; '.join(said)}."
        ),
    )


def balance(table: pd.DataFrame) -> Answer:
    """Whether B falls because the preferences even out."""
    b, b_q = by_step(table, "b_load"), by_step(table, "b_quality", "q1")
    peak, last = int(b["value"].to_numpy().argmax()), len(b) - 1
    falls = b["high"].iloc[last] < b["low"].iloc[peak]
    evener = b_q["high"].iloc[last] < b_q["low"].iloc[peak]
    moves = "falls" if falls else "does not fall clearly"
    return Answer(
        question="Does the load even out because the preferences do?",
        verdict=("yes" if evener else "no") if falls else "the load does not even out",
        numbers=(
            f"B {moves} from {spelled(b.iloc[peak])} at step {b.index[peak]} to "
            f"{spelled(b.iloc[last])} at step {b.index[last]}; B_q, of the preferences, goes from "
            f"{spelled(b_q.iloc[peak])} to {spelled(b_q.iloc[last])}."
        ),
    )


def agreement(table: pd.DataFrame) -> Answer:
    """Whether the four qualities tell the same trajectory."""
    steps = select(table, metric="estimator_agreement_steps", scope="model")
    high = int((steps["value"] >= AGREEMENT).sum())
    bounded = [
        quality
        for quality in QUALITIES
        if (by_step(table, "at_upper_bound", quality)["value"] > 0).any()
    ]
    said = [
        f"{one}-{other} {'not determined' if pd.isna(r) else f'{r:.2f}'}"
        for one, other, r in zip(steps["quality"], steps["quality_b"], steps["value"], strict=True)
    ]
    return Answer(
        question=f"Do the four estimates of quality agree (r of at least {AGREEMENT})?",
        verdict=verdict(high, len(steps)),
        numbers=(
            f"{high} of {len(steps)} pairs over the checkpoints: {', '.join(said)}. Layers are at "
            f"the upper bound of gamma at some checkpoint under {', '.join(bounded) or 'none'}: "
            "there the load does not grow with that quality."
        ),
    )


def game(table: pd.DataFrame) -> Answer:
    """Whether the equilibrium predicts unseen loads better than a temperature."""
    mfg, scaled = by_step(table, "heldout_l1_mfg"), by_step(table, "heldout_l1_softmax")
    gamma = by_step(table, "gamma_eff", "q1")
    apart = (mfg["value"] - scaled["value"]).abs()
    congested = gamma["low"] > 0
    better = int(((mfg["high"] < scaled["low"]) & congested).sum())
    return Answer(
        question="Does the congestion game predict unseen loads better than a temperature?",
        verdict=verdict(better, len(mfg)),
        numbers=(
            f"Clearly better at {better} checkpoints where gamma_eff is above 0. Held-out L1 at "
            f"step {mfg.index[-1]}: game {spelled(mfg.iloc[-1], 3)}, temperature "
            f"{spelled(scaled.iloc[-1], 3)}; within {CLOSE} of each other at "
            f"{int((apart < CLOSE).sum())} of {len(apart)} checkpoints. Where gamma_eff is 0 the "
            "game is the preferences as they are, and the difference is what a temperature "
            "below 1, fitted by likelihood, does to L1."
        ),
    )


def types(traces: pd.DataFrame) -> Answer:
    """Whether several types of tokens predict unseen loads better than one."""
    gain, over = by_step(traces, "types_gain"), by_step(traces, "types_gain_over_softmax")
    clear, clear_over = int((gain["low"] > 0).sum()), int((over["low"] > 0).sum())
    return Answer(
        question="Do several types of tokens predict unseen loads better than one?",
        verdict=verdict(clear_over, len(over)),
        numbers=(
            f"Clearly better than the equilibrium of one type in {clear} of {len(gain)} traces "
            f"(mean {gain['value'].mean():+.0%} of its L1), than one type with a temperature in "
            f"{clear_over} ({over['value'].mean():+.0%}); one in forty would be by accident. Only "
            "the second is owed to the types: the weight beta of the quality may sharpen the load, "
            "which the equilibrium of one type cannot."
        ),
    )


def null(traces: pd.DataFrame) -> Answer:
    """Whether independent logits give the same temperature."""
    own = select(traces, metric="temperature", scope="layer", quality="q1")
    other = select(traces, metric="temperature_null", scope="layer")
    both = own.merge(other, on=["step", "layer"], suffixes=("", "_null"))
    apart = (both["low"] > both["high_null"]) | (both["high"] < both["low_null"])
    flat = int((both["low"] > both["high_null"]).sum())
    return Answer(
        question="Is the load what independent logits of each expert would give (null ii)?",
        verdict=verdict(int((~apart).sum()), len(both)),
        numbers=(
            f"In {int((~apart).sum())} of {len(both)} pairs of trace and layer the temperature of "
            f"the load is not told apart from that of the null; it is flatter in {flat} and "
            f"sharper in {int(apart.sum()) - flat}."
        ),
    )


def explicit(table: pd.DataFrame) -> Answer:
    """What the auxiliary loss alone would explain, by convention."""
    gamma = by_step(table, "gamma_eff", "q1").iloc[-1]
    own = select(table, metric="gamma_explicit", scope="model", convention="sum_1").iloc[-1]
    rest = select(table, metric="gamma_implicit", scope="model", convention="sum_1")
    rest = rest.sort_values("step").iloc[-1]
    more = gamma["low"] > own["value"]
    return Answer(
        question="Is gamma_eff more than the auxiliary loss explains?",
        verdict="yes" if more else "no" if gamma["high"] < own["value"] else "not clear",
        numbers=(
            f"The loss (coefficient {COEFFICIENT}, loads that sum to 1 in each layer) counts as "
            f"gamma_explicit = {own['value']:.2f}, if units of loss are read as units of logits; "
            f"at step {gamma.name} gamma_eff is {spelled(gamma)} and gamma_implicit "
            f"{spelled(rest)}."
        ),
    )


def scope(table: pd.DataFrame) -> Answer:
    """Whether the game describes these layers at all."""
    last = table["step"].max()
    at_end = table[table["step"] == last]
    share = single(at_end, "out_of_scope")
    return Answer(
        question="Are the layers within the scope of the congestion game?",
        verdict="no" if share == 1 else "yes" if share == 0 else "in part",
        numbers=(
            f"At step {last}, {share:.0%} of the layers are not: gamma_eff at a bound in "
            f"{single(at_end, 'out_of_scope_bound'):.0%}, the load out of equilibrium by more "
            f"than three floors in {single(at_end, 'out_of_scope_epsilon'):.0%} (epsilon "
            f"{single(at_end, 'epsilon'):.3f} nats, floor {single(at_end, 'epsilon_floor'):.3f}), "
            f"over 5 % unused experts in {single(at_end, 'out_of_scope_dead'):.0%}. k / E = "
            f"{single(at_end, 'top_k_share'):.3f}; the most loaded expert serves "
            f"{single(at_end, 'max_selection_rate'):.0%} of the tokens."
        ),
    )


def answers(table: pd.DataFrame, traces: pd.DataFrame) -> list[Answer]:
    """All questions, answered from the tables."""
    surge, num_surge = phase(table, "surge")
    relaxation, num_relaxation = phase(table, "relaxation")
    steady, is_steady = plateau(table)
    return [
        flatter(table), surge, steady, relaxation, shape(num_surge, is_steady, num_relaxation),
        over_all(table), balance(table), agreement(table), game(table), types(traces), null(traces),
        explicit(table), scope(table),
    ]  # fmt: skip


def number_table(table: pd.DataFrame) -> Iterator[str]:
    """gamma_eff under every quality, temperature, B and B_q by step, as Markdown."""
    columns = {
        **{f"gamma_eff {name}": by_step(table, "gamma_eff", name) for name in QUALITIES},
        "T, q1": by_step(table, "temperature", "q1"),
        "B": by_step(table, "b_load"),
        "B_q, q1": by_step(table, "b_quality", "q1"),
        "L1 game": by_step(table, "heldout_l1_mfg"),
        "L1 temperature": by_step(table, "heldout_l1_softmax"),
    }
    yield f"| step | {' | '.join(columns)} |"
    yield f"|--:|{'--:|' * len(columns)}"
    for step in next(iter(columns.values())).index:
        cells = [spelled(found.loc[step]) for found in columns.values()]
        yield f"| {step} | {' | '.join(cells)} |"


def types_table(traces: pd.DataFrame) -> Iterator[str]:
    """Types of tokens by step, as Markdown."""
    metrics = ("count", "beta", "gamma", "l1", "l1_single", "l1_softmax", "gain_over_softmax")
    yield "| step | C | beta | gamma | L1 types | L1 one type | L1 temperature | gain |"
    yield f"|--:|{'--:|' * len(metrics)}"
    columns = [by_step(traces, f"types_{metric}") for metric in metrics]
    for step in columns[0].index:
        cells = [
            spelled(found.loc[step], 1 if metric == "count" else 2)
            for metric, found in zip(metrics, columns, strict=True)
        ]
        yield f"| {step} | {' | '.join(cells)} |"


def prediction_figure(table: pd.DataFrame, traces: pd.DataFrame) -> Figure:
    """Held-out L1 of game and temperature, and of several types, over the steps."""
    figure, axes = style.subplots(1, 2, height=3.0)
    left, right = axes[0]
    for i, (metric, label) in enumerate((("mfg", "game"), ("softmax", "temperature"))):
        found = select(table, metric=f"heldout_l1_{metric}", scope="model")
        draw_steps(left, found, label=label, color=style.COLORS[i])
    for i, (metric, label) in enumerate(
        (("l1_single", "one type, game"), ("l1_softmax", "one type, temperature"), ("l1", "types"))
    ):
        found = select(traces, metric=f"types_{metric}", scope="model")
        draw_steps(right, found, label=label, color=style.COLORS[i])
    for ax, source in ((left, table), (right, traces)):
        step_axis(ax, sorted(int(step) for step in source["step"].unique()))
        ax.set_ylim(bottom=0)
        ax.legend()
    left.set(ylabel="held-out L1, all tokens")
    right.set(ylabel="held-out L1, sampled tokens")
    return figure


def page(table: pd.DataFrame, traces: pd.DataFrame, captions: dict[str, str]) -> str:
    """The page as Markdown."""
    num_steps = table["step"].nunique()
    tokens = int(select(table, metric="b_load", scope="model")["num_tokens"].max())
    rows = [f"| {a.question} | **{a.verdict}** | {a.numbers} |" for a in answers(table, traces)]
    pictures = [f"![{name}]({name}.png)\n\n{caption}" for name, caption in captions.items()]
    return "\n".join(
        [
            "# Router congestion over the training of the embedded checkpoint",
            "",
            f"{num_steps} checkpoints of one training run, {tokens:,} tokens in 50 batches each; "
            f"and the traces of {traces['step'].nunique()} of them, with logits, of "
            f"{int(select(traces, metric='b_load', scope='model')['num_tokens'].max()):,} tokens. "
            "All gamma_eff are as defined by moetools: how much flatter the load is than the "
            "router's own preferences. A frozen router has no congestion, whatever gamma_eff is. "
            "Numbers are means over the layers, with 95 % intervals over batches of texts.",
            "",
            "Made by `python examples/trajectory_study.py`; every answer is computed from the "
            "numbers.",
            "",
            "| question | answer | numbers |",
            "|---|---|---|",
            *rows,
            "",
            *(line for picture in pictures for line in (picture, "")),
            "## By step",
            "",
            f"q1 {QUALITIES['q1']}, q2 {QUALITIES['q2']}, q3 {QUALITIES['q3']}, q4 "
            f"{QUALITIES['q4']}; T temperature of the load; B and B_q largest over mean share of "
            "load and preferences; L1 of held-out loads.",
            "",
            *number_table(table),
            "",
            "## Types of tokens",
            "",
            "C clusters of tokens share one congestion; the gain is over one type with a "
            "temperature, on batches that neither the fit nor the choice of C saw.",
            "",
            *types_table(traces),
            "",
        ]
    )


def main() -> None:
    """Fit, draw and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "trajectory-study")
    parser.add_argument("--tables", type=Path, help="folder for the tables of the analysis")
    options = parser.parse_args()
    table = trajectory(sorted(DATA.glob("step*.parquet")))
    with tempfile.TemporaryDirectory() as folder:
        report = moetools.report(
            sorted((DATA / "traces").iterdir()),
            out=Path(folder) / "report",
            only=["congestion"],
            step_from="name",
        )
    traces = report.results.tables["congestion"]
    options.out.mkdir(parents=True, exist_ok=True)
    captions = {}
    with style.applied():
        for picture in ANALYSIS.plots(table):
            captions[picture.name] = picture.caption
            picture.figure.savefig(options.out / f"{picture.name}.png", dpi=PNG_DPI)
        prediction_figure(table, traces).savefig(options.out / "prediction.png", dpi=PNG_DPI)
    captions["prediction"] = (
        "Distance of loads of unseen texts from their predictions. Left: all tokens; right: tokens "
        "with logits, in one type and in several."
    )
    text = page(table, traces, captions)
    (options.out / "README.md").write_text(text, encoding="utf-8")
    if options.tables:
        options.tables.mkdir(parents=True, exist_ok=True)
        table.to_parquet(options.tables / "checkpoints.parquet", index=False)
        traces.to_parquet(options.tables / "traces.parquet", index=False)


if __name__ == "__main__":
    main()
