"""The best passage of a text by a query's words, against passages chosen by hand and a slow search of all."""

import sys
from itertools import combinations_with_replacement

import numpy as np
import pytest

from rag_retrieval.retrieval.best_passage import LONGEST, QueryWords, query_words

pytest.importorskip("bm25s")
pytest.importorskip("Stemmer")
pytest.importorskip("jieba")

FILLER = "The river runs by the station, and the water is full of light. " * 5
FILLER_ZH = "河水从车站旁边流过，天空很蓝！" * 15


def passage(query, text):
    """The words of the best passage of a query whose words weigh 1, or None."""
    found = query_words(query, None).best_passage(text)
    return found and text[slice(*found)]


def test_the_sentence_with_the_words_is_found_whatever_their_endings():
    sentence = "(Lemurs are SLEEPING at lagoons!)"
    assert passage("Where does a lemur sleep? lagoon", f"{FILLER}{sentence} {FILLER}") == sentence


def test_sentences_next_to_each_other_are_joined_where_that_adds_a_word():
    text = f"{FILLER}The lemur sleeps. It is warm here.\n\nThe lagoon is blue. {FILLER}"
    assert passage("lemur lagoon", text) == "The lemur sleeps. It is warm here.\n\nThe lagoon is blue."
    assert passage("lemur", text) == "The lemur sleeps." and passage("warm lagoon", text).startswith("It is warm")
    assert passage("lemur lagoon", f"The lemur sleeps. {FILLER}The lagoon is blue.") == "The lemur sleeps."


def test_a_word_counts_once_and_no_sentence_is_there_in_vain():
    assert passage("cat dog", f"Cats, cats, cats. Cats. {FILLER}A cat and a dog.") == "A cat and a dog."
    assert passage("cat dog", f"Cats sleep. It rains. A cat and a dog. {FILLER}") == "A cat and a dog."


def test_of_equal_passages_the_first_is_taken():
    text = f"{FILLER}Dogs bark. {FILLER}Cats sleep. Cats eat. {FILLER}Dogs run."
    assert passage("cat dog", text) == "Dogs bark." and passage("cat", text) == "Cats sleep."


def test_a_rare_word_outweighs_two_that_many_documents_have():
    words = QueryWords({"lemur": 3.0, "cat": 1.0, "dog": 1.5})
    text = f"Cats and dogs. {FILLER}A lemur. {FILLER}"
    start = len("Cats and dogs. ") + len(FILLER)
    assert words.best_passage(text) == (start, start + len("A lemur."))


def test_chinese_is_found_sentence_by_sentence():
    sentence = "大熊猫吃竹子。"
    assert passage("大熊猫喜欢什么竹子？", FILLER_ZH + sentence + FILLER_ZH) == sentence
    assert passage("大学", FILLER_ZH + "北京大学很大。" + FILLER_ZH) == "北京大学很大。"
    assert passage("python 排序", FILLER_ZH + "用Ｐｙｔｈｏｎ排序！" + FILLER_ZH) == "用Ｐｙｔｈｏｎ排序！"


def test_places_are_code_points_of_the_text_as_it_is():
    before = "😀ﬁ㍿e\u0301 " * 60 + ". "  # normalised, they have other lengths
    start = len(before)
    assert query_words("straße", None).best_passage(f"{before}STRASSE 😀. {FILLER}") == (start, start + 10)


def test_of_a_long_sentence_a_part_is_found_and_cut_between_words():
    text = "river " * 100 + "lemur lagoon " + "station " * 100
    found = passage("lemur lagoon", text)
    assert found in text and {"lemur", "lagoon"} <= set(found.split()) <= {"river", "lemur", "lagoon", "station"}
    found = passage("竹子", "河" * 333 + "竹子" + "水" * 333)
    assert "竹子" in found and len(found) <= LONGEST


@pytest.mark.parametrize("text", ["The lemur sleeps. " * 11, "", FILLER, "。" * 1000, " \n" * 1000])
def test_nothing_is_found_in_a_short_text_and_where_no_word_is(text):
    assert passage("lemur", text) is None and passage("?", f"{text} lemur. {FILLER}") is None


@pytest.mark.parametrize("filler", [" ", "\n", "\n ", "a ,"])
def test_a_megabyte_takes_time_that_is_linear_in_it(filler):
    text = filler * (1_000_000 // len(filler)) + "A lemur."
    assert passage("lemur", text).endswith("A lemur.")


@pytest.mark.parametrize("seed", range(20))
def test_no_other_run_of_sentences_has_a_larger_sum(seed):
    draw = np.random.default_rng(seed)
    weights = dict(zip(["cat", "dog", "lemur", "river"], draw.integers(1, 9, 4).tolist(), strict=True))
    sentences = [" ".join(draw.choice([*weights, *["xyzzy"] * 12], 8)) + "." for _ in range(40)]
    starts = np.cumsum([0, *(len(sentence) + 1 for sentence in sentences)])
    runs = [(starts[i], starts[j] + len(sentences[j])) for i, j in combinations_with_replacement(range(40), 2)]
    text = " ".join(sentences)

    def sum_of(start, end):
        return sum(weight for word, weight in weights.items() if word in text[start:end])

    start, end = QueryWords(weights).best_passage(text)
    assert end - start <= LONGEST and sum_of(start, end) == max(sum_of(*run) for run in runs if run[1] - run[0] <= 200)


def test_without_the_packages_for_words_nothing_is_marked(monkeypatch):
    monkeypatch.setitem(sys.modules, "Stemmer", None)
    assert query_words("lemur", None).best_passage(f"A lemur. {FILLER}") is None
