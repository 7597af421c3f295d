"""``optimum-cli analog test-time`` and its Python twin."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from tiny_models import tiny, word_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from analog_integrations.optimum import main_test_time
from analog_integrations.optimum.scaling import _problems
from analog_plugin import AnalogError
from analog_plugin.evaluation.problems import extract_boxed, extract_last_number

CLI = Path(sys.executable).with_name("optimum-cli")
SMALL = {"samples": 4, "seeds": 2, "max_new_tokens": 2, "batch_size": 4}


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    lines = [{"prompt": f"w{i} w{i + 1}", "answer": str(i + 2)} for i in range(4, 8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def rows(directory):
    with (directory / "test-time.csv").open() as file:
        return list(csv.DictReader(file))


def test_models_side_by_side(model_directory, analog_directory, problems, tmp_path):
    models = {"original": str(model_directory), "analog": str(analog_directory)}
    reports = main_test_time(models, tmp_path / "out", problems=problems, **SMALL)
    found = rows(tmp_path / "out")
    names = {(r["model"], r["noise"], r["strategy"], r["samples"]) for r in found}
    assert names == {
        (model, noise, strategy, count)
        for model in models
        for noise in ("none", "pcm")
        for strategy in ("majority", "any")
        for count in ("1", "2", "4")
    }
    for report in reports.values():
        assert {(a.noise, a.seed) for a in report.answers} == {
            ("none", None), ("pcm", 0), ("pcm", 1),
        }  # fmt: skip
    first, second = reports.values()
    assert first.answers != second.answers
    again = main_test_time(models, tmp_path / "out", problems=problems, **SMALL)
    assert again == reports


def test_the_command_writes_its_page(analog_directory, problems, tmp_path):
    result = subprocess.run(
        [str(CLI), "analog", "test-time", str(analog_directory), "--problems", problems,
         "--samples", "2", "--seeds", "1", "--noise", "gaussian:0.01,0.1", "--max-new-tokens", "2",
         "--limit", "2", "-o", "out"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "| analog-fp | gaussian:0.1 | majority |" in result.stdout
    assert "2 problems" in result.stdout
    assert {"test-time.html", "test-time.md", "samples.jsonl", "samples-majority.png"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_help_explains_the_command_without_loading_torch(tmp_path):
    poison = tmp_path / "torch.py"
    poison.write_text("raise ImportError('torch was imported')")
    result = subprocess.run(
        [str(CLI), "analog", "test-time", "--help"], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "--problems" in result.stdout and "samples.jsonl" in result.stdout


def test_a_reward_model_scores_the_samples(analog_directory, problems, tmp_path):
    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    word_tokenizer().save_pretrained(tmp_path / "reward")
    options = {"problems": problems, "reward": str(tmp_path / "reward"), **SMALL}
    (report,) = main_test_time([str(analog_directory)], tmp_path / "out", **options).values()
    assert report.strategies == ("majority", "any", "best", "weighted")
    assert len({score for answer in report.answers for score in answer.scores}) > 4
    assert {r["strategy"] for r in rows(tmp_path / "out")} == set(report.strategies)


def test_problems_of_the_hub(monkeypatch):
    """With the columns of openai/gsm8k and HuggingFaceH4/MATH-500."""
    data = {
        "openai/gsm8k": [{"question": "2 + 2?", "answer": "Two and two.\n#### 1,004"}],
        "HuggingFaceH4/MATH-500": [{"problem": "$x = 1/2$?", "answer": r"\frac{1}{2}"}],
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, part, split: data[name])
    (problem,), extract, _ = _problems("gsm8k")
    assert "2 + 2?" in problem.prompt and problem.answer == "1004"
    assert extract is extract_last_number and extract("so 1,004.") == problem.answer
    (problem,), extract, _ = _problems("math500")
    assert extract is extract_boxed and extract(rf"is \boxed{{{problem.answer}}}") == problem.answer
    assert len(_problems("arithmetic")[0]) == 154


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "No model was given"),
        ({"problems": "/no/such.jsonl"}, r"/no/such.jsonl cannot be read"),
        ({"samples": 0}, "samples is 0"),
        ({"limit": 0}, "limit is 0, but must be at least 1"),
        ({"noise": ["pcn"]}, "did you mean 'pcm'"),
        ({"reward": "/no/such/model"}, "reward model /no/such/model does not load"),
    ],
)
def test_bad_input_is_one_sentence(changes, message, analog_directory, problems, tmp_path):
    options = {"models": [str(analog_directory)], "problems": problems, **SMALL} | changes
    with pytest.raises(AnalogError, match=message):
        main_test_time(options.pop("models"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_refused(checkpoints, problems, tmp_path):
    with pytest.raises(AnalogError, match="w8a8 is quantized"):
        main_test_time([str(checkpoints / "w8a8")], tmp_path / "out", problems=problems)


def test_a_model_without_tokenizer_is_refused(problems, tmp_path):
    tiny().save_pretrained(tmp_path / "bare")
    with pytest.raises(AnalogError, match="has no tokenizer beside it"):
        main_test_time([str(tmp_path / "bare")], tmp_path / "out", problems=problems)
