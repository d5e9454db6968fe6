"""Packed against padded, for every family: equal scores, equal gradients, and a reason where there is none."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import (
    bert_tokenizer,
    qwen2_tokenizer,
    save_tiny,
    tiny_bert,
    tiny_qwen2,
    tiny_xlm_roberta,
    xlm_roberta_tokenizer,
)
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    CamembertConfig,
    DebertaV2Config,
    ElectraConfig,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

from rag_retrieval import CrossEncoder, LLMDecoder
from rag_retrieval.models import packed_model
from rag_retrieval.models.packed_attention import ATTENTION
from rag_retrieval.models.packing import padded_inputs
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.token_batch import make_batch

SHAPE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.2
)
BERT = SHAPE | dict(max_position_embeddings=512, pad_token_id=0, attention_probs_dropout_prob=0.0)
ROBERTA = SHAPE | dict(max_position_embeddings=514, pad_token_id=1, type_vocab_size=1, attention_probs_dropout_prob=0.0)
MODERN = SHAPE | dict(max_position_embeddings=512, pad_token_id=0, local_attention=32, global_attn_every_n_layers=2)
DECODER = SHAPE | dict(num_key_value_heads=1, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None)
ENCODERS = {
    "bert": lambda size: BertConfig(vocab_size=size, **BERT),
    "roberta": lambda size: RobertaConfig(vocab_size=size, **ROBERTA),
    "xlm-roberta": lambda size: XLMRobertaConfig(vocab_size=size, **ROBERTA),
    "camembert": lambda size: CamembertConfig(vocab_size=size, **ROBERTA),
    "electra": lambda size: ElectraConfig(vocab_size=size, embedding_size=16, **BERT),
    "modernbert": lambda size: ModernBertConfig(vocab_size=size, classifier_pooling="cls", **MODERN),
    "modernbert, mean": lambda size: ModernBertConfig(vocab_size=size, classifier_pooling="mean", **MODERN),
}
DECODERS = {
    "qwen2": lambda size: Qwen2Config(vocab_size=size, **DECODER),
    "qwen3": lambda size: Qwen3Config(vocab_size=size, head_dim=16, **DECODER),
    "llama": lambda size: LlamaConfig(vocab_size=size, **DECODER),
    "mistral": lambda size: MistralConfig(vocab_size=size, sliding_window=24, **DECODER),
    "gemma": lambda size: GemmaConfig(vocab_size=size, head_dim=16, **DECODER),
}
LIKE_ROBERTA = ("roberta", "xlm-roberta", "camembert")  # their pad token is 1, positions count from 2
FAMILIES = [*ENCODERS, *DECODERS]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function that gives the packed scorer of a family, loaded once."""
    loaded = {}

    def load(family):
        if family not in loaded:
            folder = tmp_path_factory.mktemp("model")
            if family in ENCODERS:
                tokenizer = xlm_roberta_tokenizer() if family in LIKE_ROBERTA else bert_tokenizer()
                save_tiny(folder, ENCODERS[family](len(tokenizer)), tokenizer, head_labels=1)
                loaded[family] = CrossEncoder.from_pretrained(folder)
            else:
                tokenizer = qwen2_tokenizer()
                save_tiny(folder, DECODERS[family](len(tokenizer)), tokenizer, head_labels=1)
                loaded[family] = LLMDecoder.from_pretrained(folder)
        return loaded[family].eval()

    return load


def random_pairs(scorer, lengths: list[int], seed: int = 0) -> list[EncodedPair]:
    """Pairs of exactly these lengths; consecutive ones share what stands before the document where both can."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randint(5, 500, (512,), generator=generator).tolist()
    pairs = []
    for length in lengths:
        start = min(7, length // 2)
        ids = query[:start] + torch.randint(5, 500, (length - start,), generator=generator).tolist()
        types = None if scorer.pair_encoder.template.types is None else [0] * start + [1] * (length - start)
        types = None if types is None else np.array(types, np.int32)
        pairs.append(EncodedPair(np.array(ids, np.int32), types, False, start))
    return pairs


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_agree_at_short_and_long_lengths_and_with_any_neighbours(models, family):
    scorer = models(family)
    assert scorer.packing_problem is None
    generator = torch.Generator().manual_seed(3)
    lengths = torch.cat([torch.arange(1, 65), torch.randperm(447, generator=generator)[:63] + 65, torch.tensor([512])])
    pairs = random_pairs(scorer, lengths[torch.randperm(128, generator=generator)].tolist())
    with torch.no_grad():
        for start in range(0, 128, 32):  # lengths of a batch lie far apart, its neighbours are random
            batch = make_batch(pairs[start : start + 32])
            difference = scorer.packed_scores(batch) - scorer.padded_scores(batch)
            assert difference.abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_scores_the_same_alone_and_among_others(models, family):
    scorer = models(family)
    pairs = random_pairs(scorer, [40, 3, 90, 17, 41])
    with torch.no_grad():
        together = scorer.packed_scores(make_batch(pairs))
        alone = torch.cat([scorer.padded_scores(make_batch([pair])) for pair in pairs])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.std() > 0.01


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_agree(models, family, checkpointing):
    scorer = models(family).train()  # gradient checkpointing works in train mode alone
    dropouts = [module for module in scorer.modules() if isinstance(module, torch.nn.Dropout)]
    rates = [module.p for module in dropouts]
    for module in dropouts:
        module.p = 0.0
    if checkpointing:
        scorer.model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = make_batch(random_pairs(scorer, [9, 64, 30, 31, 2]))
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5])
    named = dict(scorer.named_parameters())

    def gradients(forward):
        found = torch.autograd.grad((forward(batch) * weights).sum(), list(named.values()), allow_unused=True)
        return {name: value for name, value in zip(named, found, strict=True) if value is not None}

    padded, packed = gradients(scorer.padded_scores), gradients(scorer.packed_scores)
    scorer.model.gradient_checkpointing_disable()
    for module, rate in zip(dropouts, rates, strict=True):
        module.p = rate
    assert packed.keys() == padded.keys()
    for name, value in padded.items():
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(packed[name], value, atol=1e-5 * scale, rtol=0, msg=name)


def test_a_decoder_computes_a_shared_query_once(models):
    scorer = models("qwen2")
    batch = make_batch(random_pairs(scorer, [20, 30, 40]))
    assert batch.shared.tolist() == [0, 7, 7] and scorer.shares_queries
    computed = []
    hooks = [
        part.register_forward_hook(lambda module, inputs, output: computed.append(output.shape[1]))
        for layer in scorer.model.model.layers
        for part in (layer.self_attn.k_proj, layer.mlp)
    ]
    with torch.no_grad():
        scorer(batch)
    for hook in hooks:
        hook.remove()
    tokens = 20 + 30 + 40 - 2 * 7
    assert computed == [tokens, tokens, tokens, 3], "and of the last layer what the three scores need"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_computes_no_more_than_what_is_read(models, family):
    scorer = models(family)
    layers = next(stack for stack in scorer.model.modules() if isinstance(stack, torch.nn.ModuleList))
    widths = {}
    for place in (0, 1):
        hook = layers[place].register_forward_hook(
            lambda module, inputs, output, place=place: widths.__setitem__(place, output.shape[1])
        )
        with torch.no_grad():
            scorer(make_batch(random_pairs(scorer, [20, 31])))
        hook.remove()
    shared = 7 if family in DECODERS else 0
    known = not family.startswith("modernbert")
    assert widths == {0: 51 - shared, 1: 2 if known else 51}


def test_an_encoder_shares_no_query_because_its_query_sees_the_document(models):
    assert not models("bert").shares_queries


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_the_same_model_still_takes_padded_batches_of_other_callers(models, family, tmp_path):
    scorer = models(family)
    scorer.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    pairs = [("what is a panda?", "A bear."), ("熊猫吃什么?", "大熊猫主要吃竹子。" * 5)]
    encoded = scorer.pair_encoder.encode(pairs)
    inputs = padded_inputs(make_batch(encoded), scorer.tokenizer.pad_token_id, scorer.device)
    with torch.no_grad():
        found, expected = scorer.model(**inputs).logits, plain(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_saved_model_does_not_name_our_attention(models, tmp_path):
    models("bert").save_pretrained(tmp_path)
    assert ATTENTION not in Path(tmp_path, "config.json").read_text()


# ---- families that are padded ----------------------------------------------------------------------------


def test_a_family_without_a_packed_head_is_padded_and_says_so(tmp_path):
    tokenizer = bert_tokenizer()
    config = DebertaV2Config(vocab_size=len(tokenizer), relative_attention=True, pos_att_type=["c2p", "p2c"], **BERT)
    scorer = CrossEncoder.from_pretrained(save_tiny(tmp_path, config, tokenizer, head_labels=1))
    assert scorer.packing_problem == "no padding-free forward for deberta-v2"
    assert not scorer.packs
    batch = make_batch(random_pairs(scorer, [5, 9]))
    with torch.no_grad():
        assert torch.equal(scorer(batch), scorer.padded_scores(batch))


def test_attention_with_a_softcap_is_padded_and_says_so(tmp_path):
    tokenizer = qwen2_tokenizer()
    config = Gemma2Config(vocab_size=len(tokenizer), head_dim=16, sliding_window=16, **DECODER)
    scorer = LLMDecoder.from_pretrained(save_tiny(tmp_path, config, tokenizer, head_labels=1))
    assert "softcap" in scorer.packing_problem
    assert scorer.config._attn_implementation != ATTENTION


def test_an_attention_that_was_asked_for_is_used_and_padded(tmp_path):
    scorer = CrossEncoder.from_pretrained(tiny_bert(tmp_path, head_labels=1), attn_implementation="eager")
    assert scorer.packing_problem == "attn_implementation eager was asked for"
    assert scorer.config._attn_implementation == "eager"


def move_the_first_border(packing):
    packing.lengths[:2] += np.array([1, -1], packing.lengths.dtype)
    packing._ends[0] += 1


@pytest.mark.parametrize(
    ("family", "break_packing"),
    [
        ("bert", move_the_first_border),
        ("roberta", lambda packing: packing.positions.add_(1)),
        ("qwen2", lambda packing: packing.positions.copy_(torch.arange(len(packing.positions)))),
    ],
)
def test_the_check_at_load_notices_wrong_scores(models, family, break_packing, monkeypatch):
    """A pair that sees a token of its neighbour; positions off by one; positions that do not restart (they are
    relative, but a shared query stays where it is)."""
    scorer = models(family)
    real = packed_model.packed_outputs

    def wrong(model, batch, packing):
        break_packing(packing)
        return real(model, batch, packing)

    monkeypatch.setattr("rag_retrieval.models.pair_scorer.packed_outputs", wrong)
    assert "differ from padded ones" in scorer._packing_problem(None)
    monkeypatch.undo()
    assert scorer._packing_problem(None) is None  # and it is packed again


def test_scores_that_are_all_equal_prove_nothing():
    equal = torch.ones(3)
    assert "cannot be checked" in packed_model.difference(equal, equal, torch.float32)
    broken = torch.tensor([1.0, 1.0, torch.nan])
    assert "differ" in packed_model.difference(equal, broken, torch.float32)


def test_the_check_reaches_beyond_a_sliding_window(models):
    scorer = models("modernbert")
    assert len(packed_model.pairs_to_check(scorer.model, scorer.pair_encoder)[-1]) > 32
    short = replace(scorer.pair_encoder, max_length=24)
    assert len(packed_model.pairs_to_check(scorer.model, short)[-1]) < 24  # no pair can be that long


def test_a_tokenizer_that_knows_few_words_does_not_stop_the_check(tmp_path):
    """To a tokenizer without digits, texts of digits are all one unknown token, or none."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trained.train_from_iterator(["a relevance"], trainers.BpeTrainer(special_tokens=["<unk>", "<pad>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, unk_token="<unk>", pad_token="<pad>")
    config = Qwen2Config(vocab_size=len(tokenizer) + 1, pad_token_id=1, **DECODER)  # loading adds an eos token
    scorer = LLMDecoder.from_pretrained(save_tiny(tmp_path, config, tokenizer, head_labels=1))
    assert scorer.packing_problem is None


@pytest.mark.parametrize("make", [tiny_bert, tiny_xlm_roberta, tiny_qwen2])
def test_loading_draws_no_random_number_for_the_check(make, tmp_path):
    """A run's seed must give the same head and dropout masks whether a family is packed or not."""
    folder = make(tmp_path, head_labels=1)
    load = LLMDecoder if make is tiny_qwen2 else CrossEncoder
    states = []
    for attention in (None, "sdpa"):
        torch.manual_seed(5)
        load.from_pretrained(folder, attn_implementation=attention)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_segment_ids_reach_the_model(models):
    scorer = models("bert")
    pair = random_pairs(scorer, [12])[0]
    other = EncodedPair(pair.ids, np.zeros(12, np.int32), False, pair.document_start)
    with torch.no_grad():
        assert scorer(make_batch([pair])) != scorer(make_batch([other]))
        expected = scorer.padded_scores(make_batch([pair, other]))
        torch.testing.assert_close(scorer(make_batch([pair, other])), expected, atol=1e-6, rtol=0)


def test_the_saved_config_reads_back(models, tmp_path):
    models("modernbert").save_pretrained(tmp_path)
    assert json.loads(Path(tmp_path, "config.json").read_text())["model_type"] == "modernbert"
