"""Folders of checkpoints: at every moment of a save the latest one can be read."""

import json
import shutil

import pytest

from megatron_brain.checkpointing import folders
from megatron_brain.checkpointing.errors import DamagedError
from megatron_brain.checkpointing.folders import INFO, LATEST, CheckpointInfo, read_info
from megatron_brain.errors import ConfigError

ENDINGS = (".partial", ".replaced", ".removed")


def write(root, iteration, *, mark=""):
    """A complete partial folder, as a save leaves it for `publish`; `mark` tells one save from another."""
    partial = folders.partial_dir(root, iteration)
    partial.mkdir(parents=True)
    CheckpointInfo(
        path=partial,
        iteration=iteration,
        stage="sft",
        head="policy",
        architecture={},
        tokenizer_type="HuggingFaceTokenizer",
        stage_state={"mark": mark},
        trainer_state={},
        has_optimizer=True,
        bf16=False,
        layout={},
    ).write(partial)


def save(root, iteration, *, mark=""):
    write(root, iteration, mark=mark)
    folders.publish(root, iteration)


def names(root):
    return sorted(path.name for path in root.glob("iter_*"))


def test_the_latest_checkpoint_is_read_and_earlier_ones_by_their_folder(tmp_path):
    save(tmp_path, 1, mark="first")
    save(tmp_path, 2, mark="second")
    assert (read_info(tmp_path).iteration, read_info(tmp_path).stage_state) == (2, {"mark": "second"})
    assert read_info(tmp_path / "iter_0000001").stage_state == {"mark": "first"}
    assert names(tmp_path) == ["iter_0000001", "iter_0000002"]


class Crash(BaseException):
    pass


@pytest.mark.parametrize("replaces", [False, True])
def test_wherever_publishing_stops_the_latest_checkpoint_can_be_read(tmp_path, monkeypatch, replaces):
    """Every call that changes the file system crashes once, before it does anything."""
    moments = 0
    for moment in range(20):
        root = tmp_path / str(moment)
        save(root, 1, mark="old")
        iteration = 1 if replaces else 2
        write(root, iteration, mark="new")
        calls = 0

        def crash_at(original, moment=moment):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == moment + 1:
                    raise Crash
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patched:
            for target, name in (
                (folders.Path, "rename"),
                (folders.Path, "replace"),
                (folders.shutil, "rmtree"),
                (folders, "write_whole"),
                (folders, "sync_folder"),
            ):
                patched.setattr(target, name, crash_at(getattr(target, name)))
            try:
                folders.publish(root, iteration)
                break
            except Crash:
                moments += 1
        info = read_info(root)
        assert info.stage_state["mark"] in ("old", "new")
        assert (info.path / INFO).is_file()
        # The next save clears up and goes through.
        folders.remove_leftovers(root)
        assert read_info(root).stage_state["mark"] == info.stage_state["mark"]
        save(root, 3, mark="later")
        assert read_info(root).stage_state == {"mark": "later"}
        assert not [name for name in names(root) if name.endswith(ENDINGS)]
    assert moments >= 4, "publishing was interrupted at every call"
    assert read_info(root).stage_state == {"mark": "new"}


def test_leftovers_are_never_read(tmp_path):
    save(tmp_path, 1)
    write(tmp_path, 2)
    assert read_info(tmp_path).iteration == 1
    shutil.rmtree(tmp_path / "iter_0000001")
    with pytest.raises(DamagedError, match="says 1, but iter_0000001 is not there; iterations found: none"):
        read_info(tmp_path)


def test_only_the_latest_are_kept_besides_protected_and_later_ones(tmp_path):
    for iteration in (1, 2, 3, 4, 9):
        save(tmp_path, iteration)
    folders.keep_latest(tmp_path, 4, 2, [tmp_path / "iter_0000001"])
    assert names(tmp_path) == ["iter_0000001", "iter_0000003", "iter_0000004", "iter_0000009"]
    folders.keep_latest(tmp_path, 4, 1, [])
    assert names(tmp_path) == ["iter_0000004", "iter_0000009"]


def test_a_folder_that_is_no_checkpoint_is_named_with_what_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match=r"absent does not exist"):
        read_info(tmp_path / "absent")
    with pytest.raises(ConfigError, match=f"holds no checkpoint: it has no {LATEST}"):
        read_info(tmp_path)
    (tmp_path / LATEST).write_text("soon")
    with pytest.raises(DamagedError, match="says 'soon', which is not an iteration number"):
        read_info(tmp_path)
    (tmp_path / LATEST).write_text("12\n")
    (tmp_path / "iter_0000012").mkdir()
    with pytest.raises(DamagedError, match=f"iter_0000012 has no {INFO}"):
        read_info(tmp_path)
    (tmp_path / "iter_0000012" / INFO).write_text('{"iteration": 12')
    with pytest.raises(DamagedError, match=f"{INFO} is not JSON"):
        read_info(tmp_path)
    (tmp_path / "iter_0000012" / INFO).write_text('{"iteration": 12}')
    with pytest.raises(ConfigError, match="has checkpoint format 1, this version of megatron_brain reads 4"):
        read_info(tmp_path)
    (tmp_path / "iter_0000012" / INFO).write_text("[]")
    with pytest.raises(ConfigError, match="has checkpoint format unknown"):
        read_info(tmp_path)
    (tmp_path / "iter_0000012" / INFO).write_text('{"iteration": 12, "format": 3}')
    with pytest.raises(DamagedError, match="is damaged: it differs in architecture"):
        read_info(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("head", "value"), ("architecture", []), ("bf16", "no"), ("iteration", "3"), ("layout", None)]
)
def test_an_info_with_a_value_of_another_type_is_refused(name, value, tmp_path):
    save(tmp_path, 3)
    path = tmp_path / "iter_0000003" / INFO
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(DamagedError, match=f"{INFO} is damaged: its {name} is {value!r}".replace("[", r"\[")):
        read_info(tmp_path)


def save_best(root, iteration, best):
    write(root, iteration)
    folders.publish(root, iteration, best)


def test_the_best_checkpoint_is_read_by_its_link_and_never_removed(tmp_path):
    save_best(tmp_path, 1, 1)
    save_best(tmp_path, 2, 1)
    save_best(tmp_path, 3, 1)
    folders.keep_latest(tmp_path, 3, 1, [])
    assert names(tmp_path) == ["iter_0000001", "iter_0000003"]
    assert (read_info(tmp_path / "best").iteration, read_info(tmp_path).iteration) == (1, 3)
    assert (tmp_path / "best").resolve() == (tmp_path / "iter_0000001").resolve()
    save_best(tmp_path, 4, 4)
    folders.keep_latest(tmp_path, 4, 2, [])
    assert names(tmp_path) == ["iter_0000003", "iter_0000004"] and read_info(tmp_path / "best").iteration == 4


def test_a_link_to_a_best_that_is_not_here_stays_and_one_to_a_replaced_checkpoint_goes(tmp_path):
    save_best(tmp_path, 1, 1)
    save_best(tmp_path, 2, 7)
    assert read_info(tmp_path / "best").iteration == 1, "the best of the run is elsewhere"
    save_best(tmp_path, 1, None)
    assert not (tmp_path / "best").is_symlink(), "what the link named is replaced by another run's"
    with pytest.raises(ConfigError, match="best does not exist"):
        read_info(tmp_path / "best")


def test_wherever_publishing_stops_the_best_checkpoint_can_be_read(tmp_path, monkeypatch):
    """Every call that changes the file system crashes once. The best of before is replaced, or loses its rank."""
    for iteration in (1, 2):
        moments = 0
        for moment in range(20):
            root = tmp_path / f"{iteration}_{moment}"
            save_best(root, 1, 1)
            write(root, iteration, mark="new")
            calls = 0

            def crash_at(original, moment=moment):
                def call(*args, **kwargs):
                    nonlocal calls
                    calls += 1
                    if calls == moment + 1:
                        raise Crash
                    return original(*args, **kwargs)

                return call

            with monkeypatch.context() as patched:
                for target, name in (
                    (folders.Path, "rename"),
                    (folders.Path, "replace"),
                    (folders.Path, "symlink_to"),
                    (folders, "sync_folder"),
                    (folders, "write_whole"),
                ):
                    patched.setattr(target, name, crash_at(getattr(target, name)))
                try:
                    folders.publish(root, iteration, iteration)
                    break
                except Crash:
                    moments += 1
            assert read_info(root / "best").iteration in (1, iteration)
            # The run goes on from the latest checkpoint and comes to this iteration again.
            folders.remove_leftovers(root)
            assert read_info(root).iteration in (1, iteration)
            save_best(root, iteration, iteration)
            assert read_info(root / "best").iteration == iteration
        assert moments >= 5, "publishing was interrupted at every call"
