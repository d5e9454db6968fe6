"""Single texts to token ids: prompts, limits, special tokens; against transformers' own call of the tokenizer."""

import json
from dataclasses import replace

import pytest
from tiny_models import CHINESE, ENGLISH, bert_tokenizer, llama_tokenizer, qwen2_tokenizer, xlm_roberta_tokenizer
from transformers import AutoTokenizer

from rag_retrieval.models.text_encoding import TextEncoder, append_eos, text_template

TOKENIZERS = {
    "bert": bert_tokenizer,
    "xlm_roberta": xlm_roberta_tokenizer,
    "qwen2": qwen2_tokenizer,
    "llama": llama_tokenizer,
}
TEXTS = [*ENGLISH, *CHINESE, "a", "", " spaces  everywhere ", " ".join(ENGLISH), "[SEP] </s> <|im_end|>"]
PROMPTS = {"query": "query: ", "document": "passage: "}


def encoder_of(family: str, limit: int = 512, prompts=PROMPTS, **template) -> TextEncoder:
    tokenizer = TOKENIZERS[family]()
    return TextEncoder(tokenizer, replace(text_template(tokenizer), **template), prompts, {"document": limit})


@pytest.mark.parametrize("limit", [512, 16])
@pytest.mark.parametrize("family", TOKENIZERS)
def test_ids_are_those_of_prompt_and_text_in_one_string(family, limit):
    encoder = encoder_of(family, limit)
    for kind, prompt in (("query", "query: "), ("document", "passage: "), (None, "")):
        expected = encoder.tokenizer([prompt + text for text in TEXTS], truncation=True, max_length=limit)["input_ids"]
        encoded = encoder.encode(TEXTS, kind)
        for text, ids in zip(encoded, expected, strict=True):
            assert text.ids.tolist() == (ids or [encoder.tokenizer.eos_token_id]) and text.ids.dtype == "int32"
        cut = [len(encoder.tokenizer(prompt + text)["input_ids"]) > limit for text in TEXTS]
        assert [text.truncated for text in encoded] == cut


@pytest.mark.parametrize("family", TOKENIZERS)
def test_the_tokens_before_the_text_are_those_within_its_prompt(family):
    encoder = encoder_of(family)
    tokenizer, specials = encoder.tokenizer, len(encoder.template.prefix)
    for text, encoded in zip(ENGLISH, encoder.encode(ENGLISH, "query"), strict=True):
        offsets = tokenizer("query: " + text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert encoded.document_start == specials + sum(end <= len("query: ") for _, end in offsets)
        # the first token of the text begins with it, or with the space before it
        begin = offsets[encoded.document_start - specials]
        assert ("query: " + text)[begin[0] : begin[1]].strip() == text[: begin[1] - len("query: ")].strip() != ""
    assert all(encoded.document_start == 0 for encoded in encoder.encode(ENGLISH))


def test_a_prompt_of_the_call_takes_the_place_of_that_of_the_kind():
    encoder = encoder_of("bert")
    (own,), (expected,) = encoder.encode(["a"], "query", prompt="ask: "), encoder.encode(["ask: a"])
    assert own.ids.tolist() == expected.ids.tolist() and own.document_start > 0
    assert encoder.encode(["a"], "query", prompt="")[0].ids.tolist() == encoder.encode(["a"])[0].ids.tolist()


def test_a_kind_gets_the_first_of_its_names_that_the_model_has():
    encoder = encoder_of("bert", prompts={"passage": "p: ", "corpus": "c: ", "sts": "s: "})
    assert [encoder.prompt_for(kind) for kind in ("query", "document", "sts", None)] == ["", "p: ", "s: ", ""]
    assert replace(encoder, default_prompt="sts").prompt_for(None) == "s: "


def test_queries_may_have_a_limit_of_their_own():
    encoder = replace(encoder_of("bert"), max_lengths={"document": 30, "query": 9})
    text = [" ".join(ENGLISH)]
    assert [len(encoder.encode(text, kind)[0]) for kind in ("query", "document", None)] == [9, 30, 30]
    assert len(encoder.encode(text, "query", max_length=20)[0]) == 20
    assert len(encoder.with_max_length(12).encode(text, "query")[0]) == 12


def test_a_text_that_loses_its_beginning_ends_as_it_did():
    encoder = encoder_of("bert", 12, truncate_left=True)
    tokenizer = encoder.tokenizer
    tokenizer.truncation_side = "left"
    (encoded,) = encoder.encode([ENGLISH[0]], "query")
    assert encoded.ids.tolist() == tokenizer("query: " + ENGLISH[0], truncation=True, max_length=12)["input_ids"]
    assert encoded.document_start == 0 and encoded.truncated


@pytest.mark.parametrize("limit", [5, 6, 7, 8, 9, 10, 23])
@pytest.mark.parametrize("interval", [2, 3, 4, 5])
def test_copies_of_cls_leave_the_tokens_of_the_text_in_order(limit, interval):
    encoder = encoder_of("bert", limit, prompts={}, cls_interval=interval)
    tokenizer = encoder.tokenizer
    for words in range(12):
        own = tokenizer(" ".join("abcdefghijkl"[:words]), add_special_tokens=False)["input_ids"]
        encoded = encoder.join([], own, limit)
        *ids, last = encoded.ids.tolist()
        assert last == tokenizer.sep_token_id and len(encoded) <= limit
        places = [place for place, token in enumerate(ids) if token == tokenizer.cls_token_id]
        assert places == list(range(0, len(ids), interval)) and (len(ids) == 1 or ids[-1] != tokenizer.cls_token_id)
        kept = [token for token in ids if token != tokenizer.cls_token_id]
        assert kept == own[: len(kept)] and encoded.truncated == (len(kept) < len(own))
        if encoded.truncated:  # no room is left for a token and the cls that it may need
            assert limit - len(encoded) <= 1


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True, "add_eos_token": False}])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_tokenizer_that_was_told_to_append_eos_does_so_when_it_is_opened_again(tmp_path, family, flags):
    TOKENIZERS[family]().save_pretrained(tmp_path)
    if family == "llama":
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | flags))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    before = text_template(tokenizer)
    plain = tokenizer(TEXTS)["input_ids"]
    template = append_eos(tokenizer, before, tokenizer.eos_token)
    assert (template.prefix, template.suffix) == (before.prefix, (tokenizer.eos_token_id,))
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXTS)["input_ids"] == [ids + [tokenizer.eos_token_id] for ids in plain]
    assert again(TEXTS[-2], truncation=True, max_length=9)["input_ids"][-1] == tokenizer.eos_token_id


# ---- texts that are token ids already -------------------------------------------------------------------


@pytest.mark.parametrize("limit", [512, 16])
@pytest.mark.parametrize("family", TOKENIZERS)
def test_token_ids_become_what_their_text_becomes_with_or_without_special_tokens(family, limit):
    encoder = encoder_of(family, limit, prompts={})
    for special in (False, True):
        ids = encoder.tokenizer(TEXTS, add_special_tokens=special)["input_ids"]
        for own, expected in zip(encoder.encode_ids(ids), encoder.encode(TEXTS), strict=True):
            assert own.ids.tolist() == expected.ids.tolist()
            assert (own.truncated, own.document_start) == (expected.truncated, expected.document_start)


def test_token_ids_come_after_the_prompt_of_their_kind():
    encoder = encoder_of("bert")
    ids = encoder.tokenizer(TEXTS)["input_ids"]
    for kind in ("query", "document", None):
        for own, expected in zip(encoder.encode_ids(ids, kind), encoder.encode(TEXTS, kind), strict=True):
            assert own.ids.tolist() == expected.ids.tolist() and own.is_query == (kind == "query")
            assert own.document_start == expected.document_start


def test_special_tokens_are_taken_from_the_ends_of_token_ids_alone():
    encoder = encoder_of("bert", prompts={})
    (cls,), (sep,) = encoder.template.prefix, encoder.template.suffix
    for ids, expected in (
        ([], [cls, sep]),
        ([cls], [cls, sep]),
        ([sep], [cls, sep]),
        ([cls, sep], [cls, sep]),
        ([cls, 7], [cls, 7, sep]),
        ([7, sep], [cls, 7, sep]),
        ([7, cls, sep, 8], [cls, 7, cls, sep, 8, sep]),
        ([cls, cls, 7], [cls, cls, 7, sep]),
    ):
        assert encoder.encode_ids([ids])[0].ids.tolist() == expected


def test_a_text_that_is_too_long_loses_the_side_that_is_asked_for():
    encoder = encoder_of("bert", 6, prompts={})
    (cls,), (sep,) = encoder.template.prefix, encoder.template.suffix
    for left, kept in ((False, [1, 2, 3, 4]), (True, [3, 4, 5, 6])):
        (text,) = encoder.with_truncation(left).encode_ids([[1, 2, 3, 4, 5, 6]])
        assert text.ids.tolist() == [cls, *kept, sep] and text.truncated
