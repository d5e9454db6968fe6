"""Long documents: cut at token boundaries into slices that overlap, each read with the whole query.

What a reader would get wrong: slices are runs of the document's own tokens, not texts tokenized anew, so a word has
the same tokens in every slice; but the text that a format puts around a document stands around every slice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder, context_tokens, truncate

LONG_DOCUMENT = ("max_slice", "mean_slice", "first_slice", "truncate")
LONGEST_QUERY = 0.75  # of the tokens that the fixed parts leave; a longer query is cut to this where slices are made


@dataclass(frozen=True)
class Slice:
    """One encoded pair. span: of the document's text, in characters, the end not included; None for all of it."""

    pair: EncodedPair
    span: tuple[int, int] | None


@dataclass(frozen=True)
class Reading:
    """What is read of one query and document: at least one slice. truncated: whether some of it is not."""

    slices: list[Slice]
    truncated: bool


@dataclass(frozen=True)
class DocumentTokens:
    """head, tail: ids of what the format puts before and after the text. content: all others; a token with characters
    of both counts as content. offsets: of content, in characters from where head's text begins; the document's own
    are those from `first` to before `end`."""

    head: list[int]
    content: list[int]
    tail: list[int]
    offsets: list[tuple[int, int]]
    first: int
    end: int

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The characters of the document that content[start:stop] stands for, the end not included."""
        begin, end = self.offsets[start][0], self.offsets[min(stop, len(self.offsets)) - 1][1]
        return max(begin, self.first) - self.first, min(end, self.end) - self.first


@dataclass(frozen=True)
class Reader:
    """Encodes (query, document) pairs, each as one Reading.

    overlap: tokens that a slice has in common with the one before, at most half of it. Raises ValueError where the
    formats leave a slice no room.
    """

    encoder: PairEncoder
    long_document: str
    overlap: int

    def read(self, pairs: Sequence[tuple[str, str]]) -> list[Reading]:
        """In the order given. A query that repeats is tokenized once."""
        encoder = self.encoder
        queries = list(dict.fromkeys(query for query, _ in pairs))
        ids_of = dict(zip(queries, encoder.query_ids(queries), strict=True))
        documents = encoder.document_ids([document for _, document in pairs])
        return [
            self._read_pair(ids_of[query], ids, document)
            for (query, document), ids in zip(pairs, documents, strict=True)
        ]

    def _read_pair(self, query_ids: list[int], document_ids: list[int], document: str) -> Reading:
        if self.long_document != "truncate" and len(query_ids) + len(document_ids) > self.encoder.budget:
            return self._read_slices(query_ids, document)
        pair = self.encoder.join(query_ids, document_ids)
        return Reading([Slice(pair, None)], pair.truncated)

    def _read_slices(self, query_ids: list[int], document: str) -> Reading:
        keep = min(len(query_ids), int(self.encoder.budget * LONGEST_QUERY))
        tokens = document_tokens(self.encoder, document)
        slices = [
            Slice(self.encoder.join(truncate(query_ids, keep, self.encoder.template.query_end), ids), span)
            for ids, span in self._cut(tokens, self.encoder.budget - keep)
        ]
        left_out = self.long_document == "first_slice" and len(slices) > 1
        return Reading(slices[:1] if left_out else slices, left_out or keep < len(query_ids))

    def _cut(self, tokens: DocumentTokens, budget: int) -> list[tuple[list[int], tuple[int, int] | None]]:
        """Ids of at most `budget` tokens for each slice, with their span."""
        end = list(self.encoder.template.document_end)
        room = budget - len(tokens.head) - max(len(end), len(tokens.tail))
        if room < 1:
            raise ValueError(
                f"max_length {self.encoder.max_length} leaves no room for slices beside query and formats; use a "
                'larger max_length or long_document="truncate"'
            )
        count = len(tokens.content)
        return [
            (
                [*tokens.head, *tokens.content[start : start + room], *(tokens.tail if start + room >= count else end)],
                tokens.span(start, start + room) if count > room else None,
            )
            for start in slice_starts(count, room, self.overlap)
        ]


def slice_starts(tokens: int, room: int, overlap: int) -> list[int]:
    """Where slices of `room` tokens begin, so that they hold all of `tokens`; the last is as long as the others.

    Neighbours have `overlap` tokens in common, at most half a slice, and the last two more where that fits better.
    """
    if tokens <= room:
        return [0]
    return [*range(0, tokens - room, room - min(overlap, room // 2)), tokens - room]


def document_tokens(encoder: PairEncoder, document: str) -> DocumentTokens:
    """The ids that `encoder.document_ids` gives, told apart by the characters that they stand for."""
    template = encoder.template
    before, after = template.anchor + template.before_document, template.after_document + template.following_document
    encoding = encoder.own.encode(before + document + after, add_special_tokens=False)
    anchor, following = context_tokens(encoder.own, template.anchor, template.following_document)
    own = slice(anchor, len(encoding) - following)
    ids, offsets = encoding.ids[own], encoding.offsets[own]
    first, end = len(before), len(before) + len(document)
    # from both ends, since a document may have a million tokens
    head = next((place for place, (_, stop) in enumerate(offsets) if stop > first), len(ids))
    tail = next((place + 1 for place in range(len(ids) - 1, head - 1, -1) if offsets[place][0] < end), head)
    return DocumentTokens(ids[:head], ids[head:tail], ids[tail:], offsets[head:tail], first, end)
