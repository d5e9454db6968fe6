import json
from pathlib import Path

import pytest

from rag_retrieval.train.checkpoints import (
    STATE_FILE,
    CheckpointStore,
    TrainState,
    file_sizes,
    read_state,
    write_json,
)


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path, "this-run", keep=2)


def save(store: CheckpointStore, step: int, best_step: int | None = None) -> Path:
    store.begin(step)
    (store.aside(step) / "model").mkdir()
    (store.aside(step) / "model" / "weights").write_text(f"weights of {step}")
    return store.commit(TrainState(store.run_id, step, best_step=best_step))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_state_comes_back_as_it_was_saved(store):
    folder = save(store, 5, best_step=3)
    assert read_state(folder) == TrainState("this-run", 5, best_step=3)
    assert file_sizes(folder) == {"model/weights": 12}


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


def test_a_checkpoint_written_again_replaces_the_earlier_one(store):
    save(store, 3)
    folder = save(store, 3, best_step=3)
    assert read_state(folder).best_step == 3 and folder.name == "checkpoint-3"


def test_a_crash_while_writing_leaves_the_old_ones_and_is_cleaned_up(store, tmp_path):
    save(store, 1)
    save(store, 2)
    store.begin(3)
    (store.aside(3) / "half").write_text("half a fi")
    assert store.newest()[0].step == 2
    assert [step for step, _ in store.own()] == [1, 2]
    store.remove_incomplete()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_incomplete_folders_of_another_run_stay(store, tmp_path):
    other = CheckpointStore(tmp_path, "another-run", keep=1)
    other.begin(3)
    store.remove_incomplete()
    assert other.aside(3).exists()


def damage_state(folder: Path) -> None:
    (folder / STATE_FILE).write_text('{"run_id": "this-run", "step"')


def damage_size(folder: Path) -> None:
    (folder / "model" / "weights").write_text("weig")


def damage_missing(folder: Path) -> None:
    (folder / "model" / "weights").unlink()


def damage_fields(folder: Path) -> None:
    values = json.loads((folder / STATE_FILE).read_text())
    write_json(folder / STATE_FILE, {name: values[name] for name in ("run_id", "step", "files")})


@pytest.mark.parametrize("damage", [damage_state, damage_size, damage_missing, damage_fields])
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
