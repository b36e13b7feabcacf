"""What is measured, on what, and in training how often."""

from dataclasses import dataclass
from typing import Literal

from system.choices import Dense, Layout, Task, Tower

FEATURE_TASKS: tuple[Task, ...] = ("retrieval", "zero_shot", "knn", "linear_probe")
TRAINING_TASKS: tuple[Task, ...] = ("retrieval", "zero_shot", "knn")


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What the offline evaluation and the one in training have in common. Nothing here is from the paper but
    the kinds of tasks; k, temperature and penalty sweep are DINO's and CLIP's protocols."""

    data: str
    """Images to evaluate on: a committed data set, a folder of class folders, CLIP_benchmark's tars, or
    (task segmentation) a folder with images/, masks/ and classes.txt."""
    layout: Layout = "auto"
    """Layout of `data` and `train`; auto looks at their files."""
    split: str = "test"
    """Folder of the tars below `data`, for the layout webdataset."""
    label: str = "caption"
    """Where a data set says the class of a sample: caption (the longest class name in it), a column, or
    meta.NAME of its metadata."""
    same_image: Literal["sha256", "key", "id"] = "sha256"
    """Samples of a data set that agree in this are one image with several captions; id keeps all apart."""
    tasks: tuple[Task, ...] = ()
    """What to measure; empty: what the data allow (retrieval with captions, zero_shot with classes, knn and
    linear_probe with `train`, segmentation with masks)."""
    class_names: str | None = None
    """Text file with one class name per line; none means those of the data (of a data set: its captions)."""
    templates: str | None = None
    """Text file with one prompt template per line, {} or {c} for the class name; none means those that come
    with the data, else the built-in ones."""
    empty_classes: Literal["error", "allow"] = "error"
    """Whether a class without images is a mistake, or merely a wrong answer more."""
    train: str | None = None
    """Images with classes to learn from, for knn and linear_probe."""
    train_split: str = "train"
    """Folder of the tars below `train`, for the layout webdataset."""
    features: Literal["tower", "embedding"] = "tower"
    """What knn and linear_probe see: the image tower's class token, or the unit embedding in the shared
    space."""
    k: int = 20
    """Neighbours that vote in knn (DINO's 20)."""
    temperature: float = 0.07
    """Temperature of their votes (DINO's 0.07)."""
    tower: Tower = "student"
    """Whose image encoder: the student's, or its moving average, the teacher's."""
    batch: int = 64
    """Images or texts encoded at once, on each rank."""
    seed: int = 0
    """Keys bootstrap, held-out part and masks."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.k < 1:
            raise ValueError("batch and k are at least 1; change batch or k")
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature} is not above 0; change temperature")
        if self.train is None and {"knn", "linear_probe"} & set(self.tasks):
            raise ValueError("knn and linear_probe learn from a training split; set train or change tasks")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(MeasureConfig):
    """Evaluation in training: all ranks take a share, rank 0 scores and logs an `evaluation` event."""

    tasks: tuple[Task, ...] = ()
    """Some of retrieval, zero_shot and knn; empty: those of them that the data allow."""
    data: str = ""
    """As in `MeasureConfig`; empty: no evaluation in training."""
    every_steps: int = 1000
    """Evaluate after every so many steps, and after the last one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every_steps < 1:
            raise ValueError("every_steps is at least 1; raise evaluation.every_steps")
        wrong = [task for task in self.tasks if task not in TRAINING_TASKS]
        if wrong:
            raise ValueError(
                f"{wrong[0]} is too slow to hold up a training; leave it to maskclip evaluate and change "
                "evaluation.tasks"
            )
        if self.layout == "segmentation":
            raise ValueError("in training only images with captions or classes; change evaluation.layout")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(MeasureConfig):
    """`maskclip evaluate`: which checkpoints, and what is kept of the result."""

    checkpoint: int | None = None
    """Step of the checkpoint; none means the newest committed one."""
    every: bool = False
    """Evaluate all committed checkpoints of the run, oldest first."""
    steps: tuple[int, ...] = ()
    """Evaluate the checkpoints of these steps."""
    pictures: int = 24
    """Example retrievals to keep with the result: half for images, half for texts."""
    dense: Dense = "value"
    """Patch features for segmentation: value (of the last block, as Zhou et al. 2022) or plain."""
    output: str | None = None
    """Local folder for scores.png and scores.json; none writes neither."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pictures < 0:
            raise ValueError("pictures is at least 0; change pictures")
        if sum((self.every, bool(self.steps), self.checkpoint is not None)) > 1:
            raise ValueError("give one of checkpoint, steps and every")

    @property
    def several(self) -> bool:
        """Whether it is about a list of checkpoints."""
        return self.every or bool(self.steps)
