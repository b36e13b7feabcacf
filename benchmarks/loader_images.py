"""How fast do batches of 224 px views come out of the loader? Ours against webdataset with its PIL decoder
and Pillow's bicubic resize of a random crop.

Both read the same shards in one process. Ours ends in uint8 views, which the device normalises; the peer
in the same, or in float32 as its users do ("float"). Ours also verifies every image, shuffles by the
order of the run and makes the tokens of the captions, which the peer does not. The limit is libjpeg-turbo's
full decode alone, into memory that is used again. Images of 256 px are what `maskclip preprocess` stores
(quality 95); 480x360 and 800x600 (quality 85) are stored as downloaded. The synthetic ones have more
bits per pixel than most photos.

    python -m benchmarks.loader_images [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from benchmarks.common import BUILD, Snippet, alternate, arguments, peer_python, report
from benchmarks.images import photos, synthetic_jpeg
from benchmarks.loader_raw import WEBDATASET
from cluster.manifest import Manifest, commit, file_entry
from cluster.store import open_store
from data_pipeline.records import DATASET_KIND, DATASET_VERSION, Sample, sample_id, shard_names
from data_pipeline.shards.shard_writer import write_shard

SAMPLES, SHARDS, VIEW = 512, 4, 224

OURS = """
from data_pipeline.image.augment import AugmentConfig
from data_pipeline.loading.loader import Loader, LoaderConfig
from data_pipeline.loading.order import OrderConfig
augment = AugmentConfig(image_size=ARGS["view"])
loader = Loader(ARGS["uri"], OrderConfig(streams=1), augment, LoaderConfig(), 64, 0, 1)
def run():
    count = 0
    for batch in loader.batches(0, ARGS["samples"] // 64):
        assert batch["image"].shape[2:] == (ARGS["view"], ARGS["view"])
        count += len(batch["image"])
    return count
"""

PIL = """
import random
import numpy, webdataset
from PIL import Image
rng = random.Random(0)
def view(image):
    for _ in range(10):
        area, ratio = rng.uniform(0.5, 1) * image.width * image.height, rng.uniform(0.75, 1.3333)
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if w <= image.width and h <= image.height:
            x, y = rng.randint(0, image.width - w), rng.randint(0, image.height - h)
            break
    else:
        w = h = min(image.size)
        x, y = (image.width - w) // 2, (image.height - h) // 2
    box = x, y, x + w, y + h
    pixels = numpy.asarray(image.resize((ARGS["view"],) * 2, Image.Resampling.BICUBIC, box=box))
    return (pixels.astype(numpy.float32) / 255 - 0.45) / 0.225 if ARGS["float"] else pixels
def run():
    data = webdataset.WebDataset(ARGS["tars"], shardshuffle=False, empty_check=False).decode("pil")
    count = 0
    batch = []
    for sample in data:
        batch.append(view(sample["jpg"]))
        if len(batch) == 64:
            count += len(numpy.stack(batch))
            batch = []
    return count
"""

LIMIT = """
import numpy, simplejpeg
from pathlib import Path
from data_pipeline.shards.shard_reader import ShardReader
room = numpy.empty(3 << 20, numpy.uint8)
readers = [ShardReader(Path(tar), Path(tar).with_suffix(".arrow")) for tar in ARGS["tars"]]
images = [sample.image for reader in readers for sample in reader.samples(range(ARGS["each"]))]
def run():
    for image in images:
        simplejpeg.decode_jpeg(image, "RGB", buffer=room)
    return len(images)
"""


def synthetic(width: int, height: int, quality: int) -> list[bytes]:
    return [synthetic_jpeg(width, height, seed, quality) for seed in range(64)]


def real(width: int, height: int, quality: int) -> list[bytes]:
    """Pieces of the photos of half their height, scaled to this size."""
    found = []
    for path in photos():
        pixels = simplejpeg.decode_jpeg(path.read_bytes(), "RGB")
        tall = pixels.shape[0] // 2
        wide = min(tall * width // height, pixels.shape[1])
        for top in (0, tall):
            for left in range(0, pixels.shape[1] - wide + 1, wide):
                piece = pixels[top : top + tall, left : left + wide]
                small = cv2.resize(piece, (width, height), interpolation=cv2.INTER_AREA)
                found.append(simplejpeg.encode_jpeg(np.ascontiguousarray(small), quality, "RGB", "420"))
    return found


def prepared(folder: Path, images: Callable[[], list[bytes]]) -> list[str]:
    """A committed data set of these images; the paths of its tars."""
    names = [shard_names(number, "tar") for number in range(SHARDS)]
    if not (folder / "manifest.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = _samples(images())
        shards, each = [], SAMPLES // SHARDS
        for name, index in names:
            info = write_shard((next(rows) for _ in range(each)), folder / name, folder / index, "tar")
            shards.append(vars(info))
        files = tuple(file_entry(folder / name, name) for pair in names for name in pair)
        counts = {"rows_in": SAMPLES, "kept": SAMPLES, "dropped": 0}
        meta = {"format": "tar", "shards": shards, "recipe": {}, "counts": counts}
        commit(open_store(str(folder)), Manifest(DATASET_KIND, DATASET_VERSION, files, meta))
    return [str(folder / name) for name, _ in names]


def _samples(images: list[bytes]) -> Iterator[Sample]:
    for number in range(SAMPLES):
        image = images[number % len(images)]
        height, width, *_ = simplejpeg.decode_jpeg_header(image)
        yield Sample(
            id=sample_id(f"bench/{number}"),
            key=f"{number:08d}",
            source=f"bench/{number:08d}",
            image=image,
            extension="jpg",
            caption=f"number {number}: a view of the old town from the hill in the evening light",
            width=int(width),
            height=int(height),
            sha256=hashlib.sha256(image).digest(),
        )


def main() -> None:
    args = arguments(__doc__ or "").parse_args()
    kinds = {"synthetic": synthetic} | ({"photos": real} if photos() else {})
    cases = {
        f"{kind} {width}x{height}": partial(make, width, height, quality)
        for kind, make in kinds.items()
        for width, height, quality in ((256, 256, 95), (341, 256, 95), (480, 360, 85), (800, 600, 85))
    }
    python = peer_python("webdataset-pil", [*WEBDATASET, "pillow", "numpy"])
    results = []
    for case, images in cases.items():
        folder = BUILD / "images-224" / case.replace(" ", "-")
        given = {"uri": str(folder), "tars": prepared(folder, images), "samples": SAMPLES, "view": VIEW}
        given |= {"each": SAMPLES // SHARDS, "float": False}
        ours, limit = Snippet("ours", OURS, given), Snippet("decode", LIMIT, given)
        for end in ("float", "uint8"):
            peer = Snippet("webdataset", PIL, given | {"float": end == "float"}, python)
            results.append(
                alternate(f"{case}, peer to {end}", ours, peer, limit, rounds=args.rounds, goal=3.0)
            )
            peer.close()
        ours.close()
        limit.close()
    report("224 px views", results, ["simplejpeg", "opencv-python-headless", "torch"], args.json)


if __name__ == "__main__":
    main()
