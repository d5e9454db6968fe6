"""Which values of a mining configuration do not fit each other, though each is valid by itself.

Easy to get wrong: the checks also run when some keys are invalid. `values` then lacks those, and a check that
needs one of them must stay silent. A None that is there says "not given".
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

OUTPUT_SUFFIXES = (".jsonl", ".jsonl.gz")
DENSE_DEFAULTS = {"dense_batch_size": 32, "similarity": "cosine", "vector_dtype": "float16"}
DENSE_KEYS = (
    "dense_model", "pooling", "query_prefix", "document_prefix", "dense_max_len", "faiss_index", *DENSE_DEFAULTS
)  # fmt: skip
MARGINS = ("absolute_margin", "relative_margin", "max_score")


def cross_field_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, message) for valid values that do not fit each other. Invalid keys are missing in `values`."""
    yield from _check_data(values)
    yield from _check_dense(values)
    yield from _check_window(values)
    yield from _check_margins(values)


def _check_data(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "output" in values and not values["output"].endswith(OUTPUT_SUFFIXES):
        yield "output", f"expected a name that ends in {' or '.join(OUTPUT_SUFFIXES)}, found {values['output']}"
    if "corpus" not in values or not os.path.exists(values.get("data", "")):
        return
    if is_beir(values):
        if values["corpus"] is not None:
            yield "corpus", "is only for a file of records, and data is a folder, which has its own corpus; remove it"
    elif values["corpus"] is None:
        yield "corpus", "is missing; a file of records needs the documents to mine from: add corpus"
    if not is_beir(values) and values.get("split") is not None:
        yield "split", "is only for a folder in BEIR layout, and data is a file; remove it"


def _check_dense(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    candidates = values.get("candidates")
    if candidates == "bm25":
        for key in DENSE_KEYS:
            if values.get(key) is not None:
                yield key, "is only for candidates dense and fused, and candidates is bm25; remove it"
    if candidates in ("dense", "fused") and values.get("dense_model", "invalid") is None:
        yield "dense_model", f"is missing; candidates {candidates} needs a model for the vectors"


def _check_window(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not {"first_rank", "last_rank", "num_negatives"} <= values.keys():
        return
    first, last, wanted = values["first_rank"], values["last_rank"], values["num_negatives"]
    if last < first:
        yield "last_rank", f"expected at least first_rank, {first}, found {last}"
    elif last - first + 1 < wanted:
        found = f"ranks {first} to {last} hold {last - first + 1} candidates"
        yield "num_negatives", f"{found}, which cannot give {wanted} negatives; widen the window or ask for fewer"


def _check_margins(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if values.get("candidates") == "fused" and values.get("reranker", "invalid") is None:
        for key in MARGINS:
            if values.get(key) is not None:
                yield key, "compares scores, and fused candidates have ranks alone; add a reranker or remove this"


def derived_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for keys not given, from the values of other keys. `values` are valid and fit each other."""
    derived = {"split": "train"} if is_beir(values) else {}
    if values["candidates"] != "bm25":
        derived |= DENSE_DEFAULTS
    if values["reranker"] is not None and all(values[key] is None for key in MARGINS):
        derived["absolute_margin"] = 0.0
    return derived


def is_beir(values: Mapping[str, Any]) -> bool:
    return os.path.isdir(values["data"])


def summary_file(output: str) -> Path:
    """`train.jsonl.gz` to `train.summary.json`, in the same folder."""
    return Path(output.removesuffix(".gz").removesuffix(".jsonl") + ".summary.json")
