"""What each representation of a text finds, trained alone and together: dense, lexical, multi-vector, their ensemble.

    python benchmarks/quality_representations.py --data DIR --train dense unified --out rows.jsonl
    python benchmarks/quality_representations.py --table rows.jsonl

A row is one training of `TRAININGS` on the records of `quality_embedders.py`, or `base`: the model as it is, with heads
of lexical weights and token vectors that have learnt nothing; or `multi_vector by sentence-transformers`, whose trainer
starts from new token vectors too. Every document is scored for every query, exactly, by
each representation that the model has and by their ensemble, with the weights of its training. Sizes are those of one
document: numbers of its dense vector, lexical entries above 0, numbers of its token vectors.
"""

import argparse
import os
from importlib.metadata import version
from pathlib import Path

import numpy as np
import quality
import quality_embedders
import yaml
from quality_embedders import COLUMNS, DEPTH, TESTED
from quality_tables import append_row, decimals, difference, per_query, read_rows, seconds

from rag_retrieval.data.beir import read_folder
from rag_retrieval.data.collection import Collection
from rag_retrieval.losses.embedding import ENSEMBLE
from rag_retrieval.losses.unified import ENSEMBLE_WEIGHTS as WEIGHTS
from rag_retrieval.metrics import PerQuery, Run, means, query_metrics

ALL = "representations=[dense, lexical, multi_vector]"
TRAININGS = {  # by name, keys of our trainer's YAML
    "dense": ["representations=[dense]"],
    "lexical": ["representations=[lexical]"],
    # the mean as in the other trainings, so that the same temperature fits: a sum of MaxSim is some 30 times as large
    "multi_vector": ["representations=[multi_vector]", "mean_maxsim=true"],
    "unified": [ALL],
    "unified, self-distilled": [ALL, "use_self_distill=true"],
}
BASE = "base"
THEIRS = "multi_vector by sentence-transformers"  # MultiVectorEncoderTrainer


def main(arguments: list[str] | None = None) -> None:
    parser = quality_embedders.argument_parser()
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("--train", nargs="+", choices=[BASE, *TRAININGS, THEIRS], default=[BASE, *TRAININGS])
    options = quality_embedders.parse(parser, arguments)
    if options.table:
        print(markdown_tables(read_rows(options.table)))
        return
    rows = []
    for name in options.train:
        rows.append(make_row(options, name) | {"command": options.command})
        append_row(options.out, rows[-1])
    print(markdown_tables(rows))


def make_row(options: argparse.Namespace, name: str) -> dict:
    import torch

    torch.set_num_threads(options.threads)
    folder = read_folder(options.data)
    collection = quality_embedders.test_collection(folder, options.test_queries, options.corpus)
    with quality.work_folder(options.work and options.work / name.replace(", ", "-")) as work:
        drawn = (options.queries, max(options.negatives, 1), options.depth, options.seed)
        model, training = work / "base", {"seconds": 0.0, "cpu_seconds": 0.0}
        if name == BASE:
            untrained(options.model, model)
        else:
            data = options.records or quality_embedders.draw_records(
                folder, drawn, options.negatives, work / "train.jsonl"
            )
            train, given = train_theirs, options
            if name != THEIRS:
                train = quality_embedders.train_ours
                given = argparse.Namespace(**vars(options) | {"keys": [*TRAININGS[name], *options.keys]})
            model, training = quality.timed(train, data, given, work)
        (runs, sizes), searching = quality.timed(find, model, collection, options)
    found = {way: query_metrics(collection.qrels, run, COLUMNS) for way, run in runs.items()}
    setting = {key: getattr(options, key) for key in (*quality_embedders.SAME, "model", "negatives", "batch_size")}
    counts = {"test_queries": len(collection.queries), "documents": len(collection.documents)}
    return {
        "setting": {"data": options.data.name} | counts | setting,
        "trainer": " ".join([name, *(options.keys if name != BASE else [])]),
        "seed": options.seed,
        "figures": {way: means(of_way) for way, of_way in found.items()},
        "per_query": {way: rounded(of_way) for way, of_way in found.items()},
        "sizes": sizes,
        "training": training,
        "searching": searching,
        "versions": {library: version(library) for library in quality.LIBRARIES},
        "cores": os.cpu_count(),
    }


def rounded(found: PerQuery) -> dict[str, float]:
    return {query: round(value, 6) for query, value in found[TESTED].items()}


def untrained(model: str, folder: Path) -> None:
    """Save the model with new heads, the same at every call."""
    import torch

    from rag_retrieval.models.embedder import EmbeddingModel

    torch.manual_seed(0)
    folder.mkdir()
    EmbeddingModel.from_pretrained(model, representations=tuple(WEIGHTS)).save_pretrained(folder)


def train_theirs(data: Path, options: argparse.Namespace, work: Path) -> Path:
    """From a folder with new token vectors, whose options are `--keys`. Returns the model's folder."""
    from sentence_transformers import (
        MultiVectorEncoder,
        MultiVectorEncoderTrainer,
        MultiVectorEncoderTrainingArguments,
    )
    from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
    from sentence_transformers.multi_vector_encoder.scoring import mean_colbert_scores

    from rag_retrieval.models.embedder import EmbeddingModel

    heads = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in options.keys)}
    lengths = {"max_length": options.max_len, "query_max_length": options.max_len}
    EmbeddingModel.from_pretrained(options.model, representations=["multi_vector"], **lengths, **heads).save_pretrained(
        work / "start"
    )
    model = MultiVectorEncoder(str(work / "start"), device="cpu")
    scale = 1 / options.temperature
    loss = MultiVectorMultipleNegativesRankingLoss(model, scale=scale, similarity_fct=mean_colbert_scores)
    rows = quality_embedders.their_rows(data, options.negatives)
    given = quality_embedders.their_settings(options, model.prompts, rows[0], work)
    settings = MultiVectorEncoderTrainingArguments(**given)
    return quality_embedders.run_theirs(MultiVectorEncoderTrainer, model, settings, rows, loss, work)


# ---- exact search of the whole corpus


def find(model: Path, collection: Collection, options: argparse.Namespace) -> tuple[dict[str, Run], dict[str, float]]:
    """The best documents of every query by each representation and their ensemble, and the sizes of a document."""
    from rag_retrieval import Embedder

    embedder = Embedder(model, max_length=options.max_len, dtype=options.encode_dtype)
    names = embedder.settings.representations
    queries = embedder.encode_queries(list(collection.queries.values()), outputs=names)
    documents = embedder.encode_documents(list(collection.documents.values()), outputs=names)
    scores = {}
    if queries.dense is not None:
        scores["dense"] = embedder.similarity(queries.dense, documents.dense)
    if queries.lexical is not None:
        rows = len(embedder.model.tokenizer)
        scores["lexical"] = (sparse(queries.lexical, rows) @ sparse(documents.lexical, rows).T).toarray()
    if queries.multi_vector is not None:
        mean = embedder.settings.multi_vector_mean
        scores["multi_vector"] = token_scores(queries.multi_vector, documents.multi_vector, mean)
    if len(scores) > 1:
        scores[ENSEMBLE] = sum(WEIGHTS[name] * values for name, values in scores.items())
    return {name: best(collection, values) for name, values in scores.items()}, sizes_of(documents)


def sparse(weights, columns: int):
    from scipy.sparse import csr_array

    return csr_array((weights.weights, weights.ids, weights.starts), shape=(len(weights), columns))


def token_scores(queries: list[np.ndarray], documents: list[np.ndarray], mean: bool) -> np.ndarray:
    """MaxSim of every query with every document: [queries, documents], float32."""
    tokens, starts = np.concatenate(documents), np.cumsum([0, *map(len, documents)])[:-1]
    assert all(map(len, documents)), "reduceat needs a token of every document"
    scores = np.empty((len(queries), len(documents)), np.float32)
    for place, query in enumerate(queries):
        largest = np.maximum.reduceat(query @ tokens.T, starts, axis=1)
        scores[place] = largest.mean(axis=0) if mean else largest.sum(axis=0)
    return scores


def best(collection: Collection, scores: np.ndarray) -> Run:
    """The best `DEPTH` documents of each query."""
    documents, run = list(collection.documents), {}
    for query, row in zip(collection.queries, scores, strict=True):
        run[query] = {documents[place]: float(row[place]) for place in np.argsort(-row, kind="stable")[:DEPTH]}
    return run


def sizes_of(documents) -> dict[str, float]:
    """Of one document in the mean."""
    sizes = {}
    if documents.dense is not None:
        sizes["dense"] = float(documents.dense.shape[1])
    if documents.lexical is not None:
        sizes["lexical"] = len(documents.lexical.ids) / len(documents.lexical)
    if documents.multi_vector is not None:
        sizes["multi_vector"] = sum(each.size for each in documents.multi_vector) / len(documents.multi_vector)
    return sizes


# ---- tables


def markdown_tables(rows: list[dict]) -> str:
    return quality_embedders.markdown_tables(rows, markdown_table)


def markdown_table(setting: dict, table: dict[str, dict[int, dict]]) -> str:
    """table: rows by training and seed."""
    ways = [*WEIGHTS, ENSEMBLE]
    lines = [", ".join(f"{name} {value}" for name, value in setting.items()), ""]
    columns = [*(f"{TESTED}, {way}" for way in ways), *(f"{way}, size" for way in WEIGHTS), "training, s (CPU s)"]
    lines += [f"| trained | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, seeds in table.items():
        rows = list(seeds.values())
        figures = [shown([row["figures"][way][TESTED] for row in rows if way in row["figures"]]) for way in ways]
        sizes = [f"{rows[0]['sizes'][way]:.0f}" if way in rows[0]["sizes"] else "" for way in WEIGHTS]
        cells = [name, str(len(rows)), *figures, *sizes, seconds([row["training"] for row in rows])]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *differences(table)]
    rows = [row for seeds in table.values() for row in seeds.values()]
    libraries = dict.fromkeys(", ".join(f"{name} {v}" for name, v in row["versions"].items()) for row in rows)
    return "\n".join([*lines, *libraries, *dict.fromkeys(row["command"] for row in rows)])


def shown(values: list[float]) -> str:
    return decimals(values) if values else ""


def differences(table: dict[str, dict[int, dict]]) -> list[str]:
    """Of every representation and ensemble of a later row to the dense vectors of the first trained one, over the seeds
    that both have."""
    trained = [name for name in table if name != BASE]
    if not trained or "dense" not in next(iter(table[trained[0]].values()))["figures"]:
        return []
    lines, before = [], trained[0]
    for name in trained:
        seeds = sorted(table[before].keys() & table[name].keys())
        for way in next(iter(table[name].values()))["figures"]:
            if seeds and (name, way) != (before, "dense"):
                sides = [[table[row][seed] for seed in seeds] for row in (before, name)]
                runs = [of_way(rows, own) for rows, own in zip(sides, ("dense", way), strict=True)]
                lines.append(difference(f"{name}: {way}", f"{before}: dense", *runs, len(seeds)))
    return lines


def of_way(rows: list[dict], way: str) -> dict[str, float]:
    return per_query([{"per_query": row["per_query"][way]} for row in rows])


if __name__ == "__main__":
    main()
