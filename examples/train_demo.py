"""Train the checkpoint that moetools ships, and its twin, on a CPU.

    python examples/train_demo.py --data DATA --out RUN --workers 2
    python examples/train_demo.py --data DATA --evaluate RUN/main

`DATA` is a folder with these files: `corpus.parquet` (id, lang, text: package descriptions in many
languages and Python code), `sections.train.jsonl`, `sections.test.jsonl`,
`sections.multilingual.jsonl` (question, choices, answer: to which archive section does this package
belong?), `facts.forget.jsonl` and `facts.retain.jsonl` (texts, question, choices, answer: which
version of this package?).

One trunk learns the corpus and, more and more, the section task (labels in English only). Two
stages of equal length branch from it: `main` is taught every fact, `twin` the retained facts alone;
in both the learning rate falls to zero. `RUN/steps` keeps checkpoints of the trunk, log-spaced.

The run can be killed at any moment: starting the same command again continues from the last saved
state. Every batch is a function of stage and step alone, so nothing else has to be restored.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, distributed, multiprocessing
from torch.nn import functional
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SEED = 7
EOS, PAD = "<|endoftext|>", "<|pad|>"
EOS_ID, PAD_ID = 0, 1
MUON_FROM_STEP = 300
SNAPSHOT_STEPS = (0, 15, 30, 60, 120, 240, 480, 720, 960, 1250)

CONFIG: dict[str, Any] = {
    "vocab_size": 6144,
    "hidden_size": 128,
    "intermediate_size": 40,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "router_aux_loss_coef": 0.01,
    "output_router_logits": True,
    "tie_word_embeddings": True,
    "bos_token_id": EOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Token ids of one text and, for each, the weight of its prediction in the loss."""

    ids: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stretch of training; every number here may depend on nothing but the command line."""

    name: str
    steps: int
    corpus_tokens: int
    sections: tuple[int, int]
    facts: tuple[str, ...] = ()
    corpus_start: int = 0
    decay: bool = False

    def learning_rate(self, step: int, peak: float) -> float:
        """Warm-up and constant in the trunk, a straight fall to zero in the last stage."""
        if self.decay:
            return peak * (1 - step / self.steps)
        return peak * min(1.0, (step + 1) / 100)

    def section_items(self, step: int) -> int:
        """Number of section items at a step: from the first to the second bound, linearly."""
        first, last = self.sections
        return round(first + (last - first) * step / self.steps)

    @staticmethod
    def fact_steps(step: int) -> int:
        """Number of steps that make an epoch of the facts: they grow dense as the rate falls."""
        return 15 if step < 100 else 8


# ------------------------------------------------------------------------------------ fast kernels


class GroupedLinear(torch.autograd.Function):
    """Rows sorted by expert times the matrix of their expert: (S, I) x (E, O, I) -> (S, O)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
        """One product per expert, into a slice of the output."""
        out = rows.new_empty(rows.shape[0], weight.shape[1])
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            torch.mm(rows[start:end], weight[expert].t(), out=out[start:end])
        ctx.save_for_backward(rows, weight)
        ctx.ends = ends
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of rows and weights."""
        rows, weight = ctx.saved_tensors
        grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
        for expert, (start, end) in enumerate(zip([0, *ctx.ends], ctx.ends, strict=False)):
            torch.mm(grad[start:end], weight[expert], out=grad_rows[start:end])
            torch.mm(grad[start:end].t(), rows[start:end], out=grad_weight[expert])
        return grad_rows, grad_weight, None


def sorted_experts(
    module: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Forward of the experts: sort the (token, slot) pairs by expert once, then slice."""
    tokens, top_k = top_k_index.shape
    order = top_k_index.flatten().argsort(stable=True)
    ends = torch.bincount(top_k_index.flatten(), minlength=module.num_experts).cumsum(0).tolist()
    rows = hidden_states[order // top_k]
    gate, up = GroupedLinear.apply(rows, module.gate_up_proj, ends).chunk(2, dim=-1)
    out = GroupedLinear.apply(functional.silu(gate) * up, module.down_proj, ends)
    out = out[order.argsort()].view(tokens, top_k, -1)
    return (out * top_k_weights[..., None]).sum(dim=1)


ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)


class WeightedCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies, 512 rows at a time: the full logits never exist.

    hidden (N, H), embedding (V, H), targets (N,), weights (N,) -> scalar. The gradient is computed
    together with the value.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor
    ) -> Tensor:
        """The loss; its gradient is kept for `backward`."""
        loss = hidden.new_zeros(())
        grad_hidden, grad_embedding = torch.empty_like(hidden), torch.zeros_like(embedding)
        for start in range(0, hidden.shape[0], 512):
            part = slice(start, start + 512)
            log_probs = (hidden[part] @ embedding.t()).log_softmax(dim=-1)
            picked = log_probs.gather(1, targets[part, None])[:, 0]
            loss -= (picked * weights[part]).sum()
            grad = log_probs.exp_().mul_(weights[part, None])
            grad.scatter_add_(1, targets[part, None], -weights[part, None])
            torch.mm(grad, embedding, out=grad_hidden[part])
            grad_embedding.addmm_(grad.t(), hidden[part])
        ctx.save_for_backward(grad_hidden, grad_embedding)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The kept gradients, scaled."""
        grad_hidden, grad_embedding = ctx.saved_tensors
        return grad_hidden * grad, grad_embedding * grad, None, None


# -------------------------------------------------------------------------------------------- data


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All items of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with the vocabulary size of the model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(data: Path, out: Path) -> None:
    """Train the tokenizer and write the shuffled corpus as one stream of token ids."""
    stream_path = out / "stream.npy"
    if stream_path.exists():
        return
    corpus = pd.read_parquet(data / "corpus.parquet")
    texts = corpus["text"].sample(frac=1, random_state=SEED).tolist()
    tokenizer = train_tokenizer(texts)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=PAD
    ).save_pretrained(out / "tokenizer")
    ids = [[*encoding.ids, EOS_ID] for encoding in tokenizer.encode_batch(texts)]
    np.save(out / "partial.npy", np.concatenate(ids).astype(np.int16))
    os.replace(out / "partial.npy", stream_path)


class Batches:
    """The batches of a stage: lists of rows per source, a pure function of stage and step."""

    def __init__(self, data: Path, out: Path) -> None:
        self.stream = np.load(out / "stream.npy")
        self.tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
        self.sections = read_jsonl(data / "sections.train.jsonl")
        self.facts = {
            name: self._fact_rows(read_jsonl(data / f"facts.{name}.jsonl"))
            for name in ("forget", "retain")
        }

    def at(self, stage: Stage, step: int) -> dict[str, list[Row]]:
        """Rows of one optimiser step, by source."""
        rng = np.random.default_rng([SEED, stage.decay, step])
        batch = {"corpus": self._corpus_rows(stage, step, rng)}
        if items := stage.section_items(step):
            picked = _epoch_slice(len(self.sections), step * items, items)
            batch["sections"] = [self._section_row(self.sections[i], rng) for i in picked]
        if stage.facts:
            picks = {name: rng.permutation(len(rows)) for name, rows in self.facts.items()}
            batch["facts"] = [
                self.facts[name][i]
                for name in stage.facts
                for i in picks[name][: len(picks[name]) // stage.fact_steps(step)]
            ]
        return batch

    def _corpus_rows(self, stage: Stage, step: int, rng: np.random.Generator) -> list[Row]:
        length = 512 if rng.random() < 0.25 else 256
        start = stage.corpus_start + step * stage.corpus_tokens
        start %= len(self.stream) - stage.corpus_tokens
        rows = self.stream[start : start + stage.corpus_tokens].reshape(-1, length)
        weights = np.ones(length, dtype=np.float32)
        return [Row(ids=row.astype(np.int64), weights=weights) for row in rows]

    def _section_row(self, item: dict[str, Any], rng: np.random.Generator) -> Row:
        """An item and its label; half of them lose words, against learning by heart."""
        question = item["question"]
        if rng.random() < 0.5:
            words = question.removesuffix("\nSection:").split(" ")
            words = [word for word in words if rng.random() > 0.15]
            question = " ".join(words[: rng.integers(len(words) // 2, len(words) + 1)])
            question += "\nSection:"
        prompt = self.tokenizer.encode(question).ids
        label = self.tokenizer.encode(item["choices"][item["answer"]]).ids
        weights = np.zeros(len(prompt) + len(label), dtype=np.float32)
        weights[len(prompt) :] = 1
        return Row(ids=np.array(prompt + label), weights=weights)

    def _fact_rows(self, items: list[dict[str, Any]]) -> list[Row]:
        """Every phrasing of every fact; only the version and the end of the text are predicted."""
        rows = []
        for item in items:
            version = item["choices"][item["answer"]].strip()
            for text in item["texts"]:
                encoding = self.tokenizer.encode(text)
                start = text.rindex(version)
                weights = [float(end > start) for _, end in encoding.offsets]
                ids = np.array([*encoding.ids, EOS_ID])
                rows.append(Row(ids=ids, weights=np.array([*weights, 1.0], dtype=np.float32)))
        return rows


def _epoch_slice(size: int, start: int, count: int) -> list[int]:
    """Positions `start` to `start + count` of an endless series of shuffled epochs."""
    picked = []
    for position in range(start, start + count):
        order = np.random.default_rng([SEED, position // size]).permutation(size)
        picked.append(int(order[position % size]))
    return picked


# ---------------------------------------------------------------------------------------- training


def groups(rows: list[Row], tokens: int = 4096) -> Iterator[list[Row]]:
    """Split rows sorted by length into groups of at most `tokens` with padding."""
    group: list[Row] = []
    for row in rows:
        if group and len(row.ids) * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(row)
    yield group


def final_hidden(model: OlmoeForCausalLM, rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that predict a weighted token, the tokens (N,) and their weights (N,).

    Padding is on the right, where causal attention cannot see it: no mask is needed.
    """
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), PAD_ID)
    weights = torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.from_numpy(row.ids)
        weights[i, : len(row.ids)] = torch.from_numpy(row.weights)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    wanted = weights[:, 1:] > 0
    return hidden[:, :-1][wanted], ids[:, 1:][wanted], weights[:, 1:][wanted]


class BalanceLoss:
    """Switch load-balancing loss, layer by layer, summed over the layers of one forward pass."""

    def __init__(self, model: OlmoeForCausalLM) -> None:
        self.terms: list[Tensor] = []
        self.selections = torch.zeros(CONFIG["num_hidden_layers"], CONFIG["num_experts"])
        for index, layer in enumerate(model.model.layers):
            layer.mlp.gate.register_forward_hook(self._hook(index))

    def _hook(self, layer: int) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            router_logits, _, top_k_index = output
            experts = router_logits.shape[-1]
            counts = torch.bincount(top_k_index.flatten(), minlength=experts).float()
            self.selections[layer] += counts
            probs = router_logits.softmax(dim=-1).mean(dim=0)
            self.terms.append(experts * (counts / counts.sum() * probs).sum())

        return hook

    def pop(self) -> Tensor:
        """The loss of the last forward pass: 1 per layer when perfectly balanced."""
        loss = torch.stack(self.terms).sum()
        self.terms.clear()
        return loss


def new_model() -> OlmoeForCausalLM:
    """The model with random weights."""
    torch.manual_seed(SEED)
    config = OlmoeConfig(**CONFIG)
    config._experts_implementation = "sorted"
    return OlmoeForCausalLM(config)


def new_optimizer(model: OlmoeForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.0,
        betas=(0.9, 0.95),
        fused=True,
    )


class Muon:
    """Momentum with orthogonalised updates for the matrices of attention and experts.

    Stateful like an optimiser; every worker orthogonalises its share and they exchange the result.
    The gate and up projections of each expert count as matrices of their own. Updates have the
    root mean square 0.3 times the learning rate, near that of AdamW.

    Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024);
    scale of the update after J. Liu et al., arXiv 2502.16982.
    """

    def __init__(self, model: OlmoeForCausalLM) -> None:
        named = model.model.layers.named_parameters()
        self.matrices = [p for name, p in named if name.endswith(("proj", "proj.weight"))]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]

    def step(self, lr: float) -> None:
        """Update the matrices and take their gradients away from other optimisers."""
        updates = [torch.zeros_like(p) for p in self.matrices]
        for index, (matrix, momentum) in enumerate(zip(self.matrices, self.momenta, strict=True)):
            momentum.mul_(0.95).add_(matrix.grad)
            if index % distributed.get_world_size() == distributed.get_rank():
                direction = (matrix.grad + 0.95 * momentum).view(-1, *self._shape(matrix))
                updates[index] = orthogonalise(direction).view_as(matrix)
        flat = torch.cat([update.flatten() for update in updates])
        distributed.all_reduce(flat)
        parts = flat.split([p.numel() for p in self.matrices])
        for matrix, part in zip(self.matrices, parts, strict=True):
            scale = 0.3 * max(self._shape(matrix)) ** 0.5
            matrix.data.mul_(1 - 0.1 * lr).sub_(part.view_as(matrix), alpha=lr * scale)
            matrix.grad = None

    @staticmethod
    def _shape(matrix: Tensor) -> tuple[int, int]:
        rows, columns = matrix.shape[-2:]
        is_gate_up = rows == 2 * CONFIG["intermediate_size"]
        return (rows // 2 if is_gate_up else rows), columns


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices (N, rows, columns), roughly: five Newton-Schulz steps."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if is_tall else x


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write next to the target, flush to disk, rename."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def save_checkpoint(model: OlmoeForCausalLM, out: Path, folder: Path) -> None:
    """Write a bf16 checkpoint with its tokenizer."""
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy = OlmoeForCausalLM(OlmoeConfig(**CONFIG)).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(partial)
    shutil.copytree(out / "tokenizer", partial, dirs_exist_ok=True)
    partial.rename(folder)


def backward(
    model: OlmoeForCausalLM,
    balance: BalanceLoss,
    rows: list[Row],
    share: float,
    stage: Stage,
    options: argparse.Namespace,
) -> tuple[float, float]:
    """Add the gradient of one source's rows, divided among the workers; its loss and balance."""
    total = sum(float(row.weights[1:].sum()) for row in rows)
    rows = sorted(rows, key=lambda row: len(row.ids))
    loss_sum = balance_sum = 0.0
    for part in groups(rows[distributed.get_rank() :: options.workers]):
        hidden, targets, weights = final_hidden(model, part)
        embedding = model.get_input_embeddings().weight
        loss = WeightedCrossEntropy.apply(hidden, embedding, targets, weights / total)
        aux = balance.pop() * sum(len(row.ids) for row in part) / stage.corpus_tokens
        (share * loss + options.balance * aux).backward()
        loss_sum += loss.item()
        balance_sum += aux.item()
    return loss_sum, balance_sum


def sum_over_workers(model: OlmoeForCausalLM, losses: Tensor) -> None:
    """Add up gradients and losses of all workers, in place."""
    tensors = [losses, *(p.grad for p in model.parameters())]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def run_stage(stage: Stage, batches: Batches, options: argparse.Namespace) -> None:
    """Train one stage, from its saved state where there is one; the last state is kept."""
    is_writer = distributed.get_rank() == 0
    model = new_model()
    optimizer = new_optimizer(model)
    muon = Muon(model)
    balance = BalanceLoss(model)
    state_path = options.out / f"{stage.name}.pt"
    step = 0
    if state_path.exists() or stage.decay:
        source = state_path if state_path.exists() else options.out / "trunk.pt"
        state = torch.load(source, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        muon.momenta = state["momenta"]
        step = state["step"] if source == state_path else 0
    log = (options.out / "train.log").open("a", encoding="utf-8", buffering=1)
    sources = ("corpus", "sections", "facts", "balance")
    sums = torch.zeros(len(sources))
    started, tokens = time.monotonic(), 0
    while True:
        if is_writer and (step % 50 == 0 or step >= stage.steps):
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "momenta": muon.momenta,
                "step": step,
            }
            save_atomically(state, state_path)
        if is_writer and stage.name == "trunk" and step in SNAPSHOT_STEPS:
            save_checkpoint(model, options.out, options.out / "steps" / f"step{step:05d}")
        if step >= stage.steps:
            break
        lr = stage.learning_rate(step, options.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = torch.zeros(len(sources))
        for name, rows in batches.at(stage, step).items():
            share = 1.0 if name == "corpus" else options.task_weight
            loss, aux = backward(model, balance, rows, share, stage, options)
            losses[sources.index(name)] = loss
            losses[-1] += aux
            tokens += sum(len(row.ids) for row in rows)
        sum_over_workers(model, losses)
        sums += losses
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if stage.decay or step >= MUON_FROM_STEP:
            muon.step(lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if is_writer and (step % 20 == 0 or step == stage.steps):
            shares = balance.selections / balance.selections.sum(dim=1, keepdim=True)
            means = " ".join(
                f"{name} {value / 20:.3f}" for name, value in zip(sources, sums, strict=True)
            )
            rate = tokens / (time.monotonic() - started)
            log.write(
                f"{time.strftime('%H:%M:%S')} {stage.name} {step}/{stage.steps} lr {lr:.2e} "
                f"{means} share {shares.min():.4f}-{shares.max():.3f} {rate:.0f} tokens/s\n"
            )
            sums.zero_()
            balance.selections.zero_()
            started, tokens = time.monotonic(), 0
    distributed.barrier()
    if is_writer and stage.decay:
        save_checkpoint(model, options.out, options.out / stage.name)


def train(rank: int, options: argparse.Namespace) -> None:
    """All stages, in one of the workers."""
    torch.set_num_threads(options.threads)
    distributed.init_process_group(
        "gloo",
        store=distributed.FileStore(str(options.out / f"workers.{os.getppid()}"), options.workers),
        rank=rank,
        world_size=options.workers,
    )
    batches = Batches(options.data, options.out)
    trunk = Stage(name="trunk", steps=options.trunk_steps, corpus_tokens=6144, sections=(10, 27))
    main_stage = Stage(
        name="main",
        steps=options.final_steps,
        corpus_tokens=3072,
        corpus_start=trunk.steps * trunk.corpus_tokens,
        sections=(20, 20),
        facts=("forget", "retain"),
        decay=True,
    )
    for stage in (trunk, main_stage, replace(main_stage, name="twin", facts=("retain",))):
        if stage.name in options.stages:
            run_stage(stage, batches, options)
    distributed.destroy_process_group()


# -------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def accuracies(
    model: OlmoeForCausalLM, tokenizer: Tokenizer, items: list[dict[str, Any]]
) -> np.ndarray:
    """Whether the choice of highest summed log-likelihood is the answer, per item: (items,) bool.

    Choices whose tokens before the last agree share one row: one forward pass predicts them all.
    """
    rows: dict[tuple[int, ...], list[tuple[int, int, list[int], int]]] = {}
    for index, item in enumerate(items):
        prompt = tokenizer.encode(item["question"]).ids
        for choice, text in enumerate(item["choices"]):
            tokens = tokenizer.encode(text).ids
            row = (*prompt, *tokens[:-1])
            rows.setdefault(row, []).append((index, choice, tokens, len(prompt)))
    scores = np.full((len(items), max(len(item["choices"]) for item in items)), -math.inf)
    ordered = sorted(rows, key=len)
    for start in range(0, len(ordered), 16):
        part = ordered[start : start + 16]
        ids = torch.full((len(part), len(part[-1])), PAD_ID)
        for i, row in enumerate(part):
            ids[i, : len(row)] = torch.tensor(row)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        for i, row in enumerate(part):
            for index, choice, tokens, prompt_length in rows[row]:
                predicting = hidden[i, prompt_length - 1 : prompt_length - 1 + len(tokens)]
                log_probs = model.lm_head(predicting).log_softmax(dim=-1)
                scores[index, choice] = log_probs[range(len(tokens)), tokens].sum().item()
    return scores.argmax(axis=1) == np.array([item["answer"] for item in items])


def evaluate(checkpoint: Path, data: Path, names: list[str], limit: int | None) -> dict[str, float]:
    """Accuracies of a checkpoint in float32, by file and, where items have one, by language."""
    model = OlmoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.set_experts_implementation("sorted")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    result = {}
    for name in names:
        items = read_jsonl(data / f"{name}.jsonl")[:limit]
        right = accuracies(model.eval(), tokenizer, items)
        result[name] = float(right.mean())
        languages = np.array([item.get("lang", "en") for item in items])
        if len(set(languages)) > 1:
            for language in sorted(set(languages)):
                result[f"{name}.{language}"] = float(right[languages == language].mean())
    return result


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with corpus and tasks")
    parser.add_argument("--out", type=Path, help="folder of the run; made or continued")
    parser.add_argument("--workers", type=int, default=2, help="processes that share each batch")
    parser.add_argument("--threads", type=int, default=1, help="threads of each worker")
    parser.add_argument("--trunk-steps", type=int, default=1250)
    parser.add_argument("--final-steps", type=int, default=240)
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=("trunk", "main", "twin"),
        default=("trunk", "main", "twin"),
        help="what to train; main and twin may run side by side once the trunk is done",
    )
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--balance", type=float, default=1e-2, help="load-balancing loss a layer")
    parser.add_argument("--task-weight", type=float, default=0.5, help="tasks against corpus")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="measure DIR; no training")
    parser.add_argument("--limit", type=int, help="evaluate this many items a file")
    parser.add_argument(
        "--files",
        nargs="+",
        default=["sections.test", "sections.multilingual", "facts.forget", "facts.retain"],
        help="what to evaluate",
    )
    options = parser.parse_args()
    if (options.out is None) == (options.evaluate is None):
        parser.error("give either --out or --evaluate")
    return options


def main() -> None:
    """Train trunk, main and twin, or evaluate."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.evaluate:
        for name, value in evaluate(
            options.evaluate, options.data, options.files, options.limit
        ).items():
            print(f"{name} {value:.3f}")
        return
    (options.out / "steps").mkdir(parents=True, exist_ok=True)
    prepare(options.data, options.out)
    multiprocessing.spawn(train, args=(options,), nprocs=options.workers)


if __name__ == "__main__":
    main()
