"""A small folder in BEIR layout for tests, plain or gzipped."""

import gzip
import json
from pathlib import Path

TOPICS = ("apple", "river", "engine", "planet", "violin", "harbor", "desert", "copper", "window", "falcon")
SPLITS = {"train": range(8), "test": range(8, 12)}


def write(path: Path, text: str) -> None:
    """Through gzip where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_lines(path: Path, entries: list[dict]) -> None:
    write(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def write_toy(root: Path, ending: str = "") -> Path:
    """12 queries with 6 documents each. Of q3 d3-0 is relevant; BM25 lists five and puts it third."""
    documents, queries = [], []
    for query in range(12):
        topic = TOPICS[query % len(TOPICS)]
        queries.append({"_id": f"q{query}", "text": f"where is {topic} {query}"})
        for document in range(6):
            title = topic if document else ""
            text = f"{topic} text {document}"
            documents.append({"_id": f"d{query}-{document}", "title": title, "text": text})
    write_lines(root / f"corpus.jsonl{ending}", documents)
    write_lines(root / f"queries.jsonl{ending}", queries)
    for split, members in SPLITS.items():
        qrels = "".join(f"q{query}\td{query}-0\t1\n" for query in members)
        write(root / f"qrels/{split}.tsv", "query-id\tcorpus-id\tscore\n" + qrels)
        run = "".join(
            f"q{query}\td{query}-{document}\t{9 - place}\n"
            for query in members
            for place, document in enumerate((1, 2, 0, 3, 4))
        )
        write(root / f"runs/bm25.{split}.tsv{ending}", run)
    return root
