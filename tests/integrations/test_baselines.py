"""The recipes of the baselines make models that stand in one table with the analog ones."""

import importlib.util
from pathlib import Path

import pytest
import yaml
from tiny_models import tiny, word_tokenizer

from analog_integrations.llmcompressor.recipes import read_recipe
from analog_integrations.optimum import main_evaluate

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("baselines", EXAMPLES / "make_baselines.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_every_baseline_stands_in_one_table(tie, script, corpus, tmp_path):
    tiny("llama", tie).save_pretrained(tmp_path / "original")
    word_tokenizer().save_pretrained(tmp_path / "original")
    made = script.make(str(tmp_path / "original"), tmp_path / "baselines", rows=8, length=16)
    assert len(made) == 6
    stamps = [path.stat().st_mtime_ns for path in made]
    again = script.make(str(tmp_path / "original"), tmp_path / "baselines", rows=8, length=16)
    assert [path.stat().st_mtime_ns for path in again] == stamps
    reports = main_evaluate(
        [str(tmp_path / "original"), *map(str, made)], tmp_path / "report", corpus=str(corpus),
        noise=["gaussian"], seeds=1, blocks=6, length=24,
    )  # fmt: skip
    kl = {name: report.mean("none", "kl") for name, report in reports.items()}
    assert kl["original"] == pytest.approx(0, abs=1e-6)
    assert 0 < 10 * kl["rtn-w8"] < kl["rtn-w4"] < 0.1
    assert kl["rtn-w4"] < kl["rtn-w4-di8"] < 0.1  # the same weights, and rounded inputs
    assert 0 < 2 * kl["smoothquant-w8-si8"] < kl["gptq-w4-si8"] < 0.1
    assert kl["rtn-w8"] < kl["spinquant-w4-di8"] < 0.2


def test_the_trained_baseline_is_a_recipe_of_ours():
    path = EXAMPLES / "recipes" / "baselines" / "llm-qat-w4-si8.yaml"
    recipe = read_recipe(path)
    assert recipe.scheme["preset"] == "DIGITAL_SI8_W4"
    demo = read_recipe(EXAMPLES / "recipes" / "demo.yaml")
    assert recipe.training == demo.training and recipe.data == demo.data
    assert yaml.safe_load(path.read_text())
