"""Each step has exactly one live value, whatever the run went back over, in the history and in the sinks."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from system.report.history import build_history
from system.sinks.tensorboard import TensorBoardConfig, TensorBoardSink
from system.sinks.wandb import WandbConfig, WandbSink
from tests.support.rewound import live_losses, rewound_log

REWINDS = 50


def test_history_after_fifty_rewinds():
    events = rewound_log(REWINDS)
    live = live_losses(events)
    history = build_history("run", events)
    assert [record.step for record in history.live_steps] == list(range(1, max(live) + 1))
    assert dict(history.series("loss")) == live
    assert len(history.steps) == len(events)  # the superseded ones are kept
    assert len(history.superseded_steps) == len(events) - len(live) > REWINDS


def test_tensorboard_after_fifty_rewinds(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = rewound_log(REWINDS)
    sink = TensorBoardSink(TensorBoardConfig(folder=str(tmp_path)))
    for event in events:
        sink.take(event)
    sink.close()
    shown = accumulator.EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    shown.Reload()
    assert {scalar.step: scalar.value for scalar in shown.Scalars("loss")} == live_losses(events)
    assert len(shown.Scalars("loss")) == len(live_losses(events))


def test_wandb_begins_a_run_where_the_steps_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    events = rewound_log(2)
    sink = WandbSink(WandbConfig(mode="offline", folder=str(tmp_path)), "run")
    for event in events:
        sink.take(event)
    sink.close()
    wandb.teardown()
    stretches = sorted((read_wandb(path) for path in tmp_path.rglob("*.wandb")), key=lambda found: found[0])
    firsts = [first for first, _ in stretches]
    assert len(stretches) == 3
    live: dict[int, float] = {}
    # the rule of docs/metrics.md: a run of the group replaces what others have from its first step on
    for first, rows in sorted(stretches, key=lambda found: found[1][0][1]):
        assert rows[0][0] == first
        live = {step: loss for step, loss in live.items() if step < first} | dict(rows)
    assert live == live_losses(events)
    assert len(set(firsts)) == 3


def read_wandb(path: Path) -> tuple[int, list[tuple[int, float]]]:
    """first_step of an offline run's configuration, and (step, loss) of its history."""
    from wandb.proto import wandb_internal_pb2

    rows, first = [], -1
    for data in records(path.read_bytes()):
        record = vars(wandb_internal_pb2)["Record"]()  # generated
        record.ParseFromString(data)
        for update in record.run.config.update:
            if update.key == "first_step":
                first = json.loads(update.value_json)
        if record.HasField("history"):
            items = record.history.item
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            rows.append((row["step"], row["loss"]))
    return first, rows


def records(data: bytes) -> Iterator[bytes]:
    """Of a file in LevelDB's log format with a header of 7 bytes: what W&B writes offline."""
    position, whole = 7, b""
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:  # the rest of a block that holds no header
            position += 2**15 - position % 2**15
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of several parts
            yield whole
            whole = b""
