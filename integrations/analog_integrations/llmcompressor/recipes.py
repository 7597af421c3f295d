"""Read llm-compressor recipes, and catch the spellings that it passes over in silence."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from analog_plugin.errors import AnalogError, first_fault, one_line, require
from analog_plugin.files import parse_yaml, read_yaml_text
from analog_plugin.plugins import modifiers
from analog_plugin.recipe import AnalogRecipe

SPELLING = """analog_stage:
  analog_modifiers:
    AnalogModifier: {scheme: AFM}"""


def register_modifiers() -> None:
    """Make all modifiers of the hook ``analog_modifiers`` known to llm-compressor's recipes.

    So are the preset schemes of :mod:`analog_integrations.compressed_tensors`.
    """
    factory = require("llmcompressor.modifiers.factory", "llmcompressor").ModifierFactory
    importlib.import_module("analog_integrations.compressed_tensors").register_presets()
    for record in modifiers().values():
        module, _, name = record.path.partition(":")
        factory.register(record.name, getattr(importlib.import_module(module), name))


def read_recipe(path: str | Path) -> AnalogRecipe:
    """Read the one ``AnalogModifier`` of a recipe file.

    Raises:
        AnalogError: The file is missing or no YAML, is spelled in a way that llm-compressor
            ignores, holds another modifier, or a field is wrong.
    """
    path = Path(path)
    text = _text(path)
    register_modifiers()
    recipe_class = require("llmcompressor.recipe", "llmcompressor").Recipe
    try:
        found = recipe_class.create_instance(text).modifiers
    except AnalogError:
        raise
    except Exception as error:  # pydantic, YAML and llm-compressor's own
        raise AnalogError(_first_sentence(path, error)) from error
    ours = [modifier for modifier in found if hasattr(modifier, "analog_recipe")]
    if not ours:
        raise AnalogError(
            f"The recipe {path} holds no AnalogModifier that llm-compressor can see (it passes "
            f"over other spellings in silence); write:\n{SPELLING}"
        )
    others = [type(m).__name__ for m in found if not hasattr(m, "analog_recipe")]
    if others or len(ours) > 1:
        more = ", ".join(others) or "a second AnalogModifier"
        raise AnalogError(
            f"The recipe {path} holds {more} too; this command runs one AnalogModifier: apply the "
            "others first with llmcompressor.oneshot and give its output as --model."
        )
    return ours[0].analog_recipe()


def _text(path: Path) -> str:
    try:
        text = read_yaml_text(path)
    except FileNotFoundError:
        raise AnalogError(
            f"There is no recipe {path}; give a YAML file such as\n{SPELLING}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise AnalogError(f"The recipe {path} cannot be read ({type(error).__name__}).") from None
    except AnalogError as error:
        raise AnalogError(f"The recipe {error}") from None
    values = parse_yaml(text, f"The recipe {path}")
    if not isinstance(values, Mapping):
        raise AnalogError(f"The recipe {path} is empty or not a mapping; write:\n{SPELLING}")
    for stage in values.values():
        for group in stage.values() if isinstance(stage, Mapping) else ():
            if isinstance(group, Mapping) and group.get("AnalogModifier", {}) is None:
                raise AnalogError(
                    f"The recipe {path} has an AnalogModifier without a body; write "
                    "AnalogModifier: {} for the defaults."
                )
    return text


def _first_sentence(path: Path, error: Exception) -> str:
    """What is wrong, out of a host's exception."""
    if isinstance(error, ValidationError):
        inner = error.errors()[0].get("ctx", {}).get("error")
        if isinstance(inner, AnalogError):
            return f"The recipe {path}: {inner}"
        return f"The recipe {path}: {first_fault(error)}."
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, AnalogError):
            return f"The recipe {path}: {cause}"
    return f"The recipe {path} was refused by llm-compressor: {one_line(error)}"
