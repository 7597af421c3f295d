"""Making shards: each from its own seed, those that are whole are left, damaged ones made again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from analog_plugin.data.sampling import sample_rows
from analog_plugin.data.shards.records import MadeWith, ShardRequest, made_with
from analog_plugin.data.shards.store import ShardStore
from analog_plugin.errors import AnalogError


class Sampler(Protocol):
    """What draws rows: a model in transformers, an engine, ..."""

    made_with: MadeWith

    def sample(self, rows: int, seed: int) -> Tensor:
        """Token ids [rows, sequence_length]; the same for the same seed."""
        ...


class ModelSampler:
    """Draws rows from a model in transformers, in batches.

    Args:
        model: A digital causal language model.
        request: What is asked for.
    """

    def __init__(self, model: Any, request: ShardRequest) -> None:
        self.model, self.request = model, request
        device = next(model.parameters()).device
        self.made_with = made_with(device, "analog-plugin", "torch", "transformers", "pyarrow")

    def sample(self, rows: int, seed: int) -> Tensor:
        """Token ids [rows, sequence_length]."""
        return sample_rows(self.model, self.request.sampling, rows, seed)


@dataclass
class ShardWork:
    """What :func:`make_shards` did: shards made, and shards that were whole already."""

    made: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)


def make_shards(
    store: ShardStore, sampler: Callable[[], Sampler], shards: Iterable[int] | None = None
) -> ShardWork:
    """Make what is missing or damaged of ``shards``.

    Several processes may do so at once in one directory: a shard that another one is making is
    waited for at the end, and made should that one have died.

    Args:
        store: Where they are.
        sampler: Called at most once, when there is something to make.
        shards: Their numbers; None: all.

    Raises:
        AnalogError: There is no such shard, or one cannot be made or written.
    """
    chosen, work, draws = store.chosen(shards), ShardWork(), None
    busy: list[int] = []
    for wait in (False, True):
        for shard in busy if wait else chosen:
            with store.claimed(shard, wait) as ours:
                if not ours:
                    busy.append(shard)
                    continue
                fault = store.fault(shard)
                if fault is None:
                    work.kept.append(shard)
                    continue
                if not store.is_new(shard):
                    print(f"Shard {shard} is damaged ({fault}); it is made again.")
                draws = draws or sampler()
                rows = draws.sample(store.request.rows_of(shard), store.request.seed_of(shard))
                _write(store, shard, rows, draws.made_with)
                work.made.append(shard)
    return work


def _write(store: ShardStore, shard: int, rows: Tensor, made: MadeWith) -> None:
    try:
        store.write(shard, rows, made)
    except OSError as error:
        raise AnalogError(f"{store.path_of(shard)} cannot be written ({error}).") from None
