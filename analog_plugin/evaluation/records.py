"""A file of JSON lines that grows record by record and survives every interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analog_plugin.errors import AnalogError, one_line


@dataclass
class RecordFile:
    """Records of finished work; the first line holds the settings that they have in common.

    Args:
        path: The file; made with the first record, its directory at once.
        settings: Plain values. A file with others is refused.
        check: Called with each record that is read; raises KeyError, TypeError or ValueError where
            it is none.
        overwrite: Remove the file first.

    Raises:
        AnalogError: The file holds records of other settings or damaged ones, or it cannot be read
            and written.
    """

    path: Path
    settings: Mapping[str, Any]
    check: Callable[[dict[str, Any]], Any]
    overwrite: bool = False
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.overwrite:
                self.path.unlink(missing_ok=True)
            whole = self.path.read_bytes() if self.path.exists() else b""
            # What was being written when a run was killed is no line yet.
            kept = whole[: whole.rfind(b"\n") + 1]
            self._read(kept)
            if len(kept) < len(whole):
                os.truncate(self.path, len(kept))
        except OSError as error:
            raise AnalogError(f"{self.path} cannot be read and written ({error}).") from None

    def _read(self, kept: bytes) -> None:
        lines = kept.decode("utf-8", errors="replace").split("\n")[:-1]
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if number == 1:
                    self._compare(record["settings"])
                    continue
                self.check(record)
            except AnalogError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                way = "remove the line, or " if number > 1 else ""
                raise AnalogError(
                    f"Line {number} of {self.path} cannot be used: {one_line(error)}; {way}give "
                    "another output directory, or --overwrite (overwrite=True) to begin anew."
                ) from None
            self.records.append(record)

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record: it is on disk when this returns."""
        new = not self.path.exists() or self.path.stat().st_size == 0
        lines = [{"settings": self.settings}, record] if new else [record]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)

    def _compare(self, found: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(self.settings))
        if not isinstance(found, dict):
            raise TypeError("there are no settings")
        if found != wanted:
            keys = {**found, **wanted}
            changed = sorted(key for key in keys if found.get(key) != wanted.get(key))
            raise AnalogError(
                f"{self.path} was made with other settings ({', '.join(changed)}); give another "
                "output directory, or --overwrite (overwrite=True) to begin anew."
            )
