import json

import pytest

from rag_retrieval.evaluate.training_curves import find_run, read_curves

LINES = [
    {"step": 10, "kind": "train", "loss": 1.5, "lr": 1e-4},
    {"step": 10, "kind": "eval", "loss": 1.2, "ndcg@10": 0.5, "queries": 3},
    {"step": 20, "kind": "train", "loss": 0.5, "lr": 5e-5},
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path / "run"


def test_training_and_validation_are_separate_curves(run):
    curves = read_curves(run)
    assert curves.train_loss == [(10, 1.5), (20, 0.5)] and curves.eval_loss == [(10, 1.2)]
    assert curves.lr == [(10, 1e-4), (20, 5e-5)] and curves.metrics == {"ndcg@10": [(10, 0.5)]}


def test_the_cut_last_line_of_a_killed_run_is_left_out(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "kind": "tr')
    assert read_curves(run).train_loss[-1] == (20, 0.5)


def test_a_run_is_found_beside_its_model_or_by_name(run, tmp_path):
    assert find_run(None, str(run / "model")) == run
    assert find_run(str(run), "package:x") == run
    assert find_run(None, "package:x") is None and find_run(None, str(tmp_path / "run")) is None
    with pytest.raises(ValueError, match="has no metrics.jsonl; give the output_dir of a training run"):
        find_run(str(tmp_path), "package:x")
