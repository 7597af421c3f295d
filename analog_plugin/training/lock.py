"""One run at a time in a directory: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from analog_plugin import processes
from analog_plugin.training.kept import AnotherRun

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

#: The locked file in the directory; a killed run leaves it behind, unlocked.
LOCK = "lock"
_TRIES = 100
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


@contextlib.contextmanager
def run_lock(directory: str | Path) -> Iterator[None]:
    """Have ``directory`` for one run alone, which may be of several processes; all call this.

    The first process locks a file in it (``flock``), which the kernel unlocks however that process
    ends. Within this context the directory may be locked again. Afterwards it is gone where it is
    empty. Where the system or the file system knows no such locks, nothing is locked.

    Raises:
        AnotherRun: Another run has it.
    """
    with contextlib.ExitStack() as stack:
        processes.by_first(lambda: stack.enter_context(_locked(Path(directory))))
        yield


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    place = directory.absolute()
    if fcntl is None or place in _held.get():
        yield
        return
    missing = [path for path in (place, *place.parents) if not path.exists()]
    handle = _acquire(place)
    token = _held.set(_held.get() | {place})
    try:
        yield
    finally:
        _held.reset(token)
        with contextlib.suppress(OSError):
            if handle is not None:
                (place / LOCK).unlink()
            for path in dict.fromkeys((place, *missing)):
                path.rmdir()
        if handle is not None:
            os.close(handle)


def _acquire(directory: Path) -> int | None:
    """An open, locked file; None where none can be written or locked."""
    path = directory / LOCK
    for _ in range(_TRIES):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # a run that ended has just removed the directory
            continue
        except OSError:  # writing what is to be kept will say so
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(handle)
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                with contextlib.suppress(OSError):
                    path.unlink()
                return None
            raise AnotherRun(
                f"{directory} is in use by another run{holder}; wait until that ends, or give "
                "another output."
            ) from None
        # A run that ended may have removed the file that is locked now.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                with contextlib.suppress(OSError):
                    os.truncate(handle, 0)
                    os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
                return handle
        os.close(handle)
    return None


def _holder(handle: int) -> str:
    """Who wrote into the locked file, in brackets."""
    with contextlib.suppress(OSError):
        said = os.pread(handle, 100, 0).decode(errors="replace")
        return f" ({said})" if said and said.isprintable() else ""
    return ""
