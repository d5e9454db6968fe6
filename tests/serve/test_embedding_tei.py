"""The requests of text-embeddings-inference: answers by hand, its errors, and the client of huggingface_hub."""

import math

import huggingface_hub
import numpy as np
import pytest
from serve_embedding_samples import MIXED, ask, running_embedder
from serve_samples import listening


@pytest.fixture(scope="module")
def service(embedders):
    with running_embedder(embedders["dense"], max_documents=8) as running:
        yield running


@pytest.fixture(scope="module")
def unified(embedders):
    with running_embedder(embedders["unified"]) as running:
        yield running


def test_embed_gives_a_list_of_vectors_also_for_one_text(service, embedders):
    embedder = embedders["dense"]
    for inputs, texts in ((MIXED, MIXED), ("水", ["水"])):
        response = ask(service, "/embed", json={"inputs": inputs})
        np.testing.assert_allclose(response.json(), embedder.encode(texts), atol=1e-5)
    keys = {"prompt_name": "clustering", "normalize": False, "dimensions": 8, "truncate": True}
    found = ask(service, "/embed", json={"inputs": MIXED, **keys}).json()
    expected = embedder.encode(MIXED, kind="clustering", normalize=False, dim=8)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not np.allclose(found, embedder.encode(MIXED, kind="clustering", dim=8), atol=1e-2)


def test_a_long_text_is_cut_on_the_side_that_is_asked_for(service, embedders):
    text = "river " * 100 + "Paris " * 100
    for direction, kept in (("Left", "Paris "), ("left", "Paris "), ("Right", "river "), ("right", "river ")):
        found = ask(service, "/embed", json={"inputs": text, "truncation_direction": direction}).json()
        np.testing.assert_allclose(found, embedders["dense"].encode([kept * 62]), atol=1e-5)
    response = ask(service, "/embed", json={"inputs": ["a", text], "truncate": False})
    assert (response.status_code, response.json()["error_type"]) == (422, "Validation")
    assert response.json()["error"].startswith("inputs[1]: longer than 64 tokens")


def test_embed_all_gives_the_vectors_of_the_tokens(unified, embedders):
    texts = ["Paris", "the river Seine", ""]
    found = ask(unified, "/embed_all", json={"inputs": texts}).json()
    expected = embedders["unified"].encode(texts, outputs=("multi_vector",)).multi_vector
    assert [len(vectors) for vectors in found] == [len(vectors) for vectors in expected]
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.reshape(own, other.shape), other, atol=1e-5)


def test_embed_all_of_a_query_has_the_vectors_that_fill_it_up(embedders):
    with running_embedder(embedders["colbert"]) as service:
        (query,) = ask(service, "/embed_all", json={"inputs": "Paris", "prompt_name": "query"}).json()
        (document,) = ask(service, "/embed_all", json={"inputs": "Paris", "prompt_name": "document"}).json()
    assert len(query) == 32 > len(document)


@pytest.mark.parametrize("name", ["unified", "splade"])
def test_embed_sparse_gives_the_weights_of_token_ids_in_their_order(embedders, name):
    texts = ["Paris", "the river Seine", "水"]
    with running_embedder(embedders[name]) as service:
        found = ask(service, "/embed_sparse", json={"inputs": texts}).json()
    lexical = embedders[name].encode(texts, outputs=("lexical",)).lexical
    for place, entries in enumerate(found):
        assert all(entry.keys() == {"index", "value"} for entry in entries)
        ids = [entry["index"] for entry in entries]
        assert ids == sorted(ids)
        assert {entry["index"]: entry["value"] for entry in entries} == pytest.approx(lexical.by_id(place), abs=1e-5)
    assert any(found)


def test_similarity_is_the_cosine_with_each_sentence(service, embedders):
    texts = ["the capital of France", "Paris", "水", "the capital of France"]
    vectors = embedders["dense"].encode(texts, kind="query", normalize=False).tolist()

    def cosine(left, right):
        return sum(a * b for a, b in zip(left, right, strict=True)) / math.hypot(*left) / math.hypot(*right)

    body = {"inputs": {"source_sentence": texts[0], "sentences": texts[1:]}, "parameters": {"prompt_name": "query"}}
    found = ask(service, "/similarity", json=body).json()
    assert found == pytest.approx([cosine(vectors[0], other) for other in vectors[1:]], abs=1e-5)
    without = ask(service, "/similarity", json={"inputs": body["inputs"]}).json()
    assert without[2] == pytest.approx(1) and without[:2] != pytest.approx(found[:2], abs=1e-3)


def test_tokens_have_their_places_in_bytes(service, embedders):
    tokenizer = embedders["dense"].model.tokenizer
    texts = ["The capital of France", "水在一百度时沸腾。", "🐼 naïve [SEP]", "", "Paris " * 200]
    for keys, prompt in (({}, ""), ({"prompt_name": "query"}, "query: "), ({"prompt_name": "clustering"}, "Topic: ")):
        found = ask(service, "/tokenize", json={"inputs": texts, **keys}).json()
        assert [[token["id"] for token in tokens] for tokens in found] == [
            tokenizer(prompt + text)["input_ids"] for text in texts
        ]
        for text, tokens in zip(texts, found, strict=True):
            assert [token["special"] for token in tokens] == [True, *[False] * (len(tokens) - 2), True]
            assert (tokens[0]["text"], tokens[-1]["text"]) == ("[CLS]", "[SEP]") and tokens[0]["start"] is None
            for token in tokens[1:-1]:
                assert (prompt + text).encode()[token["start"] : token["stop"]].decode() == token["text"]
    (tokens,) = ask(service, "/tokenize", json={"inputs": "Paris", "add_special_tokens": False}).json()
    assert [token["id"] for token in tokens] == tokenizer("Paris", add_special_tokens=False)["input_ids"]


def test_what_the_model_does_not_give_is_an_error_of_the_backend(service, embedders):
    for path in ("/embed_all", "/embed_sparse"):
        response = ask(service, path, json={"inputs": "a"})
        assert (response.status_code, response.json()["error_type"]) == (424, "Backend")
        assert response.json()["error"].startswith("tiny gives dense, and this asks for ")
    with running_embedder(embedders["splade"]) as sparse:
        for path in ("/embed", "/embed_all"):
            assert ask(sparse, path, json={"inputs": "a"}).status_code == 424
        sentences = {"source_sentence": "a", "sentences": ["b"]}
        assert ask(sparse, "/similarity", json={"inputs": sentences}).status_code == 424
        assert ask(sparse, "/tokenize", json={"inputs": "a"}).status_code == 200


def test_an_error_has_the_type_and_the_status_of_text_embeddings_inference(service):
    two = {"source_sentence": "a", "sentences": ["b"]}
    for path, body, status, kind, words in (
        ("/embed", {"inputs": []}, 400, "Empty", "inputs: expected at least one text"),
        ("/embed_all", {"inputs": []}, 424, "Backend", "tiny gives dense"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 400, "Empty", "inputs.sentences: "),
        ("/tokenize", {"inputs": []}, 400, "Empty", "inputs: "),
        ("/embed", {"inputs": ["a"] * 9}, 422, "Validation", "inputs: at most 8 are taken"),
        ("/embed", {"inputs": [1, 605]}, 422, "Validation", "inputs[1]: "),
        ("/embed", {"inputs": "a", "dimensions": 0}, 422, "Validation", "dimensions: "),
        ("/embed", {"inputs": "a", "dimensions": 33}, 422, "Validation", "dimensions: "),
        ("/embed", {"inputs": "a", "normalize": 1}, 422, "Validation", "normalize: "),
        ("/embed", {"inputs": "a", "prompt_name": "poem"}, 422, "Validation", "prompt_name: this model has no prompt"),
        ("/embed", {"inputs": "a", "truncation_direction": "up"}, 422, "Validation", "truncation_direction: "),
        ("/embed", {"inputs": "a", "pooling": "cls"}, 422, "Validation", "pooling: this server does not know the key"),
        ("/similarity", {"inputs": two | {"sentences": ["b", 3]}}, 422, "Validation", "inputs"),
        ("/similarity", {"inputs": two, "normalize": True}, 422, "Validation", "normalize: "),
        ("/similarity", {"inputs": two | {"sentences": ["b"] * 8}, "parameters": {"x": 1}}, 422, "Validation", ""),
        ("/tokenize", {"inputs": ["a", [1]]}, 422, "Validation", "inputs[1]: "),
        ("/tokenize", {"inputs": "a", "truncate": True}, 422, "Validation", "truncate: "),
    ):
        response = ask(service, path, json=body)
        answer = response.json()
        assert answer.keys() == {"error", "error_type"}
        assert (response.status_code, answer["error_type"]) == (status, kind), (path, body, answer)
        assert answer["error"].startswith(words), (path, body, answer)
    bad = ask(service, "/embed", content=b'{"inputs": "\\ud800"}')
    assert (bad.status_code, bad.json()["error_type"]) == (400, "Validation")


def test_a_full_server_is_overloaded(embedders):
    with running_embedder(embedders["dense"]) as service:
        service.admission.max_requests = 0
        response = ask(service, "/embed", json={"inputs": "a"})
    assert (response.status_code, response.json()["error_type"]) == (429, "Overloaded")
    assert int(response.headers["Retry-After"]) >= 1


def test_info_says_what_the_model_gives(unified, embedders):
    info = ask(unified, "/info", "GET").json()
    assert info["model_id"] == "tiny" and info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert (info["max_input_length"], info["dimensions"]) == (64, 32)
    assert info["representations"] == ["dense", "lexical", "multi_vector"] and info["int8"] is True
    assert info["max_client_batch_size"] == 1000


def test_the_client_of_hugging_face_is_answered(embedders, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with running_embedder(embedders["dense"]) as service, listening(service) as address:
        client = huggingface_hub.InferenceClient(f"{address}/embed")
        options = {"prompt_name": "query", "normalize": False, "truncate": True, "truncation_direction": "left"}
        found = client.feature_extraction("the river", **options)
        scores = huggingface_hub.InferenceClient(f"{address}/similarity").sentence_similarity("a", ["a", "b"])
    expected = embedders["dense"].encode(["the river"], kind="query", normalize=False)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert scores[0] == pytest.approx(1) and len(scores) == 2
