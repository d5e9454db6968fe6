"""What the card of an embedder says of it: how to use it, how a text becomes a vector, what a similarity means."""

import json
from pathlib import Path

from rag_retrieval.models.embedding_files import read_settings
from rag_retrieval.models.settings import ModelFiles
from rag_retrieval.train.card import Kind, RunRecord, shown

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


def description(model: Path, run: RunRecord | None) -> str:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    files = ModelFiles(str(model))
    settings = read_settings(files)
    kind = "/".join(config.get("architectures") or [config.get("model_type", "unknown")])
    line = f"An embedder: it turns a text into a vector. {kind}, pooling {settings['pooling']}"
    if files.max_seq_length is not None:
        line += f", at most {files.max_seq_length} tokens per text"
    if settings.get("query_max_length"):
        line += f" and {settings['query_max_length']} per query"
    line += "."
    if run is not None:
        line += f" Trained from `{shown(run.configuration['model_name_or_path'])}`."
    prompts = {name: prompt for name, prompt in settings["prompts"].items() if prompt}
    if not prompts:
        return line
    texts = "\n".join(f"{name}: {prompt}" for name, prompt in prompts.items())
    return f"{line}\n\nThese stand before the texts, in training as in use:\n\n```\n{texts}\n```"


def meaning(model: Path, run: RunRecord | None) -> str:
    """What a similarity says."""
    settings = read_settings(ModelFiles(str(model)))
    text = f"Vectors are compared by their {'cosine' if settings['similarity'] == 'cosine' else 'dot product'}, which "
    text += "orders documents of one query; it is no probability, and a threshold must be measured on data of your own."
    if settings["dims"]:
        widths = ", ".join(map(str, settings["dims"]))
        text += f" It was trained to be cut: keep the first {widths} numbers of a vector, then normalize."
    return text


EMBEDDER = Kind(
    "sentence-similarity",
    "Information Retrieval",
    ("sentence-transformers", "feature-extraction", "embedding"),
    use=USE,
    elsewhere=ELSEWHERE,
    description=description,
    meaning=meaning,
)
