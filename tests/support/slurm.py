"""A Slurm of one node, with its own munge, in a folder. Needs root and Debian's slurmctld, slurmd, munge."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.local_launch import free_port

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged")
SLOTS = 2
_CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
JobRequeue=1
ReturnToService=2
OverTimeLimit=2
NodeName=localhost NodeAddr=127.0.0.1 CPUs={slots} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def why_not() -> str | None:
    """Why no Slurm can be started here."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return (
            f"Slurm is not installed ({', '.join(missing)}): Debian's slurmctld, slurmd, slurm-client, munge"
        )
    return None if os.geteuid() == 0 else "a Slurm of one's own needs root"


@contextmanager
def slurm(folder: Path) -> Iterator[Callable[..., str]]:
    """Yields a function that runs one of Slurm's commands and returns what it prints."""
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge/key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    config = folder / "slurm.conf"
    ports = {"ctld_port": free_port(), "node_port": free_port()}
    # Slurm shares out as many CPUs as the node shows, or more where its configuration is to be believed.
    config.write_text(
        _CONFIG.format(folder=folder, slots=SLOTS, **ports) + "SlurmdParameters=config_overrides\n"
    )
    environment = {**os.environ, "SLURM_CONF": str(config)}
    socket = folder / "munge/socket"
    munged = [
        "munged", "--force", f"--key-file={key}", f"--socket={socket}", f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge/seed",
    ]  # fmt: skip

    def run(*words: str) -> str:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    try:
        run(*munged)
        run("slurmctld", "-f", str(config))
        run("slurmd", "-N", "localhost", "-f", str(config))
        yield run
    finally:
        with suppress(AssertionError):
            run("scancel", "--user=root", "--signal=KILL", "--full")
        for name in ("slurmd", "slurmctld", "munged"):
            _end(folder / f"{name}.pid")


def _end(pid_file: Path) -> None:
    """Its daemon, and wait for it."""
    with suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        limit = time.monotonic() + 20
        while time.monotonic() < limit:
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
