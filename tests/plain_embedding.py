"""Embedder training as a plain loop: one process, float32, no engine, every formula written out; for tests.

A step is one padded forward of all its texts, and autograd goes through all of it. Only the order of the records is the
trainer's own.
"""

import json
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from rag_retrieval.data.sampling import epoch_order


def plain_training(values: dict, records_per_step: int, factors: list[float], parts: int = 1) -> tuple[list, dict]:
    """The loss of each step and the weights after the last: InfoNCE of a BERT with mean pooling. factors: of the
    learning rate, one for each step. parts: into which the records of a step are dealt in turn; each has its own
    documents as negatives alone."""
    records = [json.loads(line) for line in Path(values["train_dataset"]).read_text().splitlines()]
    positives: dict[str, set[str]] = {}
    for record in records:
        positives.setdefault(record["query"], set()).update(record["pos"])
    order = epoch_order(42, 0, len(records))
    model = AutoModel.from_pretrained(values["model_name_or_path"]).train()
    tokenizer = AutoTokenizer.from_pretrained(values["model_name_or_path"])
    optimizer = optimizer_of(
        {name: each for name, each in model.named_parameters() if "pooler" not in name}, values
    )
    losses = []
    for step, factor in enumerate(factors):
        own = [records[place] for place in order[step * records_per_step : (step + 1) * records_per_step]]
        shares = [own[part::parts] for part in range(parts)]
        loss = sum(step_loss(model, tokenizer, share, positives, values) for share in shares) / parts
        losses.append(loss.item())
        take_step(optimizer, loss, model.parameters(), values, factor)
    return losses, model.state_dict()


def optimizer_of(parameters: dict[str, torch.nn.Parameter], values: dict) -> torch.optim.AdamW:
    groups = [{"params": [each], "weight_decay": 0.01 if each.dim() > 1 else 0.0} for each in parameters.values()]
    return torch.optim.AdamW(groups, lr=1.0, eps=values["adam_epsilon"], fused=False, foreach=False)


def take_step(optimizer, loss, parameters, values: dict, factor: float) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(list(parameters), values["max_grad_norm"])
    for group in optimizer.param_groups:
        group["lr"] = values["lr"] * factor
    optimizer.step()


def step_loss(
    model: PreTrainedModel, tokenizer, records: list[dict], positives: dict[str, set[str]], values: dict
) -> torch.Tensor:
    queries = [record["query"] for record in records]
    documents = list(dict.fromkeys(text for record in records for text in (*record["pos"], *record["neg"])))
    query_vectors = vectors(model, tokenizer, queries, values["query_max_len"])
    document_vectors = vectors(model, tokenizer, documents, values["passage_max_len"])
    terms = []
    for record, query in zip(records, query_vectors, strict=True):
        (positive,) = record["pos"]
        cosines = {text: query @ vector / values["temperature"] for text, vector in zip(documents, document_vectors)}  # noqa: B905
        negatives = documents if values.get("use_inbatch_neg", True) else record["neg"]
        others = [cosines[text] for text in negatives if text not in positives[record["query"]]]
        terms.append(torch.stack([cosines[positive], *others]).logsumexp(0) - cosines[positive])
    return torch.stack(terms).mean()


def vectors(model: PreTrainedModel, tokenizer, texts: list[str], max_length: int) -> torch.Tensor:
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    states = model(**inputs).last_hidden_state
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
