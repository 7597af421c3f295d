"""``optimum-cli export analog``: arguments only; all work is in ``export.py``."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from analog_integrations.optimum.arguments import (
    add_overwrite,
    add_place,
    add_source,
    errors_are_sentences,
    split,
)

_DESCRIPTION = """\
Train a causal language model to survive analog in-memory computing hardware, and write a
checkpoint that loads with from_pretrained.

The model is converted to simulated analog layers, its input ranges are calibrated, it is distilled
from its own full-precision self, and measured under hardware noise before and after.
"""

_EPILOG = """\
examples:
  optimum-cli export analog --model demo:smollm2-135m-instruct \\
      --recipe examples/recipes/demo.yaml demo-out
  optimum-cli export analog --model meta-llama/Llama-3.2-1B-Instruct \\
      --recipe examples/recipes/afm-llama.yaml --dataset corpus.jsonl llama-analog

a recipe (all fields are in docs/recipes.md):
  analog_stage:
    analog_modifiers:
      AnalogModifier:
        scheme: {preset: AFM_PLUS, digital_share: 0.0}
        training: {max_steps: 80, learning_rate: 5.0e-5}
        evaluation: {noise: [pcm, pcm:1.5], seeds: 10}

The output appears when all is done, whole; it holds a model card with the table of results. Until
then OUTPUT.training keeps what a run needs that is broken off: --resume goes on from there.
An error is one sentence and exit status 1, and nothing is written. Sampled tokens are kept in
$ANALOG_PLUGIN_CACHE, $XDG_CACHE_HOME/analog-plugin or ~/.cache/analog-plugin.
"""


class AnalogExportCommand(BaseOptimumCLICommand):
    """The main job: from a model to a trained analog checkpoint."""

    COMMAND = CommandInfo(
        name="analog", help="Train a model for analog hardware and write a checkpoint."
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare the arguments; defaults come from the recipe."""
        parser.description = _DESCRIPTION
        parser.epilog = _EPILOG
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("output", type=Path, help="directory of the checkpoint, new or empty")
        add_source(parser)
        parser.add_argument(
            "--dataset",
            help="training text instead of the recipe's data: .txt, .jsonl, .parquet, a datasets "
            "directory or a hub id",
        )
        parser.add_argument(
            "--profile",
            action="append",
            help="deploy profile: analog-fp, w8a8, w4-in-w8, ... (default: the recipe's, else "
            "analog-fp); give it several times for several, each a directory below the output",
        )
        parser.add_argument(
            "--seed",
            type=int,
            help="seed of the training's order and noise (default: the recipe's, else 0)",
        )
        add_place(parser, "trained weights")
        parser.add_argument(
            "--no-train",
            action="store_true",
            help="convert, calibrate, measure and write, but do not train",
        )
        parser.add_argument(
            "--task", default="text-generation", choices=("text-generation",), help="the only task"
        )
        add_overwrite(parser)
        parser.add_argument(
            "--resume",
            action="store_true",
            help="go on with a run that was broken off, from OUTPUT.training; where there is none, "
            "begin",
        )

    def run(self) -> None:
        """Run :func:`main_export`; a user's error is one sentence and exit status 1."""
        with errors_are_sentences("nothing was written", self._kept):
            from analog_integrations.optimum.export import main_export

            given = {name: getattr(self.args, name) for name in _ARGUMENTS}
            main_export(output=self.args.output, profile=split(self.args.profile) or None, **given)

    def _kept(self, error: BaseException) -> str:
        """What there is to go on from after ``error``, and the command that does."""
        from analog_plugin.processes import process_rank
        from analog_plugin.training.kept import AnotherRun, training_directory, what_is_kept

        kept = what_is_kept(training_directory(self.args.output))
        if not kept or isinstance(error, AnotherRun) or process_rank() > 0:
            return ""
        words = [word for word in sys.argv[1:] if word != "--resume"]
        return f"{kept} Go on with: {shlex.join(['optimum-cli', *words, '--resume'])}"


_ARGUMENTS = (
    "model",
    "recipe",
    "dataset",
    "seed",
    "device",
    "dtype",
    "no_train",
    "task",
    "overwrite",
    "resume",
)
