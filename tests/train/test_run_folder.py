import os
from pathlib import Path

import pytest

from rag_retrieval.train.run_folder import OutputFolderError, folder_lock, publish


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
