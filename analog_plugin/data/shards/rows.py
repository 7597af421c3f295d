"""Rows of a shard directory as a dataset: any row at any time, without reading all."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from analog_plugin.data.shards.records import INDEX, ShardIndex
from analog_plugin.data.shards.store import ShardStore
from analog_plugin.errors import AnalogError

#: Groups of rows kept decoded, some megabytes; and files kept open, which systems limit.
_KEPT, _OPEN = 64, 64


class ShardRows(Dataset):
    """Token ids [rows, length], read from their shards when they are asked for.

    A row is ``rows[i]`` [length], consecutive ones ``rows[i:j]`` [j - i, length]. Every page that
    is read is compared with its checksum. Copies in other processes open the files anew.

    Args:
        directory: Of shards, all made; merged ones have splits.
        split: ``"train"`` or ``"validation"``; without :func:`merge_shards` all is ``"train"``.
        rows: Only so many first ones; None: all.

    Raises:
        AnalogError: A shard is missing or of another size, there is no such split, or it has fewer
            rows.

    Attributes:
        request: What the shards were made for.
        shape: Rows and their length.
        sha256: Hash of them, from those in the shards' manifests.
    """

    def __init__(
        self, directory: str | Path, split: str = "train", rows: int | None = None
    ) -> None:
        store = ShardStore(directory)
        self.directory, self.request = Path(directory), store.request
        names = {store.request.name_of(shard): shard for shard in range(store.request.shards)}
        shards = [names[name] for name in _split(store, split)]
        self.largest_token = 0
        digest = hashlib.sha256()
        for shard in shards:
            try:
                manifest = store.whole(shard, verify=False)
            except AnalogError as error:
                raise AnalogError(
                    f"{directory} cannot be read: shard {shard}: {error}; make it with optimum-cli "
                    f"analog generate --shard {shard}."
                ) from None
            self.largest_token = max(self.largest_token, manifest.largest_token)
            digest.update(manifest.tokens_sha256.encode())
        self._shards = [store.rows(shard) for shard in shards]
        self._starts = [0]
        for shard in shards:
            self._starts.append(self._starts[-1] + store.request.rows_of(shard))
        there = self._starts[-1]
        if rows is not None and rows > there:
            raise AnalogError(
                f"{directory} has {there} rows for {split}, but {rows} were asked for."
            )
        self.shape = (there if rows is None else rows, store.request.sequence_length)
        self.sha256 = hashlib.sha256(f"{self.shape}{digest.hexdigest()}".encode()).hexdigest()
        self._groups: dict[int, list[int]] = {}
        self._kept: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._open: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return self.shape[0]

    def numel(self) -> int:
        """Tokens in all."""
        return self.shape[0] * self.shape[1]

    def dim(self) -> int:
        """2, as of the tensor that they would be."""
        return 2

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, slice):
            found = [self._row(i) for i in range(*index.indices(len(self)))]
            return torch.stack(found) if found else torch.empty(0, self.shape[1], dtype=torch.long)
        at = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= at < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._row(at)

    def _row(self, index: int) -> Tensor:
        shard = bisect_right(self._starts, index) - 1
        if shard not in self._groups:
            self._opens(shard)
            ends = [0]
            for count in self._shards[shard].groups():
                ends.append(ends[-1] + count)
            self._groups[shard] = ends
        ends, within = self._groups[shard], index - self._starts[shard]
        group = bisect_right(ends, within) - 1
        return self._group(shard, group)[within - ends[group]].long()

    def _group(self, shard: int, group: int) -> Tensor:
        key = (shard, group)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        self._opens(shard)
        self._kept[key] = found = self._shards[shard].group(group)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found

    def _opens(self, shard: int) -> None:
        """Close the file that was not used for longest, where ``shard`` is one too many."""
        self._open[shard] = None
        self._open.move_to_end(shard)
        if len(self._open) > _OPEN:
            oldest, _ = self._open.popitem(last=False)
            self._shards[oldest].close()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_kept": OrderedDict(), "_open": OrderedDict()}


#: Token ids [rows, length]: in memory, or read from their shards when they are asked for.
TokenRows = Tensor | ShardRows


def is_shards(source: Any) -> bool:
    """Whether a data source is a directory of shards."""
    from analog_plugin.data.shards.records import REQUEST

    return isinstance(source, (str, Path)) and (Path(source) / REQUEST).is_file()


def _split(store: ShardStore, split: str) -> list[str]:
    path = store.directory / INDEX
    if not path.exists():
        splits = {"train": [store.request.name_of(shard) for shard in range(store.request.shards)]}
    else:
        index = ShardIndex.load(path)
        if others := store.request.differences(index.request):
            raise AnalogError(
                f"{path} is of another request ({'; '.join(others)}); merge the shards anew."
            )
        splits = {str(name): names for name, names in index.splits.items()}
    if split not in splits:
        raise AnalogError(
            f"{store.directory} has no split {split!r}; merge the shards with --validation."
        )
    return splits[split]
