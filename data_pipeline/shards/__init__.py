"""Committed shards: written, read, cached."""
