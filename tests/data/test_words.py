import pytest

from rag_retrieval.data.words import SAMPLE, chinese_words, english_words, language_of


def test_a_corpus_is_chinese_from_a_fifth_of_han_characters_on():
    assert language_of(["熊猫吃竹子"]) == "chinese"
    assert language_of(["abcd", "猫"]) == "english", "exactly a fifth"
    assert language_of(["abc", "猫"]) == "chinese"
    assert language_of([""]) == "english"


def test_the_first_texts_alone_decide_the_language():
    assert language_of(["熊猫"] * SAMPLE + ["an English text, much longer"] * SAMPLE) == "chinese"
    assert language_of(["panda"] * SAMPLE + ["熊猫吃竹子" * 9]) == "english"


def test_english_words_are_stems_in_lower_case_without_stop_words():
    pytest.importorskip("bm25s")
    pytest.importorskip("Stemmer")
    assert english_words(["The Pandas are EATING bamboo", ""]) == [["panda", "eat", "bamboo"], []]


def test_chinese_text_is_cut_into_words():
    pytest.importorskip("jieba")
    assert chinese_words(["大熊猫吃竹子 Panda"]) == [["大熊猫", "吃", "竹子", "panda"]]
