"""Open a model to run it: its headers, routers and tokenizer first, its weights when needed."""

import importlib.util
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moetools import console
from moetools.architectures import RouterDiscovery, RouterSpec, find_routers, refusal
from moetools.batching import load_tokenizer
from moetools.checkpoint import Checkpoint
from moetools.errors import ArchitectureError, MachineError, RequestError
from moetools.loading import Spread, empty_model, load_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEQUENCE_LENGTH = 512
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 4096}
MEMORY_SHARE = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedModel:
    """A checkpoint that is about to run.

    Attributes:
        checkpoint: Validated; its weights are not read.
        config: Configuration of transformers.
        discovery: Its routers, and router tensors that no router of the model reads.
        path: Folder with all files.
        tokenizer: Of transformers.
        device: Where it will run.
        dtype: What it will run in.
    """

    checkpoint: Checkpoint
    config: Any
    discovery: RouterDiscovery
    path: Path
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype

    @property
    def routers(self) -> tuple[RouterSpec, ...]:
        """Every router, in order of depth."""
        return self.discovery.routers

    @property
    def text_config(self) -> Any:
        """The part of the configuration that describes the language model."""
        return self.config.get_text_config()

    @property
    def num_positions(self) -> int | None:
        """Tokens that it takes at most; None without a limit."""
        limit: int | None = getattr(self.text_config, "max_position_embeddings", None)
        return limit

    @property
    def dtype_name(self) -> str:
        """The dtype without `torch.`."""
        return dtype_name(self.dtype)

    def sequence_length(self, wanted: int | None) -> int:
        """The length that was asked for, or the default as far as the model has positions.

        Raises:
            RequestError: The model has fewer positions.
        """
        return pick_sequence_length(wanted, self.text_config)

    @contextmanager
    def load(
        self, *, experts_implementation: str | None = None, scratch: Path | None = None
    ) -> Iterator[PreTrainedModel]:
        """The model with its weights, in evaluation mode.

        Args:
            experts_implementation: As in `load_model`.
            scratch: Folder to make for what does not fit in memory, removed afterwards; None
                takes a temporary one.
        """
        console.note(f"Loading {self.checkpoint.name} ({self.dtype_name}, {self.device}) ...")
        num_bytes = _num_parameters(self.checkpoint) * self.dtype.itemsize
        with scratch_folder(scratch) as folder:
            model = load_model(
                self.path,
                dtype=self.dtype,
                device=self.device,
                trust_remote_code=self.checkpoint.trust_remote_code,
                experts_implementation=experts_implementation,
                spread=pick_spread(self.checkpoint.name, num_bytes, self.device, folder),
            )
            switch_off_extras(model)
            yield model


def open_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    purpose: str = "run",
) -> OpenedModel:
    """Open a checkpoint to run it; a hub model is downloaded.

    Args:
        name: Checkpoint folder, hub id or `demo`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        trust_remote_code: Run code that comes with the checkpoint.
        purpose: What cannot be done with it where it is refused, such as `recorded`.

    Raises:
        CheckpointError: It is missing or damaged, or has no tokenizer.
        ArchitectureError: Its routers cannot be found or recorded.
        RequestError: No such device or dtype.
    """
    on = pick_device(device)
    checkpoint = Checkpoint.open(name, trust_remote_code=trust_remote_code)
    reason = refusal(checkpoint.config_dict, trust_remote_code=trust_remote_code)
    if reason is not None:
        raise ArchitectureError(f"{name} cannot be {purpose}: {reason}.")
    config = checkpoint.config()
    discovery = find_routers(
        empty_model(config, trust_remote_code=trust_remote_code),
        {key: info.shape for key, info in checkpoint.tensors.items()},
    )
    picked = pick_dtype(dtype, on, _num_parameters(checkpoint))
    show_bars(sys.stderr.isatty() and not console.settings.quiet)
    if checkpoint.path is None:
        console.note(f"Fetching {name} ({checkpoint.num_bytes / 1e9:.1f} GB) ...")
    path = checkpoint.local_path()
    return OpenedModel(
        checkpoint=checkpoint,
        config=config,
        discovery=discovery,
        path=path,
        tokenizer=load_tokenizer(path, trust_remote_code=trust_remote_code),
        device=on,
        dtype=picked,
    )


def _num_parameters(checkpoint: Checkpoint) -> int:
    return sum(math.prod(info.shape) for info in checkpoint.tensors.values())


def pick_device(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        RequestError: No such device, or torch does not see it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in BATCH_TOKENS:
        raise RequestError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps.")
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise RequestError(f"--device {name}: torch sees {found} CUDA devices. Try --device auto.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RequestError(f"--device {name}: torch has no MPS here. Try --device auto.")
    return device


def pick_dtype(name: str, device: torch.device, num_parameters: int) -> torch.dtype:
    """The dtype that `--dtype` names; `auto` is float32 on a CPU where that fits, else bfloat16.

    Raises:
        RequestError: An unknown name.
    """
    if name == "auto":
        fits = device.type == "cpu" and num_parameters * 4 <= usable_memory(device)
        return torch.float32 if fits else torch.bfloat16
    if name not in DTYPES:
        raise RequestError(f"--dtype {name}: expected auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def pick_spread(model: str, num_bytes: int, device: torch.device, folder: Path) -> Spread | None:
    """How to place a model that is larger than the memory of the device; None where it fits.

    Raises:
        MachineError: It does not fit, and accelerate is not installed.
    """
    memory = usable_memory(device)
    if num_bytes <= memory:
        return None
    if importlib.util.find_spec("accelerate") is None:
        raise MachineError(
            f"{model} takes {num_bytes / 1e9:.1f} GB; {device} offers {memory / 1e9:.1f} GB. "
            "`pip install accelerate` lets it use other devices, memory and disk; or choose a "
            "smaller --dtype."
        )
    console.note(
        f"{num_bytes / 1e9:.1f} GB do not fit in the {memory / 1e9:.1f} GB of {device}: accelerate "
        "spreads the model over devices, memory and disk. A large --batch-tokens helps."
    )
    return Spread(folder=folder, max_memory={"cpu": int(memory)} if device.type == "cpu" else None)


def dtype_name(dtype: torch.dtype) -> str:
    """The name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def usable_memory(device: torch.device) -> float:
    """Bytes that a model may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE
    if not hasattr(os, "sysconf"):
        return float("inf")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * MEMORY_SHARE


def pick_sequence_length(wanted: int | None, config: Any) -> int:
    """The length that was asked for, or the default as far as the model has positions.

    Raises:
        RequestError: The model has fewer positions.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if wanted is None:
        return min(SEQUENCE_LENGTH, limit or SEQUENCE_LENGTH)
    if limit is not None and wanted > limit:
        raise RequestError(
            f"--sequence-length {wanted}: the model has {limit} positions. Choose at most {limit}."
        )
    return wanted


@contextmanager
def scratch_folder(folder: Path | None) -> Iterator[Path]:
    """A folder that may be made and filled, and is gone afterwards; a temporary one for None."""
    if folder is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def show_bars(wanted: bool) -> None:
    """Progress bars of the libraries that download and load the model."""
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    (logging.enable_progress_bar if wanted else logging.disable_progress_bar)()
    (enable_progress_bars if wanted else disable_progress_bars)()


def switch_off_extras(model: Any) -> None:
    """Switch off what a recording does not need."""
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = False
