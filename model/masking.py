"""Which patches and words are hidden: a pure function of (seed, epoch, sample id).

Nothing is drawn from a stream, so the masks of a sample are the same at any world size, batch position and
device, and after any resume. The generator is splitmix64 in wrapping int64 (torch has no uint64 arithmetic).

Shapes: B batch, L tokens, P patches, V visible and M masked patches, T blocks, N draws of a sample.
"""

import torch
from torch import Tensor

from model.config import TextConfig
from model.text import caption_lengths


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _signed(0x94D049BB133111EB)

# One stream per use, so that no two decisions about a sample share their numbers.
_PATCHES, _WORDS, _ACTIONS, _REPLACEMENTS, _KEPT, _DEPTH, _DEPTH_VISIBLE = range(0x6D61736B, 0x6D61736B + 7)

_LAST = torch.iinfo(torch.int64).max


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLY_2
    return x ^ _shift_right(x, 31)


def keyed_bits(seed: int, stream: int, epoch_B: Tensor, id_B: Tensor, count: int) -> Tensor:
    """[B, count] int64 of 64 random bits; column i does not depend on `count`."""
    state_B = _mix(torch.full_like(id_B, _signed(seed & (2**64 - 1))) + _GOLDEN)
    for part in (torch.full_like(id_B, stream), epoch_B, id_B):
        state_B = _mix((state_B ^ part) + _GOLDEN)
    steps = torch.arange(1, count + 1, dtype=torch.int64, device=id_B.device) * _GOLDEN
    return _mix(state_B[:, None] + steps)


def split_patches(
    seed: int, epoch_B: Tensor, id_B: Tensor, num_patches: int, keep: int
) -> tuple[Tensor, Tensor]:
    """Choose `keep` patches of each image at random.

    Args:
        seed: the run's seed.
        epoch_B: int64 epoch of each sample.
        id_B: int64 id of each sample.

    Returns:
        int64 indices of the visible [B, keep] and the masked patches [B, num_patches - keep], ascending.
    """
    order_BP = keyed_bits(seed, _PATCHES, epoch_B, id_B, num_patches).argsort(dim=1, stable=True)
    return order_BP[:, :keep].sort(dim=1).values, order_BP[:, keep:].sort(dim=1).values


def kept_patches(seed: int, epoch_B: Tensor, id_B: Tensor, num_patches: int, keep: int) -> Tensor:
    """[B, keep] ascending int64 indices of the patches that patch dropout leaves; independent of
    `split_patches`."""
    order_BP = keyed_bits(seed, _KEPT, epoch_B, id_B, num_patches).argsort(dim=1, stable=True)
    return order_BP[:, :keep].sort(dim=1).values


def branch_factors(
    seed: int, epoch_B: Tensor, id_B: Tensor, layers: int, rate: float, *, visible: bool
) -> Tensor:
    """[layers, 2, B] fp32 factors of stochastic depth: 0 where a sample skips a branch, else 1 / (1 - rate of
    the block). The rate rises linearly from 0 to `rate`. `visible`: for the pass of the visible patches."""
    stream = _DEPTH_VISIBLE if visible else _DEPTH
    bits_BN = keyed_bits(seed, stream, epoch_B, id_B, 2 * layers)
    drawn_T2B = (_shift_right(bits_BN, 11).double() * 2.0**-53).T.reshape(layers, 2, -1)
    rate_T11 = torch.linspace(0, rate, layers, dtype=torch.float64, device=id_B.device)[:, None, None]
    return ((drawn_T2B >= rate_T11) / (1 - rate_T11)).float()


def corrupt_tokens(
    seed: int, epoch_B: Tensor, id_B: Tensor, tokens_BL: Tensor, ratio: float, config: TextConfig
) -> tuple[Tensor, Tensor]:
    """Hide words of each caption: 80 % become the mask token, 10 % another word, 10 % stay (BERT).

    A caption of n words loses round(ratio * n) of them, and at least one if it has any. Start token, end
    token and padding are never touched. How far the captions are padded changes nothing. The split and the
    exact count are not from the paper.

    Args:
        tokens_BL: int64 ids of the captions.
        ratio: share of the words to hide.

    Returns:
        int64 corrupted ids [B, L] and bool [B, L], True at the words to predict.
    """
    length = tokens_BL.shape[1]
    words_B = (caption_lengths(tokens_BL, config) - 2).clamp(min=0)
    place_L = torch.arange(length, device=tokens_BL.device)
    is_word_BL = (place_L >= 1) & (place_L <= words_B[:, None])
    count_B = torch.floor(words_B.double() * ratio + 0.5).long().clamp(min=1).minimum(words_B)
    keys_BL = keyed_bits(seed, _WORDS, epoch_B, id_B, length).masked_fill(~is_word_BL, _LAST)
    rank_BL = keys_BL.argsort(dim=1, stable=True).argsort(dim=1)
    hidden_BL = is_word_BL & (rank_BL < count_B[:, None])

    action_BL = _shift_right(keyed_bits(seed, _ACTIONS, epoch_B, id_B, length), 11) % 10
    replacement_BL = (
        _shift_right(keyed_bits(seed, _REPLACEMENTS, epoch_B, id_B, length), 11) % config.start_token
    )
    corrupted_BL = tokens_BL.masked_fill(hidden_BL & (action_BL < 8), config.mask_token)
    return torch.where(hidden_BL & (action_BL == 8), replacement_BL, corrupted_BL), hidden_BL
