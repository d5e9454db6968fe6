"""Retrievers over a whole corpus: figures of hand-made runs, and whole evaluations with tiny models."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from beir_samples import write, write_lines, write_toy
from embedder_samples import copy_as

from rag_retrieval import Embedder, Reranker, RetrievalEvaluationConfig, evaluate_retriever
from rag_retrieval.cli import main
from rag_retrieval.data.beir import read_run
from rag_retrieval.evaluate.retrieval import Places
from rag_retrieval.evaluate.retrieval_output import result_of
from rag_retrieval.evaluate.retrievers import means_of, seconds_of_all
from rag_retrieval.metrics import run_metrics, trec_order
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.settings import model_content
from rag_retrieval.retrieval.best_passage import QueryWords
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.fusion import Fusion
from rag_retrieval.retrieval.index import build_index
from rag_retrieval.retrieval.searched import Searched

pytest.importorskip("bm25s")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path / "toy")


@pytest.fixture
def embedder(base_folders, tmp_path):
    return copy_as(base_folders["bert"], "embedder", tmp_path)


@pytest.fixture
def measure(toy, tmp_path):
    def run(*retrievers, **options):
        given = {"data": str(toy), "depth": 20, "output_dir": str(tmp_path / "out")} | options
        return evaluate_retriever(RetrievalEvaluationConfig(retriever=retrievers, **given))

    return run


@pytest.fixture
def encoded(monkeypatch):
    """How many texts each call encodes."""
    counts, real = [], Embedder.encode

    def counting(self, texts, *arguments, **options):
        counts.append(len(texts))
        return real(self, texts, *arguments, **options)

    monkeypatch.setattr(Embedder, "encode", counting)
    return counts


# ---- figures by hand


@pytest.fixture
def hand_made(tmp_path):
    """Two queries and 5 documents; q1 has 2 relevant documents and one that the corpus lacks, q2 has one; q2 is also
    the id of a document, and q3 has nothing relevant."""
    root = tmp_path / "hand"
    write_lines(root / "corpus.jsonl", [{"_id": id_, "text": f"text {id_}"} for id_ in ("a", "b", "c", "d", "q2")])
    write_lines(root / "queries.jsonl", [{"_id": id_, "text": f"query {id_}"} for id_ in ("q1", "q2", "q3")])
    write(root / "qrels/test.tsv", "q1\ta\t1\nq1\tb\t2\nq1\tgone\t1\nq2\tc\t1\nq3\td\t0\n")
    write(root / "found.trec", "q1 Q0 c 1 9 x\nq1 Q0 b 2 8 x\nq1 Q0 a 3 7 x\nq2 Q0 q2 1 9 x\nq2 Q0 d 2 8 x\n")
    write(root / "other.trec", "q1 Q0 b 1 9 x\nq2 Q0 c 1 9 x\n")
    return root


def test_figures_places_and_recall_of_a_hand_made_run(hand_made, measure):
    found = measure(str(hand_made / "found.trec"), data=str(hand_made), depth=3, measures=("mrr@2", "recall@3", "map"))
    assert found.measured == ["q1", "q2"] and found.data.identical_ids == 1
    assert found.after.per_query["mrr@2"] == {"q1": 0.5, "q2": 0.0}
    assert found.after.per_query["recall@3"] == {"q1": pytest.approx(2 / 3), "q2": 0.0}
    assert found.after.per_query["map"]["q1"] == pytest.approx((1 / 2 + 2 / 3) / 3)
    # of 4 relevant documents b is among the first 2, a at rank 3, c of q2 not found, one not in the corpus
    assert found.places["found.trec"] == Places(1, 1, 1, 1)
    assert found.recall["found.trec"].tolist() == pytest.approx([0, (1 / 3) / 2, (2 / 3) / 2])
    assert found.ceilings[0].per_query["mrr@2"] == {"q1": 1.0, "q2": 0.0}


def test_a_document_with_the_query_id_counts_where_it_is_wanted(hand_made, measure):
    found = measure(str(hand_made / "found.trec"), data=str(hand_made), ignore_identical_ids=False)
    assert list(found.after.run["q2"]) == ["q2", "d"] and found.data.identical_ids == 0


def test_rows_are_compared_with_the_first_or_the_one_that_is_named(hand_made, measure):
    runs = [str(hand_made / name) for name in ("found.trec", "other.trec")]
    first = measure(*runs, data=str(hand_made), measures=("mrr@10",))
    (compared,) = first.of_each["other.trec"]
    assert (compared.before, compared.after, compared.gained) == (0.25, 1.0, 2)
    second = measure(*runs, data=str(hand_made), measures=("mrr@10",), baseline="other.trec")
    assert list(second.of_each) == ["found.trec"] and second.of_each["found.trec"][0].difference == -0.75
    with pytest.raises(ValueError, match="baseline: found no row 'bm25'; expected one of found.trec, other.trec"):
        measure(*runs, data=str(hand_made), baseline="bm25")


def test_an_index_of_another_corpus_is_refused(hand_made, toy, measure, tmp_path):
    build_index(toy, tmp_path / "index")
    with pytest.raises(ValueError, match="index: holds 72 documents, and .*hand 5, of which 5 are not in it"):
        measure(str(tmp_path / "index"), data=str(hand_made))
    corpus = (toy / "corpus.jsonl").read_text()
    write(toy / "corpus.jsonl", corpus.replace("apple text 0", "another text"))
    with pytest.raises(ValueError, match="toy 72, of which 2 are not in it or have another text"):
        measure(str(tmp_path / "index"))
    write(toy / "corpus.jsonl", "".join(corpus.splitlines(keepends=True)[:70]))
    with pytest.raises(ValueError, match="holds 72 documents, and .*toy 70, of which 0"):
        measure(str(tmp_path / "index"))


def test_a_run_without_any_relevant_document_of_the_corpus_is_refused(hand_made, measure):
    write(hand_made / "qrels/test.tsv", "q1\tgone\t1\n")
    with pytest.raises(ValueError, match="found.trec: has none of the 1 relevant documents of hand test"):
        measure(str(hand_made / "found.trec"), data=str(hand_made))


# ---- whole evaluations


def test_words_an_embedder_and_an_index_in_one_table_each_reranked(toy, embedder, model_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_index(toy, tmp_path / "both", IndexOptions(embedder=embedder, vector_precision="float32"))
    options = ["--data", "toy", "--reranker", model_folders["bert"], "--depth", "20", "--output_dir", "out", "--report"]
    assert main(["evaluate", "--retriever", "bm25,embedder,both", *options]) == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    names = [row["name"] for row in result["systems"]]
    assert names == [
        "bm25", "bm25 reranked", "embedder", "embedder reranked", "both bm25", "both dense", "both fused",
        "both reranked",
    ]  # fmt: skip
    rows = dict(zip(names, result["systems"], strict=True))
    assert rows["both bm25"] | {"name": "bm25"} == rows["bm25"]
    assert rows["both dense"] | {"name": "embedder"} == rows["embedder"]
    ceilings = ["bm25 perfect order", "embedder perfect order", "both perfect order"]
    assert [row["name"] for row in result["ceilings"]] == ceilings
    # what is written is what is measured, and what a plain search gives
    qrels = {f"q{query}": {f"d{query}-0": 1} for query in range(8, 12)}
    files = {name: read_run(tmp_path / f"out/runs/{name.replace(' ', '-')}.trec") for name in names}
    for name, run in files.items():
        assert run_metrics(qrels, run, ["map"])["map"] == pytest.approx(rows[name]["map"])
    texts = [json.loads(line) for line in (toy / "corpus.jsonl").read_text().splitlines()]
    vectors = Embedder(embedder, device="cpu").encode_documents([f"{d['title']} {d['text']}".strip() for d in texts])
    scores = vectors @ Embedder(embedder, device="cpu").encode_queries("where is window 8")
    wanted = dict(sorted(zip((d["_id"] for d in texts), scores.tolist(), strict=True), key=lambda pair: -pair[1])[:20])
    assert files["embedder"]["q8"] == pytest.approx(wanted, abs=1e-5)
    pairs = [["where is window 8", next(f"{d['title']} {d['text']}".strip() for d in texts if d["_id"] == "d8-1")]]
    assert files["bm25 reranked"]["q8"]["d8-1"] == pytest.approx(
        Reranker(model_folders["bert"], device="cpu").compute_score(pairs)[0].item(), abs=1e-5
    )
    page = (tmp_path / "out/report.html").read_text()
    assert re.findall(r'<img alt="(\w+)"', page) == ["recall", "gains"]
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])["queries"][0]
    encodings = re.search(r"Encoding a query, before the stages: embedder ([\d.]+) ms, both ([\d.]+) ms\.", page)
    assert all(float(milliseconds) > 0 for milliseconds in encodings.groups())
    found = {f"{answer['name']} {stage['name']}": stage for answer in shown["answers"] for stage in answer["stages"]}
    assert list(found) == ["bm25 bm25", "bm25 reranked", "embedder dense", "embedder reranked", *names[4:]]
    for name in names[4:]:
        ranks = {hit["rank"]: hit["id"] for hit in found[name]["results"]}
        assert [ranks[rank] for rank in sorted(ranks)][:10] == trec_order(files[name][shown["id"]])[:10]
    assert all(f"<td>{name}</td>" in page for name in [*names, *ceilings])
    assert (tmp_path / "out/figures/recall.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def weighted(toy, embedder, model_folders, tmp_path):
    """The toy's index, with a weight for a reranker."""
    options = IndexOptions(embedder=embedder, vector_precision="float32", device="cpu")
    index = build_index(toy, tmp_path / "weighted", options).folder
    Fusion({"bm25": 0.5, "dense": 0.5}, 0.25, model_content(model_folders["bert"])).save(index / "fusion.json", {})
    return str(index)


def test_an_index_with_a_weight_for_the_reranker_has_a_row_of_both(weighted, measure, model_folders, caplog):
    found = measure(weighted, "bm25", reranker=model_folders["bert"])
    names = ["weighted bm25", "weighted dense", "weighted fused", "weighted reranked", "weighted combined"]
    assert [system.name for system in found.systems] == [*names, "bm25", "bm25 reranked"]
    stages = {"weighted": ["encode", "bm25", "dense", "fused", "reranked", "combined"], "bm25": ["bm25", "reranked"]}
    assert {name: list(seconds) for name, seconds in found.seconds.items()} == stages
    fused, reranked, run = (system.run for system in found.systems[2:5])
    for query, documents in run.items():
        (lowest, scores), (least, logits) = ((min(of[query].values()), of[query]) for of in (fused, reranked))
        width, height = max(scores.values()) - lowest, max(logits.values()) - least
        expected = {d: 0.25 * (logits[d] - least) / height + 0.75 * (scores[d] - lowest) / width for d in scores}
        assert documents == pytest.approx(expected, abs=1e-6)
    assert read_run(found.output_dir / "runs/weighted-combined.trec") == run
    assert found.places["weighted combined"].first == sum(
        f"d{query[1:]}-0" in trec_order(of)[:10] for query, of in run.items()
    )
    assert "another reranker" not in caplog.text
    other = measure(weighted, reranker=model_folders["xlm_roberta"], output_dir=str(found.output_dir / "other"))
    assert [system.name for system in other.systems] == names[:4]
    assert caplog.text.count("fitted for another reranker and is not used") == 1


def test_measures_are_those_of_trec_eval_on_the_written_run(toy, embedder, measure):
    ir_measures = pytest.importorskip("ir_measures")
    from ir_measures import AP, RR, P, R, nDCG

    write(toy / "qrels/test.tsv", "".join(f"q{q}\td{q}-{d}\t{d}\n" for q in range(8, 12) for d in range(4)))
    found = measure("bm25", embedder, depth=50, measures=("ndcg@10", "mrr@50", "map", "recall@50", "p@5"))
    qrels = [ir_measures.Qrel(f"q{q}", f"d{q}-{d}", d) for q in range(8, 12) for d in range(4)]
    wanted = {"ndcg@10": nDCG @ 10, "mrr@50": RR, "map": AP, "recall@50": R @ 50, "p@5": P @ 5}
    for system in found.systems:
        run = list(ir_measures.read_trec_run(str(found.output_dir / "runs" / f"{system.name}.trec")))
        for name, measure_ in wanted.items():
            values = {row.query_id: row.value for row in ir_measures.iter_calc([measure_], qrels, run)}
            assert system.per_query[name] == pytest.approx(values), (system.name, name)


def test_a_second_run_encodes_no_document_and_scores_no_pair_again(
    measure, embedder, encoded, model_folders, monkeypatch
):
    scored, real = [], Reranker.compute_score
    monkeypatch.setattr(
        Reranker, "compute_score", lambda *given, **options: scored.append(1) or real(*given, **options)
    )
    first = measure(embedder, reranker=model_folders["bert"])
    assert 72 in encoded and scored
    encoded.clear()
    scored.clear()
    again = measure(embedder, reranker=model_folders["bert"])
    assert encoded == [4] and not scored
    stages = ["encode", "dense", "reranked"]
    assert [list(one.seconds["embedder"]) for one in (first, again)] == [stages, stages[:2]]
    assert [system.run for system in again.systems] == [system.run for system in first.systems]


def test_a_model_trained_anew_gets_a_new_index_and_the_old_one_goes(measure, embedder, encoded):
    old = measure(embedder)
    model = EmbeddingModel.from_pretrained(embedder, pooling="mean")
    for weight in model.parameters():
        weight.data += 0.01 * weight.data.mean() + 0.01
    model.save_pretrained(embedder)
    new = measure(embedder)
    assert new.after.run != old.after.run and encoded.count(72) == 2
    assert len(list((new.output_dir / "indexes").iterdir())) == 1


def test_results_of_other_retrievers_or_rerankers_are_not_written_over(measure, embedder, model_folders, toy):
    from rag_retrieval.evaluate.retrieval_output import write_retrieval

    write_retrieval(measure("bm25"))
    with pytest.raises(ValueError, match="has the results of retriever bm25; give another output_dir"):
        measure("bm25", embedder)
    write_retrieval(measure("bm25", reranker=model_folders["bert"]))  # adds rows
    with pytest.raises(ValueError, match="has the results of reranker"):
        measure("bm25", reranker=model_folders["xlm_roberta"])


def test_seconds_are_those_of_a_query_of_all_that_are_asked_together():
    """The search took 3 s for both, the fusion 1 s for one and 2 s for the other."""
    both = [
        Searched("query", None, {"bm25": None, "fused": None}, {"bm25": 3.0, "fused": own}, "fused", QueryWords({}))
        for own in (1.0, 2.0)
    ]
    assert means_of(seconds_of_all(both), ["query"] * 2) == {"bm25": 1.5, "fused": 1.5}


def test_queries_and_passages_have_models_and_limits_of_their_own(measure, base_folders, embedder, toy, tmp_path):
    other = EmbeddingModel.from_pretrained(embedder, pooling="mean")
    words = other.model.embeddings.word_embeddings.weight
    words.data = words.data.flip(0)
    other.save_pretrained(tmp_path / "asks")
    options = [
        "--query_model",
        str(tmp_path / "asks"),
        "--passage_model",
        embedder,
        "--output_dir",
        str(tmp_path / "two"),
    ]
    limits = ["--query_max_length", "5", "--passage_max_length", "6"]
    assert main(["evaluate", "--data", str(toy), *options, *limits, "--report"]) == 0
    page = (tmp_path / "two/report.html").read_text()
    assert re.search(r'"seconds":{"embedder":{"encode":[\d.e-]+,"dense":[\d.e-]+}}', page)
    run = read_run(tmp_path / "two/runs/embedder.trec")
    query = Embedder(tmp_path / "asks", query_max_length=5, device="cpu").encode_queries("where is window 8")
    whole = Embedder(tmp_path / "asks", device="cpu").encode_queries("where is window 8")
    document = Embedder(embedder, max_length=6, device="cpu").encode_documents("window window text 1")
    assert run["q8"]["d8-1"] == pytest.approx(float(query @ document), abs=1e-5)
    assert run["q8"]["d8-1"] != pytest.approx(float(whole @ document), abs=1e-5)
    wide = copy_as(base_folders["qwen2"], "wide", tmp_path)
    if Embedder(wide, pooling="last", device="cpu").dim != other.dim:
        with pytest.raises(ValueError, match="query_model: vectors of .* have"):
            measure(embedder, query_model=wide, pooling="last", output_dir=str(tmp_path / "wide-out"))


def test_a_plain_bert_is_measured_before_any_training(toy, base_folders, measure):
    corpus = [json.loads(line)["text"] for line in (toy / "corpus.jsonl").read_text().splitlines()]
    plain = Embedder(base_folders["bert"], pooling="cls", device="cpu")
    assert plain.encode(corpus).shape == (72, plain.dim)
    found = measure(base_folders["bert"], pooling="cls")
    best = trec_order(found.after.run["q8"])[0]
    scores = plain.encode_documents([found.data.documents[best]]) @ plain.encode_queries("where is window 8")
    assert found.after.run["q8"][best] == pytest.approx(float(scores[0]), abs=1e-5)


def test_a_judged_pool_is_named_and_the_whole_corpus_searched(toy, measure, caplog):
    write(toy / "candidates.test.tsv", "q8\td8-0\n")
    assert len(measure("bm25").after.run["q8"]) > 1
    assert "the whole corpus is searched, not the lists of candidates.test.tsv" in caplog.text


def test_chinese_texts_are_found_and_shown(tmp_path, capsys):
    root = tmp_path / "zh"
    write_lines(
        root / "corpus.jsonl", [{"_id": "a", "text": "北京是中国的首都"}, {"_id": "b", "text": "水在一百度时沸腾"}]
    )
    write_lines(root / "queries.jsonl", [{"_id": "1", "text": "中国的首都"}, {"_id": "2", "text": "水的沸腾"}])
    write(root / "qrels/test.tsv", "1\ta\t1\n2\tb\t1\n")
    write(root / "坏.trec", "1 Q0 b 1 2 x\n1 Q0 a 2 1 x\n2 Q0 a 1 2 x\n2 Q0 b 2 1 x\n")
    options = ["--data", str(root), "--output_dir", str(tmp_path / "o"), "--report"]
    assert main(["evaluate", "--retriever", f"{root}/坏.trec,bm25", *options]) == 0
    printed = capsys.readouterr().out
    assert "北京是中国的首都" in printed and "坏.trec" in printed and "1.0000" in printed
    assert "北京是中国的首都" in (tmp_path / "o/report.html").read_text(encoding="utf-8")


def test_a_depth_beyond_the_corpus_takes_no_memory(hand_made, measure):
    at_once = measure("bm25", data=str(hand_made))
    found = measure("bm25", data=str(hand_made), depth=10**15)
    assert found.table() == at_once.table() and len(found.recall["bm25"]) == len(at_once.recall["bm25"]) <= 20


def test_a_document_whose_id_no_run_can_hold_is_named(toy, measure, model_folders):
    rows = [json.loads(line) for line in (toy / "corpus.jsonl").read_text().splitlines()]
    write_lines(toy / "corpus.jsonl", [row | {"_id": row["_id"].replace("d8-", "d 8-")} for row in rows])
    with pytest.raises(ValueError, match="the document id 'd 8-.' has spaces, which a TREC run cannot hold"):
        measure("bm25", reranker=model_folders["bert"])


def test_the_python_of_the_page_works(toy, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(from rag_retrieval import RetrievalEvaluationConfig.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("bm25,runs/my/model", "bm25").replace("DIR", str(toy)), names)
    assert [row["name"] for row in names["result"].table()] == ["bm25", "bm25 perfect order"]


def test_a_notebook_shows_the_table(hand_made, measure):
    found = measure(str(hand_made / "found.trec"), data=str(hand_made), measures=("mrr@2", "map"))
    assert found.table()[0] == {"name": "found.trec", "mrr@2": 0.25, "map": pytest.approx((1 / 2 + 2 / 3) / 6)}
    pytest.importorskip("pandas")
    assert found.to_pandas().loc["found.trec", "mrr@2"] == 0.25
    assert "<td>found.trec</td><td>0.2500</td>" in found._repr_html_()


def test_the_result_can_be_written_as_json(hand_made, measure):
    found = measure(str(hand_made / "found.trec"), data=str(hand_made))
    written = json.loads(json.dumps(result_of(found), allow_nan=False))
    assert written["queries_without_relevant"] == 1
    assert len(written["systems"][0]["recall_by_depth"]) == 5, "as many as were found"
    assert written["systems"][0]["relevant_documents"]["not_in_corpus"] == 1


@pytest.mark.slow
def test_two_processes_find_and_score_what_one_does(toy, embedder, weighted, model_folders, measure, tmp_path):
    alone = measure("bm25", embedder, weighted, reranker=model_folders["bert"])
    assert alone.systems[-1].name == "weighted combined"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    options = ["--retriever", f"bm25,{embedder},{weighted}", "--reranker", model_folders["bert"], "--depth", "20"]
    options += ["--report"]
    done = subprocess.run(
        [*launch, "rag_retrieval.cli", "evaluate", "--data", str(toy), *options, "--output_dir", str(tmp_path / "two")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    for system in alone.systems:
        two = read_run(tmp_path / "two/runs" / f"{system.name.replace(' ', '-')}.trec")
        for query, scores in system.run.items():
            assert two[query] == pytest.approx(scores, abs=1e-5)
