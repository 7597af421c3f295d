"""Digital profiles: scales that serving engines need, bits within a budget, stable derivation."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, tiny, token_ids
from transformers import AutoModelForCausalLM

from analog_plugin import AnalogError, load_checkpoint, save_checkpoint
from analog_plugin.checkpoint import plain_view
from analog_plugin.checkpoint.bits import choose_bits, packed_bytes, rounding_costs
from analog_plugin.checkpoint.digital import DIGITAL_PROFILES
from analog_plugin.checkpoint.plain import plain_reading
from analog_plugin.checkpoint.save import plan_export, save_profiles
from analog_plugin.evaluation.fidelity import Reference, fidelity
from analog_plugin.layers import analog_layers, digital_layers
from analog_plugin.layers.prefix import install_prefix
from analog_plugin.training.ranges import calibrate_plain_ranges

BATCHES = [{"input_ids": token_ids(seed=seed)} for seed in (2, 3)]
NAMES = [profile.name for profile in DIGITAL_PROFILES]
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def options(profile):
    return {"average_bits": 3.5} if profile.startswith("mixed") else {}


def plan(model, profile, **more):
    return plan_export(model, profile, batches=BATCHES, **(more or options(profile)))


def tensors(directory):
    return load_file(directory / "model.safetensors")


def config(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@torch.no_grad()
def logits(model):
    return model(token_ids(seed=5)).logits


@pytest.fixture
def with_prefix(make_analog):
    model = make_analog()
    install_prefix(model, (1,))
    calibrate_plain_ranges(model, BATCHES)
    return model


@pytest.mark.parametrize("profile", NAMES)
def test_deriving_again_changes_no_tensor(profile, make_analog, tmp_path):
    model = make_analog()
    save_checkpoint(model, tmp_path / "fp")
    for name in ("a", "b"):
        loaded = load_checkpoint(tmp_path / "fp")
        save_profiles(loaded, tmp_path / name, {profile: plan(loaded, profile)})
    save_checkpoint(model, tmp_path / "c", profile=profile, plan=plan(model, profile))
    first = tensors(tmp_path / "a")
    assert same(first, tensors(tmp_path / "b")) and same(first, tensors(tmp_path / "c"))
    assert config(tmp_path / "a") == config(tmp_path / "c")


@pytest.mark.parametrize("profile", NAMES)
def test_transformers_keeps_what_it_loaded_and_saved_again(profile, make_analog, tmp_path):
    model = make_analog()
    save_checkpoint(model, tmp_path / "out", profile=profile, plan=plan(model, profile))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    wanted = logits(loaded)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), wanted)


@pytest.mark.parametrize("profile", NAMES)
def test_a_digital_directory_is_no_analog_model_again(profile, make_analog, tmp_path):
    model = make_analog()
    save_checkpoint(model, tmp_path / "out", profile=profile, plan=plan(model, profile))
    with pytest.raises(AnalogError, match=r"full-precision weights are gone.*profile analog-fp"):
        load_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("profile", ["w8a8o8", "w4a8o8"])
def test_a_fused_group_has_one_input_and_one_output_scale(profile, name, make_analog, tmp_path):
    model = make_analog(name)
    state = tensors(
        save_checkpoint(model, tmp_path / "out", profile=profile, plan=plan(model, profile))
    )
    for layer, _ in analog_layers(model):
        assert state[f"{layer}.output_scale"].shape == (1,)
        parent, _, last = layer.rpartition(".")
        for group in (group for group in GROUPS if last in group):
            for part in ("input_scale", "output_scale"):
                scales = [state[f"{parent}.{member}.{part}"] for member in group]
                assert all(torch.equal(scale, scales[0]) for scale in scales)


def test_the_cost_of_equal_scales_is_measured_where_they_were_not_equal(make_analog):
    model = make_analog()
    assert plan(model, "w4-in-w8").notes == []  # calibrated on the same inputs
    for index, (_, layer) in enumerate(analog_layers(model)):
        layer.set_input_range(0.5 + 0.2 * index)
    (note,) = plan(model, "w4-in-w8").notes
    assert "in 6 layers it is the group's largest" in note
    after, before = (float(found) for found in re.findall(r"(\d\.\d+)", note))
    tokens = torch.cat([batch["input_ids"] for batch in BATCHES])
    with digital_layers(model):
        reference = Reference.of(model, tokens, keep_logits=True)
    with plain_reading(model, plan(model, "w4-in-w8")):
        assert fidelity(model, tokens, reference)["kl"] == pytest.approx(after, abs=5e-5)
    assert before != after
    (unmeasured,) = plan_export(model, "w4-in-w8").notes
    assert "KL" not in unmeasured


def test_four_bits_are_the_same_numbers_packed_or_not(make_analog, tmp_path):
    model = make_analog()
    views = [plain_view(model, plan(model, name)) for name in ("w4-in-w8", "w4a8")]
    assert torch.equal(logits(views[0]), logits(views[1]))
    for profile in ("w4-in-w8", "w4a8"):
        save_checkpoint(model, tmp_path / profile, profile=profile)
    codes = tensors(tmp_path / "w4-in-w8")["model.layers.0.mlp.up_proj.weight"]
    assert codes.dtype == torch.int8 and codes.abs().max() == 7
    packed = tensors(tmp_path / "w4a8")["model.layers.0.mlp.up_proj.weight_packed"]
    assert packed.numel() * packed.element_size() * 2 == codes.numel()


def test_with_a_prefix_input_scales_are_found_with_the_profiles_weights(with_prefix):
    """The other profiles' would not fit: later layers see what the rounded ones made."""
    eight, two = plan(with_prefix, "w8a8"), plan(with_prefix, "w2a8")
    last = "model.layers.1.mlp.down_proj"
    assert not torch.equal(eight.layers[last].input_scale, two.layers[last].input_scale)
    first = "model.layers.0.self_attn.q_proj"  # before it nothing is rounded
    assert torch.equal(eight.layers[first].input_scale, two.layers[first].input_scale)
    before = {name: layer.plain_range.clone() for name, layer in analog_layers(with_prefix)}
    stored = plan_export(with_prefix, "w8a8")
    for name, layer in analog_layers(with_prefix):
        assert torch.equal(layer.plain_range, before[name])
        group = [
            before[f"{name.rpartition('.')[0]}.{member}"]
            for members in GROUPS if name.rpartition(".")[2] in members for member in members
        ] or [before[name]]  # fmt: skip
        assert torch.equal(stored.layers[name].input_scale, torch.stack(group).amax(0) / 127)


def test_calibration_leaves_the_model_as_it_was(with_prefix):
    state = {name: tensor.clone() for name, tensor in with_prefix.state_dict().items()}
    with_prefix.train()
    wanted = dict(with_prefix.named_modules())
    plan(with_prefix, "w4a8o8")
    assert dict(with_prefix.named_modules()) == wanted and with_prefix.training
    assert same(with_prefix.state_dict(), state)
    assert not any(module._forward_hooks for _, module in analog_layers(with_prefix))


def test_batches_are_asked_for_only_where_they_are_needed(make_analog):
    def never():
        raise AssertionError("asked for")
        yield

    model = make_analog()
    for profile in ("w8a8", "w4-in-w8", "w4a8", "w2a8"):
        plan_export(model, profile, batches=never())
    with pytest.raises(AssertionError, match="asked for"):
        plan_export(model, "w8a8o8", batches=never())


@pytest.mark.parametrize(
    ("profile", "given", "message"),
    [
        ("w8a8o8", {}, "quantizes outputs, whose ranges are found on data; give batches"),
        ("mixed", {}, "takes one of bits .* average_bits: 4.5"),
        ("mixed", {"average_bits": 4, "max_bytes": 10}, "but 2 were given"),
        ("mixed", {"average_bits": 4}, "measured on data; give batches of tokens"),
        ("mixed", {"bits": {"x": 4}}, "each quantized layer of the model needs one of 2, 3, 4, 8"),
        ("w8a8", {"weight_scale": "l2"}, "weight_scale is 'l2', but must be max or mse"),
        ("mixed", {"average_bits": 1.5}, "budget is 1.5 bits a weight, but the fewest are 2"),
        ("mixed", {"max_bytes": 99}, "budget is 99 bytes, but 2 bits everywhere already take"),
        ("mixed-in-w8", {"max_bytes": 10**6}, "mixed-in-w8 has no option max_bytes"),
        ("w8a8", {"average_bits": 4}, "w8a8 has no option average_bits; it has weight_scale"),
        ("analog-fp", {"weight_scale": "mse"}, "analog-fp has no option weight_scale; it has none"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_a_sentence(profile, given, message, make_analog, tmp_path):
    with pytest.raises(AnalogError, match=message):
        save_checkpoint(make_analog(), tmp_path / "out", profile=profile, **given)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_for_one_profile_and_holds_its_options(make_analog, tmp_path):
    model = make_analog()
    made = plan_export(model, "w4a8")
    with pytest.raises(AnalogError, match="made for the profile w4a8, not for w8a8"):
        save_checkpoint(model, tmp_path / "out", profile="w8a8", plan=made)
    with pytest.raises(AnalogError, match="A plan holds options and scales already"):
        save_checkpoint(model, tmp_path / "out", profile="w4a8", plan=made, weight_scale="mse")
    assert list(tmp_path.iterdir()) == []


def test_batches_without_tokens_of_one_length_are_refused(make_analog):
    model = make_analog()
    uneven = [{"input_ids": token_ids(2, 10)}, {"input_ids": token_ids(2, 12)}]
    for batches in (uneven, [], [{"inputs_embeds": torch.zeros(1, 4, 64)}]):
        with pytest.raises(
            AnalogError, match="Batches must hold input_ids, sequences of one length"
        ):
            plan_export(model, "mixed", batches=batches, average_bits=4)


def test_a_fused_group_with_a_digital_member_stays_in_full_precision(make_analog, tmp_path):
    """vLLM refuses groups whose members are quantized in several ways."""
    model = make_analog(overrides={"*.q_proj": "digital"})
    made = plan(model, "w8a8")
    assert not any(name.endswith(("k_proj", "v_proj")) for name in made.layers)
    assert any(name.endswith("up_proj") for name in made.layers)
    save_checkpoint(model, tmp_path / "out", profile="w8a8", plan=made)
    ignored = config(tmp_path / "out")["ignore"]
    assert {f"model.layers.0.self_attn.{part}_proj" for part in "qkv"} <= set(ignored)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(plain_view(model, made)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("profile", ["w8a8", "w4a8", "w8a8o8"])
def test_half_precision_is_read_as_the_plain_reading_says(profile, dtype, make_analog, tmp_path):
    save_checkpoint(make_analog(), tmp_path / "fp")
    model = load_checkpoint(tmp_path / "fp", dtype=dtype)
    made = plan(model, profile)
    save_checkpoint(model, tmp_path / "out", profile=profile, plan=made)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    with plain_reading(model, made):
        assert torch.equal(logits(model), logits(loaded))


def test_several_profiles_are_directories_of_their_names(make_analog, tmp_path):
    model = make_analog()
    plans = {name: plan_export(model, name) for name in ("analog-fp", "w4a8")}
    save_profiles(model, tmp_path / "out", plans)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["analog-fp", "w4a8"]
    assert torch.equal(logits(load_checkpoint(tmp_path / "out" / "analog-fp")), logits(model))


def test_mixed_bits_are_config_groups_and_keep_within_the_budget(make_analog, tmp_path):
    model = make_analog()
    made = plan(model, "mixed", average_bits=3.3)
    save_checkpoint(model, tmp_path / "out", profile="mixed", plan=made)
    groups = config(tmp_path / "out")["config_groups"].values()
    told = {name: g["weights"]["num_bits"] for g in groups for name in g["targets"]}
    assert told == {name: layer.weight_bits for name, layer in made.layers.items()}
    assert len(groups) > 1 and {g["format"] for g in groups} == {"pack-quantized"}
    sizes = {name: layer.weight.numel() for name, layer in analog_layers(model)}
    assert sum(sizes[name] * told[name] for name in told) <= 3.3 * sum(sizes.values())
    whole = plan(model, "mixed-in-w8", bits=told)
    assert torch.equal(logits(plain_view(model, whole)), logits(plain_view(model, made)))


def test_a_budget_in_bytes_is_that_of_the_file(make_analog, tmp_path):
    model = make_analog()
    budget = 32_000
    made = plan(model, "mixed", max_bytes=budget)
    state = tensors(save_checkpoint(model, tmp_path / "out", profile="mixed", plan=made))
    parts = ("weight_packed", "weight_scale", "weight_shape")
    taken = sum(t.numel() * t.element_size() for n, t in state.items() if n.endswith(parts))
    shapes = {name: tuple(layer.weight.shape) for name, layer in analog_layers(model)}
    assert taken == sum(packed_bytes(shapes[n], la.weight_bits) for n, la in made.layers.items())
    assert 0.8 * budget < taken <= budget


def test_more_bits_go_where_rounding_costs_most():
    shapes = {name: (8, 32) for name in "abc"}
    costs = {
        2: dict(a=9.0, b=1.0, c=0.1),
        4: dict(a=1.0, b=0.1, c=0.01),
        8: dict.fromkeys("abc", 0),
    }
    assert choose_bits(shapes, costs, average_bits=8 / 3) == {"a": 4, "b": 2, "c": 2}
    assert choose_bits(shapes, costs, average_bits=4) == {"a": 4, "b": 4, "c": 4}
    assert choose_bits(shapes, costs, average_bits=2) == dict.fromkeys("abc", 2)
    assert choose_bits(shapes, costs, average_bits=99) == dict.fromkeys("abc", 8)
    with pytest.raises(AnalogError, match=r"budget is 1\.5 bits a weight, but the fewest are 2"):
        choose_bits(shapes, costs, average_bits=1.5)


def test_the_fewest_bits_fit_a_budget_of_as_many():
    """Shapes of SmolLM2-135M: shares of the weights in floats add up to more than one."""
    kinds = {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576),
             "o_proj": (576, 576), "gate_proj": (1536, 576), "up_proj": (1536, 576),
             "down_proj": (576, 1536)}  # fmt: skip
    shapes = {f"{i}.{kind}": shape for i in range(30) for kind, shape in kinds.items()}
    costs = {bits: dict.fromkeys(shapes, 1.0 / bits) for bits in (2, 3, 4, 8)}
    for bits in (2, 3, 4, 8):
        chosen = choose_bits(shapes, costs, average_bits=bits)
        loss = sum(costs[width][name] for name, width in chosen.items())
        assert loss <= sum(costs[bits].values()) * (1 + 1e-9)
    assert choose_bits(shapes, costs, average_bits=2) == dict.fromkeys(shapes, 2)


@given(st.integers(0, 999), st.floats(2, 8))
@settings(max_examples=50, deadline=None)
def test_any_budget_is_kept_and_fused_groups_stay_together(seed, budget):
    generator = torch.Generator().manual_seed(seed)
    names = [f"{i}.{n}" for i in range(3) for n in ("q_proj", "k_proj", "v_proj", "o_proj")]
    shapes = {n: (int(torch.randint(1, 40, (), generator=generator)) * 8, 64) for n in names}
    costs = {b: {n: float(torch.rand((), generator=generator)) / b**2 for n in names}
             for b in (2, 3, 4, 8)}  # fmt: skip
    chosen = choose_bits(shapes, costs, average_bits=budget)
    weights = {n: shape[0] * shape[1] for n, shape in shapes.items()}
    assert sum(weights[n] * chosen[n] for n in names) <= budget * sum(weights.values()) * (1 + 1e-9)
    for i in range(3):
        assert len({chosen[f"{i}.{n}"] for n in ("q_proj", "k_proj", "v_proj")}) == 1
    loss = sum(costs[chosen[n]][n] for n in names)
    assert all(loss <= sum(costs[b].values()) * (1 + 1e-9) for b in (2, 3, 4) if b <= budget)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_layers_cost_alone_tells_what_mixed_bits_lose(name, make_analog):
    model, tokens = make_analog(name), torch.cat([batch["input_ids"] for batch in BATCHES])
    costs = rounding_costs(model, tokens)
    with digital_layers(model):
        reference = Reference.of(model, tokens, keep_logits=True)
    loss = {}
    for budget in (3, 3.5, 4.5):
        made = plan(model, "mixed", average_bits=budget)
        expected = sum(costs[la.weight_bits][layer] for layer, la in made.layers.items())
        with plain_reading(model, made):
            loss[budget] = fidelity(model, tokens, reference)["kl"]
        assert loss[budget] == pytest.approx(expected, rel=0.25)
    assert loss[3] > 1.5 * loss[3.5] > 2.25 * loss[4.5]


def test_a_model_without_dac_has_no_digital_profile(make_analog):
    model = make_analog(input_bits=None, output_bits=None)
    with pytest.raises(AnalogError, match="w4a8 needs static 8-bit inputs"):
        plan_export(model, "w4a8")
    assert plan_export(tiny_analog_gpt2(make_analog)).layers == {}


def tiny_analog_gpt2(make_analog):
    model = make_analog("gpt2")
    with pytest.raises(AnalogError, match="Conv1D layers"):
        plan_export(model, "w4a8")
    assert type(model) is type(tiny("gpt2"))
    return model
