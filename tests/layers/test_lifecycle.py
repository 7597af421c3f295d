"""What happens to layers and models over their life: replaced weights, copies, modes, hooks."""

import copy
import pickle

import pytest
import torch
from tiny_models import tiny, token_ids
from torch import nn

from analog_plugin import AnalogError, AnalogLinear, AnalogScheme, calibrate_ranges, to_digital
from analog_plugin.layers import analog_layers, convert_to_analog, digital_layers, forward_state
from analog_plugin.noise import GaussianNoise, PCMNoise
from analog_plugin.ops.clip import clip_to_sigma
from analog_plugin.scheme import FUSED_GROUPS


def layer(inputs=40, outputs=12, *, ranges=2.0, seed=0, **scheme):
    torch.manual_seed(seed)
    made = AnalogLinear.from_linear(nn.Linear(inputs, outputs), AnalogScheme(**scheme))
    made.set_input_range(ranges)
    return made


def analog(name="llama", **scheme):
    settings = AnalogScheme(**({"tile_rows": 32, "range_init": "max"} | scheme))
    model = convert_to_analog(tiny(name), settings)
    calibrate_ranges(model, [{"input_ids": token_ids()}])
    return model


def replaced(made, weight):
    made.weight = nn.Parameter(weight)


def through_data(made, weight):
    made.weight.data.copy_(weight)


def in_place(made, weight):
    with torch.no_grad():
        made.weight.copy_(weight)


def loaded(made, weight):
    made.load_state_dict({**made.state_dict(), "weight": weight})


def assigned(made, weight):
    made.load_state_dict({**made.state_dict(), "weight": weight}, assign=True)


@pytest.mark.parametrize("change", [replaced, through_data, in_place, loaded, assigned])
def test_new_weights_between_evaluations_bring_their_own_adc_bounds(change):
    # Weights that were never written in place: replacing one Parameter by another leaves nothing
    # that a version number could tell apart.
    torch.manual_seed(0)
    old, new, x = torch.randn(12, 40), torch.randn(12, 40) * 3, torch.randn(5, 40)
    made = layer()
    made.weight = nn.Parameter(old)
    made.eval()
    made(x)
    change(made, new)
    fresh = layer()
    fresh.weight = nn.Parameter(new.clone())
    assert torch.equal(made(x), fresh.eval()(x))


def test_casting_between_evaluations_updates_the_adc_bounds():
    made, x = layer().eval(), torch.randn(5, 40).bfloat16()
    made(x.float())
    assert torch.equal(made.to(torch.bfloat16)(x), layer().to(torch.bfloat16).eval()(x))


def test_clipping_between_evaluations_updates_the_adc_bounds():
    made, fresh, x = layer().eval(), layer().eval(), torch.randn(5, 40)
    made(x)
    for each in (made, fresh):
        clip_to_sigma(each.weight, 1.0)
    assert torch.equal(made(x), fresh(x))


@pytest.mark.parametrize("bound", ["clean", "noisy"])
def test_another_seed_reprograms_from_the_clean_weights(bound):
    made, x = layer(adc_bound=bound).eval(), torch.randn(5, 40)
    made.program(PCMNoise(), 1)
    first = made(x)
    made.program(PCMNoise(), 2)
    assert not torch.equal(made(x), first)
    made.program(PCMNoise(), 1)
    assert torch.equal(made(x), first)


@pytest.mark.parametrize("bound", ["clean", "noisy"])
def test_programming_and_evaluating_work_in_inference_mode(bound):
    made, x = layer(adc_bound=bound).eval(), torch.randn(5, 40)
    made.program(PCMNoise(), 1)
    expected = made(x).detach()
    made.restore()
    with torch.inference_mode():
        made.program(PCMNoise(), 1)
        assert torch.equal(made(x), expected)


def test_weights_programmed_in_inference_mode_pass_gradients_afterwards():
    made, x = layer().eval(), torch.randn(5, 40, requires_grad=True)
    with torch.inference_mode():
        made.program(PCMNoise(), 1)
    made(x).sum().backward()
    assert bool(x.grad.any())


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_ranges_saved_in_half_precision_are_loaded_as_fp32(assign):
    made = layer()
    saved = {**made.state_dict(), "input_range": torch.tensor([3.5], dtype=torch.bfloat16)}
    made.load_state_dict(saved, assign=assign)
    assert made.input_range.dtype == torch.float32 and made.input_range.tolist() == [3.5]


def test_a_layer_built_in_inference_mode_evaluates():
    x = torch.randn(5, 40)
    expected = layer().eval()(x)
    with torch.inference_mode():
        assert torch.equal(layer().eval()(x), expected)


def test_training_goes_on_after_an_evaluation_in_inference_mode():
    made, x = layer().eval(), torch.randn(5, 40)
    with torch.inference_mode():
        made(x)
    made(x).sum().backward()
    assert made.weight.grad is not None


def test_program_and_restore_over_a_model_change_no_parameter_and_no_logit():
    model, ids = analog(), token_ids()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    clean = model(ids).logits
    for _, each in analog_layers(model):
        each.program(PCMNoise(), 7)
    assert not torch.equal(model(ids).logits, clean)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for _, each in analog_layers(model):
        each.restore()
    assert torch.equal(model(ids).logits, clean)


def test_programmed_weights_are_not_saved():
    made = layer()
    keys = set(made.state_dict())
    made.program(GaussianNoise(), 0)
    assert set(made.state_dict()) == keys == {"weight", "bias", "input_range", "range_batches"}


def test_every_layer_of_a_model_gets_its_own_programming_error():
    model = analog()
    errors = []
    for _, each in analog_layers(model):
        with torch.no_grad():
            each.weight.fill_(0.5)
        each.program(GaussianNoise(0.1), 0)
        errors.append(tuple(each.programmed_weight[0, :4].tolist()))
    assert len(set(errors)) == len(errors)


def test_nested_digital_contexts_end_with_the_outer_one():
    model, ids = analog(), token_ids()
    with digital_layers(model):
        digital = model(ids).logits
        with digital_layers(model):
            pass
        assert torch.equal(model(ids).logits, digital)
    assert not torch.equal(model(ids).logits, digital)


def test_an_error_within_the_digital_context_ends_it():
    model, ids = analog(), token_ids()
    expected = model(ids).logits
    with pytest.raises(KeyError), digital_layers(model):
        raise KeyError
    assert torch.equal(model(ids).logits, expected)


def test_digital_layers_can_be_switched_off_by_an_argument():
    model, ids = analog(), token_ids()
    expected = model(ids).logits
    with digital_layers(model, active=False):
        assert torch.equal(model(ids).logits, expected)


def test_a_copy_of_a_model_has_its_own_state_and_keeps_its_ties():
    model, ids = analog(tie_ranges=FUSED_GROUPS), token_ids()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    assert forward_state(twin) is not forward_state(model)
    attention = twin.model.layers[0].self_attn
    assert attention.q_proj.input_range is attention.k_proj.input_range
    assert attention.q_proj.input_range is not model.model.layers[0].self_attn.q_proj.input_range
    mask = torch.ones_like(ids)
    twin(ids, attention_mask=mask)
    assert forward_state(twin).attention_mask is mask
    assert forward_state(model).attention_mask is not mask


def test_a_layer_survives_pickling():
    made = layer(tile_rows=16, ranges=[1.1, 2.2, 3.3]).eval()
    again = pickle.loads(pickle.dumps(made))
    x = torch.randn(3, 40)
    assert torch.equal(again(x), made(x))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_casting_a_model_keeps_tied_ranges_tied_and_exact(cast):
    model = analog(tie_ranges=FUSED_GROUPS)
    before = {name: each.input_range.detach().clone() for name, each in analog_layers(model)}
    model.to(cast)
    for name, each in analog_layers(model):
        assert each.input_range.dtype == torch.float32
        assert torch.equal(each.input_range, before[name])
        assert each.weight.dtype == cast
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.input_range is attention.k_proj.input_range


def test_ranges_come_back_exactly_from_a_saved_state_dict(tmp_path):
    model, ids = analog(), token_ids()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = convert_to_analog(tiny(seed=5), AnalogScheme(tile_rows=32))
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_setting_the_shared_range_calibrates_all_its_layers():
    model = convert_to_analog(tiny(), AnalogScheme(tie_ranges=FUSED_GROUPS))
    for _, each in analog_layers(model):
        if each.owns_range:
            each.set_input_range(3.0)
    assert model(token_ids()).logits.isfinite().all()


def test_an_accelerate_hook_survives_the_way_back():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counts(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counts.calls += 1
            return args, kwargs

    model = tiny()
    add_hook_to_module(model.model.layers[0].mlp.up_proj, Counts())
    to_digital(convert_to_analog(model, AnalogScheme()))
    model(token_ids())
    assert Counts.calls == 1


def test_forward_hooks_survive_the_way_back():
    model, seen = tiny(), []
    target = model.model.layers[0].mlp.up_proj
    target.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    to_digital(convert_to_analog(model, AnalogScheme()))
    model(token_ids())
    assert seen == [nn.Linear]


def test_the_way_back_leaves_no_trace_in_the_model():
    model = tiny()
    keys, hooks = set(model.state_dict()), len(model._forward_pre_hooks)
    to_digital(convert_to_analog(model, AnalogScheme()))
    assert set(model.state_dict()) == keys
    assert len(model._forward_pre_hooks) == len(model._forward_pre_hooks_with_kwargs) == hooks
    convert_to_analog(model, AnalogScheme())  # and it can be converted again


def test_a_target_that_matches_nothing_is_refused():
    with pytest.raises(AnalogError, match="k_porj"):
        convert_to_analog(tiny(), AnalogScheme(), targets=["q_proj", "k_porj"])


def test_a_layer_used_under_two_names_is_converted_under_both():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    convert_to_analog(model, AnalogScheme(), ignore=())
    assert isinstance(model[0], AnalogLinear) and model[0] is model[2]
    to_digital(model)
    assert type(model[0]) is nn.Linear and model[0] is model[2]


def test_patterns_do_not_match_parts_of_a_word():
    model = convert_to_analog(tiny(), AnalogScheme(), targets=["v_proj"])
    names = [name for name, _ in analog_layers(model)]
    assert names == [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]


def test_conversion_keeps_the_mode_of_each_layer():
    model = tiny().train()
    model.model.layers[0].eval()
    convert_to_analog(model, AnalogScheme())
    modes = {name: each.training for name, each in analog_layers(model)}
    assert all(training == ("layers.1" in name) for name, training in modes.items())


def test_frozen_weights_stay_frozen():
    model = tiny().requires_grad_(False)
    convert_to_analog(model, AnalogScheme())
    for _, each in analog_layers(model):
        assert not each.weight.requires_grad and each.input_range.requires_grad


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_only_learned_ranges_are_trained(kind):
    model = convert_to_analog(tiny(), AnalogScheme(input_range=kind, range_init="max"))
    assert not any(each.input_range.requires_grad for _, each in analog_layers(model))
    calibrate_ranges(model, [{"input_ids": token_ids()}])
    model.train()(token_ids(), labels=token_ids()).loss.backward()
    for _, each in analog_layers(model):
        assert each.input_range.grad is None and each.weight.grad is not None
