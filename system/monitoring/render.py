"""Write the monitoring's configuration into a folder: `maskclip render prometheus|grafana`."""

import json
from collections.abc import Callable
from pathlib import Path

import yaml

from cluster.errors import ConfigError
from system.monitoring.alerts import rule_file
from system.monitoring.dashboards import dashboards, provisioning
from system.monitoring.scrape import RULES_FILE, alertmanager_config, prometheus_config


def prometheus_files() -> dict[str, str]:
    """File name -> text."""
    return {
        "prometheus.yml": _yaml(prometheus_config()),
        RULES_FILE: _yaml(rule_file()),
        "alertmanager.yml": _yaml(alertmanager_config()),
    }


def grafana_files() -> dict[str, str]:
    """File name -> text."""
    pages = {name: json.dumps(page, indent=1) + "\n" for name, page in dashboards().items()}
    return {"provisioning.yml": _yaml(provisioning()), **pages}


KINDS: dict[str, Callable[[], dict[str, str]]] = {"prometheus": prometheus_files, "grafana": grafana_files}


def render(kind: str, output: Path) -> list[Path]:
    """Write the files of `kind` into the folder `output`; returns their paths.

    Raises:
        ConfigError: the folder cannot be written.
    """
    written = []
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in KINDS[kind]().items():
            path = output / name
            path.write_text(text, "utf-8")
            written.append(path)
    except OSError as error:
        raise ConfigError(f"{output}: cannot write there ({error.strerror}); choose another folder") from None
    return written


def _yaml(values: dict) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
