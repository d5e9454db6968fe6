"""What the task of a pre-training computes for itself; that steps are exact is in test_exactness.py."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.token_batch import make_batch
from rag_retrieval.train.pretrain.model import PretrainingModel
from rag_retrieval.train.pretrain.task import LOSSES, PretrainTask, span_targets
from rag_retrieval.train.pretrain.training_data import PretrainMicroBatch


def make_task(seed: int = 1) -> PretrainTask:
    return PretrainTask(None, LOSSES["span_pairs"], None, None, None, None, Accelerator(cpu=True), seed, None)


def test_spans_of_one_document_are_no_negatives_of_each_other():
    """Five passages, of documents 7, 8, 7, 9, 8; this process has the second to the fourth."""
    targets = span_targets(np.array([7, 8, 7, 9, 8], np.uint64), slice(1, 4))
    assert targets.queries.tolist() == targets.positives.tolist() == [0, 1, 2, 3, 4]
    assert targets.own == slice(1, 4) and targets.negatives.shape == (3, 0)
    pairs = [(0, 4), (1, 0)]  # own record, passage: 8 with the fifth, 7 with the first
    assert list(zip(*targets.excluded.tolist(), strict=True)) == pairs
    assert list(zip(*targets.excluded_queries.tolist(), strict=True)) == pairs


def test_a_forward_draws_the_same_dropout_again_for_its_step_and_place(bert_with_dropout):
    model = PretrainingModel.from_pretrained(bert_with_dropout, 32, pooling="mean").train()
    texts = make_batch(model.text_encoder.encode(["water boils", "北京是中国的首都"]))
    masked, zeros = np.array([1, 2], np.int32), np.zeros(2, np.int64)
    batch = PretrainMicroBatch(texts, texts.ids, masked, zeros, zeros, (2, 1), 9, [])
    task = make_task()
    first, again = task.compute(model, batch, 3, 1, with_losses=False), task.compute(model, batch, 3, 1)
    assert torch.equal(first.vectors, again.vectors) and not len(first.sums)
    others = [task.compute(model, batch, *place) for place in ((3, 0), (4, 1))]
    others.append(make_task(2).compute(model, batch, 3, 1))
    assert not any(torch.equal(first.vectors, other.vectors) for other in others)


def test_the_log_has_the_mean_of_each_loss_over_its_own_items():
    task = make_task()
    for sums, items in (([6.0, 1.0], (4, 1)), ([2.0, 3.0], (4, 0)), ([0.0, 0.0], (0, 0))):
        batch = PretrainMicroBatch(None, None, None, None, None, items, 0, [])
        task.noted(torch.tensor(sums), batch)
    assert task.report(2, 9) == {"masked_token_loss": 1.0, "span_loss": pytest.approx(4.0)}
    assert task.since_report == []


def test_a_filler_has_no_vectors_and_is_described_without_a_source():
    texts = make_batch([EncodedPair(np.arange(length, dtype=np.int32), None, False, 0) for length in (6, 4)])
    parts = (texts, texts.ids, texts.ids[:1], np.zeros(2), np.zeros(2, np.uint64))
    batch = PretrainMicroBatch(*parts, (1, 1), 10, ["a.jsonl#1", "a.jsonl#9"])
    filler = PretrainMicroBatch(*parts, (0, 0), 0, [], counted=False)
    task, vectors = make_task(), torch.ones(2, 3)
    assert task.own(vectors, batch).shape == (2, 3) and task.own(vectors, filler).shape == (0, 3)
    assert task.describe_batch(batch) == "2 texts, the longest of 6 tokens, 10 tokens in all, a.jsonl#1 to a.jsonl#9"
    assert task.describe_batch(filler) == "2 texts, the longest of 6 tokens, 10 tokens in all"
