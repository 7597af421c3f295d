"""Reading files: JSON objects, and hashes of content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from analog_plugin.errors import AnalogError, one_line

# No configuration, index or manifest is so long; a file that is would take all memory.
_LONGEST_JSON = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        AnalogError: It is missing, too long, not JSON, or holds something else.
    """
    try:
        size = path.stat().st_size
        if size > _LONGEST_JSON:
            raise AnalogError(f"{path} has {size} bytes, more than any such file; copy it again.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AnalogError(f"{path.parent} has no {path.name}; give a model directory.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AnalogError(f"{path} cannot be read as JSON: {one_line(error)}.") from None
    if not isinstance(values, dict):
        raise AnalogError(f"{path} cannot be read: it does not hold a JSON object.")
    return values


def sha256_of(path: Path) -> str:
    """Hash of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
