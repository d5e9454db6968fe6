"""What the card of a reranker says of it: how to use it, what its texts look like, what a score means."""

import json
from pathlib import Path

from rag_retrieval.models.calibration import CALIBRATION_FILE
from rag_retrieval.models.settings import RerankerSettings, read_settings
from rag_retrieval.train.card import Kind, RunRecord, shown
from rag_retrieval.train.start_commands import reranker_commands

PAIR_TEXT = "The text of a pair, `{}` standing for query and document"
USE = """```python
from rag_retrieval import Reranker

reranker = Reranker("{name}")
results = reranker.rerank("what is a panda?", ["The giant panda is a bear.", "Paris is a city."], top_k=1)
```"""
ELSEWHERE = """```python
from sentence_transformers import CrossEncoder

scores = CrossEncoder("{name}").predict([["what is a panda?", "The giant panda is a bear."]])
```"""


def description(model: Path, run: RunRecord | None) -> str:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    settings = read_settings(str(model))
    kind = "/".join(config.get("architectures") or [config.get("model_type", "unknown")])
    lines = [f"A reranker: it scores how well a document answers a query. {kind}"]
    if settings is not None:
        lines[0] += f", at most {settings.max_len} tokens per pair"
    lines[0] += "."
    if run is not None:
        lines[0] += f" Trained from `{shown(run.configuration['model_name_or_path'])}`."
    if settings is not None and settings.model_type == "llm_decoder":
        lines.append(text_of_a_pair(settings))
    elif settings is not None and (settings.query_format or settings.document_format):
        lines.append(formats_of_an_encoder(settings))
    return "\n\n".join(lines)


def text_of_a_pair(settings: RerankerSettings) -> str:
    text = settings.query_format + settings.seq + settings.document_format + settings.special_token
    if settings.instruction is not None:
        text = text.replace("{instruction}", settings.instruction)
    if settings.head == "yes_no":
        what = f"the score is the logit of `{settings.yes_token}` minus that of `{settings.no_token}` after it"
        return f"{PAIR_TEXT}; {what}:\n\n```\n{text}\n```"
    return f"{PAIR_TEXT}; the score is read at its last token:\n\n```\n{text}\n```"


def formats_of_an_encoder(settings: RerankerSettings) -> str:
    query, document = settings.query_format or "{}", settings.document_format or "{}"
    return (
        "Texts are read within formats, `{}` standing for query and document. `rag_retrieval` puts them there; other "
        f"programs need texts that stand in them already:\n\n```\nquery: {query}\ndocument: {document}\n```"
    )


def meaning(model: Path, run: RunRecord | None) -> str:
    """What a score says."""
    text = "A score is a logit: it orders the documents of one query."
    if (model / CALIBRATION_FILE).is_file():
        return text + f" `{CALIBRATION_FILE}` makes probabilities of scores: `rerank(..., normalize=True)`."
    if run is not None and str(run.configuration.get("loss_type")).startswith("point_"):
        return text + " It was trained pair by pair, so its sigmoid is a probability, as good as the labels were."
    return text + " Its sigmoid is no probability unless the training taught one."


RERANKER = Kind(
    "text-ranking",
    "Reranking",
    ("reranker", "cross-encoder"),
    use=lambda model: USE,
    elsewhere=lambda model: ELSEWHERE,
    start=reranker_commands,
    description=description,
    meaning=meaning,
)
