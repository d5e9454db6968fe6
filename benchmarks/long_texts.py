"""What is found of texts of 1,000 to 8,000 tokens: truncated, in slices, whole, and whole with a cls every 256 tokens.

    python benchmarks/long_texts.py --data ../shared/data/medquad --threads 1 --out rows.jsonl

The documents are those of a folder in BEIR layout that have at least `--least` tokens, the queries those of any split
for which one of them is relevant. Half of the queries train, the other half searches all of these documents. The base
is an encoder whose position embeddings are repeated up to `--most` tokens. Each model of `TRAININGS` is read
`truncated` to `--short` tokens, in `slices` of as many, of which the best one counts, or `whole`.
"""

import argparse
import random
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import quality
import quality_embedders
from mixed_lengths import with_positions
from quality_embedders import COLUMNS, TESTED
from quality_tables import append_row, difference

from rag_retrieval.data.beir import BeirFolder, find_optional, read_folder, read_qrels
from rag_retrieval.data.collection import Collection
from rag_retrieval.metrics import PerQuery, Qrels, means, query_metrics

TRAININGS = {  # by name: keys of our trainer (None: no training; SHORT: `--short`), and what reads the model
    "base": (None, ("truncated", "slices", "whole")),
    "truncated": (("passage_max_len=SHORT",), ("truncated", "slices")),
    "truncated, cls": (("passage_max_len=SHORT", "pooling=cls"), ("truncated", "slices")),
    "whole": ((), ("whole",)),
    "whole, cls": (("pooling=cls",), ("whole",)),
    "whole, cls every 256 (MCLS)": (("pooling=cls", "cls_interval=256"), ("whole",)),
}


def main(arguments: list[str] | None = None) -> None:
    parser = quality_embedders.argument_parser()
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("--least", type=int, default=1000, help="tokens of a document")
    parser.add_argument("--most", type=int, default=8192, help="positions of the encoder; longer documents are cut")
    parser.add_argument("--short", type=int, default=512, help="tokens where documents are truncated, and of a slice")
    parser.add_argument("--train", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.set_defaults(epochs=4, batch_size=16, negatives=0, precision="bf16", encode_dtype="bf16")
    options = quality_embedders.parse(parser, arguments)
    if options.table:
        parser.error("--table: the differences of these rows are printed as they are made")
    import torch

    torch.set_num_threads(options.threads)
    with quality.work_folder(options.work) as work:
        base = work / "base"
        with_positions(options.model, options.most).save_pretrained(base)
        folder = read_folder(options.data)
        documents = long_documents(folder, base, options.least)
        records, collection = halves(folder, documents, options.seed)
        lengths = ", ".join(f"{np.quantile(list(documents.values()), share):.0f}" for share in (0, 0.5, 0.9, 1))
        print(f"{len(documents)} documents of {lengths} tokens (least, median, 90%, most), {len(records)} training "
              f"queries, {len(collection.queries)} test queries", flush=True)  # fmt: skip
        data = quality.write_records(records, work / "train.jsonl")
        results: dict[str, PerQuery] = {}
        for name in options.train:
            keys, readings = TRAININGS[name]
            model, took = base, {"cpu_seconds": 0.0}
            if keys is not None:
                own = work / str(len(results))
                own.mkdir()
                given = vars(options) | {"model": str(base), "max_len": options.most}
                keys = [key.replace("SHORT", str(options.short)) for key in keys]
                given["keys"] = ["query_max_len=64", *keys, *options.keys]
                model, took = quality.timed(quality_embedders.train_ours, data, argparse.Namespace(**given), own)
            for reading in readings:
                found, reads = quality.timed(search, model, collection, reading, options)
                write_row(options, name, reading, found, took["cpu_seconds"], reads["cpu_seconds"])
                results[f"{name}, read {reading}"] = found
    first, *others = results
    for name in others:
        print(difference(name, first, results[first][TESTED], results[name][TESTED], 1))
    print(", ".join(f"{library} {version(library)}" for library in quality.LIBRARIES))


def long_documents(folder: BeirFolder, model: Path, least: int) -> dict[str, int]:
    """Numbers of tokens of the documents that have at least so many."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = list(folder.documents.values())
    counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    return {name: count for name, count in zip(folder.documents, counts, strict=True) if count >= least}


def halves(folder: BeirFolder, documents: dict[str, int], seed: int) -> tuple[list[dict], Collection]:
    """Training records of one half of the queries, and the other half with all documents."""
    qrels: Qrels = {}
    for split in ("train", "dev", "test"):
        if find_optional(folder.path / "qrels", f"{split}.tsv"):
            for query, grades in read_qrels(folder, split).items():
                relevant = {
                    document: grade for document, grade in grades.items() if grade > 0 and document in documents
                }
                if relevant:
                    qrels[query] = relevant
    order = sorted(qrels)
    random.Random(seed).shuffle(order)
    trained, tested = order[: len(order) // 2], sorted(order[len(order) // 2 :])
    records = [
        {"query": folder.queries[query], "pos": [folder.documents[name] for name in sorted(qrels[query])]}
        for query in trained
    ]
    texts = {name: folder.documents[name] for name in sorted(documents)}
    queries = {query: folder.queries[query] for query in tested}
    return records, Collection(str(folder.path), queries, texts, {query: qrels[query] for query in tested})


def search(model: Path, collection: Collection, reading: str, options: argparse.Namespace) -> PerQuery:
    from rag_retrieval import Embedder

    length = options.most if reading == "whole" else options.short
    embedder = Embedder(model, max_length=length, dtype=options.encode_dtype, normalize=True)
    texts = list(collection.documents.values())
    parts = [[text] for text in texts]
    if reading == "slices":
        parts = slices_of(texts, embedder.model.tokenizer, length - 2)  # cls and sep take two
    vectors = embedder.encode_documents([part for each in parts for part in each])
    queries = embedder.encode_queries(list(collection.queries.values()))
    # the best part of each document; where a document is one part, that
    scores = np.maximum.reduceat(queries @ vectors.T, np.cumsum([0, *map(len, parts)])[:-1], axis=1)
    names = list(collection.documents)
    rows = zip(collection.queries, scores.tolist(), strict=True)
    run = {query: dict(zip(names, row, strict=True)) for query, row in rows}
    return query_metrics(collection.qrels, run, COLUMNS)


def slices_of(texts: list[str], tokenizer, tokens: int) -> list[list[str]]:
    """Each text in parts of at most so many tokens, cut between words."""
    parts = []
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        words, places, starts = encoded.word_ids(), encoded["offset_mapping"], [0]
        while (end := starts[-1] + tokens) < len(words):
            while words[end] == words[end - 1] and end > starts[-1] + 1:
                end -= 1
            starts.append(end)
        cuts = [0, *(places[start][0] for start in starts[1:]), len(text)]
        parts.append([text[start:end] for start, end in pairwise(cuts)])
    return parts


def write_row(options, name: str, reading: str, found: PerQuery, training: float, searching: float) -> None:
    figures = means(found)
    row = {"trained": name, "read": reading, "figures": figures, "training": training, "searching": searching}
    append_row(options.out, row)
    cells = [name, reading, *(f"{figures[column]:.4f}" for column in COLUMNS), f"{training:.0f}", f"{searching:.0f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
