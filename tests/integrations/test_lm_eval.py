"""lm-eval: the model type ``analog``, its tasks in sweeps, and the tasks that need no download."""

import re
import subprocess
import sys

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from analog_integrations.lm_eval.offline import (
    ARITHMETIC,
    PAIRS,
    arithmetic,
    minimal_pairs,
    write_offline_tasks,
)
from analog_integrations.lm_eval.tasks import PAPER, scores, task_evaluators
from analog_integrations.optimum import main_evaluate
from analog_plugin import AnalogError, load_checkpoint, save_checkpoint
from analog_plugin.pretrained import load_tokenizer

SMALL = {"blocks": 2, "length": 16, "seeds": 1}


def test_arithmetic_is_right_and_complete():
    questions = list(arithmetic())
    assert len({q["question"] for q in questions}) == len(questions) == 162
    for question in questions:
        a, sign, b, _ = question["question"].split()
        assert int(question["answer"]) == (int(a) + int(b) if sign == "+" else int(a) * int(b))
    assert questions == list(arithmetic()) != list(arithmetic(1))


def test_minimal_pairs_differ_in_one_point():
    pairs = list(minimal_pairs())
    assert pairs == list(minimal_pairs()) != list(minimal_pairs(1))
    assert len({p["sentence_good"] for p in pairs}) == len(pairs) == 400
    for pair in pairs:
        good, bad = pair["sentence_good"].split(), pair["sentence_bad"].split()
        changed = sum(a != b for a, b in zip(good, bad, strict=True))
        assert changed == (2 if pair["phenomenon"] == "word order" else 1)
        if pair["phenomenon"] == "word order":
            assert sorted(good) == sorted(bad)
        if pair["phenomenon"] == "agreement":
            singular = not good[1].endswith("s")
            assert good[2].endswith("s") == singular and bad[2].endswith("s") != singular
        if pair["phenomenon"] == "distant agreement":
            assert not good[1].endswith("s") and good[5].endswith("s") and not bad[5].endswith("s")
        if pair["phenomenon"] == "determiner":
            plural = good[-1].endswith("s.")
            assert (good[2] in ("these", "those")) == plural != (bad[2] in ("these", "those"))


class Knows(HFLM):
    """A stand-in for a model, which knows all grammar and arithmetic, or none."""

    def __init__(self, model, tokenizer, right):
        super().__init__(pretrained=model, tokenizer=tokenizer)
        self.right = right
        self.good = {p["sentence_good"] for p in minimal_pairs()}

    def loglikelihood(self, requests, **kwargs):
        return [
            (0.0 if (request.args[1].strip() in self.good) == self.right else -9.0, True)
            for request in requests
        ]

    def generate_until(self, requests, **kwargs):
        made = []
        for request in requests:
            *worked, question = request.args[0].split("\n")
            assert len(worked) == 8 and all(re.fullmatch(r"\d [+*] \d = \d+", w) for w in worked)
            a, sign, b, _ = question.split()
            answer = int(a) + int(b) if sign == "+" else int(a) * int(b)
            made.append(f" {answer if self.right else answer + 1}.\n")
        return made


@pytest.mark.parametrize("right", [True, False])
def test_stock_lm_eval_runs_and_scores_the_offline_tasks(right, model_directory, tmp_path):
    names = write_offline_tasks(tmp_path)
    model = load_digital(model_directory)
    harness = Knows(model, load_tokenizer(model_directory), right)
    results = simple_evaluate(
        harness, tasks=names, task_manager=TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0, log_samples=False,
    )  # fmt: skip
    assert scores(results, ARITHMETIC) == {f"{ARITHMETIC} exact_match (number)": float(right)}
    assert scores(results, PAIRS) == {f"{PAIRS} acc": float(right)}
    assert results["n-samples"][ARITHMETIC]["original"] == 154
    assert results["n-samples"][PAIRS]["original"] == 400


def load_digital(directory):
    from analog_plugin.pretrained import load_causal_lm

    return load_causal_lm(directory).float().eval()


def test_writing_the_tasks_again_changes_nothing(tmp_path):
    write_offline_tasks(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write_offline_tasks(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_the_papers_tasks_exist_in_lm_eval():
    manager = TaskManager()
    assert PAPER.keys() <= set(manager.all_tasks) - set(manager.all_tags)


def test_tasks_are_scored_in_a_sweep_and_kept(analog_directory, model_directory, corpus, tmp_path):
    options = {"corpus": str(corpus), "original": str(model_directory), **SMALL}
    models = [str(analog_directory)]
    plain = main_evaluate(models, tmp_path, noise=["pcm"], **options)
    both = main_evaluate(models, tmp_path, noise=["pcm"], tasks=["offline"], limit=6, **options)
    (name,) = plain
    metric = f"{PAIRS} acc"
    for old, new in zip(plain[name].cells, both[name].cells, strict=True):
        assert old.metrics.items() <= new.metrics.items()
        assert 0 <= new.metrics[metric] <= 1
    written = (tmp_path / "cells.jsonl").read_bytes()
    again = main_evaluate(models, tmp_path, noise=["pcm"], tasks=["offline"], limit=6, **options)
    assert again == both and (tmp_path / "cells.jsonl").read_bytes() == written
    assert metric in (tmp_path / "table.csv").read_text()


def test_a_chip_s_score_is_that_of_the_programmed_model(analog_directory, tmp_path):
    write_offline_tasks(tmp_path / "tasks")
    tokenizer = load_tokenizer(analog_directory)
    (evaluator,) = task_evaluators(
        [PAIRS], tokenizer, directory=tmp_path, include_path=tmp_path / "tasks", limit=12
    )
    model = load_checkpoint(analog_directory, noise="gaussian:0.2", seed=3)
    found = evaluator.evaluate(model, None, None, 4)
    results = simple_evaluate(
        "analog",
        f"pretrained={analog_directory},noise=gaussian:0.2,seed=3",
        tasks=[PAIRS],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks")),
        limit=12, batch_size=4, bootstrap_iters=0, log_samples=False, device="cpu",
    )  # fmt: skip
    assert scores(results, PAIRS) == found
    assert "limit=12" in evaluator.name


@pytest.fixture(scope="session", autouse=True)
def registered():
    import analog_integrations.lm_eval.model  # noqa: F401


def test_the_command_knows_the_model_type(analog_directory, tmp_path):
    write_offline_tasks(tmp_path / "tasks")
    result = subprocess.run(
        [sys.executable, "-m", "analog_integrations.lm_eval", "run", "--model", "analog",
         "--model_args", f"pretrained={analog_directory},noise=pcm,seed=0", "--tasks", PAIRS,
         "--include_path", str(tmp_path / "tasks"), "--limit", "4", "--device", "cpu"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert PAIRS in result.stdout and "acc" in result.stdout


def test_unknown_tasks_and_unreachable_data_are_one_sentence(
    analog_directory, tmp_path, monkeypatch
):
    tokenizer = load_tokenizer(analog_directory)
    with pytest.raises(AnalogError, match="no task 'no_such_task'; write offline"):
        task_evaluators(["no_such_task"], tokenizer, directory=tmp_path)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (evaluator,) = task_evaluators(["hellaswag"], tokenizer, directory=tmp_path, limit=1)
    with pytest.raises(AnalogError, match="The task hellaswag does not run"), torch.no_grad():
        evaluator.evaluate(load_checkpoint(analog_directory), None, None, 1)


def test_a_tag_gives_the_scores_of_all_that_it_stands_for():
    results = {"results": {"anli_r1": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "x"},
                           "anli_r2": {"acc,none": 0.25}}}  # fmt: skip
    assert scores(results, "anli") == {"anli_r1 acc": 0.5, "anli_r2 acc": 0.25}
    with pytest.raises(AnalogError, match="no score for 'anli'"):
        scores({"results": {}}, "anli")


def test_changed_tasks_are_scored_anew(analog_directory, tmp_path):
    write_offline_tasks(tmp_path / "tasks")
    tokenizer = load_tokenizer(analog_directory)

    def name():
        options = {"directory": tmp_path, "include_path": tmp_path / "tasks"}
        return task_evaluators([PAIRS, "offline"], tokenizer, **options)[0].name

    before = name()
    assert name() == before
    with (tmp_path / "tasks" / PAIRS / "test.jsonl").open("a") as file:
        file.write('{"sentence_good": "a", "sentence_bad": "b"}\n')
    assert name() != before


def test_a_model_without_tokenizer_is_refused(analog_directory, tmp_path):
    from analog_integrations.lm_eval.model import AnalogLM

    save_checkpoint(load_checkpoint(analog_directory), tmp_path / "bare")
    with pytest.raises(AnalogError, match="has no tokenizer"):
        AnalogLM(str(tmp_path / "bare"))
    with pytest.raises(AnalogError, match="dtype is 'auto'"):
        AnalogLM(str(analog_directory), dtype="auto")
    with pytest.raises(AnalogError, match="no directory"):
        AnalogLM(str(tmp_path / "none"))
