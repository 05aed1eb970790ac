"""The README's table of supported families; `python tests/readme.py families` writes it.

Every row is a tiny random model that was saved, found, recorded and reproduced; nothing is listed
by hand. `tests/parity/test_families.py` holds that the table is current.
"""

import re
import tempfile
from pathlib import Path

import tiny_models
import torch
import transformers
from transformers import PreTrainedModel

from moetools.architectures import REFUSED, RouterSpec, find_routers, get_tensor
from moetools.hooks import RouterRecorder
from moetools.routing import identify_rule

UNKNOWN = "unknown: recorded, but not a function of the logits alone"


def table() -> str:
    """The table in Markdown."""
    transformers.logging.set_verbosity_error()
    lines = [
        f"{len(tiny_models.moe_model_types())} model types of transformers are recorded exactly:",
        "",
        "| model_type | router weight on disk | scoring rule |",
        "| --- | --- | --- |",
        *[row(model_type) for model_type in tiny_models.moe_model_types()],
        "",
        "Refused, with the reason that `moetools inspect` gives:",
        "",
        "| model_type | reason |",
        "| --- | --- |",
        *[f"| `{model_type}` | {reason} |" for model_type, reason in sorted(REFUSED.items())],
    ]
    return "\n".join(lines) + "\n"


def row(model_type: str) -> str:
    """One family: where its routers lie on disk and how they score."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_models.save_tiny(model_type, Path(folder))
        routers = find_routers(model, tiny_models.shapes_on_disk(Path(folder))).routers
    keys = sorted({re.sub(r"\.\d+\.", ".N.", spec.weight_key) for spec in routers})
    return (
        f"| `{model_type}` | {'<br>'.join(f'`{key}`' for key in keys)} | {rules(model, routers)} |"
    )


def rules(model: PreTrainedModel, routers: tuple[RouterSpec, ...]) -> str:
    """The rules of all routers in words, without the numbers of the tiny config."""
    tokens = torch.arange(3, 93).reshape(3, 30)
    with torch.no_grad(), RouterRecorder(model, routers, keep=frozenset({"logits"})) as recorder:
        recorder.begin(num_tokens=tokens.numel())
        model(input_ids=tokens, use_cache=False)
        routings = recorder.take()
    words = []
    for spec in routers:
        routing = routings[spec.name]
        assert routing.router_logits is not None
        rule = identify_rule(
            routing.router_logits,
            routing.top_k_index,
            routing.top_k_weights,
            spec,
            get_tensor(model, spec.correction_bias_name),
            get_tensor(model, spec.expert_scale_name),
        )
        general = UNKNOWN if rule is None else rule.describe()
        for number, word in ((r"top-\d+", "top-k"), (r"x[\d.]+", "x scale"), (r"\d+ of \d+ ", "")):
            general = re.sub(number, word, general)
        if general not in words:
            words.append(general)
    return "<br>".join(words)
