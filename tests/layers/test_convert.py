"""Conversion of whole models, in place, and back."""

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny, token_ids
from torch import nn

from analog_plugin import AnalogError, AnalogScheme, calibrate_ranges, convert_to_analog, to_digital
from analog_plugin.layers import analog_layers, digital_layers, forward_state
from analog_plugin.scheme import FUSED_GROUPS

SCHEME = AnalogScheme(tile_rows=32)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "gpt2"])
def test_round_trip_gives_the_same_logits(name):
    model, ids = tiny(name), token_ids()
    before = {key: id(p) for key, p in model.named_parameters()}
    expected = model(ids).logits
    convert_to_analog(model, SCHEME)
    assert {k: id(p) for k, p in model.named_parameters() if "input_range" not in k} == before
    with digital_layers(model):
        assert torch.equal(model(ids).logits, expected)
    to_digital(model)
    assert torch.equal(model(ids).logits, expected)
    assert {key: id(p) for key, p in model.named_parameters()} == before


def test_every_linear_layer_but_the_head_is_converted():
    model = convert_to_analog(tiny(), SCHEME)
    names = [name for name, _ in analog_layers(model)]
    assert len(names) == 14 and "lm_head" not in names
    assert type(model.lm_head) is nn.Linear
    assert all(layer.name == name for name, layer in analog_layers(model))


def test_hooks_dtype_and_ties_survive():
    model = tiny(tie=True).to(torch.bfloat16)
    seen = []
    target = model.model.layers[0].mlp.up_proj
    target.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    convert_to_analog(model, SCHEME.replace(range_init="max"))
    calibrate_ranges(model, [{"input_ids": token_ids()}])
    seen.clear()
    model(token_ids())
    assert seen == ["AnalogLinear"]
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_accelerate_hook_moves_with_the_layer():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counts(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counts.calls += 1
            return args, kwargs

    model = tiny()
    add_hook_to_module(model.model.layers[0].mlp.up_proj, Counts())
    convert_to_analog(model, SCHEME)
    with digital_layers(model):
        model(token_ids())
    assert Counts.calls == 1


def test_patterns_choose_what_stays_digital():
    model = convert_to_analog(tiny(), SCHEME, ignore=["lm_head", "*.layers.0.*", "down_proj"])
    names = [name for name, _ in analog_layers(model)]
    assert names and all("layers.1" in name and "down_proj" not in name for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore": ["lm_haed"]}, "ignore names 'lm_haed', which matches no module"),
        ({"targets": ["Conv2d"]}, "No layer is left to convert"),
        ({"ignore": ["lm_head", "model"], "targets": ["lm_head"]}, "No layer is left"),
    ],
    ids=["unknown ignore", "unknown target", "all ignored"],
)
def test_names_that_match_nothing_are_errors(options, message):
    with pytest.raises(AnalogError, match=message):
        convert_to_analog(tiny(), SCHEME, **options)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(AnalogError, match="no linear layer"):
        convert_to_analog(nn.Sequential(nn.ReLU()), SCHEME, ignore=())


def test_a_second_conversion_is_refused():
    model = convert_to_analog(tiny(), SCHEME)
    with pytest.raises(AnalogError, match="analog already"):
        convert_to_analog(model, SCHEME)


def test_a_digital_model_cannot_be_made_digital():
    with pytest.raises(AnalogError, match="no analog layer"):
        to_digital(tiny())
    with pytest.raises(AnalogError, match="no analog layer"):
        forward_state(tiny())


def test_a_head_tied_to_the_embedding_is_refused():
    with pytest.raises(AnalogError, match="shares its weight with the embedding"):
        convert_to_analog(tiny(tie=True), SCHEME, ignore=())


def test_tied_groups_share_one_range():
    model = convert_to_analog(tiny(), SCHEME.replace(tie_ranges=FUSED_GROUPS, range_init="max"))
    calibrate_ranges(model, [{"input_ids": token_ids()}])
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.input_range is attention.v_proj.input_range
    assert attention.q_proj.owns_range and not attention.k_proj.owns_range
    assert attention.o_proj.input_range is not attention.q_proj.input_range
    assert model.model.layers[1].self_attn.q_proj.input_range is not attention.q_proj.input_range


def test_a_converted_model_generates():
    model = convert_to_analog(tiny(), SCHEME.replace(range_init="max"))
    calibrate_ranges(model, [{"input_ids": token_ids()}])
    assert model.generate(token_ids(), max_new_tokens=4, do_sample=False).shape == (3, 21)
