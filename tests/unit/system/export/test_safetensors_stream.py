"""Streamed safetensors files: what the library reads in ours, and we in the library's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from cluster.errors import DataError
from cluster.store import open_store
from model.convert import Entry
from system.export.safetensors_stream import TensorFile, write_tensors

TENSORS = {
    "b.weight": torch.arange(6.0).view(2, 3),
    "a": torch.tensor(2.5),
    "ключ": torch.arange(4.0).view(2, 2).T,
    "empty": torch.zeros(0, 3),
}


def entries(asked: list[str]) -> list[Entry]:
    def make(name: str):
        def made(get):
            asked.append(name)
            return get(name)

        return made

    return [Entry(name, tuple(tensor.shape), make(name)) for name, tensor in TENSORS.items()]


def test_the_library_reads_what_is_written_and_would_write_the_same(tmp_path: Path):
    asked: list[str] = []
    write_tensors(tmp_path / "x.safetensors", entries(asked), TENSORS.__getitem__)
    assert asked == sorted(TENSORS)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], TENSORS[name]) for name in read)
    whole = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    assert (tmp_path / "x.safetensors").read_bytes() == save(whole, metadata={"format": "pt"})


def test_a_tensor_of_another_shape_is_an_error(tmp_path: Path):
    wrong = {**TENSORS, "a": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"a has the shape \(2,\), not \(\)"):
        write_tensors(tmp_path / "x.safetensors", entries([]), wrong.__getitem__)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_the_library_writes_is_read(tmp_path: Path, dtype: torch.dtype):
    written = {name: tensor.to(dtype).contiguous() for name, tensor in TENSORS.items() if tensor.numel()}
    save_file(written | {"ids": torch.arange(3)}, tmp_path / "x.safetensors")
    file = TensorFile(open_store(str(tmp_path)), "x.safetensors")
    assert set(file) == {*written, "ids"}
    for name, tensor in written.items():
        assert (file[name].dtype, file.shape(name)) == (dtype, tuple(tensor.shape))
        assert torch.equal(file[name], tensor)
    assert "absent" not in file
    with pytest.raises(DataError, match=r"ids is I64, not a floating point tensor"):
        file["ids"]


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]", b"\x08\0\0\0\0\0\0\0not json"]
)
def test_what_is_no_such_file_is_one_line(tmp_path: Path, content: bytes):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="not a safetensors file"):
        TensorFile(open_store(str(tmp_path)), "x.safetensors")
