"""A snapshot is the file that the safetensors library would write, and its digest adds up over any cut."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from system.checkpoints import snapshot
from system.checkpoints.snapshot import Snapshot
from system.checkpoints.state_digest import add, run_sum


def tensors() -> dict[str, torch.Tensor]:
    return {
        "master/b/0": torch.randn(5),
        "master/a/3": torch.randn(1000),
        "teacher/a/3": torch.randn(1000),
        "state/teacher.centre/0": torch.randn(7),
    }


def test_the_bytes_are_the_librarys(monkeypatch):
    monkeypatch.setattr(snapshot, "PIECE_BYTES", 512)
    state = tensors()
    taken = Snapshot(state)
    taken.take(state)
    data = b"".join(taken.pieces())
    assert data == save(state)
    assert len(data) == taken.size


def test_it_keeps_what_it_took_and_takes_again():
    state = tensors()
    taken = Snapshot(state)
    taken.touch()
    taken.take(state)
    before = save(state)
    for values in state.values():
        values.add_(1)
    assert b"".join(taken.pieces()) == before
    taken.take(state)
    assert b"".join(taken.pieces()) == save(state)


@settings(deadline=None, max_examples=30)
@given(cuts=st.sets(st.integers(1, 199_999), max_size=6))
def test_the_digest_adds_up_over_any_cut(cuts):
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(1)).numpy()
    whole = add([run_sum("w", 0, values)])
    edges = [0, *sorted(cuts), values.size]
    parts = [run_sum("w", first, values[first:last]) for first, last in pairwise(edges)]
    assert add(parts) == whole
    assert add([run_sum("v", 0, values)]) != whole
    values[7], values[8] = values[8], values[7]
    assert add([run_sum("w", 0, values)]) != whole
