import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from training_runs import grouped_records, pointwise_records, write_jsonl

from rag_retrieval.data.store import open_store
from rag_retrieval.losses import LOSSES
from rag_retrieval.metrics import group_metrics
from rag_retrieval.models.cross_encoder import CrossEncoder
from rag_retrieval.train.reranker import validation as validation_module
from rag_retrieval.train.reranker.objective import Objective
from rag_retrieval.train.reranker.validation import Validation


@pytest.fixture
def scorer(bert) -> CrossEncoder:
    torch.manual_seed(0)
    return CrossEncoder.from_pretrained(bert, max_length=48)


@pytest.fixture
def validation(scorer, tmp_path):
    def make(loss_type: str, records: list[dict], levels=(0.0, 1.0), batch_size=5) -> Validation:
        store = open_store(write_jsonl(tmp_path / "val.jsonl", records), group_by_query=True)
        accelerator = Accelerator(cpu=True)
        return Validation(store, scorer.pair_encoder, Objective.of(LOSSES[loss_type]), levels, batch_size, accelerator)

    return make


def evaluate(validation: Validation, scorer: CrossEncoder) -> dict[str, float]:
    scorer.eval()
    with torch.no_grad():
        return validation(scorer)


def by_query(records: list[dict]) -> list[tuple[str, list[str], list[float]]]:
    """(query, documents, labels) of each query, in the order of first appearance."""
    groups = {}
    for record in records:
        for hit in record.get("hits", [record]):
            documents, labels = groups.setdefault(record["query"], ([], []))
            documents.append(hit["content"])
            labels.append(hit["label"])
    return [(query, *found) for query, found in groups.items()]


@pytest.mark.parametrize("loss_type", ["point_ce", "listwise_ce"])
def test_metrics_equal_those_of_compute_score(validation, scorer, loss_type):
    records = grouped_records(9, levels=(0, 1, 2) if loss_type == "point_ce" else (0, 1))
    values = evaluate(validation(loss_type, records, levels=(0.0, 2.0)), scorer)
    groups = by_query(records)
    scores = [scorer.compute_score([(query, text) for text in texts]).numpy() for query, texts, _ in groups]
    expected = group_metrics(scores, [np.array(labels) for *_, labels in groups])
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_pointwise_pairs_are_grouped_by_query_wherever_they_stand(validation, scorer):
    records = pointwise_records(16)
    shuffled = [records[place] for place in np.random.default_rng(0).permutation(16)]
    values, other = (evaluate(validation("point_ce", part), scorer) for part in (records, shuffled))
    assert values == pytest.approx(other) and values["queries"] == 4


def test_pointwise_loss_is_the_plain_mean_over_all_pairs(validation, scorer):
    records = pointwise_records(13, labels=(0, 1, 2))
    values = evaluate(validation("point_mse", records, levels=(0.0, 2.0)), scorer)
    scores = scorer.compute_score([(record["query"], record["content"]) for record in records]).tolist()
    errors = [
        (1 / (1 + math.exp(-score)) - record["label"] / 2) ** 2 for score, record in zip(scores, records, strict=True)
    ]
    assert values["loss"] == pytest.approx(sum(errors) / 13, abs=1e-6)


def test_ranknet_loss_divides_by_the_pairs_of_the_whole_set(validation, scorer):
    records = grouped_records(7, levels=(0, 1, 2))
    values = evaluate(validation("pairwise_ranknet", records), scorer)
    terms = []
    for query, texts, labels in by_query(records):
        scores = scorer.compute_score([(query, text) for text in texts]).tolist()
        terms += [
            (higher - label) * math.log1p(math.exp(scores[low] - scores[high]))
            for low, label in enumerate(labels)
            for high, higher in enumerate(labels)
            if label < higher
        ]
    assert values["loss"] == pytest.approx(sum(terms) / len(terms), abs=1e-6)


def test_listwise_loss_takes_several_positives_one_at_a_time(validation, scorer):
    records = [
        {"query": "water", "pos": ["light and water", "sugar"], "neg": ["trains", "stations", "words"]},
        {"query": "paris", "pos": ["the river"], "neg": ["fever"]},
    ]
    values = evaluate(validation("listwise_ce", records), scorer)
    terms = []
    for record in records:
        scores = [
            scorer.compute_score([(record["query"], text) for text in record[side]]).tolist() for side in ("pos", "neg")
        ]
        rest = sum(math.exp(score) for score in scores[1])
        terms += [-math.log(math.exp(score) / (math.exp(score) + rest)) for score in scores[0]]
    assert values["loss"] == pytest.approx(sum(terms) / 3, abs=1e-6)


def test_groups_are_used_whole_and_every_pair_is_scored_once(validation, scorer):
    records = grouped_records(6, sizes=(20, 3))
    made = validation("listwise_ce", records)
    planned = [position for positions, _ in made.batches for position in positions]
    assert sorted(planned) == list(range(69))
    with torch.no_grad():
        assert np.isfinite(made.score(scorer.eval())).all()


def test_batch_size_changes_nothing(validation, scorer):
    records = grouped_records(6)
    one, many = (evaluate(validation("listwise_ce", records, batch_size=size), scorer) for size in (1, 64))
    assert one == pytest.approx(many, abs=1e-6)


def test_more_processes_deal_out_the_same_batches_and_fill_up(validation, monkeypatch):
    """Two processes and three batches: the second process gets one batch and a filler."""
    records = grouped_records(5, sizes=(2,))
    whole = [positions for positions, _ in validation("listwise_ce", records, batch_size=4).batches]
    assert [len(positions) for positions in whole] == [4, 4, 2]
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    dealt = []
    for index in (0, 1):
        monkeypatch.setattr(Accelerator, "process_index", index)
        batches = validation("listwise_ce", records, batch_size=4).batches
        dealt.append([positions for positions, _ in batches])
        assert len(batches) == 2 and all(len(batch) for _, batch in batches)
    assert dealt == [[whole[0], whole[2]], [whole[1], []]]


def test_what_cannot_be_measured_is_left_out(validation):
    alone = [{"query": f"q{place}", "content": "d", "label": place % 2} for place in range(4)]
    assert set(validation("point_ce", alone).metrics) == {"loss"}
    irrelevant = [{"query": "q", "hits": [{"content": "a", "label": 0}, {"content": "b", "label": 0}]}]
    measured = set(validation("pairwise_ranknet", irrelevant).metrics)
    assert measured == {"queries", "queries_without_relevant"}, "no ordered pair: no loss either"
    assert "ndcg@10" in validation("pairwise_ranknet", grouped_records(2)).metrics


# --- memory ---


def bounded(scorer, tmp_path, records, **options) -> Validation:
    store = open_store(write_jsonl(tmp_path / "bounded.jsonl", records), group_by_query=True)
    objective = Objective.of(LOSSES["listwise_ce"])
    return Validation(store, scorer.pair_encoder, objective, (0.0, 1.0), 500, Accelerator(cpu=True), **options)


def test_no_forward_has_more_tokens_than_the_bound(scorer, tmp_path):
    records = grouped_records(12)
    for padded in (True, False):
        made = bounded(scorer, tmp_path, records, max_tokens=100, padded=padded)
        costs = [len(batch) * batch.lengths.max() if padded else batch.lengths.sum() for _, batch in made.batches]
        assert len(costs) > 5 and max(costs) <= 100
    whole = evaluate(bounded(scorer, tmp_path, records), scorer)
    assert evaluate(made, scorer) == pytest.approx(whole, abs=1e-5)


def test_each_pair_is_tokenized_once(scorer, tmp_path, monkeypatch):
    monkeypatch.setattr(validation_module, "ENCODING_CHUNK", 7)
    texts, encode = [], type(scorer.pair_encoder).encode

    def noted(self, pairs):
        texts.extend(pairs)
        return encode(self, pairs)

    monkeypatch.setattr(type(scorer.pair_encoder), "encode", noted)
    records = grouped_records(12)
    evaluate(bounded(scorer, tmp_path, records), scorer)
    assert len(texts) == sum(len(record["hits"]) for record in records)


def test_a_forward_that_does_not_fit_in_memory_is_halved(scorer, tmp_path, caplog):
    made = bounded(scorer, tmp_path, grouped_records(12))
    expected, sizes = evaluate(made, scorer), []

    def with_little_memory(batch):
        if len(batch) > 3:
            raise RuntimeError("can't allocate memory: you tried to allocate 9 bytes")
        sizes.append(len(batch))
        return scorer(batch)

    with torch.no_grad():
        scorer.eval()
        assert made(with_little_memory) == pytest.approx(expected, abs=1e-5)
    assert max(sizes) <= 3 and "do not fit in memory" in caplog.text
