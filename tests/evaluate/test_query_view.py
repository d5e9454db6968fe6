"""The queries of an evaluation on its page: what the page holds, and what a browser makes of it."""

import base64
import hashlib
import json
import re
from html import unescape

import pytest
from beir_samples import write, write_lines

from rag_retrieval import RetrievalEvaluationConfig, evaluate_retriever
from rag_retrieval.evaluate import query_view
from rag_retrieval.evaluate.retrieval_output import write_retrieval

HOSTILE = '</script><script>document.title = "hacked"</script> &lt;b&gt; <img src=x onerror=alert(1)> \u202eabc\u202c'
COUNT = 30  # documents


def run_lines(query: str, documents: list[str]) -> str:
    """The first document has the highest score, COUNT."""
    return "".join(f"{query} Q0 {id_} 1 {COUNT - place} x\n" for place, id_ in enumerate(documents))


@pytest.fixture
def data(tmp_path):
    """q1 has three relevant documents: d15 (rank 15 in one run, first in the other), d20 (in no run) and one that the
    corpus lacks; d2 is judged 0. q2 has d1, which both runs have first. q3 has d2, which neither has."""
    root = tmp_path / "data"
    texts = {f"d{place}": f"text {place}" for place in range(1, COUNT + 1)} | {"d1": HOSTILE, "d2": "长" * 1200}
    write_lines(root / "corpus.jsonl", [{"_id": id_, "text": text} for id_, text in texts.items()])
    write_lines(root / "queries.jsonl", [{"_id": f"q{number}", "text": f"query {number}"} for number in (1, 2, 3)])
    write(root / "qrels/test.tsv", "q1\td15\t2\nq1\td20\t1\nq1\tgone\t1\nq1\td2\t0\nq2\td1\t1\nq3\td2\t1\n")
    ids = [f"d{place}" for place in range(1, 16)]
    write(root / "one.trec", run_lines("q1", ids) + run_lines("q2", ["d1"]) + run_lines("q3", ["d3"]))
    write(root / "two.trec", run_lines("q1", ["d15", "d12"]) + run_lines("q2", ["d1"]) + run_lines("q3", ["d3"]))
    return root


@pytest.fixture
def evaluation(data, tmp_path):
    config = RetrievalEvaluationConfig(
        retriever=(str(data / "one.trec"), str(data / "two.trec")), data=str(data), report=True,
        output_dir=str(tmp_path / "out"), measures=("ndcg@10", "mrr@20"),
    )  # fmt: skip
    return evaluate_retriever(config)


def results(stage: dict) -> list[tuple]:
    return [(hit["id"], hit["rank"], hit["score"]) for hit in stage["results"]]


def test_stages_hold_first_documents_relevant_ones_and_where_those_of_others_stand(evaluation):
    view = query_view.query_view(evaluation)
    assert view["systems"] == ["one.trec", "two.trec"] and (view["before"], view["after"]) == (0, 1)
    # q1 finds d15, of 3 relevant documents, at once; q2 is perfect; q3 finds nothing, and comes first
    assert [query["id"] for query in view["queries"]] == ["q3", "q1", "q2"]
    first = view["queries"][1]
    one, two = (answer["stages"] for answer in first["answers"])
    assert [answer["name"] for answer in first["answers"]] == ["one.trec", "two.trec"]
    shown = [*range(1, 11), 12, 15]
    assert results(one[0]) == [(f"d{rank}", rank, COUNT + 1 - rank) for rank in shown] and one[0]["found"] == 15
    assert results(two[0]) == [("d15", 1, COUNT), ("d12", 2, COUNT - 1)] and two[0]["found"] == 2
    assert first["values"]["mrr@20"] == [pytest.approx(1 / 15), 1]
    assert first["judged"] == [
        {"id": "d15", "grade": 2, "relevant": True, "absent": []},
        {"id": "d20", "grade": 1, "relevant": True, "absent": []},
        {"id": "gone", "grade": 1, "relevant": True, "absent": ["one.trec", "two.trec"]},
        {"id": "d2", "grade": 0, "relevant": False, "absent": []},
    ]


def test_texts_are_there_once_also_of_documents_that_nothing_found_and_cut(evaluation):
    documents = query_view.query_view(evaluation)["documents"]
    assert documents.keys() == {*(f"d{place}" for place in (*range(1, 11), 12, 15, 20))}
    assert documents["d20"] == {"text": "text 20", "metadata": {}}
    assert documents["d1"]["text"] == HOSTILE
    assert documents["d2"] == {"text": "长" * 1000, "metadata": {"text": "the first 1,000 of 1,200 characters"}}


def test_limits_on_queries_and_characters_keep_the_worst_and_say_what_is_left_out(evaluation, monkeypatch):
    whole = json.dumps(query_view.query_view(evaluation), ensure_ascii=False)
    assert "All 3 queries" in query_view.section(evaluation)[0]
    monkeypatch.setattr(query_view, "MOST_QUERIES", 2)
    assert [query["id"] for query in query_view.query_view(evaluation)["queries"]] == ["q3", "q1"]
    assert "Of 3 queries the 2 with the lowest ndcg@10 of two.trec;" in query_view.section(evaluation)[0]
    monkeypatch.setattr(query_view, "MOST_CHARACTERS", 100)
    view = query_view.query_view(evaluation)
    assert [query["id"] for query in view["queries"]] == ["q3"] and view["documents"].keys() == {"d3", "d2"}
    assert len(json.dumps(view, ensure_ascii=False)) < len(whole) / 2


def test_hostile_texts_end_no_script_and_the_policy_admits_this_script_alone(evaluation):
    write_retrieval(evaluation)
    page = (evaluation.output_dir / "report.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", page, flags=re.DOTALL)
    assert [attributes for attributes, _ in scripts] == [' type="application/json" id="data"', ""]
    assert json.loads(scripts[0][1])["documents"]["d1"]["text"] == HOSTILE
    policy = unescape(re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1])
    style = re.search(r"<style>(.*?)</style>", page, flags=re.DOTALL)[1]
    for kind, text in (("script", scripts[1][1]), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy
    assert not re.search(r"(?:src|href)=\"(?!data:)", page.replace(json.dumps(HOSTILE), ""))
