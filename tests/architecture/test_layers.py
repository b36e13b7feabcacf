"""The packages form one downward DAG, and what each may know of the outside is fixed."""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.architecture.imports import PACKAGES, ROOT, cycles, imports, modules

MAY_IMPORT = {
    "cluster": {"cluster"},
    "model": {"model"},
    "data_pipeline": {"data_pipeline", "cluster"},
    "system": {"system", "data_pipeline", "model", "cluster"},
}
MODEL_DOES_NOT_KNOW = ("deepspeed", "ray", "torch.distributed", "fsspec", "s3fs", "pyarrow", "webdataset")


def is_part_of(target: str, package: str) -> bool:
    return target == package or target.startswith(f"{package}.")


def test_the_packages_are_there():
    assert [name for name in PACKAGES if name not in modules()] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_downwards(package: str):
    wrong = [
        str(found)
        for found in imports()
        if is_part_of(found.module, package)
        and found.target.split(".")[0] in PACKAGES
        and found.target.split(".")[0] not in MAY_IMPORT[package]
    ]
    assert wrong == []


def test_nothing_of_ours_imports_the_tests_or_the_examples():
    assert [str(found) for found in imports() if found.target.split(".")[0] in ("tests", "examples")] == []


def test_imports_are_absolute():
    assert [str(found) for found in imports() if found.target.startswith(".")] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circles_inside_a_package(package: str):
    edges: dict[str, set[str]] = defaultdict(set)
    for found in imports():
        if is_part_of(found.module, package) and is_part_of(found.target, package):
            edges[found.module].add(found.target)
    assert [" -> ".join(circle) for circle in cycles(edges)] == []


def test_cluster_has_no_torch_at_module_level():
    wrong = [
        str(found)
        for found in imports()
        if is_part_of(found.module, "cluster") and found.at_import_time and is_part_of(found.target, "torch")
    ]
    assert wrong == []


def test_importing_all_of_cluster_loads_no_torch():
    names = [name for name in modules() if is_part_of(name, "cluster")]
    code = f"import {', '.join(names)}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("outside", MODEL_DOES_NOT_KNOW)
def test_model_is_pure_pytorch(outside: str):
    wrong = [
        str(found)
        for found in imports()
        if is_part_of(found.module, "model") and is_part_of(found.target, outside)
    ]
    assert wrong == []
    used = [name for name, path in modules().items() if is_part_of(name, "model") and uses(path, outside)]
    assert used == []


def uses(path: Path, outside: str) -> bool:
    """`torch.distributed.x` needs no import of its own once torch is there."""
    return outside == "torch.distributed" and "torch.distributed." in path.read_text("utf-8")


def test_a_circle_and_an_upward_import_would_be_found(tmp_path: Path):
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "cluster/a.py").write_text("from cluster import b\n")
    (tmp_path / "cluster/b.py").write_text("def f():\n    from cluster.a import x\n    import system.c\n")
    found = {(found.module, found.target, found.at_import_time) for found in imports(tmp_path)}
    assert found == {
        ("cluster.a", "cluster.b", True),
        ("cluster.b", "cluster.a", False),
        ("cluster.b", "system.c", False),
    }
    assert cycles({"cluster.a": {"cluster.b"}, "cluster.b": {"cluster.a"}}) == [
        ["cluster.a", "cluster.b", "cluster.a"]
    ]
