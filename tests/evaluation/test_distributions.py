"""Weights and input ranges of models, measured and drawn."""

import copy
import csv
import json

import pytest
import torch
from tiny_models import tiny, token_ids
from torch import nn

from analog_plugin import AnalogError, AnalogScheme, calibrate_ranges, convert_to_analog
from analog_plugin.evaluation.distributions import BINS, Distributions, describe_models
from analog_plugin.evaluation.layer_plots import range_maps, weight_figure
from analog_plugin.evaluation.noise import NoiseReport
from analog_plugin.evaluation.report import write_report
from analog_plugin.evaluation.sweep import SweepModel
from analog_plugin.layers import analog_layers


def test_weights_are_relative_to_the_largest_of_column_and_tile():
    layer = nn.Linear(6, 3, bias=False)
    layer.weight.data = torch.tensor(
        [[1.0, 0.5, -0.25, 8.0, 4.0, 0.0], [0, 0, 0, -2.0, 1.0, 1.0], [0, 0, 0, 0, 0, 0]]
    )
    scheme = AnalogScheme(tile_rows=3, input_bits=None, output_bits=None)
    found = Distributions.of(convert_to_analog(nn.Sequential(layer), scheme, ignore=()))
    shares = [1.0, 0.5, 0.25, 1.0, 0.5, 0.0, 1.0, 0.5, 0.5]
    expected = torch.histc(torch.tensor(shares), BINS, 0, 1) / len(shares)
    torch.testing.assert_close(torch.tensor(found.weights), expected)
    assert found.mean == pytest.approx(sum(shares) / len(shares))
    assert found.ranges == {}


def test_ranges_are_those_of_the_layers(model):
    found = Distributions.of(model)
    assert found.ranges == {n: layer.input_range.tolist() for n, layer in analog_layers(model)}
    assert sum(found.weights) == pytest.approx(1)
    assert Distributions.from_dict(json.loads(json.dumps(vars(found)))) == found


def test_programmed_weights_are_not_what_is_measured(model):
    before = Distributions.of(model)
    for _, layer in analog_layers(model):
        layer.program(_Zero(), 0)
    assert Distributions.of(model) == before


class _Zero:
    def program(self, weight, generator):
        return torch.zeros_like(weight)


def test_ranges_that_were_never_set_are_refused(original):
    with pytest.raises(AnalogError, match="were never set"):
        Distributions.of(convert_to_analog(original, AnalogScheme()))


def test_a_model_without_weights_to_speak_of_is_described():
    layer = nn.Linear(4, 2)
    nn.init.zeros_(layer.weight)
    scheme = AnalogScheme(input_bits=None, output_bits=None)
    found = Distributions.of(convert_to_analog(nn.Sequential(layer), scheme, ignore=()))
    assert found.mean == 0 and sum(found.weights) == 0
    weight_figure({"zero": found})


def test_a_described_model_is_not_loaded_again(model, tmp_path):
    loads = []

    def load():
        loads.append(1)
        return model

    first = describe_models({"a": SweepModel(load, "1")}, tmp_path)
    assert describe_models({"a": SweepModel(load, "1")}, tmp_path) == first and len(loads) == 1
    describe_models({"a": SweepModel(load, "2")}, tmp_path)
    assert len(loads) == 2
    kept = (tmp_path / "distributions.jsonl").read_text().splitlines()
    good = json.loads(kept[1])
    unnamed = {key: value for key, value in good.items() if key != "model"}
    for bad in (
        {"weights": [1.0]},
        unnamed,
        good | {"identity": ["1"]},
        good | {"ranges": {"a": []}},
    ):
        (tmp_path / "distributions.jsonl").write_text(f"{kept[0]}\n{json.dumps(bad)}\n")
        with pytest.raises(AnalogError, match=r"Line 2 of .* cannot be used"):
            describe_models({"a": SweepModel(load, "1")}, tmp_path)


def test_layers_of_one_name_in_a_block_are_drawn_apart():
    names = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj", "h.1.mlp.c_proj"]
    found = Distributions((0.0,) * BINS, 0.0, {n: [float(i)] for i, n in enumerate(names, 1)})
    axis = range_maps({"gpt2": found})["gpt2"].axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["attn.c_proj", "mlp.c_proj"]
    assert axis.images[0].get_array().tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_they_stand_in_the_report(model, tmp_path):
    plain = AnalogScheme(input_bits=None, output_bits=None)
    found = {
        "original": Distributions.of(convert_to_analog(tiny(num_hidden_layers=1), plain)),
        "a & b": Distributions.of(model),
    }
    write_report({"a & b": NoiseReport()}, tmp_path, title="x", distributions=found)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Weights on their devices" in page and "Input ranges" in page
    assert page.count("<figcaption>a &amp; b</figcaption>") == 1  # the original has no ranges
    assert {path.name for path in tmp_path.glob("*.png")} == {"weights.png", "ranges-a___b.png"}
    with (tmp_path / "weights.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["share"]) for line in lines[BINS:]] == list(found["a & b"].weights)
    with (tmp_path / "ranges.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["range"]) for line in lines] == [
        value for values in found["a & b"].ranges.values() for value in values
    ]


def test_ranges_of_several_models_have_the_same_colours(original, model):
    wider = convert_to_analog(copy.deepcopy(original), AnalogScheme(tile_rows=32))
    calibrate_ranges(wider, [{"input_ids": token_ids(4, 16, seed=5)}])
    for _, layer in analog_layers(wider):
        layer.set_input_range(100.0)
    maps = range_maps({"a": Distributions.of(model), "b": Distributions.of(wider)})
    (one, other) = (figure.axes[0].images[0] for figure in maps.values())
    assert one.norm.vmin == other.norm.vmin and one.norm.vmax == other.norm.vmax == 100.0
    assert float(other.get_array().max()) == 100.0
