"""``torch.compile``: no graph break in training, and the same noise, codes and gradients."""

import copy
import shutil

import pytest
import torch
from tiny_models import tiny, token_ids
from torch import nn

from analog_plugin import AnalogLinear, AnalogScheme
from analog_plugin.layers import ForwardState, analog_layers, convert_to_analog, forward_state
from analog_plugin.noise import GaussianNoise


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    # One graph must serve all steps; fullgraph makes a break in it an error.
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def pair(name="llama", ranges=2.0, **scheme):
    """A model, and a copy of it that is compiled without generating code."""
    torch.manual_seed(0)
    settings = AnalogScheme(**({"tile_rows": 32, "weight_noise": 0.1} | scheme))
    plain = convert_to_analog(tiny(name), settings).train()
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if ranges is not None:
        for _, each in analog_layers(plain):
            each.set_input_range(ranges)
    inner = copy.deepcopy(plain)
    for model in (plain, inner):
        forward_state(model).seed = 3
    return plain, inner, torch.compile(inner, fullgraph=True, backend="aot_eager")


def step(model, inner, number, ids, mask=None):
    forward_state(inner).step = number
    inner.zero_grad()
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return float(loss.detach())


def assert_same_gradients(plain, inner):
    for (name, a), b in zip(plain.named_parameters(), inner.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert float((a.grad - b.grad).norm()) <= 1e-5 * float(a.grad.norm()) + 1e-9, name


def test_a_models_steps_are_one_graph_with_the_same_noise():
    plain, inner, compiled = pair(out_bound=2.0)  # some outputs saturate
    ids, mask = token_ids(), torch.ones_like(token_ids())
    mask[0, :2] = 0
    losses = []
    for number in range(3):
        losses.append(step(plain, plain, number, ids, mask))
        assert step(compiled, inner, number, ids, mask) == pytest.approx(losses[-1], rel=1e-6)
        assert_same_gradients(plain, inner)
    assert len(set(losses)) == 3
    counts = [[each.clip_counts for _, each in analog_layers(m)] for m in (plain, inner)]
    assert all(torch.equal(a, b) for a, b in zip(*counts, strict=True))
    assert sum(int(each[:, 0].sum()) for each in counts[0]) > 0


def test_layers_of_gpt2_draw_the_same_noise():
    # Without converters: its activation is decomposed, and rounds otherwise than uncompiled; a code
    # that falls to another side would hide everything else.
    plain, inner, compiled = pair("gpt2", input_bits=None, output_bits=None)
    loss = step(plain, plain, 0, token_ids())
    assert step(compiled, inner, 0, token_ids()) == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(plain, inner)


def test_ranges_found_during_training_are_the_same():
    plain, inner, compiled = pair(
        ranges=None,
        range_init_in_training=True,
        range_init_batches=2,
        range_init_std=3.0,
        output_bits=None,  # codes that fall to another side would spread
    )
    for number in range(3):
        ids = token_ids(seed=number)
        loss = step(plain, plain, number, ids)
        assert step(compiled, inner, number, ids) == pytest.approx(loss, rel=1e-6)
    for (_, a), (_, b) in zip(analog_layers(plain), analog_layers(inner), strict=True):
        torch.testing.assert_close(a.input_range, b.input_range, rtol=1e-5, atol=0)
        assert int(a.range_batches) == int(b.range_batches) == 2


def test_gradient_checkpointing_in_a_graph_repeats_the_noise():
    plain, inner, compiled = pair()
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    loss = step(plain, plain, 0, token_ids())
    assert step(compiled, inner, 0, token_ids()) == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(plain, inner)


@pytest.mark.parametrize(
    "scheme",
    [
        {"range_gradient": "lsq"},
        {"input_range": "dynamic"},
        {"output_bits": None, "weight_bits": 4},
        {"input_bits": None, "output_bits": None},
    ],
    ids=str,
)
def test_other_schemes_of_a_layer(scheme):
    torch.manual_seed(0)
    settings = AnalogScheme(**({"tile_rows": 20, "weight_noise": 0.05} | scheme))
    plain = AnalogLinear.from_linear(nn.Linear(48, 24), settings).train()
    plain.set_input_range(1.5)
    plain.name, plain.state = "layer", ForwardState(seed=1)
    other = copy.deepcopy(plain)
    x, grad = torch.randn(9, 48), torch.randn(9, 24)
    results = []
    for model in (plain, torch.compile(other, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.backward(grad)
        results.append((y.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert_same_gradients(plain, other)


def test_programmed_weights_and_evaluation():
    plain, inner, compiled = pair()
    for model in (plain, inner):
        model.eval()
        for _, each in analog_layers(model):
            each.program(GaussianNoise(0.05), 4)
    with torch.no_grad():
        a = plain(token_ids(), use_cache=False).logits
        b = compiled(token_ids(), use_cache=False).logits
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++ to generate code")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generated_code_computes_the_same(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40).to(dtype)
    plain = AnalogLinear.from_linear(linear, AnalogScheme(weight_noise=0.05, tile_rows=48)).train()
    plain.set_input_range(2.0)
    plain.name, plain.state = "layer", ForwardState(seed=1)
    other = copy.deepcopy(plain)
    x, grad = torch.randn(33, 96).to(dtype), torch.randn(33, 40).to(dtype)
    results = []
    for model in (plain, torch.compile(other, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.backward(grad)
        results.append((y.detach().float(), leaf.grad.float()))
    resolution = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for a, b in zip(*results, strict=True):
        # An output may fall on the next ADC code, where fused arithmetic rounds otherwise.
        assert float((a - b).norm() / a.norm()) < max(resolution, 2e-3)


def test_a_layer_born_without_memory_runs_in_a_graph():
    scheme = AnalogScheme(weight_noise=0.05, output_bits=None)
    with torch.device("meta"):
        born = AnalogLinear(16, 8, bias=False, scheme=scheme)
    born = born.to_empty(device="cpu").train()
    nn.init.normal_(born.weight)
    born.set_input_range(2.0)
    born.name, born.state = "layer", ForwardState(seed=1)
    x = torch.randn(4, 16)
    expected = born(x)
    compiled = torch.compile(born, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-6)
