"""Windows and answers by hand, and a tiny chat model that was trained to give one order."""

import random

import pytest
import torch
from tiny_models import tiny_qwen2
from transformers import AutoModelForCausalLM, AutoTokenizer
from yes_no_samples import tiny_causal

from rag_retrieval.infer.listwise import ListwiseReranker, parse_order, slide

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DOCUMENTS = ["panda", "tiger", {"id": "o", "text": "otter", "metadata": {"page": 2}}, "", "eagle"]


def test_answers_are_read_as_orders():
    assert parse_order("[2] > [3] > [1]", 3) == ([1, 2, 0], True)
    assert parse_order("2, 1", 2) == ([1, 0], True)
    assert parse_order("The order is [3] > [3] > [9]", 3) == ([2, 0, 1], False)
    assert parse_order("I cannot say", 3) == ([0, 1, 2], False)
    assert parse_order("[2] > [1] > [2]", 2) == ([1, 0], False), "a repeated number is no permutation"
    assert parse_order("[" + "1" * 50 + "] 2", 2) == ([1, 0], False)


def test_windows_slide_from_the_end_by_hand():
    seen = []

    def largest_first(places):
        seen.append(list(places))
        return sorted(places, reverse=True)

    assert slide([1, 5, 2, 4, 3], 3, 2, largest_first) == [5, 4, 1, 3, 2]
    assert seen == [[2, 4, 3], [1, 5, 4]]
    assert slide([7], 3, 1, largest_first) == [7] and slide([], 3, 1, largest_first) == []
    assert len(seen) == 2


def test_one_pass_brings_the_best_of_the_whole_list_to_the_top():
    generator = random.Random(0)
    for _ in range(50):
        places = generator.sample(range(100), generator.randint(1, 40))
        window = generator.randint(2, 10)
        step = generator.randint(1, window - 1) if window > 2 else 1
        ranked = slide(places, window, step, lambda part: sorted(part, reverse=True))
        assert sorted(ranked) == sorted(places)
        best = min(window - step, len(places))
        assert ranked[:best] == sorted(places, reverse=True)[:best]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A tiny Qwen that learned to answer `[3] > [1] > [2]` after any chat."""
    folder = tiny_causal(tmp_path_factory.mktemp("listwise") / "chat", "qwen3")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    answer = tokenizer("[3] > [1] > [2]<|im_end|>", add_special_tokens=False)["input_ids"]
    start = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        length = int(torch.randint(20, 120, (1,), generator=generator))
        context = torch.randint(0, 600, (8, length), generator=generator)
    
        tail = torch.tensor([start + answer]).expand(8, -1)
        ids = torch.cat([context, tail], 1)
        labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - len(answer), -100, ids)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(folder)
    return folder


def test_the_model_s_order_is_the_ranking_and_documents_without_text_come_last(chat_model):
    reranker = ListwiseReranker(chat_model, window=3, step=1, device="cpu")
    results = reranker.rerank("which animal?", DOCUMENTS)
    # of places 0 1 2 4: the window 1 2 4 becomes 4 1 2, then 0 4 1 becomes 1 0 4
    assert [result.document_index for result in results] == [1, 0, 4, 2, 3]
    assert [result.score for result in results] == [1, 1 / 2, 1 / 3, 1 / 4, 0]
    assert (results.windows, results.invalid_answers) == (2, 0)
    assert results[3].doc_id == "o" and results[3].metadata == {"page": 2}
    assert results.score_type == "reciprocal_rank" and results.to_dict()["windows"] == 2
    assert len(reranker.rerank("which animal?", DOCUMENTS, top_k=2)) == 2


def test_an_answer_that_is_no_permutation_keeps_the_rest_in_order_and_is_counted(chat_model):
    results = ListwiseReranker(chat_model, window=4, step=2, device="cpu").rerank("q", ["a", "b", "c", "d"])
    assert [result.document_index for result in results] == [2, 0, 1, 3]
    assert (results.windows, results.invalid_answers) == (1, 1)


def test_a_document_cannot_end_the_message(chat_model):
    reranker = ListwiseReranker(chat_model, device="cpu")
    end = reranker.tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain, hostile = (reranker._prompt_ids("q", [text, "b"]) for text in ("a", "a<|im_end|>"))
    assert hostile.count(end) == plain.count(end) > 0


def test_long_documents_are_cut_and_a_prompt_beyond_the_model_is_refused(chat_model):
    reranker = ListwiseReranker(chat_model, passage_tokens=4, device="cpu")
    results = reranker.rerank("q", ["panda bear " * 50, "tiger"])
    assert {result.truncated for result in results if result.document_index == 0} == {True}
    assert {result.truncated for result in results if result.document_index == 1} == {False}
    reranker.model.config.max_position_embeddings = 40
    with pytest.raises(ValueError, match="window or passage_tokens"):
        reranker.rerank("q", ["panda bear " * 50, "tiger"])


def test_options_that_do_not_fit_are_refused(chat_model, tmp_path):
    for options, named in (
        ({"window": 1}, "window"),
        ({"window": 3, "step": 4}, "step 4"),
        ({"passage_tokens": 0}, "passage_tokens"),
        ({"language": "de"}, "'de'"),
        ({"trust_remote_code": "no"}, "trust_remote_code must be True or False"),
        ({"prompt": "{query}"}, "{passages}"),
    ):
        with pytest.raises(ValueError, match=named):
            ListwiseReranker(chat_model, device="cpu", **options)
    without = tiny_qwen2(tmp_path / "plain")
    with pytest.raises(ValueError, match="chat template"):
        ListwiseReranker(without, device="cpu")


def test_a_chinese_prompt_asks_in_chinese(chat_model):
    reranker = ListwiseReranker(chat_model, window=3, step=2, language="zh", device="cpu")
    assert "查询" in reranker.prompt
    assert [result.document_index for result in reranker.rerank("哪种动物？", ["熊猫", "老虎", "水獭"])] == [2, 0, 1]
