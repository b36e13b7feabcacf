"""How well does the order of a run shuffle? Ours with windows of 16 shards, webdataset's shuffle buffer, and
Streaming's py1e, all over 64 shards of 1,000 samples in batches of 256, against a uniform shuffle.

Two numbers: pairs of samples in one batch that come from the same shard, relative to what a uniform shuffle
gives (1 is as good), and the correlation between the stored positions of neighbours (0 is as good).

    python -m benchmarks.shuffle_quality [--seeds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.common import Snippet, machine, peer_python
from benchmarks.loader_raw import STREAMING, WEBDATASET
from data_pipeline.loading.order import OrderConfig, SampleOrder

SHARDS, SIZE, BATCH = 64, 1000, 256
TOLERANCE = 0.05

WDS = """
import random
from webdataset.filters import _shuffle
def run():
    rng = random.Random(ARGS["seed"])
    shards = list(range(ARGS["shards"]))
    rng.shuffle(shards)
    rows = (s * ARGS["size"] + k for s in shards for k in range(ARGS["size"]))
    NOTE["order"] = list(_shuffle(rows, 1000, 1000, rng))
    return len(NOTE["order"])
NOTE = {}
"""

PY1E = """
import numpy
from streaming.base.shuffle import get_shuffle
def run():
    sizes = numpy.full(ARGS["shards"], ARGS["size"])
    order = get_shuffle("py1e", sizes, 1, ARGS["seed"], 0, ARGS["block"])
    NOTE["order"] = [int(k) for k in order]
    return len(order)
NOTE = {}
"""


def quality(position: np.ndarray) -> tuple[float, float]:
    """Same-shard pairs in a batch relative to uniform, and lag-1 correlation, of stored positions."""
    steps, total = len(position) // BATCH, SHARDS * SIZE
    batches = (position // SIZE)[: steps * BATCH].reshape(steps, BATCH)
    counts = [np.bincount(batch, minlength=SHARDS) for batch in batches]
    same = sum(int(np.sum(count * (count - 1))) for count in counts)
    uniform = steps * BATCH * (BATCH - 1) * (SIZE - 1) / (total - 1)
    return same / uniform, float(np.corrcoef(position[:-1], position[1:])[0, 1])


def ours(seed: int, window: int) -> np.ndarray:
    cfg = OrderConfig(seed=seed, streams=64, window_shards=window)
    located = SampleOrder([SIZE] * SHARDS, cfg, BATCH).locate(np.arange(SHARDS * SIZE))
    return located.shard * SIZE + located.index


def peer(name: str, source: str, requirements: list[str], seed: int, block: int = 0) -> np.ndarray:
    args = {"shards": SHARDS, "size": SIZE, "seed": seed, "block": block}
    side = Snippet(name, source, args, peer_python(name, requirements))
    order = np.array(side().note["order"])
    side.close()
    assert np.array_equal(np.sort(order), np.arange(SHARDS * SIZE))
    return order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sides = {
        "uniform": lambda seed: np.random.default_rng(seed).permutation(SHARDS * SIZE),
        **{f"ours, windows of {w}": (lambda seed, w=w: ours(seed, w)) for w in (4, 16)},
        "streaming py1e, blocks of 16 shards": lambda seed: peer(
            "streaming", PY1E, STREAMING, seed, 16 * SIZE
        ),
        # Its default block is four million samples: here, the whole data set is open at once.
        "streaming py1e, default": lambda seed: peer("streaming", PY1E, STREAMING, seed, 4_000_000),
        "webdataset shuffle(1000)": lambda seed: peer("webdataset", WDS, WEBDATASET, seed),
    }
    table = Table("order", "same-shard pairs / uniform", "lag-1 correlation", "within 5 %")
    found = {}
    for name, order in sides.items():
        results = [quality(order(seed)) for seed in range(args.seeds)]
        pairs, lag = (statistics.median(column) for column in zip(*results, strict=True))
        good = all(abs(p - 1) <= TOLERANCE and abs(c) <= TOLERANCE for p, c in results)
        found[name] = {"pairs": pairs, "lag": lag, "within": good, "all": results}
        table.add_row(name, f"{pairs:.3f}", f"{lag:+.4f}", "yes" if good else "no")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({"about": machine(["numpy"]), "orders": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
