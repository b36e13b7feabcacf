"""Configuration of Prometheus and Alertmanager: a start that works, to be taken over into one's own."""

from typing import Any

from system.monitoring.alerts import JOB

RULES_FILE = "maskclip.rules.yml"


def prometheus_config() -> dict[str, Any]:
    """Finds runs by what `telemetry.prometheus.targets` keeps, in the folder `targets` beside the file."""
    return {
        "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
        "rule_files": [RULES_FILE],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": ["127.0.0.1:9093"]}]}]},
        "scrape_configs": [
            {
                "job_name": JOB,
                "honor_labels": True,  # the trainer names the run, and so does its target for `up`
                "file_sd_configs": [{"files": ["targets/*.json"], "refresh_interval": "15s"}],
            }
        ],
    }


def alertmanager_config() -> dict[str, Any]:
    """One notification for each run and alert; pages repeat hourly, tickets daily. Addresses are examples."""
    return {
        "route": {
            "receiver": "tickets",
            "group_by": ["run", "alertname"],
            "group_wait": "30s",
            "group_interval": "5m",
            "repeat_interval": "24h",
            "routes": [{"matchers": ['severity="page"'], "receiver": "on-call", "repeat_interval": "1h"}],
        },
        "inhibit_rules": [
            {
                "source_matchers": ['alertname="MaskclipTrainerDown"'],
                "target_matchers": ['alertname=~"MaskclipNoProgress|MaskclipGoodputLow"'],
                "equal": ["run"],
            }
        ],
        "receivers": [
            {"name": "on-call", "webhook_configs": [{"url": "http://pager.example/maskclip"}]},
            {"name": "tickets", "webhook_configs": [{"url": "http://tickets.example/maskclip"}]},
        ],
    }
