"""Whole runs with the losses that learn from a teacher, and with a mix, against the plain loop; what they refuse."""

from pathlib import Path

import pytest
import torch
from plain_training import plain_training
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
from rag_retrieval.losses import LOSSES

GROUPED = [name for name, loss in LOSSES.items() if loss.dataset_type == "grouped"]
NEW = [name for name in GROUPED if name not in ("pairwise_ranknet", "listwise_ce")]
MIXES = [("pairwise_ranknet", "margin_mse"), ("listwise_ce", "kl_distillation")]


def probabilities(records: list[dict]) -> list[dict]:
    return [record | {"teacher_score": 0.8 if record["label"] else 0.1} for record in records]


def exact(settings, loss_type: str, records: list[dict], **changes) -> dict:
    keys = {"batch_size": 6, "gradient_accumulation_steps": 2, "warmup_proportion": 0.0, "stable_proportion": 1.0,
            "adam_epsilon": 1e-3, "max_tokens_per_batch": 200}  # fmt: skip
    return settings(loss_type, records, **keys | changes)


def assert_plain_steps(values: dict) -> None:
    train(values)
    steps = read_metrics(Path(values["output_dir"]), "train")
    losses, weights = plain_training(values, 12, [1.0] * len(steps))
    assert [line["loss"] for line in steps] == pytest.approx(losses, abs=2e-5)
    for name, value in final_weights(values["output_dir"]).items():
        torch.testing.assert_close(value, weights[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize("loss_type", NEW)
def test_steps_of_a_new_loss_equal_a_plain_loop(settings, loss_type):
    binary = LOSSES[loss_type].reads == "positive"
    records = with_teacher_scores(grouped_records(26, levels=(0, 1) if binary else (0, 1, 2)))
    assert_plain_steps(exact(settings, loss_type, records))


@pytest.mark.parametrize(("loss_type", "options"), [
    ("listwise_ce", {"temperature": 0.5}),
    ("info_nce", {"temperature": 2.0}),
    ("kl_distillation", {"temperature": 2.0}),
    ("lambda_loss", {"lambda_weights": "lambdarank", "lambda_top_k": 2}),
    ("listwise_ce", {"teacher_loss_type": "kl_distillation", "teacher_temperature": 3.0, "teacher_weight": 0.7}),
])  # fmt: skip
def test_steps_with_options_that_are_no_defaults_equal_a_plain_loop(settings, loss_type, options):
    binary = LOSSES[loss_type].reads == "positive"
    records = with_teacher_scores(grouped_records(26, levels=(0, 1) if binary else (0, 1, 2)))
    assert_plain_steps(exact(settings, loss_type, records, **options))


@pytest.mark.parametrize(("loss_type", "teacher_loss_type"), MIXES)
def test_steps_of_a_mix_equal_a_plain_loop(settings, loss_type, teacher_loss_type):
    records = with_teacher_scores(grouped_records(26))
    mix = {"teacher_loss_type": teacher_loss_type, "teacher_weight": 0.3}
    assert_plain_steps(exact(settings, loss_type, records, **mix))


def test_steps_of_a_pointwise_mix_equal_a_plain_loop(settings):
    records = probabilities(pointwise_records(29))
    assert_plain_steps(exact(settings, "point_ce", records, teacher_loss_type="point_mse", teacher_weight=0.75))


def test_a_weight_of_zero_is_the_run_without_a_teacher(settings, tmp_path):
    records = with_teacher_scores(grouped_records(12))
    alone = settings("listwise_ce", records)
    mixed = alone | {"teacher_loss_type": "kl_distillation", "teacher_weight": 0.0, "output_dir": str(tmp_path / "b")}
    train(alone), train(mixed)
    first, second = final_weights(alone["output_dir"]), final_weights(mixed["output_dir"])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_teacher_scores_stand_beside_their_documents_in_sampled_groups(settings):
    """A student that learns nothing else ranks as the teacher does, against the labels."""
    records = grouped_records(40, sizes=(6,))
    for record in records:
        for hit in record["hits"]:
            hit["teacher_score"] = -4.0 * hit["label"]
    values = settings("margin_mse", records, train_group_size=3, epochs=8, val_dataset=None)
    train(values)
    losses = [line["loss"] for line in read_metrics(Path(values["output_dir"]), "train")]
    assert sum(losses[-5:]) / 5 < 0.2 * sum(losses[:5]) / 5


def test_the_log_has_the_chance_level_of_the_mix(settings):
    records = with_teacher_scores(grouped_records(8, sizes=(3,)))
    values = settings("listwise_ce", records, teacher_loss_type="margin_mse", teacher_weight=0.5, batch_size=8)
    train(values)
    (line,) = read_metrics(Path(values["output_dir"]), "train")
    margins = [
        (first["teacher_score"] - second["teacher_score"]) ** 2
        for record in records
        for place, first in enumerate(record["hits"])
        for second in record["hits"][:place]
    ]
    expected = 0.5 * torch.tensor(3.0).log().item() + 0.5 * sum(margins) / len(margins)
    assert line["chance_loss"] == pytest.approx(expected, rel=1e-5)


def test_validation_measures_the_loss_with_teacher_scores_and_the_rankings_without(settings, tmp_path):
    records = with_teacher_scores(grouped_records(8))
    scored = write_jsonl(tmp_path / "scored.jsonl", with_teacher_scores(grouped_records(6, seed=2)))
    plain = write_jsonl(tmp_path / "plain.jsonl", grouped_records(6, seed=2))
    found = []
    for place, file in enumerate((scored, plain)):
        values = settings("margin_mse", records, val_dataset=file, output_dir=str(tmp_path / f"run{place}"))
        train(values)
        found.append(read_metrics(tmp_path / f"run{place}", "eval")[-1])
    assert "loss" in found[0] and "loss" not in found[1]
    assert found[0]["ndcg@10"] == found[1]["ndcg@10"]


def test_a_best_model_by_a_loss_that_cannot_be_measured_is_refused(settings, tmp_path):
    plain = write_jsonl(tmp_path / "plain.jsonl", grouped_records(6, seed=2))
    records = with_teacher_scores(grouped_records(8))
    with pytest.raises(StartError, match="some document has no teacher_score, so that the validation loss"):
        train(settings("margin_mse", records, val_dataset=plain, metric_for_best_model="loss"))


@pytest.mark.parametrize(
    ("loss_type", "changes", "message"),
    [
        ("margin_mse", {}, r"train.jsonl:1: found no hits\[0\].teacher_score, which the loss learns from"),
        ("listwise_ce", {"teacher_loss_type": "kl_distillation"}, r"found no hits\[0\].teacher_score"),
        ("margin_mse", {"teacher_score_key": "logit"}, r"found no hits\[0\].logit"),
    ],
)
def test_data_without_the_teachers_scores_are_refused(settings, loss_type, changes, message):
    with pytest.raises(StartError, match=message):
        train(settings(loss_type, grouped_records(8), **changes))


def test_logits_are_refused_where_probabilities_are_needed(settings):
    records = [record | {"teacher_score": 6.5} for record in pointwise_records(8)]
    with pytest.raises(StartError, match=r"teacher_score is 6.5; expected a value in \[0, 1\]: give"):
        train(settings("point_ce", records, teacher_loss_type="point_ce"))


def test_teacher_losses_need_two_documents_but_no_different_labels(settings, caplog):
    alone = with_teacher_scores(grouped_records(8, sizes=(1,)))
    with pytest.raises(StartError, match="8 of 8 groups have one document alone, so margin_mse has nothing to learn"):
        train(settings("margin_mse", alone))
    equal = with_teacher_scores(grouped_records(8, sizes=(3,), levels=(0, 0)))
    train(settings("margin_mse", equal))
    assert "teach" not in caplog.text


def test_labels_that_the_lambda_loss_cannot_take_are_refused(settings):
    records = grouped_records(8, levels=(-1, 2))
    with pytest.raises(StartError, match=r"label is -1; expected a value in \[0, 31\]"):
        train(settings("lambda_loss", records))
