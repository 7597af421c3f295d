"""``optimum-cli analog profile`` and ``inspect``: arguments only, of what works on checkpoints."""

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

_PROFILE = """\
Derive digital checkpoints from one of the profile analog-fp: integer weights and static 8-bit
inputs for transformers and vLLM, rounded to nearest; or what chips and other tools read. The analog
checkpoint stays as it is and can make every profile.
"""

_PROFILE_EXAMPLES = """\
examples:
  optimum-cli analog profile demo-out --profile w4-in-w8 demo-w4
  optimum-cli analog profile demo-out --profile w8a8 --profile w4a8 --weight-scale mse profiles
  optimum-cli analog profile demo-out --profile mixed --average-bits 3.5 demo-mixed

profiles:
  w8a8                  8-bit weights, static 8-bit inputs         transformers, vLLM
  w4-in-w8              4-bit weights, one byte each               transformers, vLLM
  w4a8                  4-bit weights, packed                      transformers
  w8a8o8                w8a8 with 8-bit outputs                    transformers
  w4a8o8                w4a8 with 8-bit outputs                    transformers, vLLM (bfloat16)
  w3-in-w8, w2-in-w8    fewer bits, one byte each                  transformers, vLLM
  w3a8, w2a8            fewer bits, packed                         transformers
  mixed                 2, 3, 4 or 8 bits by layer, packed         transformers
  mixed-in-w8           the same, one byte a weight                transformers, vLLM
  conductances          µS of every tile, in .npz                  a chip's programming software
  lightning             pytorch_model.bin and rpu_config           aihwkit-lightning

A mixed profile gives most bits to the layers whose rounding costs most.
OUTPUT appears when all is done, whole; of several profiles each is a directory of its name in it.
"""


_INSPECT = """\
Say what a directory holds: its profile, bits, input ranges, sizes, the loaders that take it, and
everything that is wrong with it. Nothing in it is executed and no model is built.
"""

_INSPECT_EXAMPLES = """\
examples:
  optimum-cli analog inspect demo-out
  optimum-cli analog inspect demo-out --json | jq .problems

The exit status is 1 where problems were found. Scales and integer codes are read, and all files
that the manifest lists, to compare their hashes; --no-verify leaves these hashes out.
"""


class AnalogProfileCommand(BaseOptimumCLICommand):
    """Derive digital profiles."""

    COMMAND = CommandInfo(name="profile", help="Derive digital checkpoints from an analog one.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.description = _PROFILE
        parser.epilog = _PROFILE_EXAMPLES
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("directory", help="checkpoint of the profile analog-fp, or a hub id")
        parser.add_argument("output", type=Path, help="directory of the result, new or empty")
        parser.add_argument(
            "--profile",
            action="append",
            required=True,
            help="what to derive; give it several times for several",
        )
        parser.add_argument(
            "--weight-scale",
            choices=("max", "mse"),
            help="each row's largest weight is its largest code, or rows are clipped where their "
            "squared error is least (default: max)",
        )
        parser.add_argument(
            "--average-bits", type=float, help="budget of a mixed profile, in bits a weight"
        )
        parser.add_argument(
            "--max-bytes",
            type=int,
            help="budget of the profile mixed: bytes of the quantized layers' codes and scales",
        )
        parser.add_argument(
            "--g-max",
            type=float,
            help="of the profile conductances: µS of each column's largest weight (default: 25)",
        )
        parser.add_argument(
            "--dataset",
            help="text to find scales and bits on (default: sampled from the model, where needed)",
        )
        add_corpus(parser, blocks=4, none="; 0: measure nothing")
        add_device(parser)
        parser.add_argument(
            "--dtype",
            choices=("float32", "bfloat16", "float16"),
            help="type of the weights before they are rounded, and of all that stays in full "
            "precision, such as embeddings (default: the checkpoint's)",
        )
        add_overwrite(parser)

    def run(self) -> None:
        """Run :func:`main_profile`; a user's error is one sentence and exit status 1."""
        given = self.args
        with errors_are_sentences("nothing was written"):
            from analog_integrations.optimum.profile import main_profile

            main_profile(
                given.directory,
                given.output,
                profile=split(given.profile),
                weight_scale=given.weight_scale,
                average_bits=given.average_bits,
                max_bytes=given.max_bytes,
                g_max=given.g_max,
                dataset=given.dataset,
                corpus=given.corpus,
                blocks=given.blocks,
                length=given.length,
                device=given.device,
                dtype=given.dtype,
                overwrite=given.overwrite,
            )


class AnalogInspectCommand(BaseOptimumCLICommand):
    """Say what a directory holds and what is wrong with it."""

    COMMAND = CommandInfo(name="inspect", help="What a checkpoint holds and who can load it.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.description = _INSPECT
        parser.epilog = _INSPECT_EXAMPLES
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("directory", help="model directory")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.add_argument(
            "--no-verify", action="store_true", help="do not compare the files' hashes"
        )

    def run(self) -> None:
        """Run :func:`main_inspect`; problems are exit status 1, a user's error is one sentence."""
        given = self.args
        with errors_are_sentences("nothing was changed"):
            from analog_integrations.optimum.inspect import main_inspect

            found = main_inspect(given.directory, as_json=given.json, verify=not given.no_verify)
        if found.problems:
            raise SystemExit(1)
