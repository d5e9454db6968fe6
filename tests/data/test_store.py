"""The opened store: random access, read-only views, and one build for each source and setting."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
from record_samples import groups_of, hits, pointwise, random_records, write

from rag_retrieval.data import store as store_module
from rag_retrieval.data.records import DataError, RecordRules
from rag_retrieval.data.store import RecordStore, open_store


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RETRIEVAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stores_in(cache_dir):
    return sorted(path for path in cache_dir.iterdir() if path.is_dir())


# ---- reading


def test_arrays_agree_with_the_groups(tmp_path):
    store = open_store(write(tmp_path / "a.jsonl", [hits("a", 1, 0), hits("b", 2), hits("c", 0, 3, 0)]))
    assert store.group_offsets.tolist() == [0, 2, 3]
    assert store.group_sizes.tolist() == [2, 1, 3]
    assert store.labels.tolist() == [1, 0, 2, 0, 3, 0]
    assert store.positives.tolist() == [True, False, True, False, True, False]
    assert (store.labels.dtype, store.positives.dtype) == (np.float32, bool)
    assert (store.group_offsets.dtype, store.group_sizes.dtype) == (np.int64, np.int64)


def test_arrays_are_views_of_the_mapped_file_and_not_copies(tmp_path):
    store = open_store(write(tmp_path / "a.jsonl", [hits("a", 1, 0)]))
    arrays = (store.labels, store.positives, store.lines, store.group_offsets, store.group_sizes, store.group(0).labels)
    for values in arrays:
        assert not values.flags.owndata
        assert not values.flags.writeable
    address = store.labels.__array_interface__["data"][0]
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [([int(end, 16) for end in fields[0].split("-")], fields[-1]) for fields in maps]
    [mapped] = [name for (start, stop), name in ranges if start <= address < stop]
    assert mapped == str(store.folder / "label")


def test_an_index_outside_the_store_is_an_error(tmp_path):
    store = open_store(write(tmp_path / "a.jsonl", [hits("a", 1, 0)]))
    for get, index in [(store.pair, 2), (store.pair, -1), (store.group, 1), (store.group, -1)]:
        with pytest.raises(IndexError, match=str(index)):
            get(index)


def test_a_pickled_store_is_its_path_and_opens_again(tmp_path):
    store = open_store(write(tmp_path / "a.jsonl", random_records(seed=5, count=500)))
    expected = groups_of(store)
    data = pickle.dumps(store)
    assert len(data) < 500
    copy = pickle.loads(data)
    assert isinstance(copy, RecordStore)
    assert groups_of(copy) == expected


# ---- the cache


def test_a_second_opening_reads_nothing_of_the_source(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [hits("a", 1, 0)])
    first = open_store(path)
    monkeypatch.setattr(store_module, "read_records", None)
    monkeypatch.chdir(tmp_path)
    assert open_store("a.jsonl").folder == first.folder


def test_the_cache_folder_can_be_given(tmp_path):
    store = open_store(write(tmp_path / "a.jsonl", [hits("a", 1)]), cache_dir=tmp_path / "other")
    assert store.folder.parent == tmp_path / "other"


def test_other_content_of_the_same_size_is_rebuilt(tmp_path):
    path = write(tmp_path / "a.jsonl", pointwise(("q", "old", 1)))
    before = open_store(path)
    time = path.stat().st_mtime_ns
    write(path, pointwise(("q", "new", 1)))
    os.utime(path, ns=(time, time))  # the hardest case: even the time is the same
    assert open_store(path).pair(0).document == "new"
    assert before.pair(0).document == "old"


def test_a_change_inside_a_large_file_is_noticed_by_its_time(tmp_path):
    def text(middle: str) -> str:
        return "".join(json.dumps(hits(word, 1)) + "\n" for word in ["a" * 2**20, middle, "b" * 2**20])

    path = tmp_path / "a.jsonl"
    path.write_text(text("old"))
    time = path.stat().st_mtime_ns
    assert open_store(path).group(1).query == "old"
    path.write_text(text("new"))
    os.utime(path, ns=(time, time + 1))  # the smallest difference that there is
    assert open_store(path).group(1).query == "new"


def test_the_same_content_with_another_time_is_rebuilt(tmp_path, cache_dir):
    path = write(tmp_path / "a.jsonl", pointwise(("q", "d", 1)))
    open_store(path)
    os.utime(path, ns=(1, 1))
    open_store(path)
    assert len(stores_in(cache_dir)) == 2


def test_each_setting_has_a_store_of_its_own(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"query": "q", "hits": [{"content": "d", "label": 1, "score": 1}]}])
    settings = [{}, {"label_key": "score"}, {"min_label": 0}, {"max_label": 1}, {"max_label": 2}]
    stores = [open_store(path, RecordRules(**setting)) for setting in [*settings, {"exactly_one_positive": True}]]
    stores.append(open_store(path, group_by_query=True))
    assert len({store.folder for store in stores}) == len(stores) == 7


def _truncate(folder):
    with open(folder / "document", "r+b") as file:
        file.truncate(10)


def _zero(folder):
    (folder / "size").write_bytes(bytes((folder / "size").stat().st_size))


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _zero,
        lambda folder: (folder / "query").unlink(),
        lambda folder: (folder / "meta.json").unlink(),
        lambda folder: (folder / "meta.json").write_text('{"bytes"'),
        lambda folder: (folder / "meta.json").write_text("[]"),
        lambda folder: [path.unlink() for path in folder.iterdir()],
    ],
)
def test_a_damaged_store_is_rebuilt(tmp_path, damage):
    path = write(tmp_path / "a.jsonl", random_records(seed=3, count=20))
    store = open_store(path)
    expected = groups_of(store)
    damage(store.folder)
    assert groups_of(open_store(path)) == expected


def test_bad_lines_leave_no_store_behind(tmp_path, cache_dir):
    path = write(tmp_path / "a.jsonl", [hits("a", 1), {"query": "b"}, hits("c")])
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            open_store(path)
        assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["2", "3"]
    assert stores_in(cache_dir) == []


def test_a_source_that_changes_while_it_is_read_is_not_stored(tmp_path, cache_dir, monkeypatch):
    path = write(tmp_path / "a.jsonl", [hits("a", 1)])
    read_records = store_module.read_records

    def read_and_append(*arguments, **options):
        yield from read_records(*arguments, **options)
        with path.open("a") as file:
            file.write(json.dumps(hits("b", 1)) + "\n")

    monkeypatch.setattr(store_module, "read_records", read_and_append)
    with pytest.raises(DataError, match="changed while it was read"):
        open_store(path)
    assert stores_in(cache_dir) == []


@pytest.mark.parametrize("source", ["missing.jsonl", "folder"])
def test_a_missing_file_and_a_folder_are_data_errors(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=f"^{source}: (no such file|found a folder)"):
        open_store(source)


def test_a_hub_dataset_is_cached_by_its_content(monkeypatch):
    content = [hits("a", 1, 0)]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(content))
    first = open_store("owner/name", split="test")
    assert groups_of(first) == [("a", ["a0", "a1"], [1, 0], [True, False], 1)]
    assert open_store("owner/name", split="test").folder == first.folder
    content[0] = hits("b", 1, 0)
    assert open_store("owner/name", split="test").group(0).query == "b"


def _open_together(path, barrier):
    barrier.wait(timeout=600)
    store = open_store(path, group_by_query=True)
    return (store.folder / "meta.json").stat().st_ino, groups_of(store)


@pytest.mark.slow
def test_two_processes_that_build_at_once_share_one_store(tmp_path, cache_dir):
    path = write(tmp_path / "a.jsonl", random_records(seed=4, count=3000))
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(2, context) as pool:
        barrier = manager.Barrier(2)
        first, second = [pool.submit(_open_together, path, barrier) for _ in range(2)]
        assert first.result(600) == second.result(240)  # the same file, so that only one built it
    assert len(stores_in(cache_dir)) == 1


def test_building_and_reading_a_store_imports_neither_pandas_nor_torch(tmp_path):
    path = write(tmp_path / "a.jsonl", random_records(seed=6, count=20))
    program = (
        "import sys; from rag_retrieval.data.store import open_store; "
        f"store = open_store({str(path)!r}, group_by_query=True); store.group(0); store.positives; "
        "print([name for name in ('pandas', 'torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    root = Path(store_module.__file__).parents[2]
    printed = subprocess.check_output([sys.executable, "-c", program], cwd=root, text=True)
    assert printed.strip() == "[]"


# ---- teacher scores


def with_teacher(records):
    """Each document's teacher score says which it is: its number in the file, as a logit."""
    numbered = iter(range(10**6))
    for record in records:
        if "hits" in record:
            scored = [hit | {"teacher_score": next(numbered) - 500} for hit in record["hits"]]
            yield record | {"hits": scored}
        elif "content" in record:
            yield record | {"teacher_score": next(numbered) - 500}
        else:
            sides = {f"{side}_scores": [next(numbered) - 500 for _ in record[side]] for side in ("pos", "neg")}
            yield record | sides


@pytest.mark.parametrize("group_by_query", [False, True])
def test_teacher_scores_go_with_their_documents_wherever_grouping_brings_them(tmp_path, group_by_query):
    records = list(with_teacher(random_records(seed=3, count=300)))
    expected = {}
    for line, record in enumerate(records, 1):
        if "pos" in record:
            texts, scores = record["pos"] + record["neg"], record["pos_scores"] + record["neg_scores"]
        else:
            hits_of = record.get("hits", [record])
            texts, scores = ([hit[key] for hit in hits_of] for key in ("content", "teacher_score"))
        expected[line] = list(zip(texts, scores, strict=True))
    path = write(tmp_path / "a.jsonl", records)
    rules = RecordRules(teacher_key="teacher_score", needs_teacher=True)
    store = open_store(path, rules, group_by_query=group_by_query)
    found = {}
    for index in range(store.num_pairs):
        pair = store.pair(index)
        found.setdefault(pair.line, []).append((pair.document, store.teacher_scores[index]))
    assert found == expected


def test_teacher_scores_are_mapped_and_absent_where_they_are_not_read(tmp_path):
    path = write(tmp_path / "a.jsonl", list(with_teacher([hits("a", 1, 0), hits("b", 1, 0, 0)])))
    without, store = open_store(path), open_store(path, RecordRules(teacher_key="teacher_score"))
    assert without.teacher_scores is None and without.folder != store.folder
    assert store.teacher_scores.tolist() == [-500, -499, -498, -497, -496]
    assert store.teacher_scores.dtype == np.float32
    assert not store.teacher_scores.flags.owndata and not store.teacher_scores.flags.writeable
    assert {path.name for path in store.files} - {path.name for path in without.files} == {"teacher"}


def test_a_pickled_store_has_its_teacher_scores_again(tmp_path):
    path = write(tmp_path / "a.jsonl", list(with_teacher([hits("a", 1, 0)])))
    store = open_store(path, RecordRules(teacher_key="teacher_score"))
    assert pickle.loads(pickle.dumps(store)).teacher_scores.tolist() == [-500, -499]
