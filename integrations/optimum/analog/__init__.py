"""``optimum.analog``: the import path that Optimum's users expect."""

from analog_integrations.optimum import (
    AnalogModelForCausalLM,
    main_ablate,
    main_evaluate,
    main_export,
    main_generate,
    main_inspect,
    main_plan,
    main_profile,
    main_teacher,
    main_test_time,
    main_to_aihwkit,
)

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
