"""Padding tokens neither count as clipped nor move a range, in whole models."""

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny, token_ids

from analog_plugin import AnalogScheme, calibrate_ranges
from analog_plugin.layers import ForwardState, analog_layers, convert_to_analog, forward_state

MODELS = [*ARCHITECTURES, "gpt2"]
REAL = token_ids(2, 9)


def padded(side, filler=0, width=5):
    """The two sequences of REAL with padding tokens on one side, and the mask."""
    pads, off = torch.full((2, width), filler), torch.zeros(2, width, dtype=torch.int64)
    on = torch.ones_like(REAL)
    if side == "left":
        return torch.cat([pads, REAL], 1), torch.cat([off, on], 1)
    return torch.cat([REAL, pads], 1), torch.cat([on, off], 1)


def analog(name, **scheme):
    settings = AnalogScheme(**({"tile_rows": 32, "range_init": "max"} | scheme))
    return convert_to_analog(tiny(name), settings)


@pytest.mark.parametrize("criterion", ["max", "std", "percentile", "mse"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_does_not_move_calibrated_ranges(name, criterion):
    # What padding tokens compute cannot matter: causal models place it on the right.
    ids, mask = padded("right")
    plain = calibrate_ranges(analog(name, range_init=criterion), [{"input_ids": REAL}])
    with_padding = calibrate_ranges(
        analog(name, range_init=criterion), [{"input_ids": ids, "attention_mask": mask}]
    )
    # Other batch shapes round differently, which may move a count to the histogram's next bin.
    tolerance = 1 / 32 if criterion in ("percentile", "mse") else 1e-4
    for layer, ranges in plain.items():
        torch.testing.assert_close(with_padding[layer], ranges, rtol=tolerance, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_is_not_counted_as_clipped(name, side):
    ids, mask = padded(side)
    model = analog(name, weight_noise=0.0)
    for _, layer in analog_layers(model):
        layer.set_input_range(0.5)
    model.train()(ids, attention_mask=mask)
    for layer_name, layer in analog_layers(model):
        rows = torch.tensor(layer.tiles)
        assert layer.clip_counts[:, 1].tolist() == (rows * int(mask.sum())).tolist(), layer_name


def test_other_padding_tokens_give_the_same_clip_counts():
    counts = []
    for filler in (0, 99):
        ids, mask = padded("right", filler)
        model = analog("llama", weight_noise=0.0)
        for _, layer in analog_layers(model):
            layer.set_input_range(0.5)
        model.train()(ids, attention_mask=mask)
        counts.append({n: layer.clip_counts.tolist() for n, layer in analog_layers(model)})
    assert counts[0] == counts[1]
    assert any(clipped for tiles in counts[0].values() for clipped, _ in tiles)


def test_an_attention_mask_given_by_position_is_seen():
    ids, mask = padded("right")
    model = analog("llama")
    model.config.use_cache = False
    calibrate_ranges(model, [{"input_ids": REAL}])
    model(ids, mask)
    assert torch.equal(forward_state(model).attention_mask, mask)


def test_the_mask_of_an_earlier_forward_is_forgotten():
    ids, mask = padded("right")
    model = analog("llama")
    calibrate_ranges(model, [{"input_ids": REAL}])
    model(ids, attention_mask=mask)
    model.train()(ids)
    for _, layer in analog_layers(model):
        assert int(layer.clip_counts[0, 1]) == ids.numel() * layer.tiles[0]


def test_a_forward_without_gradients_is_not_counted():
    model = analog("llama")
    calibrate_ranges(model, [{"input_ids": REAL}])
    with torch.no_grad():
        model.train()(REAL)
    assert not any(bool(layer.clip_counts.any()) for _, layer in analog_layers(model))


@pytest.mark.parametrize(
    ("mask", "shape"),
    [
        (None, (2, 3, 8)),
        (torch.ones(2, 1, 3, 3), (2, 3, 8)),
        (torch.ones(4, 3), (2, 3, 8)),
        (torch.ones(2, 2), (2, 3, 8)),
        (torch.ones(2, 3), (6, 8)),
    ],
    ids=["no mask", "4-d mask", "other batch", "shorter", "flat inputs"],
)
def test_a_mask_that_does_not_fit_the_inputs_hides_nothing(mask, shape):
    state = ForwardState()
    state.attention_mask = mask
    assert state.row_mask(torch.zeros(shape)) is None


def test_with_cached_tokens_the_mask_of_the_new_ones_counts():
    state = ForwardState()
    state.attention_mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    assert state.row_mask(torch.zeros(2, 1, 8)).tolist() == [True, False]
