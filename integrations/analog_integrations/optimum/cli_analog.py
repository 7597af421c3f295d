"""``optimum-cli analog ...``: arguments only; the work of each command is in a file of its name."""

from __future__ import annotations

import argparse
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from analog_integrations.optimum.arguments import (
    add_corpus,
    add_measurements,
    add_place,
    errors_are_sentences,
    split,
)
from analog_integrations.optimum.cli_aihwkit import AnalogToAihwkitCommand
from analog_integrations.optimum.cli_checkpoint import AnalogInspectCommand, AnalogProfileCommand
from analog_integrations.optimum.cli_generate import AnalogGenerateCommand
from analog_integrations.optimum.cli_import import AnalogImportCommand
from analog_integrations.optimum.cli_plan import AnalogPlanCommand
from analog_integrations.optimum.cli_training import AnalogAblateCommand, AnalogTeacherCommand

_EVALUATE = """\
Measure models under hardware noise: perplexity, and KL and top-1 agreement with the full-precision
original. Analog checkpoints run with their converters, full-precision models with the noise alone,
quantized ones without noise.
"""

_EVALUATE_EXAMPLES = """\
examples:
  optimum-cli analog evaluate demo-out --original demo:smollm2-135m-instruct --output report
  optimum-cli analog evaluate demo:smollm2-135m-instruct demo-out \\
      --noise pcm --noise gaussian:0.01,0.02,0.03 --noise hermes --time 1s,1h,1d,1y --output report

Every finished measurement is kept in OUTPUT/cells.jsonl: the same command goes on where it was
interrupted, and with more noise models, seeds or models it runs only what is missing. All in one
page is OUTPUT/report.html; beside it are table.md, table.csv and every figure as PNG.
"""


_TEST_TIME = """\
Draw many answers to each problem from models under hardware noise, and measure the accuracy of
votes over them against their number: each noise seed is one chip.
"""

_TEST_TIME_EXAMPLES = """\
examples:
  optimum-cli analog test-time demo:smollm2-135m-instruct demo-out --samples 16 --output scaling
  optimum-cli analog test-time demo-out --problems my-problems.jsonl --limit 100 --output scaling

Every finished problem is kept in OUTPUT/samples.jsonl: the same command goes on where it was
interrupted. The page is OUTPUT/test-time.html; beside it are test-time.md and test-time.csv.
"""


_KEPT = "what was measured is kept; the same command goes on from there"


class AnalogEvaluateCommand(BaseOptimumCLICommand):
    """Measure models under hardware noise."""

    COMMAND = CommandInfo(name="evaluate", help="Measure models under hardware noise.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.description = _EVALUATE
        parser.epilog = _EVALUATE_EXAMPLES
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        _add_common(parser, seeds=10, batch_size=4)
        parser.add_argument(
            "--original",
            help="full-precision original, for KL and top-1 (default: the first such model)",
        )
        add_corpus(parser, blocks=16)
        parser.add_argument(
            "--tasks",
            action="append",
            help="tasks or groups of lm-eval, scored too: offline (needs no download), paper, "
            "hellaswag,arc_easy",
        )
        parser.add_argument("--include-path", type=Path, help="directory of further tasks")
        parser.add_argument("--limit", type=int, help="questions of each task (default: all)")
        parser.add_argument(
            "--sensitivity",
            action="store_true",
            help="measure each layer of the analog checkpoints alone, too",
        )

    def run(self) -> None:
        """Run :func:`main_evaluate`; a user's error is one sentence and exit status 1."""
        given = self.args
        with errors_are_sentences(_KEPT):
            from analog_integrations.optimum.evaluate import main_evaluate

            main_evaluate(
                given.models,
                given.output,
                noise=_noises(given.noise),
                time=split(given.time),
                seeds=given.seeds,
                original=given.original,
                corpus=given.corpus,
                blocks=given.blocks,
                length=given.length,
                batch_size=given.batch_size,
                tasks=split(given.tasks),
                include_path=given.include_path,
                limit=given.limit,
                sensitivity=given.sensitivity,
                device=given.device,
                dtype=given.dtype,
                overwrite=given.overwrite,
            )


class AnalogTestTimeCommand(BaseOptimumCLICommand):
    """Measure accuracy against the number of samples."""

    COMMAND = CommandInfo(name="test-time", help="Accuracy against samples a problem, under noise.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.description = _TEST_TIME
        parser.epilog = _TEST_TIME_EXAMPLES
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        _add_common(parser, seeds=3, batch_size=16)
        parser.add_argument(
            "--problems",
            default="arithmetic",
            help="arithmetic (no download), gsm8k, math500, or a JSON-lines file with prompt and "
            "answer (default: arithmetic)",
        )
        parser.add_argument(
            "--samples", type=int, default=16, help="answers to each problem (default: 16)"
        )
        parser.add_argument(
            "--temperature", type=float, default=0.7, help="of the sampling (default: 0.7)"
        )
        parser.add_argument("--max-new-tokens", type=int, help="of an answer")
        parser.add_argument("--limit", type=int, help="problems (default: all)")
        parser.add_argument("--reward", help="reward model, for the best of n and weighted votes")

    def run(self) -> None:
        """Run :func:`main_test_time`; a user's error is one sentence and exit status 1."""
        given = self.args
        with errors_are_sentences(_KEPT):
            from analog_integrations.optimum.scaling import main_test_time

            main_test_time(
                given.models,
                given.output,
                problems=given.problems,
                noise=_noises(given.noise),
                time=split(given.time),
                seeds=given.seeds,
                samples=given.samples,
                temperature=given.temperature,
                max_new_tokens=given.max_new_tokens,
                limit=given.limit,
                reward=given.reward,
                batch_size=given.batch_size,
                device=given.device,
                dtype=given.dtype,
                overwrite=given.overwrite,
            )


def _add_common(parser: argparse.ArgumentParser, *, seeds: int, batch_size: int) -> None:
    """Arguments of every command that measures models under noise."""
    parser.add_argument("models", nargs="+", metavar="model", help="directory, hub id or demo:NAME")
    add_measurements(parser, "what was measured")
    parser.add_argument(
        "--noise",
        action="append",
        help="noise model, also with levels, gaussian:0.01,0.02, or faults, pcm+stuck:0.001; give "
        "it several times for several (default: pcm)",
    )
    parser.add_argument(
        "--time",
        action="append",
        help="times since programming at which drifting models are read: 1s,1h,1d,1y",
    )
    parser.add_argument("--seeds", type=int, default=seeds, help=f"noise seeds (default: {seeds})")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=batch_size,
        help=f"blocks, questions or samples at once (default: {batch_size})",
    )
    add_place(parser, "weights")


def _noises(given: list[str] | None) -> list[str]:
    from analog_plugin.noise.specification import split_list

    return [item for text in given or ["pcm"] for item in split_list(text)]


class AnalogCommand(BaseOptimumCLICommand):
    """The group of commands for analog models."""

    COMMAND = CommandInfo(name="analog", help="Measure models for analog hardware.")
    SUBCOMMANDS = (
        CommandInfo(
            name="evaluate",
            help="Measure models under hardware noise.",
            subcommand_class=AnalogEvaluateCommand,
        ),
        CommandInfo(
            name="test-time",
            help="Accuracy against samples a problem, under noise.",
            subcommand_class=AnalogTestTimeCommand,
        ),
        CommandInfo(
            name="ablate",
            help="What each ingredient of training is worth.",
            subcommand_class=AnalogAblateCommand,
        ),
        CommandInfo(
            name="profile",
            help="Derive digital checkpoints from an analog one.",
            subcommand_class=AnalogProfileCommand,
        ),
        CommandInfo(
            name="generate",
            help="Sample training tokens into shards.",
            subcommand_class=AnalogGenerateCommand,
        ),
        CommandInfo(
            name="import",
            help="Import a model trained with aihwkit-lightning.",
            subcommand_class=AnalogImportCommand,
        ),
        CommandInfo(
            name="plan",
            help="Estimate memory, time and cost on many GPUs.",
            subcommand_class=AnalogPlanCommand,
        ),
        CommandInfo(
            name="teacher",
            help="Store a teacher's logits for training.",
            subcommand_class=AnalogTeacherCommand,
        ),
        CommandInfo(
            name="inspect",
            help="What a checkpoint holds and who can load it.",
            subcommand_class=AnalogInspectCommand,
        ),
        CommandInfo(
            name="to-aihwkit",
            help="Run an analog checkpoint on aihwkit's tiles, as time passes.",
            subcommand_class=AnalogToAihwkitCommand,
        ),
    )
