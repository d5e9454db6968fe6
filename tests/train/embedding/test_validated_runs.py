"""Runs of an embedder with validation: what is measured when, which model is kept, and what a resumed run knows."""

import logging
from pathlib import Path

import pytest
import torch
from beir_samples import write, write_toy
from training_runs import embedding_records, final_weights, read_metrics, train, write_jsonl

from rag_retrieval.core.distributed import StartError
from rag_retrieval.train.embedding.validation import EmbeddingValidation


@pytest.fixture
def validated(settings, tmp_path):
    """A run of 10 steps that is validated on records before it, and at steps 5 and 10."""
    val = write_jsonl(tmp_path / "val.jsonl", embedding_records(20, seed=3))
    return lambda **changes: settings(epochs=2, val_dataset=val, **changes)


def evaluations(values: dict) -> dict[int, dict]:
    return {line["step"]: line for line in read_metrics(Path(values["output_dir"]), "eval")}


def test_a_run_is_validated_before_the_first_step_and_compares_all_later_figures(validated, caplog):
    caplog.set_level(logging.INFO)
    values = validated()
    train(values)
    found = evaluations(values)
    assert list(found) == [0, 5, 10]
    assert {"loss", "ndcg@10", "mrr@10", "recall@10", "recall@100", "mean_cosine"} <= found[0].keys()
    assert not [name for name in found[0] if "start" in name]
    for step in (5, 10):
        assert found[step]["ndcg@10_at_start"] == found[0]["ndcg@10"]
        assert 0 < found[step]["ndcg@10_p_value"] <= 1
    assert found[10]["loss"] < found[0]["loss"]
    assert f"at the start {found[0]['ndcg@10']:.4f}" in caplog.text and "paired" in caplog.text


def test_the_best_checkpoint_becomes_the_model_and_training_ends_early(validated, monkeypatch):
    """The figure is best at step 2, then two evaluations bring nothing."""
    measured = EmbeddingValidation.__call__
    figures = {0: 0.9, 2: 0.5, 4: 0.4, 6: 0.5}

    def scripted(self, model, step):
        return measured(self, model, step) | {"ndcg@10": figures[step]}

    monkeypatch.setattr(EmbeddingValidation, "__call__", scripted)
    values = validated(eval_steps=2, early_stopping_patience=2, save_steps=1, num_max_checkpoints=9)
    train(values)
    assert list(evaluations(values)) == [0, 2, 4, 6]
    output_dir = Path(values["output_dir"])
    kept, best = final_weights(output_dir), final_weights(output_dir / "checkpoint-2")
    assert all(torch.equal(kept[name], best[name]) for name in kept)


def test_a_resumed_run_reports_what_an_uninterrupted_one_does(validated):
    whole = validated(save_steps=5, num_max_checkpoints=9)
    train(whole)
    expected = evaluations(whole)
    train(whole | {"resume": str(Path(whole["output_dir"]) / "checkpoint-5")})
    assert evaluations(whole) == expected and "ndcg@10_p_value" in expected[10]


def test_a_run_may_be_validated_on_a_beir_folder(settings, tmp_path):
    folder = write_toy(tmp_path / "toy")
    write(folder / "qrels/dev.tsv", "q1\td1-0\t1\nq2\td2-0\t1\n")
    values = settings(val_dataset=str(folder), metric_for_best_model="recall@100")
    train(values)
    found = evaluations(values)
    assert list(found) == [0, 5] and found[0]["queries"] == 2 and "loss" not in found[0]
    assert found[5]["recall@100_at_start"] == found[0]["recall@100"]


def test_validation_data_without_anything_relevant_are_refused(settings, tmp_path):
    hits = [{"content": text, "label": 0} for text in ("a", "b")]
    val = write_jsonl(tmp_path / "val.jsonl", [{"query": "q", "hits": hits}])
    with pytest.raises(StartError, match="val_dataset.*relevant"):
        train(settings(val_dataset=val))
