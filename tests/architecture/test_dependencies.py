"""What the packages import from outside is declared in setup.py."""

import ast
import re
import sys
from importlib.metadata import packages_distributions

from tests.architecture.imports import PACKAGES, ROOT, imports


def declared() -> set[str]:
    """Normalised distribution names of install_requires."""
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text("utf-8")))
        if isinstance(node, ast.keyword) and node.arg == "install_requires"
    )
    return {normal(re.split(r"[<>=!~\[; ]", line)[0]) for line in ast.literal_eval(call.value)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_outside_import_is_declared():
    known = packages_distributions()
    wrong = [
        str(found)
        for found in imports()
        for name in (found.target.split(".")[0],)
        if name not in sys.stdlib_module_names
        and name not in PACKAGES
        and declared().isdisjoint(normal(distribution) for distribution in known.get(name, []))
    ]
    assert wrong == []


def test_the_lock_has_every_declared_package():
    lines = (ROOT / "requirements/lock.txt").read_text("utf-8").splitlines()
    locked = {normal(line.split("==")[0]) for line in lines if "==" in line and not line.startswith("#")}
    assert declared() - locked == set()
