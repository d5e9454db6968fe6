"""The command `search`: one query or a file of them, as text for a terminal, as JSON lines, or as a TREC run."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from rich.console import RenderableType
from rich.text import Text

from rag_retrieval.core.config import NAMES, FolderPath, Location, ModelName, Only, OutputPath, key, shown_value
from rag_retrieval.core.files import atomic_write, check_new_file
from rag_retrieval.core.log import Progress
from rag_retrieval.core.terminal import on_one_line, rendered, terminal_columns, wrapped
from rag_retrieval.data.beir import query_texts, run_lines
from rag_retrieval.data.readers import text_lines, unique_object
from rag_retrieval.models.options import LongDocumentOptions, ModelOptions
from rag_retrieval.retrieval.config import DEPTH
from rag_retrieval.retrieval.filters import parse_where

if TYPE_CHECKING:
    from rag_retrieval.infer.reranker import Reranker
    from rag_retrieval.retrieval.retriever import Retriever
    from rag_retrieval.retrieval.searched import SearchResult, SearchResults

RRF = "rrf"
TEXT_LINES = 3  # of a document's text
INDENT = "   "
TOGETHER = 256  # queries that are encoded at once
RERANKED = Only("runs with a reranker", lambda config: config.reranker is not None)
WRITTEN = Only("runs with output", lambda config: config.output is not None)


def default_format(config: "SearchConfig") -> str:
    if config.output is None:
        return "text"
    return "json" if Path(config.output).suffix in (".json", ".jsonl") else "trec"


class SearchConfig(ModelOptions, LongDocumentOptions):
    """One search."""

    main_keys: ClassVar = ("index", "query", "queries", "where", "reranker")
    groups: ClassVar = ModelOptions.groups | {"long_document": "Long documents", "index": "Search", "output": "Output"}
    only_for: ClassVar = dict.fromkeys(
        ModelOptions.model_fields.keys() - {"device", "trust_remote_code"} | LongDocumentOptions.model_fields.keys(),
        RERANKED,
    )

    index: FolderPath = Field(min_length=1, description="Folder that rag-retrieval index wrote.")
    query: str | None = key("What is searched for.", min_length=1)
    queries: Annotated[str, Location(file=True)] | None = key(
        "A file of queries: JSON lines with _id and text, or a text with one in each line, whose id is its number.",
        min_length=1,
    )
    reranker: ModelName | None = key(
        "Folder, hub name, or package:NAME of a reranker for what is found.", min_length=1
    )
    top_k: int = key("Documents of a query.", 10, ge=1)
    where: str | None = key(
        'Conditions on the metadata as JSON, all of which hold: {"language": "zh", "year": {"gte": 2020}}; a value '
        "for equality, or gt, gte, lt, lte, in, ne. Absent: all documents are searched.", min_length=1
    )  # fmt: skip
    depth: int = key("Documents that each stage finds, and that are reranked; top_k where that is more.", DEPTH, ge=1)
    stages: Annotated[list[str], NAMES] | None = key(
        "Those of the index to search. Absent: all that count in the fusion.", min_length=1
    )
    fusion: Annotated[str, Location(file=True, words=(RRF,))] | None = key(
        "A file that fit-fusion wrote, or rrf for reciprocal ranks. Absent: the index's own, else reciprocal ranks.",
        min_length=1,
    )
    batch_size: int = key("Pairs of one forward, at most.", 256, only=RERANKED, ge=1)
    normalize: bool = key("Show values in [0, 1] instead of logits.", False, only=RERANKED)
    output: OutputPath | None = key("A file for the results. Absent: they are printed.", min_length=1)
    overwrite: bool = key("Replace a file that is there.", False, only=WRITTEN)
    output_format: Literal["text", "json", "trec"] = key(
        "Text for people, a JSON object for each query on a line, or a TREC run. Absent: text where the results are "
        "printed, json for an output that ends in .json or .jsonl, else trec.", "text", derive=default_format
    )  # fmt: skip

    def problems(self) -> Iterator[tuple[str, str]]:
        if (self.query is None) == (self.queries is None):
            yield "query", f"{'is missing' if self.query is None else 'given with queries'}; give query or queries"
        try:
            parse_where(self.conditions)
        except ValueError as error:
            yield "where", str(error).removeprefix("where: ")

    @property
    def conditions(self) -> dict[str, Any] | None:
        """Raises ValueError for what is no JSON."""
        try:
            return None if self.where is None else json.loads(self.where, object_pairs_hook=unique_object)
        except ValueError as error:
            found = f"found {shown_value(self.where)} ({error})"
            raise ValueError(f'expected JSON such as {{"year": {{"gte": 2020}}}}, {found}') from None


def run(config: SearchConfig) -> str:
    if config.output is not None:
        check_new_file(Path(config.output), config.overwrite)
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    queries = {"1": config.query} if config.queries is None else read_queries(Path(config.queries))
    with open_retriever(config) as retriever:
        texts = shown(config, retriever, queries)
        if config.output is None:
            return "".join(texts).rstrip("\n")
        with atomic_write(Path(config.output)) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(texts)
    return f"{config.output}: {len(queries):,} quer{'y' if len(queries) == 1 else 'ies'}"


def read_queries(file: Path) -> dict[str, str]:
    """Texts by id. Raises DataError at a bad line, and ValueError for a file without a query."""
    if file.name.lower().endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")):
        queries = query_texts(file)
    else:
        queries = {str(line): text.strip() for line, text in text_lines(file)}
    if not queries:
        raise ValueError(f"{file}: found no queries; expected one in each line")
    return queries


def open_retriever(config: SearchConfig) -> "Retriever":
    from rag_retrieval.retrieval.fusion import Fusion
    from rag_retrieval.retrieval.retriever import Retriever

    fusion = config.fusion and (Fusion() if config.fusion == RRF else Fusion.read(config.fusion))
    names = ("stages", "depth", "device", "trust_remote_code", "batch_size", "normalize", "long_document", "overlap")
    options = {name: getattr(config, name) for name in names}
    return Retriever(config.index, reranker=open_reranker(config), fusion=fusion, **options)


def open_reranker(config: SearchConfig) -> "Reranker | None":
    from rag_retrieval.infer.backend import open_backend
    from rag_retrieval.infer.reranker import Reranker

    return config.reranker and Reranker.from_backend(open_backend(config.reranker, config.model_options()))


def shown(config: SearchConfig, retriever: "Retriever", queries: dict[str, str]) -> Iterator[str]:
    """What is printed or written of each query."""
    ids, texts = list(queries), list(queries.values())
    columns = terminal_columns()
    with Progress(len(ids), "searching", "queries", shown=len(ids) > 1) as progress:
        for start in range(0, len(ids), TOGETHER):
            found = retriever.search_many(texts[start : start + TOGETHER], config.top_k, config.conditions)
            for id_, results in zip(ids[start : start + TOGETHER], found, strict=True):
                if config.output_format == "json":
                    yield json_line(id_ if config.queries else None, results)
                elif config.output_format == "trec":
                    scores = {result.doc_id: result.score for result in results}
                    yield from run_lines(id_, scores, Path(config.index).resolve().name)
                else:
                    styled = config.output is None and sys.stdout.isatty()
                    yield rendered(list(as_text(results, columns)), columns, styled) + "\n\n"
                progress.update()


def json_line(query_id: str | None, results: "SearchResults") -> str:
    values = json.loads(results.to_json())
    return json.dumps({"query_id": query_id} | values if query_id else values, ensure_ascii=False) + "\n"


def as_text(results: "SearchResults", columns: int) -> Iterator[RenderableType]:
    """Of each document rank and id, its scores with ranks, metadata, and the text or its best slice, cut."""
    yield from wrapped(results.query, columns)
    if not results:
        yield "nothing found"
    room = max(1, columns - len(INDENT))
    for result in results:
        yield ""
        yield Text(f"{result.rank}. {on_one_line(result.doc_id)}", style="bold")
        for line in [*wrapped(describe_scores(result), room), *describe_metadata(result.metadata, room)]:
            yield INDENT + line
        start, end = result.slice or (0, len(result.text))
        for line in wrapped("…" * (start > 0) + result.text[start:end], room, TEXT_LINES):
            yield INDENT + line


def describe_scores(result: "SearchResult") -> str:
    """The last stage first: `reranked 4.21 (1), fused 0.0325 (2), bm25 12.3 (1)`; the numbers in brackets are ranks."""
    stages = reversed(result.scores)
    return ", ".join(f"{stage} {result.scores[stage]:.4g} ({result.ranks[stage]})" for stage in stages)


def describe_metadata(metadata: dict, columns: int) -> Iterable[str]:
    """The place in a file, where `index` cut a passage out of it; all else in one line."""
    others = dict(metadata)
    if {"file", "start", "end"} <= others.keys():
        file, start, end = (others.pop(name) for name in ("file", "start", "end"))
        yield from wrapped(f"{file}, characters {start} to {end}", columns)
    if others:
        yield from wrapped(json.dumps(others, ensure_ascii=False), columns, 1)
