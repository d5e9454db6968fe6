import numpy as np
import pytest
from mining_samples import corpus_of
from tiny_models import TEXTS

from rag_retrieval import Reranker
from rag_retrieval.infer.torch_backend import TorchBackend
from rag_retrieval.mining.miner import rerank
from rag_retrieval.mining.queries import Query
from rag_retrieval.models.options import LongDocumentOptions

TRUNCATE = LongDocumentOptions(long_document="truncate")


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_scores_are_those_of_compute_score(load_tiny, tmp_path, family):
    scorer = load_tiny(family)
    query = Query("what is a panda", np.array([2, 5]), [1.0, 1.0])
    reranker = Reranker.from_backend(TorchBackend(scorer))
    scores, of_positives = rerank(reranker, query, np.array([7, 0]), corpus_of(tmp_path, list(TEXTS)), TRUNCATE)
    expected = scorer.compute_score([(query.text, TEXTS[row]) for row in (7, 0, 2, 5)]).numpy()
    np.testing.assert_allclose(np.concatenate([scores, of_positives]), expected, atol=1e-5)
    assert len(scores) == 2


def test_long_documents_are_read_as_the_reranker_reads_them(load_tiny, tmp_path):
    reranker = Reranker.from_backend(TorchBackend(load_tiny("bert", max_length=48)))
    texts = [TEXTS[0], " ".join(TEXTS) * 2, TEXTS[1]]
    query, corpus = Query(TEXTS[2], np.array([0]), [1.0]), corpus_of(tmp_path, texts)
    for long_document in ("truncate", "max_slice", "mean_slice"):
        results = reranker.rerank(query.text, texts, long_document=long_document, overlap=5)
        expected = {result.document_index: result.score for result in results}
        options = LongDocumentOptions(long_document=long_document, overlap=5)
        scores, of_positives = rerank(reranker, query, np.array([1, 2]), corpus, options)
        assert [*of_positives, *scores] == pytest.approx([expected[place] for place in range(3)], abs=1e-5)


def test_no_candidates_are_no_scores(model_folders, tmp_path):
    query = Query("panda", np.array([0]), [1.0])
    reranker = Reranker(model_folders["bert"], device="cpu")
    scores, of_positives = rerank(reranker, query, np.array([], np.int64), corpus_of(tmp_path, ["a"]), TRUNCATE)
    assert len(scores) == 0 and len(of_positives) == 1


def test_nonfinite_scores_are_refused_and_not_compared_with_margins(load_tiny, tmp_path):
    scorer = load_tiny("bert")
    scorer.model.classifier.bias.data += float("nan")
    query = Query("panda", np.array([0]), [1.0])
    with pytest.raises(ValueError, match="query 'panda'.*nan"):
        reranker = Reranker.from_backend(TorchBackend(scorer))
        rerank(reranker, query, np.array([1]), corpus_of(tmp_path, ["a", "b"]), TRUNCATE)
