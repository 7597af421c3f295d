"""A directory of shards: which are finished, and writing one so that no crash leaves half of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from analog_plugin.data.shards.parquet import ParquetRows, write_rows
from analog_plugin.data.shards.records import REQUEST, MadeWith, ShardManifest, ShardRequest
from analog_plugin.errors import AnalogError, one_line
from analog_plugin.files import sha256_of
from analog_plugin.paths import atomic_file, drop_partial

_LOCK = ".lock"


class ShardStore:
    """The shards of one request in one directory, which many processes may fill at once.

    Args:
        directory: Where they are.

    Raises:
        AnalogError: No shards were begun there, or the request cannot be read.

    Attributes:
        request: What all its shards are part of.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        path = self.directory / REQUEST
        if not path.is_file():
            raise AnalogError(
                f"{directory} holds no shards (there is no {REQUEST}); make them with optimum-cli "
                "analog generate."
            )
        self.request = ShardRequest.load(path)
        self._lock: Any = None

    @classmethod
    def begin(cls, directory: str | Path, request: ShardRequest) -> ShardStore:
        """The shards of ``request``: begun here, or gone on with.

        Raises:
            AnalogError: The directory holds something else or shards of another request, or cannot
                be written.
        """
        path = Path(directory)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not (path / REQUEST).exists():
                if found := sorted(p.name for p in path.iterdir() if not p.name.startswith(".")):
                    raise AnalogError(
                        f"{directory} holds {found[0]} but no {REQUEST}; give a new directory, or "
                        "one of shards."
                    )
                with atomic_file(path / REQUEST, keep=True) as partial:
                    partial.write_text(request.json_text(), encoding="utf-8")
        except OSError as error:
            raise AnalogError(
                f"The output {directory} cannot be written: {one_line(error)}; give another."
            ) from None
        store = cls(path)
        if others := request.differences(store.request):
            raise AnalogError(
                f"{directory} holds shards of another request ({'; '.join(others)}); ask for the "
                "same, or give another directory."
            )
        return store

    def chosen(self, shards: Iterable[int] | None) -> list[int]:
        """Numbers of shards, each once; None: of all.

        Raises:
            AnalogError: There is no such shard.
        """
        count = self.request.shards
        found = list(range(count)) if shards is None else list(dict.fromkeys(shards))
        for shard in found:
            if not 0 <= shard < count:
                raise AnalogError(
                    f"shard is {shard}, but the {count} shards are numbered from 0 to {count - 1}."
                )
        return found

    def path_of(self, shard: int) -> Path:
        """The parquet file of a shard."""
        return self.directory / self.request.name_of(shard)

    def manifest_of(self, shard: int) -> Path:
        """Where a shard's manifest is."""
        return self.path_of(shard).with_suffix(".json")

    def read_manifest(self, shard: int) -> ShardManifest:
        """What a finished shard holds.

        Raises:
            AnalogError: It has no manifest, or one that is not its own.
        """
        manifest = ShardManifest.load(self.manifest_of(shard))
        if others := self.request.differences(manifest.request):
            raise AnalogError(f"it is of another request ({'; '.join(others)})")
        rows = self.request.rows_of(shard)
        tokens = rows * self.request.sequence_length
        found = (manifest.shard, manifest.seed, manifest.rows, manifest.tokens)
        if found != (shard, self.request.seed_of(shard), rows, tokens):
            raise AnalogError("its manifest is of another shard")
        return manifest

    def whole(self, shard: int, verify: bool = True) -> ShardManifest:
        """The manifest of a shard that is whole.

        Args:
            shard: Its number.
            verify: Whether to compare the hash of its file, too; otherwise only its size.

        Raises:
            AnalogError: It is not whole; what is said neither begins nor ends a sentence.
        """
        path = self.path_of(shard)
        if not self.manifest_of(shard).exists():
            there = path.exists()
            raise AnalogError("it was not finished" if there else "it is not there")
        try:
            manifest = self.read_manifest(shard)
            size = path.stat().st_size
            if size != manifest.bytes:
                raise AnalogError(f"{path.name} has {size} bytes, not {manifest.bytes}")
            if verify and sha256_of(path) != manifest.sha256:
                raise AnalogError(f"{path.name} is not the file that was written")
        except FileNotFoundError:
            raise AnalogError(f"{path.name} is missing") from None
        except (AnalogError, OSError) as error:
            raise AnalogError(str(error).rstrip(".")) from None
        return manifest

    def fault(self, shard: int) -> str | None:
        """Why a shard is not whole, or None."""
        try:
            self.whole(shard)
        except AnalogError as error:
            return str(error)
        return None

    def is_new(self, shard: int) -> bool:
        """Whether nothing is there of it, rather than something damaged."""
        return not self.manifest_of(shard).exists()

    def rows(self, shard: int) -> ParquetRows:
        """Its rows, to be read."""
        asked = self.request
        return ParquetRows(
            self.path_of(shard), asked.rows_of(shard), asked.sequence_length, asked.vocabulary
        )

    def write(self, shard: int, rows: Tensor, made: MadeWith) -> ShardManifest:
        """Put a shard's rows [rows, sequence_length] there, then its manifest."""
        asked, path = self.request, self.path_of(shard)
        assert tuple(rows.shape) == (asked.rows_of(shard), asked.sequence_length)
        self.manifest_of(shard).unlink(missing_ok=True)
        with atomic_file(path) as partial:
            write_rows(partial, rows)
            digest, size = sha256_of(partial), partial.stat().st_size
        manifest = ShardManifest(
            request=asked,
            shard=shard,
            seed=asked.seed_of(shard),
            made_with=made,
            rows=rows.shape[0],
            tokens=rows.numel(),
            largest_token=int(rows.max()),
            bytes=size,
            sha256=digest,
            tokens_sha256=tokens_digest(rows),
        )
        with atomic_file(self.manifest_of(shard)) as partial:
            partial.write_text(manifest.json_text(), encoding="utf-8")
        return manifest

    @contextlib.contextmanager
    def claimed(self, shard: int, wait: bool) -> Iterator[bool]:
        """Whether this process alone has the shard now; another one's end lets it go, however.

        On systems and file systems without locks every process has every shard: work may be done
        twice, and what is written is whole all the same.
        """
        try:
            import fcntl
        except ImportError:
            yield True
            return
        # Of one file, a byte a shard; opened once, for closing it lets go of all.
        if self._lock is None:
            try:
                self._lock = (self.directory / _LOCK).open("ab")
            except OSError as error:
                raise AnalogError(f"{self.directory} cannot be written ({error}).") from None
        flags = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.lockf(self._lock, flags, 1, shard, os.SEEK_SET)
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError:
            yield True
            return
        try:
            drop_partial(self.path_of(shard))
            drop_partial(self.manifest_of(shard))
            yield True
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, shard, os.SEEK_SET)


def tokens_digest(rows: Tensor) -> str:
    """Hash of ids as little-endian 32-bit integers, row after row."""
    import torch

    ids = rows.to(torch.int32).contiguous().numpy().astype("<i4")
    return hashlib.sha256(ids.tobytes()).hexdigest()
