"""EmbedderEmbeddings and IndexRetriever inside LangChain: its vector store and our index, each before our reranker."""

import asyncio
import copy
import pickle

import numpy as np
import pytest
from integration_samples import ANSWERS, PROMPTS, TEXTS

pytest.importorskip("langchain_core")

from langchain_core.documents import Document  # noqa: E402
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough  # noqa: E402
from langchain_core.vectorstores import InMemoryVectorStore  # noqa: E402

from rag_retrieval import Embedder, Retriever  # noqa: E402
from rag_retrieval.integrations.langchain import EmbedderEmbeddings, IndexRetriever, RerankerCompressor  # noqa: E402

QUESTION = "水在多少度沸腾？"


def places(found: list[Document]) -> list[int]:
    return [document.metadata["place"] for document in found]


def reranked(retriever: Runnable, reranker) -> Runnable:
    compressor = RerankerCompressor(model=reranker, top_n=2)
    both = {"documents": retriever, "query": RunnablePassthrough()}
    return both | RunnableLambda(lambda found: compressor.compress_documents(**found))


@pytest.fixture(scope="module")
def store(embedder) -> InMemoryVectorStore:
    store = InMemoryVectorStore(EmbedderEmbeddings(model=embedder))
    store.add_documents([Document(text, metadata={"place": place}) for place, text in enumerate(TEXTS)])
    return store


@pytest.mark.parametrize("question", ANSWERS)
def test_the_vector_store_finds_the_answer_and_the_reranker_puts_it_first(store, token_reranker, question):
    retriever = store.as_retriever(search_kwargs={"k": 5})
    assert places(retriever.invoke(question))[0] == ANSWERS[question]
    chain = reranked(retriever, token_reranker)
    for found in (chain.invoke(question), asyncio.run(chain.ainvoke(question))):
        assert places(found)[0] == ANSWERS[question] and len(found) == 2
    expected = token_reranker.rerank(question, TEXTS).results[0].score
    assert found[0].metadata["relevance_score"] == pytest.approx(expected, abs=1e-5)


def test_the_store_scores_by_the_cosine_of_the_models_own_vectors(store, embedder):
    expected = embedder.similarity(embedder.encode_queries(QUESTION), embedder.encode_documents(TEXTS))[0]
    found = store.similarity_search_with_score(QUESTION, k=len(TEXTS))
    by_place = {document.metadata["place"]: score for document, score in found}
    assert [by_place[place] for place in range(len(TEXTS))] == pytest.approx(expected.tolist(), abs=1e-5)


def test_vectors_equal_those_of_the_embedder_with_its_prompts(embedder):
    embeddings = EmbedderEmbeddings(model=embedder)
    documents, query = embedder.encode_documents(TEXTS), embedder.encode_queries(QUESTION)
    assert embeddings.embed_documents(TEXTS) == documents.tolist()
    assert embeddings.embed_query(QUESTION) == query.tolist() != embedder.encode_documents(QUESTION).tolist()
    assert asyncio.run(embeddings.aembed_documents(TEXTS)) == documents.tolist()
    assert asyncio.run(embeddings.aembed_query(QUESTION)) == query.tolist()
    assert embeddings.embed_documents([]) == []


def test_options_reach_the_embedder(embedder):
    options = {"max_length": 8, "query_max_length": 6, "dim": 64, "normalize": False, "batch_size": 2}
    embeddings = EmbedderEmbeddings(model=embedder, **options)
    documents = embedder.encode_documents(TEXTS, max_length=8, dim=64, normalize=False)
    assert np.allclose(embeddings.embed_documents(TEXTS), documents, atol=1e-5)
    query = embedder.encode_queries(QUESTION, max_length=6, dim=64, normalize=False)
    assert np.allclose(embeddings.embed_query(QUESTION), query, atol=1e-5)
    assert not np.allclose(query, embedder.encode_queries(QUESTION, dim=64, normalize=False), atol=1e-3)


def test_a_folder_is_opened_with_options_of_embedder_and_can_be_copied_and_pickled(base_folders):
    options = {"prompts": PROMPTS, "pooling": "mean"}
    embeddings = EmbedderEmbeddings(model=base_folders["bert"], model_kwargs=options)
    expected = Embedder(base_folders["bert"], **options).encode_queries(QUESTION).tolist()
    for one in (embeddings, copy.deepcopy(embeddings), pickle.loads(pickle.dumps(embeddings))):
        assert one.embed_query(QUESTION) == expected


def test_what_is_no_dense_embedder_is_refused(embedder, tmp_path):
    with pytest.raises(ValueError, match="expected an Embedder, or the name or folder of one; found int"):
        EmbedderEmbeddings(model=3)
    with pytest.raises(ValueError, match="no config.json in it"):
        EmbedderEmbeddings(model=str(tmp_path))
    with pytest.raises(ValueError, match="model_kwargs: an open Embedder takes none"):
        EmbedderEmbeddings(model=embedder, model_kwargs={"device": "cpu"})


@pytest.mark.parametrize("question", ANSWERS)
def test_the_index_gives_the_retrievers_documents_scores_and_stages(index, token_reranker, question):
    expected = Retriever(index).search(question, 3)
    retriever = IndexRetriever(index=index, top_k=3)
    for found in (retriever.invoke(question), asyncio.run(retriever.ainvoke(question))):
        assert places(found)[0] == ANSWERS[question]
        for document, result in zip(found, expected, strict=True):
            assert (document.id, document.page_content) == (result.doc_id, result.text)
            own = {"relevance_score": result.score, "stage_scores": result.scores, "stage_ranks": result.ranks}
            assert document.metadata == result.metadata | own
            assert {"language", "place", "relevance_score"} < document.metadata.keys()
    assert places(reranked(retriever, token_reranker).invoke(question))[0] == ANSWERS[question]


def test_conditions_on_the_metadata_and_the_number_are_the_retrievers_or_the_calls(index):
    retriever = IndexRetriever(index=index, where={"language": "zh"})
    assert {document.metadata["language"] for document in retriever.invoke(QUESTION)} == {"zh"}
    english = {"where": {"language": "en", "place": {"lt": 5}}, "top_k": 2}
    for found in (retriever.invoke(QUESTION, **english), asyncio.run(retriever.ainvoke(QUESTION, **english))):
        assert len(found) == 2 and all(place < 5 for place in places(found))
    assert len(IndexRetriever(index=index).invoke(QUESTION)) == 10
    with pytest.raises(ValueError, match="where: langauge"):
        retriever.invoke(QUESTION, where={"langauge": "en"})


def test_an_index_folder_is_opened_with_options_of_retriever(index, token_reranker):
    options = {"reranker": token_reranker, "stages": ["bm25"], "depth": 4}
    found = IndexRetriever(index=index.folder, retriever_kwargs=options).invoke(QUESTION)
    expected = Retriever(index, **options).search(QUESTION)
    assert [document.metadata["stage_scores"] for document in found] == [result.scores for result in expected]
    assert set(found[0].metadata["stage_scores"]) == {"bm25", "reranked"}
    again = IndexRetriever(index=Retriever(index, **options)).invoke(QUESTION)
    assert again == found


def test_what_is_no_index_is_refused(index, tmp_path):
    with pytest.raises(ValueError, match="index: expected a Retriever, an Index or the folder of one; found int"):
        IndexRetriever(index=3)
    with pytest.raises(ValueError, match="no finished index"):
        IndexRetriever(index=str(tmp_path))
    with pytest.raises(ValueError, match="retriever_kwargs: an open Retriever takes none"):
        IndexRetriever(index=Retriever(index), retriever_kwargs={"depth": 3})
    with pytest.raises(ValueError, match="top_k"):
        IndexRetriever(index=index, top_k=0)
