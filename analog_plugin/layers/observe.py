"""Watch the inputs of analog layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

#: Called with a layer's input [..., in] and the [T] mask of the tokens that count, or None.
Observer = Callable[[Tensor, Tensor | None], None]


@contextlib.contextmanager
def observed(layers: Mapping[str, Any], observers: Mapping[str, Observer]) -> Iterator[None]:
    """Within this context each layer's inputs go to the observer of the same name."""
    try:
        for name, observer in observers.items():
            layers[name].observer = observer
        yield
    finally:
        for name in observers:
            layers[name].observer = None
