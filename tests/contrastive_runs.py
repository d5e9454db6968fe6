"""An embedder with an in-batch contrastive loss, trained by the loop for rerankers; for tests only.

    torchrun --nproc_per_node 2 tests/contrastive_runs.py OUTPUT_DIR BATCH_SIZE ACCUMULATION

The loss couples the whole step: every query of it, on whatever process and in whatever micro-batch, has every document
of the step among its candidates. The task embeds all micro-batches without a graph, takes the gradient of the loss at
the embeddings, and yields surrogates that have this gradient.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import Dataset

from rag_retrieval.core.distributed import gather
from rag_retrieval.train.checkpoints import TrainState
from rag_retrieval.train.config import TrainingConfig
from rag_retrieval.train.loop import Trainer
from rag_retrieval.train.resume import claim
from rag_retrieval.train.run_folder import Provenance
from rag_retrieval.train.script import leave
from rag_retrieval.train.steps import MixedSteps, StepShape
from rag_retrieval.train.task import StepLoss

FEATURES, RECORDS, SCALE, LR = 5, 22, 5.0, 0.05


@dataclass
class Pairs:
    """queries, documents: [pairs, features]; document i is the positive of query i."""

    queries: torch.Tensor
    documents: torch.Tensor
    items: tuple[int, ...]
    size: int
    sources: list[str] = field(default_factory=list)
    part: str = ""

    def to(self, device):
        return self


class ContrastiveSteps(Dataset):
    def __init__(self, shape: StepShape):
        self.shape = shape
        numbers = torch.Generator().manual_seed(1)
        self.queries = torch.randn(RECORDS, FEATURES, generator=numbers)
        self.documents = self.queries + torch.randn(RECORDS, FEATURES, generator=numbers)

    @property
    def steps_per_epoch(self) -> int:
        return self.shape.steps_per_epoch

    def __getitem__(self, position):
        return [self.batch(list(places)) for places in self.shape.positions(position[1])]

    def batch(self, places: list[int]) -> Pairs:
        return Pairs(self.queries[places], self.documents[places], (len(places),), len(places))

    def filler(self) -> Pairs:
        return self.batch([])


class ContrastiveTask:
    unit, memory_advice = "pairs", ""

    def losses(self, model, micro_batches, factors, step):
        with torch.no_grad():
            embedded = [model(torch.cat([batch.queries, batch.documents])) for batch in micro_batches]
        sizes = [batch.size for batch in micro_batches]
        queries = torch.cat([rows[:size] for rows, size in zip(embedded, sizes, strict=True)])
        documents = torch.cat([rows[size:] for rows, size in zip(embedded, sizes, strict=True)])
        all_queries, all_documents = gather(queries), gather(documents)
        mine = dist.get_rank() if len(all_queries) > 1 else 0
        # gradients of the whole step's loss at this process's embeddings, whoever has the queries
        all_queries[mine], all_documents[mine] = queries.requires_grad_(), documents.requires_grad_()
        with torch.enable_grad():
            every_query, every_document = torch.cat(all_queries), torch.cat(all_documents)
            rows = nn.functional.cross_entropy(
                SCALE * every_query @ every_document.T, torch.arange(len(every_query)), reduction="none"
            )
            query_grad, document_grad = torch.autograd.grad(rows.sum() * factors[0], [queries, documents])
        first = sum(map(len, all_queries[:mine]))
        for batch, q_grad, d_grad, own in zip(
            micro_batches,
            query_grad.split(sizes),
            document_grad.split(sizes),
            rows.detach()[first : first + len(queries)].split(sizes),
            strict=True,
        ):
            again = model(torch.cat([batch.queries, batch.documents]))
            yield StepLoss((again * torch.cat([q_grad, d_grad])).sum(), own.sum()[None])

    def describe_batch(self, micro_batch):
        return f"{micro_batch.size} pairs"

    def report(self, step, total_steps):
        return {}

    def save_model(self, folder: Path, state_dict):
        folder.mkdir()
        torch.save(state_dict, folder / "weights")

    def export(self, folder: Path, results: Path):
        folder.rename(results / "model")


def new_model() -> nn.Module:
    set_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 4))


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-3, fused=True)


def run(output_dir: Path, batch_size: int, accumulation: int) -> None:
    accelerator = Accelerator(cpu=True)
    model = new_model()
    shape = StepShape(RECORDS, batch_size, accumulation, accelerator.num_processes, accelerator.process_index)
    config = TrainingConfig(
        model_name_or_path="a-model", output_dir=str(output_dir), warmup_proportion=0.0, stable_proportion=1.0,
        max_grad_norm=None, log_interval=1, num_workers=0, num_max_checkpoints=1, save_on_epoch_end=False,
    )  # fmt: skip
    state = TrainState("contrastive")
    if accelerator.is_main_process:
        claim(output_dir, state)
    steps = MixedSteps({"": ContrastiveSteps(shape)})
    origin = Provenance({}, {}, "DDP", accelerator.num_processes, {})
    Trainer(
        accelerator, model, new_optimizer(model), steps, ContrastiveTask(), config, None, state, origin
    ).train()


if __name__ == "__main__":
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    leave(0)
