"""Problems with one right answer, and how an answer is found in what a model says."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from analog_plugin.errors import AnalogError

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Problem:
    """A question with one right answer.

    Args:
        prompt: What the model reads.
        answer: What :func:`extract_number`, or another extraction, should find.
    """

    prompt: str
    answer: str


def extract_number(text: str) -> str | None:
    r"""The last number of the first line, without thousands separators; None if there is none.

    Example:
        >>> extract_number(" 1,250.\n7 + 1 =")
        '1250'
    """
    return extract_last_number(text.lstrip().partition("\n")[0])


def extract_last_number(text: str) -> str | None:
    """The last number of the whole text, without thousands separators; None if there is none."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def extract_boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}``, braces within it kept; None if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, inside = 1, text[start + len("\\boxed{") :]
    for index, character in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return inside[:index].strip()
    return None


def read_problems(path: str | Path) -> list[Problem]:
    """Problems from a JSON-lines file with ``prompt`` and ``answer`` in each line.

    Raises:
        AnalogError: The file cannot be read, is empty, or a line is none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AnalogError(f"The problems {path} cannot be read ({error}).") from None
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            problems.append(Problem(str(record["prompt"]), str(record["answer"])))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise AnalogError(
                f"Line {number} of {path} is no problem; write "
                '{"prompt": "3 + 4 =", "answer": "7"}.'
            ) from None
    if not problems:
        raise AnalogError(f"{path} holds no problem; give at least one line.")
    return problems
