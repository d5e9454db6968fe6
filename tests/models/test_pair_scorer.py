"""compute_score as its users call it: order, shapes, errors; and that padding and neighbours never change a score."""

import copy

import numpy as np
import pytest
import torch
from pair_samples import some_pairs
from tiny_models import CHINESE, ENGLISH, save_tiny, xlm_roberta_tokenizer
from transformers import BartConfig, T5Config

from rag_retrieval import CrossEncoder, score_over_processes
from rag_retrieval.core.log import Progress
from rag_retrieval.models import scoring
from rag_retrieval.models.packed_model import pairs_to_check
from rag_retrieval.models.token_batch import make_batch

FAMILIES = ["bert", "xlm_roberta", "qwen2", "llama"]


def one_by_one(scorer, pairs) -> torch.Tensor:
    """Scores of pairs that never saw padding: each alone, through the Hugging Face model itself."""
    scores = []
    with torch.no_grad():
        for pair in scorer.pair_encoder.encode(pairs):
            types = None if pair.types is None else torch.from_numpy(pair.types[None]).long()
            inputs = {"input_ids": torch.from_numpy(pair.ids[None]).long()} | (
                {} if types is None else {"token_type_ids": types}
            )
            scores.append(scorer.model.eval()(**inputs).logits[0, 0])
    return torch.stack(scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_unpadded_single_pairs_in_input_order(load_tiny, family):
    scorer, pairs = load_tiny(family), some_pairs(40)
    scores = scorer.compute_score(pairs)
    assert scores.shape == (40,) and scores.dtype == torch.float32 and scores.device.type == "cpu"
    torch.testing.assert_close(scores, one_by_one(scorer, pairs), atol=1e-5, rtol=0)
    assert scores.std() > 0.05, "the scores of this model hardly differ: the test could not fail"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_batch_size_does_not_change_scores(load_tiny, family):
    scorer, pairs = load_tiny(family), some_pairs(23)
    expected = scorer.compute_score(pairs)
    for batch_size in (1, 3, 7, 1000):
        torch.testing.assert_close(scorer.compute_score(pairs, batch_size=batch_size), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_do_not_change_a_score(load_tiny, family):
    scorer = load_tiny(family)
    pair = (ENGLISH[1], CHINESE[0])
    alone = scorer.compute_score(pair)
    for neighbour in ((ENGLISH[0], " ".join(ENGLISH)), ("", ""), (CHINESE[3], CHINESE[4] * 9)):
        torch.testing.assert_close(scorer.compute_score([neighbour, pair])[1:], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_token_that_fills_the_padding_does_not_change_a_score(load_tiny, family):
    scorer, pairs = load_tiny(family), some_pairs(12)
    expected = scorer.compute_score(pairs)
    scorer.tokenizer.pad_token = scorer.tokenizer.convert_ids_to_tokens(77)
    torch.testing.assert_close(scorer.compute_score(pairs), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_and_sdpa_attention_give_equal_scores(load_tiny, family):
    pairs = some_pairs(12)
    eager, sdpa = (load_tiny(family, attn_implementation=name) for name in ("eager", "sdpa"))
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
    torch.testing.assert_close(eager.compute_score(pairs), sdpa.compute_score(pairs), atol=1e-5, rtol=0)


@pytest.fixture
def bert(load_tiny):
    return load_tiny("bert")


def test_one_pair_and_every_kind_of_list_of_pairs_is_taken(bert):
    expected = bert.compute_score([["water", "boils"], ["fire", "burns"]])
    one = expected[:1]
    for pair in (["water", "boils"], ("water", "boils"), np.array(["water", "boils"]), [("water", "boils")]):
        torch.testing.assert_close(bert.compute_score(pair), one, atol=1e-6, rtol=0)
    both = [("water", "boils"), ("fire", "burns")]
    lists = (list(pair) for pair in both)
    for pairs in (both, tuple(both), iter(both), np.array(both), lists):
        assert torch.equal(bert.compute_score(pairs), expected)


def test_no_pairs_give_an_empty_tensor(bert):
    for empty in ([], (), iter([])):
        scores = bert.compute_score(empty)
        assert scores.shape == (0,) and scores.dtype == torch.float32
    assert bert.compute_score([], normalize=True).shape == (0,)


def test_normalize_is_the_sigmoid_and_the_first_score_can_be_taken_alone(bert):
    pairs = some_pairs(6)
    scores = bert.compute_score(pairs)
    assert torch.equal(bert.compute_score(pairs, normalize=True), torch.sigmoid(scores))
    assert torch.sigmoid(scores[0]).dim() == 0


def test_texts_for_booleans_are_refused(bert):
    for name in ("normalize", "show_progress_bar"):
        with pytest.raises(ValueError, match=f"{name} must be True or False, found 'false'"):
            bert.compute_score([["a", "b"]], **{name: "false"})
    with pytest.raises(ValueError, match="normalize must be True or False, found 1"):
        score_over_processes(bert, [["a", "b"]], normalize=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_max_length_of_a_call_cuts_for_that_call_alone(load_tiny, family):
    scorer = load_tiny(family)
    long = (ENGLISH[0], " ".join(ENGLISH))
    whole = scorer.compute_score(long)
    cut = scorer.compute_score(long, max_length=30)
    assert not torch.equal(whole, cut)
    assert torch.equal(cut, load_tiny(family, max_length=30).compute_score(long))
    assert torch.equal(scorer.compute_score(long), whole)


def test_a_max_length_too_small_for_the_fixed_parts_is_refused(bert):
    with pytest.raises(ValueError, match="max_length 4 is too small"):
        bert.compute_score(["a", "b"], max_length=4)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(bert, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, found {batch_size}"):
        bert.compute_score(["a", "b"], batch_size=batch_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_under_bfloat16_autocast_scores_keep_float32_resolution(load_tiny, family):
    scorer, pairs = load_tiny(family), some_pairs(20)
    exact = scorer.compute_score(pairs)
    batch = make_batch(scorer.pair_encoder.encode(pairs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = scorer(batch)
    assert scores.dtype == torch.float32
    assert (scores != scores.bfloat16().float()).sum() > 15, "rounded to bfloat16"
    torch.testing.assert_close(scores.detach(), exact, atol=0.3, rtol=0.1)
    scores.sum().backward()
    assert all(parameter.grad is not None for parameter in scorer.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_scores_alike(load_tiny, family):
    scorer = load_tiny(family)
    assert torch.equal(
        copy.deepcopy(scorer).compute_score(some_pairs(5)), scorer.compute_score(some_pairs(5))
    )


def test_the_inner_model_may_be_moved_and_the_wrapper_put_in_eval_mode_as_the_readme_does(bert):
    bert.model.to("cpu")
    assert bert.eval() is bert
    assert bert.device == torch.device("cpu")
    assert bert.config is bert.model.config


def test_progress_counts_every_pair_and_shows_on_demand_alone(bert, monkeypatch):
    made = []

    class Noting(Progress):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(scoring, "Progress", Noting)
    pairs = some_pairs(30) + some_pairs(30)  # repeated ones count too
    for choice in (True, False, None):
        bert.compute_score(pairs, batch_size=1, show_progress_bar=choice)
    assert [progress.shown for progress in made] == [True, False, False], "None shows it on a terminal"
    assert {(progress.done, progress.total) for progress in made} == {(60, 60)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_on_a_gpu_are_near_those_on_the_cpu_and_hardly_tie(load_tiny, family):
    scorer, pairs = load_tiny(family), some_pairs(40)
    expected = scorer.compute_score(pairs)
    scorer.model.to("cuda:0")
    scores = scorer.compute_score(pairs)
    assert scores.device.type == "cpu" and scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=0.3, rtol=0.1)
    assert len(set(scores.tolist())) == len(set(expected.tolist()))


# ---- odd tokens in texts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "xlm_roberta"])
def test_special_tokens_inside_a_text_score_as_in_transformers(load_tiny, family):
    """RoBERTa's positions skip padding tokens, wherever they stand."""
    scorer = load_tiny(family)
    assert scorer.packs
    special = scorer.tokenizer.all_special_tokens
    pairs = [("water", f"rest {token} may {token} {token} help") for token in special]
    pairs += [(f"a{scorer.tokenizer.pad_token} query", " ".join(special * 3))]
    torch.testing.assert_close(scorer.compute_score(pairs), one_by_one(scorer, pairs), atol=1e-5, rtol=0)
    texts = scorer.tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = scorer.model(**texts).logits[:, 0]
    torch.testing.assert_close(scorer.compute_score(pairs), expected, atol=1e-5, rtol=0)


def test_the_check_at_load_reads_every_special_token(load_tiny):
    for family in FAMILIES:
        scorer = load_tiny(family)
        ids = {token for pair in pairs_to_check(scorer.model, scorer.pair_encoder) for token in pair.ids.tolist()}
        assert {token for token in scorer.tokenizer.all_special_ids if token < scorer.config.vocab_size} <= ids


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_an_eos_token_inside_one_text_leaves_the_others_their_scores(tmp_path, family):
    """Both pool at the last eos token of a row, and refuse rows with different numbers of them."""
    tokenizer = xlm_roberta_tokenizer()
    common = dict(vocab_size=len(tokenizer), d_model=32, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2)
    if family == "bart":
        heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64)
        config = BartConfig(**common, **heads, encoder_layers=1, decoder_layers=1, init_std=0.2)
    else:
        config = T5Config(**common, num_layers=1, num_decoder_layers=1, num_heads=2, d_kv=16, d_ff=64)
    scorer = CrossEncoder.from_pretrained(save_tiny(tmp_path, config, tokenizer, head_labels=1))
    pairs = [("water", "boils"), ("water", "rest"), ("fever", "cough")]
    expected = scorer.compute_score(pairs)
    scores = scorer.compute_score([*pairs, ("water", "boils </s> and </s> rests")])
    torch.testing.assert_close(scores[:3], expected, atol=1e-5, rtol=0)
    assert torch.isfinite(scores).all()


def test_tokens_added_to_the_tokenizer_score_as_after_saving(load_tiny, tmp_path):
    scorer, pairs = load_tiny("bert"), [("xyzzy", "the water xyzzy"), ("water", "boils")]
    before = scorer.compute_score(pairs)
    scorer.tokenizer.add_tokens(["xyzzy"])
    scorer.model.resize_token_embeddings(len(scorer.tokenizer))
    after = scorer.compute_score(pairs)
    assert before[0] != after[0] and before[1] == after[1]
    scorer.save_pretrained(tmp_path)
    torch.testing.assert_close(CrossEncoder.from_pretrained(tmp_path).compute_score(pairs), after, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_scores_do_not_depend_on_the_default_dtype(load_tiny, family):
    scorer, pairs = load_tiny(family), some_pairs(20)
    expected = scorer.compute_score(pairs)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            for devices in (None, ["cpu", "cpu"]):
                scores = scorer.compute_score(pairs, devices=devices)
                assert scores.dtype == torch.float32
                torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
            assert scorer.compute_score([]).dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)
