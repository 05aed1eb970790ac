"""A checkpoint whose layers are known to matter in known ways, and texts it predicts.

Texts are pairs of a lower-case letter and its capital: `bBaAdD`. Small letters are equally likely.
One expert per token (K = 1) of four:

- layer 0: expert e writes "the capital of letter e comes next"; the router sends letter e to it;
- layer 1: all experts are equal; each writes "some capital comes next";
- layer 2: all experts write nothing.

Nothing else in the model tells the capitals apart, and attention writes nothing.
"""

from pathlib import Path

import numpy as np
import torch
from conftest import save_byte_tokenizer, write_rows
from tiny_models import tiny_config
from transformers import OlmoeForCausalLM

LETTERS = "abcd"
SMALL, CAPITAL, IS_SMALL, IS_CAPITAL, IS_NEXT_CAPITAL = slice(0, 4), slice(4, 8), 8, 9, 10


def save_planted(path: Path) -> Path:
    """Save the checkpoint with a byte tokenizer."""
    save_byte_tokenizer(path)
    from moetools.batching import load_tokenizer

    tokenizer = load_tokenizer(path)
    small = tokenizer(LETTERS)["input_ids"]
    capital = tokenizer(LETTERS.upper())["input_ids"]
    config = tiny_config(
        "olmoe", num_hidden_layers=3, hidden_size=16, vocab_size=258, num_experts=4,
        num_experts_per_tok=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        intermediate_size=4, norm_topk_prob=True, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = OlmoeForCausalLM(config).eval()
    eye = torch.eye(16)
    with torch.no_grad():
        embedding, head = model.model.embed_tokens.weight.zero_(), model.lm_head.weight.zero_()
        embedding[small] = eye[SMALL] + eye[IS_SMALL]
        embedding[capital] = eye[CAPITAL] * 0.1 + eye[IS_CAPITAL]
        head[small] = 8 * eye[IS_CAPITAL] - 8 * eye[IS_SMALL]
        head[capital] = 2 * eye[CAPITAL] + 3 * eye[IS_NEXT_CAPITAL] - 8 * eye[IS_CAPITAL]
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.gate.weight.copy_(8 * (eye[SMALL] + eye[CAPITAL]))
            experts = layer.mlp.experts
            width = experts.down_proj.shape[-1]
            experts.gate_up_proj.zero_()
            experts.gate_up_proj[:, 0, IS_SMALL] = 1
            experts.gate_up_proj[:, width, IS_SMALL] = 1
            experts.down_proj.zero_()
            for expert in range(4):
                if number == 0:
                    experts.down_proj[expert, 4 + expert, 0] = 0.2
                elif number == 1:
                    experts.down_proj[expert, IS_NEXT_CAPITAL, 0] = 0.45
    model.save_pretrained(path)
    return path


def save_texts(path: Path, *, num_texts: int = 30, num_pairs: int = 10) -> Path:
    """Texts of the planted language as a jsonl file."""
    generator = np.random.default_rng(0)
    letters = np.array(list(LETTERS))
    texts = letters[generator.integers(0, 4, (num_texts, num_pairs))]
    rows = [{"text": "".join(x + x.upper() for x in text)} for text in texts]
    return write_rows(path, rows)


def save_items(path: Path, *, num_items: int = 400) -> Path:
    """Which capital follows a letter, as multiple-choice items."""
    generator = np.random.default_rng(1)
    choices = list(LETTERS.upper())
    answers = generator.integers(0, 4, num_items)
    rows = [{"question": LETTERS[a], "choices": choices, "answer": int(a)} for a in answers]
    return write_rows(path, rows)
