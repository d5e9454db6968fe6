"""RerankerRanker inside a Haystack pipeline, written to YAML and read again."""

import copy
import pickle

import pytest

pytest.importorskip("haystack")

from haystack import Document, Pipeline  # noqa: E402
from haystack.components.retrievers.in_memory import InMemoryBM25Retriever  # noqa: E402
from haystack.document_stores.in_memory import InMemoryDocumentStore  # noqa: E402

from rag_retrieval.infer.reranker import Reranker  # noqa: E402
from rag_retrieval.integrations.haystack import RerankerRanker  # noqa: E402

TEXTS = ["Water boils at 100 degrees.", "What is Paris? Paris is a city.", "What fever is.", "A cough boils."]
QUERY = "what boils?"


@pytest.fixture(scope="module")
def reranker(model_folders) -> Reranker:
    return Reranker(model_folders["bert"])


def documents() -> list[Document]:
    return [Document(id=str(place), content=text, meta={"place": place}) for place, text in enumerate(TEXTS)]


def found(results: dict) -> list[tuple[str, float]]:
    return [(document.id, document.score) for document in results["documents"]]


def expected(reranker: Reranker, **options) -> list[tuple[str, float]]:
    return [(str(result.doc_id), result.score) for result in reranker.rerank(QUERY, TEXTS, **options)]


def pipeline(ranker: RerankerRanker) -> Pipeline:
    store = InMemoryDocumentStore()
    store.write_documents(documents())
    pipeline = Pipeline()
    pipeline.add_component("retriever", InMemoryBM25Retriever(store))
    pipeline.add_component("ranker", ranker)
    pipeline.connect("retriever.documents", "ranker.documents")
    return pipeline


def test_a_pipeline_gives_the_rerankers_order_and_scores(reranker):
    inputs = {"retriever": {"query": QUERY}, "ranker": {"query": QUERY}}
    assert found(pipeline(RerankerRanker(reranker)).run(inputs)["ranker"]) == expected(reranker)
    inputs["ranker"]["top_k"] = 2
    assert found(pipeline(RerankerRanker(reranker, top_k=3)).run(inputs)["ranker"]) == expected(reranker, top_k=2)


def test_a_pipeline_goes_through_yaml_with_every_option(model_folders, reranker):
    ranker = RerankerRanker(model_folders["bert"], top_k=3, normalize=True, batch_size=2, long_document="truncate")
    text = pipeline(ranker).dumps()
    again = Pipeline.loads(text, allowed_modules=["rag_retrieval.*"])
    other = again.get_component("ranker")
    assert other.to_dict() == ranker.to_dict() and other._reranker is None, "nothing is opened by reading"
    scores = dict(found(other.run(QUERY, documents())))
    assert scores == pytest.approx(dict(expected(reranker, top_k=3, normalize=True)))


def test_an_open_reranker_cannot_be_written(reranker):
    with pytest.raises(ValueError, match="give the component a folder or name"):
        RerankerRanker(reranker).to_dict()


def test_warming_up_opens_the_model_once(model_folders):
    ranker = RerankerRanker(model_folders["bert"])
    ranker.warm_up()
    opened = ranker._reranker
    ranker.warm_up()
    assert ranker._reranker is opened is not None


def test_documents_keep_their_meta_and_the_given_ones_are_not_changed(reranker):
    given = [*documents(), Document(id="none", content=None)]
    results = RerankerRanker(reranker).run(QUERY, given)["documents"]
    assert [document.id for document in results][-1] == "none", "without text: last"
    assert all(document.meta == {"place": int(document.id)} for document in results[:-1])
    assert all(document.score is None for document in given)
    assert RerankerRanker(reranker).run(QUERY, []) == {"documents": []}


def test_it_can_be_copied_and_pickled_after_its_first_use(reranker):
    ranker = RerankerRanker(reranker)
    expected = found(ranker.run(QUERY, documents()))
    for other in (copy.deepcopy(ranker), pickle.loads(pickle.dumps(ranker))):
        assert found(other.run(QUERY, documents())) == expected
