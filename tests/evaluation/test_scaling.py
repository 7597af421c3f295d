"""Test-time scaling: votes, curves with intervals, and sampling that resumes."""

import itertools
import json
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import word_tokenizer

from analog_plugin import AnalogError, evaluate_test_time_scaling
from analog_plugin.evaluation.problems import (
    Problem,
    extract_boxed,
    extract_last_number,
    extract_number,
    read_problems,
)
from analog_plugin.evaluation.scaling import SAMPLES, STRATEGIES, Answers, ScalingReport
from analog_plugin.evaluation.scaling_report import write_scaling_report

PROBLEMS = [Problem("w5 w6 w7", "w8"), Problem("w9", "w10"), Problem("w11 w12", "w13")]


def answers(given_answers, truth="7", scores=None, seed=0, problem=0, noise="pcm"):
    right = tuple(answer == truth for answer in given_answers)
    return Answers(noise, seed, problem, right, tuple(given_answers), scores)


def test_votes():
    four = answers(["7", "8", None, "8"], scores=(9.0, 1.0, 50.0, 2.0))
    every = range(4)
    assert not four.correct("majority", every) and four.correct("any", every)
    assert four.correct("weighted", every) and not four.correct("best", every)
    assert four.correct("majority", [0, 1]), "of equals the first stands"
    assert not four.correct("majority", [1, 0])
    assert four.correct("majority", [0, 2]), "no answer is no vote"
    assert not four.correct("majority", [2]) and not four.correct("any", [2])
    assert four.correct("best", [0, 1])


@given(st.lists(st.sampled_from(["7", "8", "9", None]), min_size=1, max_size=12), st.randoms())
def test_no_vote_beats_any_and_a_clear_majority_decides(said, chance):
    scores = tuple(chance.random() for _ in said)
    found = answers(said, scores=scores)
    every = range(len(said))
    for strategy in STRATEGIES:
        assert found.correct(strategy, every) <= found.correct("any", every)
    valid = [answer for answer in said if answer is not None]
    if valid and valid.count("7") > len(valid) / 2:
        assert found.correct("majority", every)
    if all(found.right):
        assert all(found.correct(strategy, every) for strategy in STRATEGIES)


def synthetic(problems=200, chips=2, samples=8, p=0.3, seed=0):
    """Right with probability ``p``, else wrong in a way of its own."""
    chance = random.Random(seed)

    def draw():
        return "7" if chance.random() < p else str(chance.randint(100, 10**6))

    return ScalingReport(
        [
            answers([draw() for _ in range(samples)], seed=chip, problem=problem)
            for chip in range(chips)
            for problem in range(problems)
        ]
    )


def test_one_sample_is_right_as_often_as_samples_are():
    report = synthetic()
    share = sum(sum(a.right) for a in report.answers) / (8 * len(report.answers))
    first = report.curve("pcm")[0]
    assert first.samples == 1 and first.mean == pytest.approx(share, abs=0.01)
    assert first.low < first.mean < first.high


def test_a_vote_gains_where_wrong_answers_differ():
    report = synthetic()
    majority, either = report.curve("pcm"), report.curve("pcm", "any")
    assert [point.samples for point in majority] == [1, 2, 4, 8]
    assert majority[-1].mean > majority[0].mean + 0.3
    for few, more in itertools.pairwise(either):
        assert few.mean < more.mean
    exact = 1 - 0.7**8
    assert either[-1].mean == pytest.approx(exact, abs=0.03)


def test_the_interval_is_that_of_problems():
    """One chip, one sample: the standard error of a share."""
    report = synthetic(problems=400, chips=1, samples=1, p=0.3)
    (point,) = report.curve("pcm", resamples=4000)
    half = 1.96 * math.sqrt(point.mean * (1 - point.mean) / 400)
    assert point.high - point.mean == pytest.approx(half, rel=0.12)
    assert point.mean - point.low == pytest.approx(half, rel=0.12)
    assert report.curve("pcm") == report.curve("pcm")


def test_chips_widen_the_interval():
    good = [answers(["7"], seed=0, problem=i) for i in range(200)]
    bad = [answers(["8"], seed=1, problem=i) for i in range(200)]
    (point,) = ScalingReport(good + bad).curve("pcm")
    assert point.mean == 0.5 and point.low == 0.0 and point.high == 1.0


def test_strategies_need_scores():
    report = synthetic(3, 1, 2)
    assert report.strategies == ("majority", "any")
    with pytest.raises(AnalogError, match=r"'best'.*needs score="):
        report.curve("pcm", "best")
    with pytest.raises(AnalogError, match="'median', but must be one of majority, any"):
        report.curve("pcm", "median")
    assert report.curve("gaussian") == []


def test_answers_are_found():
    assert extract_number(" 1,250.\n7 + 1 =") == "1250" and extract_number("x\n3") is None
    assert extract_number("is 3 or -4.5") == "-4.5" and extract_number("") is None
    assert extract_last_number("so 3\nand then 1,234") == "1234"
    assert extract_boxed(r"a \boxed{1} b \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert extract_boxed("none") is None and extract_boxed(r"\boxed{1") is None


def sample(model, output, **options):
    settings = {
        "samples": 5,
        "batch_size": 2,
        "seeds": 2,
        "max_new_tokens": 3,
        "extract": str.strip,
    }
    return evaluate_test_time_scaling(
        model, word_tokenizer(), PROBLEMS, output, **(settings | options)
    )


def test_sampling_is_the_same_again_and_each_chip_its_own(model, tmp_path):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample(model, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert sample(model, tmp_path / "b") == first
    said = {(a.noise, a.seed): a.answers for a in first.answers if a.problem == 0}
    assert said.keys() == {("none", None), ("pcm", 0), ("pcm", 1)}
    assert len(set(said.values())) == 3
    assert all(len(a.answers) == 5 and len(set(a.answers)) > 1 for a in first.answers)


@pytest.mark.parametrize("stop", [0, 1, 4, 8])
def test_an_interrupted_run_goes_on(stop, model, tmp_path, monkeypatch):
    whole = sample(model, tmp_path / "whole")
    calls, generate = [], model.generate

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3 * stop + 1:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        sample(model, tmp_path / "cut")
    assert all(
        layer.programmed_weight is None for layer in model.modules() if hasattr(layer, "tiles")
    )
    monkeypatch.setattr(model, "generate", generate)
    assert sample(model, tmp_path / "cut") == whole
    lines = (tmp_path / "cut" / SAMPLES).read_text()
    assert lines == (tmp_path / "whole" / SAMPLES).read_text()
    monkeypatch.setattr(model, "generate", None)
    assert sample(model, tmp_path / "cut") == whole


def test_what_changes_the_samples_is_not_mixed(model, tmp_path):
    sample(model, tmp_path)
    for change in ({"samples": 4}, {"temperature": 1.0}, {"batch_size": 3}, {"max_new_tokens": 4}):
        with pytest.raises(AnalogError, match=rf"other settings \({next(iter(change))}\)"):
            sample(model, tmp_path, **change)


def test_scores_are_asked_for_prompt_and_sample(model, tmp_path):
    seen = []
    report = sample(model, tmp_path, score=lambda *pair: seen.append(pair) or float(len(pair[1])))
    assert report.strategies == STRATEGIES
    assert {prompt for prompt, _ in seen} == {problem.prompt for problem in PROBLEMS}
    assert len(seen) == 3 * 3 * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"temperature": 0}, "temperature is 0"),
        ({"noise": ["pcn"]}, "no noise model 'pcn'"),
        ({"seeds": 0}, "seeds is 0"),
    ],
)
def test_wrong_arguments_are_refused(options, message, model, tmp_path):
    with pytest.raises(AnalogError, match=message):
        sample(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ['{"prompt": "x"}', "[]", "x", "3", "[" * 100_000])
def test_a_file_of_problems_is_read_or_its_line_named(line, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "answer": 3}\n\n')
    assert read_problems(path) == [Problem("a", "3")]
    path.write_text('{"prompt": "a", "answer": 3}\n' + line)
    with pytest.raises(AnalogError, match=r"Line 2 of .* is no problem"):
        read_problems(path)
    path.write_text("\n")
    with pytest.raises(AnalogError, match="holds no problem"):
        read_problems(path)
    with pytest.raises(AnalogError, match="cannot be read"):
        read_problems(tmp_path / "none.jsonl")


def test_the_report_shows_every_point(tmp_path):
    reports = {"<a>": synthetic(20, 2, 4), "b": synthetic(20, 2, 4, p=0.8)}
    text = write_scaling_report(reports, tmp_path, title="T & t", notes=["Note."])
    page = (tmp_path / "test-time.html").read_text(encoding="utf-8")
    assert "<a>" not in page and "&lt;a&gt;" in page and "T &amp; t" in page and "Note." in page
    assert page.count("<svg") == len(list(tmp_path.glob("*.png"))) == 2
    rows = (tmp_path / "test-time.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 * 3 and "| b | pcm | majority |" in text
    assert json.dumps(reports["b"].curve("pcm")[-1].mean) in rows[-4]
