"""Whole runs over several training files. test_exactness compares one with a plain loop, over processes."""

import json
import logging
from pathlib import Path

import pytest
import torch
from training_runs import (
    final_weights,
    grouped_records,
    pointwise_records,
    read_metrics,
    train,
    with_teacher_scores,
    write_jsonl,
)

from rag_retrieval.core.distributed import StartError
from rag_retrieval.train.loop import Trainer


@pytest.fixture
def mixed(settings, tmp_path):
    """Keys of a run over groups, and pairs with a loss of their own; an epoch has 5 steps of the one and 3 of the
    other, of 4 groups or pairs each."""

    def make(grouped: dict | None = None, pairs: dict | None = None, **changes) -> dict:
        entries = [
            {"path": write_jsonl(tmp_path / "groups.jsonl", grouped_records(20, sizes=(3, 7, 12)))},
            {"path": write_jsonl(tmp_path / "pairs.jsonl", pointwise_records(22, labels=(0, 1, 2)))},
        ]
        entries[0] |= grouped or {}
        entries[1] |= {"type": "pointwise", "loss_type": "point_ce", "max_label": 2, "weight": 0.5} | (pairs or {})
        return settings(records=[], train_group_size=4) | {"train_dataset": entries} | changes

    return make


def equal(first: str, second: str) -> bool:
    one, other = final_weights(first), final_weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logged(output_dir: str) -> list[dict]:
    return [
        {key: value for key, value in json.loads(line).items() if key != "pairs_per_second"}
        for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("loss_type", ["point_ce", "listwise_ce"])
def test_a_list_of_one_file_is_the_file_to_the_last_bit(settings, tmp_path, bert_with_dropout, loss_type):
    values = settings(loss_type, model_name_or_path=bert_with_dropout, epochs=2, shuffle_rate=0.5)
    listed = values | {"train_dataset": [values["train_dataset"]], "output_dir": str(tmp_path / "listed")}
    train(values), train(listed)
    assert equal(values["output_dir"], listed["output_dir"])
    assert logged(values["output_dir"]) == logged(listed["output_dir"])


def test_files_take_turns_and_the_log_tells_them_apart(mixed, caplog):
    caplog.set_level(logging.INFO, "rag_retrieval")
    values = mixed(epochs=2, warmup_proportion=0.0)
    assert train(values).step == 16
    lines = read_metrics(Path(values["output_dir"]), "train")
    # groups are due at 1/10, 3/10, 5/10, 7/10, 9/10 of the epoch, and pairs at 1/6, 3/6, 5/6
    names = ["groups.jsonl", "pairs.jsonl", *["groups.jsonl"] * 2, "pairs.jsonl", "groups.jsonl", "pairs.jsonl"]
    names.append("groups.jsonl")
    for line, name in zip(lines, 2 * names, strict=True):
        assert line[f"loss/{name}"] == line["loss"]
        assert {key for key in line if "/" in key} == {f"{key}/{name}" for key in ("loss", "chance_loss", "score_std")}
    # half a cosine over the 16 steps
    assert lines[8]["lr"] == pytest.approx(0.5 * values["lr"]) and lines[-1]["epoch"] == 2.0
    assert "an epoch has 8 steps:\n  5 steps of groups.jsonl, listwise_ce: 20 records, of 20, weight 1\n" in caplog.text
    assert "  3 steps of pairs.jsonl, point_ce: 11 records, of 22, weight 0.5" in caplog.text
    for entry in values["train_dataset"]:
        assert f"training data: {entry['path']}" in caplog.text


@pytest.mark.parametrize(("num_workers", "after"), [(0, 6), (2, 13)])
def test_a_mixed_run_resumes_within_an_epoch_to_the_same_bits(
    mixed, tmp_path, bert_with_dropout, monkeypatch, num_workers, after
):
    values = mixed(
        model_name_or_path=bert_with_dropout, epochs=2, save_steps=5, shuffle_rate=0.5, num_workers=num_workers
    )
    cut = values | {"output_dir": str(tmp_path / "cut")}
    train(values)
    take_step = Trainer.train_step

    def step_or_die(self, micro_batches):
        if self.state.step == after:
            raise InterruptedError
        take_step(self, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_or_die)
        with pytest.raises(InterruptedError):
            train(cut)
    assert train(cut | {"resume": "auto"}).step == 16
    assert equal(values["output_dir"], cut["output_dir"])
    assert logged(values["output_dir"]) == logged(cut["output_dir"])


def test_accumulation_and_a_token_budget_change_no_step(mixed, tmp_path):
    values = mixed(adam_epsilon=1e-3)
    parts = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_tokens_per_batch": 64}
    cut = values | parts | {"output_dir": str(tmp_path / "parts")}
    train(values), train(cut)
    for one, other in zip(logged(values["output_dir"]), logged(cut["output_dir"]), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    one, other = (final_weights(keys["output_dir"]) for keys in (values, cut))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=0)


def test_a_file_may_have_steps_of_a_size_of_its_own(mixed):
    values = mixed({"batch_size": 7}, {"batch_size": 6})
    assert train(values).step == 3 + 2, "20 groups and 11 pairs"


def test_another_weight_or_content_of_a_file_stops_a_resume(mixed, tmp_path):
    train(mixed(save_steps=4))
    from_there = {"resume": str(tmp_path / "run" / "checkpoint-4"), "output_dir": str(tmp_path / "elsewhere")}
    with pytest.raises(StartError, match=r"\n  train_dataset entry 2, weight: was 0.5, now 0.25\n"):
        train(mixed({}, {"weight": 0.25}, **from_there))
    values = mixed(**from_there)
    write_jsonl(tmp_path / "pairs.jsonl", pointwise_records(22, seed=5, labels=(0, 1, 2)))
    with pytest.raises(StartError, match=r"\n  train_dataset entry 2: was \S+pairs.jsonl \(content \w+\), now "):
        train(values)


def test_files_of_the_same_size_are_not_drawn_in_the_same_order(mixed, tmp_path, monkeypatch):
    seen: dict[str, list[str]] = {}
    take_step = Trainer.train_step

    def noted(self, micro_batches):
        for batch in micro_batches:
            seen.setdefault(batch.part, []).extend(source.rpartition(":")[2] for source in batch.sources)
        take_step(self, micro_batches)

    monkeypatch.setattr(Trainer, "train_step", noted)
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", grouped_records(20)) for name in "ab"]
    train(mixed(train_dataset=paths))
    assert sorted(seen["a.jsonl"]) == sorted(seen["b.jsonl"]) and seen["a.jsonl"] != seen["b.jsonl"]


def test_one_file_may_be_trained_on_twice_as_pairs_and_as_groups(mixed, tmp_path):
    path = write_jsonl(tmp_path / "groups.jsonl", grouped_records(20))
    values = mixed({"path": path}, {"path": path, "max_label": 1})
    train(values)
    names = {key for line in read_metrics(Path(values["output_dir"]), "train") for key in line if key[:5] == "loss/"}
    assert names == {"loss/1-groups.jsonl", "loss/2-groups.jsonl"}


def test_teacher_scores_are_needed_only_in_files_that_learn_from_them(mixed, tmp_path):
    scored = write_jsonl(tmp_path / "scored.jsonl", with_teacher_scores(grouped_records(20)))
    train(mixed({"path": scored, "teacher_loss_type": "margin_mse"}))
    with pytest.raises(StartError, match=r"groups.jsonl:1: found no hits\[0\].teacher_score"):
        train(mixed({"teacher_loss_type": "margin_mse"}, overwrite_output_dir=True))


def test_labels_outside_an_entrys_loss_are_refused_with_file_and_line(mixed):
    with pytest.raises(StartError, match=r"pairs.jsonl:3: label is 2; expected a value in \[0, 1\]"):
        train(mixed({}, {"max_label": 1}))


def test_a_file_that_can_teach_its_loss_nothing_is_named(mixed, tmp_path):
    equal_labels = write_jsonl(tmp_path / "equal.jsonl", [{"query": "q", "pos": ["d", "e"]}])
    with pytest.raises(StartError, match=r"train_dataset: \S+equal.jsonl: 1 of 1 groups have documents of one label"):
        train(mixed({"path": equal_labels, "loss_type": "listnet"}))


def test_validation_measures_the_loss_of_the_run(mixed, settings, tmp_path):
    """Not that of an entry: the first evaluation, before any step, is that of a run on groups alone."""
    validation = write_jsonl(tmp_path / "val.jsonl", grouped_records(6, seed=9))
    values = mixed(val_dataset=validation, eval_on_start=True)
    alone = values | {"train_dataset": values["train_dataset"][0]["path"], "output_dir": str(tmp_path / "alone")}
    train(values), train(alone)
    one, other = (read_metrics(Path(keys["output_dir"]), "eval")[0] for keys in (values, alone))
    assert one == other and one["step"] == 0
