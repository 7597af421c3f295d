"""``optimum-cli analog to-aihwkit``: arguments only; all work is in ``to_aihwkit.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from analog_integrations.optimum.arguments import (
    add_corpus,
    add_device,
    add_overwrite,
    errors_are_sentences,
    split,
)

_DESCRIPTION = """\
Put an analog checkpoint on the tiles of IBM's aihwkit, program it there chip by chip, and measure
it as time passes: perplexity, and KL and top-1 agreement with full precision.
"""

_EXAMPLES = """\
examples:
  optimum-cli analog to-aihwkit demo-out
  optimum-cli analog to-aihwkit demo-out drift --noise pcm_like --time 1h,1d,1y --seeds 10

The table is printed, and with OUTPUT written there as table.md and table.csv. In a program of your
own, analog_integrations.aihwkit.to_aihwkit(DIRECTORY) gives the same model.
"""


class AnalogToAihwkitCommand(BaseOptimumCLICommand):
    """Run an analog checkpoint on aihwkit's tiles."""

    COMMAND = CommandInfo(
        name="to-aihwkit", help="Run an analog checkpoint on aihwkit's tiles, as time passes."
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.description = _DESCRIPTION
        parser.epilog = _EXAMPLES
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("directory", help="checkpoint of the profile analog-fp, or a hub id")
        parser.add_argument(
            "output", type=Path, nargs="?", help="directory of the tables, new or empty"
        )
        parser.add_argument(
            "--noise",
            default="hermes",
            help="how it is programmed: hermes, pcm_like, pcm, reram_wan2022 or reram_cmo, also "
            "with a level, hermes:1.5 (default: hermes)",
        )
        parser.add_argument(
            "--time",
            action="append",
            help="times since programming at which it is read (default: 0s,1h,1d,1y)",
        )
        parser.add_argument("--seeds", type=int, default=5, help="chips (default: 5)")
        parser.add_argument(
            "--no-drift-compensation",
            action="store_true",
            help="leave out aihwkit's global drift compensation",
        )
        parser.add_argument(
            "--tiles", default="torch", choices=("torch", "c++"), help="(default: torch)"
        )
        parser.add_argument(
            "--original",
            help="full-precision model that KL and top-1 are to (default: the checkpoint's own "
            "weights in full precision)",
        )
        add_corpus(parser, blocks=4)
        parser.add_argument("--batch-size", type=int, default=4, help="blocks at once (default: 4)")
        add_device(parser)
        add_overwrite(parser)

    def run(self) -> None:
        """Run :func:`main_to_aihwkit`; a user's error is one sentence and exit status 1."""
        given = self.args
        with errors_are_sentences("nothing was written"):
            from analog_integrations.optimum.to_aihwkit import main_to_aihwkit

            times = {} if given.time is None else {"time": split(given.time)}
            main_to_aihwkit(
                given.directory,
                given.output,
                noise=given.noise,
                seeds=given.seeds,
                drift_compensation=not given.no_drift_compensation,
                tiles=given.tiles,
                original=given.original,
                corpus=given.corpus,
                blocks=given.blocks,
                length=given.length,
                batch_size=given.batch_size,
                device=given.device,
                overwrite=given.overwrite,
                **times,
            )
