import pytest

from rag_retrieval.evaluate.rank_changes import RankChange, changed_documents, largest_changes
from rag_retrieval.metrics import query_metrics


def ranked(*documents):
    return {document: float(-place) for place, document in enumerate(documents)}


def test_documents_that_moved_far_at_the_top_are_listed_by_rank():
    before, after = ranked("a", "b", "c", "d", "e", "f"), ranked("e", "b", "a", "d", "f", "new")
    moves = changed_documents({"e": 2, "b": 1, "f": 0}, before, after)
    # e 5 -> 1 and a 1 -> 3 moved most; then new and c, which one run lacks; f moved from 6 to 5 only
    assert moves == [
        RankChange("e", 2, 5, 1),
        RankChange("a", None, 1, 3),
        RankChange("new", None, None, 6),
        RankChange("c", None, 3, None),
    ]


def test_a_relevant_document_s_move_weighs_twice():
    before, after = ranked("a", "b", "c", "d", "e", "x"), ranked("a", "c", "d", "e", "x", "b")
    moves = {move.document for move in changed_documents({"x": 1}, before, after)}
    assert moves == {"b", "c", "d", "x"}  # of e, 5 -> 4, and x, 6 -> 5, the relevant one is named


def test_queries_are_ordered_by_the_size_of_their_change():
    qrels = {"q1": {"a": 1}, "q2": {"b": 2, "a": 1}, "q3": {"c": 1}}
    before = {"q1": ranked("c", "b", "a"), "q2": ranked("b", "a"), "q3": ranked("c")}
    after = {"q1": ranked("a", "b", "c"), "q2": ranked("a", "b"), "q3": ranked("c")}
    figures = [query_metrics(qrels, run, ["ndcg@10"]) for run in (before, after)]
    gained, lost = largest_changes(qrels, *figures, (before, after), "ndcg@10")
    assert ([change.query for change in gained], [change.query for change in lost]) == (["q1"], ["q2"])
    assert gained[0].before == pytest.approx(0.5) and gained[0].after == 1
    assert [document.as_text() for document in gained[0].documents] == [("1", "3 -> 1"), ("-", "1 -> 3")]
    assert largest_changes(qrels, figures[0], figures[0], (before, before), "ndcg@10") == ([], [])
