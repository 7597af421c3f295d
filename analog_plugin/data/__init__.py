"""Training tokens: sampled from the model itself, or read from a dataset."""

from analog_plugin.data.corpus import evaluation_tokens
from analog_plugin.data.generate import generate_dataset
from analog_plugin.data.load import load_tokens
from analog_plugin.data.pack import pack_documents

__all__ = ["evaluation_tokens", "generate_dataset", "load_tokens", "pack_documents"]
