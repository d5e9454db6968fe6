"""Small data sets in BEIR layout for the tests of mining, and what a run over them wrote."""

import gzip
import json
from pathlib import Path

from rag_retrieval.data.corpus import Corpus, build_corpus
from rag_retrieval.data.documents import read_documents
from rag_retrieval.mining.config import MiningConfig

ANIMALS = ("panda", "tiger", "otter", "eagle", "whale", "horse")
PLACES = ("river", "forest", "desert", "island", "valley", "coast")


def write_jsonl(path: Path, entries, compressed: bool = False) -> Path:
    data = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if compressed else data)
    return path


def write_beir(folder: Path, documents: dict, queries: dict, qrels, compressed: bool = False) -> Path:
    """documents: id to text; queries: id to text; qrels: (query id, document id, grade)."""
    end = ".gz" if compressed else ""
    corpus = [{"_id": id_, "title": "", "text": text} for id_, text in documents.items()]
    write_jsonl(folder / f"corpus.jsonl{end}", corpus, compressed)
    entries = [{"_id": id_, "text": text} for id_, text in queries.items()]
    write_jsonl(folder / f"queries.jsonl{end}", entries, compressed)
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, line)) for line in qrels)]
    table = ("\n".join(lines) + "\n").encode()
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / f"qrels/train.tsv{end}").write_bytes(gzip.compress(table) if compressed else table)
    return folder


def animal_data(folder: Path, reverse: bool = False, compressed: bool = False) -> Path:
    """36 documents and as many queries, each about an animal and a place; the one about both is the positive."""
    pairs = [(animal, place) for animal in ANIMALS for place in PLACES]
    documents = {f"{a}-{p}": f"The {a} lives at the {p} and sleeps." for a, p in pairs}
    queries = {f"q-{a}-{p}": f"which {a} lives near a {p}" for a, p in pairs}
    qrels = [(f"q-{a}-{p}", f"{a}-{p}", 1) for a, p in pairs]
    if reverse:
        queries, qrels = dict(reversed(queries.items())), qrels[::-1]
    return write_beir(folder, documents, queries, qrels, compressed)


def corpus_of(folder: Path, texts: list[str]) -> Corpus:
    source = write_jsonl(folder / "source.jsonl", ({"_id": f"d{i}", "text": text} for i, text in enumerate(texts)))
    built = folder / "corpus"
    built.mkdir()
    return build_corpus(read_documents(source), built)


def config_of(data: Path, output: Path, **options) -> MiningConfig:
    return MiningConfig(data=str(data), output=str(output), **{"num_negatives": 3, "last_rank": 10} | options)


def read_output(path: Path) -> list[dict]:
    raw = path.read_bytes()
    text = gzip.decompress(raw) if path.suffix == ".gz" else raw
    return [json.loads(line) for line in text.decode().splitlines()]
