from dataclasses import replace

import pytest

from rag_retrieval.train import resume
from rag_retrieval.train.checkpoints import TrainState
from rag_retrieval.train.provenance import Provenance
from rag_retrieval.train.reranker.config import RerankerConfig
from rag_retrieval.train.resume import MAY_CHANGE, ResumeError

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


@pytest.mark.parametrize(("key", "value"), MATTERING.items())
def test_what_matters_stops_the_resume_and_is_told_with_both_values(checkpoint, key, value):
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
    assert FREE.keys() == MAY_CHANGE
    assert checked_resume(STATE, checkpoint, provenance(**FREE), with_changes=False) == STATE


def test_every_difference_is_told(checkpoint):
    found = dict(differences(provenance(), provenance(lr=1e-4, seed=1)))
    assert found.keys() == {"lr", "head_lr", "seed"}, "head_lr follows lr"


def test_data_are_told_by_their_content_and_may_move(checkpoint):
    moved = provenance(train_dataset="moved.jsonl")
    assert checked_resume(STATE, checkpoint, moved, with_changes=False) == STATE
    changed = provenance(data={"train_dataset": "cc", "val_dataset": "bb"})
    with pytest.raises(ResumeError, match=r"train_dataset: was train.jsonl \(content aa\), now .* \(content cc\)"):
        checked_resume(STATE, checkpoint, changed, with_changes=False)


TWO = {"train_dataset entry 1": "aa", "train_dataset entry 2": "cc", "val_dataset": "bb"}


def test_of_several_files_each_is_told_by_its_content_and_its_entry():
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


def test_another_number_of_files_is_told_and_a_list_of_one_is_the_file_itself():
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


def test_a_checkpoint_of_another_version_has_the_defaults_of_keys_that_it_does_not_know(checkpoint, tmp_path):
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
