"""From (query, document) texts to scores, also where a document is longer than the model reads.

A document is tokenized once and its tokens are cut into slices, so a word has the same tokens in every slice; the text
that a format puts around a document stands around every slice. Nothing here imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rag_retrieval.infer.backend import Backend
from rag_retrieval.models.inputs import check_number
from rag_retrieval.models.options import LONG_DOCUMENT, OVERLAP
from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder, truncate
from rag_retrieval.models.text_scoring import Pairs, score_texts

Span = tuple[int, int]  # of a document's text, in characters, the end not included


@dataclass(frozen=True)
class EncodedDocument:
    """A document beside its query. pairs: one, or one for each slice. spans: of the slices; None for all of the text.
    truncated: whether a part of query or document is in none of them."""

    pairs: list[EncodedPair]
    spans: list[Span | None]
    truncated: bool


@dataclass(frozen=True)
class ScoredPair:
    """score: the logit. span: of the best slice; None where the document was read in one piece."""

    score: float
    span: Span | None
    truncated: bool


NO_TEXT = ScoredPair(-np.inf, None, False)  # of a document that has none, which the model does not read


@dataclass(frozen=True)
class DocumentTokens:
    """head, tail: ids of what the format puts before and after the text. content: all others; a token with characters
    of both counts as content. offsets: of content, in characters from where head's text begins; the document's own
    are those from `first` to before `end`."""

    head: list[int]
    content: list[int]
    tail: list[int]
    offsets: list[Span]
    first: int
    end: int

    def span(self, start: int, stop: int) -> Span:
        """The characters of the document that content[start:stop] stands for."""
        begin, end = self.offsets[start][0], self.offsets[min(stop, len(self.offsets)) - 1][1]
        return max(begin, self.first) - self.first, min(end, self.end) - self.first


@dataclass(frozen=True)
class PassageEncoder:
    """Encodes texts for one model, long documents as `Reranker.rerank` describes `long_document` and `overlap`.

    Raises ValueError for an unknown `long_document` and a negative `overlap`.
    """

    encoder: PairEncoder
    long_document: str
    overlap: int = OVERLAP

    def __post_init__(self):
        if self.long_document not in LONG_DOCUMENT:
            names = ", ".join(map(repr, LONG_DOCUMENT))
            raise ValueError(f"long_document must be one of {names}; found {self.long_document!r}")
        check_number("overlap", self.overlap, 0, "tokens")

    def encode(self, pairs: Pairs, query_ids: dict[str, np.ndarray] | None = None) -> list[EncodedDocument]:
        """In the order given; a query that repeats is tokenized once. query_ids: those of queries that are known, which
        new ones are added to. ValueError where slices have no room."""
        encoder = self.encoder
        query_ids = {} if query_ids is None else query_ids
        new = [query for query in dict.fromkeys(query for query, _ in pairs) if query not in query_ids]
        query_ids.update(zip(new, encoder.text_ids(new, "query"), strict=True))
        documents = encoder.text_ids([document for _, document in pairs], "document")
        encoded = []
        for (query, document), document_ids in zip(pairs, documents, strict=True):
            if self.long_document != "truncate" and not encoder.fits(query_ids[query], document_ids):
                encoded.append(self._slices(query_ids[query], document))
            else:
                pair = encoder.join(query_ids[query], document_ids)
                encoded.append(EncodedDocument([pair], [None], pair.truncated))
        return encoded

    def combine(self, documents: Sequence[EncodedDocument], scores: np.ndarray) -> list[ScoredPair]:
        """scores: of all pairs of the documents, [pairs]. The first of equal slices counts as the best. Raises
        ValueError for a score that is not finite."""
        if not np.isfinite(scores).all():
            raise ValueError(
                f"the model gave the score {scores[~np.isfinite(scores)][0]}, which is no number; in fp16 a model may "
                "overflow: use bf16 or fp32"
            )
        combined, start = [], 0
        for document in documents:
            values = scores[start : start + len(document.pairs)]
            start += len(document.pairs)
            best = int(values.argmax())
            score = values.mean(dtype=np.float64) if self.long_document == "mean_slice" else values[best]
            combined.append(ScoredPair(float(score), document.spans[best], document.truncated))
        return combined

    def _slices(self, query_ids: np.ndarray, document: str) -> EncodedDocument:
        encoder = self.encoder
        template = encoder.template
        query_keep, room = encoder.room_for_slices(len(query_ids))
        query = truncate(query_ids, query_keep, template.query_end)
        tokens, end = document_tokens(encoder, document), list(template.document_end)
        room -= len(tokens.head) + max(len(end), len(tokens.tail))
        if room < 1:
            raise ValueError(
                f"max_length {encoder.max_length} leaves no room for slices beside query and formats; use a larger "
                'max_length or long_document="truncate"'
            )
        count = len(tokens.content)
        starts = slice_starts(count, room, self.overlap)
        left_out = self.long_document == "first_slice" and len(starts) > 1
        pairs, spans = [], []
        for start in starts[:1] if left_out else starts:
            tail = tokens.tail if start + room >= count else end
            pairs.append(encoder.join(query, [*tokens.head, *tokens.content[start : start + room], *tail]))
            spans.append(tokens.span(start, start + room) if count > room else None)
        return EncodedDocument(pairs, spans, left_out or query_keep < len(query_ids))


def score_pairs(backend: Backend, encoder: PassageEncoder, pairs: Pairs, batch_size: int) -> list[ScoredPair]:
    """In the order given; equal pairs get the same result. Raises ValueError for a score that is not finite."""

    def score(documents: Sequence[EncodedDocument]) -> list[ScoredPair]:
        scores = backend.score([pair for document in documents for pair in document.pairs], batch_size)
        return encoder.combine(documents, scores)

    return score_texts(pairs, encoder.encode, score)


def slice_starts(tokens: int, room: int, overlap: int) -> list[int]:
    """Where slices of `room` tokens begin, so that they hold all of `tokens`; the last is as long as the others.

    Neighbours have `overlap` tokens in common, at most half a slice, and the last two more where that fits better.
    """
    if tokens <= room:
        return [0]
    return [*range(0, tokens - room, room - min(overlap, room // 2)), tokens - room]


def document_tokens(encoder: PairEncoder, document: str) -> DocumentTokens:
    """The ids that `encoder.text_ids` gives, split by the characters that they stand for."""
    ids, offsets = encoder.ids_and_offsets(document, "document")
    first = len(encoder.template.anchor + encoder.template.before_document)
    end = first + len(document)
    # from both ends, since a document may have a million tokens
    head = next((place for place, (_, stop) in enumerate(offsets) if stop > first), len(ids))
    tail = next((place + 1 for place in range(len(ids) - 1, head - 1, -1) if offsets[place][0] < end), head)
    return DocumentTokens(ids[:head], ids[head:tail], ids[tail:], offsets[head:tail], first, end)
