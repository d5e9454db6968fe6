"""From texts to results, whatever computes them: each distinct text once, in chunks, tokenized one chunk ahead.

Equal texts are computed once because the same text in another forward may round differently, by which duplicates would
not tie. Nothing here imports torch.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import TypeVar

CHUNK_TEXTS = 4096  # tokenized and planned together
CHUNK_CHARACTERS = 8_000_000  # of documents, likewise: a document may be a book. A longer one is a chunk by itself

Pairs = Sequence[tuple[str, str]]
Texts = Sequence[str] | Pairs  # single texts, or (query, document) pairs
Item, Result, Encoded = TypeVar("Item"), TypeVar("Result"), TypeVar("Encoded")


def score_texts(
    texts: Texts,
    encode: Callable[[Texts], Encoded],
    score: Callable[[Encoded], Sequence[Result]],
    chunk_texts: int | None = None,
) -> list[Result]:
    """The result of each text or pair, in order; equal ones get the same.

    encode: tokenizes a chunk, in a thread while the chunk before is scored. score: one result for each text of a chunk.
    chunk_texts: at most, default CHUNK_TEXTS.
    """
    unique, places = distinct(texts)
    results: list[Result] = []
    with closing(prefetch(encode, chunks_of(unique, chunk_texts or CHUNK_TEXTS))) as encoded_chunks:
        for encoded in encoded_chunks:
            results.extend(score(encoded))
    return [results[place] for place in places]


def distinct(items: Iterable[Hashable]) -> tuple[list, list[int]]:
    """The items without repetitions, in the order of their first place, and the place of each item among them."""
    places: dict = {}
    of_items = [places.setdefault(item, len(places)) for item in items]
    return list(places), of_items


def chunks_of(texts: Texts, chunk_texts: int) -> Iterator[Texts]:
    start = characters = 0
    for place, text in enumerate(texts):
        length = len(text if isinstance(text, str) else text[1])
        characters += length
        if place > start and (place - start == chunk_texts or characters > CHUNK_CHARACTERS):
            yield texts[start:place]
            start, characters = place, length
    if start < len(texts):
        yield texts[start:]


def prefetch(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """work(item) of each item in order, the next one computed in a thread while the caller uses this one.

    The thread helps because tokenizers and forwards release Python's lock; work in pure Python would gain nothing.
    Items are taken in the caller's thread, and one item alone starts no thread. An error of `work` is raised here, when
    its turn comes. Close the generator when leaving early: that waits for the item in work.
    """
    items = iter(items)
    for first in islice(items, 1):
        result = work(first)  # nothing to overlap with yet
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as thread:
            for item in items:
                following = thread.submit(work, item)
                yield result
                result = following.result()
        yield result
