"""Checkpoints of multimodal models, read through their text part."""

from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from moetools.architectures import find_routers
from moetools.loading import empty_model, load_model


@pytest.mark.parametrize("model_type", ["llama4", "qwen3_5_moe", "dots3_note", "qwen3_vl_moe"])
def test_text_part_routes_as_the_whole_model(model_type: str, tmp_path: Path) -> None:
    config = tiny_models.tiny_config(model_type)
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]._from_config(config)
    tiny_models.randomise(whole, seed=0)
    whole.eval().save_pretrained(tmp_path)
    shapes = tiny_models.shapes_on_disk(tmp_path)
    discovery = find_routers(empty_model(config), shapes)
    assert {spec.weight_key for spec in discovery.routers} <= set(shapes)
    loaded = load_model(tmp_path, dtype="auto", device="cpu")
    tokens = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=tokens, use_cache=False).logits,
            whole(input_ids=tokens, use_cache=False).logits,
            rtol=1e-4,
            atol=1e-5,
        )


def test_routers_of_an_image_tower_are_listed_not_recorded(tmp_path: Path) -> None:
    config = tiny_models.tiny_config("dots3_note")
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]._from_config(config).save_pretrained(
        tmp_path
    )
    discovery = find_routers(empty_model(config), tiny_models.shapes_on_disk(tmp_path))
    assert [spec.name for spec in discovery.routers] == ["01"]
    assert set(discovery.ignored) == {
        "vision_encoder.blocks.1.mlp.gate_weight",
        "vision_encoder.blocks.1.mlp.router_bias",
    }
    assert all("another modality" in reason for reason in discovery.ignored.values())


def test_image_experts_beside_the_text_experts_are_not_recorded(tmp_path: Path) -> None:
    model = tiny_models.save_tiny("ernie4_5_vl_moe", tmp_path)
    discovery = find_routers(model, tiny_models.shapes_on_disk(tmp_path))
    assert all(".text_moe." in spec.experts_module for spec in discovery.routers)
    assert set(discovery.ignored) == {spec.weight_key + "_1" for spec in discovery.routers}
