import unicodedata

import pytest

from rag_retrieval.data.words import describe_words, tokenize

pytest.importorskip("bm25s")
pytest.importorskip("Stemmer")
pytest.importorskip("jieba")


def words(text, language="auto"):
    return tokenize([text], language)[0]


def shared(query, document):
    """Words of the query that find the document."""
    return set(words(query)) & set(words(document))


def test_english_words_are_stems_in_small_letters_without_stop_words():
    assert tokenize(["The Pandas are EATING bamboo", ""]) == [["panda", "eat", "bamboo"], []]


def test_a_query_finds_a_document_in_its_own_script_whatever_it_is():
    for query, document in (
        ("पांडा क्या खाता है", "पांडा बांस खाता है"),
        ("Что едят панды", "Панда ест бамбук"),
        ("ماذا تأكل الباندا", "الباندا تأكل الخيزران"),
        ("熊猫吃什么", "大熊猫主要吃竹子"),
        ("パンダは何を食べる", "パンダは笹を食べます"),
        ("แพนด้ากินอะไร", "แพนด้ากินไผ่"),
        ("ຫມີແພນດ້າກິນ", "ແພນດ້າກິນໄມ້ໄຜ່"),
        ("ខ្លាឃ្មុំផេនដាស៊ីអ្វី", "ផេនដាស៊ីឫស្សី"),
        ("ပန်ဒါဘာစားသလဲ", "ပန်ဒါသည်ဝါးစားသည်"),
        ("판다는 무엇을 먹나요", "판다가 대나무를 먹는다"),
    ):
        assert shared(query, document), (query, words(query), words(document))


def test_each_word_is_tokenized_by_its_own_script():
    english = "a long English text about many things, with one quotation: "
    assert words(english + "大熊猫吃竹子")[-3:] == words("大熊猫吃竹子") == ["大熊猫", "吃", "竹子"]
    assert words("大熊猫 eating Pandas") == ["大熊猫", "eat", "panda"]


def test_both_ways_to_write_a_character_are_one_word():
    composed, decomposed = (unicodedata.normalize(form, "Café über Straße") for form in ("NFC", "NFD"))
    assert composed != decomposed and words(composed) == words(decomposed)
    assert words("ＡＢＣ１２") == words("abc12"), "full width"
    assert words("STRASSE") == words("Straße")


def test_words_of_one_letter_count_but_not_the_ending_after_an_apostrophe():
    assert words("C, C++ and C#: it's Mach's") == ["c", "c++", "c#", "mach"]
    assert words("file#part l'eau") == ["file", "part", "l", "eau"]


def test_scripts_without_spaces_give_overlapping_pairs_of_characters_with_their_marks():
    assert words("パンダ") == ["パン", "ンダ"]
    assert words("กินนี้") == ["กิน", "นนี้"], "a vowel sign or a tone mark stays with its letter"
    assert words("물") == ["물"]


def test_the_language_can_be_set_and_must_exist():
    assert words("Die Häuser und Katzen", "german") == ["haus", "katz"]
    assert words("The Pandas", "plain") == ["the", "pandas"]
    with pytest.raises(ValueError, match="'klingon'.*auto.*german"):
        words("x", "klingon")


def test_the_description_counts_words_by_how_they_were_made():
    vocabulary = {word for text in ("pandas eat", "大熊猫吃竹子", "パンダ", "панда", "ქართული") for word in words(text)}
    assert describe_words(vocabulary) == "chinese 3, bigrams 2, english 2, other 1, russian 1"
    assert describe_words(vocabulary, "plain").startswith("plain 4, ")
    assert describe_words([]) == "no words"


def test_texts_without_letters_have_no_words():
    assert tokenize(["", "?!", " \n"]) == [[], [], []]
