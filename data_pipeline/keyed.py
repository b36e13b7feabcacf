"""Random numbers and permutations that are pure functions of their keys.

Nothing here holds a state: a crop, a shuffle or a mask is computed from (seed, epoch, sample id, ...), so it
is the same at any world size, with any number of workers and after any resume.

The mixer is the output function of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", OOPSLA 2014). The permutation is an unbalanced Feistel network with cycle walking (Black,
Rogaway: "Ciphers with arbitrary finite domains", CT-RSA 2002). Neither is cryptographic.
"""

from __future__ import annotations

import numpy as np

MASK_64 = (1 << 64) - 1
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FEISTEL_ROUNDS = 8  # even, so that the unequal halves end where they began
MIN_BITS = 6  # over smaller domains the network is visibly not uniform (chi-square over all orders of n = 4)
U64 = np.uint64


def _as_u64(value: np.ndarray | np.integer | int) -> np.ndarray:
    """Two's complement view of integers as uint64: negative values and seeds beyond 64 bits are fine."""
    if isinstance(value, int):
        return np.asarray(value & MASK_64, dtype=U64)
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"keys must be integers, not {array.dtype}")
    return array.astype(U64, copy=False)


def _finalise(z: np.ndarray) -> np.ndarray:
    z = z + GOLDEN
    z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
    return z ^ (z >> U64(31))


def mix(*parts: np.ndarray | np.integer | int) -> np.ndarray:
    """Hash integers to 64 bits, in order: mix(a, b) differs from mix(b, a).

    Each part is an int or an integer array; they are broadcast against each other. Returns uint64 of the
    broadcast shape (0-d for ints alone). Raises TypeError for keys that are not integers.
    """
    state = np.zeros((), dtype=U64)
    with np.errstate(over="ignore"):  # wrapping around 2^64 is the arithmetic meant here
        for part in parts:
            state = _finalise(state ^ _as_u64(part))
    return np.asarray(state)


def uniform(
    seed: int, epoch: np.ndarray | int, ids: np.ndarray | int, stream: np.ndarray | int
) -> np.ndarray:
    """Uniform float64 in [0, 1) with 53 random bits, one for each broadcast (seed, epoch, id, stream).

    `stream` numbers the independent draws that one sample needs in one epoch.
    """
    return (mix(seed, epoch, ids, stream) >> U64(11)).astype(np.float64) * 2.0**-53


def permute(x: np.ndarray, n: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """Image of x under the permutation of [0, n) that `key` picks.

    All three are broadcast, so each x can have its own n and key. x integer array with 0 <= x < n, n >= 1 (at
    most 2^62). Returns int64. Raises ValueError when x lies outside.
    """
    x_in, n_in, key_in = np.broadcast_arrays(np.asarray(x), np.asarray(n), _as_u64(key))
    if np.any(n_in < 1) or np.any(x_in < 0) or np.any(x_in >= n_in):
        raise ValueError("permute: x must lie in [0, n)")
    size = n_in.astype(U64).ravel()
    keys = key_in.ravel()
    # frexp gives the bit length; above 2^53 rounding may add one bit, which only makes the walk longer.
    bits = np.maximum(np.frexp((size - U64(1)).astype(np.float64))[1], MIN_BITS).astype(U64)
    value = x_in.astype(U64).ravel()
    out = _feistel(value, bits, keys)
    walking = np.flatnonzero(out >= size)
    while walking.size:  # stays on the cycle of x, which holds x itself, so it ends
        out[walking] = _feistel(out[walking], bits[walking], keys[walking])
        walking = walking[out[walking] >= size[walking]]
    return out.astype(np.int64).reshape(x_in.shape)


def _feistel(value: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    """One pass of the network over [0, 2^bits); a bijection whatever the round function is."""
    right_bits = bits >> U64(1)
    left_bits = bits - right_bits
    left_mask = (U64(1) << left_bits) - U64(1)
    right_mask = (U64(1) << right_bits) - U64(1)
    left, right = value >> right_bits, value & right_mask
    with np.errstate(over="ignore"):
        for round_number in range(FEISTEL_ROUNDS):
            noise = _finalise((key + U64(round_number) * GOLDEN) ^ _finalise(right))
            # The halves change places, so their widths do too.
            mask = left_mask if round_number % 2 == 0 else right_mask
            left, right = right, left ^ (noise & mask)
    return (left << right_bits) | right


class Permutation:
    """Keyed bijection on [0, n) in O(1) memory: index array in, int64 index array of the same shape out."""

    def __init__(self, n: int, key: int | np.integer) -> None:
        if n < 1:
            raise ValueError(f"Permutation of {n} elements: n must be at least 1")
        self.n = n
        self.key = int(key) & MASK_64

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return permute(x, self.n, self.key)
