"""What the commands share: where they compute, and how a user's error ends them."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator


def add_place(parser: argparse.ArgumentParser, weights: str) -> None:
    """Declare ``--device`` and ``--dtype``, the type of ``weights``."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help=f"type of the {weights} (default: float32)",
    )


@contextlib.contextmanager
def errors_are_sentences(interrupted: str) -> Iterator[None]:
    """A user's error becomes one sentence and exit status 1; Ctrl-C says ``interrupted``."""
    from analog_plugin.errors import AnalogError

    try:
        yield
    except AnalogError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted: {interrupted}") from None
