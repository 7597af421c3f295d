"""Progress bars, in transformers' own style and under its switch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def progress_bar(items: Iterable[T], *, desc: str, total: int | None = None) -> Iterable[T]:
    """Iterate over ``items`` with a progress bar.

    ``transformers.utils.logging.disable_progress_bar()`` (or ``HF_HUB_DISABLE_PROGRESS_BARS=1``)
    silences it.
    """
    from transformers.utils import logging

    return logging.tqdm(items, desc=desc, total=total)


def progress_counter(*, desc: str, total: int, unit: str) -> Any:
    """A bar that is advanced by hand with ``update(n)``; use it in a ``with`` statement."""
    from transformers.utils import logging

    return logging.tqdm(desc=desc, total=total, unit=unit)
