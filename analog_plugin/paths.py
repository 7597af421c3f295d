"""Directories: the user's cache, and writing a directory or a file whole or not at all."""

from __future__ import annotations

import contextlib
import glob
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
    """Refuse an output directory that cannot be written; mend one left by a crash.

    Returns:
        The directory that will be written: absolute, links followed.

    Raises:
        AnalogError: It is a file or below one, not empty without ``overwrite``, the current
            directory or around it, or not writable.
    """
    try:
        target = _resolve(directory)
        _recover(target)
        there = next(path for path in (target, *target.parents) if path.exists())
        full = there == target and target.is_dir() and any(target.iterdir())
    except OSError as error:
        raise AnalogError(f"The output {directory} cannot be written ({error}).") from None
    if not there.is_dir():
        raise AnalogError(
            f"{there} is a file, but the output {directory} must be a directory; give another."
        )
    if full and not overwrite:
        raise AnalogError(
            f"{directory} exists and is not empty; give another directory, or --overwrite "
            "(overwrite=True) to replace it."
        )
    beside = target.parent if there == target else there
    if not os.access(beside, os.W_OK):
        raise AnalogError(
            f"The output {directory} cannot be written: {beside} is not writable; give another."
        )
    return target


def refuse_around(output: str | Path, source: str | Path) -> None:
    """Refuse an output that is the source or holds it, and would take its place.

    Raises:
        AnalogError: It is.
    """
    if Path(source).resolve().is_relative_to(_resolve(output)):
        raise AnalogError(
            f"The output {str(output)!r} is or holds the checkpoint itself, whose full-precision "
            "weights would be lost; give another."
        )


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


@contextlib.contextmanager
def atomic_file(path: Path, keep: bool = False) -> Iterator[Path]:
    """Write a temporary sibling; it is on disk before it takes the name ``path``.

    Args:
        path: The file.
        keep: Whether a file that is there stays.
    """
    partial = path.with_name(f".{path.name}{_PARTIAL}{uuid.uuid4().hex[:8]}")
    try:
        yield partial
        _sync_file(partial)
        if keep:
            with contextlib.suppress(FileExistsError):
                os.link(partial, path)
        else:
            partial.replace(path)
        _sync_names(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def drop_partial(path: Path) -> None:
    """Remove what a crash left of writing ``path``; nobody may be writing it."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}{_PARTIAL}*"):
        partial.unlink(missing_ok=True)


def _resolve(directory: str | Path) -> Path:
    """Absolute and without links: a link would be renamed instead of what it leads to."""
    try:
        target = Path(directory).resolve()
    # A loop of links (up to Python 3.12), a zero byte.
    except (RuntimeError, ValueError) as error:
        raise AnalogError(f"The output {str(directory)!r} is no path ({error}).") from None
    if Path.cwd().is_relative_to(target):
        raise AnalogError(
            f"The output {str(directory)!r} is the current directory or holds it, so it cannot be "
            "replaced; give another."
        )
    return target


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
            _sync_file(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _sync_names(directory: Path) -> None:
    """Have on disk which names are in a directory, where the system offers that."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
