"""``optimum-cli analog ...``: arguments only; the work of each command is in a file of its name."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

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


class AnalogEvaluateCommand(BaseOptimumCLICommand):
    """Measure models under hardware noise."""

    COMMAND = CommandInfo(name="evaluate", help="Measure models under hardware noise.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.description = _EVALUATE
        parser.epilog = _EVALUATE_EXAMPLES
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument(
            "models", nargs="+", metavar="model", help="directory, hub id or demo:NAME"
        )
        parser.add_argument(
            "-o", "--output", type=Path, required=True, help="directory of the measurements"
        )
        parser.add_argument(
            "--noise",
            action="append",
            help="noise model, also with levels: gaussian:0.01,0.02; give it several times for "
            "several (default: pcm)",
        )
        parser.add_argument(
            "--time",
            action="append",
            help="times since programming at which drifting models are read: 1s,1h,1d,1y",
        )
        parser.add_argument("--seeds", type=int, default=10, help="noise seeds (default: 10)")
        parser.add_argument(
            "--original",
            help="full-precision original, for KL and top-1 (default: the first such model)",
        )
        parser.add_argument(
            "--corpus",
            default="pydoc_data.topics",
            help="text to measure on: a file, a datasets directory, a hub id (default: Python's "
            "own reference text)",
        )
        parser.add_argument("--blocks", type=int, default=16, help="blocks of it (default: 16)")
        parser.add_argument("--length", type=int, default=256, help="their tokens (default: 256)")
        parser.add_argument(
            "--tasks",
            action="append",
            help="tasks or groups of lm-eval, scored too: offline (needs no download), paper, "
            "hellaswag,arc_easy",
        )
        parser.add_argument("--include-path", type=Path, help="directory of further tasks")
        parser.add_argument("--limit", type=int, help="questions of each task (default: all)")
        parser.add_argument(
            "--batch-size", type=int, default=4, help="blocks or questions at once (default: 4)"
        )
        parser.add_argument(
            "--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)"
        )
        parser.add_argument(
            "--dtype",
            default="float32",
            choices=("float32", "bfloat16", "float16"),
            help="type of the weights (default: float32)",
        )
        parser.add_argument(
            "--overwrite", action="store_true", help="forget what was measured in OUTPUT"
        )

    def run(self) -> None:
        """Run :func:`main_evaluate`; a user's error is one sentence and exit status 1."""
        from analog_plugin.errors import AnalogError

        given = self.args
        try:
            from analog_integrations.optimum.evaluate import main_evaluate

            main_evaluate(
                given.models,
                given.output,
                noise=[item for text in given.noise or ["pcm"] for item in _levels(text)],
                time=_split(given.time),
                seeds=given.seeds,
                original=given.original,
                corpus=given.corpus,
                blocks=given.blocks,
                length=given.length,
                batch_size=given.batch_size,
                tasks=_split(given.tasks),
                include_path=given.include_path,
                limit=given.limit,
                device=given.device,
                dtype=given.dtype,
                overwrite=given.overwrite,
            )
        except AnalogError as error:
            raise SystemExit(f"error: {error}") from None
        except KeyboardInterrupt:
            raise SystemExit(
                "interrupted: what was measured is kept; the same command goes on from there"
            ) from None


def _split(given: list[str] | None) -> list[str]:
    """Every item of lists with commas."""
    return [item.strip() for text in given or [] for item in text.split(",") if item.strip()]


def _levels(noise: str) -> list[str]:
    """``gaussian:0.01,0.02`` as two noise models, ``pcm,hermes@1d`` as two as well."""
    found: list[str] = []
    name = ""
    for part in noise.split(","):
        if re.fullmatch(r"[\d.eE+-]+(@.*)?", part) and name:
            found.append(f"{name}:{part}")
        else:
            name = part.partition("@")[0].partition(":")[0]
            found.append(part)
    return found


class AnalogCommand(BaseOptimumCLICommand):
    """The group of commands for analog models."""

    COMMAND = CommandInfo(name="analog", help="Measure and inspect models for analog hardware.")
    SUBCOMMANDS = (
        CommandInfo(
            name="evaluate",
            help="Measure models under hardware noise.",
            subcommand_class=AnalogEvaluateCommand,
        ),
    )
