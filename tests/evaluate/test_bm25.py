import pytest

from rag_retrieval.evaluate.bm25 import bm25_run

pytest.importorskip("bm25s")


def test_a_chinese_query_finds_the_document_with_its_word():
    pytest.importorskip("jieba")
    documents = {"a": "今天天气很好", "b": "北京是中国的首都", "c": "水在一百度时沸腾"}
    assert list(bm25_run(documents, {"q": "中国首都在哪里"}, None, 10)[0]["q"]) == ["b"]


def test_scores_follow_the_formula_and_equal_ones_keep_the_corpus_order():
    pytest.importorskip("Stemmer")
    documents = {"b": "red apple", "a": "red apple", "c": "green pear"}
    run = bm25_run(documents, {"q": "apples", "none": "zebra"}, None, 10)[0]
    # Lucene's form: idf ln(1 + (3 - 2 + .5) / (2 + .5)), frequency 1 / (1 + 1.2 * (1 - .75 + .75 * 2 / 2))
    assert run["q"] == pytest.approx({"b": 0.470004 / 2.2, "a": 0.470004 / 2.2}, rel=1e-5)
    assert list(run["q"]) == ["b", "a"] and run["none"] == {}
    assert list(bm25_run(documents, {"q": "apples"}, None, 1)[0]["q"]) == ["b"]


def test_documents_without_a_word_are_found_by_nothing_and_a_pool_of_them_is_ranked_whole():
    pytest.importorskip("Stemmer")
    documents = {"a": "", "b": "b"}  # single letters are no words to bm25s
    assert bm25_run(documents, {"q": "apples"}, None, 10)[0] == {"q": {}}
    assert bm25_run(documents, {"q": "apples"}, {"q": ["b", "a"]}, 10)[0] == {"q": {"a": 0.0, "b": 0.0}}
