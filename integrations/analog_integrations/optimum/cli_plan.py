"""``optimum-cli analog plan``: arguments only; all work is in ``plan.py``."""

from __future__ import annotations

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from analog_integrations.optimum.arguments import errors_are_sentences, split

_PLAN = """\
Estimate what sampling tokens and hardware-aware training will take on many GPUs: memory of each,
time and messages of a step, hours, cost. Nothing is loaded or run.
"""

_PLAN_EXAMPLES = """\
examples:
  optimum-cli analog plan 8b --gpus 8,64,256 --gpu h100 --price 2.50
  optimum-cli analog plan path/to/model --gpus 8 --sharding ddp --rows 4 --tokens 500M

The formulas and what they assume are in docs/scaling.md. A step takes the longer of computing and
sending.
"""

_JOB = ("epochs", "length", "rows", "accumulation", "sharding")


class AnalogPlanCommand(BaseOptimumCLICommand):
    """Estimate memory, time and cost on many GPUs."""

    COMMAND = CommandInfo(name="plan", help="Estimate memory, time and cost on many GPUs.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.description = _PLAN
        parser.epilog = _PLAN_EXAMPLES
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument(
            "model", help="1b, 4b, 8b or 70b (Llama, Phi-3), or a directory with a config.json"
        )
        parser.add_argument("--gpu", default="h100", help="v100, a100, h100, h200 (default: h100)")
        parser.add_argument(
            "--gpus", action="append", help="numbers of GPUs (default: 8,64,256,1024)"
        )
        parser.add_argument(
            "--tokens", default="20B", help="sampled, and trained on in an epoch (default: 20B)"
        )
        parser.add_argument("--epochs", type=float, default=2, help="default: 2")
        parser.add_argument("--length", type=int, default=4096, help="of a row (default: 4096)")
        parser.add_argument("--rows", type=int, default=1, help="a GPU at a time (default: 1)")
        parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
        parser.add_argument("--sharding", default="fsdp", help="ddp or fsdp (default: fsdp)")
        parser.add_argument(
            "--no-checkpointing", action="store_true", help="keep activations for the backward"
        )
        parser.add_argument(
            "--redraw-noise", action="store_true", help="keep_noise: false of the recipe"
        )
        parser.add_argument(
            "--stored-teacher", action="store_true", help="no full-precision model beside"
        )
        parser.add_argument(
            "--efficiency", type=float, help="share of the operations reached (default: 0.35)"
        )
        parser.add_argument(
            "--analog", type=float, help="time of a step in plain distillation's (default: 1.18)"
        )
        parser.add_argument("--price", type=float, help="of a GPU and hour, for the cost")
        parser.add_argument("--json", action="store_true", help="all figures, for machines")

    def run(self) -> None:
        """Run :func:`main_plan`; a user's error is one sentence and exit status 1."""
        given = self.args
        with errors_are_sentences("nothing was written"):
            from analog_integrations.optimum.plan import main_plan
            from analog_plugin.errors import AnalogError
            from analog_plugin.planning import Assumptions

            guessed = {
                name: getattr(given, name)
                for name in ("efficiency", "analog")
                if getattr(given, name) is not None
            }
            numbers = split(given.gpus) or ["8", "64", "256", "1024"]
            if not all(number.isascii() and number.isdigit() for number in numbers):
                raise AnalogError(f"gpus is {','.join(numbers)}, but must be numbers such as 8,64.")
            main_plan(
                given.model,
                gpu=given.gpu,
                gpus=[int(number) for number in numbers],
                tokens=given.tokens,
                price=given.price,
                assumptions=Assumptions(**guessed),
                as_json=given.json,
                checkpointing=not given.no_checkpointing,
                keep_noise=not given.redraw_noise,
                teacher=not given.stored_teacher,
                **{name: getattr(given, name) for name in _JOB},
            )
