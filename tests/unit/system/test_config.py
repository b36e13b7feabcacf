"""Configuration: what is wrong is named with its dotted path; what a run is does not change silently."""

from pathlib import Path

import pytest

from cluster.errors import ConfigError
from data_pipeline.preprocess import PreprocessConfig
from system.config import digest, identity, load_recipe, load_train_recipe, to_dict, validate

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
EMOJI = str(CONFIGS / "emoji.yaml")


def message(*knobs: str, recipe: str = EMOJI) -> str:
    with pytest.raises(ConfigError) as caught:
        load_train_recipe(recipe, list(knobs))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_valid_and_begins_with_its_command(path):
    first = path.read_text().splitlines()[0]
    kind = "preprocess" if "preprocess" in first else "train"
    config = (
        load_recipe(str(path), [], PreprocessConfig)
        if kind == "preprocess"
        else load_train_recipe(str(path), [])
    )
    assert config.command == kind
    assert path.name in first


@pytest.mark.parametrize(
    ("knob", "path"),
    [
        ("run.stepz=1", "run.stepz"),
        ("runn.steps=1", "runn"),
        ("model.distill.wait=1", "model.distill.wait"),
        ("run.steps=1.5", "run.steps"),
        ("run.steps=true", "run.steps"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("engine.precision=fp8", "engine.precision"),
        ("engine.accumulation=0", "engine.accumulation"),
        ("engine.accumulation=2", "engine.accumulation"),  # the recipe's: stage 1 in bf16
        ("engine.max_refused_steps=0", "engine.max_refused_steps"),
        ("engine={zero_stage: 0, offload_optimizer: true}", "engine.offload_optimizer"),
        ("engine={zero_stage: 2, offload_parameters: true}", "engine.offload_parameters"),
        ("engine={zero_stage: 0, precision: fp16}", "engine.precision"),
        ("engine={zero_stage: 3, compile: true}", "engine.compile"),
        ("run=5", "run"),
        ("run.steps=0", "run.steps"),
        ("data.loader.workers=-1", "data.loader"),
        ("teacher.momentum_start=1.5", "teacher.momentum"),
    ],
)
def test_an_error_names_the_dotted_path(knob, path):
    assert path in message(knob)


def test_exponents_without_a_dot_are_numbers():
    assert load_train_recipe(EMOJI, ["optimizer.lr=1e-4"]).optimizer.lr == 1e-4


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    twice = tmp_path / "twice.yaml"
    twice.write_text("run: {uri: a, steps: 1}\ndata: {uri: b}\nrun: {uri: c, steps: 2}\n")
    assert "'run' stands twice" in message(recipe=str(twice))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [1\n", "run: !!python/object:os.system {}\n"])
def test_what_is_no_recipe_is_refused(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert str(path) in message(recipe=str(path))


def test_saved_config_builds_the_same_config():
    config = load_train_recipe(EMOJI, ["model.distill.weight=0.1"])
    again = validate(type(config), to_dict(config), "saved")
    assert again == config


def test_identity_ignores_where_and_with_how_many():
    base = digest(identity(load_train_recipe(EMOJI, [])))
    free = [
        "run.uri=s3://b/c",
        "run.processes=7",
        "data.uri=x",
        "engine.zero_stage=3",
        "engine.offload_optimizer=true",
        "engine.offload_parameters=true",
        "engine.accumulation=4",
        "data.loader.workers=3",
    ]
    assert digest(identity(load_train_recipe(EMOJI, free))) == base
    for bound in ("run.seed=1", "data.global_batch=80", "model.mlm.weight=0.1", "optimizer.lr=7e-4"):
        assert digest(identity(load_train_recipe(EMOJI, [bound]))) != base
