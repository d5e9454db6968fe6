import pytest

from rag_retrieval.core.files import replacing, write_whole


def test_a_file_is_replaced_only_when_all_went_well(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as aside:
        aside.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_text_that_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    write_whole(path, "熊猫")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half \ud83d")
    assert path.read_text(encoding="utf-8") == "熊猫" and list(tmp_path.iterdir()) == [path]
