"""What the ranks of a run tell each other besides tensors: decisions of rank 0, and the verdict on a step."""

import struct
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


def on_every_rank(work: Callable[[], T]) -> list[T]:
    """Run `work` on all ranks and give every rank all results, by rank; or the first exception of any."""
    mine: list = [None, None]
    try:
        mine[0] = work()
    except Exception as error:
        mine[1] = error
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for _, error in everyone:
        if error is not None:
            if isinstance(error, MaskClipError):
                error.agreed = True
            raise error
    return [result for result, _ in everyone]


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
    work_seconds: tuple[float, ...]
    """Of each rank, by rank: how long it has worked on the step before (`WorkClock`)."""
    loss: float
    """Of the global batch."""
    others: tuple[int, ...]
    """Sums over the ranks of what else they had to say."""
    measured: tuple[int, ...]
    """Likewise, of what lay on the device."""


def peer_lost(error: BaseException) -> Hang | None:
    """A collective that failed because another rank is gone, as the error that it is; else None."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs):
        return Hang("lost the connection to another rank; if that one gave no reason, run again")
    return None


def agree(
    loss: torch.Tensor,
    total: torch.Tensor,
    batch: dict[str, torch.Tensor],
    stop_reason: str | None,
    work_seconds: float,
    others: tuple[int, ...],
    measured: torch.Tensor,
) -> Verdict:
    """One small all-reduce, and the one time that a step waits for the device: non-finite loss anywhere? stop
    asked anywhere? which samples? how long has each rank worked?

    Args:
        loss: this rank's share, scalar.
        total: loss of the global batch, fp32 scalar, the same on all ranks.
        work_seconds: of this rank; see `WorkClock`.
        others: whatever else is to be summed.
        measured: int64 [n] on the device, likewise.
    """
    real = batch["weight"] > 0
    pairs = _mix(batch["id"][real] ^ _mix(batch["slot"][real]))
    # The first rank's total goes as its bits, so a sum leaves it as it is.
    bits = total.detach().reshape(1).view(torch.int32)[0] * int(dist.get_rank() == 0)
    found = torch.stack([~torch.isfinite(loss.detach()).all(), bits, pairs.sum()]).to(torch.int64)
    micros_W = [0] * dist.get_world_size()
    micros_W[dist.get_rank()] = round(1e6 * work_seconds)
    asked = [int(stop_reason == reason) for reason in ("interrupted", "preempted")]
    said = torch.tensor([*asked, *micros_W, *others], dtype=torch.int64)
    votes = torch.cat([found, said.to(loss.device), measured])
    dist.all_reduce(votes)
    non_finite, total_bits, digest, interrupted, preempted, *rest = votes.tolist()
    micros_W, rest = rest[: len(micros_W)], rest[len(micros_W) :]
    return Verdict(
        non_finite,
        interrupted > 0,
        preempted > 0,
        ids_digest=f"{digest & 0xFFFFFFFFFFFFFFFF:016x}",
        work_seconds=tuple(1e-6 * micros for micros in micros_W),
        loss=struct.unpack("f", struct.pack("i", total_bits))[0],
        others=tuple(rest[: len(others)]),
        measured=tuple(rest[len(others) :]),
    )


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A 64-bit finaliser on int64 with wrap-around, so that sums of its values detect any exchanged pair."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
