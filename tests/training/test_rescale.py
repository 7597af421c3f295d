"""Rescaling changes nothing for a digital model, and lowers the expected error of an analog one."""

import copy

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny, token_ids
from torch import nn
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    BitNetConfig,
    BitNetForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
)

from analog_plugin import AnalogScheme, convert_to_analog
from analog_plugin.layers import AnalogLinear, digital_layers
from analog_plugin.noise import GaussianNoise, PCMNoise
from analog_plugin.training.rescale import (
    expected_error,
    fold,
    fold_groups,
    rescale_model,
)

SCHEME = AnalogScheme(tile_rows=32, range_init="max", out_bound=4.0)


def with_outliers(model):
    """Input channels of very different size, as trained models have them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter[::9] *= 30
    return model


def batches(count=4):
    return [{"input_ids": token_ids(4, 17, seed)} for seed in range(count)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folding_keeps_the_function_in_float64(name):
    model = tiny(name).double()
    wanted = model(token_ids()).logits
    groups = list(fold_groups(model))
    assert len(groups) == 4 * len(model.model.layers)
    generator = torch.Generator().manual_seed(0)
    before = copy.deepcopy(model.state_dict())
    for group in groups:
        producer = model.get_submodule(group.producer).weight
        size = producer[group.rows].shape[0]
        fold(model, group, torch.rand(size, generator=generator, dtype=torch.float64) * 4 + 0.2)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert len(changed) >= 5 * len(model.model.layers)
    torch.testing.assert_close(model(token_ids()).logits, wanted, rtol=1e-9, atol=1e-10)


def test_a_model_of_another_shape_has_no_groups():
    assert list(fold_groups(tiny("gpt2"))) == []
    assert rescale_model(convert_to_analog(tiny("gpt2"), SCHEME), batches(), None) == []


@pytest.mark.parametrize(
    "noise", [None, GaussianNoise(0.03), PCMNoise()], ids=["none", "gaussian", "pcm"]
)
@pytest.mark.parametrize("scales", ["one", "many"])
def test_the_expected_error_is_that_of_the_layer(noise, scales):
    torch.manual_seed(0)
    linear = nn.Linear(96, 200, bias=False)
    x = torch.randn(400, 96) * torch.linspace(0.2, 3, 96)
    s = torch.ones(96) if scales == "one" else torch.linspace(0.5, 2, 96)
    expected, ranges = expected_error([linear.weight.detach()], x, s, SCHEME, noise)
    with torch.no_grad():
        linear.weight.mul_(s)
    layer = AnalogLinear.from_linear(linear, SCHEME).eval()
    layer.set_input_range(ranges)
    exact = (x / s).double() @ linear.weight.double().t()
    errors = []
    for seed in range(12 if noise else 1):
        if noise:
            layer.program(noise, seed)
        with torch.no_grad():
            errors.append((layer(x / s).double() - exact).square().sum() / exact.square().sum())
    assert expected == pytest.approx(float(torch.stack(errors).mean()), rel=0.05)


def analog(ignore=("lm_head",)):
    return convert_to_analog(with_outliers(tiny()), SCHEME, ignore)


def digital_logits(model):
    with digital_layers(model):
        return model(token_ids()).logits


@pytest.mark.parametrize("noise", [None, PCMNoise()], ids=["converters", "pcm"])
def test_rescaling_lowers_the_error_on_inputs_that_were_not_searched(noise):
    model = analog()
    wanted = digital_logits(model)
    found = rescale_model(model, batches(), noise)
    assert found
    assert all(record.after < record.before for record in found)
    torch.testing.assert_close(digital_logits(model), wanted, rtol=1e-3, atol=1e-3)


def test_groups_with_a_digital_layer_are_left_alone():
    model = analog(("lm_head", "q_proj"))
    before = copy.deepcopy(model.state_dict())
    found = rescale_model(model, batches(), None)
    assert found and not any("q_proj" in name for r in found for name in r.group.consumers)
    for name, value in model.state_dict().items():
        if "q_proj" in name or "input_layernorm" in name:
            assert torch.equal(value, before[name])


def test_a_bound_that_is_chosen_later_does_not_stop_it():
    model = convert_to_analog(with_outliers(tiny()), SCHEME.replace(out_bound=None))
    assert rescale_model(model, batches(), None)


def test_rescaling_repeats_exactly():
    assert rescale_model(analog(), batches(), PCMNoise()) == rescale_model(
        analog(), batches(), PCMNoise()
    )


@pytest.mark.parametrize(
    ("model_class", "config_class", "options", "groups"),
    [
        (GemmaForCausalLM, GemmaConfig, {"head_dim": 16}, 2),
        (ArceeForCausalLM, ArceeConfig, {}, 2),
        (BitNetForCausalLM, BitNetConfig, {}, 0),
    ],
    ids=["norm of 1 + weight", "activation without a gate", "norms within"],
)
def test_what_only_looks_like_a_llama_keeps_its_function(
    model_class, config_class, options, groups
):
    shape = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1,
             "eos_token_id": 2}  # fmt: skip
    torch.manual_seed(0)
    model = model_class(config_class(**shape, **options)).eval().double()
    wanted = model(token_ids()).logits
    found = list(fold_groups(model))
    for group in found:
        size = model.get_submodule(group.producer).weight[group.rows].shape[0]
        fold(model, group, torch.linspace(0.5, 2, size, dtype=torch.float64))
    assert len(found) == groups
    torch.testing.assert_close(model(token_ids()).logits, wanted, rtol=1e-9, atol=1e-10)


def test_inputs_without_a_dac_need_no_ranges():
    scheme = SCHEME.replace(input_bits=None, output_bits=None, range_init="output")
    assert rescale_model(convert_to_analog(with_outliers(tiny()), scheme), batches(), PCMNoise())
