"""Recording and alert rules of Prometheus.

All have the label `run`. An alert says what to look at first; docs/metrics.md has the same table.
"""

from dataclasses import dataclass
from typing import Any, Literal

from system.monitoring.thresholds import (
    FEW_CODEWORDS,
    FULL_DISK,
    LEARNT_STEPS,
    LOW_GOODPUT,
    OLD_SAVE_SECONDS,
    QUIET_SECONDS,
    REFUSALS,
    RESTARTS,
    SLOW_RANK,
    WAITING_SHARE,
)

JOB = "maskclip"


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A value that alerts and dashboards share."""

    record: str
    expr: str


@dataclass(frozen=True, kw_only=True)
class Alert:
    name: str
    expr: str
    wait: str
    """How long it must hold (Prometheus' `for`)."""
    severity: Literal["page", "ticket"]
    """page: somebody shall look now. ticket: within the day."""
    summary: str
    look: str
    """What to look at first."""


RECORDINGS = (
    Recording(
        record="maskclip:step_time_seconds:p50_5m",
        expr="histogram_quantile(0.5, sum by (run, le) (rate(maskclip_step_time_seconds_bucket[5m])))",
    ),
    Recording(
        record="maskclip:step_time_seconds:p99_5m",
        expr="histogram_quantile(0.99, sum by (run, le) (rate(maskclip_step_time_seconds_bucket[5m])))",
    ),
    Recording(
        record="maskclip:goodput:ratio_30m",
        expr='sum by (run) (rate(maskclip_time_seconds_total{class="productive"}[30m]))',
    ),
    Recording(
        record="maskclip:data_wait:ratio_10m",
        expr='sum by (run) (rate(maskclip_time_seconds_total{class="data_wait"}[10m])) / sum by (run) '
        '(rate(maskclip_time_seconds_total{class=~"data_wait|productive"}[10m]))',
    ),
    Recording(
        record="maskclip:store_request_seconds:mean_10m",
        expr="sum by (run) (rate(maskclip_store_request_seconds_total[10m])) / "
        "sum by (run) (rate(maskclip_store_requests_total[10m]) > 0)",
    ),
)

ALERTS = (
    Alert(
        name="MaskclipTrainerDown",
        expr=f'up{{job="{JOB}"}} == 0',
        wait="2m",
        severity="page",
        summary="the trainer does not answer and has not said that it is done",
        look="the job on its scheduler, the last lines of its log, `maskclip report RUN`",
    ),
    Alert(
        name="MaskclipNoProgress",
        expr=f"(time() - max by (run) (maskclip_step_timestamp_seconds) > {QUIET_SECONDS}) and on (run) "
        "max by (run) (maskclip_steps_left) > 0",
        wait="1m",
        severity="page",
        summary="no step was applied for ten minutes",
        look="`slowest_rank` before it stopped, the network between the nodes, refused steps",
    ),
    Alert(
        name="MaskclipGoodputLow",
        expr=f"maskclip:goodput:ratio_30m < {LOW_GOODPUT}",
        wait="30m",
        severity="ticket",
        summary="less than 80 % of the last 30 minutes went into applied steps",
        look="`maskclip_time_seconds_total` by class: data, checkpoints, evaluation, or none: restarts",
    ),
    Alert(
        name="MaskclipCheckpointTooOld",
        expr=f"max by (run) (maskclip_durable_age_seconds) > {OLD_SAVE_SECONDS}",
        wait="5m",
        severity="page",
        summary="the newest durable state is older than two hours",
        look="`checkpoint_failed` events, the store, `checkpoint.every_seconds`",
    ),
    Alert(
        name="MaskclipCheckpointFailed",
        expr="sum by (run) (increase(maskclip_checkpoint_failures_total[30m])) > 0",
        wait="0m",
        severity="ticket",
        summary="a save was given up; training went on",
        look="the reason in the event `checkpoint_failed`, store errors, `checkpoint.deadline_seconds`",
    ),
    Alert(
        name="MaskclipStepsRefused",
        expr=f"sum by (run) (increase(maskclip_steps_refused_total[10m])) > {REFUSALS}",
        wait="0m",
        severity="page",
        summary="losses or gradients are not finite",
        look="`step_refused` events, `grad_norm`, `loss_scale`, the samples of that slot",
    ),
    Alert(
        name="MaskclipCodewordCollapse",
        expr=f"max by (run) (maskclip_codeword_use) < {FEW_CODEWORDS} and on (run) "
        f"max by (run) (maskclip_step) > {LEARNT_STEPS}",
        wait="10m",
        severity="page",
        summary="the teacher puts nearly all patches into few codewords",
        look="`teacher_entropy`, `distill`, the teacher's temperature, centring and momentum",
    ),
    Alert(
        name="MaskclipLoaderBound",
        expr=f"maskclip:data_wait:ratio_10m > {WAITING_SHARE}",
        wait="15m",
        severity="ticket",
        summary="more than 10 % of the time goes into waiting for batches",
        look="`data.loader.workers`, cache misses, latency of the store",
    ),
    Alert(
        name="MaskclipStoreErrors",
        expr="sum by (run) (increase(maskclip_store_errors_total[10m])) > 3",
        wait="0m",
        severity="ticket",
        summary="operations on the store fail in spite of their retries",
        look="`maskclip doctor URI`, the store's own status, credentials",
    ),
    Alert(
        name="MaskclipSlowRank",
        expr=f"max by (run) (maskclip_rank_skew) > {SLOW_RANK}",
        wait="15m",
        severity="ticket",
        summary="one rank works 30 % longer than the median, and all wait for it",
        look="the node of `maskclip_slowest_rank`: clocks, temperature, other jobs, its disk",
    ),
    Alert(
        name="MaskclipRestartStorm",
        expr="max by (run) (max_over_time(maskclip_attempt[1h])) "
        f"- min by (run) (min_over_time(maskclip_attempt[1h])) >= {RESTARTS}",
        wait="0m",
        severity="page",
        summary="four or more restarts within an hour",
        look="the reasons in `attempt_ended`, and whether checkpoints are committed in between",
    ),
    Alert(
        name="MaskclipDiskFull",
        expr=f"min by (run) (maskclip_disk_free_ratio) < {FULL_DISK}",
        wait="10m",
        severity="ticket",
        summary="a disk of the first rank's node is nearly full",
        look="`data.loader.cache_bytes`, `checkpoint.local_keep`, the spool of events",
    ),
    Alert(
        name="MaskclipTelemetryDropped",
        expr="sum by (run) (increase(maskclip_telemetry_dropped_total[10m])) > 0",
        wait="0m",
        severity="ticket",
        summary="events are lost: the report will have gaps",
        look="the store, the disk of the spool, `sink_failed` events",
    ),
)


def rule_file() -> dict[str, Any]:
    """The contents of a Prometheus rule file."""
    recordings = [{"record": rule.record, "expr": rule.expr} for rule in RECORDINGS]
    alerts = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.wait,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": f"{{{{ $labels.run }}}}: {alert.summary}", "look": alert.look},
        }
        for alert in ALERTS
    ]
    return {
        "groups": [{"name": "maskclip", "rules": recordings}, {"name": "maskclip-alerts", "rules": alerts}]
    }
