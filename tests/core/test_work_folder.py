import pytest

from rag_retrieval.core.work_folder import WorkFolder, content_of


def test_a_stage_is_built_once_for_what_it_is_made_from(tmp_path):
    work, built = WorkFolder(tmp_path), []

    def build(folder):
        built.append(folder)
        (folder / "x").write_text("done")

    first = work.stage("a", [1], build)
    assert work.stage("a", [1], build) == first and (first / "x").read_text() == "done"
    assert work.stage("a", [2], build) != first
    assert len(built) == 2


@pytest.mark.parametrize("resumes, left", [(False, ["second"]), (True, ["first", "second"])])
def test_a_stage_that_died_is_not_taken_for_whole(tmp_path, resumes, left):
    work = WorkFolder(tmp_path)

    def die(folder):
        (folder / "first").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.stage("a", [1], die, resumes)
    folder = work.stage("a", [1], lambda folder: (folder / "second").touch(), resumes)
    assert sorted(path.name for path in folder.iterdir()) == left
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_removing_leaves_what_others_put_there(tmp_path):
    work = WorkFolder(tmp_path / "w")
    with work.locked():
        work.stage("bm25", [1], lambda folder: (folder / "x").touch())
    (tmp_path / "w" / "notes.txt").touch()
    work.remove()
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["notes.txt"]
    (tmp_path / "w" / "notes.txt").unlink()
    work.remove()
    assert not (tmp_path / "w").exists()


def test_two_runs_do_not_work_in_one_folder(tmp_path):
    first, second = WorkFolder(tmp_path / "w"), WorkFolder(tmp_path / "w")
    with first.locked(), pytest.raises(ValueError, match="another run works"), second.locked():
        pass
    with WorkFolder(tmp_path / "w").locked():
        pass


def test_content_is_bytes_and_the_names_in_a_folder(tmp_path):
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).write_text(content)
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b") != content_of(tmp_path / "c")
    before = content_of(tmp_path)
    (tmp_path / "c").rename(tmp_path / "d")
    assert content_of(tmp_path) != before
