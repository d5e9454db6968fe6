"""The pad token: agreed between tokenizer and config, and never the token where a decoder's score is read."""

import pytest
from tiny_models import bert_tokenizer, llama_tokenizer, qwen2_tokenizer, tiny_bert, tiny_llama, tiny_qwen2
from transformers import AutoModelForSequenceClassification

from rag_retrieval.models.pad_token import NEW_PAD_TOKEN, set_decoder_pad_token, set_encoder_pad_token


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


def test_an_encoder_where_nobody_knows_a_pad_token_gets_a_new_one(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert(tmp_path))
    tokenizer = bert_tokenizer()
    model.config.pad_token_id = tokenizer.pad_token = None
    set_encoder_pad_token(model, tokenizer)
    assert tokenizer.pad_token == NEW_PAD_TOKEN
    assert model.config.pad_token_id == tokenizer.pad_token_id < model.get_input_embeddings().num_embeddings
