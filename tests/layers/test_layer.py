"""Behaviour of analog layers that no formula shows."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from analog_plugin import AnalogError, AnalogLinear, AnalogScheme
from analog_plugin.layers.state import ForwardState
from analog_plugin.noise import GaussianNoise, PCMNoise
from analog_plugin.ops.ranges import decay_gradient


def layer(inputs=40, outputs=12, *, ranges=2.0, name="layer", **scheme):
    torch.manual_seed(0)
    made = AnalogLinear.from_linear(nn.Linear(inputs, outputs), AnalogScheme(**scheme))
    made.name = name
    made.set_input_range(ranges)
    return made


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 16), st.floats(0.1, 50))
def test_dac_gives_integer_codes_within_its_levels(bits, value):
    linear = nn.Linear(8, 8, bias=False)
    linear.weight.data.copy_(torch.eye(8))
    made = AnalogLinear.from_linear(linear, AnalogScheme(input_bits=bits, output_bits=None)).eval()
    made.set_input_range(value)
    codes = made(torch.randn(20, 8) * 20).detach().double() / (made.input_range.detach().double()
                                                               / (2 ** (bits - 1) - 1))  # fmt: skip
    assert float((codes - codes.round()).abs().max()) < 1e-2
    assert float(codes.abs().max()) <= 2 ** (bits - 1) - 1 + 1e-2


@pytest.mark.parametrize("tile_rows", [None, 16], ids=["one tile", "3 tiles"])
def test_an_all_zero_column_gives_the_bias_never_nan(tile_rows):
    made = layer(tile_rows=tile_rows)
    made.weight.data[3] = 0
    for prepare in (made.train, made.eval, lambda: made.eval().program(PCMNoise(), 0)):
        prepare()
        y = made(torch.randn(5, 40))
        assert torch.equal(y[:, 3], made.bias[3].expand(5))
        assert y.isfinite().all()


def test_ranges_stay_exact_fp32_whatever_the_model_becomes():
    made = layer(tile_rows=16, ranges=[1.2345678, 2.3456789, 3.4567891])
    before = made.input_range.detach().clone()
    for convert in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), copy.deepcopy):
        made = convert(made)
        assert made.input_range.dtype == torch.float32
        assert torch.equal(made.input_range, before)
        assert isinstance(made.input_range, nn.Parameter)
    fresh = layer(tile_rows=16).half()
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh.input_range, before)


def test_programming_uses_noisy_weights_and_restoring_forgets_them():
    made = layer().eval()
    x = torch.randn(6, 40)
    weight, clean = made.weight.detach().clone(), made(x)
    made.program(PCMNoise(), 0)
    assert not torch.equal(made(x), clean)
    assert torch.equal(made.weight, weight)
    made.restore()
    assert torch.equal(made(x), clean)


def test_a_seed_and_a_layer_determine_the_programmed_weights():
    def programmed(seed, name):
        made = layer(name=name)
        made.program(GaussianNoise(0.02), seed)
        return made.programmed_weight

    assert torch.equal(programmed(3, "a"), programmed(3, "a"))
    assert not torch.equal(programmed(3, "a"), programmed(4, "a"))
    assert not torch.equal(programmed(3, "a"), programmed(3, "b"))


def test_training_noise_is_keyed_by_seed_layer_step_and_micro_batch():
    made, x = layer().train(), torch.randn(6, 40)

    def draw(seed=1, step=0, micro=0, name="layer"):
        made.state, made.name = ForwardState(seed), name
        made.state.step, made.state.micro_batch = step, micro
        torch.manual_seed(torch.randint(1000, (1,)).item())  # must not matter
        return made(x).detach()

    first = draw()
    assert torch.equal(draw(), first)
    for other in (draw(seed=2), draw(step=1), draw(micro=1), draw(name="other")):
        assert not torch.equal(other, first)


def test_without_a_key_noise_follows_torchs_generator():
    made, x = layer().train(), torch.randn(6, 40)
    torch.manual_seed(5)
    first, second = made(x), made(x)
    torch.manual_seed(5)
    assert torch.equal(made(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("seed", [None, 7], ids=["global generator", "keyed"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recomputation_sees_the_same_noise(seed, reentrant):
    def gradients(wrapped):
        torch.manual_seed(2)
        made = layer().train()
        made.state = ForwardState(seed)
        x = torch.randn(6, 40, requires_grad=True)
        torch.manual_seed(3)
        y = checkpoint(made, x, use_reentrant=reentrant) if wrapped else made(x)
        y.square().sum().backward()
        return x.grad, made.weight.grad, made.input_range.grad

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


def test_evaluation_mode_has_no_training_noise():
    made, x = layer().eval(), torch.randn(6, 40)
    assert torch.equal(made(x), made(x))


def test_gradient_stops_beyond_the_range_and_passes_on_it():
    made = layer(2, 3, ranges=1.0, weight_noise=0.0, output_bits=None).train()
    x = torch.tensor([[1.0, 1.0001], [-1.0, -1.0001]], requires_grad=True)
    made(x).sum().backward()
    assert bool((x.grad[:, 0] != 0).all())
    assert bool((x.grad[:, 1] == 0).all())


def test_inputs_and_weights_that_need_no_gradient_get_none():
    made = layer().train()
    made.weight.requires_grad_(False)
    made(torch.randn(3, 40)).sum().backward()
    assert made.weight.grad is None
    assert made.input_range.grad is not None


def test_an_uncalibrated_layer_says_what_to_call():
    made = AnalogLinear.from_linear(nn.Linear(4, 4), AnalogScheme())
    with pytest.raises(AnalogError, match="never set; call calibrate_ranges"):
        made(torch.randn(2, 4))


@pytest.mark.parametrize("values", [0.0, -1.0, float("nan"), float("inf"), [1.0, 2.0]], ids=str)
def test_impossible_ranges_are_refused(values):
    with pytest.raises(AnalogError):
        layer(tile_rows=16).set_input_range(values)


def test_dynamic_inputs_use_each_tokens_own_maximum():
    made = layer(input_range="dynamic", output_bits=None, weight_noise=0.0).eval()
    made.bias.data.zero_()
    x = torch.randn(6, 40)
    assert torch.equal(made(x * 8.0), made(x) * 8.0)
    assert made(torch.zeros(1, 40)).isfinite().all()


def test_clip_counts_leave_out_padding():
    made = layer(ranges=1.0).train()
    made.state = ForwardState(0)
    made.state.attention_mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x = torch.full((2, 3, 40), 0.5)
    x[0, 2], x[1, 1], x[0, 0] = 9.0, 9.0, 9.0  # two clipped padding tokens, one real
    made(x.requires_grad_())
    assert made.clip_counts.tolist() == [[40, 120]]


def test_decay_acts_only_where_few_inputs_clip():
    made = layer(ranges=1.0, tile_rows=20).train()
    made.state = ForwardState(0)
    x = torch.full((1, 4, 40), 0.5)
    x[..., :20] = 9.0
    made(x.requires_grad_())
    decay = decay_gradient(made.input_range.detach(), made.clip_counts, made.scheme)
    torch.testing.assert_close(decay, torch.tensor([0.0, 0.01]))


def test_to_linear_returns_the_same_parameters():
    digital = nn.Linear(8, 4)
    made = AnalogLinear.from_linear(digital, AnalogScheme())
    assert made.weight is digital.weight
    back = made.to_linear()
    assert type(back) is nn.Linear and back.weight is digital.weight and back.bias is digital.bias
