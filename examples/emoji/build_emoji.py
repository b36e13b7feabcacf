"""Rebuild the demo data of this folder from four npm packages, byte for byte.

    python examples/emoji/build_emoji.py            # rebuild train/, eval/ and emoji.sha256 in place
    python examples/emoji/build_emoji.py --check    # rebuild elsewhere and compare with emoji.sha256
    python examples/emoji/build_emoji.py --every build/emoji-all    # every concept, elsewhere; not committed

The layout is the one that img2dataset writes with `output_format=webdataset`: per shard a tar with
`<key>.png|jpg`, `<key>.txt`, `<key>.json`, a parquet table of the same rows and a `_stats.json`. Nothing is
drawn from a random stream: order and wording are keyed by a hash of the concept, so they depend on
`concepts.txt` and on nothing else. Train images are the files of the packages, untouched; eval images are
re-encoded, so a rebuild is byte-identical only with the Pillow and pyarrow of the lock. Needs npm.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HERE = Path(__file__).resolve().parent
SUMS = "emoji.sha256"
VERSIONS = {
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "cldr-annotations-full": "48.2.0",
}
FLUENT = "@lobehub/fluent-emoji-3d"
TRAIN_STYLES = ("google", "twitter")
SAMPLES_PER_SHARD = 100
EVAL_SIDE = 128
EVAL_QUALITY = 88
COLUMNS = ("url", "caption", "key", "status", "error_message", "width", "height")
COLUMNS += ("original_width", "original_height", "exif", "sha256", "concept", "style")


@dataclass(frozen=True)
class Concept:
    code: str  # code points as the packages name their files, e.g. "1f436" or "2600-fe0f"
    name: str  # CLDR English short name, unique among the concepts
    keywords: tuple[str, ...]  # CLDR English keywords that say something the name does not


@dataclass(frozen=True)
class Picture:
    concept: Concept
    style: str
    caption: str
    url: str
    extension: str
    image: bytes
    original: bytes
    size: tuple[int, int]
    original_size: tuple[int, int]


def keyed(*parts: str) -> int:
    """A number in [0, 2^64) that depends on `parts` alone."""
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:8], "big")


class Words:
    """CLDR's English names and keywords, by code."""

    def __init__(self, packages: Path) -> None:
        self.table = packages / "cldr-annotations-full/annotations/en/annotations.json"
        self._entries = json.loads(self.table.read_text("utf-8"))["annotations"]["annotations"]

    def concept(self, code: str) -> Concept | None:
        """None for what CLDR does not name: flags, and most of what is joined of several code points."""
        text = "".join(chr(int(point, 16)) for point in code.split("-"))
        entry = self._entries.get(text) or self._entries.get(text.replace("\ufe0f", ""))
        if entry is None:
            return None
        name = entry["tts"][0]
        known = set(name.lower().split())
        keywords = tuple(word for word in entry["default"] if not set(word.lower().split()) <= known)
        return Concept(code, name, keywords)


def load_concepts(packages: Path) -> list[Concept]:
    """The concepts of concepts.txt with their CLDR words; SystemExit when a name differs."""
    words, concepts = Words(packages), []
    for line in (HERE / "concepts.txt").read_text("utf-8").splitlines():
        code, name = line.split(" ", 1)
        concept = words.concept(code)
        if concept is None or concept.name != name:
            raise SystemExit(f"concepts.txt: {code} is not called {name!r} in {words.table}")
        concepts.append(concept)
    if len({concept.name for concept in concepts}) != len(concepts):
        raise SystemExit("concepts.txt: a short name occurs twice; an eval caption must name one concept")
    return concepts


def every_concept(packages: Path) -> list[Concept]:
    """All that CLDR names and all three styles draw, by code; of those with the same name or the same eval
    picture the first."""
    words, found, seen = Words(packages), dict[str, Concept](), set[bytes]()
    for picture in sorted((packages / "emoji-datasource-google/img/google/64").glob("*.png")):
        concept = words.concept(picture.stem)
        if concept is None or concept.name in found:
            continue
        twitter = packages / f"emoji-datasource-twitter/img/twitter/64/{picture.name}"
        fluent = fluent_file(packages, concept)
        if not twitter.exists() or fluent is None:
            continue
        drawn = (packages / FLUENT / fluent).read_bytes()
        if drawn not in seen:
            seen.add(drawn)
            found[concept.name] = concept
    return list(found.values())


def train_caption(concept: Concept, style: str) -> str:
    """The bare name for one style, name and up to three keywords for the other; which is which is keyed."""
    described = TRAIN_STYLES[keyed("wording", concept.code) % 2]
    if style != described or not concept.keywords:
        return concept.name
    chosen = sorted(concept.keywords, key=lambda word: keyed("keyword", concept.code, word))[:3]
    return f"{concept.name}: {', '.join(chosen)}"


def train_picture(packages: Path, concept: Concept, style: str) -> Picture:
    package = f"emoji-datasource-{style}"
    inside = f"img/{style}/64/{concept.code}.png"
    image = (packages / package / inside).read_bytes()
    with Image.open(io.BytesIO(image)) as picture:
        size = picture.size
    url = f"pkg:npm/{package}@{VERSIONS[package]}#{inside}"
    return Picture(concept, style, train_caption(concept, style), url, "png", image, image, size, size)


def fluent_file(packages: Path, concept: Concept) -> str | None:
    """The picture's path inside its package; None where there is none."""
    candidates = (f"assets/{code}.webp" for code in (concept.code, concept.code.replace("-fe0f", "")))
    return next((path for path in candidates if (packages / FLUENT / path).exists()), None)


def eval_picture(packages: Path, concept: Concept) -> Picture:
    package, inside = FLUENT, fluent_file(packages, concept)
    if inside is None:
        raise SystemExit(f"{concept.code}: {package} does not draw it")
    original = (packages / package / inside).read_bytes()
    with Image.open(io.BytesIO(original)) as picture:
        original_size = picture.size
        rgba = picture.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    flat = flat.resize((EVAL_SIDE, EVAL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    flat.save(buffer, "JPEG", quality=EVAL_QUALITY, optimize=True)
    url = f"pkg:npm/{package.replace('@', '%40')}@{VERSIONS[package]}#{inside}"
    image = buffer.getvalue()
    return Picture(concept, "fluent-3d", concept.name, url, "jpg", image, original, flat.size, original_size)


def row_of(picture: Picture, key: str) -> dict[str, str | int | None]:
    values = (picture.url, picture.caption, key, "success", None, *picture.size, *picture.original_size, "{}")
    values += (hashlib.sha256(picture.original).hexdigest(), picture.concept.code, picture.style)
    return dict(zip(COLUMNS, values, strict=True))


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def write_shard(folder: Path, number: int, pictures: list[Picture]) -> None:
    stem = f"{number:05d}"
    rows = []
    with tarfile.open(folder / f"{stem}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, picture in enumerate(pictures):
            row = row_of(picture, f"{stem}{i:04d}")
            rows.append(row)
            add_member(tar, f"{row['key']}.{picture.extension}", picture.image)
            add_member(tar, f"{row['key']}.txt", picture.caption.encode())
            packed = json.dumps(row, ensure_ascii=False, separators=(",", ":"))
            add_member(tar, f"{row['key']}.json", packed.encode())
    number_columns = {name for name in COLUMNS if name.endswith(("width", "height"))}
    schema = pa.schema({name: pa.int32() if name in number_columns else pa.string() for name in COLUMNS})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{stem}.parquet", compression="zstd")
    stats = {
        "count": len(rows),
        "successes": len(rows),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        # img2dataset notes when it ran; a rebuild must not differ, so there is no time here
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": len(rows)},
    }
    (folder / f"{stem}_stats.json").write_text(json.dumps(stats, indent=4) + "\n", "utf-8")


def write_set(folder: Path, pictures: list[Picture]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ordered = sorted(pictures, key=lambda picture: keyed("order", picture.style, picture.concept.code))
    for number, start in enumerate(range(0, len(ordered), SAMPLES_PER_SHARD)):
        write_shard(folder, number, ordered[start : start + SAMPLES_PER_SHARD])


def build(packages: Path, out: Path, concepts: list[Concept]) -> None:
    """Write out/train, out/eval and out/emoji.sha256."""
    write_set(out / "train", [train_picture(packages, c, style) for c in concepts for style in TRAIN_STYLES])
    write_set(out / "eval", [eval_picture(packages, c) for c in concepts])
    (out / SUMS).write_text("".join(checksums(out)), "utf-8")


def checksums(out: Path) -> Iterator[str]:
    for part in ("eval", "train"):
        for path in sorted((out / part).iterdir()):
            yield f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {part}/{path.name}\n"


def install_packages(folder: Path) -> Path:
    """Install the four packages (no scripts are run) below `folder`; returns its node_modules."""
    if shutil.which("npm") is None:
        raise SystemExit("npm is not on the PATH: install Node.js, or pass --packages NODE_MODULES")
    folder.mkdir(parents=True)
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder)]
    wanted = [f"{name}@{version}" for name, version in VERSIONS.items()]
    subprocess.run(["npm", "install", *options, *wanted], check=True, stdout=sys.stderr)
    return folder / "node_modules"


def main() -> int:
    parser = argparse.ArgumentParser(description="Rebuild the emoji demo data.")
    parser.add_argument("--packages", type=Path, help="a node_modules that holds the packages already")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--check", action="store_true", help="compare with emoji.sha256, change nothing")
    where.add_argument("--every", type=Path, metavar="FOLDER", help="build every concept into FOLDER")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        packages = args.packages or install_packages(Path(scratch) / "npm")
        out = Path(scratch) / "out" if args.check else args.every or HERE
        concepts = every_concept(packages) if args.every else load_concepts(packages)
        build(packages, out, concepts)
        size = sum(path.stat().st_size for part in ("train", "eval") for path in (out / part).iterdir())
        print(f"{len(concepts)} concepts, {size / 1e6:.2f} MB")
        if args.check and (out / SUMS).read_text("utf-8") != (HERE / SUMS).read_text("utf-8"):
            raise SystemExit(f"the rebuilt data differ from {SUMS}: are Pillow and pyarrow the locked ones?")
    return 0


if __name__ == "__main__":
    sys.exit(main())
