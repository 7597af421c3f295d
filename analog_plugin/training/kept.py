"""What a run keeps beside its output until it is done, so that it can be broken off and resumed."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from analog_plugin.checkpoint.layout import verify_manifest, write_manifest
from analog_plugin.errors import AnalogError, first_fault, one_line
from analog_plugin.files import read_json
from analog_plugin.layers import analog_layers, convert_to_analog, model_scheme
from analog_plugin.layers.prefix import Prefix, install_prefix, installed_prefix
from analog_plugin.paths import atomic_directory, check_output
from analog_plugin.processes import by_first, gathered
from analog_plugin.recipe import AnalogRecipe
from analog_plugin.scheme import AnalogScheme
from analog_plugin.training.bound import set_out_bound
from analog_plugin.training.record import Record, difference

#: The prepared model before the first step, and the trained one after the last.
START, TRAINED = "start", "trained"
_CHECKPOINT = "checkpoint-"
_STATE, _RECORD = "state.safetensors", "record.json"
_TRAINER_STATE = "trainer_state.json"
_PREFIX = "digital-prefix/"


def training_directory(output: str | Path) -> Path:
    """Where a run that writes ``output`` keeps what it needs to be resumed: beside it."""
    path = Path(output)
    return path.with_name(f"{path.name}.training")


class SavingFailed(AnalogError):
    """A training checkpoint could not be written."""


class AnotherRun(AnalogError):
    """What is kept is not to be gone on with, or not of this run."""


class KeptRun:
    """The directory of one run: ``start``, ``checkpoint-N`` and ``trained``, each whole or absent.

    Each is written into a temporary sibling, its manifest of hashes last, and then renamed. In a
    run of several processes all of them call :meth:`save_checkpoint`; everything else is the
    first's.

    Args:
        directory: See :func:`training_directory`.
        identity: See :func:`~analog_plugin.training.record.run_identity`.
        limit: Training checkpoints to keep; the last whole one always is.
        resume: Go on with what is there.
        overwrite: Forget it, where it is not resumed.
    """

    def __init__(
        self,
        directory: Path,
        identity: Mapping[str, Any],
        limit: int = 2,
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.directory, self.identity, self.limit = directory, dict(identity), max(limit, 1)
        self.resume, self.overwrite = resume, overwrite
        self._writing = contextlib.ExitStack()

    def open(self) -> None:
        """Begin, or go on with what is there.

        Raises:
            AnalogError: There is a run and it is neither to be resumed nor overwritten, or it is
                a run of something else.
        """
        kept = what_is_kept(self.directory)
        if kept and not (self.resume or self.overwrite):
            raise AnotherRun(
                f"{self.directory} holds a run that was broken off; go on with --resume "
                "(resume=True), or delete it."
            )
        if not self.resume:
            forget_run(self.directory)
        self._mend()
        if self.resume and (found := self.state()) is not None:
            self._check_identity(found[1].identity)

    def state(self) -> tuple[Path, Record] | None:
        """The latest of ``trained`` and ``start`` that is whole, and its record."""
        for name in (TRAINED, START):
            place = self.directory / name
            if not place.is_dir():
                continue
            fault = _fault(place, (_STATE, _RECORD))
            if fault is None:
                return place, self._record(place)
            print(f"{place} is damaged and left out: {fault}.")
            shutil.rmtree(place, ignore_errors=True)
        # Checkpoints hold no scheme: without a start there is nothing to put them into.
        for step in _steps(self.directory):
            shutil.rmtree(self._checkpoint(step), ignore_errors=True)
        return None

    def save_state(self, name: str, model: nn.Module, record: Mapping[str, Any]) -> None:
        """Keep the model's weights, ranges, counters and prefix, and what is known beside them.

        Raises:
            SavingFailed: It could not be written.
        """
        from safetensors.torch import save_file

        tensors = _tensors(model)
        prefix = installed_prefix(model)
        if prefix is not None:
            tensors |= {_PREFIX + name: tensor for name, tensor in prefix.to_tensors().items()}
        values = Record(
            identity=self.identity, scheme=model_scheme(model).to_dict(), **record
        ).model_dump(mode="json")
        try:
            with atomic_directory(self.directory / name, overwrite=True) as target:
                # As they are: what shares memory is there once.
                save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()},
                          target / _STATE)  # fmt: skip
                (target / _RECORD).write_text(json.dumps(values, indent=2) + "\n")
                write_manifest(target)
        except Exception as error:
            raise SavingFailed(
                f"The state {self.directory / name} could not be written: {one_line(error)}; make "
                "room there, and go on with --resume."
            ) from error

    def restore(self, model: nn.Module, place: Path, recipe: AnalogRecipe) -> Prefix | None:
        """Make the digital ``model`` what :meth:`save_state` found; its prefix is returned.

        Raises:
            AnalogError: The state does not fit the model.
        """
        from safetensors.torch import load_file

        record = self._record(place)
        tensors = load_file(place / _STATE)
        found = {
            n.removeprefix(_PREFIX): tensors.pop(n) for n in list(tensors) if n.startswith(_PREFIX)
        }
        prefix = become(model, record.scheme, Prefix.from_tensors(found), recipe)
        own = _tensors(model)
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
            raise AnalogError(f"{place} does not fit the model; delete {self.directory}.")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        return prefix

    def latest_checkpoint(self) -> Path | None:
        """The last training checkpoint that is whole; damaged later ones are told of and deleted.

        They go because a checkpoint of the same step takes their place, and none may pass for the
        latest meanwhile.
        """
        for step in reversed(_steps(self.directory)):
            place = self._checkpoint(step)
            fault = _fault(place, (_TRAINER_STATE,))
            if fault is None:
                return place
            print(f"{place} is damaged and left out: {fault}.")
            shutil.rmtree(place, ignore_errors=True)
        return None

    def save_checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Keep what ``write`` puts into a directory ``checkpoint-N`` below the path it is given.

        Raises:
            SavingFailed: A process could not write; the checkpoints before are as they were.
        """
        place = by_first(lambda: self._begin_checkpoint(step))
        failure = None
        try:
            write(place)
        except Exception as error:  # packages report a full disk in as many ways as there are
            failure = one_line(error)
        failures = [failed for failed in gathered(failure) if failed is not None]
        by_first(lambda: self._end_checkpoint(step, place, failures))

    def _begin_checkpoint(self, step: int) -> Path:
        try:
            return self._writing.enter_context(
                atomic_directory(self._checkpoint(step), overwrite=True)
            )
        except OSError as error:
            raise self._failed(step, [one_line(error)]) from error

    def _end_checkpoint(self, step: int, place: Path, failures: list[str]) -> None:
        try:
            with self._writing:
                if failures:
                    raise SavingFailed(failures[0])
                made = place / f"{_CHECKPOINT}{step}"
                for path in made.iterdir():
                    path.rename(place / path.name)
                made.rmdir()
                write_manifest(place)
        except (OSError, SavingFailed) as error:
            raise self._failed(step, failures or [one_line(error)]) from error
        for old in _steps(self.directory)[: -self.limit]:
            shutil.rmtree(self._checkpoint(old), ignore_errors=True)

    def _failed(self, step: int, failures: list[str]) -> SavingFailed:
        before = what_is_kept(self.directory) or "Nothing is kept of the training yet."
        return SavingFailed(
            f"The training checkpoint of step {step} could not be written: {failures[0]}; make "
            f"room, and go on with --resume. {before}"
        )

    def _record(self, place: Path) -> Record:
        try:
            record = Record.model_validate(read_json(place / _RECORD))
            AnalogScheme.from_dict(record.scheme)
        except ValidationError as error:
            raise AnalogError(
                f"{place / _RECORD} cannot be read: {first_fault(error)}; delete {self.directory}."
            ) from None
        return record

    def _check_identity(self, before: Mapping[str, Any]) -> None:
        differs = difference(before, self.identity)
        if differs is not None:
            raise AnotherRun(
                f"{self.directory} is another run: {differs}; resume with what it began with, "
                "or delete it and begin anew."
            )

    def _mend(self) -> None:
        """Clear up after a crash in the middle of a rename or of writing."""
        for left in self.directory.glob(".*.replaced"):
            check_output(self.directory / left.name[1:].removesuffix(".replaced"), overwrite=True)
        for left in self.directory.glob(".*.partial-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _checkpoint(self, step: int) -> Path:
        return self.directory / f"{_CHECKPOINT}{step}"


def what_is_kept(directory: Path) -> str:
    """What a run could go on from, in a sentence; empty where there is nothing."""
    steps = _steps(directory)
    if (directory / TRAINED).is_dir():
        return f"The trained weights are kept in {directory}."
    if steps:
        return f"The training is kept in {directory} up to step {steps[-1]}."
    if (directory / START).is_dir():
        return f"The prepared model is kept in {directory}."
    return ""


def forget_run(directory: Path) -> None:
    """Delete what a run kept, and the directory where nothing else is in it."""
    own = (START, TRAINED, f"{_CHECKPOINT}*", ".*.partial-*", ".*.replaced")
    for path in [path for pattern in own for path in directory.glob(pattern)]:
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        directory.rmdir()


def become(
    model: nn.Module, scheme: Mapping[str, Any], prefix: Prefix | None, recipe: AnalogRecipe
) -> Prefix | None:
    """Make the digital ``model`` analog by a scheme that was completed before, with its prefix.

    Its weights and ranges are still to be set.
    """
    chosen = AnalogScheme.from_dict(dict(scheme))
    convert_to_analog(model, chosen, recipe.ignore, recipe.targets)
    if chosen.out_bound is not None:
        set_out_bound(model, chosen.out_bound)
    for _, layer in analog_layers(model):
        layer.range_initializer.known = True
    return None if prefix is None else install_prefix(model, prefix)


def _steps(directory: Path) -> list[int]:
    """Steps of the checkpoints, by their names: clocks may jump."""
    names = (path.name.removeprefix(_CHECKPOINT) for path in directory.glob(f"{_CHECKPOINT}*"))
    return sorted(int(name) for name in names if name.isdecimal())


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and kept buffers, each once."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return dict(model.named_parameters()) | buffers


def _fault(place: Path, required: Iterable[str]) -> str | None:
    """What is wrong with a directory that was written with a manifest; None: it is whole."""
    try:
        verify_manifest(place, required)
    except AnalogError as error:
        return str(error).split(";")[0].rstrip(".")
    return None
