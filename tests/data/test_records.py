"""Ranking records: what is accepted, and what every fault is called; read from files, as users give them."""

import math

import pytest
from record_samples import GOOD, error_of, read, write_lines

from rag_retrieval.data.records import positives


def test_one_file_may_mix_pointwise_hits_and_pos_neg_records(tmp_path):
    path = write_lines(
        tmp_path / "mixed.jsonl",
        [
            {"query": "a", "content": "d1", "label": 0.5},
            {"query": "b", "hits": [{"content": "d2", "label": 2}, {"content": "d3", "label": 0}]},
            {"query": "c", "pos": ["d4"], "neg": ["d5", "d6"]},
            {"query": "d", "pos": ["d7"], "neg": ["d8"], "pos_scores": [7.5], "neg_scores": [-2]},
            {"query": "e", "pos": ["d9"]},
        ],
    )
    got = [(r.query, r.documents, r.labels, r.positive, r.format, r.line) for r in read(path)]
    assert got == [
        ("a", ["d1"], [0.5], [True], "pointwise", 1),
        ("b", ["d2", "d3"], [2, 0], [True, False], "hits", 2),
        ("c", ["d4", "d5", "d6"], [1, 0, 0], [True, False, False], "pos_neg", 3),
        ("d", ["d7", "d8"], [7.5, -2], [True, False], "pos_neg", 4),
        ("e", ["d9"], [1], [True], "pos_neg", 5),
    ]


def test_positives_are_above_the_lowest_label_or_zero_if_all_equal():
    cases = [
        ([1, 0, 0], [True, False, False]),
        ([3, 1, 2], [True, False, True]),
        ([0.9, 0.1], [True, False]),
        ([-1, -2], [True, False]),
        ([0, 0], [False, False]),
        ([2, 2], [True, True]),
        ([1], [True]),
        ([0], [False]),
    ]
    for labels, expected in cases:
        assert positives(labels) == expected


def test_labels_are_exact_float32_values(tmp_path):
    [record] = read(write_lines(tmp_path / "a.jsonl", [GOOD | {"label": 0.99988}]))
    # 0.99988 = 16775202.77 / 2**24, so the nearest float32 below 1 has the mantissa 16775203
    assert record.labels == [16775203 / 2**24]


def test_label_key_names_the_label_of_pointwise_records_and_of_hits(tmp_path):
    lines = [
        {"query": "q", "content": "d", "score": 0.25, "label": "x"},
        {"query": "q", "hits": [{"content": "d", "score": 2}]},
    ]
    got = read(write_lines(tmp_path / "a.jsonl", lines), label_key="score")
    assert [record.labels for record in got] == [[0.25], [2]]


def test_unknown_keys_are_ignored_and_null_stands_for_an_absent_optional_key(tmp_path):
    lines = [
        GOOD | {"id": 7, "title": None, "meta": {"a": [1]}},
        {"query": "q", "pos": ["d"], "neg": None, "pos_scores": None, "hits": None, "prompt": "p"},
        {"query": "q", "pos": ["d"], "neg": ["e"], "neg_ids": [3]},  # no misspelling: neg itself is there
    ]
    got = read(write_lines(tmp_path / "a.jsonl", lines))
    assert [record.format for record in got] == ["pointwise", "pos_neg", "pos_neg"]


def test_an_empty_document_is_a_legal_document(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [GOOD | {"content": ""}, {"query": "q", "pos": [""]}])
    assert [record.documents for record in read(path)] == [[""], [""]]


# bad records, each on line 3 after a good and a blank one
BAD_RECORDS = [
    ('"text"', "found the string 'text'; expected an object with the keys of one record."),
    ("[1]", "found a list; expected an object with the keys of one record."),
    ("null", "found null; expected an object with the keys of one record."),
    ("3", "found the number 3; expected an object with the keys of one record."),
    ({"content": "d", "label": 1, "id": 2},
     "found no 'query' among the keys 'content', 'label', 'id'; add it."),
    ({"qurey": "q", "content": "d", "label": 1}, "found no 'query' but 'qurey'; rename it to 'query'."),
    ({"query": "q", "contnet": "d", "label": 1}, "found no 'content' but 'contnet'; rename it to 'content'."),
    ({"query": "q", "hit": [], "id": 1}, "found no 'hits' but 'hit'; rename it to 'hits'."),
    ({"query": "q", "text": "d"},
     "found the keys 'query', 'text'; expected one of 'content', 'hits', 'pos', 'positive'."),
    ({"query": "q", "content": "d", "lable": 1}, "found no 'label' but 'lable'; rename it to 'label'."),
    ({"query": "q", "content": "d", "score": 1}, "found no 'label' among the keys 'query', 'content', 'score'"
     "; add it, or name the key that holds the label (train_label_key, val_label_key; distill: label_key)."),
    ({"query": "q", "hits": [{"content": "d", "label": 1}, {"contents": "d", "label": 1}]},
     "found no 'content' in hits[1] but 'contents'; rename it to 'content'."),
    ({"query": "q", "hits": [{"content": "d"}]}, "found no 'label' in hits[0] among the keys 'content'"
     "; add it, or name the key that holds the label (train_label_key, val_label_key; distill: label_key)."),
    ({"query": "q", "hits": [], "pos": ["d"]},
     "found both 'hits', 'pos'; expected one format: keep one of these keys."),
    ({"query": "q", "pos": ["d"], "negs": ["d"]}, "found 'negs', which looks like 'neg'; rename it."),
    ({"query": "q", "pos": ["d"], "negatives": ["d"]},
     "found 'negatives', which looks like 'neg'; rename it."),
    ({"query": "q", "pos": ["d"], "pos_score": [1]},
     "found 'pos_score', which looks like 'pos_scores'; rename it."),
    ({"query": 5, "content": "d", "label": 1}, "query is the number 5; expected a string."),
    ({"query": "", "content": "d", "label": 1}, "query is empty; expected text."),
    ({"query": " \t\n", "content": "d", "label": 1}, "query is empty; expected text."),
    ({"query": "q", "content": None, "label": 1}, "content is null; expected a string."),
    ({"query": "q", "content": ["d"], "label": 1}, "content is a list; expected a string."),
    ({"query": "q", "content": "d", "label": "1"}, "label is the string '1'; expected a number."),
    ({"query": "q", "content": "d", "label": True}, "label is true; expected a number."),
    ({"query": "q", "content": "d", "label": None}, "label is null; expected a number."),
    ({"query": "q", "content": "d", "label": math.nan},
     "label is nan; expected a finite number that float32 can hold."),
    ({"query": "q", "content": "d", "label": -math.inf},
     "label is -inf; expected a finite number that float32 can hold."),
    ({"query": "q", "content": "d", "label": 1e39},
     "label is 1e+39; expected a finite number that float32 can hold."),
    ({"query": "q", "content": "\ud83d", "label": 1},
     r"content has half of a character ('\ud83d'); expected its pair too."),
    ({"query": "q", "hits": "d"}, "hits is the string 'd'; expected a list of objects."),
    ({"query": "q", "hits": []}, "hits is an empty list; expected at least one document."),
    ({"query": "q", "hits": ["d"]}, "hits[0] is the string 'd'; expected an object with content and label."),
    ({"query": "q", "hits": [{"content": "d", "label": False}]},
     "hits[0].label is false; expected a number."),
    ({"query": "q", "hits": [{"content": 1, "label": 1}]},
     "hits[0].content is the number 1; expected a string."),
    ({"query": "q", "pos": []}, "pos is an empty list; expected at least one document."),
    ({"query": "q", "pos": "d"}, "pos is the string 'd'; expected a list of strings."),
    ({"query": "q", "pos": ["d"], "neg": [{"content": "d"}]}, "neg[0] is an object; expected a string."),
    ({"query": "q", "pos": ["a", "b", "c"], "pos_scores": [1, 2]},
     "pos has 3 documents but pos_scores has 2; give one score per document."),
    ({"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1], "neg_scores": [1, 2]},
     "neg has 1 document but neg_scores has 2; give one score per document."),
    ({"query": "q", "pos": ["a"], "pos_scores": [1], "neg_scores": [1]},
     "neg has 0 documents but neg_scores has 1; give one score per document."),
    ({"query": "q", "pos": ["a"], "neg": ["b", "c"], "pos_scores": [1]},
     "found pos_scores without neg_scores for 2 neg; give both or neither."),
    ({"query": "q", "pos": ["a"], "neg": ["b"], "neg_scores": [1]},
     "found neg_scores without pos_scores; give both or neither."),
    ({"query": "q", "pos": ["a"], "pos_scores": ["x"]},
     "pos_scores[0] is the string 'x'; expected a number."),
    ({"query": "q", "pos": ["a"], "pos_scores": 1},
     "pos_scores is the number 1; expected a list of numbers."),
]  # fmt: skip


def test_a_bad_record_is_reported_with_file_and_line(tmp_path):
    for bad, message in BAD_RECORDS:
        path = write_lines(tmp_path / "train.jsonl", [GOOD, "", bad, GOOD])
        assert error_of(path) == f"{path}:3: {message}"


def test_a_label_outside_the_range_is_reported_with_the_range(tmp_path):
    cases = [
        (GOOD | {"label": 2.5}, "label is 2.5"),
        (GOOD | {"label": -1}, "label is -1"),
        ({"query": "q", "hits": [{"content": "d", "label": 3}]}, "hits[0].label is 3"),
        ({"query": "q", "pos": ["d"], "pos_scores": [2.0000001]}, "pos_scores[0] is 2.0000001"),
    ]
    expected = "expected a value in [0, 2]: correct it, or change min_label and max_label."
    for record, found in cases:
        path = write_lines(tmp_path / "a.jsonl", [GOOD | {"label": 0}, GOOD | {"label": 2}, record])
        assert error_of(path, min_label=0, max_label=2) == f"{path}:3: {found}; {expected}"


def test_pos_and_neg_without_scores_need_0_within_the_label_range(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"query": "q", "pos": ["d"], "neg": ["e"]}])
    assert error_of(path, min_label=1) == (
        f"{path}:1: the label of a document is 0.0 (positives and negatives without scores count as 1 and 0); "
        "expected a value in [1, inf]: correct it, or change min_label and max_label."
    )


@pytest.mark.parametrize(
    ("labels", "shown"), [([1, 1, 0], "1, 1, 0"), ([0, 0], "0, 0"), ([1, 0.5], "1, 0.5"), ([2, 0], "2, 0")]
)
def test_hits_without_exactly_one_positive_are_reported_where_that_is_demanded(tmp_path, labels, shown):
    def hits(labels):
        return {"query": "q", "hits": [{"content": "d", "label": label} for label in labels]}

    path = write_lines(tmp_path / "a.jsonl", [hits([0, 1]), hits(labels), {"query": "q", "pos": ["a", "b"]}])
    assert len(read(path)) == 3
    assert error_of(path, exactly_one_positive=True) == (
        f"{path}:2: hits has the labels {shown}; expected exactly one 1 and the rest 0 for listwise cross entropy."
    )


# teacher scores


def teacher_scores_of(path, **rules):
    return [record.teacher_scores for record in read(path, **{"teacher_key": "teacher_score"} | rules)]


def test_teacher_scores_stand_beside_the_label_and_may_be_logits(tmp_path):
    lines = [
        GOOD | {"teacher_score": 7.5},
        {"query": "q", "hits": [{"content": "d", "label": 1, "teacher_score": -2},
                                {"content": "e", "label": 0, "teacher_score": 0.25}]},
    ]  # fmt: skip
    assert teacher_scores_of(write_lines(tmp_path / "a.jsonl", lines)) == [[7.5], [-2, 0.25]]


def test_teacher_scores_are_not_read_unless_asked_for(tmp_path):
    [record] = read(write_lines(tmp_path / "a.jsonl", [GOOD | {"teacher_score": "x"}]))
    assert record.teacher_scores is None


def test_scores_of_pos_and_neg_may_be_the_teachers_instead_of_labels(tmp_path):
    line = {"query": "q", "pos": ["a"], "neg": ["b", "c"], "pos_scores": [7.5], "neg_scores": [-2, 3]}
    path = write_lines(tmp_path / "a.jsonl", [line])
    [record] = read(path, teacher_key="teacher_score", max_label=1.0)
    assert (record.labels, record.teacher_scores) == ([1, 0, 0], [7.5, -2, 3])
    assert read(path)[0].labels == [7.5, -2, 3]


def test_absent_teacher_scores_are_nan_where_they_may_be_absent(tmp_path):
    lines = [GOOD, {"query": "q", "hits": [{"content": "d", "label": 1, "teacher_score": None}]},
             {"query": "q", "pos": ["d"], "neg": ["e"]}]  # fmt: skip
    found = teacher_scores_of(write_lines(tmp_path / "a.jsonl", lines))
    assert [[math.isnan(score) for score in scores] for scores in found] == [[True], [True], [True, True]]


MISSING = (
    "found no {}, which the loss learns from; add the teacher's score (rag-retrieval distill writes it), or set "
    "teacher_score_key to the key that holds it."
)


def test_a_needed_teacher_score_that_is_missing_or_invalid_is_refused(tmp_path):
    cases = [
        (GOOD, MISSING.format("teacher_score")),
        (
            {"query": "q", "hits": [{"content": "d", "label": 1, "teacher_score": 1}, {"content": "e", "label": 0}]},
            MISSING.format("hits[1].teacher_score"),
        ),
        ({"query": "q", "pos": ["d"]}, MISSING.format("pos_scores")),
        (GOOD | {"teacher_score": "1"}, "teacher_score is the string '1'; expected a number."),
        (GOOD | {"teacher_score": math.nan}, "teacher_score is nan; expected a finite number that float32 can hold."),
        (
            {"query": "q", "pos": ["d"], "neg": ["e"], "pos_scores": [1], "neg_scores": []},
            "neg has 1 document but neg_scores has 0; give one score per document.",
        ),
    ]
    for line, message in cases:
        path = write_lines(tmp_path / "a.jsonl", [line])
        assert error_of(path, teacher_key="teacher_score", needs_teacher=True) == f"{path}:1: {message}"


@pytest.mark.parametrize("score", [1.5, -0.25])
def test_a_teacher_score_outside_its_range_is_refused_with_what_to_do(tmp_path, score):
    path = write_lines(tmp_path / "a.jsonl", [GOOD | {"teacher_score": score}])
    assert error_of(path, teacher_key="teacher_score", teacher_range=(0.0, 1.0)) == (
        f"{path}:1: teacher_score is {score}; expected a value in [0, 1]: give the teacher's probabilities (set "
        "teacher_score_key to their key), or learn from logits with margin_mse or kl_distillation on groups."
    )


# For embedders


def test_the_prompt_of_a_record_is_read_for_embedders_alone(tmp_path):
    lines = [GOOD | {"prompt": "p: "}, GOOD | {"prompt_for_query": "f: "}, GOOD | {"prompt": None}, GOOD]
    path = write_lines(tmp_path / "a.jsonl", lines)
    assert [record.prompt for record in read(path, for_embedder=True)] == ["p: ", "f: ", "", ""]
    assert [record.prompt for record in read(path)] == [""] * 4
    path = write_lines(tmp_path / "a.jsonl", [GOOD | {"prompt": "a", "prompt_for_query": "b"}, GOOD | {"prompt": 1}])
    assert [line.partition(": ")[0][-2:] for line in error_of(path, for_embedder=True).splitlines()] == [":1", ":2"]


def test_scores_beside_positives_alone_are_theirs(tmp_path):
    line = {"query": "q", "pos": ["a", "b"], "scores": [0.75, 0.25]}
    path = write_lines(tmp_path / "a.jsonl", [line])
    assert read(path, for_embedder=True)[0].labels == [0.75, 0.25]
    assert read(path, for_embedder=True, teacher_key="t")[0].teacher_scores == [0.75, 0.25]
    assert read(path)[0].labels == [1, 1], "a reranker's records have none"
    for wrong in (line | {"scores": [1]}, line | {"neg": ["c"]}, line | {"pos_scores": [1, 2]}):
        assert "scores" in error_of(write_lines(tmp_path / "a.jsonl", [wrong]), for_embedder=True)
    unrelated = GOOD | {"scores": {"any": "thing"}}
    assert read(write_lines(tmp_path / "a.jsonl", [unrelated]), for_embedder=True)[0].labels == [1]


def test_hits_may_have_a_teacher_s_scores_alone(tmp_path):
    hits = [{"content": "a", "t": 3}, {"content": "b", "t": -1}]
    path = write_lines(tmp_path / "a.jsonl", [{"query": "q", "hits": hits}])
    [record] = read(path, for_embedder=True, teacher_key="t")
    assert (record.labels, record.positive, record.teacher_scores) == ([1, 1], [True, True], [3, -1])
    assert "'label'" in error_of(path, teacher_key="t")
    mixed = write_lines(tmp_path / "b.jsonl", [{"query": "q", "hits": [hits[0] | {"label": 1}, hits[1]]}])
    assert "hits[1]" in error_of(mixed, for_embedder=True, teacher_key="t")
    both = [hit | {"u": 1} for hit in hits]
    path = write_lines(tmp_path / "c.jsonl", [{"query": "q", "hits": both}])
    assert read(path, for_embedder=True, teacher_key=("t", "u"))[0].labels == [1, 1]


def test_of_a_text_alone_nothing_but_the_query_is_read(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"query": "q", "prompt": "p"}, {"query": "r", "pos": "not a list"}])
    records = read(path, for_embedder=True, texts_alone=True)
    assert [(record.query, record.documents, record.prompt, record.line) for record in records] == [
        ("q", [""], "p", 1),
        ("r", [""], "", 2),
    ]
    path = write_lines(tmp_path / "a.jsonl", [{"text": "q"}, {"query": " "}])
    assert [line.partition(": ")[0][-2:] for line in error_of(path, texts_alone=True).splitlines()] == [":1", ":2"]
