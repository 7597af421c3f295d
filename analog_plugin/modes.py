"""Training and evaluation mode of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within this context ``model`` evaluates; then each of its modules is in its own mode again.

    Parts may differ: a frozen part stays in evaluation mode while the rest is trained.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
