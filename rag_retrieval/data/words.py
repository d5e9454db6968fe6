"""Cutting texts into the words that BM25 counts: English stems, or Chinese words.

The trap: which of the two is decided once for a whole corpus, from its first SAMPLE texts, and queries are cut in
the same way. An English query to a Chinese corpus is cut by jieba, too, and not stemmed.
"""

from collections.abc import Callable, Iterable
from itertools import islice

Words = Callable[[list[str]], list[list[str]]]

SAMPLE = 200  # texts of a corpus that decide its language
CHINESE_SHARE = 0.2  # of characters that are Han, from which on a corpus is cut as Chinese


def language_of(texts: Iterable[str]) -> str:
    """The key in `CUTTERS`, by the share of Han characters in the first SAMPLE of a corpus's texts."""
    han = characters = 0
    for text in islice(texts, SAMPLE):
        han += sum("\u4e00" <= character <= "\u9fff" for character in text)
        characters += len(text)
    return "chinese" if han > CHINESE_SHARE * characters else "english"


def english_words(texts: list[str]) -> list[list[str]]:
    """Stems in lower case without stop words."""
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    return bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)


def chinese_words(texts: list[str]) -> list[list[str]]:
    import jieba

    jieba.setLogLevel("WARNING")
    return [[word for word in jieba.cut(text.lower()) if word.strip()] for text in texts]


CUTTERS: dict[str, Words] = {"english": english_words, "chinese": chinese_words}
