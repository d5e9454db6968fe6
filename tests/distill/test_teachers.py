"""What can teach: rerankers of ours and of others, language models that are asked; and what cannot."""

import numpy as np
import pytest
import torch
from tiny_models import ENGLISH, tiny_bert, tiny_qwen2
from transformers import AutoModelForCausalLM, AutoTokenizer
from yes_no_samples import YES_NO, tiny_causal

from rag_retrieval import CrossEncoder, LLMDecoder, Reranker
from rag_retrieval.distill.config import DistillConfig
from rag_retrieval.distill.run import TeacherError, load_teachers, mean_logits
from rag_retrieval.infer.torch_backend import TorchBackend

PAIRS = [(query, document) for query in ENGLISH[:3] for document in ENGLISH[3:6]]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CPU = torch.device("cpu")


def config(*teachers, **changes) -> DistillConfig:
    keys = {"dataset": "d.jsonl", "output": "o.jsonl", "yes_token": "1", "no_token": "0"}
    return DistillConfig(**keys | {"teachers": [str(name) for name in teachers]} | changes)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> str:
    folder = tiny_causal(tmp_path_factory.mktemp("chat"), "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def test_a_language_model_is_asked_in_its_own_chat_template(chat_model):
    prompt = "Is this right? {instruction}\nQ: {query}\nD: {document}\n1 or 0?"
    asked = config(chat_model, system="Be strict.", instruction="find facts", prompt=prompt)
    scores = mean_logits(load_teachers(asked, CPU), PAIRS, 4)
    tokenizer, model = AutoTokenizer.from_pretrained(chat_model), AutoModelForCausalLM.from_pretrained(chat_model)
    yes, no = tokenizer.convert_tokens_to_ids(["1", "0"])
    for (query, document), score in zip(PAIRS, scores.tolist(), strict=True):
        user = f"Is this right? find facts\nQ: {query}\nD: {document}\n1 or 0?"
        messages = [{"role": "system", "content": "Be strict."}, {"role": "user", "content": user}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            probabilities = model.eval()(ids).logits[0, -1].double().softmax(dim=0)
        expected = (probabilities[yes] / probabilities[no]).log().float()
        torch.testing.assert_close(torch.tensor(score), expected, atol=1e-5, rtol=1e-5)


def test_the_language_changes_the_question(chat_model):
    english, chinese = (
        mean_logits(load_teachers(config(chat_model, language=language), CPU), PAIRS, 9) for language in ("en", "zh")
    )
    assert not np.allclose(english, chinese, atol=1e-3)


def test_a_reranker_saved_here_brings_its_own_question(tmp_path, chat_model):
    LLMDecoder.from_pretrained(chat_model, **YES_NO).save_pretrained(tmp_path)
    (teacher,) = load_teachers(config(tmp_path, prompt="Other {query} {document}"), CPU)
    settings = teacher.backend.scorer.settings
    assert settings.query_format == YES_NO["query_format"] and settings.yes_token == "a"
    expected = LLMDecoder.from_pretrained(tmp_path).compute_score(PAIRS).tolist()
    assert mean_logits([teacher], PAIRS, 9).tolist() == expected


def test_scores_of_several_teachers_are_the_mean_of_their_logits(model_folders, load_tiny, chat_model, tmp_path):
    load_tiny("llama").save_pretrained(tmp_path)
    teachers = load_teachers(config(model_folders["bert"], tmp_path, chat_model, max_len=200), CPU)
    scorers = [teacher.backend.scorer for teacher in teachers]
    assert [type(scorer) for scorer in scorers] == [CrossEncoder, LLMDecoder, LLMDecoder]
    assert [scorer.settings.head for scorer in scorers] == [None, None, "yes_no"]
    expected = sum(scorer.compute_score(PAIRS).double() for scorer in scorers) / 3
    np.testing.assert_allclose(mean_logits(teachers, PAIRS, 256), expected.numpy(), rtol=1e-6)
    assert {teacher.max_length for teacher in teachers} == {200}


def test_what_cannot_teach_is_refused(tmp_path, chat_model):
    with pytest.raises(ValueError, match="teachers: .*BertModel.*Give a reranker"):
        load_teachers(config(tiny_bert(tmp_path / "base")), CPU)
    with pytest.raises(ValueError, match="yes_token 'yes' must be one token.*'1' and '0', 'A' and 'B'"):
        load_teachers(config(chat_model, yes_token="yes"), CPU)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        load_teachers(config(tiny_qwen2(tmp_path / "no-chat")), CPU)


def test_half_precision_weights_are_loaded_on_request(model_folders):
    (teacher,) = load_teachers(config(model_folders["bert"], dtype="bfloat16"), CPU)
    assert teacher.backend.scorer.model.dtype == torch.bfloat16


def test_a_score_that_is_not_finite_stops_the_run(load_tiny):
    teacher = load_tiny("bert")
    with torch.no_grad():
        teacher.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(TeacherError, match="query 'A reranker reads.*nan"):
        mean_logits([Reranker.from_backend(TorchBackend(teacher))], PAIRS, 9)
