"""Ctrl-C and SIGTERM while a run is under way."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from analog_plugin.errors import AnalogError
from analog_plugin.processes import all_reduce


class TrainingStopped(AnalogError):
    """SIGTERM came, and what there was to keep is kept."""

    #: As a shell shows a process that SIGTERM ended.
    exit_status = 128 + signal.SIGTERM


class Termination:
    """SIGTERM as an error: at once, or, within :meth:`deferred`, when it is asked for.

    Attributes:
        requested: Whether it came.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Within this context SIGTERM is ours; a handler of somebody else's stays."""
        ours = threading.current_thread() is threading.main_thread()
        if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this context SIGTERM only sets :attr:`requested`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _note(self, number: int, frame: Any) -> None:
        self.requested = True
        if not self._deferred:
            raise TrainingStopped("The run was stopped by SIGTERM.")


class StopsOnRequest(TrainerCallback):
    """Saves and ends the training after the step in which any process was sent SIGTERM."""

    def __init__(self, termination: Termination) -> None:
        self.termination = termination
        self.stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask all processes: they save and stop together."""
        asked = torch.tensor(float(self.termination.requested), device=args.device)
        if all_reduce(asked) > 0 and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


class KeptInterrupts(TrainerCallback):
    """An interrupt that a library swallows is raised again after the step.

    C code may clear any exception, that of Ctrl-C too: ``PyObject_HasAttr`` does.
    """

    def __init__(self) -> None:
        self.pending = False

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Note interrupts within this context; a handler of somebody else's stays."""
        ours = threading.current_thread() is threading.main_thread()
        if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return

        def note(number: int, frame: Any) -> None:
            self.pending = True
            signal.default_int_handler(number, frame)

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Raise what was swallowed."""
        if self.pending:
            raise KeyboardInterrupt
