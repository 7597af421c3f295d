"""What the commands share: where they compute, and how a user's error ends them."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def add_place(parser: argparse.ArgumentParser, weights: str) -> None:
    """Declare ``--device`` and ``--dtype``, the type of ``weights``."""
    add_device(parser)
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help=f"type of the {weights} (default: float32)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declare ``--device``."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")


def add_corpus(parser: argparse.ArgumentParser, blocks: int, none: str = "") -> None:
    """Declare ``--corpus``, ``--blocks`` and ``--length``: what is measured on.

    Args:
        parser: The command's.
        blocks: How many by default.
        none: What no blocks mean, where they mean something.
    """
    parser.add_argument(
        "--corpus",
        default="pydoc_data.topics",
        help="text to measure on: a file, a datasets directory, a hub id (default: Python's own "
        "reference text)",
    )
    parser.add_argument(
        "--blocks", type=int, default=blocks, help=f"blocks of it{none} (default: {blocks})"
    )
    parser.add_argument("--length", type=int, default=256, help="their tokens (default: 256)")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Declare ``--overwrite`` of a command that writes a directory whole."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an output directory that is not empty"
    )


def add_source(parser: argparse.ArgumentParser) -> None:
    """Declare ``--model`` and ``--recipe`` of a command that trains."""
    parser.add_argument(
        "-m",
        "--model",
        required=True,
        help="hub id, local directory, or demo:smollm2-135m-instruct",
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        required=True,
        help="llm-compressor recipe (YAML) with one AnalogModifier",
    )


def add_measurements(parser: argparse.ArgumentParser, kept: str) -> None:
    """Declare ``--output`` and ``--overwrite`` of a command that keeps ``kept`` and goes on."""
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="directory of the measurements"
    )
    parser.add_argument("--overwrite", action="store_true", help=f"forget {kept} in OUTPUT")


@contextlib.contextmanager
def errors_are_sentences(
    interrupted: str, note: Callable[[BaseException], str] | None = None
) -> Iterator[None]:
    """A user's error becomes one sentence and its exit status, 1 as a rule.

    Args:
        interrupted: What Ctrl-C says.
        note: What is to be said after whatever ended the block, if anything.
    """
    from analog_plugin.errors import AnalogError, torchvision_explained
    from analog_plugin.processes import ProcessFailed

    try:
        with torchvision_explained():
            yield
    except ProcessFailed:  # the one that failed says why
        raise SystemExit(1) from None
    except BaseException as error:
        said = [] if note is None else [note(error)]
        if isinstance(error, AnalogError):
            said.insert(0, f"error: {error}")
        elif isinstance(error, KeyboardInterrupt):
            said.insert(0, f"interrupted: {interrupted}")
        print(*filter(None, said), sep="\n", file=sys.stderr)
        if isinstance(error, (AnalogError, KeyboardInterrupt)):
            raise SystemExit(getattr(error, "exit_status", 1)) from None
        raise


def split(given: list[str] | None) -> list[str]:
    """Every item of lists with commas."""
    return [item.strip() for text in given or [] for item in text.split(",") if item.strip()]


def count_of(text: int | str) -> int:
    """A number of tokens: ``20B``, ``1.5M``, ``10k``, or digits alone.

    Raises:
        AnalogError: It is no such number, or not a whole one above 0.
    """
    from analog_plugin.errors import AnalogError, shown

    found = re.fullmatch(r"([0-9]{1,18})(?:\.([0-9]{1,9}))?([kMBT]?)", str(text))
    if isinstance(text, bool) or found is None:
        raise AnalogError(
            f"tokens is {shown(text)}, but must be a number such as 20B, 500M or 10k."
        )
    whole, fraction, unit = found[1], found[2] or "", found[3]
    scaled, rest = divmod(int(whole + fraction) * _UNITS[unit], 10 ** len(fraction))
    if rest or scaled < 1:
        raise AnalogError(f"tokens is {text}, but must be a whole number above 0.")
    return scaled
