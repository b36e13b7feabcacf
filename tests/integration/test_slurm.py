"""The rendered script on a real Slurm: stopped ahead of its time limit, requeued, resumed, finished, and the
same run as one that nobody stopped."""

import sys
import time

import pytest

from cluster.store import open_store
from system.checkpoints.checkpoint import committed_steps
from tests.support import paced_maskclip
from tests.support.runs import instants, live_steps, maskclip, write_recipe
from tests.support.slurm import slurm, why_not

STOP_STEP = 6


@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_a_job_is_stopped_ahead_of_its_limit_requeued_and_finished(tmp_path, train_data, undisturbed_run):
    recipe, run, log = write_recipe(tmp_path), tmp_path / "run", tmp_path / "job.log"
    # The least limit is a minute; with one second of notice Slurm signals in its second half.
    done = maskclip(
        "render",
        "slurm",
        recipe,
        "device=cpu",
        "processes=2",
        "cpus=1",
        "minutes=1",
        "notice_seconds=1",
        f"program={sys.executable} {paced_maskclip.__file__}",
        f"prepare=export PACED_STEPS={STOP_STEP}",
        f"settings=[run.uri={run},data.uri={train_data}]",
        f"log={log}",
        f"output={tmp_path / 'job.sh'}",
    )
    assert done.returncode == 0, done.stderr
    with slurm(tmp_path / "slurm") as command:
        job = command("sbatch", "--parsable", f"--chdir={tmp_path}", str(tmp_path / "job.sh")).strip()
        wait_for_end(command, job)
    said = log.read_text()
    assert "attempt 0 of job" in said, said
    stopped = [end["exit_code"] for end in instants(run, "attempt_ended")]
    assert stopped == [75, 0], said
    assert [start["resumed_step"] for start in instants(run, "attempt_started")] == [None, STOP_STEP + 1]
    assert STOP_STEP + 1 in committed_steps(open_store(str(run)))
    ours, theirs = live_steps(run), live_steps(undisturbed_run)
    assert ours.keys() == theirs.keys()
    for step, values in theirs.items():
        assert (ours[step]["loss"], ours[step]["ids_digest"]) == (values["loss"], values["ids_digest"])


def wait_for_end(command, job: str) -> None:
    """Of a job that goes on after its requeue."""
    limit = time.monotonic() + 200
    state = ""
    while time.monotonic() < limit:
        facts = dict(
            word.split("=", 1) for word in command("scontrol", "show", "job", job).split() if "=" in word
        )
        state = facts["JobState"]
        if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
            assert state == "COMPLETED", facts
            assert facts["Restarts"] == "1"
            return
        time.sleep(0.5)
    raise AssertionError(f"job {job} is still {state}")
