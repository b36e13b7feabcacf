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
    """One file per stretch of steps without a rewind.

    A file begins with the step from which it replaces the ones before (`purge_step`); TensorBoard then shows
    one value per step, and the superseded ones stay in the older files.
    """

    def __init__(self, config: TensorBoardConfig) -> None:
        self._folder = config.folder
        self._writer: Any = None
        self._rewinds = Rewinds()

    def take(self, event: Event) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]  # generated
        from torch.utils.tensorboard import SummaryWriter

        if event["name"] != "step":
            return
        if self._rewinds.begins(event):
            self.close()
            self._writer = SummaryWriter(self._folder, purge_step=event["step"])
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars_of(event).items()]
        self._writer._get_file_writer().add_summary(Summary(value=values), event["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
