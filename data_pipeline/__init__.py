"""Raw image-text rows become committed shards, and committed shards become batches."""
