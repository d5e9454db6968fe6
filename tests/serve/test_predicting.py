"""`/predict`: scores of pairs beside the Reranker, over ASGI."""

import numpy as np
import pytest
from serve_embedding_samples import ask
from serve_samples import running_service

from rag_retrieval.infer.reranker import Reranker

PAIRS = [
    ["capital of France", "Paris"],
    ["fever", "The symptoms are fever and cough."],
    ["capital of France", "Bread"],
    ["水的沸点", "水在一百度时沸腾。"],
    ["capital of France", "Paris"],
    ["capital", ""],
]


@pytest.fixture
def service(backend):
    with running_service(backend, max_documents=8) as running:
        yield running


@pytest.mark.parametrize("raw", [False, True])
def test_pairs_are_scored_in_their_order(service, backend, raw):
    answer = ask(service, "/predict", json={"inputs": PAIRS, "raw_scores": raw}).json()
    expected = Reranker.from_backend(backend).compute_score(PAIRS[:5], normalize=not raw)
    assert [[entry.keys() for entry in each] for each in answer] == [[{"score", "label"}]] * 6
    found = [each[0]["score"] for each in answer]
    np.testing.assert_allclose(found[:5], expected, atol=1e-5)
    assert found[0] == found[4] and found[5] == (-10_000 if raw else 0)
    assert {each[0]["label"] for each in answer} == {"LABEL_0"}
    computed = service.metrics.registry.get_sample_value("rag_retrieval_items_total", {"model": "reranker"})
    assert computed == 4, "equal pairs are computed once, and one without text is not read"


def test_one_pair_that_stands_in_no_list_gets_one_answer(service):
    single = ask(service, "/predict", json={"inputs": PAIRS[0]})
    (listed,) = ask(service, "/predict", json={"inputs": PAIRS[:1]}).json()
    assert single.json()[0]["score"] == pytest.approx(listed[0]["score"], abs=1e-5) and len(single.json()) == 1
    assert single.headers["X-Score-Type"] == "sigmoid"


def test_long_pairs_are_cut_or_refused(service):
    pairs = [PAIRS[0], ["fever", "word " * 200]]
    assert ask(service, "/predict", json={"inputs": pairs}).status_code == 200
    response = ask(service, "/predict", json={"inputs": pairs, "truncate": False})
    assert (response.status_code, response.json()["error_type"]) == (422, "Validation")
    assert response.json()["error"].startswith("inputs[1]: longer than the 64 tokens")


def test_an_error_has_the_shape_of_text_embeddings_inference(service):
    for body, status, kind, words in (
        ({}, 422, "Validation", "inputs: missing"),
        ({"inputs": []}, 400, "Empty", "inputs: expected a pair"),
        ({"inputs": "one text"}, 422, "Validation", "inputs: not as expected; inputs takes a pair"),
        ({"inputs": ["one text"]}, 422, "Validation", "inputs: expected a pair [query, document], found 1"),
        ({"inputs": ["a", "b", "c"]}, 422, "Validation", "inputs: expected a pair [query, document], found 3"),
        ({"inputs": [["a", "b"], ["c"]]}, 422, "Validation", "inputs[1]: expected a pair"),
        ({"inputs": [["a", "b"], ["c", 3]]}, 422, "Validation", "inputs[1][1]: not as expected"),
        ({"inputs": [["a", "b"]] * 9}, 422, "Validation", "inputs: at most 8 are taken"),
        ({"inputs": ["a", "b" * 100_001]}, 422, "Validation", "inputs[1]: found 100001 characters"),
        ({"inputs": ["a", "b"], "truncation_direction": "Left"}, 422, "Validation", "truncation_direction: "),
        ({"inputs": ["a", "b"], "top_n": 1}, 422, "Validation", "top_n: "),
    ):
        response = ask(service, "/predict", json=body)
        answer = response.json()
        assert answer.keys() == {"error", "error_type"}
        assert (response.status_code, answer["error_type"]) == (status, kind), (body, answer)
        assert answer["error"].startswith(words), (body, answer)
