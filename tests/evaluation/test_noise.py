"""Evaluation under programming noise: seeds, statistics, and what it leaves behind."""

import json
import math
import statistics

import pytest
import torch

from analog_plugin import AnalogError, evaluate_noise
from analog_plugin.evaluation import NoiseReport
from analog_plugin.evaluation.noise import NoiseCell
from analog_plugin.layers import analog_layers
from analog_plugin.noise import GaussianNoise


def by_cell(report):
    return {(cell.noise, cell.seed): cell.metrics for cell in report.cells}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    for _, layer in analog_layers(model):
        assert layer.programmed_weight is None and not layer.digital


def test_there_is_a_cell_for_each_noise_and_seed_and_one_without_noise(model, tokens):
    report = evaluate_noise(model, tokens, (None, "pcm", "gaussian:0.02"), 3)
    assert [(cell.noise, cell.seed) for cell in report.cells] == [
        ("none", None),
        *(("pcm", seed) for seed in range(3)),
        *(("gaussian:0.02", seed) for seed in range(3)),
    ]
    assert len({json.dumps(cell.metrics) for cell in report.cells}) == 7


def test_the_same_seed_gives_the_same_metrics_in_any_order(model, tokens, reference):
    forwards = evaluate_noise(model, tokens, ("pcm", "gaussian:0.05"), [4, 1, 9])
    torch.manual_seed(123)
    backwards = evaluate_noise(model, tokens, ("gaussian:0.05", None, "pcm"), [9, 4, 1])
    assert by_cell(forwards).items() <= by_cell(backwards).items()
    alone = evaluate_noise(model, tokens, ["pcm"], [9])
    assert by_cell(alone)["pcm", 9] == by_cell(forwards)["pcm", 9]


def test_the_global_generator_is_left_alone(model, tokens):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    evaluate_noise(model, tokens, ["pcm"], 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_model_is_changed(training, model, tokens, reference):
    model.train(training)
    before = state(model)
    evaluate_noise(model, tokens, (None, "pcm"), 2, reference=reference, converters=False)
    assert_untouched(model, before)
    assert model.training == training


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("converters", [True, False])
def test_an_interruption_leaves_the_model_as_it_was(error, converters, model, tokens, register):
    model.train()
    before = state(model)
    logits = model.eval()(tokens).logits
    model.train()
    calls = []

    def interrupted(model, tokens, reference, batch_size):
        calls.append(all(layer.programmed_weight is not None for _, layer in analog_layers(model)))
        if len(calls) == 2:
            raise error("stopped")
        return {"one": 1.0}

    with pytest.raises(error, match="stopped"):
        evaluate_noise(
            model, tokens, ["pcm"], 5, evaluators=[register("interrupted", interrupted)],
            converters=converters,
        )  # fmt: skip
    assert calls == [True, True]
    assert_untouched(model, before)
    assert model.training
    assert torch.equal(model.eval()(tokens).logits, logits)


def test_evaluators_get_the_running_model_and_their_metrics_are_joined(
    model, tokens, reference, register
):
    def own(model, tokens, reference, batch_size):
        assert not model.training and not torch.is_grad_enabled()
        return {"rows": float(len(tokens)), "batch": float(batch_size),
                "programmed": float(next(analog_layers(model))[1].programmed_weight is not None),
                "reference": float(reference is not None)}  # fmt: skip

    report = evaluate_noise(
        model, tokens, (None, "pcm"), 1, reference=reference, batch_size=3,
        evaluators=["fidelity", register("own", own)],
    )  # fmt: skip
    clean, noisy = (cell.metrics for cell in report.cells)
    names = {"perplexity", "kl", "agreement", "rows", "batch", "programmed", "reference"}
    assert clean.keys() == noisy.keys() == names
    assert (clean["rows"], clean["batch"], clean["reference"]) == (5.0, 3.0, 1.0)
    assert (clean["programmed"], noisy["programmed"]) == (0.0, 1.0)


def test_noise_may_be_a_mapping_or_an_object(model, tokens):
    report = evaluate_noise(
        model, tokens, ["gaussian:0.02", {"name": "gaussian", "sigma": 0.02}, GaussianNoise(0.02)],
        [6],
    )  # fmt: skip
    assert [cell.noise for cell in report.cells] == [
        "gaussian:0.02", "gaussian(sigma=0.02)", "GaussianNoise",
    ]  # fmt: skip
    assert len({json.dumps(cell.metrics) for cell in report.cells}) == 1


def test_more_noise_is_worse(model, tokens, reference):
    levels = ["gaussian:0.01", "gaussian:0.05", "gaussian:0.2"]
    report = evaluate_noise(model, tokens, levels, 4, reference=reference)
    means = [report.mean(level, "kl") for level in levels]
    assert means == sorted(means)


def test_noise_of_no_size_is_no_noise(model, tokens, reference):
    report = evaluate_noise(model, tokens, (None, "gaussian:0"), 1, reference=reference)
    assert report.cells[0].metrics == report.cells[1].metrics


def test_mean_and_standard_deviation_are_over_seeds(model, tokens, reference):
    report = evaluate_noise(model, tokens, (None, "pcm"), 4, reference=reference)
    values = [cell.metrics["kl"] for cell in report.cells if cell.noise == "pcm"]
    assert report.values("pcm", "kl") == values and len(set(values)) == 4
    assert report.mean("pcm", "kl") == pytest.approx(sum(values) / 4, rel=1e-12)
    assert report.std("pcm", "kl") == pytest.approx(statistics.stdev(values), rel=1e-12)
    assert report.mean("none", "kl") == report.cells[0].metrics["kl"]


def test_a_single_value_has_no_deviation_and_none_has_no_mean():
    report = NoiseReport([NoiseCell("pcm", 0, {"kl": 2.0})])
    assert report.mean("pcm", "kl") == 2.0 and math.isnan(report.std("pcm", "kl"))
    assert math.isnan(report.mean("gaussian", "kl")) and math.isnan(report.std("gaussian", "kl"))


def test_a_report_becomes_plain_values(model, tokens):
    report = evaluate_noise(model, tokens, (None, "pcm"), [7])
    written = json.loads(json.dumps(report.to_dict()))
    assert NoiseReport.from_dict(written) == report
    records = written["cells"]
    assert [(record["noise"], record["seed"]) for record in records] == [("none", None), ("pcm", 7)]
    assert [record["metrics"] for record in records] == [cell.metrics for cell in report.cells]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluators": ["fidelty"]}, "no evaluator 'fidelty'; did you mean 'fidelity'"),
        ({"noise": ["pmc"]}, "no noise model 'pmc'; did you mean 'pcm'"),
        ({"noise": ["pcm:much"]}, "level 'much', which is not a number"),
        ({"noise": [{"name": "pcm", "size": 1}]}, "no argument 'size'; it takes scale"),
        ({"noise": [3]}, "noise is 3, but must be a name"),
        ({"seeds": 0}, "seeds is 0, but must be at least 1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_runs(
    options, message, model, tokens, register
):
    calls = []
    own = register("own", lambda *arguments: calls.append(arguments) or {})
    with pytest.raises(AnalogError, match=message):
        evaluate_noise(model, tokens, **({"evaluators": [own]} | options))
    assert calls == []


def test_a_digital_model_is_refused(original, tokens):
    with pytest.raises(AnalogError, match="no analog layer"):
        evaluate_noise(original, tokens)
