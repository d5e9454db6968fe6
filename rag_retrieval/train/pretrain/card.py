"""What the card of a pre-trained encoder says of it: what it was trained for, and how an embedder starts from it."""

import json
from pathlib import Path

from rag_retrieval.models.embedding_files import read_settings
from rag_retrieval.models.settings import ModelFiles
from rag_retrieval.train.card import Kind, RunRecord, shown

USE = """```bash
rag-retrieval train --task embedding --model_name_or_path {name} --train_dataset train.jsonl --output_dir runs/embedder
```"""
ELSEWHERE = """```python
from transformers import AutoModel, AutoModelForMaskedLM

encoder = AutoModel.from_pretrained("{name}")
masked_language_model = AutoModelForMaskedLM.from_pretrained("{name}")
```"""
LEARNED = {
    "retromae": "to predict masked tokens, and to rebuild a passage from its vector (RetroMAE)",
    "span_pairs": "to predict masked tokens, and to tell two spans of one passage from those of others",
}


def description(model: Path, run: RunRecord | None) -> str:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    kind = "/".join(config.get("architectures") or [config.get("model_type", "unknown")])
    files = ModelFiles(str(model))
    pooling, tokens = read_settings(files)["pooling"], files.max_seq_length
    line = "An encoder that was pre-trained for retrieval on plain texts. "
    line += f"{kind}, pooling {pooling}, at most {tokens} tokens per text."
    if run is not None:
        values = run.configuration
        line += f" Trained from `{shown(values['model_name_or_path'])}` {LEARNED[values['loss_type']]}."
    return line


def meaning(model: Path, run: RunRecord | None) -> str:
    return "It is a beginning: train an embedder from it before its vectors are compared."


PRETRAINED = Kind(
    "fill-mask",
    "Masked Language Modelling",
    ("pre-training", "retrieval"),
    use=lambda model: USE,
    elsewhere=lambda model: ELSEWHERE,
    start=None,
    description=description,
    meaning=meaning,
)
