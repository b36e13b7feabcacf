"""What the ranks of a run tell each other besides tensors: decisions of rank 0, and the verdict on a step."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from cluster.errors import ConfigError, Hang, MaskClipError
from cluster.stop import Reason, StopRequest, stopped

T = TypeVar("T")


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 only and give its result, or its exception, to every rank: nobody is left
    waiting."""
    box: list = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        if isinstance(box[1], MaskClipError):
            box[1].agreed = True
        raise box[1]
    return box[0]


def same_on_all_ranks(what: str, mine: str) -> None:
    """Raises ConfigError on every rank unless all give the same text."""
    texts: list = [None] * dist.get_world_size()
    dist.all_gather_object(texts, mine)
    others = [rank for rank, text in enumerate(texts) if text != texts[0]]
    if others:
        error = ConfigError(
            f"rank {others[0]} and {len(others) - 1} others have another {what} than rank 0; give every rank "
            "the same recipe and settings"
        )
        error.agreed = True
        raise error


def stop_if_asked(stop: StopRequest) -> None:
    """All ranks call it outside of the step loop: if one was asked to stop, all raise."""
    reasons: list[Reason | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, stop.reason)
    if "interrupted" in reasons:
        raise _stopped_early("interrupted")
    if "preempted" in reasons:
        raise _stopped_early("preempted")


def _stopped_early(reason: Reason) -> MaskClipError:
    return stopped(reason, "stopped before the first step of this attempt; run the same command to go on")


@contextmanager
def lost_peers_named(stop: StopRequest) -> Iterator[None]:
    """A collective that fails because another rank is gone leaves the block as `Hang`; or, where that one was
    asked to stop and we were too, as that."""
    try:
        yield
    except RuntimeError as error:
        known: MaskClipError | None = peer_lost(error)
        if known is None:
            raise
        raise (_stopped_early(stop.reason) if stop.reason else known) from error


@dataclass(frozen=True)
class Verdict:
    """What all ranks know of a step before it is applied."""

    non_finite_ranks: int
    interrupted: bool
    preempted: bool
    ids_digest: str
    """Hash of the (slot, sample id) pairs of the global batch; the same at any world size."""


def peer_lost(error: BaseException) -> Hang | None:
    """A collective that failed because another rank is gone, as the error that it is; else None."""
    signs = ("Connection closed by peer", "Connection reset by peer", "NCCL")
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs):
        return Hang("lost the connection to another rank; if that one gave no reason, run again")
    return None


def agree(loss: torch.Tensor, batch: dict[str, torch.Tensor], stop_reason: str | None) -> Verdict:
    """One small all-reduce: non-finite loss anywhere? stop asked anywhere? which samples?"""
    real = batch["weight"] > 0
    pairs = _mix(batch["id"][real] ^ _mix(batch["slot"][real]))
    votes = torch.stack(
        [
            (~torch.isfinite(loss.detach()).all()).to(torch.int64).cpu(),
            torch.tensor(int(stop_reason == "interrupted")),
            torch.tensor(int(stop_reason == "preempted")),
            pairs.sum().cpu(),
        ]
    ).to(loss.device)
    dist.all_reduce(votes)
    non_finite, interrupted, preempted, digest = votes.tolist()
    return Verdict(non_finite, interrupted > 0, preempted > 0, f"{digest & 0xFFFFFFFFFFFFFFFF:016x}")


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A 64-bit finaliser on int64 with wrap-around, so that sums of its values detect any exchanged pair."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def state_digest(named: list[tuple[str, int, torch.Tensor]]) -> str:
    """Hash over all ranks of fp32 runs (name, start, values [length]), each element counted once; free of
    topology."""
    total = torch.zeros((), dtype=torch.int64)
    for name, start, values in named:
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        bits = values.detach().cpu().contiguous().view(torch.int32).to(torch.int64)
        position = torch.arange(start, start + bits.numel(), dtype=torch.int64)
        total += _mix(bits ^ _mix(position + key)).sum()
    total = total.reshape(1)
    if dist.get_backend() == "nccl":
        total = total.cuda()
    dist.all_reduce(total)
    return f"{int(total) & 0xFFFFFFFFFFFFFFFF:016x}"
