"""Boxes in files: read as any boxes, and never more executed than tensors need."""

import json
import pickle

import pytest
import torch

from megatron_brain.checkpointing.boxes import Box
from megatron_brain.checkpointing.storage import (
    INDEX,
    CheckpointError,
    read_boxes,
    read_index,
    read_tensors,
    write_boxes,
)
from megatron_brain.config.errors import ConfigError


def box(key, data, *, shape=None, offset=None):
    return Box(key=key, shape=shape or tuple(data.shape), offset=offset or (0,) * data.dim(), data=data)


@pytest.fixture
def folder(single, tmp_path):
    """A matrix in three uneven boxes, one of them a view of something larger, and a bf16 vector."""
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


def test_boxes_are_read_in_another_division_and_precision(folder):
    left, right = torch.zeros(6, 1), torch.zeros(6, 3, dtype=torch.float64)
    vector = torch.zeros(2)
    read_boxes(
        [box("matrix", left, shape=(6, 4)), box("matrix", right, shape=(6, 4), offset=(0, 1)), box("vector", vector)],
        folder,
    )
    assert torch.equal(torch.cat([left, right], dim=1), torch.arange(24.0, dtype=torch.float64).view(6, 4))
    assert vector.tolist() == [1.0, 2.5]


def test_whole_tensors_are_read_by_one_process(folder):
    tensors = read_tensors(folder)
    assert torch.equal(tensors["matrix"], torch.arange(24.0).view(6, 4))
    assert tensors["vector"].dtype == torch.bfloat16
    assert list(read_tensors(folder, "vec")) == ["vector"]


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


def test_the_pickle_that_torch_writes_beside_is_not_read(folder, tmp_path):
    proof = tmp_path / "proof"
    attack = pickle.dumps(Attack(proof))
    pickle.loads(attack)  # noqa: S301
    assert proof.exists(), "the attack works where it is unpickled"
    proof.unlink()
    (folder / ".metadata").write_bytes(attack)
    read_boxes([box("matrix", torch.zeros(6, 4))], folder)
    assert not proof.exists()


def test_a_tensor_file_cannot_run_code(folder, tmp_path):
    proof, payload = tmp_path / "proof", tmp_path / "payload"
    torch.save(Attack(proof), payload)
    torch.load(payload, weights_only=False)
    assert proof.exists(), "the attack works on an unrestricted torch.load"
    proof.unlink()
    index = json.loads((folder / INDEX).read_text())
    (place,) = index["vector"]["boxes"]
    (folder / place["file"]).write_bytes(payload.read_bytes())
    for box_of_index in (b for tensor in index.values() for b in tensor["boxes"]):
        box_of_index |= {"start": 0, "length": payload.stat().st_size}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="Weights only load failed"):
        read_boxes([box("vector", torch.zeros(2))], folder)
    assert not proof.exists()


def shorten(folder, index):
    (file,) = folder.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:100])


def remove(folder, index):
    (file,) = folder.glob("*.distcp")
    file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shorten, "__0_0.distcp ends before a part of"),
        (remove, "is not there; do all nodes see this folder"),
        (lambda _, index: index["matrix"]["boxes"].pop(), "matrix is not there in full"),
        (lambda _, index: index["matrix"]["boxes"][0].update(offset=[5, 3]), "matrix is not there in full"),
        (
            lambda _, index: index["vector"]["boxes"][0].update(file="../__0_0.distcp"),
            r"\.\./__0_0.distcp, which holds",
        ),
        (lambda _, index: index["vector"]["boxes"][0].update(start=-1), "ends before a part of vector"),
        (lambda _, index: index["vector"].update(dtype="load"), "vector has the dtype 'load'"),
        (lambda _, index: index["vector"].pop("shape"), "damaged or not complete: 'shape'"),
        (lambda _, index: index.update(vector=3), "damaged or not complete"),
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


def test_a_file_of_other_contents_is_an_error_that_names_the_folder(folder):
    (file,) = folder.glob("*.distcp")
    file.write_bytes(b"?" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=f"{folder.name} cannot be read: rank 0"):
        read_boxes([box("matrix", torch.zeros(6, 4))], folder)
