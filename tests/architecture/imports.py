"""Read which module imports which from the sources, without running them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

PACKAGES = ("cluster", "data_pipeline", "model", "system")


@dataclass(frozen=True)
class Import:
    module: str  # the importing module, dotted
    line: int
    target: str  # what is imported, dotted: a module of ours where there is one, else the name as written
    at_import_time: bool  # False inside a function

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path = ROOT) -> dict[str, Path]:
    return {module_name(path, root): path for package in PACKAGES for path in (root / package).rglob("*.py")}


def imports(root: Path = ROOT) -> list[Import]:
    """Every import of the four packages, those inside functions and under TYPE_CHECKING included."""
    known = modules(root)
    found = []
    for name, path in sorted(known.items()):
        for node, at_import_time in _statements(ast.parse(path.read_text("utf-8"), str(path)), True):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                base = "." * node.level + (node.module or "")
                targets = [f"{base}.{alias.name}" for alias in node.names]
                # a name inside a module of ours stands for that module, `from package import module` as well
                targets = [target if target in known or base not in known else base for target in targets]
            found += [Import(name, node.lineno, target, at_import_time) for target in targets]
    return found


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """One way round for each group of modules that import each other, itself included."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(edges.get(name, ())):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])
    return found


def _statements(node: ast.AST, at_import_time: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_import_time
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _statements(child, at_import_time and not inside)
