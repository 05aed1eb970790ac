"""`moetools.tensor_diff` against torch on whole tensors, for any values, dtypes and layouts."""

import json

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moetools import tensor_diff
from moetools.checkpoint import Checkpoint
from moetools.tensor_diff import diff_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn)
WHOLE = (torch.int64, torch.int32, torch.uint8, torch.bool)
SPECIAL = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-30, 1e30)


@st.composite
def tensors(draw):
    """Some tensors by key, with values that repeat often and are sometimes special."""
    found = {"model.experts.0.weight": torch.ones(1)}
    for name in draw(st.sets(st.sampled_from("abcde"))):
        shape = draw(st.lists(st.integers(0, 40), min_size=0, max_size=2))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2)))
        dtype = draw(st.sampled_from(DTYPES + WHOLE))
        values = torch.randn(shape, generator=generator) * 3
        for _ in range(draw(st.integers(0, 2)) if values.numel() else 0):
            place = draw(st.integers(0, values.numel() - 1))
            values.view(-1)[place] = draw(st.sampled_from(SPECIAL))
        if not dtype.is_floating_point:
            values = values.nan_to_num(0, 1, 0).clamp(0, 200)
        found[name] = values.to(dtype)
    return found


def write(path, state, *, files):
    """A checkpoint in one file, or with every second tensor in another."""
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "olmoe"}')
    if files == 1:
        save_file(state, path / "model.safetensors")
        return Checkpoint.open(str(path))
    weight_map = {key: f"part-{number % 2}.safetensors" for number, key in enumerate(state)}
    for name in set(weight_map.values()):
        save_file({k: t for k, t in state.items() if weight_map[k] == name}, path / name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return Checkpoint.open(str(path))


def raw(tensor):
    return tensor.reshape(-1).view(torch.uint8)


@settings(max_examples=80)
@given(tensors(), tensors(), st.integers(1, 2), st.booleans(), st.data())
def test_differences_are_those_of_torch(tmp_path_factory, one, two, files, small, data):
    two |= {key: one[key] for key in data.draw(st.sets(st.sampled_from(sorted(one))))}
    folder = tmp_path_factory.mktemp("pair")
    a, b = write(folder / "a", one, files=1), write(folder / "b", two, files=files)
    sizes = (tensor_diff.LOCAL_WINDOW, tensor_diff.BLOCK_ELEMENTS)
    try:
        if small:
            tensor_diff.LOCAL_WINDOW, tensor_diff.BLOCK_ELEMENTS = 64, 7
        found = diff_tensors(a, b)
    finally:
        tensor_diff.LOCAL_WINDOW, tensor_diff.BLOCK_ELEMENTS = sizes
    same = {
        key
        for key in one.keys() & two.keys()
        if one[key].dtype == two[key].dtype
        and one[key].shape == two[key].shape
        and torch.equal(raw(one[key]), raw(two[key]))
    }
    assert found.num_identical == len(same)
    assert found.num_identical_bytes == sum(raw(one[key]).numel() for key in same)
    kinds = {each.key: each.kind for each in found.differences}
    assert kinds == {
        **dict.fromkeys((one.keys() & two.keys()) - same, "changed"),
        **dict.fromkeys(one.keys() - two.keys(), "removed"),
        **dict.fromkeys(two.keys() - one.keys(), "added"),
    }
    for each in found.of_kind("changed"):
        check_numbers(each, one[each.key], two[each.key])


def check_numbers(each, x, y):
    floating = x.dtype.is_floating_point and y.dtype.is_floating_point
    if x.shape != y.shape or (x.dtype != y.dtype and not floating):
        assert each.num_changed_elements is each.num_changed_bytes is each.change is None
        return
    if x.dtype == y.dtype:
        changed = raw(x) != raw(y)
        assert each.num_changed_bytes == int(changed.sum())
        by_element = changed.reshape(x.numel(), x.itemsize).any(dim=1)
        assert each.num_changed_elements == int(by_element.sum())
    else:
        assert each.num_changed_bytes is None
        p, q = x.double(), y.double()
        assert each.num_changed_elements == int(((p != q) & ~(p.isnan() & q.isnan())).sum())
    if not floating:
        assert each.change is each.cosine is each.largest is None
        return
    p, q = x.double().reshape(-1), y.double().reshape(-1)
    finite = p.isfinite() & q.isfinite()
    assert each.num_not_finite == int((~finite).sum())
    p, q = p[finite], q[finite]
    norms = float(p.norm()), float(q.norm())
    assert each.largest == (float((q - p).abs().max()) if len(p) else 0)
    if norms[0] == 0:
        assert each.change is None
    else:
        torch.testing.assert_close(each.change, float((q - p).norm()) / norms[0])
    if 0 in norms:
        assert each.cosine is None
    else:
        expected = float(p @ q) / norms[0] / norms[1]
        torch.testing.assert_close(each.cosine, expected, atol=1e-9, rtol=1e-9)
