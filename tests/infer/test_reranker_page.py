"""The Python blocks of the Reranker's page run, one after another, on a tiny model."""

import re
import shutil
from pathlib import Path

from transformers import AutoTokenizer
from yes_no_samples import tiny_causal

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reranker.md"


def test_the_blocks_of_the_page_run_in_order(model_folders, tmp_path, monkeypatch):
    shutil.copytree(model_folders["bert"], tmp_path / "runs" / "a" / "model")
    chat = tiny_causal(tmp_path / "runs" / "chat", "qwen3")
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.chat_template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(chat)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 5
    names = {}
    for block in blocks:
        exec(block, names)
    start, end = names["result"].slice
    assert 0 <= start < end <= len(names["text"])
    assert [len(names["first"]), len(names["second"])] == [1, 2]
    assert names["ordered"].windows == 2 and sorted(r.document_index for r in names["ordered"]) == [0, 1, 2, 3]
    assert names["results"][-1].text == "" and names["results"][-1].score == -10000


def test_the_page_s_files_and_choices_are_those_of_the_code():
    from rag_retrieval.infer.results import RerankResult
    from rag_retrieval.models.options import LONG_DOCUMENT

    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{choice}` |" in text for choice in LONG_DOCUMENT)
    assert all(f"`{field}`" in text for field in RerankResult.__dataclass_fields__)
