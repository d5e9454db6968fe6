"""RerankerCompressor inside LangChain: a retriever and the compressor in one chain."""

import asyncio
import copy
import pickle

import pytest

langchain_core = pytest.importorskip("langchain_core")

from langchain_core.documents import Document  # noqa: E402
from langchain_core.retrievers import BaseRetriever  # noqa: E402
from langchain_core.runnables import RunnableLambda, RunnablePassthrough  # noqa: E402

from rag_retrieval.infer.reranker import Reranker  # noqa: E402
from rag_retrieval.integrations.langchain import RerankerCompressor  # noqa: E402

TEXTS = ["Water boils at 100 degrees.", "Paris is a city.", "", "Fever and cough."]
QUERY = "what boils?"


@pytest.fixture(scope="module")
def reranker(model_folders) -> Reranker:
    return Reranker(model_folders["bert"])


def documents() -> list[Document]:
    return [Document(text, id=str(place), metadata={"place": place}) for place, text in enumerate(TEXTS)]


def places(found) -> list[int]:
    return [document.metadata["place"] for document in found]


class Everything(BaseRetriever):
    def _get_relevant_documents(self, query, *, run_manager):
        return documents()


def test_a_chain_of_retriever_and_compressor_gives_the_rerankers_order_and_scores(reranker):
    compressor = RerankerCompressor(model=reranker)
    both = {"documents": Everything(), "query": RunnablePassthrough()}
    chain = both | RunnableLambda(lambda found: compressor.compress_documents(**found))
    expected = reranker.rerank(QUERY, TEXTS)
    for found in (chain.invoke(QUERY), asyncio.run(chain.ainvoke(QUERY))):
        assert places(found) == [result.document_index for result in expected] != [0, 1, 2, 3]
        scores = [document.metadata["relevance_score"] for document in found]
        assert scores == [result.score for result in expected]
        assert places(found)[-1] == 2, "the document without text comes last"


def test_the_retrieving_chain_of_langchain_itself_takes_it(reranker):
    retrievers = pytest.importorskip("langchain_classic.retrievers")
    retriever = retrievers.ContextualCompressionRetriever(
        base_compressor=RerankerCompressor(model=reranker, top_n=2), base_retriever=Everything()
    )
    best = [result.document_index for result in reranker.rerank(QUERY, TEXTS, top_k=2)]
    assert places(retriever.invoke(QUERY)) == places(asyncio.run(retriever.ainvoke(QUERY))) == best


def test_documents_keep_ids_and_metadata_and_the_given_ones_are_not_changed(reranker):
    given = documents()
    best = RerankerCompressor(model=reranker, top_n=1).compress_documents(given, QUERY)[0]
    place = best.metadata["place"]
    assert (best.id, best.page_content) == (str(place), TEXTS[place])
    assert all("relevance_score" not in document.metadata for document in given)


def test_options_reach_the_reranker_in_both_ways_of_calling(reranker):
    compressor = RerankerCompressor(model=reranker, top_n=2, normalize=True, batch_size=1)
    expected = [result.score for result in reranker.rerank(QUERY, TEXTS, top_k=2, normalize=True)]
    later = asyncio.run(compressor.acompress_documents(documents(), QUERY))
    for found in (compressor.compress_documents(documents(), QUERY), later):
        assert [document.metadata["relevance_score"] for document in found] == pytest.approx(expected)
        assert all(0 < score < 1 for score in expected)


def test_a_folder_is_opened_and_no_documents_give_none(model_folders, reranker):
    compressor = RerankerCompressor(model=model_folders["bert"])
    assert compressor.compress_documents([], QUERY) == []
    assert places(compressor.compress_documents(documents(), QUERY)) == [
        result.document_index for result in reranker.rerank(QUERY, TEXTS)
    ]


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a Reranker, or the name or folder of one; found int"):
        RerankerCompressor(model=3)
    with pytest.raises(ValueError, match="no config.json in it"):
        RerankerCompressor(model=str(tmp_path))
    with pytest.raises(ValueError, match="top_n"):
        RerankerCompressor(model=str(tmp_path), top_n=0)


def test_it_can_be_copied_and_pickled(reranker):
    compressor = RerankerCompressor(model=reranker, top_n=2)
    expected = compressor.compress_documents(documents(), QUERY)
    for other in (copy.deepcopy(compressor), pickle.loads(pickle.dumps(compressor))):
        assert other.compress_documents(documents(), QUERY) == expected
