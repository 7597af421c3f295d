"""Rows of token ids in a parquet file: written whole, read a group of rows at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analog_plugin.errors import AnalogError, one_line

COLUMN = "input_ids"
#: Of a group of rows, the least that is decoded for one row.
_TOKENS_OF_A_GROUP = 1 << 16


def write_rows(path: Path, rows: Tensor) -> None:
    """Write token ids [rows, length] as lists of 32-bit integers; the same ids, the same bytes."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, length = rows.shape
    values = rows.to(torch.int32).contiguous().view(-1).numpy()
    offsets = np.arange(0, count * length + 1, length, dtype=np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    pq.write_table(
        pa.table({COLUMN: column}),
        path,
        row_group_size=max(_TOKENS_OF_A_GROUP // length, 1),
        compression="zstd",
        use_dictionary=False,
        write_page_checksum=True,
    )


class ParquetRows:
    """Token ids of a file, opened at the first use.

    Args:
        path: The file.
        rows, length: What it must hold.
        vocabulary: Ids are smaller.
    """

    def __init__(self, path: Path, rows: int, length: int, vocabulary: int) -> None:
        self.path, self.rows, self.length, self.vocabulary = path, rows, length, vocabulary
        self._file: Any = None

    def groups(self) -> list[int]:
        """Rows of each group.

        Raises:
            AnalogError: The file cannot be read or holds something else.
        """
        metadata = self._open().metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    def group(self, number: int) -> Tensor:
        """Ids [rows of the group, length], 32 bits each.

        Raises:
            AnalogError: The file cannot be read or holds something else.
        """
        opened = self._open()
        try:
            table = opened.read_row_group(number, columns=[COLUMN], use_threads=False)
            column = table.column(COLUMN).combine_chunks()
            lengths, values = column.value_lengths(), column.flatten()
            rows = opened.metadata.row_group(number).num_rows
        # For a damaged file pyarrow raises errors of its own, of Python's, or of broken text.
        except Exception as error:
            raise self._fault(one_line(error)) from None
        even = lengths.null_count == values.null_count == 0 and bool(
            (lengths.to_numpy() == self.length).all()
        )
        if not even or len(lengths) != rows:
            raise self._fault(f"not all of {rows} rows have {self.length} tokens")
        ids = torch.from_numpy(values.to_numpy().copy())
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            raise self._fault(f"a token is not among the model's {self.vocabulary}")
        return ids.view(-1, self.length)

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._file is not None:
            return self._file
        try:
            # Not mapped into memory: a file that shrinks would end the process.
            opened = pq.ParquetFile(self.path, page_checksum_verification=True)
            kind = opened.schema_arrow.field(COLUMN).type
            rows = opened.metadata.num_rows
        except Exception as error:  # as in group()
            raise self._fault(one_line(error)) from None
        if kind != pa.list_(pa.int32()) and kind != pa.list_(pa.field("element", pa.int32())):
            raise self._fault(f"{COLUMN} is {kind}, not list<int32>")
        if rows != self.rows:
            raise self._fault(f"it has {rows} rows, not {self.rows}")
        self._file = opened
        return opened

    def _fault(self, why: str) -> AnalogError:
        return AnalogError(
            f"The shard {self.path} cannot be read: {why.rstrip('.')}; make it again with "
            "optimum-cli analog generate."
        )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_file": None}
