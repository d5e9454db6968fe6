import json
import shutil
import sys
from pathlib import Path

import pytest
from beir_samples import write_toy
from tiny_models import tiny_bert

# the scripts import each other by bare name, as Python runs them
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import quality_pipeline
from quality_tables import read_rows

SYSTEMS = ["bm25", "base", "bm25 + base"]


def test_reranked_documents_come_first_and_the_others_stay_below_in_their_order():
    found = {"a": 9.0, "b": 8.0, "c": 7.0, "d": 6.0}
    scores = {("q", "a"): -3.0, ("q", "b"): -2.0, ("other", "a"): 50.0}
    reranked = quality_pipeline.with_scores("q", found, scores, depth=2)
    assert sorted(reranked, key=reranked.get, reverse=True) == ["b", "a", "c", "d"]
    assert (reranked["b"], reranked["a"]) == (-2.0, -3.0)
    assert quality_pipeline.with_scores("q", {}, scores, depth=2) == {}


def row(system: str, *values: float) -> dict:
    per_query = {f"q{place}": value for place, value in enumerate(values)}
    figures = dict.fromkeys(quality_pipeline.COLUMNS, sum(values) / len(values))
    return {"system": system, "figures": figures, "per_query": per_query, "cpu_seconds": 12.3, "memory_mib": 2000}


def test_the_best_pipeline_is_compared_with_every_other():
    text = quality_pipeline.markdown_table([row("bm25", 0.2, 0.4), row("fused", 0.5, 0.5), row("base", 0.3, 0.1)])
    assert "| fused | 0.5000 | 0.5000 | 0.5000 | 12 | 2,000 |" in text
    assert [line.split(": ")[0] for line in text.splitlines()[-2:]] == ["fused - bm25", "fused - base"]
    assert "+0.2000" in text and "2/0/0 gained/lost/same" in text


@pytest.mark.slow
def test_every_list_is_measured_without_and_with_the_reranker_and_finished_steps_stay(tmp_path, capsys):
    toy = write_toy(tmp_path / "toy")
    shutil.copy(toy / "qrels/train.tsv", toy / "qrels/dev.tsv")
    model = tiny_bert(tmp_path / "bert")
    files = ["--data", toy, "--embedder", f"base={model}", "--reranker", tmp_path / "reranker"]
    files += ["--work", tmp_path / "work", "--out", tmp_path / "rows.jsonl"]
    arguments = [*map(str, files), "--depth", "3", "--max_len", "32", "--threads", "1"]

    with pytest.raises(SystemExit, match="step reranked ended with exit code 1"):
        quality_pipeline.main(arguments)
    begun = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    tiny_bert(tmp_path / "reranker", head_labels=1)
    quality_pipeline.main(arguments)

    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    assert {name: now[name] for name in begun} == begun, "no finished step ran again"
    rows = read_rows(tmp_path / "rows.jsonl")
    *rows, both = rows
    assert [row["system"] for row in rows] == [each for name in SYSTEMS for each in (name, f"{name}, reranked")]
    assert both["system"] == "base + reranked" and 0 < both["figures"]["ndcg@10"] <= 1
    for plain, reranked in zip(rows[::2], rows[1::2], strict=True):
        assert reranked["cpu_seconds"] > plain["cpu_seconds"] and reranked["memory_mib"] > 100
        assert reranked["figures"]["recall@100"] == plain["figures"]["recall@100"]
        assert plain["per_query"].keys() == {"q8", "q9", "q10", "q11"}
    said = json.loads((tmp_path / "work/reranked.json").read_text())
    assert said["scored"] <= sum(said["pairs"].values()) and set(said["pairs"]) == set(SYSTEMS)
    assert "| bm25 + base, reranked |" in capsys.readouterr().out
