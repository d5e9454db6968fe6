"""Which records, texts and ids a step of an embedder has, however it is cut."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from training_runs import write_jsonl

from rag_retrieval.data.records import RecordRules
from rag_retrieval.data.step_records import QUERY_MARK
from rag_retrieval.data.store import open_store
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.train.embedding.training_data import EmbeddingSteps, SamplingOptions, TrainingFile, records_of
from rag_retrieval.train.steps import StepShape


class Words:
    """Encodes a text as one token for each character, after a token for its kind and one for its prompt, if any."""

    def encode(self, texts, kind=None, prompt=None):
        start = [{"query": 1, "document": 2}[kind]] + ([3] if prompt else [])
        return [self.encoded([*start, *map(ord, text)]) for text in texts]

    def encoded(self, ids):
        return EncodedPair(np.array(ids, np.int32), None, False, 0)


def texts_of(batch) -> list[str]:
    """`q:` or `d:`, `p` for a prompt, and the text."""
    names = {1: "q:", 2: "d:", 3: "p:"}
    rows = np.split(batch.texts.ids, np.cumsum(batch.texts.lengths)[:-1])
    return ["".join(names.get(token) or chr(token) for token in row.tolist()) for row in rows]


@pytest.fixture
def steps(tmp_path):
    def make(
        records,
        *others,
        kind="positives",
        batch_size=4,
        run_steps=1,
        processes=1,
        index=0,
        vectors=None,
        rules=None,
        **options,
    ) -> EmbeddingSteps:
        """run_steps: of the run."""
        rules = RecordRules(**{"for_embedder": True} | (rules or {}))
        paths = [write_jsonl(tmp_path / f"{place}.jsonl", part) for place, part in enumerate([records, *others])]
        stores = [open_store(path, rules, group_by_query=not rules.texts_alone) for path in paths]
        file = TrainingFile("data.jsonl", "", stores[0], kind, records_of(stores[0], kind), vectors)
        shape = StepShape(run_steps * batch_size * processes, batch_size, 1, processes, index)
        return EmbeddingSteps(file, Words(), shape, SamplingOptions(**{"seed": 5, "group_size": 8} | options), stores)

    return make


RECORDS = [
    {"query": "one", "pos": ["first"], "neg": ["shared", "far"]},
    {"query": "two", "pos": ["shared"]},
    {"query": "three", "pos": ["third"], "neg": ["first"]},
    {"query": "four", "pos": ["fourth"], "neg": ["ｓｈａｒｅｄ "]},
]


def test_a_step_embeds_each_distinct_text_once_queries_first(steps):
    (batch,) = steps(RECORDS)[0, 0]
    texts = texts_of(batch)
    assert batch.queries == 4 and batch.size == 9 and batch.items == (4,)
    assert sorted(texts[:4]) == ["q:four", "q:one", "q:three", "q:two"]
    documents = {text.replace("ｓｈａｒｅｄ ", "shared") for text in texts[4:]}
    assert documents == {"d:far", "d:first", "d:fourth", "d:shared", "d:third"}
    assert len(set(batch.ids.tolist())) == 9


def test_ids_say_what_belongs_to_what(steps):
    data = steps(RECORDS, shuffle=False)
    (batch,) = data[0, 0]
    names = dict(zip(batch.ids.tolist(), texts_of(batch), strict=True))
    records = batch.records
    assert [names[id_] for id_ in records.query_ids.tolist()] == ["q:one", "q:two", "q:three", "q:four"]
    assert [names[id_] for id_ in records.positive_ids.tolist()] == ["d:first", "d:shared", "d:third", "d:fourth"]
    assert [names[id_] for id_ in records.negative_ids.tolist()] == ["d:shared", "d:far", "d:first", "d:shared"]
    assert records.negative_offsets.tolist() == [0, 2, 2, 3, 4]
    assert batch.sources == ["data.jsonl:1", "data.jsonl:2", "data.jsonl:3", "data.jsonl:4"]


def test_a_query_and_a_document_of_one_text_differ_by_the_mark(steps):
    records = [{"query": "same", "pos": ["same"]}]
    (batch,) = steps(records, batch_size=1)[0, 0]
    assert batch.ids[0] ^ QUERY_MARK == batch.ids[1] == batch.records.positive_ids[0]


def test_the_token_budget_changes_the_cut_alone(steps):
    data = steps(RECORDS)
    (whole,) = data[0, 0]
    for padded in (False, True):
        data.options = replace(data.options, max_tokens=16, padded=padded)
        parts = data[0, 0]
        assert len(parts) > 2 and [part.items for part in parts] == [(4,), *[(0,)] * (len(parts) - 1)]
        assert all(part.records is None for part in parts[1:])
        assert np.array_equal(parts[0].records.query_ids, whole.records.query_ids)
        texts = {name: id_ for part in parts for name, id_ in zip(texts_of(part), part.ids.tolist(), strict=True)}
        assert texts == dict(zip(texts_of(whole), whole.ids.tolist(), strict=True))
        for part in parts:
            kinds = [name[0] for name in texts_of(part)]
            assert kinds == ["q"] * part.queries + ["d"] * (len(kinds) - part.queries)
            longest, total = part.texts.lengths.max(), part.texts.lengths.sum()
            assert (len(kinds) * longest if padded else total) <= 16


def test_every_positive_of_a_query_in_the_data_is_known(steps):
    records = [
        {"query": "one", "pos": ["a", "b"]},
        {"query": "one ", "pos": ["c"], "neg": ["d"]},
        {"query": "two", "content": "e", "label": 1},
        {"query": "two", "content": "f", "label": 0},
    ]
    data = steps(records, [{"query": "two", "pos": ["g"]}], batch_size=3, shuffle=False)
    ids = {name: int(data.store.document_ids[place]) for place, name in enumerate("abcdef")}
    ids["g"] = int(data.all_stores[1].document_ids[0])
    records = data[0, 0][0].records
    known = np.split(records.known_positive_ids, records.known_positive_offsets[1:-1])
    assert [set(row.tolist()) for row in known] == [{ids[name] for name in names} for names in ("abc", "abc", "eg")]


def test_a_positive_of_a_query_is_known_under_every_prompt(steps):
    records = [
        {"query": "one", "pos": ["a"]},
        {"query": "one", "pos": ["b"], "prompt": "say: "},
        {"query": "two", "pos": ["c"], "prompt": "say: "},
    ]
    data = steps(records, batch_size=3, shuffle=False)
    a, b, c = data.store.document_ids.tolist()
    records = data[0, 0][0].records
    known = np.split(records.known_positive_ids, records.known_positive_offsets[1:-1])
    assert [set(row.tolist()) for row in known] == [{a, b}, {a, b}, {c}]
    assert len(set(records.query_ids.tolist())) == 3, "they are three queries all the same"


def test_a_record_shows_one_positive_in_a_pass_and_negatives_in_turns(steps):
    data = steps([{"query": "q", "pos": ["a", "b", "c"], "neg": list("uvwxyz")}], batch_size=1, group_size=3)
    shown = [data.example(pass_number, 0) for pass_number in range(3)]
    assert {example.pair for example in shown} == {0, 1, 2}
    assert sorted(place for example in shown for place in example.negatives) == [3, 4, 5, 6, 7, 8]
    assert data.example(1, 0).pair == shown[1].pair


def test_the_records_of_a_step_do_not_depend_on_the_number_of_processes(steps):
    records = [{"query": f"q{place}", "pos": [f"d{place}"]} for place in range(11)]
    for step in range(3):
        whole = steps(records, batch_size=4, run_steps=3)[0, step][0].records.query_ids
        shares = [
            steps(records, batch_size=2, run_steps=3, processes=2, index=index)[0, step][0].records.query_ids
            for index in range(2)
        ]
        assert np.array_equal(np.stack(shares, axis=1).ravel(), whole)


def test_steps_are_full_and_a_pass_continues_in_the_next_one(steps):
    records = [{"query": f"q{place}", "pos": [f"d{place}"]} for place in range(10)]
    data = steps(records, batch_size=4, run_steps=5)
    seen = [id_ for step in range(5) for id_ in data[0, step][0].records.query_ids.tolist()]
    assert len(seen) == 20 and len(set(seen[:10])) == len(set(seen[10:])) == 10
    assert seen[:10] != seen[10:], "another order in the next pass"


def test_queries_without_a_positive_are_left_out(steps):
    records = [{"query": "none", "content": "x", "label": 0}, *RECORDS]
    data = steps(records, batch_size=4)
    assert sorted(texts_of(data[0, 0][0]))[-4:] == ["q:four", "q:one", "q:three", "q:two"]


def test_a_filler_has_a_text_and_no_id(steps):
    filler = steps(RECORDS).filler()
    assert len(filler.texts) == 1 and len(filler.ids) == filler.queries == filler.size == 0
    assert filler.items == (0,) and filler.records is None


def test_steps_are_equal_in_a_worker(steps):
    data = steps(RECORDS)
    copy = pickle.loads(pickle.dumps(data))
    assert np.array_equal(copy[0, 0][0].ids, data[0, 0][0].ids)


# The kinds of records


def test_pairs_with_a_label_are_records_by_themselves(steps):
    records = [
        {"query": "one", "content": "a", "label": 0.25},
        {"query": "two", "pos": ["b"], "scores": [0.5]},
        {"query": "one", "content": "c", "label": 1},
    ]
    (batch,) = steps(records, kind="label", batch_size=3, shuffle=False)[0, 0]
    names = dict(zip(batch.ids.tolist(), texts_of(batch), strict=True))
    pairs = zip(batch.records.query_ids.tolist(), batch.records.positive_ids.tolist(), strict=True)
    assert [names[query] + names[document] for query, document in pairs] == ["q:oned:a", "q:oned:c", "q:twod:b"]
    assert batch.records.labels.tolist() == [0.25, 1, 0.5] and batch.records.labels.dtype == np.float32
    assert len(batch.records.negative_ids) == 0


TEACHER = {"teacher_key": "teacher_score", "needs_teacher": True}


def test_a_teacher_s_scores_stand_beside_the_ids(steps):
    records = [
        {"query": "one", "pos": ["a"], "neg": ["b", "c"], "pos_scores": [3.5], "neg_scores": [1, -2]},
        {"query": "two", "hits": [
            {"content": "d", "label": 0, "teacher_score": 0.5}, {"content": "e", "label": 1, "teacher_score": 7},
        ]},
    ]  # fmt: skip
    (batch,) = steps(records, batch_size=2, shuffle=False, rules=TEACHER)[0, 0]
    assert batch.records.positive_scores.tolist() == [3.5, 7]
    assert batch.records.negative_scores.tolist() == [1, -2, 0.5]
    names = dict(zip(batch.ids.tolist(), texts_of(batch), strict=True))
    assert [names[id_] for id_ in batch.records.negative_ids.tolist()] == ["d:b", "d:c", "d:d"]


def test_positives_with_scores_alone_are_candidates_of_one_another(steps):
    records = [{"query": "one", "pos": ["a", "b", "c"], "scores": [0.5, 0.25, 0.125]}]
    data = steps(records, batch_size=1, rules=TEACHER)
    (batch,) = data[0, 0]
    scores = [batch.records.positive_scores.tolist(), batch.records.negative_scores.tolist()]
    assert sorted(sum(scores, [])) == [0.125, 0.25, 0.5] and len(scores[1]) == 2
    data.options = replace(data.options, group_size=2)
    assert all(len(data.example(pass_number, 0).negatives) == 1 for pass_number in range(3))


def test_texts_alone_have_their_rows_of_the_teacher_s_file(steps, tmp_path):
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    vectors.tofile(tmp_path / "vectors")
    records = [{"query": text} for text in ("a", "b", "a", "c")]
    data = steps(records, kind="teacher_vectors", vectors=tmp_path / "vectors", rules={"texts_alone": True})
    (batch,) = data[0, 0]
    assert sorted(texts_of(batch)) == ["q:a", "q:b", "q:c"] and batch.queries == 3
    order = [int(row[0]) // 3 for row in batch.records.teacher_vectors]
    names = dict(zip(batch.ids.tolist(), texts_of(batch), strict=True))
    assert [names[id_] for id_ in batch.records.query_ids.tolist()] == [f"q:{'abac'[row]}" for row in order]
    assert sorted(order) == [0, 1, 2, 3] and type(batch.records.teacher_vectors) is np.ndarray
    assert np.array_equal(batch.records.positive_ids, batch.records.query_ids)


def test_a_record_s_prompt_stands_in_place_of_the_model_s(steps):
    records = [{"query": "a", "pos": ["d"], "prompt": "x"}, {"query": "a", "pos": ["d"]},
               {"query": "b", "pos": ["d"], "prompt_for_query": "y"}]  # fmt: skip
    (batch,) = steps(records, batch_size=3)[0, 0]
    assert sorted(texts_of(batch)) == ["d:d", "q:a", "q:p:a", "q:p:b"]
    assert len(set(batch.ids.tolist())) == 4


def test_a_sample_of_the_records_is_the_same_for_a_seed(steps):
    store = steps([{"query": f"q{place}", "pos": ["d"]} for place in range(20)]).store
    sample = records_of(store, "positives", 5, seed=1)
    assert len(set(sample.tolist())) == 5 and sample.tolist() == sorted(sample.tolist())
    assert np.array_equal(sample, records_of(store, "positives", 5, seed=1))
    assert not np.array_equal(sample, records_of(store, "positives", 5, seed=2))
    assert len(records_of(store, "positives", 99, seed=1)) == 20
