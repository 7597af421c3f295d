"""llm-compressor: the ``AnalogModifier`` of recipes. Importing it registers the name."""

from analog_integrations.llmcompressor.recipes import read_recipe, register_modifiers

__all__ = ["AnalogModifier", "read_recipe", "register_modifiers"]


def __getattr__(name: str) -> object:
    if name == "AnalogModifier":
        from analog_integrations.llmcompressor.modifier import AnalogModifier

        register_modifiers()
        return AnalogModifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
