"""compute_score: order, shapes, modes, errors; and that padding and neighbours never change a score."""

import copy
import random

import numpy as np
import pytest
import torch
from tiny_models import CHINESE, ENGLISH
from torch import nn

from rag_retrieval.models import pair_scorer
from rag_retrieval.models.pair_batch import make_batch
from rag_retrieval.models.pair_scorer import batches_by_length, check_pairs

FAMILIES = ["bert", "xlm_roberta", "qwen2", "llama"]


def some_pairs(count: int) -> list[tuple[str, str]]:
    """Pairs of very different lengths, in random order, some with an empty text."""
    generator = random.Random(3)
    pairs = [("", ""), ("", "water"), (CHINESE[0], ""), (CHINESE[1], CHINESE[2])]
    while len(pairs) < count:
        document = " ".join(generator.choices(ENGLISH + CHINESE, k=generator.randint(1, 6)))
        pairs.append((generator.choice(ENGLISH + CHINESE), document[: generator.randint(0, 400)]))
    generator.shuffle(pairs)
    return pairs


def one_by_one(scorer, pairs) -> torch.Tensor:
    """Scores of pairs that never saw padding: each alone, through the Hugging Face model itself."""
    scores = []
    with torch.no_grad():
        for pair in scorer.pair_encoder.encode(pairs):
            types = None if pair.types is None else torch.tensor([pair.types])
            inputs = {"input_ids": torch.tensor([pair.ids])} | (
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
@pytest.mark.parametrize("batch_size", [1, 3, 7, 1000])
def test_the_batch_size_does_not_change_scores(load_tiny, family, batch_size):
    scorer, pairs = load_tiny(family), some_pairs(23)
    expected = scorer.compute_score(pairs)
    torch.testing.assert_close(
        scorer.compute_score(pairs, batch_size=batch_size), expected, atol=1e-5, rtol=0
    )


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
def test_more_pairs_than_one_chunk_score_alike(load_tiny, family, monkeypatch):
    scorer, pairs = load_tiny(family), some_pairs(23)
    expected = scorer.compute_score(pairs)
    monkeypatch.setattr(pair_scorer, "SCORING_CHUNK", 5)
    torch.testing.assert_close(scorer.compute_score(pairs, batch_size=2), expected, atol=1e-5, rtol=0)


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


@pytest.mark.parametrize(
    "pairs,message",
    [
        ("text", "pairs must be a list of .query, document., found str"),
        (None, "found NoneType"),
        (7, "found int"),
        ({"query": "a", "document": "b"}, "found dict"),
        ({"a", "b"}, "found set"),
        ([["a", "b"], "cd"], r"pairs\[1\] must be \[query, document\], found 'cd'"),
        (["a", "b", "c"], r"pairs\[0\] must be \[query, document\], found 'a'"),
        ([["a", "b"], ["a", "b", "c"]], r"pairs\[1\] must be .* found \['a', 'b', 'c'\]"),
        ([["a", "b"], ["a"]], r"pairs\[1\] must be"),
        ([["a", "b"], None], r"pairs\[1\] must be .* found None"),
        ([["a", "b"], 3], r"pairs\[1\] must be .* found 3"),
        ([["a", "b"], ["a", None]], r"pairs\[1\]: the document must be a string, found NoneType"),
        ([["a", "b"], [5, "b"]], r"pairs\[1\]: the query must be a string, found int"),
        ([["a", b"b"]], r"pairs\[0\]: the document must be a string, found bytes"),
        ([["a", "b"], ["a", "\ud83d"]], r"pairs\[1\]: the document holds half a surrogate pair"),
    ],
)
def test_a_bad_pair_is_named_with_its_position(pairs, message):
    with pytest.raises(ValueError, match=message):
        check_pairs(pairs)


def test_batches_hold_every_position_once_longest_first():
    lengths = [3, 9, 1, 9, 5, 2, 7]
    batches = list(batches_by_length(lengths, 3))
    assert batches == [[1, 3, 6], [4, 0, 5], [2]]
    assert list(batches_by_length([], 3)) == []


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


def test_the_progress_bar_shows_on_demand_alone(bert, capsys):
    bert.compute_score(some_pairs(6), batch_size=2, show_progress_bar=True)
    assert "6/6" in capsys.readouterr().err
    for choice in (False, None):
        bert.compute_score(some_pairs(30), batch_size=1, show_progress_bar=choice)
        assert capsys.readouterr().err == ""


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
