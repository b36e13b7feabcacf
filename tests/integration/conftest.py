"""Small committed data sets out of the emoji sample, made once by the real command."""

import shutil
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.runs import maskclip, train, write_recipe


def preprocess_to(output: str, part: str, tars: int, folder: Path) -> int:
    """The first `tars` tars of a part of the sample -> a data set of 32 px images at `output`; the exit
    code."""
    source = folder / f"raw-{part}"
    source.mkdir()
    for number in range(tars):
        shutil.copy(ROOT / f"examples/emoji/{part}/{number:05d}.tar", source)
    recipe = ROOT / f"configs/emoji_{part}_data.yaml"
    knobs = (f"source.uri={source}", f"output={output}", "transform.short_side=32")
    return maskclip("preprocess", recipe, *knobs).returncode


@pytest.fixture(scope="session")
def train_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """300 samples in 3 shards."""
    folder = tmp_path_factory.mktemp("data")
    assert preprocess_to(str(folder / "train"), "train", 3, folder) == 0
    return str(folder / "train")


@pytest.fixture(scope="session")
def undisturbed_run(tmp_path_factory: pytest.TempPathFactory, train_data: str) -> Path:
    """What the recipe of `tests.support.runs` gives when nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(write_recipe(folder), folder / "run", train_data)
    return folder / "run"


@pytest.fixture(scope="session")
def eval_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """100 samples in one shard."""
    folder = tmp_path_factory.mktemp("data")
    assert preprocess_to(str(folder / "eval"), "eval", 1, folder) == 0
    return str(folder / "eval")
