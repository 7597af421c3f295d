"""What this integration offers to the plugin manager."""

from __future__ import annotations

from collections.abc import Iterable

from analog_plugin.plugins import NoiseModel, hookimpl


@hookimpl
def analog_noise_models() -> Iterable[NoiseModel]:
    """Aihwkit's models of measured devices."""
    from analog_integrations.aihwkit import noise

    yield NoiseModel("pcm_like", noise.pcm_like, "phase-change memory, aihwkit's PCMLike (25 µS)")
    yield NoiseModel("hermes", noise.hermes, "phase-change memory of IBM's HERMES chip, aihwkit's")
    yield NoiseModel("reram_wan2022", noise.reram_wan2022, "ReRAM of Wan et al. 2022, aihwkit's")
    yield NoiseModel("reram_cmo", noise.reram_cmo, "CMO/HfOx ReRAM, aihwkit's")
