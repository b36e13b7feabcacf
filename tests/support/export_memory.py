"""``export_memory.py TOWER RUN...`` prints by how many bytes the export of each run folder raises the peak of
this process's memory, and the size of the last one's weights. Needs Linux's /proc."""

import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from system.export.export import ExportConfig, export


def memory(what: str) -> int:
    """Bytes: VmRSS, what is resident now, or VmHWM, the most that was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def added(run: str, tower: Literal["student", "teacher"]) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory("VmRSS")
        export(run, ExportConfig(output=f"{folder}/out", tower=tower))
        peak = memory("VmHWM")
        return peak - before, Path(folder, "out/model.safetensors").stat().st_size


def main(tower: Any, *runs: str) -> None:
    added(runs[0], tower)  # what the first export imports counts for neither
    found = [added(run, tower) for run in runs]
    print(*(peak for peak, _ in found), found[-1][1])


if __name__ == "__main__":
    main(*sys.argv[1:])
