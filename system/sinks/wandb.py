"""The scalars of a run for Weights & Biases."""

from dataclasses import dataclass
from typing import Any, Literal

from system.sinks.feed import Event
from system.sinks.scalars import Rewinds, scalars_of


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; needs the extra `wandb`. Its own settings (WANDB_API_KEY, WANDB_BASE_URL, ...) come
    from the environment."""

    mode: Literal["off", "offline", "online"] = "off"
    """offline writes to `folder`, for `wandb sync` later."""
    project: str = "maskclip"
    """Project of the runs."""
    folder: str = "wandb"
    """Local folder of its files."""


class WandbSink:
    """One W&B run per stretch of steps without a rewind, in one group per run of ours.

    W&B cannot go back a step, so a rewind begins a new run of the group. Its configuration says from which
    step on it supersedes the ones before (`first_step`); these stay as they are.
    """

    def __init__(self, config: WandbConfig, run: str) -> None:
        self._config, self._run = config, run
        self._rewinds = Rewinds()
        self._stretch = 0
        self._wandb: Any = None

    def take(self, event: Event) -> None:
        if event["name"] != "step":
            return
        if self._rewinds.begins(event):
            self.close()
            self._wandb = self._begin(event)
        self._wandb.log({"step": event["step"], **scalars_of(event)})

    def _begin(self, event: Event) -> Any:
        import wandb

        self._stretch += 1
        name = f"{self._run}-{event['attempt']:04d}-{self._stretch}"
        run = wandb.init(
            project=self._config.project,
            group=self._run,
            name=name,
            dir=self._config.folder,
            mode="offline" if self._config.mode == "offline" else "online",
            config={"run": self._run, "attempt": event["attempt"], "first_step": event["step"]},
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, init_timeout=30),
        )
        run.define_metric("*", step_metric="step")
        return run

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
