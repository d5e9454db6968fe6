"""RerankerPostprocessor inside LlamaIndex: a query engine that retrieves and reranks, without any language model."""

import asyncio
import copy
import pickle

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import Settings, get_response_synthesizer  # noqa: E402
from llama_index.core.instrumentation import get_dispatcher  # noqa: E402
from llama_index.core.instrumentation.event_handlers import BaseEventHandler  # noqa: E402
from llama_index.core.llms import MockLLM  # noqa: E402
from llama_index.core.query_engine import RetrieverQueryEngine  # noqa: E402
from llama_index.core.response_synthesizers import ResponseMode  # noqa: E402
from llama_index.core.retrievers import BaseRetriever  # noqa: E402
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode  # noqa: E402

from rag_retrieval.infer.reranker import Reranker  # noqa: E402
from rag_retrieval.integrations.llama_index import RerankerPostprocessor  # noqa: E402

TEXTS = ["Water boils at 100 degrees.", "Paris is a city.", "", "Fever and cough."]
QUERY = "what boils?"


@pytest.fixture(scope="module")
def reranker(model_folders) -> Reranker:
    return Reranker(model_folders["bert"])


def nodes(**metadata) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(text=text, id_=str(place), metadata=metadata), score=0.5)
        for place, text in enumerate(TEXTS)
    ]


class Everything(BaseRetriever):
    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return nodes()


def found(results: list[NodeWithScore]) -> list[tuple[str, float]]:
    return [(result.node.node_id, result.score) for result in results]


def expected(reranker: Reranker, texts=TEXTS, **options) -> list[tuple[str, float]]:
    return [(str(result.doc_id), result.score) for result in reranker.rerank(QUERY, texts, **options)]


def test_a_query_engine_gives_the_rerankers_order_and_scores(reranker, monkeypatch):
    monkeypatch.setattr(Settings, "_llm", MockLLM())  # else it looks for one of a company
    engine = RetrieverQueryEngine(
        retriever=Everything(),
        response_synthesizer=get_response_synthesizer(response_mode=ResponseMode.NO_TEXT),
        node_postprocessors=[RerankerPostprocessor(model=reranker, top_n=3)],
    )
    best = expected(reranker, top_k=3)
    assert found(engine.query(QUERY).source_nodes) == best
    assert found(asyncio.run(engine.aquery(QUERY)).source_nodes) == best


def test_all_nodes_come_back_with_new_scores_and_the_given_ones_are_not_changed(reranker):
    given = nodes()
    results = RerankerPostprocessor(model=reranker).postprocess_nodes(given, query_str=QUERY)
    assert found(results) == expected(reranker) and results[-1].node.node_id == "2", "without text: last"
    assert [node.score for node in given] == [0.5] * 4


def test_metadata_stand_before_the_text_as_in_other_rerankers_of_the_library_or_not(reranker):
    with_metadata = nodes(title="on boiling")
    texts = [f"title: on boiling\n\n{text}" if text else "title: on boiling" for text in TEXTS]
    scores = dict(found(RerankerPostprocessor(model=reranker).postprocess_nodes(with_metadata, query_str=QUERY)))
    wanted = dict(expected(reranker, texts))
    assert {place: scores[place] for place in "013"} == {place: wanted[place] for place in "013"}
    bare = RerankerPostprocessor(model=reranker, metadata_mode=MetadataMode.NONE)
    assert found(bare.postprocess_nodes(with_metadata, query_str=QUERY)) == expected(reranker)


def test_options_reach_the_reranker(reranker):
    postprocessor = RerankerPostprocessor(model=reranker, top_n=2, normalize=True, batch_size=1)
    scores = dict(found(postprocessor.postprocess_nodes(nodes(), query_str=QUERY)))
    assert scores == pytest.approx(dict(expected(reranker, top_k=2, normalize=True)))


def test_the_librarys_event_handlers_see_what_it_does(model_folders):
    events = []

    class Watcher(BaseEventHandler):
        def handle(self, event, **options):
            events.append(event)

    dispatcher = get_dispatcher("rag_retrieval.integrations.llama_index")
    dispatcher.add_event_handler(Watcher())
    try:
        RerankerPostprocessor(model=model_folders["bert"], top_n=1).postprocess_nodes(nodes(), query_str=QUERY)
    finally:
        dispatcher.event_handlers.clear()
    begin, end = (event for event in events if event.class_name().startswith("ReRank"))
    assert begin.query == QUERY
    assert (begin.top_n, begin.model_name, len(begin.nodes), len(end.nodes)) == (1, model_folders["bert"], 4, 1)


def test_without_a_query_or_a_model_it_says_so(reranker):
    with pytest.raises(ValueError, match="a reranker needs the query: give query_bundle or query_str"):
        RerankerPostprocessor(model=reranker).postprocess_nodes(nodes())
    with pytest.raises(ValueError, match="expected a Reranker, or the name or folder of one; found NoneType"):
        RerankerPostprocessor(model=None)
    assert RerankerPostprocessor(model=reranker).postprocess_nodes([], query_str=QUERY) == []


def test_it_can_be_copied_and_pickled_after_its_first_use(reranker):
    postprocessor = RerankerPostprocessor(model=reranker)
    expected = found(postprocessor.postprocess_nodes(nodes(), query_str=QUERY))
    for other in (copy.deepcopy(postprocessor), pickle.loads(pickle.dumps(postprocessor))):
        assert found(other.postprocess_nodes(nodes(), query_str=QUERY)) == expected
