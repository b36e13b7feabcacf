"""Files stay short, and nothing names the place where it was written."""

import re
from pathlib import Path

from tests.architecture.imports import PACKAGES, ROOT

MOST_LINES = 400
CODE = (*PACKAGES, "tests", "examples", "benchmarks")
CACHES = {"__pycache__", ".ruff_cache", ".pytest_cache", ".hypothesis"}
TEXT = {".py", ".md", ".txt", ".toml", ".yaml", ".yml", ".sh", ".j2", ".html", ".css", ".js", ".json", ""}
# Absolute paths of a machine: none is right anywhere else. Spelled so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.$}/-])/(?:" + "|".join(("work", "root", "home", "Users")) + r")/\w")


def sources() -> list[Path]:
    return sorted(path for part in CODE for path in (ROOT / part).rglob("*.py"))


def texts() -> list[Path]:
    parts = (*CODE, "configs", "docs", "requirements", ".ci")
    found = [path for part in parts for path in (ROOT / part).rglob("*") if path.is_file()]
    found += [path for path in ROOT.iterdir() if path.is_file()]
    return sorted(path for path in found if path.suffix in TEXT and CACHES.isdisjoint(path.parts))


def test_no_file_is_over_400_lines():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in sources()}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_every_module_says_what_it_is():
    def first(path: Path) -> str:
        return path.read_text("utf-8").lstrip()[:3]

    inside = [path for path in sources() if path.relative_to(ROOT).parts[0] in PACKAGES]
    assert [str(path.relative_to(ROOT)) for path in inside if first(path) != '"""'] == []


def test_no_machine_paths():
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in texts()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert wrong == []
