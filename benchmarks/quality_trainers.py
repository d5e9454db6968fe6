"""The two trainers that `quality.py` compares: ours, and the CrossEncoderTrainer of sentence-transformers.

Both get the same records, pairs per step, epochs, learning rates (the fresh head's own included), weight
decay, clipping, length and precision. What differs: the order of records and the head's first values
come from each library's own use of the seed, and sentence-transformers' warmup begins at a learning rate of
0, ours one step above it.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import nn

PAIRS_PER_STEP = 32
WARMUP, WEIGHT_DECAY, MAX_GRAD_NORM = 0.1, 0.01, 1.0
SCORING_BATCH = 64  # pairs
POINTWISE = ("point_ce", "point_mse")

Pairs = list[tuple[str, str]]  # query and document
Record = dict  # {"query": text, "pos": [one text], "neg": [texts]}


@dataclass(frozen=True)
class Recipe:
    """How to train. negatives: documents of a group beside the positive. max_len: tokens of a pair. precision:
    no (float32) or bf16 (autocast). keys: KEY=VALUE, values as in YAML, of our configuration alone."""

    model: str
    loss: str
    negatives: int
    max_len: int
    lr: float
    head_lr: float
    seed: int
    precision: str
    epochs: int = 1
    keys: Sequence[str] = ()

    @property
    def groups_per_step(self) -> int:
        return max(1, PAIRS_PER_STEP // (self.negatives + 1))

    @property
    def pairs_per_step(self) -> int:
        return self.groups_per_step * (self.negatives + 1)


def train_ours(data: Path, recipe: Recipe, work: Path) -> Path:
    """Run the real command on a YAML file. Returns the model's folder; RuntimeError when it fails."""
    from rag_retrieval.train.reranker.train_reranker import main

    os.environ["RAG_RETRIEVAL_CACHE"] = str(work / "cache")
    config = work / "training.yaml"
    config.write_text(yaml.safe_dump(our_config(recipe, data, work / "out")), encoding="utf-8")
    code = main(["--config", str(config)])
    if code:
        raise RuntimeError(f"training ended with exit code {code}; its message is above")
    return work / "out" / "model"


def our_config(recipe: Recipe, data: Path, output_dir: Path) -> dict:
    pointwise = recipe.loss in POINTWISE
    config = {
        "model_name_or_path": recipe.model,
        "model_type": "bert_encoder",
        "max_len": recipe.max_len,
        "train_dataset": str(data),
        "train_dataset_type": "pointwise" if pointwise else "grouped",
        "loss_type": recipe.loss,
        "output_dir": str(output_dir),
        "epochs": recipe.epochs,
        "batch_size": recipe.pairs_per_step if pointwise else recipe.groups_per_step,
        "lr": recipe.lr,
        "head_lr": recipe.head_lr,
        "weight_decay": WEIGHT_DECAY,
        "warmup_proportion": WARMUP,
        "max_grad_norm": MAX_GRAD_NORM,
        "mixed_precision": recipe.precision,
        "seed": recipe.seed,
        "num_workers": 0,  # as the other side, which tokenizes between two steps too
        "save_on_epoch_end": False,  # the final model is written anyway
    }
    if not pointwise:
        config["train_group_size"] = recipe.negatives + 1
    return config | {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in recipe.keys)}


def score_ours(model_folder: Path, pairs: Pairs, max_len: int) -> list[float]:
    from rag_retrieval import load_reranker

    reranker = load_reranker(model_folder).to(best_device())
    return reranker.compute_score(pairs, batch_size=SCORING_BATCH, max_length=max_len).tolist()


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def train_sentence_transformers(data: Path, recipe: Recipe, work: Path) -> Path:
    """CrossEncoderTrainer with its library's own losses where it has them. Returns the model's folder.

    data: JSON lines {"query", "pos": [one text], "neg": [texts]}.
    """
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from transformers import set_seed

    from rag_retrieval.models.settings import resolve_model_path

    path = resolve_model_path(recipe.model)
    head = new_parameters(path)
    set_seed(recipe.seed)  # the head is drawn before the trainer sets its seed
    model = CrossEncoder(path, num_labels=1, max_length=recipe.max_len, activation_fn=nn.Identity())
    model.float()
    pointwise = recipe.loss in POINTWISE
    settings = CrossEncoderTrainingArguments(
        output_dir=str(work / "trainer"),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.pairs_per_step if pointwise else recipe.groups_per_step,
        learning_rate=recipe.lr,
        learning_rate_mapping={re.escape(name) + "$": recipe.head_lr for name in head},
        weight_decay=WEIGHT_DECAY,
        warmup_steps=WARMUP,  # below 1 it is a share
        lr_scheduler_type="cosine",
        max_grad_norm=MAX_GRAD_NORM,
        seed=recipe.seed,
        bf16=recipe.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),  # without it, bf16 is refused on a CPU
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        logging_steps=10,
    )
    loss = sentence_transformers_loss(recipe.loss, model)
    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    rows = pair_rows(records) if pointwise else group_rows(records)
    CrossEncoderTrainer(model=model, args=settings, train_dataset=as_dataset(rows), loss=loss).train()
    model.save_pretrained(str(work / "model"), create_model_card=False)
    return work / "model"


def new_parameters(model_path: str) -> set[str]:
    """Names of the parameters that the base has no values for: the head, which learns at head_lr."""
    from rag_retrieval import CrossEncoder

    return CrossEncoder.from_pretrained(model_path).new_parameters


def as_dataset(rows: list[dict]):
    from datasets import Dataset

    return Dataset.from_list(rows)


def pair_rows(records: list[Record]) -> list[dict]:
    return [
        {"query": record["query"], "document": document, "label": label}
        for record in records
        for label, key in ((1.0, "pos"), (0.0, "neg"))
        for document in record[key]
    ]


def group_rows(records: list[Record]) -> list[dict]:
    return [
        {
            "query": record["query"],
            "documents": [*record["pos"], *record["neg"]],
            "labels": [1.0] * len(record["pos"]) + [0.0] * len(record["neg"]),
        }
        for record in records
    ]


def sentence_transformers_loss(name: str, model) -> nn.Module:
    """mini_batch_size -1: all pairs of a step in one forward pass, as ours; the default splits them.

    reduction_log: RankNet's loss in nats, as ours; the default, in bits, is larger by a constant factor.
    """
    from sentence_transformers.cross_encoder import losses

    if name == "point_ce":
        return losses.BinaryCrossEntropyLoss(model)
    if name == "point_mse":
        return losses.MSELoss(model, activation_fn=nn.Sigmoid())
    if name == "pairwise_ranknet":
        return losses.RankNetLoss(model, mini_batch_size=-1, reduction_log="natural")
    if name == "listwise_ce":
        return GroupCrossEntropy(model)
    of_name = {
        "listnet": losses.ListNetLoss,
        "listmle": partial(losses.ListMLELoss, respect_input_order=False),
        "position_listmle": partial(losses.PListMLELoss, respect_input_order=False),
        "lambda_loss": losses.LambdaLoss,  # its default weights are NDCG-Loss2++, as ours
        "adr_mse": losses.ADRMSELoss,
    }
    return of_name[name](model, mini_batch_size=-1)


class GroupCrossEntropy(nn.Module):
    """listwise_ce for CrossEncoderTrainer: cross entropy of the one positive against its group, their mean.

    The library has none without negatives from the rest of the batch, and its ListNet is another loss, whose
    target is a softmax of the labels.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs: list, labels: list[torch.Tensor], prompt=None, task=None) -> torch.Tensor:
        from sentence_transformers.util import batch_to_device

        queries, groups = inputs
        pairs = [(query, text) for query, group in zip(queries, groups, strict=True) for text in group]
        features = batch_to_device(self.model.preprocess(pairs, prompt=prompt, task=task), self.model.device)
        scores = self.model(features)["scores"].view(-1).split([len(group) for group in groups])
        losses = [-row.log_softmax(0)[label.argmax()] for row, label in zip(scores, labels, strict=True)]
        return torch.stack(losses).mean()


def score_sentence_transformers(model_folder: Path, pairs: Pairs, max_len: int) -> list[float]:
    from sentence_transformers.cross_encoder import CrossEncoder

    model = CrossEncoder(str(model_folder), max_length=max_len, activation_fn=nn.Identity())
    return model.predict(pairs, batch_size=SCORING_BATCH, show_progress_bar=False).tolist()


def score_cosine(model: str, pairs: Pairs, max_len: int) -> list[float]:
    """Cosine of query and document, with the base as an embedding model, pooled as its folder says."""
    from sentence_transformers import SentenceTransformer

    from rag_retrieval.models.settings import resolve_model_path

    embedder = SentenceTransformer(resolve_model_path(model))
    embedder.max_seq_length = max_len
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    vectors = embedder.encode(texts, batch_size=SCORING_BATCH, normalize_embeddings=True, show_progress_bar=False)
    place = {text: position for position, text in enumerate(texts)}
    return [float(vectors[place[query]] @ vectors[place[document]]) for query, document in pairs]
