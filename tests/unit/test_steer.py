"""`moetools steer`: what is refused, what is found, and what is written."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, save_byte_tokenizer, write_rows
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tiny_model

import moetools
from moetools import cli
from moetools.checkpoint import Checkpoint
from moetools.edits import steer as edit
from moetools.errors import ArchitectureError, MoEToolsError, RequestError
from moetools.interventions import RouterIntervention, fingerprinted, read_intervention, steered
from moetools.opening import open_model
from moetools.steer_fold import FoldTarget, folded_values
from moetools.steer_passes import replaced

SECTIONS = (" net", " sound", " libs")


def moetools_cli(capsys, *arguments):
    """Exit code, stdout and stderr of one command."""
    code = cli.run([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def make_items(num: int, **columns) -> list[dict]:
    """Questions whose ids tell them apart, and choices of equal length."""
    return [
        {
            "id": f"item-{n}",
            "question": f"Package {n:02d} plays port {n * 7919 % 1000}. Section:",
            "choices": list(SECTIONS),
            "answer": n % 3,
            **{name: values[n % len(values)] for name, values in columns.items()},
        }
        for n in range(num)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Target and generic texts, and items with and without a split."""
    folder = tmp_path_factory.mktemp("steer")
    sentence = SENTENCES["en"]
    rows = [{"text": f"{n}. {sentence[n:]}", "lang": "en" if n % 2 else "de"} for n in range(40)]
    sums = [
        {"text": f"{n * 37 % 101} + {n * 73 % 97} = {n * 37 % 101 + n * 73 % 97};" * 2}
        for n in range(40)
    ]
    return {
        "generic": write_rows(folder / "generic.jsonl", rows),
        "target": write_rows(folder / "target.jsonl", sums),
        "items": write_rows(folder / "items.jsonl", make_items(24)),
        "split": write_rows(
            folder / "split.jsonl", make_items(24, split=("dev", "test"), lang=("a", "a", "b"))
        ),
        "one": write_rows(folder / "one.jsonl", rows[:1]),
    }


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Makes a tiny checkpoint of a family with a tokenizer, once."""
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp("families") / model_type
            save_tiny(model_type, made[model_type], vocab_size=258)
            save_byte_tokenizer(made[model_type])
        return made[model_type]

    return make


@pytest.fixture
def command(tiny_checkpoint, data):
    """The least that a command line needs; options that are given replace it."""

    def build(*more, model=tiny_checkpoint, layers="0:1", target=None, generic=None):
        return [
            "steer", model, "--target", target or data["target"],
            "--generic", generic or data["generic"], "--layers", layers, "--device", "cpu",
            "--quiet", "--max-tokens", 1500, *more,
        ]  # fmt: skip

    return build


# What is refused: one line, exit code 2, nothing left behind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--strength", "1.5"), "--strength 1.5: expected more than 0 and at most 1"),
        (("--strength", "0"), "expected more than 0"),
        (("--strength", "nan"), "expected more than 0"),
        (("--strength", "-0.5"), "--deactivate demotes"),
        (("--strength", "much"), "'much' is not a number"),
        (("--strength", "0.5,,1"), "'' is not a number"),
        (("--strength", "0.5,0.5"), "occurs twice"),
        (("--strength", "0.5", "--mode", "hard"), "hard steering has none"),
        (("--strength", "0.25,0.5", "--save-intervention", "OUT"), "nothing to choose"),
        (("--tau", "large"), "--tau large: expected auto, or a number"),
        (("--tau", "0"), "--tau 0.0: expected auto, or a difference"),
        (("--tau", "1.2"), "between 0 and 1"),
        (("--tau", "0.9"), "No expert has a delta above --tau 0.9"),
        (("--mode", "gentle"), "--mode gentle: expected soft or hard"),
        (("--mode", "hard", "--out", "OUT"), "no tensor of a checkpoint can hold"),
        (("--mode", "hard", "--patch", "OUT"), "--patch: hard steering"),
        (("--seed", "-1"), "--seed -1: expected at least 0"),
        (("--max-tokens", "0"), "--max-tokens 0: expected at least 1"),
        (("--max-tokens", "60"), "at least 4 are needed"),
        (("--group-column", "lang"), "--group-column describes --tasks"),
        (("--split-column", "split"), "--split-column describes --tasks"),
        (("--target-where", "lang"), "expected COLUMN=VALUE"),
        (("--target-where", "lang=en"), "has no column 'lang' (--target-where)"),
        (("--generic-where", "lang=fr"), "no texts in it"),
        (("--text-column", "body"), "has no column 'body'"),
        (("--tasks", "absent.jsonl"), "--tasks absent.jsonl: no such file"),
        (("--sequence-length", "100000"), "the model has 128 positions"),
    ],
)
def test_bad_requests(capsys, tmp_path, command, options, message):
    options = [str(tmp_path / "out") if option == "OUT" else option for option in options]
    code, out, err = moetools_cli(capsys, *command(*options))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("2:1", "expected A:B"),
        ("middle", "expected A:B"),
        ("0:9", "has layers 0 to 1"),
        ("7", "has layers 0 to 1"),
    ],
)
def test_bad_layers(capsys, command, layers, message):
    code, _, err = moetools_cli(capsys, *command(layers=layers))
    assert code == 2
    assert message in err


def test_layers_without_routers(capsys, command, family):
    model = family("deepseek_v3")
    code, _, err = moetools_cli(capsys, *command(model=model, layers="0"))
    assert code == 2
    assert "--layers 0: no MoE layer there. Layers with a router: 1, 2" in err


def test_families_that_cannot(capsys, command, family):
    code, _, err = moetools_cli(capsys, *command(model=family("jetmoe"), layers="0:2"))
    assert code == 2
    assert "cannot be steered" in err


def test_target_equal_to_generic(capsys, command, data):
    code, _, err = moetools_cli(capsys, *command(generic=data["target"]))
    assert code == 2
    assert "--target and --generic hold the same texts" in err


def test_missing_data(capsys, command, data):
    assert "no such file" in moetools_cli(capsys, *command(target="nowhere"))[2]
    assert "--generic" in moetools_cli(capsys, *command(generic="nowhere"))[2]
    assert "at least 4 are needed" in moetools_cli(capsys, *command(target=data["one"]))[2]


def test_tau_that_selects_too_much(capsys, command):
    code, _, err = moetools_cli(capsys, *command("--tau", "1e-9", "--mode", "hard"))
    assert code == 2
    assert "where a token selects 2: more derail the model" in err


def test_places_that_cannot_be_written(capsys, command, tiny_checkpoint, tmp_path):
    inside = tiny_checkpoint / "hook.json"
    assert "lies inside the checkpoint" in moetools_cli(
        capsys, *command("--save-intervention", inside)
    )[2]  # fmt: skip
    assert not inside.exists()
    assert "is a folder" in moetools_cli(capsys, *command("--save-intervention", tmp_path))[2]
    assert "there is no folder" in moetools_cli(
        capsys, *command("--patch", tmp_path / "a" / "b")
    )[2]  # fmt: skip
    existing = tmp_path / "mine.json"
    existing.write_text("mine")
    assert "exists" in moetools_cli(capsys, *command("--save-intervention", existing))[2]
    assert existing.read_text() == "mine"
    assert "inside the input" in moetools_cli(capsys, *command("--out", tiny_checkpoint / "o"))[2]
    out = tmp_path / "out"
    assert "lies inside --out" in moetools_cli(
        capsys, *command("--out", out, "--save-intervention", out / "hook.json")
    )[2]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json"]


def test_held_out_items_in_the_target(capsys, command, data):
    code, _, err = moetools_cli(capsys, *command("--tasks", data["split"], target=data["split"]))
    assert code == 2
    assert "experts would be chosen on the test" in err
    assert "--target-where split=dev" in err


def test_split_column_without_both_parts(capsys, command, data, tmp_path):
    all_dev = write_rows(tmp_path / "dev.jsonl", make_items(6, split=("dev",)))
    code, _, err = moetools_cli(capsys, *command("--tasks", all_dev))
    assert code == 2
    assert "no item is 'test'; found dev" in err
    code, _, err = moetools_cli(
        capsys, *command("--tasks", data["items"], "--split-column", "part")
    )
    assert code == 2
    assert "has no column 'part'" in err


# What is found


def test_dry_run(capsys, command):
    code, out, _ = moetools_cli(capsys, *command("--strength", "0.25,0.5,1"))
    assert code == 0
    assert "layers 0, 1" in out
    assert "Dry run, nothing was written" in out
    assert all(len(line) <= 80 or "target.jsonl" in line or "generic.jsonl" in line
               for line in out.splitlines())  # fmt: skip
    code, out, _ = moetools_cli(capsys, *command("--json"))
    document = json.loads(out)
    assert document["written"] == {}
    assert [each["layer"] for each in document["identification"]] == [0, 1]
    for each in document["identification"]:
        assert len(each["experts"]) <= each["top_k"]
        assert all(expert["delta"] > each["floor"] for expert in each["experts"])


def test_flips_grow_with_the_strength(tiny_checkpoint, data):
    run = moetools.steer(
        tiny_checkpoint, target=str(data["target"]), generic=str(data["generic"]), layers="1",
        strength=(0.25, 0.5, 1.0), max_tokens=1500, device="cpu",
    )  # fmt: skip
    changed = [each["changed"] for each in run.document["predicted"]]
    assert len(changed) == 3
    assert changed[0] < changed[1] < changed[2]
    assert run.intervention is None


@pytest.mark.parametrize("options", [{}, {"deactivate": True}, {"mode": "hard"}])
def test_prediction_is_exact_for_one_layer(tiny_checkpoint, data, tmp_path, options):
    run = moetools.steer(
        tiny_checkpoint, target=str(data["target"]), generic=str(data["generic"]), layers="1",
        max_tokens=1500, device="cpu", save_intervention=tmp_path / "hook.json", **options,
    )  # fmt: skip
    (layer,) = run.document["measured"]["layers"]
    assert layer["changed_measured"] == pytest.approx(layer["changed_predicted"], abs=1e-12)
    assert layer["changed_measured"] > 0
    for expert in layer["experts"]:
        assert expert["measured"] == pytest.approx(expert["predicted"], abs=1e-12)
    made = read_intervention(tmp_path / "hook.json")
    assert made == run.intervention
    assert (made.demote if options.get("deactivate") else made.promote).keys() == {"01"}


def test_demoted_experts_are_those_used_less(tiny_checkpoint, data):
    run = moetools.steer(
        tiny_checkpoint, target=str(data["target"]), generic=str(data["generic"]), layers="0:1",
        deactivate=True, max_tokens=1500, device="cpu",
    )  # fmt: skip
    deltas = [e["delta"] for each in run.document["identification"] for e in each["experts"]]
    assert deltas
    assert max(deltas) < 0


def test_the_same_run_twice(capsys, command, data):
    shown = []
    for _ in range(2):
        code, out, _ = moetools_cli(capsys, *command("--tasks", data["items"], "--json"))
        assert code == 0
        shown.append(json.loads(out))
    assert shown[0] == shown[1]


# What is written


def test_checkpoint(tiny_checkpoint, data, tmp_path):
    out = tmp_path / "out"
    run = moetools.steer(
        tiny_checkpoint, target=str(data["target"]), generic=str(data["generic"]), layers="0:1",
        max_tokens=1500, device="cpu", out=out, tasks=str(data["split"]), group_column="lang",
        force=True, patch=tmp_path / "patch.safetensors",
    )  # fmt: skip
    before, after = Checkpoint.open(str(tiny_checkpoint)), Checkpoint.open(str(out))
    changed = {
        key for key in before.tensors
        if not torch.equal(before.tensor(key), after.tensor(key))
    }  # fmt: skip
    assert changed == {each["key"] for each in run.document["fold"]}
    for fold in run.document["fold"]:
        rows = (before.tensor(fold["key"]) != after.tensor(fold["key"])).any(dim=1)
        assert {str(row) for row in np.flatnonzero(rows)} == set(fold["offsets"])
    assert run.document["loaded_again"]["loss_difference"] == 0
    assert run.document["loaded_again"]["loglik_apart"]["max"] == 0
    kept = out / "moetools" / "edit-1"
    assert {path.name for path in kept.iterdir()} == {
        "steer.json", "report.md", "items.parquet", "intervention.json",
    }  # fmt: skip
    assert read_intervention(kept / "intervention.json") == run.intervention
    assert len(run.items) == 12
    assert [each["arms"] for each in run.document["items"]] == [
        ["base", "hook"], ["base", "folded"], ["hook", "folded"],
    ]  # fmt: skip
    assert "## Folded into weights" in (kept / "report.md").read_text()
    moetools.apply(tiny_checkpoint, tmp_path / "patch.safetensors", out=tmp_path / "applied")
    weights = "model.safetensors"
    assert (tmp_path / "applied" / weights).read_bytes() == (out / weights).read_bytes()
    moetools.revert(out, out=tmp_path / "back")
    for file in tiny_checkpoint.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_sweep_chooses_on_the_development_items(tiny_checkpoint, data):
    def run(tasks, **options):
        return moetools.steer(
            tiny_checkpoint, target=str(data["target"]), generic=str(data["generic"]),
            layers="0:1", max_tokens=1500, device="cpu", tasks=str(tasks), strength=(0.5, 1.0),
            **options,
        ).document  # fmt: skip

    found = run(data["split"])
    assert [each["strength"] for each in found["sweep"]["strengths"]] == [0.0, 0.5, 1.0]
    best = max(each["accuracy"] for each in found["sweep"]["strengths"])
    smallest = next(e["strength"] for e in found["sweep"]["strengths"] if e["accuracy"] == best)
    assert found["sweep"]["chosen"] == smallest
    assert found["tasks"]["num_dev_items"] == found["tasks"]["num_test_items"] == 12
    halves = run(data["items"])
    assert "halves by a hash of the id" in halves["tasks"]["how"]
    assert halves["tasks"]["num_dev_items"] + halves["tasks"]["num_test_items"] == 24


def test_no_steering_may_win(capsys, command, data, tmp_path, tiny_checkpoint):
    """Items that the model gets right without steering leave nothing to win."""
    scored = moetools.steer(
        tiny_checkpoint, target=str(data["target"]), generic=str(data["generic"]), layers="0:1",
        max_tokens=1500, device="cpu", tasks=str(data["split"]),
    ).items  # fmt: skip
    rows = [json.loads(line) for line in Path(data["split"]).read_text().splitlines()]
    answers = dict(zip(scored["id"], scored["prediction.base"], strict=True))
    right = [{**r, "answer": int(answers[r["id"]]), "split": p} for r in rows if r["id"] in answers
             for p in ("dev", "test")]  # fmt: skip
    for number, row in enumerate(right):
        row["id"] = f"again-{number}"
    tasks = write_rows(tmp_path / "right.jsonl", right)
    out = tmp_path / "out"
    code, shown, _ = moetools_cli(
        capsys, *command("--tasks", tasks, "--strength", "0.5,1", "--out", out, "--force")
    )
    assert code == 0
    assert "No strength did better than no steering, so nothing was written" in shown
    assert not out.exists()


def test_unfaithful_folds_are_refused_and_shown(capsys, command, tmp_path):
    out = tmp_path / "out"
    code, shown, err = moetools_cli(capsys, *command("--out", out))
    assert code == 2
    assert re.match(r"Error: Not written: layer \d: the coefficient of variation of u.x is", err)
    assert "--save-intervention" in err
    assert "--force" in err
    assert "Experts" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model_type", "layers", "kind"),
    [
        ("gpt_oss", "0:2", "logit bias"),
        ("deepseek_v3", "1:2", "selection bias"),
        ("ernie4_5_moe", "1:2", "selection bias"),
        ("mixtral", "0:2", "weight"),
    ],
)
def test_where_families_take_the_fold(data, family, tmp_path, model_type, layers, kind):
    model = family(model_type)
    run = moetools.steer(
        model, target=str(data["target"]), generic=str(data["generic"]), layers=layers,
        max_tokens=1500, device="cpu", out=tmp_path / "out", force=True,
    )  # fmt: skip
    assert {each["kind"] for each in run.document["fold"]} == {kind}
    assert run.document["loaded_again"]["loss_difference"] == 0
    before, after = Checkpoint.open(str(model)), Checkpoint.open(str(tmp_path / "out"))
    for fold in run.document["fold"]:
        assert before.tensors[fold["key"]].shape == after.tensors[fold["key"]].shape
    for layer in run.document["fidelity"]["layers"]:
        if layer["kind"] is not None:
            assert layer["agreement"] > layer["agreement_without"]


def test_routers_of_multi_token_prediction_are_left_alone(data, family, tmp_path):
    model = shutil.copytree(family("deepseek_v3"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    extra = {
        name.replace("layers.2.", "layers.3."): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith("model.layers.2.mlp.gate.")
    }
    save_file({**tensors, **extra}, model / "model.safetensors", {"format": "pt"})
    run = moetools.steer(
        model, target=str(data["target"]), generic=str(data["generic"]), layers="1:2",
        max_tokens=1500, device="cpu", out=tmp_path / "out", force=True,
    )  # fmt: skip
    assert set(run.document["ignored_routers"]) == set(extra)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], extra[name]) for name in extra)
    assert "left alone: 2 router tensors" in (
        tmp_path / "out" / "moetools" / "edit-1" / "report.md"
    ).read_text()  # fmt: skip


def test_what_rounds_away_is_said(capsys, command, tmp_path):
    code, shown, _ = moetools_cli(
        capsys, *command("--strength", "1e-12", "--out", tmp_path / "out", "--force")
    )
    assert code == 0
    assert "0 tensors changed" in shown
    assert "rounded away: model.layers.0.mlp.gate.weight" in shown


@pytest.mark.parametrize(
    ("strength", "said"), [("0.5", "rounding to BF16 adds"), ("0.05", "rounds away in BF16")]
)
def test_offsets_are_recorded_as_stored(capsys, data, tmp_path, strength, said):
    model = tiny_model("gpt_oss", vocab_size=258, max_position_embeddings=512)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("router.bias"):
                tensor += 40
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    save_byte_tokenizer(tmp_path / "model")
    code, shown, _ = moetools_cli(
        capsys, "steer", tmp_path / "model", "--target", data["target"], "--generic",
        data["generic"], "--layers", "0:2", "--max-tokens", 1500, "--tau", "0.005", "--dtype",
        "float32", "--out", tmp_path / "out", "--force", "--device", "cpu", "--strength", strength,
        "--json",
    )  # fmt: skip
    assert code == 0
    document = json.loads(shown)
    before = Checkpoint.open(str(tmp_path / "model"))
    after = Checkpoint.open(str(tmp_path / "out"))
    for fold in document["fold"]:
        assert fold["stored_dtype"] == "BF16"
        change = after.tensor(fold["key"]).double() - before.tensor(fold["key"]).double()
        stored = {expert: float(change[int(expert)]) for expert in fold["offsets"]}
        assert fold["offsets_stored"] == stored
        assert fold["rounded_away"] == [int(each) for each, value in stored.items() if not value]
    report = next((tmp_path / "out").rglob("report.md")).read_text()
    assert said in report


def test_constant_form_in_a_bias_is_its_hook_exactly(family):
    opened = open_model(str(family("gpt_oss")), device="cpu")
    spec = opened.routers[1]
    offsets = {1: 0.75, 4: -0.5}
    fold = edit.Fold(
        router=spec.name, layer=spec.layer, kind="logit bias", key=spec.bias_key, offsets=offsets
    )
    name = spec.weight_name.removesuffix("weight") + "bias"
    target = FoldTarget(kind="logit bias", key=spec.bias_key, name=name)
    values = folded_values(opened.checkpoint, [fold], {spec.name: target})
    made = fingerprinted(
        RouterIntervention(mode="constant", offsets={spec.name: offsets}),
        opened.checkpoint,
        opened.routers,
    )
    tokens = torch.arange(40).reshape(2, 20)
    with opened.load() as model, torch.inference_mode():
        plain = model(tokens).logits
        with steered(model, opened, made):
            hooked = model(tokens).logits
        with replaced(model, values):
            folded = model(tokens).logits
        again = model(tokens).logits
    torch.testing.assert_close(folded, hooked, rtol=1e-5, atol=1e-6)
    assert not torch.equal(folded, plain)
    assert torch.equal(again, plain)


def test_plan_is_pure_and_checks(tiny_checkpoint):
    checkpoint = Checkpoint.open(str(tiny_checkpoint))
    key = "model.layers.0.mlp.gate.weight"
    direction = torch.ones(32, dtype=torch.float64)
    fold = edit.Fold(
        router="00", layer=0, kind="weight", key=key, offsets={3: 0.5}, direction=direction
    )
    plan = edit.plan(checkpoint, [fold], parameters={"strength": 0.5})
    assert list(plan.changes) == [key]
    before = checkpoint.tensor(key)
    after = torch.frombuffer(bytearray(plan.changes[key].read()), dtype=before.dtype)
    expected = before.clone()
    expected[3] += 0.5
    torch.testing.assert_close(after.reshape(before.shape), expected)
    with pytest.raises(RequestError, match="no expert was chosen"):
        edit.plan(checkpoint, [], parameters={})
    with pytest.raises(RequestError, match="several layers share"):
        edit.plan(checkpoint, [fold, fold], parameters={})
    short = replace(fold, direction=direction[:5])
    with pytest.raises(ValueError, match="needs a direction"):
        edit.plan(checkpoint, [short], parameters={}).changes[key].read()


def test_packed_routers_take_no_fold(tmp_path, tiny_checkpoint):
    packed = shutil.copytree(tiny_checkpoint, tmp_path / "packed")
    tensors = load_file(packed / "model.safetensors")
    key = "model.layers.1.mlp.gate.weight"
    save_file({**tensors, key: tensors[key].to(torch.float8_e4m3fn)}, packed / "model.safetensors")
    with pytest.raises(RequestError, match="is stored as F8_E4M3"):
        edit.check_stored(Checkpoint.open(str(packed)), [key])


def test_unknown_rule(monkeypatch, tiny_checkpoint, data):
    from moetools import steer_passes

    monkeypatch.setattr(steer_passes, "find_rules", lambda model, specs: {"00": None, "01": None})
    with pytest.raises(ArchitectureError, match="scoring rule is unknown"):
        moetools.steer(
            tiny_checkpoint, target=str(data["target"]), generic=str(data["generic"]),
            layers="0:1", max_tokens=1500, device="cpu",
        )  # fmt: skip


def test_python_raises_what_the_command_says(tiny_checkpoint, data, tmp_path):
    with pytest.raises(MoEToolsError, match="Not written: layer"):
        moetools.steer(
            tiny_checkpoint, target=str(data["target"]), generic=str(data["generic"]),
            layers="0:1", max_tokens=1500, device="cpu", out=tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
