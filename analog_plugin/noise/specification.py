"""How noise models are named: ``"pcm"``, ``"gaussian:0.02"``, ``"hermes+stuck@1d"``, a mapping."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from analog_plugin.errors import AnalogError, shown
from analog_plugin.noise.chain import NoiseChain
from analog_plugin.noise.programming import parse_time


def resolve_noise(noise: str | Mapping[str, Any] | Any | None) -> Any | None:
    """Return the noise model that ``noise`` names; None (or ``"none"``) means no noise.

    Args:
        noise: A name, with its first argument behind a colon (``"pcm:1.5"``), the time since
            programming behind an @ (``"hermes@1d"``) and faults behind a + (``"pcm+stuck:0.01"``);
            a mapping of ``name``, arguments and, as a list, ``faults``; or an object with
            ``program(weight, generator)``.

    Raises:
        AnalogError: A name is unknown, an argument does not fit, or a model cannot follow another.

    Example:
        >>> resolve_noise("gaussian:0.02").sigma
        0.02
    """
    if noise is None or (isinstance(noise, str) and noise == "none"):
        return None
    if hasattr(noise, "program") and not isinstance(noise, type):
        return noise
    if isinstance(noise, str):
        parts, time = _parts(noise)
        times: list[dict[str, Any]] = [{} if time is None else {"time": time}]
        times += [{}] * (len(parts) - 1)  # faults know none
        made = [_model(*part, given, noise) for part, given in zip(parts, times, strict=True)]
        return made[0] if len(made) == 1 else NoiseChain(made, [name for name, _ in parts])
    if isinstance(noise, Mapping) and isinstance(noise.get("name"), str):
        arguments = {key: value for key, value in noise.items() if key not in ("name", "faults")}
        model, faults = _model(noise["name"], None, arguments, noise), noise.get("faults", [])
        if not (isinstance(faults, (list, tuple)) and all(map(_is_one_model, faults))):
            raise AnalogError(
                f"faults is {shown(faults)}, but must be a list of single noise models that follow "
                f"{noise['name']}; write faults: [stuck:0.001, ir_drop]."
            )
        if not faults:
            return model
        names = [noise["name"], *map(noise_label, faults)]
        return NoiseChain([model, *map(resolve_noise, faults)], names)
    raise AnalogError(
        f"noise is {shown(noise)}, but must be a name, name:level or a mapping with a name; write "
        "noise: pcm or noise: {name: gaussian, sigma: 0.02}."
    )


def _is_one_model(fault: Any) -> bool:
    if isinstance(fault, str):
        return fault != "none" and len(_parts(fault)[0]) == 1
    return isinstance(fault, Mapping) and "faults" not in fault


def _model(name: str, level: str | None, arguments: Mapping[str, Any], said: Any) -> Any:
    """The noise model ``name`` with these arguments, its first one from the text ``level``."""
    from analog_plugin.plugins import lookup, noise_models

    factory = lookup(noise_models(), name, "noise model").factory
    parameters = list(inspect.signature(factory).parameters)
    arguments = dict(arguments)
    if level is not None:
        try:
            arguments[parameters[0]] = float(level)
        except (ValueError, IndexError):
            raise AnalogError(
                f"noise {shown(said)} has the level {shown(level)}, which is not a number; write "
                f"{name}:1.5."
            ) from None
    for key in arguments:
        if key not in parameters:
            raise AnalogError(
                f"noise model {name!r} has no argument {shown(key)}; it takes "
                f"{', '.join(parameters)}."
            )
    return factory(**arguments)


def split_list(text: str) -> list[str]:
    """The noise models of a list with commas; a number alone is another level of the one before.

    Example:
        >>> split_list("gaussian:0.01,0.02,hermes@1h+stuck:0.1,0.2")
        ['gaussian:0.01', 'gaussian:0.02', 'hermes@1h+stuck:0.1', 'hermes+stuck:0.2@1h']
    """
    found: list[str] = []
    for part in text.split(","):
        if found and re.fullmatch(r"[\d.eE+-]+(@.*)?", part):
            level, at, later = part.partition("@")
            parts, time = _parts(found[-1])
            parts[-1] = (parts[-1][0], level)
            time = later if at else time
            found.append(_joined(parts) + ("" if time is None else f"@{time}"))
        else:
            found.append(part)
    return found


def at_times(
    noise: Sequence[str | Mapping[str, Any] | None], times: Sequence[str | float]
) -> list[str | Mapping[str, Any] | None]:
    """Each noise model read at each time since programming; as it is where it knows no time.

    Args:
        noise: As in :func:`resolve_noise`, but by name.
        times: Such as ``"1h"`` or seconds; none: ``noise`` itself.

    Raises:
        AnalogError: A noise model is unknown or has a time already, or a time is none.

    Example:
        >>> at_times(["hermes", "pcm"], ["1h", "1d"])
        ['hermes@1h', 'hermes@1d', 'pcm']
    """
    for time in times:
        parse_time(time)
    found: list[str | Mapping[str, Any] | None] = []
    for item in noise:
        model: Any = resolve_noise(item)
        if not times or not hasattr(model, "time"):
            found.append(item)
        elif model.time is not None:
            raise AnalogError(
                f"noise {noise_label(item)!r} has a time, and times were given beside it; leave "
                "one of them out."
            )
        elif isinstance(item, Mapping):
            found += [{**item, "time": time} for time in times]
        else:
            found += [f"{item}@{time}" for time in times]
    return found


class NoiseName(NamedTuple):
    """The parts of a label such as ``"hermes:1.5@1h"`` or ``"pcm+stuck:0.01"``.

    Args:
        name: All but what follows.
        level: What stands behind the last model's colon, else its first argument's default; None
            where that is no number.
        time: Seconds since programming; None: as programmed.
    """

    name: str
    level: float | None
    time: float | None


def split_label(label: str) -> NoiseName:
    """Read a label of :func:`noise_label` for plots.

    Example:
        >>> split_label("gaussian:0.02")
        NoiseName(name='gaussian', level=0.02, time=None)
    """
    from analog_plugin.plugins import noise_models

    if "(" in label:  # of a mapping
        return NoiseName(label, None, None)
    try:
        parts, time = _parts(label)
    except AnalogError:  # a stranger's model may be named in another way
        return NoiseName(label, None, None)
    *before, (last, said) = parts
    known = noise_models().get(last)
    if said is None and known is not None:
        first = next(iter(inspect.signature(known.factory).parameters.values()), None)
        said = None if first is None else first.default
    try:
        level = float(said)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        level = None
    name = _joined([*before, (last, None)])
    try:
        return NoiseName(name, level, parse_time(time))
    except AnalogError:  # and tell times so
        return NoiseName(name, level, None)


def _joined(parts: Sequence[tuple[str, str | None]]) -> str:
    return "+".join(name if level is None else f"{name}:{level}" for name, level in parts)


def _parts(text: str) -> tuple[list[tuple[str, str | None]], str | None]:
    """Name and level of each model of ``"name:level+name:level@time"``, and the time.

    None stands for what is not there.

    Raises:
        AnalogError: There are two times.
    """
    parts: list[tuple[str, str | None]] = []
    times: list[str] = []
    for part in re.split(r"\+(?=[^\W\d])", text):  # the + of 1e+3 stands before a digit
        rest, at, time = part.partition("@")
        name, colon, level = rest.partition(":")
        parts.append((name, level if colon else None))
        times += [time] if at else []
    if len(times) > 1:
        raise AnalogError(
            f"noise {shown(text)} has {len(times)} times; write one: hermes+stuck@1d."
        )
    return parts, times[0] if times else None


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
