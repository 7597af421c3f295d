"""Ray: shards of training tokens made by many workers."""
