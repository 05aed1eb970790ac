"""Any plan on any checkpoint: only what was planned changes, and it can be undone and repeated."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_checkpoints import raw, read_raw, tree, write_raw

import moetools
from moetools.checkpoint import Checkpoint
from moetools.edit_plan import EditPlan, EditRecord, TensorChange
from moetools.writing import WriteOptions, write_checkpoint

BITS = {"BF16": 16, "F32": 32, "F8_E4M3": 8, "I64": 64, "F4": 4, "Q4_K_X": None, "BOOL": 8}
KEYS = [f"model.layers.{layer}.experts.{name}" for layer in range(3) for name in ("ä", "b", "c.d")]


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(sorted(BITS)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    bits = BITS[dtype]
    if dtype == "F4":
        shape = (*shape, 2)
    elements = int(np.prod(shape, dtype=int))
    num_bytes = draw(st.integers(0, 9)) if bits is None else elements * bits // 8
    return raw(dtype, shape, num_bytes, draw(st.integers(0, 3)))


@st.composite
def edits(draw):
    """Shards of a checkpoint and changes to it: replaced, reshaped and new tensors."""
    keys = draw(st.permutations(KEYS))
    num_old = draw(st.integers(1, len(KEYS)))
    num_shards = draw(st.integers(1, 3))
    names = ["model.safetensors"] if num_shards == 1 else [f"m-{n}.safetensors" for n in range(3)]
    shards = {}
    for key in keys[:num_old]:
        shards.setdefault(draw(st.sampled_from(names)), {})[key] = draw(tensors())
    old = {key: tensor for shard in shards.values() for key, tensor in shard.items()}
    changes = {}
    for key in draw(st.lists(st.sampled_from(keys), unique=True, max_size=5)):
        new = draw(tensors())
        if key in old and draw(st.booleans()):
            dtype, shape, content = old[key]
            new = raw(dtype, shape, len(content), draw(st.integers(0, 5)))
        elif key in old and new[:2] == old[key][:2]:
            new = old[key]  # an unknown dtype has one size for one shape
        changes[key] = new
    return shards, old, changes


@settings(max_examples=40)
@given(edits(), st.booleans(), st.booleans())
def test_only_the_plan_changes_and_it_can_be_undone_and_repeated(edit, link, by_base):
    shards, old, changes = edit
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = write_raw(root / "in", shards, index="model.safetensors" not in shards)
        before = tree(folder)
        plan = EditPlan(
            checkpoint=Checkpoint.open(str(folder)),
            changes={
                key: TensorChange(dtype=dtype, shape=shape, read=lambda content=content: content)
                for key, (dtype, shape, content) in changes.items()
            },
            record=EditRecord(method="any", parameters={}, model="any", version="1"),
        )
        options = WriteOptions(patch=root / "patch", link=link)
        written = write_checkpoint(plan, root / "out", options=options)
        assert read_raw(root / "out") == {**old, **changes}
        differ = {key for key, tensor in changes.items() if old.get(key) != tensor}
        assert set(written.changed) == differ
        assert set(written.rounded_away) == changes.keys() - differ
        Checkpoint.open(str(root / "out"))

        moetools.apply(folder, root / "patch", out=root / "again", options=WriteOptions(link=link))
        assert tree(root / "again") == tree(root / "out")
        moetools.revert(root / "out", out=root / "back", base=folder if by_base else None)
        assert tree(root / "back") == before == tree(folder)
