"""What the profiles write for plain loaders, and what they refuse."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, tiny, token_ids
from transformers import AutoModelForCausalLM

from analog_plugin import (
    AnalogError,
    AnalogScheme,
    calibrate_ranges,
    convert_to_analog,
    load_checkpoint,
    save_checkpoint,
)
from analog_plugin.checkpoint import plain_view
from analog_plugin.checkpoint.plain import plain_reading
from analog_plugin.checkpoint.save import plan_export
from analog_plugin.layers import analog_layers
from analog_plugin.layers.prefix import installed_prefix
from analog_plugin.noise import resolve_noise
from analog_plugin.training.ranges import calibrate_plain_ranges
from analog_plugin.training.start import prepare_start

PROFILES = pytest.mark.parametrize(("profile", "bits"), [("analog-fp", None), ("w8a8", 8)])
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@torch.no_grad()
def logits(model):
    return model(token_ids(seed=5)).logits


def tensors(directory):
    return load_file(directory / "model.safetensors")


def config(directory):
    return json.loads((directory / "config.json").read_text())


def known_settings(model):
    """Without the two that transformers notes in the model at every save."""
    values = model.config.to_dict()
    return {key: values[key] for key in values if key not in ("dtype", "architectures")}


@PROFILES
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensors_are_the_digital_models_and_known_parameters_beside_them(
    name, tie, profile, bits, make_analog, tmp_path
):
    digital = tiny(name, tie)
    digital.save_pretrained(tmp_path / "digital")
    model = make_analog(name, tie)
    before, layers = tensors(tmp_path / "digital"), dict(analog_layers(model))
    after = tensors(save_checkpoint(model, tmp_path / "out", profile=profile))
    extra = {f"{layer}.input_scale" for layer in layers}
    if bits is not None:
        extra |= {f"{layer}.weight_scale" for layer in layers}
    assert after.keys() == before.keys() | extra
    for key, tensor in before.items():
        if bits is None or key.rpartition(".")[0] not in layers or key.endswith(".bias"):
            assert torch.equal(after[key], tensor)
        else:
            assert after[key].dtype == torch.int8 and after[key].abs().max() == 127


def test_w8a8_scales_have_the_shapes_that_engines_read(make_analog, tmp_path):
    model = make_analog("qwen2")
    state = tensors(save_checkpoint(model, tmp_path / "out", profile="w8a8"))
    for name, layer in analog_layers(model):
        weight_scale, input_scale = state[f"{name}.weight_scale"], state[f"{name}.input_scale"]
        assert weight_scale.shape == (layer.out_features, 1)
        assert weight_scale.dtype == input_scale.dtype == torch.float32
        assert input_scale.shape == (1,)


@PROFILES
def test_the_input_scale_is_the_largest_range_over_127(profile, bits, make_analog, tmp_path):
    model = make_analog("phi3")  # natively fused: no group to make equal
    for index, (_, layer) in enumerate(analog_layers(model)):
        layer.set_input_range([0.1 * (index + 1) + tile for tile in range(len(layer.tiles))])
    state = tensors(save_checkpoint(model, tmp_path / "out", profile=profile))
    for name, layer in analog_layers(model):
        expected = layer.input_range.detach().max() / 127
        assert torch.equal(state[f"{name}.input_scale"], expected.reshape(1)), name


@PROFILES
def test_a_fused_group_gets_the_largest_range_of_its_members(profile, bits, make_analog, tmp_path):
    model = make_analog("llama")
    for index, (_, layer) in enumerate(analog_layers(model)):
        layer.set_input_range(0.5 + 0.1 * index)
    layers = dict(analog_layers(model))
    state = tensors(save_checkpoint(model, tmp_path / "out", profile=profile))
    for name in layers:
        parent, _, last = name.rpartition(".")
        group = next((group for group in GROUPS if last in group), (last,))
        largest = max(
            layers[f"{parent}.{part}"].input_range.detach().max().item() for part in group
        )
        assert float(state[f"{name}.input_scale"]) == pytest.approx(largest / 127, rel=1e-6)
    # The analog model keeps its own range for each member.
    if profile == "analog-fp":
        loaded = dict(analog_layers(load_checkpoint(tmp_path / "out")))
        for name, layer in layers.items():
            assert torch.equal(loaded[name].input_range, layer.input_range)


@PROFILES
def test_layers_that_stay_digital_are_not_quantized(profile, bits, make_analog, tmp_path):
    model = make_analog(ignore=("lm_head", "down_proj", "layers.1.self_attn.q_proj"))
    directory = save_checkpoint(model, tmp_path / "out", profile=profile)
    names = {key.rpartition(".")[0] for key in tensors(directory) if key.endswith("input_scale")}
    fused = {f"model.layers.1.self_attn.{part}_proj" for part in "kv"}  # with a digital q_proj
    assert names == set(dict(analog_layers(model))) - fused and fused <= set(
        config(directory)["quantization_config"]["ignore"]
    )
    assert "lm_head" in config(directory)["quantization_config"]["ignore"]
    plain = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(logits(plain), logits(plain_view(model, plan_export(model, profile))))


@pytest.fixture
def with_outliers():
    """A model with a digital prefix, whose first token has massive activations in two layers."""
    model = convert_to_analog(tiny(), AnalogScheme(prefix=1, tile_rows=32, range_init="max"))
    batches = [{"input_ids": token_ids()}]
    prepare_start(model, batches, token_ids(), None)
    calibrate_plain_ranges(model, batches)
    for name in ("mlp.down_proj", "self_attn.k_proj"):
        layer = model.model.layers[1].get_submodule(name)
        layer.plain_range = layer.input_range.detach().max().reshape(1) * 8.1
    return model.eval()


@PROFILES
def test_layers_with_massive_activations_are_not_quantized(profile, bits, with_outliers, tmp_path):
    directory = save_checkpoint(with_outliers, tmp_path / "out", profile=profile)
    parts = ("mlp.down_proj", *(f"self_attn.{x}_proj" for x in "qkv"))
    kept = {f"model.layers.1.{part}" for part in parts}
    assert set(config(directory)["quantization_config"]["ignore"]) == kept | {"lm_head"}
    state = tensors(directory)
    for name, layer in analog_layers(with_outliers):
        assert (f"{name}.input_scale" in state) == (name not in kept)
        if name in kept:
            assert torch.equal(state[f"{name}.weight"], layer.weight)
    assert all(name in (directory / "README.md").read_text() for name in kept)
    plain = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(
        logits(plain), logits(plain_view(with_outliers, plan_export(with_outliers, profile)))
    )
    if profile == "analog-fp":
        assert torch.equal(logits(load_checkpoint(directory)), logits(with_outliers))


@PROFILES
def test_a_reading_is_undone_whatever_happens(profile, bits, with_outliers):
    model = with_outliers
    wanted, names = logits(model), [name for name, _ in analog_layers(model)]
    with pytest.raises(KeyError), plain_reading(model, plan_export(model, profile)):
        assert list(analog_layers(model)) == [] and installed_prefix(model) is None
        assert torch.equal(logits(model), logits(model))
        raise KeyError
    assert [name for name, _ in analog_layers(model)] == names
    assert installed_prefix(model) is not None and torch.equal(logits(model), wanted)


@PROFILES
def test_where_every_layer_has_massive_activations_all_are_quantized(
    profile, bits, with_outliers, tmp_path
):
    for _, layer in analog_layers(with_outliers):
        layer.plain_range = layer.input_range.detach().max().reshape(1) * 100
    directory = save_checkpoint(with_outliers, tmp_path / "out", profile=profile)
    assert config(directory)["quantization_config"]["ignore"] == ["lm_head"]
    plain = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(
        logits(plain), logits(plain_view(with_outliers, plan_export(with_outliers, profile)))
    )


@PROFILES
def test_tied_ranges_survive_exactly(profile, bits, make_analog, tmp_path):
    model = make_analog(tie_ranges=GROUPS)
    directory = save_checkpoint(model, tmp_path / "out", profile=profile)
    plain = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(logits(plain), logits(plain_view(model, plan_export(model, profile))))
    if profile == "analog-fp":
        loaded = load_checkpoint(directory)
        assert torch.equal(logits(loaded), logits(model))
        attention = loaded.model.layers[0].self_attn
        assert attention.q_proj.input_range is attention.v_proj.input_range


@pytest.mark.parametrize("bits", [2, 4, 6, 16, None])
def test_inputs_of_other_widths_survive_exactly(bits, make_analog, tmp_path):
    model = make_analog(input_bits=bits, output_bits=None if bits is None else 8)
    directory = save_checkpoint(model, tmp_path / "out")
    assert torch.equal(logits(load_checkpoint(directory)), logits(model))
    assert ("quantization_config" in config(directory)) == (bits is not None)
    plain = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(logits(plain), logits(plain_view(model, plan_export(model))))


def test_dynamic_inputs_survive_exactly(make_analog, tmp_path):
    model = make_analog(input_range="dynamic")
    save_checkpoint(model, tmp_path / "out")
    assert torch.equal(logits(load_checkpoint(tmp_path / "out")), logits(model))


def test_a_plain_load_of_dynamic_inputs_equals_the_emulation(make_analog, tmp_path):
    model = make_analog(input_range="dynamic")
    save_checkpoint(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain), logits(plain_view(model, plan_export(model))))


@pytest.mark.parametrize(
    "scheme", [{"input_bits": 4}, {"input_bits": None, "output_bits": None},
               {"input_range": "dynamic"}],
    ids=["4 bit", "not quantized", "dynamic"],
)  # fmt: skip
def test_w8a8_refuses_inputs_that_are_not_static_8_bit(scheme, make_analog, tmp_path):
    with pytest.raises(AnalogError, match=r"needs static 8-bit inputs.*write profile: analog-fp"):
        save_checkpoint(make_analog(**scheme), tmp_path / "out", profile="w8a8")
    assert list(tmp_path.iterdir()) == []


@PROFILES
def test_a_row_of_zeros_stays_zero(profile, bits, make_analog, tmp_path):
    model = make_analog()
    layer = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        layer.weight[3] = 0
    directory = save_checkpoint(model, tmp_path / "out", profile=profile)
    plain = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(logits(plain), logits(plain_view(model, plan_export(model, profile))))
    assert logits(plain).isfinite().all()


def test_a_model_without_calibrated_ranges_is_not_saved(tmp_path):
    """Its ranges are placeholders: loaded again, they would pass for calibrated ones."""
    model = convert_to_analog(tiny(), AnalogScheme())
    with pytest.raises(AnalogError, match="calibrate_ranges"):
        save_checkpoint(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_digital_model_is_not_saved(tmp_path):
    with pytest.raises(AnalogError, match="no analog layer"):
        save_checkpoint(tiny(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_head_untied_by_hand_is_not_tied_again(tmp_path):
    model = tiny(tie=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.5)
    convert_to_analog(model, AnalogScheme(tile_rows=32), ignore=())
    calibrate_ranges(model, [{"input_ids": token_ids()}])
    save_checkpoint(model, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain), logits(plain_view(model, plan_export(model))))


@PROFILES
def test_saving_changes_nothing_of_the_model(profile, bits, make_analog, tmp_path):
    model = make_analog().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    settings = known_settings(model)
    save_checkpoint(model, tmp_path / "out", profile=profile)
    assert model.training and not model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.requires_grad
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert known_settings(model) == settings


@PROFILES
def test_programmed_noise_is_not_saved(profile, bits, make_analog, tmp_path):
    model = make_analog()
    clean = tensors(save_checkpoint(model, tmp_path / "clean", profile=profile))
    for _, layer in analog_layers(model):
        layer.program(resolve_noise("gaussian:0.1"), 0)
    noisy = tensors(save_checkpoint(model, tmp_path / "noisy", profile=profile))
    assert all(torch.equal(noisy[key], clean[key]) for key in clean)


def test_a_profile_made_of_a_loaded_model_equals_one_made_directly(make_analog, tmp_path):
    model = make_analog()
    save_checkpoint(model, tmp_path / "fp")
    direct = tensors(save_checkpoint(model, tmp_path / "direct", profile="w8a8"))
    loaded = load_checkpoint(tmp_path / "fp")
    derived = tensors(save_checkpoint(loaded, tmp_path / "derived", profile="w8a8"))
    assert direct.keys() == derived.keys()
    assert all(torch.equal(direct[key], derived[key]) for key in direct)


@PROFILES
def test_files_say_that_they_hold_torch_tensors(profile, bits, make_analog, tmp_path):
    directory = save_checkpoint(make_analog(), tmp_path / "out", profile=profile)
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_configuration_names_the_architecture_and_nothing_of_the_plugins_inside_the_quantization(
    make_analog, tmp_path
):
    values = config(save_checkpoint(make_analog(), tmp_path / "out"))
    assert values["architectures"] == ["LlamaForCausalLM"]
    assert values["analog_config"]["version"] == 1
    quantization = values["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == "dense"
    assert quantization["quantization_status"] == "compressed"
    assert not any("analog" in key for key in json.dumps(quantization).split('"'))


def test_the_digital_profile_holds_no_analog_key_and_no_state(make_analog, tmp_path):
    directory = save_checkpoint(make_analog(), tmp_path / "out", profile="w8a8")
    assert "analog_config" not in config(directory)
    assert [path.name for path in (directory / "analog").iterdir()] == ["manifest.json"]
