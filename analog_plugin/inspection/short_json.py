"""JSON of moderate length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analog_plugin.errors import AnalogError
from analog_plugin.files import read_json

# No configuration or index is so long; one that is would take all memory.
_LONGEST = 64 << 20


def short_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        AnalogError: It cannot be read, or is too long.
    """
    check_short(path)
    return read_json(path)


def check_short(path: Path) -> bool:
    """True for a file that may be read whole.

    Raises:
        AnalogError: It is too long.
    """
    size = path.stat().st_size
    if size > _LONGEST:
        raise AnalogError(f"{path} has {size} bytes, more than any such file; copy it again.")
    return True
