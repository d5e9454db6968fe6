"""The vectors of fixed texts, encoded by all processes of a run together, as often as a model is validated.

Texts are dealt to the processes in blocks, and a block alone decides its forwards. So the number of processes changes
no forward, and no digit of a vector.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from torch import nn

from rag_retrieval.core.distributed import gather, process_count, process_index
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.token_batch import TokenBatch, make_batch, plan_by_tokens
from rag_retrieval.train.validation import forward_in_memory

BLOCK = 512  # texts dealt out, tokenized and planned together
GATHERED = 8192  # vectors of each process that are exchanged at once


class Block(NamedTuple):
    """first: the place of its first text among all. prompts: of texts that have one of their own, by place in the
    block."""

    first: int
    kind: str
    texts: Sequence[str]
    prompts: Mapping[int, str]


class SharedEncoding:
    """Encodes queries and documents with a model. Every process makes it from the same texts and calls it in turn with
    the others; its own blocks are tokenized once and kept, as int32.

    prompts: of queries that have one of their own, by place. max_tokens, padded: see `plan_by_tokens`. batch_size:
    texts of one forward at most.
    """

    def __init__(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        encoder: Any,
        accelerator: Accelerator,
        *,
        prompts: Mapping[int, str],
        max_tokens: int | None,
        padded: bool,
        batch_size: int,
    ):
        self.accelerator, self.num_queries = accelerator, len(queries)
        distinct = dict.fromkeys(documents)  # equal texts get one vector, and so equal scores
        self.num_texts = len(queries) + len(distinct)
        blocks = [*blocks_of("query", queries, 0, prompts), *blocks_of("document", [*distinct], len(queries), {})]
        places = dict(zip(distinct, range(len(distinct)), strict=True))
        self.copies = [places[text] for text in documents] if len(distinct) < len(documents) else None
        self.batches: list[tuple[list[int], TokenBatch]] = []  # places among all texts
        for block in blocks[process_index() :: process_count()]:
            encoded = encode_block(encoder, block)
            lengths = [[len(text)] for text in encoded]
            for part in plan_by_tokens(lengths, max_tokens, padded=padded, max_pairs=batch_size):
                places = [block.first + place for place in part]
                self.batches.append((places, make_batch([encoded[place] for place in part])))
        # engines that exchange weights in the forward need the same number of forwards on every process
        missing = max(gather(len(self.batches))) - len(self.batches)
        filler = make_batch(encoder.encode(["filler"], "document"))
        self.batches += [([], filler)] * missing

    def __call__(self, model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        """(queries, documents), each float32 [texts, dim], as the model gives them, not normalized; equal on all
        processes. Memory is that of these vectors, on every process."""
        places, vectors = [], []
        for of_batch, batch in self.batches:
            embedded = forward_in_memory(model, batch, self.accelerator).float().cpu().numpy()
            places += of_batch
            vectors.append(embedded[: len(of_batch)])
        own_places, own = np.array(places, np.int64), np.concatenate(vectors)
        result = np.empty((self.num_texts, own.shape[1]), np.float32)
        for start in range(0, max(gather(len(own))), GATHERED):
            stop = start + GATHERED
            for rows, values in gather((own_places[start:stop], own[start:stop])):
                result[rows] = values
        queries, documents = result[: self.num_queries], result[self.num_queries :]
        return queries, documents if self.copies is None else documents[self.copies]


def blocks_of(kind: str, texts: Sequence[str], first: int, prompts: Mapping[int, str]) -> Iterator[Block]:
    for start in range(0, len(texts), BLOCK):
        part = texts[start : start + BLOCK]
        own = {place: prompts[start + place] for place in range(len(part)) if start + place in prompts}
        yield Block(first + start, kind, part, own)


def encode_block(encoder: Any, block: Block) -> list[EncodedPair]:
    encoded = encoder.encode(block.texts, block.kind)
    for place, prompt in block.prompts.items():
        (encoded[place],) = encoder.encode([block.texts[place]], block.kind, prompt=prompt)
    return encoded
