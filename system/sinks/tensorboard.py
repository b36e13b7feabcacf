"""The scalars of a run as TensorBoard event files."""

from dataclasses import dataclass
from typing import Any

from system.sinks.feed import Event
from system.sinks.scalars import Rewinds, scalars_of


@dataclass(frozen=True, kw_only=True)
class TensorBoardConfig:
    """Event files for `tensorboard --logdir`; needs the extra `tensorboard`."""

    folder: str = ""
    """Local or network folder; all attempts of a run share it. Empty: none are written."""


class TensorBoardSink:
    """One event file per process.

    Where the run goes back, a mark of a new session says from which step on it replaces what was there.
    TensorBoard then shows one value per step; the superseded ones stay in the files.
    """

    def __init__(self, config: TensorBoardConfig) -> None:
        from torch.utils.tensorboard.writer import FileWriter

        self._writer = FileWriter(config.folder)
        self._rewinds = Rewinds()

    def take(self, event: Event) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2

        protos: Any = vars(event_pb2) | vars(summary_pb2)  # generated: no checker knows what is in there
        if event["name"] != "step":
            return
        step = event["step"]
        if self._rewinds.begins(event):
            self._writer.add_event(protos["Event"](file_version="brain.Event:2"), step)
            start = protos["SessionLog"](status=protos["SessionLog"].START)
            self._writer.add_event(protos["Event"](session_log=start), step)
        values = scalars_of(event).items()
        made = [protos["Summary"].Value(tag=name, simple_value=value) for name, value in values]
        self._writer.add_summary(protos["Summary"](value=made), step)

    def close(self) -> None:
        self._writer.close()
