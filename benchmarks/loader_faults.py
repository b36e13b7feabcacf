"""What does a bad day of the object store cost? The loader's throughput over a local S3 server behind a
proxy, undisturbed and with faults: 5 % of the answers are 503, 1 % are cut short, one shard comes ten
times slower.

Both runs read one epoch of the same data set into an empty cache, take turns, and must give every sample
once. The proxy gives each connection 10 MB/s. The slow shard, which takes 5 s, is one that is first needed in
the middle of the epoch, and the look-ahead is longer than that: where either is not so, the loader can only
wait for the rest of it. Wall times, because waiting is what is measured, less the
time for which the loader's thread was ready to run and other jobs of the machine had its core.

    python -m benchmarks.loader_faults [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import shutil
import socket
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web
from rich.console import Console
from rich.table import Table

from benchmarks.common import arguments, machine
from benchmarks.images import synthetic_jpeg
from cluster.manifest import Manifest, commit, file_entry
from cluster.store import open_store
from data_pipeline.image.augment import AugmentConfig
from data_pipeline.loading.loader import Loader, LoaderConfig
from data_pipeline.loading.order import OrderConfig, SampleOrder
from data_pipeline.records import DATASET_KIND, DATASET_VERSION, Sample, sample_id, shard_names
from data_pipeline.shards.shard_writer import write_shard
from tests.support.s3_server import S3Server

SHARDS, SIZE, BATCH = 192, 128, 64
ORDER = OrderConfig(seed=1, streams=4, window_shards=4)
LOOKAHEAD, TRANSFERS = 256, 16
GOAL = 0.9
PIECE = 64 << 10


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What the proxy does to answers."""

    busy: float = 0.0
    """Part of the answers that are 503 SlowDown."""
    cut: float = 0.0
    """Part of the bodies that end half way, with the connection."""
    slow_key: str = ""
    """The object whose name ends so comes ten times slower."""
    bytes_per_second: float = 10e6
    seed: int = 0


def serve(port: int, target: str, faults: Faults, counts: Any) -> None:
    """The proxy: forwards everything to `target`, well or badly."""
    rng = random.Random(faults.seed)

    async def handle(request: web.Request) -> web.StreamResponse:
        counts[0] += 1
        reads = request.method in ("GET", "HEAD")
        if reads and rng.random() < faults.busy:
            counts[1] += 1
            body = "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            return web.Response(status=503, text=body, content_type="application/xml")
        headers = {k: v for k, v in request.headers.items() if k.lower() != "host"}
        url = target + request.raw_path
        async with request.app["session"].request(
            request.method, url, headers=headers, data=await request.read(), allow_redirects=False
        ) as answer:
            data = await answer.read()
            kept = {
                k: v
                for k, v in answer.headers.items()
                if k.lower() not in ("transfer-encoding", "connection")
            }
            kept["Content-Length"] = answer.headers.get("Content-Length", str(len(data)))
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            end = len(data)
            if request.method == "GET" and rng.random() < faults.cut:
                counts[2] += 1
                end //= 2
            slow = faults.slow_key and request.path.endswith(faults.slow_key)
            rate = faults.bytes_per_second / (10 if slow else 1)
            try:
                for start in range(0, end, PIECE):
                    await response.write(data[start : min(start + PIECE, end)])
                    await asyncio.sleep(PIECE / rate)
            except ConnectionResetError:
                return response  # the client gave up, which is its right
            if end < len(data) and request.transport is not None:
                request.transport.close()
                return response
            await response.write_eof()
            return response

    async def session(app: web.Application):
        app["session"] = aiohttp.ClientSession(auto_decompress=False)
        yield
        await app["session"].close()

    app = web.Application(client_max_size=1 << 30)
    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{key:.*}", handle)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None, handle_signals=True)


def write_data(uri: str) -> None:
    images = [synthetic_jpeg(256, 256, seed) for seed in range(32)]
    store, files, shards = open_store(uri), [], []
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(SHARDS):
            path, index = (Path(folder, name) for name in shard_names(shard, "tar"))
            rows = (
                Sample(
                    id=sample_id(f"bench/{number}"),
                    key=f"{number:08d}",
                    source=f"bench/{number:08d}",
                    image=images[number % len(images)],
                    extension="jpg",
                    caption=f"number {number}",
                    width=256,
                    height=256,
                    sha256=bytes(32),
                )
                for number in range(shard * SIZE, (shard + 1) * SIZE)
            )
            shards.append(vars(write_shard(rows, path, index, "tar")))
            for file in (path, index):
                files.append(file_entry(file, file.name))
                store.put_file(file.name, file)
                file.unlink()
    rows_in = SHARDS * SIZE
    meta = {"format": "tar", "shards": shards, "recipe": {}, "counts": {"rows_in": rows_in, "kept": rows_in}}
    commit(store, Manifest(DATASET_KIND, DATASET_VERSION, tuple(files), meta))


def late_shard() -> str:
    """Name of a shard that is first needed in the middle of the epoch."""
    order, middle = SampleOrder([SIZE] * SHARDS, ORDER, BATCH), SHARDS * SIZE // BATCH // 2
    before = set(order.locate(np.arange(middle * BATCH)).shard.tolist())
    after = order.locate(np.arange(middle * BATCH, (middle + 16) * BATCH)).shard.tolist()
    return shard_names(next(shard for shard in after if shard not in before), "tar")[0]


def run_queue_seconds() -> float:
    """How long this thread has stood in the kernel's queue for a core, so far."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def epoch(server: S3Server, uri: str, faults: Faults) -> dict[str, float]:
    """One epoch through a proxy of its own; samples per second, requests, and what the cache did."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    counts = context.Array("l", 3, lock=False)
    proxy = context.Process(target=serve, args=(port, server.endpoint, faults, counts), daemon=True)
    proxy.start()
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    folder = tempfile.mkdtemp(prefix="maskclip-bench-")
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.05)
        cfg = LoaderConfig(cache=folder, cache_bytes=4 * 10**9, lookahead=LOOKAHEAD, transfers=TRANSFERS)
        loader = Loader(uri, ORDER, AugmentConfig(image_size=224), cfg, BATCH, 0, 1)
        steps, ids = SHARDS * SIZE // BATCH, []
        asked, start, queued = counts[0], time.perf_counter(), run_queue_seconds()
        for batch in loader.batches(0, steps):
            ids += batch["id"].tolist()
        wall = time.perf_counter() - start
        seconds = wall - (run_queue_seconds() - queued)
        assert len(set(ids)) == len(ids) == SHARDS * SIZE, "a sample was lost or came twice"
        return {
            "samples_per_second": len(ids) / seconds,
            "by_the_wall": len(ids) / wall,
            "requests_per_1000": 1000 * (counts[0] - asked) / len(ids),
            "busy": counts[1],
            "cut": counts[2],
            **asdict(loader.counters),
        }
    finally:
        proxy.terminate()
        proxy.join()
        shutil.rmtree(folder)


def main() -> None:
    args = arguments(__doc__ or "").parse_args()
    slow = Faults(busy=0.05, cut=0.01, slow_key=late_shard())
    with tempfile.TemporaryDirectory(prefix="maskclip-s3-") as folder:
        server = S3Server(Path(folder))
        server.start()
        try:
            os.environ.update(server.env)
            uri = server.make_bucket("faults")
            write_data(uri)
            turns = [
                (epoch(server, uri, Faults()), epoch(server, uri, replace(slow, seed=seed)))
                for seed in range(args.rounds + 1)
            ][1:]
        finally:
            server.kill()
    ratios = [bad["samples_per_second"] / good["samples_per_second"] for good, bad in turns]
    ratio = statistics.median(ratios)
    cut = sum(int(bad["cut"]) for _, bad in turns)
    assert cut, "no body was cut short: more rounds"
    names = (
        "samples_per_second",
        "by_the_wall",
        "requests_per_1000",
        "busy",
        "cut",
        "misses",
        "hits",
        "range_reads",
    )
    table = Table("run", *names, title="one epoch from an object store, means")
    for name, column in zip(
        ("undisturbed", "5 % 503, 1 % cut, one slow"), zip(*turns, strict=True), strict=True
    ):
        table.add_row(name, *(f"{statistics.fmean(turn[key] for turn in column):.1f}" for key in names))
    verdict = "met" if ratio >= GOAL else "MISSED"
    console = Console()
    console.print(table, f"throughput with faults: {ratio:.0%} of undisturbed, goal {GOAL:.0%}: {verdict}")
    console.print(f"no sample lost or twice in {len(turns)} epochs with {cut} cut bodies")
    if args.json:
        about = machine(["s3fs", "numpy"])
        args.json.write_text(json.dumps({"about": about, "ratios": ratios, "turns": turns}, indent=1) + "\n")


if __name__ == "__main__":
    main()
