"""From committed shards to batches: order, mixes, tokens, workers."""
