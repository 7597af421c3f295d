"""The main job: from a digital model to a trained analog one and the table that judges it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from analog_plugin import processes
from analog_plugin.recipe import AnalogRecipe
from analog_plugin.training.kept import KeptRun
from analog_plugin.training.lock import run_lock
from analog_plugin.training.record import run_identity
from analog_plugin.training.signals import Termination
from analog_plugin.training.stages import AnalogResult, Stages


def train_analog(
    model: nn.Module,
    recipe: AnalogRecipe | Mapping[str, Any],
    *,
    tokenizer: Any = None,
    dataset: Any = None,
    train: bool = True,
    keep: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> AnalogResult:
    """Convert ``model`` in place, calibrate its ranges, train it and measure it.

    Args:
        model: A digital causal language model; it becomes the analog one.
        recipe: The settings, or their mapping.
        tokenizer: Needed to read text and for the default evaluation corpus.
        dataset: Training tokens instead of ``recipe.data.source``: whatever
            :func:`~analog_plugin.data.load_tokens` reads, or token ids [rows, length].
        train: False: calibrate and measure only.
        keep: Directory for what a resumed run needs: the prepared model, training checkpoints
            (``training: {save_steps: ..., save_total_limit: ...}``) and the trained weights. It
            stays when the training is done; delete it when they are written elsewhere. None, or
            ``training: {save_strategy: "no"}``: nothing is kept.
        resume: Go on with the run in ``keep``; where there is none, begin.
        overwrite: Forget a run in ``keep`` that is not resumed.

    Several processes, started by ``accelerate launch``, train together; the first one does all
    else, and has the reports.

    Raises:
        AnalogError: A setting does not fit the model or the data, or another run uses ``keep``;
            the model is digital as before.
        TrainingStopped: SIGTERM came; what was done is kept in ``keep``.
    """
    recipe = AnalogRecipe.parse(recipe)
    processes.join(next(model.parameters()).device.type, _timeout(recipe))
    train = train and recipe.training is not None
    strategy = (recipe.training or {}).get("save_strategy", "steps")
    termination, kept = Termination(), None
    with contextlib.ExitStack() as stack:
        if keep is not None and train and strategy != "no":
            stack.enter_context(run_lock(keep))
            identity = run_identity(model, recipe, dataset, processes.process_count())
            limit = (recipe.training or {}).get("save_total_limit") or 2
            kept = KeptRun(Path(keep), identity, limit, resume=resume, overwrite=overwrite)
            stack.enter_context(termination.handled())
        return Stages(model, recipe, tokenizer, dataset, train, kept, termination).run()


def _timeout(recipe: AnalogRecipe) -> float:
    return (recipe.training or {}).get("ddp_timeout", processes.DEFAULT_TIMEOUT)
