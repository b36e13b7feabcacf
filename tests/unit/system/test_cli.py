"""The command line: what it loads, what it answers, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.store import open_store
from data_pipeline.takedown import load_tombstones
from system.cli import main
from system.commands import duration, preprocess_note
from tests.support.small_dataset import flip_byte
from tests.support.small_set import small_sample, write_set

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "ray", "deepspeed", "matplotlib")


def loaded(*words: str) -> list[str]:
    """Which of the heavy libraries are loaded once the command has run."""
    code = (
        "import contextlib, io, sys\n"
        "from system.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    main({list(words)!r})\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1].replace("'", '"'))


@pytest.mark.parametrize("words", [("--help",), ("dataset", "stats", "--help"), ("train", "--help")])
def test_help_loads_nothing_heavy(words: tuple[str, ...]) -> None:
    assert loaded(*words) == []


@pytest.mark.parametrize("action", ["verify", "audit", "stats"])
def test_commands_of_data_sets_load_nothing_heavy(tmp_path: Path, action: str) -> None:
    write_set(tmp_path)
    assert loaded("dataset", action, str(tmp_path)) == []


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict]:
    """Exit code and JSON document of a command."""
    capsys.readouterr()
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_audit_is_0_or_65(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(tmp_path, (3, 2), ("small",))
    code, data = run(capsys, "dataset", "audit", tmp_path)
    assert (code, data["status"], data["rows_in"], data["kept"], data["dropped"]) == (0, "whole", 6, 5, 1)
    flip_byte(tmp_path / "shard-000000.tar", 600)
    code, data = run(capsys, "dataset", "audit", tmp_path, "workers=1")
    assert (code, data["status"]) == (65, "damaged")
    assert "shard-000000.tar" in data["problems"][0]
    assert main(["dataset", "audit", str(tmp_path)]) == 65
    assert "shard-000000.tar" in capsys.readouterr().out
    code, data = run(capsys, "dataset", "audit", tmp_path / "nowhere")
    assert (code, data["error"]) == (65, "ObjectNotFound")


def test_remove(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    write_set(folder)
    urls = [small_sample(number).url for number in (0, 1)]
    code, data = run(capsys, "dataset", "remove", folder, "by=url", f"values={','.join(map(str, urls))}")
    assert (code, data["removed"]) == (0, 2)
    (tmp_path / "list").write_text(f"{small_sample(2).id}\n\n{small_sample(3).id}\n77\n")
    words = ("dataset", "remove", folder, "by=id", f"list={tmp_path / 'list'}", "reason=they = asked")
    code, data = run(capsys, *words)
    assert (code, data["removed"], data["not_found"]) == (65, 2, ["77"])
    code, data = run(capsys, *words, "missing=ok")
    assert (code, data["removed"], data["already_removed"]) == (0, 0, 2)
    assert len(load_tombstones(open_store(str(folder)))) == 4
    assert "they = asked" in next((folder / "tombstones").glob("000002-*")).read_text()


def test_a_hash_of_digits_stays_a_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = "12345e67".rjust(64, "0")
    write_set(tmp_path, changes={0: {"sha256": bytes.fromhex(digits)}})
    code, data = run(capsys, "dataset", "remove", tmp_path, "by=sha256", f"values={digits}")
    assert (code, data["removed"]) == (0, 1)


def test_merge_diff_and_stats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = tmp_path / "dt=1" / "a", tmp_path / "b", tmp_path / "c"
    write_set(a)
    write_set(b, (1,), origin="b.tar")
    code, data = run(capsys, "dataset", "merge", a, f"output={c}", b, "workers=2")
    assert (code, data["samples"], data["shards"]) == (0, 6, 3)
    code, data = run(capsys, "dataset", "diff", a, c)
    assert (code, data["same"], data["only_b"]["count"]) == (0, 5, 1)
    code, data = run(capsys, "dataset", "stats", c, f"output={tmp_path / 'out'}")
    assert (code, data["samples"]) == (0, 6)
    assert [Path(path).name for path in data["written"]] == ["stats.json", "stats.png"]
    for words in (("diff", a, c), ("stats", c), ("audit", c), ("verify", c)):
        assert main(["dataset", *map(str, words)]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("remove", "SET", "values=a"), "by: missing"),
        (("remove", "SET", "by=name", "values=a"), "none of url, sha256, id, source"),
        (("remove", "SET", "by=id"), "values=a,b or list=FILE"),
        (("remove", "SET", "by=id", "values=1", "list=x"), "either"),
        (("remove", "SET", "by=id", "list=/nowhere/at/all"), "/nowhere/at/all"),
        (("remove", "SET", "by=id", "values=1", "values=2"), "twice"),
        (("audit", "SET", "workers=0"), "workers"),
        (("audit", "SET", "workers=two"), "workers"),
        (("audit", "SET", "worker=2"), "unknown key"),
        (("stats", "SET", "out"), "key=value"),
        (("verify", "SET", "x=1"), "unknown key"),
        (("merge", "SET", "SET"), "output: missing"),
        (("merge", "SET", "output=x"), "two data sets or more"),
        (("merge", "SET", "SET", "output=x", "inputs=3"), "inputs: unknown key"),
    ],
)
def test_wrong_settings_are_64_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    write_set(tmp_path / "set")
    named = [str(tmp_path / "set") if word == "SET" else word for word in words]
    assert main(["dataset", *named]) == 64
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("maskclip")]
    assert len(lines) == 1
    assert says in lines[0]


def test_the_progress_of_a_preprocess_job_says_rate_drops_and_time_left() -> None:
    state = {
        "stage": "stage",
        "done": 3,
        "total": 10,
        "rows": 12_000,
        "kept": 11_400,
        "dropped": 600,
        "skipped": 2,
        "rows_per_second": 812.4,
        "seconds_left": 3723.0,
    }
    assert (
        preprocess_note(state)
        == "stage, 12,000 rows, 600 dropped (5.0%), 2 done earlier, 812 rows/s, 1:02:03 left"
    )
    nothing = {**state, "rows": 0, "dropped": 0, "skipped": 0, "rows_per_second": 0.0, "seconds_left": None}
    assert preprocess_note(nothing) == "stage, 0 rows"
    assert [duration(seconds) for seconds in (0, 59.6, 3600)] == ["0:00", "1:00", "1:00:00"]
