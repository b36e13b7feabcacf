"""Job files for batch systems: a Slurm script, a KubeRay RayJob, a cluster file for `ray up`.

Pure: text from a description. Slurm's script is a template; the others are YAML and are made from plain
values, so that they cannot be anything but YAML.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import yaml
from pydantic import Field

from cluster.errors import ConfigError

Kind = Literal["slurm", "kuberay", "ray-up"]
RECIPE_FOLDER = "/etc/maskclip"
METRICS_PORT = 9400
_TEMPLATES = Path(__file__).parent / "templates"
_SPARE_SECONDS = 30
"""Between the end of the notice and the SIGKILL of Kubernetes."""


class _Plain(yaml.SafeDumper):
    """Without anchors, which few people read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What a batch system has to know besides the recipe."""

    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$")] = "maskclip"
    """Of the job and of all that belongs to it."""
    nodes: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Machines."""
    processes: Annotated[int, Field(ge=1, le=64)] = 8
    """Ranks of each machine, one per GPU or CPU slot."""
    device: Literal["gpu", "cpu"] = "gpu"
    """What a rank computes on."""
    cpus: Annotated[int, Field(ge=1, le=1024)] = 8
    """CPUs of each rank, for its loader workers too."""
    memory_gb: Annotated[int, Field(ge=0, le=65_536)] = 0
    """Memory of each machine; 0: as the batch system does without being told. Kubernetes needs it."""
    minutes: Annotated[int, Field(ge=1)] = 1440
    """Time limit of one start of the job (Slurm); the run goes on over as many as it takes."""
    notice_seconds: Annotated[int, Field(ge=1, le=3600)] = 120
    """Between the signal or notice to stop and the end of the machine: time for the last checkpoint."""
    restarts: Annotated[int, Field(ge=0)] = 20
    """Starts after failures in a row (Slurm), or of the whole cluster (KubeRay)."""
    partition: str = ""
    """Of Slurm; empty: the default one."""
    account: str = ""
    """Of Slurm; empty: the default one."""
    prepare: str = ""
    """Shell line before the ranks start, such as one that activates an environment (Slurm)."""
    program: str = "maskclip"
    """How the ranks call this program (Slurm)."""
    log: str = "maskclip-%j.log"
    """Log file; %j is the job's number (Slurm)."""
    image: str = ""
    """Container image with this program, see the Dockerfile (KubeRay, ray up)."""
    ray_version: str = "2.60.0"
    """The one in the image (KubeRay)."""
    hosts: tuple[str, ...] = ()
    """Addresses of the machines, the head first (ray up)."""
    user: str = "ubuntu"
    """Who logs in there (ray up)."""
    settings: tuple[str, ...] = ()
    """key=value of the recipe that the job gives, such as [run.uri=s3://bucket/run]."""
    output: str = ""
    """Where the file goes; empty: stdout."""

    @property
    def workers(self) -> int:
        return self.nodes * self.processes


def render(kind: Kind, recipe: Path, job: JobConfig) -> str:
    """The job file.

    Args:
        recipe: the recipe's file; KubeRay's and `ray up`'s carry its text, Slurm's the path.

    Raises:
        ConfigError: something is not set that this kind cannot do without.
    """
    return {"slurm": _slurm, "kuberay": _kuberay, "ray-up": _ray_up}[kind](recipe, job)


def _slurm(recipe: Path, job: JobConfig) -> str:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string((_TEMPLATES / "slurm.sh.j2").read_text("utf-8"))
    words = [*shlex.split(job.program), "train", str(recipe.resolve()), *job.settings]
    return template.render(job=job, command=shlex.join(words))


def _launch(recipe: Path, job: JobConfig) -> str:
    """The command that runs the recipe on a Ray cluster."""
    settings = {
        "launch.workers": job.workers,
        "launch.device": job.device,
        "launch.cpus_per_worker": job.cpus,
        "preemption.notice_seconds": job.notice_seconds,
        "telemetry.prometheus.port": METRICS_PORT,
        "telemetry.prometheus.host": "0.0.0.0",
    }
    given = [f"{key}={value}" for key, value in settings.items()]
    return shlex.join(["maskclip", "launch", f"{RECIPE_FOLDER}/{recipe.name}", *given, *job.settings])


def _kuberay(recipe: Path, job: JobConfig) -> str:
    if not job.image or not job.memory_gb:
        raise ConfigError("a pod needs an image and a memory size; give image=... and memory_gb=...")
    labels = {"app.kubernetes.io/name": job.name, "app.kubernetes.io/part-of": "maskclip"}
    meta = {"name": job.name, "labels": labels}
    recipe_map = f"{job.name}-recipe"
    objects: list[dict[str, Any]] = [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": recipe_map, "labels": labels},
            "data": {recipe.name: recipe.read_text("utf-8")},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": f"{job.name}-metrics", "labels": labels},
            "spec": {
                "clusterIP": "None",  # every pod has an address of its own: the first rank may be on any
                "selector": {**labels, "app.kubernetes.io/component": "worker"},
                "ports": [{"name": "metrics", "port": METRICS_PORT, "targetPort": "metrics"}],
            },
        },
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": meta,
            "spec": {
                "entrypoint": _launch(recipe, job),
                "submissionMode": "K8sJobMode",
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": 600,
                "backoffLimit": job.restarts,
                "rayClusterSpec": {
                    "rayVersion": job.ray_version,
                    "headGroupSpec": {
                        # No rank runs on the head, so that it may live on a small and lasting machine.
                        "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
                        "template": _pod(job, labels, recipe_map, head=True),
                    },
                    "workerGroupSpecs": [
                        {
                            "groupName": "ranks",
                            "replicas": job.nodes,
                            "minReplicas": job.nodes,
                            "maxReplicas": job.nodes,
                            "rayStartParams": {},
                            "template": _pod(job, labels, recipe_map, head=False),
                        }
                    ],
                },
            },
        },
    ]
    return yaml.dump_all(objects, Dumper=_Plain, sort_keys=False, width=100)


def _pod(job: JobConfig, labels: dict[str, str], recipe_map: str, *, head: bool) -> dict[str, Any]:
    """Template of the head's pod, or of a machine with ranks."""
    cpus = 2 if head else job.cpus * job.processes
    resources: dict[str, Any] = {"cpu": cpus, "memory": "8Gi" if head else f"{job.memory_gb}Gi"}
    if job.device == "gpu" and not head:
        resources["nvidia.com/gpu"] = job.processes
    health = {"exec": {"command": ["ray", "health-check"]}} if head else {"tcpSocket": {"port": 52365}}
    container: dict[str, Any] = {
        "name": "ray-head" if head else "ray-worker",
        "image": job.image,
        "ports": [{"name": "gcs", "containerPort": 6379}, {"name": "dashboard", "containerPort": 8265}]
        if head
        else [{"name": "metrics", "containerPort": METRICS_PORT}],
        "resources": {"requests": resources, "limits": resources},
        "startupProbe": {**health, "periodSeconds": 5, "failureThreshold": 60, "timeoutSeconds": 5},
        "readinessProbe": {**health, "periodSeconds": 10, "failureThreshold": 3, "timeoutSeconds": 5},
        "livenessProbe": {**health, "periodSeconds": 15, "failureThreshold": 8, "timeoutSeconds": 5},
        "volumeMounts": [
            {"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    if not head:
        container["lifecycle"] = {"preStop": {"exec": {"command": ["bash", "-c", _drain(job)]}}}
    return {
        "metadata": {"labels": {**labels, "app.kubernetes.io/component": "head" if head else "worker"}},
        "spec": {
            "terminationGracePeriodSeconds": job.notice_seconds + _SPARE_SECONDS,
            "containers": [container],
            "volumes": [
                {"name": "recipe", "configMap": {"name": recipe_map}},
                {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
            ],
        },
    }


def _drain(job: JobConfig) -> str:
    """Before the pod's SIGTERM: tell Ray that the node goes, and leave the ranks the notice."""
    return (
        "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the pod is being deleted' "
        f"--deadline-remaining-seconds {job.notice_seconds}; sleep {job.notice_seconds}"
    )


def _ray_up(recipe: Path, job: JobConfig) -> str:
    if len(job.hosts) != job.nodes:
        raise ConfigError(
            f"{len(job.hosts)} addresses for {job.nodes} machines; give hosts=[HEAD,...] and nodes=..."
        )
    values: dict[str, Any] = {
        "cluster_name": job.name,
        "provider": {"type": "local", "head_ip": job.hosts[0], "worker_ips": list(job.hosts[1:])},
        "auth": {"ssh_user": job.user},
        "max_workers": job.nodes - 1,
        "min_workers": job.nodes - 1,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "file_mounts": {f"{RECIPE_FOLDER}/{recipe.name}": str(recipe.resolve())},
        "head_start_ray_commands": [
            "ray stop",
            "ulimit -n 65536; ray start --head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            "ulimit -n 65536; ray start --address=$RAY_HEAD_IP:6379",
        ],
    }
    if job.image:
        run_options = ["--ulimit nofile=65536:65536", "--shm-size=16g"]
        values["docker"] = {
            "image": job.image,
            "container_name": job.name,
            "run_options": [*run_options, "--gpus=all"] if job.device == "gpu" else run_options,
        }
    header = f"# ray up THIS_FILE, then: ray exec THIS_FILE {shlex.quote(_launch(recipe, job))}\n"
    return header + yaml.dump(values, Dumper=_Plain, sort_keys=False, width=100)
