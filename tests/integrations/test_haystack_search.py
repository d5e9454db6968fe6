"""Embedders and retriever inside Haystack: its document store and our index, each before our reranker."""

import asyncio
import copy
import pickle

import numpy as np
import pytest
from integration_samples import ANSWERS, MINILM, PROMPTS, TEXTS

pytest.importorskip("haystack")

from haystack import Document, Pipeline  # noqa: E402
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever  # noqa: E402
from haystack.components.writers import DocumentWriter  # noqa: E402
from haystack.document_stores.in_memory import InMemoryDocumentStore  # noqa: E402

from rag_retrieval import Index, Retriever  # noqa: E402
from rag_retrieval.integrations.haystack import (  # noqa: E402
    EmbedderDocumentEmbedder,
    EmbedderTextEmbedder,
    IndexRetriever,
    RerankerRanker,
)

QUESTION = "水在多少度沸腾？"
ALLOWED = ["rag_retrieval.*"]


def documents() -> list[Document]:
    return [Document(id=str(place), content=text, meta={"place": place}) for place, text in enumerate(TEXTS)]


def places(found: dict) -> list[int]:
    return [int(document.id) for document in found["documents"]]


@pytest.fixture(scope="module")
def store(embedder) -> InMemoryDocumentStore:
    """Filled by a pipeline of the library."""
    store = InMemoryDocumentStore()
    pipeline = Pipeline()
    pipeline.add_component("embedder", EmbedderDocumentEmbedder(embedder))
    pipeline.add_component("writer", DocumentWriter(store))
    pipeline.connect("embedder.documents", "writer.documents")
    assert pipeline.run({"embedder": {"documents": documents()}}) == {"writer": {"documents_written": len(TEXTS)}}
    return store


def searching(store: InMemoryDocumentStore, embedder, reranker) -> Pipeline:
    pipeline = Pipeline()
    pipeline.add_component("embedder", EmbedderTextEmbedder(embedder))
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=5))
    pipeline.add_component("ranker", RerankerRanker(reranker, top_k=2))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    pipeline.connect("retriever.documents", "ranker.documents")
    return pipeline


@pytest.mark.parametrize("question", ANSWERS)
def test_the_document_store_finds_the_answer_and_the_reranker_puts_it_first(store, embedder, token_reranker, question):
    pipeline = searching(store, embedder, token_reranker)
    inputs = {"embedder": {"text": question}, "ranker": {"query": question}}
    for run in (pipeline.run, lambda *given, **more: asyncio.run(pipeline.run_async(*given, **more))):
        found = run(inputs, include_outputs_from={"retriever"})
        assert places(found["retriever"])[0] == places(found["ranker"])[0] == ANSWERS[question]
        assert len(found["retriever"]["documents"]) == 5 and len(found["ranker"]["documents"]) == 2
    expected = token_reranker.rerank(question, TEXTS).results[0].score
    assert found["ranker"]["documents"][0].score == pytest.approx(expected, abs=1e-5)


def test_vectors_equal_those_of_the_embedder_with_its_prompts(embedder):
    found = EmbedderDocumentEmbedder(embedder).run(documents())["documents"]
    assert [document.embedding for document in found] == embedder.encode_documents(TEXTS).tolist()
    query = embedder.encode_queries(QUESTION).tolist()
    assert EmbedderTextEmbedder(embedder).run(QUESTION)["embedding"] == query
    assert query != embedder.encode_documents(QUESTION).tolist()


def test_documents_keep_everything_else_and_the_given_ones_are_not_changed(embedder):
    given = [*documents(), Document(id="none", content=None)]
    found = EmbedderDocumentEmbedder(embedder).run(given)["documents"]
    for before, after in zip(given, found, strict=True):
        assert (after.id, after.content, after.meta) == (before.id, before.content, before.meta)
        assert before.embedding is None
    np.testing.assert_allclose(found[-1].embedding, embedder.encode_documents(""), rtol=0, atol=1e-6)
    assert EmbedderDocumentEmbedder(embedder).run([]) == {"documents": []}


def test_chosen_metadata_stand_before_the_text(embedder):
    given = Document(content="Water boils.", meta={"title": "on boiling", "year": 2020, "author": None, "other": "x"})
    embedding = EmbedderDocumentEmbedder(
        embedder, meta_fields_to_embed=["title", "author", "year", "missing"], embedding_separator=" | "
    )
    expected = embedder.encode_documents("on boiling | 2020 | Water boils.").tolist()
    assert embedding.run([given])["documents"][0].embedding == expected


def test_options_reach_the_embedder(embedder):
    options = {"max_length": 8, "dim": 64, "normalize": False}
    found = EmbedderDocumentEmbedder(embedder, batch_size=2, **options).run(documents())["documents"]
    vectors = [document.embedding for document in found]
    assert np.allclose(vectors, embedder.encode_documents(TEXTS, **options), atol=1e-5)
    query = EmbedderTextEmbedder(embedder, **options).run(QUESTION)["embedding"]
    assert np.allclose(query, embedder.encode_queries(QUESTION, **options), atol=1e-5)


def test_a_pipeline_goes_through_yaml_and_finds_the_same(embedder, token_folder, index):
    store = InMemoryDocumentStore()
    options = {"prompts": PROMPTS, "device": "cpu"}
    filled = EmbedderDocumentEmbedder(MINILM, options, ["place"], " ", 4, 32, 64, True)
    pipeline = searching(store, MINILM, token_folder)
    pipeline.add_component("filled", filled)
    kwargs = {"reranker": token_folder, "stages": ["dense"], "depth": 4}
    pipeline.add_component("index", IndexRetriever(index.folder, 3, {"language": "zh"}, kwargs))
    again = Pipeline.loads(pipeline.dumps(), allowed_modules=ALLOWED)
    for name in ("embedder", "filled", "index"):
        before, after = pipeline.get_component(name), again.get_component(name)
        assert after.to_dict() == before.to_dict() and after is not before
    assert again.get_component("embedder")._embedder is None, "nothing is opened by reading"
    vectors = [document.embedding for document in again.get_component("filled").run(documents())["documents"]]
    texts = [f"{place} {text}" for place, text in enumerate(TEXTS)]
    expected = embedder.encode_documents(texts, batch_size=4, max_length=32, dim=64, normalize=True)
    assert vectors == expected.tolist()
    found = again.get_component("index").run(QUESTION)
    assert places(found)[0] == ANSWERS[QUESTION] and len(found["documents"]) == 3
    assert set(found["documents"][0].meta["stage_scores"]) == {"dense", "reranked"}


def test_open_models_cannot_be_written(embedder, index):
    for component in (EmbedderTextEmbedder(embedder), EmbedderDocumentEmbedder(embedder), IndexRetriever(index)):
        with pytest.raises(ValueError, match="cannot be written to a file; give the component a folder or name"):
            component.to_dict()


def test_warming_up_opens_once_and_what_is_open_can_be_copied_and_pickled(base_folders):
    for kind in (EmbedderTextEmbedder, EmbedderDocumentEmbedder):
        component = kind(base_folders["bert"], {"pooling": "mean"})
        component.warm_up()
        opened = component._embedder
        component.warm_up()
        assert component._embedder is opened is not None
    given = documents()
    expected = component.run(given)
    for other in (copy.deepcopy(component), pickle.loads(pickle.dumps(component))):
        assert other.run(given) == expected


def test_what_is_no_text_or_model_is_refused(embedder, index):
    with pytest.raises(ValueError, match="text"):
        EmbedderTextEmbedder(embedder).run(["one", "two"])
    with pytest.raises(ValueError, match="expected an Embedder, or the name or folder of one; found int"):
        EmbedderTextEmbedder(3).warm_up()
    with pytest.raises(ValueError, match="expected a Retriever, an Index or the folder of one; found int"):
        IndexRetriever(3).warm_up()
    with pytest.raises(ValueError, match="retriever_kwargs: an open Retriever takes none"):
        IndexRetriever(Retriever(index), retriever_kwargs={"depth": 3}).warm_up()


@pytest.mark.parametrize("question", ANSWERS)
def test_the_index_gives_the_retrievers_documents_scores_and_stages(index: Index, token_reranker, question):
    pipeline = Pipeline()
    pipeline.add_component("retriever", IndexRetriever(index, top_k=3))
    pipeline.add_component("ranker", RerankerRanker(token_reranker))
    pipeline.connect("retriever.documents", "ranker.documents")
    inputs = {"retriever": {"query": question}, "ranker": {"query": question}}
    found = pipeline.run(inputs, include_outputs_from={"retriever"})
    assert places(found["retriever"])[0] == places(found["ranker"])[0] == ANSWERS[question]
    expected = Retriever(index).search(question, 3)
    for document, result in zip(found["retriever"]["documents"], expected, strict=True):
        assert (document.id, document.content, document.score) == (result.doc_id, result.text, result.score)
        assert document.meta == result.metadata | {"stage_scores": result.scores, "stage_ranks": result.ranks}
        assert document.meta["place"] == int(document.id)
    inputs["retriever"] |= {"top_k": 2, "where": {"language": "en", "place": {"lt": 5}}}
    chosen = places(pipeline.run(inputs)["ranker"])
    assert len(chosen) == 2 and all(place < 5 for place in chosen)
