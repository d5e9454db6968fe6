"""Lexical weights as dicts, and the names of tokens in four families of tokenizers."""

import numpy as np
import pytest
from tiny_models import bert_tokenizer, llama_tokenizer, qwen2_tokenizer, xlm_roberta_tokenizer
from tokenizers import Tokenizer, decoders
from tokenizers.models import Unigram, WordLevel

from rag_retrieval.infer.encoded_texts import LexicalWeights, token_name

WORDS = Tokenizer(WordLevel({"a": 0, "panda": 1, "bear": 2, "is": 3}, unk_token="a"))


def weights_of(*texts) -> LexicalWeights:
    pairs = [(np.array(list(text), np.int64), np.array(list(text.values()), np.float32)) for text in texts]
    return LexicalWeights.of(pairs, WORDS)


def test_a_text_is_a_dict_with_the_largest_weight_first():
    lexical = weights_of({0: 0.25, 1: 0.5, 3: 0.0}, {}, {1: 0.125, 2: 2.0})
    assert list(lexical) == [{"panda": 0.5, "a": 0.25}, {}, {"bear": 2.0, "panda": 0.125}]
    assert [list(text) for text in lexical] == [["panda", "a"], [], ["bear", "panda"]]
    assert lexical[-1] == lexical[2] and lexical[:2] == [lexical[0], {}] and len(lexical) == 3
    assert lexical.by_id(2) == {2: 2.0, 1: 0.125}
    assert lexical.ids.tolist() == [0, 1, 1, 2] and lexical.starts.tolist() == [0, 2, 2, 4]
    with pytest.raises(IndexError):
        lexical[3]
    assert len(weights_of()) == 0


@pytest.mark.parametrize("make", [bert_tokenizer, xlm_roberta_tokenizer, qwen2_tokenizer, llama_tokenizer])
def test_no_two_tokens_have_the_same_name(make):
    tokenizer = make().backend_tokenizer
    vocabulary = tokenizer.get_vocab()
    names = {token_name(tokenizer, token) for token in vocabulary.values()}
    assert len(names) == len(vocabulary) > 500
    assert all(name.strip() for name in names)


def test_a_token_that_begins_with_several_marks_keeps_them():
    tokenizer = Tokenizer(Unigram([("<unk>", 0.0), ("▁x", -1.0), ("▁▁x", -2.0), ("▁▁", -3.0)], 0))
    tokenizer.decoder = decoders.Metaspace()
    assert [token_name(tokenizer, token) for token in range(4)] == ["<unk>", "x", "▁▁x", "▁▁"]


def test_a_word_is_named_without_the_mark_of_its_beginning():
    makers = (bert_tokenizer, xlm_roberta_tokenizer, qwen2_tokenizer)
    bert, roberta, qwen2 = (make().backend_tokenizer for make in makers)
    assert roberta.token_to_id("▁and") and roberta.token_to_id("and") is None
    assert token_name(roberta, roberta.token_to_id("▁and")) == "and"
    assert roberta.token_to_id("▁a") and roberta.token_to_id("a")
    assert [token_name(roberta, roberta.token_to_id(token)) for token in ("▁a", "a")] == ["▁a", "a"]
    assert token_name(bert, bert.token_to_id("##er")) == "##er"
    assert token_name(qwen2, qwen2.token_to_id("Ġand")) == "and"
    (first, *_) = qwen2.encode("北").ids
    assert token_name(qwen2, first) == qwen2.id_to_token(first)  # a part of a character
    assert token_name(WORDS, 9) == "[9]"
