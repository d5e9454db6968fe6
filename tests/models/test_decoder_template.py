"""The text around a pair in parts: always the tokens of the whole text, and kept where a text is cut."""

import itertools
import json
import random

import pytest
from tiny_models import ENGLISH, TEXTS, joining_tokenizer, llama_tokenizer, qwen2_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from rag_retrieval.models.decoder_template import decoder_template, safe_split_points
from rag_retrieval.models.pair_encoding import PairEncoder
from rag_retrieval.models.token_batch import make_batch

DEFAULTS = dict(query_format="query: {}", document_format="document: {}", seq="\n", special_token="\nrelevance")
FORMATS = {
    "defaults": DEFAULTS,
    "nothing before the query": dict(query_format="{}", document_format="D: {}", seq="\n", special_token=".\nanswer:"),
    "marks around texts": dict(query_format="<q>{}</q>", document_format="<d>{}</d>", seq=" | ", special_token=" ?"),
    "signs after the texts": dict(query_format="Q: {}.", document_format="D: {}!", seq="\n\n", special_token=" score"),
    "lines of their own": dict(
        query_format="Judge.\n\nQuery:\n{}", document_format="Document:\n{}", seq="\n\n", special_token="\n\nRelevance:"
    ),
    "special tokens": dict(
        query_format="Judge it.<|im_start|>\n{}",
        document_format="document: {}",
        seq=" <|im_end|>\n",
        special_token="\n<|im_end|>",
    ),
    "several lines between": dict(
        query_format="{}", document_format="The document:\n {}", seq="?\nIt is rated.\n", special_token="\t\nrelevance"
    ),
}


def cutting_as_gpt2() -> PreTrainedTokenizerFast:
    """GPT-2's own pattern keeps the last white space before a word apart, so "\\n\\n" is one token only at the end."""
    data = json.loads(joining_tokenizer().backend_tokenizer.to_str())
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return as_fast(data, eos_token="<|im_end|>")


def marking_every_section() -> PreTrainedTokenizerFast:
    """As Llama's first files: the mark of a space begins what follows a special token too."""
    data = json.loads(llama_tokenizer().backend_tokenizer.to_str())
    data["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]}  # fmt: skip
    data["pre_tokenizer"] = None
    return as_fast(data, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def as_fast(data: dict, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **names)


TOKENIZERS = {
    "qwen": joining_tokenizer,
    "gpt2": cutting_as_gpt2,
    "llama": llama_tokenizer,
    "old llama": marking_every_section,
}


def random_text(generator: random.Random) -> str:
    """Words, Chinese, signs and white space in any order and anywhere."""
    signs = ["?", ".", ".\n", "\n", "\n\n", " ", "  ", "\t", "7", "(", "</", "/", "😀", "龘", "'s"]
    words = [*" ".join(TEXTS).split(), *signs, *signs]
    return "".join(generator.choices(words, k=generator.randint(0, 9)))


def whole_text(formats: dict[str, str], query: str, document: str) -> str:
    start, query_end = formats["query_format"].split("{}")
    document_start, end = formats["document_format"].split("{}")
    return "".join([start, query, query_end, formats["seq"], document_start, document, end, formats["special_token"]])


def encoder_of(tokenizer, formats: dict[str, str], max_length: int = 1024) -> PairEncoder:
    return PairEncoder(tokenizer, decoder_template(tokenizer, **formats), max_length)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("formats", FORMATS)
def test_tokens_are_those_of_the_whole_text_in_one_go(name, formats):
    tokenizer, formats, generator = TOKENIZERS[name](), FORMATS[formats], random.Random(3)
    pairs = [(random_text(generator), random_text(generator)) for _ in range(200)]
    pairs += [("what?", "it."), ("line.\n", "12"), ("ends in a space ", "so does this "), ("", "")]
    for pair, encoded in zip(pairs, encoder_of(tokenizer, formats).encode(pairs), strict=True):
        assert encoded.ids.tolist() == tokenizer(whole_text(formats, *pair))["input_ids"], pair


def test_the_tokenizers_of_these_tests_join_what_they_should():
    for make, last in ((joining_tokenizer, 1), (cutting_as_gpt2, 2)):
        tokens = make().tokenize("a?\nb\n\nc")
        assert ("?Ċ" in tokens, tokens.count("Ċ")) == ((True, 0) if last == 1 else (False, 3))
    assert marking_every_section().tokenize("<s>a") == ["<s>", "▁a"]


def test_texts_are_cut_before_added_tokens_after_line_breaks_and_before_single_spaces():
    assert safe_split_points("\ndocument: ", "(?!)") == [1]
    assert safe_split_points("</q> | <d>", "(?!)") == [4, 6]
    assert safe_split_points("a  b\n c\t d\n\ne", "(?!)") == [5, 12], "white space goes together"
    assert safe_split_points("\n", "(?!)") == safe_split_points(" ", "(?!)") == safe_split_points("a\n", "(?!)") == []
    assert safe_split_points("\n/a", "(?!)") == [], "one token in some families"
    assert safe_split_points("a <s>b<s>\n", "<s>") == [2, 6], "the space before an added token is no part of it"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_special_token_of_white_space_alone_stays_whole_at_the_end(name):
    tokenizer, before = TOKENIZERS[name](), "<|im_end|>" if name in ("qwen", "gpt2") else "x\n"
    for special_token in ("\n", "\n\n", " ", "\t"):
        encoder = encoder_of(tokenizer, DEFAULTS | {"special_token": special_token})
        template = encoder.template
        alone = tokenizer(before + special_token)["input_ids"]
        assert template.document_end == () and template.suffix == alone[-len(template.suffix) :]
        assert tokenizer.decode(template.suffix) in (special_token, special_token[1:]), "llama's drops the first space"
        for pair in encoder.encode([("what?", "it."), ("what?", "")]):
            assert pair.ids[-len(template.suffix) :].tolist() == template.suffix


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_follows_a_text_stays_when_it_is_cut(name):
    tokenizer = TOKENIZERS[name]()
    encoder = encoder_of(tokenizer, FORMATS["nothing before the query"], 60)
    pair = encoder.encode([(" ".join(TEXTS), "words " * 99)])[0]
    text, line_break = tokenizer.decode(pair.ids), encoder.template.query_end
    assert len(pair) == 60 and pair.truncated
    assert "\nD: words" in text and text.endswith(".\nanswer:")
    end = pair.document_start
    assert tuple(pair.ids[end - len(line_break) : end]) == line_break != ()


def test_the_pairs_of_a_query_begin_alike_up_to_the_document_though_its_end_joins_the_format():
    encoder = encoder_of(joining_tokenizer(), DEFAULTS)
    pairs = encoder.encode([("what?", "it."), ("what?", "\nother"), ("what?", "")])
    length = len(encoder.tokenizer("query: what?\n")["input_ids"])
    assert make_batch(pairs).shared.tolist() == [0, length, length]


def test_bos_comes_once_whether_the_text_brings_it_or_not():
    tokenizer = llama_tokenizer()
    for query_format, document in itertools.product(("system\n{}", "<s>system\n{}", "{}", "<s>{}"), ("", "a")):
        formats = DEFAULTS | {"query_format": query_format}
        ids = encoder_of(tokenizer, formats).encode([("a", document)])[0].ids.tolist()
        text = whole_text(formats, "a", document)
        assert ids == tokenizer(text, add_special_tokens=not text.startswith("<s>"))["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_an_instruction_is_filled_in_where_there_is_one_and_plain_text_elsewhere():
    tokenizer = qwen2_tokenizer()
    formats = DEFAULTS | {"query_format": "{instruction}: {}"}
    texts = []
    for instruction in ("find {}", None):
        encoder = PairEncoder(tokenizer, decoder_template(tokenizer, **formats, instruction=instruction), 99)
        texts.append(tokenizer.decode(encoder.encode([("{instruction}", ENGLISH[0])])[0].ids))
    expected = f"{{instruction}}\ndocument: {ENGLISH[0]}\nrelevance"
    assert texts == [f"find {{}}: {expected}", f"{{instruction}}: {expected}"]


def test_a_tokenizer_that_ends_single_texts_with_eos_adds_none_here():
    tokenizer = llama_tokenizer()
    tokenizer.add_eos_token = True
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    pair = PairEncoder(tokenizer, decoder_template(tokenizer, **DEFAULTS), 64).encode([("a", "b")])[0]
    assert tokenizer.eos_token_id not in pair.ids
    assert pair.ids.tolist().count(tokenizer.bos_token_id) == 1


def test_a_format_without_exactly_one_pair_of_braces_is_refused():
    for name, text in itertools.product(("query_format", "document_format"), ("query:", "", "{} and {}", "{0}")):
        with pytest.raises(ValueError, match=f"{name} must contain {{}} exactly once.*found {text!r}"):
            decoder_template(qwen2_tokenizer(), **(DEFAULTS | {name: text}))


def test_a_special_token_without_tokens_is_refused():
    with pytest.raises(ValueError, match="special_token '' gives no token"):
        decoder_template(qwen2_tokenizer(), **(DEFAULTS | {"special_token": ""}))
