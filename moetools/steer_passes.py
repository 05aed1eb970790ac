"""The passes of a steering run over texts: to find experts, to hold a change against the hook.

N tokens, D documents, E experts, K selected per token, R steered experts, H channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moetools import console
from moetools.architectures import RouterSpec, get_tensor
from moetools.errors import ArchitectureError, MachineError
from moetools.hooks import NaNRoutingError, RouterRecorder, Routing, router_tensor
from moetools.interventions import (
    RouterIntervention,
    SteeredRouter,
    find_rules,
    steered_routers,
)
from moetools.opening import BATCH_TOKENS
from moetools.probe_passes import Evaluation
from moetools.routing import ScoringRule, required
from moetools.scoring import ScoredTokens, model_arguments
from moetools.steering import entered, set_agreement, spread

LINEAR_TOLERANCE = 0.05
"""Of the largest logit: how far logits may be from weight times input, in bfloat16 too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitRecording:
    """What the unchanged model did on the texts that things are found on.

    Attributes:
        ids: Router -> [N, K] selected experts, in the order of the rows.
        mean_spread: Router -> mean standard deviation over a token's logits.
        mean_score_spread: Router -> the same of the scores that its selection bias is added to;
            without the routers that have none.
        inputs: Router -> [N', H] inputs of a sample of the tokens, in the dtype of the model.
        is_linear: Router -> whether its logits are its weight times these inputs, and a constant.
    """

    ids: Mapping[str, NDArray[np.int64]]
    mean_spread: Mapping[str, float]
    mean_score_spread: Mapping[str, float]
    inputs: Mapping[str, Tensor]
    is_linear: Mapping[str, bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPass:
    """What a model, steered or not, did on the held-out texts.

    Attributes:
        index: Router -> [N, K] int16 selected experts.
        nll: [D] negative log-likelihood of each document, a sum in nats.
    """

    index: Mapping[str, Tensor]
    nll: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a strength should do to the selections of each router, from unsteered logits.

    Attributes:
        flips: Router -> [R] share of the tokens that each promoted expert enters, or each demoted
            one leaves; promoted ones first.
        changed: Router -> share of the tokens whose set changes.
    """

    flips: Mapping[str, NDArray[np.float64]]
    changed: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class NativePass(TextPass):
    """What the unchanged model did on them, and what follows from it.

    Attributes:
        predictions: By strength.
        products: Router -> [N] u.x of its inputs, for the directions asked for.
    """

    predictions: Mapping[float, Prediction]
    products: Mapping[str, Tensor]


@dataclass(kw_only=True, slots=True)
class _Sums:
    """Sums over the tokens of one router."""

    num_tokens: int = 0
    spread: float = 0.0
    score_spread: float = 0.0
    inputs: list[Tensor] = field(default_factory=list)
    is_linear: bool = True


class SteerPasses:
    """Runs one model over texts.

    Args:
        model: In evaluation mode.
        specs: The routers of the steered layers.
        device: Where the model runs.
        batch_tokens: Tokens of a batch, padding included; None chooses by device.
    """

    def __init__(
        self,
        model: Any,
        specs: Sequence[RouterSpec],
        *,
        device: torch.device,
        batch_tokens: int | None,
    ) -> None:
        self.specs = tuple(specs)
        self.rules = _known_rules(model, specs)
        self._model = model
        weight = model.get_input_embeddings().weight
        self._device = device if weight.is_meta else weight.device
        self.batch_tokens = batch_tokens or BATCH_TOKENS[device.type]

    def plan(self, evaluation: Evaluation) -> None:
        """Divide texts into batches."""
        vocab_size = self._model.config.get_text_config().vocab_size
        evaluation.plan(vocab_size=vocab_size, batch_tokens=self.batch_tokens)

    def fit(self, texts: Evaluation, sampled: NDArray[np.bool_]) -> FitRecording:
        """Record selections, spreads and inputs of the unchanged model.

        Args:
            texts: Target and generic texts.
            sampled: [N] tokens whose router inputs are kept.
        """
        keep = {"logits", "inputs"} if sampled.any() else {"logits"}
        ids = {
            spec.name: np.zeros((texts.num_tokens, spec.top_k), dtype=np.int64)
            for spec in self.specs
        }
        sums = {spec.name: _Sums() for spec in self.specs}
        weights = {s.name: router_tensor(self._model, s.weight_name) for s in self.specs}
        for tokens, routings in self._run(texts, "Finding experts", keep=frozenset(keep)):
            kept = torch.from_numpy(np.flatnonzero(sampled[tokens.numpy()]))
            for spec in self.specs:
                routing, of_router = routings[spec.name], sums[spec.name]
                logits = required(routing.router_logits, "router_logits").float()
                ids[spec.name][tokens.numpy()] = routing.top_k_index.cpu().numpy()
                of_router.num_tokens += len(logits)
                of_router.spread += float(spread(logits).cpu().double().sum())
                if self.adds_bias(spec):
                    scores = biased_scores(self.rules[spec.name], logits)
                    of_router.score_spread += float(spread(scores).cpu().double().sum())
                if routing.router_inputs is not None:
                    rows = kept.to(routing.router_inputs.device)
                    of_router.inputs.append(routing.router_inputs[rows].cpu())
                    of_router.is_linear &= _is_linear(weights[spec.name], routing)
        return FitRecording(
            ids=ids,
            mean_spread={name: each.spread / each.num_tokens for name, each in sums.items()},
            mean_score_spread={
                spec.name: sums[spec.name].score_spread / sums[spec.name].num_tokens
                for spec in self.specs
                if self.adds_bias(spec)
            },
            inputs={name: torch.cat(each.inputs) for name, each in sums.items() if each.inputs},
            is_linear={name: each.is_linear for name, each in sums.items()},
        )

    def adds_bias(self, spec: RouterSpec) -> bool:
        """Whether the router adds a bias of its checkpoint to the scores that it selects by."""
        return spec.correction_bias_key is not None and self.rules[spec.name].bias_on is not None

    def predict(
        self,
        texts: Evaluation,
        interventions: Mapping[float, RouterIntervention],
        directions: Mapping[str, Tensor],
    ) -> NativePass:
        """The unchanged model on the held-out texts, and what steering its logits would select.

        Exact for the first steered layer; for those above what lower ones change is not in it.

        Args:
            texts: Held out.
            interventions: By strength.
            directions: Router -> [H] u, whose products with router inputs are wanted.
        """
        steered = {
            strength: steered_routers(self._model, self.specs, each, self.rules)
            for strength, each in interventions.items()
        }
        tally = {strength: _Moves(routers) for strength, routers in steered.items()}
        index = self._empty(texts)
        loglik = np.zeros(len(texts.rows))
        products = {name: torch.zeros(texts.num_tokens, dtype=torch.float64) for name in directions}
        keep = frozenset({"logits", "inputs"} if directions else {"logits"})
        for tokens, routings in self._run(texts, "Predicting", keep=keep, loglik=loglik):
            for spec in self.specs:
                index[spec.name][tokens] = routings[spec.name].top_k_index.cpu().to(torch.int16)
            for moves in tally.values():
                moves.add(routings)
            for name, direction in directions.items():
                inputs = required(routings[name].router_inputs, "router_inputs").cpu()
                products[name][tokens] = inputs.double() @ direction
        return NativePass(
            index=index,
            nll=texts.per_document(-loglik),
            predictions={strength: moves.prediction() for strength, moves in tally.items()},
            products=products,
        )

    def again(self, texts: Evaluation, title: str) -> TextPass:
        """The model as it is now, steered or with other weights, on the held-out texts."""
        index = self._empty(texts)
        loglik = np.zeros(len(texts.rows))
        for tokens, routings in self._run(texts, title, loglik=loglik):
            for spec in self.specs:
                index[spec.name][tokens] = routings[spec.name].top_k_index.cpu().to(torch.int16)
        return TextPass(index=index, nll=texts.per_document(-loglik))

    def _empty(self, texts: Evaluation) -> dict[str, Tensor]:
        return {
            spec.name: torch.zeros(texts.num_tokens, spec.top_k, dtype=torch.int16)
            for spec in self.specs
        }

    def _run(
        self,
        texts: Evaluation,
        title: str,
        *,
        keep: frozenset[str] = frozenset(),
        loglik: NDArray[np.float64] | None = None,
    ) -> Iterator[tuple[Tensor, dict[str, Routing]]]:
        """Numbers of the tokens of each batch and what was recorded of them.

        Args:
            texts: What goes through the model.
            title: Of the progress.
            keep: As in `RouterRecorder`.
            loglik: [rows] filled with the log-likelihood of each; None saves the head.

        Raises:
            RoutingError: A router returned NaN.
        """
        forward = self._model.base_model if loglik is None else self._model
        with (
            torch.inference_mode(),
            RouterRecorder(self._model, self.specs, keep=keep) as recorder,
            console.progress(title, texts.num_tokens, "tokens") as meter,
        ):
            for batch in texts.batches:
                rows = [texts.rows[number] for number in batch]
                arguments, mask = model_arguments([row.token_ids for row in rows], self._device)
                recorder.begin(num_tokens=mask.numel(), mask=mask)
                output = forward(**arguments)
                try:
                    routings = recorder.take()
                except NaNRoutingError as error:
                    raise error.of_batch() from None
                if loglik is not None:
                    scored = ScoredTokens(rows)
                    chosen = scored.chosen(scored.logprobs(output.logits))
                    loglik[list(batch)] = scored.row_sums(chosen)
                yield texts.tokens(batch), routings
                meter.advance(int(mask.sum()))


class _Moves:
    """Counts what steering would change, from the logits of the unchanged model."""

    def __init__(self, routers: Sequence[SteeredRouter]) -> None:
        self._routers = routers
        self._num_tokens = 0
        self._flips = {
            each.spec.name: np.zeros(len(each.intervention.experts(each.spec.name)))
            for each in routers
        }
        self._changed = dict.fromkeys(self._flips, 0)

    def add(self, routings: Mapping[str, Routing]) -> None:
        """Count a batch."""
        for router in self._routers:
            name = router.spec.name
            logits = required(routings[name].router_logits, "router_logits").float()
            bias = router.correction_bias
            scores = router.rule.selection_scores(
                logits, None if bias is None else bias.to(logits.device)
            )
            before = scores.topk(router.rule.top_k, dim=-1).indices
            after = router.route(logits).top_k_index
            self._flips[name] += flips(before, after, router.intervention, name).sum(axis=0)
            self._changed[name] += int((~set_agreement(before, after)).sum())
        self._num_tokens += len(next(iter(routings.values())).top_k_index)

    def prediction(self) -> Prediction:
        """Shares of the tokens counted."""
        return Prediction(
            flips={name: each / self._num_tokens for name, each in self._flips.items()},
            changed={name: each / self._num_tokens for name, each in self._changed.items()},
        )


def flips(
    before: Tensor, after: Tensor, intervention: RouterIntervention, router: str
) -> NDArray[np.bool_]:
    """[N, R] whether each promoted expert enters, or each demoted one leaves."""
    entering = entered(before, after, intervention.promote.get(router, ()))
    leaving = entered(after, before, intervention.demote.get(router, ()))
    moved: NDArray[np.bool_] = torch.cat([entering, leaving], dim=1).cpu().numpy()
    return moved


def biased_scores(rule: ScoringRule, logits: Tensor) -> Tensor:
    """[T, E] what the selection bias is added to."""
    if rule.bias_on == "logits":
        return logits.float()
    return replace(rule, bias_on=None, n_group=1).selection_scores(logits)


@contextmanager
def replaced(model: Any, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters and buffers have other values inside.

    Args:
        model: Loaded.
        tensors: Name in the model -> values of as many elements.

    Raises:
        MachineError: One of them is not in memory.
    """
    found = {name: required(get_tensor(model, name), name) for name in tensors}
    absent = next((name for name, tensor in found.items() if tensor.is_meta), None)
    if absent is not None:
        raise MachineError(
            f"{absent} is not in memory, because the model does not fit, so changed weights cannot "
            "be tried. Use a larger machine, or --save-intervention."
        )
    before = {name: tensor.detach().clone() for name, tensor in found.items()}
    with torch.no_grad():
        for name, values in tensors.items():
            found[name].copy_(values.reshape(found[name].shape))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, values in before.items():
                found[name].copy_(values)


def _is_linear(weight: Tensor | None, routing: Routing) -> bool:
    inputs = required(routing.router_inputs, "router_inputs").float()
    logits = required(routing.router_logits, "router_logits").float()
    weight = required(weight, "weight").float()
    if weight.shape != (logits.shape[-1], inputs.shape[-1]):
        return False
    rest = logits - inputs @ weight.T.to(inputs.device)
    off = (rest - rest.mean(dim=0)).abs().max()
    return bool(off <= LINEAR_TOLERANCE * logits.abs().max())


def _known_rules(model: Any, specs: Sequence[RouterSpec]) -> dict[str, ScoringRule]:
    """How each router selects.

    Raises:
        ArchitectureError: Unknown for one of them.
    """
    found = find_rules(model, specs)
    rules = {name: rule for name, rule in found.items() if rule is not None}
    unknown = next((spec for spec in specs if spec.name not in rules), None)
    if unknown is not None:
        raise ArchitectureError(
            f"Router {unknown.name} cannot be steered: its scoring rule is unknown, so nothing "
            f"tells what changed logits would select. Leave layer {unknown.layer} out of --layers."
        )
    return rules
