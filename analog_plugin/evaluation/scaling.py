"""Test-time scaling: many samples of each answer from one chip, and votes over them.

A model that is wrong more often than it would be without noise may still be right on average: with
more samples and a vote its accuracy rises ('Analog Foundation Models', arXiv 2505.09663, section on
test-time compute; self-consistency, arXiv 2203.11171).
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from analog_plugin.data.sampling import own_generation_config
from analog_plugin.errors import AnalogError
from analog_plugin.evaluation.noise import named_cells, programmed
from analog_plugin.evaluation.problems import Problem, extract_number
from analog_plugin.evaluation.records import RecordFile
from analog_plugin.layers.state import keyed_generator
from analog_plugin.modes import evaluation_mode
from analog_plugin.progress import progress_bar

#: Ways to one answer from several; the last two need scores.
STRATEGIES = ("majority", "any", "best", "weighted")
#: The file of samples in an output directory.
SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class Answers:
    """What one chip said to one problem.

    Args:
        noise, seed: The chip; None without noise.
        problem: Index of the problem.
        right: For each sample, whether its answer is right.
        answers: The extracted answers; None where there is none.
        scores: One a sample, or None.
    """

    noise: str
    seed: int | None
    problem: int
    right: tuple[bool, ...]
    answers: tuple[str | None, ...]
    scores: tuple[float, ...] | None = None

    def correct(self, strategy: str, chosen: Sequence[int]) -> bool:
        """Whether ``strategy`` is right on the samples with the indices ``chosen``."""
        if strategy == "any":
            return any(self.right[i] for i in chosen)
        if strategy == "best":
            assert self.scores is not None
            return self.right[max(chosen, key=lambda i: self.scores[i])]  # type: ignore[index]
        votes: dict[str, float] = {}
        winner: dict[str, bool] = {}
        for i in chosen:
            answer = self.answers[i]
            if answer is None:
                continue
            weight = self.scores[i] if strategy == "weighted" and self.scores is not None else 1.0
            votes[answer] = votes.get(answer, 0.0) + weight
            winner.setdefault(answer, self.right[i])
        if not votes:
            return False
        # The first of equals, as they came: max is stable.
        return winner[max(votes, key=lambda answer: votes[answer])]


@dataclass(frozen=True)
class Point:
    """Accuracy with ``samples`` samples a problem, and its 95 % bootstrap interval."""

    samples: int
    mean: float
    low: float
    high: float


@dataclass
class ScalingReport:
    """Every answer of one model, and accuracies from them."""

    answers: list[Answers] = field(default_factory=list)

    @property
    def strategies(self) -> tuple[str, ...]:
        """Those that the samples allow: ``best`` and ``weighted`` where there are scores."""
        scored = bool(self.answers) and all(a.scores is not None for a in self.answers)
        return STRATEGIES if scored else STRATEGIES[:2]

    def curve(
        self, noise: str, strategy: str = "majority", *, draws: int = 100, resamples: int = 1000
    ) -> list[Point]:
        """Accuracy against the number of samples, 1, 2, 4, ... up to all.

        With fewer samples than there are, the mean over ``draws`` random choices of them. The
        interval resamples problems, and chips where there are several.

        Raises:
            AnalogError: There is no such strategy, or it needs scores that there are not.
        """
        if strategy not in self.strategies:
            raise AnalogError(
                f"strategy is {strategy!r}, but must be one of {', '.join(self.strategies)}"
                + ("" if strategy not in STRATEGIES else "; it needs score=") + "."
            )  # fmt: skip
        found = [answer for answer in self.answers if answer.noise == noise]
        if not found:
            return []
        total = len(found[0].right)
        counts = [2**k for k in range(total.bit_length()) if 2**k < total] + [total]
        return [self._point(found, strategy, n, draws, resamples) for n in counts]

    def _point(
        self, found: Sequence[Answers], strategy: str, count: int, draws: int, resamples: int
    ) -> Point:
        chance = random.Random(f"{strategy}/{count}")
        by_chip: dict[int | None, list[float]] = {}
        for answer in found:
            total = len(answer.right)
            chosen = (
                [range(total)]
                if count == total
                else [chance.sample(range(total), count) for _ in range(draws)]
            )
            share = statistics.fmean(answer.correct(strategy, indices) for indices in chosen)
            by_chip.setdefault(answer.seed, []).append(share)
        table = torch.tensor(list(by_chip.values()), dtype=torch.float64)  # [chips, problems]
        means = []
        generator = keyed_generator(f"bootstrap/{strategy}/{count}")
        for _ in range(resamples):
            # Every chip was asked the same problems, so both are drawn for all.
            drawn = torch.randint(len(table), (len(table),), generator=generator)
            problems = torch.randint(table.shape[1], (table.shape[1],), generator=generator)
            means.append(float(table[drawn][:, problems].mean()))
        means.sort()
        low, high = means[int(0.025 * resamples)], means[int(0.975 * resamples)]
        return Point(count, float(table.mean()), low, high)


@torch.no_grad()
def evaluate_test_time_scaling(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    output: str | Path,
    *,
    noise: Sequence[str | Mapping[str, Any] | None] = (None, "pcm"),
    seeds: int | Sequence[int] = 3,
    samples: int = 16,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 1.0,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    extract: Callable[[str], str | None] = extract_number,
    score: Callable[[str, str], float] | None = None,
    name: str = "model",
    identity: str = "",
    overwrite: bool = False,
) -> ScalingReport:
    """Sample ``samples`` answers to each problem from each chip; go on from an earlier call.

    Args:
        model: A model with analog layers.
        tokenizer: Its tokenizer.
        problems: The questions.
        output: Directory of ``samples.jsonl``, in which finished problems are kept.
        noise, seeds: The chips; see :func:`~analog_plugin.evaluation.evaluate_noise`.
        samples: Answers to each problem from each chip.
        temperature, top_k, top_p, max_new_tokens: Of the sampling; top_k 0: no limit.
        batch_size: Samples drawn together. Together with the chip and the problem it decides the
            random numbers, so it must not change between calls.
        extract: From a sample to its answer; None: it has none.
        score: From prompt and sample to a number, more for better (a reward model, a verifier).
            Adds the strategies ``best`` and ``weighted``.
        name, identity: The model, among others in the same output; see
            :class:`~analog_plugin.evaluation.sweep.SweepModel`.
        overwrite: Forget what ``output`` holds.

    Raises:
        AnalogError: An argument is out of range, or ``output`` holds samples of other settings.
    """
    for argument, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise AnalogError(f"{argument} is {value}, but must be at least 1; write 16.")
    if not temperature > 0:
        raise AnalogError(f"temperature is {temperature}, but must be above 0; write 0.7.")
    cells = named_cells(noise, seeds)
    text = json.dumps([[p.prompt, p.answer] for p in problems])
    settings = {
        "problems": hashlib.sha256(text.encode()).hexdigest()[:16],
        "samples": samples,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
    }
    file = RecordFile(Path(output) / SAMPLES, settings, _check, overwrite)
    known = {
        (r["noise"], r["seed"], r["problem"]): r["samples"]
        for r in file.records
        if (r["model"], r["identity"]) == (name, identity)
    }
    work = [
        (cell, [i for i in range(len(problems)) if (cell.label, cell.seed, i) not in known])
        for cell in cells
    ]
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    with evaluation_mode(model):
        for cell, missing in work:
            if not missing:
                continue
            chip = cell.label if cell.seed is None else f"{cell.label}, seed {cell.seed}"
            with programmed(model, cell.noise, cell.seed):
                for i in progress_bar(missing, desc=f"Sampling from {name}, {chip}"):
                    made = _sample(
                        model, tokenizer, problems[i].prompt, samples, batch_size, max_new_tokens,
                        f"{cell.seed}/{i}", options,
                    )  # fmt: skip
                    known[cell.label, cell.seed, i] = made
                    file.add(
                        {
                            "model": name,
                            "identity": identity,
                            "noise": cell.label,
                            "seed": cell.seed,
                            "problem": i,
                            "samples": made,
                        }
                    )
    report = ScalingReport()
    for cell in cells:
        for i, problem in enumerate(problems):
            made = known[cell.label, cell.seed, i]
            answers = tuple(extract(sample) for sample in made)
            right = tuple(answer == problem.answer for answer in answers)
            scores = None
            if score is not None:
                scores = tuple(float(score(problem.prompt, sample)) for sample in made)
            report.answers.append(Answers(cell.label, cell.seed, i, right, answers, scores))
    return report


def _check(record: dict[str, Any]) -> None:
    hash((record["noise"], record["seed"], record["problem"]))
    if not all(isinstance(sample, str) for sample in record["samples"]):
        raise TypeError("samples must be texts")
    str(record["model"] + record["identity"])


def _sample(
    model: Any,
    tokenizer: Any,
    prompt: str,
    samples: int,
    batch_size: int,
    max_new_tokens: int,
    key: str,
    options: Mapping[str, Any],
) -> list[str]:
    """``samples`` continuations of ``prompt``, the same for the same key on the same machine."""
    device = next(model.parameters()).device
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    made: list[str] = []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ends = getattr(model.generation_config, "eos_token_id", None)
    with own_generation_config(model), torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(keyed_generator(f"samples/{key}").initial_seed())
        while len(made) < samples:
            tokens = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                num_return_sequences=min(batch_size, samples - len(made)),
                max_new_tokens=max_new_tokens,
                eos_token_id=ends,
                pad_token_id=pad,
                **options,
            )
            rows = tokens[:, inputs["input_ids"].shape[1] :]
            made += tokenizer.batch_decode(rows, skip_special_tokens=True)
    return made
