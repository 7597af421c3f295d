"""What the commands share: where they compute, and how a user's error ends them."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
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
def errors_are_sentences(interrupted: str) -> Iterator[None]:
    """A user's error becomes one sentence and exit status 1; Ctrl-C says ``interrupted``."""
    from analog_plugin.errors import AnalogError, torchvision_explained

    try:
        with torchvision_explained():
            yield
    except AnalogError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted: {interrupted}") from None


def split(given: list[str] | None) -> list[str]:
    """Every item of lists with commas."""
    return [item.strip() for text in given or [] for item in text.split(",") if item.strip()]
