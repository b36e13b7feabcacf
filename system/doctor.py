"""`maskclip doctor`: is this machine fit to preprocess and train, and if not, what to do about it.

Every check returns a value and none raises: the point is to see all problems at once.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from cluster.errors import MaskClipError
from cluster.store import ObjectStore, StoreConfig, open_store
from model.attention import is_deterministic, resolve_backend
from system.gpu_health import QUERY, reported, wrong_sums

DISTRIBUTION = "maskclip"
SUPPORTED_PYTHON = ((3, 11), (3, 12))
GIB = 1 << 30
# Rough floors: a shard, its index and one checkpoint of the largest preset are a few GiB; Ray and the loader
# workers pass arrays through shared memory; Ray opens several descriptors per worker process.
DISK_WARN, DISK_FAIL = 10 * GIB, GIB
SHM_WARN = GIB
OPEN_FILES_WARN = 4096
IMPORT_SECONDS = 180
RACERS = 8
# A store that is away shall be told within a minute.
STORE = StoreConfig(deadline_seconds=15.0, attempts=3)

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    name: str
    status: Status
    detail: str
    fix: str = ""
    """What to do; empty when there is nothing to do."""
    exit_code: int = 0
    """What the command ends with, where this check says so itself."""


def run_checks(uri: str | None = None) -> list[Check]:
    """All checks in a fixed order; with `uri` also of the object store there (the probe is deleted)."""
    checks: list[Callable[[], list[Check]]] = [
        _python,
        _packages,
        _compiler,
        _torch,
        _gpu_health,
        _deepspeed,
        lambda: _disk(uri),
        _shared_memory,
        _open_files,
    ]
    if uri is not None:
        checks.append(lambda: _store(uri))
    return [check for run in checks for check in run()]


def _python() -> list[Check]:
    version = sys.version.split()[0]
    if sys.version_info[:2] in SUPPORTED_PYTHON:
        return [Check("python", "ok", version)]
    wanted = " or ".join(".".join(map(str, pair)) for pair in SUPPORTED_PYTHON)
    return [
        Check(
            "python", "fail", f"{version}, tested are {wanted}", f"make the environment with Python {wanted}"
        )
    ]


def _packages() -> list[Check]:
    try:
        required = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return [Check("packages", "warn", f"{DISTRIBUTION} itself is not installed", "run: pip install -e .")]
    checks = []
    for line in required:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        checks.append(_package(requirement))
    return checks


def _package(requirement: Requirement) -> Check:
    name = f"package {requirement.name}"
    fix = f"run: pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(name, "fail", f"not installed, needed: {requirement.specifier or 'any version'}", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(name, "fail", f"{version} is installed, needed: {requirement.specifier}", fix)
    return Check(name, "ok", version)


def _compiler() -> list[Check]:
    name = "c++ compiler"
    fix = "install one, for example: apt-get install g++ (DeepSpeed compiles an extension at its first start)"
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None or shutil.which(compiler) is None:
        return [Check(name, "fail", f"{compiler or 'c++, g++ and clang++'}: not found in PATH", fix)]
    result = _run([compiler, "--version"], seconds=30)
    if isinstance(result, str):
        return [Check(name, "fail", f"{compiler} does not run: {result}", fix)]
    checks = [Check(name, "ok", result.stdout.splitlines()[0] if result.stdout else compiler)]
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        checks.append(
            Check("python headers", "warn", f"{header}: not there", "install them (Debian: python3-dev)")
        )
    return checks


def _torch() -> list[Check]:
    checks = [Check("torch", "ok", f"{torch.__version__}, built for {_torch_build()}")]
    if not torch.cuda.is_available():
        checks.append(
            Check("gpu", "warn", "no CUDA device: training runs on the CPU, good for small runs only")
        )
        device = torch.device("cpu")
    else:
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        bf16 = "with" if torch.cuda.is_bf16_supported() else "without"
        checks.append(Check("gpu", "ok", f"{len(names)} x {names[0]}, {bf16} bf16"))
        device = torch.device("cuda")
    backend = resolve_backend("auto", device.type, torch.bfloat16)
    if device.type == "cuda" and backend != "xformers":
        fix = "install xformers built for this torch, its memory-efficient attention is faster"
        checks.append(Check("attention", "warn", f"{backend} on {device.type} in bf16", fix))
    else:
        checks.append(Check("attention", "ok", f"{backend} on {device.type} in bf16"))
    if is_deterministic(backend, device.type):
        checks.append(Check("determinism", "ok", f"{backend} attention repeats its gradients to the bit"))
    else:
        detail = f"{backend} attention on {device.type} adds gradients in another order each time"
        fix = "only where a run must repeat to the bit: set model.attention to math (docs/numerics.md)"
        checks.append(Check("determinism", "ok", detail, fix))
    return checks


def _gpu_health() -> list[Check]:
    if not torch.cuda.is_available():
        return []
    driver = _run(QUERY, seconds=30)
    problems = wrong_sums() | ({} if isinstance(driver, str) else reported(driver.stdout))
    if not problems:
        return [Check("gpu health", "ok", "no memory errors, no throttling, products repeat to the bit")]
    detail = "; ".join(f"GPU {index}: {found}" for index, found in problems.items())
    return [Check("gpu health", "fail", detail, "leave this node out and have the GPU replaced")]


def _torch_build() -> str:
    version = torch.version.cuda
    return f"CUDA {version}" if version else "CPU"


def _deepspeed() -> list[Check]:
    """In a process of its own: the import is slow, has side effects, and may take the interpreter with it."""
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    code = "import deepspeed; print('version', deepspeed.__version__)"
    result = _run([sys.executable, "-c", code], seconds=IMPORT_SECONDS, environment=environment)
    if isinstance(result, str):
        return [
            Check(
                "deepspeed",
                "fail",
                f"cannot be imported: {result}",
                "run: pip install --force-reinstall deepspeed",
            )
        ]
    version = re.findall(r"^version (\S+)$", result.stdout, flags=re.MULTILINE)
    return [Check("deepspeed", "ok", f"{version[-1] if version else 'unknown version'}, imports")]


def _run(
    command: list[str], *, seconds: float, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str] | str:
    """The finished process, or the last line of what went wrong."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit code {result.returncode}"
    return result


def _disk(uri: str | None) -> list[Check]:
    folder = Path.cwd() if uri is None or "://" in uri else _existing_parent(Path(uri))
    free = shutil.disk_usage(folder).free
    status: Status = "fail" if free < DISK_FAIL else "warn" if free < DISK_WARN else "ok"
    fix = "" if status == "ok" else f"free some space on the disk of {folder}, or work on another one"
    return [Check("free disk", status, f"{free / GIB:.1f} GiB at {folder}", fix)]


def _existing_parent(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _shared_memory() -> list[Check]:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return [Check("shared memory", "warn", f"{shm} is not there", "use a Linux machine for training")]
    free = shutil.disk_usage(shm).free
    fix = "" if free >= SHM_WARN else "give it more, for example: docker run --shm-size=8g"
    return [Check("shared memory", "warn" if fix else "ok", f"{free / GIB:.1f} GiB free in {shm}", fix)]


def _open_files() -> list[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    fix = "" if unlimited or soft >= OPEN_FILES_WARN else "raise it before the start: ulimit -n 65536"
    detail = (
        "no limit"
        if unlimited
        else f"{soft} (hard limit {hard if hard != resource.RLIM_INFINITY else 'none'})"
    )
    return [Check("open files", "warn" if fix else "ok", detail, fix)]


def _store(uri: str) -> list[Check]:
    folder = None if "://" in uri else Path(uri)
    new_folders = _missing_folders(folder) if folder else []
    try:
        store = open_store(uri, STORE)
        return _probe(store)
    except MaskClipError as error:
        return [
            Check(
                "store",
                "fail",
                str(error),
                "check the uri, AWS_ENDPOINT_URL, the credentials and the bucket",
                error.exit_code,
            )
        ]
    finally:
        for made in new_folders:
            if made.is_dir() and not any(made.iterdir()):
                made.rmdir()


def _missing_folders(folder: Path) -> list[Path]:
    folder = folder.absolute()
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _probe(store: ObjectStore) -> list[Check]:
    """Write, race, read back, list and delete one object: what every commit of a manifest rests on."""
    key = f"maskclip-doctor-{uuid.uuid4().hex}"
    values = [f"racer {index}".encode() for index in range(RACERS)]
    store.exists(key)  # one failure, before eight at once
    try:
        with ThreadPoolExecutor(RACERS) as pool:
            won = list(pool.map(lambda value: store.put_if_absent(key, value), values))
        kept = store.get(key)
        listed = any(item.key == key for item in store.list(key))
    except MaskClipError:
        with suppress(MaskClipError):  # what failed first is the news
            store.delete(key)
        raise
    store.delete(key)
    checks = [Check("store", "ok", f"{store.uri}: writes, reads, lists and deletes")]
    if not listed:
        checks = [
            Check(
                "store",
                "fail",
                f"{store.uri}: a new object is not listed",
                "use a store with consistent lists",
            )
        ]
    if won.count(True) == 1 and kept == values[won.index(True)]:
        return [*checks, Check("put-if-absent", "ok", f"exclusive, one winner among {RACERS} at once")]
    detail = f"{won.count(True)} of {RACERS} writers at once were told that they won"
    fix = "use a store that honours If-None-Match: *, otherwise two jobs can commit the same folder"
    return [*checks, Check("put-if-absent", "fail", detail, fix)]
