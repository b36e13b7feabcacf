"""Other CLIP libraries, importable where torchvision's compiled operators do not fit the torch there is."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def _declare_missing_operators() -> list[Any]:
    """torchvision from the package index is built for CUDA: beside a CPU torch its operators do not load,
    and then its import fails while it registers their shapes. Nothing here calls them; declaring them is
    enough."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None and spec.submodule_search_locations  # noqa: PT018
    text = (Path(spec.submodule_search_locations[0]) / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in re.findall(r'register_fake\("torchvision::(\w+)"\)', text):
            library.define(f"{name}(Tensor x) -> Tensor")
    return [library]


_KEPT = _declare_missing_operators()


def transformers() -> ModuleType:
    return importlib.import_module("transformers")


def open_clip() -> ModuleType:
    return importlib.import_module("open_clip")
