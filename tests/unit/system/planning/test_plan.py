"""The plan of a recipe: its numbers follow from each other, its mistakes are one line."""

import json
import math

import pytest

from model.config import preset
from model.flops import flops_per_pair
from system.cli import main
from system.planning.memory import Shapes, checkpoint_bytes, rank_memory
from tests.support.memory_worker import worker_config
from tests.support.runs import write_recipe

STATED = ("sample_bytes=5000", "settings=[run.uri=elsewhere]")


def test_time_follows_from_flops_and_the_stated_utilisation(tmp_path, capsys):
    words = [*STATED, "gpus=8", "mfu=0.5", "caption_tokens=32", "--json"]
    assert main(["plan", str(write_recipe(tmp_path)), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    flops = flops_per_pair(preset("test"), 32, 6.0).training + 8 * 24 * 64
    assert found["flops_per_pair"] == pytest.approx(flops)
    # fp32 products of an H100 at half their peak.
    assert found["step_seconds"] == pytest.approx(24 * flops / (8 * 494e12 * 0.5))
    assert found["pairs_per_second"] == pytest.approx(24 / found["step_seconds"])
    assert found["store_bytes_per_second"] == pytest.approx(5000 * found["pairs_per_second"])
    assert found["gpu_hours"] == pytest.approx(8 * 12 * found["step_seconds"] / 3600)
    best = math.sqrt(2 * max(found["checkpoint_stall_seconds"], 1e-3) * 24 * 3600)
    assert found["checkpoint_interval_seconds"] == pytest.approx(
        max(best, 1.2 * found["checkpoint_save_seconds"])
    )


def test_what_is_shared_out_sums_to_the_whole():
    """Over the ranks, at every stage that shares it."""
    config = worker_config({"zero_stage": 3, "precision": "bf16"})
    shapes = Shapes.of(config)
    alone = rank_memory(config, shapes, 1, 1, 0.0)
    for ranks in (2, 3, 8):
        memories = {stage: rank_memory(config, shapes, stage, ranks, 0.0) for stage in range(4)}
        for stage in (1, 2, 3):
            assert ranks * memories[stage].optimizer == pytest.approx(alone.optimizer, rel=1e-4)
        assert shapes.averaged <= ranks * shapes.averaged_share(ranks) <= ranks * shapes.averaged
        assert memories[0].state > memories[1].state
        assert memories[1].parameters == memories[0].parameters > memories[3].parameters
    assert checkpoint_bytes(shapes) == alone.optimizer + 4 * shapes.averaged


@pytest.mark.parametrize(
    ("words", "key"),
    [(("gpus=64",), "global_batch"), (("caption_tokens=100",), "caption_tokens"), (("gpu=tpu",), "gpu")],
)
def test_a_plan_that_cannot_be_is_one_line(tmp_path, capsys, words, key):
    code = main(["plan", str(write_recipe(tmp_path)), *STATED, *words])
    said = capsys.readouterr().err
    assert (code, said.count("\n")) == (64, 1), said
    assert key in said


def test_a_simulation_needs_its_costs_or_a_run(tmp_path, capsys):
    for words, key in (
        (["step_seconds=0.5"], "restart_seconds"),
        ([str(tmp_path / "nothing")], "no run here"),
    ):
        code = main(["simulate", *words])
        said = capsys.readouterr().err
        assert (code, said.count("\n")) in ((64, 1), (65, 1)), said
        assert key in said


def test_a_simulation_says_that_it_is_one(tmp_path, capsys):
    costs = ["step_seconds=0.5", "stall_seconds=0.1", "save_seconds=5", "restore_seconds=5"]
    sizes = ["days=3", "repeats=1", "gpus=[1024,4096]", "intervals=[60,600]"]
    output = f"output={tmp_path / 'curve.png'}"
    assert main(["simulate", *costs, "restart_seconds=40", *sizes, output, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["simulated"] is True
    small, large = found["sizes"]
    assert small["goodput"] > large["goodput"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
