"""What is drawn for a passage: masks, spans, seeds; and how a step is laid out."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_models import CHINESE, bert_tokenizer
from training_runs import plain_texts, write_jsonl

from rag_retrieval.data.passages import open_passages
from rag_retrieval.models.text_encoding import TextEncoder, text_template
from rag_retrieval.train.pretrain.training_data import (
    MaskingOptions,
    PretrainSteps,
    random_places,
    random_span,
    replaced,
)
from rag_retrieval.train.steps import StepShape

TOKENIZER = bert_tokenizer()
CLS, SEP, MASK = (TOKENIZER.convert_tokens_to_ids(token) for token in ("[CLS]", "[SEP]", "[MASK]"))
OPTIONS = MaskingOptions(7, "retromae", 0.3, MASK, len(TOKENIZER))


@pytest.fixture(scope="module")
def make_steps(tmp_path_factory):
    """Steps over 20 English and 6 Chinese passages in two files."""
    folder = tmp_path_factory.mktemp("passages")
    chinese = [{"text": sentence} for sentence in CHINESE]
    files = [write_jsonl(folder / f"{place}.jsonl", rows) for place, rows in enumerate((plain_texts(20), chinese))]
    sources = [open_passages(file, 200) for file in files]

    def make(max_length: int = 64, shape: StepShape | None = None, **options) -> PretrainSteps:
        encoder = TextEncoder(TOKENIZER, text_template(TOKENIZER), {}, {"document": max_length})
        return PretrainSteps(sources, encoder, shape or StepShape(26, 26, 1), replace(OPTIONS, **options))

    return make


def test_a_share_of_the_tokens_is_masked_and_special_tokens_never_are(make_steps):
    steps = make_steps()
    for place in range(26):
        (text,) = steps.example(0, place).texts
        own = len(text.ids) - 2
        assert len(text.places) == max(1, round(0.3 * own)) and 1 <= text.places.min() <= text.places.max() <= own
        assert (text.ids[0], text.ids[-1]) == (text.encoded.ids[0], text.encoded.ids[-1]) == (CLS, SEP)
        untouched = np.delete(np.arange(own + 2), text.places)
        assert (text.encoded.ids[untouched] == text.ids[untouched]).all()


def test_every_passage_stands_once_in_a_pass_chinese_ones_too(make_steps):
    steps = make_steps()
    shown = [TOKENIZER.decode(steps.example(1, place).texts[0].ids[1:-1]) for place in range(26)]
    expected = [steps.sources[0].text(place) for place in range(20)] + list(CHINESE)
    assert sorted(shown) == sorted(TOKENIZER.decode(TOKENIZER(each)["input_ids"][1:-1]) for each in expected)
    places = [steps.example(1, place).place for place in range(26)]
    assert sorted(places) == list(range(26)) != places


def test_masked_tokens_become_mostly_the_mask_token():
    ids = np.full(100_000, 50, np.int32)
    result = replaced(ids, OPTIONS, np.random.default_rng(0))
    assert result.dtype == np.int32
    assert (result == MASK).mean() == pytest.approx(0.8 + 0.1 / len(TOKENIZER), abs=0.005)
    assert (result == 50).mean() == pytest.approx(0.1 + 0.1 / len(TOKENIZER), abs=0.005)
    assert len(np.unique(result)) == len(TOKENIZER)


@pytest.mark.parametrize("count, share, masked", [(10, 0.3, 3), (1, 0.3, 1), (0, 0.3, 0), (4, 1.0, 4), (5, 0.5, 2)])
def test_the_number_of_masked_tokens_is_the_rounded_share_and_at_least_one(count, share, masked):
    places = random_places(count, share, np.random.default_rng(0))
    assert len(places) == len(set(places.tolist())) == masked and set(places.tolist()) <= set(range(count))


def test_a_span_is_a_run_of_a_tenth_to_a_half_of_the_tokens():
    random, ids = np.random.default_rng(0), np.arange(100)
    spans = [random_span(ids, random) for _ in range(2_000)]
    assert all((np.diff(span) == 1).all() for span in spans)
    assert min(map(len, spans)) == 10 and max(map(len, spans)) == 50
    assert min(span[0] for span in spans) == 0 and max(span[-1] for span in spans) == 99
    assert len(random_span(np.arange(1), random)) == 1 and len(random_span(np.arange(0), random)) == 0


def test_draws_depend_on_seed_pass_and_passage_and_on_nothing_else(make_steps):
    def drawn(steps: PretrainSteps, pass_number: int) -> dict:
        examples = [steps.example(pass_number, place) for place in range(26)]
        return {each.place: (each.texts[0].encoded.ids.tolist(), each.seed) for each in examples}

    first = drawn(make_steps(), 0)
    steps = make_steps(shape=StepShape(26, 2, 3, 2, 1))
    steps.example(3, 5)  # whatever was drawn before
    assert drawn(steps, 0) == first
    for other in (drawn(make_steps(), 1), drawn(make_steps(seed=8), 0)):
        assert not [place for place in first if other[place][1] == first[place][1]]
        assert sum(other[place][0] == first[place][0] for place in first) < 13


def test_a_micro_batch_counts_what_the_losses_are_means_of(make_steps):
    (batch,) = make_steps(bag_of_words=True)[0, 0]
    own = batch.texts.lengths - 2
    assert batch.items == (len(batch.masked), own.sum(), 26) and batch.size == batch.texts.lengths.sum()
    assert set(batch.ids[batch.masked]).isdisjoint({CLS, SEP})
    changed = np.flatnonzero(batch.ids != batch.texts.ids)
    assert set(changed) <= set(batch.masked) and len(changed) > 0.8 * len(batch.masked)
    assert sorted(batch.sources)[:2] == ["0.jsonl#1", "0.jsonl#10"] and len(batch.seeds) == 26
    (pairs,) = make_steps(loss_type="span_pairs")[0, 0]
    assert pairs.items == (len(pairs.masked), 26) and len(pairs.texts) == 52
    assert (pairs.documents[::2] == pairs.documents[1::2]).all() and (pairs.documents[::2] == batch.documents).all()


def test_long_passages_lose_their_ends_and_spans_come_from_all_of_them(make_steps):
    texts = [text for place in range(26) for text in make_steps(max_length=8).example(0, place).texts]
    assert max(len(text.ids) for text in texts) == 8 and all(text.ids[-1] == SEP for text in texts)
    steps, seen = make_steps(max_length=8, loss_type="span_pairs"), set()
    for pass_number in range(40):
        examples = (steps.example(pass_number, place) for place in range(26))
        (own,) = (each for each in examples if each.place == 11)  # of 14 words
        seen |= {token for text in own.texts for token in text.ids.tolist()}
    whole = steps.encoder.encode([steps.sources[0].text(11)], max_length=99)[0].ids
    assert len(whole) > 16 and seen == set(whole.tolist())


def test_a_step_is_the_same_passages_however_they_are_dealt_and_cut(make_steps):
    (whole,) = make_steps()[0, 0]
    shares = [
        batch
        for process in range(2)
        for batch in make_steps(shape=StepShape(26, 5, 3, 2, process), max_tokens=40, padded=False)[0, 0]
    ]
    assert all(batch.size <= 40 for batch in shares) and len(shares) > 6
    assert sorted(seed for batch in shares for seed in batch.seeds) == sorted(whole.seeds)
    totals = np.sum([batch.items for batch in shares], axis=0)
    assert tuple(totals) == whole.items


def test_the_spans_of_a_passage_stay_in_one_micro_batch(make_steps):
    batches = make_steps(loss_type="span_pairs", max_tokens=24, padded=False)[0, 0]
    assert len(batches) > 5 and all(len(batch.texts) % 2 == 0 for batch in batches)
    assert all((batch.documents[::2] == batch.documents[1::2]).all() for batch in batches)


def test_a_filler_counts_nothing(make_steps):
    (filler,) = make_steps().micro_batches([])
    assert (filler.items, filler.size, filler.counted, filler.sources) == ((0, 0), 0, False, [])
    assert len(filler.texts) == 1
