"""The tiled contrastive losses: equal to the naive ones over any number of processes, in memory that does not
grow with them."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from cluster.local_launch import run_local
from model import contrastive, losses
from model.losses import SingleProcess
from tests.support import contrastive_worker
from tests.support.contrastive_worker import BIAS, ROWS, SCALE, made_up_features
from tests.unit.model.samples import relative_error


def naive(image_BE: Tensor, text_BE: Tensor, scale: Tensor, bias: Tensor, weight_B: Tensor) -> list[Tensor]:
    """Both losses from one dense matrix: softmax over rows and columns, and SigLIP's."""
    share_B = losses.mean_shares(weight_B, SingleProcess())
    kept = weight_B > 0
    logits_BB = scale * (image_BE @ text_BE.T)
    present_BB = logits_BB[kept][:, kept]
    target = torch.arange(len(present_BB))
    rows, columns = (
        share_B[kept] @ F.cross_entropy(matrix, target, reduction="none")
        for matrix in (present_BB, present_BB.T)
    )
    sign_BB = 2 * torch.eye(len(target), dtype=logits_BB.dtype) - 1
    pairs = -(share_B[kept] @ F.logsigmoid(sign_BB * (present_BB + bias)).sum(dim=1))
    return [rows + columns, pairs]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_is_the_naive_loss_and_gradient(tmp_path, processes):
    leaves = [*made_up_features(processes), torch.tensor([SCALE]), torch.tensor([BIAS])]
    weight_B = leaves.pop(2)
    root = Path(__file__).resolve().parents[2]
    argv = [sys.executable, contrastive_worker.__file__, str(tmp_path)]
    assert run_local(argv, processes, {"PYTHONPATH": str(root)}) == 0
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(processes)]
    for which in range(2):
        exact = [leaf.double().requires_grad_() for leaf in leaves]
        expected = naive(*exact, weight_B.double())[which]
        expected.backward()
        average = torch.stack([results[which]["loss"] for results in ranks]).mean()
        assert relative_error(average, expected) <= 1e-6
        for number, name in enumerate(("image", "text")):
            gathered = torch.cat([results[which][name] for results in ranks]) / processes
            assert relative_error(gathered, exact[number].grad) <= 1e-6, name
        for number, name in ((2, "scale"), (3, "bias")):
            if name in ranks[0][which]:
                mean = torch.stack([results[which][name] for results in ranks]).mean(dim=0)
                assert relative_error(mean, exact[number].grad) <= 1e-6, name


class Crowd:
    """A ring of which all other ranks are made up: what they would send is computed when it is asked for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def rotate(self, x: Tensor) -> Tensor:
        return torch.roll(x, 1, dims=0)


@pytest.mark.parametrize("tile", [64, 1024])
@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_memory_does_not_grow_with_the_global_batch(loss, tile):
    def peak(size: int) -> int:
        generator = torch.Generator().manual_seed(0)
        image, text = (F.normalize(torch.randn(ROWS, 64, generator=generator)) for _ in range(2))
        scale, bias = torch.tensor([SCALE]), torch.tensor([BIAS])
        leaves = [leaf.requires_grad_() for leaf in (image, text, scale, bias)]
        tracker = MemTracker()
        with tracker:
            share = torch.full((ROWS,), 1 / (ROWS * size))
            if loss == "info_nce":
                terms = contrastive.info_nce(*leaves[:3], share, Crowd(size), tile)
                (terms[0] + terms[1]).backward()
            else:
                contrastive.sigmoid(*leaves, share, Crowd(size), tile).backward()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]

    few, many = peak(1), peak(64)
    assert few > 4 * ROWS * 64 * 2  # the tracker saw the features at least
    assert many <= 1.05 * few
