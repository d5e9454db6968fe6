"""What an export is judged on: the whole corpus for embedders, graded pairs, and what static int8 is calibrated on."""

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx  # noqa: E402
from beir_samples import write, write_lines  # noqa: E402
from embedder_samples import FAMILIES, PROMPTS  # noqa: E402
from exported_samples import exported  # noqa: E402
from tiny_models import CHINESE, ENGLISH  # noqa: E402

from rag_retrieval import Embedder, ExportConfig, Reranker  # noqa: E402
from rag_retrieval.export.calibrate import calibration_texts  # noqa: E402
from rag_retrieval.export.source import open_source  # noqa: E402
from rag_retrieval.models.embedder import EmbeddingModel  # noqa: E402

LABELS = (3, 0, 1, 2, 0, 5)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("embedder")
    model = EmbeddingModel.from_pretrained(FAMILIES["bert"](root / "base"), prompts=PROMPTS, max_length=64)
    model.save_pretrained(root / "model")
    return str(root / "model")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """30 different documents, three queries. BM25 finds none of them for the first and the last query."""
    root = tmp_path_factory.mktemp("corpus")
    texts = [f"{text} {number}" for number in range(5) for text in (*ENGLISH, *CHINESE)][:30]
    write_lines(root / "corpus.jsonl", [{"_id": f"d{place}", "text": text} for place, text in enumerate(texts)])
    queries = {"q0": "zebra", "q1": f"{ENGLISH[0]} 3", "d7": "yak"}  # the last one has the id of a document
    write_lines(root / "queries.jsonl", [{"_id": name, "text": text} for name, text in queries.items()])
    write(root / "qrels" / "test.tsv", "q0\td4\t1\nq1\td8\t2\nq1\td9\t1\nd7\td11\t1\n")
    return root


def measured_of(folder) -> dict:
    (file,) = folder.glob("*_onnx.json")
    return json.loads(file.read_text())["verification"]


def ndcg(vectors: np.ndarray, query: np.ndarray, grades: dict[int, int], left_out: int | None) -> float:
    """@10, with the grades as gains."""
    order = [place for place in np.argsort(-vectors @ query) if place != left_out][:10]
    discounts = 1 / np.log2(np.arange(2, 12))
    gains = np.array([grades.get(place, 0) for place in order])
    best = np.array(sorted(grades.values(), reverse=True))
    return float(gains @ discounts[: len(gains)]) / float(best @ discounts[: len(best)])


def test_an_embedder_is_judged_on_the_whole_corpus(embedder, corpus, tmp_path):
    folder = exported(embedder, tmp_path / "out", data=str(corpus))
    measured = measured_of(folder)
    assert measured["searched"] == "all 30 documents" and measured["queries"] == 3
    with Embedder(embedder, device="cpu") as model:
        documents = model.encode_documents([json.loads(line)["text"] for line in (corpus / "corpus.jsonl").open()])
        queries = model.encode_queries(["zebra", f"{ENGLISH[0]} 3", "yak"])
    judged = ({4: 1}, None), ({8: 2, 9: 1}, None), ({11: 1}, 7)
    expected = np.mean([ndcg(documents, query, *of) for query, of in zip(queries, judged, strict=True)])
    assert measured["changes"]["dense"]["ndcg_before"] == pytest.approx(expected, abs=1e-6)
    assert measured["changes"]["dense"]["ndcg_after"] == pytest.approx(expected, abs=1e-6)
    part = measured_of(exported(embedder, tmp_path / "part", data=str(corpus), documents=25))
    assert part["searched"] == "25 of 30 documents", "what is left out is told"


def test_graded_pairs_are_measured_by_the_labels_ranks(embedder, model_folders, tmp_path):
    texts = [*ENGLISH, *CHINESE, "water", "copper wire"][:6]
    pairs = list(zip(texts, reversed(texts), strict=True))
    records = [
        {"query": one, "content": other, "label": label} for (one, other), label in zip(pairs, LABELS, strict=True)
    ]
    write_lines(tmp_path / "graded.jsonl", records)
    given = {"graded_pairs": str(tmp_path / "graded.jsonl")}
    with Embedder(embedder, device="cpu") as model:
        left, right = (model.encode([pair[side] for pair in pairs]) for side in (0, 1))  # neither query nor document
    cosines = (left * right).sum(axis=1)
    measured = measured_of(exported(embedder, tmp_path / "embedder", **given))
    assert measured["graded"] == "graded.jsonl"
    assert measured["changes"]["dense"]["graded_before"] == pytest.approx(spearmanr(cosines, LABELS).statistic)
    scores = Reranker(model_folders["bert"], device="cpu").compute_score(pairs)
    measured = measured_of(exported(model_folders["bert"], tmp_path / "reranker", **given))
    assert measured["changes"]["scores"]["graded_after"] == pytest.approx(spearmanr(scores, LABELS).statistic)


def test_static_int8_has_the_scales_of_the_calibration_and_needs_no_other_texts(embedder, corpus, tmp_path):
    folder = exported(embedder, tmp_path / "out", quantize="int8", calibrate_with=str(corpus), force=True)
    measured = measured_of(folder)
    assert (measured["calibrated_with"], measured["calibration_method"]) == (corpus.name, "max")
    graph = onnx.load(folder / "model.onnx").graph
    constants = {value.name for value in graph.initializer}
    roundings = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    # of each layer: q, k and v share one, o, and two of the feed-forward layer
    assert len(roundings) == 8 and all(set(node.input[1:]) <= constants for node in roundings)
    with Embedder(folder) as small:
        together = small.encode(list(ENGLISH))
        np.testing.assert_allclose([small.encode(text) for text in ENGLISH], together, atol=1e-5)


def test_texts_to_calibrate_on_get_prompts_and_are_evenly_chosen(embedder, model_folders, corpus, tmp_path):
    def texts_of(model: str, file, count: int = 256) -> tuple:
        config = ExportConfig(
            model=model, output="o", quantize="int8", calibrate_with=str(file), calibration_texts=count
        )
        source = open_source(config)
        return source, calibration_texts(config, source)

    (tmp_path / "lines.txt").write_text("one\n\ntwo\nthree\nfour\n", encoding="utf-8")
    source, found = texts_of(embedder, tmp_path / "lines.txt", count=2)
    expected = source.encoder.encode(["one", "three"], "document")
    assert [text.ids.tolist() for text in found] == [text.ids.tolist() for text in expected]
    assert all(text.document_start for text in found), "the prompt stands before each"
    source, found = texts_of(embedder, corpus)
    query = source.encoder.encode([f"{ENGLISH[0]} 3"], "query")
    document = source.encoder.encode([f"{ENGLISH[0]} 0"], "document")  # a digit is no word: the first of equals
    assert [text.ids.tolist() for text in found] == [text.ids.tolist() for text in (*query, *document)]
    with pytest.raises(ValueError, match=r"lines.txt has single texts, and a reranker reads pairs; give a folder"):
        texts_of(model_folders["bert"], tmp_path / "lines.txt")
