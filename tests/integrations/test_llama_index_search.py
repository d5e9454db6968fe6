"""EmbedderEmbedding and IndexRetriever inside LlamaIndex: its vector store and our index, each before our reranker."""

import asyncio
import copy
import pickle

import numpy as np
import pytest
from integration_samples import ANSWERS, LANGUAGES, PROMPTS, TEXTS

pytest.importorskip("llama_index.core")

from llama_index.core import Settings, VectorStoreIndex, get_response_synthesizer  # noqa: E402
from llama_index.core.base.base_retriever import BaseRetriever  # noqa: E402
from llama_index.core.ingestion import IngestionPipeline  # noqa: E402
from llama_index.core.llms import MockLLM  # noqa: E402
from llama_index.core.query_engine import RetrieverQueryEngine  # noqa: E402
from llama_index.core.response_synthesizers import ResponseMode  # noqa: E402
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode  # noqa: E402
from llama_index.core.vector_stores import SimpleVectorStore  # noqa: E402

from rag_retrieval import Embedder, Retriever  # noqa: E402
from rag_retrieval.integrations.llama_index import (  # noqa: E402
    EmbedderEmbedding,
    IndexRetriever,
    RerankerPostprocessor,
)

QUESTION = "水在多少度沸腾？"


def nodes() -> list[TextNode]:
    return [TextNode(text=text, id_=str(place)) for place, text in enumerate(TEXTS)]


def places(found: list[NodeWithScore]) -> list[int]:
    return [int(result.node.node_id) for result in found]


def engine(retriever: BaseRetriever, reranker) -> RetrieverQueryEngine:
    """Retrieves and reranks, without any language model."""
    return RetrieverQueryEngine(
        retriever=retriever,
        response_synthesizer=get_response_synthesizer(response_mode=ResponseMode.NO_TEXT),
        node_postprocessors=[RerankerPostprocessor(model=reranker, top_n=2, metadata_mode=MetadataMode.NONE)],
    )


@pytest.fixture(autouse=True)
def no_language_model(monkeypatch):
    monkeypatch.setattr(Settings, "_llm", MockLLM())  # else it looks for one of a company


@pytest.fixture(scope="module")
def store(embedder) -> VectorStoreIndex:
    store = VectorStoreIndex(nodes(), embed_model=EmbedderEmbedding(model=embedder))
    assert isinstance(store.vector_store, SimpleVectorStore)
    return store


@pytest.mark.parametrize("question", ANSWERS)
def test_the_vector_store_finds_the_answer_and_the_reranker_puts_it_first(store, token_reranker, question):
    retriever = store.as_retriever(similarity_top_k=5)
    assert places(retriever.retrieve(question))[0] == ANSWERS[question]
    answering = engine(retriever, token_reranker)
    for response in (answering.query(question), asyncio.run(answering.aquery(question))):
        assert places(response.source_nodes)[0] == ANSWERS[question] and len(response.source_nodes) == 2
    expected = token_reranker.rerank(question, TEXTS).results[0].score
    assert response.source_nodes[0].score == pytest.approx(expected, abs=1e-5)


def test_the_store_scores_by_the_cosine_of_the_models_own_vectors(store, embedder):
    expected = embedder.similarity(embedder.encode_queries(QUESTION), embedder.encode_documents(TEXTS))[0]
    found = store.as_retriever(similarity_top_k=len(TEXTS)).retrieve(QUESTION)
    by_place = {int(result.node.node_id): result.score for result in found}
    assert [by_place[place] for place in range(len(TEXTS))] == pytest.approx(expected.tolist(), abs=1e-5)


def test_vectors_equal_those_of_the_embedder_with_its_prompts(embedder):
    embedding = EmbedderEmbedding(model=embedder)
    documents, query = embedder.encode_documents(TEXTS), embedder.encode_queries(QUESTION)
    assert embedding.get_text_embedding_batch(TEXTS) == documents.tolist()
    assert asyncio.run(embedding.aget_text_embedding_batch(TEXTS)) == documents.tolist()
    one = embedder.encode_documents(TEXTS[:1])[0].tolist()
    assert embedding.get_text_embedding(TEXTS[0]) == asyncio.run(embedding.aget_text_embedding(TEXTS[0])) == one
    assert embedding.get_query_embedding(QUESTION) == query.tolist() != embedder.encode_documents(QUESTION).tolist()
    assert asyncio.run(embedding.aget_query_embedding(QUESTION)) == query.tolist()


def test_options_reach_the_embedder(embedder):
    options = {"max_length": 8, "query_max_length": 6, "dim": 64, "normalize": False, "embed_batch_size": 3}
    embedding = EmbedderEmbedding(model=embedder, **options)
    documents = embedder.encode_documents(TEXTS, max_length=8, dim=64, normalize=False)
    assert np.allclose(embedding.get_text_embedding_batch(TEXTS), documents, atol=1e-5)
    query = embedder.encode_queries(QUESTION, max_length=6, dim=64, normalize=False)
    assert np.allclose(embedding.get_query_embedding(QUESTION), query, atol=1e-5)
    assert not np.allclose(query, embedder.encode_queries(QUESTION, dim=64, normalize=False), atol=1e-3)


def test_a_folder_is_opened_with_options_of_embedder_and_can_be_copied_and_pickled(base_folders):
    options = {"prompts": PROMPTS, "pooling": "mean"}
    embedding = EmbedderEmbedding(model=base_folders["bert"], model_kwargs=options)
    expected = Embedder(base_folders["bert"], **options).encode_queries(QUESTION).tolist()
    for one in (embedding, copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))):
        assert one.get_query_embedding(QUESTION) == expected
        assert one.to_payload()["model_name"] == base_folders["bert"]


def test_it_embeds_nodes_in_an_ingestion_pipeline_with_their_metadata(embedder):
    given = [TextNode(text=TEXTS[0], metadata={"title": "on rerankers"})]
    pipeline = IngestionPipeline(transformations=[EmbedderEmbedding(model=embedder)])
    for done in (pipeline.run(nodes=given), asyncio.run(pipeline.arun(nodes=copy.deepcopy(given)))):
        expected = embedder.encode_documents([f"title: on rerankers\n\n{TEXTS[0]}"])[0]
        assert done[0].embedding == expected.tolist()


def test_what_is_no_dense_embedder_is_refused(embedder):
    with pytest.raises(ValueError, match="expected an Embedder, or the name or folder of one; found NoneType"):
        EmbedderEmbedding(model=None)
    with pytest.raises(ValueError, match="model_kwargs: an open Embedder takes none"):
        EmbedderEmbedding(model=embedder, model_kwargs={"device": "cpu"})


@pytest.mark.parametrize("question", ANSWERS)
def test_the_index_gives_the_retrievers_nodes_and_scores(index, token_reranker, question):
    expected = Retriever(index).search(question, 3)
    retriever = IndexRetriever(index, top_k=3)
    for found in (retriever.retrieve(question), asyncio.run(retriever.aretrieve(question))):
        assert places(found)[0] == ANSWERS[question]
        for node, result in zip(found, expected, strict=True):
            assert (node.node_id, node.text, node.score) == (result.doc_id, result.text, result.score)
            stages = {"stage_scores": result.scores, "stage_ranks": result.ranks}
            assert node.metadata == result.metadata | stages and node.metadata["place"] == int(node.node_id)
    response = engine(retriever, token_reranker).query(question)
    assert places(response.source_nodes)[0] == ANSWERS[question]


def test_conditions_on_the_metadata_reach_the_search(index):
    retriever = IndexRetriever(index, where={"language": "en", "place": {"lt": 5}})
    for found in (retriever.retrieve(QUESTION), asyncio.run(retriever.aretrieve(QUESTION))):
        assert sorted(places(found)) == [0, 1, 2, 3, 4]


def test_no_stage_is_read_by_a_language_model_or_a_reranker(index):
    node = IndexRetriever(index, top_k=1).retrieve(QUESTION)[0].node
    place = int(node.node_id)
    expected = f"language: {LANGUAGES[place]}\nplace: {place}\n\n{TEXTS[place]}"
    for mode in (MetadataMode.LLM, MetadataMode.EMBED):
        assert node.get_content(metadata_mode=mode) == expected


def test_an_index_folder_is_opened_with_options_of_retriever(index, token_reranker):
    options = {"reranker": token_reranker, "stages": ["bm25"], "depth": 4}
    found = IndexRetriever(index.folder, retriever_kwargs=options).retrieve(QUESTION)
    expected = Retriever(index, **options).search(QUESTION)
    assert [(node.node_id, node.score) for node in found] == [(result.doc_id, result.score) for result in expected]
    assert set(found[0].metadata["stage_scores"]) == {"bm25", "reranked"}


def test_what_is_no_index_is_refused(index):
    with pytest.raises(ValueError, match="index: expected a Retriever, an Index or the folder of one; found int"):
        IndexRetriever(3)
    with pytest.raises(ValueError, match="retriever_kwargs: an open Retriever takes none"):
        IndexRetriever(Retriever(index), retriever_kwargs={"depth": 3})
