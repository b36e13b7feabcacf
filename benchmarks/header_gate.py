"""What does it cost to refuse a JPEG of 14000 x 14000 pixels?

Ours reads the header and applies a limit of pixels; the peer, img2dataset 1.47.0 with max_image_area, decodes
the image and looks at its size then. The goal is a refusal in at most 1 ms and 5 MB. The SHA-256 of the
bytes, which the ledger wants of every original, kept or not, is timed apart.

    python -m benchmarks.header_gate [--json FILE]
"""

from __future__ import annotations

import statistics
from pathlib import Path

import simplejpeg

from benchmarks.common import BUILD, Snippet, alternate, arguments, cost, report
from benchmarks.images import synthetic_rgb
from benchmarks.preprocess_speed import PEER_SETUP, img2dataset_python

SIDE, MAX_PIXELS = 14_000, 50_000_000

_MEMORY = """
import resource
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
data = open(ARGS["image"], "rb").read()
NOTE = {}
def noted(function):
    before = peak()
    result = function()
    NOTE.setdefault("grown_mb", peak() - before)  # by the first call; later ones find the memory there
    return result
"""
PEER = (
    PEER_SETUP
    + _MEMORY
    + """
resize = resizer.Resizer(256, "keep_ratio", True, max_image_area=ARGS["max_pixels"])
resize(io.BytesIO(open(ARGS["small"], "rb").read()))  # what is loaded once is not the image's cost
def run():
    result = noted(lambda: resize(io.BytesIO(data)))
    assert result[-1] == "image area too large", result[-1]
    return 1
"""
)
OURS = (
    _MEMORY
    + """
from data_pipeline.image.header import read_header
read_header(open(ARGS["small"], "rb").read())
def refuse():
    header = read_header(data)
    return header.width * header.height > ARGS["max_pixels"]
def run():
    assert noted(refuse)
    assert all(refuse() for _ in range(9999))
    return 10000
"""
)
SHA256 = """
import hashlib
data = open(ARGS["image"], "rb").read()
def run():
    hashlib.sha256(data).digest()
    return 1
"""


def write_images() -> tuple[Path, Path]:
    """The huge JPEG, and a small one to warm up with."""
    folder = BUILD / "images" / "huge"
    huge, small = folder / f"{SIDE}.jpg", folder / "small.jpg"
    if not huge.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = synthetic_rgb(700, 700, 0)
        small.write_bytes(simplejpeg.encode_jpeg(part, 85, "RGB", "420"))
        blocks = part.repeat(SIDE // 700, axis=0).repeat(SIDE // 700, axis=1)
        huge.write_bytes(simplejpeg.encode_jpeg(blocks, 50, "RGB", "420"))
    return huge, small


def main() -> None:
    options = arguments(str(__doc__).splitlines()[0]).parse_args()
    huge, small = write_images()
    args = {"image": str(huge), "small": str(small), "max_pixels": MAX_PIXELS}
    sides = {
        "theirs": Snippet("img2dataset", PEER, args, img2dataset_python()),
        "ours": Snippet("ours", OURS, args),
        "sha256": Snippet("sha256", SHA256, args),
    }
    case = f"refuse {SIDE}x{SIDE}"
    result = alternate(case, sides["ours"], sides["theirs"], rounds=options.rounds, goal=500)
    hashed = statistics.median(cost(sides["sha256"]()) for _ in range(options.rounds))
    for side in sides.values():
        side.close()
    report("an image refused by its header", [result], ["simplejpeg"], options.json)
    ours_ms = 1e3 * statistics.median(map(cost, result.ours))
    grown = {"ours": result.ours[0].note["grown_mb"], "peer": result.theirs[0].note["grown_mb"]}
    met = "met" if ours_ms <= 1 and grown["ours"] <= 5 else "MISSED"
    print(
        f"{huge.stat().st_size / 1e6:.1f} MB of JPEG; ours {ours_ms:.4f} ms and +{grown['ours']:.1f} MB "
        f"(goal 1 ms and 5 MB: {met}); peer +{grown['peer']:.0f} MB; SHA-256 of it {1e3 * hashed:.1f} ms"
    )


if __name__ == "__main__":
    main()
