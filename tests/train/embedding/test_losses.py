"""Every loss of the table trains, and couples the records of a whole step however the step is cut."""

import numpy as np
import pytest
from training_runs import embedding_records, read_metrics, train

from rag_retrieval.losses.embedding import EMBEDDING_LOSSES

FAST = ("cosent", "m3_distillation", "stella")  # one of each kind of coupling
COUNT = 16


def records_for(loss, folder) -> tuple[list[dict], dict]:
    """Records that have what the loss reads, and the keys that it needs."""
    numbers = np.random.default_rng(0)
    records = embedding_records(COUNT)
    if loss.reads == "teacher_score":
        for record in records:
            record["pos_scores"] = numbers.normal(2, 1, len(record["pos"])).tolist()
            record["neg_scores"] = numbers.normal(0, 1, len(record["neg"])).tolist()
    if loss.reads == "label":
        records = [{"query": r["query"], "content": r["pos"][0], "label": i / COUNT} for i, r in enumerate(records)]
    if loss.reads == "teacher_vectors":
        numbers.normal(size=(COUNT, 40)).astype(np.float32).tofile(folder / "vectors")
        keys = {"train_dataset_vec": [str(folder / "vectors")], "teacher_embedding_dim": 40}
        return [{"query": record["query"]} for record in records], keys
    return records, {}


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(loss, id=name, marks=() if name in FAST else pytest.mark.slow)
        for name, loss in EMBEDDING_LOSSES.items()
    ],
)
def test_a_loss_is_that_of_the_step_whatever_the_accumulation(loss, settings, tmp_path):
    records, keys = records_for(loss, tmp_path)
    logged = []
    for batch_size in (8, 2):
        run = tmp_path / f"run{batch_size}"
        cut = {"batch_size": batch_size, "gradient_accumulation_steps": 8 // batch_size, "output_dir": str(run)}
        values = settings(records, loss_type=loss.name, **keys, **cut)
        del values["temperature"]
        train(values)
        logged.append([line["loss"] for line in read_metrics(run, "train")])
    assert len(logged[0]) == 2 and all(loss > 0 for loss in logged[0])
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)
