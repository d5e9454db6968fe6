"""Unified training as a plain loop: one process, float32, one padded forward, every score of a pair taken alone; for
tests. Only the order of the records is the trainer's own.

Dense vectors are means, lexical weights the largest ReLU of each token id, token vectors those after the first token.
"""

import json
from pathlib import Path

import torch
from plain_embedding import optimizer_of, take_step
from torch.nn.functional import linear, normalize
from transformers import AutoModel, AutoTokenizer

from rag_retrieval.data.sampling import epoch_order

Text = tuple[torch.Tensor, dict[int, torch.Tensor], torch.Tensor]  # dense vector, weight of each id, token vectors


def plain_unified(values: dict, records_per_step: int, factors: list[float], taught_from: int) -> tuple[list, dict]:
    """The loss of each step and the weights after the last, heads among them: of InfoNCE with BGE-M3's weights, and
    self-distillation from the step numbered `taught_from` on. The model's folder is in bge-m3's layout."""
    records = [json.loads(line) for line in Path(values["train_dataset"]).read_text().splitlines()]
    positives: dict[str, set[str]] = {}
    for record in records:
        positives.setdefault(record["query"], set()).update(record["pos"])
    order = epoch_order(42, 0, len(records))
    folder = Path(values["model_name_or_path"])
    model = AutoModel.from_pretrained(folder).train()
    heads = {
        f"{name}.{key}": value.requires_grad_()
        for name in ("sparse_linear", "colbert_linear")
        for key, value in torch.load(folder / f"{name}.pt", weights_only=True).items()
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parameters = {name: each for name, each in model.named_parameters() if "pooler" not in name} | heads
    optimizer = optimizer_of(parameters, values)
    losses = []
    for step, factor in enumerate(factors):
        own = [records[place] for place in order[step * records_per_step : (step + 1) * records_per_step]]
        loss = step_loss(model, heads, tokenizer, own, positives, values, step >= taught_from)
        losses.append(loss.item())
        take_step(optimizer, loss, parameters.values(), values, factor)
    return losses, {name: each.detach() for name, each in parameters.items()}


def step_loss(model, heads, tokenizer, records, positives, values, taught: bool) -> torch.Tensor:
    queries = list(dict.fromkeys(record["query"] for record in records))
    documents = list(dict.fromkeys(text for record in records for text in (*record["pos"], *record["neg"])))
    of_queries = dict(zip(queries, texts_of(model, heads, tokenizer, queries, values["query_max_len"]), strict=True))
    of_documents = texts_of(model, heads, tokenizer, documents, values["passage_max_len"])
    terms = []
    for record in records:
        pairs = [scores(of_queries[record["query"]], document) for document in of_documents]
        table = torch.stack([torch.stack(pair) for pair in pairs], dim=1) / values["temperature"]  # [4, documents]
        (positive,) = record["pos"]
        candidates = [text == positive or text not in positives[record["query"]] for text in documents]
        left = table[:, torch.tensor(candidates)].logsumexp(1) - table[:, documents.index(positive)]
        loss = (left[0] + 0.1 * left[1] + left[2] + left[3]) / 4
        if taught:
            teacher = table[3].detach().softmax(0)
            distances = [(teacher * (teacher.log() - own.log_softmax(0))).sum() for own in table[:3]]
            loss = (loss + (distances[0] + 0.1 * distances[1] + distances[2]) / 3) / 2
        terms.append(loss)
    return torch.stack(terms).mean()


def texts_of(model, heads, tokenizer, texts: list[str], max_length: int) -> list[Text]:
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    states = model(**inputs).last_hidden_state
    found = []
    for ids, mask, state in zip(inputs["input_ids"], inputs["attention_mask"], states, strict=True):
        ids, state = ids[mask.bool()].tolist(), state[mask.bool()]
        weights: dict[int, torch.Tensor] = {}
        for token, weight in zip(ids, linear(state, heads["sparse_linear.weight"], heads["sparse_linear.bias"]), strict=True):  # noqa: E501
            if token not in tokenizer.all_special_ids:
                weight = weight[0].relu()
                weights[token] = torch.maximum(weights[token], weight) if token in weights else weight
        vectors = linear(state[1:], heads["colbert_linear.weight"], heads["colbert_linear.bias"])
        found.append((normalize(state.mean(0), dim=0), weights, normalize(vectors, dim=1)))
    return found


def scores(query: Text, document: Text) -> tuple[torch.Tensor, ...]:
    """Dense, lexical, multi_vector, ensemble."""
    dense = query[0] @ document[0]
    lexical = sum((query[1][token] * document[1][token] for token in query[1] if token in document[1]), dense * 0)
    multi_vector = (query[2] @ document[2].T).max(1).values.mean()
    return dense, lexical, multi_vector, dense + 0.3 * lexical + multi_vector
