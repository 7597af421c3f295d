"""Tasks that need no download, written as ordinary lm-eval task directories.

One-digit arithmetic with worked examples, answered by generation, and grammatical minimal pairs,
judged as BLiMP is (arXiv 1912.00582): the sentence that the model finds likelier should be the
grammatical one. Everything is generated from a seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analog_plugin.evaluation.problems import Problem

ARITHMETIC = "analog_arithmetic"
PAIRS = "analog_minimal_pairs"
_SHOTS = 8

_NOUNS = (
    "author", "dog", "farmer", "teacher", "bird", "doctor", "student", "neighbor", "sailor",
    "king", "singer", "guard", "horse", "actor", "pilot", "girl",
)  # fmt: skip
_VERBS = (
    ("laughs", "laugh"), ("sleeps", "sleep"), ("runs", "run"), ("works", "work"),
    ("sings", "sing"), ("waits", "wait"), ("smiles", "smile"), ("travels", "travel"),
)  # fmt: skip
_PLACES = ("near the houses", "behind the trees", "with the boxes", "beside the cars")
_ADJECTIVES = ("old", "red", "small", "quiet", "young", "tall", "happy", "strange")
_ENDINGS = ("every day", "in the morning", "after lunch", "all the time")


def write_offline_tasks(directory: str | Path, *, seed: int = 0) -> list[str]:
    """Write both tasks below ``directory``, the same files for the same seed.

    Args:
        directory: For lm-eval's ``--include_path``; made where it is missing.
        seed: Chooses and orders the questions.

    Returns:
        The tasks' names.
    """
    root = Path(directory).resolve()
    worked, questions = _worked(seed)
    _write(
        root / ARITHMETIC,
        questions,
        {
            "task": ARITHMETIC,
            "output_type": "generate_until",
            "doc_to_text": worked + "{{question}}",
            "doc_to_target": " {{answer}}",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 8},
            "filter_list": [
                {
                    "name": "number",
                    "filter": [
                        {"function": "regex", "regex_pattern": "^\\s*(-?[0-9]+)"},
                        {"function": "take_first"},
                    ],
                }
            ],
            "metric_list": [
                {
                    "metric": "exact_match",
                    "aggregation": "mean",
                    "higher_is_better": True,
                    "regexes_to_ignore": ["\\s"],
                }
            ],
        },
    )
    _write(
        root / PAIRS,
        list(minimal_pairs(seed)),
        {
            "task": PAIRS,
            "output_type": "multiple_choice",
            "doc_to_text": "",
            "doc_to_target": 0,
            "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
    )
    return [ARITHMETIC, PAIRS]


def arithmetic_problems(seed: int = 0) -> list[Problem]:
    """The task's questions behind its worked examples, for test-time scaling."""
    worked, questions = _worked(seed)
    return [Problem(worked + q["question"], q["answer"]) for q in questions]


def _worked(seed: int) -> tuple[str, list[dict[str, Any]]]:
    """The worked examples as text, and the questions that are left."""
    questions = list(arithmetic(seed))
    shown = "".join(f"{q['question']} {q['answer']}\n" for q in questions[:_SHOTS])
    return shown, questions[_SHOTS:]


def arithmetic(seed: int = 0) -> Iterator[dict[str, Any]]:
    """All sums and products of two digits from 1 to 9, in random order."""
    pairs = [(a, b, sign) for a in range(1, 10) for b in range(1, 10) for sign in "+*"]
    random.Random(f"arithmetic/{seed}").shuffle(pairs)
    for a, b, sign in pairs:
        yield {"question": f"{a} {sign} {b} =", "answer": str(a + b if sign == "+" else a * b)}


def minimal_pairs(seed: int = 0, each: int = 100) -> Iterator[dict[str, Any]]:
    """Pairs of sentences that differ in one point of grammar, ``each`` of every phenomenon."""
    chance = random.Random(f"pairs/{seed}")
    makers = {
        "agreement": _agreement,
        "distant agreement": _distant_agreement,
        "determiner": _determiner,
        "word order": _word_order,
    }
    for phenomenon, make in makers.items():
        seen: set[str] = set()
        while len(seen) < each:
            good, bad = make(chance)
            if good not in seen:
                seen.add(good)
                yield {"sentence_good": good, "sentence_bad": bad, "phenomenon": phenomenon}


def _subject(chance: random.Random) -> tuple[str, bool]:
    plural = chance.random() < 0.5
    return chance.choice(_NOUNS) + ("s" if plural else ""), plural


def _agreement(chance: random.Random) -> tuple[str, str]:
    (noun, plural), verb = _subject(chance), chance.choice(_VERBS)
    rest = chance.choice(_ENDINGS)
    good, bad = verb[plural], verb[not plural]
    return f"The {noun} {good} {rest}.", f"The {noun} {bad} {rest}."


def _distant_agreement(chance: random.Random) -> tuple[str, str]:
    noun, verb = chance.choice(_NOUNS), chance.choice(_VERBS)
    place, rest = chance.choice(_PLACES), chance.choice(_ENDINGS)
    return f"The {noun} {place} {verb[0]} {rest}.", f"The {noun} {place} {verb[1]} {rest}."


def _determiner(chance: random.Random) -> tuple[str, str]:
    (noun, plural), (one, many) = (
        _subject(chance),
        chance.choice((("this", "these"), ("that", "those"))),
    )
    adjective, verb = (
        chance.choice(_ADJECTIVES),
        chance.choice(("saw", "liked", "heard", "followed")),
    )
    good, bad = (many, one) if plural else (one, many)
    return f"They {verb} {good} {adjective} {noun}.", f"They {verb} {bad} {adjective} {noun}."


def _word_order(chance: random.Random) -> tuple[str, str]:
    noun, adjective, rest = (chance.choice(x) for x in (_NOUNS, _ADJECTIVES, _ENDINGS))
    verb = chance.choice(_VERBS)[0]
    return f"The {adjective} {noun} {verb} {rest}.", f"The {noun} {adjective} {verb} {rest}."


def _write(directory: Path, questions: list[dict[str, Any]], task: dict[str, Any]) -> None:
    import yaml

    directory.mkdir(parents=True, exist_ok=True)
    data = directory / "test.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    fields = task | {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    (directory / f"{fields['task']}.yaml").write_text(text, encoding="utf-8")
