"""Attempts of `maskclip train` whose ranks go wrong; everything else is the real command.

Run as a program it is a process that has imported all that a rank needs, and forks ranks for every attempt
that a line of its input asks for: imports are most of the time of a short attempt.

A fault is [kind, rank, first window, last window, times]: in these slot windows `kind` happens to that rank,
so many times in all: loss (its share is infinite), gradient (that of a layer is), memory (a bit of a
parameter's copy flips), hang, spike (what all ranks are told of the loss is ten times as much).
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.local_launch import free_port

Fault = tuple[str, int, int, int, int]


class PoisonedRuns:
    """The process, for a test."""

    def __enter__(self) -> Self:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        argv = [sys.executable, "-m", "tests.support.poisoned_runs"]
        # One thread per rank: there are two on most machines of the tests.
        self._process = subprocess.Popen(
            argv, process_group=0, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # with every rank that is left
        self._process.communicate()

    def train(
        self,
        recipe: Path,
        run: Path,
        data: str,
        *knobs: str,
        faults: Sequence[Fault] = (),
        processes: int = 2,
    ) -> list[int]:
        """One attempt; the exit codes by rank."""
        argv = [str(recipe), f"run.uri={run}", f"data.uri={data}", *knobs]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([argv, faults, processes]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def infinite_gradient(module: Any) -> Any:
    """From now on, what flows back into `module` is infinite; a handle that ends it."""

    def hook(_: Any, inputs: Any, output: Any) -> None:
        output.register_hook(lambda gradient: gradient * float("inf"))

    return module.register_forward_hook(hook)


def poison(faults: list[list[Any]], rank: int, global_batch: int) -> None:
    import torch

    from system.engine.accumulate import Accumulator

    original = Accumulator.forward

    def forward(self: Accumulator, batch: Any, *args: Any, **named: Any) -> Any:
        window, objective = int(batch["slot"][0]) // global_batch, self._engine.objective
        found = [f for f in faults if f[1] == rank and f[2] <= window <= f[3] and f[4] > 0]
        kinds = [fault[0] for fault in found]
        for fault in found:
            fault[4] -= 1
        if "hang" in kinds:
            time.sleep(600)
        if "memory" in kinds:
            next(objective.vision.parameters()).data.view(-1).view(torch.int32)[0] ^= 1 << 20
        handle = infinite_gradient(objective.vision.input_norm) if "gradient" in kinds else None
        output = original(self, batch, *args, **named)
        if handle is not None:
            handle.remove()
        if "spike" in kinds:
            output = output._replace(total=output.total * 10)
        return output._replace(loss=output.loss * float("inf")) if "loss" in kinds else output

    Accumulator.forward = forward  # type: ignore[method-assign]


def start_rank(argv: list[str], faults: list[list[Any]], processes: int, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        from system import cli
        from system.config import load_train_recipe

        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        poison(faults, rank, load_train_recipe(argv[0], argv[1:]).data.global_batch)
        code = cli.main(["train", *argv])
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def serve() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    import system.train  # noqa: F401

    _ = deepspeed.ops.__compatible_ops__  # is asked of the compiler once, and not in every rank
    for line in sys.stdin:
        argv, faults, processes = json.loads(line)
        port = free_port()
        ranks = [start_rank(argv, faults, processes, rank, port) for rank in range(processes)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    serve()
