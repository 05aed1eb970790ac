"""Gemma 4: the router module returns probabilities; its projection returns the logits."""

from moetools.architectures._spec import Architecture

ARCHITECTURE = Architecture(
    model_types=("gemma4_text",),
    source="transformers/models/gemma4/modeling_gemma4.py, Gemma4TextRouter",
    logits="proj",
)
