"""How far it is from `maskclip train` to the train step, for somebody who reads.

Measured as the functions that one has to read in order, one calling the next, from the handler of the command
to the step itself: the number of files that they lie in, and the sum of their lines, signature and docstring
included.
"""

import ast
from itertools import pairwise

from tests.architecture.imports import modules

PATH = (
    "system.cli:train_command",
    "system.train:train",
    "system.trainer:Trainer.fit",
    "system.trainer:Trainer.step_until_applied",
    "system.trainer:Trainer.step",
)
MOST_FILES = 3
MOST_LINES = 150


def find(place: str) -> ast.FunctionDef:
    """The definition of "module:Class.function"; AssertionError when it is not there."""
    module, _, dotted = place.partition(":")
    node: ast.AST = ast.parse(modules()[module].read_text("utf-8"))
    for name in dotted.split("."):
        inside = [child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == name]
        assert inside, f"{place} is not there: the reading path has changed, so change PATH"
        node = inside[0]
    assert isinstance(node, ast.FunctionDef)
    return node


def called(node: ast.FunctionDef) -> set[str]:
    calls = [child.func for child in ast.walk(node) if isinstance(child, ast.Call)]
    return {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}


def test_each_calls_the_next():
    for caller, callee in pairwise(PATH):
        assert callee.split(":")[1].split(".")[-1] in called(find(caller)), f"{caller} does not call {callee}"


def test_three_files_and_150_lines():
    lines = {place: (node.end_lineno or 0) - node.lineno + 1 for place in PATH for node in (find(place),)}
    files = {place.split(":")[0] for place in PATH}
    assert len(files) <= MOST_FILES
    assert sum(lines.values()) <= MOST_LINES, lines
