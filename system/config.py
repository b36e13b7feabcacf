"""Typed, frozen configuration of a training run.

The bounds of single values stand at their types, and `recipe.validate` applies them; what several values must
be together is in `__post_init__`. Either error is one line with the dotted key, before anything is allocated
(design law 8).
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from cluster.errors import ConfigError
from cluster.store import StoreConfig, normal_uri, overlap
from cluster.watchdog import WatchdogConfig
from data_pipeline.loading.loader_config import LoaderConfig
from data_pipeline.loading.mixing import MixPart
from model.config import ModelConfig, resolve
from system.checkpoints.config import CheckpointConfig
from system.evaluation.config import EvaluationConfig
from system.health.config import HealthConfig
from system.recipe import apply_overrides, build_config, read_recipe
from system.sinks.config import TelemetryConfig

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
    "health",
    "watchdog",
    "telemetry",
    "store",
)

# What the tokenizer gives, which loads too slowly to be asked here; a test compares.
VOCABULARY, CAPTION_TOKENS = 49_408, 77


def _address(uri: str) -> str:
    try:
        normal_uri(uri)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return uri


Uri = Annotated[str, AfterValidator(_address)]
UriOrEmpty = Annotated[
    str,
    BeforeValidator(lambda uri: "" if uri is None else uri),  # key= on the command line is a null
    AfterValidator(lambda uri: uri and _address(uri)),
]
AtLeastOne = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    uri: Uri
    """Run folder: a local path or s3://bucket/prefix. Events, checkpoints and evaluations live under it."""
    steps: Annotated[int, Field(ge=1, le=999_999_999)]  # the name of a checkpoint's folder has nine digits
    """Optimizer steps of the whole run; the schedules end here. Part of what the run is: a run cannot be made
    longer or shorter."""
    processes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Local processes that `maskclip train` starts (ignored under torchrun)."""
    event_seconds: Positive = 5.0
    """Events reach the store this often; a killed process loses at most so many seconds of them."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Keys the initial weights, the sample order, crops, masks and token corruption."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    uri: UriOrEmpty = ""
    """Committed data set, as written by `maskclip preprocess`; empty or null where `mix` is given."""
    mix: tuple[MixPart, ...] = ()
    """Several data sets, each with a whole-number weight; every batch holds exactly their shares, so
    global_batch is a multiple of the sum of the weights (in lowest terms)."""
    global_batch: Annotated[int, Field(ge=1, le=2**30)] = 4096
    """Pairs per step over all ranks (paper: 4096). World size need not divide it."""
    streams: AtLeastOne = 64
    """Logical streams of the sample order, at most; divides global_batch."""
    window_shards: AtLeastOne = 4
    """Samples are permuted within windows of about this many shards."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Area range of the random crop (SLIP's value; not given in the paper)."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    @property
    def parts(self) -> tuple[MixPart, ...]:
        """What is trained on: the parts of the mix, or the one data set."""
        return self.mix or (MixPart(uri=self.uri, weight=1),)

    def __post_init__(self) -> None:
        if self.uri and self.mix:
            raise ValueError(
                "data.uri and data.mix are both set, and only one of them can be; clear one: give data.uri= "
                "or data.mix=[]"
            )
        if not self.uri and not self.mix:
            raise ValueError("needs either one data set or a mix of several; set data.uri or data.mix")
        for number, part in enumerate(self.mix):
            try:
                normal_uri(part.uri)
            except ConfigError as error:
                raise ValueError(f"{error} (data.mix, entry {number + 1})") from None
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale {self.crop_scale} is not two rising numbers in (0, 1]; change data.crop_scale"
            )
        if self.global_batch % self.streams:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of streams {self.streams}; "
                "change data.global_batch or data.streams"
            )
        weights = [part.weight for part in self.mix]
        if self.mix and self.global_batch % (whole := sum(weights) // math.gcd(*weights)):
            raise ValueError(
                f"global_batch {self.global_batch} cannot be shared by the weights {weights} of data.mix; "
                f"make data.global_batch a multiple of {whole}, or change the weights"
            )


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Weights that the run begins from; not from the paper, which trains from scratch (docs/export.md)."""

    uri: UriOrEmpty = ""
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

    lr: Positive = 5e-4
    """Peak of the learning rate, at the end of the warm-up."""
    final_lr: NotNegative = 1e-5
    """Learning rate at the last step; a cosine leads there."""
    warmup_lr: NotNegative = 1e-6
    """Learning rate at the first step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    """Steps over which the learning rate rises in a line."""
    weight_decay: NotNegative = 0.5
    """Decoupled decay of matrices; biases, gains and other vectors have none."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate for every layer further from the top of a tower; 1: none (not from the
    paper; below 1 when a tower begins from trained weights)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """Decay of the running means of gradients and of their squares."""
    eps: Positive = 1e-8
    """Keeps the update finite where gradients vanish."""
    gradient_clip: NotNegative = 0.0
    """Clip the global gradient norm to this; 0 switches clipping off."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """EMA teacher. The momentum range agrees with the authors' BootMAE; the paper's text for it was not
    seen."""

    momentum_start: Fraction = 0.999
    """Share of the teacher that stays at the first step."""
    momentum_end: Fraction = 0.9999
    """And at the last one."""
    temperature_warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the run over which the teacher temperature rises from its start to its final value."""

    def __post_init__(self) -> None:
        if self.momentum_start > self.momentum_end:
            raise ValueError(
                f"momentum_start {self.momentum_start} is above momentum_end {self.momentum_end}; "
                "change teacher.momentum_start"
            )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is computed. None of it is from the paper, which does not say."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ranks share out: 1 optimizer state, 2 gradients too, 3 parameters too; 0 nothing."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of the passes; the masters and all sums over ranks are fp32. fp16 has a dynamic loss scale."""
    accumulation: AtLeastOne = 1
    """Micro-batches per step and rank. Features are computed one more time, so that negatives come from the
    whole global batch; loss and gradient are those of accumulation 1."""
    offload_optimizer: bool = False
    """Masters and Adam's moments live and are updated in host memory."""
    offload_parameters: bool = False
    """The shares of the parameters that the passes compute with live in host memory too (ZeRO 3)."""
    compile: bool = False
    """Compile each transformer block with torch.compile; the first steps take minutes longer."""
    max_refused_steps: AtLeastOne = 3
    """Refused steps in a row before the attempt ends with the NonFinite exit code; those that halved the loss
    scale of fp16 do not count."""

    def __post_init__(self) -> None:
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
class TrainConfig:
    """One training run."""

    command: Literal["train"] = "train"
    """The command that runs this recipe."""
    run: RunConfig
    data: DataConfig
    model: ModelConfig
    init: InitConfig = field(default_factory=InitConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    store: StoreConfig = field(default_factory=StoreConfig)


def load_train_recipe(path: str, overrides: list[str]) -> TrainConfig:
    """As `load_recipe`, with the model's preset filled in; also checks what a new attempt must fulfil."""
    values = apply_overrides(read_recipe(path), overrides)
    section = values.get("model", {})
    if isinstance(section, dict):
        try:
            values["model"] = resolve(section)
        except ValueError as error:
            raise ConfigError(f"{path}: model: {error}") from None
    config = build_config(values, path, TrainConfig)
    for part in config.data.parts:
        if overlap(config.run.uri, part.uri):
            raise ConfigError(
                f"{path}: run.uri {config.run.uri} and the data set {part.uri} lie one in the other; "
                "change run.uri"
            )
    if (config.model.text.vocab_size, config.model.text.context_length) != (VOCABULARY, CAPTION_TOKENS):
        raise ConfigError(
            f"{path}: the tokenizer has {VOCABULARY} words and gives {CAPTION_TOKENS} tokens; remove "
            "model.text.vocab_size and model.text.context_length"
        )
    return config


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
