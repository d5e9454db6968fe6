"""The words of texts that BM25 counts, in every script.

A text is normalised (NFKC and case folding, so that the two ways to write "é" are one), then each word goes by its own
letters, whatever the rest of the text or of the corpus is written in:

    Latin, Cyrillic, Greek, Arabic, Devanagari, ...   words between spaces, as stems and without stop words
    Han                                               words by jieba
    kana, Hangul, Thai, Lao, Khmer, Burmese, ...      overlapping pairs of characters (with their marks)

A word of one letter counts ("C", "C++", "C#"), but not the letter after an apostrophe ("it's"). Which language Latin
letters stand for cannot be seen in a word: they are taken as English unless `language` names another one.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from itertools import pairwise

import regex

AUTO, PLAIN = "auto", "plain"
SCRIPT_LANGUAGES = {  # script to the language whose stemmer its words get
    "Latin": "english",
    "Cyrillic": "russian",
    "Greek": "greek",
    "Arabic": "arabic",
    "Armenian": "armenian",
    "Devanagari": "hindi",
    "Tamil": "tamil",
}
WORDS_VERSION = 2  # raise it whenever the same text would give other words
CACHED_WORDS = 1 << 17  # distinct words whose stems are kept in memory

# \w of `regex` includes combining marks and joiners, without which a Hindi word falls apart
_WORD = regex.compile(r"(?:(?<!\w['’])\w+|\w\w+)(?:\+\+|#(?!\w))?")
# Line_Break=SA: the scripts of South East Asia that put no space between words
UNSPACED = r"[\p{Line_Break=SA}\p{Hiragana}\p{Katakana}\p{Hangul}ー]\p{M}*"
_STRETCH = regex.compile(rf"(?P<chinese>\p{{Han}}+)|(?P<bigrams>(?:{UNSPACED})+)|(?:(?!\p{{Han}}|{UNSPACED}).)+")
_SCRIPTS = [(regex.compile(rf"\p{{{script}}}"), language) for script, language in SCRIPT_LANGUAGES.items()]


def tokenize(texts: Sequence[str], language: str = AUTO) -> list[list[str]]:
    """The words of each text, in order, repeated ones too; none for a text without letters and digits.

    language: of words between spaces: a Snowball stemmer ("german"), "auto" (by the script of each word, Latin is
    English) or "plain" (words as they are). Raises ValueError for another name.
    """
    check_language(language)
    return [[part for word in _WORD.findall(_normalised(text)) for part in _parts(word, language)] for text in texts]


class WordFinder:
    """Which of some words, as `tokenize` makes them, occur in a text; `tokenize` of the text may take several times as
    long.

    A word of a script without spaces occurs wherever its characters stand together, also inside what jieba takes for a
    longer word. language: see `tokenize`.
    """

    def __init__(self, words: Iterable[str], language: str = AUTO):
        self.language = language
        self.spaced, self.unspaced = set(), set()
        for word in words:
            (self.unspaced if _STRETCH.match(word).lastgroup else self.spaced).add(word)

    def find(self, text: str) -> set[str]:
        text = _normalised(text)
        found = {word for word in self.unspaced if word in text}
        for word in _WORD.findall(text) if self.spaced else ():
            for stretch in [word] if word.isascii() else _spaced_stretches(word):
                found.update([part for part in _parts(stretch, self.language) if part in self.spaced])
        return found


def _spaced_stretches(word: str) -> list[str]:
    return [match[0] for match in _STRETCH.finditer(word) if not match.lastgroup]


def _normalised(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def check_language(language: str) -> None:
    import Stemmer

    if language not in (AUTO, PLAIN, *Stemmer.algorithms()):
        expected = ", ".join((AUTO, PLAIN, *Stemmer.algorithms()))
        raise ValueError(f"there is no stemmer for the language {language!r}; expected one of {expected}.")


def describe_words(vocabulary: Iterable[str], language: str = AUTO) -> str:
    """How many of these distinct words were made in which way: `english 7,034, chinese 12`, most frequent first."""
    ways = Counter(_way(word, language) for word in vocabulary)
    by_count = sorted(ways.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{way} {count:,}" for way, count in by_count) or "no words"


def _way(word: str, language: str) -> str:
    """"chinese", "bigrams", a language, or "other" for a script without a stemmer."""
    if word.isascii() and language == AUTO:
        return SCRIPT_LANGUAGES["Latin"]
    way = _STRETCH.match(word).lastgroup
    if way or language != AUTO:
        return way or language
    return next((stemmer for script, stemmer in _SCRIPTS if script.search(word)), "other")


@lru_cache(CACHED_WORDS)
def _parts(word: str, language: str) -> tuple[str, ...]:
    """What is counted of a normalised word: its stem, or nothing for a stop word, or the words of its stretches."""
    parts = []
    for stretch in [word] if word.isascii() else (match[0] for match in _STRETCH.finditer(word)):
        way = _way(stretch, language)
        if way == "chinese":
            parts += _jieba().cut(stretch)
        elif way == "bigrams":
            characters = regex.findall(r"\X", stretch)
            parts += list(map("".join, pairwise(characters))) or characters
        elif way in ("other", PLAIN):
            parts.append(stretch)
        elif stretch not in _stop_words(way):
            parts.append(_stemmer(way).stemWord(stretch))
    return tuple(parts)


@cache
def _stemmer(language: str):
    import Stemmer

    return Stemmer.Stemmer(language)


@cache
def _stop_words(language: str) -> frozenset[str]:
    """Empty for a language that bm25s has no list for."""
    from bm25s import stopwords

    name = "EN" if language == "english" else language.upper()
    return frozenset(getattr(stopwords, f"STOPWORDS_{name}", ()))


@cache
def _jieba():
    import jieba

    jieba.setLogLevel("WARNING")
    return jieba
