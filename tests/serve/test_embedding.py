"""The model of the embedding endpoints beside `Embedder.encode`."""

from collections import Counter

import numpy as np
import pytest
from serve_embedding_samples import MIXED, ask

from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.embedding import EMBEDDER, Embedded, EmbedModel, EmbedTask
from rag_retrieval.serve.http import RequestError
from rag_retrieval.serve.server import opened_service

KINDS = (None, "query", "document")


def place(position: int) -> str:
    return f"input[{position}]"


def embedded(model: EmbedModel, task: EmbedTask) -> Embedded:
    items = [item for piece in model.pieces(task) for item in model.encode(task, piece)]
    return model.embedded(task, items, model.compute(items))


def assert_equal(found, expected) -> None:
    """Of two EncodedTexts: the same texts in another batch are rounded differently."""
    if expected.dense is not None:
        np.testing.assert_allclose(found.dense, expected.dense, atol=1e-5)
    if expected.lexical is not None:
        assert [texts.keys() for texts in found.lexical] == [texts.keys() for texts in expected.lexical]
        np.testing.assert_allclose(found.lexical.weights, expected.lexical.weights, atol=1e-5)
    if expected.multi_vector is not None:
        for own, other in zip(found.multi_vector, expected.multi_vector, strict=True):
            np.testing.assert_allclose(own, other, atol=1e-5)


@pytest.mark.parametrize("name", ["dense", "unified", "colbert"])
def test_outputs_are_those_of_the_embedder(embedders, name):
    embedder = embedders[name]
    outputs = embedder.settings.representations
    for kind in KINDS:
        found = embedded(
            EmbedModel("m", embedder), EmbedModel("m", embedder).task(MIXED, place, kind=kind, outputs=outputs)
        )
        assert_equal(found.results["float32"], embedder.encode(MIXED, kind=kind, outputs=outputs))
        encoded = embedder.backend.text_encoder.encode(MIXED, kind)
        assert found.tokens == [len(text) for text in encoded] and found.truncated == [6]


def test_dense_vectors_are_cut_normalized_and_stored_as_those_of_the_embedder(embedders):
    embedder = embedders["calibrated"]
    model = EmbedModel("m", embedder)
    for options in ({"dim": 8}, {"normalize": False}, {"dim": 16, "normalize": False}, {"max_length": 9}):
        found = embedded(model, model.task(MIXED, place, kind="query", **options)).results["float32"].dense
        np.testing.assert_allclose(found, embedder.encode(MIXED, kind="query", **options), atol=1e-5)
    task = model.task(MIXED, place, precisions=("int8", "binary", "float16"))
    results = embedded(model, task).results
    for precision, dtype in (("int8", np.int8), ("binary", np.uint8), ("float16", np.float16)):
        found, expected = results[precision].dense, embedder.encode(MIXED, precision=precision)
        assert found.dtype == dtype and found.shape == expected.shape
        # what lies on the border of a level may fall on either side of it
        assert (found != expected).mean() < 0.02


def test_equal_texts_are_computed_once_and_have_equal_vectors(embedders):
    model = EmbedModel("m", embedders["dense"])
    task = model.task(["a", "b", "a", (7, 8), "a", (7, 8)], place)
    items = [item for piece in model.pieces(task) for item in model.encode(task, piece)]
    assert len(items) == 3
    found = model.embedded(task, items, model.compute(items))
    vectors = found.results["float32"].dense
    assert (vectors[0] == vectors[2]).all() and (vectors[0] == vectors[4]).all() and (vectors[3] == vectors[5]).all()
    np.testing.assert_allclose(vectors[1], embedders["dense"].encode("b"), atol=1e-5)
    assert found.tokens == [found.tokens[0], found.tokens[1], found.tokens[0], 4, found.tokens[0], 4]


def test_texts_of_different_outputs_are_computed_in_one_batch(embedders):
    embedder = embedders["unified"]
    model = EmbedModel("m", embedder)
    tasks = [
        model.task([f"text {number}", "水"], place, outputs=outputs)
        for number, outputs in enumerate((("dense",), ("lexical",), ("multi_vector", "dense"), ("dense",)))
    ]
    items = [model.encode(task, task.inputs) for task in tasks]
    mixed = [item for pair in zip(*items, strict=True) for item in pair]  # of one text of each task after the other
    found = dict(zip(map(id, mixed), model.compute(mixed), strict=True))
    for task, own in zip(tasks, items, strict=True):
        result = model.embedded(task, own, [found[id(item)] for item in own]).results["float32"]
        assert_equal(result, embedder.encode(task.inputs, outputs=task.forms[0].names))
    assert Counter(tuple(each) for each in found.values()) == {
        ("dense",): 4, ("lexical",): 2, ("dense", "multi_vector"): 2,
    }  # fmt: skip


def test_token_ids_have_the_vector_of_their_text(embedders):
    embedder = embedders["dense"]
    model, texts = EmbedModel("m", embedder), [text for text in MIXED if text.strip()]
    ids = [tuple(embedder.backend.text_encoder.fast_tokenizer.encode(text).ids) for text in texts]
    found = embedded(model, model.task(ids, place, kind="query"))
    np.testing.assert_allclose(found.results["float32"].dense, embedder.encode_queries(texts), atol=1e-5)


def test_a_text_that_is_too_long_loses_its_beginning_or_its_end_or_is_refused(embedders):
    embedder = embedders["dense"]
    model, text = EmbedModel("m", embedder), "river " * 100 + "Paris " * 100
    for left, kept in ((True, "Paris " * 62), (False, "river " * 62), (None, "river " * 62)):
        found = embedded(model, model.task([text], place, left=left))
        np.testing.assert_allclose(found.results["float32"].dense[0], embedder.encode(kept), atol=1e-5)
    task = model.task(["a", "b", text, text], place, truncate=False)
    with pytest.raises(RequestError, match=r"input\[2\]: longer than 64 tokens") as caught:
        embedded(model, task)
    assert caught.value.status == 422
    assert embedded(model, model.task(["a"], place, truncate=False)).truncated == []


def test_what_the_embedder_refuses_is_refused_before_anything_is_computed(embedders):
    model = EmbedModel("m", embedders["calibrated"])
    for options, words in (
        ({"kind": "poem"}, "no prompt 'poem'; it knows query, document, clustering"),
        ({"dim": 99}, "32 numbers, found 99"),
        ({"outputs": ("lexical",)}, "'lexical' was asked for"),
        ({"precisions": ("float32", "int8"), "dim": 8}, "calibrate with dim=8"),
        ({"precisions": ("binary",), "dim": 12}, "no multiple of 8"),
        ({"max_length": 2}, "too small"),
        ({"max_length": 10_000}, "max_length"),
    ):
        with pytest.raises(ValueError, match=words):
            model.task(["a"], place, **options)


def test_pieces_hold_each_distinct_input_once(embedders):
    model = EmbedModel("m", embedders["dense"])
    inputs = ["a" * 30_000, (1,) * 30_000, "a" * 30_000, "b" * 10, (1,) * 30_000]
    pieces = list(model.pieces(model.task(inputs, place)))
    assert [[(type(each), len(each)) for each in piece] for piece in pieces] == [
        [(str, 30_000)], [(tuple, 30_000), (str, 10)],
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["dense", "unified", "colbert", "splade"])
def test_a_server_opens_any_embedder_and_measures_its_batches(embedders, name):
    config = ServeConfig(embedder=embedders[name].backend.name, embedder_name="mine", device="cpu", max_length=32)
    with opened_service(config, None) as service:
        info = ask(service, "/info", "GET").json()
        assert (info["model_id"], info["max_input_length"]) == ("mine", 32)
        assert service.models[EMBEDDER].batcher.batch_tokens == info["max_batch_tokens"] >= 512
        tokens = ask(service, "/tokenize", json={"inputs": "Paris"})
        assert tokens.status_code == 200
