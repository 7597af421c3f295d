"""Shards made by Ray Data's workers, each with a model of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from analog_plugin.data.shards.store import ShardStore
from analog_plugin.data.shards.work import Sampler, ShardWork, make_shards
from analog_plugin.errors import AnalogError, one_line, require


class _Worker:
    """One process: it loads the model with its first shard that is to be made."""

    def __init__(self, directory: Path, sampler: Callable[[], Sampler]) -> None:
        self._store, self._load = ShardStore(directory), sampler
        self._sampler: Sampler | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        made, errors = [], []
        for shard in map(int, batch["shard"]):
            # Ray hands on an exception's traceback, not its sentence.
            try:
                work, error = make_shards(self._store, self._sampler_once, [shard]), ""
            except AnalogError as raised:
                work, error = ShardWork(), str(raised)
            made.append(shard in work.made)
            errors.append(error)
        return {"shard": batch["shard"], "made": made, "error": errors}

    def _sampler_once(self) -> Sampler:
        if self._sampler is None:
            self._sampler = self._load()
        return self._sampler


def make_shards_with_ray(
    store: ShardStore,
    sampler: Callable[[], Sampler],
    shards: Sequence[int] | None = None,
    *,
    workers: int = 1,
    gpus: float = 0,
) -> ShardWork:
    """As :func:`~analog_plugin.data.shards.make_shards`, in ``workers`` processes.

    The directory must be the same for all of them. A Ray cluster is joined where
    ``RAY_ADDRESS`` names one; otherwise the workers run here.

    Args:
        store, sampler, shards: See there; ``sampler`` is called in each worker.
        workers: How many.
        gpus: GPUs that each takes.

    Raises:
        MissingExtra: Ray is not installed.
        AnalogError: A shard cannot be made.
    """
    ray, data = require("ray", "ray"), require("ray.data", "ray")
    chosen = store.chosen(shards)
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    parts = data.from_items([{"shard": shard} for shard in chosen], override_num_blocks=len(chosen))
    try:
        done = parts.map_batches(
            _Worker,
            fn_constructor_args=(store.directory.resolve(), sampler),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=workers),
            num_gpus=gpus or None,
        ).take_all()
    except ray.exceptions.RayError as error:
        raise AnalogError(f"A worker of Ray failed: {one_line(error)}") from error
    work = ShardWork()
    for row in sorted(done, key=lambda row: row["shard"]):
        if row["error"]:
            raise AnalogError(str(row["error"]))
        (work.made if row["made"] else work.kept).append(int(row["shard"]))
    return work
