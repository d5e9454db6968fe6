import os
import shutil
from pathlib import Path

import pytest

from rag_retrieval.train.checkpoints import CheckpointStore, TrainState
from rag_retrieval.train.resume import claim, plan_start
from rag_retrieval.train.run_folder import WRITTEN, OutputFolderError, finish, folder_lock, publish


def save(folder: Path, state: TrainState) -> Path:
    store = CheckpointStore(folder, state.run_id, keep=9)
    store.begin(state.step)
    (store.temporary(state.step) / "weights").write_text(f"weights of {state.step}")
    return store.commit(state)


@pytest.fixture
def earlier(tmp_path) -> TrainState:
    """A run in tmp_path that saved checkpoints 2 and 4 (the best) and was killed."""
    state = TrainState("earlier", best_metric=0.5, best_step=4, steps_per_epoch=10)
    claim(tmp_path, state)
    for step in (2, 4):
        state.step = step
        save(tmp_path, state)
    for name in ("model", "adapter", "tracking"):
        (tmp_path / name).mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    return state


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_new_folder_starts_a_new_run(tmp_path):
    state, checkpoint = plan_start(tmp_path / "new", None, overwrite=False)
    assert state.step == 0 and checkpoint is None and not (tmp_path / "new").exists()
    assert state.run_id != plan_start(tmp_path / "new", "auto", overwrite=False)[0].run_id


def test_a_second_run_in_the_same_folder_is_refused_with_the_three_ways_out(tmp_path, earlier):
    with pytest.raises(OutputFolderError, match="already holds a run") as caught:
        plan_start(tmp_path, None, overwrite=False)
    for way in ("--resume auto", "another --output_dir", "--overwrite_output_dir true"):
        assert way in str(caught.value)


def test_planning_changes_nothing(tmp_path, earlier):
    before = contents(tmp_path)
    plan_start(tmp_path, None, overwrite=True)
    plan_start(tmp_path, "auto", overwrite=False)
    assert contents(tmp_path) == before


def test_overwriting_replaces_only_what_the_run_wrote(tmp_path, earlier):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-7").mkdir()
    save(tmp_path, TrainState("a third run", step=3))
    CheckpointStore(tmp_path, "earlier", 1).begin(5)
    state, _ = plan_start(tmp_path, None, overwrite=True)
    claim(tmp_path, state)
    assert contents(tmp_path) == {"notes.txt", "checkpoint-7", "checkpoint-3", "run.json"}


def test_auto_goes_on_from_the_newest_checkpoint(tmp_path, earlier):
    state, checkpoint = plan_start(tmp_path, "auto", overwrite=False)
    assert state == TrainState("earlier", 4, 10, 0.5, 4) and checkpoint == tmp_path / "checkpoint-4"


def test_auto_has_nothing_to_do_for_a_finished_run(tmp_path, earlier):
    finish(tmp_path, earlier.run_id, 4)
    assert plan_start(tmp_path, "auto", overwrite=False) is None


def test_auto_starts_anew_where_a_run_was_killed_before_its_first_checkpoint(tmp_path):
    claim(tmp_path, TrainState("killed early"))
    state, checkpoint = plan_start(tmp_path, "auto", overwrite=False)
    assert state.step == 0 and checkpoint is None


def test_a_folder_that_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is no complete checkpoint .* give another folder checkpoint-N"):
        plan_start(tmp_path / "out", str(tmp_path), overwrite=False)


def test_a_named_checkpoint_that_is_damaged_is_an_error_that_says_what_is_wrong(tmp_path, earlier):
    folder = tmp_path / "checkpoint-4"
    (folder / "weights").write_text("more")
    with pytest.raises(ValueError, match=f"{folder} is no complete checkpoint .*weights is not as it was written"):
        plan_start(tmp_path, str(folder), overwrite=False)


def test_auto_passes_over_a_damaged_checkpoint_and_names_it(tmp_path, earlier, caplog):
    (tmp_path / "checkpoint-4" / "weights").write_text("more")
    state, checkpoint = plan_start(tmp_path, "auto", overwrite=False)
    assert checkpoint == tmp_path / "checkpoint-2" and "checkpoint-4: weights is not as it was written" in caplog.text


def test_auto_does_not_start_anew_where_every_checkpoint_is_damaged(tmp_path, earlier):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "weights").unlink()
    with pytest.raises(OutputFolderError, match="no complete checkpoint is left in .*checkpoint-2, checkpoint-4 are"):
        plan_start(tmp_path, "auto", overwrite=False)
    assert plan_start(tmp_path, None, overwrite=True)[0].step == 0


@pytest.mark.parametrize("content", ["", "[1]", '{"run_id": 7}', '{"run_id"'])
def test_auto_does_not_start_anew_beside_checkpoints_whose_run_file_is_spoilt(tmp_path, earlier, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(OutputFolderError, match="run.json is missing or damaged, though there are checkpoints"):
        plan_start(tmp_path, "auto", overwrite=False)
    state, checkpoint = plan_start(tmp_path, str(tmp_path / "checkpoint-2"), overwrite=False)
    assert state.step == 2


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(OutputFolderError, match=f"output_dir: {tmp_path} is not writable"):
        folder_lock(tmp_path / "runs" / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match="is a file"):
        folder_lock(tmp_path / "file" / "a")


def test_going_back_to_an_earlier_checkpoint_removes_the_later_ones_and_forgets_a_best_that_is_gone(
    tmp_path, earlier, caplog
):
    save(tmp_path, TrainState("earlier", 3, best_metric=0.4, best_step=1))
    state, checkpoint = plan_start(tmp_path, str(tmp_path / "checkpoint-3"), overwrite=False)
    claim(tmp_path, state)
    assert state.step == 3 and state.best_step is None and "step 1, is gone" in caplog.text
    assert not (tmp_path / "checkpoint-4").exists() and checkpoint.exists()


def test_a_checkpoint_of_another_run_starts_a_run_of_its_own(tmp_path, earlier):
    source = str(tmp_path / "checkpoint-4")
    state, checkpoint = plan_start(tmp_path / "elsewhere", source, overwrite=False)
    assert (state.step, state.best_step, state.steps_per_epoch) == (4, None, 10)
    assert state.run_id != "earlier" and str(checkpoint) == source


def test_results_take_the_place_of_earlier_ones(tmp_path):
    for name, text in (("model", "old"), ("new/model", "new"), ("new/adapter", "new")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights").write_text(text)
    publish(tmp_path / "new", tmp_path)
    assert [(tmp_path / name / "weights").read_text() for name in ("model", "adapter")] == ["new", "new"]


# --- what is not ours ---


@pytest.mark.parametrize("name", WRITTEN)
def test_what_no_run_wrote_is_never_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputFolderError, match=f"{name} exists, is not of a run of this trainer"):
        plan_start(tmp_path, None, overwrite=True)


def test_copies_and_links_of_checkpoints_stay_whole(tmp_path, earlier):
    out, elsewhere = tmp_path, tmp_path.with_name("elsewhere")
    elsewhere.mkdir()
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-2-backup")
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-keep-this")
    shutil.copytree(out / "checkpoint-2", elsewhere / "checkpoint-2")
    shutil.rmtree(out / "checkpoint-2")
    for link in ("checkpoint-2", "checkpoint-archive", "model-link"):
        (out / link).symlink_to(elsewhere / "checkpoint-2")
    shutil.rmtree(out / "model")
    (out / "model").symlink_to(elsewhere / "checkpoint-2")
    CheckpointStore(out, "earlier", keep=1)._rotate(None)
    claim(out, plan_start(out, None, overwrite=True)[0])
    kept = {"checkpoint-2", "checkpoint-archive", "model-link", "checkpoint-2-backup", "checkpoint-keep-this"}
    assert contents(out) == {*kept, "run.json"}
    assert {path.name for path in (elsewhere / "checkpoint-2").iterdir()} == {"weights", "trainer_state.json"}
