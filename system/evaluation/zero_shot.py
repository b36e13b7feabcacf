"""Zero-shot classification by prompts: CLIP's protocol with a short template set of our own.

Shapes: N images, C classes, T templates, E embedding width.

A class is one name. Its weight is the mean over the templates of the unit text embeddings, made unit again,
as in CLIP and SLIP. Their 80 ImageNet templates can be given as a file: one template per line, `{}` (or
`{c}`, as CLIP_benchmark writes it) for the name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from cluster.errors import ConfigError, DataError
from system.evaluation.retrieval import normalise_caption, require_finite, right_ranks
from system.evaluation.scoring import classification_scores

PLACE, BENCHMARK_PLACE = "{}", "{c}"
TEMPLATES = (
    "{}",
    "a picture of {}.",
    "a photo of {}.",
    "an icon that shows {}.",
    "a small drawing of {}.",
    "a close view of {}.",
    "{} on a plain background.",
    "this image shows {}.",
)


@dataclass(frozen=True)
class ClassList:
    """C class names without duplicates (compared as normalised captions) and where they come from."""

    names: tuple[str, ...]
    source: str

    @classmethod
    def of(cls, names: Sequence[str], source: str) -> "ClassList":
        """Raise DataError if no name is left once blank ones are dropped."""
        distinct: dict[str, str] = {}
        for name in names:
            distinct.setdefault(normalise_caption(name), name.strip())
        distinct.pop("", None)
        if not distinct:
            raise DataError(f"{source}: no class names in it, write one name per line")
        return cls(tuple(distinct.values()), source)

    @cached_property
    def index(self) -> dict[str, int]:
        """Number of every normalised name."""
        return {normalise_caption(name): number for number, name in enumerate(self.names)}

    def find(self, text: str, index: Mapping[str, int] | None = None) -> int:
        """The class that `text` is the name of, -1 for none; `index` takes the place of the names."""
        return (self.index if index is None else index).get(normalise_caption(text), -1)

    def labels(self, captions: Sequence[str]) -> torch.Tensor:
        """int64 [N]: the class of every caption, -1 where none fits.

        A caption belongs to the longest class name that stands in it as whole words (equal to the name is the
        plain case); of two equally long names the one that comes first in the caption.
        """
        index = {tuple(name.split()): number for name, number in self.index.items()}
        longest = max(len(words) for words in index)
        return torch.tensor([_label(caption, index, longest) for caption in captions], dtype=torch.int64)


def _label(caption: str, index: dict[tuple[str, ...], int], longest: int) -> int:
    plain = normalise_caption(caption).split()
    bare = [word.strip(".,;:!?\"'()") for word in plain]
    for words in (plain, bare):
        for length in range(min(longest, len(words)), 0, -1):
            for start in range(len(words) - length + 1):
                label = index.get(tuple(words[start : start + length]))
                if label is not None:
                    return label
    return -1


def read_lines(path: str, what: str, data: bytes | None = None) -> list[str]:
    """The non-blank lines of a text file. ConfigError if it cannot be read, DataError if nothing is in it.

    Args:
        what: the setting that names the file.
        data: the file's content where somebody has read it.
    """
    try:
        text = (Path(path).read_bytes() if data is None else data).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{what}={path}: cannot be read ({error}), give a text file with one entry per line"
        ) from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{what}={path}: the file is empty, write one entry per line")
    return lines


def parse_templates(lines: Sequence[str], where: str) -> tuple[str, ...]:
    """Templates with `{}` for the class name. ConfigError for a line without exactly one place for it."""
    templates = tuple(line.replace(BENCHMARK_PLACE, PLACE) for line in lines)
    for line, template in zip(lines, templates, strict=True):
        if template.count(PLACE) != 1:
            raise ConfigError(
                f"{where}: the template {line!r} must hold {PLACE} or {BENCHMARK_PLACE} once, where the "
                "class name goes; correct templates"
            )
    return templates


def read_templates(path: str | None) -> tuple[str, ...]:
    """The templates of a file, or the built-in ones. Raises as `read_lines` and `parse_templates`."""
    return TEMPLATES if path is None else parse_templates(read_lines(path, "templates"), f"templates={path}")


def class_embeddings(
    names: Sequence[str], templates: Sequence[str], encode: Callable[[list[str]], torch.Tensor], batch: int
) -> torch.Tensor:
    """Unit class weights [C, E]; `encode` maps at most `batch` texts to their unit embeddings."""
    sums = []
    classes_at_once = max(1, batch // len(templates))
    for start in range(0, len(names), classes_at_once):
        some = names[start : start + classes_at_once]
        prompts = [template.replace(PLACE, name) for name in some for template in templates]
        parts = [encode(prompts[first : first + batch]) for first in range(0, len(prompts), batch)]
        sums.append(torch.cat(parts).unflatten(0, (len(some), len(templates))).mean(dim=1))
    return torch.nn.functional.normalize(torch.cat(sums), dim=-1)


def evaluate_zero_shot(
    image_NE: torch.Tensor, class_CE: torch.Tensor, labels_N: torch.Tensor, source: str, seed: int = 0
) -> dict:
    """Top-1, top-5 and mean per class over the images that have a class (label >= 0), with intervals and the
    chance level.

    Raises DataError if no image has a class, NonFinite if an embedding is not finite.
    """
    require_finite("class", class_CE)
    labelled_N = labels_N >= 0
    if not bool(labelled_N.any()):
        raise DataError(
            f"{source}: none of its class names occurs in a caption of the data set, check the names"
        )
    classes = len(class_CE)
    image_ME, label_M = image_NE[labelled_N.to(image_NE.device)], labels_N[labelled_N].to(image_NE.device)
    require_finite("image", image_ME)
    ranks_M = right_ranks(image_ME, class_CE, label_M, torch.arange(classes, device=image_NE.device))
    return {
        "classes": classes,
        "class_source": source,
        "images_without_class": int((~labelled_N).sum()),
        **classification_scores(ranks_M, label_M, classes, f"zero_shot/{seed}"),
    }
