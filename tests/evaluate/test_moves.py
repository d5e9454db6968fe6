import pytest

from rag_retrieval.evaluate.moves import Move, describe_changes, largest_changes, moved_documents
from rag_retrieval.evaluate.ranking_data import RankingData
from rag_retrieval.evaluate.terminal_text import width
from rag_retrieval.metrics import query_metrics


def ranked(*documents):
    return {document: float(-place) for place, document in enumerate(documents)}


def test_the_documents_that_moved_far_at_the_top_are_named_by_their_new_rank():
    before, after = ranked("a", "b", "c", "d", "e", "f"), ranked("e", "b", "a", "d", "f", "new")
    moves = moved_documents({"e": 2, "b": 1, "f": 0}, before, after)
    # e 5 -> 1 and a 1 -> 3 moved most; then new and c, which one run lacks; f moved from 6 to 5 only
    assert moves == [
        Move("e", 2, 5, 1),
        Move("a", None, 1, 3),
        Move("new", None, None, 6),
        Move("c", None, 3, None),
    ]


def test_a_relevant_document_s_move_weighs_twice():
    before, after = ranked("a", "b", "c", "d", "e", "x"), ranked("a", "c", "d", "e", "x", "b")
    moves = {move.document for move in moved_documents({"x": 1}, before, after)}
    assert moves == {"b", "c", "d", "x"}  # of e, 5 -> 4, and x, 6 -> 5, the relevant one is named


@pytest.fixture
def data():
    queries = {"q1": "中国的首都在哪里？" * 9, "q2": "the second", "q3": "the third"}
    documents = {"a": "北京是中国的首都，" * 9, "b": "water boils " * 20, "c": "short"}
    qrels = {"q1": {"a": 1}, "q2": {"b": 2, "a": 1}, "q3": {"c": 1}}
    return RankingData("toy", documents, queries, qrels, {}, "BM25")


def test_queries_are_told_from_the_largest_change_and_fit_the_terminal(data):
    before = {"q1": ranked("c", "b", "a"), "q2": ranked("b", "a"), "q3": ranked("c")}
    after = {"q1": ranked("a", "b", "c"), "q2": ranked("a", "b"), "q3": ranked("c")}
    figures = [query_metrics(data.qrels, run, ["ndcg@10"]) for run in (before, after)]
    changes = largest_changes(data, *figures, (before, after), "ndcg@10")
    assert [[change.query for change in part] for part in changes] == [["q1"], ["q2"]]
    assert changes[0][0].before == pytest.approx(0.5) and changes[0][0].after == 1
    text = describe_changes(data, changes, "ndcg@10", 60)
    assert "+0.500" in text and "the third" not in text
    assert "grade 1  rank    3 -> 1" in text and "grade -  rank    1 -> 3" in text
    assert max(map(width, text.splitlines())) <= 60
    assert "   北京是中国的首都，北京是中...\n" in text


def test_where_nothing_changed_that_is_said(data):
    run = {"q1": ranked("a"), "q2": ranked("b"), "q3": ranked("c")}
    figures = query_metrics(data.qrels, run, ["map"])
    changes = largest_changes(data, figures, figures, (run, run), "map")
    assert describe_changes(data, changes, "map", 80).split("\n") == ["no query gained", "", "no query lost"]
