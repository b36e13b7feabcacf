"""Evaluation of a checkpoint: caption-aware retrieval, zero-shot classification, examples as pictures.

Runs in one process, without DeepSpeed, in fp32. The result is RUN/evaluations/step-000000200-<data
digest>.json (`...-teacher.json` for the teacher's tower); evaluating the same again replaces it. Shapes: N
images, U distinct texts, C classes, E embedding.
"""

import base64
import io
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from rich.console import RenderableType
from rich.table import Table

from cluster.events import EventLog
from cluster.store import ObjectStore, open_store
from data_pipeline.augment import eval_view
from data_pipeline.catalog import DatasetManifest, load_dataset, read_index
from data_pipeline.loader import eval_batches
from data_pipeline.tokenizer import Tokenizer
from model.objective import MaskClip
from system.checkpoint import step_folder
from system.export import Tower, TrainedModel, load_trained
from system.retrieval import CaptionGroups, best_matches, evaluate_retrieval, right_ranks
from system.zero_shot import ClassList, class_embeddings, evaluate_zero_shot, read_lines, read_templates

VERSION = 1
ANSWERS = 5
PICTURE_SIDE, PICTURE_QUALITY = 96, 80
# Evaluations belong to no attempt of the trainer: their events go under the number that claim_attempt never
# gives.
NO_ATTEMPT = 0

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    data: str
    """Committed data set to evaluate on."""
    checkpoint: int | None = None
    """Step of the checkpoint; none means the newest committed one."""
    tower: Tower = "student"
    """Whose image encoder: the student's, or its moving average, the teacher's."""
    batch: int = 64
    """Images or texts encoded at once."""
    class_names: str | None = None
    """Text file with one class name per line; none means the distinct captions of the data set."""
    templates: str | None = None
    """Text file with one prompt template per line, {} for the class name; none means the built-in ones."""
    pictures: int = 24
    """Example retrievals to keep with the result: half for images, half for texts."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.pictures < 0:
            raise ValueError("batch is at least 1 and pictures at least 0; change batch or pictures")


def evaluate(run_uri: str, config: EvaluateConfig, progress: Progress | None = None) -> dict:
    """Evaluate, store the result in the run folder and return it (without the pictures).

    Args:
        progress: called with {"stage": "images" | "texts" | "classes", "done", "total"}.

    Raises:
        ObjectNotFound: no run, no checkpoint or no data set there.
        DataError: the data set or the list of classes is empty, or no class occurs in a caption.
        ConfigError: a text file cannot be read, or a template has no {}.
        NonFinite: the model's embeddings are not finite.
    """
    started = time.monotonic()
    run = open_store(run_uri)
    trained = load_trained(run, config.checkpoint, config.tower)
    dataset = load_dataset(config.data)
    templates = read_templates(config.templates)
    names = read_lines(config.class_names, "class_names") if config.class_names else None
    rows = _Rows(dataset)
    encoder = _Encoder(trained, config.batch, progress)
    groups = CaptionGroups.of(rows.captions)
    classes = ClassList.of(names or groups.texts, config.class_names or "captions of the data set")

    image_NE = encoder.images(dataset)
    text_UE = encoder.texts(groups.texts, "texts")
    class_CE = class_embeddings(
        classes.names, templates, lambda prompts: encoder.texts(prompts, "classes"), config.batch
    )
    result = {
        "version": VERSION,
        "time": time.time(),
        **trained.provenance,
        "data": {"uri": dataset.uri, "digest": dataset.digest, "samples": dataset.num_samples},
        "retrieval": evaluate_retrieval(image_NE, text_UE, groups),
        "zero_shot": evaluate_zero_shot(image_NE, class_CE, classes.labels(rows.captions), classes.source)
        | {"templates": len(templates)},
        "seconds": time.monotonic() - started,
    }
    examples, shown = _examples(config.pictures, image_NE, text_UE, groups, rows)
    pictures = {str(position): rows.picture(position) for position in sorted(shown)}
    return _store(run, result, {"examples": examples, "pictures": pictures})


class _Encoder:
    """Embeddings of images and texts on the best device at hand."""

    def __init__(self, trained: TrainedModel, batch: int, progress: Progress | None) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: MaskClip = trained.model.to(self._device)
        self._image_size = trained.config.vision.image_size
        self._context_length = trained.config.text.context_length
        self._tokenizer = Tokenizer()
        self._batch = batch
        self._progress = progress

    @torch.inference_mode()
    def images(self, dataset: DatasetManifest) -> torch.Tensor:
        """Unit embeddings [N, E] of all images in stored order."""
        parts, done = [], 0
        for batch in eval_batches(dataset.uri, self._image_size, self._batch):
            parts.append(self._model.encode_image(batch["image"].to(self._device))[batch["weight"] > 0])
            done += len(parts[-1])
            self._report("images", done, dataset.num_samples)
        return torch.cat(parts)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], stage: str) -> torch.Tensor:
        """Unit embeddings [U, E]."""
        parts = []
        for start in range(0, len(texts), self._batch):
            tokens = self._tokenizer.encode(texts[start : start + self._batch], self._context_length)
            parts.append(self._model.encode_text(torch.from_numpy(tokens).to(self._device)))
            self._report(stage, min(start + self._batch, len(texts)), len(texts))
        return torch.cat(parts)

    def _report(self, stage: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress({"stage": stage, "done": done, "total": total})


class _Rows:
    """Captions of a data set in stored order, and any of its pictures by position."""

    def __init__(self, dataset: DatasetManifest) -> None:
        self._store = open_store(dataset.uri)
        self._shards = dataset.shards
        self._indexes: list[pa.Table] = [
            read_index(self._store.get(shard.index_name), shard.index_name) for shard in dataset.shards
        ]
        self._starts = np.cumsum([0, *(shard.num_samples for shard in dataset.shards)])
        self.captions: list[str] = [
            caption for index in self._indexes for caption in index["caption"].to_pylist()
        ]

    def picture(self, position: int) -> str:
        """A small JPEG of the image as the model sees it, in base64."""
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        row = self._indexes[shard].slice(position - int(self._starts[shard]), 1).to_pylist()[0]
        image = self._store.get_range(self._shards[shard].name, row["image_offset"], row["image_size"])
        file = io.BytesIO()
        Image.fromarray(eval_view(image, PICTURE_SIDE)).save(file, "JPEG", quality=PICTURE_QUALITY)
        return base64.b64encode(file.getvalue()).decode()


def _examples(
    number: int, image_NE: torch.Tensor, text_UE: torch.Tensor, groups: CaptionGroups, rows: _Rows
) -> tuple[dict[str, list[dict]], set[int]]:
    """Queries spread evenly over the data set (nothing is chosen by its result), with their best answers.

    Returns the examples and the positions of all pictures in them. A text's picture is the first that carries
    it.
    """
    group_N = groups.group_N.to(image_NE.device)
    text_U = torch.arange(len(text_UE), device=image_NE.device)
    first_U: list[int] = [0] * len(groups.texts)
    for position in range(len(rows.captions) - 1, -1, -1):
        first_U[int(groups.group_N[position])] = position
    images = _spread(number - number // 2, len(image_NE), image_NE.device)
    texts = _spread(number // 2, len(text_UE), image_NE.device)

    def answers(
        scores: torch.Tensor, found: torch.Tensor, right: torch.Tensor, positions: Sequence[int]
    ) -> list[dict]:
        return [
            {"picture": position, "caption": rows.captions[position], "score": score, "right": bool(hit)}
            for position, score, hit in zip(positions, scores.tolist(), right[found].tolist(), strict=True)
        ]

    examples: dict[str, list[dict]] = {"image_to_text": [], "text_to_image": []}
    if len(images):
        scores, found = best_matches(image_NE[images], text_UE, ANSWERS)
        ranks = right_ranks(image_NE[images], text_UE, group_N[images], text_U)
        for query, position in enumerate(images.tolist()):
            shown = [first_U[text] for text in found[query].tolist()]
            listed = answers(scores[query], found[query], text_U == group_N[position], shown)
            example = {"picture": position, "caption": rows.captions[position], "rank": int(ranks[query]) + 1}
            examples["image_to_text"].append({**example, "answers": listed})
    if len(texts):
        scores, found = best_matches(text_UE[texts], image_NE, ANSWERS)
        ranks = right_ranks(text_UE[texts], image_NE, texts, group_N)
        for query, text in enumerate(texts.tolist()):
            listed = answers(scores[query], found[query], group_N == text, found[query].tolist())
            example = {"caption": groups.texts[text], "rank": int(ranks[query]) + 1, "answers": listed}
            examples["text_to_image"].append(example)
    everything = [
        item for kind in examples.values() for example in kind for item in (example, *example["answers"])
    ]
    return examples, {item["picture"] for item in everything if "picture" in item}


def _spread(number: int, total: int, device: torch.device) -> torch.Tensor:
    """`number` (at most `total`) positions in [0, total) at equal distances."""
    number = min(number, total)
    return (torch.arange(number, device=device) * total) // max(1, number)


def _store(run: ObjectStore, result: dict[str, Any], extra: dict[str, Any]) -> dict:
    suffix = "-teacher" if result["tower"] == "teacher" else ""
    file = f"evaluations/{step_folder(result['step'])}-{result['data']['digest'][:8]}{suffix}.json"
    run.put(file, json.dumps({**result, **extra}).encode())
    headline = {
        f"{direction}_{cutoff}": result["retrieval"][direction][cutoff]
        for direction in ("image_to_text", "text_to_image")
        for cutoff in ("r1", "r5")
    }
    # Every evaluation is a writer of its own, so that none writes over the events of another.
    taken = [
        int(match[1])
        for info in run.list("events/attempt-0000/")
        if (match := re.search(r"rank-(\d+)/", info.key))
    ]
    events = EventLog(run, NO_ATTEMPT, max(taken, default=-1) + 1)
    events.instant(
        "evaluation",
        step=result["step"],
        tower=result["tower"],
        data=result["data"]["uri"],
        file=file,
        top1=result["zero_shot"]["top1"],
        chance=result["retrieval"]["chance"]["image_to_text"],
        **headline,
    )
    events.close()
    return {**result, "file": f"{run.uri}/{file}"}


def render(result: dict[str, Any]) -> RenderableType:
    """The result of `evaluate` as a table for the terminal."""
    retrieval, classes = result["retrieval"], result["zero_shot"]
    data = f"{retrieval['images']} images of {result['data']['uri']}"
    title = f"step {result['step']}, {result['tower']} tower, {data}"
    table = Table(title=title, title_justify="left")
    for column in ("task", "measure", "result", "chance", "times chance"):
        table.add_column(column, justify="left" if column in ("task", "measure") else "right")
    rows = [
        (direction.replace("_", " "), cutoff, retrieval[direction][cutoff], chance)
        for direction in ("image_to_text", "text_to_image")
        for cutoff, chance in retrieval["chance"][direction].items()
    ]
    rows += [
        (f"zero-shot, {classes['classes']} classes", top, classes[top], chance)
        for top, chance in classes["chance"].items()
    ]
    for task, measure, value, chance in rows:
        table.add_row(
            task, measure, f"{100 * value:.2f} %", f"{100 * chance:.2f} %", f"{value / chance:.1f}x"
        )
    return table
