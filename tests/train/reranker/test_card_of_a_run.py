"""A run leaves a card beside its model, with its own figures."""

import json

from huggingface_hub import ModelCard
from training_runs import grouped_records, read_metrics, train, write_jsonl

from rag_retrieval.train.run_record import read_run_record


def test_a_finished_run_has_a_card_with_the_figures_of_its_model(model_folders, tmp_path):
    out = tmp_path / "out"
    state = train(
        dict(
            model_name_or_path=model_folders["bert"],
            model_type="bert_encoder",
            train_dataset=write_jsonl(tmp_path / "train.jsonl", grouped_records(8)),
            train_dataset_type="grouped",
            train_group_size=3,
            val_dataset=write_jsonl(tmp_path / "dev.jsonl", grouped_records(6, seed=1)),
            val_dataset_type="grouped",
            loss_type="listwise_ce",
            output_dir=str(out),
            batch_size=2,
            lr=1e-3,
            epochs=2,
            num_workers=0,
        )
    )
    text = (out / "model" / "README.md").read_text()
    best = next(line for line in read_metrics(out, "eval") if line["step"] == state.best_step)
    data = ModelCard(text).data
    assert data.model_name == "out" and data.base_model is None, "a folder's name is not one of the hub"
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found["ndcg@10"] == round(best["ndcg@10"], 4) and found["loss"] == round(best["loss"], 4)
    assert "training: train.jsonl\n  records          8\n" in text and "validation: dev.jsonl" in text
    assert str(tmp_path) not in text and "lr: 0.001" in text
    assert json.loads((out / "run.json").read_text())["model_step"] == state.best_step
    assert read_run_record(out).provenance["processes"] == 1
