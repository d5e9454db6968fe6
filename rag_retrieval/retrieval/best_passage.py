"""The part of a text in which most of a query's words stand: what a page marks of a document.

Nothing here imports torch.
"""

import re
from collections import deque
from collections.abc import Iterator, Mapping

from rag_retrieval.data.documents import SENTENCE_END
from rag_retrieval.data.words import AUTO, WordFinder, tokenize
from rag_retrieval.retrieval.bm25 import Bm25Search

LONGEST = 200  # characters of a passage; a text without more has none
PART = 50  # characters of a part of a sentence that is longer than LONGEST

_SENTENCE_BREAK = re.compile(rf"(?:{SENTENCE_END.pattern})+[\"'”’」』）)\]]*|\n\s*\n|\Z")
_PART = re.compile(rf"(?s).{{1,{PART}}}(?:(?<=[\s,;:，、；：])|\Z)|.{{1,{PART}}}")


class QueryWords:
    """weights: of each different word of a query, above 0. language: of `words.tokenize`."""

    def __init__(self, weights: Mapping[str, float], language: str = AUTO):
        self.weights, self.finder = weights, WordFinder(weights, language)

    def best_passage(self, text: str) -> tuple[int, int] | None:
        """(start, end), in characters, of sentences one after another, together at most LONGEST characters, whose
        different words have the largest sum of weights; of equal sums the first. The first and the last of these
        sentences add to the sum. A sentence that is longer than LONGEST counts as several.

        None where the text has at most LONGEST characters, or no word of the query. Takes time linear in the text.
        """
        if len(text) <= LONGEST or not self.weights:
            return None
        best, highest = None, 0.0
        window: deque[tuple[int, set[str]]] = deque()  # start and words of the sentences that have words
        counts = dict.fromkeys(self.weights, 0)  # sentences of the window with each word
        for start, end in _sentences(text):
            words = self.finder.find(text[start:end])
            if not words:
                continue
            window.append((start, words))
            for word in words:
                counts[word] += 1
            while end - window[0][0] > LONGEST or all(counts[word] > 1 for word in window[0][1]):
                for word in window.popleft()[1]:
                    counts[word] -= 1
            total = sum(weight for word, weight in self.weights.items() if counts[word])
            if total > highest:
                best, highest = (window[0][0], end), total
        return best


def query_words(query: str, bm25: Bm25Search | None) -> QueryWords:
    """With their idf in an index's search by words; without such a search each word weighs 1."""
    if bm25 is not None:
        return QueryWords(bm25.weights(query), bm25.language)
    try:
        return QueryWords(dict.fromkeys(tokenize([query])[0], 1.0))
    except ImportError:  # an index of vectors alone is searched without the packages that make words
        return QueryWords({})


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of all, each at most LONGEST characters: parts of a longer one, which end at a space or comma where
    there is one. None begins or ends with a space."""
    begin = 0
    for sentence_break in _SENTENCE_BREAK.finditer(text):
        found = [(begin, sentence_break.end())]
        if sentence_break.end() - begin > LONGEST:
            found = map(re.Match.span, _PART.finditer(text, *found[0]))
        for start, end in found:
            stripped = text[start:end].strip()
            if stripped:
                start += text[start:end].index(stripped[0])
                yield start, start + len(stripped)
        begin = sentence_break.end()
