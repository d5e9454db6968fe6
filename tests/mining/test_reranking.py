import numpy as np
import pytest
from mining_samples import corpus_of
from tiny_models import TEXTS, tiny_bert

from rag_retrieval import CrossEncoder, LLMDecoder
from rag_retrieval.mining.queries import Query
from rag_retrieval.mining.reranking import load_reranker, rerank


@pytest.mark.parametrize("family, kind", [("bert", CrossEncoder), ("qwen2", LLMDecoder)])
def test_scores_are_those_of_compute_score(model_folders, load_tiny, tmp_path, family, kind):
    load_tiny(family).save_pretrained(tmp_path / "model")
    scorer = load_reranker(str(tmp_path / "model"), "cpu")
    assert isinstance(scorer, kind)
    query = Query("what is a panda", np.array([2, 5]), [1.0, 1.0])
    scores, of_positives = rerank(scorer, query, np.array([7, 0]), corpus_of(tmp_path, list(TEXTS)))
    expected = scorer.compute_score([(query.text, TEXTS[row]) for row in (7, 0, 2, 5)]).numpy()
    np.testing.assert_allclose(np.concatenate([scores, of_positives]), expected, atol=1e-5)
    assert len(scores) == 2


def test_no_candidates_are_no_scores(model_folders, tmp_path):
    query = Query("panda", np.array([0]), [1.0])
    scorer = load_reranker(model_folders["bert"], "cpu")
    scores, of_positives = rerank(scorer, query, np.array([], np.int64), corpus_of(tmp_path, ["a"]))
    assert len(scores) == 0 and len(of_positives) == 1


def test_a_model_without_a_trained_head_is_a_mistake(tmp_path):
    folder = tiny_bert(tmp_path / "base")
    with pytest.raises(ValueError, match="without a trained score head; give a trained reranker"):
        load_reranker(folder, "cpu")


def test_scores_that_are_not_finite_are_refused_and_not_taken_for_a_margin(load_tiny, tmp_path):
    scorer = load_tiny("bert")
    scorer.model.classifier.bias.data += float("nan")
    query = Query("panda", np.array([0]), [1.0])
    with pytest.raises(ValueError, match="gave the score nan to the query 'panda'; its weights are damaged"):
        rerank(scorer, query, np.array([1]), corpus_of(tmp_path, ["a", "b"]))
