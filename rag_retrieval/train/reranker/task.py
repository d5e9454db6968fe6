"""What the training loop needs to know of rerankers: the losses of a step, validation, and files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.train.lora import SavedModel
from rag_retrieval.train.reranker.objective import ConstantScoreWatch, Objective
from rag_retrieval.train.reranker.training_data import RerankerMicroBatch
from rag_retrieval.train.reranker.validation import Validation
from rag_retrieval.train.task import StepLoss, weighted_sum


class RerankerTask(SavedModel):
    """objectives: by the `part` of the micro-batches that they are for. The rest: see `SavedModel`."""

    unit = "pairs"
    memory_advice = (
        "Lower max_tokens_per_batch, or batch_size with gradient_accumulation_steps raised as much: the step stays the "
        "same. Or set gradient_checkpointing true, mixed_precision bf16, or a smaller max_len."
    )

    def __init__(
        self,
        scorer: PairScorer,
        objectives: Mapping[str, Objective],
        validation: Validation | None,
        load_base: Callable[[], PairScorer],
        adapter: Any = None,
    ):
        super().__init__(scorer, load_base, adapter)
        self.objectives, self.validation = objectives, validation
        self.watches = {part: ConstantScoreWatch(objective, part) for part, objective in objectives.items()}

    def losses(
        self, model: nn.Module, micro_batches: Sequence[RerankerMicroBatch], factors: Sequence[float], step: int
    ) -> Iterator[StepLoss]:
        for micro_batch in micro_batches:
            sums = self.loss_sums(model, micro_batch)
            yield StepLoss(weighted_sum(sums, factors), sums.detach())

    def loss_sums(self, model: nn.Module, micro_batch: RerankerMicroBatch) -> torch.Tensor:
        """The summed losses of a micro-batch: float32 [losses] with a graph, not finite if any score is not."""
        objective = self.objectives[micro_batch.part]
        targets = micro_batch.labels, micro_batch.teacher_scores, micro_batch.mask
        if objective.layered:
            pair_scores = model(micro_batch.pairs, all_layers=True)
            heads = [micro_batch.place_scores(of_head) for of_head in pair_scores.unbind(1)]
            scores, sums = heads[-1], objective.layered_sums(heads, *targets)
        else:
            pair_scores = model(micro_batch.pairs)
            scores = micro_batch.place_scores(pair_scores)
            sums = objective.sums(scores, *targets)
        self.watches[micro_batch.part].add(sums.detach(), scores.detach(), micro_batch)
        # a loss may hide an infinite score (MSE: sigmoid(inf) is 1), and a filler's score has no weight in it
        return sums + 0.0 * pair_scores.sum()

    def describe_batch(self, micro_batch: RerankerMicroBatch) -> str:
        lengths, sources = micro_batch.pairs.lengths, micro_batch.sources
        where = f", {sources[0]} to {sources[-1]}" if sources else ""
        labels = micro_batch.labels[micro_batch.mask]
        values = f", labels {labels.min():g} to {labels.max():g}" if len(labels) else ""
        size = f"{len(lengths)} pairs, the longest of {lengths.max()} tokens, {lengths.sum():,} tokens in all"
        return f"{size}{where}{values}"

    def report(self, step: int, total_steps: int) -> dict[str, float]:
        reports = [watch.report(step, total_steps) for watch in self.watches.values()]
        return {name: value for report in reports for name, value in report.items()}

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        return self.validation(model)
