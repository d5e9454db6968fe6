import os
from pathlib import Path

import pytest
from accelerate import Accelerator
from training_runs import write_jsonl

from rag_retrieval.core.files import content_digest
from rag_retrieval.data.store import open_store
from rag_retrieval.train.run_folder import (
    OutputFolderError,
    Provenance,
    engine_of,
    folder_lock,
    library_versions,
    publish,
)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(OutputFolderError, match=f"output_dir: {tmp_path} is not writable"):
        folder_lock(tmp_path / "runs" / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match="is a file"):
        folder_lock(tmp_path / "file" / "a")


def test_results_take_the_place_of_earlier_ones(tmp_path):
    for name, text in (("model", "old"), ("new/model", "new"), ("new/adapter", "new")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights").write_text(text)
    publish(tmp_path / "new", tmp_path)
    assert [(tmp_path / name / "weights").read_text() for name in ("model", "adapter")] == ["new", "new"]


def test_provenance_comes_back_as_it_was_saved(tmp_path):
    made = Provenance({"lr": 5e-5, "modules": ["q"], "seed": None}, {"train": "ab"}, "DDP", 2, {"torch": "2"})
    made.save(tmp_path)
    assert Provenance.read(tmp_path) == made


def test_versions_name_the_libraries_that_make_the_bits():
    versions = library_versions()
    assert versions.keys() == {"rag_retrieval", "python", "torch", "transformers", "accelerate"}
    assert all(value[0].isdigit() for value in versions.values())


def test_one_process_and_many_share_an_engine():
    assert engine_of(Accelerator(cpu=True)) == "DDP"


def test_the_same_data_under_another_name_have_the_same_store(tmp_path):
    lines = [{"query": "rain", "content": "wet", "label": 1}, {"query": "rain", "content": "dry", "label": 0}]
    one = open_store(write_jsonl(tmp_path / "a.jsonl", lines), cache_dir=tmp_path)
    two = open_store(write_jsonl(tmp_path / "b.jsonl", lines), cache_dir=tmp_path)
    assert one.folder != two.folder and content_digest(one.files) == content_digest(two.files)
    lines[1]["content"] = "dri"
    other = open_store(write_jsonl(tmp_path / "c.jsonl", lines), cache_dir=tmp_path)
    assert content_digest(other.files) != content_digest(one.files)
