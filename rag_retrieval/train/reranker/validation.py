"""Validation: every pair scored once, over all processes, then loss and ranking metrics from the whole set.

Which pairs share a batch is planned over the whole set before it is dealt to the processes, so that the
number of processes changes no digit of a metric. Groups are used whole: sampling is for training.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from rag_retrieval.data.store import RecordStore
from rag_retrieval.metrics import LOGGED_METRICS, group_metrics, relevance_threshold
from rag_retrieval.models.pair_encoding import PairEncoder
from rag_retrieval.models.token_batch import TokenBatch, make_batch, plan_by_tokens
from rag_retrieval.train.reranker.objective import Objective, WeightedLoss
from rag_retrieval.train.reranker.training_data import layout, rescale
from rag_retrieval.train.task import TrainingError
from rag_retrieval.train.validation import forward_in_memory

ENCODING_CHUNK = 4096  # pairs tokenized at a time
LOSS_CHUNK = 1024  # groups in one evaluation of the loss


class Validation:
    """Scores a validation store with a model. Build it once: the process's batches are encoded and kept, as int32.

    label_range: what pointwise labels are rescaled from. batch_size: pairs of one forward at most. names: of the
    ranking metrics. max_tokens, padded: see `plan_by_tokens`. metrics: names of the values that this data allows to
    measure.
    """

    def __init__(
        self,
        store: RecordStore,
        encoder: PairEncoder,
        objective: Objective,
        label_range: tuple[float, float],
        batch_size: int,
        accelerator: Accelerator,
        names: Sequence[str] = LOGGED_METRICS,
        max_tokens: int | None = None,
        padded: bool = True,
    ):
        self.names = names
        self.store, self.objective, self.label_range, self.accelerator = store, objective, label_range, accelerator
        self.groups = [
            np.arange(first, first + size) for first, size in zip(store.group_offsets, store.group_sizes, strict=True)
        ]
        self.labels = store.labels
        self.relevant_from = relevance_threshold(self.labels)
        self.metrics = self.values(np.zeros(len(self.labels), dtype=np.float32)).keys()
        self._plan(encoder, batch_size, max_tokens, padded)

    def _plan(self, encoder: PairEncoder, batch_size: int, max_tokens: int | None, padded: bool) -> None:
        """Tokenize each pair once, chunk by chunk, and keep the batches of this process."""
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        self.batches: list[tuple[list[int], TokenBatch]] = []
        planned = 0
        for start in range(0, len(self.labels), ENCODING_CHUNK):
            pairs = [self.store.pair(place) for place in range(start, min(start + ENCODING_CHUNK, len(self.labels)))]
            encoded = encoder.encode([(pair.query, pair.document) for pair in pairs])
            lengths = [[len(pair)] for pair in encoded]
            for part in plan_by_tokens(lengths, max_tokens, padded=padded, max_pairs=batch_size):
                if planned % processes == index:
                    batch = make_batch([encoded[place] for place in part])
                    self.batches.append(([start + place for place in part], batch))
                planned += 1
        # engines that exchange weights in the forward need the same number of forwards on every process
        if len(self.batches) < math.ceil(planned / processes):
            first = self.store.pair(0)
            self.batches.append(([], make_batch(encoder.encode([(first.query, first.document)]))))

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The values of `self.metrics`, all finite, and on how many queries they were measured."""
        return self.values(self.score(model))

    def values(self, scores: np.ndarray) -> dict[str, float]:
        """loss and, where some query has several documents, the ranking metrics that can be measured: without
        a relevant document in any group there is no nDCG. scores: [pairs] in the store's order."""
        values = {"loss": self.mean_loss(scores)}
        if self.store.group_sizes.max() > 1:
            rows = [(scores[group], self.labels[group]) for group in self.groups]
            values |= group_metrics([row[0] for row in rows], [row[1] for row in rows], self.relevant_from, self.names)
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        return {name: int(value) if name.startswith("queries") else value for name, value in finite.items()}

    @property
    def lacks_teacher(self) -> bool:
        """Whether a loss learns from teacher scores and some document here has none."""
        return any(weighted.from_teacher and self._targets(weighted) is None for weighted in self.objective.losses)

    def score(self, model: nn.Module) -> np.ndarray:
        """Scores of all pairs in the store's order: [pairs], float32, equal on all processes.

        Raises TrainingError, on every process, when a score is not finite.
        """
        scored = []
        for positions, batch in self.batches:
            batch_scores = torch.cat(forward_in_memory(model, batch, self.accelerator)).float().cpu().numpy()
            if positions:
                scored.append((positions, batch_scores))
        scores = np.full(len(self.labels), np.nan, dtype=np.float32)
        for positions, batch_scores in gather_object(scored):
            scores[positions] = batch_scores
        self._check_finite(scores)
        return scores

    def _check_finite(self, scores: np.ndarray) -> None:
        bad = np.flatnonzero(~np.isfinite(scores))
        if bad.size:
            lines = ", ".join(str(self.store.pair(int(place)).line) for place in bad[:20])
            raise TrainingError(
                f"{bad.size} of {scores.size} validation pairs have a score that is not finite, on lines "
                f"{lines}{' and more' if bad.size > 20 else ''} of the validation data; train in "
                "mixed_precision no or bf16"
            )

    def mean_loss(self, scores: np.ndarray) -> float:
        """The training loss over the whole set, each loss of the model's own head divided once by its count; NaN
        where one of them has nothing to count, or learns from teacher scores that some document has not."""
        return sum(
            weighted.weight * self._mean(weighted, scores)
            for weighted in self.objective.losses if not weighted.from_deepest
        )  # fmt: skip

    def _mean(self, weighted: WeightedLoss, scores: np.ndarray) -> float:
        targets = self._targets(weighted)
        if targets is None:
            return math.nan
        total, items = 0.0, 0
        for rows in self._loss_rows(weighted, scores, targets):
            chunk_sum, chunk_count = weighted.loss(*rows)
            total, items = total + chunk_sum.item(), items + int(chunk_count)
        return total / items if items else math.nan

    def _loss_rows(
        self, weighted: WeightedLoss, scores: np.ndarray, targets: np.ndarray
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Scores, targets and mask as the loss takes them, chunk by chunk."""
        if weighted.loss.dataset_type == "pointwise":
            values, labels = torch.from_numpy(scores), torch.from_numpy(np.ascontiguousarray(targets))
            yield values, labels, torch.ones(len(values), dtype=torch.bool)
            return
        for start in range(0, len(self.groups), LOSS_CHUNK):
            groups = self.groups[start : start + LOSS_CHUNK]
            if weighted.loss.one_positive:
                units = [unit for group in groups for unit in self._one_positive_at_a_time(group)]
            else:
                units = [(group, targets[group]) for group in groups]
            if units:
                labels, mask = layout([labels for _, labels in units])
                values, _ = layout([scores[places] for places, _ in units])
                yield values, labels, mask

    def _targets(self, weighted: WeightedLoss) -> np.ndarray | None:
        """What the loss learns from: float32 [pairs], or None where a document has no teacher score."""
        if weighted.from_teacher:
            scores = self.store.teacher_scores
            return scores if scores is not None and np.isfinite(scores).all() else None
        if weighted.loss.dataset_type == "pointwise":
            return rescale(self.labels, *self.label_range)
        return self.store.positives.astype(np.float32) if weighted.loss.reads == "positive" else self.labels

    def _one_positive_at_a_time(self, group: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        positive = self.store.positives[group]
        negatives = group[~positive]
        one_hot = np.zeros(len(negatives) + 1, dtype=np.float32)
        one_hot[0] = 1.0
        return [(np.concatenate([[place], negatives]), one_hot) for place in group[positive]]
