"""Masks are pure functions of (seed, epoch, id), with exact counts."""

import pytest
import torch
from torch import Tensor

from model.config import preset
from model.masking import branch_factors, corrupt_tokens, kept_patches, keyed_bits, split_patches
from tests.unit.model.samples import make_tokens

CONFIG = preset("test")
TEXT = CONFIG.text
MASK64 = 2**64 - 1


def mix(x: int) -> int:
    """splitmix64's finaliser on Python's integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def ids(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.zeros(count, dtype=torch.int64), torch.randint(0, 2**63 - 1, (count,), generator=generator)


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 5])
def test_bits_are_splitmix64(seed: int):
    golden, stream, epoch, sample = 0x9E3779B97F4A7C15, 3, 2, 2**63 - 25
    bits = keyed_bits(seed, stream, torch.tensor([epoch]), torch.tensor([sample]), 4)
    state = mix((seed + golden) & MASK64)
    for part in (stream, epoch, sample):
        state = mix(((state ^ part) + golden) & MASK64)
    expected = [mix((state + step * golden) & MASK64) for step in range(1, 5)]
    assert [value & MASK64 for value in bits[0].tolist()] == expected


def test_patches_are_split_exactly():
    epoch, id_ = ids(200)
    visible, masked = split_patches(0, epoch, id_, 64, 16)
    assert visible.shape == (200, 16)
    assert masked.shape == (200, 48)
    together = torch.cat([visible, masked], dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(64).expand(200, 64))
    assert (visible.diff(dim=1) > 0).all()
    assert (masked.diff(dim=1) > 0).all()


def test_every_patch_is_as_likely():
    epoch, id_ = ids(4000)
    visible, _ = split_patches(0, epoch, id_, 64, 16)
    share = torch.bincount(visible.flatten(), minlength=64) / 4000
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5


def test_a_mask_belongs_to_its_sample():
    epoch, id_ = ids(50)
    visible, _ = split_patches(1, epoch, id_, 64, 16)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(split_patches(1, epoch, id_[order], 64, 16)[0], visible[order])
    assert torch.equal(split_patches(1, epoch[:1], id_[:1], 64, 16)[0], visible[:1])
    for other in (split_patches(2, epoch, id_, 64, 16), split_patches(1, epoch + 1, id_, 64, 16)):
        assert (other[0] != visible).any(dim=1).float().mean() > 0.99


def test_words_are_hidden_in_exact_number_and_nothing_else_is():
    lengths = [0, 1, 2, 3, 7, 8, 20, 75] * 5
    tokens = make_tokens(lengths, CONFIG)
    corrupted, hidden = corrupt_tokens(0, *ids(len(lengths)), tokens, 0.2, TEXT)
    expected = [min(words, max(1, int(words * 0.2 + 0.5))) for words in lengths]
    assert hidden.sum(dim=1).tolist() == expected
    for row, words in zip(hidden, lengths, strict=True):
        assert not row[0]
        assert not row[words + 1 :].any()
    assert torch.equal(corrupted[~hidden], tokens[~hidden])


def test_corruption_follows_berts_split():
    tokens = make_tokens([75] * 400, CONFIG)
    corrupted, hidden = corrupt_tokens(0, *ids(400), tokens, 0.2, TEXT)
    before, after = tokens[hidden], corrupted[hidden]
    count = len(before)
    masked, kept = (after == TEXT.mask_token).sum() / count, (after == before).sum() / count
    assert abs(float(masked) - 0.8) < 5 * (0.8 * 0.2 / count) ** 0.5
    assert abs(float(kept) - 0.1) < 5 * (0.1 * 0.9 / count) ** 0.5
    replaced = after[(after != TEXT.mask_token) & (after != before)]
    assert replaced.max() < TEXT.start_token
    assert len(replaced.unique()) > 0.9 * len(replaced)


def test_corruption_belongs_to_its_sample_and_ignores_padding():
    lengths = [3, 9, 5, 1]
    tokens, (epoch, id_) = make_tokens(lengths, CONFIG), ids(4)
    corrupted, hidden = corrupt_tokens(0, epoch, id_, tokens, 0.2, TEXT)
    alone = corrupt_tokens(0, epoch[2:3], id_[2:3], tokens[2:3, :7], 0.2, TEXT)
    assert torch.equal(alone[0], corrupted[2:3, :7])
    assert torch.equal(alone[1], hidden[2:3, :7])
    assert not torch.equal(corrupt_tokens(0, epoch + 1, id_, tokens, 0.2, TEXT)[1], hidden)


def test_patch_dropout_keeps_an_exact_number_independent_of_the_masks():
    epoch, ids = torch.zeros(500, dtype=torch.int64), torch.arange(500)
    kept = kept_patches(3, epoch, ids, 16, 8)
    assert kept.shape == (500, 8)
    assert (kept.diff(dim=1) > 0).all()
    visible, _ = split_patches(3, epoch, ids, 16, 8)
    overlap = torch.stack([torch.isin(a, b).sum() for a, b in zip(kept, visible, strict=True)])
    assert abs(float(overlap.float().mean()) - 4) < 0.2


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_stochastic_depth_belongs_to_its_sample_and_keeps_the_mean(rate: float):
    epoch, ids = torch.zeros(4000, dtype=torch.int64), torch.arange(4000)
    factors = branch_factors(3, epoch, ids, 5, rate, visible=False)
    assert factors.shape == (5, 2, 4000)
    assert (factors[0] == 1).all()  # the first block is never skipped
    assert torch.allclose(factors.mean(dim=2), torch.ones(5, 2), atol=0.06)
    skipped = (factors[-1] == 0).float().mean()
    assert abs(float(skipped) - rate) < 0.03
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(branch_factors(3, epoch, ids[order], 5, rate, visible=False), factors[:, :, order])
    if rate:
        assert not torch.equal(branch_factors(3, epoch, ids, 5, rate, visible=True), factors)
