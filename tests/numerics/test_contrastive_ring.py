"""The tiled contrastive losses: equal to the naive ones over any number of processes, in memory that does not
grow with them."""

import sys

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
from tests.support.paths import ROOT
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
    image_BE, text_BE, weight_B = made_up_features(processes)
    argv = [sys.executable, contrastive_worker.__file__, str(tmp_path)]
    assert run_local(argv, processes, {"PYTHONPATH": str(ROOT)}) == 0
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(processes)]
    for which in range(2):
        exact = {
            "image": image_BE,
            "text": text_BE,
            "scale": torch.tensor([SCALE]),
            "bias": torch.tensor([BIAS]),
        }
        exact = {name: leaf.double().requires_grad_() for name, leaf in exact.items()}
        expected = naive(exact["image"], exact["text"], exact["scale"], exact["bias"], weight_B.double())[
            which
        ]
        expected.backward()
        results = [rank[which] for rank in ranks]
        average = torch.stack([result["loss"] for result in results]).mean()
        assert relative_error(average, expected) <= 1e-6
        for name, leaf in exact.items():
            if leaf.grad is None:  # no loss but SigLIP's has a bias
                continue
            if name in ("image", "text"):
                gradient = torch.cat([result[name] for result in results]) / processes
            else:
                gradient = torch.stack([result[name] for result in results]).mean(dim=0)
            assert relative_error(gradient, leaf.grad) <= 1e-6, name


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
        for leaf in (image, text, scale, bias):
            leaf.requires_grad_()
        tracker = MemTracker()
        with tracker:
            share = torch.full((ROWS,), 1 / (ROWS * size))
            if loss == "info_nce":
                terms = contrastive.info_nce(image, text, scale, share, Crowd(size), tile)
                (terms[0] + terms[1]).backward()
            else:
                contrastive.sigmoid(image, text, scale, bias, share, Crowd(size), tile).backward()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]

    few, many = peak(1), peak(64)
    assert few > 4 * ROWS * 64 * 2  # the tracker saw the features at least
    assert many <= 1.05 * few
