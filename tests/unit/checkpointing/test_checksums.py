"""A checkpoint that rotted is not loaded without a word: every kind of file, one bit at a time."""

import json
import logging

import pytest
import torch
from helpers.tiny_training import Training, equal_weights

from megatron_brain.checkpointing import load_weights, read_info, read_records, require_files
from megatron_brain.checkpointing.boxes import BoxPart
from megatron_brain.checkpointing.checksums import checksum
from megatron_brain.checkpointing.folders import INFO
from megatron_brain.checkpointing.index import INDEX, StoredBox, index_checksum, read_index
from megatron_brain.checkpointing.verification import find_damaged_boxes, my_share
from megatron_brain.commands import inspect_checkpoint as inspect_command
from megatron_brain.errors import ConfigError

DATA = "weights_00000.safetensors"


@pytest.fixture
def saved(single, tmp_path):
    """A checkpoint after one step, with records."""
    training = Training(single)
    training.step()
    return training.save(tmp_path, 1, records=[{"id": "a", "reward": 1.25}], stage={"seed": 3})


def flip(path, place, bit=2):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(bytes(data))


def place_of(folder, key):
    """Where the first value of a tensor stands in the file."""
    data = (folder / DATA).read_bytes()
    length = int.from_bytes(data[:8], "little")
    [name] = [name for name in json.loads(data[8 : 8 + length]) if name.startswith(f"{key}@")]
    return 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]


def resume(folder, single, **options):
    training = Training(single, seed=99)
    training.resume(read_info(folder.parent), **options)
    return training


@pytest.mark.parametrize(
    "key",
    ["decoder.layers.1.mlp.linear_fc2.weight", "optimizer.exp_avg.decoder.final_layernorm.weight", "random.torch"],
)
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_is_found_named_and_read_only_if_asked_to(key, bit, saved, single):
    before = resume(saved, single).weights()
    flip(saved / DATA, place_of(saved, key), bit)
    with pytest.raises(ConfigError, match=f"damaged: {key}@0.* in {DATA}: .*Copy it again.*--no-verify"):
        resume(saved, single)
    after = resume(saved, single, verify=False).weights()
    assert equal_weights(after, before) == (not key.startswith("decoder"))


def test_of_what_is_damaged_only_what_is_read_matters(saved, single):
    flip(saved / DATA, place_of(saved, "optimizer.exp_avg.decoder.final_layernorm.weight"))
    load_weights(read_info(saved), Training(single).chunks, head="policy")
    assert list(find_damaged_boxes((box for boxes in read_index(saved).boxes.values() for box in boxes), saved)) == [
        f"optimizer.exp_avg.decoder.final_layernorm.weight@0 in {DATA}"
    ]


def test_a_damaged_header_is_a_mistake_with_a_cure(saved, single):
    flip(saved / DATA, 12)
    with pytest.raises(ConfigError, match=f"{DATA} is damaged: .*Copy it again"):
        resume(saved, single)


@pytest.mark.parametrize("name", [INDEX, "records/replica_00000.jsonl"])
def test_a_changed_small_file_is_refused_and_a_missing_one(name, saved):
    info = read_info(saved)
    require_files(info)
    flip(saved / name, -3)
    with pytest.raises(ConfigError, match=f"is damaged: {name} is not what was saved, by its checksum"):
        require_files(info)
    (saved / name).unlink()
    with pytest.raises(ConfigError, match=f"is damaged: {name} is missing"):
        require_files(info)


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.txt", "config.yaml"])
def test_what_users_edit_is_warned_of(name, saved, caplog):
    (saved / name).write_text((saved / name).read_text() + "\n# edited\n")
    with caplog.at_level(logging.WARNING):
        require_files(read_info(saved))
    assert f"{name} is not what was saved, by its checksum: it was edited, or is damaged" in caplog.text


def test_a_changed_digit_of_the_info_is_found_and_an_edit_can_be_meant(saved):
    text = (saved / INFO).read_text()
    (saved / INFO).write_text(text.replace('"seed": 3', '"seed": 7'))
    with pytest.raises(ConfigError, match=f"{INFO} is damaged: it is not what was written, .*remove its 'checksum'"):
        read_info(saved)
    values = json.loads((saved / INFO).read_text())
    del values["checksum"]
    (saved / INFO).write_text(json.dumps(values))
    assert read_info(saved).stage_state == {"seed": 7}


def as_before_checksums(folder):
    """The folder as format 3 wrote it."""
    index = json.loads((folder / INDEX).read_text())
    for tensor in index["tensors"].values():
        for box in tensor["boxes"]:
            del box["checksum"]
    (folder / INDEX).write_text(json.dumps(index))
    values = json.loads((folder / INFO).read_text())
    for name in ("checksum", "files", "template_date"):
        del values[name]
    (folder / INFO).write_text(json.dumps({**values, "format": 3}))


def test_a_checkpoint_of_before_loads_with_a_note(saved, single, caplog):
    expected = resume(saved, single).weights()
    as_before_checksums(saved)
    with caplog.at_level(logging.INFO):
        assert equal_weights(resume(saved, single).weights(), expected)
    assert f"{saved} has no checksums, being of an earlier version: what is read is not verified" in caplog.text
    info = read_info(saved)
    assert (info.format, info.template_date, info.files) == (3, "", {}) and read_records(info)
    require_files(info)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8])
def test_a_checksum_is_that_of_the_bytes_whatever_type_and_shape(dtype):
    values = torch.arange(6).to(dtype)
    assert checksum(values.view(2, 3)) == checksum(values) != checksum(torch.arange(6).flip(0).to(dtype))
    assert checksum(values[:1].view(())) == checksum(values[:1])
    assert checksum(values[:0]) == checksum(torch.zeros(0))


def test_processes_of_a_node_look_at_each_box_once_that_any_of_them_needs():
    def box(number, size=8):
        part = BoxPart(key=f"t{number}", dtype=torch.float32, shape=(size,), offset=(0,), size=(size,))
        return StoredBox(part=part, file=DATA, file_size=1, checksum="0")

    needed = [[box(0), box(1), box(2)], [box(1), box(2), box(3)], [box(0), box(1)], []]
    hosts = ["a", "a", "b", "b"]
    told = [(host, [stored.part for stored in boxes]) for host, boxes in zip(hosts, needed, strict=True)]
    shares = [my_share(boxes, told, rank) for rank, boxes in enumerate(needed)]
    for host in "ab":
        looked_at = [b.part.key for share, name in zip(shares, hosts, strict=True) if name == host for b in share]
        wanted = {b.part.key for boxes, name in zip(needed, hosts, strict=True) if name == host for b in boxes}
        assert sorted(looked_at) == sorted(wanted)
    assert all(set(share) <= set(boxes) for share, boxes in zip(shares, needed, strict=True))


@pytest.fixture
def inspect_checkpoint():
    return inspect_command.main


def test_the_tool_says_what_a_checkpoint_holds_and_that_it_is_sound(inspect_checkpoint, saved, capsys):
    assert inspect_checkpoint([str(saved.parent), "--finite"]) == 0
    shown = capsys.readouterr().out
    for said in (
        str(saved),
        "policy model of the sft stage, iteration 1, format 4",
        "saved at pipeline 1 x tensor 1 x data 1, in float32",
        "num_layers=2",
        "seed 3",
        "  lr: 0.01",
        "  decoder.layers.*.mlp.linear_fc1.weight  [128, 32]  float32  x 2",
        "sound: ",
    ):
        assert said in shown, said
    assert shown.index("  embedding.word_embeddings.weight") < shown.index("  optimizer.exp_avg.embedding")
    assert inspect_checkpoint([str(saved), "--tensors", "--no-verify"]) == 0
    shown = capsys.readouterr().out
    assert "decoder.layers.1.mlp.linear_fc1.weight" in shown and "sound" not in shown


def test_the_tool_tells_damage_of_every_kind_and_numbers_that_are_none(inspect_checkpoint, saved, capsys, single):
    flip(saved / DATA, place_of(saved, "decoder.final_layernorm.weight"))
    flip(saved / "records" / "replica_00000.jsonl", 3)
    assert inspect_checkpoint([str(saved)]) == 1
    shown = capsys.readouterr().out
    assert f"decoder.final_layernorm.weight@0 in {DATA}: not what was saved" in shown
    assert "records/replica_00000.jsonl is not what was saved" in shown
    training = Training(single)
    training.chunks[0].decoder.final_layernorm.weight.data[3] = float("nan")
    folder = training.save(saved.parent, 2, with_optimizer=False)
    assert inspect_checkpoint([str(folder)]) == 0
    assert inspect_checkpoint([str(folder), "--finite"]) == 1
    assert f"decoder.final_layernorm.weight@0 in {DATA}: 1 values are not finite" in capsys.readouterr().out


def test_the_tool_tells_a_mistake_from_damage(inspect_checkpoint, saved, tmp_path, capsys):
    assert inspect_checkpoint([str(tmp_path / "absent")]) == 2
    assert "does not exist" in capsys.readouterr().err
    as_before_checksums(saved)
    assert inspect_checkpoint([str(saved)]) == 0
    assert "not verified: it is of an earlier version" in capsys.readouterr().out


def test_a_checkpoint_of_which_one_part_has_lost_its_checksum_is_damaged(saved):
    index = saved / "tensors.json"
    index.write_text(index.read_text().replace('"checksum"', '"chdcksum"', 1))
    with pytest.raises(ConfigError, match=r"tensors.json: .* has no checksum, and others have\. Copy it again"):
        read_index(saved)


def test_the_checksum_of_an_index_is_of_the_values_and_neither_of_the_place_nor_of_the_files_names(saved, tmp_path):
    before = index_checksum(saved)
    moved = saved.rename(tmp_path / "moved")
    (moved / DATA).rename(moved / "weights_00007.safetensors")
    place = moved / INDEX
    place.write_text(place.read_text().replace(DATA, "weights_00007.safetensors"))
    assert index_checksum(moved) == before
    index = json.loads(place.read_text())
    [box, *_] = index["tensors"]["decoder.final_layernorm.weight"]["boxes"]
    box["checksum"] = "0" * 16
    place.write_text(json.dumps(index))
    assert index_checksum(moved) != before


def test_without_checksums_the_times_of_the_files_tell_that_other_weights_took_their_place(saved):
    index = json.loads((saved / INDEX).read_text())
    for tensor in index["tensors"].values():
        for box in tensor["boxes"]:
            box["checksum"] = None
    (saved / INDEX).write_text(json.dumps(index))
    before = index_checksum(saved)
    assert index_checksum(saved) == before
    (saved / DATA).write_bytes((saved / DATA).read_bytes())
    assert index_checksum(saved) != before, "they may be others, of the same shapes"
