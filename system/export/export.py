"""A trained model as a folder of its own: weights, configuration, model card, a manifest written last.

    EXPORT/model.safetensors   fp32 parameters of model.objective.MaskClip: towers, projections, logit scale
    EXPORT/config.json         model, preprocessing, tokenizer, provenance
    EXPORT/README.md           model card
    EXPORT/manifest.json       kind "export"

That is the layout maskclip; hugging_face and open_clip are folders that those libraries load by themselves
(docs/export.md). Decoders, quantizer and MLM head serve the training only and are left out, as in the paper.
Parameters go from the checkpoint to the file one at a time: memory does not grow with the depth of the model.
"""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from cluster.errors import CheckpointIncompatible, ManifestMismatch
from cluster.manifest import MANIFEST, Manifest, commit, file_entry, load, verify
from cluster.store import ObjectStore, open_store
from model import convert
from model.config import ModelConfig
from model.objective import MaskClip
from system.checkpoints.checkpoint import (
    load_checkpoint_meta,
    newest_step,
    open_fragments,
)
from system.choices import Tower
from system.config import TrainConfig
from system.export.config import ExportConfig
from system.export.layout_files import DESCRIPTION, WEIGHTS, describe, layout_files
from system.export.model_card import model_card, read_scores
from system.export.safetensors_stream import write_tensors
from system.recipe import validate
from system.run_folder import load_run_config

KIND = "export"
VERSION = 1
CARD_FILE = "README.md"


@dataclass(frozen=True)
class TrainedModel:
    """The inference model of a checkpoint, on the CPU in fp32 and in eval mode, and where it comes from."""

    model: MaskClip
    config: ModelConfig
    provenance: dict[str, Any]
    """run, step, samples_seen, tower, checkpoint (manifest digest), dataset (manifest digest), seed; and
    initial_weights (digest of the file) if the run began from some."""


def load_trained(run: ObjectStore, checkpoint: int | None, tower: Tower) -> TrainedModel:
    """Build the inference model from a run's checkpoint, without DeepSpeed.

    Raises:
        ObjectNotFound: no run there, or no such checkpoint.
        CheckpointIncompatible: the checkpoint lacks a parameter of the model, or the tower.
    """
    train = load_run_config(run)
    step = newest_step(run, checkpoint)
    provenance = _provenance(run, train, step, tower)
    reader = open_fragments(run, step)
    parameters = reader.everything("master")
    if tower == "teacher":
        averaged = reader.everything("teacher")
        parameters |= {name: value for name, value in averaged.items() if name.startswith("vision.")}
    model = MaskClip(train.model, seed=train.run.seed)
    _fill(model, parameters, f"{run.uri}, checkpoint of step {step}")
    return TrainedModel(model.eval(), train.model, provenance)


def _provenance(run: ObjectStore, train: TrainConfig, step: int, tower: Tower) -> dict[str, Any]:
    checkpoint, distill = load_checkpoint_meta(run, step), train.model.distill
    if tower == "teacher" and not distill.needs_teacher:
        raise CheckpointIncompatible(
            f"{run.uri}: this run has no teacher (model.distill.weight is {distill.weight:g}, its target is "
            f"{distill.target}); choose tower=student"
        )
    provenance = {
        "run": run.uri,
        "step": step,
        "samples_seen": checkpoint.samples_seen,
        "tower": tower,
        "checkpoint": checkpoint.digest,
        "dataset": checkpoint.meta.get("dataset"),
        "seed": train.run.seed,
    }
    initial = checkpoint.meta.get("initial_weights")
    return provenance | ({"initial_weights": initial} if initial else {})


def _fill(model: MaskClip, parameters: dict[str, torch.Tensor], where: str) -> None:
    """Copy the parameters that the inference model has; further ones belong to the training."""
    wanted = model.state_dict()
    for name, target in wanted.items():
        found = parameters.get(name)
        _check(name, None if found is None else found.shape, target.shape, where)
    model.load_state_dict({name: parameters[name] for name in wanted})


def _check(name: str, found: Any, wanted: Any, where: str) -> None:
    if found is None or tuple(found) != tuple(wanted):
        state = "is missing" if found is None else f"has the shape {tuple(found)}, not {tuple(wanted)}"
        raise CheckpointIncompatible(f"{where}: {name} {state}; use the version of maskclip that wrote it")


def export(run_uri: str, config: ExportConfig) -> dict:
    """Write the export of a checkpoint. The same export again is the same bytes, and writes nothing.

    Returns:
        output, layout, digest (of the manifest), written (False if it was there), bytes, parameters,
        and the provenance.

    Raises:
        ManifestMismatch: another export, or something else, is committed at the output; it was left as it is.
        ConfigError: the layout cannot say what the model is.
        ObjectNotFound, CheckpointIncompatible: see `load_trained`.
    """
    run, output = open_store(run_uri), open_store(config.output)
    train = load_run_config(run)
    step = newest_step(run, config.checkpoint)
    provenance = _provenance(run, train, step, config.tower)
    entries = list(convert.exported(train.model, config.layout))
    size = sum(math.prod(entry.shape) for entry in entries)
    texts = layout_files(train.model, config.layout, describe(train.model, provenance))
    texts[CARD_FILE] = model_card(
        train, provenance, config.layout, size, read_scores(run, step, config.tower)
    )
    with tempfile.TemporaryDirectory(prefix="maskclip-") as name:
        folder = Path(name)
        write_tensors(folder / WEIGHTS[config.layout], entries, _reader(run, step, config.tower, train.model))
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        files = tuple(file_entry(folder / file, file) for file in (WEIGHTS[config.layout], *texts))
        manifest = Manifest(KIND, VERSION, files, {"provenance": provenance, "layout": config.layout})
        written = _store_folder(output, manifest, folder)
    return {
        "output": output.uri,
        "layout": config.layout,
        "digest": manifest.digest,
        "written": written,
        "bytes": sum(entry.size for entry in files),
        "parameters": size,
        **provenance,
    }


def _reader(run: ObjectStore, step: int, tower: Tower, config: ModelConfig) -> convert.Get:
    """Parameters of the inference model by name, each read from the checkpoint when it is asked for."""
    reader = open_fragments(run, step)
    # Checked before anything is written.
    for entry in convert.exported(config, "maskclip"):
        where = f"{run.uri}, checkpoint of step {step}"
        _check(entry.name, reader.shapes.get(entry.name), entry.shape, where)

    def get(name: str) -> torch.Tensor:
        averaged = tower == "teacher" and name.startswith("vision.")
        return reader.whole("teacher" if averaged else "master", name)

    return get


def _store_folder(output: ObjectStore, manifest: Manifest, folder: Path) -> bool:
    # Looked at before the first write, so that a refusal leaves the other export whole; commit decides a
    # race.
    if output.exists(MANIFEST):
        there = load(output, KIND, VERSION)
        if there.digest == manifest.digest:
            return False
        raise ManifestMismatch(
            f"{output.uri}: holds another committed export ({_difference(there, manifest)}); "
            "choose another output"
        )
    for entry in manifest.files:
        output.put_file(entry.name, folder / entry.name)
    return commit(output, manifest)


def _difference(there: Manifest, manifest: Manifest) -> str:
    if there.meta == manifest.meta:
        changed = sorted({entry.name for entry in {*there.files} ^ {*manifest.files}})
        return f"of the same checkpoint, but with another {', '.join(changed)}"
    provenance = there.meta.get("provenance", {})
    return (
        f"step {provenance.get('step')}, {provenance.get('tower')} tower, of {provenance.get('run')}, "
        f"layout {there.meta.get('layout', 'maskclip')}"
    )


def load_export(uri: str) -> tuple[MaskClip, dict]:
    """Verify an export and build its model, in eval mode on the CPU.

    Returns:
        The model and the content of its config.json.

    Raises:
        ObjectNotFound: nothing was committed there.
        ManifestMismatch: a file is damaged or missing, or the export is of a newer version or for another
            library.
    """
    store = open_store(uri)
    manifest = load(store, KIND, VERSION)
    layout = manifest.meta.get("layout", "maskclip")
    if layout != "maskclip":
        raise ManifestMismatch(f"{store.uri}: is in the layout {layout}; load it with that library")
    problems = verify(store, manifest)
    if problems:
        raise ManifestMismatch(f"{problems[0]}; export it again ({len(problems)} damaged files)")
    where = f"{store.uri}/{DESCRIPTION['maskclip']}"
    config = json.loads(store.get(DESCRIPTION["maskclip"]))
    model = MaskClip(validate(ModelConfig, config["model"], where), seed=0)
    weights = WEIGHTS["maskclip"]
    _fill(model, safetensors.torch.load(store.get(weights)), f"{store.uri}/{weights}")
    return model.eval(), config
