"""Configuration: what is wrong is named with its dotted path; what a run is does not change silently."""

import pytest

from cluster.errors import ConfigError
from data_pipeline.job.preprocess import PreprocessConfig
from data_pipeline.loading.mixing import MixedOrder
from data_pipeline.loading.order import OrderConfig
from data_pipeline.loading.tokenizer import CONTEXT_LENGTH, VOCAB_SIZE
from system.config import (
    CAPTION_TOKENS,
    VOCABULARY,
    TrainConfig,
    digest,
    flatten,
    identity,
    load_train_recipe,
    to_dict,
)
from system.evaluation.config import EvaluateConfig
from system.export.config import ExportConfig
from system.recipe import load_recipe, parse_overrides, validate
from system.settings_help import settings
from tests.support.paths import ROOT

CONFIGS = ROOT / "configs"
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


@pytest.mark.parametrize(
    "knob",
    [
        "data.global_batch=0",
        "data.global_batch=-96",
        "data.streams=0",
        "data.window_shards=0",
        "data.crop_scale=[1, 0.5]",
        "data.crop_scale=[0, 0]",
        "data.crop_scale=[.nan, 1]",
        "data.loader.cache_bytes=-1",
        "data.loader.workers=100000",
        "data.loader.tombstone_seconds=.nan",
        "optimizer.lr=.nan",
        "optimizer.lr=.inf",
        "optimizer.lr=-1",
        "optimizer.lr=1e400",
        "optimizer.warmup_steps=-1",
        "optimizer.betas=[2, 3]",
        "optimizer.eps=0",
        "optimizer.weight_decay=.inf",
        "optimizer.weight_decay=-1",
        "optimizer.gradient_clip=-1",
        "optimizer.gradient_clip=.nan",
        "optimizer.layer_decay=0",
        "teacher.temperature_warmup=-1",
        "teacher.momentum_end=1",
        "engine.max_refused_steps=-1",
        "checkpoint.every_steps=0",
        "run.event_seconds=.nan",
        "run.event_seconds=.inf",
        "run.steps=-5",
        "run.steps=10000000000000000000000",
        "run.seed=-1",
        "run.processes=0",
        "run.processes=100000",
        "store.deadline_seconds=.inf",
        "store.deadline_seconds=0",
        "store.attempts=0",
        "store.backoff_seconds=-1",
        "model.distill.weight=.nan",
        "model.distill.weight=-1",
        "model.mlm.weight=.inf",
        "model.vision.layer_scale=.nan",
        "model.text.vocab_size=10",
        "model.text.context_length=100000",
        "evaluation.temperature=.nan",
    ],
)
def test_an_impossible_number_is_refused_by_its_key(knob):
    assert knob.partition("=")[0] in message(knob)


def test_what_the_tokenizer_gives_is_what_the_model_must_take():
    assert (VOCABULARY, CAPTION_TOKENS) == (VOCAB_SIZE, CONTEXT_LENGTH)


@pytest.mark.parametrize(
    ("knob", "says"),
    [
        ("run.uri=s3://", "no bucket"),
        ("run.uri=ftp://x/y", "ftp"),
        ("run.uri=''", "empty"),
        ('run.uri="a\\nb"', "line break"),
        ("data.uri=~nobody-of-that-name/x", "no such user"),
        ("init.uri=gs://x", "gs"),
    ],
)
def test_an_address_that_no_store_has_is_refused_by_its_key(knob, says):
    found = message(knob)
    assert knob.partition("=")[0] in found
    assert says in found


@pytest.mark.parametrize(
    ("run", "data"),
    [
        ("sets/a", "sets/a"),
        ("sets/a/run", "sets/a"),
        ("sets", "sets/a"),
        ("x/../sets/a/", "sets/a"),
        ("link/run", "sets/a"),
        ("s3://b/sets/a", "s3://b/sets/a/"),
        ("s3://b", "s3://b/sets"),
    ],
)
def test_run_and_data_set_do_not_lie_one_in_the_other(tmp_path, monkeypatch, run, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets/a").mkdir(parents=True)
    (tmp_path / "link").symlink_to("sets/a")
    assert "run.uri" in message(f"run.uri={run}", f"data.uri={data}")
    mixed = f"data.mix=[{{uri: other, weight: 1}}, {{uri: '{data}', weight: 1}}]"
    assert "run.uri" in message(f"run.uri={run}", "data.uri=''", mixed)
    load_train_recipe(EMOJI, [f"run.uri={run}-1", f"data.uri={data}-2"])


def test_a_saved_run_is_read_wherever_it_lies():
    config = to_dict(load_train_recipe(EMOJI, []))
    config["run"]["uri"] = config["data"]["uri"]
    assert validate(TrainConfig, config, "saved").run.uri == config["data"]["uri"]


def test_exponents_without_a_dot_are_numbers():
    assert load_train_recipe(EMOJI, ["optimizer.lr=1e-4"]).optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((number, float(number)) for number in ("1e-4", "1.", ".5", "-2.5E+3", "012.5", "1e400")),
        *((number, int(number)) for number in ("0", "-12", "+7", "1_000")),
        *((word, word) for word in ("012", "0o14", "0x10", "1:30", "no", "on", "Yes", "2024-01-01", "e5")),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("-.inf", float("-inf")),
        ("[no, 012]", ["no", "012"]),
        ('{a: "1"}', {"a": "1"}),
    ],
)
def test_values_are_read_as_yaml_1_2_without_what_versions_disagree_in(text, value):
    ((path, read),) = parse_overrides([f"a.b={text}"])
    assert (path, read, type(read)) == (["a", "b"], value, type(value))


def test_a_number_that_begins_with_0_is_no_number():
    assert "run.seed" in message("run.seed=012")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "a: &a {b: *a}",
        "[" * 100_000,
        "a: !!binary aGk=",
        "a: !!set {b}",
        "a: !!timestamp x",
        "a: !!bool maybe",
        "a: !!int x",
        "a: " + "9" * 5000,
        "? [a]\n: b",
    ],
)
def test_what_has_no_plain_values_is_no_recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert "not valid YAML" in message(recipe=str(path))
    if text.startswith("a: "):
        assert "not valid YAML" in message(f"run={text[3:]}")


def test_a_setting_that_undoes_another_is_an_error():
    assert "run.seed: given twice" in message("run.seed=1", "run.seed=1")
    assert "model.preset" in message("model.preset=test", "model={preset: tiny}")
    config = load_train_recipe(EMOJI, ["model={preset: test}", "model.vision.layers=3", "run.seed=1"])
    assert (config.model.preset, config.model.vision.layers) == ("test", 3)


def test_without_a_recipe_nothing_says_to_add_to_it():
    with pytest.raises(ConfigError) as caught:
        validate(ExportConfig, {}, "export", recipe=False)
    assert str(caught.value) == "export: output: missing, give output=..."


def test_help_lists_every_setting_with_type_bounds_default_and_text():
    listed = {one.key: one for one in settings(TrainConfig, {})}
    config = load_train_recipe(EMOJI, [])
    assert set(flatten(to_dict(config))) - {"command"} == set(listed)
    assert [one.key for one in listed.values() if not one.text] == []
    steps = listed["run.steps"]
    assert (steps.kind, steps.default) == ("whole number, at least 1, at most 999999999", "required")
    assert "cannot be made longer" in steps.text
    assert listed["engine.precision"].kind == "fp32 | bf16 | fp16"
    assert (listed["optimizer.betas"].default, listed["data.mix"].kind) == (
        "[0.9, 0.98]",
        "list of {uri, weight}",
    )
    evaluate = {one.key: one for one in settings(EvaluateConfig, {})}
    assert evaluate["data"].text.startswith("Images to evaluate on")  # of the base class
    assert "required with source.table" in {one.default for one in settings(PreprocessConfig, {})}


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


MIX = "data.mix=[{uri: a, weight: 6}, {uri: b, weight: 2}]"


@pytest.mark.parametrize("cleared", ["data.uri=", "data.uri=null", "data.uri=''"])
def test_a_mix_takes_the_place_of_the_data_set_of_a_recipe(cleared):
    config = load_train_recipe(EMOJI, [cleared, MIX])
    assert config.data.uri == ""
    assert [(part.uri, part.weight) for part in config.data.parts] == [("a", 6), ("b", 2)]


def test_a_data_set_and_a_mix_are_too_much_and_neither_too_little():
    found = message(MIX)
    assert "data.uri and data.mix are both set" in found
    assert "data.uri=" in found
    assert "data.mix=[]" in found
    assert "set data.uri or data.mix" in message("data.uri=")
    assert load_train_recipe(EMOJI, ["data.uri=c", "data.mix=[]"]).data.parts[0].uri == "c"


@pytest.mark.parametrize(
    ("weights", "batch", "fits"),
    [((6, 2), 100, True), ((6, 2), 98, False), ((1, 2), 96, True), ((1, 2), 80, False)],
)
def test_weights_that_do_not_divide_the_batch_are_refused_by_their_key(weights, batch, fits):
    mix = f"data.mix=[{{uri: a, weight: {weights[0]}}}, {{uri: b, weight: {weights[1]}}}]"
    knobs = ["data.uri=", mix, f"data.global_batch={batch}", "data.streams=2"]
    if fits:
        config = load_train_recipe(EMOJI, knobs).data
        shards = [[50] * 8, [30] * 8]
        order = OrderConfig(seed=0, streams=config.streams, window_shards=2)
        assert sum(MixedOrder(shards, weights, order, batch).counts) == batch
    else:
        found = message(*knobs)
        assert "data.global_batch" in found
        assert "data.mix" in found
