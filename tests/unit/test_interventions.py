"""Steered models: what hooks do to a forward pass, and the file that says what they do."""

import json
import math
from dataclasses import replace

import numpy as np
import planted_model
import pytest
import tiny_models
import torch
from conftest import save_byte_tokenizer, save_tiny_checkpoint
from torch import Tensor

import moetools
from moetools.architectures import find_routers, get_tensor
from moetools.checkpoint import Checkpoint
from moetools.errors import ArchitectureError, CheckpointError, MoEToolsError, RequestError
from moetools.hooks import RouterRecorder
from moetools.interventions import (
    RouterIntervention,
    Steering,
    check_fits,
    find_rules,
    fingerprinted,
    read_intervention,
    steered,
    steered_routers,
    write_intervention,
)
from moetools.opening import open_model
from moetools.routing import ScoringRule
from moetools.steering import (
    entered,
    flip_strength,
    fold_into_bias,
    predicted_flip_rate,
    set_agreement,
)
from moetools.texts import read_texts
from moetools.trace_store import TraceStore

TOKENS = torch.randint(3, 90, (4, 25), generator=torch.Generator().manual_seed(5))
SOFT = RouterIntervention(
    mode="soft", strength=0.5, promote={"01": (3, 5)}, demote={"01": (0,), "02": (7,)}
)
OFFSETS = {"01": {3: 0.5, 0: -0.25}, "02": {6: 1.0}}
CONSTANT = RouterIntervention(mode="constant", offsets={"01": {3: 0.5, 0: -0.25}})


class Tiny:
    """A tiny random model, its routers and their rules."""

    def __init__(self, model_type="olmoe", **changes):
        self.model = tiny_models.tiny_model(model_type, **changes)
        self.routers = find_routers(self.model, None).routers
        self.rules = find_rules(self.model, self.routers)

    def steered(self, intervention):
        return steered_routers(self.model, self.routers, intervention, self.rules)

    def run(self, intervention=None, tokens=TOKENS, **arguments):
        """What was recorded, and the output."""
        changed = () if intervention is None else self.steered(intervention)
        with Steering(self.model, changed):
            return record(self.model, self.routers, tokens, **arguments)


def record(model, routers, tokens, **arguments):
    with (
        torch.no_grad(),
        RouterRecorder(model, routers, keep=frozenset({"logits", "inputs"})) as recorder,
    ):
        recorder.begin(num_tokens=tokens.numel(), mask=arguments.get("attention_mask"))
        output = model(input_ids=tokens, use_cache=False, **arguments).logits
        return recorder.take(), output


@pytest.fixture(scope="module")
def tiny():
    return Tiny()


class TestForwardPass:
    def test_only_named_routers_are_touched(self, tiny):
        native, _ = tiny.run()
        found, _ = tiny.run(replace(SOFT, promote={"01": (3,)}, demote={}))
        assert torch.equal(found["00"].router_logits, native["00"].router_logits)
        assert torch.equal(found["00"].top_k_index, native["00"].top_k_index)
        others = [0, 1, 2, 4, 5, 6, 7]
        assert torch.equal(
            found["01"].router_logits[:, others], native["01"].router_logits[:, others]
        )
        assert (found["01"].router_logits[:, 3] > native["01"].router_logits[:, 3]).all()

    def test_recorded_is_what_the_rule_makes_of_changed_logits(self, tiny):
        native, _ = tiny.run()
        found, _ = tiny.run(SOFT)
        predicted = tiny.steered(SOFT)[0].route(native["01"].router_logits)
        assert torch.equal(found["01"].router_logits, predicted.router_logits)
        assert torch.equal(found["01"].top_k_index, predicted.top_k_index)
        assert torch.equal(found["01"].top_k_weights, predicted.top_k_weights)

    def test_the_model_is_itself_afterwards_also_after_an_error(self, tiny):
        _, before = tiny.run()
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.model.modules()]
        with pytest.raises(KeyError), Steering(tiny.model, tiny.steered(SOFT)):
            raise KeyError
        assert torch.equal(tiny.run()[1], before)
        assert hooks == [
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.model.modules()
        ]

    @pytest.mark.parametrize(
        "nothing",
        [
            replace(SOFT, strength=0.0),
            replace(SOFT, strength=-0.0),
            RouterIntervention(mode="soft", strength=1.0),
            RouterIntervention(mode="hard", promote={"01": ()}, demote={"02": ()}),
            RouterIntervention(mode="constant"),
            RouterIntervention(mode="constant", offsets={"01": {3: 0.0}}),
        ],
    )
    def test_no_strength_or_no_experts_is_the_identity_to_the_bit(self, tiny, nothing):
        assert nothing.routers == ()
        assert tiny.steered(nothing) == ()
        _, before = tiny.run()
        assert torch.equal(tiny.run(nothing)[1], before)

    @pytest.mark.parametrize("recorder_first", [True, False])
    def test_recorders_see_the_change_whichever_came_first(self, tiny, recorder_first):
        wanted, _ = tiny.run(SOFT)
        recorder = RouterRecorder(tiny.model, tiny.routers, keep=frozenset({"logits"}))
        steering = Steering(tiny.model, tiny.steered(SOFT))
        order = (recorder, steering) if recorder_first else (steering, recorder)
        with order[0], order[1], torch.no_grad():
            recorder.begin(num_tokens=TOKENS.numel())
            tiny.model(input_ids=TOKENS, use_cache=False)
            found = recorder.take()
        for name, routing in wanted.items():
            assert torch.equal(found[name].router_logits, routing.router_logits)
            assert torch.equal(found[name].top_k_index, routing.top_k_index)

    def test_the_routers_own_output_is_changed_too(self, tiny):
        found, _ = tiny.run(SOFT)
        outputs = []
        gate = tiny.model.get_submodule(tiny.routers[1].module)
        handle = gate.register_forward_hook(lambda module, args, output: outputs.append(output))
        with Steering(tiny.model, tiny.steered(SOFT)), torch.no_grad():
            tiny.model(input_ids=TOKENS, use_cache=False)
        handle.remove()
        logits, weights, index = outputs[0]
        assert torch.equal(logits, found["01"].router_logits)
        assert torch.equal(weights, found["01"].top_k_weights)
        assert torch.equal(index, found["01"].top_k_index)

    @pytest.mark.parametrize("mode", ["soft", "hard"])
    def test_neither_padding_nor_the_batch_matters(self, tiny, mode):
        made = RouterIntervention(
            mode=mode, promote={"00": (3, 5), "02": (1,)}, demote={"01": (2,)}
        )
        lengths = [25, 9, 17, 4]
        mask = torch.arange(25) < torch.tensor(lengths)[:, None]
        together, output = tiny.run(made, attention_mask=mask.long())
        start = 0
        for row, length in enumerate(lengths):
            alone, logits = tiny.run(made, tokens=TOKENS[row : row + 1, :length])
            torch.testing.assert_close(output[row : row + 1, :length], logits, atol=1e-5, rtol=1e-4)
            for name in ("00", "01", "02"):
                ours = together[name].top_k_index[start : start + length]
                assert set_agreement(ours, alone[name].top_k_index).all()
            start += length

    def test_hard_experts_are_selected_by_every_token(self, tiny):
        made = RouterIntervention(mode="hard", promote={"01": (3,)}, demote={"02": (7,)})
        found, _ = tiny.run(made)
        assert (found["01"].top_k_index == 3).any(dim=-1).all()
        assert not (found["02"].top_k_index == 7).any()

    def test_noise_belongs_to_the_seed_and_the_router(self, tiny):
        def noise(seed):
            promote = {"00": (3,), "01": (3,)}
            made = RouterIntervention(mode="hard", promote=promote, noise=0.5, seed=seed)
            return [router.noise for router in tiny.steered(made)]

        first, again, other = noise(1), noise(1), noise(2)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        assert not torch.equal(first[0], first[1])
        assert not torch.equal(first[0], other[0])

    def test_it_generates(self, tiny):
        """Token by token with a cache as in one pass."""
        made = RouterIntervention(mode="soft", strength=1.0, promote={"01": (3,)})
        with Steering(tiny.model, tiny.steered(made)), torch.no_grad():
            whole = tiny.model(input_ids=TOKENS).logits
            cache = None
            for place in range(TOKENS.shape[1]):
                step = tiny.model(
                    input_ids=TOKENS[:, place : place + 1], past_key_values=cache, use_cache=True
                )
                cache = step.past_key_values
        torch.testing.assert_close(step.logits[:, 0], whole[:, -1], atol=1e-4, rtol=1e-4)

    def test_weights_keep_their_type_in_a_bfloat16_model(self):
        model = Tiny()
        model.model.to(torch.bfloat16)
        model.rules = find_rules(model.model, model.routers)
        native, before = model.run()
        found, after = model.run(SOFT)
        assert found["01"].router_logits.dtype == torch.float32
        assert found["01"].top_k_weights.dtype == native["01"].top_k_weights.dtype
        assert after.dtype == before.dtype
        assert not torch.equal(after, before)

    def test_a_compiled_model_is_refused(self, tiny):
        with pytest.raises(ArchitectureError, match="compiled"):
            Steering(torch.compile(tiny.model, backend="eager"), ())

    def test_experts_that_are_called_alone_are_refused(self, tiny):
        experts = tiny.model.get_submodule(tiny.routers[1].experts_module)
        index = torch.zeros(2, 2, dtype=torch.long)
        with (
            Steering(tiny.model, tiny.steered(SOFT)),
            pytest.raises(ArchitectureError, match="was not called once after its router"),
        ):
            experts(torch.zeros(2, 32), index, torch.zeros(2, 2))


class TestConstantFormIsWhatItFoldsTo:
    """Against a copy of the model whose tensor on disk holds the offsets."""

    def folded(self, tiny, name_of):
        other = Tiny.__new__(Tiny)
        other.model = type(tiny.model)(tiny.model.config).eval()
        other.model.load_state_dict(tiny.model.state_dict())
        other.routers, other.rules = tiny.routers, tiny.rules
        with torch.no_grad():
            for spec in tiny.routers:
                if spec.name in OFFSETS:
                    bias = get_tensor(other.model, name_of(spec))
                    bias.copy_(fold_into_bias(bias, OFFSETS[spec.name]))
        return other

    def compare(self, tiny, name_of):
        made = RouterIntervention(mode="constant", offsets=OFFSETS)
        by_hook, output = tiny.run(made)
        by_fold, wanted = self.folded(tiny, name_of).run()
        unsteered, before = tiny.run()
        assert not set_agreement(by_hook["01"].top_k_index, unsteered["01"].top_k_index).all()
        assert (output - before).abs().max() > 1e-3
        return by_hook, output, by_fold, wanted

    def bias_of(self, spec):
        return spec.weight_name.removesuffix("weight") + "bias"

    def test_in_a_router_bias_to_the_bit_where_sums_are_exact(self):
        """Weights, biases and inputs on a grid, so that no sum of the router rounds."""
        tiny = Tiny("gpt_oss")
        made = RouterIntervention(mode="constant", offsets=OFFSETS)
        folded = self.folded(tiny, self.bias_of)
        generator = torch.Generator().manual_seed(0)
        for spec in tiny.routers:
            if spec.name not in OFFSETS:
                continue
            grid = torch.randint(-8, 9, (8, 32), generator=generator) / 8
            inputs = torch.randint(-8, 9, (50, 32), generator=generator) / 8
            outputs = []
            for each in (tiny, folded):
                router = each.model.get_submodule(spec.module)
                with torch.no_grad():
                    router.weight.copy_(grid)
                    router.bias.copy_((router.bias * 8).round() / 8)
                    steering = Steering(each.model, tiny.steered(made) if each is tiny else ())
                    with steering:
                        outputs.append(router(inputs))
            for ours, theirs in zip(*outputs, strict=True):
                assert torch.equal(ours, theirs)

    def test_in_a_router_bias_within_one_rounding_otherwise(self):
        by_hook, output, by_fold, wanted = self.compare(Tiny("gpt_oss"), self.bias_of)
        torch.testing.assert_close(
            by_hook["01"].router_logits, by_fold["01"].router_logits, rtol=2**-23, atol=2**-24
        )
        for name in ("00", "01", "02"):
            assert set_agreement(by_hook[name].top_k_index, by_fold[name].top_k_index).all()
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "model_type", ["deepseek_v3", "glm4_moe", "minimax_m2", "ernie4_5_moe", "lfm2_moe"]
    )
    def test_in_a_selection_bias_exactly_and_without_touching_logits(self, model_type):
        tiny = Tiny(model_type)
        by_hook, output, by_fold, wanted = self.compare(
            tiny, lambda spec: spec.correction_bias_name
        )
        unsteered, _ = tiny.run()
        assert torch.equal(by_hook["01"].router_logits, unsteered["01"].router_logits)
        for name in by_hook:
            ours, theirs = (each[name].top_k_index.sort(-1) for each in (by_hook, by_fold))
            assert torch.equal(ours.values, theirs.values)
            torch.testing.assert_close(
                by_hook[name].top_k_weights.gather(1, ours.indices),
                by_fold[name].top_k_weights.gather(1, theirs.indices),
            )
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)

    def test_gates_of_tokens_whose_set_stays_are_unchanged(self):
        tiny = Tiny("deepseek_v3")
        made = RouterIntervention(mode="constant", offsets={"01": {3: 0.25}})
        found, _ = tiny.run(made)
        unsteered, _ = tiny.run()
        ours, theirs = found["01"], unsteered["01"]
        same = set_agreement(ours.top_k_index, theirs.top_k_index)
        assert 0 < same.sum() < len(same)
        weights = [
            each.top_k_weights.gather(1, each.top_k_index.argsort(-1))[same]
            for each in (ours, theirs)
        ]
        torch.testing.assert_close(*weights, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = planted_model.save_planted(tmp_path_factory.mktemp("planted") / "model")
    opened = open_model(str(folder), device="cpu")
    texts = planted_model.save_texts(folder.parent / "texts.jsonl", num_texts=12)
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    tokens = torch.tensor(opened.tokenizer(rows)["input_ids"])
    with opened.load() as model:
        with torch.no_grad():
            gate = model.model.layers[0].mlp.gate.weight
            gate[2, planted_model.SMALL] = torch.tensor([7.0, 6.0, 8.0, 5.0])
        yield opened, model, tokens


@pytest.fixture(scope="module")
def demo():
    opened = open_model("demo", device="cpu")
    ids = [
        opened.tokenizer(each.text)["input_ids"][:60] for each in read_texts(["demo"]).texts[:40]
    ]
    tokens = torch.tensor([each for each in ids if len(each) == 60])
    with opened.load() as model:
        yield opened, model, tokens


class TestPrediction:
    """The flip rate that unsteered logits promise, against the steered model."""

    @pytest.mark.parametrize("which", ["planted", "demo"])
    @pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
    def test_flip_rate_of_one_layer_is_measured(self, which, strength, request):
        opened, model, tokens = request.getfixturevalue(which)
        spec = opened.routers[0 if which == "planted" else 3]
        targets = (2,) if which == "planted" else (1, 5, 9)
        made = RouterIntervention(mode="soft", strength=strength, promote={spec.name: targets})
        made = fingerprinted(made, opened.checkpoint, opened.routers)
        native, _ = record(model, opened.routers, tokens)
        with steered(model, opened, made):
            found, _ = record(model, opened.routers, tokens)
        logits, top_k = native[spec.name].router_logits, spec.top_k
        strengths = flip_strength(logits, targets, top_k)
        before, after = native[spec.name].top_k_index, found[spec.name].top_k_index
        clear = ~_tied(logits, top_k) & ~_tied(found[spec.name].router_logits, top_k)
        assert clear.float().mean() > 0.4
        measured = entered(before, after, targets)[clear].double().mean(dim=0)
        predicted = predicted_flip_rate(strengths[clear], strength)
        assert torch.equal(predicted, measured)
        assert which == "planted" or (measured > 0).any()

    def test_the_planted_expert_gets_the_frequency_that_was_predicted(self, planted):
        """Expert 2 is the second choice of letters a, b and d, by margins that differ."""
        opened, model, tokens = planted
        letters = tokens[:, ::2]
        native, before = record(model, opened.routers, tokens)
        logits = native["00"].router_logits.reshape(*tokens.shape, -1)[:, ::2]
        strengths = flip_strength(logits.reshape(-1, 4), [2], 1).reshape(letters.shape)
        ids = opened.tokenizer(planted_model.LETTERS)["input_ids"]
        expected = {ids[0]: 0.2655, ids[1]: 0.5601, ids[2]: 0.0, ids[3]: 0.8775}
        for letter, strength in expected.items():
            found = strengths[letters == letter]
            torch.testing.assert_close(found, torch.full_like(found, strength), atol=1e-3, rtol=0)
        for strength in (0.2, 0.5, 0.75, 1.0):
            made = RouterIntervention(mode="soft", strength=strength, promote={"00": (2,)})
            with steered(model, opened, fingerprinted(made, opened.checkpoint, opened.routers)):
                found, after = record(model, opened.routers, tokens)
            index = found["00"].top_k_index.reshape(tokens.shape)[:, ::2]
            frequency = (index == 2).double().mean().item()
            share = (letters == ids[2]).double().mean().item()
            rate = predicted_flip_rate(strengths.reshape(-1, 1), strength).item()
            assert frequency == pytest.approx(share + rate, abs=1e-12)
            gone = sum((letters == letter).double().mean().item()
                       for letter, each in expected.items() if 0 < each < strength)  # fmt: skip
            assert rate == pytest.approx(gone, abs=1e-12)
            assert torch.equal(after, before) == (rate == 0)
        assert rate == pytest.approx(1 - share)


def _tied(logits: Tensor, top_k: int) -> Tensor:
    """[T] whether the last selected and the first not selected are equal within rounding."""
    best = logits.sort(dim=-1, descending=True).values
    return (best[:, top_k - 1] - best[:, top_k]).abs() < 1e-5


class TestFile:
    """What is written and read, and what is refused in one line."""

    @pytest.fixture
    def opened(self, tiny_checkpoint):
        return open_model(str(tiny_checkpoint), device="cpu")

    @pytest.mark.parametrize(
        "made",
        [
            SOFT,
            replace(SOFT, strength=-1.0, seed=3),
            RouterIntervention(mode="hard", promote={"01": (3, 5)}, noise=0.0),
            replace(
                CONSTANT,
                model="org/name",
                revision="abc",
                fingerprints={"01": {"gate.weight": "0" * 64}},
            ),
        ],
    )
    def test_it_comes_back_as_it_was(self, tmp_path, made):
        write_intervention(tmp_path / "made.json", made)
        assert read_intervention(tmp_path / "made.json") == made
        assert [path.name for path in tmp_path.iterdir()] == ["made.json"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "other"}, "it is not an intervention of moetools"),
            ({"format_version": 2}, "it has format 2; this moetools reads format 1"),
            ({"strenght": 1}, "unknown fields: strenght"),
            ({"strength": None}, "strength: expected a number"),
            ({"strength": True}, "strength: expected a number"),
            ({"strength": 1.5}, "strength 1.5: expected a number from -1 to 1"),
            ({"strength": math.nan}, "strength nan: expected a number from -1 to 1"),
            ({"mode": "gentle"}, "mode 'gentle': expected one of soft, hard, constant"),
            ({"mode": ["soft"]}, "mode: expected text"),
            ({"mode": "hard"}, "strength 0.5: hard interventions have none"),
            ({"promote": [3]}, "promote: expected lists of expert numbers by router"),
            ({"promote": {"01": [0.5]}}, "promote: expected lists of expert numbers by router"),
            ({"promote": {"01": [True]}}, "promote: expected lists of expert numbers by router"),
            ({"promote": {"01": [3, 3]}}, "router 01: an expert is named twice"),
            ({"promote": {"01": [0]}}, "router 01: an expert is named twice"),
            ({"offsets": {"01": {"3": "x"}}}, "offsets: expected a number for every expert"),
            ({"offsets": {"01": {"x": 1.0}}}, "offsets: expected a number for every expert"),
            ({"offsets": {"01": {"3": 1.0}}}, "offsets belong to a constant intervention"),
            ({"noise": -1}, "noise -1.0: expected a number of at least 0"),
            ({"noise": math.inf}, "noise inf: expected a number of at least 0"),
            ({"seed": 0.5}, "seed: expected a whole number of at least 0"),
            ({"seed": -1}, "seed: expected a whole number of at least 0"),
            ({"fingerprints": {"01": "0"}}, "fingerprints: expected a sha256 for every tensor"),
            ({"model": 5}, "model: expected text"),
        ],
    )
    def test_what_has_no_meaning_is_refused(self, tmp_path, change, message):
        path = tmp_path / "made.json"
        path.write_text(json.dumps({**SOFT.to_json(), **change}))
        with pytest.raises(RequestError) as error:
            read_intervention(path)
        assert str(error.value).startswith(f"--intervention {path}: {message}")
        assert "\n" not in str(error.value)

    def test_missing_fields_are_named(self, tmp_path):
        document = SOFT.to_json()
        del document["seed"]
        path = tmp_path / "made.json"
        path.write_text(json.dumps(document))
        with pytest.raises(RequestError, match="missing fields: seed"):
            read_intervention(path)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff\xfe", b'{"format": 1}'])
    def test_other_files_are_refused(self, tmp_path, content):
        path = tmp_path / "made.json"
        path.write_bytes(content)
        with pytest.raises(RequestError, match="--save-intervention` writes one"):
            read_intervention(path)

    def test_no_file_is_refused(self, tmp_path):
        with pytest.raises(RequestError, match="No such file"):
            read_intervention(tmp_path / "made.json")
        with pytest.raises(RequestError, match="directory"):
            read_intervention(tmp_path)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"mode": "soft", "strength": 2.0}, "from -1 to 1"),
            ({"mode": "constant", "promote": {"01": (1,)}}, "given by offsets"),
            ({"mode": "constant", "offsets": {"01": {1: math.inf}}}, "not a finite number"),
            ({"mode": "constant", "strength": 0.5}, "constant interventions have none"),
        ],
    )
    def test_library_callers_get_value_errors(self, fields, message):
        with pytest.raises(ValueError, match=message):
            RouterIntervention(**fields)

    def test_it_fits_the_checkpoint_that_it_was_made_for(self, opened):
        made = RouterIntervention(mode="soft", strength=0.5, promote={"01": (3,)})
        made = fingerprinted(made, opened.checkpoint, opened.routers)
        assert made.fingerprints.keys() == {"01"}
        assert made.model == opened.checkpoint.name
        check_fits(made, opened.checkpoint, opened.routers)

    def test_another_checkpoint_is_refused(self, opened, tmp_path):
        made = RouterIntervention(mode="soft", strength=0.5, promote={"01": (3,)})
        made = fingerprinted(made, opened.checkpoint, opened.routers)
        other = Checkpoint.open(str(save_tiny_checkpoint(tmp_path, seed=1)))
        with pytest.raises(CheckpointError) as error:
            check_fits(made, other, opened.routers)
        assert str(error.value) == (
            f"The intervention was made for {opened.checkpoint.name}; router 01 of {tmp_path} has "
            "other weights. Use the checkpoint that it was made for, or make it again with "
            "`moetools steer`."
        )

    def test_a_bias_counts_as_well(self, tmp_path):
        """What was folded into a bias would be done twice."""
        model = tiny_models.save_tiny("glm4_moe", tmp_path)
        checkpoint = Checkpoint.open(str(tmp_path))
        routers = find_routers(
            model, {key: info.shape for key, info in checkpoint.tensors.items()}
        ).routers
        name = routers[0].name
        made = RouterIntervention(mode="soft", strength=0.5, promote={name: (3,)})
        made = fingerprinted(made, checkpoint, routers)
        check_fits(made, checkpoint, routers)
        get_tensor(model, routers[0].correction_bias_name)[0] += 0.5
        model.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=f"router {name} of .* has other weights"):
            check_fits(made, Checkpoint.open(str(tmp_path)), routers)

    def test_only_changed_routers_must_be_the_same(self, opened, tmp_path):
        """A checkpoint that differs elsewhere is accepted; so is one that nothing is done to."""
        other = Checkpoint.open(str(save_tiny_checkpoint(tmp_path, seed=1)))
        made = RouterIntervention(mode="soft", strength=0.0, promote={"01": (3,)})
        check_fits(fingerprinted(made, opened.checkpoint, opened.routers), other, opened.routers)

    def test_without_a_fingerprint_it_fits_nothing(self, opened):
        made = RouterIntervention(mode="soft", strength=0.5, promote={"01": (3,)})
        with pytest.raises(CheckpointError, match="made for another checkpoint"):
            check_fits(made, opened.checkpoint, opened.routers)

    @pytest.mark.parametrize(
        ("made", "message"),
        [
            (
                RouterIntervention(mode="soft", promote={"07": (1,)}),
                "The intervention changes router 07; this model has routers 00 to 01. It was made "
                "for another checkpoint.",
            ),
            (
                RouterIntervention(mode="soft", demote={"01": (8,)}),
                "The intervention changes expert 8 of router 01, which has experts 0 to 7.",
            ),
            (
                RouterIntervention(mode="constant", offsets={"01": {9: 1.0}}),
                "The intervention changes expert 9 of router 01, which has experts 0 to 7.",
            ),
            (
                RouterIntervention(mode="soft", promote={"01": (-1,)}),
                "The intervention changes expert -1 of router 01, which has experts 0 to 7.",
            ),
            (
                RouterIntervention(mode="hard", promote={"01": (1, 2, 3)}),
                "The intervention promotes 3 experts of router 01 to the top, but a token selects "
                "2. Promote fewer, or use soft.",
            ),
        ],
    )
    def test_what_the_model_does_not_have_is_refused(self, opened, made, message):
        with pytest.raises(RequestError) as error:
            check_fits(made, opened.checkpoint, opened.routers)
        assert str(error.value) == message

    def test_a_router_that_uses_all_experts_is_refused(self, tmp_path):
        opened = open_model(
            str(save_tiny_checkpoint(tmp_path, num_experts_per_tok=8)), device="cpu"
        )
        made = RouterIntervention(mode="soft", promote={"01": (1,)})
        with pytest.raises(ArchitectureError, match="every token uses all 8 experts"):
            check_fits(made, opened.checkpoint, opened.routers)

    @pytest.mark.parametrize(
        ("made", "words"),
        [
            (SOFT, "soft 0.5, 2 experts promoted, 2 experts demoted in routers 01, 02"),
            (CONSTANT, "constant, 1 expert promoted, 1 expert demoted in routers 01"),
            (RouterIntervention(mode="soft", strength=0.0, promote={"01": (1,)}),
             "soft 0, 1 expert promoted, nothing changed"),
            (RouterIntervention(mode="hard"), "hard, nothing changed"),
        ],
    )  # fmt: skip
    def test_in_words(self, made, words):
        assert made.describe() == words


class TestTrace:
    """`moetools trace --intervention`."""

    @pytest.fixture
    def made(self, tmp_path, tiny_checkpoint):
        opened = open_model(str(tiny_checkpoint), device="cpu")
        made = RouterIntervention(mode="soft", strength=1.0, promote={"00": (3,)})
        made = fingerprinted(made, opened.checkpoint, opened.routers)
        write_intervention(tmp_path / "made.json", made)
        return made

    def trace(self, checkpoint, texts, out, **options):
        return moetools.trace(
            checkpoint, data=str(texts), out=out, group_column="lang", device="cpu", **options
        )

    def test_it_says_so_and_records_what_the_experts_got(
        self, tmp_path, made, tiny_checkpoint, parallel_texts
    ):
        options = {"keep": ("logits",), "batch_tokens": 128, "part_tokens": 300}
        native = self.trace(tiny_checkpoint, parallel_texts, tmp_path / "native", **options)
        store = self.trace(
            tiny_checkpoint,
            parallel_texts,
            tmp_path / "steered",
            intervention=tmp_path / "made.json",
            **options,
        )
        assert store.manifest.intervention == made.to_json()
        assert store.manifest.title == f"{tiny_checkpoint}, steered"
        assert store.manifest.notes == ("Steered: soft 1, 1 expert promoted in routers 00.",)
        assert native.manifest.intervention is None
        assert native.manifest.title == str(tiny_checkpoint)
        ours, theirs = column(store, "logits.00"), column(native, "logits.00")
        others = [0, 1, 2, 4, 5, 6, 7]
        np.testing.assert_array_equal(ours[:, others], theirs[:, others])
        spread = theirs.std(axis=1)
        np.testing.assert_allclose(ours[:, 3], theirs[:, 3] + spread, rtol=1e-4, atol=1e-5)
        chosen = np.sort(column(store, "experts.00"), axis=1)
        np.testing.assert_array_equal(chosen, np.sort(np.argsort(-ours, axis=1)[:, :2], axis=1))
        assert all(router.rule is not None for router in store.routers)
        frequency = (column(store, "experts.00") == 3).mean()
        assert frequency > (column(native, "experts.00") == 3).mean() + 0.05

    def test_a_selection_bias_is_the_steered_one(self, tmp_path, parallel_texts):
        """Margins are those of the selection that was made."""
        folder = tmp_path / "model"
        tiny_models.save_tiny("glm4_moe", folder, vocab_size=258)
        save_byte_tokenizer(folder)
        opened = open_model(str(folder), device="cpu")
        name = opened.routers[0].name
        made = RouterIntervention(mode="constant", offsets={name: {3: 5.0}})
        made = fingerprinted(made, opened.checkpoint, opened.routers)
        write_intervention(tmp_path / "made.json", made)
        store = self.trace(
            folder,
            parallel_texts,
            tmp_path / "steered",
            intervention=tmp_path / "made.json",
            keep=("logits",),
        )
        assert (column(store, f"experts.{name}") == 3).any(axis=1).all()
        rule = ScoringRule.from_json(store.routers[0].rule)
        bias = opened.checkpoint.tensor(opened.routers[0].correction_bias_key).clone()
        bias[3] += 5
        logits = torch.from_numpy(column(store, f"logits.{name}"))
        best = rule.selection_scores(logits, bias).topk(3).values
        margin = torch.from_numpy(column(store, f"margin.{name}")).float()
        finite = best[:, 2].isfinite()
        torch.testing.assert_close(
            margin[finite], (best[:, 1] - best[:, 2])[finite], rtol=0.04, atol=1e-3
        )

    @pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
    def test_a_model_larger_than_memory_is_steered(
        self, tmp_path, made, tiny_checkpoint, parallel_texts, monkeypatch
    ):
        pytest.importorskip("accelerate")
        options = {"intervention": tmp_path / "made.json", "keep": ("logits",), "dtype": "float32"}
        whole = self.trace(tiny_checkpoint, parallel_texts, tmp_path / "whole", **options)
        size = (tiny_checkpoint / "model.safetensors").stat().st_size
        monkeypatch.setattr("moetools.opening.usable_memory", lambda device: size / 2)
        spread = self.trace(tiny_checkpoint, parallel_texts, tmp_path / "spread", **options)
        for name in ("experts.00", "logits.00", "experts.01", "logits.01"):
            np.testing.assert_array_equal(column(spread, name), column(whole, name))
        assert spread.routers == whole.routers

    def test_resume_needs_the_same_intervention(
        self, tmp_path, made, tiny_checkpoint, parallel_texts
    ):
        out = tmp_path / "steered"
        file = tmp_path / "made.json"
        self.trace(tiny_checkpoint, parallel_texts, out, intervention=file, part_tokens=300)
        last = sorted((out / "tokens").iterdir())[-1]
        last.unlink()
        manifest = json.loads((out / "manifest.json").read_text())
        manifest["complete"] = False
        (out / "manifest.json").write_text(json.dumps(manifest))
        again = {"part_tokens": 300, "resume": True}
        with pytest.raises(MoEToolsError, match="was started differently: intervention"):
            self.trace(tiny_checkpoint, parallel_texts, out, **again)
        write_intervention(file, replace(made, strength=0.5))
        with pytest.raises(MoEToolsError, match=r"intervention \(strength 1.0 -> 0.5\)"):
            self.trace(tiny_checkpoint, parallel_texts, out, intervention=file, **again)
        write_intervention(file, made)
        store = self.trace(tiny_checkpoint, parallel_texts, out, intervention=file, **again)
        assert store.manifest.complete
        assert store.manifest.notes == ("Steered: soft 1, 1 expert promoted in routers 00.",)

    def test_what_does_not_fit_leaves_nothing(
        self, tmp_path, made, tiny_checkpoint, parallel_texts
    ):
        other = save_tiny_checkpoint(tmp_path / "other", seed=1)
        with pytest.raises(CheckpointError, match="has other weights"):
            self.trace(other, parallel_texts, tmp_path / "out", intervention=tmp_path / "made.json")
        with pytest.raises(RequestError, match="No such file"):
            self.trace(other, parallel_texts, tmp_path / "out", intervention=tmp_path / "none.json")
        assert not (tmp_path / "out").exists()


def column(store: TraceStore, name: str) -> np.ndarray:
    return np.concatenate([batch.tokens[name] for batch in store.batches({name})])
