"""Where the time of one step of `AnalogTrainer` goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import measure
import torch
from torch import Tensor, nn

from analog_plugin import AnalogCallback, AnalogTrainer

_TOTAL, _STEP, _LOSS = "total", "training step", "compute loss"
TEACHER, STUDENT = "teacher forward", "student forward"
OPTIMIZER, CALLBACK = "optimizer", "clipping and callback"


class Parts:
    """Seconds of the parts of a step, from :meth:`begin` to :meth:`end`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._starts: dict[str, float] = {}

    def begin(self) -> None:
        self.seconds = {}  # other peers have the same teacher
        self.start(_TOTAL)

    def end(self) -> tuple[float, dict[str, float]]:
        """Seconds of all, and of its parts, which add up to it."""
        self.stop(_TOTAL)
        spent = self.seconds
        total, step, loss = spent[_TOTAL], spent[_STEP], spent[_LOSS]
        return total, {
            TEACHER: spent[TEACHER],
            STUDENT: spent[STUDENT],
            "loss with heads": loss - spent[TEACHER] - spent[STUDENT],
            "student backward": step - loss,
            OPTIMIZER: spent[OPTIMIZER],
            CALLBACK: spent[CALLBACK],
            "gradient norm and the Trainer's own": (
                total - step - spent[OPTIMIZER] - spent[CALLBACK]
            ),
        }

    def start(self, name: str) -> None:
        self._starts[name] = measure.clock(self.device)

    def stop(self, name: str) -> None:
        spent = measure.clock(self.device) - self._starts.pop(name)
        self.seconds[name] = self.seconds.get(name, 0.0) + spent

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.start(name)
        yield
        self.stop(name)

    def watch(self, module: nn.Module, name: str) -> None:
        """Take the module's forwards as a part."""
        module.register_forward_pre_hook(lambda *_: self.start(name))
        module.register_forward_hook(lambda *_: self.stop(name))


class MeasuredTrainer(AnalogTrainer):
    """Notes what its parts take."""

    def __init__(self, *args: Any, parts: Parts, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts = parts
        parts.watch(self.teacher.base_model, TEACHER)
        parts.watch(self.model.base_model, STUDENT)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.parts.part(_STEP):
            return super().training_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with self.parts.part(_LOSS):
            return super().compute_loss(*args, **kwargs)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args)
        if new:
            optimizer.register_step_pre_hook(lambda *_: self.parts.start(OPTIMIZER))
            optimizer.register_step_post_hook(lambda *_: self.parts.stop(OPTIMIZER))
        return optimizer


class MeasuredCallback(AnalogCallback):
    """Notes what it takes."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        with self.parts.part(CALLBACK):
            super().on_step_begin(*args, **kwargs)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with self.parts.part(CALLBACK):
            super().on_pre_optimizer_step(*args, **kwargs)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with self.parts.part(CALLBACK):
            super().on_optimizer_step(*args, **kwargs)
