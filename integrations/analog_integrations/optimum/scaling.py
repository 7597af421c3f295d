"""``main_test_time``: the Python twin of ``optimum-cli analog test-time``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from analog_integrations.lm_eval.offline import arithmetic_problems
from analog_integrations.optimum.evaluate import (
    check_counts,
    identity,
    kind_of,
    load_entry,
    named_models,
)
from analog_integrations.optimum.export import resolve_device
from analog_plugin.demo import resolve_model
from analog_plugin.errors import AnalogError, one_line, require
from analog_plugin.evaluation import Problem, ScalingReport, evaluate_test_time_scaling
from analog_plugin.evaluation.problems import (
    extract_boxed,
    extract_last_number,
    extract_number,
    read_problems,
)
from analog_plugin.evaluation.scaling_report import write_scaling_report
from analog_plugin.noise import at_times, resolve_noise
from analog_plugin.pretrained import load_tokenizer


def main_test_time(
    models: str | Sequence[str] | Mapping[str, str],
    output: str | Path,
    *,
    problems: str = "arithmetic",
    noise: Sequence[str | Mapping[str, Any]] = ("pcm",),
    time: Sequence[str | float] = (),
    seeds: int | Sequence[int] = 3,
    samples: int = 16,
    temperature: float = 0.7,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    reward: str | Callable[[str, str], float] | None = None,
    batch_size: int = 16,
    device: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> dict[str, ScalingReport]:
    """Accuracy against the number of samples a problem; finished problems are kept.

    Args:
        models: Full-precision models (noise alone) and analog checkpoints, as in
            :func:`~analog_integrations.optimum.evaluate.main_evaluate`.
        output: Directory of ``samples.jsonl``, ``test-time.html``, the table and the figures.
        problems: ``"arithmetic"`` (one digit, no download), ``"gsm8k"`` or ``"math500"`` (from the
            hub), or a JSON-lines file with ``prompt`` and ``answer``.
        noise, time, seeds: The chips; without noise is measured always.
        samples: Answers to each problem from each chip.
        temperature: Of the sampling.
        max_new_tokens: Of an answer; None: 8 for arithmetic, else 512.
        limit: Problems; None: all.
        reward: A reward model (a sequence classifier, directory or hub id) or a function of prompt
            and sample, for the best of n and weighted votes.
        batch_size: Samples drawn together; it must stay the same to go on.
        device, dtype: Where to compute, and in which type.
        overwrite: Forget the samples in ``output``.

    Returns:
        A report by model.

    Raises:
        AnalogError: Something given is wrong; one sentence says what. Finished problems are kept.
    """
    require("matplotlib", "eval")
    check_counts(
        output, samples=(samples, 1), batch_size=(batch_size, 1), limit=(limit, 1),
        max_new_tokens=(max_new_tokens, 1),
    )  # fmt: skip
    named = named_models(models)
    noises = [None, *at_times(noise, time)]
    for item in noises:  # refused before anything is loaded
        resolve_noise(item)
    place = resolve_device(device, dtype)
    kinds = {name: kind_of(source) for name, source in named.items()}
    for name, kind in kinds.items():
        if kind == "quantized":
            raise AnalogError(f"The model {name} is quantized; give one that can be programmed.")
    asked, extract, tokens = _problems(problems)
    asked = asked[:limit]
    score = _reward(reward, place) if isinstance(reward, str) else reward
    reports: dict[str, ScalingReport] = {}
    for name, source in named.items():
        tokenizer = load_tokenizer(resolve_model(source), source)
        if tokenizer is None:
            raise AnalogError(f"The model {source} has no tokenizer beside it; give one that has.")
        reports[name] = evaluate_test_time_scaling(
            load_entry(source, kinds[name], dtype, place),
            tokenizer,
            asked,
            output,
            noise=noises,
            seeds=seeds,
            samples=samples,
            temperature=temperature,
            max_new_tokens=tokens if max_new_tokens is None else max_new_tokens,
            batch_size=batch_size,
            extract=extract,
            score=score,
            name=name,
            identity=identity(source),
            overwrite=overwrite and not reports,
        )
    drawn = f"{samples} samples each at temperature {temperature:g}"
    notes = [f"{len(asked)} problems ({problems}), {drawn}."]
    title = f"{', '.join(named)}: test-time scaling"
    text = write_scaling_report(reports, output, title=title, notes=notes)
    print(f"\n{text}\nWritten to {output}; the page is {Path(output) / 'test-time.html'}.")
    return reports


def _problems(name: str) -> tuple[list[Problem], Callable[[str], str | None], int]:
    """The problems, how their answers are found, and the tokens that an answer may take."""
    if name == "arithmetic":
        return arithmetic_problems(), extract_number, 8
    if name == "gsm8k":
        rows = _from_hub("openai/gsm8k", "main")
        found = [
            Problem(
                f"Question: {row['question']}\nAnswer: Let's think step by step.",
                row["answer"].rpartition("####")[2].strip().replace(",", ""),
            )
            for row in rows
        ]
        return found, extract_last_number, 512
    if name == "math500":
        ask = "Put the final answer into \\boxed{}."
        rows = _from_hub("HuggingFaceH4/MATH-500", None)
        return (
            [Problem(f"{row['problem']}\n{ask}\n", row["answer"].strip()) for row in rows],
            extract_boxed,
            512,
        )
    return read_problems(name), extract_last_number, 512


def _from_hub(name: str, part: str | None) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, part, split="test")
    # Unknown, unreachable and changed data sets fail in as many ways as there are formats.
    except Exception as error:
        raise AnalogError(
            f"The problems {name} cannot be had: {one_line(error)}; give a JSON-lines file."
        ) from error


def _reward(name: str, device: str) -> Callable[[str, str], float]:
    """Scores by a sequence classifier: its only logit, or the log-odds of its last class."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            name, trust_remote_code=False
        )
    except Exception as error:
        raise AnalogError(f"The reward model {name} does not load: {one_line(error)}") from error
    model = model.to(device).eval()

    @torch.no_grad()
    def score(prompt: str, sample: str) -> float:
        inputs = tokenizer(prompt + sample, return_tensors="pt", truncation=True).to(device)
        logits = model(**inputs).logits[0].float()
        return float(logits[-1] if len(logits) == 1 else logits[-1] - logits[:-1].logsumexp(0))

    return score
