"""How much processor time does fetching an image take, against img2dataset's pool of urllib threads?

A server on this machine, in a process of its own, gives away synthetic JPEGs. The peer is img2dataset 1.47.0:
its `download_image_with_retry`, taken out of its module because that needs libraries of other years, in a
thread pool of the same size as our concurrency, with its opt-out headers. Ours is `fetch_rows` with all
checks: robots.txt, tags, addresses, limits. The limit is a blocking socket that sends the same requests one
after another over one connection and looks at nothing.

    python -m benchmarks.download [--json FILE]
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.common import ROOT, Comparison, Snippet, alternate, arguments, report
from benchmarks.images import synthetic_jpeg
from benchmarks.preprocess_speed import img2dataset_python

IN_FLIGHT = 64
ROWS = 1000
CASES = {"at once": 0.0, "after 50 ms": 0.05}
"""Seconds that the server waits before it answers."""

SERVER = """
import sys
from tests.support.web_server import WebServer, page, slowly
seconds, length = float(sys.argv[1]), int(sys.argv[2])
with WebServer({"/image": slowly(seconds, page(sys.stdin.buffer.read(length)))}) as server:
    print(server.port, flush=True)
    sys.stdin.read()
"""
PEER = """
import ast, importlib.metadata, io, math, ssl, urllib.request
from multiprocessing.pool import ThreadPool
path = importlib.metadata.distribution("img2dataset").locate_file("img2dataset/downloader.py")
wanted = ("is_disallowed", "download_image", "download_image_with_retry")
tree = ast.parse(open(path).read())
tree.body = [node for node in tree.body if getattr(node, "name", None) in wanted]
assert len(tree.body) == len(wanted)
exec(compile(tree, str(path), "exec"))
headers = ["noai", "noimageai", "noindex", "noimageindex"]
rows = [(n, ARGS["url"]) for n in range(ARGS["rows"])]
def one(row):
    _, stream, error = download_image_with_retry(row, 10, 2, None, headers)
    assert error is None, error
    return len(stream.read())
def run():
    with ThreadPool(ARGS["in_flight"]) as pool:
        assert sum(pool.imap_unordered(one, rows)) == ARGS["bytes"] * len(rows)
    return len(rows)
"""
OURS = """
from data_pipeline.fetch.download import DownloadConfig, fetch_rows
from data_pipeline.records import SourceRow
config = DownloadConfig(
    concurrency=ARGS["in_flight"],
    per_host=ARGS["in_flight"],
    per_host_rate=None,
    allow_private_addresses=True,
)
rows = [SourceRow(0, n, str(n), str(n), "caption", {}, url=ARGS["url"]) for n in range(ARGS["rows"])]
def run():
    assert sum(len(row.image) for row in fetch_rows(rows, config)) == ARGS["bytes"] * len(rows)
    return len(rows)
"""
LIMIT = """
import http.client, urllib.parse
url = urllib.parse.urlsplit(ARGS["url"])
def run():
    connection = http.client.HTTPConnection(url.hostname, url.port)
    for _ in range(100):
        connection.request("GET", url.path)
        assert len(connection.getresponse().read()) == ARGS["bytes"]
    connection.close()
    return 100
"""


def compare(case: str, seconds: float, image: bytes, rounds: int) -> Comparison:
    """One case, with a server of its own."""
    command = [sys.executable, "-c", SERVER, str(seconds), str(len(image))]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(image)
    server.stdin.flush()
    url = f"http://127.0.0.2:{int(server.stdout.readline())}/image"
    args = {"url": url, "rows": ROWS, "in_flight": IN_FLIGHT, "bytes": len(image)}
    sides = [
        Snippet("ours", OURS, args),
        Snippet("img2dataset", PEER, args, img2dataset_python()),
        Snippet("limit", LIMIT, args),
    ]
    result = alternate(case, *sides, rounds=rounds)
    for side in sides:
        side.close()
    server.communicate()
    return result


def main() -> None:
    options = arguments(str(__doc__).splitlines()[0]).parse_args()
    image = synthetic_jpeg(480, 360, seed=1)
    results = [compare(case, seconds, image, options.rounds) for case, seconds in CASES.items()]
    title = f"download, {len(image) / 1e3:.0f} KB, {IN_FLIGHT} in flight"
    report(title, results, ("aiohttp", "protego"), options.json)


if __name__ == "__main__":
    main()
