"""lm-eval's tasks as metrics of a sweep: any by name, the paper's set, and a set without a hub."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from analog_integrations.lm_eval.offline import write_offline_tasks
from analog_plugin.errors import AnalogError, one_line, require
from analog_plugin.plugins import Evaluator

#: Tasks and worked examples of 'Analog Foundation Models' (arXiv 2505.09663) that lm-eval has.
PAPER = {
    "mmlu": 5,
    "gsm8k_cot": 8,
    "boolq": 0,
    "hellaswag": 5,
    "medqa_4options": 2,
    "agieval_en": 0,
    "arc_challenge": 10,
    "arc_easy": 10,
    "anli_r1": 7,
    "anli_r2": 7,
    "anli_r3": 7,
    "ifeval": 0,
}


def task_evaluators(
    tasks: Sequence[str],
    tokenizer: Any,
    *,
    directory: str | Path,
    include_path: str | Path | None = None,
    limit: int | None = None,
) -> list[Evaluator]:
    """One evaluator a task of lm-eval, for :func:`~analog_plugin.evaluation.sweep.sweep`.

    Args:
        tasks: Names of tasks or groups; ``"offline"`` and ``"paper"`` are sets of them.
        tokenizer: The models'.
        directory: Where the tasks of ``"offline"`` are written.
        include_path: A directory with further tasks, as lm-eval's ``--include_path``.
        limit: Questions of each task, and of each member of a group; None: all.

    Raises:
        AnalogError: There is no such task.
        MissingExtra: lm-eval is not installed.
    """
    require("lm_eval", "eval")
    from lm_eval.tasks import TaskManager

    shots: dict[str, int | None] = {}
    paths = [str(include_path)] if include_path is not None else []
    for name in tasks:
        if name == "offline":
            shots |= dict.fromkeys(write_offline_tasks(directory))
            paths.append(str(directory))
        elif name == "paper":
            shots |= PAPER
        else:
            shots.setdefault(name, None)
    with _quiet():
        manager = TaskManager(include_path=paths or None)
    for name in shots:
        if name not in manager.all_tasks:
            raise AnalogError(
                f"lm-eval has no task {name!r}; write offline, paper, or a name that "
                "`lm_eval ls tasks` lists, and give --include-path for tasks of your own."
            )
    return [
        _evaluator(name, count, tokenizer, manager, limit, _hash(include_path))
        for name, count in shots.items()
    ]


def _evaluator(
    task: str,
    shots: int | None,
    tokenizer: Any,
    manager: Any,
    limit: int | None,
    source: str | None,
) -> Evaluator:
    def evaluate(model: Any, tokens: Any, reference: Any, size: int) -> Mapping[str, float]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _quiet():
            try:
                results = simple_evaluate(
                    HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size),
                    tasks=[task],
                    num_fewshot=shots,
                    task_manager=manager,
                    limit=limit,
                    bootstrap_iters=0,
                    log_samples=False,
                )
            # Data sets that cannot be had fail in as many ways as there are hubs and formats.
            except Exception as error:
                raise AnalogError(f"The task {task} does not run: {one_line(error)}") from error
        return scores(results, task)

    # Cells of another of these are not used again.
    asked = {"shots": shots, "limit": limit, "include_path": source}
    parts = [task, *(f"{key}={value}" for key, value in asked.items() if value is not None)]
    return Evaluator(f"lm_eval({', '.join(parts)})", evaluate, "scores of a task of lm-eval")


def scores(results: Mapping[str, Any], task: str) -> dict[str, float]:
    """The scores of ``task``, by ``"task metric"``; a filter's name stands behind its metric.

    A tag has no score of its own: all that it stands for are given.

    Raises:
        AnalogError: There is none.
    """
    own = results["results"].get(task)
    found = {}
    for name, values in ({task: own} if own else results["results"]).items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            found[f"{name} {metric}" + ("" if chosen == "none" else f" ({chosen})")] = float(value)
    if not found:
        raise AnalogError(f"lm-eval gives no score for {task!r}; name the tasks that it holds.")
    return found


def _hash(directory: str | Path | None) -> str | None:
    """Changes with the files below ``directory``."""
    if directory is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(Path(directory).rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(directory)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within this context lm-eval and datasets say no more than what goes wrong."""
    from datasets.utils import logging as datasets_logging

    logger = logging.getLogger("lm_eval")
    level, shown = logger.level, datasets_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            datasets_logging.enable_progress_bar()
