"""Who gets an answer from the dashboard, and what for."""

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.store import open_store
from tests.support.dashboard_server import Server, dashboard
from tests.support.replayed_run import write_killed_and_rewound
from tests.support.runs import maskclip

TOKEN = "correct-horse-battery"
TRICKS = (
    "/static/../app.py",
    "/static/..%2fapp.py",
    "/static/%2e%2e/app.py",
    "/static/js/..%5c..%5capp.py",
    "//static/style.css",
    "/static//etc/passwd",
    "/static/%00",
    "/api/overview/../../app.py",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_killed_and_rewound(folder / "first")
    write_killed_and_rewound(folder / "deeper/second")
    (folder / "secret.txt").write_text("not for the web")
    return folder


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[Server]:
    with dashboard(runs) as found:
        yield found


@pytest.fixture(scope="module")
def guarded(runs: Path) -> Iterator[Server]:
    with dashboard(runs, "host=0.0.0.0", f"token={TOKEN}") as found:
        yield found


def test_it_listens_at_this_machine_alone_unless_told(server: Server):
    assert server.host == "127.0.0.1"
    assert "token" not in server.address


def test_all_runs_of_a_folder(server: Server):
    assert json.loads(server.get("/api/runs")[2]) == ["deeper/second", "first"]
    status, _, body = server.get("/api/overview?run=deeper/second")
    assert status == 200
    assert json.loads(body)["story"]["steps_done"] == 60


def test_runs_in_an_object_store(tmp_path: Path, s3_env: str):
    write_killed_and_rewound(tmp_path)
    store = open_store(f"{s3_env}/runs/one")
    for path in tmp_path.rglob("*.json*"):
        store.put_file(path.relative_to(tmp_path).as_posix(), path)
    with dashboard(f"{s3_env}/runs") as found:
        assert json.loads(found.get("/api/runs")[2]) == ["one"]
        view = json.loads(found.get("/api/overview?run=one")[2])
        for _ in range(100):
            if view["read"] == 1:
                break
            time.sleep(0.1)
            view = json.loads(found.get("/api/overview?run=one")[2])
        assert (view["story"]["steps_done"], view["story"]["superseded_steps"]) == (60, 35)


def test_only_names_of_runs_are_opened(server: Server, tmp_path: Path):
    for name in ("nothing", "../first", "deeper", "secret.txt", str(tmp_path), "s3://elsewhere", "%00", ""):
        assert server.get(f"/api/overview?run={name}")[0] == 404, name


@pytest.mark.parametrize("path", TRICKS)
def test_path_tricks_are_refused(server: Server, path: str):
    status, _, body = server.get(path)
    assert status in (400, 404, 421)
    assert b"Starlette" not in body


@pytest.mark.parametrize(
    "query",
    [
        "scalars=",
        "scalars=" + ",".join(f"a{k}" for k in range(41)),
        "scalars=loss&from=-1",
        "scalars=loss&to=1e9",
        "scalars=loss&points=x",
        "scalars=loss&to=99999999999999999999",
    ],
)
def test_queries_that_make_no_sense_are_refused(server: Server, query: str):
    assert server.get(f"/api/curves?run=first&{query}")[0] == 400


def test_oversized_queries_are_refused_and_points_are_bounded(server: Server):
    assert server.get("/api/curves?run=first&scalars=" + "a" * 2_000)[0] == 414
    assert server.get("/api/curves?run=first&scalars=loss&points=999999999")[0] == 200


def test_nothing_but_reading(server: Server):
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert server.get("/api/runs", method)[0] == 405


def test_a_name_that_was_made_to_point_here_is_refused(server: Server):
    """DNS rebinding: a page elsewhere whose host name resolves to 127.0.0.1."""
    assert server.get("/api/runs", Host=f"evil.example:{server.port}")[0] == 421
    assert server.get("/api/runs", Host=f"localhost:{server.port}")[0] == 200


def test_every_answer_says_what_the_page_may_do(server: Server):
    for path in ("/", "/static/js/main.js", "/api/runs", "/nothing"):
        headers = server.get(path)[1]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_without_the_token_401(guarded: Server):
    for path in ("/", "/static/style.css", "/api/runs", "/api/stream", "/?token=wrong", "/nothing"):
        assert guarded.get(path)[0] == 401, path
    assert guarded.get("/api/runs", Authorization="Bearer wrong")[0] == 401
    assert guarded.get("/api/runs", Cookie="maskclip_dashboard=wrong")[0] == 401
    assert guarded.get("/api/runs", Authorization=f"Bearer {TOKEN}")[0] == 200


def test_the_token_leaves_the_address_for_a_cookie(guarded: Server):
    status, headers, _ = guarded.get(f"/?run=first&token={TOKEN}")
    assert (status, headers["location"]) == (303, "/?run=first")
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert guarded.get("/api/runs", Cookie=cookie.partition(";")[0])[0] == 200


def test_a_token_is_made_where_none_is_given(runs: Path):
    with dashboard(runs, "host=0.0.0.0") as found:
        assert found.get("/api/runs")[0] == 401
        token = found.address.partition("?token=")[2]
        assert len(token) >= 24
        assert found.get("/api/runs", Authorization=f"Bearer {token}")[0] == 200


def test_answers_are_compressed_when_asked(server: Server):
    status, headers, body = server.get("/api/overview?run=first", **{"Accept-Encoding": "gzip"})
    assert (status, headers["content-encoding"]) == (200, "gzip")
    assert json.loads(gzip.decompress(body))["name"] == "first"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("{folder}/nothing",), 64, "no run here"),
        (("{folder}", "host=0.0.0.0", "token=short"), 64, "token"),
        (("{folder}", "host=203.0.113.7"), 64, "change host or port"),
    ],
)
def test_mistakes_are_one_line(runs: Path, words: tuple[str, ...], code: int, said: str):
    done = maskclip("dashboard", *(word.format(folder=runs) for word in words))
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
