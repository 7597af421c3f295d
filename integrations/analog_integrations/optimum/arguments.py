"""What the commands share: where they compute, and how a user's error ends them."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


def add_place(parser: argparse.ArgumentParser, weights: str) -> None:
    """Declare ``--device`` and ``--dtype``, the type of ``weights``."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help=f"type of the {weights} (default: float32)",
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
