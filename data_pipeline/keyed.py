"""Random numbers and permutations that are pure functions of their keys.

Nothing here holds a state: a crop, a shuffle or a mask is computed from (seed, epoch, sample id, ...), so it
is the same at any world size, with any number of workers and after any resume.

The mixer is the output function of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", OOPSLA 2014). The permutation is an unbalanced Feistel network with cycle walking (Black,
Rogaway: "Ciphers with arbitrary finite domains", CT-RSA 2002). Neither is cryptographic.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

MASK_64 = (1 << 64) - 1
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FEISTEL_ROUNDS = 8  # even, so that the unequal halves end where they began
MIN_BITS = 6  # over smaller domains the network is visibly not uniform (chi-square over all orders of n = 4)
U64 = np.uint64
PIECE = 1 << 13


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
    return _walk(x, n, key, _feistel)


def unpermute(y: np.ndarray, n: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """The x whose image `permute(x, n, key)` is y; shapes and errors as there."""
    return _walk(y, n, key, _feistel_back)


def shuffled(n: int, key: np.ndarray | int) -> np.ndarray:
    """All of [0, n), n < 2^32, in an order that `key` picks: int64 [n].

    For a whole order this is several times faster than `permute` of every point. It sorts by the hash of each
    point; where the kept bits of two hashes are equal, the smaller point comes first.
    """
    bits = U64(max(1, (n - 1).bit_length()))
    low = (U64(1) << bits) - U64(1)
    packed = np.empty(n, dtype=U64)
    # In pieces that stay in the processor's cache: fresh memory would cost more than the arithmetic.
    with np.errstate(over="ignore"):
        for start in range(0, n, PIECE):
            points = np.arange(start, min(start + PIECE, n), dtype=U64)
            packed[start : start + PIECE] = (_finalise(points ^ _as_u64(key)) & ~low) | points
    packed.sort()
    packed &= low
    return packed.view(np.int64)


def _walk(
    x: np.ndarray,
    n: np.ndarray | int,
    key: np.ndarray | int,
    network: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    x_in, n_in, key_in = np.broadcast_arrays(np.asarray(x), np.asarray(n), _as_u64(key))
    if np.any(n_in < 1) or np.any(x_in < 0) or np.any(x_in >= n_in):
        raise ValueError("permute: x must lie in [0, n)")
    size = n_in.astype(U64).ravel()
    keys = key_in.ravel()
    # frexp gives the bit length; above 2^53 rounding may add one bit, which only makes the walk longer.
    bits = np.maximum(np.frexp((size - U64(1)).astype(np.float64))[1], MIN_BITS).astype(U64)
    value = x_in.astype(U64).ravel()
    out = network(value, bits, keys)
    walking = np.flatnonzero(out >= size)
    while walking.size:  # stays on the cycle of x, which holds x itself, so it ends
        out[walking] = network(out[walking], bits[walking], keys[walking])
        walking = walking[out[walking] >= size[walking]]
    return out.astype(np.int64).reshape(x_in.shape)


def _halves(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Width of the right half, masks of the left and of the right one."""
    right_bits = bits >> U64(1)
    left_bits = bits - right_bits
    return right_bits, (U64(1) << left_bits) - U64(1), (U64(1) << right_bits) - U64(1)


def _feistel(value: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    """One pass of the network over [0, 2^bits); a bijection whatever the round function is."""
    right_bits, left_mask, right_mask = _halves(bits)
    left, right = value >> right_bits, value & right_mask
    with np.errstate(over="ignore"):
        for round_number in range(FEISTEL_ROUNDS):
            # The halves change places, so their widths do too.
            mask = left_mask if round_number % 2 == 0 else right_mask
            left, right = right, left ^ (_noise(right, key, round_number) & mask)
    return (left << right_bits) | right


def _feistel_back(value: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The inverse of `_feistel`: the same rounds, last one first."""
    right_bits, left_mask, right_mask = _halves(bits)
    left, right = value >> right_bits, value & right_mask
    with np.errstate(over="ignore"):
        for round_number in reversed(range(FEISTEL_ROUNDS)):
            mask = left_mask if round_number % 2 == 0 else right_mask
            left, right = right ^ (_noise(left, key, round_number) & mask), left
    return (left << right_bits) | right


def _noise(half: np.ndarray, key: np.ndarray, round_number: int) -> np.ndarray:
    return _finalise((key + U64(round_number) * GOLDEN) ^ _finalise(half))


class Permutation:
    """Keyed bijection on [0, n) in O(1) memory: index array in, int64 index array of the same shape out."""

    def __init__(self, n: int, key: int | np.integer) -> None:
        if n < 1:
            raise ValueError(f"Permutation of {n} elements: n must be at least 1")
        self.n = n
        self.key = int(key) & MASK_64

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return permute(x, self.n, self.key)
