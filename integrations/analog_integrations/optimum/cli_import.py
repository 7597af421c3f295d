"""``optimum-cli analog import``: arguments only, of what comes from other tools."""

from __future__ import annotations

import argparse
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from analog_integrations.optimum.arguments import add_overwrite, errors_are_sentences, split

_IMPORT = """\
Turn an analog model that was trained with aihwkit-lightning, such as the published ones, into a
checkpoint of the profile analog-fp. Nothing in its files is executed: tensors are read as tensors,
and the pickled rpu_config by a reader that knows only the classes of a configuration.
"""

_IMPORT_EXAMPLES = """\
examples:
  optimum-cli analog import ibm-aimc/analog-Llama-3.2-1B-Instruct llama-analog
  optimum-cli analog import my-lightning-model imported --adc-bound noisy

The way back is a profile: optimum-cli analog profile imported --profile lightning for-lightning
What has no counterpart is said, or refused in one sentence. aihwkit-lightning is not needed.
"""


class AnalogImportCommand(BaseOptimumCLICommand):
    """Import a published analog model."""

    COMMAND = CommandInfo(name="import", help="Import a model trained with aihwkit-lightning.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.description = _IMPORT
        parser.epilog = _IMPORT_EXAMPLES
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("path", help="directory of the model, or a hub id")
        parser.add_argument("output", type=Path, help="directory of the checkpoint, new or empty")
        parser.add_argument(
            "--adc-bound",
            choices=("clean", "noisy"),
            default="clean",
            help="under noise, the ADC's full scale follows the clean weights, or the noisy ones "
            "as in aihwkit-lightning (default: clean)",
        )
        parser.add_argument(
            "--ignore",
            action="append",
            help="layers that were digital, needed only where no input ranges in the files tell",
        )
        parser.add_argument(
            "--dtype",
            choices=("float32", "bfloat16", "float16"),
            help="type of the weights (default: as they are stored)",
        )
        add_overwrite(parser)

    def run(self) -> None:
        """Run :func:`import_lightning`; a user's error is one sentence and exit status 1."""
        given = self.args
        with errors_are_sentences("nothing was written"):
            from analog_integrations.lightning import import_lightning

            made = import_lightning(
                given.path,
                given.output,
                adc_bound=given.adc_bound,
                ignore=split(given.ignore),
                dtype=given.dtype,
                overwrite=given.overwrite,
            )
        for note in made.notes:
            print(f"note: {note}")
        print(f"{len(made.layers)} analog layers, written to {given.output}.")
