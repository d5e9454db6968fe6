import gzip
import json

import numpy as np
import pytest
from mining_samples import corpus_of

from rag_retrieval.data.readers import read_records
from rag_retrieval.data.records import RecordRules
from rag_retrieval.mining.output import Mined, lines_of, text_writer
from rag_retrieval.mining.queries import Query

QUERY = Query("q", np.array([0, 2]), [2.0, 0.9])
MINED = Mined([3, 1], [0.5, 0.25], [1.5, -2.0], candidates=9, dropped={})


def records(tmp_path, output_format, labels):
    corpus = corpus_of(tmp_path, ["a", "b", "猫", "d"])
    return [json.loads(line) for line in lines_of(QUERY, MINED, corpus, output_format, labels)]


def test_a_pos_neg_record_keeps_scores_out_of_the_labels(tmp_path):
    expected = {"query": "q", "pos": ["a", "猫"], "neg": ["d", "b"]}
    expected["candidate_scores"] = {"pos": [1.5, -2.0], "neg": [0.5, 0.25]}
    assert records(tmp_path, "pos_neg", "relevance") == [expected]


def test_a_pos_neg_record_teaches_scores_where_asked(tmp_path):
    scores = {"pos_scores": [1.5, -2.0], "neg_scores": [0.5, 0.25]}
    assert records(tmp_path, "pos_neg", "score") == [{"query": "q", "pos": ["a", "猫"], "neg": ["d", "b"], **scores}]


@pytest.mark.parametrize("labels, taught", [("relevance", [2, 0.9, 0, 0]), ("score", [1.5, -2, 0.5, 0.25])])
def test_hits_and_pairs_have_a_label_and_a_score_each(tmp_path, labels, taught):
    scores, contents = [1.5, -2.0, 0.5, 0.25], ["a", "猫", "d", "b"]
    hits = [
        {"content": content, "label": label, "score": score}
        for content, label, score in zip(contents, taught, scores, strict=True)
    ]
    corpus = corpus_of(tmp_path, ["a", "b", "猫", "d"])
    found = [json.loads(line) for line in lines_of(QUERY, MINED, corpus, "hits", labels)]
    assert found == [{"query": "q", "hits": hits}]
    found = [json.loads(line) for line in lines_of(QUERY, MINED, corpus, "pointwise", labels)]
    assert found == [{"query": "q", **hit} for hit in hits]


@pytest.mark.parametrize(
    "output_format, labels, expected",
    [
        ("pos_neg", "relevance", [(4, [1, 1, 0, 0])]),
        ("pos_neg", "score", [(4, [1.5, -2, 0.5, 0.25])]),
        ("hits", "relevance", [(4, pytest.approx([2, 0.9, 0, 0]))]),
        ("pointwise", "score", [(1, [1.5]), (1, [-2]), (1, [0.5]), (1, [0.25])]),
    ],
)
def test_the_trainer_reads_what_was_written(tmp_path, output_format, labels, expected):
    corpus = corpus_of(tmp_path, ["a", "b", "猫", "d"])
    with text_writer(tmp_path / "out.jsonl", compressed=False) as file:
        file.writelines(f"{line}\n" for line in lines_of(QUERY, MINED, corpus, output_format, labels))
    read = read_records(tmp_path / "out.jsonl", RecordRules())
    assert [(len(record.documents), record.labels) for record in read] == expected


def test_compressed_lines_are_the_same_bytes_at_any_time_and_place(tmp_path, monkeypatch):
    for time, name in ((1e9, "a.gz"), (2e9, "b.gz")):
        monkeypatch.setattr("time.time", lambda time=time: time)
        with text_writer(tmp_path / name, compressed=True) as file:
            file.write("猫\n")
    first, second = ((tmp_path / name).read_bytes() for name in ("a.gz", "b.gz"))
    assert first == second
    assert gzip.decompress(first).decode() == "猫\n"
