"""The start before training: each lever does what it says, and all survive a checkpoint."""

import copy

import pytest
import torch
import yaml
from tiny_models import tiny, token_ids
from transformers import AutoModelForCausalLM

from analog_plugin import (
    AnalogError,
    AnalogRecipe,
    AnalogScheme,
    convert_to_analog,
    load_checkpoint,
    save_checkpoint,
    train_analog,
)
from analog_plugin.checkpoint import plain_view
from analog_plugin.checkpoint.digital import plain_layers
from analog_plugin.checkpoint.save import plan_export
from analog_plugin.evaluation.fidelity import Reference, fidelity
from analog_plugin.evaluation.sensitivity import analyze_sensitivity, choose_digital
from analog_plugin.layers import analog_layers, digital_layers, keep_digital, model_scheme
from analog_plugin.layers.prefix import installed_prefix, remove_prefix
from analog_plugin.noise import PCMNoise
from analog_plugin.presets import resolve_scheme
from analog_plugin.training.bound import choose_out_bound
from analog_plugin.training.outputs import search_output_ranges
from analog_plugin.training.ranges import calibrate_plain_ranges, calibrate_ranges
from analog_plugin.training.start import prepare_start

ROWS = token_ids(16, 16, seed=4)
PLUS = {"preset": "AFM_PLUS", "tile_rows": 32, "range_init_batches": 2, "digital_share": 0.2}


def recipe(**changes):
    fields = {
        "scheme": PLUS,
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
        "evaluation": None,
    }
    return AnalogRecipe.parse(fields | changes)


def batches(count=4):
    return [{"input_ids": token_ids(4, 17, seed)} for seed in range(count)]


def analog(**fields):
    return convert_to_analog(tiny(), AnalogScheme(tile_rows=32, **fields)).eval()


def logits(model, ids=None):
    with torch.no_grad():
        return model(token_ids() if ids is None else ids).logits


def kl_to_digital(model, tokens):
    with digital_layers(model):
        reference = Reference.of(model, tokens)
    return fidelity(model, tokens, reference)["kl"]


def test_all_levers_leave_a_better_start_than_none():
    none = {"preset": "AFM", "tile_rows": 32, "range_init_in_training": False}
    kl = {}
    for name, scheme in (("AFM", none), ("AFM_PLUS", PLUS)):
        result = train_analog(tiny(), recipe(scheme=scheme, training=None), dataset=ROWS)
        kl[name] = kl_to_digital(result.model, token_ids(8, 16, seed=9))
    assert kl["AFM_PLUS"] < 0.5 * kl["AFM"]


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2", "llama-tied"])
def test_the_whole_start_and_training_survive_a_checkpoint(name, tmp_path):
    base, _, tied = name.partition("-")
    result = train_analog(tiny(base, bool(tied)), recipe(), dataset=ROWS)
    save_checkpoint(result.model, tmp_path / "out", result=result)
    loaded = load_checkpoint(tmp_path / "out")
    assert installed_prefix(loaded).tokens == (1,)
    assert model_scheme(loaded) == model_scheme(result.model)
    assert model_scheme(loaded).out_bound is not None
    for ids in (token_ids(), ROWS):
        assert torch.equal(logits(loaded, ids), logits(result.model, ids))
    again = load_checkpoint(tmp_path / "out", noise="pcm", seed=3)
    assert not torch.equal(logits(again), logits(loaded))
    save_checkpoint(loaded, tmp_path / "again")
    assert torch.equal(logits(load_checkpoint(tmp_path / "again")), logits(loaded))


@pytest.mark.parametrize("profile", ["analog-fp", "w8a8", "w4a8o8"])
def test_plain_loaders_compute_what_the_plain_view_does(profile, tmp_path):
    """They know no prefix, and keep digital layers as they are."""
    made = recipe(deploy={"profile": profile})
    result = train_analog(tiny(), made, dataset=ROWS)
    save_checkpoint(result.model, tmp_path / "out", profile=profile, result=result)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    view = plain_view(result.model, result.plans[profile])
    assert installed_prefix(result.model) is not None
    for ids in (token_ids(), ROWS):
        assert torch.equal(logits(plain, ids), logits(view, ids))
    assert not torch.equal(logits(view), logits(result.model))


def test_the_record_tells_what_was_done():
    result = train_analog(tiny(), recipe(training=None), dataset=ROWS)
    start, scheme = result.training["start"], model_scheme(result.model)
    assert start["kl_at_bound"][scheme.out_bound] == min(start["kl_at_bound"].values())
    assert 0 < sum(row["share"] for row in start["digital"]) <= 0.2
    assert {row["name"] for row in start["digital"]} == {name for name, _ in scheme.overrides}
    assert all(group["error_after"] < group["error_before"] for group in start["rescaled"])


@pytest.mark.parametrize(
    "off",
    [{"prefix": None}, {"rescale": None}, {"range_init": "mse"}, {"out_bound": 4.0},
     {"digital_share": 0.0}, {"output_bits": None}, {"input_range": "dynamic"}],
    ids=lambda off: next(iter(off)),
)  # fmt: skip
def test_each_lever_can_be_switched_off(off, tmp_path):
    model = tiny()
    result = train_analog(model, recipe(scheme=PLUS | off), dataset=ROWS)
    scheme = model_scheme(result.model)
    assert (installed_prefix(model) is None) == ("prefix" in off)
    assert ("rescaled" in result.training["start"]) == ("rescale" not in off)
    assert bool(scheme.overrides) == ("digital_share" not in off)
    assert "out_bound" not in off or scheme.out_bound == 4.0
    save_checkpoint(model, tmp_path / "out", result=result)
    assert torch.equal(logits(load_checkpoint(tmp_path / "out")), logits(model))


def test_an_error_leaves_the_original_behind(monkeypatch):
    from analog_plugin.training import stages

    def fail(*args, **kwargs):
        raise AnalogError("stop")

    model = tiny()
    before, wanted = copy.deepcopy(model.state_dict()), logits(model)
    real = stages.prepare_start
    monkeypatch.setattr(stages, "prepare_start", lambda *a: (real(*a), fail()))
    with pytest.raises(AnalogError, match="stop"):
        train_analog(model, recipe(), dataset=ROWS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), wanted)


def test_a_model_without_rotary_positions_is_told_to_do_without_a_prefix():
    with pytest.raises(AnalogError, match="prefix: null"):
        train_analog(tiny("gpt2"), recipe(), dataset=ROWS)


def test_output_ranges_are_better_on_the_outputs_than_those_for_inputs_alone():
    model = analog(out_bound=2.0)
    tokens = token_ids(8, 16, seed=9)
    kl = {}
    for criterion in ("max", "mse", "output"):
        for _, layer in analog_layers(model):
            layer.scheme = layer.scheme.replace(range_init=criterion)
        if criterion == "output":
            for name, ranges in search_output_ranges(model, batches(), (2.0,))[2.0].items():
                model.get_submodule(name).set_input_range(ranges)
        else:
            calibrate_ranges(model, batches())
        kl[criterion] = kl_to_digital(model, tokens)
    assert kl["output"] < 0.9 * min(kl["max"], kl["mse"])


def test_padding_does_not_move_output_ranges():
    model = analog(range_init="output")
    clean = search_output_ranges(model, batches(), (4.0,), 4)[4.0]
    padded = [
        {
            "input_ids": torch.cat([b["input_ids"], torch.zeros(4, 3, dtype=torch.long)], 1),
            "attention_mask": (torch.arange(20) < 17).long().expand(4, -1),
        }
        for b in batches()
    ]
    found = search_output_ranges(model, padded, (4.0,), 4)[4.0]
    assert clean.keys() == dict(analog_layers(model)).keys()
    for name, ranges in clean.items():
        torch.testing.assert_close(found[name], ranges)


def test_a_finer_bound_is_chosen_where_the_paper_s_is_coarse():
    model = analog(out_bound=None, range_init="max")
    calibrate_ranges(model, batches())
    with pytest.raises(AnalogError, match="bound"):
        logits(model)
    curve = choose_out_bound(model, token_ids(8, 16, seed=9))
    best = min(curve, key=curve.get)
    assert model_scheme(model).out_bound == best < 14
    assert {layer.scheme.out_bound for _, layer in analog_layers(model)} == {best}
    assert curve[best] < 0.5 * curve[14.0]


@pytest.mark.parametrize("by", ["layer", "kind"])
def test_sensitivity_finds_the_layer_that_hurts_and_changes_nothing(by):
    model = analog(out_bound=4.0, range_init="max")
    calibrate_ranges(model, batches())
    victim = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(victim)
    layer.set_input_range(layer.input_range * 40)  # a useless DAC
    wanted = logits(model)
    tokens = token_ids(4, 16, seed=9)
    report = analyze_sensitivity(model, tokens, by=by, parts=("inputs", "outputs", "noise"))
    assert torch.equal(logits(model), wanted)
    worst = report.rows[0]
    assert worst.name == (victim if by == "layer" else "down_proj") and worst.part == "inputs"
    assert sum(row.share for row in report.rows if row.part == "noise") == pytest.approx(1)
    assert report.kl(worst.name, "noise") < worst.kl
    everything = analyze_sensitivity(model, tokens, by=by)
    assert choose_digital(everything, 0.2)[0] == worst.name or by == "kind"
    spent = sum(row.share for row in everything.rows if row.name in choose_digital(everything, 0.2))
    assert spent <= 0.2
    assert choose_digital(everything, 0.0) == []


def test_the_parts_serve_by_themselves(tmp_path):
    model = convert_to_analog(tiny(), resolve_scheme(PLUS))
    with pytest.raises(AnalogError, match="prepare_start"):
        calibrate_ranges(model, batches())
    record = prepare_start(model, batches(), ROWS, None)
    assert installed_prefix(model) is not None and record["kl_at_bound"]
    calibrate_plain_ranges(model, batches())
    save_checkpoint(model, tmp_path / "out")
    assert torch.equal(logits(load_checkpoint(tmp_path / "out")), logits(model))
    remove_prefix(model)
    with pytest.raises(AnalogError, match="none installed"):
        save_checkpoint(model, tmp_path / "other")


def test_a_prefix_without_plain_ranges_is_not_saved(tmp_path):
    model = analog(out_bound=4.0, prefix=1, range_init="max")
    prepare_start(model, batches(), ROWS, None)
    with pytest.raises(AnalogError, match="calibrate_plain_ranges"):
        save_checkpoint(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_that_no_input_reaches_is_named():
    model = tiny()
    model.spare = torch.nn.Linear(8, 8)
    convert_to_analog(model, AnalogScheme(out_bound=4.0, range_init="output"))
    with pytest.raises(AnalogError, match="reached spare; keep it digital"):
        prepare_start(model, batches(), ROWS, None)


def test_wrong_questions_are_refused():
    model = analog(out_bound=4.0)
    for options, message in (
        ({"by": "head"}, "layer, fused or kind"),
        ({"parts": ["dac"]}, "no part"),
    ):
        with pytest.raises(AnalogError, match=message):
            analyze_sensitivity(model, token_ids(), **options)
    with pytest.raises(AnalogError, match="no analog layer"):
        analyze_sensitivity(tiny(), token_ids())
    with pytest.raises(AnalogError, match="no analog layer"):
        keep_digital(model, ["lm_head"])
    with pytest.raises(AnalogError, match="would be left"):
        keep_digital(model, [name for name, _ in analog_layers(model)])


def test_a_group_whose_owner_went_digital_keeps_learning_its_range():
    groups = (("q_proj", "k_proj", "v_proj"),)
    model = analog(out_bound=4.0, tie_ranges=groups)
    keep_digital(model, ["model.layers.0.self_attn.q_proj"])
    left = [m for n, m in analog_layers(model) if n.startswith("model.layers.0.self_attn")]
    shared = [m for m in left if m.input_range is left[0].input_range]
    assert len(shared) == 2 and [m.owns_range for m in shared] == [True, False]


def test_an_assignment_file_says_what_stays_digital(tmp_path):
    path = tmp_path / "assignment.yaml"
    path.write_text(yaml.safe_dump({"down_proj": "digital", "*.layers.0.*": {"input_bits": 6}}))
    settings = recipe(assignment=str(path), training=None, scheme=PLUS | {"digital_share": 0})
    assert settings.assignment is None  # it stands in the scheme now
    model = train_analog(tiny(), settings, dataset=ROWS).model
    layers = dict(analog_layers(model))
    assert not any("down_proj" in name for name in layers)
    bits = {
        name.startswith("model.layers.0"): layer.scheme.input_bits for name, layer in layers.items()
    }
    assert bits == {True: 6, False: 8}
    save_checkpoint(model, tmp_path / "out")
    assert torch.equal(logits(load_checkpoint(tmp_path / "out")), logits(model))


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("[1]", "must map"), ("a: [", "is not valid YAML"),
     ("nothing: digital", "matches no linear layer"), ("down_proj: {out_bound: 3}", "whole model")],
)  # fmt: skip
def test_a_wrong_assignment_is_one_sentence(text, message, tmp_path):
    path = tmp_path / "assignment.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(AnalogError, match=message):
        train_analog(tiny(), recipe(assignment=str(path)), dataset=ROWS)


@pytest.mark.parametrize("path", ["/dev/zero", "a" * 50_000, "\0"])
def test_an_assignment_that_is_no_file_is_one_short_sentence(path):
    with pytest.raises(
        AnalogError, match=r"The assignment .* (cannot be read|is no file)"
    ) as caught:
        recipe(assignment=path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "change",
    [
        {"overrides": {"q_proj": {"range_init": "mse"}}},
        {"overrides": {"o_proj": {"output_bits": None}}},
        {"overrides": {"o_proj": {"input_bits": None, "output_bits": None}}},
        {"output_bits": None, "overrides": {"o_proj": {"output_bits": 8}}},
        {"input_bits": None, "output_bits": None},
    ],
    ids=["criterion", "no ADC", "no DAC", "only ADC", "no DAC at all"],
)
def test_layers_may_differ_in_converters_and_criterion(change, tmp_path):
    model = tiny()
    result = train_analog(model, recipe(scheme=PLUS | change, training=None), dataset=ROWS)
    save_checkpoint(model, tmp_path / "out", result=result)
    assert torch.equal(logits(load_checkpoint(tmp_path / "out")), logits(model))


def test_ranges_found_in_training_do_not_skip_the_other_levers():
    scheme = {"preset": "AFM", "out_bound": None, "rescale": "noise-aware"}
    result = train_analog(tiny(), recipe(scheme=scheme), dataset=ROWS)
    assert {"rescaled", "kl_at_bound"} <= result.training["start"].keys()


def test_rows_of_one_token_are_refused():
    with pytest.raises(AnalogError, match="two tokens"):
        train_analog(tiny(), recipe(), dataset=ROWS[:, :1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_sensitivity_leaves_programmed_weights_alone_even_when_interrupted(error):
    class Failing:
        def program(self, weight, generator):
            raise error

    model = analog(out_bound=4.0, range_init="max")
    calibrate_ranges(model, batches())
    layers = [layer for _, layer in analog_layers(model)]
    for layer in layers:
        layer.program(PCMNoise(), 0)
    before = [(layer.programmed_weight, layer.scheme, layer.digital) for layer in layers]
    analyze_sensitivity(model, token_ids())
    with pytest.raises(error):
        analyze_sensitivity(model, token_ids(), noise=Failing())
    after = [(layer.programmed_weight, layer.scheme, layer.digital) for layer in layers]
    assert all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(after, before, strict=True))


def test_the_part_of_outputs_costs_nothing_without_an_adc():
    model = analog(output_bits=None, range_init="max")
    calibrate_ranges(model, batches())
    report = analyze_sensitivity(model, token_ids(), by="kind", parts=("outputs",))
    assert all(row.kl == pytest.approx(0, abs=1e-6) for row in report.rows)


def test_plain_ranges_need_data_and_survive_a_cast():
    model = analog(out_bound=4.0)
    with pytest.raises(AnalogError, match="empty"):
        calibrate_plain_ranges(model, [])
    calibrate_plain_ranges(model, batches())
    layer = next(layer for _, layer in analog_layers(model))
    wanted = layer.plain_range.clone()
    model.to(torch.bfloat16)
    assert layer.plain_range.dtype == torch.float32 and torch.equal(layer.plain_range, wanted)


def test_plain_loaders_are_told_nothing_of_dacs_of_two_kinds():
    model = analog(out_bound=4.0, overrides={"down_proj": {"input_range": "dynamic"}})
    calibrate_ranges(model, batches())
    assert plain_layers(model) == {} and plan_export(model).layers == {}


def test_only_like_dacs_share_a_range():
    groups, change = (("q_proj", "k_proj", "v_proj"),), {"q_proj": {"input_range": "dynamic"}}
    model = analog(out_bound=4.0, tie_ranges=groups, overrides=change)
    q, k, v = [layer for _, layer in analog_layers(model)][:3]
    assert k.input_range is v.input_range is not q.input_range
    assert k.input_range.requires_grad and k.owns_range and not v.owns_range
