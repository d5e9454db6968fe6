"""MTEB's tasks for our models: an Embedder as its encoder, a Reranker as its cross-encoder, a Retriever as its search
model; `run` is the command.

    mteb.evaluate(EmbedderEncoder("runs/a/model"), mteb.get_tasks(["SciFact"]))

MTEB keeps results by a model's name and revision. The revision here is a digest of all that decides on what the model
gives, so that results of another prompt or length are never taken for these.
"""

import json
import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.utils.data import DataLoader

from rag_retrieval.core.command import load_own
from rag_retrieval.core.files import digest_of
from rag_retrieval.data.collection import Collection, beir_collection, is_beir_folder
from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.infer.reranker import Reranker, open_reranker
from rag_retrieval.integrations import missing_library
from rag_retrieval.integrations.mteb_config import MtebConfig
from rag_retrieval.models.options import EmbedderOptions, OpeningOptions
from rag_retrieval.models.representations import LEXICAL, MULTI_VECTOR
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.index import build_index
from rag_retrieval.retrieval.index_files import fingerprint
from rag_retrieval.retrieval.retriever import Retriever

try:
    import mteb
    from datasets import Dataset
    from mteb._create_dataloaders import create_dataloader
    from mteb.abstasks.abstask import AbsTask
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.abs_encoder import get_prompt_name
    from mteb.models.model_meta import ModelMeta, ScoringFunction
    from mteb.types import PromptType
except ImportError as error:
    raise missing_library("mteb", "mteb") from error

logger = logging.getLogger(__name__)


class EmbedderEncoder:
    """An Embedder as MTEB's encoder (EncoderProtocol), for tasks of every kind.

    model: an Embedder, or the folder, hub name or package:NAME of one. Before a text stands what the model's prompts
    have, by MTEB's order of names: `SciFact-query`, `SciFact`, `Retrieval-query`, `Retrieval`, `query`; where none is
    there, what `Embedder.encode` puts before a text of this kind. query_instruction, document_instruction: in place of
    all that, "" for none.
    """

    def __init__(
        self,
        model: Embedder | str | os.PathLike,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
    ):
        self.embedder = model if isinstance(model, Embedder) else Embedder(model)
        self.instructions = {"query": query_instruction, "document": document_instruction}
        self._used: set[tuple[str, str | None]] = set()
        backend = self.embedder.backend
        self.mteb_model_meta = model_meta(
            [backend.name],
            [backend.fingerprint(), self.instructions],
            max_tokens=backend.text_encoder.max_length,
            embed_dim=backend.dim,
            similarity_fn_name=ScoringFunction(backend.settings.similarity),
            use_instructions=bool(backend.settings.prompts),
        )

    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int = 256,
        precision: str = "float32",
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """[texts, dim], in the order of the inputs. precision: as of `Embedder.encode`."""
        prompt = self.prompt_for(task_metadata, prompt_type)
        texts, kind = texts_of(inputs), prompt_type and prompt_type.value
        work = {"batch_size": batch_size, "precision": precision, "show_progress_bar": show_progress_bar}
        return self.embedder.encode(texts, prompt, kind=kind, **work)

    def prompt_for(self, task: TaskMetadata, prompt_type: PromptType | None) -> str:
        """Logged once for a task and kind."""
        encoder, kind = self.embedder.backend.text_encoder, prompt_type and prompt_type.value
        name = get_prompt_name(dict(encoder.prompts), task, prompt_type)
        prompt = self.instructions.get(kind)
        if prompt is None:
            prompt = encoder.prompt_for(kind) if name is None else encoder.prompts[name]
        if (task.name, kind) not in self._used:
            self._used.add((task.name, kind))
            logger.info("%s, %s: %s before each", task.name, kind or "texts", json.dumps(prompt, ensure_ascii=False))
        return prompt

    def similarity(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> torch.Tensor:
        """As the model compares vectors: [texts of 1, texts of 2]."""
        return torch.from_numpy(self.embedder.similarity(np.asarray(embeddings1), np.asarray(embeddings2)))

    def similarity_pairwise(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> torch.Tensor:
        """Of each vector with the one in its place: [pairs]."""
        pairs = zip(np.asarray(embeddings1), np.asarray(embeddings2), strict=True)
        return torch.tensor([self.embedder.similarity(*pair).item() for pair in pairs])


class RerankerCrossEncoder:
    """A Reranker as MTEB's cross-encoder (CrossEncoderProtocol), for tasks that list the documents of each query.

    model: a Reranker, or the folder, hub name or package:NAME of one.
    """

    def __init__(self, model: Reranker | str | os.PathLike):
        self.reranker = open_reranker(model)
        backend = self.reranker.backend
        kind = "late-interaction" if backend.model_type == MULTI_VECTOR else "cross-encoder"
        facts = {"max_tokens": self.reranker.max_length, "model_type": [kind]}
        self.mteb_model_meta = model_meta([backend.name], [backend.fingerprint()], **facts)

    def predict(
        self,
        inputs1: DataLoader,
        inputs2: DataLoader,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int = 256,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Logits of the pairs: [pairs], float32."""
        pairs = list(zip(texts_of(inputs1), texts_of(inputs2), strict=True))
        return self.reranker.compute_score(pairs, batch_size)


class RetrieverSearch:
    """A Retriever over each task's corpus as MTEB's search model (SearchProtocol), for retrieval tasks.

    options: what is indexed: words, vectors or both, which are then fused. reranker: a Reranker, or the folder, hub
    name or package:NAME of one, that orders what is found. depth: documents that it reads for a query; no others are
    then ranked.
    """

    def __init__(self, options: IndexOptions, reranker: Reranker | str | os.PathLike | None = None, depth: int = 100):
        self.options, self.depth = options, depth
        self.reranker = None if reranker is None else open_reranker(reranker)
        models, decides = [options.embedder] if options.embedder else [], [fingerprint(options)]
        if self.reranker is not None:
            models.append(self.reranker.backend.name)
            decides += [self.reranker.backend.fingerprint(), depth]
        self.mteb_model_meta = model_meta([*["bm25"] * options.bm25, *models], decides, model_type=["hybrid"])

    def index(self, corpus: Dataset, *, task_metadata: TaskMetadata, **_) -> None:
        """_: which split and subset it is, and options of an encoder."""
        self._folder = TemporaryDirectory(prefix="mteb-index-")
        source = Path(self._folder.name) / "corpus.jsonl"
        texts = texts_of(create_dataloader(corpus, task_metadata=task_metadata, prompt_type=PromptType.document))
        with source.open("w", encoding="utf-8") as file:
            for id_, text in zip(corpus["id"], texts, strict=True):
                file.write(json.dumps({"_id": id_, "text": text}) + "\n")
        self._index = build_index(source, source.with_name("index"), self.options)

    def search(
        self,
        queries: Dataset,
        *,
        task_metadata: TaskMetadata,
        top_k: int,
        top_ranked: dict[str, list[str]] | None = None,
        **_,
    ) -> dict[str, dict[str, float]]:
        """Scores of the last stage by query and document. _: as of `index`. Raises ValueError for a task that lists the
        documents of each query."""
        if top_ranked is not None:
            raise ValueError(
                f"tasks: {task_metadata.name} lists the documents of each query, and a retriever searches a whole "
                "corpus; measure an embedding model or a reranker alone"
            )
        texts = texts_of(create_dataloader(queries, task_metadata=task_metadata, prompt_type=PromptType.query))
        retriever = Retriever(self._index, reranker=self.reranker, depth=self.depth)
        found = retriever.search_many(texts, min(top_k, self.depth) if self.reranker else top_k)
        self._index.close()
        self._folder.cleanup()
        return {
            query: {result.doc_id: result.score for result in results}
            for query, results in zip(queries["id"], found, strict=True)
        }


def texts_of(inputs: DataLoader) -> list[str]:
    return [text for batch in inputs for text in batch["text"]]


def model_meta(models: list[str], decides: list, **facts) -> ModelMeta:
    """decides: what the results depend on, as JSON values. A folder's name is its own or, of one called `model`, that
    of the run."""
    paths = [Path(model) for model in models]
    names = [path.parent.name if path.is_dir() and path.name == "model" else path.name for path in paths]
    is_hub_name = len(models) == 1 and "/" in models[0] and not paths[0].is_dir()
    name = models[0] if is_hub_name else f"local/{'+'.join(names)}"
    return ModelMeta.create_empty({"name": name, "revision": digest_of(decides), "framework": ["PyTorch"]} | facts)


# ---- the command ----------------------------------------------------------------------------------------


def run(config: MtebConfig) -> str:
    """The main score of each task and split; MTEB's files have the others. A task whose result is there already is not
    run again, unless its data have changed. Raises ValueError for a model or task that cannot be opened."""
    tasks, model = [open_task(name, config.split) for name in config.tasks], open_model(config)
    for task in tasks:
        if not isinstance(model, EmbedderEncoder) and not isinstance(task, AbsTaskRetrieval):
            raise ValueError(f"tasks: {task.metadata.name} is no retrieval task; it takes an embedding model alone")
    cache = mteb.ResultCache(config.output_folder)
    lines = []
    for task in tasks:
        path = cache.get_task_result_path(task.metadata.name, model.mteb_model_meta)
        old = mteb.TaskResult.from_disk(path) if path.exists() else None
        changed = old is not None and old.dataset_revision != task.metadata.revision
        result = mteb.evaluate(
            model,
            task,
            co2_tracker=False,
            encode_kwargs={"batch_size": config.batch_size, "show_progress_bar": None},
            cache=cache,
            overwrite_strategy="always" if changed else "only-missing",
            prediction_folder=config.prediction_folder,
            show_progress_bar=False,
        ).task_results[0]
        lines += [
            f"{result.task_name} {split} {scores['hf_subset']}: {task.metadata.main_score} {scores['main_score']:.5f}"
            for split in task.eval_splits
            for scores in result.scores[split]
        ]
    return "\n".join([*lines, f"results of {model.mteb_model_meta.name}: {path.parent}"])


def open_model(config: MtebConfig) -> EmbedderEncoder | RerankerCrossEncoder | RetrieverSearch:
    opening, kinds = config.given(*EmbedderOptions.model_fields), ("query", "document")
    if config.candidates is None and config.reranker is None:
        embedder = Embedder(config.model, **opening)
        return EmbedderEncoder(embedder, config.query_instruction, config.document_instruction)
    alone = config.candidates is None
    names = OpeningOptions.model_fields if alone else ("device", "devices", "dtype", "precision", "trust_remote_code")
    reranker = config.reranker and Reranker(config.reranker, **config.given(*names))
    if alone:
        return RerankerCrossEncoder(reranker)
    given = zip(kinds, (config.query_instruction, config.document_instruction), strict=True)
    prompts = (config.prompts or {}) | {kind: text for kind, text in given if text is not None}
    searched = {
        LEXICAL: {"representations": (LEXICAL,)},
        MULTI_VECTOR: {"representations": (MULTI_VECTOR,), "token_precision": "float32", "token_candidates": "all"},
    }.get(config.candidates, {"vector_precision": "float32"})
    options = IndexOptions(
        **opening | {"prompts": prompts or None} | searched,
        embedder=config.model,
        bm25=config.candidates in ("bm25", "fused"),
        batch_size=config.batch_size,
    )
    return RetrieverSearch(options, reranker, config.depth)


def open_task(name: str, split: str | None) -> AbsTask:
    """Of a BEIR folder, of `module:Class`, or MTEB's own of this name. split: None leaves the task's own."""
    if is_beir_folder(name):
        return folder_task(beir_collection(name, split or "test"), split or "test")
    try:
        task = load_own("tasks", name)() if ":" in name else mteb.get_task(name)
    except KeyError as error:
        raise ValueError(f"tasks: {error.args[0]} Give a name of MTEB's, a BEIR folder, or module:Class") from error
    if split not in (None, *task.metadata.eval_splits):
        known = " or ".join(task.metadata.eval_splits)
        raise ValueError(f"split: {task.metadata.name} is measured on {known}, found {split}")
    return task.filter_eval_splits([split]) if split else task


def folder_task(data: Collection, split: str) -> AbsTaskRetrieval:
    """Retrieval over the corpus or, where the data list the documents of each query, reranking. A document with the id
    of the query does not count, and queries without a relevant document are left out, as in `evaluate`."""

    class FolderTask(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=Path(data.source).resolve().name,
            description=f"{split} of {data.source}",
            dataset={"path": data.source, "revision": f"{data.checksum:08x}"},
            type="Retrieval" if data.pool is None else "Reranking",
            category="t2t",
            eval_splits=[split],
            eval_langs=["und"],
            main_score="ndcg_at_10",
        )
        ignore_identical_ids = True

        def load_data(self, num_proc: int | None = None, **kwargs) -> None:
            self.dataset = {"default": {split: split_data(data)}}
            self.data_loaded = True

    return FolderTask()


def split_data(data: Collection) -> dict[str, Dataset | dict | None]:
    """What MTEB calls RetrievalSplitData."""
    left_out = set(data.without_relevant)
    qrels = {query: dict(grades) for query, grades in data.qrels.items() if query not in left_out}
    texts = ({query: data.queries[query] for query in qrels}, data.documents)
    queries, corpus = (Dataset.from_dict({"id": list(each), "text": list(each.values())}) for each in texts)
    return {"queries": queries, "corpus": corpus, "relevant_docs": qrels, "top_ranked": data.pool}
