"""Whether a run is well: what is not finite, what jumps, what drifts apart, what grows."""
