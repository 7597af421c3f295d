"""Models on aihwkit's tiles and back: aihwkit computes, layer by layer, what ours compute."""

import copy
from pathlib import Path

import pytest
import torch
from adc_codes import count_flips
from aihwkit.inference import GlobalDriftCompensation, PCMLikeNoiseModel
from aihwkit.inference.noise.hermes import HermesNoiseModel
from aihwkit.nn import AnalogConv2d as AihwkitConv2d
from aihwkit.nn import AnalogLinear as AihwkitLinear
from aihwkit.nn.conversion import convert_to_analog as aihwkit_convert
from aihwkit.simulator.configs import (
    BoundManagementType,
    InferenceRPUConfig,
    NoiseManagementType,
    TorchInferenceRPUConfig,
    TorchInferenceRPUConfigIRDropT,
)
from tiny_models import tiny, token_ids
from torch import nn

from analog_integrations.aihwkit import PCMNoiseModel, evaluate_drift, from_aihwkit, to_aihwkit
from analog_plugin import (
    AnalogError,
    AnalogLinear,
    AnalogScheme,
    convert_to_analog,
    load_checkpoint,
    save_checkpoint,
)
from analog_plugin.evaluation import Reference
from analog_plugin.evaluation.fidelity import fidelity
from analog_plugin.layers import analog_layers
from analog_plugin.layers.prefix import install_prefix, installed_prefix
from analog_plugin.noise import resolve_noise

ARCHITECTURES = ("llama", "phi3", "gpt2")
TILES = {"one tile": None, "several tiles": 24}
EXACT = {"dtype": torch.float64, "drift_compensation": False}
each_model = pytest.mark.parametrize("name", ARCHITECTURES)
each_tiling = pytest.mark.parametrize("tile_rows", TILES.values(), ids=TILES.keys())


def inputs_of(model, tokens):
    """What each analog layer reads."""
    seen = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name, layer in analog_layers(model)
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def flips(ours, theirs, x):
    return count_flips(ours, ours(x), theirs(x))


def layer_pair(inputs=83, outputs=29, *, exact=False, bias=True, spread=1.0, value=1.5, **scheme):
    """One layer of ours with ranges, the same on aihwkit's tiles, and inputs; fp32 or exact."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias))
    convert_to_analog(model, AnalogScheme(**scheme), ignore=())
    layer = model[0].eval()
    layer.set_input_range(torch.linspace(value, 2 * value, len(layer.tiles)))
    theirs = to_aihwkit(model, **(EXACT if exact else {}))[0]
    x = torch.randn(5, 40, inputs) * spread
    return (layer.double(), theirs, x.double()) if exact else (layer, theirs, x)


@each_tiling
@each_model
def test_every_layer_computes_the_same_on_aihwkit_s_tiles(name, tile_rows, make_analog):
    model = make_analog(name, tile_rows=tile_rows)
    converted = to_aihwkit(model)
    flipped = total = 0
    for layer_name, x in inputs_of(model, token_ids(8, 33, seed=5)).items():
        theirs = converted.get_submodule(layer_name)
        assert type(theirs) is AihwkitLinear
        count, outputs = flips(model.get_submodule(layer_name), theirs, x)
        flipped, total = flipped + count, total + outputs
    assert total > 200_000 and flipped < total / 1000


@each_tiling
@each_model
def test_whole_models_agree(name, tile_rows, make_analog):
    model = make_analog(name, tile_rows=tile_rows)
    tokens = token_ids(8, 33, seed=5)
    found = fidelity(to_aihwkit(model), tokens, Reference.of(model, tokens))
    assert found["kl"] <= 1e-3 and found["agreement"] > 0.99


@each_tiling
@each_model
def test_in_float64_no_code_of_whole_models_differs(name, tile_rows, make_analog):
    model = make_analog(name, tile_rows=tile_rows)
    converted = to_aihwkit(model, **EXACT)
    exact, tokens = copy.deepcopy(model).double(), token_ids(24, 33, seed=5)
    with torch.no_grad():
        theirs, ours = converted(tokens).logits, exact(tokens).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-12)
    found = fidelity(converted, tokens, Reference.of(exact, tokens))
    assert found["kl"] <= 1e-9 and found["agreement"] == 1


@pytest.mark.parametrize("spread", [0.02, 1.0, 6.0], ids=["wide", "usual", "clipping hard"])
@each_tiling
def test_flips_are_rare_whatever_the_inputs(tile_rows, spread):
    ours, theirs, x = layer_pair(577, 65, tile_rows=tile_rows, spread=spread)
    count, total = flips(ours, theirs, x)
    assert count < total / 1000


SCHEMES = {
    "dynamic inputs": {"input_range": "dynamic"},
    "static inputs": {"input_range": "static"},
    "no converters": {"input_bits": None, "output_bits": None},
    "no ADC": {"output_bits": None},
    "4-bit DAC, 6-bit ADC": {"input_bits": 4, "output_bits": 6},
    "ADC that saturates": {"out_bound": 0.5},
    "narrow tiles": {"tile_columns": 10},
    "fake-quantized in training": {"weight_bits": 4},
    "ranges that clip": {"value": 0.2},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
@each_tiling
def test_every_scheme_computes_the_same(tile_rows, scheme):
    ours, theirs, x = layer_pair(tile_rows=tile_rows, **scheme)
    with torch.no_grad():
        y, z = ours(x), theirs(x)
    off = (y - z).abs() > 2e-6 * float(z.abs().max())
    # A DAC's tie, or an ADC's, may fall to either side.
    assert float(off.any(-1).float().mean()) <= 0.02
    # Which is not because both compute next to nothing, or the scheme has no effect.
    with torch.no_grad():
        exact = nn.functional.linear(x, ours.weight, ours.bias)
    error = float((z - exact).norm() / exact.norm())
    assert (error < 1e-6) if scheme.get("input_bits", 8) is None else (1e-3 < error < 1)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
@each_tiling
def test_in_float64_no_code_of_any_scheme_differs(tile_rows, scheme):
    ours, theirs, x = layer_pair(577, 65, tile_rows=tile_rows, exact=True, **scheme)
    with torch.no_grad():
        y, z = ours(x), theirs(x)
    torch.testing.assert_close(y, z, rtol=0, atol=1e-13 * float(z.abs().max()))


def test_columns_of_zeros_give_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 6, bias=False))
    with torch.no_grad():
        model[0].weight[2] = 0
    convert_to_analog(model, AnalogScheme(tile_rows=16), ignore=())
    model[0].set_input_range(2.0)
    converted = to_aihwkit(model, "pcm")
    converted.program_analog_weights()
    y = converted(torch.randn(9, 40))
    assert y.isfinite().all() and y[:, 2].abs().max() == 0 and y.abs().max() > 0


def test_layers_keep_their_own_schemes_and_digital_ones_stay_digital(make_analog):
    overrides = {"*.0.*.o_proj": {"input_bits": 6}, "*.1.*.down_proj": "digital"}
    model = make_analog("llama", overrides=overrides, tile_rows=32)
    converted = to_aihwkit(model)
    linear = {n: m for n, m in converted.named_modules() if type(m) is nn.Linear}
    assert list(linear) == ["model.layers.1.mlp.down_proj", "lm_head"]
    for layer_name, x in inputs_of(model, token_ids()).items():
        count, total = flips(
            model.get_submodule(layer_name), converted.get_submodule(layer_name), x
        )
        assert count < total / 500
    back = from_aihwkit(converted)
    schemes = {n: layer.scheme for n, layer in analog_layers(back)}
    bits = {n: s.input_bits for n, s in schemes.items() if n.endswith("o_proj")}
    assert bits == {"model.layers.0.self_attn.o_proj": 6, "model.layers.1.self_attn.o_proj": 8}


def test_a_digital_prefix_stays(make_analog):
    model = make_analog("llama")
    tokens = token_ids(4, 20)
    with torch.no_grad():
        prefix = install_prefix(tiny("llama"), (1,))
        without = to_aihwkit(model)(tokens).logits
        install_prefix(model, prefix)
        expected = model(tokens).logits
        found = to_aihwkit(model)(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert float((found - without).abs().max()) > 0.05
    assert installed_prefix(from_aihwkit(to_aihwkit(model))).tokens == (1,)


def test_half_precision_becomes_fp32(make_analog):
    model = make_analog("llama", dtype=torch.bfloat16)
    converted = to_aihwkit(model)
    assert {p.dtype for p in converted.parameters()} == {torch.float32}
    tokens = token_ids()
    exact = copy.deepcopy(model).float()
    found = fidelity(converted, tokens, Reference.of(exact, tokens))
    assert found["kl"] <= 1e-3
    assert {p.dtype for n, p in model.named_parameters() if "range" not in n} == {torch.bfloat16}


def test_the_model_stays_as_it_is_and_so_do_torch_s_draws(make_analog):
    model = make_analog("llama")
    tokens, state = token_ids(), torch.get_rng_state()
    with torch.no_grad():
        before = model(tokens).logits
        converted = to_aihwkit(model)
        assert torch.equal(torch.get_rng_state(), state)
        converted.program_analog_weights()
        assert torch.equal(model(tokens).logits, before)


def test_a_directory_converts_without_the_original(make_analog, tmp_path):
    model = make_analog("gpt2")
    save_checkpoint(model, tmp_path / "out")
    tokens = token_ids()
    with torch.no_grad():
        found = to_aihwkit(tmp_path / "out")(tokens).logits
        assert torch.equal(found, to_aihwkit(model)(tokens).logits)


def test_the_document_s_reader_without_this_package_computes_the_same(
    make_analog, tmp_path, monkeypatch
):
    model = make_analog("llama")
    save_checkpoint(model, tmp_path / "demo-out")
    text = (Path(__file__).parents[2] / "docs" / "aihwkit.md").read_text(encoding="utf-8")
    block = text.partition("## Without this package")[2].partition("```python\n")[2]
    code = block.partition("```")[0]
    assert "analog_integrations" not in code and "analog_plugin" not in code
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    with torch.no_grad():
        expected = to_aihwkit(model)(token_ids()).logits
        assert torch.equal(names["model"](token_ids()).logits, expected)


def test_the_converted_model_generates(make_analog):
    model = make_analog("llama")
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(token_ids(2, 5), **options)
    assert torch.equal(to_aihwkit(model).generate(token_ids(2, 5), **options), expected)


def test_errors_grow_with_time_on_aihwkit_s_devices(make_analog):
    model = make_analog("llama")
    converted = to_aihwkit(model, "hermes")
    ours = dict(analog_layers(model))
    errors = {}
    for seed in range(5):
        torch.manual_seed(seed)
        converted.program_analog_weights()
        for time in (0.0, 3600.0, 86_400.0, 365 * 86_400.0):
            converted.drift_analog_weights(time)
            for name, layer in converted.named_analog_layers():
                tiles = [tile for column in layer.analog_module.array for tile in column]
                made = torch.cat([t.get_weights()[0] * t.alpha for t in tiles], dim=1)
                clean = ours[name].tile_weight.detach()
                error = float((made - clean).norm() / clean.norm())
                errors.setdefault(time, []).append(error)
    means = [sum(values) / len(values) for values in errors.values()]
    assert means == sorted(means) and means[-1] > 1.3 * means[0] and means[0] > 0.05


def test_the_outputs_of_chips_get_worse_and_one_seed_is_one_chip(make_analog):
    model, tokens = make_analog("llama"), token_ids(6, 33)
    converted = to_aihwkit(model, "hermes")
    reference = Reference.of(tiny("llama"), tokens)
    report = evaluate_drift(
        converted, tokens, ["0s", "1h", "1d", "1y"], 5, reference=reference, label="hermes"
    )
    times = ["hermes@0s", "hermes@1h", "hermes@1d", "hermes@1y"]
    means = [report.mean(time, "kl") for time in times]
    assert means == sorted(means) and means[-1] > 1.2 * means[0]
    assert report.values("none", "kl") == [fidelity(converted, tokens, reference)["kl"]]
    # Neither the order of the seeds nor what was read before plays a part.
    again = evaluate_drift(converted, tokens, ["1d"], [3], reference=reference, label="hermes")
    (third,) = [c for c in report.cells if (c.noise, c.seed) == ("hermes@1d", 3)]
    assert again.values("hermes@1d", "kl") == [third.metrics["kl"]]
    (fresh,) = [c for c in report.cells if (c.noise, c.seed) == ("hermes", 3)]
    assert again.values("hermes", "kl") == [fresh.metrics["kl"]]


def test_noise_models_go_by_their_names(make_analog):
    model = make_analog("llama")

    def chosen(noise, **options):
        tile = next(to_aihwkit(model, noise, **options).analog_tiles())
        return tile.rpu_config.noise_model, tile.rpu_config.drift_compensation

    assert isinstance(chosen(None)[0], HermesNoiseModel)
    assert isinstance(chosen(None)[1], GlobalDriftCompensation)
    assert chosen("pcm:1.5")[0].fit.scale == 1.5 and type(chosen("pcm")[0]) is PCMNoiseModel
    assert chosen({"name": "hermes", "devices": 1})[0].num_devices == 1
    assert chosen(resolve_noise("pcm_like:2"))[0].prog_noise_scale == 2
    own = PCMLikeNoiseModel(g_max=20.0)
    assert chosen(own)[0].g_max == 20.0
    assert chosen(own, drift_compensation=False)[1] is None


@each_tiling
@each_model
def test_there_and_back_nothing_is_lost(name, tile_rows, make_analog):
    model = make_analog(name, tile_rows=tile_rows, tile_columns=40)
    back = from_aihwkit(to_aihwkit(model), weight_noise=0.02)
    ours, found = dict(analog_layers(model)), dict(analog_layers(back))
    assert type(back) is type(model) and list(found) == list(ours)
    for layer_name, layer in found.items():
        before = ours[layer_name]
        assert type(layer) is type(before) and layer.tiles == before.tiles
        assert torch.equal(layer.input_range.data, before.input_range.data)
        assert layer.scheme == before.scheme.replace(weight_noise=0.02)
        assert layer.weight.shape == before.weight.shape
        assert (layer.bias is None) or torch.equal(layer.bias, before.bias)
        # aihwkit keeps weights over their column's maximum: fp32 gives them back to one bit.
        torch.testing.assert_close(layer.weight, before.weight, rtol=1.2e-7, atol=0)
    tokens = token_ids()
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_weights_that_were_bf16_come_back_exactly(make_analog):
    model = make_analog("llama", dtype=torch.bfloat16)
    back = dict(analog_layers(from_aihwkit(to_aihwkit(model)).bfloat16()))
    for name, layer in analog_layers(model):
        assert torch.equal(back[name].weight, layer.weight)


@each_tiling
def test_a_programmed_model_comes_back_programmed(tile_rows, make_analog, tmp_path):
    model, tokens = make_analog("llama", tile_rows=tile_rows), token_ids()
    converted = to_aihwkit(model, "hermes")
    torch.manual_seed(0)
    converted.drift_analog_weights(86_400.0)
    back = from_aihwkit(converted)
    with torch.no_grad():
        drifted, clean = converted(tokens).logits, model(tokens).logits
        torch.testing.assert_close(back(tokens).logits, drifted, rtol=1e-4, atol=1e-4)
        assert float((drifted - clean).abs().max()) > 0.1
        for _, layer in analog_layers(back):
            layer.restore()
        torch.testing.assert_close(back(tokens).logits, clean, rtol=1e-4, atol=1e-4)
        save_checkpoint(back, tmp_path / "out")
        assert torch.equal(load_checkpoint(tmp_path / "out")(tokens).logits, back(tokens).logits)


def exact_configuration(**forward):
    """What a user of aihwkit writes for converters of 8 bits."""
    config = TorchInferenceRPUConfig()
    io, ranges, mapping = config.forward, config.pre_post.input_range, config.mapping
    io.inp_res = io.out_res = 254
    io.out_bound, io.out_noise = 12.0, 0.0
    io.noise_management = NoiseManagementType.NONE
    io.bound_management = BoundManagementType.NONE
    ranges.enable, ranges.init_from_data = True, 0
    mapping.weight_scaling_omega, mapping.weight_scaling_columnwise = 1.0, True
    mapping.max_input_size = mapping.max_output_size = 32
    for field, value in forward.items():
        setattr(io, field, value)
    return config


def test_a_model_of_aihwkit_becomes_ours():
    model = aihwkit_convert(tiny("llama"), exact_configuration(), exclude_modules=["lm_head"])
    for i, tile in enumerate(model.analog_tiles()):
        tile.set_input_range(2.0 + 0.001 * (i // 100))
    back = from_aihwkit(model.eval(), clip_sigma=None)
    assert {layer.scheme.out_bound for _, layer in analog_layers(back)} == {12.0}
    assert isinstance(back.model.layers[0].mlp.up_proj, AnalogLinear)
    assert type(back.lm_head) is nn.Linear
    tokens = token_ids()
    found = fidelity(back, tokens, Reference.of(model, tokens))
    assert found["kl"] <= 1e-3 and found["agreement"] > 0.99


def test_what_ours_cannot_hold_is_refused():
    def refuse(message, config=None, *, layer=None, change=None, **training):
        module = AihwkitLinear(8, 4, rpu_config=config or exact_configuration())
        model = nn.Sequential(layer or module).eval()
        if change is not None:
            change(next(m for m in model.modules() if hasattr(m, "rpu_config")))
        with pytest.raises(AnalogError, match=message):
            from_aihwkit(model, **training)

    refuse(r"0 has forward.out_noise = 0.1.*set it to 0.0", exact_configuration(out_noise=0.1))
    refuse(r"inp_res = 100.*254 \(8 bits\)", exact_configuration(inp_res=100))
    refuse(r"out_bound = -1.*14.0", exact_configuration(out_bound=-1))
    refuse(r"inp_bound = 2", exact_configuration(inp_bound=2.0))
    refuse(
        r"bound_management = 'ITERATIVE'.*NONE",
        exact_configuration(bound_management=BoundManagementType.ITERATIVE),
    )
    refuse(
        r"noise_management = 'ABS_MAX'.*NONE beside an input range",
        exact_configuration(noise_management=NoiseManagementType.ABS_MAX),
    )
    unscaled = exact_configuration()
    unscaled.mapping.weight_scaling_omega = 0.0
    refuse(r"weight_scaling_omega to 1.0 .*remap_analog_weights", unscaled)
    refuse(r"TorchInferenceRPUConfigIRDropT", TorchInferenceRPUConfigIRDropT())
    refuse(r"0 is an AnalogConv2d", layer=AihwkitConv2d(1, 1, 2, rpu_config=exact_configuration()))
    refuse(r"holds analog layers of aihwkit", layer=nn.Linear(3, 3))
    refuse(r"out_bound is what the model itself says", out_bound=3.0)
    two = nn.Sequential(
        *(AihwkitLinear(8, 4, rpu_config=exact_configuration(out_bound=b)) for b in (3.0, 4.0))
    )
    with pytest.raises(AnalogError, match=r"different forward.out_bound \(3.0, 4.0\).*set one"):
        from_aihwkit(two)


def test_what_aihwkit_cannot_hold_is_refused_or_named(make_analog):
    model = make_analog("llama")
    for noise, message in {
        "gaussian": r"'gaussian'.*write noise_model='pcm'",
        "pcm+stuck:0.01": r"'pcm\+stuck:0.01'.*write noise_model='pcm'",
        "hermes@1d": r"'hermes@1d' has a time.*drift_analog_weights",
        "hermse": r"hermes",
    }.items():
        with pytest.raises(AnalogError, match=message):
            to_aihwkit(model, noise)
    with pytest.raises(AnalogError, match=r"drift_compensation is 'yes'.*True"):
        to_aihwkit(model, drift_compensation="yes")
    with pytest.raises(AnalogError, match=r"tiles is 'cpp'.*torch or c\+\+"):
        to_aihwkit(model, tiles="cpp")
    with pytest.raises(AnalogError, match=r"dtype is torch.bfloat16.*write dtype=torch.float32"):
        to_aihwkit(model, dtype=torch.bfloat16)
    with pytest.raises(AnalogError, match=r"drift compensation.*drift_compensation=False"):
        to_aihwkit(model, dtype=torch.float64)
    with pytest.raises(AnalogError, match=r"tiles is 'c\+\+'.*tiles='torch'"):
        to_aihwkit(model, tiles="c++", **EXACT)
    with pytest.raises(AnalogError, match=r"LlamaForCausalLM.*convert_to_analog"):
        to_aihwkit(tiny("llama"))
    with pytest.raises(AnalogError, match=r"input ranges of .* were never set"):
        to_aihwkit(convert_to_analog(tiny("llama"), AnalogScheme()))
    with pytest.warns(UserWarning, match=r"adc_bound is 'noisy'.*clean"):
        to_aihwkit(make_analog("llama", adc_bound="noisy"))
    next(layer for _, layer in analog_layers(model)).program(resolve_noise("pcm"), 0)
    with pytest.raises(AnalogError, match=r"q_proj is programmed.*restore\(\)"):
        to_aihwkit(model)


def test_c_plus_plus_tiles_compute_the_same_or_say_that_they_do_not_run(make_analog):
    model, tokens = make_analog("llama"), token_ids()
    try:
        AihwkitLinear(2, 2, rpu_config=InferenceRPUConfig()).eval()(torch.ones(1, 2))
    except Exception:
        with pytest.raises(AnalogError, match=r"C\+\+ tiles of aihwkit .* with torch .*'torch'"):
            to_aihwkit(model, tiles="c++")
    else:
        converted = to_aihwkit(model, tiles="c++")
        for name, x in inputs_of(model, tokens).items():
            count, total = flips(model.get_submodule(name), converted.get_submodule(name), x)
            assert count < total / 500


def test_ties_that_the_ranges_break_are_refused(make_analog):
    converted = to_aihwkit(make_analog("llama"))
    group = (("q_proj", "k_proj"),)
    attention = converted.get_submodule("model.layers.0.self_attn")
    equal = [tile.input_range.item() for tile in attention.q_proj.analog_tiles()]
    for tile, value in zip(attention.k_proj.analog_tiles(), equal, strict=True):
        tile.set_input_range(value)
    back = from_aihwkit(converted, tie_ranges=group)
    layers = dict(analog_layers(back))
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    assert layers[names[0]].input_range is layers[names[1]].input_range
    next(attention.k_proj.analog_tiles()).set_input_range(9.0)
    with pytest.raises(AnalogError, match=r"leave tie_ranges out"):
        from_aihwkit(converted, tie_ranges=group)


def test_a_checkpoint_of_gpt2_comes_back_from_aihwkit_whole(make_analog, tmp_path):
    model, tokens = make_analog("gpt2"), token_ids()
    back = from_aihwkit(to_aihwkit(model))
    save_checkpoint(back, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(load_checkpoint(tmp_path / "out")(tokens).logits, back(tokens).logits)


def test_calibrated_ranges_of_a_root_layer_are_not_enough():
    layer = AnalogLinear.from_linear(nn.Linear(4, 4), AnalogScheme())
    layer.set_input_range(1.0)
    with pytest.raises(AnalogError, match=r"no model that holds analog layers"):
        to_aihwkit(layer)
