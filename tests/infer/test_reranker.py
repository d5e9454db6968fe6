"""The Reranker against the models' own scores: order, ids, empty documents, many queries, bad input."""

import gc
import inspect
import json
import shutil
import weakref
from typing import get_args

import numpy as np
import pytest
import torch
from tiny_models import CHINESE, ENGLISH

import rag_retrieval
from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.infer.results import EMPTY_SCORE, RerankResult
from rag_retrieval.infer.torch_backend import TorchBackend
from rag_retrieval.models.calibration import Calibration, write_calibration
from rag_retrieval.models.options import LONG_DOCUMENT
from rag_retrieval.models.pair_encoding import PairEncoder, PairTemplate

FAMILIES = ["bert", "xlm_roberta", "qwen2", "llama"]
DOCUMENTS = [*ENGLISH, *CHINESE]
QUERIES = ["where is Paris?", "感冒的症状", "how do I open a file"]


@pytest.fixture(scope="module")
def rerankers(load_tiny):
    return {family: Reranker.from_backend(TorchBackend(load_tiny(family))) for family in FAMILIES}


class ByLength:
    """A backend whose score is the number of tokens, at most 7 of them."""

    model_type, calibration = "bert_encoder", None

    def __init__(self, tokenizer):
        self.pair_encoder = PairEncoder(tokenizer, PairTemplate([2], [3], [3]), 64)
        self.calls = []

    def score(self, pairs, batch_size):
        self.calls.append(len(pairs))
        return np.array([min(len(pair), 7) for pair in pairs], np.float32)

    def close(self):
        self.calls.append("closed")


@pytest.fixture
def by_length(load_tiny):
    return Reranker.from_backend(ByLength(load_tiny("bert").tokenizer))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_order_are_those_of_the_models_own_compute_score(family, rerankers):
    reranker = rerankers[family]
    pairs = [[query, document] for query in QUERIES for document in DOCUMENTS]
    expected = reranker.backend.scorer.compute_score(pairs).numpy()
    assert np.array_equal(reranker.compute_score(pairs), expected)
    for query, scores in zip(QUERIES, expected.reshape(3, -1), strict=True):
        results = reranker.rerank(query, DOCUMENTS)
        order = sorted(range(len(DOCUMENTS)), key=lambda place: -scores[place])
        assert [result.document_index for result in results] == order
        np.testing.assert_allclose([result.score for result in results], scores[order], atol=2e-6)
        assert [result.text for result in results] == [DOCUMENTS[place] for place in order]
        assert [result.rank for result in results] == list(range(1, len(DOCUMENTS) + 1))


def test_the_public_name_opens_a_folder(model_folders):
    with rag_retrieval.Reranker(model_folders["bert"], device="cpu") as reranker:
        found = reranker.compute_score(["where is Paris?", ENGLISH[1]])
    expected = rag_retrieval.CrossEncoder.from_pretrained(model_folders["bert"]).compute_score([QUERIES[0], ENGLISH[1]])
    assert found.dtype == np.float32 and found.tolist() == expected.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_many_queries_in_one_call_give_what_one_at_a_time_gives(family, rerankers):
    reranker = rerankers[family]
    lists = [DOCUMENTS, [], DOCUMENTS[3:5] + [" ".join(ENGLISH) * 6]]
    together = reranker.rerank_many(QUERIES, lists, top_k=4, long_document="max_slice")
    for query, documents, found in zip(QUERIES, lists, together, strict=True):
        alone = reranker.rerank(query, documents, top_k=4, long_document="max_slice")
        assert found.query == alone.query == query
        assert [result.doc_id for result in found] == [result.doc_id for result in alone]
        assert [result.slice for result in found] == [result.slice for result in alone]
        np.testing.assert_allclose([r.score for r in found], [r.score for r in alone], atol=2e-5)


def test_many_queries_share_the_calls_of_the_backend(by_length):
    by_length.rerank_many(["a", "b", "c"], [["x", "y"], ["z"], ["water boils " * 100]], long_document="max_slice")
    assert len(by_length.backend.calls) == 1 and by_length.backend.calls[0] > 4


def test_ties_keep_input_order_and_empty_documents_keep_their_place_with_the_lowest_score(by_length):
    documents = ["a", None, "a a a", "", "a a a a", " \n", "a", "a a a a a"]  # scores 5, 7, 7, 5, 7
    results = by_length.rerank("a", documents)
    assert [result.document_index for result in results] == [2, 4, 7, 0, 6, 1, 3, 5]
    assert [result.score for result in results] == [7, 7, 7, 5, 5] + [EMPTY_SCORE] * 3
    assert [result.text for result in results[-3:]] == ["", "", " \n"]
    assert by_length.rerank("a", documents, normalize=True)[-1].score == 0.0
    assert [result.doc_id for result in by_length.rerank("a", [None, ""])] == [0, 1]


def test_ids_and_metadata_of_documents_come_back(by_length):
    documents = [
        {"id": "d7", "text": "one", "metadata": {"page": 3}, "title": "T"},
        "two two two two two two two",
        {"text": None, "id": 12},
        {"text": "three", "id": None},
    ]
    results = by_length.rerank("a", documents)
    found = {result.document_index: (result.doc_id, result.metadata) for result in results}
    assert found == {0: ("d7", {"page": 3, "title": "T"}), 1: (1, {}), 2: (12, {}), 3: (3, {})}
    assert results[0].document_index == 1
    assert results.get_score_by_docid(12) == EMPTY_SCORE
    assert documents[0]["metadata"] == {"page": 3}, "the caller's own dict stays as it is"


def test_no_documents_give_an_empty_result_and_no_pairs_an_empty_array(by_length):
    assert list(by_length.rerank("a", [])) == [] and by_length.rerank_many([], []) == []
    assert by_length.compute_score([]).shape == (0,) and by_length.compute_score([]).dtype == np.float32
    assert by_length.backend.calls == []


def test_top_k_cuts_what_comes_back(by_length):
    documents = ["a " * count for count in range(1, 6)]
    assert [result.rank for result in by_length.rerank("a", documents, top_k=2)] == [1, 2]
    assert len(by_length.rerank("a", documents, top_k=99)) == 5
    assert len(by_length.rerank("a", documents, top_k=np.int64(3))) == 3


def test_normalize_is_the_sigmoid_and_with_a_calibration_the_calibrated_probability(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["bert"], tmp_path / "model")
    pairs = [[QUERIES[0], document] for document in DOCUMENTS]
    plain = Reranker(folder, device="cpu")
    scores = plain.compute_score(pairs).astype(float)
    np.testing.assert_allclose(plain.compute_score(pairs, normalize=True), 1 / (1 + np.exp(-scores)), rtol=1e-5)
    write_calibration(folder, Calibration(2.0, -0.5, "dev", 10))
    calibrated = Reranker(folder, device="cpu").rerank(QUERIES[0], DOCUMENTS, normalize=True)
    expected = 1 / (1 + np.exp(-(scores / 2 - 0.5)))
    for result in calibrated:
        assert result.score == pytest.approx(expected[result.document_index], rel=1e-5)


def test_max_length_of_a_call_cuts_further_and_cannot_exceed_that_of_the_reranker(rerankers):
    reranker = rerankers["bert"]
    pairs = [[QUERIES[2], " ".join(ENGLISH)]]
    expected = reranker.backend.scorer.compute_score(pairs, max_length=24).numpy()
    assert reranker.compute_score(pairs, max_length=24) == expected
    with pytest.raises(ValueError, match=r"max_length 513 is more than the 512 .* open it with max_length=513"):
        reranker.rerank("a", ["b"], max_length=513)


def test_batch_size_changes_no_score(rerankers):
    pairs = [[QUERIES[0], document] for document in DOCUMENTS]
    for reranker in rerankers.values():
        np.testing.assert_allclose(
            reranker.compute_score(pairs, batch_size=3), reranker.compute_score(pairs), atol=2e-6
        )


def test_long_documents_are_read_alike_everywhere_unless_something_else_is_asked_for():
    """Signatures and configurations have one list of values and one default."""
    from rag_retrieval.evaluate.config import EvaluationConfig
    from rag_retrieval.mining.config import MiningConfig
    from rag_retrieval.serve.config import ServeConfig

    for function in (Reranker.rerank, Reranker.rerank_many, Reranker.arerank, Reranker.arerank_many):
        parameters = inspect.signature(function).parameters
        assert (parameters["long_document"].default, parameters["overlap"].default) == ("truncate", 64)
    assert inspect.signature(Reranker.compute_score).parameters["long_document"].default == "truncate"
    for config in (EvaluationConfig, MiningConfig, ServeConfig):
        fields = config.model_fields
        assert (fields["long_document"].default, fields["overlap"].default) == ("truncate", 64)
        assert set(get_args(fields["long_document"].annotation)) == set(LONG_DOCUMENT)


def test_close_closes_the_backend(by_length):
    with by_length:
        pass
    assert by_length.backend.calls == ["closed"]


def test_a_closed_reranker_lets_its_model_go_and_says_so(model_folders):
    with Reranker(model_folders["bert"]) as reranker:
        model = weakref.ref(reranker.backend.scorer.model)
        assert len(reranker.rerank("a", ["b"])) == 1
    gc.collect()
    assert model() is None
    for call in (lambda: reranker.rerank("a", ["b"]), lambda: reranker.at_layer(2)):
        with pytest.raises(ValueError, match=f"{model_folders['bert']} is closed"):
            call()


def bad_calls():
    surrogate = "\ud800"
    yield lambda r: r.rerank(3, []), "query: expected a string, found int"
    yield lambda r: r.rerank(surrogate, []), "query: half a surrogate pair"
    yield lambda r: r.rerank("a", "text"), "documents: expected a list, found str"
    yield lambda r: r.rerank("a", None), "documents: expected a list, found NoneType"
    yield lambda r: r.rerank("a", {"text": "b"}), "documents: expected a list, found dict"
    yield (lambda r: r.rerank("a", ["b", None, "c", 7]),
           r'documents\[3\]: expected a string, a dict with "text" or None, found int')  # fmt: skip
    yield lambda r: r.rerank("a", [["b"]]), r"documents\[0\]: expected a string, .* found list"
    yield lambda r: r.rerank("a", [{"title": "b"}]), r"documents\[0\]: expected a dict with \"text\", found 'title'"
    yield lambda r: r.rerank("a", [{"text": 5}]), r'documents\[0\]: "text" must be a string or None, found int'
    yield lambda r: r.rerank("a", [{"text": "b", "metadata": 5}]), r'documents\[0\]: "metadata" must be a dict'
    yield lambda r: r.rerank("a", ["b", surrogate]), r"documents\[1\]: half a surrogate pair"
    yield lambda r: r.rerank("a", ["b"], top_k=0), "top_k must be a whole number of documents, at least 1; found 0"
    yield lambda r: r.rerank("a", ["b"], top_k=True), "top_k must be .*; found True"
    yield lambda r: r.rerank("a", ["b"], batch_size=0), "batch_size must be .* at least 1; found 0"
    yield lambda r: r.rerank("a", ["b"], overlap=-1), "overlap must be .* at least 0; found -1"
    yield lambda r: r.rerank("a", ["b"], max_length=2), "max_length 2 is too small"
    yield lambda r: r.rerank("a", ["b"], long_document="cut"), "long_document must be one of .*'max_slice', .*'cut'"
    for wrong in ("x", 1, None):
        yield lambda r, wrong=wrong: r.rerank("a", ["b"], normalize=wrong), f"normalize must be .* found {wrong!r}"
        yield lambda r, wrong=wrong: r.compute_score(["a", "b"], normalize=wrong), "normalize must be True or False"
        yield lambda r, wrong=wrong: r.rerank_many(["a"], [["b"]], normalize=wrong), "normalize must be True or False"
    yield lambda r: r.rerank_many("a", [["b"]]), "queries: expected a list, found str"
    yield lambda r: r.rerank_many(["a", 5], [[], []]), r"queries\[1\]: expected a string, found int"
    yield lambda r: r.rerank_many(["a", "b"], [["c"]]), "documents: expected a list for each of the 2 queries, found 1"
    yield lambda r: r.rerank_many(["a"], ["b"]), r"documents\[0\]: expected a list, found str"
    yield lambda r: r.rerank_many(["a"], [["b", 5]]), r"documents\[0\]\[1\]: expected a string"
    yield lambda r: r.compute_score([["a", "b"], ["a", "b", "c"]]), r"pairs\[1\] must be \[query, document\]"
    yield lambda r: r.compute_score([["a", 5]]), r"pairs\[0\]: the document must be a string, found int"


def test_bad_input_is_an_error_that_names_the_argument_and_the_position(by_length):
    for call, message in bad_calls():
        with pytest.raises(ValueError, match=message):
            call(by_length)


def test_a_table_is_refused_and_its_rows_and_columns_are_taken(by_length):
    """Iterating over a table gives its columns: their names would be scored."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"query": ["a", "a"], "text": ["b", "c d"]})
    for call in (
        lambda: by_length.compute_score(frame),
        lambda: by_length.rerank("a", frame),
        lambda: by_length.rerank_many(frame, [["b"], ["c"]]),
        lambda: by_length.rerank_many(["a", "b"], frame),
    ):
        with pytest.raises(ValueError, match="DataFrame.*rows"):
            call()
    assert by_length.compute_score(frame[["query", "text"]].values.tolist()).tolist() == [5, 6]
    assert by_length.compute_score(frame[["query", "text"]].to_numpy()).tolist() == [5, 6]
    assert [result.text for result in by_length.rerank("a", frame["text"])] == ["c d", "b"]
    assert [result.text for result in by_length.rerank("a", frame.to_dict("records"))] == ["c d", "b"]


class Listed(ByLength):
    """A backend that gives the scores of a list, one for each pair that it is asked for."""

    def __init__(self, tokenizer, scores, calibration=None):
        super().__init__(tokenizer)
        self.scores, self.calibration = scores, calibration

    def score(self, pairs, batch_size):
        self.calls.append(len(pairs))
        return np.array(self.scores[: len(pairs)], np.float32)


def test_normalize_changes_what_is_shown_and_never_the_order(by_length):
    """In float32 the sigmoid is 1.0 from 17 on, and 0.0 from -104 on."""
    tokenizer = by_length.backend.pair_encoder.tokenizer
    logits, documents = [18, 25, 21, -120, -110], ["a", "b", "c", "d", "e", ""]
    for calibration, score_type in ((None, "sigmoid"), (Calibration(0.5, 1.0, "dev", 10), "calibrated")):
        reranker = Reranker.from_backend(Listed(tokenizer, logits, calibration))
        raw, shown = reranker.rerank("q", documents), reranker.rerank("q", documents, normalize=True)
        assert [result.document_index for result in raw] == [1, 2, 0, 4, 3, 5]
        assert [result.document_index for result in shown] == [1, 2, 0, 4, 3, 5]
        assert [result.score for result in shown] == [1, 1, 1, 0, 0, 0]
        assert reranker.rerank("q", documents, top_k=1, normalize=True)[0].text == "b"
        assert (raw.score_type, shown.score_type) == ("logit", score_type)
        assert json.loads(shown.to_json())["score_type"] == score_type


def test_equal_pairs_are_computed_once_and_tie(by_length):
    reranker = Reranker.from_backend(Listed(by_length.backend.pair_encoder.tokenizer, [0.1, 0.2, 0.3]))
    results = reranker.rerank("q", ["same", "other", "same", None, "same"])
    assert [(result.document_index, result.score) for result in results] == [
        (1, np.float32(0.2)), (0, np.float32(0.1)), (2, np.float32(0.1)), (4, np.float32(0.1)), (3, EMPTY_SCORE),
    ]  # fmt: skip
    assert reranker.compute_score([["q", "a"], ["q", "b"], ["q", "a"], ["r", "a"]]).tolist() == np.float32(
        [0.1, 0.2, 0.1, 0.3]
    ).tolist()
    assert reranker.backend.calls == [2, 3]


def test_a_document_below_the_lowest_shown_score_still_stands_before_one_without_text(by_length):
    reranker = Reranker.from_backend(Listed(by_length.backend.pair_encoder.tokenizer, [-20_000]))
    assert [result.document_index for result in reranker.rerank("q", ["", "a"])] == [1, 0]


def test_json_never_holds_nan(by_length):
    for value in (float("nan"), float("inf")):
        results = by_length.rerank("a", [{"text": "b", "metadata": {"page": [value]}}])
        with pytest.raises(ValueError, match="metadata"):
            results.to_json()


def test_a_score_that_is_no_number_is_an_error(by_length):
    by_length.backend.score = lambda pairs, size: np.full(len(pairs), np.nan, np.float32)
    with pytest.raises(ValueError, match="gave the score nan.*bf16 or fp32"):
        by_length.rerank("a", ["b"])


def test_results_become_dicts_json_and_frames(by_length):
    results = by_length.rerank("水?", [{"id": "x", "text": "水", "metadata": {"page": 1}}, "b c d e f"])
    assert json.loads(results.to_json()) == results.to_dict()
    assert "水" in results.to_json()
    first = results.to_dict()["results"][0]
    assert first["doc_id"] == 1 and set(first) == set(RerankResult.__dataclass_fields__)
    assert results.top_k(1) == [results[0]] == results[:1] and len(results) == 2
    with pytest.raises(KeyError, match="no document with doc_id 'y'"):
        results.get_score_by_docid("y")
    with pytest.raises(ValueError, match="k must be"):
        results.top_k(0)


def test_results_become_a_pandas_frame_also_when_there_are_none(by_length):
    pytest.importorskip("pandas")
    frame = by_length.rerank("a", ["b c d e", "f"]).to_pandas()
    assert list(frame["rank"]) == [1, 2] and list(frame["text"]) == ["b c d e", "f"]
    empty = by_length.rerank("a", []).to_pandas()
    assert len(empty) == 0 and list(empty.columns) == list(frame.columns)


def test_a_reranker_leaves_its_model_in_eval_mode(rerankers):
    rerankers["bert"].rerank("a", ["b"])
    assert not any(module.training for module in rerankers["bert"].backend.scorer.modules())
    assert torch.is_grad_enabled()
