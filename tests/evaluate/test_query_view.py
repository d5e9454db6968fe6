"""The queries of an evaluation on its page: what the page holds, and what a browser makes of it."""

import base64
import hashlib
import json
import re
from html import unescape

import pytest
from beir_samples import write, write_lines
from embedder_samples import save_by_sentence_transformers
from tiny_models import tiny_bert

from rag_retrieval import RetrievalEvaluationConfig, evaluate_retriever
from rag_retrieval.evaluate import query_view
from rag_retrieval.evaluate.retrieval_output import write_retrieval
from rag_retrieval.metrics import trec_order
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.index import build_index

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
def evaluate(data, tmp_path):
    def run(*retrievers):
        config = RetrievalEvaluationConfig(
            retriever=[str(each) for each in retrievers], data=str(data), report=True, depth=30,
            output_dir=str(tmp_path / "out"), measures=("ndcg@10", "mrr@20"),
        )  # fmt: skip
        return evaluate_retriever(config)

    return run


@pytest.fixture
def evaluation(data, evaluate):
    return evaluate(data / "one.trec", data / "two.trec")


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
    place = {"begin": 0, "characters": 1200, "metadata": {"text": "characters 0 to 1,000 of 1,200"}}
    assert documents["d2"] == {"text": "长" * 1000} | place


LEMUR = "Some words. " * 20 + "A red panda eats bamboo. " + "More words. " * 20  # the panda at 240 to 264
FAR = "Filler 😀!!! " * 130 + "Pandas sleep. " + "Filler here. " * 50  # the pandas at 1,560 to 1,573


def test_a_query_has_the_best_passage_of_each_document_and_its_surroundings_beyond_the_beginning(data, evaluate):
    assert LEMUR[240:264] == "A red panda eats bamboo." and FAR[1560:1573] == "Pandas sleep."
    write_lines(data / "queries.jsonl", [{"_id": f"q{n}", "text": text} for n, text in enumerate(("panda", "cat"), 1)])
    texts = {"d1": LEMUR, "d2": FAR, "d3": "A panda.", "d4": "A cat."}
    write_lines(data / "corpus.jsonl", [{"_id": id_, "text": text} for id_, text in texts.items()])
    write(data / "qrels/test.tsv", "q1\td3\t1\nq2\td2\t1\n")
    write(data / "one.trec", run_lines("q1", ["d1", "d2", "d3"]) + run_lines("q2", ["d1", "d4"]))
    view = query_view.query_view(evaluate(data / "one.trec"))
    cat, panda = view["queries"]
    assert cat["query"] == "cat" and cat["documents"] == {}
    around = {"text": FAR[1260:1873], "begin": 1260, "characters": len(FAR)}
    assert panda["documents"] == {
        "d1": {"passage": {"start": 240, "end": 264}},
        "d2": {"passage": {"start": 1560, "end": 1573}} | around
        | {"metadata": {"text": f"characters 1,260 to 1,873 of {len(FAR):,}"}},
    }  # fmt: skip
    assert view["documents"]["d2"]["text"] == FAR[:1000]  # for the query without a passage
    assert view["seconds"] == {"one.trec": {}}


def test_a_text_that_every_query_has_in_its_own_part_is_not_there_twice(data, evaluate):
    write_lines(data / "queries.jsonl", [{"_id": "q1", "text": "panda"}])
    write_lines(data / "corpus.jsonl", [{"_id": "d1", "text": FAR}])
    write(data / "qrels/test.tsv", "q1\td1\t1\n")
    write(data / "one.trec", run_lines("q1", ["d1"]))
    assert query_view.query_view(evaluate(data / "one.trec"))["documents"] == {}


def test_stages_have_mean_seconds_and_passages_the_weights_of_the_search_by_words(data, evaluate, tmp_path):
    write_lines(data / "queries.jsonl", [{"_id": f"q{n}", "text": "panda cat"} for n in (1, 2, 3)])
    common = [{"_id": f"c{n}", "text": "A panda."} for n in range(9)]
    text = "A panda is here. " + "Filler words. " * 20 + "A cat."  # 'cat' is rarer, and so weighs more
    write_lines(data / "corpus.jsonl", [*common, {"_id": "d1", "text": text}])
    write(data / "qrels/test.tsv", "q1\td1\t1\n")
    evaluation = evaluate("bm25")
    view = query_view.query_view(evaluation)
    assert view["queries"][0]["documents"] == {"d1": {"passage": {"start": len(text) - 6, "end": len(text)}}}
    assert view["seconds"] == evaluation.seconds and 0 < view["seconds"]["bm25"]["bm25"] < 10
    write_retrieval(evaluation)
    page = (evaluation.output_dir / "report.html").read_text(encoding="utf-8")
    assert "time of a stage is a mean" in page and "Encoding a query" not in page


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


# ---- in a browser


def open_report(browser, evaluation, link: str = "", **window) -> None:
    write_retrieval(evaluation)
    browser.open(f"file://{evaluation.output_dir.resolve()}/report.html{link}", **window)


def rows(browser) -> list[list[str]]:
    """Texts of the table's cells, without what queries open into."""
    script = """return [...document.querySelectorAll('.queries .scroll > table > tbody > tr:not(.opened)')].map(
        row => [...row.cells].map(cell => cell.innerText))"""
    return browser.run(script)


def sort_by(browser, column: int) -> str:
    """Presses the heading, and says what it says then; the query is column 0."""
    browser.run("document.querySelectorAll('.queries thead th')[arguments[0]].querySelector('button').click()", column)
    return browser.run("return document.querySelectorAll('.queries thead th')[arguments[0]].ariaSort", column)


@pytest.mark.slow
def test_the_table_sorts_by_measure_and_gain_and_changes_the_measure(browser, evaluation):
    open_report(browser, evaluation)
    assert browser.texts(".queries thead button")[:3] == ["relevant", "one.trec", "two.trec"]
    assert [row[0] for row in rows(browser)] == ["query 3", "query 1", "query 2"]
    one, two = (system.per_query["ndcg@10"] for system in evaluation.systems)
    assert rows(browser)[1] == ["query 1", "3", f"{one['q1']:.3f}", f"{two['q1']:.3f}", f"+{two['q1'] - one['q1']:.3f}"]
    assert sort_by(browser, 4) == "ascending" and rows(browser)[-1][0] == "query 1"
    assert sort_by(browser, 4) == "descending" and rows(browser)[0][0] == "query 1"
    assert sort_by(browser, 2) == "ascending" and rows(browser)[-1][0] == "query 2"
    browser.run("measure.value = 'mrr@20'; measure.dispatchEvent(new Event('change'))")
    assert ["query 1", "3", "0.067", "1.000", "+0.933"] in rows(browser)
    assert browser.complaints() == []


@pytest.mark.slow
def test_a_query_opens_into_stages_with_relevant_documents_and_their_places(browser, evaluation):
    open_report(browser, evaluation)
    button = browser.all("button.query")[1]
    assert button.get_attribute("aria-expanded") == "false"
    browser.run("arguments[0].focus()", button)
    browser.press("\ue007")
    assert browser.run("return [document.activeElement.innerText, document.activeElement.ariaExpanded]") == [
        "query 1",
        "true",
    ]
    assert browser.texts(".places tbody tr td:not(:first-child)") == [
        "2", "rank 15", "rank 1", "1", "not among 15", "not among 2", "1", "not in the corpus", "not in the corpus",
    ]  # fmt: skip
    shown = browser.run("""return [...document.querySelectorAll('.stage')].map(stage => [stage.ariaLabel,
        [...stage.querySelectorAll('li')].map(one => one.querySelector('.rank')?.innerText ?? one.innerText)])""")
    first = [*map(str, range(1, 11)), "⋮", "15"]
    assert shown == [["one.trec, run", first], ["two.trec, run", ["1", "2"]]]
    assert browser.texts(".hit.relevant .id") == ["d15", "d15"] and browser.texts(".hit .quiet:not(.score)") == [
        "judged, grade 0"
    ]
    hostile = browser.run("return [...document.querySelectorAll('.snippet')].map(one => one.textContent)[0]")
    assert hostile == HOSTILE and browser.driver.title.startswith("Retrieval on")
    browser.all(".places button")[1].click()
    assert "text 20" in browser.one("dialog").text and "not found" in browser.one("dialog").text
    browser.press("\ue00c")
    browser.wait(lambda: not browser.all("dialog"))
    open_report(browser, evaluation, "#q3", width=360, dark=True)
    assert browser.texts(".places tbody td:not(:first-child)") == ["1", "not among 1", "not among 1"]
    browser.all(".places button")[0].click()
    assert "characters 0 to 1,000 of 1,200" in browser.one("dialog").text
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("return getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert browser.complaints() == [] and all(one.startswith(("file:", "data:")) for one in browser.requested())


@pytest.mark.slow
def test_the_best_passage_is_marked_where_it_stands_with_its_place_in_the_whole_text(browser, data, evaluate):
    write_lines(data / "queries.jsonl", [{"_id": "q1", "text": "panda"}])
    write_lines(data / "corpus.jsonl", [{"_id": "d1", "text": LEMUR}, {"_id": "d2", "text": FAR}])
    write(data / "qrels/test.tsv", "q1\td2\t1\n")
    evaluation = evaluate("bm25")
    open_report(browser, evaluation, "#q1")
    assert browser.texts(".places mark") == ["Pandas sleep."]
    assert sorted(browser.texts(".stage mark")) == ["A red panda eats bamboo.", "Pandas sleep."]
    far = f"best passage: characters 1,560 to 1,573 of {len(FAR):,}"
    assert sorted(browser.texts(".stage .place")) == [far, f"best passage: characters 240 to 264 of {len(LEMUR)}"]
    assert all(text.startswith("… ") for text in browser.texts(".snippet"))
    (seconds,) = browser.texts(".stage .seconds")
    assert re.fullmatch(r"[\d.]+ m?s", seconds) and "time of a stage is a mean" in browser.one(".queries").text
    browser.all(".places button")[0].click()
    assert browser.texts("dialog mark") == ["Pandas sleep."]
    assert far in browser.one("dialog").text and "characters 1,260 to 1,873" in browser.one("dialog").text
    assert browser.complaints() == []


@pytest.mark.slow
def test_the_stages_of_an_index_stand_side_by_side_with_their_moves(browser, data, evaluate, tmp_path):
    save_by_sentence_transformers(tiny_bert(tmp_path / "base"), tmp_path / "embedder", "mean", {})
    options = IndexOptions(embedder=str(tmp_path / "embedder"), vector_precision="float32", device="cpu")
    build_index(data, tmp_path / "index", options)
    evaluation = evaluate(tmp_path / "index")
    ranks = [{id_: rank for rank, id_ in enumerate(trec_order(system.run["q1"]), 1)} for system in evaluation.systems]
    open_report(browser, evaluation, "#q1")
    stages = browser.run("""return [...document.querySelectorAll('.stage')].map(stage =>
        [...stage.querySelectorAll('.hit')].map(hit => [hit.querySelector('.id').innerText,
            ...[...hit.querySelectorAll('.moves .for-readers')].map(one => one.textContent)]))""")
    assert len(stages) == 3 and len(ranks[1]) == 30
    for (id_, words, vectors), rank in zip(stages[2], sorted(ranks[2].values()), strict=False):
        assert ranks[2][id_] == rank or rank > 10
        assert vectors == moved(ranks[1].get(id_), ranks[2][id_], "vectors")
        assert words == moved(ranks[0].get(id_), ranks[2][id_], "words")


def moved(before: int | None, after: int, stage: str) -> str:
    if before is None:
        return f"not in {stage}"
    if before == after:
        return f"the same rank in {stage}"
    return f"{'up' if before > after else 'down'} {abs(before - after)} from rank {before} in {stage}"
