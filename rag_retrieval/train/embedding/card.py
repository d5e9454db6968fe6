"""What the card of an embedder says of it: how to use it, what a text becomes, what a score means."""

import json
from pathlib import Path

from rag_retrieval.models.embedding_files import read_settings
from rag_retrieval.models.representation_files import MEAN_MAXSIM
from rag_retrieval.models.settings import ModelFiles
from rag_retrieval.train.card import Kind, RunRecord, shown
from rag_retrieval.train.start_commands import embedder_commands

USE = """```python
from rag_retrieval import Embedder

embedder = Embedder("{name}")
queries = embedder.encode_queries(["what is a panda?"])
documents = embedder.encode_documents(["The giant panda is a bear.", "Paris is a city."])
print(embedder.similarity(queries, documents))
```"""
ELSEWHERE = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
queries = model.encode(["what is a panda?"], prompt_name="query")
documents = model.encode(["The giant panda is a bear.", "Paris is a city."], prompt_name="document")
print(model.similarity(queries, documents))
```"""


SHOWN = {
    "dense": "print(documents.dense.shape)",
    "lexical": "print(documents.lexical[0])  # weights of tokens, the largest first",
    "multi_vector": "print(documents.multi_vector[0].shape)  # a vector for each token",
}
SPARSE_ENCODER = """```python
from sentence_transformers import SparseEncoder

model = SparseEncoder("{name}")
queries = model.encode_query(["what is a panda?"])
documents = model.encode_document(["The giant panda is a bear.", "Paris is a city."])
print(model.similarity(queries, documents))
```"""
COLBERT = """```python
from pylate import models, rank

model = models.ColBERT("{name}")
queries = model.encode(["what is a panda?"], is_query=True)
documents = model.encode([["The giant panda is a bear.", "Paris is a city."]], is_query=False)
print(rank.rerank([["panda", "Paris"]], queries, documents))
```"""
BGE_M3 = """```python
from FlagEmbedding import BGEM3FlagModel

model = BGEM3FlagModel("{name}", use_fp16=False)
print(model.compute_score([["what is a panda?", "The giant panda is a bear."]]))
```"""
KINDS = {"dense": "a vector", "lexical": "weights of tokens", "multi_vector": "a vector for each token"}


def representations_of(model: Path) -> tuple[str, ...]:
    return tuple(read_settings(ModelFiles(str(model)))["representations"])


def use(model: Path) -> str:
    names = representations_of(model)
    if names == ("dense",):
        return USE
    lines = [
        "from rag_retrieval import Embedder\n",
        'embedder = Embedder("{name}")',
        f'documents = embedder.encode_documents(["The giant panda is a bear."], outputs={list(names)})',
        *(SHOWN[name] for name in names),
        'print(embedder.compute_score([["what is a panda?", "The giant panda is a bear."]]))',
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def elsewhere(model: Path) -> str:
    settings = read_settings(ModelFiles(str(model)))
    names = tuple(settings["representations"])
    if names == ("dense",):
        return ELSEWHERE
    if names == ("lexical",) and settings["lexical"] == "splade":
        return SPARSE_ENCODER
    return COLBERT if names == ("multi_vector",) else BGE_M3


def description(model: Path, run: RunRecord | None) -> str:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    files = ModelFiles(str(model))
    settings = read_settings(files)
    names, length = representations_of(model), settings.get("max_length", files.max_seq_length)
    kind = "/".join(config.get("architectures") or [config.get("model_type", "unknown")])
    line = f"An embedder: it turns a text into {', '.join(KINDS[name] for name in names)}. {kind}"
    if "dense" in names:
        line += f", pooling {settings['pooling']}"
    if "lexical" in names:
        line += f", lexical weights by {settings['lexical']}"
    if length is not None:
        line += f", at most {length} tokens per text"
    if settings.get("query_max_length"):
        line += f" and {settings['query_max_length']} per query"
    line += "."
    if run is not None:
        line += f" Trained from `{shown(run.configuration['model_name_or_path'])}`."
    prompts = {name: prompt for name, prompt in settings.get("prompts", {}).items() if prompt}
    if not prompts:
        return line
    texts = "\n".join(f"{name}: {prompt}" for name, prompt in prompts.items())
    return f"{line}\n\nThese stand before the texts, in training as in use:\n\n```\n{texts}\n```"


def meaning(model: Path, run: RunRecord | None) -> str:
    """What a score says."""
    settings, names = read_settings(ModelFiles(str(model))), representations_of(model)
    scores = {
        "dense": f"the {'cosine' if settings['similarity'] == 'cosine' else 'dot product'} of vectors",
        "lexical": "the sum over common tokens of the product of their weights",
        "multi_vector": "the sum, over a query's vectors, of the largest product with one of the document's (MaxSim)",
    }
    if names != ("multi_vector",) or settings["similarity"] == MEAN_MAXSIM:
        scores["multi_vector"] = scores["multi_vector"].replace("the sum", "the mean")
    text = f"A score is {'; or '.join(scores[name] for name in names)}. It "
    text += "orders documents of one query; it is no probability, and a threshold must be measured on data of your own."
    if len(names) > 1:
        text += " Sums of several scores rank better than each alone only with weights that fit: measure them too."
    if settings["dims"]:
        widths = ", ".join(map(str, settings["dims"]))
        text += f" It was trained to be cut: keep the first {widths} numbers of a vector, then normalize."
    return text


EMBEDDER = Kind(
    "sentence-similarity",
    "Information Retrieval",
    ("sentence-transformers", "feature-extraction", "embedding"),
    use=use,
    elsewhere=elsewhere,
    start=embedder_commands,
    description=description,
    meaning=meaning,
)
