"""What recording costs: a trace against the plain forward pass on the same batches.

    python tests/benchmarks/trace_overhead.py          # on the CPU, in float32
    python tests/benchmarks/trace_overhead.py cuda     # on a GPU, in bfloat16

A random OLMoE (hidden 1024, intermediate 256, 16 layers, 64 experts, top-8). Plain and recorded
passes alternate on the same batches, each first in turn, so that other load on the machine meets
both. The recorded pass is the engine of `moetools trace`, with everything written. Target: at most
1.03 times the plain pass, and at most 3 microseconds per token for hooks and hand-over in the
forward thread.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from moetools import console
from moetools.architectures import find_routers
from moetools.batching import TokenSequence
from moetools.hooks import RouterRecorder, _Recording
from moetools.trace_store import TracedRouter, TraceManifest, TraceWriter, read_manifest
from moetools.tracing import TraceOptions, _Run, padded

NUM_BATCHES = 8
BATCH = {"cpu": 2, "cuda": 32}
LENGTH = {"cpu": 256, "cuda": 512}
RECORDED = 2048
RATIO = 1.03
MICROSECONDS = 3.0


def main(device: str) -> int:
    console.settings.quiet = True
    batch_size, length = BATCH[device], LENGTH[device]
    model = olmoe(hidden_size=1024, intermediate_size=256)
    model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    specs = find_routers(model, None).routers
    generator = np.random.default_rng(0)
    sequences = [
        TokenSequence(token_ids=generator.integers(2, 8192, length).astype(np.int32))
        for _ in range(NUM_BATCHES * batch_size)
    ]
    num_tokens = batch_size * length
    routers = tuple(
        TracedRouter(
            name=s.name, layer=s.layer, kind=s.kind, num_experts=s.num_experts, top_k=s.top_k
        )
        for s in specs
    )

    manifest = TraceManifest(
        model="random", routers=routers, num_sequences=batch_size, num_tokens=num_tokens,
        plan={"batch_tokens": num_tokens, "part_tokens": num_tokens, "keep_tokens": None},
    )  # fmt: skip

    def trace(some: list[TokenSequence], out: Path) -> tuple[float, float]:
        """Seconds to record one batch until it is on disk, and seconds of processors."""
        options = TraceOptions(model="random", data=("random",), out=out)
        run = _Run(options=options, path=out, manifest=manifest, sequences=some, specs=specs)
        begin = time.process_time()
        run.record(model)
        spent = time.process_time() - begin
        run.finish()
        return run.seconds, spent

    def plain(some: list[TokenSequence]) -> tuple[float, float]:
        ids, _ = padded([sequence.token_ids for sequence in some])
        begin, begin_spent = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            model.base_model(input_ids=ids.to(device), use_cache=False)
            synchronize(device)
        return time.perf_counter() - begin, time.process_time() - begin_spent

    batches = [
        sequences[start : start + batch_size] for start in range(0, len(sequences), batch_size)
    ]
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        first = Path(name) / "first"
        first.mkdir()
        trace(batches[0], first)  # finds the scoring rules, once in a trace
        manifest = read_manifest(first)
        plain(batches[0])
        for number, some in enumerate(batches):
            out = Path(name) / str(number)
            TraceWriter(out, manifest)
            if number % 2:
                pairs.append((plain(some), trace(some, out)))
            else:
                recorded = trace(some, out)
                pairs.append((plain(some), recorded))
    ratio, processors = (
        statistics.median(recorded[clock] / bare[clock] for bare, recorded in pairs)
        for clock in (0, 1)
    )
    bare = statistics.median(bare for (bare, _), _ in pairs)
    hooks = recorder_seconds(olmoe(hidden_size=64, intermediate_size=16)) / RECORDED * 1e6
    print(
        f"plain forward pass: {num_tokens / bare:,.0f} tokens/s, {torch.get_num_threads()} threads"
    )
    print(f"trace / plain forward pass: {ratio:.3f} (target: at most {RATIO})")
    print(f"the same in processor time, which other load does not change: {processors:.3f}")
    print(f"recorder in the forward thread: {hooks:.2f} us per token (target: {MICROSECONDS})")
    return 0 if ratio <= RATIO and hooks <= MICROSECONDS else 1


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def olmoe(*, hidden_size: int, intermediate_size: int) -> OlmoeForCausalLM:
    config = OlmoeConfig(
        vocab_size=8192, hidden_size=hidden_size, intermediate_size=intermediate_size,
        num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=8, num_experts=64,
        num_experts_per_tok=8, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return OlmoeForCausalLM(config).eval()


def recorder_seconds(model: OlmoeForCausalLM) -> float:
    """Processor seconds of hooks and hand-over in the forward thread, for one batch of a CPU.

    Hooks keep references and copy nothing, so a model with the same routers and small experts
    tells what they cost. The median of several batches.
    """
    seconds = 0.0

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal seconds
            begin = time.thread_time()
            result = call(*args, **kwargs)
            seconds += time.thread_time() - begin
            return result

        return run

    for name in ("_router_ran", "_experts_called"):
        setattr(_Recording, name, timed(getattr(_Recording, name)))
    ids = torch.randint(2, 8192, (RECORDED // 512, 512))
    mask = torch.ones_like(ids, dtype=torch.bool)
    measured = []
    specs = find_routers(model, None).routers
    with (
        torch.inference_mode(),
        RouterRecorder(model, specs, keep=frozenset({"logits"})) as recorder,
    ):
        for _ in range(7):
            seconds = 0.0
            timed(recorder.begin)(num_tokens=ids.numel(), mask=mask)
            model.base_model(input_ids=ids, use_cache=False)
            timed(recorder.take)()
            measured.append(seconds)
    return statistics.median(measured)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:] or ["cpu"]))
