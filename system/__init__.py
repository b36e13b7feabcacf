"""The composition root of MaskCLIP's training system: configuration, engine, trainer, checkpoints, commands.

The four packages have short names, so a folder `model/` elsewhere on the path could take the place of ours;
that is an error here and not a strange one later.
"""

from importlib.util import find_spec
from pathlib import Path

_HOME = Path(__file__).resolve().parent.parent

for _name in ("cluster", "data_pipeline", "model"):
    _spec = find_spec(_name)
    if _spec is None or _spec.origin is None or Path(_spec.origin).resolve().parent.parent != _HOME:
        _found = "nothing" if _spec is None else _spec.origin or "a folder without __init__.py"
        raise ImportError(
            f"package {_name}: expected in {_HOME}, found {_found}; "
            "run from another folder or repair PYTHONPATH"
        )
