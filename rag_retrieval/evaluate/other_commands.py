"""The options of other evaluation commands, FlagEmbedding's and MindSpore's, so that these run here.

`docs/evaluation.md` has all of them in one table.
"""

from collections.abc import Mapping
from typing import Any

from rag_retrieval.core.config import ABSENT, shown_value
from rag_retrieval.train.embedding.other_trainers import is_true

ALIASES = {  # another name of a key of ours, with the same values
    "encoder": "retriever",
    "passage_model": "retriever",
    "passage_max_length": "max_length",
    "max_passage_length": "max_length",
    "max_query_length": "query_max_length",
    "index_factory": "faiss_index",
    "k": "depth",
}
INSTRUCTION = "Represent this sentence for searching relevant passages: "  # of FlagEmbedding's script, for queries
DICT_MEASURES = ("mrr@1", "mrr@10", "mrr@100", "recall@1", "recall@10", "recall@100")
DICT_NAMES = {"mrr": "MRR", "recall": "Recall", "ndcg": "nDCG", "map": "MAP", "p": "P", "err": "ERR"}
TRANSLATIONS = {  # what it means in our keys
    "fp16": lambda on: {"dtype": "fp16"} if on else {},
    "add_instruction": lambda on: {"prompts": {"query": INSTRUCTION if on else ""}},
}


def translate(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """(keys in our names, problems by key) of what a user of another command gives. Others stay as they are."""
    values, problems = dict(given), []
    for name, meaning in TRANSLATIONS.items():
        if (value := values.pop(name, None)) in ABSENT:
            continue
        try:
            meant = meaning(is_true(value))
        except ValueError as error:
            problems.append((name, f"{error}, found {shown_value(value)}"))
            continue
        both = meant.keys() & values
        problems += [(name, f"does not fit {key}, which is given too; keep one of the two") for key in both]
        values |= meant
    return values, problems


def as_dict(measures: Mapping[str, float]) -> dict[str, float]:
    """Means under the names of those commands: MRR@10 for mrr@10."""
    parts = {name: name.partition("@") for name in measures}
    return {DICT_NAMES[name] + at + k: measures[measure] for measure, (name, at, k) in parts.items()}
