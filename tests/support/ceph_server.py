"""A real Ceph object gateway for the tests: a monitor, an OSD on a sparse file, a radosgw, all on 127.0.0.1.

Needs root and Debian's radosgw, ceph-mon, ceph-osd and ceph-common. Unlike the other test server it checks
signatures.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

from cluster.local_launch import free_port

_PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool")
_DISK_BYTES = 16 << 30
"""Sparse: only what is written takes space."""
_START_SECONDS = 90.0


def missing() -> str | None:
    """Why no gateway can be started here; None if one can."""
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install radosgw ceph-mon ceph-osd ceph-common"
    return None if os.geteuid() == 0 else "Ceph's monitor and OSD need root"


class CephServer:
    """One gateway. `env` is what a client needs in its environment."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self.port, self._mon_port = free_port(), free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._fsid = str(uuid.uuid4())
        self.env: dict[str, str] = {}

    def start(self) -> None:
        """Make the cluster, start it and wait until it answers. RuntimeError with the logs if it does not."""
        self._folder.mkdir(parents=True)
        self._write_config()
        try:
            self._start_monitor()
            self._start_osd()
            self._start_gateway()
        except (subprocess.SubprocessError, OSError, TimeoutError) as error:
            self.kill()
            logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in self._folder.glob("*.log"))
            raise RuntimeError(f"Ceph did not start: {error}\n{logs}") from error

    def kill(self) -> None:
        """Stop it at once, like a machine that loses power."""
        for process in reversed(self._processes):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def make_bucket(self, name: str) -> str:
        """Create a bucket and return its address `s3://name`."""
        import botocore.session

        client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.env["AWS_DEFAULT_REGION"],
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
        )
        client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def _write_config(self) -> None:
        """Nothing of it is for keeps: no replica, no manager, small caches, small pools."""
        folder = self._folder
        (folder / "ceph.conf").write_text(
            f"""[global]
fsid = {self._fsid}
mon_host = v2:127.0.0.1:{self._mon_port}
public_addr = 127.0.0.1
keyring = {folder}/keyring
log_file = {folder}/$name.log
admin_socket = {folder}/$name.asok
run_dir = {folder}
pid_file =
crash_dir = {folder}
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_data = {folder}/mon
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
mon_max_pg_per_osd = 1000
mon_data_avail_warn = 1
mon_data_avail_crit = 1
mon_osd_full_ratio = 0.99
osd_data = {folder}/osd
osd_objectstore = bluestore
osd_memory_target = 939524096
bluestore_block_path = {folder}/disk
bluestore_block_size = {_DISK_BYTES}
bluestore_fsck_on_mount = false
debug_ms = 0
rgw_frontends = beast endpoint=127.0.0.1:{self.port}
rgw_data = {folder}/rgw
rgw_thread_pool_size = 32
rgw_enable_usage_log = false
"""
        )

    def _tool(self, name: str, *words: str) -> str:
        return _run(name, "--conf", f"{self._folder}/ceph.conf", *words)

    def _serve(self, name: str, *words: str) -> None:
        command = [name, "--conf", f"{self._folder}/ceph.conf", "--foreground", *words]
        with (self._folder / f"{name}.out.log").open("ab") as output:
            self._processes.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )
            )

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Until what was started last answers. OSError if a daemon has ended, TimeoutError."""
        give_up = time.monotonic() + _START_SECONDS
        while not ready():
            for process in self._processes:
                if process.poll() is not None:
                    raise OSError(f"{process.args[0]} has ended with {process.returncode}")  # type: ignore[index]
            if time.monotonic() > give_up:
                raise TimeoutError(f"no answer within {_START_SECONDS:g} s")
            time.sleep(0.1)

    def _start_monitor(self) -> None:
        keyring, monmap = str(self._folder / "keyring"), str(self._folder / "monmap")
        address = f"[v2:127.0.0.1:{self._mon_port}]"
        _run("ceph-authtool", "-C", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        _run("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *_all_caps("--cap"))
        _run("monmaptool", "--create", "--addv", "a", address, "--fsid", self._fsid, monmap)
        self._tool("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        self._serve("ceph-mon", "-i", "a")
        self._wait(lambda: _listens(self._mon_port))

    def _start_osd(self) -> None:
        folder, identity = self._folder / "osd", str(uuid.uuid4())
        folder.mkdir()
        keyring = str(folder / "keyring")
        self._tool("ceph", "auth", "get-or-create", "osd.0", *_all_caps(), "-o", keyring)
        self._tool("ceph", "osd", "new", identity, "0")
        self._tool("ceph-osd", "-i", "0", "--keyring", keyring, "--mkfs", "--osd-uuid", identity)
        self._serve("ceph-osd", "-i", "0", "--keyring", keyring)

    def _start_gateway(self) -> None:
        self._serve("radosgw", "-n", "client.admin", "--rgw-zone", "default")
        self._wait(self._answers)
        user = json.loads(self._tool("radosgw-admin", "user", "create", "--uid=test", "--display-name=test"))
        self.env = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": user["keys"][0]["access_key"],
            "AWS_SECRET_ACCESS_KEY": user["keys"][0]["secret_key"],
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.endpoint, timeout=1):
                return True
        except urllib.error.HTTPError as error:
            return error.code < 500
        except OSError:
            return False


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _all_caps(option: str = "") -> list[str]:
    words = [(option, daemon, "allow *") for daemon in ("mon", "osd", "mgr")]
    return [word for group in words for word in group if word]


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words[:5])} ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout
