"""Ranges found during the first training steps, as the paper finds them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny, token_ids
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerState

from analog_plugin import AnalogLinear, AnalogScheme
from analog_plugin.layers import ForwardState, analog_layers, convert_to_analog, forward_state
from analog_plugin.scheme import FUSED_GROUPS
from analog_plugin.training import AnalogCallback

KAPPA = 18.0


def layer(batches=3, *, tile_rows=None, seed=0, **scheme):
    settings = AnalogScheme(
        range_init_in_training=True, range_init_batches=batches, tile_rows=tile_rows, **scheme
    )
    torch.manual_seed(0)
    made = AnalogLinear.from_linear(nn.Linear(24, 6), settings).train()
    made.state = None if seed is None else ForwardState(seed)
    return made


def running(start, steps, tiles):
    """λ ← (λ·n + κ·std) / (n + 1) over lists of the rows that each step saw, in float64."""
    value = torch.full((len(tiles),), float(start), dtype=torch.float64)
    for n, rows in enumerate(steps):
        deviation = torch.stack([b.double().std() for b in rows.split(tiles, 1)])
        value = (value * n + KAPPA * deviation) / (n + 1)
    return value.float()


def step(made, number, *micro_batches):
    made.state.step = number
    for micro, x in enumerate(micro_batches):
        made.state.micro_batch = micro
        made(x)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 8), st.sampled_from([None, 10]), st.integers(0, 1000))
def test_the_range_is_the_mean_over_the_first_batches(batches, steps, tile_rows, seed):
    made = layer(batches, tile_rows=tile_rows)
    generator = torch.Generator().manual_seed(seed)
    data = [torch.randn(5, 7, 24, generator=generator) * (i + 1) for i in range(steps)]
    for number, x in enumerate(data):
        step(made, number, x)
    seen = [x.view(-1, 24) for x in data[:batches]]
    torch.testing.assert_close(
        made.input_range.data, running(1.0, seen, made.tiles), rtol=1e-5, atol=0
    )
    assert int(made.range_batches) == min(batches, steps)


def test_the_first_batch_replaces_whatever_was_there():
    made, x = layer(), torch.randn(5, 7, 24)
    made.input_range.data.fill_(1e9)
    step(made, 0, x)
    torch.testing.assert_close(made.input_range.data, running(0, [x.view(-1, 24)], made.tiles))


def test_a_batch_is_all_micro_batches_of_a_step():
    made, whole = layer(), torch.randn(8, 7, 24)
    for number in range(2):
        step(made, number, *whole.split(2))
    expected = running(1.0, [whole.view(-1, 24)] * 2, made.tiles)
    torch.testing.assert_close(made.input_range.data, expected, rtol=1e-5, atol=0)
    assert int(made.range_batches) == 2


def test_the_last_batch_takes_all_its_micro_batches():
    made, whole = layer(batches=1), torch.randn(8, 7, 24)
    step(made, 0, *whole.split(2))
    step(made, 1, whole * 100)
    expected = running(1.0, [whole.view(-1, 24)], made.tiles)
    torch.testing.assert_close(made.input_range.data, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recomputation_is_not_another_batch(reentrant):
    plain, recomputed = layer(), layer()
    recomputed.load_state_dict(plain.state_dict())
    plain.state.step = recomputed.state.step = 4
    x = torch.randn(5, 7, 24, requires_grad=True)
    plain(x).sum().backward()
    checkpoint(recomputed, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(plain.input_range, recomputed.input_range)
    assert int(recomputed.range_batches) == 1
    assert torch.equal(plain.weight.grad, recomputed.weight.grad)


def test_padding_does_not_move_the_initialised_range():
    made, x = layer(), torch.randn(2, 4, 24)
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]])
    made.state.attention_mask = mask
    polluted = torch.where(mask.bool()[..., None], x, 1e4)
    step(made, 0, polluted)
    expected = running(1.0, [x.view(-1, 24)[mask.view(-1).bool()]], made.tiles)
    torch.testing.assert_close(made.input_range.data, expected, rtol=1e-5, atol=0)


def test_evaluation_does_not_move_ranges():
    made, x = layer(), torch.randn(2, 4, 24)
    step(made, 0, x)
    before = made.input_range.detach().clone()
    made.eval()(x * 50)
    assert torch.equal(made.input_range, before) and int(made.range_batches) == 1


def test_a_tile_that_sees_only_zeros_keeps_its_range():
    made, x = layer(tile_rows=12), torch.randn(5, 24)
    x[:, 12:] = 0
    step(made, 0, x[None])
    ranges = made.input_range.tolist()
    assert ranges[1] == 1.0 and ranges[0] > 10


def test_the_count_goes_past_256_in_half_precision():
    # A counter in the weight's bfloat16 would stick there.
    made, x = layer(batches=300, tile_rows=None).to(torch.bfloat16), torch.randn(3, 24).bfloat16()
    with torch.no_grad():
        for number in range(310):
            step(made, number, x[None])
    assert int(made.range_batches) == 300
    assert made.input_range.dtype == torch.float32


def test_initialisation_goes_on_where_a_saved_layer_stopped():
    data = [torch.randn(5, 7, 24) * (i + 1) for i in range(5)]
    whole, first, second = layer(batches=4), layer(batches=4), layer(batches=4)
    for number, x in enumerate(data):
        step(whole, number, x)
        if number < 2:
            step(first, number, x)
    second.load_state_dict(first.state_dict())
    for number in (2, 3, 4):
        step(second, number, data[number])
    assert torch.equal(second.input_range, whole.input_range)
    assert int(second.range_batches) == 4


def test_a_second_run_leaves_initialised_ranges_alone():
    # Its steps count from zero again, and it has more micro-batches.
    scheme = AnalogScheme(range_init_in_training=True, range_init_batches=1)
    model = convert_to_analog(nn.Sequential(nn.Linear(24, 6)), scheme, ignore=()).train()
    made, x = model[0], torch.randn(5, 7, 24)
    for micro_batches in (1, 2):
        AnalogCallback(seed=0).on_train_begin(None, TrainerState(), None, model=model)
        step(made, 0, *[x] * micro_batches)
        if micro_batches == 1:
            made.input_range.data.fill_(5.0)  # as the optimizer would
    assert made.input_range.tolist() == [5.0]


def test_reloading_within_a_step_begins_it_again():
    # As resuming from a checkpoint in the same process does.
    made, x = layer(batches=2), torch.randn(5, 7, 24)
    saved = {name: value.clone() for name, value in made.state_dict().items()}
    step(made, 0, x)
    made.load_state_dict(saved)
    step(made, 0, 2 * x)
    expected = running(1.0, [2 * x.view(-1, 24)], made.tiles)
    torch.testing.assert_close(made.input_range.data, expected, rtol=1e-5, atol=0)
    assert int(made.range_batches) == 1


def test_a_batch_without_tokens_does_not_count():
    # An expert of a mixture that no token was routed to.
    made, x = layer(), torch.randn(5, 7, 24)
    step(made, 0, torch.zeros(0, 24))
    assert made.input_range.tolist() == [1.0] and int(made.range_batches) == 0
    step(made, 1, x)
    expected = running(1.0, [x.view(-1, 24)], made.tiles)
    torch.testing.assert_close(made.input_range.data, expected, rtol=1e-5, atol=0)


def test_without_a_key_every_forward_is_a_batch():
    made = layer(seed=None)
    for _ in range(2):
        made(torch.randn(5, 24))
    assert int(made.range_batches) == 2


def test_the_owner_of_a_tied_range_initialises_it_alone():
    scheme = AnalogScheme(
        range_init_in_training=True, range_init_batches=2, tie_ranges=FUSED_GROUPS
    )
    model = convert_to_analog(tiny(), scheme).train()
    shared, ids = forward_state(model), token_ids()
    shared.seed = 0
    for number in range(3):
        shared.step = number
        model(ids)
    for name, each in analog_layers(model):
        assert int(each.range_batches) == (2 if each.owns_range else 0), name
        assert each.input_range.tolist() != [1.0]


@pytest.mark.parametrize("tied", [(), FUSED_GROUPS], ids=["untied", "tied"])
def test_gradient_checkpointing_of_a_model_changes_neither_ranges_nor_gradients(tied):
    def trained(checkpointing):
        scheme = AnalogScheme(
            range_init_in_training=True, range_init_batches=2, tie_ranges=tied, tile_rows=32
        )
        model = convert_to_analog(tiny(), scheme).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        shared, ids = forward_state(model), token_ids()
        shared.seed = 1
        for number in range(3):
            shared.step = number
            for micro in range(2):
                shared.micro_batch = micro
                model(ids, labels=ids, use_cache=False).loss.backward()
        return {n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()}

    plain, recomputed = trained(False), trained(True)
    for name, (value, grad) in plain.items():
        assert torch.equal(recomputed[name][0], value), name
        assert torch.equal(recomputed[name][1], grad), name
