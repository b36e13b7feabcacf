"""The doctor's look at a cluster: two real raylets on this machine, and findings that were made up."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from cluster.node_probe import Clock, offset_of
from system import cli, cluster_doctor, doctor
from system.cluster_doctor import merge
from system.doctor import Check
from system.gpu_health import reported


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", str(cluster.address))
    yield cluster
    cluster.shutdown()


def test_two_nodes_that_are_fit(
    two_nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    # Importing DeepSpeed takes each node seconds, and is not what this is about.
    monkeypatch.setattr(cluster_doctor, "run_checks", quick_checks)
    assert cli.main(["doctor", str(tmp_path), "--cluster", "--json"]) == 0
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert found["nodes"]["detail"].startswith("2: ")
    assert "on" not in found["python"]["detail"].split()
    assert {"clocks", "way between nodes", "store, writing", "store, reading"} <= found.keys()
    assert "one winner among 2 nodes" in found["put-if-absent over nodes"]["detail"]
    assert list(tmp_path.iterdir()) == []


def quick_checks(uri: str | None) -> list[Check]:
    return [*doctor._python(), *doctor._disk(uri), *doctor._shared_memory()]


def test_without_a_cluster_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cli.main(["doctor", "--cluster"]) == 64
    assert "RAY_ADDRESS is not set" in capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert cli.main(["doctor", "--cluster"]) == 64
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "RAY_ADDRESS=127.0.0.1:9" in lines[0]


def test_other_versions_on_one_node_are_a_failure():
    same, other = Check("package torch", "ok", "2.13.0"), Check("package torch", "ok", "2.11.0")
    disk = Check("free disk", "warn", "3 GiB", "free some")
    merged = merge({"a": [same], "b": [same, disk], "c": [other]})
    torch, free = merged
    assert torch.status == "fail"
    assert torch.detail == "2.13.0 on a, b; 2.11.0 on c"
    assert (free.status, free.detail, free.fix) == ("warn", "3 GiB on b", "free some")
    assert merge({"a": [same], "b": [same]}) == [same]


def test_the_fastest_answer_gives_the_offset():
    slow, fast = Clock(100.0, 111.0, 104.0), Clock(200.0, 210.01, 200.02)
    assert offset_of([slow, fast]) == pytest.approx(10.0)


def test_what_the_driver_reports_of_gpus():
    lines = "0, 0, Not Active\n1, 3, Not Active\n2, [N/A], Active\nno devices were found\n"
    assert reported(lines) == {
        1: "3 uncorrected memory errors",
        2: "slowed down by the hardware (heat or power)",
    }
