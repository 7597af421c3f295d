"""Sweeps: the same cells as evaluate_noise, kept as they end, and none run twice."""

import json
import math

import pytest
import torch

from analog_plugin import AnalogError, evaluate_noise
from analog_plugin.evaluation.noise import NoiseReport
from analog_plugin.evaluation.sweep import CELLS, SweepModel, sweep
from analog_plugin.evaluation.tables import (
    Summary,
    comma_separated,
    markdown,
    paired_rows,
    rows,
)
from analog_plugin.noise import PCMNoise

NOISES = [None, "pcm", "gaussian:0.05"]


class Loads:
    """Gives one model, and counts how often it was asked for."""

    def __init__(self, model):
        self.model, self.count = model, 0

    def __call__(self):
        self.count += 1
        return self.model


@pytest.fixture
def models(model, original):
    return {
        "analog": SweepModel(Loads(model), "a"),
        "digital": SweepModel(Loads(original), "d", noisy=False),
    }


@pytest.fixture
def base(original):
    return SweepModel(Loads(original), "o")


def run(models, base, tokens, output, noises=NOISES, seeds=2, **options):
    return sweep(models, tokens, noises, seeds, output, original=base, **options)


def test_cells_are_those_of_evaluate_noise(model, models, base, tokens, reference, tmp_path):
    reports = run(models, base, tokens, tmp_path / "deep" / "out")
    assert reports["analog"] == evaluate_noise(model, tokens, NOISES, 2, reference=reference)
    assert [(c.noise, c.seed) for c in reports["digital"].cells] == [("none", None)]
    assert reports["digital"].mean("none", "kl") == pytest.approx(0, abs=1e-9)


def test_a_finished_sweep_loads_nothing(models, base, tokens, tmp_path):
    first = run(models, base, tokens, tmp_path)
    counts = [entry.load.count for entry in (*models.values(), base)]
    written = (tmp_path / CELLS).read_bytes()
    assert run(models, base, tokens, tmp_path) == first
    assert [entry.load.count for entry in (*models.values(), base)] == counts
    assert (tmp_path / CELLS).read_bytes() == written


@pytest.mark.parametrize("after", range(6))
def test_an_interrupted_sweep_goes_on_with_what_is_missing(
    after, models, base, tokens, tmp_path, register
):
    calls = []

    def count(model, tokens, reference, batch_size):
        calls.append(1)
        if len(calls) == after + 1 and not resumed:
            raise KeyboardInterrupt
        return {"sum": float(model(tokens).logits.double().sum())}

    name, resumed = register("count", count), True
    whole = run(models, base, tokens, tmp_path / "whole", evaluators=[name])
    total, resumed = len(calls), False
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(models, base, tokens, tmp_path / "cut", evaluators=[name])
    resumed = True
    assert run(models, base, tokens, tmp_path / "cut", evaluators=[name]) == whole
    assert len(calls) == total + 1  # the one that was interrupted ran again
    layer = models["analog"].load.model.model.layers[0].mlp.up_proj
    assert layer.programmed_weight is None


def test_a_line_that_was_being_written_is_dropped(models, base, tokens, tmp_path):
    whole = run(models, base, tokens, tmp_path)
    path = tmp_path / CELLS
    text = path.read_bytes()
    for cut in (1, 5, 40, len(text.splitlines()[-1]), len(text) - 3):
        path.write_bytes(text[:-cut])
        assert run(models, base, tokens, tmp_path) == whole
        assert path.read_bytes() == text


def test_more_can_be_asked_for_later(models, base, tokens, tmp_path):
    run(models, base, tokens, tmp_path, noises=["pcm"], seeds=1)
    reports = run(models, base, tokens, tmp_path, seeds=3)
    assert len(reports["analog"].cells) == 1 + 2 * 3
    fewer = run(models, base, tokens, tmp_path, noises=["pcm"], seeds=[2])
    assert [(c.noise, c.seed) for c in fewer["analog"].cells] == [("pcm", 2)]


def test_a_changed_model_is_measured_anew(models, base, tokens, tmp_path):
    run(models, base, tokens, tmp_path, noises=[None])
    models["analog"] = SweepModel(models["analog"].load, "another")
    before = models["analog"].load.count
    run(models, base, tokens, tmp_path, noises=[None])
    assert models["analog"].load.count == before + 1


def test_cells_of_other_settings_are_not_mixed(models, base, tokens, tmp_path):
    run(models, base, tokens, tmp_path, noises=[None])
    written = (tmp_path / CELLS).read_bytes()
    with pytest.raises(AnalogError, match=r"other settings \(shape, tokens\).*--overwrite"):
        run(models, base, tokens[:2], tmp_path, noises=[None])
    with pytest.raises(AnalogError, match="seeds is 0"):
        run(models, base, tokens, tmp_path, seeds=0, overwrite=True)
    with pytest.raises(AnalogError, match=r"other settings \(corpus\)"):
        run(models, base, tokens, tmp_path, noises=[None], settings={"corpus": "x"})
    assert (tmp_path / CELLS).read_bytes() == written


CELL = {"model": "a", "identity": "b", "evaluator": "c", "noise": "pcm", "seed": 0}


@pytest.mark.parametrize(
    "line",
    ["", "[]", "{}", "null", '{"model": 1}', "\x00", "[" * 100_000]
    + [json.dumps(CELL | {"metrics": metrics}) for metrics in (3, {"kl": "x"})],
)
def test_a_damaged_file_is_named_with_its_line(line, models, base, tokens, tmp_path):
    run(models, base, tokens, tmp_path, noises=[None])
    path = tmp_path / CELLS
    lines = path.read_text().splitlines()
    for place in (0, 1):
        path.write_text("\n".join([*lines[:place], line, *lines[place:]]) + "\n")
        with pytest.raises(
            AnalogError, match=rf"Line {place + 1} of .*cells.jsonl.*another output"
        ):
            run(models, base, tokens, tmp_path, noises=[None])


def test_a_digital_model_is_not_taken_for_a_programmed_one(original, tokens, tmp_path):
    models = {"digital": SweepModel(Loads(original))}
    with pytest.raises(AnalogError, match="no analog layer"):
        run(models, None, tokens, tmp_path)


@pytest.mark.parametrize("head", ["null", "[1]", '"x"', '{"settings": null}', '{"settings": [1]}'])
def test_a_file_of_others_is_left_as_it_is(head, models, base, tokens, tmp_path):
    path = tmp_path / CELLS
    path.write_text(head + "\nnot ended")
    with pytest.raises(AnalogError, match=r"Line 1 of .*; give another output"):
        run(models, base, tokens, tmp_path, noises=[None])
    assert path.read_text() == head + "\nnot ended"
    run(models, base, tokens, tmp_path, noises=[None], overwrite=True)
    assert path.read_text().startswith('{"settings": {')


def test_one_named_twice_is_no_second_chip(model, models, base, tokens, tmp_path):
    twice = run(models, base, tokens, tmp_path, noises=["pcm", "pcm"], seeds=[1, 1, 0])
    assert [(c.noise, c.seed) for c in twice["analog"].cells] == [("pcm", 1), ("pcm", 0)]
    again = evaluate_noise(model, tokens, ["pcm", "pcm"], [0, 0])
    assert len(again.cells) == 2  # two of a list, one seed


def test_objects_have_no_name_to_be_kept_by(models, base, tokens, tmp_path):
    with pytest.raises(AnalogError, match="needs a noise model by name"):
        run(models, base, tokens, tmp_path, noises=[PCMNoise()])
    with pytest.raises(AnalogError, match="seeds is an empty list"):
        run(models, base, tokens, tmp_path, seeds=[])


def test_another_original_is_another_measurement(models, base, tokens, tmp_path):
    run(models, base, tokens, tmp_path, noises=[None])
    counts = [entry.load.count for entry in models.values()]
    reports = run(models, None, tokens, tmp_path, noises=[None])
    assert [entry.load.count for entry in models.values()] == [count + 1 for count in counts]
    assert reports["analog"].cells[0].metrics.keys() == {"perplexity"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_said_so(value):
    table = rows({"a": report(kl=[1.0, value]), "b": report(kl=[1.0, 2.0])})
    assert "| a | pcm | not finite |" in markdown(table)
    assert math.isnan(report(kl=[1.0, value]).std("pcm", "kl"))


def test_an_output_that_is_a_file_is_refused(models, base, tokens, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(AnalogError, match="cannot be read and written"):
        run(models, base, tokens, tmp_path / "file")


def report(**values):
    cells = [
        {"noise": "pcm", "seed": seed, "metrics": {"kl": value}}
        for seed, value in enumerate(values["kl"])
    ]
    return NoiseReport.from_dict({"cells": cells})


def test_the_interval_is_student_s():
    """t(0.975, 4) = 2.7764, from printed tables."""
    summary = Summary.of([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764 * 2.5**0.5 / 5**0.5
    assert summary.mean == 3.0 and summary.std == pytest.approx(2.5**0.5)
    assert summary.low == pytest.approx(3 - half, rel=1e-4)
    assert summary.high == pytest.approx(3 + half, rel=1e-4)
    assert str(Summary.of([2.0])) == "2.000" and Summary.of([2.0]).interval == ""
    assert str(Summary.of([])) == "–"


def test_differences_are_taken_seed_by_seed():
    first, second = report(kl=[1.0, 5.0, 9.0]), report(kl=[0.5, 4.5, 8.5, 3.0])
    (difference,) = paired_rows({"first": first, "second": second})
    assert difference.model == "second − first" and difference.summary.count == 3
    assert difference.summary.mean == -0.5 and difference.summary.std == 0
    assert paired_rows({"first": first}) == []


def test_tables_hold_every_figure():
    table = rows({"a": report(kl=[1.0, 2.0]), "b": report(kl=[11.0, 13.0])})
    text = markdown(table)
    assert "| a | pcm | 1.500 ± 0.707 [" in text and "| b | pcm | 12.0 ± 1.4 [" in text
    lines = comma_separated(table).splitlines()
    assert lines[0] == "model,noise,metric,seeds,mean,std,low,high"
    assert lines[1].startswith("a,pcm,kl,2,1.5,0.707") and len(lines) == 3


def test_the_reference_has_the_model_s_prefix(original, tokens, tmp_path):
    """A prefix changes what a model says; it is no error of the hardware."""
    import copy

    from analog_plugin import AnalogScheme, convert_to_analog
    from analog_plugin.layers import digital_layers
    from analog_plugin.layers.prefix import install_prefix, installed_prefix

    analog = convert_to_analog(
        copy.deepcopy(original), AnalogScheme(input_bits=None, output_bits=None)
    )
    with digital_layers(analog):
        install_prefix(analog, (1,))
    base = SweepModel(Loads(original), "o")
    reports = sweep(
        {"m": SweepModel(Loads(analog), "m")}, tokens, [None], 1, tmp_path, original=base
    )
    assert reports["m"].mean("none", "kl") == pytest.approx(0, abs=1e-6)
    assert installed_prefix(original) is None
    with torch.no_grad():
        assert not torch.allclose(analog(tokens).logits, original(tokens).logits, atol=1e-3)


def test_the_file_is_plain_json_lines(models, base, tokens, tmp_path):
    run(models, base, tokens, tmp_path)
    head, *cells = [json.loads(line) for line in (tmp_path / CELLS).read_text().splitlines()]
    assert head["settings"]["shape"] == list(tokens.shape)
    keys = {"model", "identity", "noise", "seed", "evaluator", "metrics"}
    assert all(cell.keys() == keys for cell in cells)


def test_another_evaluator_runs_alone(models, base, tokens, tmp_path, register):
    before = run(models, base, tokens, tmp_path)
    name = register("mean", lambda m, t, reference, size: {"mean": float(m(t).logits.mean())})
    after = run(models, base, tokens, tmp_path, evaluators=["fidelity", name])
    assert len((tmp_path / CELLS).read_text().splitlines()) == 1 + 2 * 6
    for old, new in zip(before["analog"].cells, after["analog"].cells, strict=True):
        assert new.metrics.keys() == old.metrics.keys() | {"mean"}
        assert old.metrics.items() <= new.metrics.items()
    assert run(models, base, tokens, tmp_path) == before
