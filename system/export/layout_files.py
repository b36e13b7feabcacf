"""What stands beside the weights of an export, so that the library of its layout loads the folder by itself.

maskclip: config.json. hugging_face: config.json, preprocessor_config.json and the tokenizer's files.
open_clip: open_clip_config.json; its tokenizer is the same as ours and comes with the library. The layouts of
others also get maskclip.json, which says what config.json says in ours.
"""

import json
from typing import Any

from cluster.errors import ConfigError
from data_pipeline.loading import tokenizer
from model import convert
from model.config import Layout, ModelConfig
from model.vision import IMAGE_MEAN, IMAGE_STD
from system.config import to_dict

FORMAT, VERSION = "maskclip-export", 1
WEIGHTS: dict[Layout, str] = {
    "maskclip": "model.safetensors",
    "hugging_face": "model.safetensors",
    "open_clip": "open_clip_model.safetensors",
}
DESCRIPTION: dict[Layout, str] = {
    "maskclip": "config.json",
    "hugging_face": "maskclip.json",
    "open_clip": "maskclip.json",
}
_BICUBIC = 3  # Pillow's number for it


def layout_files(config: ModelConfig, layout: Layout, description: dict[str, Any]) -> dict[str, str]:
    """Text of every file of the layout but weights, model card and manifest, by name.

    Raises:
        ConfigError: the layout cannot say what this model is.
    """
    files = {DESCRIPTION[layout]: _json(description)}
    if layout == "hugging_face":
        files |= {"config.json": _json(convert.hugging_face_config(config)), **_tokenizer_files(config)}
        files["preprocessor_config.json"] = _json(_preprocessor(config.vision.image_size))
    elif layout == "open_clip":
        if config.vision.activation != config.text.activation:
            raise ConfigError(
                f"open_clip has one activation for both towers, this model has {config.vision.activation} "
                f"for images and {config.text.activation} for text; choose another layout"
            )
        content = convert.open_clip_config(config)
        content["preprocess_cfg"] |= {"interpolation": "bicubic", "resize_mode": "shortest"}
        files["open_clip_config.json"] = _json(content)
    return files


def describe(config: ModelConfig, provenance: dict[str, Any]) -> dict[str, Any]:
    """Model, preprocessing, tokenizer and provenance, for whoever uses the weights without this package."""
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
        "provenance": provenance,
    }


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _preprocessor(side: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }


def _tokenizer_files(config: ModelConfig) -> dict[str, str]:
    """CLIP's vocabulary as `CLIPTokenizer` reads it. It pads with the end token, which changes no feature:
    a caption's feature is the state of its first one."""
    start, end = tokenizer.SPECIAL
    merges = "".join(f"{left} {right}\n" for left, right in tokenizer.load_merges())
    words = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    return {
        "vocab.json": json.dumps(tokenizer.vocabulary(), ensure_ascii=False) + "\n",
        "merges.txt": f"#version: 0.2\n{merges}",
        "special_tokens_map.json": _json(words),
        "tokenizer_config.json": _json(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": config.text.context_length,
                "do_lower_case": True,
                **words,
            }
        ),
    }
