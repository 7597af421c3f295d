"""``optimum-cli analog ablate`` and ``teacher``: arguments only, of what serves training."""

from __future__ import annotations

import argparse
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from analog_integrations.optimum.arguments import (
    add_measurements,
    add_overwrite,
    add_place,
    add_source,
    errors_are_sentences,
    split,
)

_ABLATE = """\
Train a model several times from one start, each time with one ingredient changed: training noise,
clipping, the ADC, learned ranges, distillation, own tokens. All runs are measured alike.
"""

_ABLATE_EXAMPLES = """\
examples:
  optimum-cli analog ablate --model demo:smollm2-135m-instruct \\
      --recipe examples/recipes/demo.yaml --steps 20 --output ablation
  optimum-cli analog ablate --model MODEL --recipe RECIPE --ingredients tokens,distillation \\
      --corpus text.jsonl --output ablation

Every finished run is kept in OUTPUT/runs.jsonl: the same command goes on where it was interrupted.
The page is OUTPUT/report.html; beside it are table.md, table.csv and every figure as PNG.
"""


_TEACHER = """\
Compute once, for all training tokens of a recipe, the most likely tokens of the full-precision
model and their probabilities, so that training need not keep that model in memory.
"""

_TEACHER_EXAMPLES = """\
examples:
  optimum-cli analog teacher --model demo:smollm2-135m-instruct \\
      --recipe examples/recipes/demo.yaml --output teacher
  then, in the recipe:  distillation: {teacher: teacher}

A position takes 8 k + 4 bytes. The loss compares the k tokens and all others as one outcome.
The same model, dtype, tokens, digital prefix and temperature must be trained with; others are
refused. OUTPUT appears when all is done.
"""


class AnalogAblateCommand(BaseOptimumCLICommand):
    """Measure what each ingredient of training is worth."""

    COMMAND = CommandInfo(name="ablate", help="What each ingredient of training is worth.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.description = _ABLATE
        parser.epilog = _ABLATE_EXAMPLES
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        add_source(parser)
        add_measurements(parser, "the runs")
        parser.add_argument(
            "--ingredients",
            action="append",
            help="of noise, clipping, adc, ranges, distillation, tokens (default: all that the "
            "recipe has room for)",
        )
        parser.add_argument(
            "--corpus", help="text to train on instead of own tokens: a file, a hub id"
        )
        parser.add_argument("--steps", type=int, help="steps of a run (default: the recipe's)")
        add_place(parser, "trained weights")

    def run(self) -> None:
        """Run :func:`main_ablate`; a user's error is one sentence and exit status 1."""
        given = self.args
        with errors_are_sentences("finished runs are kept; the same command goes on from there"):
            from analog_integrations.optimum.ablate import main_ablate

            main_ablate(
                given.model,
                given.output,
                given.recipe,
                ingredients=split(given.ingredients) or None,
                corpus=given.corpus,
                steps=given.steps,
                device=given.device,
                dtype=given.dtype,
                overwrite=given.overwrite,
            )


class AnalogTeacherCommand(BaseOptimumCLICommand):
    """Store what training needs of its teacher."""

    COMMAND = CommandInfo(name="teacher", help="Store a teacher's logits for training.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.description = _TEACHER
        parser.epilog = _TEACHER_EXAMPLES
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        add_source(parser)
        parser.add_argument(
            "-o", "--output", type=Path, required=True, help="directory of the result"
        )
        parser.add_argument("--dataset", help="training text instead of the recipe's data")
        parser.add_argument(
            "--top-k",
            type=int,
            help="tokens kept a position (default: the recipe's, else 64)",
        )
        parser.add_argument(
            "--batch-size", type=int, default=8, help="rows computed at once (default: 8)"
        )
        add_place(parser, "weights, as in the training")
        add_overwrite(parser)

    def run(self) -> None:
        """Run :func:`main_teacher`; a user's error is one sentence and exit status 1."""
        given = self.args
        with errors_are_sentences("nothing was written"):
            from analog_integrations.optimum.teacher import main_teacher

            main_teacher(
                given.model,
                given.output,
                given.recipe,
                dataset=given.dataset,
                top_k=given.top_k,
                batch_size=given.batch_size,
                device=given.device,
                dtype=given.dtype,
                overwrite=given.overwrite,
            )
