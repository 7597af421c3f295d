"""Stuck devices and IR drop, alone and behind a noise model."""

import pytest
import torch
from tiny_models import tiny, token_ids
from torch import nn

from analog_plugin import (
    AnalogError,
    AnalogLinear,
    AnalogScheme,
    calibrate_ranges,
    convert_to_analog,
    evaluate_noise,
)
from analog_plugin.errors import shown
from analog_plugin.evaluation.noise import programmed
from analog_plugin.noise import (
    GaussianNoise,
    IRDrop,
    NoiseChain,
    Programmed,
    StuckDevices,
    at_times,
    program_tiles,
    resolve_noise,
)
from analog_plugin.noise.specification import split_label


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(columns=200, inputs=300, seed=1):
    return torch.randn(columns, inputs, generator=generator(seed))


def linear(inputs=24, outputs=6):
    layer = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        layer.weight.copy_(rows(outputs, inputs))
    return layer


def analog(source, **fields):
    layer = AnalogLinear.from_linear(source, AnalogScheme(**fields)).eval()
    if fields.get("input_bits", 8) is not None:
        layer.set_input_range(2.0)
    return layer


@pytest.fixture
def model():
    scheme = AnalogScheme(tile_rows=32, output_bits=None)
    model = convert_to_analog(tiny(num_hidden_layers=1), scheme)
    calibrate_ranges(model, [{"input_ids": token_ids(4, 16, seed=5)}])
    return model.eval()


# Stuck devices


@pytest.mark.parametrize("at", ["random", "zero", "full"])
def test_the_share_of_weights_is_stuck_where_it_is_said(at):
    weight = rows()
    made = StuckDevices(0.05, at).program(weight, generator()).weight
    stuck = made != weight
    assert float(stuck.float().mean()) == pytest.approx(0.05, abs=0.003)
    unit = (made / weight.abs().amax(1, keepdim=True))[stuck]
    if at == "random":
        assert float(unit.std()) == pytest.approx(3**-0.5, rel=0.03)
        assert float(unit.abs().max()) <= 1
    else:
        magnitude = torch.full_like(unit, float(at == "full"))
        torch.testing.assert_close(unit.abs(), magnitude)
        assert at == "zero" or abs(float(unit.mean())) < 0.1  # either sign


@pytest.mark.parametrize("fraction", [0, 1])
def test_no_device_or_every_device_can_be_stuck(fraction):
    weight = rows()
    made = StuckDevices(fraction, "zero").program(weight, generator()).weight
    assert torch.equal(made, torch.zeros_like(weight) if fraction else weight)


def test_behind_a_noise_model_the_other_devices_are_that_model_s():
    weight = rows()
    alone = GaussianNoise(0.02).program(weight, generator())
    (tile,) = program_tiles(resolve_noise("gaussian:0.02+stuck:0.1"), weight, [300], generator())
    changed = tile.weight != alone
    assert float(changed.float().mean()) == pytest.approx(0.1, abs=0.005)
    # Full scale is that of the exact weights, not of the noisy ones.
    assert bool((tile.weight.abs() <= weight.abs().amax(1, keepdim=True))[changed].all())


def test_more_stuck_devices_are_those_and_further_ones():
    weight = rows()
    few, many = (StuckDevices(f).program(weight, generator()).weight != weight for f in (0.01, 0.1))
    assert bool(many[few].all()) and int(many.sum()) > int(few.sum())


# IR drop


def test_the_drop_is_what_aihwkit_s_own_source_computes():
    # From `applyIrDrop` of aihwkit 1.1.0's rpu_forward_backward_pass.cpp, compiled on its own.
    weight = torch.sin(1 + torch.arange(24.0, dtype=torch.float64)).view(3, 8)
    weight /= weight.abs().amax(1, keepdim=True)
    inputs = torch.cos(2 * torch.arange(8.0, dtype=torch.float64))[None]
    made = IRDrop(scale=1.5, g_ratio=40.0).disturbance(inputs, weight)
    theirs = torch.tensor([[-0.1451425656, 0.0998051358, 0.1264181375]], dtype=torch.float64)
    torch.testing.assert_close(made, theirs, rtol=0, atol=1e-10)


def drop_reference(x, weight, tiles, scale, g_ratio, full=None):
    """Σ over tiles of the product and its drop, device by device in float64."""
    total = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for xs, ws in zip(x.double().split(tiles, 1), weight.double().split(tiles, 1), strict=True):
        n = xs.shape[1]
        for t, row in enumerate(xs):
            unit = full or float(row.abs().max())
            for i, column in enumerate(ws):
                peak = float(column.abs().max())
                a = n / g_ratio * sum(abs(float(w * v)) for w, v in zip(column, row, strict=True))
                a /= peak * unit
                c = a * (a * (0.05 * a - 0.2) + 0.5)
                late = sum(float(column[j] * row[j]) * (1 - (1 - j / n) ** 2) for j in range(n))
                total[t, i] += float(column @ row) - scale * c * late
    return total


def test_a_layer_loses_it_tile_by_tile_relative_to_its_range():
    source, x = linear(), rows(5, 24, seed=3).clamp(-2, 2)
    layer = analog(source, input_bits=16, output_bits=None, tile_rows=8)
    layer.program(resolve_noise({"name": "ir_drop", "scale": 2.0, "g_ratio": 50.0}), 0)
    expected = drop_reference(x, source.weight.detach(), [8, 8, 8], 2.0, 50.0, full=2.0)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-3, atol=1e-3)
    assert float((layer(x) - source(x)).detach().abs().max()) > 0.05  # it matters here


@pytest.mark.parametrize("digital", [False, True], ids=["no converters", "converters off"])
def test_without_a_dac_it_is_relative_to_the_token_s_largest_input(digital):
    source, x = linear(), rows(5, 24, seed=3)
    bits = {} if digital else {"input_bits": None, "output_bits": None}
    layer = analog(source, tile_rows=12, **bits)
    layer.digital = digital
    layer.program(resolve_noise({"name": "ir_drop", "g_ratio": 50.0}), 0)
    expected = drop_reference(x, source.weight.detach(), [12, 12], 1.0, 50.0)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_adc_sees_the_drop():
    source, x = linear(), rows(50, 24, seed=3).clamp(-2, 2)
    layer = analog(source, output_bits=8, out_bound=14.0)
    clean = layer(x)
    layer.program(resolve_noise({"name": "ir_drop", "scale": 3.0, "g_ratio": 50.0}), 0)
    step = 14.0 * 2.0 * source.weight.detach().abs().amax(1) / 127
    codes = layer(x) / step
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert not torch.equal(layer(x), clean)


DROP = {"name": "ir_drop", "scale": 2.0, "g_ratio": 50.0}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("how", [torch.bfloat16, torch.float16, "autocast"], ids=str)
def test_in_half_precision_the_drop_is_as_exact_as_the_product(how, bits):
    x, exact = rows(5, 24, seed=3).clamp(-2, 2), linear()
    layer = analog(exact, input_bits=bits, output_bits=None)
    layer.program(resolve_noise(DROP), 0)
    full, clean = layer(x).detach(), exact(x).detach()
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x).detach()
    else:
        half = analog(linear().to(how), input_bits=bits, output_bits=None)
        half.program(resolve_noise(DROP), 0)
        y = half(x.to(how)).detach()
    assert y.dtype == (torch.bfloat16 if how == "autocast" else how)
    error = 0.002 if how == torch.float16 else 0.015
    assert float((y.float() - full).abs().max()) < error * float(clean.abs().max())
    assert float((full - clean).abs().max()) > 5 * error * float(clean.abs().max())


def test_inputs_and_weights_of_zero_stay_zero():
    source = linear()
    source.weight.data[2] = 0
    layer = analog(source, out_bound=14.0)
    layer.program(resolve_noise("pcm+ir_drop"), 0)
    assert torch.equal(layer(torch.zeros(2, 24)), torch.zeros(2, 6))
    assert torch.equal(layer(rows(2, 24))[:, 2], torch.zeros(2))


@pytest.mark.parametrize("adc_bound", ["clean", "noisy"])
def test_the_drop_is_that_of_the_conductances(adc_bound):
    """Devices at half of what was asked for, made good behind the ADC: half the current."""
    source, x = linear(), rows(5, 24, seed=3).clamp(-2, 2)

    class Halved:
        def program(self, weight, generator):
            return Programmed(weight / 2, output_scale=2.0)

    layer = analog(source, input_bits=16, output_bits=None, adc_bound=adc_bound)
    layer.program(NoiseChain([Halved(), IRDrop(g_ratio=50.0)], ["halved", "ir_drop"]), 0)
    # The same as a wire of twice the conductance; outputs are digitally as large as before.
    expected = drop_reference(x, source.weight.detach(), [24], 1.0, 100.0, full=2.0)
    torch.testing.assert_close(layer(x).detach().double(), expected, rtol=1e-3, atol=1e-3)


def test_a_dynamic_range_is_relative_to_the_token_s_largest_input():
    source, x = linear(), rows(5, 24, seed=3)
    layer = analog(source, input_bits=16, input_range="dynamic", output_bits=None)
    layer.program(resolve_noise({"name": "ir_drop", "g_ratio": 50.0}), 0)
    expected = drop_reference(x, source.weight.detach(), [24], 1.0, 50.0)
    torch.testing.assert_close(layer(x).detach().double(), expected, rtol=1e-3, atol=1e-3)


def test_converters_are_left_out_where_a_layer_has_its_own(model):
    scheme = AnalogScheme(tile_rows=32, overrides={"o_proj": {"output_bits": 6}})
    model = convert_to_analog(tiny(num_hidden_layers=1), scheme)
    calibrate_ranges(model, [{"input_ids": token_ids(4, 16, seed=5)}])
    model.eval()
    report = evaluate_noise(model, token_ids(5, 11, seed=2), ["ir_drop"], 1, converters=False)
    assert report.mean("ir_drop", "perplexity") > 0


def test_restoring_a_layer_takes_every_fault_back():
    layer, x = analog(linear(), out_bound=14.0), rows(5, 24, seed=3)
    clean = layer(x)
    layer.program(resolve_noise("pcm+stuck:0.01+ir_drop:100"), 0)
    assert not torch.equal(layer(x), clean)
    layer.restore()
    assert torch.equal(layer(x), clean)


def test_programming_within_a_context_is_undone_with_its_faults(model):
    tokens = token_ids(5, 11, seed=2)
    before = model(tokens).logits
    with programmed(model, resolve_noise({"name": "ir_drop", "g_ratio": 50.0}), 0):
        assert not torch.equal(model(tokens).logits, before)
    assert torch.equal(model(tokens).logits, before)


def test_a_model_is_measured_with_faults(model):
    report = evaluate_noise(model, token_ids(5, 11, seed=2), [None, "stuck:0.0", "stuck:0.3"], 3)
    clean = report.mean("none", "perplexity")
    assert report.values("stuck:0.0", "perplexity") == [clean] * 3
    assert len(set(report.values("stuck:0.3", "perplexity"))) == 3


# Names

RECURSIVE = {"name": "pcm", "faults": []}
RECURSIVE["faults"].append(RECURSIVE)


@pytest.mark.parametrize(
    ("label", "parts"),
    [
        ("pcm+stuck:0.01", ("pcm+stuck", 0.01, None)),
        ("pcm:1.5+stuck", ("pcm:1.5+stuck", 0.001, None)),
        ("hermes+ir_drop@1h", ("hermes+ir_drop", 1.0, 3600.0)),
        ("hermes@1h+ir_drop:2", ("hermes+ir_drop", 2.0, 3600.0)),
        ("hermes(faults=['stuck:0.001'])", ("hermes(faults=['stuck:0.001'])", None, None)),
        ("pcm@1h+stuck@1h", ("pcm@1h+stuck@1h", None, None)),
        ("gaussian:1e+0", ("gaussian", 1.0, None)),
    ],
)
def test_a_label_is_read_for_plots(label, parts):
    assert tuple(split_label(label)) == parts


def test_a_mapping_names_faults_with_their_arguments():
    weight = rows()
    form = {
        "name": "gaussian",
        "sigma": 0.0,
        "faults": ["ir_drop", {"name": "stuck", "at": "full"}],
    }
    made = resolve_noise(form).program(weight, generator())
    assert isinstance(made, Programmed) and len(made.disturbances) == 1
    peak = weight.abs().amax(1, keepdim=True).expand_as(weight)
    stuck = made.weight != weight
    assert bool(stuck.any()) and torch.equal(made.weight[stuck].abs(), peak[stuck])


def test_times_reach_the_model_that_drifts():
    pytest.importorskip("aihwkit")
    times = at_times(["hermes+stuck:0.1", "pcm+stuck"], ["1h"])
    assert times == ["hermes+stuck:0.1@1h", "pcm+stuck"]
    assert resolve_noise("hermes+stuck:0.1@1h").models[0].time == 3600.0


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("stuck:2", ["fraction is 2.0", "write stuck:0.001"]),
        ("stuck:nan", ["fraction is nan"]),
        ({"name": "stuck", "at": "half"}, ["at is 'half'", "random, zero or full"]),
        ("ir_drop:-1", ["scale is -1.0", "write scale: 1"]),
        ({"name": "ir_drop", "g_ratio": 0}, ["g_ratio is 0"]),
        ("stuck+pcm", ["has pcm behind another model", "pcm+stuck:0.001"]),
        ("pcm+gaussian:0.1", ["has gaussian behind another model"]),
        ("pcm+", ["no noise model 'pcm+'"]),
        ("pcm+sutck", ["no noise model 'sutck'", "did you mean 'stuck'"]),
        ("pcm+stuck:much", ["'pcm+stuck:much' has the level 'much'"]),
        ("hermes@1h+stuck@1d", ["has 2 times", "write one"]),
        ("pcm+stuck@1d", ["'pcm' has no argument 'time'"]),
        ({"name": "pcm", "faults": "stuck"}, ["faults is 'stuck'", "[stuck:0.001, ir_drop]"]),
        ({"name": "pcm", "faults": ["gaussian"]}, ["has gaussian behind another model"]),
        ({"name": "pcm", "faults": [3]}, ["faults is [3]", "single noise models"]),
        ({"name": "pcm", "faults": ["none"]}, ["faults is ['none']"]),
        ({"name": "pcm", "faults": ["stuck+ir_drop"]}, ["single noise models"]),
        ({"name": "pcm", "faults": b""}, ["faults is b''"]),
        (RECURSIVE, ["single noise models"]),
        ({"name": "pcm", "scale": 10**5000}, ["pcm: scale is"]),
        ({"name": "stuck", "at": torch.zeros(2)}, ["stuck: at is"]),
        ({"name": "gaussian", "per": torch.zeros(2)}, ["gaussian: per is"]),
        ([0] * 100_000, ["noise is [0, 0"]),
        ("ir_drop:1e13", ["from 0 to below 1e12", "write scale: 1"]),
    ],
    ids=shown,
)
def test_what_names_no_fault_says_what_to_write(form, words):
    with pytest.raises(AnalogError) as caught:
        resolve_noise(form)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
