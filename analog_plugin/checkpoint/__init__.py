"""Checkpoints: plain compressed-tensors directories that also hold the analog model."""

from analog_plugin.checkpoint.inspect import inspect_checkpoint
from analog_plugin.checkpoint.load import load_checkpoint
from analog_plugin.checkpoint.plain import plain_view
from analog_plugin.checkpoint.save import save_checkpoint

__all__ = ["inspect_checkpoint", "load_checkpoint", "plain_view", "save_checkpoint"]
