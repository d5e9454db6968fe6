"""The question around a pair: Qwen3-Reranker's own text, chat templates of other families, tokens of the whole text."""

import random

import pytest
from tiny_models import TEXTS, joining_tokenizer, llama_tokenizer, qwen2_tokenizer
from tokenizers import AddedToken

from rag_retrieval.models.decoder_template import decoder_template
from rag_retrieval.models.pair_encoding import PairEncoder
from rag_retrieval.models.prompts import PROMPTS, answer_tokens, chat_formats

# as the model card of Qwen3-Reranker-0.6B writes it
CARD_PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
CARD_PAIR = (
    "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n<Query>: {query}\n"
    "<Document>: {document}"
)
CARD_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = CHATML.replace("assistant\n", "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}")
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[INST] {{ m.content | trim }} [/INST]{% endfor %}"
)
OTHER_ROLES = "{% for m in messages if m.role == 'query' %}{{ m.content }}{% endfor %}"


def qwen3_tokenizer(chat_template: str | None = None):
    """With Qwen's joined tokens of a sign and a line break."""
    tokenizer = joining_tokenizer()
    assert len(tokenizer("a?\nb.\n\nc")["input_ids"]) == 5 + 1
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    tokenizer.chat_template = chat_template
    return tokenizer


def default_formats(tokenizer) -> dict[str, str]:
    return chat_formats(tokenizer, PROMPTS["en"].system, PROMPTS["en"].user)


def random_text(generator: random.Random) -> str:
    """Words, Chinese, signs and white space in any order; no white space at the beginning."""
    words = [*" ".join(TEXTS).split(), "龘", "😀", "don't", "?", ".\n", "\n\n", "  ", "7", "(", "<Query>"]
    return generator.choice(["", " "]).join(generator.choices(words, k=generator.randint(0, 12))).lstrip()


def filled(formats: dict[str, str], query: str, document: str, instruction: str) -> str:
    text = formats["query_format"].replace("{}", query) + formats["seq"]
    text += formats["document_format"].replace("{}", document) + formats["special_token"]
    return text.replace("{instruction}", instruction)


@pytest.mark.parametrize("chat_template", [None, QWEN3, OTHER_ROLES], ids=["none", "qwen3", "of a reranker"])
def test_the_default_prompt_is_that_of_the_qwen3_reranker_model_card(chat_template):
    formats = default_formats(qwen3_tokenizer(chat_template))
    expected = CARD_PREFIX + CARD_PAIR.format(query="q?", document="d.") + CARD_SUFFIX
    assert filled(formats, "q?", "d.", PROMPTS["en"].instruction) == expected


def test_a_chat_template_lays_the_prompt_out():
    formats = chat_formats(qwen3_tokenizer(CHATML), "System.", "Q {query} D {document} ?")
    assert formats == {
        "query_format": "<|im_start|>system\nSystem.<|im_end|>\n<|im_start|>user\nQ {}",
        "seq": " D ",
        "document_format": "{}",
        "special_token": " ?<|im_end|>\n<|im_start|>assistant\n",
    }


def test_a_family_that_refuses_a_system_message_gets_it_in_the_user_s():
    tokenizer = llama_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    formats = chat_formats(tokenizer, "System.", "Q {query} D {document}")
    assert filled(formats, "q", "d", "") == "[INST] System.\n\nQ q D d [/INST]"


def test_without_a_system_text_there_is_no_system_message():
    formats = chat_formats(qwen3_tokenizer(CHATML), "", "{query} {document}")
    assert formats["query_format"] == "<|im_start|>user\n{}"


def test_without_chat_template_and_markup_the_formats_are_asked_for():
    with pytest.raises(ValueError, match="no chat template that takes a system and a user message; give query_format"):
        default_formats(llama_tokenizer())


@pytest.mark.parametrize("user", ["{document} {query}", "{query}", "{query} {query} {document}"])
def test_a_prompt_without_its_two_places_in_order_is_refused(user):
    with pytest.raises(ValueError, match="expected {query} and, after it, {document} in the prompt, each once"):
        chat_formats(qwen3_tokenizer(CHATML), "", user)


@pytest.mark.parametrize("language", PROMPTS)
def test_tokens_are_those_of_the_whole_text_in_one_go(language):
    tokenizer, prompt = qwen3_tokenizer(QWEN3), PROMPTS[language]
    formats = chat_formats(tokenizer, prompt.system, prompt.user)
    template = decoder_template(tokenizer, **formats, instruction=prompt.instruction)
    encoder = PairEncoder(tokenizer, template, 1024)
    generator = random.Random(5)
    pairs = [(random_text(generator), random_text(generator)) for _ in range(60)]
    pairs += [("what?", "it."), ("line.\n", "12"), ("", "")]
    for (query, document), pair in zip(pairs, encoder.encode(pairs), strict=True):
        text = filled(formats, query, document, prompt.instruction)
        assert pair.ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"], (query, document)
        assert not pair.truncated


def test_an_answer_of_several_tokens_is_refused_with_what_there_is_instead():
    with pytest.raises(ValueError) as caught:
        answer_tokens(qwen2_tokenizer(), "yes", "no")
    assert str(caught.value) == (
        "yes_token 'yes' must be one token, and this tokenizer makes 2 of it (y, es); one token each here: "
        "'1' and '0', 'A' and 'B'"
    )
    with pytest.raises(ValueError, match="no_token 'nein' must be one token"):
        answer_tokens(qwen2_tokenizer(), "a", "nein")
    with pytest.raises(ValueError, match="are the same token; give two answers"):
        answer_tokens(qwen2_tokenizer(), "a", "a")
