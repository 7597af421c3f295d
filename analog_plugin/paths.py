"""Directories: the user's cache, and writing a directory whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from analog_plugin.errors import AnalogError

_ASIDE = ".replaced"
_PARTIAL = ".partial-"


def cache_directory(*parts: str) -> Path:
    """``$ANALOG_PLUGIN_CACHE``, else ``$XDG_CACHE_HOME/analog-plugin``, else ``~/.cache/…``."""
    root = os.environ.get("ANALOG_PLUGIN_CACHE")
    if root:
        return Path(root).expanduser().joinpath(*parts)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().joinpath("analog-plugin", *parts)


def check_output(directory: str | Path, overwrite: bool) -> Path:
    """Refuse an output directory that exists and is not empty; mend one left by a crash.

    Raises:
        AnalogError: It is a file, or not empty without ``overwrite``.
    """
    directory = Path(directory)
    _recover(directory)
    if directory.exists() and not directory.is_dir():
        raise AnalogError(
            f"{directory} is a file, but the output must be a directory; give another."
        )
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise AnalogError(
            f"{directory} exists and is not empty; give another directory, or --overwrite "
            "(overwrite=True) to replace it."
        )
    return directory


@contextlib.contextmanager
def atomic_directory(directory: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Fill a temporary sibling; it takes the name ``directory`` only when all went well.

    An old directory is renamed aside, the new one put in its place, then the old one deleted.
    Whenever a crash comes, ``directory`` is whole: the old one or the new one (at worst aside, from
    where the next call here or :func:`check_output` brings it back).
    """
    directory = check_output(directory, overwrite)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}{_PARTIAL}{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        yield partial
        _sync(partial)
        aside = _aside(directory)
        if directory.exists():
            directory.rename(aside)
        partial.rename(directory)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _recover(directory)
        raise


def _aside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}{_ASIDE}")


def _recover(directory: Path) -> None:
    """Finish what a crash interrupted: bring back the old directory, or drop it if replaced."""
    aside = _aside(directory)
    if not aside.exists():
        return
    if directory.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.rename(directory)


def _sync(directory: Path) -> None:
    """Have the files on disk before the rename that makes them visible."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
