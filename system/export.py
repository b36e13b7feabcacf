"""A trained model as a folder of its own: weights, configuration, model card, a manifest written last.

    EXPORT/model.safetensors   fp32 parameters of model.objective.MaskClip: towers, projections, logit scale
    EXPORT/config.json         model, preprocessing, tokenizer, provenance
    EXPORT/README.md           model card
    EXPORT/manifest.json       kind "export"

Decoders, quantizer and MLM head serve the training only and are left out, as in the paper.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from cluster.errors import CheckpointIncompatible, ManifestMismatch
from cluster.manifest import MANIFEST, Manifest, commit, file_entry, load, verify
from cluster.store import ObjectStore, open_store
from data_pipeline import tokenizer
from model.config import ModelConfig
from model.objective import MaskClip
from model.vision import IMAGE_MEAN, IMAGE_STD
from system.checkpoint import load_checkpoint_meta, newest_step, read_parameters
from system.config import to_dict, validate
from system.run_folder import load_run_config

KIND = "export"
VERSION = 1
FORMAT = "maskclip-export"
MODEL_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"

Tower = Literal["student", "teacher"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    output: str
    """Folder to write: a local path or s3://bucket/prefix."""
    checkpoint: int | None = None
    """Step of the checkpoint; none means the newest committed one."""
    tower: Tower = "student"
    """Whose image encoder: the student's, or its moving average, the teacher's."""


@dataclass(frozen=True)
class TrainedModel:
    """The inference model of a checkpoint, on the CPU in fp32 and in eval mode, and where it comes from."""

    model: MaskClip
    config: ModelConfig
    provenance: dict[str, Any]
    """run, step, samples_seen, tower, checkpoint (manifest digest), dataset (manifest digest), seed."""


def load_trained(run: ObjectStore, checkpoint: int | None, tower: Tower) -> TrainedModel:
    """Build the inference model from a run's checkpoint, without DeepSpeed.

    Raises:
        ObjectNotFound: no run there, or no such checkpoint.
        CheckpointIncompatible: the checkpoint lacks a parameter of the model.
    """
    train = load_run_config(run)
    step = newest_step(run, checkpoint)
    meta = load_checkpoint_meta(run, step)
    parameters = read_parameters(run, step, "master")
    if tower == "teacher":
        averaged = read_parameters(run, step, "teacher")
        parameters |= {name: value for name, value in averaged.items() if name.startswith("vision.")}
    model = MaskClip(train.model, seed=train.run.seed)
    _fill(model, parameters, f"{run.uri}, checkpoint of step {step}")
    provenance = {
        "run": run.uri,
        "step": step,
        "samples_seen": meta.samples_seen,
        "tower": tower,
        "checkpoint": meta.digest,
        "dataset": meta.meta.get("dataset"),
        "seed": train.run.seed,
    }
    return TrainedModel(model.eval(), train.model, provenance)


def _fill(model: MaskClip, parameters: dict[str, torch.Tensor], where: str) -> None:
    """Copy the parameters that the inference model has; further ones belong to the training."""
    wanted = model.state_dict()
    for name, target in wanted.items():
        found = parameters.get(name)
        if found is None or found.shape != target.shape:
            state = (
                "is missing"
                if found is None
                else f"has the shape {tuple(found.shape)}, not {tuple(target.shape)}"
            )
            raise CheckpointIncompatible(
                f"{where}: {name} {state}; use the version of maskclip that wrote it"
            )
    model.load_state_dict({name: parameters[name] for name in wanted})


def export(run_uri: str, config: ExportConfig) -> dict:
    """Write the export of a checkpoint. The same export again is the same bytes, and writes nothing.

    Returns:
        output, digest (of the manifest), written (False if it was there), bytes, parameters,
        and the provenance.

    Raises:
        ManifestMismatch: another export, or something else, is committed at the output; it was left as it is.
        ObjectNotFound, CheckpointIncompatible: see `load_trained`.
    """
    trained = load_trained(open_store(run_uri), config.checkpoint, config.tower)
    output = open_store(config.output)
    described = _describe(trained)
    with tempfile.TemporaryDirectory(prefix="maskclip-") as name:
        folder = Path(name)
        state = {name: tensor.contiguous() for name, tensor in sorted(trained.model.state_dict().items())}
        safetensors.torch.save_file(state, folder / MODEL_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(
            json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        (folder / CARD_FILE).write_text(_card(described, trained.model), encoding="utf-8")
        files = [file_entry(folder / file, file) for file in (MODEL_FILE, CONFIG_FILE, CARD_FILE)]
        manifest = Manifest(KIND, VERSION, tuple(files), {"provenance": trained.provenance})
        written = _store_folder(output, manifest, folder)
    return {
        "output": output.uri,
        "digest": manifest.digest,
        "written": written,
        "bytes": sum(entry.size for entry in files),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        **trained.provenance,
    }


def _store_folder(output: ObjectStore, manifest: Manifest, folder: Path) -> bool:
    # Looked at before the first write, so that a refusal leaves the other export whole; commit decides a
    # race.
    if output.exists(MANIFEST):
        there = load(output, KIND, VERSION)
        if there.digest == manifest.digest:
            return False
        raise ManifestMismatch(
            f"{output.uri}: holds another committed export (step {_origin(there)}); choose another output"
        )
    for entry in manifest.files:
        output.put_file(entry.name, folder / entry.name)
    return commit(output, manifest)


def _origin(manifest: Manifest) -> str:
    provenance = manifest.meta.get("provenance", {})
    return f"{provenance.get('step')}, {provenance.get('tower')} tower, of {provenance.get('run')}"


def load_export(uri: str) -> tuple[MaskClip, dict]:
    """Verify an export and build its model, in eval mode on the CPU.

    Returns:
        The model and the content of its config.json.

    Raises:
        ObjectNotFound: nothing was committed there.
        ManifestMismatch: a file is damaged or missing, or the export is of a newer version.
    """
    store = open_store(uri)
    manifest = load(store, KIND, VERSION)
    problems = verify(store, manifest)
    if problems:
        raise ManifestMismatch(f"{problems[0]}; export it again ({len(problems)} damaged files)")
    config = json.loads(store.get(CONFIG_FILE))
    model = MaskClip(validate(ModelConfig, config["model"], f"{store.uri}/{CONFIG_FILE}"), seed=0)
    _fill(model, safetensors.torch.load(store.get(MODEL_FILE)), f"{store.uri}/{MODEL_FILE}")
    return model.eval(), config


def _describe(trained: TrainedModel) -> dict[str, Any]:
    config = trained.config
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": to_dict(config),
        "preprocessing": {
            "image_size": config.vision.image_size,
            "resize": "short side to image_size, bicubic, then a centre crop",
            "colour": "RGB, values in [0, 1] before mean and std",
            "mean": list(IMAGE_MEAN),
            "std": list(IMAGE_STD),
        },
        "tokenizer": {
            "kind": "CLIP byte-pair encoding, lower case",
            "vocab_size": tokenizer.VOCAB_SIZE,
            "context_length": config.text.context_length,
            "start": tokenizer.SOT,
            "end": tokenizer.EOT,
            "pad": tokenizer.PAD,
        },
        "embedding": {"width": config.embed_dim, "normalised": "L2", "similarity": "dot product"},
        "provenance": trained.provenance,
    }


def _card(described: dict[str, Any], model: MaskClip) -> str:
    vision, text, origin = described["model"]["vision"], described["model"]["text"], described["provenance"]
    size = sum(parameter.numel() for parameter in model.parameters())
    return f"""# MaskCLIP image-text model

Image and text encoder in one shared space, trained with image-text contrast, masked self-distillation and
masked language modelling (MaskCLIP, Dong et al., CVPR 2023, arXiv 2208.12262). Decoders and heads of the
training are not part of it.

| | |
|---|---|
| parameters | {size:,} |
| image encoder | {vision["layers"]} layers x {vision["width"]}, from the {origin["tower"]} |
| images | {vision["image_size"]} x {vision["image_size"]} pixels, patches of {vision["patch_size"]} |
| text encoder | {text["layers"]} layers x {text["width"]}, {text["context_length"]} tokens |
| shared space | {described["embedding"]["width"]} dimensions, unit vectors |
| trained by | `{origin["run"]}`, step {origin["step"]}, {origin["samples_seen"]:,} samples |
| checkpoint | `{origin["checkpoint"]}` |
| data set | `{origin["dataset"]}` |

## Use

```python
import torch
from data_pipeline.augment import eval_view
from data_pipeline.tokenizer import Tokenizer
from system.export import load_export

model, config = load_export("path/of/this/folder")
pixels = eval_view(open("picture.jpg", "rb").read(), config["preprocessing"]["image_size"])
tokens = Tokenizer().encode(["a dog", "a cat"], config["tokenizer"]["context_length"])
with torch.no_grad():
    image = model.encode_image(torch.tensor(pixels).permute(2, 0, 1)[None])
    texts = model.encode_text(torch.from_numpy(tokens))
print(image @ texts.T)
```

`config.json` says how images and captions are prepared, `manifest.json` names every file with size and
SHA-256. The weights carry whatever biases the training pairs carry; the model was not tested for any use that
decides about people.
"""
