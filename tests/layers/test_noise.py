"""Training noise: its size, its keys, and that recomputation repeats it."""

import copy
import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny, token_ids
from torch import nn

from analog_plugin import AnalogLinear, AnalogScheme
from analog_plugin.layers import ForwardState, analog_layers, convert_to_analog, forward_state
from analog_plugin.layers.state import keyed_generator


def weight_errors(layer, value):
    """W̃ - W of one training forward without ADC, read off unit inputs."""
    x = torch.eye(layer.in_features) * value
    with torch.no_grad():
        return layer(x).t() / value - layer.weight


def layer(inputs=256, outputs=96, **scheme):
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight.data.mul_(torch.logspace(-1, 1, outputs)[:, None])  # columns of all sizes
    settings = AnalogScheme(**({"output_bits": None} | scheme))
    made = AnalogLinear.from_linear(linear, settings).train()
    made.name, made.state = "layer", ForwardState(seed=0)
    made.set_input_range(1.0)
    return made


@pytest.mark.parametrize("options", [{}, {"noise_per": "step"}, {"keep_noise": False}], ids=str)
@pytest.mark.parametrize("tile_rows", [None, 100], ids=["one tile", "3 tiles"])
@pytest.mark.parametrize("gamma", [0.01, 0.03, 0.2])
def test_noise_is_gaussian_and_relative_to_the_columns_maximum(gamma, tile_rows, options):
    made = layer(weight_noise=gamma, tile_rows=tile_rows)
    for name, value in options.items():
        setattr(made.state, name, value)
    blocks = zip(
        weight_errors(made, 1.0).split(made.tiles, 1),
        made.weight.detach().split(made.tiles, 1),
        strict=True,
    )
    unit = torch.cat([e / w.abs().amax(1, keepdim=True) for e, w in blocks], 1) / gamma
    count = unit.numel()
    assert abs(float(unit.mean())) < 5 / math.sqrt(count)
    assert float(unit.std()) == pytest.approx(1.0, abs=5 / math.sqrt(2 * count))
    assert float((unit**4).mean()) == pytest.approx(3.0, abs=5 * math.sqrt(96 / count))
    by_column = unit.std(1)  # every column has the deviation, not just their mean
    assert float(by_column.min()) > 0.7 and float(by_column.max()) < 1.3


def test_noise_has_the_statistics_of_lightnings():
    from aihwkit_lightning.nn import AnalogLinear as LightningLinear
    from aihwkit_lightning.simulator.configs import (
        TorchInferenceRPUConfig,
        WeightNoiseInjectionType,
    )

    made = layer(weight_noise=0.03, tile_rows=100)
    config = TorchInferenceRPUConfig()
    config.forward.inp_res, config.forward.out_res, config.forward.out_noise = -1, -1, 0.0
    config.modifier.noise_type = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL
    config.modifier.std_dev = 0.03
    config.mapping.max_input_size = 100
    theirs = LightningLinear.from_digital(made.to_linear(), config).train()
    with torch.no_grad():
        reference = theirs(torch.eye(256)).t() - made.weight
    ours = weight_errors(made, 1.0)
    for a, b in zip(ours.split(made.tiles, 1), reference.split(made.tiles, 1), strict=True):
        ratio = a.std(1) / b.std(1)
        assert float(ratio.log().mean()) == pytest.approx(0.0, abs=0.05)
        assert float(ratio.min()) > 0.6 and float(ratio.max()) < 1.6


def test_an_all_zero_column_gets_no_noise():
    made = layer(weight_noise=0.1)
    made.weight.data[5] = 0
    assert torch.equal(weight_errors(made, 1.0)[5], torch.zeros(256))


def test_the_noise_of_a_key_is_that_keys_generators():
    made = layer(weight_noise=0.1)
    made.state.step, made.state.micro_batch = 3, 2
    noise = torch.empty(96, 256).normal_(generator=keyed_generator("0/layer/3/2"))
    expected = 0.1 * made.weight.detach().abs().amax(1, keepdim=True) * noise
    torch.testing.assert_close(weight_errors(made, 1.0), expected, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(*[st.tuples(st.integers(0, 99), st.text(max_size=9), st.integers(0, 99))] * 2)
def test_different_keys_give_different_streams(one, other):
    def draw(key):
        state = ForwardState(key[0])
        state.step = key[2]
        return torch.randn(4, generator=state.generator(key[1], torch.device("cpu")))

    assert torch.equal(draw(one), draw(other)) == (one == other)


def test_a_keyed_forward_leaves_torchs_generator_alone():
    made = layer(weight_noise=0.1)
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    made(torch.randn(2, 256, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(3), expected)


def test_no_noise_where_gamma_is_zero_or_weights_are_programmed():
    from analog_plugin.noise import GaussianNoise

    assert float(weight_errors(layer(weight_noise=0.0), 1.0).abs().max()) < 1e-6
    made = layer(weight_noise=0.1)
    made.program(GaussianNoise(0.05), 0)
    fixed = made.programmed_weight - made.weight.detach()
    torch.testing.assert_close(weight_errors(made, 1.0), fixed, rtol=1e-4, atol=1e-6)


def test_four_bit_weights_are_quantized_in_training_only():
    made = layer(weight_noise=0.0, weight_bits=4)
    weight = made.weight.detach()
    step = weight.abs().amax(1, keepdim=True) / 7
    expected = (weight / step).round() * step - weight
    torch.testing.assert_close(weight_errors(made, 1.0), expected, rtol=1e-4, atol=1e-6)
    assert float(weight_errors(made.eval(), 1.0).abs().max()) < 1e-6


def test_tied_layers_of_a_model_draw_independent_noise():
    model = convert_to_analog(tiny(), AnalogScheme(output_bits=None, weight_noise=0.1)).train()
    forward_state(model).seed = 0
    draws = []
    for _, each in analog_layers(model):
        each.set_input_range(1.0)
        with torch.no_grad():
            each.weight.fill_(1.0)
        draws.append(weight_errors(each, 1.0)[:8, :8].flatten())
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert float(correlation.abs().max()) < 0.6


@pytest.mark.parametrize("options", [{}, {"noise_per": "step"}, {"keep_noise": False}], ids=str)
@pytest.mark.parametrize("seed", [None, 4], ids=["global generator", "keyed"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_of_a_model_changes_no_gradient(name, seed, options):
    def gradients(checkpointing):
        scheme = AnalogScheme(weight_noise=0.1, tile_rows=32)
        model = convert_to_analog(tiny(name), scheme).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for _, each in analog_layers(model):
            each.set_input_range(2.0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        forward_state(model).seed = seed
        for option, value in options.items():
            setattr(forward_state(model), option, value)
        ids = token_ids()
        torch.manual_seed(8)
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    plain, recomputed = gradients(False), gradients(True)
    for parameter, grad in plain.items():
        assert torch.equal(recomputed[parameter], grad), parameter


def test_another_step_draws_other_noise_in_every_layer():
    model = convert_to_analog(tiny(), AnalogScheme(output_bits=None, weight_noise=0.1)).train()
    shared = forward_state(model)
    shared.seed = 0
    for _, each in analog_layers(model):
        each.set_input_range(1.0)
        shared.step = 0
        first = weight_errors(each, 1.0)
        assert torch.equal(weight_errors(each, 1.0), first)
        shared.step = 1
        assert not torch.equal(weight_errors(each, 1.0), first)


def test_gradients_are_those_at_the_noisy_weights():
    made = layer(weight_noise=0.1)
    x = torch.randn(5, 256).clamp(-1, 1).requires_grad_()
    y, grad = made(x), torch.randn(5, 96)
    y.backward(grad)
    noisy = made.weight.detach() + weight_errors(made, 1.0)
    inside = x.detach().abs() <= 1
    torch.testing.assert_close(x.grad, (grad @ noisy) * inside, rtol=1e-3, atol=1e-3)


def test_accumulated_micro_batches_each_keep_their_own_noise():
    # A pooled buffer of noisy weights would be overwritten before the first backward.
    made = layer(weight_noise=0.1)
    x = [torch.randn(5, 256, requires_grad=True) for _ in range(2)]
    apart = []
    for micro in range(2):
        made.state.micro_batch = micro
        apart.append(torch.autograd.grad(made(x[micro]).square().sum(), x[micro])[0])
    losses = []
    for micro in range(2):
        made.state.micro_batch = micro
        losses.append(made(x[micro]).square().sum())
    together = torch.autograd.grad(sum(losses), x)
    for a, b in zip(apart, together, strict=True):
        assert torch.equal(a, b)


def gradients(made, x, keep_noise):
    made.state.keep_noise = keep_noise
    made.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(5)
    y = made(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, made.weight.grad.clone(), made.input_range.grad.clone()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile_rows", [None, 100], ids=["one tile", "3 tiles"])
@pytest.mark.parametrize("weight_bits", [None, 4])
def test_noise_drawn_again_in_the_backward_is_the_forwards(weight_bits, tile_rows, dtype):
    made = layer(weight_noise=0.1, weight_bits=weight_bits, tile_rows=tile_rows, output_bits=8)
    made = made.to(dtype)
    x = torch.randn(7, 256).to(dtype)
    for kept, again in zip(gradients(made, x, True), gradients(made, x, False), strict=True):
        assert torch.equal(kept, again)


def test_without_a_seed_noise_drawn_again_is_the_forwards_and_new_in_each():
    made = layer(weight_noise=0.1)
    made.state.seed, made.state.keep_noise = None, False
    x, grad = torch.randn(5, 256).clamp(-1, 1).requires_grad_(), torch.randn(5, 96)
    torch.manual_seed(3)
    made(x).backward(grad)
    torch.manual_seed(3)
    noisy = made.weight.detach() + weight_errors(made, 1.0)
    torch.testing.assert_close(x.grad, grad @ noisy, rtol=1e-3, atol=1e-3)
    assert not torch.equal(weight_errors(made, 1.0), weight_errors(made, 1.0))


def test_memory_for_the_backward_holds_no_weights_where_noise_is_drawn_again():
    made = layer(inputs=512, outputs=512, weight_noise=0.1)
    x = torch.randn(8, 512, requires_grad=True)

    def kept():
        sizes = {}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() != made.weight.untyped_storage().data_ptr():
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            made(x)
        return sum(sizes.values())

    weights = made.weight.numel() * 4
    assert kept() > weights
    made.state.keep_noise = False
    assert kept() < weights / 50


def test_weights_that_changed_before_the_noise_is_drawn_again_are_an_error():
    made = layer(weight_noise=0.1)
    made.state.keep_noise = False
    y = made(torch.randn(5, 256, requires_grad=True))
    with torch.no_grad():
        made.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("keep_noise", [True, False])
def test_noise_per_step_is_one_for_all_micro_batches_and_new_in_each_step(keep_noise):
    made = layer(weight_noise=0.1)
    made.state.noise_per, made.state.keep_noise = "step", keep_noise
    first = weight_errors(made, 1.0)
    made.state.micro_batch = 3
    assert torch.equal(weight_errors(made, 1.0), first)
    made.state.step = 1
    second = weight_errors(made, 1.0)
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.05
    with torch.no_grad():
        made.weight.mul_(2)  # as an optimizer may within what counts as a step
    torch.testing.assert_close(weight_errors(made, 1.0), 2 * second, rtol=1e-3, atol=1e-5)
    made.eval()
    assert float(weight_errors(made, 1.0).abs().max()) < 1e-5


def test_writes_that_no_version_shows_can_be_told():
    made = layer(weight_noise=0.1)
    made.state.noise_per = "step"
    first = weight_errors(made, 1.0)
    made.weight.data.mul_(2)
    made.forget_step_weight()
    torch.testing.assert_close(weight_errors(made, 1.0), 2 * first, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_models_are_copied_without_the_weights_of_a_step(gamma, name):
    model = convert_to_analog(tiny(name), AnalogScheme(weight_noise=gamma)).train()
    forward_state(model).seed, forward_state(model).noise_per = 0, "step"
    for _, each in analog_layers(model):
        each.set_input_range(2.0)
    model(token_ids(), use_cache=False)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    original = tiny(name)
    for (label, value), (_, kept) in zip(
        original.named_parameters(), ((n, p) for n, p in twin.named_parameters()
        if not n.endswith("input_range")), strict=True,
    ):  # fmt: skip
        assert torch.equal(value, kept), label
    twin(token_ids(), use_cache=False)


def test_a_layer_is_freed_without_a_garbage_collection():
    gc.disable()
    try:
        made = layer(weight_noise=0.1)
        made(torch.randn(2, 256)).sum().backward()
        gone = weakref.ref(made)
        del made
        assert gone() is None
    finally:
        gc.enable()
