"""Typed, frozen configuration of a training run, and the way from a recipe to it.

A recipe is YAML; knobs are ``key=value`` with dotted keys. Unknown keys, wrong types and impossible
combinations are a `ConfigError` with the dotted path, before anything is allocated (design law 8).
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from cluster.errors import ConfigError
from cluster.store import StoreConfig
from data_pipeline.loader import LoaderConfig
from data_pipeline.mixing import MixPart
from model.config import ModelConfig, resolve
from system.evaluation_config import EvaluationConfig

# Keys that may differ between the attempts of one run; everything else is the run's identity.
FREE_KEYS = (
    "run.uri",
    "run.processes",
    "run.event_seconds",
    "data.uri",
    "data.mix",  # what it mixes, and how, is in the digest that stands for the data set
    "data.loader",
    "engine.zero_stage",
    "engine.accumulation",
    "engine.offload_optimizer",
    "engine.offload_parameters",
    "checkpoint",
    "evaluation",
    "store",
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    uri: str
    """Run folder: a local path or s3://bucket/prefix. Events, checkpoints and evaluations live under it."""
    steps: int
    """Optimizer steps of the whole run; the schedules end here."""
    processes: int = 1
    """Local processes that `maskclip train` starts (ignored under torchrun)."""
    event_seconds: float = 5.0
    """Events reach the store this often; a killed process loses at most so many seconds of them."""
    seed: int = 0
    """Keys the initial weights, the sample order, crops, masks and token corruption."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.processes < 1 or self.event_seconds <= 0:
            raise ValueError("steps, processes and event_seconds are above 0; raise run.steps or the others")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    uri: str = ""
    """Committed data set, as written by `maskclip preprocess`; or give `mix`."""
    mix: tuple[MixPart, ...] = ()
    """Several data sets, each with a whole-number weight; every batch holds exactly their shares, so
    global_batch is a multiple of the sum of the weights (in lowest terms)."""
    global_batch: int = 4096
    """Pairs per step over all ranks (paper: 4096). World size need not divide it."""
    streams: int = 64
    """Logical streams of the sample order, at most; divides global_batch."""
    window_shards: int = 4
    """Samples are permuted within windows of about this many shards."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Area range of the random crop (SLIP's value; not given in the paper)."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    @property
    def parts(self) -> tuple[MixPart, ...]:
        """What is trained on: the parts of the mix, or the one data set."""
        return self.mix or (MixPart(uri=self.uri, weight=1),)

    def __post_init__(self) -> None:
        if bool(self.uri) == bool(self.mix):
            raise ValueError("needs either one data set or a mix of several; set data.uri or data.mix")
        if self.streams < 1 or self.global_batch % self.streams:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of streams {self.streams}; "
                "change data.global_batch or data.streams"
            )


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Weights that the run begins from; not from the paper, which trains from scratch (docs/export.md)."""

    uri: str = ""
    """Folder or .safetensors file, local or s3://...: an export of ours, or CLIP as open_clip or Hugging Face
    store it. Read at step 0 only; empty: all weights come from run.seed."""
    mean: tuple[float, float, float] | None = None
    """Mean of the pixels (0 to 1, by channel) that the weights were trained on; none: as the folder says, and
    CLIP's if it says nothing."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the pixels, likewise."""

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None) or (self.mean is not None and not self.uri):
            raise ValueError("mean and std go together, and with uri; set init.uri, init.mean and init.std")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std {self.std} is not above 0; change init.std")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule. lr, decay, betas and warm-up are not from the paper: SLIP's CLIP recipe."""

    lr: float = 5e-4
    final_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup_steps: int = 2000
    weight_decay: float = 0.5
    layer_decay: float = 1.0
    """Factor on the learning rate for every layer further from the top of a tower; 1: none (not from the
    paper; below 1 when a tower begins from trained weights)."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    gradient_clip: float = 0.0
    """Clip the global gradient norm to this; 0 switches clipping off."""

    def __post_init__(self) -> None:
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay {self.layer_decay} is not in (0, 1]; change optimizer.layer_decay")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """EMA teacher. The momentum range agrees with the authors' BootMAE; the paper's text for it was not
    seen."""

    momentum_start: float = 0.999
    momentum_end: float = 0.9999
    temperature_warmup: float = 0.1
    """Share of the run over which the teacher temperature rises from its start to its final value."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum_start <= self.momentum_end < 1.0:
            raise ValueError("0 <= momentum_start <= momentum_end < 1 must hold; change teacher.momentum_*")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is computed. None of it is from the paper, which does not say."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ranks share out: 1 optimizer state, 2 gradients too, 3 parameters too; 0 nothing."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of the passes; the masters and all sums over ranks are fp32. fp16 has a dynamic loss scale."""
    accumulation: int = 1
    """Micro-batches per step and rank. Features are computed one more time, so that negatives come from the
    whole global batch; loss and gradient are those of accumulation 1."""
    offload_optimizer: bool = False
    """Masters and Adam's moments live and are updated in host memory."""
    offload_parameters: bool = False
    """The shares of the parameters that the passes compute with live in host memory too (ZeRO 3)."""
    compile: bool = False
    """Compile each transformer block with torch.compile; the first steps take minutes longer."""
    max_refused_steps: int = 3
    """Refused steps in a row before the attempt ends with the NonFinite exit code; those that halved the loss
    scale of fp16 do not count."""

    def __post_init__(self) -> None:
        if self.accumulation < 1:
            raise ValueError(f"accumulation is {self.accumulation}: set engine.accumulation to 1 or more")
        if self.max_refused_steps < 1:
            raise ValueError(
                f"max_refused_steps is {self.max_refused_steps}: set engine.max_refused_steps to 1 or more"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "the optimizer is offloaded from stage 1 on; set engine.zero_stage to 1, 2 or 3, or "
                "engine.offload_optimizer to false"
            )
        if self.offload_parameters and not (self.zero_stage == 3 and self.offload_optimizer):
            raise ValueError(
                "parameters are offloaded at stage 3 and together with the optimizer; set engine.zero_stage "
                "to 3 and engine.offload_optimizer to true, or engine.offload_parameters to false"
            )
        if self.precision == "fp16" and self.zero_stage == 0:
            raise ValueError(
                "DeepSpeed does not scale the loss at stage 0; set engine.zero_stage to 1, 2 or 3, or "
                "engine.precision to bf16"
            )
        if self.accumulation > 1 and self.precision != "fp32" and self.zero_stage < 2:
            raise ValueError(
                f"below stage 2 the gradients of micro-batches would be summed in {self.precision}; set "
                "engine.zero_stage to 2 or 3, engine.precision to fp32 or engine.accumulation to 1"
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "blocks whose parameters are sharded cannot be compiled; set engine.zero_stage to 2 or "
                "engine.compile to false"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 1000
    """A checkpoint is committed after every so many steps, at the end and when the run is asked to stop."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError("every_steps is at least 1; raise checkpoint.every_steps")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    run: RunConfig
    data: DataConfig
    model: ModelConfig
    command: Literal["train"] = "train"
    init: InitConfig = field(default_factory=InitConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    store: StoreConfig = field(default_factory=StoreConfig)


T = TypeVar("T")


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 with two repairs: ``1e-4`` is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"the key '{twice[0]}' stands twice")
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_RecipeLoader)  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: not valid YAML ({reason}); correct the recipe") from None


def parse_overrides(overrides: list[str]) -> list[tuple[list[str], Any]]:
    """``["a.b=1"]`` -> ``[(["a", "b"], 1)]``; values are read as YAML."""
    pairs = []
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator or not all(key.split(".")):
            raise ConfigError(f"'{item}' is not of the form key=value; write for example run.steps=100")
        pairs.append((key.split("."), _parse_yaml(value, item)))
    return pairs


def apply_overrides(values: dict, overrides: list[str]) -> dict:
    values = json.loads(json.dumps(values))
    for path, value in parse_overrides(overrides):
        node = values
        for depth, name in enumerate(path[:-1], start=1):
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{'.'.join(path)}: '{'.'.join(path[:depth])}' is a value, not a section")
        node[path[-1]] = value
    return values


def validate(kind: type[T], values: dict, where: str) -> T:
    """Build `kind` (a dataclass) from plain values.

    Raises:
        ConfigError: unknown key, wrong type, missing key or impossible value; one line with every dotted
        path.
    """
    strict = with_config(ConfigDict(extra="forbid", strict=True))(kind)  # nested sections inherit it
    try:
        return TypeAdapter(strict).validate_json(json.dumps(values))
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise ConfigError(f"{where}: {'; '.join(problems)}") from None


def _explain(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"]) or "recipe"
    if problem["type"] == "unexpected_keyword_argument":
        return f"{path}: unknown key, remove it or correct its spelling"
    if problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{path}: missing, add it to the recipe or give {path}=..."
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{path}: {message}"
    return f"{path}: {message[0].lower()}{message[1:]}, not {problem['input']!r}"


def read_recipe(path: str) -> dict:
    """The plain values of a recipe file. Raises ConfigError when it is absent or not a YAML mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(
            f"{path}: cannot read the recipe ({reason}); give the path of a YAML recipe"
        ) from None
    values = _parse_yaml(text, path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a YAML mapping of sections; see configs/ for examples")
    return values


def load_recipe(path: str, overrides: list[str], kind: type[T]) -> T:
    """Read, override and validate the recipe at `path` as a `kind`."""
    return build_config(apply_overrides(read_recipe(path), overrides), path, kind)


def load_train_recipe(path: str, overrides: list[str]) -> TrainConfig:
    """As `load_recipe`, with the model's preset filled in."""
    values = apply_overrides(read_recipe(path), overrides)
    section = values.get("model", {})
    if isinstance(section, dict):
        try:
            values["model"] = resolve(section)
        except ValueError as error:
            raise ConfigError(f"{path}: model: {error}") from None
    return build_config(values, path, TrainConfig)


def build_config(values: dict, path: str, kind: type[T]) -> T:
    """Validate `values` as a `kind`, which must be for the command that the recipe names."""
    wanted = next(f.default for f in dataclasses.fields(kind) if f.name == "command")  # type: ignore[arg-type]
    given = values.get("command", wanted)
    if given != wanted:
        raise ConfigError(f"{path}: this recipe is for `maskclip {given}`, not `maskclip {wanted}`")
    return validate(kind, values, path)


def to_dict(config: Any) -> dict:
    """Plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def identity(config: TrainConfig) -> dict[str, Any]:
    """Dotted keys and values that must be the same in every attempt of a run."""
    flat = flatten(to_dict(config))
    return {
        k: v for k, v in flat.items() if not any(k == free or k.startswith(free + ".") for free in FREE_KEYS)
    }


def digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
