"""Leave out what has been computed already: the blocks before the layer that is changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class KnownBlocks:
    """Outputs of a model's blocks on one batch, to begin a forward at the block that differs.

    Blocks are the modules of the ``nn.ModuleList`` with the most weights. They must run once each,
    in their order, and say all they have to say to the next by their output. That is checked on the
    model; where it does not hold, every forward runs in full.

    Args:
        model: In evaluation mode.
        run: A forward of ``model`` on the batch, and the result to compare.
    """

    def __init__(self, model: nn.Module, run: Callable[[], Tensor]) -> None:
        lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in lists.items()}
        self.path = max(sizes, key=sizes.__getitem__, default="")
        self.blocks: list[nn.Module] = list(lists.get(self.path, ()))
        self.outputs: list[Any] = []
        order: list[nn.Module] = []

        def keep(block: nn.Module, _: Any, output: Any) -> None:
            order.append(block)
            self.outputs.append(output)

        handles = [block.register_forward_hook(keep) for block in self.blocks]
        try:
            expected = run()
        finally:
            for handle in handles:
                handle.remove()
        if order == self.blocks:
            with self._known(len(self.blocks) - 1):
                if torch.equal(run(), expected):
                    return
        self.blocks = []

    @contextlib.contextmanager
    def before(self, name: str) -> Iterator[None]:
        """Within this context the blocks before the one that holds the module ``name`` are known.

        For a module outside the blocks nothing is.
        """
        inside, _, rest = name.partition(f"{self.path}.")
        index = rest.partition(".")[0]
        with self._known(int(index) if not inside and index.isdigit() and self.blocks else 0):
            yield

    @contextlib.contextmanager
    def _known(self, count: int) -> Iterator[None]:
        """Within this context the first ``count`` blocks give their known outputs."""
        known = self.blocks[: max(count, 0)]
        # What some library wrapped around a forward is put back.
        own = [vars(block).get("forward") for block in known]
        try:
            for block, output in zip(known, self.outputs, strict=False):
                vars(block)["forward"] = _constant(output)
            yield
        finally:
            for block, forward in zip(known, own, strict=True):
                vars(block).pop("forward", None)
                if forward is not None:
                    vars(block)["forward"] = forward


def _constant(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output
