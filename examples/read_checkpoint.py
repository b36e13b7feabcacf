"""Read a checkpoint of MaskCLIP without MaskCLIP: it takes safetensors, NumPy and the standard library.

    python read_checkpoint.py RUN/checkpoints/step-000000200 [KIND [PARAMETER]]

KIND is master (the weights), exp_avg, exp_avg_sq or teacher. Prints the parameters, or the values of one.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open


def read_checkpoint(folder: str, kind: str = "master", only: str | None = None) -> dict[str, np.ndarray]:
    """Parameters of one kind, whole (fp32), after every file was compared with the manifest."""
    root = Path(folder)
    manifest = json.loads((root / "manifest.json").read_bytes())  # absent: not a checkpoint
    if manifest["kind"] != "checkpoint" or manifest["version"] not in (1, 2):
        raise ValueError(f"{folder}: not a checkpoint of version 1 or 2")
    shapes = manifest["meta"]["parameters"]
    flat: dict[str, np.ndarray] = {}
    covered: dict[str, int] = {}
    for entry in manifest["files"]:
        path = root / entry["name"]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if path.stat().st_size != entry["size"] or digest != entry["sha256"]:
            raise ValueError(f"{path}: is not what the manifest says")
        with safe_open(path, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no dictionary
                found, parameter, start = name.split("/")
                if found != kind or only not in (None, parameter):
                    continue
                run = tensors.get_tensor(name)
                size = int(np.prod(shapes[parameter]))
                target = flat.setdefault(parameter, np.empty(size, np.float32))
                target[int(start) : int(start) + run.size] = run
                covered[parameter] = covered.get(parameter, 0) + run.size
    for parameter, count in covered.items():
        if count != flat[parameter].size:
            raise ValueError(f"{folder}: {kind} of {parameter} is not complete")
    return {parameter: values.reshape(shapes[parameter]) for parameter, values in flat.items()}


if __name__ == "__main__":
    values = read_checkpoint(*sys.argv[1:4])
    for parameter, array in sorted(values.items()):
        print(parameter, list(array.shape), f"rms {np.sqrt(np.mean(np.square(array, dtype=np.float64))):.6g}")
    if len(sys.argv) > 3:
        print(values[sys.argv[3]])
