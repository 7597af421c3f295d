"""What a model directory holds, and what is wrong with it, without building the model."""

from analog_plugin.inspection.reader import inspect_checkpoint
from analog_plugin.inspection.records import Inspection

__all__ = ["Inspection", "inspect_checkpoint"]
