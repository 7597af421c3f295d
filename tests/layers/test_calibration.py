"""Ranges from one pass over data, against brute force on the inputs that each layer saw."""

import pytest
import torch
from tiny_models import tiny, token_ids
from torch import nn

from analog_plugin import AnalogError, AnalogScheme, calibrate_ranges
from analog_plugin.layers import analog_layers, convert_to_analog
from analog_plugin.scheme import FUSED_GROUPS


def analog(**scheme):
    return convert_to_analog(tiny(), AnalogScheme(**({"range_init": "max"} | scheme)))


def batches(count=3):
    return [{"input_ids": token_ids(seed=i)} for i in range(count)]


def inputs_of_digital_layers(data):
    """What each linear layer of the original model sees, over all the data."""
    model, seen = tiny(), {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, 1))
            )
    with torch.no_grad():
        for batch in data:
            model(**batch)
    return {name: torch.cat(rows).double() for name, rows in seen.items()}


CRITERIA = {
    "max": lambda x: x.abs().max(),
    "std": lambda x: 5.0 * x.std(),
    "percentile": lambda x: x.abs().flatten().sort().values[-(-x.numel() * 99 // 100) - 1],
}


@pytest.mark.parametrize("tile_rows", [None, 32], ids=["one tile", "tiles"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_ranges_are_those_of_the_digital_models_inputs(criterion, tile_rows):
    model = analog(
        range_init=criterion, range_init_std=5.0, range_percentile=99.0, tile_rows=tile_rows
    )
    found = calibrate_ranges(model, batches())
    seen = inputs_of_digital_layers(batches())
    assert found.keys() == seen.keys() - {"lm_head"}
    for name, layer in analog_layers(model):
        blocks = seen[name].split(layer.tiles, 1)
        exact = torch.stack([CRITERIA[criterion](block) for block in blocks]).float()
        ratio = layer.input_range.detach() / exact
        tolerance = 1 / 32 if criterion == "percentile" else 1e-5  # one bin of the histogram
        assert bool(((ratio - 1).abs() <= tolerance).all()), name
        assert torch.equal(found[name], layer.input_range)


def test_the_order_of_batches_does_not_matter():
    forward = calibrate_ranges(analog(range_init="mse"), batches())
    backward = calibrate_ranges(analog(range_init="mse"), batches()[::-1])
    assert all(torch.equal(forward[name], backward[name]) for name in forward)


def test_calibrating_again_gives_the_same_ranges():
    model = analog()
    first = calibrate_ranges(model, batches())
    second = calibrate_ranges(model, batches())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tied_layers_get_one_range_for_all():
    model = analog(tie_ranges=FUSED_GROUPS)
    found = calibrate_ranges(model, batches())
    alone = calibrate_ranges(analog(), batches())
    for i in range(2):
        prefix = f"model.layers.{i}.self_attn"
        assert found[f"{prefix}.q_proj"] == found[f"{prefix}.k_proj"] == alone[f"{prefix}.q_proj"]


def test_no_data_is_an_error():
    with pytest.raises(AnalogError, match="calibration data is empty"):
        calibrate_ranges(analog(), [])


def test_a_layer_that_no_input_reaches_is_named():
    model = tiny()
    model.extra = nn.Linear(4, 4)
    convert_to_analog(model, AnalogScheme(range_init="max"))
    with pytest.raises(AnalogError, match="No calibration input reached extra"):
        calibrate_ranges(model, batches())


def test_data_of_padding_only_reaches_no_layer():
    ids = token_ids()
    data = [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}]
    with pytest.raises(AnalogError, match="No calibration input reached"):
        calibrate_ranges(analog(), data)


def test_a_tile_that_saw_only_zeros_takes_the_largest_range_of_its_layer():
    model = analog(tile_rows=16)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[16:32] = 0
    found = calibrate_ranges(model, batches())["model.layers.0.self_attn.q_proj"]
    assert float(found[1]) == float(found.max()) > 0


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_the_models_mode_survives(training):
    model = analog().train(training)
    calibrate_ranges(model, batches())
    assert all(module.training is training for module in model.modules())


def test_a_part_that_was_in_evaluation_mode_stays_so():
    model = analog().train()
    model.model.layers[0].eval()
    calibrate_ranges(model, batches())
    assert model.model.layers[1].training and not model.model.layers[0].training


def test_a_failing_batch_leaves_the_model_as_it_was():
    model = analog().train()
    with pytest.raises(ValueError):
        calibrate_ranges(model, [{"no_such_argument": token_ids()}])
    assert model.training
    for _, layer in analog_layers(model):
        assert layer.observer is None and not layer.digital


@pytest.mark.parametrize(
    "scheme", [{"input_range": "dynamic"}, {"input_bits": None, "output_bits": None}], ids=str
)
def test_layers_without_static_ranges_need_no_data(scheme):
    assert calibrate_ranges(analog(**scheme), []) == {}


def test_calibration_takes_no_gradients_and_leaves_weights_alone():
    model = analog()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    calibrate_ranges(model, batches())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert "input_range" in name or torch.equal(parameter, before[name])


@pytest.mark.parametrize("bits", [4, 8])
def test_the_least_squares_range_is_no_worse_than_the_maximum(bits):
    data = [{"input_ids": token_ids(16, 60, seed=i)} for i in range(3)]
    found = calibrate_ranges(analog(range_init="mse", input_bits=bits), data)
    widest = calibrate_ranges(analog(range_init="max"), data)
    seen, levels = inputs_of_digital_layers(data), 2 ** (bits - 1) - 1

    def error(x, value):
        scale = value.double() / levels
        return (x - (x.clamp(-value, value) / scale).round() * scale).square().mean()

    for name, value in found.items():
        assert error(seen[name], value) <= error(seen[name], widest[name]) * 1.01, name


def test_labels_and_an_analog_head_see_every_position():
    plain, labelled = analog(), analog()
    data = batches()
    calibrate_ranges(plain, data)
    calibrate_ranges(labelled, [batch | {"labels": batch["input_ids"]} for batch in data])
    for (_, first), (_, second) in zip(analog_layers(plain), analog_layers(labelled), strict=True):
        assert torch.equal(first.input_range, second.input_range)
    head = convert_to_analog(tiny(), AnalogScheme(range_init="max"), ignore=())
    found = calibrate_ranges(head, data)["lm_head"]
    with torch.no_grad():
        hidden = [tiny().model(**batch).last_hidden_state.abs().max() for batch in data]
    torch.testing.assert_close(found, torch.stack(hidden).max().reshape(1))
