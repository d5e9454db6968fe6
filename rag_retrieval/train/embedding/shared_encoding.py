"""What a model gives for fixed texts, encoded by all processes of a run together, as often as a model is validated.

Texts are dealt to the processes in blocks, and a block alone decides its forwards. So the number of processes changes
no forward, and no digit of what it gives.
"""

from collections.abc import Iterable, Sequence
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from rag_retrieval.core.distributed import gather, process_count, process_index
from rag_retrieval.data.collection import Collection
from rag_retrieval.models.token_batch import TokenBatch, make_batch, plan_by_tokens
from rag_retrieval.train.embedding.text_outputs import Outputs, joined, of_texts, outputs_of
from rag_retrieval.train.embedding.training_data import encode_queries
from rag_retrieval.train.task import TrainingError
from rag_retrieval.train.validation import forward_in_memory

BLOCK = 512  # texts dealt out, tokenized and planned together
GATHERED = 512  # texts of each process whose outputs are exchanged at once
NAMED, SHOWN = 5, 60  # texts in a message, and characters of one


class SharedEncoding:
    """Encodes the queries and documents of a collection with a model. Every process makes it from the same collection
    and calls it in turn with the others; its own blocks are tokenized once and kept, as int32.

    encoder: the model's. max_tokens, padded: see `plan_by_tokens`. batch_size: texts of one forward at most.
    """

    def __init__(
        self,
        collection: Collection,
        encoder: Any,
        accelerator: Accelerator,
        *,
        max_tokens: int | None,
        padded: bool,
        batch_size: int,
    ):
        self.accelerator, self.num_queries = accelerator, len(collection.queries)
        texts = list(collection.documents.values())
        documents = dict(zip(dict.fromkeys(texts), count()))  # equal texts get one vector, and so equal scores
        self.copies = [documents[text] for text in texts] if len(documents) < len(texts) else None
        self.texts = [*collection.queries.values(), *documents]
        blocks = [*blocks_of(collection.queries, 0), *blocks_of(documents, self.num_queries)]
        self.batches: list[tuple[list[int], TokenBatch]] = []  # places among texts
        for first, part in blocks[process_index() :: process_count()]:
            if first < self.num_queries:
                prompts = [collection.prompts.get(query, "") for query in part]
                encoded = encode_queries(encoder, [collection.queries[query] for query in part], prompts)
            else:
                encoded = encoder.encode(part, "document")
            lengths = [[len(text)] for text in encoded]
            for forward in plan_by_tokens(lengths, max_tokens, padded=padded, max_pairs=batch_size):
                batch = make_batch([encoded[place] for place in forward])
                self.batches.append(([first + place for place in forward], batch))
        # engines that exchange weights in the forward need the same number of forwards on every process
        missing = max(gather(len(self.batches))) - len(self.batches)
        filler = make_batch(encoder.encode(["filler"], "document"))
        self.batches += [([], filler)] * missing

    def __call__(self, model: nn.Module) -> tuple[Outputs, Outputs] | None:
        """Of the queries and of the documents on the main process, on the CPU; None on the others. Raises
        TrainingError, on all processes, where a value is not finite."""
        places, parts = [], []
        for of_batch, batch in self.batches:
            outputs = joined([outputs_of(each) for each in forward_in_memory(model, batch, self.accelerator)])
            places += of_batch
            parts.append({name: entries.first(len(of_batch)).to("cpu") for name, entries in outputs.items()})
        own_places, own = torch.tensor(places, dtype=torch.int64), joined(parts)
        self._check_finite(own_places, own)
        received = []
        for start in range(0, max(gather(len(own_places))), GATHERED):
            texts = torch.arange(len(own_places))[start : start + GATHERED]
            for part in gather((own_places[texts], of_texts(own, texts))):
                if process_index() == 0:
                    received.append(part)
        if not received:
            return None
        order = torch.cat([places for places, _ in received]).argsort()
        everything = of_texts(joined([outputs for _, outputs in received]), order)
        documents = np.arange(len(self.texts) - self.num_queries) if self.copies is None else np.array(self.copies)
        rows = torch.arange(self.num_queries), self.num_queries + torch.from_numpy(documents)
        return tuple(of_texts(everything, each) for each in rows)

    def _check_finite(self, places: torch.Tensor, outputs: Outputs) -> None:
        own: set[int] = set()
        for entries in outputs.values():
            texts = torch.arange(len(entries.counts)).repeat_interleave(entries.counts)
            own.update(places[texts[~entries.values.isfinite().reshape(len(texts), -1).all(dim=1)]].tolist())
        if bad := sorted(chain.from_iterable(gather(own))):
            raise TrainingError(
                f"{len(bad)} of {len(self.texts)} validation texts have a vector that is not finite: "
                f"{first_texts([self.texts[place] for place in bad])}; train in mixed_precision no or bf16"
            )


def first_texts(texts: Sequence[str]) -> str:
    """For a message, each cut."""
    more = f" and {len(texts) - NAMED:,} more" if len(texts) > NAMED else ""
    return ", ".join(repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...") for text in texts[:NAMED]) + more


def blocks_of(keys: Iterable[str], first: int) -> list[tuple[int, list[str]]]:
    """(place of its first key, keys) of each block. first: the place of the first key of all."""
    keys = list(keys)
    return [(first + start, keys[start : start + BLOCK]) for start in range(0, len(keys), BLOCK)]
