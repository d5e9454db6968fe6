"""Whole evaluations on a toy folder with a tiny model of random weights."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from beir_samples import write, write_lines, write_toy
from transformers import AutoTokenizer
from yes_no_samples import tiny_causal

from rag_retrieval import EvaluationConfig, Reranker, evaluate_reranker, load_reranker
from rag_retrieval.cli import main
from rag_retrieval.data.beir import read_run
from rag_retrieval.evaluate import scoring
from rag_retrieval.evaluate.output import describe_evaluation, result_of, write_evaluation
from rag_retrieval.evaluate.report import write_report
from rag_retrieval.evaluate.systems import RankChange, System, changed_documents, largest_changes
from rag_retrieval.infer.listwise import ListwiseReranker
from rag_retrieval.metrics import LOGGED_METRICS, query_metrics, run_metrics
from rag_retrieval.models.calibration import read_calibration

pytest.importorskip("bm25s")


@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path / "toy")


@pytest.fixture
def model(load_tiny, tmp_path):
    load_tiny("bert").save_pretrained(tmp_path / "bert" / "model")
    return str(tmp_path / "bert" / "model")


@pytest.fixture
def config(toy, model, tmp_path):
    return EvaluationConfig(model=model, data=str(toy), depth=4, output_dir=str(tmp_path / "out"))


@pytest.fixture
def scored(monkeypatch):
    """The number of pairs that each call scored."""
    counts, real = [], Reranker.compute_score

    def counting(reranker, pairs, *arguments, **options):
        counts.append(len(pairs))
        return real(reranker, pairs, *arguments, **options)

    monkeypatch.setattr(Reranker, "compute_score", counting)
    return counts


def test_the_run_has_the_model_s_scores_of_the_candidates(config, toy):
    found = evaluate_reranker(config)
    documents = ["d8-1", "d8-2", "d8-0", "d8-3"]  # of the folder's BM25 run, to depth 4
    texts = [found.data.documents[document] for document in documents]
    scores = load_reranker(config.model).compute_score([["where is window 8", text] for text in texts])
    assert found.after.run["q8"] == pytest.approx(dict(zip(documents, scores.tolist(), strict=True)), abs=1e-5)
    assert read_run(found.output_dir / "run.trec") == found.after.run
    wanted = run_metrics(found.data.qrels, found.after.run, LOGGED_METRICS)
    assert {row.metric: row.after for row in found.comparisons[:3]} == pytest.approx(wanted)
    assert found.before.name == "BM25" and set(found.before.per_query["mrr@10"].values()) == {1 / 3}


def test_an_interrupted_evaluation_continues_to_the_same_result(config, scored, monkeypatch, tmp_path):
    monkeypatch.setattr(scoring, "PART_PAIRS", {"cpu": 5})  # two queries of four documents
    whole = evaluate_reranker(config)
    assert scored == [8, 8]
    cut = config.model_copy(update={"output_dir": str(tmp_path / "cut")})
    real, written = scoring.write_run, []

    def one_and_no_more(file, *arguments):
        if written:
            raise KeyboardInterrupt
        written.append(file)
        real(file, *arguments)

    monkeypatch.setattr(scoring, "write_run", one_and_no_more)
    with pytest.raises(KeyboardInterrupt):
        evaluate_reranker(cut)
    assert written[0].is_file() and not (tmp_path / "cut" / "run.trec").exists()
    monkeypatch.setattr(scoring, "write_run", real)
    scored.clear()
    again = evaluate_reranker(cut)
    assert scored == [8] and again.after.run == whole.after.run
    assert not (tmp_path / "cut" / "run.trec.parts").exists()


def test_a_finished_run_is_taken_again_until_weights_or_candidates_change(config, scored, load_tiny):
    first = evaluate_reranker(config)
    assert evaluate_reranker(config).after.run == first.after.run and len(scored) == 1
    scorer = load_tiny("bert")
    scorer.model.classifier.bias.data += 1
    scorer.save_pretrained(config.model)
    changed = evaluate_reranker(config)
    assert scored == [16, 16] and changed.after.run["q8"]["d8-1"] == pytest.approx(first.after.run["q8"]["d8-1"] + 1)
    evaluate_reranker(config.model_copy(update={"depth": 3}))
    assert scored == [16, 16, 12]


@pytest.mark.parametrize("damage", [lambda lines: lines[:5], lambda lines: [*lines[:5], "q8 Q0"]])
def test_a_truncated_run_file_is_scored_again(config, scored, damage):
    first = evaluate_reranker(config)
    file = first.output_dir / "run.trec"
    whole = file.read_text()
    file.write_text("\n".join(damage(whole.splitlines())) + "\n")
    assert evaluate_reranker(config).after.run == first.after.run
    assert scored == [16, 16] and file.read_text() == whole


def test_a_missing_library_is_reported_before_anything_is_scored(config, scored, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(ValueError, match=r"evaluation needs matplotlib; run: pip install -e '.\[evaluate,report\]'"):
        evaluate_reranker(config.model_copy(update={"report": True}))
    assert scored == []


def test_a_model_is_compared_with_bm25_a_run_file_or_another_model(config, load_tiny, tmp_path):
    other = load_tiny("qwen2")
    other.save_pretrained(tmp_path / "other")
    against_model = evaluate_reranker(config.model_copy(update={"baseline": str(tmp_path / "other")}))
    file = against_model.output_dir / "baseline.trec"
    assert read_run(file) == against_model.before.run != against_model.after.run
    (tmp_path / "kept.trec").write_text(file.read_text())
    against_file = evaluate_reranker(config.model_copy(update={"baseline": str(tmp_path / "kept.trec")}))
    assert against_file.comparisons == against_model.comparisons
    against_bm25 = evaluate_reranker(config.model_copy(update={"candidates": str(file), "baseline": "bm25"}))
    assert against_bm25.before.name == "BM25" and against_bm25.data.source == "baseline.trec"


def test_a_calibration_is_fitted_on_one_split_saved_and_used_on_another(config, toy):
    (toy / "qrels/dev.tsv").write_text((toy / "qrels/train.tsv").read_text())
    (toy / "runs/bm25.dev.tsv").write_text((toy / "runs/bm25.train.tsv").read_text())
    try:
        found = evaluate_reranker(config.model_copy(update={"calibrate": "dev"})).probabilities
    except ValueError as refused:  # random weights may score relevant documents lower
        pytest.fail(f"choose another tiny model: {refused}")
    assert found.calibration.data == "toy dev" and found.calibration.pairs == 32
    assert read_calibration(config.model) == found.calibration
    later = evaluate_reranker(config).probabilities
    assert later == found and later.log_loss < later.sigmoid_log_loss


def test_a_calibration_goes_elsewhere_for_a_read_only_model_folder(config, toy, tmp_path, monkeypatch):
    (toy / "qrels/dev.tsv").write_text((toy / "qrels/train.tsv").read_text())
    (toy / "runs/bm25.dev.tsv").write_text((toy / "runs/bm25.train.tsv").read_text())
    readable = os.access
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != config.model and readable(path, mode))
    with pytest.raises(ValueError, match="calibrate: .* cannot be written to; set calibration_dir"):
        evaluate_reranker(config.model_copy(update={"calibrate": "dev"}))
    elsewhere = tmp_path / "new" / "calibration"
    changes = {"calibrate": "dev", "calibration_dir": str(elsewhere)}
    found = evaluate_reranker(config.model_copy(update=changes)).probabilities
    assert found.calibration == read_calibration(str(elsewhere)) and read_calibration(config.model) is None
    assert (found.score_type, found.calibration.data) == ("calibrated", "toy dev")


def test_a_model_without_a_trained_head_is_refused_also_as_baseline(config, scored, load_tiny, tmp_path):
    load_tiny("bert").model.base_model.save_pretrained(tmp_path / "base")
    load_tiny("bert").tokenizer.save_pretrained(tmp_path / "base")
    for key in ("model", "baseline"):
        with pytest.raises(ValueError, match="trained"):
            evaluate_reranker(config.model_copy(update={key: str(tmp_path / "base")}))
    assert scored == [16], "of the trained model alone"


def test_calibration_on_what_is_measured_or_without_a_folder_is_refused(config):
    with pytest.raises(ValueError, match="calibrate: test is measured on; fit on other queries"):
        evaluate_reranker(config.model_copy(update={"calibrate": "test"}))
    data = config.data + "/queries.jsonl"
    with pytest.raises(ValueError, match="queries.jsonl is measured on; fit on other queries"):
        same = data.replace("/queries", "/qrels/../queries")
        evaluate_reranker(config.model_copy(update={"data": data, "calibrate": same}))
    with pytest.raises(ValueError, match="saved with the model, and package:x is no folder of yours"):
        evaluate_reranker(config.model_copy(update={"calibrate": "dev", "model": "package:x"}))


def test_scores_that_are_not_finite_are_refused_with_their_query(config, load_tiny):
    scorer = load_tiny("bert")
    scorer.model.classifier.bias.data += float("nan")
    scorer.save_pretrained(config.model)
    with pytest.raises(ValueError, match="classifier.bias are not all finite"):
        evaluate_reranker(config)


def test_the_command_prints_the_table_and_writes_per_query_results(config, toy, tmp_path, capsys):
    arguments = ["--model", config.model, "--data", str(toy), "--depth", "4", "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", *arguments, "--measures", "ndcg@10,p@1"]) == 0
    printed = capsys.readouterr().out
    assert "toy test: 4 queries, 16 pairs; candidates from BM25" in printed
    assert "paired randomization test" in printed and "not calibrated" in printed
    rows = [json.loads(line) for line in (tmp_path / "out/per_query.jsonl").read_text().splitlines()]
    assert [row["query_id"] for row in rows] == ["q8", "q9", "q10", "q11"]
    assert rows[0]["baseline"] == {"ndcg@10": 0.5, "p@1": 0.0} and rows[0]["relevant"] == 1
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["model"]["ndcg@10"] == pytest.approx(sum(row["ndcg@10"] for row in rows) / 4)
    assert result["ceiling"]["ndcg@10"] == 1.0 and result["config"]["depth"] == 4


def test_a_model_is_named_by_its_path_from_the_current_folder(toy, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--model", "bert/model", "--data", "toy", "--depth", "4"]) == 0
    assert "\n  model     bert/model\n" in capsys.readouterr().out
    assert json.loads(Path("runs/evaluate/bert-toy-test/result.json").read_text())["model"]["name"] == "bert/model"


def test_a_file_of_records_is_evaluated_with_its_documents_as_candidates(model, tmp_path, capsys):
    hits = [{"content": "北京是中国的首都", "label": 2}, {"content": "水在一百度时沸腾", "label": 0}]
    write_lines(tmp_path / "dev.jsonl", [{"query": "中国的首都", "hits": hits}])
    options = ["--data", str(tmp_path / "dev.jsonl"), "--output_dir", str(tmp_path / "o")]
    assert main(["evaluate", "--model", model, *options]) == 0
    assert "1 queries, 2 pairs; candidates from BM25 of the data's own lists" in capsys.readouterr().out


def test_queries_without_a_relevant_document_are_left_out_and_named(config, toy):
    judged = (toy / "qrels/test.tsv").read_text().replace("q9\td9-0\t1", "q9\td9-0\t0")
    (toy / "qrels/test.tsv").write_text(judged)
    found = evaluate_reranker(config)
    assert found.measured == ["q8", "q10", "q11"]
    write_evaluation(found)
    result = json.loads((found.output_dir / "result.json").read_text())
    assert (result["queries"], result["queries_without_relevant"]) == (3, 1)
    rows = [json.loads(line) for line in (found.output_dir / "per_query.jsonl").read_text().splitlines()]
    assert [row["query_id"] for row in rows if "left_out" in row] == ["q9"] and "ndcg@10" not in rows[1]
    means = [row["ndcg@10"] for row in rows if "left_out" not in row]
    assert result["model"]["ndcg@10"] == pytest.approx(sum(means) / 3)


def test_a_document_with_the_query_id_is_left_out_unless_wanted(config, toy):
    for name, id_ in (("queries.jsonl", "q8"), ("qrels/test.tsv", "q8"), ("runs/bm25.test.tsv", "q8")):
        (toy / name).write_text((toy / name).read_text().replace(id_, "d8-1"))
    found = evaluate_reranker(config)
    assert list(found.data.candidates["d8-1"]) == ["d8-2", "d8-0", "d8-3", "d8-4"]
    assert result_of(found)["queries_with_identical_ids"] == 1
    assert "1 queries have a document with their own id" in describe_evaluation(found, 80)
    wanted = config.model_copy(update={"ignore_identical_ids": False, "output_dir": config.output_dir + "-all"})
    assert list(evaluate_reranker(wanted).data.candidates["d8-1"]) == ["d8-1", "d8-2", "d8-0", "d8-3"]


def test_the_language_of_the_words_is_settable_and_in_the_result(config, toy):
    (toy / "runs/bm25.test.tsv").unlink()
    result = result_of(evaluate_reranker(config.model_copy(update={"language": "german"})))
    assert "german" in result["words"] and result["config"]["language"] == "german"


def test_judgments_without_any_relevant_document_are_refused(config, scored):
    with pytest.raises(ValueError, match="none of the 4 judged queries .* relevant_from"):
        evaluate_reranker(config.model_copy(update={"relevant_from": 3}))
    assert scored == []


def test_a_mistake_ends_with_one_line_and_code_2(model, tmp_path, capsys):
    assert main(["evaluate", "--model", model, "--data", str(tmp_path / "gone")]) == 2
    assert "error: " in capsys.readouterr().err


def test_gaps_in_the_data_are_in_the_terminal_and_the_result(config, toy, tmp_path, capsys):
    write(tmp_path / "part.trec", "q8 Q0 d8-0 1 2.5 x\n")
    with (toy / "qrels/test.tsv").open("a") as file:
        file.write("q9\tgone\t1\n")
    options = ["--candidates", str(tmp_path / "part.trec"), "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", "--model", config.model, "--data", str(toy), *options]) == 0
    printed = capsys.readouterr().out
    assert "\n3 queries have no candidates and count 0\n" in printed
    assert "\n1 judgments are of documents that the corpus lacks; they count as missed\n" in printed
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert (result["queries_without_candidates"], result["judgments_without_document"]) == (3, 1)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(config, toy, tmp_path):
    alone = evaluate_reranker(config)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--model", config.model, "--data", str(toy), "--depth", "4", "--output_dir", str(tmp_path / "two")]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [*launch, "-m", "rag_retrieval.cli", "evaluate", *options],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    two = read_run(tmp_path / "two" / "run.trec")
    for query, scores in alone.after.run.items():
        assert two[query] == pytest.approx(scores, abs=1e-5)


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
    systems = [System("", run, query_metrics(qrels, run, ["ndcg@10"])) for run in (before, after)]
    gained, lost = largest_changes(qrels, *systems, "ndcg@10")
    assert ([change.query for change in gained], [change.query for change in lost]) == (["q1"], ["q2"])
    assert gained[0].before == pytest.approx(0.5) and gained[0].after == 1
    assert [document.as_text() for document in gained[0].documents] == [("1", "3 -> 1"), ("-", "1 -> 3")]
    assert largest_changes(qrels, systems[0], systems[0], "ndcg@10") == ([], [])


def test_a_chat_model_is_measured_by_the_order_that_it_answers(config, tmp_path, monkeypatch, caplog):
    folder = tiny_causal(tmp_path / "chat", "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    answers = iter(["[3] > [2] > [1]", "[2] > [1]", *["[1]"] * 99])
    asked = []

    def answer(reranker, query, passages):
        asked.append(query)
        return next(answers)

    monkeypatch.setattr(ListwiseReranker, "_answer", answer)
    changes = {"model": folder, "listwise": True, "window": 3, "step": 2, "report": True, "max_length": 20}
    found = evaluate_reranker(config := EvaluationConfig(**config.model_dump(exclude_none=True) | changes))
    first, *_ = found.data.candidates
    order = list(found.data.candidates[first])
    # the window of the last three is turned round, then that of the first two, which begins at the top
    expected = [order[3], order[0], order[2], order[1]]
    assert sorted(found.after.run[first], key=found.after.run[first].get, reverse=True) == expected
    assert sorted(found.after.run[first].values()) == [1 / 4, 1 / 3, 1 / 2, 1]
    others = [query for query in found.data.candidates if query != first]
    assert all(list(found.after.run[query]) == list(found.data.candidates[query]) for query in others)
    assert "answers did not name each document" in caplog.text and "max_length (only for" in config.ignored
    write_evaluation(found)
    write_report(found)
    assert result_of(found)["probabilities"] is None and "probabilities" not in describe_evaluation(found, 100)
    calls = len(asked)
    assert evaluate_reranker(config).after.run == found.after.run and len(asked) == calls, "taken from the folder"
    other = EvaluationConfig(**config.model_dump(exclude_none=True) | {"window": 2})
    evaluate_reranker(other)
    assert len(asked) > calls, "another window is another order"
