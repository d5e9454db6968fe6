"""Reranker training as a plain loop: one process, float32, no engine, every formula written out; for tests.

Only the data are the trainer's own: token ids and labels of each step. A step here
is one batch of all its records, padded, in one forward, however many processes and micro-batches the trainer takes.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import partial

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rag_retrieval.data.records import RecordRules
from rag_retrieval.data.store import open_store
from rag_retrieval.losses import LOSSES
from rag_retrieval.train.reranker.config import RerankerConfig
from rag_retrieval.train.reranker.objective import configured_objective
from rag_retrieval.train.reranker.run import load_scorer
from rag_retrieval.train.reranker.training_data import RerankerMicroBatch, SamplingOptions, TrainingSteps
from rag_retrieval.train.steps import StepShape

# of each document: token ids, token types, label, teacher's score (empty where none are read)
Group = tuple[list[list[int]], list[list[int]], list[float], list[float]]


def plain_training(
    values: dict, records_per_step: int, factors: list[float]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each step and the weights after the last.

    factors: of the learning rate, one for each step.
    """
    config = RerankerConfig(**values)
    torch.manual_seed(config.seed)
    model = AutoModelForSequenceClassification.from_pretrained(config.model_name_or_path, num_labels=1).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, config), eps=config.adam_epsilon, fused=False, foreach=False)
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for (alone, groups), factor in zip(mixed_step_groups(config, records_per_step), factors, strict=True):
        loss = step_loss(alone, group_scores(model, groups), groups)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        clip([parameter.grad for parameter in model.parameters()], config.max_grad_norm)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.step()
    return losses, model.state_dict()


def parameter_groups(model: PreTrainedModel, config: RerankerConfig) -> Iterator[dict]:
    """Matrices decay, vectors (biases, norms) do not; the new head has a rate of its own."""
    head = set((model.score if config.model_type == "llm_decoder" else model.classifier).parameters())
    for parameter in model.parameters():
        yield {
            "params": [parameter],
            "lr": config.head_lr if parameter in head else config.lr,
            "weight_decay": config.weight_decay if parameter.dim() > 1 else 0.0,
        }


def mixed_step_groups(
    config: RerankerConfig, records_per_step: int
) -> Iterator[tuple[RerankerConfig, list[Group]]]:
    """The groups of each step of the first epoch, with the configuration of a run on the step's file alone. Files of
    weight 1 take turns, each as evenly spread over the epoch as can be."""
    steps = []
    for place, (alone, weight) in enumerate(config.files):
        assert weight == 1.0
        of_file = list(step_groups(alone.model_copy(update={"seed": config.seed + place}), records_per_step))
        due = [(Fraction(2 * step + 1, 2 * len(of_file)), place) for step in range(len(of_file))]
        steps += [(*when, alone, groups) for when, groups in zip(due, of_file, strict=True)]
    for *_, alone, groups in sorted(steps, key=lambda step: step[:2]):
        yield alone, groups


def step_groups(config: RerankerConfig, records_per_step: int) -> Iterator[list[Group]]:
    """The groups of each step of the first epoch; for pointwise losses each pair is a group."""
    objective = configured_objective(config)
    rules = RecordRules(exactly_one_positive=objective.one_positive, teacher_key=config.teacher_score_key)
    store = open_store(config.train_dataset, rules, group_by_query=True)
    records = store.num_groups if objective.grouped else store.num_pairs
    shape = StepShape(records, records_per_step, accumulation=1)
    options = SamplingOptions(config.seed, config.train_group_size, 0.0, 1.0, shuffle_rate=0.0)
    steps = TrainingSteps(store, "train", load_scorer(config).pair_encoder, objective, shape, options)
    for step in range(steps.steps_per_epoch):
        (batch,) = steps[0, step]
        yield list(groups_of(batch))


def groups_of(batch: RerankerMicroBatch) -> Iterator[Group]:
    ends = np.cumsum(batch.pairs.lengths)[:-1]
    ids = [row.tolist() for row in np.split(batch.pairs.ids, ends)]
    types = [[0] * len(row) for row in ids]
    if batch.pairs.types is not None:
        types = [row.tolist() for row in np.split(batch.pairs.types, ends)]
    start = 0
    for row, mask in enumerate(batch.mask):
        labels = batch.labels[row][mask].tolist()
        teacher_scores = [] if batch.teacher_scores is None else batch.teacher_scores[row][mask].tolist()
        stop = start + len(labels)
        yield ids[start:stop], types[start:stop], labels, teacher_scores
        start = stop


def group_scores(model: PreTrainedModel, groups: list[Group]) -> list[torch.Tensor]:
    """The scores of each group: [documents]. One padded forward over all pairs of the step."""
    rows = [row for ids, *_ in groups for row in ids]
    types = [row for _, rows_types, *_ in groups for row in rows_types]
    real = [[1] * len(row) for row in rows]
    inputs = {"input_ids": padded(rows, model.config.pad_token_id), "attention_mask": padded(real)}
    if hasattr(model, "score"):  # a decoder: the score of the last token
        hidden = model.model(**inputs).last_hidden_state
        last = torch.stack([hidden[place, len(row) - 1] for place, row in enumerate(rows)])
        scores = model.score(last)[:, 0]
    else:
        scores = model(**inputs, token_type_ids=padded(types)).logits[:, 0]
    return list(scores.split([len(ids) for ids, *_ in groups]))


def padded(rows: list[list[int]], value: int = 0) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def step_loss(config: RerankerConfig, scores: list[torch.Tensor], groups: list[Group]) -> torch.Tensor:
    """The mean of each loss over the step, weighted."""
    labels, teacher_scores = [group[2] for group in groups], [group[3] for group in groups]
    from_teacher = config.loss_type in ("margin_mse", "kl_distillation")
    options = {option.name: getattr(config, option.name) for option in LOSSES[config.loss_type].options}
    loss = mean_loss(config.loss_type, scores, teacher_scores if from_teacher else labels, options)
    if config.teacher_loss_type is None:
        return loss
    weight = config.teacher_weight
    learned = LOSSES[config.teacher_loss_type]
    options = {option.name: getattr(config, f"teacher_{option.name}") for option in learned.options}
    return (1 - weight) * loss + weight * mean_loss(config.teacher_loss_type, scores, teacher_scores, options)


def mean_loss(loss_type: str, scores: list[torch.Tensor], labels: list[list[float]], options: dict) -> torch.Tensor:
    """The mean of all terms of the step; 0 with a graph where there is none."""
    terms_of = partial(TERMS[loss_type], **options)
    terms = [term for group, of_group in zip(scores, labels, strict=True) for term in terms_of(group, of_group)]
    return torch.stack(terms).mean() if terms else sum(group.sum() for group in scores) * 0.0


def bce_terms(scores: torch.Tensor, labels: list[float]) -> Iterator[torch.Tensor]:
    for score, label in zip(scores, labels, strict=True):
        yield -(label * score.sigmoid().log() + (1 - label) * (-score).sigmoid().log())


def mse_terms(scores: torch.Tensor, labels: list[float]) -> Iterator[torch.Tensor]:
    for score, label in zip(scores, labels, strict=True):
        yield (score.sigmoid() - label) ** 2


def ranknet_terms(scores: torch.Tensor, labels: list[float]) -> Iterator[torch.Tensor]:
    for lower, label in zip(scores, labels, strict=True):
        for higher, other in zip(scores, labels, strict=True):
            if label < other:
                yield (other - label) * (1 + (lower - higher).exp()).log()


def listwise_terms(scores: torch.Tensor, labels: list[float], temperature: float) -> Iterator[torch.Tensor]:
    scores = scores / temperature
    yield scores.exp().sum().log() - scores[labels.index(1.0)]


def listnet_terms(scores: torch.Tensor, labels: list[float]) -> Iterator[torch.Tensor]:
    weights = [math.exp(label) for label in labels]
    if len(set(labels)) > 1:
        yield sum(w / sum(weights) * (scores.exp().sum().log() - s) for w, s in zip(weights, scores, strict=True))


def levels(scores: torch.Tensor, labels: list[float]) -> list[tuple[int, torch.Tensor]]:
    """(place, -log of its probability among all that are not above it), for documents above the lowest."""
    return [
        (place, sum(s.exp() for s, other in zip(scores, labels, strict=True) if other <= label).log() - scores[place])
        for place, label in enumerate(labels)
        if label > min(labels)
    ]


def listmle_terms(scores: torch.Tensor, labels: list[float]) -> Iterator[torch.Tensor]:
    if len(set(labels)) > 1:
        yield sum(term for _, term in levels(scores, labels))


def position_listmle_terms(scores: torch.Tensor, labels: list[float]) -> Iterator[torch.Tensor]:
    ranked = sorted(labels, reverse=True)
    weights = [2 ** (len(labels) - rank) - 1 for rank in range(1, len(labels) + 1)]
    if len(set(labels)) > 1:
        of_label = {y: [w for w, x in zip(weights, ranked, strict=True) if x == y] for y in labels}
        shares = {y: sum(of) / len(of) / sum(weights) for y, of in of_label.items()}
        yield sum(shares[labels[place]] * term for place, term in levels(scores, labels))


def lambda_terms(
    scores: torch.Tensor, labels: list[float], lambda_weights: str, lambda_top_k: int | None
) -> Iterator[torch.Tensor]:
    """LambdaRank, or NDCG-Loss2++, of the whole ranking or of its first lambda_top_k."""
    order = sorted(range(len(labels)), key=lambda place: (-scores[place].item(), labels[place]))
    rank = {place: position for position, place in enumerate(order, 1)}
    best = sorted(labels, reverse=True)[:lambda_top_k]
    ideal = sum((2**y - 1) / math.log2(1 + r) for r, y in enumerate(best, 1))
    terms = []
    for i, high in enumerate(labels):
        for j, low in enumerate(labels):
            if high > low and min(rank[i], rank[j]) <= (lambda_top_k or len(labels)):
                apart = abs(rank[i] - rank[j])
                weight = abs(1 / math.log2(1 + rank[i]) - 1 / math.log2(1 + rank[j]))
                if lambda_weights == "ndcg_loss2pp":
                    weight += 10 * (1 / math.log2(1 + apart) - 1 / math.log2(2 + apart))
                error = (1 + (scores[j] - scores[i]).exp()).log() / math.log(2)
                terms.append(weight * (2**high - 2**low) / ideal * error)
    if terms:
        yield sum(terms)


def info_nce_terms(scores: torch.Tensor, labels: list[float], temperature: float) -> Iterator[torch.Tensor]:
    scores = scores / temperature
    negatives = [s.exp() for s, label in zip(scores, labels, strict=True) if label == min(labels)]
    for score, label in zip(scores, labels, strict=True):
        if label > min(labels):
            yield -(score.exp() / (score.exp() + sum(negatives))).log()


def adr_terms(scores: torch.Tensor, labels: list[float]) -> Iterator[torch.Tensor]:
    for score, label in zip(scores, labels, strict=True):
        rank = sum(y > label for y in labels) + (labels.count(label) + 1) / 2
        if len(set(labels)) > 1:
            yield (rank - (0.5 + (scores - score).sigmoid().sum())) ** 2 / math.log2(1 + rank)


def margin_terms(scores: torch.Tensor, teacher_scores: list[float]) -> Iterator[torch.Tensor]:
    for i in range(len(scores)):
        for j in range(i):
            yield ((scores[i] - scores[j]) - (teacher_scores[i] - teacher_scores[j])) ** 2


def kl_terms(scores: torch.Tensor, teacher_scores: list[float], temperature: float) -> Iterator[torch.Tensor]:
    target, student = ((values / temperature).softmax(0) for values in (torch.tensor(teacher_scores), scores))
    if len(scores) > 1:
        yield temperature**2 * (target * (target.log() - student.log())).sum()


TERMS = {
    "point_ce": bce_terms,
    "point_mse": mse_terms,
    "pairwise_ranknet": ranknet_terms,
    "listwise_ce": listwise_terms,
    "listnet": listnet_terms,
    "listmle": listmle_terms,
    "position_listmle": position_listmle_terms,
    "lambda_loss": lambda_terms,
    "info_nce": info_nce_terms,
    "adr_mse": adr_terms,
    "margin_mse": margin_terms,
    "kl_distillation": kl_terms,
}


def clip(gradients: list[torch.Tensor], limit: float | None) -> None:
    norm = math.sqrt(sum((gradient.double() ** 2).sum().item() for gradient in gradients))
    if limit is not None and norm > limit:
        for gradient in gradients:
            gradient.mul_(limit / norm)
