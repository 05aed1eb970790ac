"""Find tokens for which rounding alone may decide which experts a router selects.

The experts of a token are the K best of E. Where the worst of them and the best of the others are
closer than rounding, another batch may exchange the two, and with them the output of the model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from moetools.architectures import RouterSpec
from moetools.hooks import InstalledHooks, router_tensor
from moetools.interventions import find_rules
from moetools.routing import ScoringRule

ROUTING_TIE = 32 * torch.finfo(torch.float32).eps
"""Margin of a selection that counts as a tie, relative to the largest logit of the token. In
float32, batches of other sizes moved the logits of the embedded checkpoint by up to a third."""


def selection_margin(
    router_logits: Tensor, top_k: int, rule: ScoringRule | None = None, bias: Tensor | None = None
) -> Tensor:
    """[T] how far each token is from other experts, relative to its largest logit.

    Args:
        router_logits: [T, E].
        top_k: K, below E.
        rule: Where the selection is not by logits alone.
        bias: [E] of the rule, where it has one.
    """
    logits = router_logits.float()
    largest = logits.abs().amax(dim=-1)
    if rule is None or (rule.bias_on is None and rule.n_group == 1):
        return _gap(logits, top_k) / largest
    scores = replace(rule, n_group=1).selection_scores(router_logits, bias)
    margin = _gap(rule.selection_scores(router_logits, bias), top_k)
    if 1 < rule.n_group > rule.topk_group:
        grouped = scores.view(len(scores), rule.n_group, -1)
        best = grouped.topk(1 if rule.group_score == "max" else 2, dim=-1).values.sum(dim=-1)
        margin = torch.minimum(margin, _gap(best, rule.topk_group))
    return margin / torch.maximum(largest, scores.abs().amax(dim=-1))


def _gap(values: Tensor, num_best: int) -> Tensor:
    best = values.topk(num_best + 1, dim=-1).values
    return best[:, -2] - best[:, -1]


class RoutingTies(InstalledHooks):
    """Hooks that watch the margins of all routers, and name the rows with a tie.

        with RoutingTies(model, routers) as ties:
            with ties.watch(numbers, mask):
                model(input_ids)
            tied = ties.take()

    Args:
        model: In eager mode, in float32.
        routers: Of the model.
    """

    def __init__(self, model: Any, routers: Sequence[RouterSpec]) -> None:
        super().__init__()
        self._model = model
        self._routers = [spec for spec in routers if spec.top_k < spec.num_experts]
        self._closest: Tensor | None = None
        self._watching = 0
        self._found: set[int] = set()

    def __enter__(self) -> Self:
        ruled = [s for s in self._routers if s.correction_bias_name or (s.n_group or 1) > 1]
        rules = find_rules(self._model, ruled)
        for spec in self._routers:
            bias = router_tensor(self._model, spec.correction_bias_name)
            module = self._model.get_submodule(spec.module)
            hook = self._hook(spec, rules.get(spec.name), bias)
            self._handles.append(module.register_forward_hook(hook))
        return self

    @contextmanager
    def watch(self, numbers: Sequence[int], mask: Tensor) -> Iterator[None]:
        """Watch one forward pass.

        Args:
            numbers: [B] what each row of the batch is called.
            mask: [B, L] tokens that count.
        """
        self._closest, self._watching = None, mask.numel()
        yield
        closest, self._closest, self._watching = self._closest, None, 0
        if closest is not None:
            tied = (closest.cpu().reshape(mask.shape) < ROUTING_TIE) & mask.cpu()
            self._found.update(numbers[row] for row in tied.any(dim=1).nonzero()[:, 0].tolist())

    def take(self) -> list[int]:
        """Rows with a tie since the last call, by their numbers."""
        found, self._found = sorted(self._found), set()
        return found

    def _hook(self, spec: RouterSpec, rule: ScoringRule | None, bias: Tensor | None) -> Any:
        def router_ran(module: Any, args: tuple[Any, ...], output: Any) -> None:
            for value in output if isinstance(output, tuple) else (output,):
                if (
                    isinstance(value, Tensor)
                    and value.is_floating_point()
                    and value.numel() == self._watching * spec.num_experts
                    and value.shape[-1] == spec.num_experts
                ):
                    logits = value.reshape(-1, spec.num_experts)
                    margin = selection_margin(logits, spec.top_k, rule, bias)
                    if self._closest is not None:
                        margin = torch.minimum(self._closest, margin.to(self._closest.device))
                    self._closest = margin
                    return

        return router_ran
