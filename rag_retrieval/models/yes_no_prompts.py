"""What a causal language model is asked about a pair, by language: data, and the one check of such a text.

English is the prompt of the Qwen3-Reranker checkpoints, word for word: they were trained on it, and another one
changes their scores. `user` says where instruction, query and document stand; the query goes first, so that the
documents of one query share its computation.
"""

import json
from typing import NamedTuple

PLACES = ("{query}", "{document}")


class Prompt(NamedTuple):
    """yes_token, no_token: the answers, each one token of the model's tokenizer."""

    system: str
    instruction: str
    user: str
    yes_token: str
    no_token: str


USER = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"

PROMPTS = {
    "en": Prompt(
        system="Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".',
        instruction="Given a web search query, retrieve relevant passages that answer the query",
        user=USER,
        yes_token="yes",
        no_token="no",
    ),
    "zh": Prompt(
        system="请根据给出的 Instruct 和 Query，判断 Document 是否符合要求。注意：只能回答“是”或“否”。",
        instruction="给定一个搜索查询，找出能够回答该查询的段落",
        user=USER,
        yes_token="是",
        no_token="否",
    ),
}

# How Qwen3's chat template lays a system and a user text out with thinking switched off, up to the answer
QWEN3_CHAT = (
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
QWEN3_MARKUP = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")

# Answers that other prompts ask for, to suggest where a tokenizer cuts the wanted ones into several tokens
ANSWERS = (
    ("yes", "no"), ("Yes", "No"), ("YES", "NO"), (" yes", " no"), (" Yes", " No"), ("true", "false"),
    ("True", "False"), ("是", "否"), ("是", "不"), ("对", "错"), ("1", "0"), ("A", "B"),
)  # fmt: skip


def check_places(user: str) -> None:
    """Raises ValueError for a user text without the places of query and document in this order."""
    if [user.count(place) for place in PLACES] != [1, 1] or user.index(PLACES[0]) > user.index(PLACES[1]):
        raise ValueError(
            f"expected {{query}} and, after it, {{document}} in the prompt, each once; found {json.dumps(user)}"
        )
