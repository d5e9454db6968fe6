"""What the training loop needs to know of rerankers: the loss of a micro-batch, validation, and files.

What a reader would get wrong: with LoRA a checkpoint's `model` folder holds the adapter alone, not a model.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.train.reranker.objective import ConstantScoreWatch, Objective
from rag_retrieval.train.reranker.training_data import RerankerMicroBatch
from rag_retrieval.train.reranker.validation import Validation
from rag_retrieval.train.task import StepLoss, weighted_sum


class RerankerTask:
    """One run's losses, validation and files.

    objectives: by the `part` of the micro-batches that they are for. adapter: the LoRA wrapper around
    `scorer.model`, if any. load_base: loads the model as it was before training, for merging an adapter into.
    """

    def __init__(
        self,
        scorer: PairScorer,
        objectives: Mapping[str, Objective],
        validation: Validation | None,
        load_base: Callable[[], PairScorer],
        adapter=None,
    ):
        self.scorer, self.objectives, self.validation, self.load_base = scorer, objectives, validation, load_base
        self.adapter = adapter
        self.watches = {part: ConstantScoreWatch(objective, part) for part, objective in objectives.items()}

    def losses(
        self, model: nn.Module, micro_batches: Sequence[RerankerMicroBatch], factors: Sequence[float]
    ) -> Iterator[StepLoss]:
        for micro_batch in micro_batches:
            sums = self.loss_sums(model, micro_batch)
            yield StepLoss(weighted_sum(sums, factors), sums.detach())

    def loss_sums(self, model: nn.Module, micro_batch: RerankerMicroBatch) -> torch.Tensor:
        """The summed losses of a micro-batch: float32 [losses] with a graph, not finite if any score is not."""
        pair_scores = model(micro_batch.pairs)
        scores = micro_batch.place_scores(pair_scores)
        objective = self.objectives[micro_batch.part]
        sums = objective.sums(scores, micro_batch.labels, micro_batch.teacher_scores, micro_batch.mask)
        self.watches[micro_batch.part].add(sums.detach(), scores.detach(), micro_batch)
        # a loss may hide an infinite score (MSE: sigmoid(inf) is 1), and a filler's score has no weight in it
        return sums + 0.0 * pair_scores.sum()

    def describe_batch(self, micro_batch: RerankerMicroBatch) -> str:
        lengths, sources = micro_batch.pairs.lengths, micro_batch.sources
        where = f", {sources[0]} to {sources[-1]}" if sources else ""
        return f"{len(lengths)} pairs, the longest of {lengths.max()} tokens, {lengths.sum():,} tokens in all{where}"

    def report(self, step: int, total_steps: int) -> dict[str, float]:
        reports = [watch.report(step, total_steps) for watch in self.watches.values()]
        return {name: value for report in reports for name, value in report.items()}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return self.validation(model)

    def save_model(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        """state_dict: of the scorer, whose names have `model.` before those of the Hugging Face model."""
        weights = {name.removeprefix("model."): value for name, value in state_dict.items()}
        if self.adapter is None:
            self.scorer.save_pretrained(folder, weights)
        else:
            # embeddings are never trained here; by itself peft asks the hub whether they changed
            self.adapter.save_pretrained(
                folder, state_dict=adapter_names(weights), save_embedding_layers=False
            )

    def load_model(self, folder: Path) -> None:
        if self.adapter is None:
            load_weights(self.scorer.model, folder)
        else:
            load_adapter_weights(self.adapter, folder)

    def export(self, folder: Path, results: Path) -> None:
        """`model`, and for LoRA `adapter` with the adapter merged into the former."""
        shutil.copytree(folder, results / ("model" if self.adapter is None else "adapter"))
        if self.adapter is not None:
            with without_new_head_warning():  # the adapter brings the head
                merged(self.load_base(), folder).save_pretrained(results / "model")


@contextmanager
def without_new_head_warning():
    loading = logging.getLogger("rag_retrieval.models.loading")
    level = loading.level
    loading.setLevel(logging.ERROR)
    try:
        yield
    finally:
        loading.setLevel(level)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Copy the weights of a saved folder (one file or shards) into a model of the same shape."""
    saved = type(model).from_pretrained(folder, dtype=model.dtype, config=model.config)
    model.load_state_dict(saved.state_dict())


def adapter_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """peft's names of the parameters of the model that it wraps."""
    return {f"base_model.model.{name}": value for name, value in weights.items()}


def load_adapter_weights(adapter, folder: Path) -> None:
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(adapter, load_peft_weights(str(folder), device=str(adapter.device)))


def merged(base: PairScorer, adapter_folder: Path) -> PairScorer:
    """The base model with a saved adapter and its head in it. Merging the trained model itself would not do:
    a sharding engine holds only a part of it on each process."""
    from peft import PeftModel

    base.model = PeftModel.from_pretrained(base.model, str(adapter_folder)).merge_and_unload()
    return base
