"""What an embedder's task computes for itself; that steps are exact is in test_exactness.py."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.representations import Representations
from rag_retrieval.models.token_batch import make_batch
from rag_retrieval.train.embedding.task import EmbeddingOptions, EmbeddingTask, step_texts
from rag_retrieval.train.embedding.training_data import EmbeddingMicroBatch


def batch(lengths: list[int], ids: list[int], queries: int = 0) -> EmbeddingMicroBatch:
    texts = make_batch([EncodedPair(np.arange(length, dtype=np.int32), None, False, 0) for length in lengths])
    return EmbeddingMicroBatch(texts, np.array(ids, np.uint64), queries, None, (0,), len(ids), ["a.jsonl:1"])


@pytest.fixture
def make_task():
    def make(**options) -> EmbeddingTask:
        values = {"seed": 1, "max_tokens_with_graph": 0, "padded": False, "cross_device": True} | options
        return EmbeddingTask(None, {}, None, None, None, None, Accelerator(cpu=True), EmbeddingOptions(**values))

    return make


def test_dropout_depends_on_seed_step_process_and_micro_batch_and_on_nothing_else(make_task, monkeypatch):
    task, texts = make_task(), batch([3, 2], [7, 8])

    def drawn(task: EmbeddingTask, step: int, place: int) -> float:
        torch.rand(3)  # whatever was drawn before
        outputs = task.embed(lambda texts: Representations(torch.rand(len(texts), 1)), texts, step, place)
        return outputs["dense"].values.sum().item()

    first = drawn(task, 0, 0)
    assert drawn(task, 0, 0) == first
    others = [drawn(task, 1, 0), drawn(task, 0, 1), drawn(make_task(seed=2), 0, 0)]
    monkeypatch.setattr(Accelerator, "process_index", 1)
    assert len({first, *others, drawn(task, 0, 0)}) == 5


def test_a_fillers_vector_is_left_out(make_task):
    outputs = make_task().embed(lambda texts: Representations(torch.ones(len(texts), 4)), batch([3], []), 0, 0)
    assert outputs["dense"].values.shape == (0, 4)


@pytest.mark.parametrize(
    "tokens, padded, kept",
    [(9, False, 0), (10, False, 1), (15, False, 1), (16, False, 2), (16, True, 1), (99, True, 3)],
)
def test_the_first_micro_batches_keep_their_graphs_while_the_tokens_allow(make_task, tokens, padded, kept):
    batches = [batch([6, 4], [1, 2], queries=1), batch([4, 2], [3, 4]), batch([5], [5])]
    texts = step_texts(batches, make_task(max_tokens_with_graph=tokens, padded=padded).options)
    assert texts.kept == kept
    assert texts.ids.tolist() == [1, 2, 3, 4, 5] and texts.is_query.tolist() == [True, False, False, False, False]


def test_a_micro_batch_is_described_for_errors(make_task):
    text = make_task().describe_batch(batch([6, 4], [1, 2]))
    assert "2 texts" in text and "longest of 6" in text and "10 tokens" in text and "a.jsonl:1" in text
