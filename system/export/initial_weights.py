"""Weights that a run begins from: read at step 0 and never again, known to the run by their digest.

What can be read: an export of ours, and CLIP in open_clip's or Hugging Face's layout, as a folder or as one
safetensors file. Names tell the layout; positions are resized to the model's grid and the normalisation of
pixels is folded in (`model.convert`). Parameters that the file does not have (decoders, heads, the vector of
a hidden word) keep the values that run.seed gives.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.errors import (
    CheckpointIncompatible,
    ConfigError,
    DataError,
    ManifestMismatch,
    ObjectNotFound,
)
from cluster.manifest import MANIFEST, load, sha256_object
from cluster.store import ObjectStore, StoreConfig, open_store
from model import convert
from model.config import ModelConfig
from model.convert import CLIP_MEAN, CLIP_STD, Layout
from system.agreement import on_rank_zero
from system.checkpoints.checkpoint import committed_steps
from system.config import InitConfig, TrainConfig
from system.export.safetensors_stream import TensorFile
from system.run_folder import recorded_initial_weights

SUFFIX = ".safetensors"
EXPORT = "export"
# The first that is there is taken; otherwise the folder's only file.
_FILES = ("model.safetensors", "open_clip_model.safetensors")
_CONFIGS: dict[Layout, str] = {
    "maskclip": "config.json",
    "open_clip": "open_clip_config.json",
    "hugging_face": "config.json",
}
# Neither weights of the towers nor what would change their features.
_WITHOUT_EFFECT = re.compile(r".*position_ids|(.*\.)?attn_mask|text\.mask_embedding|logit_(scale|bias)")


@dataclass(frozen=True)
class InitialWeights:
    digest: str | None
    """SHA-256 of the file; none without init.uri."""
    parameters: dict[str, Tensor]
    """fp32, by our names; empty when there is nothing to fill, as in a resume."""


def initial_weights(config: TrainConfig, run: ObjectStore) -> InitialWeights:
    """For every rank of a run. Rank 0 reads first, so that a wrong file is one line.

    Raises:
        DataError, ObjectNotFound: see `read_weights`.
        CheckpointIncompatible: likewise; or the run began from other weights.
    """
    if not config.init.uri:
        return InitialWeights(None, {})
    if on_rank_zero(lambda: bool(committed_steps(run))):
        return InitialWeights(on_rank_zero(lambda: recorded_initial_weights(run)), {})
    read: list[dict[str, Tensor]] = []
    on_rank_zero(lambda: read.append(read_weights(config.init, config.model, config.store)))
    digest = on_rank_zero(lambda: weights_digest(config.init, config.store))
    return InitialWeights(digest, read[0] if read else read_weights(config.init, config.model, config.store))


def fill(model: torch.nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Copy `parameters` over those of the same name; all of them have one."""
    targets = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in parameters.items():
            targets[name].copy_(values)


def read_weights(
    init: InitConfig, config: ModelConfig, store: StoreConfig | None = None
) -> dict[str, Tensor]:
    """Our parameters (fp32, by our names) from the file or folder at init.uri.

    Raises:
        ObjectNotFound: nothing is there.
        DataError: no safetensors file, or a layout that is not known.
        CheckpointIncompatible: it is another model; names a tensor and both shapes, or the setting.
    """
    folder, key = _locate(init.uri, store)
    file = _Used(TensorFile(folder, key))
    layout = convert.layout_of(set(file))
    if layout is None:
        raise DataError(
            f"{file.uri}: no layout that is known, its first tensor is {min(file, default='none')}; give "
            "init.uri an export of maskclip, or CLIP as open_clip or Hugging Face store it"
        )
    if layout == "maskclip" and init.mean is not None:
        raise ConfigError("init.mean and init.std are for weights of other libraries; leave them out")
    beside = _json(folder, _CONFIGS[layout])
    for setting, theirs, ours in _unseen_in_shapes(beside, layout, config):
        if theirs != ours:
            raise CheckpointIncompatible(
                f"{file.uri}: trained with {setting} {theirs}, this model has {ours}; set {setting}={theirs}"
            )
    mean, std = _normalisation(init, folder, layout, beside)
    try:
        parameters = convert.imported(file, config, layout, mean, std)
    except ValueError as error:
        raise CheckpointIncompatible(f"{file.uri}: {error}; change the model section or init.uri") from None
    left = sorted(name for name in set(file) - file.used if not _WITHOUT_EFFECT.fullmatch(name))
    if left:
        raise CheckpointIncompatible(
            f"{file.uri}: the model has no place for {left[0]} {tuple(file.shape(left[0]))} (and "
            f"{len(left) - 1} others); change the model section or init.uri"
        )
    return parameters


def weights_digest(init: InitConfig, store: StoreConfig | None = None) -> str:
    """SHA-256 of the weights' file, in hexadecimal. Raises ManifestMismatch when it is a damaged export."""
    folder, key = _locate(init.uri, store)
    found = sha256_object(folder, key, folder.size(key))
    if folder.exists(MANIFEST):
        entries = {entry.name: entry.sha256 for entry in load(folder, EXPORT).files}
        if entries.get(key, found) != found:
            raise ManifestMismatch(f"{folder.uri}/{key}: sha256 is not the manifest's; export it again")
    return found


class _Used(Mapping[str, Tensor]):
    """The file's tensors; remembers which were asked for."""

    def __init__(self, file: TensorFile) -> None:
        self._file, self.uri, self.shape = file, file.uri, file.shape
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.used.add(name)
        return self._file[name]

    def __contains__(self, name: object) -> bool:
        return name in self._file

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)


def _locate(uri: str, config: StoreConfig | None) -> tuple[ObjectStore, str]:
    """The folder, and the key of the weights in it."""
    config = config or StoreConfig()
    if uri.endswith(SUFFIX):
        folder, _, name = uri.rpartition("/")
        return open_store(folder or ("/" if uri.startswith("/") else "."), config), name
    store = open_store(uri, config)
    there = [info.key for info in store.list() if info.key.endswith(SUFFIX) and "/" not in info.key]
    chosen = next((name for name in _FILES if name in there), there[0] if len(there) == 1 else None)
    if chosen is None:
        what = ", ".join(there[:3]) if there else f"no {SUFFIX} file"
        raise ObjectNotFound(f"{store.uri}: {what}; give init.uri one file or a folder with {_FILES[0]}")
    return store, chosen


def _json(folder: ObjectStore, key: str) -> dict[str, Any]:
    """Content of a JSON file of the folder; empty if there is none."""
    try:
        return json.loads(folder.get(key))
    except ObjectNotFound:
        return {}
    except ValueError as error:
        raise DataError(f"{folder.uri}/{key}: not JSON ({error}); mend it or take it away") from None


def _unseen_in_shapes(
    beside: dict[str, Any], layout: Layout, config: ModelConfig
) -> Iterator[tuple[str, Any, Any]]:
    """(setting, their value, our value) of what shapes do not show, if the folder says it."""
    for tower, ours in (("vision", config.vision), ("text", config.text)):
        if layout == "maskclip" and "model" in beside:
            theirs = beside["model"][tower]
            heads, activation = theirs["heads"], theirs["activation"]
        elif layout == "hugging_face" and f"{tower}_config" in beside:
            theirs = beside[f"{tower}_config"]  # what is left out has the library's default
            heads = theirs.get("num_attention_heads", 12 if tower == "vision" else 8)
            activation = theirs.get("hidden_act", "quick_gelu")
        elif layout == "open_clip" and "model_cfg" in beside:
            theirs = beside["model_cfg"][f"{tower}_cfg"]
            heads = (
                ours.width // theirs.get("head_width", 64) if tower == "vision" else theirs.get("heads", 8)
            )
            activation = "quick_gelu" if beside["model_cfg"].get("quick_gelu") else "gelu"
        else:
            return
        yield f"model.{tower}.heads", heads, ours.heads
        yield f"model.{tower}.activation", activation, ours.activation


def _normalisation(
    init: InitConfig, folder: ObjectStore, layout: Layout, beside: dict[str, Any]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of their pixels: as the recipe says, else as their folder says, else CLIP's."""
    if init.mean is not None and init.std is not None:
        return init.mean, init.std
    if layout == "open_clip":
        found = beside.get("preprocess_cfg", {})
        return tuple(found.get("mean", CLIP_MEAN)), tuple(found.get("std", CLIP_STD))
    found = _json(folder, "preprocessor_config.json") if layout == "hugging_face" else {}
    return tuple(found.get("image_mean", CLIP_MEAN)), tuple(found.get("image_std", CLIP_STD))
