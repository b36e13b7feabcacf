"""The registry of metrics: what a run measures, under which name, in which unit, and which alerts watch it.

Every metric is a field of an event (`cluster/events.py`). The sinks, the alert rules, the dashboards and the
tables of docs/metrics.md are made from this list; nothing else knows names or units. In Prometheus,
OpenTelemetry, TensorBoard and Weights & Biases a metric has the same name, with the prefix maskclip_ in the
first two.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

PREFIX = "maskclip_"


@dataclass(frozen=True, kw_only=True)
class Metric:
    name: str
    unit: str = ""
    """As people write it; empty for plain numbers."""
    meaning: str
    look: str = ""
    """When to look twice."""
    kind: Literal["gauge", "counter", "total"] = "gauge"
    """gauge: the newest value counts. counter: values of the events add up (1 each without a field). total:
    the value is a sum since the start of the process already."""
    event: str = "step"
    field: str | None = None
    """Of the event; None: the name itself for gauges and totals, and for counters the event itself."""
    label: tuple[str, str] | None = None
    """Fixed label (name, value) of a metric that has several rows here."""

    @property
    def exported(self) -> str:
        """The name in Prometheus and OpenTelemetry."""
        return f"{PREFIX}{self.name}{'' if self.kind == 'gauge' else '_total'}"

    def value(self, event: dict[str, Any]) -> float | None:
        """What an event of this metric's name says; None if it has no number there."""
        if self.kind == "counter" and self.field is None:
            return 1.0
        found = event.get(self.field or self.name)
        return float(found) if isinstance(found, int | float) else None


def _tower_norms() -> Iterator[Metric]:
    for tower, what in (
        ("vision", "the vision tower and its projection"),
        ("text", "the text tower and its projection"),
        ("heads", "decoders, quantizer and the other heads"),
    ):
        yield Metric(
            name=f"grad_norm_{tower}",
            meaning=f"L2 norm of the gradient of {what}, before clipping; see `telemetry.norms_every`",
            look="one tower grows while the others do not",
        )
        yield Metric(
            name=f"param_norm_{tower}",
            meaning=f"L2 norm of the fp32 weights of {what}, after the step; as often",
            look="it grows without bound: raise the weight decay",
        )


def _seconds(name: str, event: str, field: str, meaning: str) -> Metric:
    return Metric(
        name="time_seconds",
        unit="s",
        meaning=meaning,
        kind="counter",
        event=event,
        field=field,
        label=("class", name),
    )


LOSS = (
    Metric(
        name="loss",
        meaning="weighted sum of the terms below over the global batch, weights as configured "
        "(paper: 1, 1, 0.05, 0.05)",
        look="it jumps, or differs after a resume",
    ),
    Metric(
        name="image_text",
        unit="nats",
        meaning="contrastive cross-entropy of the right caption among all of the global batch",
        look="it stays at ln(batch): chance",
    ),
    Metric(
        name="text_image",
        unit="nats",
        meaning="the same of the right image; their sum is in the loss, not their mean",
        look="it stays at ln(batch): chance",
    ),
    Metric(name="pairs", unit="nats", meaning="in place of both with `model.contrastive: sigmoid`"),
    Metric(
        name="distill",
        unit="nats",
        meaning="cross-entropy of the student's codewords to the teacher's at masked patches, unweighted",
        look="it falls to zero together with `teacher_entropy`",
    ),
    Metric(name="mlm", unit="nats", meaning="cross-entropy of masked tokens, unweighted"),
    Metric(
        name="logit_scale",
        meaning="factor on the cosines, exp of the learned value, at most 100",
        look="it sits at 100 early",
    ),
)

OPTIMIZER = (
    Metric(name="lr", meaning="learning rate of the step"),
    Metric(
        name="grad_norm",
        meaning="global gradient norm before clipping",
        look="it grows over many steps, or is nan",
    ),
    Metric(
        name="loss_scale",
        meaning="fp16 only: factor on the loss before backward; each overflow halves it and is "
        "a `step_refused`, 1,000 steps without one double it",
        look="it falls below 128",
    ),
    *_tower_norms(),
    *(
        Metric(
            name=f"moment_ratio_{tower}",
            meaning="root mean square of gradient over Adam's second moment in the first layer of the "
            f"{tower} tower, of the step before",
            look="it is above 2.3: a loss spike is near (Wortsman et al., 2023)",
        )
        for tower in ("vision", "text")
    ),
)

TEACHER = (
    Metric(name="teacher_momentum", meaning="momentum of the moving average"),
    Metric(name="teacher_temperature", meaning="temperature of the teacher's codewords"),
    Metric(
        name="teacher_entropy",
        unit="nats",
        meaning="mean entropy of the teacher's codeword distribution per patch",
        look="near 0 (one codeword for sure) or near ln(codewords) (no preference)",
    ),
    Metric(
        name="codeword_use",
        unit="0..1",
        meaning="effective share of the codewords that the batch uses: exp of the entropy of the mean "
        "target, over the number of codewords",
        look="near 1/codewords: all patches share one codeword, a collapse",
    ),
    Metric(
        name="teacher_cosine",
        unit="-1..1",
        meaning="cosine of the teacher's weights and the student's; every `telemetry.norms_every` steps",
        look="it falls: the student leaves its teacher behind",
    ),
)

SPEED = (
    Metric(
        name="pairs_per_second",
        unit="1/s",
        meaning="global batch over the wall time of the step, waiting for data included",
    ),
    Metric(
        name="mfu",
        unit="0..1",
        meaning="model FLOP utilisation: FLOPs of the step by formula (`model/flops.py`, forward and "
        "backward, nothing recomputed) over its wall time, data included, and the peak of all devices; only "
        "where `telemetry.peak_tflops` states that peak",
    ),
    Metric(
        name="data_seconds",
        unit="s",
        meaning="time that rank 0 waited for the batch",
        look="more than a few per cent of the step: add loader workers",
    ),
    Metric(name="step_seconds", unit="s", meaning="forward to teacher update"),
    Metric(name="step_p50_seconds", unit="s", meaning="median of `step_seconds` over the last 200 steps"),
    Metric(
        name="step_p99_seconds",
        unit="s",
        meaning="99th percentile of the same",
        look="it is twice the median: something interrupts steps",
    ),
    Metric(
        name="slowest_rank",
        meaning="rank that worked longest on the step before: its wait for data, and its own passes up to "
        "where features meet those of others (at ZeRO 3 parameters are gathered before, so slowness "
        "spreads)",
    ),
    Metric(name="slowest_rank_seconds", unit="s", meaning="how long it worked"),
    Metric(
        name="rank_skew",
        meaning="the slowest rank's time over the median rank's",
        look="above 1.3 for minutes, and always the same `slowest_rank`: look at that node",
    ),
)

MACHINE = (
    Metric(name="host_bytes", unit="bytes", meaning="resident memory of rank 0", look="it always grows"),
    Metric(name="device_bytes", unit="bytes", meaning="CUDA only: most memory of rank 0 so far"),
    Metric(
        name="disk_free_ratio",
        unit="0..1",
        meaning="free share of the fullest disk that rank 0 writes to: run folder, cache, spool, local "
        "checkpoints, temporary files",
        look="below 0.1",
    ),
)

DATA = (
    Metric(name="slot", meaning="first slot of the batch in the sample order: the data position"),
    Metric(name="epoch", meaning="samples seen over the samples of the data set"),
    Metric(
        name="cache_hits",
        kind="total",
        meaning="shards of a remote data set that rank 0 asked its cache for and found",
    ),
    Metric(name="cache_misses", kind="total", meaning="shards that rank 0 had to copy"),
    Metric(name="cache_copied_bytes", unit="bytes", kind="total", meaning="what these copies moved"),
    Metric(
        name="cache_evictions", kind="total", meaning="files deleted to make room", look="it always grows"
    ),
    Metric(name="dataset_samples", event="attempt_started", meaning="samples of the data set, or of the mix"),
    Metric(name="dataset_shards", event="attempt_started", meaning="their shards"),
    Metric(
        name="dataset_rejects",
        event="attempt_started",
        meaning="rows that preprocessing has dropped, with a reason each (`maskclip dataset stats`)",
    ),
)

CHECKPOINT = (
    Metric(
        name="durable_age_seconds",
        unit="s",
        meaning="age of the newest state that is known to be durable: what a power cut would cost now",
        look="it grows beyond a few intervals: saves fail or are skipped",
    ),
    Metric(
        name="checkpoints",
        kind="counter",
        event="checkpoint_committed",
        meaning="checkpoints committed by this attempt",
    ),
    Metric(
        name="checkpoint_stall_seconds",
        unit="s",
        event="checkpoint_committed",
        field="stall_seconds",
        meaning="how long training stood still for the newest one",
    ),
    Metric(
        name="checkpoint_seconds",
        unit="s",
        event="checkpoint_committed",
        field="seconds",
        meaning="from its snapshot to the manifest that was read back",
    ),
    Metric(
        name="checkpoint_bytes",
        unit="bytes",
        event="checkpoint_committed",
        field="bytes",
        meaning="its size, all ranks together",
    ),
    Metric(
        name="checkpoint_failures",
        kind="counter",
        event="checkpoint_failed",
        meaning="saves that were given up",
        look="any",
    ),
    Metric(
        name="checkpoints_skipped",
        kind="counter",
        event="checkpoint_skipped",
        meaning="saves that were due while one was in flight",
        look="it grows: the store is too slow for the interval",
    ),
)

STORE = (
    Metric(
        name="store_requests",
        kind="total",
        meaning="operations of rank 0's process on stores (run, data set), that it made itself",
    ),
    Metric(name="store_retries", kind="total", meaning="attempts that failed and were made again"),
    Metric(
        name="store_errors",
        kind="total",
        meaning="operations that failed for good; an absent object is none",
        look="any",
    ),
    Metric(
        name="store_request_seconds",
        unit="s",
        kind="total",
        meaning="time that these operations took, retries included; over the requests: their mean latency",
        look="the mean grows tenfold",
    ),
)

RUN = (
    Metric(name="step", meaning="applied steps of the run, so the first is 1"),
    Metric(name="steps_left", meaning="steps to `run.steps`; 0: the run is done"),
    Metric(name="left_seconds", unit="s", meaning="time for them at the pace of the last 200 steps"),
    Metric(name="steps", kind="counter", event="step", meaning="steps applied by this attempt"),
    Metric(
        name="steps_refused",
        kind="counter",
        event="step_refused",
        meaning="steps that were not applied, since a loss or gradient was not finite",
        look="any outside of fp16's first steps",
    ),
    Metric(name="attempt", meaning="number of the attempt; the restarts are one less"),
    Metric(name="processes", event="attempt_started", meaning="ranks of the attempt"),
    Metric(
        name="telemetry_dropped",
        kind="total",
        meaning="events that the log or a sink of rank 0 has lost",
        look="any: the report has gaps",
    ),
    _seconds("productive", "step", "step_seconds", "wall time of rank 0: applied steps"),
    _seconds("data_wait", "step", "data_seconds", "waiting for their batches"),
    _seconds("lost_work", "step_refused", "step_seconds", "steps that were refused"),
    _seconds("checkpoint_stall", "checkpoint_committed", "stall_seconds", "snapshots between steps"),
    _seconds("evaluation", "evaluation", "seconds", "evaluation in training"),
    _seconds("restore", "checkpoint_restored", "seconds", "reading the checkpoint"),
)

GROUPS: dict[str, tuple[Metric, ...]] = {
    "Loss": LOSS,
    "Optimizer": OPTIMIZER,
    "Teacher": TEACHER,
    "Speed": SPEED,
    "Memory and disk": MACHINE,
    "Data": DATA,
    "Checkpoints": CHECKPOINT,
    "Store": STORE,
    "Run": RUN,
}
METRICS: tuple[Metric, ...] = tuple(metric for group in GROUPS.values() for metric in group)


def by_event() -> dict[str, tuple[Metric, ...]]:
    """Name of an event -> the metrics that it feeds."""
    found: dict[str, list[Metric]] = {}
    for metric in METRICS:
        found.setdefault(metric.event, []).append(metric)
    return {event: tuple(metrics) for event, metrics in found.items()}
