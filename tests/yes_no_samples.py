"""Tiny causal models for the yes/no head, and the scores that transformers' own model gives with the same prompt."""

import torch
from tiny_models import HIDDEN, llama_tokenizer, qwen2_tokenizer, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, LlamaConfig, Qwen2Config, Qwen3Config

# of the tiny tokenizers "a" and "b" are one token each, as "yes" and "no" are of the real ones
TEXTS = dict(
    query_format="<|im_start|>system\nJudge. Answer a or b.<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n"
    "<Query>: {}",
    document_format="<Document>: {}",
    seq="\n",
    special_token="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    instruction="find the answer",
    yes_token="a",
    no_token="b",
)
YES_NO = TEXTS | {"head": "yes_no"}
CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig, "gemma2": Gemma2Config}


def tiny_causal(folder, family: str, *, tied: bool = False, **changes) -> str:
    tokenizer = llama_tokenizer() if family == "llama" else qwen2_tokenizer()
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
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return save_tiny(folder, CONFIGS[family](**shape | changes), tokenizer)


def prompt(query: str, document: str) -> str:
    """The whole text, put together by hand."""
    before = TEXTS["query_format"].replace("{instruction}", TEXTS["instruction"]).replace("{}", query)
    return before + TEXTS["seq"] + TEXTS["document_format"].replace("{}", document) + TEXTS["special_token"]


def transformers_scores(folder, pairs, tokens=("a", "b")) -> torch.Tensor:
    """log P(yes) - log P(no) of transformers' model, one pair at a time, without any of our code."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    yes, no = (tokenizer(token, add_special_tokens=False)["input_ids"][0] for token in tokens)
    scores = []
    for pair in pairs:
        with torch.no_grad():
            logits = model(tokenizer(prompt(*pair), return_tensors="pt")["input_ids"]).logits[0, -1]
        log_probabilities = logits.double().log_softmax(dim=0)
        scores.append(log_probabilities[yes] - log_probabilities[no])
    return torch.stack(scores).float()
