"""Boxes in files: read as any boxes, bit for bit, and never executed."""

import json
import os
import stat

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from megatron_brain.checkpointing import data_files, storage
from megatron_brain.checkpointing.boxes import Box
from megatron_brain.checkpointing.index import INDEX, read_index, write_index
from megatron_brain.checkpointing.storage import (
    fill,
    read_boxes,
    read_tensors,
    write_boxes,
    write_file,
)
from megatron_brain.errors import ConfigError

DATA = "weights_00000.safetensors"


def box(key, data, *, shape=None, offset=None):
    return Box(key=key, shape=shape or tuple(data.shape), offset=offset or (0,) * data.dim(), data=data)


@pytest.fixture
def folder(single, tmp_path):
    """A matrix in four uneven boxes, three of them views of something larger, and a bf16 vector."""
    whole = torch.arange(24.0).view(6, 4)
    boxes = [
        box("matrix", whole[1:2, 2:], shape=(6, 4), offset=(1, 2)),
        box("matrix", whole[2:], shape=(6, 4), offset=(2, 0)),
        box("matrix", whole[:1], shape=(6, 4), offset=(0, 0)),
        box("matrix", whole[1:2, :2].clone(), shape=(6, 4), offset=(1, 0)),
        box("vector", torch.tensor([1.0, 2.5], dtype=torch.bfloat16)),
    ]
    write_boxes(boxes, tmp_path, single.host_group())
    return tmp_path


def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(*args):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(SafetensorError, match=f"{DATA}: I/O error: No space"):
        write_file([box("vector", torch.zeros(2))], tmp_path / DATA)


def test_boxes_are_read_in_another_division_and_precision(folder):
    left, right = torch.zeros(6, 1), torch.zeros(6, 3, dtype=torch.float64)
    vector = torch.zeros(2)
    read_boxes(
        [box("matrix", left, shape=(6, 4)), box("matrix", right, shape=(6, 4), offset=(0, 1)), box("vector", vector)],
        folder,
    )
    assert torch.equal(torch.cat([left, right], dim=1), torch.arange(24.0, dtype=torch.float64).view(6, 4))
    assert vector.tolist() == [1.0, 2.5]


def test_boxes_that_are_views_of_something_larger_are_written_through(folder):
    larger = torch.full((4, 9), -1.0)
    fill([box("matrix", larger[1:3, 2:8:3], shape=(6, 4), offset=(3, 1))], read_index(folder))
    expected = torch.full((4, 9), -1.0)
    expected[1:3, 2:8:3] = torch.arange(24.0).view(6, 4)[3:5, 1:3]
    assert torch.equal(larger, expected)


def test_whole_tensors_are_read_by_one_process(folder):
    tensors = read_tensors(folder)
    assert torch.equal(tensors["matrix"], torch.arange(24.0).view(6, 4))
    assert tensors["vector"].dtype == torch.bfloat16
    assert list(read_tensors(folder, "vec")) == ["vector"]


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_every_dtype_comes_back(tmp_path, dtype):
    """Of not-a-numbers with any payload too, and of tensors without dimensions or elements."""
    bits = torch.randint(0, 256, (64,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    buffer = bits.view(dtype)
    boxes = [box("flat", buffer[2:].view(2, -1)), box("scalar", buffer[1]), box("empty", buffer[:0].view(0, 3))]
    write_index(tmp_path, write_file(boxes, tmp_path / "a.safetensors"))
    stored = read_tensors(tmp_path)
    for written in boxes:
        read = stored[written.key]
        assert (read.dtype, read.shape) == (dtype, written.data.shape)
        assert torch.equal(read.reshape(-1).view(torch.uint8), written.data.reshape(-1).view(torch.uint8))


def test_a_file_is_plain_safetensors_named_by_tensor_and_place(folder):
    tensors = load_file(folder / DATA)
    assert sorted(tensors) == ["matrix@0,0", "matrix@1,0", "matrix@1,2", "matrix@2,0", "vector@0"]
    assert tensors["matrix@1,2"].tolist() == [[6.0, 7.0]]


def test_files_of_several_processes_make_one_checkpoint(tmp_path):
    rows = torch.arange(8.0).view(4, 2)
    stored = [
        place
        for number in range(2)
        for place in write_file(
            [box("rows", rows[2 * number : 2 * number + 2], shape=(4, 2), offset=(2 * number, 0))],
            tmp_path / f"part_{number}.safetensors",
        )
    ]
    write_index(tmp_path, stored)
    index = read_index(tmp_path)
    assert (list(index.boxes), index.shape("rows")) == (["rows"], (4, 2))
    assert [place.part.dtype for place in index.boxes["rows"]] == [torch.float32] * 2
    middle = torch.zeros(2, 1)
    fill([box("rows", middle, shape=(4, 2), offset=(1, 1))], index)
    assert middle.tolist() == [[3.0], [5.0]]


def test_files_are_readable_for_whom_the_user_lets(tmp_path):
    before = os.umask(0o027)
    try:
        write_file([box("a", torch.ones(1))], tmp_path / DATA)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / DATA).stat().st_mode) == 0o640


def test_boxes_that_overlap_or_leave_something_out_are_not_indexed(tmp_path):
    first, second = torch.zeros(2, 4), torch.zeros(2, 4)
    for row in (1, 3):
        boxes = [box("matrix", first, shape=(4, 4)), box("matrix", second, shape=(4, 4), offset=(row, 0))]
        with pytest.raises(AssertionError, match="the boxes of matrix overlap or leave something out"):
            write_index(tmp_path, write_file(boxes, tmp_path / DATA))


def _mapped() -> int:
    """Bytes of files in this process's memory."""
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssFile:", "RssShmem:")))


@pytest.fixture
def mapped(monkeypatch):
    """What each copied box left in memory of its file."""
    seen, copy, before = [], storage._copy, _mapped()

    def copy_and_look(*args):
        copy(*args)
        seen.append(_mapped() - before)

    monkeypatch.setattr(storage, "_copy", copy_and_look)
    return seen


def test_of_a_file_only_what_is_needed_is_read(tmp_path, mapped):
    """A row range of a tensor that is 32 times as large."""
    whole = torch.arange(16 * 2**20, dtype=torch.float32).view(2**12, -1)
    write_index(tmp_path, write_file([box("whole", whole)], tmp_path / DATA))
    rows = torch.zeros(2**7, whole.size(1))
    fill([box("whole", rows, shape=whole.shape, offset=(2**10, 0))], read_index(tmp_path))
    assert torch.equal(rows, whole[2**10 : 2**10 + 2**7])
    assert rows.nbytes // 2 < max(mapped) < 4 * rows.nbytes


def test_a_large_file_is_let_go_of_while_it_is_read(tmp_path, mapped, monkeypatch):
    monkeypatch.setattr(data_files, "_MAPPED_BYTES", 8 * 2**20)
    boxes = [box(f"w{number}", torch.full((2**20,), float(number))) for number in range(16)]
    write_index(tmp_path, write_file(boxes, tmp_path / DATA))
    stored = read_tensors(tmp_path)
    assert all(torch.equal(stored[written.key], written.data) for written in boxes)
    assert 4 * 2**20 < max(mapped) < 16 * 2**20


def test_what_is_missing_or_of_another_shape_is_named(folder):
    with pytest.raises(ConfigError, match="has no absent"):
        read_boxes([box("absent", torch.zeros(1))], folder)
    with pytest.raises(ConfigError, match=r"matrix has shape \(6, 4\), needed is \(5, 4\)"):
        read_boxes([box("matrix", torch.zeros(5, 4))], folder)


class Attack:
    """Runs code when it is unpickled."""

    def __init__(self, proof):
        self._proof = proof

    def __reduce__(self):
        return open, (str(self._proof), "w")


def replace(folder, contents):
    """Put another file in the place of the data, and let the index know its size."""
    (folder / DATA).write_bytes(contents)
    index = json.loads((folder / INDEX).read_text())
    index["files"][DATA] = len(contents)
    (folder / INDEX).write_text(json.dumps(index))


def test_a_tensor_file_cannot_run_code(folder, tmp_path):
    proof, payload = tmp_path / "proof", tmp_path / "payload"
    torch.save(Attack(proof), payload)
    torch.load(payload, weights_only=False)
    assert proof.exists(), "the attack works on an unrestricted torch.load"
    proof.unlink()
    replace(folder, payload.read_bytes())
    with pytest.raises(ConfigError, match=f"{DATA} is damaged: Error while deserializing header"):
        read_boxes([box("vector", torch.zeros(2))], folder)
    assert not proof.exists()


def test_a_file_of_other_tensors_is_named(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "other.safetensors"
    for boxes, problem in (
        ([box("vector", torch.zeros(3))], r"vector@0 is torch.float32 \(3,\) there, and torch.bfloat16 \(2,\) in"),
        ([box("other", torch.zeros(3))], "does not contain tensor vector@0"),
    ):
        write_file(boxes, other)
        replace(folder, other.read_bytes())
        with pytest.raises(ConfigError, match=f"{DATA} is damaged: .*{problem}"):
            read_boxes([box("vector", torch.zeros(2))], folder, verify=False)
        with pytest.raises(ConfigError, match="damaged: "):
            read_boxes([box("vector", torch.zeros(2))], folder)


def shorten(folder, index):
    (folder / DATA).write_bytes((folder / DATA).read_bytes()[:100])


def lengthen(folder, index):
    (folder / DATA).write_bytes((folder / DATA).read_bytes() + b"?")


def remove(folder, index):
    (folder / DATA).unlink()


def change(key, number=0, **values):
    return lambda folder, index: index["tensors"][key]["boxes"][number].update(values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shorten, f"{DATA} has 100 bytes, written were "),
        (lengthen, f"{DATA} has .* bytes, written were "),
        (remove, f"{DATA} is not there; do all nodes see this folder"),
        (lambda _, index: index["tensors"]["matrix"]["boxes"].pop(), "matrix is not there in full"),
        (lambda _, index: index["tensors"]["vector"].update(boxes=[]), "vector is not there in full"),
        (change("matrix", offset=[5, 3]), "matrix is not there in full, or twice"),
        (change("matrix", 1, offset=[1, 0]), "matrix is not there in full, or twice"),
        (change("vector", file=f"../{DATA}"), rf"\.\./{DATA}, which holds a part of vector, is not among its files"),
        (lambda _, index: index["files"].update({f"../{DATA}": 3}), rf"\.\./{DATA} is not there"),
        (change("vector", offset=[-1]), r"\(-1,\) is negative"),
        (lambda _, index: index["tensors"]["vector"].update(shape=[1] * 40), "vector has 40 dimensions"),
        (change("vector", offset=[0.0]), "damaged or not complete"),
        (lambda _, index: index["tensors"]["vector"].update(dtype="load"), "vector has the dtype 'load'"),
        (lambda _, index: index["tensors"]["vector"].pop("shape"), "damaged or not complete: 'shape'"),
        (lambda _, index: index["tensors"].update(vector=3), "damaged or not complete"),
        (lambda _, index: index.pop("files"), "damaged or not complete: 'files'"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_before_anything_is_read(folder, damage, message):
    index = json.loads((folder / INDEX).read_text())
    damage(folder, index)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=message):
        read_boxes([box("matrix", torch.zeros(6, 4))], folder)


def test_an_index_that_is_no_json_or_not_there_is_refused(folder):
    (folder / INDEX).write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        read_index(folder)
    (folder / INDEX).unlink()
    with pytest.raises(ConfigError, match=r"has no tensors\.json"):
        read_index(folder)


def test_a_file_of_other_contents_is_an_error_that_names_it(folder):
    file = folder / DATA
    file.write_bytes(b"?" * file.stat().st_size)
    with pytest.raises(ConfigError, match=f"{file} is damaged: .*--no-verify"):
        read_boxes([box("matrix", torch.zeros(6, 4))], folder)
