"""How much faster is our preprocessing of an image than img2dataset's, and what is lost by it?

Both sides take the same JPEGs and make JPEGs of quality 95 with a short side of 256 pixels, on one core: the
peer with the resizer of img2dataset 1.47.0 (resize_mode keep_ratio), loaded by itself because its package
needs libraries of other years; ours with read_header and prepare, once without and once with fingerprints.
The limit is the scaled decode and the encode of the result alone. PSNR compares the resized pixels, before
they are encoded, with a full decode and OpenCV's area filter, which is what the peer does; beside it stands
what the encoder loses afterwards on either side.

    python -m benchmarks.preprocess_speed [--json FILE]
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from benchmarks.common import BUILD, Comparison, Snippet, alternate, arguments, peer_python, report
from benchmarks.images import photos, synthetic_jpeg
from data_pipeline.image.decode import decode_rgb
from data_pipeline.image.header import read_header
from data_pipeline.image.transforms import shrink

SHORT_SIDE, QUALITY = 256, 95
SIZES = {(480, 360): (1.29, 1.4), (800, 600): (1.31, 1.8), (1600, 1200): (1.31, 2.2)}
"""Slope of the synthetic images, so that they have about 58, 142 and 518 KB, and the goal of the ratio."""
IMAGES = 8

PEER_SETUP = """
import glob, importlib.metadata, importlib.util, io, os, warnings
warnings.filterwarnings("ignore")
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
path = importlib.metadata.distribution("img2dataset").locate_file("img2dataset/resizer.py")
spec = importlib.util.spec_from_file_location("resizer", path)
resizer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(resizer)
"""
PEER = (
    PEER_SETUP
    + """
resize = resizer.Resizer(ARGS["short_side"], "keep_ratio", True, encode_quality=ARGS["quality"])
images = [open(name, "rb").read() for name in sorted(glob.glob(ARGS["images"]))]
NOTE = {}
def run():
    results = [resize(io.BytesIO(data)) for _ in range(ARGS["repeat"]) for data in images]
    assert not any(error for *_, error in results), results[0][-1]
    NOTE.update(sizes=[(r[1], r[2]) for r in results[:len(images)]], bytes=sum(len(r[0]) for r in results))
    return len(results)
"""
)
OURS = """
import glob
from data_pipeline.image.header import read_header
from data_pipeline.records import Prepared, SourceRow
from data_pipeline.image.transforms import TransformConfig, prepare
config = TransformConfig(
    short_side=ARGS["short_side"], quality=ARGS["quality"], fingerprints=ARGS["fingerprints"]
)
images = [open(name, "rb").read() for name in sorted(glob.glob(ARGS["images"]))]
rows = [SourceRow(0, i, str(i), str(i), "caption", {}, image=data) for i, data in enumerate(images)]
NOTE = {}
def run():
    results = [prepare(row, read_header(row.image), config) for _ in range(ARGS["repeat"]) for row in rows]
    assert all(isinstance(result, Prepared) for result in results), results[0]
    sizes = [(result.width, result.height) for result in results[:len(rows)]]
    NOTE.update(sizes=sizes, bytes=sum(len(result.image) for result in results))
    return len(results)
"""
LIMIT = """
import glob, simplejpeg
from data_pipeline.image.decode import decode_rgb, resize_rgb
images = [open(name, "rb").read() for name in sorted(glob.glob(ARGS["images"]))]
sizes = ARGS["sizes"]
done = [resize_rgb(decode_rgb(data), tuple(size)) for data, size in zip(images, sizes)]
scaled = [decode_rgb(data, None, tuple(size)).shape for data, size in zip(images, sizes)]
def run():
    for _ in range(ARGS["repeat"]):
        for data, pixels, shape in zip(images, done, scaled):
            simplejpeg.decode_jpeg(data, "RGB", min_height=shape[0], min_width=shape[1])
            simplejpeg.encode_jpeg(pixels, ARGS["quality"], "RGB", "420")
    return ARGS["repeat"] * len(images)
"""


def img2dataset_python() -> Path:
    libraries = ["opencv-python-headless<5", "albumentations<2", "numpy<2.3"]
    return peer_python("img2dataset", libraries, alone=["img2dataset==1.47.0"])


def write_images() -> dict[str, tuple[Path, float | None]]:
    """Folder of each case's images, and its goal."""
    cases: dict[str, tuple[Path, float | None]] = {}
    pictures = [simplejpeg.decode_jpeg(path.read_bytes(), "RGB") for path in photos()]
    for (width, height), (slope, goal) in SIZES.items():
        synthetic = [synthetic_jpeg(width, height, seed, slope=slope) for seed in range(IMAGES)]
        cases[f"synthetic {width}x{height}"] = _write(f"synthetic-{width}", synthetic), goal
        real = []
        for picture in pictures:
            scale = height / min(picture.shape[:2])
            size = round(picture.shape[1] * scale), round(picture.shape[0] * scale)
            small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
            real.append(simplejpeg.encode_jpeg(small, 85, "RGB", "420"))
        if real:
            cases[f"photos, short side {height}"] = _write(f"photos-{height}", real), goal
    if pictures:
        cases["photos as they are"] = _write("photos-full", [path.read_bytes() for path in photos()]), None
    return cases


def _write(name: str, images: list[bytes]) -> Path:
    folder = BUILD / "images" / name
    folder.mkdir(parents=True, exist_ok=True)
    for index, data in enumerate(images):
        (folder / f"{index:02d}.jpg").write_bytes(data)
    return folder


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """dB."""
    error = np.square(image.astype(float) - reference.astype(float)).mean()
    return 10 * np.log10(255**2 / max(error, 1e-9))


def quality(images: list[bytes], sizes: list[tuple[int, int]]) -> str:
    """PSNR of our resized pixels against a full decode and the area filter; and what encoding that loses."""
    resized, encoded = [], []
    for data, size in zip(images, sizes, strict=True):
        full = decode_rgb(data)
        reference = cv2.resize(full, size, interpolation=cv2.INTER_AREA)
        resized.append(psnr(shrink(data, read_header(data), size), reference))
        jpeg = simplejpeg.encode_jpeg(reference, QUALITY, "RGB", "420")
        encoded.append(psnr(simplejpeg.decode_jpeg(jpeg, "RGB"), reference))
    return (
        f"PSNR median {np.median(resized):.1f}, worst {min(resized):.1f} dB, below 35 are "
        f"{sum(value < 35 for value in resized)} (encoding alone: "
        f"{np.median(encoded):.1f}, {min(encoded):.1f} dB)"
    )


def compare(
    case: str, folder: Path, goal: float | None, python: Path, rounds: int
) -> tuple[list[Comparison], str]:
    """Without and with fingerprints; and a line about the images."""
    images = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    shapes = [decode_rgb(data).shape for data in images]
    pixels = sum(height * width for height, width, _ in shapes)
    repeat = max(1, round(20e6 / pixels))
    args = {"images": f"{folder}/*.jpg", "short_side": SHORT_SIDE, "quality": QUALITY, "repeat": repeat}
    theirs = Snippet("img2dataset", PEER, args, python)
    first = theirs().note
    sizes = [(width, height) for width, height in first["sizes"]]
    limit = Snippet("limit", LIMIT, args | {"sizes": sizes})
    results, share = [], 0.0
    for marks in (False, True):
        ours = Snippet("ours", OURS, args | {"fingerprints": marks})
        name = f"{case}, fingerprints" if marks else case
        results.append(alternate(name, ours, theirs, limit, rounds=rounds, goal=None if marks else goal))
        note = results[-1].ours[0].note
        share = note["bytes"] / first["bytes"]
        if note["sizes"] != first["sizes"]:
            raise RuntimeError(f"{case}: the sides' sizes differ: {note['sizes']} and {first['sizes']}")
        ours.close()
    theirs.close()
    limit.close()
    total = sum(map(len, images))
    about = (
        f"{case}: {len(images)} images, {total / len(images) / 1e3:.0f} KB, {8 * total / pixels:.2f} "
        f"bits/pixel; {quality(images, sizes)}; our output has {share:.1%} of the peer's bytes"
    )
    return results, about


def main() -> None:
    options = arguments(str(__doc__).splitlines()[0]).parse_args()
    python = img2dataset_python()
    results: list[Comparison] = []
    lines: list[str] = []
    for case, (folder, goal) in write_images().items():
        compared, about = compare(case, folder, goal, python, options.rounds)
        results += compared
        lines.append(about)
    packages = ["simplejpeg", "opencv-python-headless", "pillow", "numpy"]
    report("images to a short side of 256, one core", results, packages, options.json, images=lines)
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
