"""Additive router statistics of a series of checkpoints: one small parquet file for each.

    python examples/demo_trajectory.py RUN/steps/* RUN/main --out examples/demo-trajectory

The text is dealt into 50 batches, the units that a bootstrap resamples. Each row belongs to one
batch, layer and expert, and holds sums over the tokens of the batch:

| column | summed over | what |
| --- | --- | --- |
| `selections` | all tokens | 1 where the expert is among the selected |
| `softmax`, `log_softmax` | all tokens | (log-)probability of the expert |
| `gate` | tokens that selected it | routing weight |
| `output_norm` | tokens that selected it | norm of the expert's output |
| `contribution_norm` | tokens that selected it | the same times the routing weight |

`tokens` is the number of tokens of the batch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import OlmoeForCausalLM

DEMO_TEXT = Path(__file__).parents[1] / "moetools" / "demo" / "text"
BATCHES = 50
MAX_LENGTH = 512
SUMS = ("selections", "softmax", "log_softmax", "gate", "output_norm", "contribution_norm")


def demo_texts() -> list[str]:
    """The declaration in all languages and the section questions, in a fixed random order."""
    articles = pd.read_parquet(DEMO_TEXT / "udhr.parquet")["text"].tolist()
    lines = (DEMO_TEXT / "sections.test.jsonl").read_text(encoding="utf-8").splitlines()
    texts = articles + [json.loads(line)["question"] for line in lines]
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


class RouterSums:
    """Hooks on every MoE layer that add to `sums`, float64 (statistics, layers, experts)."""

    def __init__(self, model: OlmoeForCausalLM) -> None:
        config = model.config
        self.sums = np.zeros((len(SUMS), config.num_hidden_layers, config.num_experts))
        self.keep = torch.ones(0, dtype=torch.bool)
        for index, layer in enumerate(model.model.layers):
            layer.mlp.gate.register_forward_hook(self._gate_hook(index))
            layer.mlp.experts.register_forward_pre_hook(self._experts_hook(index))

    def _gate_hook(self, layer: int) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            log_probs = output[0][self.keep].double().log_softmax(dim=-1)
            self.sums[1, layer] += log_probs.exp().sum(dim=0).numpy()
            self.sums[2, layer] += log_probs.sum(dim=0).numpy()

        return hook

    def _experts_hook(self, layer: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            hidden_states, top_k_index, top_k_weights = (arg[self.keep] for arg in args)
            for expert in range(module.num_experts):
                token, slot = torch.where(top_k_index == expert)
                gate_up = hidden_states[token] @ module.gate_up_proj[expert].t()
                gate, up = gate_up.chunk(2, dim=-1)
                output = (module.act_fn(gate) * up) @ module.down_proj[expert].t()
                weight, norm = top_k_weights[token, slot].double(), output.norm(dim=-1).double()
                self.sums[0, layer, expert] += len(token)
                self.sums[3, layer, expert] += weight.sum().item()
                self.sums[4, layer, expert] += norm.sum().item()
                self.sums[5, layer, expert] += (weight * norm).sum().item()

        return hook


@torch.inference_mode()
def batch_sums(model: OlmoeForCausalLM, sums: RouterSums, texts: list[list[int]]) -> pd.DataFrame:
    """The rows of one batch; one forward pass, padding on the right and not counted."""
    length = max(map(len, texts))
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    mask = torch.zeros(len(texts), length, dtype=torch.bool)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(text)
        mask[i, : len(text)] = True
    sums.keep = mask.flatten()
    sums.sums[:] = 0
    model.model(input_ids=ids, use_cache=False)
    layers, experts = sums.sums.shape[1:]
    layer, expert = np.indices((layers, experts), dtype=np.int16)
    columns: dict[str, Any] = {"layer": layer.ravel(), "expert": expert.ravel()}
    columns["tokens"] = np.int32(mask.sum().item())
    for name, values in zip(SUMS, sums.sums, strict=True):
        kind = np.int32 if name == "selections" else np.float32
        columns[name] = values.ravel().astype(kind)
    return pd.DataFrame(columns)


def statistics(checkpoint: Path, texts: list[str]) -> pd.DataFrame:
    """All batches of one checkpoint, computed in float32 and summed in float64."""
    model = OlmoeForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    encoded = [encoding.ids[:MAX_LENGTH] for encoding in tokenizer.encode_batch(texts)]
    sums = RouterSums(model)
    frames = []
    for batch in range(BATCHES):
        frame = batch_sums(model, sums, encoded[batch::BATCHES])
        frame.insert(0, "batch", np.int16(batch))
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def main() -> None:
    """Write one file per checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", help="checkpoint folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the parquet files")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    texts = demo_texts()
    for checkpoint in options.checkpoints:
        frame = statistics(checkpoint, texts)
        frame.to_parquet(
            options.out / f"{checkpoint.name}.parquet", index=False, compression="zstd"
        )
        print(f"{checkpoint.name}: {frame['selections'].sum()} selections")


if __name__ == "__main__":
    main()
