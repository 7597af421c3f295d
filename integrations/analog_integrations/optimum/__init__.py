"""Optimum: ``optimum-cli export analog`` and ``AnalogModelForCausalLM``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analog_integrations.optimum.export import main_export
    from analog_integrations.optimum.modeling import AnalogModelForCausalLM

__all__ = ["AnalogModelForCausalLM", "main_export"]


def __getattr__(name: str) -> object:
    # optimum-cli imports this package at every start, so nothing heavy is imported above.
    if name == "AnalogModelForCausalLM":
        from analog_integrations.optimum.modeling import AnalogModelForCausalLM

        return AnalogModelForCausalLM
    if name == "main_export":
        from analog_integrations.optimum.export import main_export

        return main_export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
