"""Reading files: text, JSON objects, and hashes of content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from analog_plugin.errors import AnalogError, one_line, shown

# No configuration, index or manifest is so long; a file that is would take all memory.
_LONGEST = 64 << 20


def read_text(path: Path) -> str:
    """Read a file of text.

    Raises:
        AnalogError: It is too long, or no file: a device or a pipe may have no end.
        OSError, UnicodeDecodeError: It is missing or cannot be read.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise AnalogError(f"{shown(str(path))} is no file; give a file.")
    if size > _LONGEST:
        raise AnalogError(
            f"{shown(str(path))} has {size} bytes, more than any such file; copy it again."
        )
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        AnalogError: It is missing, too long, not JSON, or holds something else.
    """
    try:
        values = json.loads(read_text(path))
    except FileNotFoundError:
        raise AnalogError(f"{path.parent} has no {path.name}; give a model directory.") from None
    except AnalogError:
        raise
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
