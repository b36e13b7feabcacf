"""`maskclip doctor --cluster`: are all nodes of a Ray cluster fit to train together?

One actor per node makes the checks of `system.doctor` there, and those that need several nodes: the same
versions, clocks that agree, ways between the nodes and to the store, and a store that lets only one of all
nodes win. As there, every check returns a value and none raises; a node that does not answer is a finding.
"""

import os
import statistics
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cluster.errors import ConfigError, MaskClipError
from cluster.node_probe import LINK_BYTES, Clock, NodeProbe, offset_of
from cluster.ray_tasks import ray_session
from cluster.store import open_store
from system.doctor import STORE, Check, run_checks

ANSWER_SECONDS = 240.0
"""Importing DeepSpeed on a node for the first time takes minutes at worst."""
STORE_BYTES = 16 << 20
SKEW_WARN, SKEW_FAIL = 1.0, 600.0
"""Seconds. Event times of the nodes are compared; S3 refuses a signature that is 15 minutes off."""
SLOW_SHARE = 1 / 3
"""A way that has less than this share of the median is named."""
_SAME = ("python", "package ", "torch", "deepspeed")
"""Checks whose finding must be the same on all nodes, by the beginning of their name."""


@dataclass(frozen=True)
class Node:
    name: str
    """Host name and address."""
    address: str
    probe: Any
    """Handle of its `NodeProbe` actor."""


def run_cluster_checks(uri: str | None) -> list[Check]:
    """Checks of all nodes of the Ray cluster that RAY_ADDRESS names or that runs on this machine.

    Raises:
        ConfigError: there is no such cluster.
    """
    import ray

    if not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "--cluster: RAY_ADDRESS is not set; set it to host:port of the cluster's head, or to auto on one "
            "of its machines"
        )
    with ray_session(None):
        nodes = [_start(info) for info in _alive()]
        try:
            examined = _ask(nodes, lambda probe: probe.run.remote(run_checks, uri))
            there = [node for node in nodes if node.name in examined]
            lost = [node.name for node in nodes if node.name not in examined]
            checks = [_members(there, lost)]
            checks += merge({node.name: examined[node.name] for node in there})
            checks += _clocks(there)
            checks += _links(there)
            if uri is not None:
                checks += _store(there, uri)
            return checks
        finally:
            for node in nodes:
                ray.kill(node.probe)


def _alive() -> list[dict[str, Any]]:
    import ray

    return sorted((info for info in ray.nodes() if info["Alive"]), key=lambda info: info["NodeID"])


def _start(info: dict[str, Any]) -> Node:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actor: Any = ray.remote(NodeProbe)
    there = NodeAffinitySchedulingStrategy(info["NodeID"], soft=False)
    address = info["NodeManagerAddress"]
    name = f"{info['NodeManagerHostname']} ({address}, {info['NodeID'][:6]})"
    return Node(name, address, actor.options(num_cpus=0, scheduling_strategy=there).remote())


def _ask(nodes: list[Node], call: Callable[[Any], Any], seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
    """Answers by node, asked all at once; a node that fails or is silent for `seconds` is left out."""
    import ray
    from ray.exceptions import RayError

    calls = {node.name: call(node.probe) for node in nodes}
    ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=seconds) if calls else ([], [])
    answers = {}
    for name, ref in calls.items():
        with suppress(RayError):
            if ref in ready:
                answers[name] = ray.get(ref)
    return answers


def _members(there: list[Node], lost: list[str]) -> Check:
    if lost:
        fix = "look at Ray's log on these nodes; is maskclip installed there?"
        return Check("nodes", "fail", f"no answer from {', '.join(lost)}", fix)
    return Check("nodes", "ok", f"{len(there)}: {', '.join(node.name for node in there)}")


def merge(found: dict[str, list[Check]]) -> list[Check]:
    """The checks of several nodes in one list: one line where all found the same, else one per finding."""
    by_name: dict[str, dict[Check, list[str]]] = defaultdict(lambda: defaultdict(list))
    for node, checks in found.items():
        for check in checks:
            by_name[check.name][check].append(node)
    merged = []
    for name, findings in by_name.items():
        holders = sum(map(len, findings.values()))
        if len(findings) == 1 and holders == len(found):
            merged += findings
        elif name.startswith(_SAME):
            detail = "; ".join(f"{check.detail} on {', '.join(on)}" for check, on in findings.items())
            merged.append(Check(name, "fail", detail, "install requirements/lock.txt on every node"))
        else:
            merged += [
                Check(name, check.status, f"{check.detail} on {', '.join(on)}", check.fix, check.exit_code)
                for check, on in findings.items()
            ]
    return merged


def _clocks(nodes: list[Node]) -> list[Check]:
    """Offsets against this machine's clock, each sure to half the time of its fastest question."""
    offsets = {}
    for node in nodes:
        asked: list[Clock] = []
        for _ in range(5):
            before = time.time()
            answer = _ask([node], lambda probe: probe.clock.remote(), 10.0)
            if node.name in answer:
                asked.append(Clock(before, answer[node.name], time.time()))
        if asked:
            offsets[node.name] = offset_of(asked)
    if not offsets:
        return []
    low, high = min(offsets, key=lambda n: offsets[n]), max(offsets, key=lambda n: offsets[n])
    skew = offsets[high] - offsets[low]
    detail = f"{skew * 1000:.0f} ms apart"
    if skew < SKEW_WARN:
        return [Check("clocks", "ok", detail)]
    fix = f"run an NTP client on every node; {high} is ahead of {low}"
    return [Check("clocks", "fail" if skew > SKEW_FAIL else "warn", detail, fix)]


def _links(nodes: list[Node]) -> list[Check]:
    """Each node sends to the next one around the ring, one after the other."""
    if len(nodes) < 2:
        return []
    rates, broken = {}, []
    for sender, receiver in zip(nodes, nodes[1:] + nodes[:1], strict=True):
        way = f"{sender.name} to {receiver.name}"
        port = _ask([receiver], lambda probe: probe.listen.remote(), 10.0).get(receiver.name)
        address = receiver.address
        answer = _ask([sender], lambda probe, to=(address, port): probe.send.remote(*to), 60.0)
        rate = answer.get(sender.name)
        if isinstance(rate, float):
            rates[way] = rate
        else:
            broken.append(f"{way}: {rate or 'no answer'}")
    checks = [Check("way between nodes", "fail", line, "open all ports between the nodes") for line in broken]
    return checks + _rates("way between nodes", f"MB/s, {LINK_BYTES >> 20} MiB each", rates)


def _rates(name: str, unit: str, rates: dict[str, float]) -> list[Check]:
    if not rates:
        return []
    middle = statistics.median(rates.values())
    slow = [f"{where} {rate:.0f}" for where, rate in rates.items() if rate < middle * SLOW_SHARE]
    detail = f"{min(rates.values()):.0f} to {max(rates.values()):.0f} {unit}"
    if slow:
        return [
            Check(
                name, "warn", f"{detail}; slow: {', '.join(slow)}", "look at their links, or leave them out"
            )
        ]
    return [Check(name, "ok", detail)]


def _store(nodes: list[Node], uri: str) -> list[Check]:
    """All nodes race for one object, and write and read one of their own at the same time."""
    stem = f"maskclip-doctor-{uuid.uuid4().hex}"
    try:
        store = open_store(uri, STORE)
        start = time.time() + 1.0
        won = _ask(nodes, lambda probe: probe.race.remote(uri, STORE, f"{stem}-race", start), 60.0)
        rates = _ask(nodes, lambda probe: probe.store_rates.remote(uri, STORE, stem, STORE_BYTES), 120.0)
        with suppress(MaskClipError):
            store.delete(f"{stem}-race")
    except MaskClipError as error:
        return [Check("store from all nodes", "fail", str(error), "correct the uri", error.exit_code)]
    failed = [f"{node}: {told}" for node, told in {**won, **rates}.items() if isinstance(told, str)]
    if failed or len(won) < len(nodes):
        fix = "check credentials and network of these nodes"
        detail = "; ".join(failed) or "not every node answered"
        return [Check("store from all nodes", "fail", detail, fix)]
    winners = [node for node, told in won.items() if told]
    race = Check("put-if-absent over nodes", "ok", f"exclusive, one winner among {len(won)} nodes")
    if len(winners) != 1:
        fix = "use a store that honours If-None-Match: *; a local path must be the same disk on all nodes"
        race = Check(race.name, "fail", f"{len(winners)} of {len(won)} nodes were told that they won", fix)
    size = f"{STORE_BYTES >> 20} MiB per node at once"
    return [
        race,
        *_rates("store, writing", f"MB/s, {size}", {node: pair[0] for node, pair in rates.items()}),
        *_rates("store, reading", f"MB/s, {size}", {node: pair[1] for node, pair in rates.items()}),
    ]
