"""Ranking records and their files for the tests of records and of the store, and what a store gives back.

Two writers, because they serve two ends: `write_lines` also writes what is no record, byte by byte; `write`
keeps text as UTF-8, as real files have it.
"""

import gzip
import json
import random

import pytest

from rag_retrieval.data.readers import read_records
from rag_retrieval.data.records import DataError, RecordRules

GOOD = {"query": "q", "content": "d", "label": 1}


def write_lines(path, lines):
    """Lines as given where they are text or bytes, else as JSON."""
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    data = b"".join(line + b"\n" for line in encoded)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path, split="train", **rules):
    return list(read_records(path, RecordRules(**rules), split=split))


def error_of(path, **rules):
    with pytest.raises(DataError) as caught:
        read(path, **rules)
    return str(caught.value)


def write(path, records):
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def pointwise(*triples):
    return [{"query": query, "content": content, "label": label} for query, content, label in triples]


def hits(query, *labels):
    return {"query": query, "hits": [{"content": f"{query}{i}", "label": x} for i, x in enumerate(labels)]}


def random_records(seed, count):
    """Records of all formats, with queries that come back later, Chinese text and empty documents."""
    rng = random.Random(seed)
    words = ["重排", "score", "", "é😀", "a b"]

    def document():
        return f"{rng.choice(words)}{rng.randrange(9)}" if rng.random() < 0.9 else ""

    for _ in range(count):
        query = f"q{rng.randrange(12)}{rng.choice(['', '中'])}"
        kind = rng.choice(["pointwise", "pointwise", "hits", "pos", "scores"])
        many = rng.randrange(4)
        if kind == "pointwise":
            yield {"query": query, "content": document(), "label": rng.choice([0, 1, 2, 0.99988])}
        elif kind == "hits":
            labelled = [{"content": document(), "label": rng.randrange(2)} for _ in range(many + 1)]
            yield {"query": query, "hits": labelled}
        elif kind == "pos":
            yield {"query": query, "pos": [document()], "neg": [document() for _ in range(many)]}
        else:
            record = {"query": query, "pos": [document()], "neg": [document() for _ in range(many)]}
            yield record | {"pos_scores": [rng.random()], "neg_scores": [rng.random() for _ in range(many)]}


def groups_of(store):
    """Every group with its positives, read through `group`."""
    groups = [store.group(index) for index in range(store.num_groups)]
    return [(g.query, g.documents, g.labels.tolist(), g.positives.tolist(), g.line) for g in groups]


def pairs_of(store):
    return [tuple(store.pair(index)) for index in range(store.num_pairs)]
