"""What the packages import from outside is declared in setup.py."""

import ast
import re
import sys
from importlib.metadata import packages_distributions

from tests.architecture.imports import PACKAGES, ROOT, imports


def setup_argument(name: str):
    """The value of an argument of `setup`, which is a literal."""
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text("utf-8")))
        if isinstance(node, ast.keyword) and node.arg == name
    )
    return ast.literal_eval(call.value)


def names(requirements: list[str]) -> set[str]:
    """Normalised distribution names."""
    return {normal(re.split(r"[<>=!~\[; ]", line)[0]) for line in requirements}


def declared() -> set[str]:
    return names(setup_argument("install_requires"))


def optional() -> set[str]:
    """What the extras for users add."""
    return set().union(*(names(e) for name, e in setup_argument("extras_require").items() if name != "dev"))


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
        and (declared() if found.at_import_time else declared() | optional()).isdisjoint(
            normal(distribution) for distribution in known.get(name, [])
        )
    ]
    assert wrong == []


def test_the_lock_has_every_declared_package():
    lines = (ROOT / "requirements/lock.txt").read_text("utf-8").splitlines()
    locked = {normal(line.split("==")[0]) for line in lines if "==" in line and not line.startswith("#")}
    assert declared() - locked == set()
