import errno
import fcntl
import multiprocessing
import os
import time
import zlib
from pathlib import Path

import pytest

from rag_retrieval.core import files
from rag_retrieval.core.files import (
    WorkFolder,
    atomic_write,
    content_digest,
    content_of,
    lock_file_of,
    locked,
    write_text,
)


def test_a_file_is_replaced_only_when_all_went_well(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_file_of_somebody_else_with_the_old_temporary_name_stays(tmp_path):
    (tmp_path / "a.tmp").write_text("precious")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a.tmp").read_text() == "precious"


def test_a_text_that_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    write_text(path, "熊猫")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud83d")
    assert path.read_text(encoding="utf-8") == "熊猫" and list(tmp_path.iterdir()) == [path]


# --- locks ---


def hold(lock_file: Path, held, done) -> None:
    with locked(lock_file, "busy"):
        held.set()
        done.wait(60)


def start_holding(lock_file: Path):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(lock_file, held, done), daemon=True)
    process.start()
    assert held.wait(60)
    return process, done


def test_a_second_writer_is_refused_at_once_and_comes_in_when_the_first_has_left(tmp_path, monkeypatch):
    lock_file = lock_file_of(tmp_path / "model")
    process, done = start_holding(lock_file)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))  # as on another node, or of another user
    with pytest.raises(ValueError, match="model is busy"), locked(lock_file, "model is busy"):
        pass
    done.set()
    process.join(60)
    with locked(lock_file, "busy"):
        assert lock_file.exists()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    process, _ = start_holding(tmp_path / "lock")
    process.kill()
    process.join(60)
    with locked(tmp_path / "lock", "busy"):
        pass


def hold_with_child(lock_file: Path, held) -> None:
    with locked(lock_file, "busy"):
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        held.set()
        time.sleep(60)


def test_a_child_that_outlives_a_killed_process_does_not_keep_its_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold_with_child, args=(tmp_path / "lock", held))
    process.start()
    assert held.wait(60)
    process.kill()
    process.join()
    with locked(tmp_path / "lock", "busy"):
        pass


def test_folders_made_for_a_lock_go_where_nothing_came_into_them(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "runs" / "a" / "lock", "busy"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "runs" / "a" / "lock", "busy"):
        (tmp_path / "runs" / "b").touch()
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs", tmp_path / "runs" / "b"]
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine" / "lock", "busy"):
        pass
    assert (tmp_path / "mine").is_dir(), "it was there before"


def test_a_folder_that_another_process_removes_before_the_lock_is_made_again(tmp_path, monkeypatch):
    opened = os.open

    def late_open(path, *arguments):
        if not calls:
            calls.append(path)
            (tmp_path / "runs").rmdir()
        return opened(path, *arguments)

    calls = []
    monkeypatch.setattr(os, "open", late_open)
    with locked(tmp_path / "runs" / "lock", "busy"):
        assert (tmp_path / "runs" / "lock").exists()


def test_a_lock_file_removed_before_it_is_locked_is_created_again(tmp_path, monkeypatch):
    lock_file, flock, calls = tmp_path / "lock", fcntl.flock, []

    def late(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            lock_file.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(lock_file, "busy"):
        assert lock_file.exists() and len(calls) == 2


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "lock", "busy"):
        assert f"{tmp_path}: this file system has no locks" in caplog.text


# --- digests ---


def test_the_digest_is_of_sizes_and_content_not_of_names(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"abc"), second.write_bytes(b"abc")
    expected = f"{zlib.crc32(b'3abc'):08x}"
    assert content_digest([first]) == content_digest([second]) == expected
    second.write_bytes(b"abd")
    assert content_digest([second]) != expected
    assert content_digest([first, second]) != content_digest([second, first])


def test_a_large_file_is_read_in_evenly_spread_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 4)
    monkeypatch.setattr(files, "SAMPLED_BLOCKS", 2)
    path = tmp_path / "a"
    path.write_bytes(b"aaaabbbbccccdd")  # blocks 0 and 2 of four
    assert content_digest([path]) == f"{zlib.crc32(b'14aaaacccc'):08x}"


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


def test_content_is_read_again_only_where_a_file_has_changed(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"old")
    before, times = content_of(tmp_path), (1, 1)
    hits = files._read_content.cache_info().hits
    assert content_of(tmp_path) == before and files._read_content.cache_info().hits == hits + 1
    os.utime(file, times)
    (tmp_path / "other").write_bytes(b"new")
    os.utime(tmp_path / "other", times)
    os.replace(tmp_path / "other", file)  # of the same name, size and time
    assert content_of(tmp_path) != before
