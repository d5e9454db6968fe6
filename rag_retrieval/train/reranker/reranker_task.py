"""What the training loop needs to know of rerankers: the loss of a micro-batch, validation, saving, and a watch
for the commonest failure of all, a model that gives every pair the same score.
"""

import logging
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from rag_retrieval.losses import Loss
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.train.checkpoints import replace_folder
from rag_retrieval.train.reranker.training_data import RerankerMicroBatch
from rag_retrieval.train.reranker.validation import Validation

logger = logging.getLogger(__name__)

FLAT_SPREAD = 0.1  # standard deviation of scores below which they "hardly vary"; logits of a trained model span units
NEAR_CHANCE = 0.97  # of the chance level: a loss above that has learned next to nothing
PATIENCE = 3  # reports in a row before the warning

REMEDIES = (
    "the loss is at the level of a constant score (%.3f, chance %.3f) and scores hardly vary (standard deviation "
    "%.3f): the model gives every pair nearly the same score. Try, in this order: a larger head_lr (1e-3), a larger "
    "lr, more steps; then look whether labels are right (label histogram above), whether positives and negatives "
    "really differ, and whether max_len cuts the decisive text away"
)


class RerankerTask:
    """One run's loss, validation and files. `adapter` is the LoRA wrapper around `scorer.model`, if any."""

    def __init__(self, scorer: PairScorer, loss: Loss, validation: Validation | None, adapter=None):
        self.scorer, self.loss, self.validation, self.adapter = scorer, loss, validation, adapter
        self.watch = ChanceWatch(loss)

    def loss_sum(self, model: nn.Module, micro_batch: RerankerMicroBatch) -> torch.Tensor:
        scores = micro_batch.place_scores(model(micro_batch.pairs))
        loss = self.loss.function(scores, micro_batch.labels, micro_batch.mask, reduction="sum")
        self.watch.add(loss.detach(), scores.detach(), micro_batch)
        return loss

    def report(self) -> dict[str, float]:
        return self.watch.report()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return self.validation(model)

    def save_model(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        weights = {name.removeprefix("model."): value for name, value in state_dict.items()}
        if self.adapter is None:
            self.scorer.save_pretrained(folder, weights)
        else:
            self.adapter.save_pretrained(folder, state_dict=adapter_names(weights))

    def load_model(self, folder: Path) -> None:
        if self.adapter is None:
            load_weights(self.scorer.model, folder)
        else:
            load_adapter_weights(self.adapter, folder)

    def export(self, folder: Path, output_dir: Path) -> None:
        """output_dir/model, and for LoRA output_dir/adapter with the adapter merged into the former."""
        if self.adapter is None:
            replace_folder(output_dir / "model", lambda aside: copy_files(folder, aside))
            return
        replace_folder(output_dir / "adapter", lambda aside: copy_files(folder, aside))
        load_adapter_weights(self.adapter, folder)
        self.scorer.model = self.adapter.merge_and_unload()
        replace_folder(output_dir / "model", self.scorer.save_pretrained)


def copy_files(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


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


class ChanceWatch:
    """Compares the loss with that of the best constant score, and looks how much scores vary.

    It adds to the log `chance_loss` and `score_std`: the standard deviation of scores, within groups for grouped
    losses. It warns once, after PATIENCE reports in a row at chance level. Sums stay on the device until a report.
    """

    def __init__(self, loss: Loss):
        self.loss = loss
        self.flat_reports = 0
        self.warned = False
        self._clear()

    def _clear(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.labels: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.squares: list[torch.Tensor] = []
        self.items = self.pairs = 0

    def add(self, loss: torch.Tensor, scores: torch.Tensor, batch: RerankerMicroBatch) -> None:
        if batch.size == 0:
            return
        self.losses.append(loss)
        self.items += batch.items
        self.pairs += batch.size
        self.labels.append((batch.labels, batch.mask))
        counts = batch.mask.sum(-1, keepdim=True)
        deviations = (scores - scores.sum(-1, keepdim=True) / counts.clamp(min=1)) * batch.mask
        self.squares.append(deviations.square().sum())

    def report(self) -> dict[str, float]:
        if not self.items:
            self._clear()
            return {}
        loss = torch.stack(self.losses).sum().item() / self.items
        spread = (torch.stack(self.squares).sum().item() / self.pairs) ** 0.5
        chance = self._chance()
        self._clear()
        self._judge(loss, chance, spread)
        return {"chance_loss": chance, "score_std": spread}

    def _chance(self) -> float:
        widest = max(labels.shape[-1] for labels, _ in self.labels)
        if self.loss.dataset_type == "pointwise":
            parts = [(labels.cpu(), mask.cpu()) for labels, mask in self.labels]
            return self.loss.chance(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))
        pad = nn.functional.pad
        labels = torch.cat([pad(labels.cpu(), (0, widest - labels.shape[-1])) for labels, _ in self.labels])
        mask = torch.cat([pad(mask.cpu(), (0, widest - mask.shape[-1])) for _, mask in self.labels])
        return self.loss.chance(labels, mask)

    def _judge(self, loss: float, chance: float, spread: float) -> None:
        flat = chance > 0 and loss > NEAR_CHANCE * chance and spread < FLAT_SPREAD
        self.flat_reports = self.flat_reports + 1 if flat else 0
        if self.flat_reports >= PATIENCE and not self.warned:
            self.warned = True
            logger.warning(REMEDIES, loss, chance, spread)
