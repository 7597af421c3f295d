"""Settings that are validated once, and faults in them as one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from analog_plugin.errors import AnalogError, shown


class Settings(BaseModel):
    """A frozen record of settings, without unknown fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False
    )

    @classmethod
    def read(cls, values: Any, where: str) -> Any:
        """Build from a mapping; a fault becomes one sentence.

        Raises:
            AnalogError: A field is unknown or out of range.
        """
        if isinstance(values, cls):
            return values
        if not isinstance(values, Mapping):
            raise AnalogError(
                f"{where} is {shown(values)}, but must be a mapping of fields to values."
            )
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise AnalogError(_sentence(cls, where, error)) from None


def _sentence(cls: type[BaseModel], where: str, error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("extra_forbidden", "invalid_key"):
        return _unknown(where, first["loc"][0], list(cls.model_fields))
    allowed = first["msg"][0].lower() + first["msg"][1:]
    allowed = allowed.replace("input should", "it should")
    return f"{where}: {path} is {shown(first['input'])}, but {allowed}."


def _unknown(where: str, name: object, known: list[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(sorted(known))}."
    return f"{where} has no field {shown(name)}; {hint}"
