"""compressed-tensors: schemes of analog hardware by name. Importing this registers them."""

from analog_integrations.compressed_tensors.presets import PRESETS, register_presets

__all__ = ["PRESETS", "register_presets"]

register_presets()
