"""Bytes to pixels: header gate, decode, resize, fingerprints, keyed crops."""
