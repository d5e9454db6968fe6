"""Forwards planned by tokens, tokenization ahead, and what happens when memory runs out."""

import random
import threading
import time

import pytest
import torch
from pair_samples import some_pairs
from tiny_models import ENGLISH

from rag_retrieval.models import scoring
from rag_retrieval.models.pair_encoding import PairEncoder
from rag_retrieval.models.scoring import one_ahead

FAMILIES = ["bert", "xlm_roberta", "qwen2", "llama"]


def padded(load_tiny, family: str):
    """A scorer whose forwards are padded, as those of a family without a packed forward are."""
    return load_tiny(family, attn_implementation="sdpa")


def forwards_of(scorer) -> list[list[int]]:
    """A list that fills with the lengths of the pairs of every forward."""
    forwards = []
    scorer.register_forward_pre_hook(lambda module, arguments: forwards.append(list(arguments[0].lengths)))
    return forwards


def out_of_memory_beyond(scorer, tokens: int) -> None:
    """Make forwards of more tokens than that fail as CUDA does."""

    def fail(module, arguments):
        if sum(arguments[0].lengths) > tokens:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    scorer.register_forward_pre_hook(fail)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_pairs_than_one_chunk_score_alike(load_tiny, family, monkeypatch):
    scorer, pairs = load_tiny(family), some_pairs(23)
    expected = scorer.compute_score(pairs)
    monkeypatch.setattr(scoring, "SCORING_CHUNK", 5)
    torch.testing.assert_close(scorer.compute_score(pairs, batch_size=2), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [1, 90, 400])
def test_no_token_budget_changes_a_score_or_its_place(load_tiny, family, tokens, monkeypatch):
    scorer, pairs = load_tiny(family), some_pairs(24)
    single = torch.cat([scorer.compute_score(pair) for pair in pairs])
    monkeypatch.setattr(scoring, "CPU_TOKENS", tokens)
    torch.testing.assert_close(scorer.compute_score(pairs), single, atol=1e-5, rtol=0)


@pytest.mark.parametrize("load", [padded, lambda load_tiny, family: load_tiny(family)], ids=["padded", "as loaded"])
@pytest.mark.parametrize("batch_size", [3, 100])
def test_a_forward_holds_no_more_tokens_than_the_budget_and_no_more_pairs_than_the_batch_size(
    load_tiny, load, batch_size, monkeypatch
):
    scorer, pairs = load(load_tiny, "bert"), some_pairs(40)
    lengths = [len(pair) for pair in scorer.pair_encoder.encode(pairs)]
    monkeypatch.setattr(scoring, "CPU_TOKENS", 500)
    forwards = forwards_of(scorer)
    scorer.compute_score(pairs, batch_size=batch_size)
    assert sorted(length for forward in forwards for length in forward) == sorted(lengths)
    for forward in forwards:
        cost = sum(forward) if scorer.packs else len(forward) * max(forward)
        assert len(forward) == 1 or (len(forward) <= batch_size and cost <= 500)
    assert max(map(len, forwards)) >= 3 and len(forwards) < 20, "the bounds allow more pairs than that"
    assert max(forwards[0]) == max(lengths), "the longest come first"


def test_pairs_of_one_query_stand_side_by_side_where_the_query_is_computed_once(load_tiny):
    scorer = load_tiny("qwen2")
    assert scorer.shares_queries
    order = random.Random(1)
    pairs = [(query, document) for query in ENGLISH[:3] for document in ENGLISH]
    order.shuffle(pairs)
    shared = []
    scorer.register_forward_pre_hook(lambda module, arguments: shared.append(list(arguments[0].shared)))
    scores = scorer.compute_score(pairs)
    assert sum(beginning == 0 for forward in shared for beginning in forward) <= 3 * len(shared)
    torch.testing.assert_close(scores, torch.cat([scorer.compute_score(pair) for pair in pairs]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("load", [padded, lambda load_tiny, family: load_tiny(family)], ids=["padded", "as loaded"])
def test_what_does_not_fit_in_memory_is_cut_smaller_and_the_lower_bound_is_kept(load_tiny, load):
    scorer, pairs = load(load_tiny, "bert"), some_pairs(40)
    expected = scorer.compute_score(pairs)
    tried = forwards_of(scorer)
    out_of_memory_beyond(scorer, 500)
    torch.testing.assert_close(scorer.compute_score(pairs), expected, atol=1e-5, rtol=0)
    fitting = scorer.fitting_tokens
    failed = [forward for forward in tried if sum(forward) > 500]
    assert 0 < len(failed) < 4 and 125 <= fitting <= 1024
    done = sorted(length for forward in tried if sum(forward) <= 500 for length in forward)
    assert done == sorted(len(pair) for pair in scorer.pair_encoder.encode(pairs)), "every pair is scored once"
    tried.clear()
    scorer.compute_score(pairs)
    assert all(sum(forward) <= 500 for forward in tried), "what was learnt is forgotten"


def test_few_pairs_that_do_not_fit_are_cut_too_though_the_budget_is_far_larger(load_tiny, monkeypatch):
    monkeypatch.setattr(scoring, "CPU_TOKENS", 65_536)
    scorer = load_tiny("bert")
    pairs = [("water", ENGLISH[0])] * 4
    length = len(scorer.pair_encoder.encode(pairs)[0])
    forwards = forwards_of(scorer)
    out_of_memory_beyond(scorer, 2 * length)
    scorer.compute_score(pairs)
    assert forwards == [[length] * 4, [length] * 2, [length] * 2]


def test_one_pair_that_does_not_fit_is_an_error_that_names_its_tokens(load_tiny):
    scorer = load_tiny("bert")
    pairs = [("water", "boils"), ("water", " ".join(ENGLISH))]
    length = len(scorer.pair_encoder.encode(pairs)[1])
    out_of_memory_beyond(scorer, length - 1)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=f"one pair of {length} tokens does not fit .* max_length"):
        scorer.compute_score(pairs)
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


def test_running_out_of_memory_with_shared_queries_halves_what_was_computed(load_tiny):
    """Half of the pairs' own tokens could be more than the forward computed: it would fail for ever."""
    scorer = load_tiny("qwen2")
    pairs = [(" ".join(ENGLISH[:3]), text) for text in ENGLISH]
    expected = scorer.compute_score(pairs)
    encoded = scorer.pair_encoder.encode(pairs)
    sizes = scoring.sizes_of(encoded)
    whole = scoring.computed_tokens(sizes, padded=False, shares_queries=True)
    assert whole < sum(map(len, encoded)) // 2
    computed = []

    def fail(module, arguments, keywords):
        computed.append(keywords["input_ids"].shape[1])
        if computed[-1] > whole // 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    scorer.model.model.register_forward_pre_hook(fail, with_kwargs=True)
    torch.testing.assert_close(scorer.compute_score(pairs), expected, atol=1e-5, rtol=0)
    assert computed[0] == whole and scorer.fitting_tokens == whole // 2 and len(computed) < 10


def test_another_error_goes_up_as_it_is_and_nothing_is_tried_again(load_tiny):
    scorer = load_tiny("bert")
    problem = RuntimeError("CUDA error: device-side assert; out of memory is not what this is")
    calls = []

    def fail(module, arguments):
        calls.append(1)
        raise problem

    scorer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError) as caught:
        scorer.compute_score(some_pairs(8))
    assert caught.value is problem and len(calls) == 1 and scorer.fitting_tokens is None


def test_tokenization_runs_in_another_thread_one_chunk_ahead_and_in_none_for_one_chunk(load_tiny, monkeypatch):
    scorer, pairs = load_tiny("bert"), some_pairs(20)
    events = []
    encode = PairEncoder.encode

    def noting(encoder, chunk):
        events.append(("encode", threading.current_thread() is threading.main_thread()))
        return encode(encoder, chunk)

    monkeypatch.setattr(PairEncoder, "encode", noting)
    scorer.compute_score(pairs)
    assert events == [("encode", True)]
    events.clear()
    monkeypatch.setattr(scoring, "SCORING_CHUNK", 5)
    scorer.compute_score(pairs)
    assert events == [("encode", True)] + [("encode", False)] * 3


def test_a_query_that_repeats_is_tokenized_once(load_tiny, monkeypatch):
    scorer = load_tiny("bert")
    asked = []
    query_ids = PairEncoder.query_ids
    monkeypatch.setattr(
        PairEncoder, "query_ids", lambda encoder, texts: asked.append(list(texts)) or query_ids(encoder, texts)
    )
    scorer.compute_score([("water", document) for document in ENGLISH])
    assert asked == [["water"]]


def test_an_error_of_the_tokenizing_thread_goes_up_and_leaves_no_thread_and_no_mode(load_tiny, monkeypatch):
    scorer, pairs = load_tiny("bert").train(), some_pairs(20)
    encode = PairEncoder.encode

    def broken(encoder, chunk):
        if threading.current_thread() is not threading.main_thread():
            raise KeyError("a token")
        return encode(encoder, chunk)

    monkeypatch.setattr(PairEncoder, "encode", broken)
    monkeypatch.setattr(scoring, "SCORING_CHUNK", 5)
    with pytest.raises(KeyError, match="a token"):
        scorer.compute_score(pairs)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("one-ahead")]
    assert scorer.training and torch.is_grad_enabled()


def test_an_interrupt_while_scoring_goes_up_and_leaves_no_thread(load_tiny, monkeypatch):
    scorer = load_tiny("bert")
    monkeypatch.setattr(scoring, "SCORING_CHUNK", 5)

    def interrupt(module, arguments):
        raise KeyboardInterrupt

    scorer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        scorer.compute_score(some_pairs(20))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("one-ahead")]


def test_one_ahead_keeps_the_order_and_works_on_one_item_while_another_is_used():
    started = []

    def work(item):
        started.append(item)
        return item * item

    results = one_ahead(work, iter(range(4)))
    assert next(results) == 0
    deadline = time.monotonic() + 5
    while len(started) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert started == [0, 1], "the next one and no more"
    assert list(results) == [1, 4, 9]
    assert list(one_ahead(work, [])) == []
