"""What this integration offers to the plugin manager."""

from __future__ import annotations

from collections.abc import Iterable

from analog_plugin.plugins import ModifierType, hookimpl


@hookimpl
def analog_modifiers() -> Iterable[ModifierType]:
    """The modifier of llm-compressor recipes."""
    yield ModifierType(
        "AnalogModifier", "analog_integrations.llmcompressor.modifier:AnalogModifier"
    )
