"""What the embedding endpoints have in common: hostile bodies, many requests at once, and what is counted."""

import asyncio
import json

import numpy as np
import pytest
from serve_embedding_samples import ask, running_embedder
from serve_samples import client_of

from rag_retrieval.serve.http import RequestError


@pytest.fixture(scope="module")
def service(embedders):
    with running_embedder(embedders["unified"]) as running:
        yield running


def endpoint_of(service, path: str):
    return next(each for each in service.endpoints if path in each.paths)


@pytest.mark.parametrize(("path", "key"), [("/v1/embeddings", "input"), ("/embed", "inputs"), ("/v2/embed", "texts")])
def test_a_hostile_body_of_four_megabytes_is_refused(service, path, key):
    start = f'{{"{key}": '.encode()
    for body in (
        start + b"[" + b"1," * 2_000_000 + b"1]}",
        start + b'["a",' + b"1," * 2_000_000 + b"1]}",
        start + b"[" + b"[1]," * 1_000_000 + b"[1]]}",
        start + b"[" * 2_000_000 + b"]" * 2_000_000 + b"}",
        start + b"[" * 300 + b"]" * 300 + b', "pad": "' + b" " * 10_000 + b'"}',
        start + b"[" + b"{}," * 1_300_000 + b"{}]}",
        start + b"[" + b'"",' * 1_300_000 + b'""]}',
        start + b"[" + b"1e5," * 1_000_000 + b"1]}",
        start + b"9" * 4_000_000 + b"}",
        start + b'"a", ' + b",".join(b'"%d":1' % name for name in range(300_000)) + b"}",
    ):
        with pytest.raises(RequestError) as caught:
            endpoint_of(service, path).parse(body, path)
        assert caught.value.status in (400, 422) and len(caught.value.message) < 250


def test_a_body_that_is_no_object_names_the_keys_of_its_own_service(service):
    for path, key in (("/v1/embeddings", "input"), ("/embed", "inputs"), ("/v2/embed", "texts")):
        with pytest.raises(RequestError, match=f"expected an object with {key}$"):
            endpoint_of(service, path).parse(b"[]", path)


def test_half_a_surrogate_pair_is_no_json(service):
    for path, body in (
        ("/v1/embeddings", b'{"input": "\\ud83d"}'),
        ("/embed", b'{"inputs": ["a", "\\udc3c x"]}'),
        ("/v2/embed", b'{"texts": ["\\ud83d\\ud83d"]}'),
        ("/similarity", b'{"inputs": {"source_sentence": "\\ud83d", "sentences": ["a"]}}'),
        ("/tokenize", b'{"inputs": "\\ud83d"}'),
    ):
        assert ask(service, path, content=body).status_code == 400, path
    whole = ask(service, "/tokenize", content=b'{"inputs": "\\ud83d\\udc3c", "add_special_tokens": false}')
    assert whole.status_code == 200 and "".join(token["text"] for token in whole.json()[0]) == "🐼"


def test_requests_of_all_kinds_at_once_get_their_own_answers(service, embedders):
    """They share batches, and each is compared with the embedder alone."""
    embedder, generator = embedders["unified"], np.random.default_rng(0)
    texts = [[f"{number} {place} 水 Paris" for place in range(generator.integers(1, 9))] for number in range(24)]
    paths = ["/v1/embeddings", "/embed_sparse", "/embed_all", "/v2/embed"]
    keys = {"/v1/embeddings": "input", "/v2/embed": "texts"}

    async def all_at_once():
        async with client_of(service, timeout=600) as client:
            asked = []
            for number, own in enumerate(texts):
                path = paths[number % 4]
                asked.append(client.post(path, json={keys.get(path, "inputs"): own}))
            return await asyncio.gather(*asked)

    for number, (own, response) in enumerate(zip(texts, asyncio.run(all_at_once()), strict=True)):
        answer, path = response.json(), paths[number % 4]
        expected = embedder.encode(own, outputs=embedder.settings.representations)
        if path == "/embed_sparse":
            for place, entries in enumerate(answer):
                found = {entry["index"]: entry["value"] for entry in entries}
                assert found == pytest.approx(expected.lexical.by_id(place), abs=1e-5)
        elif path == "/embed_all":
            for vectors, other in zip(answer, expected.multi_vector, strict=True):
                np.testing.assert_allclose(vectors, other, atol=1e-5)
        else:
            vectors = answer["embeddings"]["float"] if path == "/v2/embed" else [e["embedding"] for e in answer["data"]]
            np.testing.assert_allclose(vectors, expected.dense, atol=1e-5)


def test_equal_texts_are_computed_once_and_counted(embedders):
    with running_embedder(embedders["dense"]) as service:
        ask(service, "/embed", json={"inputs": ["a", "b", "a", "Paris " * 99]})
        text = ask(service, "/metrics", "GET").text
    lengths = [len(text) for text in embedders["dense"].backend.text_encoder.encode(["a", "b", "Paris " * 99])]
    lines = text.splitlines()
    assert f'rag_retrieval_tokens_total{{model="embedder"}} {sum(lengths)}.0' in lines
    assert 'rag_retrieval_requests_total{path="/embed",status="200"} 1.0' in lines
    assert any(line.startswith("rag_retrieval_truncated") and line.endswith(" 1.0") for line in lines)


def test_a_request_counts_as_many_documents_as_it_has_texts(service):
    for path, body, expected in (
        ("/embed", {"inputs": ["a", "a", "b"]}, 3),
        ("/embed", {"inputs": [1, 2, 3]}, 1),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}}, 3),
        ("/tokenize", {"inputs": ["a", "b"]}, 2),
    ):
        endpoint = endpoint_of(service, path)
        assert endpoint.size(endpoint.parse(json.dumps(body).encode(), path)) == expected


def test_queries_go_before_the_documents_of_others(embedders, monkeypatch):
    with running_embedder(embedders["dense"]) as service:
        batcher, seen = service.batchers["embedder"], []
        submit = batcher.submit
        monkeypatch.setattr(batcher, "submit", lambda items, first=False: seen.append(first) or submit(items, first))
        for path, body in (
            ("/embed", {"inputs": "a", "prompt_name": "query"}),
            ("/embed", {"inputs": "a", "prompt_name": "document"}),
            ("/v2/embed", {"texts": ["a"], "input_type": "search_query"}),
            ("/v2/embed", {"texts": ["a"], "input_type": "search_document"}),
            ("/v1/embeddings", {"input": "a"}),
        ):
            assert ask(service, path, json=body).status_code == 200
    assert seen == [True, False, True, False, False]
