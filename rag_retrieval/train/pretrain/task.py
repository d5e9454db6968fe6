"""What the training loop needs to know of pre-training: the losses of a step, validation, and files.

Losses of tokens and of bags of words are means over all tokens and passages of the step. The loss of pairs of spans
couples the step as an embedder's does: all spans are embedded, the vectors of all processes gathered, and the gradients
at the vectors taken. A process with one micro-batch goes back through the graph of that forward; with several, each is
computed again, so that one graph lives at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from accelerate import Accelerator
from torch import nn

from rag_retrieval.core.distributed import gather
from rag_retrieval.losses.embedding import Objective
from rag_retrieval.losses.step_gradients import representation_gradients
from rag_retrieval.losses.step_outputs import StepOutputs
from rag_retrieval.losses.step_targets import StepTargets
from rag_retrieval.train.embedding.text_outputs import gather_rows
from rag_retrieval.train.lora import SavedModel
from rag_retrieval.train.pretrain.model import DECODER_FILE, PretrainingModel, PretrainOutputs
from rag_retrieval.train.pretrain.training_data import PretrainMicroBatch, PretrainSteps
from rag_retrieval.train.task import StepLoss, weighted_sum

LOSSES = {  # names of the sums, by loss_type
    "retromae": ("masked_token_loss", "decoder_loss", "bag_of_words_loss"),
    "span_pairs": ("masked_token_loss", "span_loss"),
}


class PretrainTask(SavedModel):
    """names: of the losses, in the order of `items`. objective: of pairs of spans; None without them. validation: steps
    of the validation texts; None without any. hosts: the processes' group for what is on the CPU. The rest: see
    `SavedModel`."""

    unit = "tokens"
    memory_advice = (
        "Lower max_tokens_per_batch, or batch_size with gradient_accumulation_steps raised as much: the step stays the "
        "same. Or set gradient_checkpointing true, mixed_precision bf16, or a smaller max_len."
    )

    def __init__(
        self,
        model: PretrainingModel,
        names: Sequence[str],
        objective: Objective | None,
        validation: PretrainSteps | None,
        load_base: Callable[[], PretrainingModel],
        adapter: Any,
        accelerator: Accelerator,
        seed: int,
        hosts: distributed.ProcessGroup | None,
    ):
        super().__init__(model, load_base, adapter)
        self.names, self.objective, self.validation = names, objective, validation
        self.accelerator, self.seed, self.hosts = accelerator, seed, hosts
        self.since_report: list[tuple[torch.Tensor, tuple[int, ...]]] = []  # sums and items of own micro-batches

    def losses(
        self, model: nn.Module, micro_batches: Sequence[PretrainMicroBatch], factors: Sequence[float], step: int
    ) -> Iterator[StepLoss]:
        if self.objective is None:
            for place, batch in enumerate(micro_batches):
                sums = self.compute(model, batch, step, place).sums
                yield StepLoss(weighted_sum(sums, factors), self.noted(sums.detach(), batch))
            return
        kept = self.compute(model, micro_batches[0], step, 0) if len(micro_batches) == 1 else None
        with torch.no_grad():
            first = [kept] if kept else [
                self.compute(model, batch, step, place, with_losses=False) for place, batch in enumerate(micro_batches)
            ]  # fmt: skip
        vectors = torch.cat([self.own(each.vectors, batch) for each, batch in zip(first, micro_batches, strict=True)])
        gradients, span_loss = self.span_gradients(vectors.detach(), micro_batches, factors[1])
        parts = gradients.split([len(batch.documents) if batch.counted else 0 for batch in micro_batches])
        for place, (batch, gradient) in enumerate(zip(micro_batches, parts, strict=True)):
            outputs = kept or self.compute(model, batch, step, place)
            of_vectors = (self.own(outputs.vectors, batch) * gradient).sum()
            sums = torch.stack([outputs.sums[0].detach(), span_loss if place == 0 else torch.zeros_like(span_loss)])
            yield StepLoss(outputs.sums[0] * factors[0] + of_vectors, self.noted(sums, batch))

    def compute(
        self, model: nn.Module, batch: PretrainMicroBatch, step: int, place: int, with_losses: bool = True
    ) -> PretrainOutputs:
        """The forward of a micro-batch; the same at every call, dropout too."""
        seeds = (self.seed, step, self.accelerator.process_index, place)
        torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> np.uint64(1)))
        return model(batch, with_losses)

    def own(self, vectors: torch.Tensor, batch: PretrainMicroBatch) -> torch.Tensor:
        """Without those of a filler."""
        return vectors if batch.counted else vectors[:0]

    def noted(self, sums: torch.Tensor, batch: PretrainMicroBatch) -> torch.Tensor:
        self.since_report.append((sums, batch.items))
        return sums

    def span_gradients(
        self, vectors: torch.Tensor, micro_batches: Sequence[PretrainMicroBatch], factor: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of factor * the step's summed losses of spans at this process's vectors, [texts, hidden], and
        the sum of its own losses. The first spans are queries, whose documents are the second ones."""
        documents = np.concatenate([batch.documents for batch in micro_batches if batch.counted] or [np.empty(0, "u8")])
        everyone, process = gather(documents[::2], self.hosts), self.accelerator.process_index
        counts = [len(each) for each in everyone]
        every = gather_rows(vectors, [2 * count for count in counts]) if len(counts) > 1 else vectors
        start = sum(counts[:process])
        targets = span_targets(np.concatenate(everyone), slice(start, start + counts[process])).to(vectors.device)
        found = representation_gradients(
            self.objective, StepOutputs(every[::2]), StepOutputs(every[1::2]), targets, factor
        )
        gradient = torch.stack([found.queries.dense, found.documents.dense], dim=1).flatten(0, 1)
        if len(everyone) > 1:
            distributed.all_reduce(gradient)
        return gradient[2 * start : 2 * (start + counts[process])], found.losses.sum()

    def describe_batch(self, micro_batch: PretrainMicroBatch) -> str:
        lengths, sources = micro_batch.texts.lengths, micro_batch.sources
        where = f", {sources[0]} to {sources[-1]}" if sources else ""
        return f"{len(lengths)} texts, the longest of {lengths.max()} tokens, {lengths.sum():,} tokens in all{where}"

    def report(self, step: int, total_steps: int) -> dict[str, float]:
        """The mean of each loss over its own items."""
        own = sum(np.stack([sums.cpu().numpy(), items]) for sums, items in self.since_report)
        self.since_report = []
        totals = sum(gather(own, self.hosts))
        return {name: float(total / max(count, 1)) for name, total, count in zip(self.names, *totals, strict=True)}

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """The losses of all validation texts, with the masks of a first pass: `loss` is their sum."""
        for number in range(self.validation.steps_per_epoch):
            batches = self.validation[0, number]
            missing = max(gather(len(batches), self.hosts)) - len(batches)
            batches = batches + [self.validation.filler() for _ in range(missing)]
            for _ in self.losses(model, batches, [1.0] * len(self.names), number):
                pass  # what they are is noted
        values = self.report(step, 0)
        return {"loss": sum(values.values()), **values}

    def export(self, folder: Path, results: Path) -> None:
        """Without the decoder, which has no part in a vector."""
        super().export(folder, results)
        for name in ("model", "adapter"):
            (results / name / DECODER_FILE).unlink(missing_ok=True)


def span_targets(documents: np.ndarray, own: slice) -> StepTargets:
    """Each passage of a step is a record: its first span is the query, its second one the positive document.

    documents: uint64 [passages], of which document each is. own: this process's. Spans of passages of one document, or
    of equal ones, are no negatives of each other.
    """
    rows = np.arange(len(documents))
    same = (documents[own, None] == documents) & (rows[own, None] != rows)
    excluded = torch.from_numpy(np.stack(same.nonzero()))
    places = torch.from_numpy(rows)
    none = torch.empty(len(rows[own]), 0, dtype=torch.int64)
    return StepTargets(places, places, own, none, excluded, excluded)
