"""Tensors of safetensors files: what their headers say, and single ones on demand."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from analog_plugin.errors import AnalogError, one_line, shown

#: Bits of the types whose names do not end in a number of them.
_BITS = {"BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}

#: Rows of a tensor that are read at once hold about so many elements.
_BLOCK = 1 << 24


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Args:
        name: Of the tensor.
        dtype: In safetensors' spelling: ``F32``, ``I8``, ...
        shape: Its sizes.
        path: The file that holds it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path

    @property
    def elements(self) -> int:
        """Their number."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        digits = "".join(c for c in self.dtype if c.isdigit())
        bits = _BITS.get(self.dtype) or int(digits or 8)
        return math.ceil(self.elements * bits / 8)

    def read(self) -> Tensor:
        """The values.

        Raises:
            AnalogError: They cannot be read.
        """
        with _opened(self.path) as handle:
            return handle.get_tensor(self.name)

    def blocks(self) -> Iterator[Tensor]:
        """The values of a matrix, some rows at a time.

        Raises:
            AnalogError: They cannot be read.
        """
        step = max(1, _BLOCK // max(1, self.shape[1]))
        with _opened(self.path) as handle:
            rows = handle.get_slice(self.name)
            for start in range(0, self.shape[0], step):
                yield rows[start : start + step]


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name; only its header is read.

    Raises:
        AnalogError: It is missing or no whole safetensors file.
    """
    with _opened(path) as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        return {
            name: StoredTensor(name, part.get_dtype(), tuple(part.get_shape()), path)
            for name, part in slices.items()
        }


def indexed_faults(
    weight_map: Mapping[Any, Any], found: Iterable[StoredTensor], index: Path
) -> list[str]:
    """Sentences on an index of shards that does not describe them."""
    there = {tensor.name: tensor.path.name for tensor in found}
    lost = [n for n, file in weight_map.items() if there.get(n) != Path(str(file)).name]
    extra = [name for name in there if name not in weight_map]
    faults = []
    if lost:
        faults.append(
            f"{index} says that {shown(weight_map[lost[0]])} holds {shown(lost[0])}"
            f"{and_more(lost)}, which it does not; copy the shards again."
        )
    if extra:
        faults.append(
            f"{index} does not list {shown(extra[0])}{and_more(extra)}, which "
            f"{there[extra[0]]} holds: loaders will not see it; copy the index again."
        )
    return faults


def and_more(names: list[Any]) -> str:
    """How many there are beside the first."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; what is wrong with it becomes an :class:`AnalogError`."""
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file():
            raise AnalogError(f"{path.parent} lacks {path.name}; copy it again.")
        with safe_open(path, framework="pt") as handle:
            yield handle
    except AnalogError:
        raise
    # Values of types that this torch does not have fail in torch.
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise AnalogError(f"{path} cannot be read: {one_line(error)}; copy it again.") from None
