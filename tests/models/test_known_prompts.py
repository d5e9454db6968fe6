"""Known prompts: recognised from files alone, written word for word, scored as the models' own code does it."""

import json
from pathlib import Path

import pytest
import torch
from sentence_transformers import CrossEncoder as TheirCrossEncoder
from tiny_models import HIDDEN, bert_tokenizer, qwen2_tokenizer, save_tiny, tiny_bert
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaConfig, Qwen2Config, Qwen3Config

from rag_retrieval import Reranker
from rag_retrieval.models.prompts import known_prompts

CONFIGS = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "gemma": GemmaConfig}
PAIRS = [["where is Paris", "Paris is in France"], ["感冒", "发烧 and cough, or rest"], ["a", "water " * 30]]

# the prompts as the models' own code puts them together
QWEN3 = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n"
    "<think>\n\n</think>\n\n"
)
QWEN3_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
MXBAI = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{instruction}query: {query}\ndocument: {document}\nYou are a search relevance expert who "
    "evaluates how well documents match search queries. For each query-document pair, carefully analyze the semantic "
    "relationship between them, then provide your binary relevance judgment (0 for not relevant, 1 for relevant).\n"
    "Relevance:<|im_end|>\n<|im_start|>assistant\n"
)
GEMMA = (
    "A: {query}\nB: {document}\nGiven a query A and a passage B, determine whether the passage contains an answer to "
    "the query by providing a prediction of either 'Yes' or 'No'."
)


def tokenizer_with_answers():
    """The real ones have each answer as one token; here they are added. "1" and "0" are tokens anyway."""
    tokenizer = qwen2_tokenizer()
    tokenizer.add_tokens([AddedToken(text, single_word=True) for text in ("yes", "no", "Yes", "No")])
    return tokenizer


def tiny_answering(folder: Path, family: str, *, labels: int = 0, **changes) -> Path:
    tokenizer = tokenizer_with_answers()
    shape = dict(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        head_dim=16,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    save_tiny(folder, CONFIGS[family](**shape | changes), tokenizer, head_labels=labels)
    return folder


def with_name(folder: Path, name: str) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_name_or_path": name}))
    return folder


def with_card(folder: Path, text: str) -> Path:
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


@torch.no_grad()
def slow_scores(folder: Path, texts: list[str], yes: str, no: str | None) -> list[float]:
    """The logit of yes, less that of no, after each whole text, by transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    scores = []
    for text in texts:
        logits = model(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits[0, -1]
        tokens = [tokenizer.convert_tokens_to_ids(token) for token in (yes, no) if token is not None]
        scores.append((logits[tokens[0]] - (logits[tokens[1]] if no is not None else 0)).item())
    return scores


def test_qwen3_reranker_is_scored_as_its_card_says(tmp_path):
    folder = with_name(tiny_answering(tmp_path, "qwen3"), "Qwen/Qwen3-Reranker-0.6B")
    texts = [QWEN3.format(instruction=QWEN3_INSTRUCTION, query=query, document=document) for query, document in PAIRS]
    found = Reranker(folder, device="cpu").compute_score(PAIRS)
    assert found == pytest.approx(slow_scores(folder, texts, "yes", "no"), abs=1e-4)
    asked = Reranker(folder, device="cpu", instruction="find code").compute_score(PAIRS)
    texts = [QWEN3.format(instruction="find code", query=query, document=document) for query, document in PAIRS]
    assert asked == pytest.approx(slow_scores(folder, texts, "yes", "no"), abs=1e-4)


def test_mxbai_rerank_v2_is_scored_as_its_package_does(tmp_path):
    folder = with_name(tiny_answering(tmp_path, "qwen2"), "mixedbread-ai/mxbai-rerank-base-v2")
    for instruction, line in ((None, ""), ("find code", "instruction: find code\n")):
        texts = [MXBAI.format(instruction=line, query=query, document=document) for query, document in PAIRS]
        found = Reranker(folder, device="cpu", instruction=instruction).compute_score(PAIRS)
        assert found == pytest.approx(slow_scores(folder, texts, "1", "0"), abs=1e-4)


def test_bge_reranker_v2_gemma_is_scored_by_the_logit_of_yes_alone(tmp_path):
    folder = with_name(tiny_answering(tmp_path, "gemma"), "BAAI/bge-reranker-v2-gemma")
    texts = [GEMMA.format(query=query, document=document) for query, document in PAIRS]
    reranker = Reranker(folder, device="cpu")
    assert reranker.compute_score(PAIRS) == pytest.approx(slow_scores(folder, texts, "Yes", None), abs=1e-4)
    reranker.backend.scorer.save_pretrained(tmp_path / "saved")
    saved = Reranker(tmp_path / "saved", device="cpu")
    assert saved.compute_score(PAIRS).tolist() == reranker.compute_score(PAIRS).tolist()
    with pytest.raises(ValueError, match=r"neither query_format nor document_format has \{instruction\}"):
        Reranker(folder, device="cpu", instruction="find code")


def test_a_copy_with_a_classification_head_gets_the_same_prompt(tmp_path):
    folder = with_name(tiny_answering(tmp_path, "qwen3", labels=1), "Qwen/Qwen3-Reranker-0.6B")
    for instruction in (None, "find code"):
        reranker = Reranker(folder, device="cpu", instruction=instruction)
        encoder = reranker.backend.pair_encoder
        text = QWEN3.format(instruction=instruction or QWEN3_INSTRUCTION, query="where", document="here")
        assert encoder.tokenizer.decode(encoder.encode([("where", "here")])[0].ids) == text
        assert reranker.backend.scorer.settings.head is None
    folder = with_name(tiny_answering(tmp_path / "gemma", "gemma", labels=1), "bge-reranker-v2-gemma")
    with pytest.raises(ValueError, match=r"has \{instruction\}"):
        Reranker(folder, device="cpu", instruction="find code")


CARDS = {
    "of what it was made from": "---\nbase_model: Qwen/Qwen3-Reranker-0.6B\n---\n# A model\n",
    "of a list of them": "---\nbase_model:\n- Qwen/Qwen3-Reranker-0.6B\ntags: [a]\n---\n",
    "that names it": "---\nlicense: mit\n---\n# Qwen3-Reranker-0.6B\n\ntext",
    "that shows the prompt": "# x\n" + QWEN3,
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_model_is_recognised_by_its_card(card, tmp_path):
    folder = with_card(tiny_answering(tmp_path, "qwen3"), card)
    assert Reranker(folder, device="cpu").backend.scorer.settings.yes_token == "yes"


@pytest.mark.parametrize(
    ("family", "card"),
    [
        ("qwen3", "# Another\n\nBetter than Qwen3-Reranker-0.6B."),
        ("qwen3", "---\nbase_model: Qwen/Qwen3-0.6B\n---\n"),
        ("qwen3", "---\n: [broken\n---\n"),
        ("qwen3", "---\njust text\n---\n"),
        ("qwen2", "# Qwen3-Reranker-0.6B"),
    ],
)
def test_a_mention_or_another_family_is_no_evidence(family, card, tmp_path):
    folder = with_card(tiny_answering(tmp_path, family), card)
    with pytest.raises(ValueError, match="does not say which prompt"):
        Reranker(folder, device="cpu")


def test_settings_given_win_over_known_ones(tmp_path):
    folder = with_name(tiny_answering(tmp_path, "qwen3"), "Qwen/Qwen3-Reranker-0.6B")
    settings = Reranker(folder, device="cpu", yes_token="Yes", no_token="No", seq=" | ").backend.scorer.settings
    assert (settings.yes_token, settings.no_token, settings.seq) == ("Yes", "No", " | ")
    assert settings.query_format == known_prompts()[0].query_format


def test_head_yes_no_alone_asks_the_question_of_qwen3_reranker_of_any_language_model(tmp_path):
    folder = tiny_answering(tmp_path, "qwen2")
    chat = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    (folder / "chat_template.jinja").write_text(chat)
    encoder = Reranker(folder, device="cpu", head="yes_no").backend.pair_encoder
    text = encoder.tokenizer.decode(encoder.encode([("where", "here")])[0].ids)
    assert text.startswith("[system] Judge whether") and "<Query>: where\n<Document>: here" in text


TEMPLATE = (
    '{%- set instruction = messages | selectattr("role", "eq", "system") | map(attribute="content") | first '
    '| default("the default one") -%}\n'
    '{%- set query = messages | selectattr("role", "eq", "query") | map(attribute="content") | first -%}\n'
    '{%- set document = messages | selectattr("role", "eq", "document") | map(attribute="content") | first -%}\n'
    "<|im_start|>Is it so? {{ instruction }}\nQ: {{ query }}\nD: {{ document }}<|im_end|>\nanswer:\n\n"
)


@pytest.mark.parametrize("prompt", [None, "find code"])
@pytest.mark.parametrize("labels", [0, 1], ids=["an answer", "a classification head"])
def test_a_decoder_saved_by_sentence_transformers_is_scored_as_there(labels, prompt, tmp_path):
    folder = tiny_answering(tmp_path / "base", "qwen3", labels=labels)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    options = {} if prompt is None else {"prompts": {"web": prompt}, "default_prompt_name": "web"}
    theirs = TheirCrossEncoder(str(folder), device="cpu", **options)
    expected = theirs.predict([tuple(pair) for pair in PAIRS], activation_fn=torch.nn.Identity(), batch_size=1)
    theirs.save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "modules.json").is_file()
    reranker = Reranker(tmp_path / "saved", device="cpu")
    assert reranker.compute_score(PAIRS) == pytest.approx(expected, abs=1e-4)
    encoder = reranker.backend.pair_encoder
    text = encoder.tokenizer.decode(encoder.encode([("where", "here")])[0].ids)
    assert text == f"<|im_start|>Is it so? {prompt or 'the default one'}\nQ: where\nD: here<|im_end|>\nanswer:\n"


def test_every_known_prompt_has_its_places_and_says_where_it_is_from():
    assert len(known_prompts()) >= 3
    for prompt in known_prompts():
        assert prompt.query_format.count("{}") == prompt.document_format.count("{}") == 1
        assert prompt.source and prompt.models and prompt.names and prompt.words and prompt.yes_token
        assert (prompt.instruction is not None) == ("{instruction}" in prompt.query_format)


def test_an_encoder_needs_no_prompt_whatever_its_card_says(tmp_path):
    folder = Path(tiny_bert(tmp_path, head_labels=1))
    with_card(folder, CARDS["that names it"])
    assert Reranker(folder, device="cpu").backend.pair_encoder.template.prefix == [bert_tokenizer().cls_token_id]
