"""How fast do samples come out of a shard, undecoded? Ours (both formats) against webdataset's tar iterator,
MosaicML Streaming's MDSReader and Ray Data's read_webdataset.

Every side reads the same 4,000 samples (jpg of about 20 KB, caption, a little JSON) of one shard from the
page cache, as a disk fills it, in one process. Ours and Streaming read in a random order, the others can only
read in sequence. Ours verifies the CRC of every image; the others verify nothing. The limit is pread and CRC
alone. Ray works in processes of its own, whose CPU time is not seen: its wall time is the fair figure.

    python -m benchmarks.loader_raw [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import BUILD, Comparison, Snippet, alternate, arguments, peer_python, report
from benchmarks.images import synthetic_jpeg
from data_pipeline.records import Sample, sample_id
from data_pipeline.row_checksum import rows_are_whole
from data_pipeline.shards.shard_reader import ShardReader
from data_pipeline.shards.shard_writer import write_shard

SAMPLES = 4000
DIFFERENT = 40  # images, repeated
WEBDATASET = ["webdataset==1.0.2"]
STREAMING = ["mosaicml-streaming==0.13.*"]

OURS = """
import random
from pathlib import Path
from data_pipeline.shards.shard_reader import ShardReader
order = list(range(ARGS["samples"]))
random.Random(0).shuffle(order)
def run():
    reader = ShardReader(Path(ARGS["path"]), Path(ARGS["index"]))
    total = sum(len(s.image) + len(s.caption) for s in reader.samples(order))
    assert total == ARGS["bytes"], total
    reader.close()
    return len(order)
"""

LIMIT = """
import os
from zlib_ng import zlib_ng
places = ARGS["places"]
def run():
    file = os.open(ARGS["path"], os.O_RDONLY)
    for offset, size in places:
        zlib_ng.crc32(os.pread(file, size, offset))
    os.close(file)
    return len(places)
"""

TAR = """
import webdataset
def run():
    count = total = 0
    for sample in webdataset.WebDataset(ARGS["path"], shardshuffle=False, empty_check=False):
        total += len(sample["jpg"]) + len(sample["txt"].decode())
        count += 1
    assert total == ARGS["bytes"], total
    return count
"""

MDS_WRITE = """
from streaming import MDSWriter
import tarfile
def run():
    columns = {"jpg": "bytes", "txt": "str", "json": "bytes"}
    with MDSWriter(out=ARGS["out"], columns=columns, size_limit=1 << 30) as out:
        with tarfile.open(ARGS["path"]) as tar:
            members = [(m.name, tar.extractfile(m).read()) for m in tar]
        for k in range(0, len(members), 3):
            out.write({"jpg": members[k][1], "txt": members[k + 1][1].decode(), "json": members[k + 2][1]})
    return len(members) // 3
"""

MDS = """
import json, random
from streaming.base.format import reader_from_json
shard = json.load(open(ARGS["out"] + "/index.json"))["shards"][0]
order = list(range(ARGS["samples"]))
random.Random(0).shuffle(order)
def run():
    reader = reader_from_json(ARGS["out"], None, shard)
    total = 0
    for k in order:
        sample = reader[k]
        total += len(sample["jpg"]) + len(sample["txt"])
    assert total == ARGS["bytes"], total
    return len(order)
"""

RAY = """
import logging, os
os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
import ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
logging.getLogger('ray.data').setLevel(logging.ERROR)
ray.data.DataContext.get_current().enable_progress_bars = False
def run():
    count = total = 0
    for batch in ray.data.read_webdataset(ARGS["path"], decoder=None).iter_batches(batch_format="pyarrow"):
        total += sum(len(x.as_py()) for x in batch["jpg"])
        count += batch.num_rows
    assert count == ARGS["samples"], count
    return count
"""


def samples() -> Iterator[Sample]:
    images = [synthetic_jpeg(288, 256, seed) for seed in range(DIFFERENT)]
    for number in range(SAMPLES):
        image = images[number % DIFFERENT]
        yield Sample(
            id=sample_id(f"bench/{number}"),
            key=f"{number:08d}",
            source=f"bench/{number:08d}",
            image=image,
            extension="jpg",
            caption=f"number {number}: the quick brown fox jumps over a lazy dog near the old river bank",
            width=288,
            height=256,
            sha256=hashlib.sha256(image).digest(),
            url=f"https://example.org/images/{number:08d}.jpg",
            meta={"similarity": 0.31, "punsafe": 0.002},
        )


def prepared(folder: Path) -> dict[str, Path]:
    """The shard in both formats and, rewritten in Streaming's own, in a folder of its own."""
    paths = {
        "tar": folder / "shard.tar",
        "index": folder / "shard-index.arrow",
        "arrow": folder / "shard.arrow",
    }
    made = all(path.exists() for path in paths.values()) and rows_are_whole(paths["arrow"], SAMPLES)
    if not made:
        folder.mkdir(parents=True, exist_ok=True)
        write_shard(samples(), paths["tar"], paths["index"], "tar")
        write_shard(samples(), paths["arrow"], paths["arrow"], "arrow")
    paths["mds"] = folder / "mds"
    if not (paths["mds"] / "index.json").exists():
        args = {"out": str(paths["mds"]), "path": str(paths["tar"])}
        writer = Snippet("MDSWriter", MDS_WRITE, args, peer_python("streaming", STREAMING))
        writer()
        writer.close()
    return paths


def read_from_disk(path: Path) -> None:
    """Leave the file in the page cache as a read from the disk does: in large pieces, which are cheaper to
    map than the single pages of a file that was just written."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(1 << 20):
            pass


def main() -> None:
    options = arguments(__doc__ or "")
    options.add_argument("--no-ray", action="store_true", help="leave Ray Data out (it starts a cluster)")
    args = options.parse_args()
    paths = prepared(BUILD / "raw")
    for path in [*paths.values(), *paths["mds"].iterdir()]:
        if path.is_file():
            read_from_disk(path)
    reader = ShardReader(paths["tar"], paths["index"])
    total = sum(len(s.image) + len(s.caption) for s in reader.samples(range(len(reader))))
    common = {"samples": SAMPLES, "bytes": total}
    tar = {**common, "path": str(paths["tar"]), "index": str(paths["index"])}
    arrow = {**common, "path": str(paths["arrow"]), "index": str(paths["arrow"])}
    places = [reader.place(row) for row in range(len(reader))]
    sides = {
        "ours, tar": Snippet("ours, tar", OURS, tar),
        "ours, arrow": Snippet("ours, arrow", OURS, arrow),
        "limit": Snippet("limit", LIMIT, {**tar, "places": places}),
        "webdataset": Snippet("webdataset", TAR, tar, peer_python("webdataset", WEBDATASET)),
        "streaming": Snippet(
            "streaming", MDS, {**common, "out": str(paths["mds"])}, peer_python("streaming", STREAMING)
        ),
    }
    if not args.no_ray:
        sides["ray"] = Snippet("ray", RAY, tar)
    goals = {"webdataset": 8.0, "streaming": 2.0, "ray": 10.0}
    results: list[Comparison] = []
    for peer in [name for name in goals if name in sides]:
        for ours in ("ours, tar", "ours, arrow"):
            results.append(
                alternate(
                    f"{ours} / {peer}",
                    sides[ours],
                    sides[peer],
                    sides["limit"],
                    rounds=args.rounds,
                    goal=goals[peer],
                )
            )
    for side in sides.values():
        side.close()
    size = round(total / SAMPLES)
    report("raw samples of one shard", results, ["pyarrow", "ray", "numpy"], args.json, bytes_per_sample=size)


if __name__ == "__main__":
    main()
