"""The curve of a run's checkpoints, and the correlation of graded pairs."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from beir_samples import write, write_lines, write_toy
from embedder_samples import copy_as, save_by_sentence_transformers

from rag_retrieval import CrossEncoder, Embedder, EvaluationConfig, RetrievalEvaluationConfig
from rag_retrieval.cli import main
from rag_retrieval.evaluate.checkpoints import checkpoints_of, evaluate_checkpoints
from rag_retrieval.evaluate.pairs import correlations
from rag_retrieval.metrics import run_metrics
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.train.checkpoints import CheckpointStore, TrainState
from rag_retrieval.train.run_folder import finish

pytest.importorskip("bm25s")
pytest.importorskip("matplotlib")


@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path / "toy")


def write_checkpoints(run: Path, task: str, model, change) -> Path:
    """Checkpoints 2 and 10 and a finished model of step 20, with other weights each."""
    run.mkdir()
    (run / "training_config.yaml").write_text(f"task: {task}\n")
    store = CheckpointStore(run, "a" * 32, keep=9)
    for step in (2, 10):
        change(model)
        store.begin(step)
        model.save_pretrained(store.temporary(step) / "model")
        store.commit(TrainState("a" * 32, step))
    change(model)
    model.save_pretrained(run / "model")
    finish(run, "a" * 32, 20)
    return run


@pytest.fixture
def embedder_run(base_folders, tmp_path):
    def change(model):
        model.model.embeddings.word_embeddings.weight.data *= 1.5

    return write_checkpoints(
        tmp_path / "run", "embedding", EmbeddingModel.from_pretrained(base_folders["bert"]), change
    )


@pytest.fixture
def reranker_run(model_folders, tmp_path):
    def change(model):
        model.model.classifier.weight.data *= -1  # turns the order round

    return write_checkpoints(tmp_path / "run", "reranker", CrossEncoder.from_pretrained(model_folders["bert"]), change)


def test_every_checkpoint_of_an_embedder_s_run_is_on_the_curve(embedder_run, toy, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--data", str(toy), "--measures", "ndcg@10,map", "--depth", "72", "--output_dir", str(out)]
    assert main(["evaluate", "--checkpoints", str(embedder_run), *options]) == 0
    curve = json.loads((out / "checkpoints.json").read_text())
    assert [row["step"] for row in curve["checkpoints"]] == [2, 10, 20]
    values = [row["means"]["ndcg@10"] for row in curve["checkpoints"]]
    assert curve["best"]["means"]["ndcg@10"] == max(values)
    alone = RetrievalEvaluationConfig(
        retriever=(str(embedder_run / "checkpoint-10/model"),), data=str(toy), depth=72, output_dir=str(tmp_path / "o")
    )
    from rag_retrieval import evaluate_retriever

    qrels = {f"q{query}": {f"d{query}-0": 1} for query in range(8, 12)}
    assert run_metrics(qrels, evaluate_retriever(alone).after.run, ["map"])["map"] == pytest.approx(
        curve["checkpoints"][1]["means"]["map"]
    )
    result = json.loads((out / "checkpoint-10/result.json").read_text())
    assert result["systems"][0]["ndcg@10"] == values[1]
    assert (out / "figures/checkpoints.png").is_file() and "data:image/png" in (out / "report.html").read_text()
    printed = capsys.readouterr().out
    assert f"* {curve['best']['step']}" in printed and "best by ndcg@10" in printed


def test_checkpoints_of_a_reranker_order_candidates_or_what_a_retriever_finds(reranker_run, toy, tmp_path):
    options = {"data": str(toy), "checkpoints": str(reranker_run), "measures": ("mrr@10",)}
    alone = evaluate_checkpoints(EvaluationConfig(**options, output_dir=str(tmp_path / "a")))
    values = [row.means["mrr@10"] for row in alone.checkpoints]
    # each turns the order of the one before round, so the first and the last have the same
    assert values[0] == values[2] != values[1] and alone.best.step == (2 if values[0] > values[1] else 10)
    over_bm25 = RetrievalEvaluationConfig(**options, retriever=("bm25",), output_dir=str(tmp_path / "b"))
    found = evaluate_checkpoints(over_bm25)
    assert [row.step for row in found.checkpoints] == [2, 10, 20]
    assert found.checkpoints[0].means == found.checkpoints[2].means != found.checkpoints[1].means
    assert len(list((tmp_path / "b/indexes").iterdir())) == 1, "one index for all"


def test_the_command_knows_what_a_run_trains(reranker_run, toy, tmp_path, capsys):
    options = ["--data", str(toy), "--measures", "mrr@10", "--output_dir", str(tmp_path / "o")]
    assert main(["evaluate", "--checkpoints", str(reranker_run), *options]) == 0
    assert all((tmp_path / "o/checkpoint-10" / name).is_file() for name in ("run.trec", "result.json"))
    for given, named in (
        ([], "--model: is missing"),
        (["--retriever", ""], "--retriever: a name is missing"),
        (["--query_model", "a/b"], "--retriever: a name is missing"),
        (["--model", "a/b", "--fp16"], "--fp16: unknown key"),
    ):
        assert main(["evaluate", "--data", str(toy), *given]) == 2
        assert named in capsys.readouterr().err
    write(tmp_path / "a.yaml", f"retriever: bm25\ndata: {toy}\noutput_dir: {tmp_path}/y\n")
    assert main(["evaluate", "--config", str(tmp_path / "a.yaml")]) == 0 and (tmp_path / "y/runs/bm25.trec").is_file()


def test_only_a_run_s_folder_has_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="checkpoints: .* is not the output_dir of a training run"):
        checkpoints_of(tmp_path)
    write(tmp_path / "run.json", json.dumps({"run_id": "a" * 32}))
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        checkpoints_of(tmp_path)


# ---- graded pairs


def slow_ranks(values):
    """The mean rank of equal values."""
    return [np.mean([place for place, other in enumerate(sorted(values), 1) if other == value]) for value in values]


def test_equal_grades_share_the_mean_of_their_ranks():
    cosines, grades = np.array([0.1, 0.4, 0.4, 0.9, 0.2]), np.array([0.0, 2.0, 3.0, 3.0, 0.0])
    spearman, pearson = correlations(cosines, grades)
    assert spearman == pytest.approx(np.corrcoef(slow_ranks(cosines), slow_ranks(grades))[0, 1])
    assert pearson == pytest.approx(np.corrcoef(cosines, grades)[0, 1])
    assert correlations(np.ones(3), np.arange(3.0)) == (0.0, 0.0)


def test_pairs_are_encoded_alike_and_correlated_by_the_command(base_folders, tmp_path, capsys):
    pairs = [
        ("a cat sits", "a cat is sitting", 5),
        ("北京", "中国的首都", 3.5),
        ("a plane", "a man plays", 0),
        ("x", "y", 0),
    ]
    rows = [{"query": first, "content": second, "label": grade} for first, second, grade in pairs]
    write_lines(tmp_path / "sts.jsonl", rows)
    model = str(tmp_path / "embedder")
    save_by_sentence_transformers(base_folders["bert"], tmp_path / "embedder", "mean", prompts={"query": "a query: "})
    options = ["--data", str(tmp_path / "sts.jsonl"), "--output_dir", str(tmp_path / "o")]
    assert main(["evaluate", "--retriever", model, *options, "--output_format", "dict"]) == 0
    printed = ast.literal_eval(capsys.readouterr().out)
    embedder = Embedder(model, device="cpu")
    left, right = (embedder.encode([pair[side] for pair in pairs]) for side in (0, 1))
    cosines, grades = (left * right).sum(axis=1), [pair[2] for pair in pairs]
    assert printed["Pearson"] == pytest.approx(np.corrcoef(cosines, grades)[0, 1], abs=1e-5)
    assert printed["Spearman"] == pytest.approx(np.corrcoef(slow_ranks(cosines), slow_ranks(grades))[0, 1])
    (row,) = json.loads((tmp_path / "o/result.json").read_text())["systems"]
    assert (row["name"], row["pairs"]) == ("embedder", 4)
    other = copy_as(base_folders["bert"], "other", tmp_path)
    assert main(["evaluate", "--retriever", f"{model},{other}", *options[:2], "--output_dir", str(tmp_path / "p")]) == 0
    assert "sts.jsonl: 4 pairs" in (printed := capsys.readouterr().out) and "\n  other " in printed


@pytest.mark.slow
def test_two_processes_correlate_pairs_once(base_folders, tmp_path):
    rows = [{"query": "a cat", "content": text, "label": grade} for grade, text in enumerate(("cat", "a dog", "x"))]
    write_lines(tmp_path / "sts.jsonl", rows)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    options = ["--retriever", base_folders["bert"], "--data", "sts.jsonl", "--output_dir", "o"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*launch, "rag_retrieval.cli", "evaluate", *options]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sts.jsonl: 3 pairs") == 1


def test_pairs_that_cannot_be_correlated_are_refused(tmp_path, base_folders, capsys):
    write_lines(tmp_path / "same.jsonl", [{"query": "a", "content": "b", "label": 1}] * 3)
    options = ["--data", str(tmp_path / "same.jsonl"), "--output_dir", str(tmp_path / "o")]
    assert main(["evaluate", "--retriever", base_folders["bert"], *options]) == 2
    assert "found 3 pairs and 1 different grades" in capsys.readouterr().err
    write_lines(tmp_path / "rank.jsonl", [{"query": "a", "pos": ["b"], "neg": ["c"]}])
    ranking = ["--data", str(tmp_path / "rank.jsonl"), *options[2:]]
    assert main(["evaluate", "--retriever", base_folders["bert"], *ranking]) == 2
    assert "rank.jsonl:1: found a pos_neg record; expected graded pairs" in capsys.readouterr().err
    assert main(["evaluate", "--retriever", "bm25", *options]) == 2
    assert "cannot compare the two texts of a pair" in capsys.readouterr().err
