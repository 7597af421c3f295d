"""Training tokens in shards: made by many processes, checked, merged, and read row by row."""

from analog_plugin.data.shards.merge import merge_shards
from analog_plugin.data.shards.records import ShardManifest, ShardRequest
from analog_plugin.data.shards.rows import ShardRows
from analog_plugin.data.shards.store import ShardStore
from analog_plugin.data.shards.work import ModelSampler, Sampler, make_shards

__all__ = [
    "ModelSampler",
    "Sampler",
    "ShardManifest",
    "ShardRequest",
    "ShardRows",
    "ShardStore",
    "make_shards",
    "merge_shards",
]
