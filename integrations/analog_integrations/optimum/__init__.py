"""Optimum: the commands, their Python twins, and ``AnalogModelForCausalLM``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analog_integrations.optimum.ablate import main_ablate
    from analog_integrations.optimum.evaluate import main_evaluate
    from analog_integrations.optimum.export import main_export
    from analog_integrations.optimum.generate import main_generate
    from analog_integrations.optimum.inspect import main_inspect
    from analog_integrations.optimum.modeling import AnalogModelForCausalLM
    from analog_integrations.optimum.plan import main_plan
    from analog_integrations.optimum.profile import main_profile
    from analog_integrations.optimum.scaling import main_test_time
    from analog_integrations.optimum.teacher import main_teacher
    from analog_integrations.optimum.to_aihwkit import main_to_aihwkit

__all__ = [
    "AnalogModelForCausalLM",
    "main_ablate",
    "main_evaluate",
    "main_export",
    "main_generate",
    "main_inspect",
    "main_plan",
    "main_profile",
    "main_teacher",
    "main_test_time",
    "main_to_aihwkit",
]

_MODULES = {
    "AnalogModelForCausalLM": "modeling",
    "main_ablate": "ablate",
    "main_evaluate": "evaluate",
    "main_export": "export",
    "main_generate": "generate",
    "main_plan": "plan",
    "main_profile": "profile",
    "main_inspect": "inspect",
    "main_teacher": "teacher",
    "main_test_time": "scaling",
    "main_to_aihwkit": "to_aihwkit",
}


def __getattr__(name: str) -> object:
    # optimum-cli imports this package at every start, so nothing heavy is imported above.
    if name in _MODULES:
        from analog_plugin.errors import torchvision_explained

        with torchvision_explained():
            return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
