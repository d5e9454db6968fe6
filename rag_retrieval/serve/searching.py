"""/search and /documents of an index: what `Retriever.search` finds, with both models computing in batches.

    queries -> tokens -> the embedder's batches, first -> the searches, in a thread -> the reranker's batches -> answer

An index that another process changes is opened anew before the next request's search; `fusion.json` is read at the
start alone.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from pydantic import Field, create_model
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.responses import Response

from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.models.inputs import is_unicode
from rag_retrieval.models.options import EmbedderOptions
from rag_retrieval.models.settings import model_content
from rag_retrieval.retrieval.encoding import Encoded, encoded_of, represented_how
from rag_retrieval.retrieval.filters import FilterError, parse_where
from rag_retrieval.retrieval.index import Index
from rag_retrieval.retrieval.index_files import LOCAL_KEYS, IndexState
from rag_retrieval.retrieval.retriever import Retriever
from rag_retrieval.retrieval.searched import ENCODE, Searched
from rag_retrieval.serve.batching import Batcher
from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.embedding import EMBEDDER, EmbedModel, compute_texts, served_embedder
from rag_retrieval.serve.endpoints import (
    Endpoint,
    StrictRequest,
    Work,
    check_characters,
    cut_warning,
    limited_list,
    parse_json,
)
from rag_retrieval.serve.http import RequestError, ServerMetrics
from rag_retrieval.serve.reranking import RERANKER, RerankModel, compute_documents
from rag_retrieval.serve.schemas import RerankTask

INDEX, INDEX_EMBEDDER = "index", "index_embedder"  # in /health and /info
DOCUMENTS = "/documents/"
WARM_UP = "a query, 一个查询"

log = logging.getLogger(__name__)


class SearchRequest(StrictRequest):
    """As it is sent. `limited_request` sets the greatest numbers."""

    query: str | list[str]
    top_k: int = Field(10, ge=1)
    where: dict[str, Any] | None = None
    stages: bool = False
    raw_scores: bool = False


def limited_request(max_queries: int, max_results: int) -> type[SearchRequest]:
    queries = limited_list("queries", str, max_queries)
    fields = {"query": (str | queries, ...), "top_k": (int, Field(10, ge=1, le=max_results))}
    return create_model("LimitedRequest", __base__=SearchRequest, **fields)


@dataclass(frozen=True)
class SearchTask:
    """is_list: whether the answer is one. depth: documents of each stage. with_stages: whether the lists of all stages
    are shown. raw_scores: of the reranker, logits in place of values in [0, 1]."""

    queries: list[str]
    is_list: bool
    top_k: int
    depth: int
    where: Mapping[str, Any] | None
    with_stages: bool
    raw_scores: bool

    def place(self, position: int) -> str:
        """What the request calls a query."""
        return f"query[{position}]" if self.is_list else "query"


class SearchEndpoint(Endpoint):
    """embedding: the model of the index and its batcher; None where no stage needs it. role: what metrics call it.
    reranking: the same of what is found; None for none."""

    paths = ("/search",)
    first = True

    def __init__(
        self,
        config: ServeConfig,
        retriever: Retriever,
        embedding: tuple[EmbedModel, Batcher] | None,
        reranking: tuple[RerankModel, Batcher] | None,
        metrics: ServerMetrics,
        role: str,
    ):
        self.truncated, self.role = metrics.truncated, role
        self.retriever, self.embedding, self.reranking = retriever, embedding, reranking
        self.name = retriever.index.folder.resolve().name
        self.batchers = [served[1] for served in (embedding, reranking) if served is not None]
        self.schema = limited_request(config.max_queries, config.max_documents)
        self.max_characters, self.most = config.max_characters, config.queue_pairs

    @property
    def info(self) -> dict[str, Any]:
        """For /info."""
        index = self.retriever.index
        return {"model_type": {"index": {}}, "stages": self.retriever.stages, "embedder": index.options.embedder}

    def parse(self, body: bytes, path: str) -> SearchTask:
        request = parse_json(body, self.schema, {"query": "a text or a list of texts"})
        is_list = isinstance(request.query, list)
        queries = request.query if is_list else [request.query]
        try:
            parse_where(request.where)
        except FilterError as error:
            raise RequestError(422, str(error)) from error
        depth = max(self.retriever.depth, request.top_k)
        task = SearchTask(queries, is_list, request.top_k, depth, request.where, request.stages, request.raw_scores)
        check_characters(((task.place(place), query) for place, query in enumerate(queries)), self.max_characters)
        if self.size(task) > self.most:
            found = f"{len(queries)} queries, of each of which {depth} documents are reranked"
            raise RequestError(422, f"query: {found}; at most {self.most} documents are taken: send them in parts")
        return task

    def size(self, task: SearchTask) -> int:
        """Queries, or documents where these are reranked."""
        return len(task.queries) * (1 if self.reranking is None else task.depth)

    async def answer(self, task: SearchTask, work: Work) -> Response:
        searched: list[Searched] = []
        warnings: list[str] = []
        if task.queries:
            encoded, seconds = await self._encode(task, work, warnings)
            searched = await work.run(self._find, task, encoded, first=True)
            searched = [replace(one, seconds=one.seconds | seconds) for one in searched]
            if self.reranking is not None:
                searched = await self._rerank(searched, task, work, warnings)
        return await work.run(self._response, searched, task, warnings, work.id, first=True)

    async def _encode(
        self, task: SearchTask, work: Work, warnings: list[str]
    ) -> tuple[Encoded | None, dict[str, float]]:
        """The queries as the index compares them, and the seconds of that. warnings: gets one where some are cut."""
        if self.embedding is None:
            return None, {}
        started, (model, batcher) = perf_counter(), self.embedding
        how = represented_how(model.embedder, "query", self.retriever.index.options)
        embed_task = model.task(task.queries, task.place, **how)
        items, found = await compute_texts(model, batcher, embed_task, work, first=True)
        embedded = model.embedded(embed_task, items, found)
        if embedded.truncated:
            self.truncated.labels(self.role).inc(len(embedded.truncated))
            warnings.append(cut_warning(embedded.truncated, len(task.queries), "queries", task.place))
        encoded = encoded_of(embedded.results["float32"], model.embedder.settings.multi_vector_mean)
        return encoded, {ENCODE: perf_counter() - started}

    def _find(self, task: SearchTask, encoded: Encoded | None) -> list[Searched]:
        refresh(self.retriever.index)
        try:
            return self.retriever.find(task.queries, task.depth, task.where, encoded)
        except FilterError as error:
            raise RequestError(422, str(error)) from error

    async def _rerank(
        self, searched: Sequence[Searched], task: SearchTask, work: Work, warnings: list[str]
    ) -> list[Searched]:
        """With the stages after the reranking. warnings: gets one where documents are cut."""
        started, (model, batcher) = perf_counter(), self.reranking
        rerank_tasks = await work.run(lambda: [RerankTask(one.query, one.texts()) for one in searched], first=True)
        encoded, scores = await compute_documents(model, batcher, rerank_tasks, work)
        seconds = perf_counter() - started

        def reranked() -> list[Searched]:
            scored = map(model.scored, rerank_tasks, encoded, scores)
            options = {"seconds": seconds, "normalize": not task.raw_scores}
            return [self.retriever.reranked(one, own, **options) for one, own in zip(searched, scored, strict=True)]

        cut = [own.truncated_of(of_query) for own, of_query in zip(encoded, rerank_tasks, strict=True)]
        if any(cut):
            warnings.append(cut_documents_warning(searched, cut, task))
            self.truncated.labels(RERANKER).inc(sum(map(len, cut)))
        return await work.run(reranked, first=True)

    def _response(
        self, searched: Sequence[Searched], task: SearchTask, warnings: Sequence[str], request_id: str
    ) -> Response:
        answers: Any = [one.answer(task.top_k, task.with_stages) for one in searched]
        answer = {"results": answers} if task.is_list else answers[0]
        meta = {"meta": {"warnings": warnings}} if warnings else {}
        return json_response(answer | {"id": request_id, "model": self.name} | meta)


def cut_documents_warning(searched: Sequence[Searched], cut: Sequence[Sequence[int]], task: SearchTask) -> str:
    """cut: of each query the positions of the documents that were not read whole; at least one."""
    positions = [(query, position) for query, own in enumerate(cut) for position in own]
    count = sum(len(one.last.rows) for one in searched)

    def place(found: tuple[int, int]) -> str:
        one = searched[found[0]]
        return f"{one.documents.id(int(one.last.rows[found[1]]))!r:.100} for {task.place(found[0])}"

    return cut_warning(positions, count, "reranked documents", place)


class DocumentId(PathConvertor):
    """Starlette's `path` ends at a line feed, which an id may have."""

    regex = "(?s:.*)"


register_url_convertor("document_id", DocumentId())


class DocumentEndpoint(Endpoint):
    """A whole document of the index, by its id."""

    method = "GET"
    paths = (f"{DOCUMENTS}{{id:document_id}}",)

    def __init__(self, index: Index):
        self.index = index

    def parse(self, body: bytes, path: str) -> str:
        return path.removeprefix(DOCUMENTS)

    def size(self, task: str) -> int:
        return 1

    async def answer(self, task: str, work: Work) -> Response:
        return await work.run(self._response, task, first=True)

    def _response(self, id_: str) -> Response:
        refresh(self.index)
        documents = self.index.documents
        row = documents.row_of_id(id_) if is_unicode(id_) else None
        if row is None:
            raise RequestError(404, f"the index has no document {id_!r:.100}")
        return json_response({"id": id_, "text": documents.text(row), "metadata": documents.metadata(row)})


def json_response(values: Any) -> Response:
    """Made in the thread that has the values: an answer with all stages may have a megabyte."""
    return Response(json.dumps(values, ensure_ascii=False, allow_nan=False).encode(), media_type="application/json")


def refresh(index: Index) -> None:
    """Take a newer state of the index; where it cannot be opened the old one stays, and the log says why."""
    try:
        if index.refresh():
            log.info("%s has changed: %s", index.folder, index.describe())
    except (ValueError, OSError) as error:
        log.error("the index has changed and cannot be opened, what was open before is searched: %s", error)


# ---- before the server listens --------------------------------------------------------------------------


@contextmanager
def opened_search(
    config: ServeConfig,
    metrics: ServerMetrics,
    embedding: tuple[EmbedModel, Batcher] | None,
    reranking: tuple[RerankModel, Batcher] | None,
) -> Iterator[SearchEndpoint]:
    """The index of `--index`, searched once, so that all that the first search loads is there. Raises what that raises.

    embedding: of `--embedder`. It serves the index too where it is the same model, opened with the same options; else
    the index has one of its own.
    """
    local = config.given("device", "devices", "trust_remote_code")
    is_shared = embedding is not None and is_embedder_of(IndexState.read(Path(config.index), local), config)
    index = Index(config.index, embedder=embedding[0].embedder if is_shared else None, **local)
    role = EMBEDDER if embedding is None or is_shared else INDEX_EMBEDDER
    reranker = None if reranking is None else Reranker.from_backend(reranking[0].backend)
    options = {"normalize": True, "long_document": config.long_document, "overlap": config.overlap}
    with ExitStack() as stack:
        stack.callback(index.close)
        retriever = Retriever(index, reranker=reranker, depth=config.depth, **options)
        retriever.find([WARM_UP])
        if not retriever.needs_model:
            embedding = None
        elif not is_shared:
            name = Path(index.options.embedder).name
            embedding = stack.enter_context(served_embedder(name, index.embedder, config, metrics, role))
        yield SearchEndpoint(config, retriever, embedding, reranking, metrics, role)


def is_embedder_of(state: IndexState | None, config: ServeConfig) -> bool:
    """state: of the index; None where there is none, which opening it reports."""
    names = [name for name in EmbedderOptions.model_fields if name not in LOCAL_KEYS]
    if state is None or state.options.given(*names) != config.embedder_options().given(*names):
        return False
    return model_content(config.embedder) == state.made_from.get("model")
