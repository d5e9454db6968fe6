"""Forwards planned by tokens, tokenization ahead, and what happens when memory runs out."""

import logging
import random
import threading

import pytest
import torch
from pair_samples import some_pairs
from tiny_models import ENGLISH
from torch import nn

from rag_retrieval.core import log
from rag_retrieval.models import scoring
from rag_retrieval.models.devices import check_devices
from rag_retrieval.models.pair_encoding import PairEncoder
from rag_retrieval.models.token_batch import make_batch

FAMILIES = ["bert", "xlm_roberta", "qwen2", "llama"]


def padded(load_tiny, family: str):
    """A scorer whose forwards are padded, as those of a family without a packed forward are."""
    return load_tiny(family, attn_implementation="sdpa")


def forwards_of(scorer) -> list[list[int]]:
    """A list that fills with the lengths of the pairs of every forward."""
    forwards = []
    scorer.register_forward_pre_hook(lambda module, arguments: forwards.append(arguments[0].lengths.tolist()))
    return forwards


def out_of_memory_beyond(scorer, tokens: int) -> None:
    """Make forwards of more tokens than that fail as CUDA does."""

    def fail(module, arguments):
        if arguments[0].lengths.sum() > tokens:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    scorer.register_forward_pre_hook(fail)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_pairs_than_one_chunk_score_alike(load_tiny, family, monkeypatch):
    scorer, pairs = load_tiny(family), some_pairs(23)
    expected = scorer.compute_score(pairs)
    monkeypatch.setattr(scoring, "CHUNK_TEXTS", 5)
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
    scorer.register_forward_pre_hook(lambda module, arguments: shared.append(arguments[0].shared.tolist()))
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
    pairs = [("water", letter) for letter in "abcd"]
    (length,) = {len(pair) for pair in scorer.pair_encoder.encode(pairs)}
    forwards = forwards_of(scorer)
    out_of_memory_beyond(scorer, 2 * length)
    scorer.compute_score(pairs)
    assert forwards == [[length] * 4, [length] * 2, [length] * 2]


def test_one_pair_that_does_not_fit_is_an_error_that_names_its_tokens(load_tiny):
    scorer = load_tiny("bert")
    pairs = [("water", "boils"), ("water", " ".join(ENGLISH))]
    length = len(scorer.pair_encoder.encode(pairs)[1])
    out_of_memory_beyond(scorer, length - 1)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=f"one text of {length} tokens does not fit .* max_length"):
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
    monkeypatch.setattr(scoring, "CHUNK_TEXTS", 5)
    scorer.compute_score(pairs)
    assert events == [("encode", True)] + [("encode", False)] * 3


def test_a_query_that_repeats_is_tokenized_once(load_tiny, monkeypatch):
    scorer = load_tiny("bert")
    asked = []
    text_ids = PairEncoder.text_ids
    monkeypatch.setattr(PairEncoder, "text_ids", lambda self, *asks: asked.append(asks) or text_ids(self, *asks))
    scorer.compute_score([("water", document) for document in ENGLISH])
    assert [list(texts) for texts, kind in asked if kind == "query"] == [["water"]]


def test_an_error_of_the_tokenizing_thread_goes_up_and_leaves_no_thread_and_no_mode(load_tiny, monkeypatch):
    scorer, pairs = load_tiny("bert").train(), some_pairs(20)
    encode = PairEncoder.encode

    def broken(encoder, chunk):
        if threading.current_thread() is not threading.main_thread():
            raise KeyError("a token")
        return encode(encoder, chunk)

    monkeypatch.setattr(PairEncoder, "encode", broken)
    monkeypatch.setattr(scoring, "CHUNK_TEXTS", 5)
    with pytest.raises(KeyError, match="a token"):
        scorer.compute_score(pairs)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    assert scorer.training and torch.is_grad_enabled()


def test_an_interrupt_while_scoring_goes_up_and_leaves_no_thread(load_tiny, monkeypatch):
    scorer = load_tiny("bert")
    monkeypatch.setattr(scoring, "CHUNK_TEXTS", 5)

    def interrupt(module, arguments):
        raise KeyboardInterrupt

    scorer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        scorer.compute_score(some_pairs(20))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


# ---- equal pairs -----------------------------------------------------------------------------------------


def test_equal_pairs_are_scored_once_and_tie(load_tiny, monkeypatch):
    """In another forward the same pair may round differently: only what is computed once ties on every CPU."""
    scorer, pairs = load_tiny("bert"), some_pairs(20)
    monkeypatch.setattr(scoring, "CHUNK_TEXTS", 7)  # its repetitions would come in other chunks
    forwards = forwards_of(scorer)
    expected = scorer.compute_score(pairs)
    assert sum(map(len, forwards)) == len(set(pairs))
    forwards.clear()
    repeated = [*pairs, *reversed(pairs), *map(list, pairs)]
    scores = scorer.compute_score(repeated)
    assert sum(map(len, forwards)) == len(set(pairs))
    assert torch.equal(scores, torch.cat([expected, expected.flip(0), expected]))


def test_progress_counts_repeated_pairs_too(load_tiny, monkeypatch, caplog):
    monkeypatch.setattr(log, "LOG_EVERY", 0.0)
    caplog.set_level("INFO", "rag_retrieval")
    load_tiny("bert").compute_score(some_pairs(10) * 7, show_progress_bar=True)
    assert "70/70 pairs" in caplog.messages[-1]
    caplog.clear()
    load_tiny("bert").compute_score(some_pairs(10) * 7, show_progress_bar=False)
    assert not any("pairs, " in message for message in caplog.messages)


# ---- several devices -------------------------------------------------------------------------------------

TWO = ["cpu", "cpu"]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_replicas_give_the_scores_of_one_in_input_order(load_tiny, family):
    scorer = load_tiny(family)
    for count in (0, 1, 3, 150):
        pairs = some_pairs(150)[:count]
        for options in ({}, {"max_length": 30, "batch_size": 2}, {"normalize": True}):
            scores = scorer.compute_score(pairs, devices=TWO, **options)
            torch.testing.assert_close(scores, scorer.compute_score(pairs, **options), atol=1e-5, rtol=0)


def test_every_replica_scores_in_its_own_thread_and_in_the_precision_asked_for(load_tiny, monkeypatch):
    scorer, threads = load_tiny("bert"), {}
    both = threading.Barrier(2, timeout=60)

    def note(module, arguments):
        first = threading.get_ident() not in threads
        threads.setdefault(threading.get_ident(), []).append((id(module), torch.is_autocast_enabled("cpu")))
        if first:
            both.wait()  # no replica can do all the work before the other begins

    scorer.register_forward_pre_hook(note)
    scorer.compute_score(some_pairs(64), batch_size=4, devices=TWO, precision="bf16")
    seen = [set(calls) for calls in threads.values()]
    assert len(seen) == 2 and all(len(calls) == 1 for calls in seen)
    assert len({module for calls in seen for module, _ in calls}) == 2, "both threads use one model"
    assert all(autocast for calls in seen for _, autocast in calls)


def test_replicas_share_weights_on_one_device_and_follow_the_model(load_tiny):
    scorer, pairs = load_tiny("qwen2"), some_pairs(30)
    first, second = scoring.replicas(scorer, [torch.device("cpu")] * 2)
    assert first is scorer and second is not scorer and second.pair_encoder is scorer.pair_encoder
    for name, value in second.named_parameters():
        assert value.data_ptr() == scorer.get_parameter(name).data_ptr() and not value.requires_grad
    before = scorer.compute_score(pairs, devices=TWO)
    with torch.no_grad():
        scorer.model.score.weight.mul_(2)
    after = scorer.compute_score(pairs, devices=TWO)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, scorer.compute_score(pairs), atol=1e-5, rtol=0)


def test_an_error_of_one_replica_goes_up_and_the_others_stop(load_tiny):
    scorer, calls = load_tiny("bert"), []

    def fail(module, arguments):
        calls.append(1)
        raise RuntimeError("the replica fails")

    scorer.train().register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the replica fails"):
        scorer.compute_score(some_pairs(64), batch_size=1, devices=TWO)
    assert 1 <= len(calls) <= 2 and scorer.training
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("scoring")]


def test_what_does_not_fit_in_memory_of_two_replicas_is_cut_smaller(load_tiny):
    scorer, pairs = load_tiny("bert"), some_pairs(60)
    expected = scorer.compute_score(pairs)
    out_of_memory_beyond(scorer, 500)
    torch.testing.assert_close(scorer.compute_score(pairs, devices=TWO), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "devices,message",
    [
        ("cuda:0", "devices must be a list such as .* found 'cuda:0'"),
        ([], "devices must be a list"),
        (["cpu", "gpu:1"], "'gpu:1' is no device of torch"),
        (["cpu", None], "None is no device of torch"),
        (["cpu", "cuda:99"], "cuda:99 is not on this machine, which has [0-9]+ CUDA devices"),
    ],
)
def test_devices_that_cannot_be_are_refused(load_tiny, devices, message):
    with pytest.raises(ValueError, match=message):
        check_devices(devices)
    with pytest.raises(ValueError, match=message):
        load_tiny("bert").compute_score(["a", "b"], devices=devices)


def test_options_are_checked_for_every_device(load_tiny):
    scorer = load_tiny("bert")
    with pytest.raises(ValueError, match="precision 'fp16' needs a GPU"):
        scorer.compute_score(["a", "b"], devices=TWO, precision="fp16")
    with pytest.raises(ValueError, match="max_length 4 is too small"):
        scorer.compute_score(["a", "b"], devices=TWO, max_length=4)


# ---- mode and precision ----------------------------------------------------------------------------------


@pytest.fixture
def bert(load_tiny):
    return load_tiny("bert")


def test_a_loaded_model_is_in_eval_mode_and_stays_there(bert):
    assert not any(module.training for module in bert.modules())
    bert.compute_score(["a", "b"])
    assert not any(module.training for module in bert.modules())


def test_dropout_is_off_while_scoring_and_train_mode_comes_back(bert):
    assert any(isinstance(module, nn.Dropout) and module.p > 0 for module in bert.modules())
    expected = bert.compute_score(some_pairs(8))
    bert.train()
    assert torch.equal(bert.compute_score(some_pairs(8)), expected)
    assert all(module.training for module in bert.modules())
    batch = make_batch(bert.pair_encoder.encode(some_pairs(8)))
    assert not torch.equal(bert(batch), bert(batch)), "dropout is not on again"


def test_a_part_that_was_in_eval_mode_during_training_is_so_again(bert):
    bert.train()
    bert.model.bert.embeddings.eval()
    bert.compute_score(["a", "b"])
    assert not bert.model.bert.embeddings.dropout.training
    assert bert.model.bert.encoder.training and bert.model.training and bert.training


def test_the_mode_comes_back_after_an_error(bert, monkeypatch):
    def broken(batch):
        assert not bert.training
        raise RuntimeError("out of something")

    bert.train()
    monkeypatch.setattr(bert, "forward", broken)
    with pytest.raises(RuntimeError, match="out of something"):
        bert.compute_score(["a", "b"])
    assert all(module.training for module in bert.modules())
    assert torch.is_grad_enabled()


def test_scores_carry_no_gradient_and_the_model_trains_on_afterwards(bert):
    scores = bert.compute_score(some_pairs(4))
    assert not scores.requires_grad and not scores.is_inference()
    bert.train()
    bert(make_batch(bert.pair_encoder.encode(some_pairs(4)))).sum().backward()
    assert all(parameter.grad is not None for parameter in bert.parameters())


def test_bf16_is_near_float32_differs_from_it_and_keeps_float32_resolution(bert):
    pairs = some_pairs(20)
    exact = bert.compute_score(pairs)
    assert torch.equal(bert.compute_score(pairs, precision="no"), exact)
    half = bert.compute_score(pairs, precision="bf16")
    torch.testing.assert_close(half, exact, atol=0.3, rtol=0.1)
    assert (half != exact).all()
    assert (half != half.bfloat16().float()).sum() > 15, "rounded to bfloat16"
    assert torch.equal(bert.compute_score(pairs), exact), "autocast is still on"


@pytest.mark.parametrize("precision", ["fp32", "bfloat16", "", torch.bfloat16])
def test_an_unknown_precision_is_refused_with_the_known_ones(bert, precision):
    with pytest.raises(ValueError, match="precision must be None or one of 'no', 'bf16', 'fp16'; found"):
        bert.compute_score(["a", "b"], precision=precision)


def test_fp16_is_refused_on_the_cpu(bert):
    with pytest.raises(ValueError, match="precision 'fp16' needs a GPU"):
        bert.compute_score(["a", "b"], precision="fp16")


@pytest.mark.parametrize(
    "instructions,warnings", [({"avx2": True}, 1), ({"avx512_bf16": True}, 0), ({"bf16": True}, 0)]
)
def test_bf16_on_a_cpu_without_its_instructions_is_warned_of_once(bert, monkeypatch, caplog, instructions, warnings):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    scoring.warn_of_slow_bf16.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            bert.compute_score(["a", "b"], precision="bf16")
    assert sum("no bfloat16 instructions" in message for message in caplog.messages) == warnings
    scoring.warn_of_slow_bf16.cache_clear()
