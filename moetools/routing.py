"""Router logits -> selected experts and weights: the scoring rules, and which one a router uses.

T tokens, E classes of a router, K selected per token, G groups.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from moetools.architectures import RouterSpec

ScoreFunction = Literal["softmax", "top_k_softmax", "sigmoid", "sqrt_softplus", "sparse_mixer"]

FITTED_TOKENS = 4096
"""Rows of the first batch that a rule is tried on."""

SCREENED_TOKENS = 64
"""Rows that rule out most rules at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringRule:
    """How a router turns logits [T, E] into K experts and their weights.

    In this order: scores from the logits, plus the correction bias for the selection alone; groups
    that are not among the best are excluded; the K best experts are selected; their unbiased
    scores are normalised, scaled, and multiplied by the expert's own scale.

    Attributes:
        top_k: K.
        score_function: `softmax` over E; `top_k_softmax`, the K best logits and a softmax over
            them; `sigmoid`; `sqrt_softplus`; `sparse_mixer`, which picks one expert after the
            other, each with a softmax over the logits within a margin of the best that is left.
        bias_on: Where the correction bias is added to select: `scores`, `logits`, or None.
        n_group: Groups of E / G neighbouring experts; 1 means none.
        topk_group: Groups that are kept per token.
        group_score: Score of a group: its best expert, or the sum of its two best.
        excluded: What an excluded expert scores: minus infinity, or zero.
        normalize_p: The selected scores are divided by their p-norm; None leaves them.
        normalize_eps: Added to that norm.
        scale: Factor on the weights.
        uses_expert_scale: Weights are multiplied by a learned factor per expert.
        num_skip_classes: Last classes of the router that select no expert; their weight is 0.
        jitter_eps: Half the relative margin of `sparse_mixer`.
        in_logits_dtype: Scores are computed in the dtype of the logits instead of float32.
        num_tokens: Tokens on which the rule was found.
        num_ties: Tokens among them whose selection differs only by a tie within rounding.
        num_exact: Tokens among them whose selection and weights it equals bit for bit.
    """

    top_k: int
    score_function: ScoreFunction
    bias_on: Literal["scores", "logits"] | None = None
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    excluded: Literal["never", "zero"] = "never"
    normalize_p: float | None = None
    normalize_eps: float = 0.0
    scale: float = 1.0
    uses_expert_scale: bool = False
    num_skip_classes: int = 0
    jitter_eps: float = 0.0
    in_logits_dtype: bool = False
    num_tokens: int = field(default=0, compare=False)
    num_ties: int = field(default=0, compare=False)
    num_exact: int = field(default=0, compare=False)

    def select(
        self,
        router_logits: Tensor,
        correction_bias: Tensor | None = None,
        expert_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Experts [T, K] int64 by selection score, best first, and weights [T, K] float32.

        Args:
            router_logits: [T, E].
            correction_bias: [E]; required where `bias_on` is set.
            expert_scale: [E]; required where `uses_expert_scale` is set.
        """
        selection = self.selection_scores(router_logits, correction_bias)
        top_k_index = selection.topk(self.top_k, dim=-1).indices
        return top_k_index, self.weights(router_logits, top_k_index, expert_scale)

    def weights(
        self, router_logits: Tensor, top_k_index: Tensor, expert_scale: Tensor | None = None
    ) -> Tensor:
        """Weights [T, K] float32 of a given selection [T, K]."""
        logits = self._typed(router_logits)
        if self.score_function == "top_k_softmax":
            weights = logits.gather(-1, top_k_index).softmax(dim=-1)
        elif self.score_function == "sparse_mixer":
            weights = self._sparse_mixer_weights(logits, top_k_index)
        else:
            weights = self._scores(logits).gather(-1, top_k_index)
        weights = weights.float()
        if self.normalize_p == 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + self.normalize_eps)
        elif self.normalize_p is not None:
            norms = weights.norm(p=self.normalize_p, dim=-1, keepdim=True)
            weights = weights / (norms + self.normalize_eps)
        if self.scale != 1:
            weights = weights * self.scale
        if self.uses_expert_scale:
            weights = weights * required(expert_scale, "expert_scale")[top_k_index].float()
        if self.num_skip_classes:
            first_skipped = router_logits.shape[-1] - self.num_skip_classes
            weights = weights.masked_fill(top_k_index >= first_skipped, 0)
        return weights

    def selection_scores(
        self, router_logits: Tensor, correction_bias: Tensor | None = None
    ) -> Tensor:
        """What the K best are taken of, [T, E] float32: biased, excluded groups at -inf or 0.

        The k-th minus the (k+1)-th of a row is the margin of that token's selection.
        """
        logits = self._typed(router_logits)
        by_logits = (
            self.score_function in ("top_k_softmax", "sparse_mixer") or self.bias_on == "logits"
        )
        scores = (logits if by_logits else self._scores(logits)).float()
        if self.bias_on is not None:
            scores = scores + required(correction_bias, "correction_bias").float().reshape(-1)
        if self.n_group == 1:
            return scores
        grouped = scores.view(len(scores), self.n_group, -1)
        if self.group_score == "max":
            of_groups = grouped.amax(dim=-1)
        else:
            of_groups = grouped.topk(2, dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(of_groups, dtype=torch.bool)
        kept.scatter_(-1, of_groups.topk(self.topk_group, dim=-1).indices, True)
        excluded = -math.inf if self.excluded == "never" else 0.0
        return grouped.masked_fill(~kept.unsqueeze(-1), excluded).flatten(-2)

    def probabilities(self, router_logits: Tensor) -> Tensor:
        """Probabilities [T, E] float32 over all experts, without selection bias or groups.

        The softmax over E; for element-wise scores (sigmoid and the like) scores divided by their
        sum.
        """
        logits = router_logits.float()
        if self.score_function in ("sigmoid", "sqrt_softplus"):
            scores = self._scores(logits)
            return scores / scores.sum(dim=-1, keepdim=True)
        return logits.softmax(dim=-1)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: A field is unknown.
        """
        unknown = set(values) - {each.name for each in fields(cls)}
        if unknown:
            raise ValueError(f"unknown fields of a scoring rule: {sorted(unknown)}")
        return cls(**values)

    def describe(self) -> str:
        """The rule in words, such as `sigmoid + bias on scores, top-8, /sum, x2.5`."""
        parts = [self.score_function + (f" + bias on {self.bias_on}" if self.bias_on else "")]
        if self.n_group > 1:
            parts.append(f"groups {self.topk_group} of {self.n_group} ({self.group_score})")
        parts.append(f"top-{self.top_k}")
        if self.normalize_p is not None:
            parts.append("/sum" if self.normalize_p == 1 else f"/{self.normalize_p:g}-norm")
        if self.scale != 1:
            parts.append(f"x{self.scale:g}")
        if self.uses_expert_scale:
            parts.append("x expert scale")
        return ", ".join(parts)

    def _typed(self, router_logits: Tensor) -> Tensor:
        return router_logits if self.in_logits_dtype else router_logits.float()

    def _scores(self, logits: Tensor) -> Tensor:
        if self.score_function == "sigmoid":
            return logits.sigmoid()
        if self.score_function == "sqrt_softplus":
            return torch.nn.functional.softplus(logits).sqrt()
        return logits.softmax(dim=-1)

    def _sparse_mixer_weights(self, logits: Tensor, top_k_index: Tensor) -> Tensor:
        """Softmax over the logits within the margin of each pick, earlier picks masked out."""
        left = logits
        weights = []
        for place in range(self.top_k):
            best = left.amax(dim=-1, keepdim=True)
            far = (best - logits) / logits.abs().clamp(min=best) > 2 * self.jitter_eps
            pick = top_k_index[:, place : place + 1]
            weights.append(left.masked_fill(far, -math.inf).softmax(dim=-1).gather(-1, pick))
            left = left.scatter(-1, pick, -math.inf)
        return torch.cat(weights, dim=-1)


def required(tensor: Tensor | None, name: str) -> Tensor:
    """The tensor.

    Raises:
        ValueError: It is None.
    """
    if tensor is None:
        raise ValueError(f"this scoring rule needs {name}")
    return tensor


def identify_rule(
    router_logits: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    spec: RouterSpec,
    correction_bias: Tensor | None = None,
    expert_scale: Tensor | None = None,
) -> ScoringRule | None:
    """The first of `fitting_rules`, or None when none fits."""
    rules = fitting_rules(
        router_logits, top_k_index, top_k_weights, spec, correction_bias, expert_scale
    )
    return rules[0] if rules else None


def fitting_rules(
    router_logits: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    spec: RouterSpec,
    correction_bias: Tensor | None = None,
    expert_scale: Tensor | None = None,
) -> tuple[ScoringRule, ...]:
    """The rules that reproduce what a model selected and how it weighted it, best first.

    Selections must agree on every token, except where the scores at the border are equal within
    rounding; weights must agree within rounding. Several rules can fit (a softmax over all that is
    normalised equals a softmax over the selected): the one that equals more tokens bit for bit
    comes first, then the likelier one.

    Args:
        router_logits: [T, E] of one batch, in the dtype of the model.
        top_k_index: [T, K] that the model selected, in any order within a row.
        top_k_weights: [T, K] that the model used.
        spec: Where the numbers of groups and scaling factors to try come from.
        correction_bias: [E] of this router.
        expert_scale: [E] of this router.
    """
    logits = router_logits[:FITTED_TOKENS].detach().cpu()
    index = top_k_index[:FITTED_TOKENS].detach().cpu()
    weights = top_k_weights[:FITTED_TOKENS].detach().cpu()
    if not len(logits) or not logits.isfinite().all() or not weights.isfinite().all():
        return ()
    bias = None if correction_bias is None else correction_bias.detach().cpu()
    scale = None if expert_scale is None else expert_scale.detach().cpu()
    fits = []
    for selecting in selection_rules(spec, bias is not None, logits.dtype):
        if tied_tokens(selecting, logits[:SCREENED_TOKENS], index[:SCREENED_TOKENS], bias) is None:
            continue
        tied = tied_tokens(selecting, logits, index, bias)
        if tied is None:
            continue
        for weighting in weighting_rules(selecting, scale is not None):
            rule = fit_scale(weighting, logits, index, weights, scale, spec)
            if rule is not None:
                equal = rule.weights(logits, index, scale).to(weights.dtype) == weights
                rule = replace(
                    rule,
                    num_tokens=len(index),
                    num_ties=int(tied.sum()),
                    num_exact=int((equal.all(dim=-1) & ~tied).sum()),
                )
                fits.append(rule)
    return tuple(sorted(fits, key=lambda rule: -rule.num_exact))


def common_rules(
    fits: Mapping[str, Sequence[ScoringRule]],
) -> dict[str, ScoringRule | None]:
    """One rule for each router, the same one wherever it fits.

    In a low precision two rules can equal the same tokens of one router by chance; the routers of
    a model together tell them apart.

    Args:
        fits: Router -> `fitting_rules`.
    """
    num_routers: Counter[ScoringRule] = Counter()
    num_exact: Counter[ScoringRule] = Counter()
    for rules in fits.values():
        for rule in rules:
            num_routers[rule] += 1
            num_exact[rule] += rule.num_exact
    return {
        name: max(rules, key=lambda rule: (num_routers[rule], num_exact[rule]), default=None)
        for name, rules in fits.items()
    }


def selection_rules(spec: RouterSpec, has_bias: bool, dtype: torch.dtype) -> Iterator[ScoringRule]:
    """Rules that differ in what they select, likely ones first."""
    groups: list[dict[str, Any]] = [{}]
    if spec.n_group and spec.topk_group and spec.n_group > 1:
        grouped = {"n_group": spec.n_group, "topk_group": spec.topk_group}
        groups = [
            {**grouped, "group_score": score, "excluded": excluded}
            for score, excluded in itertools.product(("top2_sum", "max"), ("never", "zero"))
        ] + groups
    biases = ("scores", "logits", None) if has_bias else (None,)
    dtypes = (False,) if dtype == torch.float32 else (False, True)
    functions: tuple[ScoreFunction, ...] = ("softmax", "top_k_softmax", "sigmoid", "sqrt_softplus")
    for function, bias, group, native in itertools.product(functions, biases, groups, dtypes):
        if not (bias == "logits" and function == "top_k_softmax"):
            yield ScoringRule(
                top_k=spec.top_k,
                score_function=function,
                bias_on=bias,
                num_skip_classes=spec.num_skip_classes,
                in_logits_dtype=native,
                **group,
            )
    if spec.jitter_eps is not None:
        for native in dtypes:
            yield ScoringRule(
                top_k=spec.top_k,
                score_function="sparse_mixer",
                jitter_eps=spec.jitter_eps,
                in_logits_dtype=native,
            )


def weighting_rules(rule: ScoringRule, has_expert_scale: bool) -> Iterator[ScoringRule]:
    """The rule with every way to weight what it selects."""
    norms: list[dict[str, Any]] = [{}]
    if rule.score_function not in ("top_k_softmax", "sparse_mixer"):
        norms += [{"normalize_p": 1.0}, {"normalize_p": 1.0, "normalize_eps": 1e-6}]
        norms += [{"normalize_p": 2.0}]
    for scaled, norm in itertools.product((True, False) if has_expert_scale else (False,), norms):
        yield replace(rule, uses_expert_scale=scaled, **norm)


def tied_tokens(
    rule: ScoringRule, logits: Tensor, index: Tensor, bias: Tensor | None
) -> Tensor | None:
    """Tokens [T] whose selection differs by a tie within rounding; None when others differ too."""
    scores = rule.selection_scores(logits, bias)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)
    if (chosen.sum(dim=-1) != index.shape[-1]).any():
        return None
    lowest_chosen = scores.masked_fill(~chosen, math.inf).amin(dim=-1)
    best_other = scores.masked_fill(chosen, -math.inf).amax(dim=-1)
    differs = best_other > lowest_chosen
    largest = scores.masked_fill(scores.isinf(), 0).abs().amax(dim=-1)
    if (best_other - lowest_chosen > rounding(logits.dtype) * largest)[differs].any():
        return None
    return differs


def fit_scale(
    rule: ScoringRule,
    logits: Tensor,
    index: Tensor,
    weights: Tensor,
    expert_scale: Tensor | None,
    spec: RouterSpec,
) -> ScoringRule | None:
    """The rule with the factor that turns its weights into the recorded ones, if one does."""
    mine, recorded = rule.weights(logits, index, expert_scale), weights.float()
    total = mine.sum().item()
    if total == 0 or not math.isfinite(total):
        return None
    factor = recorded.sum().item() / total
    tolerance = max(rounding(logits.dtype), rounding(weights.dtype))
    known = [1.0, 1 / spec.top_k]
    if spec.routed_scaling_factor is not None:
        known.append(float(spec.routed_scaling_factor))
    nearest = min(known, key=lambda each: abs(factor - each))
    scale = nearest if abs(factor - nearest) <= tolerance * abs(nearest) else factor
    if (mine * scale - recorded).abs().max() > tolerance * max(recorded.abs().max().item(), 1e-30):
        return None
    return replace(rule, scale=scale)


def rounding(dtype: torch.dtype) -> float:
    """Relative error to allow after a few operations in a dtype."""
    return 8 * torch.finfo(dtype).eps
