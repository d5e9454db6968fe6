"""How the similarities of an embedder follow the grades of text pairs (STS): Spearman's and Pearson's correlation.

Both texts are encoded alike, as sentence-transformers and MTEB do: neither as a query nor as a document.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rag_retrieval.core.distributed import on_main, own_device, process_group
from rag_retrieval.core.terminal import plain_table, rendered
from rag_retrieval.data.readers import read_records
from rag_retrieval.data.records import DataError, RecordRules
from rag_retrieval.evaluate.output import write_files
from rag_retrieval.evaluate.retrieval_config import RetrievalEvaluationConfig
from rag_retrieval.evaluate.scoring import locked_output_dir
from rag_retrieval.evaluate.systems import default_output_dir, short_names
from rag_retrieval.models.vectors import finish
from rag_retrieval.retrieval.encoding import open_embedder


@dataclass(frozen=True)
class PairCorrelation:
    """Of the cosines of one model's vectors with the grades: in [-1, 1], and 0 where all cosines are equal. Equal
    cosines, or grades, share the mean of their ranks."""

    name: str
    pairs: int
    spearman: float
    pearson: float


def correlate_pairs(config: RetrievalEvaluationConfig) -> list[PairCorrelation]:
    """For each retriever, an embedder: of the pairs in the file `config.data`. Written as result.json.

    Raises ValueError for a model that cannot be opened; DataError for bad records, fewer than two pairs, and where all
    grades are equal.
    """
    names, data = short_names(config.retriever), Path(config.data).name
    output_dir = Path(config.output_dir or default_output_dir("+".join(names), data))
    values = config.model_dump(mode="json")

    def measure_and_write() -> list[PairCorrelation]:
        found = measure(config, names)
        write_files(output_dir, [], {"data": data, "systems": [vars(one) for one in found], "config": values})
        return found

    with process_group(), locked_output_dir(output_dir, values):
        return on_main(measure_and_write)


def measure(config: RetrievalEvaluationConfig, names: list[str]) -> list[PairCorrelation]:
    first, second, grades = read_pairs(Path(config.data))
    found = []
    for model, name in zip(config.retriever, names, strict=True):
        with open_embedder(config.index_options(model), own_device()) as embedder:
            vectors = embedder.encode(first + second, batch_size=config.batch_size)
        left, right = np.split(finish(vectors), 2)
        cosines = np.einsum("ij,ij->i", left, right)
        found.append(PairCorrelation(name, len(grades), *correlations(cosines, grades)))
    return found


def read_pairs(file: Path) -> tuple[list[str], list[str], np.ndarray]:
    """(first texts, second texts, grades)"""
    records = list(read_records(file, RecordRules()))
    other = next((record for record in records if record.format != "pointwise"), None)
    if other is not None:
        raise DataError(f"{file}:{other.line}: found a {other.format} record; expected graded pairs of query, content "
                        "and label, or to measure a search, a folder in BEIR layout.")  # fmt: skip
    first, second = [record.query for record in records], [record.documents[0] for record in records]
    grades = np.array([record.labels[0] for record in records])
    if len(grades) < 2 or np.ptp(grades) == 0:
        raise DataError(f"{file}: found {len(grades)} pairs and {len(np.unique(grades))} different grades; a "
                        "correlation needs two of both.")  # fmt: skip
    return first, second, grades


def correlations(cosines: np.ndarray, grades: np.ndarray) -> tuple[float, float]:
    """(Spearman, Pearson)"""
    from scipy.stats import pearsonr, spearmanr

    if np.ptp(cosines) == 0:
        return 0.0, 0.0
    return float(spearmanr(cosines, grades).statistic), float(pearsonr(cosines, grades).statistic)


def describe_pairs(config: RetrievalEvaluationConfig, found: list[PairCorrelation], columns: int) -> str:
    if config.output_format == "dict":
        dicts = {one.name: {"Spearman": one.spearman, "Pearson": one.pearson} for one in found}
        return str(dicts if len(dicts) > 1 else dicts[found[0].name])
    rows = [(f"  {one.name}", f"{one.spearman:.4f}", f"{one.pearson:.4f}") for one in found]
    title = f"{Path(config.data).name}: {found[0].pairs:,} pairs; cosines against grades\n"
    return rendered([title, plain_table(("", "Spearman", "Pearson"), rows)], columns)
