"""Where a run starts or resumes, what it may replace, and what must be as it was."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rag_retrieval.train import resume
from rag_retrieval.train.checkpoints import CheckpointStore, TrainState
from rag_retrieval.train.reranker.config import RerankerConfig
from rag_retrieval.train.resume import MAY_CHANGE, ResumeError, claim, plan_start
from rag_retrieval.train.run_folder import WRITTEN, OutputFolderError, Provenance, finish


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


def test_a_second_run_in_a_folder_is_refused_with_three_remedies(tmp_path, earlier):
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


def test_auto_resumes_from_the_newest_checkpoint(tmp_path, earlier):
    state, checkpoint = plan_start(tmp_path, "auto", overwrite=False)
    assert state == TrainState("earlier", 4, 10, 0.5, 4) and checkpoint == tmp_path / "checkpoint-4"


def test_auto_has_nothing_to_do_for_a_finished_run(tmp_path, earlier):
    finish(tmp_path, earlier.run_id, 4)
    assert plan_start(tmp_path, "auto", overwrite=False) is None


def test_auto_starts_over_after_a_kill_before_the_first_checkpoint(tmp_path):
    claim(tmp_path, TrainState("killed early"))
    state, checkpoint = plan_start(tmp_path, "auto", overwrite=False)
    assert state.step == 0 and checkpoint is None


def test_a_folder_that_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is no complete checkpoint .* give another folder checkpoint-N"):
        plan_start(tmp_path / "out", str(tmp_path), overwrite=False)


def test_a_damaged_named_checkpoint_is_an_error_that_says_why(tmp_path, earlier):
    folder = tmp_path / "checkpoint-4"
    (folder / "weights").write_text("more")
    with pytest.raises(ValueError, match=f"{folder} is no complete checkpoint .*weights is not as it was written"):
        plan_start(tmp_path, str(folder), overwrite=False)


def test_auto_passes_over_a_damaged_checkpoint_and_names_it(tmp_path, earlier, caplog):
    (tmp_path / "checkpoint-4" / "weights").write_text("more")
    state, checkpoint = plan_start(tmp_path, "auto", overwrite=False)
    assert checkpoint == tmp_path / "checkpoint-2" and "checkpoint-4: weights is not as it was written" in caplog.text


def test_auto_does_not_start_over_where_every_checkpoint_is_damaged(tmp_path, earlier):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "weights").unlink()
    with pytest.raises(OutputFolderError, match="no complete checkpoint is left in .*checkpoint-2, checkpoint-4 are"):
        plan_start(tmp_path, "auto", overwrite=False)
    assert plan_start(tmp_path, None, overwrite=True)[0].step == 0


@pytest.mark.parametrize("content", ["", "[1]", '{"run_id": 7}', '{"run_id"'])
def test_auto_does_not_start_over_beside_checkpoints_without_a_run_file(tmp_path, earlier, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(OutputFolderError, match="run.json is missing or damaged, though there are checkpoints"):
        plan_start(tmp_path, "auto", overwrite=False)
    state, checkpoint = plan_start(tmp_path, str(tmp_path / "checkpoint-2"), overwrite=False)
    assert state.step == 2


def test_going_back_removes_later_checkpoints_and_forgets_a_lost_best(tmp_path, earlier, caplog):
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


# --- is it the same run? ---


STATE = TrainState("run", 7, best_metric=0.5, best_step=5, stale_evaluations=1)
VERSIONS = {"torch": "2.13", "transformers": "5.23"}


def provenance(engine="DDP", processes=1, data=None, **changes) -> Provenance:
    keys = dict(
        model_name_or_path="a/model",
        model_type="bert_encoder",
        train_dataset="train.jsonl",
        train_dataset_type="pointwise",
        val_dataset="val.jsonl",
        loss_type="point_ce",
        output_dir="run",
    )
    configuration = RerankerConfig(**(keys | changes)).model_dump()
    return Provenance(configuration, data or {"train_dataset": "aa", "val_dataset": "bb"}, engine, processes, VERSIONS)


def checked_resume(state, checkpoint, now, with_changes) -> TrainState:
    return resume.checked_resume(state, checkpoint, now, RerankerConfig, with_changes)


def differences(before: Provenance, now: Provenance):
    return resume.differences(before, now, RerankerConfig)


@pytest.fixture
def checkpoint(tmp_path):
    provenance().save(tmp_path)
    return tmp_path


MATTERING = {
    "model_name_or_path": "another/model",
    "max_len": 256,
    "train_label_key": "score",
    "max_label": 2.0,
    "shuffle_rate": 0.5,
    "loss_type": "point_mse",
    "epochs": 2,
    "lr": 1e-4,
    "head_lr": 1e-2,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-6,
    "max_grad_norm": None,
    "warmup_proportion": 0.2,
    "stable_proportion": 0.2,
    "mixed_precision": "bf16",
    "seed": 1,
    "freeze_embeddings": True,
    "freeze_layers": 1,
    "lora_r": 4,
    "metric_for_best_model": "map",
    "val_label_key": "other",
}


def test_a_changed_key_stops_the_resume_and_is_named_with_both_values(checkpoint):
    for key, value in MATTERING.items():
        now = provenance(**{key: value})
        was = provenance().configuration[key]
        with pytest.raises(ResumeError) as caught:
            checked_resume(STATE, checkpoint, now, with_changes=False)
        assert f"\n  {key}: was {was!r}, now {value!r}\n" in str(caught.value)
        assert "--resume_with_changes true" in str(caught.value)
        assert checked_resume(STATE, checkpoint, now, with_changes=True).step == 7


FREE = {
    "output_dir": "elsewhere",
    "log_interval": 3,
    "log_with": "wandb",
    "num_workers": 0,
    "wait_minutes": 5.0,
    "save_steps": 5,
    "save_on_epoch_end": False,
    "num_max_checkpoints": 1,
    "eval_steps": 5,
    "eval_on_start": True,
    "early_stopping_patience": 3,
    "max_tokens_per_batch": 64,
    "gradient_checkpointing": True,
    "attn_implementation": "eager",
    "torch_compile": True,
    "trust_remote_code": True,
    "resume": "auto",
    "overwrite_output_dir": True,
    "resume_with_changes": True,
}


def test_what_does_not_matter_may_change(checkpoint):
    assert FREE.keys() | {"max_tokens_with_graph"} == MAY_CHANGE, "and that key is an embedder's"
    assert checked_resume(STATE, checkpoint, provenance(**FREE), with_changes=False) == STATE


def test_every_difference_is_listed(checkpoint):
    found = dict(differences(provenance(), provenance(lr=1e-4, seed=1)))
    assert found.keys() == {"lr", "head_lr", "seed"}, "head_lr follows lr"


def test_data_are_identified_by_content_and_may_move(checkpoint):
    moved = provenance(train_dataset="moved.jsonl")
    assert checked_resume(STATE, checkpoint, moved, with_changes=False) == STATE
    changed = provenance(data={"train_dataset": "cc", "val_dataset": "bb"})
    with pytest.raises(ResumeError, match=r"train_dataset: was train.jsonl \(content aa\), now .* \(content cc\)"):
        checked_resume(STATE, checkpoint, changed, with_changes=False)


TWO = {"train_dataset entry 1": "aa", "train_dataset entry 2": "cc", "val_dataset": "bb"}


def test_each_of_several_files_is_compared_by_content_and_entry():
    was = provenance(train_dataset=["a.jsonl", "b.jsonl"], data=TWO)
    moved = provenance(train_dataset=["x/a.jsonl", "x/b.jsonl"], data=TWO)
    assert dict(differences(was, moved)) == {}
    entries = ["a.jsonl", {"path": "b.jsonl", "weight": 2, "max_label": 3}]
    now = provenance(train_dataset=entries, data=TWO | {"train_dataset entry 2": "dd"})
    assert dict(differences(was, now)) == {
        "train_dataset entry 2": "was b.jsonl (content cc), now b.jsonl (content dd)",
        "train_dataset entry 2, weight": "was 1.0, now 2.0",
        "train_dataset entry 2, max_label": "was 1.0, now 3.0",
    }


def test_another_number_of_files_is_a_difference_but_no_list_of_one():
    two = provenance(train_dataset=["a.jsonl", "b.jsonl"], data=TWO)
    assert dict(differences(provenance(), two)) == {"train_dataset": "was 1 files, now 2"}
    assert dict(differences(provenance(), provenance(train_dataset=["train.jsonl"]))) == {}
    again = provenance(train_dataset=[{"path": "train.jsonl", "weight": 0.5}])
    assert dict(differences(provenance(), again)) == {"train_dataset, weight": "was 1.0, now 0.5"}


def test_of_several_files_too_only_the_product_counts_that_makes_a_step():
    entries = ["a.jsonl", {"path": "b.jsonl", "batch_size": 4}]
    was = provenance(train_dataset=entries, data=TWO)
    halves = ["a.jsonl", {"path": "b.jsonl", "batch_size": 2}]
    on_two = provenance(train_dataset=halves, data=TWO, batch_size=16, processes=2)
    assert dict(differences(was, on_two)) == {}
    ((place, change),) = differences(was, provenance(train_dataset=halves, data=TWO))
    assert place == "train_dataset entry 2, batch_size x gradient_accumulation_steps x processes"
    assert change == "was 4 x 1 x 1 = 4, now 2 x 1 x 1 = 2"


def test_a_validation_that_was_another_gives_no_best_to_compare_with(checkpoint):
    now = provenance(data={"train_dataset": "aa", "val_dataset": "cc"})
    state = checked_resume(STATE, checkpoint, now, with_changes=True)
    assert state == replace(STATE, best_metric=None, best_step=None, stale_evaluations=0)
    without = provenance(val_dataset=None, data={"train_dataset": "aa"})
    assert dict(differences(provenance(), without))["val_dataset"] == "was val.jsonl (content bb), now none"


def test_only_the_product_of_batch_accumulation_and_processes_counts(checkpoint):
    same = provenance(batch_size=8, gradient_accumulation_steps=2, processes=2)
    assert checked_resume(STATE, checkpoint, same, with_changes=False) == STATE
    with pytest.raises(ResumeError, match="x processes: was 32 x 1 x 1 = 32, now 32 x 1 x 2 = 64"):
        checked_resume(STATE, checkpoint, provenance(processes=2), with_changes=False)


def test_an_engine_that_cannot_read_the_files_stops_whatever_was_said(tmp_path):
    provenance("DeepSpeed ZeRO-2", processes=2, batch_size=16).save(tmp_path)
    again = provenance("DeepSpeed ZeRO-2", processes=2, batch_size=16)
    assert checked_resume(STATE, tmp_path, again, with_changes=False) == STATE
    with pytest.raises(ResumeError, match="DeepSpeed resumes on that number alone, not on 1. Launch 2 processes"):
        checked_resume(STATE, tmp_path, provenance("DeepSpeed ZeRO-2"), with_changes=True)
    with pytest.raises(ResumeError, match="written by DeepSpeed ZeRO-2 on 2 processes, and DDP cannot read it"):
        checked_resume(STATE, tmp_path, provenance(processes=2, batch_size=16), with_changes=True)


def test_fsdp_resumes_on_another_number_of_processes(tmp_path):
    provenance("FSDP", processes=2, batch_size=16).save(tmp_path)
    assert checked_resume(STATE, tmp_path, provenance("FSDP"), with_changes=False) == STATE


def test_another_library_version_warns(checkpoint, caplog):
    now = replace(provenance(), versions={"torch": "2.14", "transformers": "5.23"})
    checked_resume(STATE, checkpoint, now, with_changes=False)
    assert "written with torch 2.13, now 2.14" in caplog.text and "transformers" not in caplog.text


def test_a_checkpoint_of_another_version_has_defaults_for_unknown_keys(checkpoint, tmp_path):
    """What this version removed asks for nothing, and what it added had its default."""
    older = provenance()
    older.configuration.pop("temperature")
    older.configuration.pop("max_grad_norm")
    older.configuration.update(num_labels=1, val_dataset_type="pointwise")
    older.save(tmp_path)
    assert checked_resume(STATE, tmp_path, provenance(), with_changes=False) == STATE
    with pytest.raises(ResumeError, match="max_grad_norm: was 1.0, now 2.0"):
        checked_resume(STATE, tmp_path, provenance(max_grad_norm=2.0), with_changes=False)
    entries = ["a.jsonl", {"path": "b.jsonl", "weight": 2}]
    mixed = provenance(train_dataset=entries, data=TWO)
    for entry in mixed.configuration["train_dataset"]:
        del entry["temperature"], entry["teacher_temperature"]
    mixed.save(tmp_path)
    assert checked_resume(STATE, tmp_path, provenance(train_dataset=entries, data=TWO), with_changes=False) == STATE
