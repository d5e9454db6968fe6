"""Decoders in sentence-transformers: equal raw scores for every head and family, and chats as they were."""

import json

import pytest
import torch
from tiny_models import CHINESE, ENGLISH, tiny_joining_qwen2, tiny_llama, tiny_qwen2
from transformers import AutoTokenizer
from yes_no_samples import YES_NO, prompt, tiny_causal

from rag_retrieval import LLMDecoder
from rag_retrieval.models.sentence_transformers_files import own_template
from rag_retrieval.models.settings import RerankerSettings

CHATML = (
    "\n{% for message in messages %}\n<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}  <|im_start|>assistant\n{% endif %}\n  "
)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?\n"}]
PAIRS = [
    ("what is it?", "A thing."),
    (ENGLISH[1], ENGLISH[2]),
    (CHINESE[0], CHINESE[1]),
    ("a line.\nand more ", " 😀 2 words"),
    ("", ""),
]
LONG = ("water", " ".join(ENGLISH))
SCALAR = {
    "defaults": {},
    "ends of sentences": dict(query_format="Q: {}.", document_format="D: {}!", seq="\n\n", special_token=" relevance"),
    "special tokens": dict(seq="</s>", special_token="</s>relevance"),
    "escapes": dict(query_format='"问题" \\ {}', seq="\t😀\n", special_token="'{{ x }}' {% if %}"),
}


def their_scores(folder, pairs, max_length: int) -> torch.Tensor:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device="cpu")
    assert isinstance(model.activation_fn, torch.nn.Identity) and model.max_seq_length == max_length
    return model.predict([list(pair) for pair in pairs], convert_to_tensor=True)


def assert_equal_scores(scorer: LLMDecoder, folder, pairs) -> None:
    scorer.save_pretrained(folder)
    scores = scorer.compute_score(pairs)
    assert scores.std() > 0.1
    torch.testing.assert_close(their_scores(folder, pairs, scorer.settings.max_len), scores, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gemma2"])
def test_a_yes_no_decoder_has_equal_scores(tmp_path, family):
    scorer = LLMDecoder.from_pretrained(tiny_causal(tmp_path / "base", family), **YES_NO)
    assert_equal_scores(scorer, tmp_path / "saved", PAIRS)


@pytest.mark.parametrize("make", [tiny_qwen2, tiny_joining_qwen2, tiny_llama])
@pytest.mark.parametrize("formats", SCALAR)
def test_a_scalar_decoder_has_equal_scores(tmp_path, make, formats):
    scorer = LLMDecoder.from_pretrained(make(tmp_path / "base", head_labels=1), **SCALAR[formats])
    assert_equal_scores(scorer, tmp_path / "saved", PAIRS)


@pytest.mark.parametrize("head", ["scalar", "yes_no"])
def test_a_document_is_cut_as_here_before_the_end_of_the_prompt(tmp_path, head):
    answers = head == "yes_no"
    base = tmp_path / "base"
    base = tiny_causal(base, "qwen2") if answers else tiny_joining_qwen2(base, head_labels=1)
    options = YES_NO | {"max_length": 190} if answers else {"max_length": 60}
    scorer = LLMDecoder.from_pretrained(base, **options)
    assert scorer.pair_encoder.encode([LONG])[0].truncated
    assert_equal_scores(scorer, tmp_path / "saved", [LONG, *PAIRS[:1]])


def test_the_template_gives_the_text_that_the_settings_say(tmp_path):
    LLMDecoder.from_pretrained(tiny_causal(tmp_path / "base", "qwen2"), **YES_NO).save_pretrained(tmp_path)
    messages = [{"role": "query", "content": "why? {}"}, {"role": "document", "content": "{{ so }}"}]
    rendered = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False)
    assert rendered == prompt("why? {}", "{{ so }}")


@pytest.fixture(scope="module")
def with_chat(tmp_path_factory) -> str:
    """A causal model whose tokenizer has a chat template, with line breaks and spaces where blocks begin and end."""
    folder = tmp_path_factory.mktemp("chat")
    tiny_causal(folder, "qwen2")
    (folder / "chat_template.jinja").write_text(CHATML)
    return str(folder)


def test_the_tokenizers_own_chats_are_rendered_as_before(with_chat, tmp_path):
    LLMDecoder.from_pretrained(with_chat, **YES_NO).save_pretrained(tmp_path)
    before, after = AutoTokenizer.from_pretrained(with_chat), AutoTokenizer.from_pretrained(tmp_path)
    for answers in (False, True):
        options = dict(tokenize=False, add_generation_prompt=answers)
        assert after.apply_chat_template(CHAT, **options) == before.apply_chat_template(CHAT, **options) != ""
    assert own_template(after) == own_template(before) == CHATML


def test_saving_what_was_saved_changes_no_file_of_it(with_chat, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    LLMDecoder.from_pretrained(with_chat, **YES_NO).save_pretrained(first)
    LLMDecoder.from_pretrained(first).save_pretrained(second)
    names = ("chat_template.jinja", "modules.json", "sentence_bert_config.json", "1_LogitScore/config.json")
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_template_alone_says_how_the_model_is_asked(with_chat, tmp_path):
    scorer = LLMDecoder.from_pretrained(with_chat, **YES_NO)
    scorer.save_pretrained(tmp_path)
    (tmp_path / "reranker_config.json").unlink()
    again = LLMDecoder.from_pretrained(tmp_path, head="yes_no")
    assert torch.equal(again.compute_score(PAIRS), scorer.compute_score(PAIRS))


def test_the_files_name_the_modules_the_two_tokens_and_the_limit(with_chat, tmp_path):
    scorer = LLMDecoder.from_pretrained(with_chat, **YES_NO, max_length=300)
    scorer.save_pretrained(tmp_path)
    names = ("modules", "sentence_bert_config", "config_sentence_transformers", "1_LogitScore/config")
    read = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in names}
    assert [module["path"] for module in read["modules"]] == ["", "1_LogitScore"]
    assert read["sentence_bert_config"]["max_seq_length"] == 300
    assert read["config_sentence_transformers"]["model_type"] == "CrossEncoder"
    yes, no = (scorer.tokenizer.convert_tokens_to_ids(token) for token in "ab")
    assert read["1_LogitScore/config"] == {"true_token_id": yes, "false_token_id": no}


def test_several_named_chat_templates_leave_the_default_one(with_chat):
    tokenizer = AutoTokenizer.from_pretrained(with_chat)
    tokenizer.chat_template = {"default": "{{ messages }}\n", "tool_use": "x"}
    assert own_template(tokenizer) == "{{ messages }}"
    tokenizer.chat_template = None
    assert own_template(tokenizer) == ""


def test_an_encoder_says_where_servers_cut(load_tiny, tmp_path):
    load_tiny("bert", max_length=100).save_pretrained(tmp_path)
    settings = RerankerSettings(**json.loads((tmp_path / "reranker_config.json").read_text()))
    limit = json.loads((tmp_path / "sentence_bert_config.json").read_text())["max_seq_length"]
    assert limit == settings.max_len == 100 and not (tmp_path / "modules.json").exists()
