"""The model card of an export: what the model is, where it comes from, how it was trained and how to load it.

Every figure is read from the run. What nobody wrote down (a licence, say) is not made up.
"""

import json
from typing import Any

import yaml

from cluster.errors import DataError
from cluster.store import ObjectStore
from model.config import Layout, ModelConfig
from system.checkpoints.checkpoint import step_folder
from system.config import TrainConfig, to_dict

Scores = list[tuple[str, str, float]]
"""Data set, measure, value."""

_TASKS = ("retrieval", "zero_shot", "knn", "linear_probe", "patches")

_LIBRARY: dict[Layout, str] = {"maskclip": "", "hugging_face": "transformers", "open_clip": "open_clip"}

_USE: dict[Layout, str] = {
    "maskclip": """import torch
from data_pipeline.image.augment import eval_view
from data_pipeline.loading.tokenizer import Tokenizer
from system.export.export import load_export

model, config = load_export("path/of/this/folder")
pixels = eval_view(open("picture.jpg", "rb").read(), config["preprocessing"]["image_size"])
tokens = Tokenizer().encode(["a dog", "a cat"], config["tokenizer"]["context_length"])
with torch.no_grad():
    image = model.encode_image(torch.tensor(pixels).permute(2, 0, 1)[None])
    texts = model.encode_text(torch.from_numpy(tokens))
print(image @ texts.T)""",
    "hugging_face": """import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("path/of/this/folder").eval()
processor = CLIPProcessor.from_pretrained("path/of/this/folder")
inputs = processor(
    text=["a dog", "a cat"],
    images=Image.open("picture.jpg"),
    return_tensors="pt",
    padding=True,
    truncation=True,
)
with torch.no_grad():
    output = model(**inputs)
print(output.image_embeds @ output.text_embeds.T)""",
    "open_clip": """import open_clip
import torch
from PIL import Image

name = "local-dir:path/of/this/folder"
model, _, preprocess = open_clip.create_model_and_transforms(name)
tokens = open_clip.get_tokenizer(name)(["a dog", "a cat"])
model.eval()
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("picture.jpg"))[None], normalize=True)
    texts = model.encode_text(tokens, normalize=True)
print(image @ texts.T)""",
}


def read_scores(run: ObjectStore, step: int, tower: str) -> Scores:
    """Every number that evaluations of this checkpoint and tower left under RUN/evaluations."""
    scores: Scores = []
    for info in run.list(f"evaluations/{step_folder(step)}"):
        try:
            found = json.loads(run.get(info.key))
        except ValueError:
            raise DataError(
                f"{run.uri}/{info.key}: not JSON; delete it or evaluate this checkpoint again"
            ) from None
        if found.get("tower", "student") != tower:
            continue
        values = found.get("scores") or {task: found[task] for task in _TASKS if task in found}
        data = found.get("data", "")
        uri = data.get("uri", "") if isinstance(data, dict) else str(data)
        scores += [(uri, name, value) for name, value in _numbers(values)]
    return scores


def _numbers(values: Any, prefix: str = "") -> list[tuple[str, float]]:
    if isinstance(values, dict):
        return [item for key, value in values.items() for item in _numbers(value, f"{prefix} {key}".strip())]
    number = isinstance(values, int | float) and not isinstance(values, bool)
    return [(prefix.replace("_", " "), values)] if number else []


def model_card(
    train: TrainConfig, provenance: dict[str, Any], layout: Layout, parameters: int, scores: Scores
) -> str:
    """Markdown.

    Args:
        parameters: numbers in the weights.
        scores: what evaluations of this checkpoint found; may be empty.
    """
    front = ["tags:", "- clip", "- maskclip", "pipeline_tag: zero-shot-image-classification"]
    if _LIBRARY[layout]:
        front.append(f"library_name: {_LIBRARY[layout]}")
    facts = _table(("", ""), _facts(train.model, provenance, parameters))
    recipe = to_dict(train)
    shown = {
        name: recipe[name]
        for name in ("init", "model", "data", "optimizer", "teacher", "engine")
        if name in recipe
    }
    return f"""---
{chr(10).join(front)}
---
# MaskCLIP image-text model

Image and text encoder in one shared space, trained with {_losses(train.model)}
(MaskCLIP, Dong et al., CVPR 2023, arXiv 2208.12262). Decoders and heads of the training are not part of it.

{facts}

## Use

```python
{_USE[layout]}
```

{_notes(layout, train.model)} `manifest.json` names every file with size and SHA-256.

## Scores

{
        _table(("data", "measure", "value"), [(d, m, f"{v:.4g}") for d, m, v in scores])
        if scores
        else "This checkpoint was not evaluated before the export."
    }

## Training

{_training(train, provenance)}

```yaml
{yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).rstrip()}
```

## Intended use and limits

For research on image-text representations: zero-shot classification, retrieval, features for other models.
The model knows what its training pairs show, in the language of their captions, and carries whatever biases
they carry. It was not tested for any use that decides about people, nor for safety; test it on data of your
own task before you rely on it. No licence is stated here: whoever publishes these weights must state one, and
the terms of the training data hold.
"""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _facts(model: ModelConfig, origin: dict[str, Any], parameters: int) -> list[tuple[str, str]]:
    vision, text = model.vision, model.text
    rows = [
        ("parameters", f"{parameters:,}"),
        ("image encoder", f"{vision.layers} layers x {vision.width}, from the {origin['tower']}"),
        ("images", f"{vision.image_size} x {vision.image_size} pixels, patches of {vision.patch_size}"),
        ("text encoder", f"{text.layers} layers x {text.width}, {text.context_length} tokens"),
        ("shared space", f"{model.embed_dim} dimensions, unit vectors"),
        ("trained by", f"`{origin['run']}`, step {origin['step']}"),
        ("samples seen", f"{origin['samples_seen']:,}"),
        ("checkpoint", f"`{origin['checkpoint']}`"),
        ("data set", f"manifest `{origin['dataset']}`"),
    ]
    if "initial_weights" in origin:
        rows.append(("began from", f"weights with SHA-256 `{origin['initial_weights']}`"))
    return rows


def _losses(model: ModelConfig) -> str:
    losses = [f"image-text contrast ({model.contrastive})"]
    if model.distill.weight > 0:
        losses.append(f"masked self-distillation ({model.distill.target})")
    if model.mlm.weight > 0:
        losses.append("masked language modelling")
    return " and ".join([", ".join(losses[:-1]), losses[-1]] if len(losses) > 1 else losses)


def _notes(layout: Layout, model: ModelConfig) -> str:
    if layout == "maskclip":
        return "`config.json` says how images and captions are prepared;"
    text = "`maskclip.json` says how images and captions are prepared and where the weights come from;"
    if layout == "hugging_face" and model.contrastive == "sigmoid":
        text = (
            "`CLIPModel` has no place for the bias of the sigmoid loss and says so when it loads: add the "
            f"tensor `logit_bias` of the file to its logits. {text}"
        )
    return text


def _training(train: TrainConfig, origin: dict[str, Any]) -> str:
    optimizer, batch = train.optimizer, train.data.global_batch
    return (
        f"{origin['step']:,} of {train.run.steps:,} steps of {batch:,} pairs, seed {train.run.seed}, "
        f"{train.engine.precision}. AdamW, learning rate {optimizer.lr:g} after {optimizer.warmup_steps:,} "
        f"steps of warm-up, then a cosine to {optimizer.final_lr:g}; weight decay {optimizer.weight_decay:g}."
    )
