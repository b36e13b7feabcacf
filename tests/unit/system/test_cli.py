"""The command line: what it loads, what it answers, what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from cluster.store import open_store
from data_pipeline.upkeep.takedown import load_tombstones
from system import console
from system.cli import main
from system.commands import cell, duration, preprocess_note
from system.console import progress_bar
from tests.support.paths import ROOT
from tests.support.small_dataset import flip_byte
from tests.support.small_set import small_sample, write_set

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


EMOJI = "configs/emoji.yaml"
COMMANDS = ("preprocess", "train", "evaluate", "export", "report", "config", "doctor", "demo")


@pytest.mark.parametrize(
    "words",
    [("--help",), ("--version",), ("dataset", "stats", "--help"), ("config", EMOJI)]
    + [(command, "--help") for command in COMMANDS],
)
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


def test_settings_may_stand_behind_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(tmp_path / "set")
    where, output = str(tmp_path / "set"), f"output={tmp_path / 'out'}"
    for words in (
        ["dataset", "stats", where, "--json", output],
        ["dataset", "stats", "--json", where, output],
        ["--json", "dataset", "stats", where, output],
    ):
        assert main(words) == 0
        assert len(json.loads(capsys.readouterr().out)["written"]) == 2
    assert main(["dataset", "audit", where, "--json", "worker=2"]) == 64
    assert "worker: unknown key" in json.loads(capsys.readouterr().out)["message"]


def test_remove_counts_and_names_twins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(tmp_path, dropped=("near_duplicate",), details={0: "a.tar/003"})
    words = ["dataset", "remove", str(tmp_path), "by=source", "values=a.tar/lost-000"]
    assert main(words) == 0
    lines = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if "│" in line]
    shown = {name.strip(): value.strip() for name, value in lines}
    assert (shown["of them twins of duplicates"], shown["of them only alike"]) == ("1", "a.tar/003")
    code, data = run(capsys, *words)
    assert (code, data["removed"], data["already_removed"], data["near_twins"]) == (0, 0, 1, [])


def test_verify_reads_tombstones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(tmp_path)
    run(capsys, "dataset", "remove", tmp_path, "by=source", "values=a.tar/001")
    assert run(capsys, "dataset", "verify", tmp_path)[0] == 0
    (tombstone,) = (tmp_path / "tombstones").iterdir()
    flip_byte(tombstone, 30)
    code, data = run(capsys, "dataset", "verify", tmp_path)
    assert (code, data["status"]) == (65, "damaged")
    assert tombstone.name in data["problems"][0]


def test_the_table_of_stats_shows_aspects_as_ratios(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path)  # 10 to 14 wide, 20 high
    assert main(["dataset", "stats", str(tmp_path)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "aspect" in line)
    assert "min 0.5" in line
    assert "max 0.7" in line
    assert run(capsys, "dataset", "stats", tmp_path)[1]["aspect"]["max"] == 700


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


def helped(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "listed"),
    [
        (
            ("train",),
            ("run.steps: whole number", "model.vision.width", "default by model.preset", "optimizer.lr"),
        ),
        (("preprocess",), ("shards.samples_per_shard", "source.table.url_column")),
        (("evaluate",), ("data: text; required", "linear_probe")),
        (("export",), ("output: text; required", "open_clip")),
        (("report",), ("output",)),
        (("dataset", "remove"), ("by: url | sha256 | id | source; required",)),
        (("dataset", "merge"), ("output: text; required",)),
    ],
)
def test_help_lists_the_settings(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], listed: tuple[str, ...]
) -> None:
    text = helped(capsys, *words, "--help")
    assert [one for one in listed if one not in text] == []


@pytest.mark.parametrize(
    ("words", "positional"),
    [
        (("doctor",), ("r",)),
        (("demo",), ("f",)),
        (("checkpoint", "list"), ("r",)),
        (("checkpoint", "verify"), ("r",)),
        (("dataset", "verify"), ("d",)),
        (("dataset", "diff"), ("a", "b")),
    ],
)
def test_a_command_without_settings_offers_none_and_refuses_any(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], positional: tuple[str, ...]
) -> None:
    assert "key=value" not in helped(capsys, *words, "--help")
    assert main([*words, *positional, "x=1"]) == 64
    assert "x=1: unknown key" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert helped(capsys, "--version").split() == ["maskclip", version("maskclip")]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("train",), "maskclip: the following arguments are required: recipe; see `maskclip train --help`"),
        (("export", "run"), "maskclip: export: output: missing, give output=..."),
        (("evaluate", "run"), "maskclip: evaluate: data: missing, give data=..."),
        (("dataset", "merge", "a", "b"), "maskclip: dataset merge: output: missing, give output=..."),
        (
            ("config", EMOJI, "run.seed=1", "run.seed=2"),
            "maskclip: run.seed: given twice on the command line",
        ),
    ],
)
def test_what_is_missing_is_said_once(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(words) == 64
    assert capsys.readouterr().err.startswith(line)


def test_config_prints_a_recipe_that_it_takes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for recipe in (EMOJI, "configs/emoji_train_data.yaml"):
        assert main(["config", recipe]) == 0
        first = capsys.readouterr().out
        assert first.startswith("command: ")
        (tmp_path / "again.yaml").write_text(first)
        assert main(["config", str(tmp_path / "again.yaml")]) == 0
        assert capsys.readouterr().out == first


def test_progress_in_a_log_file_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress_bar("copied") as bar:
        bar(0, 10, "")
        bar(10, 10, "all")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(console, "PLAIN_EVERY_SECONDS", -1.0)
    with progress_bar("copied") as bar:
        bar(3, 10, "[1/2]")
    assert capsys.readouterr() == ("", "copied 3/10  [1/2]\n")


def test_progress_on_a_terminal_leaves_nothing() -> None:
    code = (
        "from system.console import progress_bar\n"
        "with progress_bar('copied') as bar:\n    bar(1, 2, 'half')\n    raise SystemExit(0)\n"
    )
    ours, theirs = os.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal whose other side is closed
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert done.returncode == 0
    assert b"half" in shown
    assert shown.endswith((b"\x1b[2K", b"\x1b[2K\r"))  # its lines are erased


def test_a_table_shows_numbers_to_four_digits_and_collections_in_words() -> None:
    shown = [cell(value) for value in (1.23456789012, 12345.678, 7, True, None, {}, [], "[/x]")]
    assert shown == ["1.235", "12,345.7", "7", "yes", "none", "none", "none", "[/x]"]
    assert cell({"min": 64, "mean": 64.123456}) == "min 64  mean 64.12"
    assert cell([0.5, "a"]) == "0.5, a"


def test_a_path_with_brackets_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "[bold]" / "[" / "x]"
    write_set(folder)
    for action in ("verify", "stats"):
        assert main(["dataset", action, str(folder)]) == 0
        assert "[bold]" in capsys.readouterr().out


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
