"""The plugin manager, and what all plugins offer together."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

import pluggy

from analog_plugin.errors import AnalogError, shown
from analog_plugin.plugins import hookspecs
from analog_plugin.plugins.types import (
    Evaluator,
    Exporter,
    LayerType,
    ModifierType,
    NoiseModel,
    Preset,
)

T = TypeVar("T")


class PluginError(AnalogError):
    """A plugin is broken, or two claim one name."""


class UnknownName(PluginError):
    """No plugin offers this name."""


@cache
def get_plugin_manager() -> pluggy.PluginManager:
    """Return the manager of this process: built-ins first, then installed entry points.

    Raises:
        PluginError: An entry point cannot be loaded or registered, or implements a hook that does
            not exist.
    """
    from analog_plugin.plugins import builtin

    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(builtin, name=hookspecs.PROJECT)
    for entry_point in entry_points(group=hookspecs.PROJECT):
        owner = entry_point.dist.name if entry_point.dist is not None else "an unknown distribution"
        if manager.get_plugin(entry_point.name) is not None:
            raise PluginError(
                f"Two plugins are called {entry_point.name!r}; one is {entry_point.value} of "
                f"{owner}: uninstall one of them."
            )
        try:
            plugin = entry_point.load()
        except Exception as error:  # whatever a stranger's module raises
            raise PluginError(
                f"The plugin {entry_point.name!r} ({entry_point.value} of {owner}) does not load: "
                f"{type(error).__name__}: {error}; repair or uninstall {owner}."
            ) from error
        _register(manager, plugin, entry_point.name, f"{entry_point.value} of {owner}")
    check_hooks(manager)
    return manager


def check_hooks(manager: pluggy.PluginManager) -> None:
    """Raise :class:`PluginError` where a plugin implements a hook that does not exist."""
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"A plugin implements an unknown hook: {error}.") from error


def noise_models(manager: pluggy.PluginManager | None = None) -> dict[str, NoiseModel]:
    """Noise models by name."""
    return _collect("analog_noise_models", NoiseModel, lambda r: r.name, "noise model", manager)


def presets(manager: pluggy.PluginManager | None = None) -> dict[str, Preset]:
    """Presets by name."""
    return _collect("analog_presets", Preset, lambda r: r.name, "preset", manager)


def layer_types(manager: pluggy.PluginManager | None = None) -> dict[type, LayerType]:
    """Layer types by module class."""
    return _collect("analog_layers", LayerType, lambda r: r.digital, "layer type", manager)


def exporters(manager: pluggy.PluginManager | None = None) -> dict[str, Exporter]:
    """Exporters by the name of their profile."""
    return _collect("analog_exporters", Exporter, lambda r: r.name, "exporter", manager)


def modifiers(manager: pluggy.PluginManager | None = None) -> dict[str, ModifierType]:
    """Modifier classes by their name in recipes."""
    return _collect("analog_modifiers", ModifierType, lambda r: r.name, "modifier", manager)


def evaluators(manager: pluggy.PluginManager | None = None) -> dict[str, Evaluator]:
    """Evaluators by name."""
    return _collect("analog_evaluators", Evaluator, lambda r: r.name, "evaluator", manager)


def lookup(known: Mapping[str, T], name: str, kind: str) -> T:
    """Return ``known[name]``.

    Raises:
        UnknownName: There is none; the message lists what there is and suggests a close name.
    """
    if name in known:
        return known[name]
    close = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UnknownName(f"There is no {kind} {shown(name)}; {hint}known: {', '.join(sorted(known))}.")


def _register(manager: pluggy.PluginManager, plugin: Any, name: str, source: str) -> None:
    other = manager.get_name(plugin)
    if other is not None:
        raise PluginError(
            f"The plugins {other!r} and {name!r} ({source}) are the same module; name it by one "
            "entry point only."
        )
    try:
        manager.register(plugin, name=name)
    except pluggy.PluginValidationError as error:
        reason = " ".join(str(error).split())
        raise PluginError(
            f"The plugin {name!r} ({source}) does not fit a hook: {reason}."
        ) from error


def _collect(
    hook: str,
    record_type: type[T],
    key: Callable[[T], Any],
    kind: str,
    manager: pluggy.PluginManager | None,
) -> dict[Any, T]:
    manager = manager or get_plugin_manager()
    found: dict[Any, tuple[T, str]] = {}
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        provider = implementation.plugin_name
        for record in _records(implementation, hook):
            if not isinstance(record, record_type):
                raise PluginError(
                    f"The plugin {provider!r} yields {type(record).__name__} from {hook}, but must "
                    f"yield {record_type.__name__}."
                )
            name = key(record)
            if name in found:
                raise PluginError(
                    f"The {kind} {name!r} comes from both {found[name][1]!r} and {provider!r}; "
                    "uninstall one of them."
                )
            found[name] = (record, provider)
    return {name: record for name, (record, _) in found.items()}


def _records(implementation: pluggy.HookImpl, hook: str) -> list[Any]:
    try:
        records: Iterable[Any] = implementation.function()  # type: ignore[assignment]
        return list(records)
    except AnalogError:  # a missing extra, say: already a sentence for the user
        raise
    except Exception as error:  # whatever a stranger's hook raises, or None instead of records
        raise PluginError(
            f"The plugin {implementation.plugin_name!r} fails in {hook}: "
            f"{type(error).__name__}: {error}; the hook must yield records."
        ) from error
