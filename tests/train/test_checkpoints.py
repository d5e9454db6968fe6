import json
import os
import shutil
import zlib
from pathlib import Path

import pytest

from rag_retrieval.core import files
from rag_retrieval.core.files import write_json
from rag_retrieval.train.checkpoints import (
    STATE_FILE,
    CheckpointStore,
    DamagedCheckpoint,
    TrainState,
    file_digests,
    read_state,
)


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path, "this-run", keep=2)


def save(store: CheckpointStore, step: int, best_step: int | None = None) -> Path:
    store.begin(step)
    (store.temporary(step) / "model").mkdir()
    (store.temporary(step) / "model" / "weights").write_text(f"weights of {step}")
    return store.commit(TrainState(store.run_id, step, best_step=best_step))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_state_comes_back_as_it_was_saved(store):
    folder = save(store, 5, best_step=3)
    assert read_state(folder) == TrainState("this-run", 5, best_step=3)
    digest = zlib.crc32(b"weights of 5", zlib.crc32(b"12"))
    assert file_digests(folder) == {"model/weights": f"{digest:08x}"}


def test_rotation_keeps_the_newest_and_the_best(store, tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(store, step, best_step=1 if step < 4 else 4)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]
    save(store, 6, best_step=4)
    save(store, 7, best_step=4)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6", "checkpoint-7"]


def test_steps_are_compared_as_numbers(store, tmp_path):
    for step in (9, 10, 11):
        save(store, step)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]


def test_folders_of_others_are_neither_counted_nor_touched(store, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "precious").write_text("x")
    write_json(tmp_path / "checkpoint-1" / STATE_FILE, {"global_step": 1})  # as transformers writes it
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "checkpoint-2").write_text("a file")
    other = save(CheckpointStore(tmp_path, "another-run", keep=1), 3)
    for step in (1, 2, 3, 4):
        save(store, step)
    expected = {"checkpoint-1", "checkpoint-2", "checkpoint-final", "checkpoint-3", "checkpoint-4"}
    assert set(names(tmp_path)) == expected | {"checkpoint-3-this-run"}
    assert (tmp_path / "checkpoint-1" / "precious").exists()
    assert read_state(other).run_id == "another-run"
    assert store.path(3) == tmp_path / "checkpoint-3-this-run" and store.newest()[0].step == 4


def test_the_state_of_a_step_can_be_written_again(store):
    save(store, 3)
    assert store.update(TrainState("this-run", 3, best_step=3)) and not store.update(TrainState("this-run", 4))
    assert read_state(store.path(3)).best_step == 3


def test_a_crash_while_writing_leaves_the_old_ones_and_is_cleaned_up(store, tmp_path):
    save(store, 1)
    save(store, 2)
    store.begin(3)
    (store.temporary(3) / "half").write_text("half a fi")
    assert store.newest()[0].step == 2
    assert [step for step, _ in store.own()] == [1, 2]
    store.remove_incomplete()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_incomplete_folders_of_another_run_stay(store, tmp_path):
    other = CheckpointStore(tmp_path, "another-run", keep=1)
    other.begin(3)
    store.remove_incomplete()
    assert other.temporary(3).exists()


def damage_state(folder: Path) -> None:
    (folder / STATE_FILE).write_text('{"run_id": "this-run", "step"')


def damage_step(folder: Path) -> None:
    text = (folder / STATE_FILE).read_text()
    (folder / STATE_FILE).write_text(text.replace('"step": 2', '"step": 3'))


def damage_types(folder: Path) -> None:
    values = json.loads((folder / STATE_FILE).read_text())
    write_json(folder / STATE_FILE, values | {"step": "two", "files": []})


def damage_owner(folder: Path) -> None:
    text = (folder / STATE_FILE).read_text()
    (folder / STATE_FILE).write_text(text.replace("this-run", "thjs-run"))


def damage_bit(folder: Path) -> None:
    content = bytearray((folder / "model" / "weights").read_bytes())
    content[5] ^= 4
    (folder / "model" / "weights").write_bytes(content)


def damage_addition(folder: Path) -> None:
    (folder / "random_states_1.pkl").write_text("of another run")


def damage_size(folder: Path) -> None:
    (folder / "model" / "weights").write_text("weig")


def damage_missing(folder: Path) -> None:
    (folder / "model" / "weights").unlink()


def damage_fields(folder: Path) -> None:
    values = json.loads((folder / STATE_FILE).read_text())
    write_json(folder / STATE_FILE, {name: values[name] for name in ("run_id", "step", "files")})


DAMAGES = [damage_state, damage_step, damage_types, damage_owner, damage_bit, damage_addition, damage_size,
           damage_missing, damage_fields]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(store, damage, caplog):
    save(store, 1)
    damage(save(store, 2))
    assert store.newest()[0].step == 1
    assert "checkpoint-2" in caplog.text and "passed over" in caplog.text


def test_there_is_no_newest_checkpoint_in_an_empty_folder(store):
    assert store.newest() is None


def test_going_back_removes_what_lies_beyond(store, tmp_path):
    save(store, 1)
    save(store, 2)
    store.remove_after(1)
    assert names(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (damage_bit, "model/weights is not as it was written"),
        (damage_step, "trainer_state.json is not as it was written"),
        (damage_missing, "model/weights is missing"),
        (damage_state, "trainer_state.json is missing or cannot be read"),
        (damage_types, "trainer_state.json is not one of this trainer"),
    ],
)
def test_what_is_damaged_is_named(store, damage, what):
    folder = save(store, 2)
    damage(folder)
    with pytest.raises(DamagedCheckpoint) as caught:
        read_state(folder)
    assert str(caught.value) == f"{folder}: {what}"


def complete(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, found as a resume finds them: by content, whatever their names."""
    steps = []
    for path in folder.glob("checkpoint-*"):
        try:
            steps.append(read_state(path).step)
        except DamagedCheckpoint:
            continue
    return sorted(steps)


@pytest.fixture
def watched(monkeypatch, tmp_path) -> list[list[int]]:
    """The complete checkpoints before and after every rename and removal."""
    seen = []

    def watch(module, name: str) -> None:
        function = getattr(module, name)

        def observed(*arguments, **options):
            seen.append(complete(tmp_path))
            function(*arguments, **options)
            seen.append(complete(tmp_path))

        monkeypatch.setattr(module, name, observed)

    watch(os, "replace"), watch(os, "unlink"), watch(shutil, "rmtree")
    return seen


def test_at_every_instant_of_rotation_a_complete_checkpoint_is_there(tmp_path, watched):
    store = CheckpointStore(tmp_path, "this-run", keep=1)
    save(store, 1)
    watched.clear()
    save(store, 2)
    assert all(watched) and watched[-1] == [2] and [1, 2] in watched


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", range(12))
def test_a_kill_at_any_removal_or_rename_leaves_no_false_checkpoint(tmp_path, monkeypatch, after):
    store = CheckpointStore(tmp_path, "this-run", keep=1)
    for step in (1, 3):
        save(store, step)
    calls = []

    def dying(function):
        def call(*arguments, **options):
            calls.append(function)
            if len(calls) > after:
                raise Killed
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for module, name in ((os, "replace"), (os, "unlink"), (os, "rmdir"), (Path, "unlink"), (os, "fsync")):
            patch.setattr(module, name, dying(getattr(module, name)))
        try:
            store.update(TrainState("this-run", 3, best_step=1))
            save(store, 4)
        except Killed:
            pass
    state, folder = store.newest()
    assert state.step in (3, 4) and folder in [path for _, path in store.own()]
    store.remove_incomplete()
    assert not list(tmp_path.glob(".*"))
    save(store, 5)
    assert names(tmp_path) == ["checkpoint-5"]


def test_files_and_folder_are_flushed_before_the_rename(store, monkeypatch):
    flushed, fsync, replace = [], os.fsync, os.replace

    def note(descriptor):
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def rename(source, target):
        if Path(target).name == "checkpoint-1":
            assert {"weights", "model", STATE_FILE, store.temporary(1).name} <= set(flushed)
            flushed.append("renamed")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", note)
    monkeypatch.setattr(files.os, "replace", rename)
    save(store, 1)
    assert flushed[flushed.index("renamed") + 1] == store.folder.name


def test_a_missing_output_folder_is_not_created_again(store):
    shutil.rmtree(store.folder)
    with pytest.raises(FileNotFoundError):
        store.begin(1)
