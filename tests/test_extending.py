"""The examples of docs/extending.md: written as files, trained and evaluated with, and nothing else is changed."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from beir_samples import write_toy
from tiny_models import tiny_bert
from training_runs import (
    ROOT,
    embedding_records,
    grouped_records,
    read_metrics,
    train,
    without_dropout,
    write_jsonl,
    write_yaml,
)

from rag_retrieval import EvaluationConfig, evaluate_reranker
from rag_retrieval.metrics import METRICS, metric_value, rank_group
from rag_retrieval.train.reranker.train_reranker import main

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """The page's files in a folder that is the current one and not on sys.path; the table of metrics as it was."""
    for name, code in re.findall(r"```python\n# (my_ranking/\w+\.py)\n(.*?)```", PAGE, flags=re.S):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    path = [entry for entry in sys.path if entry]
    monkeypatch.setattr("sys.path", path)
    metrics = dict(METRICS)
    yield tmp_path
    METRICS.clear()
    METRICS.update(metrics)
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_ranking"]:
        del sys.modules[name]


def test_every_place_that_the_page_names_is_there():
    names = [name for name in re.findall(r"`((?:rag_retrieval|tests)/[^`]+)`", PAGE)]
    assert len(names) > 8 and [name for name in names if not (ROOT / name).exists()] == []
    for table, file in re.findall(r"`([A-Z_]+)` in `([^`]+)`", PAGE):
        assert re.search(rf"^{table}\b", (ROOT / file).read_text(encoding="utf-8"), flags=re.M), table


def run_values(folder: Path, **changes) -> dict:
    (folder / "base").mkdir()
    return {
        "model_name_or_path": without_dropout(tiny_bert(folder / "base")),
        "model_type": "bert_encoder",
        "max_len": 48,
        "train_dataset": write_jsonl(folder / "train.jsonl", grouped_records(12)),
        "train_dataset_type": "grouped",
        "val_dataset": write_jsonl(folder / "val.jsonl", grouped_records(6, seed=9)),
        "output_dir": str(folder / "run"),
        "batch_size": 4,
        "lr": 1e-3,
        "num_workers": 0,
        "log_interval": 1,
    } | changes


def test_a_loss_and_a_metric_of_ones_own_train_and_evaluate(package, monkeypatch):
    pytest.importorskip("bm25s")
    with monkeypatch.context() as during_import:  # the loss is found in the current folder
        during_import.syspath_prepend(str(package))
        importlib.import_module("my_ranking.metrics")
    loss_type = "my_ranking.losses:squared_hinge"
    values = run_values(package, loss_type=loss_type, metric_for_best_model="success@2")
    state = train(values)
    losses = [line["loss"] for line in read_metrics(package / "run", "train")]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    (evaluated,) = read_metrics(package / "run", "eval")
    assert state.best_metric == evaluated["success@2"]
    model = package / "run" / "model"
    assert loss_type in (package / "run" / "training_config.yaml").read_text()
    assert loss_type in (model / "README.md").read_text()
    config = EvaluationConfig(
        model=str(model), data=str(write_toy(package / "toy")), measures=["success@1", "ndcg@3"], output_dir="out"
    )
    result = evaluate_reranker(config)
    ranked_first = [max(scores, key=scores.get) for scores in result.after.run.values()]
    expected = [float(document.endswith("-0")) for document in ranked_first]
    assert list(result.after.per_query["success@1"].values()) == expected


def test_a_user_loss_that_returns_a_mean_is_refused_before_training(package, capsys):
    (package / "my_ranking" / "losses.py").write_text(
        "def mean(scores, labels, mask):\n"
        "    return ((scores - labels).square() * mask).sum() / mask.sum().clamp(min=1), mask.sum()\n"
    )
    values = run_values(package, loss_type="my_ranking.losses:mean")
    assert main(["--config", write_yaml(package / "run.yaml", values)]) == 2
    message = capsys.readouterr().err
    assert "error: " in message and "my_ranking.losses:mean" in message and "sum" in message
    assert "Traceback" not in message and not (package / "run" / "metrics.jsonl").exists()


def test_the_metric_of_the_page_counts_as_it_says(package, monkeypatch):
    monkeypatch.syspath_prepend(str(package))
    importlib.import_module("my_ranking.metrics")
    ranking = rank_group([3.0, 2.0, 1.0], [0, 0, 1])
    assert [metric_value(f"success@{k}", ranking) for k in (1, 2, 3)] == [0.0, 0.0, 1.0]


@pytest.mark.slow
def test_an_entry_in_the_table_of_losses_makes_its_option_a_key(package):
    """In a process of its own: the configuration reads the table when it is imported."""
    (entry,) = re.findall(r"```python\n(Loss\(.*?)```", PAGE, flags=re.S)
    (package / "my_ranking" / "losses.py").write_text(
        "def hinge_with_margin(scores, labels, mask, margin=1.0):\n"
        "    ordered = (labels[:, :, None] < labels[:, None, :]) & mask[:, :, None] & mask[:, None, :]\n"
        "    margins = (margin + scores[:, :, None] - scores[:, None, :]).clamp(min=0)\n"
        "    return margins.square().masked_fill(~ordered, 0).sum(), ordered.sum()\n"
    )
    values = run_values(package, loss_type="squared_hinge", margin=0.25)
    code = (
        "import json, sys\n"
        "import rag_retrieval.losses as table\n"
        "from rag_retrieval.losses import Loss, LossOption\n"
        f"table.LOSSES['squared_hinge'] = {entry}\n"
        "from rag_retrieval.train.reranker.config import RerankerConfig\n"
        "from rag_retrieval.train.reranker.run import run\n"
        f"values = json.loads({json.dumps(json.dumps(values))})\n"
        "config = RerankerConfig(**values)\n"
        "assert config.margin == 0.25 and RerankerConfig(**values | {'margin': None}).margin == 1.0\n"
        "assert 'margin' in RerankerConfig(**values | {'loss_type': 'listnet'}).ignored\n"
        "run(config)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{package}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "margin: 0.25" in (package / "run" / "training_config.yaml").read_text()


def test_the_embedding_loss_of_the_page_trains(package):
    (package / "base").mkdir()
    loss_type = "my_ranking.embedding_losses:squared_distance"
    train({
        "task": "embedding", "model_name_or_path": without_dropout(tiny_bert(package / "base")), "query_max_len": 24,
        "passage_max_len": 48, "train_dataset": write_jsonl(package / "train.jsonl", embedding_records(12)),
        "loss_type": loss_type, "output_dir": str(package / "run"), "batch_size": 4, "lr": 1e-3, "num_workers": 0,
        "log_interval": 1, "use_mrl": True, "mrl_dims": [8, 16],
    })  # fmt: skip
    losses = [line["loss"] for line in read_metrics(package / "run", "train")]
    assert len(losses) == 3 and losses[-1] < losses[0]
