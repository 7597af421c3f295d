"""``optimum-cli analog inspect``: arguments only, of what looks at checkpoints."""

from __future__ import annotations

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from analog_integrations.optimum.arguments import errors_are_sentences

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
