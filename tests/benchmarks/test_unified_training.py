"""The step that the benchmark of unified training times: its gradients are those of plain loops over padded outputs."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_bert

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import unified_training as benchmark

from rag_retrieval.models.token_batch import make_batch

QUERIES = ["what is a panda", "capital of france"]
DOCUMENTS = ["a panda is a bear", "paris", "a bear", "what", "is", "of"]


def losses_by_loops(model, temperature=benchmark.TEMPERATURE):
    """Mean loss with a graph through the model's outputs, from one forward for each text."""
    encoder = model.text_encoder
    sides = [[model(make_batch(encoder.encode([text], kind))) for text in texts]
             for kind, texts in (("query", QUERIES), ("document", DOCUMENTS))]  # fmt: skip

    def scores(query, document):
        dense = torch.cosine_similarity(query.dense[0], document.dense[0], dim=0)
        weights = dict(zip(document.lexical.ids.tolist(), document.lexical.weights, strict=True))
        pairs = zip(query.lexical.ids.tolist(), query.lexical.weights, strict=True)
        lexical = sum((weight * weights[key] for key, weight in pairs if key in weights), torch.tensor(0.0))
        products = query.multi_vector.vectors @ document.multi_vector.vectors.T
        return torch.stack([dense, lexical, products.amax(dim=1).mean()])

    matrix = torch.stack([torch.stack([scores(query, document) for document in sides[1]]) for query in sides[0]])
    dense, lexical, tokens = (matrix / temperature).unbind(dim=2)
    labels = torch.arange(len(QUERIES))
    loss = [torch.nn.functional.cross_entropy(each, labels) for each in (dense, lexical, tokens)]
    ensemble = torch.nn.functional.cross_entropy(dense + 0.3 * lexical + tokens, labels)
    return (loss[0] + 0.1 * loss[1] + loss[2] + ensemble) / 4


def test_a_step_of_a_model_has_the_loss_and_gradients_of_loops(tmp_path):
    model = benchmark.open_model(tiny_bert(tmp_path), 32)
    expected = losses_by_loops(model)
    expected.backward()
    wanted = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    assert any("token_heads" in name for name in wanted) and len(wanted) > 10
    model.zero_grad()
    assert benchmark.our_step(model)(QUERIES, DOCUMENTS) == pytest.approx(expected.item(), rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())  # some are 0 but for rounding
    for name, each in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(each.grad, wanted[name], rtol=1e-4, atol=1e-5 * largest)


def test_a_step_has_no_text_twice(tmp_path):
    records = [{"query": f"q{i % 3}", "pos": [f"p{i}"], "neg": [f"n{i}", f"m{i}", "same" if i < 2 else f"l{i}", "no"]}
               for i in range(4)]  # fmt: skip
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    ((queries, documents),) = benchmark.step_texts(argparse.Namespace(records=str(file), queries=2))
    assert queries == ["q0", "q2"]  # the second record shares a negative with the first
    assert documents == ["p0", "p2", "n0", "m0", "same", "n2", "m2", "l2"]
