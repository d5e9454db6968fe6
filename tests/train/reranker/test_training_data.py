import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_runs import grouped_records, pointwise_records, write_jsonl

from rag_retrieval.data.records import RecordRules
from rag_retrieval.data.store import open_store
from rag_retrieval.losses import LOSSES
from rag_retrieval.models.cross_encoder import CrossEncoder
from rag_retrieval.train.failures import steps_of
from rag_retrieval.train.reranker.objective import Objective
from rag_retrieval.train.reranker.training_data import SamplingOptions, TrainingSteps, layout, records_of, rescale
from rag_retrieval.train.steps import StepShape, records_per_epoch, step_loader


@pytest.fixture
def steps(tmp_path, bert):
    """Builds the steps of a run over records: 4 records per micro-batch."""
    encoder = CrossEncoder.from_pretrained(bert, max_length=48).pair_encoder

    def make(
        loss: str,
        records: list[dict],
        processes=1,
        index=0,
        group_size=8,
        levels=(0.0, 1.0),
        shuffle_rate=0.0,
        weight=1.0,
    ) -> TrainingSteps:
        chosen = LOSSES[loss]
        source = write_jsonl(tmp_path / "data.jsonl", records)
        grouped = chosen.dataset_type == "grouped"
        store = open_store(source, RecordRules(exactly_one_positive=chosen.one_positive), group_by_query=True)
        count = records_per_epoch(records_of(store, Objective.of(chosen)), weight)
        shape = StepShape(count, batch_size=4, accumulation=2, processes=processes, process_index=index)
        options = SamplingOptions(5, group_size if grouped else None, *levels, shuffle_rate)
        return TrainingSteps(store, "data.jsonl", encoder, Objective.of(chosen), shape, options, "data")

    return make


def pairs_of(texts: TrainingSteps, micro_batch) -> list[str]:
    ids = np.split(micro_batch.pairs.ids, np.cumsum(micro_batch.pairs.lengths)[:-1])
    return [texts.encoder.tokenizer.decode(row) for row in ids]


def test_levels_are_rescaled_uniformly_and_continuous_labels_pass_through():
    assert rescale(np.array([0, 1, 2], np.float32), 0, 2).tolist() == [0.0, 0.5, 1.0]
    assert rescale(np.array([1, 3, 5], np.float32), 1, 5).tolist() == [0.0, 0.5, 1.0]
    soft = np.array([0.99988, 0.1, 0.0, 1.0], np.float32)
    assert rescale(soft, 0.0, 1.0).tolist() == soft.tolist()
    assert rescale(soft, 0.0, 1.0).dtype == np.float32


def test_ragged_rows_become_a_matrix_and_its_mask():
    values, mask = layout([np.array([1, 2], np.float32), np.array([3], np.float32)])
    assert values.tolist() == [[1, 2], [3, 0]] and values.dtype == torch.float32
    assert mask.tolist() == [[True, True], [True, False]]


def test_pointwise_labels_are_exact_float32_from_file_to_batch(steps):
    records = [{"query": "q", "content": "d", "label": 0.99988}, {"query": "q", "content": "e", "label": 0}]
    batch = steps("point_ce", records)[0, 0][0]
    assert batch.labels.dtype == torch.float32
    assert sorted(batch.labels.tolist()) == [0.0, float(np.float32(0.99988))]
    assert batch.mask.all() and batch.items == (2,) and batch.size == 2


def test_pointwise_levels_become_fractions(steps):
    batch = steps("point_mse", pointwise_records(6, labels=(0, 1, 2)), levels=(0.0, 2.0))[0, 0][0]
    assert set(batch.labels.tolist()) <= {0.0, 0.5, 1.0}


def test_grouped_labels_stay_as_they_are_and_padding_is_masked(steps):
    records = grouped_records(4, sizes=(2, 3, 4, 5), levels=(0, 1, 3))
    batch = steps("pairwise_ranknet", records)[0, 0][0]
    assert batch.labels.shape == batch.mask.shape == (4, 5)
    assert sorted(batch.mask.sum(1).tolist()) == [2, 3, 4, 5] and batch.size == 14
    assert batch.labels.max() == 3 and (batch.labels[~batch.mask] == 0).all()


def test_scores_go_where_the_mask_says(steps):
    batch = steps("pairwise_ranknet", grouped_records(2, sizes=(2, 3)))[0, 0][0]
    placed = batch.place_scores(torch.arange(1.0, 6.0))
    first = int(batch.mask[0].sum())
    assert placed[batch.mask].tolist() == [1, 2, 3, 4, 5]
    assert placed[0, :first].tolist() == list(range(1, first + 1))
    assert (placed[~batch.mask] == 0).all()


def test_labels_stand_beside_their_documents(steps):
    words = ["rest", "water", "light", "sugar", "oxygen"]  # the word says the label
    records = [
        {"query": query, "hits": [{"content": f"{query} {words[label]}", "label": label} for label in labels]}
        for query, labels in (("capital", (0, 2, 1)), ("boils", (4, 3)))
    ]
    data = steps("pairwise_ranknet", records)
    batch = data[0, 0][0]
    for text, label in zip(pairs_of(data, batch), batch.labels[batch.mask].tolist(), strict=True):
        assert words[int(label)] in text
        assert text.count("capital") + text.count("boils") == 2


def test_pairs_of_a_query_stay_together_where_its_computation_is_shared(steps):
    long, short = "boils " * 12, "rest"
    records = [
        {"query": query, "content": content, "label": 0}
        for query in ("what is the capital of France", "how do I open a file in Python")
        for content in (long, short)
    ]
    data = steps("point_ce", records)
    examples = [data.example(record, 0) for record in range(4)]
    lengths = {}
    for shares in (False, True):
        data.options = replace(data.options, max_tokens=64, padded=False, shares_queries=shares)
        lengths[shares] = [batch.pairs.shared.tolist() for batch in data.micro_batches(examples)]
    # by length alone the two long ones come first, apart; with its query counted once, a long and a short one fit
    assert lengths[False] == [[0], [0], [0, 0]]
    assert [[tokens > 0 for tokens in shared] for shared in lengths[True]] == [[False, True], [False, True]]


def test_shared_tokens_count_once_in_the_budget(steps):
    data = steps("listwise_ce", grouped_records(1, sizes=(4,)))
    pairs = data.encoder.encode([("one two three", "a"), ("one two three", "b c"), ("four", "d")])
    start = pairs[0].document_start
    data.options = replace(data.options, shares_queries=True)
    assert data._lengths(pairs) == [len(pairs[0]), len(pairs[1]) - start, len(pairs[2])]
    data.options = replace(data.options, shares_queries=False)
    assert data._lengths(pairs) == [len(pair) for pair in pairs]


def test_sources_name_file_and_line(steps):
    data = steps("point_ce", pointwise_records(6))
    batches = data[0, 0]
    named = [source for batch in batches for source in batch.sources]
    assert sorted(named) == [f"data.jsonl:{line}" for line in range(1, 7)]
    for batch in batches:
        for source, text in zip(batch.sources, pairs_of(data, batch), strict=True):
            record = pointwise_records(6)[int(source.split(":")[1]) - 1]
            assert record["query"].split()[0].lower() in text


def test_listwise_groups_have_exactly_one_positive_also_from_several(steps):
    records = [{"query": f"q{n}", "pos": ["a", "b", "c"], "neg": ["d", "e", "f", "g"]} for n in range(8)]
    batch = steps("listwise_ce", records, group_size=4)[0, 0][0]
    assert batch.labels.sum(1).tolist() == [1, 1, 1, 1] and batch.mask.sum(1).tolist() == [4, 4, 4, 4]
    assert batch.items == (4,)


def test_teacher_scores_do_not_change_the_one_hot_label_of_listwise_ce(steps):
    records = [{"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [7.5], "neg_scores": [-2.0]}]
    assert steps("listwise_ce", records)[0, 0][0].labels.tolist() == [[1.0, 0.0]]
    assert steps("pairwise_ranknet", records)[0, 0][0].labels.tolist() == [[7.5, -2.0]]


def test_an_idle_process_gets_a_filler_without_loss_or_gradient(steps):
    for loss in LOSSES.values():
        records = grouped_records(1) if loss.dataset_type == "grouped" else pointwise_records(1)
        filler = steps(loss.name, records, processes=2, index=1)[0, 0][0]
        assert (filler.items, filler.size, filler.sources, len(filler.pairs)) == ((0,), 0, [], 1)
        assert not filler.mask.any()
        scores = torch.tensor([3.0], requires_grad=True)
        value = loss(filler.place_scores(scores), filler.labels, filler.mask)[0]
        value.backward()
        assert value.item() == 0 and scores.grad.tolist() == [0.0]


def test_documents_are_reordered_differently_in_each_epoch(steps):
    long = {"query": "q", "content": " ".join(["river"] * 10 + ["paris"] * 10 + ["seine"] * 10), "label": 1}
    data = steps("point_ce", [long] * 8, shuffle_rate=0.5)
    shown = [pairs_of(data, batch) for epoch in range(2) for batch in data[epoch, 0]]
    assert any("] river" not in text for texts in shown for text in texts)
    assert any("] river" in text for texts in shown for text in texts)
    assert shown[:2] != shown[2:]


def test_each_document_of_each_group_is_drawn_by_itself(steps):
    long = " ".join(["river"] * 10 + ["paris"] * 10 + ["seine"] * 10)
    records = [{"query": "q", "pos": [long], "neg": [long]} for _ in range(8)]
    data = steps("listwise_ce", records, shuffle_rate=0.5)
    shown = [pairs_of(data, batch) for batch in data[0, 0]]
    groups = [tuple(texts[first : first + 2]) for texts in shown for first in range(0, 8, 2)]
    assert len(set(groups)) > 3 and any(first != second for first, second in groups)


@pytest.mark.parametrize("loss", ["point_mse", "listwise_ce"])
def test_workers_change_nothing(steps, loss):
    records = pointwise_records(40) if loss == "point_mse" else grouped_records(40)
    data = steps(loss, records, group_size=3, shuffle_rate=0.5)

    def contents(num_workers: int) -> list:
        loader = step_loader(data, epochs=2, done=0, num_workers=num_workers)
        return [
            [(b.pairs.ids.tolist(), b.labels.tolist(), b.mask.tolist(), b.items, b.sources) for b in step]
            for step in steps_of(loader)
        ]

    assert len(contents(0)) == 10
    assert contents(0) == contents(1) == contents(2)


def test_pickled_steps_carry_neither_data_nor_model(steps):
    small, large = steps("point_ce", pointwise_records(4)), steps("point_ce", pointwise_records(2000))
    tokenizer = len(pickle.dumps(small.encoder))
    small[0, 0], large[0, 0]
    assert len(pickle.dumps(small)) < tokenizer + 3000
    assert len(pickle.dumps(large)) < tokenizer + 3000 + 4 * 2000  # one epoch's order, four bytes a record


@pytest.mark.parametrize("loss", ["point_ce", "pairwise_ranknet"])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("records", [2, 49])
def test_an_epoch_sees_every_record_once_on_one_process_alone(steps, loss, processes, records):
    """And every pair of it; what fills up has no weight."""
    data = pointwise_records(records) if loss == "point_ce" else grouped_records(records)
    seen, pairs = [], 0
    for index in range(processes):
        share = steps(loss, data, processes=processes, index=index)
        batches = [batch for step in range(share.steps_per_epoch) for batch in share[1, step]]
        seen += [source for batch in batches for source in batch.sources]
        pairs += sum(int(batch.mask.sum()) for batch in batches)
        assert all(batch.items == (0,) for batch in batches if not batch.mask.any())
    assert sorted(seen) == sorted(f"data.jsonl:{line}" for line in range(1, records + 1))
    assert pairs == sum(len(record.get("hits", [record])) for record in data)


def lines_of(data: TrainingSteps, epoch: int) -> list[int]:
    """The lines of the records that an epoch shows, in its order."""
    batches = [batch for step in range(data.steps_per_epoch) for batch in data[epoch, step]]
    return [int(source.split(":")[1]) for batch in batches for source in batch.sources]


@pytest.mark.parametrize("loss", ["point_ce", "pairwise_ranknet"])
def test_a_weight_below_one_continues_in_the_next_epoch(steps, loss):
    """19 records, weight 0.3: 6 an epoch, so that the 4th epoch begins the second pass after 1 of its 6."""
    records = pointwise_records(19) if loss == "point_ce" else grouped_records(19)
    whole, part = steps(loss, records), steps(loss, records, weight=0.3)
    passes = lines_of(whole, 0) + lines_of(whole, 1)
    assert [lines_of(part, epoch) for epoch in range(6)] == [passes[6 * e : 6 * e + 6] for e in range(6)]
    assert sorted(passes[:19]) == sorted(passes[19:]) == list(range(1, 20)) and passes[:19] != passes[19:]


def test_a_weight_above_one_shows_pass_after_pass_in_one_epoch(steps):
    records = grouped_records(9)
    whole, part = steps("pairwise_ranknet", records), steps("pairwise_ranknet", records, weight=2.5)
    passes = [line for epoch in range(5) for line in lines_of(whole, epoch)]
    assert part.steps_per_epoch == 3, "22 records in steps of 8: 2.5 x 9 is rounded to the even 22"
    assert lines_of(part, 0) + lines_of(part, 1) == passes[:44]


def test_another_pass_in_an_epoch_shows_other_documents_of_large_groups(steps):
    queries = ("capital", "boils", "river", "paris", "seine", "sugar", "oxygen", "france")
    records = [{"query": query, "pos": ["yes"], "neg": ["rest", "water", "light"]} for query in queries]
    whole = steps("listwise_ce", records, group_size=2)
    expected = [pairs_of(whole, batch) for epoch in range(3) for batch in whole[epoch, 0]]
    part = steps("listwise_ce", records, group_size=2, weight=3)
    assert [pairs_of(part, batch) for step in range(3) for batch in part[0, step]] == expected
    assert len({text for texts in expected for text in texts}) == 8 * 4, "in three passes every document"


def test_every_micro_batch_and_filler_names_its_file(steps):
    data = steps("listwise_ce", grouped_records(9), processes=2, index=1)
    batches = [batch for step in range(data.steps_per_epoch) for batch in data[0, step]]
    assert {batch.part for batch in batches} == {"data"} == {data.filler().part}
