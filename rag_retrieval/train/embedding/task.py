"""What the training loop needs to know of embedders: a loss that couples a whole optimizer step, validation, and files.

Whatever the number of processes and micro-batches, the loss is that of the step's distinct texts together. Every text
is embedded, what the model gave on all processes is gathered, and the gradients at that alone are taken
(`losses.step_gradients`). Then each micro-batch back-propagates (outputs * gradients).sum(). Graphs of the first
micro-batches are kept for that, as far as memory allows; the others are embedded a second time: gradient caching, Gao
et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (2021). No collective has a gradient,
so that it works under every engine.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from accelerate import Accelerator
from torch import nn

from rag_retrieval.core.distributed import gather
from rag_retrieval.data.step_records import StepRecords, first_of_each
from rag_retrieval.losses.embedding import Objective
from rag_retrieval.losses.embedding_report import (
    log_values,
    no_terms_problem,
    same_direction_problem,
    zero_loss_problem,
)
from rag_retrieval.losses.step_gradients import representation_gradients
from rag_retrieval.losses.step_targets import targets_of
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.outputs import places_of
from rag_retrieval.models.scoring import evaluating
from rag_retrieval.models.token_batch import make_batch
from rag_retrieval.train.embedding.guide import GuideVectors
from rag_retrieval.train.embedding.text_outputs import (
    Outputs,
    difference,
    gather_outputs,
    joined,
    matched,
    of_texts,
    on_device,
    outputs_of,
    step_outputs,
)
from rag_retrieval.train.embedding.training_data import EmbeddingMicroBatch
from rag_retrieval.train.lora import SavedModel, quiet_loading
from rag_retrieval.train.task import StepLoss

logger = logging.getLogger(__name__)

PROBES = {  # texts whose vectors show whether a folder holds the model, and whether training changed it
    "query": ["what is a panda?", "capital of France"],
    "document": ["The giant panda is a bear that lives in China. " * 40, "Paris"],
}
SAME = 1e-3  # between what a model gives in memory and on disk, on any device
UNCHANGED = 1e-6


@dataclass(frozen=True)
class StepTexts:
    """The texts of one process in a step, in the order of its micro-batches.

    ids: uint64 [texts]. is_query: bool [texts]. records: what is whose positive. kept: the number of its first
    micro-batches whose graphs fit in memory.
    """

    ids: np.ndarray
    is_query: np.ndarray
    records: StepRecords
    kept: int


@dataclass(frozen=True)
class EmbeddingOptions:
    """seed: of dropout. max_tokens_with_graph: of one process in a step. padded: how batches are laid out.
    cross_device: whether the texts of other processes are negatives."""

    seed: int
    max_tokens_with_graph: int
    padded: bool
    cross_device: bool


class EmbeddingTask(SavedModel):
    """objectives: by the `part` of the micro-batches that they are for. reopen: opens a folder that training wrote.
    hosts: the processes' group for what is on the CPU; None without others. guide: vectors by which false negatives are
    found; None where no loss reads them. The rest: see `SavedModel`."""

    unit = "texts"
    memory_advice = (
        "Lower max_tokens_with_graph, or max_tokens_per_batch: the step stays the same. Or set gradient_checkpointing "
        "true, mixed_precision bf16, or a smaller passage_max_len."
    )

    def __init__(
        self,
        model: EmbeddingModel,
        objectives: Mapping[str, Objective],
        validation: Callable[[nn.Module, int], dict[str, float]] | None,
        load_base: Callable[[], EmbeddingModel],
        reopen: Callable[[str], EmbeddingModel],
        adapter: Any,
        accelerator: Accelerator,
        options: EmbeddingOptions,
        hosts: distributed.ProcessGroup | None = None,
        guide: GuideVectors | None = None,
    ):
        super().__init__(model, load_base, adapter)
        self.objectives, self.validation, self.reopen = objectives, validation, reopen
        self.accelerator, self.options, self.hosts, self.guide = accelerator, options, hosts, guide
        plugin = accelerator.state.deepspeed_plugin  # gradients of ZeRO-3 are wrong after several forwards (0.19.8)
        self.one_graph_alone = plugin is not None and plugin.zero_stage == 3
        self.sums: dict[str, float] = {}  # since the last report, of this process
        self.checks = [zero_loss_problem, same_direction_problem, no_terms_problem]  # of the next report

    def losses(
        self, model: nn.Module, micro_batches: Sequence[EmbeddingMicroBatch], factors: Sequence[float], step: int
    ) -> Iterator[StepLoss]:
        own = step_texts(micro_batches, self.options)
        everyone = gather(own, self.hosts)
        kept = min(texts.kept for texts in everyone)  # engines need the same sequence of forwards on every process
        if self.one_graph_alone and len(micro_batches) > 1:
            kept = 0
        outputs = []
        for place, batch in enumerate(micro_batches):
            with torch.set_grad_enabled(place < kept):
                outputs.append(self.embed(model, batch, step, place))
        process = self.accelerator.process_index
        if not self.options.cross_device:
            everyone, process = [own], 0
        objective = self.objectives[micro_batches[0].part]
        detached = [{name: entries.detach() for name, entries in each.items()} for each in outputs]
        gradients, loss = self.gradients_at(joined(detached), everyone, process, objective, factors[0], step)
        sizes = {name: [len(each[name].values) for each in detached] for name in gradients}
        parts = {name: gradient.split(sizes[name]) for name, gradient in gradients.items()}
        for place, batch in enumerate(micro_batches):
            now = outputs[place] if place < kept else self.embed(model, batch, step, place)
            outputs[place] = None  # its graph ends with its backward
            if 0 < place == len(micro_batches) - 1 < kept:
                # DDP exchanges gradients in the backward of a forward outside of no_sync, and there was none
                with self.accelerator.trigger_sync_in_backward(model):
                    pass
            surrogate = sum(
                (entries.values * matched(parts[name][place], detached[place][name], entries)).sum()
                for name, entries in now.items()
            )
            yield StepLoss(surrogate, loss if place == 0 else torch.zeros_like(loss))

    def embed(self, model: nn.Module, batch: EmbeddingMicroBatch, step: int, place: int) -> Outputs:
        """Of the micro-batch's texts, without a filler's; the same at every call, dropout too."""
        seeds = (self.options.seed, step, self.accelerator.process_index, place)
        torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> np.uint64(1)))
        outputs = outputs_of(model(batch.texts))
        return {name: entries.first(len(batch.ids)) for name, entries in outputs.items()}

    def gradients_at(
        self,
        outputs: Outputs,
        everyone: Sequence[StepTexts],
        process: int,
        objective: Objective,
        factor: float,
        step: int,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The gradient of factor * the step's summed losses at the values of this process's outputs, and the sum of its
        own losses, [1]. everyone: the texts of all processes, of which this is the one numbered `process`."""
        counts = [len(texts.ids) for texts in everyone]
        ids = np.concatenate([texts.ids for texts in everyone])
        is_query = np.concatenate([texts.is_query for texts in everyone])
        # of equal texts on two processes the lower process's copy is the one that counts
        queries, documents = (of[first_of_each(ids[of])[0]] for of in map(np.flatnonzero, (is_query, ~is_query)))
        targets = targets_of(ids[queries], ids[documents], [texts.records for texts in everyone], process)
        device = next(iter(outputs.values())).values.device
        places = [torch.from_numpy(of).to(device) for of in (queries, documents)]
        of_all = gather_outputs(outputs, counts)
        chosen = [of_texts(of_all, place) for place in places]
        del of_all
        guide = self.guide and tuple(self.guide.of(ids[of]).to(device) for of in (queries, documents))
        given = map(step_outputs, chosen)
        found = representation_gradients(objective, *given, targets.to(device), factor, guide, step)
        for name, value in found.report.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        start, own = sum(counts[:process]), counts[process]
        result = {name: torch.zeros_like(entries.values) for name, entries in outputs.items()}
        for place, of_kind, gradients in zip(places, chosen, (found.queries, found.documents), strict=True):
            mine = ((place >= start) & (place < start + own)).nonzero().squeeze(1)
            for name, entries in of_kind.items():
                gradient = getattr(gradients, name)
                if len(everyone) > 1:
                    distributed.all_reduce(gradient)
                here = places_of(outputs[name].counts, place[mine] - start)
                result[name][here] = gradient[places_of(entries.counts, mine)]
        return result, found.losses.sum()[None]

    def describe_batch(self, micro_batch: EmbeddingMicroBatch) -> str:
        lengths, sources = micro_batch.texts.lengths, micro_batch.sources
        where = f", of the step of {sources[0]} to {sources[-1]}" if sources else ""
        return f"{len(lengths)} texts, the longest of {lengths.max()} tokens, {lengths.sum():,} tokens in all{where}"

    def report(self, step: int, total_steps: int) -> dict[str, float]:
        everyone = gather(self.sums, self.hosts)
        self.sums = {}
        sums = {name: sum(of[name] for of in everyone) for name in everyone[0]}
        for check in list(self.checks):
            if problem := check(sums):
                logger.warning(problem)
            if problem or check is zero_loss_problem:  # that one is of the beginning
                self.checks.remove(check)
        return log_values(sums)

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        return self.validation(model, step)

    def rehearse(self) -> None:
        """Also: save the model as at the end, and open it again. Raises ValueError where it gives other vectors."""
        super().rehearse()
        self.before = probe(self.model)
        with tempfile.TemporaryDirectory() as folder:
            saved, results = Path(folder, "saved"), Path(folder, "results")
            saved.mkdir(), results.mkdir()
            self.save_model(saved, self.model.state_dict())
            super().export(saved, results)
            again = self.probe_of(results / "model")
        if (found := difference(again, self.before)) > SAME:
            raise ValueError(
                f"{type(self.model.model).__name__}: saved and opened again, the model gives vectors that differ by "
                f"{found:.2g}; expected at most {SAME}. Take another model, or another pooling"
            )

    def export(self, folder: Path, results: Path) -> None:
        """Also: open the finished model and say where it gives the vectors that it gave before training."""
        super().export(folder, results)
        if difference(self.probe_of(results / "model"), self.before) <= UNCHANGED:
            logger.warning(
                "the model did not change: texts have the vectors that they had before training. Raise lr or epochs, "
                "and look at the loss: where it is 0 from the start, there are no negatives to learn from"
            )

    def probe_of(self, folder: Path) -> Outputs:
        with quiet_loading():
            return probe(self.reopen(str(folder)).to(self.model.device))


def probe(model: EmbeddingModel) -> Outputs:
    """What the model gives for `PROBES`, on the CPU, in the precision of the weights."""
    encoded = [text for kind, texts in PROBES.items() for text in model.text_encoder.encode(texts, kind)]
    with evaluating(model):  # FSDP has put autocast around the forward of this object
        return on_device(outputs_of(type(model).forward(model, make_batch(encoded))), "cpu")


def step_texts(micro_batches: Sequence[EmbeddingMicroBatch], options: EmbeddingOptions) -> StepTexts:
    """Of this process."""
    sizes = [batch.texts.lengths for batch in micro_batches]
    tokens = np.cumsum([len(each) * each.max() if options.padded else each.sum() for each in sizes], dtype=np.int64)
    return StepTexts(
        np.concatenate([batch.ids for batch in micro_batches]),
        np.concatenate([np.arange(len(batch.ids)) < batch.queries for batch in micro_batches]),
        micro_batches[0].records,
        int((tokens <= options.max_tokens_with_graph).sum()),
    )
