"""A multilingual study of the embedded checkpoint: one page with pictures, offline, in a minute.

    python examples/multilingual_study.py --out examples/multilingual-study

Records the routing of the embedded checkpoint on 30 articles in 18 languages, runs the analysis
`multilingual`, and writes `README.md` with pictures. Every answer on the page is computed from the
numbers of the run; nothing is said that another run could not unsay.
"""

import argparse
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import moetools
from moetools import analysis, registry
from moetools.analyses.multilingual import beyond_allowance
from moetools.analysis import select, single
from moetools.profiles import correlation
from moetools.reporting import style
from moetools.texts import read_texts
from moetools.trace_store import TraceStore

TAU = 0.2
LEVEL = 0.05
NUM_PERMUTATIONS = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A question of the study, its answer in a word, and the numbers behind it."""

    question: str
    verdict: str
    numbers: str


def verdict(count: int, total: int) -> str:
    """What `count` of `total` tests with a positive outcome say."""
    if total == 0:
        return "unknown"
    return "yes" if count == total else "no" if count == 0 else "in part"


def spelled(row: pd.Series, digits: int = 3) -> str:
    """A value with its interval."""
    if not np.isfinite(row["value"]):
        return "not determined"
    text = f"{row['value']:.{digits}f}"
    if pd.isna(row["low"]):
        return text
    return f"{text} ({row['low']:.{digits}f} to {row['high']:.{digits}f})"


def only(table: pd.DataFrame, metric: str, scope: str = "model", **wanted: object) -> pd.Series:
    """The only row of a metric over all layers."""
    found = select(table, metric=metric, scope=scope, layer=None, **wanted)
    assert len(found) == 1, (metric, len(found))
    return found.iloc[0]


def beyond_noise(table: pd.DataFrame) -> Answer:
    """Whether every language differs from the reference by more than the halves of both texts."""
    excess = select(table, metric="divergence_excess", scope="group")
    whole, layers = excess[excess["layer"].isna()], excess[excess["layer"].notna()]
    clear, clear_layers = (int(beyond_allowance(table, part).sum()) for part in (whole, layers))
    return Answer(
        question="Is every language routed differently from English, beyond noise?",
        verdict=verdict(clear, len(whole)),
        numbers=(
            f"{clear} of {len(whole)} languages, and {clear_layers} of {len(layers)} combinations "
            "of language and layer, lie above what the halves of the same two articles show, and "
            "above what their unequal lengths may leave in that; on average by "
            f"{spelled(only(table, 'divergence_excess'))}, where lengths may leave "
            f"{single(table, 'divergence_excess_allowance'):.3f}."
        ),
    )


def bend(table: pd.DataFrame, metric: str, title: str) -> Answer:
    """Whether the middle layers differ less than both ends."""
    allowed = select(table, metric=f"{metric.removesuffix('_u')}_allowance", scope="model")
    allowance = float(allowed["value"].iloc[0]) if len(allowed) else 0.0
    ends = [only(table, metric, end=end) for end in ("first", "last")]
    of_group = select(table, metric=metric, scope="group")
    beyond = beyond_allowance(table, of_group) if len(allowed) else of_group["low"] > 0
    both = beyond.groupby(of_group["group"]).all()
    layers = select(table, metric=metric.removesuffix("_u"), scope="layer")
    lowest = layers.iloc[int(layers["value"].to_numpy(float).argmin())]
    return Answer(
        question=title,
        verdict=verdict(sum(row["low"] > allowance for row in ends), 2),
        numbers=(
            f"The first quarter of the layers lies {spelled(ends[0])} above the middle, the last "
            f"quarter {spelled(ends[1])}; lowest is layer {lowest['layer']}, {spelled(lowest)}. "
            f"Each on its own, {int(both.sum())} of {len(both)} languages rise at both ends."
            + (
                f" Unequal lengths may leave {allowance:.3f} on average, and a rise counts only "
                "above that."
                if allowance
                else ""
            )
        ),
    )


def scale(table: pd.DataFrame) -> Answer:
    """Whether different reference texts can be told from halves of one."""
    layers = select(table, metric="divergence_ratio", scope="layer")
    known = int(layers["value"].notna().sum())
    ratio = only(table, "divergence_ratio")
    other = single(table, "divergence_excess_other")
    return Answer(
        question="Does the topic of an article move the routing of English?",
        verdict=verdict(known, len(layers)),
        numbers=(
            f"Different articles differ by {other:.3f} more than their halves, clearly in {known} "
            f"of {len(layers)} layers. In that unit the languages are at {spelled(ratio, 1)}: "
            "above 1, the language matters more than the topic."
        ),
    )


def same_script(table: pd.DataFrame, latin: dict[str, bool]) -> Answer:
    """Whether two languages in one script are more alike than two in different ones."""
    pairs = select(table, metric="divergence_pair", scope="pair", layer=None)
    names = sorted(latin)
    place = {name: i for i, name in enumerate(names)}
    one, other = (pairs[column].map(place).to_numpy(int) for column in ("group", "group_b"))
    value = pairs["value"].to_numpy(float)

    def gap(is_latin: np.ndarray) -> np.ndarray:
        across = is_latin[..., one] != is_latin[..., other]
        within = ~across
        return (across @ value) / across.sum(axis=-1) - (within @ value) / within.sum(axis=-1)

    labels = np.array([latin[name] for name in names])
    generator = np.random.default_rng(0)
    shuffled = generator.permuted(np.tile(labels, (NUM_PERMUTATIONS, 1)), axis=1)
    found = float(gap(labels))
    p = (1 + (gap(shuffled) >= found - 1e-12).sum()) / (1 + NUM_PERMUTATIONS)
    return Answer(
        question="Are languages in Latin script routed apart from the others?",
        verdict="yes" if p < LEVEL else "not clear",
        numbers=(
            f"Two languages across the line differ by {found:.3f} more than two on one side of it "
            f"(permutation of the {len(names)} languages, {labels.sum()} of them Latin: "
            f"p = {p:.2g})."
        ),
    )


def likelihood(table: pd.DataFrame) -> Answer:
    """Whether divergence goes with how badly the model predicts a language."""
    row, p = (only(table, f"divergence_score_{name}", correlation="pearson") for name in ("r", "p"))
    rho, p_rho = (
        only(table, f"divergence_score_{name}", correlation="spearman") for name in ("r", "p")
    )
    largest = only(table, "divergence_score_p_largest", correlation="pearson")["value"]
    layers = select(table, metric="divergence_score_r", scope="layer", correlation="pearson")
    strongest = layers.iloc[int(layers["value"].abs().to_numpy(float).argmax())]
    count = only(table, "divergence_score_num_groups")["value"]
    significant = [p["value"] < LEVEL, p_rho["value"] < LEVEL]
    direction = "yes" if row["value"] < 0 else "no, the opposite"
    return Answer(
        question="Are languages that the model predicts better routed more like English?",
        verdict=direction if all(significant) else "not clear",
        numbers=(
            f"Over {count:.0f} languages, divergence and minus the nats of an article: r = "
            f"{spelled(row, 2)}, p = {p['value']:.2g}; by ranks {spelled(rho, 2)}, p = "
            f"{p_rho['value']:.2g} (yes takes both below {LEVEL}). Strongest in layer "
            f"{strongest['layer']}, r = {strongest['value']:.2f}; for the best of {len(layers)} "
            f"layers p = {largest:.2g}."
        ),
    )


def likelihood_within(table: pd.DataFrame, latin: dict[str, bool]) -> Answer:
    """The same among languages of one script, which removes the script as an explanation."""
    value = select(table, metric="divergence", scope="group", layer=None).set_index("group")
    score = select(table, metric="score", scope="group").set_index("group")["value"]
    texts, significant = [], []
    for name, wanted in (("Latin script", True), ("other scripts", False)):
        chosen = [group for group in value.index if latin[group] is wanted]
        x, y = score[chosen].to_numpy(float), value.loc[chosen, ["value"]].to_numpy(float)
        found = correlation(x, y, ranks=True)
        significant.append(bool(found.p[0] < LEVEL and found.r[0] < 0))
        texts.append(
            f"{len(chosen)} languages in {name}: by ranks {found.r[0]:.2f} ({found.low[0]:.2f} to "
            f"{found.high[0]:.2f}), p = {found.p[0]:.2g}"
        )
    return Answer(
        question="Does that hold among languages of one kind of script?",
        verdict=verdict(sum(significant), len(significant)).replace("no", "not clear"),
        numbers="; ".join(texts) + ".",
    )


def own_experts(table: pd.DataFrame) -> Answer:
    """Whether languages have experts that English does not use."""
    counts = select(table, metric="num_language_experts", scope="group", layer=None, tau=TAU)
    floor = single(table, "num_language_experts_floor", tau=TAU)
    total = single(table, "num_multilingual_experts", tau=TAU)
    deltas = select(table, metric="frequency_delta")
    num_experts = len(deltas[["layer", "expert"]].drop_duplicates())
    above = int((counts["value"] > floor).sum())
    most, least = (counts.sort_values("value").iloc[i] for i in (-1, 0))
    return Answer(
        question=f"Does every language have experts of its own (tau = {TAU})?",
        verdict=verdict(above, len(counts)),
        numbers=(
            f"{above} of {len(counts)} languages have more than the {floor:.1f} that two halves of "
            f"the English articles show; from {least['value']:.0f} ({least['group']}) to "
            f"{most['value']:.0f} ({most['group']}). {total:.0f} of {num_experts} experts belong "
            "to at least one language."
        ),
    )


def shared_experts(table: pd.DataFrame) -> Answer:
    """Whether pairs of languages share their experts beyond chance."""
    more, fewer, count = (
        select(table, metric=f"expert_overlap{suffix}", scope="pair", tau=TAU).dropna(
            subset=["value"]
        )
        for suffix in ("_p_more", "_p_fewer", "")
    )
    num = len(more)
    clear = more[more["value"] * num < LEVEL]
    apart = int((fewer["value"] * num < LEVEL).sum())
    text = (
        f"{len(clear)} of {num} pairs share more of their experts than random sets would, {apart} "
        f"fewer, with p below {LEVEL} after Bonferroni's correction."
    )
    if len(count):
        most = count.sort_values("value").iloc[-1]
        place = {"group": most["group"], "group_b": most["group_b"], "tau": TAU}
        expected = single(table, "expert_overlap_expected", "pair", **place)
        text += (
            f" The most: {most['group']} and {most['group_b']}, {most['value']:.0f} where chance "
            f"gives {expected:.1f}."
        )
    return Answer(
        question=f"Do two languages share these experts more than by chance (tau = {TAU})?",
        verdict=verdict(len(clear), num),
        numbers=text,
    )


def consistent(table: pd.DataFrame) -> Answer:
    """Whether tokens of one text are more alike than the language's frequencies explain."""
    found = select(table, metric="consistency", scope="group", layer=None).set_index("group")
    chance = select(table, metric="consistency_chance_skewed", scope="group", layer=None)
    chance = chance.set_index("group")["value"]
    above = found["low"] > chance[found.index]
    uniform = single(table, "consistency_chance_uniform")
    most = found["value"].astype(float).idxmax()
    return Answer(
        question="Are tokens of one article routed more alike than the frequencies explain?",
        verdict=verdict(int(above.sum()), len(above)),
        numbers=(
            f"{int(above.sum())} of {len(above)} languages. Uniform chance is {uniform:.3f}; most "
            f"consistent is {most}, {spelled(found.loc[most])}, where its own frequencies alone "
            f"give {chance[most]:.3f}."
        ),
    )


def answers(table: pd.DataFrame, latin: dict[str, bool]) -> list[Answer]:
    """All questions of the study."""
    return [
        beyond_noise(table),
        bend(table, "divergence_u", "Do the middle layers treat languages most alike (a U)?"),
        bend(table, "divergence_excess_u", "Is the U still there above the floor of each layer?"),
        scale(table),
        same_script(table, latin),
        likelihood(table),
        likelihood_within(table, latin),
        own_experts(table),
        shared_experts(table),
        consistent(table),
    ]


def latin_scripts() -> dict[str, bool]:
    """Whether most letters of each language's text are Latin."""
    found: dict[str, list[bool]] = {}
    for text in read_texts(["demo"]).texts:
        letters = (letter for letter in text.text if letter.isalpha())
        found.setdefault(text.group or "", []).extend(
            unicodedata.name(letter, "").startswith("LATIN") for letter in letters
        )
    return {group: float(np.mean(flags)) > 0.5 for group, flags in found.items()}


def language_table(table: pd.DataFrame, tokens: dict[str, float]) -> Iterator[str]:
    """One line for each language, most different first."""
    yield "| language | tokens an article | divergence | beyond noise | clear in layers | nats |"
    yield "| --- | --- | --- | --- | --- | --- |"
    value = select(table, metric="divergence", scope="group", layer=None)
    for _, row in value.sort_values("value", ascending=False).iterrows():
        group = row["group"]
        excess = select(table, metric="divergence_excess", scope="group", group=group)
        layers = excess[excess["layer"].notna()]
        nats = -single(table, "score", "group", group=group)
        yield (
            f"| {group} | {tokens[group]:.0f} | {spelled(row)} | "
            f"{spelled(excess[excess['layer'].isna()].iloc[0])} | "
            f"{int(beyond_allowance(table, layers).sum())} of {len(layers)} | {nats:.0f} |"
        )


def page(
    table: pd.DataFrame,
    trace: TraceStore,
    found: Sequence[Answer],
    pictures: Sequence[tuple[str, str]],
) -> str:
    """The page as Markdown."""
    routers = trace.routers
    sequences = trace.sequences(["group", "num_tokens", "id"]).to_pandas()
    by_group = sequences.groupby("group")
    tokens = (by_group["num_tokens"].sum() / by_group["id"].nunique()).to_dict()
    num_items = sequences["id"].nunique()
    longest = max(tokens, key=lambda group: tokens[group])
    reference = trace.manifest.reference_group or ""
    lines = [
        "# Does the embedded checkpoint route languages alike?",
        "",
        f"The embedded checkpoint ({len(routers)} layers, {routers[0].num_experts} experts, "
        f"top-{routers[0].top_k}) on the {num_items} articles of the Universal Declaration of "
        f"Human Rights in {len(trace.groups)} languages: {trace.num_tokens:,} tokens, the same "
        f"content in every language. The reference is {reference}. This page is written by",
        "",
        "```bash",
        "python examples/multilingual_study.py",
        "```",
        "",
        "and every answer is computed from its numbers. Intervals are 95 %, from resampling whole "
        "articles, the same in all languages; what the metrics mean is in the README, section "
        "Languages.",
        "",
        "| question | answer | numbers |",
        "| --- | --- | --- |",
        *(f"| {one.question} | **{one.verdict}** | {one.numbers} |" for one in found),
        "",
        "## Pictures",
        "",
    ]
    for name, caption in pictures:
        lines += [f"![{name}]({name}.png)", "", caption, ""]
    lines += [
        "## Languages",
        "",
        *language_table(table, tokens),
        "",
        "`beyond noise` is `divergence_excess`: halves of articles compared across languages, "
        "minus the halves of each of the two. A layer is clear where that exceeds what unequal "
        "lengths may leave. `nats` is what the model needs for an article.",
        "",
        "## What this does not show",
        "",
        f"- Where the meaning is treated alike. The tokenizer cuts an article into "
        f"{tokens[reference]:.0f} tokens of {reference} and {tokens[longest]:.0f} of {longest}. "
        "Other tokens are other inputs, whatever they mean.",
        f"- Anything about other texts: {num_items} short articles of one declaration. The "
        "intervals cover the choice of articles, not of the languages or of the training run.",
        "- Cause. Correlations over so few languages are weak evidence, and script, length and "
        "amount of training text may go together.",
        "- Experts of tasks: all texts are of one kind, so language experts could be compared only "
        "with each other.",
        "",
    ]
    return "\n".join(lines)


def study(trace: TraceStore, out: Path) -> list[Answer]:
    """Analyse a trace of the demo and write the page with its pictures."""
    results = analysis.run([trace], only=["multilingual"])
    table = results.tables["multilingual"]
    found = answers(table, latin_scripts())
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    with style.applied():
        for picture in registry.load("analyses", "multilingual").ANALYSIS.plots(table):
            picture.figure.savefig(
                out / f"{picture.name}.png", dpi=120, metadata={"Software": None}
            )
            pictures.append((picture.name, picture.caption))
    (out / "README.md").write_text(page(table, trace, found, pictures), encoding="utf-8")
    return found


def main() -> None:
    """Record, analyse, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("examples/multilingual-study"))
    parser.add_argument("--trace", type=Path, help="keep the trace here, or read it from here")
    options = parser.parse_args()
    torch.set_num_threads(1)  # of so small a model, more threads only wait for each other
    with tempfile.TemporaryDirectory() as temporary:
        path = options.trace or Path(temporary) / "trace"
        if path.exists():
            trace = TraceStore(path)
        else:
            trace = moetools.trace("demo", data="demo", out=path, keep=["nll"], device="cpu")
        for one in study(trace, options.out):
            print(f"{one.question} {one.verdict.upper()}. {one.numbers}")
    print(f"Written: {options.out / 'README.md'}")


if __name__ == "__main__":
    main()
