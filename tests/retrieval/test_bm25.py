import bm25s
import numpy as np
import pytest
from mining_samples import corpus_of

from rag_retrieval.data.records import DataError
from rag_retrieval.data.words import tokenize
from rag_retrieval.retrieval import bm25
from rag_retrieval.retrieval.bm25 import Bm25Search, bm25_run, build_bm25

WORDS = ["panda", "bamboo", "tiger", "forest", "river", "eats", "sleeps", "runs"]


def random_texts(count, seed=0):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(0, 12))) for _ in range(count)]


def found_by(search, text, judged=(), depth=10):
    return search.search([text], [np.array(judged, np.int64)], depth)[0]


def built(tmp_path, texts):
    folder = tmp_path / "bm25"
    folder.mkdir()
    build_bm25(corpus_of(tmp_path, texts), folder)
    return folder


@pytest.mark.parametrize("postings", [7, 1 << 22])
def test_the_index_is_the_one_that_bm25s_builds(tmp_path, monkeypatch, postings):
    monkeypatch.setattr(bm25, "DOCUMENTS", 13)
    monkeypatch.setattr(bm25, "POSTINGS", postings)
    texts = random_texts(100)
    search = Bm25Search(built(tmp_path, texts))
    theirs = bm25s.BM25(k1=1.2, b=0.75)
    theirs.index(tokenize(texts), show_progress=False)
    assert isinstance(search.index.scores["data"], np.memmap)
    for word in search.index.vocab_dict:
        ours, reference = column(search.index, word), column(theirs, word)
        assert ours[0] == reference[0]
        np.testing.assert_allclose(ours[1], reference[1], rtol=1e-6)


def column(index, word):
    """(documents, scores) of a word."""
    number, ends = index.vocab_dict[word], index.scores["indptr"]
    part = slice(ends[number], ends[number + 1])
    return index.scores["indices"][part].tolist(), index.scores["data"][part]


def test_candidates_have_the_scores_of_the_formula_and_positives_theirs(tmp_path):
    search = Bm25Search(built(tmp_path, ["panda panda bamboo", "panda river", "tiger river forest", ""]))
    found = found_by(search, "panda", (1, 2))
    # N = 4, n = 2, L = 8 / 4; the word panda occurs twice in 3 words and once in 2
    weight = np.log(1 + 2.5 / 2.5)
    expected = [weight * 2 / (2 + 1.2 * (0.25 + 0.75 * 3 / 2)), weight * 1 / (1 + 1.2 * (0.25 + 0.75 * 2 / 2))]
    assert found.rows.tolist() == [0, 1]
    assert found.scores.tolist() == pytest.approx(expected)
    assert found.judged_scores.tolist() == pytest.approx([expected[1], 0])


def test_the_words_of_a_query_weigh_their_idf_and_unknown_ones_nothing(tmp_path):
    search = Bm25Search(built(tmp_path, ["panda panda bamboo", "panda river", "tiger river forest", ""]))
    found = search.weights("The river tigers, the tiger and a zebra")
    assert found == pytest.approx({"river": np.log(1 + 2.5 / 2.5), "tiger": np.log(1 + 3.5 / 1.5)})
    assert search.weights("zebra?") == {}


def test_a_query_without_a_known_word_has_no_candidates(tmp_path):
    search = Bm25Search(built(tmp_path, ["panda", "tiger"]))
    for text in ("zebra", "the", "?"):
        assert found_by(search, text).rows.tolist() == []


def test_chinese_documents_are_found_by_their_words(tmp_path):
    search = Bm25Search(built(tmp_path, ["北京是中国的首都", "大熊猫主要吃竹子", "水在一百度时沸腾"]))
    assert found_by(search, "熊猫和竹子").rows.tolist() == [1]


def test_a_column_has_its_room_on_the_disk_before_it_is_written(tmp_path):
    """Else a full disk would end the process by SIGBUS."""
    column = bm25._mapped_column(tmp_path / "c.npy", np.float32, 100_000)
    assert column.shape == (100_000,) and (tmp_path / "c.npy").stat().st_blocks * 512 >= 400_000


def test_a_corpus_without_words_is_refused(tmp_path):
    with pytest.raises(DataError, match="no document of the corpus has a word"):
        built(tmp_path, ["?", ""])


def test_a_chinese_query_finds_the_document_with_its_word():
    documents = {"a": "今天天气很好", "b": "北京是中国的首都", "c": "水在一百度时沸腾"}
    assert list(bm25_run(documents, {"q": "中国首都在哪里"}, None, 10)[0]["q"]) == ["b"]


def test_scores_follow_the_formula_and_equal_ones_keep_the_corpus_order():
    documents = {"b": "red apple", "a": "red apple", "c": "green pear"}
    run = bm25_run(documents, {"q": "apples", "none": "zebra"}, None, 10)[0]
    # Lucene's form: idf ln(1 + (3 - 2 + .5) / (2 + .5)), frequency 1 / (1 + 1.2 * (1 - .75 + .75 * 2 / 2))
    assert run["q"] == pytest.approx({"b": 0.470004 / 2.2, "a": 0.470004 / 2.2}, rel=1e-5)
    assert list(run["q"]) == ["b", "a"] and run["none"] == {}
    assert list(bm25_run(documents, {"q": "apples"}, None, 1)[0]["q"]) == ["b"]


def test_documents_without_words_are_never_found_but_ranked_in_a_pool():
    documents = {"a": "", "b": "b"}  # single letters are no words to bm25s
    assert bm25_run(documents, {"q": "apples"}, None, 10)[0] == {"q": {}}
    assert bm25_run(documents, {"q": "apples"}, {"q": ["b", "a"]}, 10)[0] == {"q": {"a": 0.0, "b": 0.0}}
