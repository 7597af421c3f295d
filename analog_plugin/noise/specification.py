"""How recipes and commands name a noise model: ``"pcm"``, ``"gaussian:0.02"``, a mapping."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from analog_plugin.errors import AnalogError


def resolve_noise(noise: str | Mapping[str, Any] | Any | None) -> Any | None:
    """Return the noise model that ``noise`` names; None (or ``"none"``) means no noise.

    Args:
        noise: A name; a name and its first argument (``"pcm:1.5"``); a mapping of ``name`` and
            arguments; or an object with ``program(weight, generator)``.

    Raises:
        AnalogError: The name is unknown, or an argument does not fit.

    Example:
        >>> resolve_noise("gaussian:0.02").sigma
        0.02
    """
    from analog_plugin.plugins import lookup, noise_models

    if noise is None or noise == "none":
        return None
    if hasattr(noise, "program") and not isinstance(noise, type):
        return noise
    arguments: dict[str, Any] = {}
    if isinstance(noise, str):
        name, colon, value = noise.partition(":")
    elif isinstance(noise, Mapping) and isinstance(noise.get("name"), str):
        arguments = {key: value for key, value in noise.items() if key != "name"}
        name, colon, value = noise["name"], "", ""
    else:
        raise AnalogError(
            f"noise is {noise!r}, but must be a name, name:level or a mapping with a name; write "
            "noise: pcm or noise: {name: gaussian, sigma: 0.02}."
        )
    factory = lookup(noise_models(), name, "noise model").factory
    parameters = list(inspect.signature(factory).parameters)
    if colon:
        try:
            arguments[parameters[0]] = float(value)
        except (ValueError, IndexError):
            raise AnalogError(
                f"noise {noise!r} has the level {value!r}, which is not a number; write {name}:1.5."
            ) from None
    for key in arguments:
        if key not in parameters:
            raise AnalogError(
                f"noise model {name!r} has no argument {key!r}; it takes {', '.join(parameters)}."
            )
    return factory(**arguments)


def noise_label(noise: str | Mapping[str, Any] | Any | None) -> str:
    """A short name of ``noise`` for tables and files."""
    if noise is None:
        return "none"
    if isinstance(noise, str):
        return noise
    if isinstance(noise, Mapping):
        rest = ",".join(f"{k}={v}" for k, v in noise.items() if k != "name")
        return f"{noise.get('name')}({rest})" if rest else str(noise.get("name"))
    return type(noise).__name__
