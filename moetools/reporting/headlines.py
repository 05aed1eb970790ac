"""Which numbers a summary shows for every layer, under short headings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """A metric with fixed parameters, and what a summary calls it."""

    analysis: str
    metric: str
    heading: str
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)


_CACHE = {"rho": 2, "accounting": "strict", "cold": "hit", "pool": "layer"}

HEADLINES = (
    Headline(analysis="load", metric="load_max_over_mean", heading="busiest over mean"),
    Headline(analysis="load", metric="effective_num_experts", heading="experts in use"),
    Headline(analysis="load", metric="num_dead_experts", heading="dead"),
    Headline(analysis="entropy", metric="token_entropy_relative", heading="token entropy"),
    Headline(analysis="local_consistency", metric="srp", heading="SRP m 16", parameters={"m": 16}),
    Headline(
        analysis="local_consistency",
        metric="srp_adjusted_skewed",
        heading="SRP over chance",
        parameters={"m": 16},
    ),
    Headline(
        analysis="local_consistency",
        metric="lru",
        heading="LRU hits 2k slots",
        parameters=_CACHE,
    ),
    Headline(analysis="specialization", metric="domain_specialization", heading="group spread"),
    Headline(
        analysis="specialization",
        metric="vocabulary_specialization",
        heading="token purity",
        parameters={"vocabulary": "input"},
    ),
)


def found(metrics: Mapping[str, Any], trace: str) -> dict[Headline, dict[int | None, int]]:
    """Where the headline numbers of a trace are.

    Args:
        metrics: The document of `metrics.json`.
        trace: Name of a trace.

    Returns:
        For every headline that the document has, the places of its records: by layer, and under
        None for the whole model.
    """
    places: dict[Headline, dict[int | None, int]] = {}
    for headline in HEADLINES:
        analysis = metrics["analyses"].get(headline.analysis, {"records": []})
        for i, record in enumerate(analysis["records"]):
            if (
                record["metric"] == headline.metric
                and record["trace"] == trace
                and record["scope"] in ("model", "layer")
                and all(record.get(name) == v for name, v in headline.parameters.items())
            ):
                places.setdefault(headline, {})[record.get("layer")] = i
    return places
