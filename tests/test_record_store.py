"""The record store: the same records as the source, one build per source, and a summary that counts right."""

import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest

from rag_retrieval import record_store
from rag_retrieval.record_store import RecordStore, format_summary, open_store, summary
from rag_retrieval.records import DataError, positives


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RETRIEVAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, records):
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def pointwise(*triples):
    return [{"query": query, "content": content, "label": label} for query, content, label in triples]


def hits(query, *labels):
    return {"query": query, "hits": [{"content": f"{query}{i}", "label": x} for i, x in enumerate(labels)]}


def groups_of(store):
    """Every group with its positives, read through `group`."""
    groups = [store.group(index) for index in range(store.num_groups)]
    return [(g.query, g.documents, g.labels.tolist(), g.positives.tolist(), g.line) for g in groups]


def pairs_of(store):
    return [tuple(store.pair(index)) for index in range(store.num_pairs)]


def stores_in(cache_dir):
    return sorted(path for path in cache_dir.iterdir() if path.is_dir())


def random_records(seed, count):
    """Records of all formats, with queries that come back later, Chinese text and empty documents."""
    rng = random.Random(seed)
    words = ["重排", "score", "", "é😀", "a b"]

    def document():
        return f"{rng.choice(words)}{rng.randrange(9)}" if rng.random() < 0.9 else ""

    for _ in range(count):
        query = f"q{rng.randrange(12)}{rng.choice(['', '中'])}"
        kind = rng.choice(["pointwise", "pointwise", "hits", "pos", "scores"])
        many = rng.randrange(4)
        if kind == "pointwise":
            yield {"query": query, "content": document(), "label": rng.choice([0, 1, 2, 0.99988])}
        elif kind == "hits":
            labelled = [{"content": document(), "label": rng.randrange(2)} for _ in range(many + 1)]
            yield {"query": query, "hits": labelled}
        elif kind == "pos":
            yield {"query": query, "pos": [document()], "neg": [document() for _ in range(many)]}
        else:
            record = {"query": query, "pos": [document()], "neg": [document() for _ in range(many)]}
            yield record | {"pos_scores": [rng.random()], "neg_scores": [rng.random() for _ in range(many)]}


def slow_groups(path, group_by_query):
    """The groups by plain dicts and lists: (query, documents, labels, positives, lines)."""
    groups, of_query = [], {}
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        data = json.loads(text)
        if "hits" in data:
            documents = [hit["content"] for hit in data["hits"]]
            labels = [hit["label"] for hit in data["hits"]]
        elif "pos" in data:
            documents = data["pos"] + data["neg"]
            labels = data.get("pos_scores", [1] * len(data["pos"]))
            labels = labels + data.get("neg_scores", [0] * len(data["neg"]))
        else:
            documents, labels = [data["content"]], [data["label"]]
        labels = [float(np.float32(label)) for label in labels]
        earlier = of_query.get(data["query"]) if "content" in data and group_by_query else None
        if earlier is not None:
            earlier[1].extend(documents)
            earlier[2].extend(labels)
            earlier[4].append(line)
            continue
        in_pos = [True] + [False] * (len(documents) - 1) if "pos" in data else None
        group = (data["query"], documents, labels, in_pos, [line] * len(documents))
        groups.append(group)
        if "content" in data:
            of_query[data["query"]] = group
    return [(q, d, x, in_pos or positives(x), lines) for q, d, x, in_pos, lines in groups]


# ---- the same records as the source


@pytest.mark.parametrize("group_by_query", [False, True])
@pytest.mark.parametrize("chunk", [3, 1 << 13])
def test_random_access_equals_the_source_for_every_record(tmp_path, monkeypatch, group_by_query, chunk):
    monkeypatch.setattr(record_store, "CHUNK", chunk)
    path = write(tmp_path / "a.jsonl", random_records(seed=1, count=400))
    store = open_store(path, group_by_query=group_by_query)
    expected = slow_groups(path, group_by_query)
    assert groups_of(store) == [(q, d, x, p, lines[0]) for q, d, x, p, lines in expected]
    pairs = [(q, *row) for q, d, x, _, lines in expected for row in zip(d, x, lines, strict=True)]
    order = list(range(len(pairs)))
    random.Random(2).shuffle(order)
    assert [tuple(store.pair(index)) for index in order] == [pairs[index] for index in order]


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
    arrays = (store.labels, store.positives, store.group_offsets, store.group_sizes, store.group(0).labels)
    for values in arrays:
        assert not values.flags.owndata
        assert not values.flags.writeable
    address = store.labels.__array_interface__["data"][0]
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [([int(end, 16) for end in fields[0].split("-")], fields[-1]) for fields in maps]
    [mapped] = [name for (start, stop), name in ranges if start <= address < stop]
    assert mapped == str(store.folder / "pairs.arrow")


def test_labels_stay_exact_float32(tmp_path):
    store = open_store(write(tmp_path / "a.jsonl", pointwise(("q", "d", 0.99988), ("q", "e", 1e-30))))
    assert store.labels.tolist() == [16775203 / 2**24, float(np.float32(1e-30))]
    assert store.pair(0).label == 16775203 / 2**24


def test_pointwise_records_are_groups_of_one_unless_grouped(tmp_path):
    path = write(tmp_path / "a.jsonl", pointwise(("q", "d", 1), ("q", "e", 0)))
    assert groups_of(open_store(path)) == [("q", ["d"], [1], [True], 1), ("q", ["e"], [0], [False], 2)]


def test_pairs_of_a_query_that_are_not_adjacent_form_one_group_in_order_of_appearance(tmp_path):
    first = pointwise(("b", "b1", 0.2), ("a", "a1", 0), ("b", "b2", 0.9))
    later = pointwise(("c", "c1", 1), ("a", "a2", 0), ("b", "b3", 0.2))
    store = open_store(write(tmp_path / "a.jsonl", first + later), group_by_query=True)
    low, high = float(np.float32(0.2)), float(np.float32(0.9))
    assert groups_of(store) == [
        ("b", ["b1", "b2", "b3"], [low, high, low], [False, True, False], 1),
        ("a", ["a1", "a2"], [0, 0], [False, False], 2),
        ("c", ["c1"], [1], [True], 4),
    ]
    assert [pair[3] for pair in pairs_of(store)] == [1, 3, 6, 2, 5, 4]


def test_hits_and_pos_neg_records_keep_their_own_group_when_pairs_are_grouped_by_query(tmp_path):
    records = [
        *pointwise(("q", "d1", 1)),
        hits("q", 1, 0),
        {"query": "q", "pos": ["p"]},
        *pointwise(("q", "d2", 0)),
    ]
    store = open_store(write(tmp_path / "a.jsonl", records), group_by_query=True)
    assert [group[1] for group in groups_of(store)] == [["d1", "d2"], ["q0", "q1"], ["p"]]


def test_grouped_records_give_one_pair_per_document(tmp_path):
    records = [
        hits("a", 2, 0),
        {"query": "b", "pos": ["p"], "neg": ["n"], "pos_scores": [0.5], "neg_scores": [0.25]},
    ]
    store = open_store(write(tmp_path / "a.jsonl", records))
    assert pairs_of(store) == [("a", "a0", 2, 1), ("a", "a1", 0, 1), ("b", "p", 0.5, 2), ("b", "n", 0.25, 2)]


def test_documents_that_are_all_empty_can_be_stored(tmp_path):
    path = write(tmp_path / "a.jsonl", pointwise(("a", "", 1), ("b", "", 0), ("a", "", 0)))
    assert pairs_of(open_store(path)) == [("a", "", 1, 1), ("b", "", 0, 2), ("a", "", 0, 3)]
    grouped = open_store(path, group_by_query=True)
    assert pairs_of(grouped) == [("a", "", 1, 1), ("a", "", 0, 3), ("b", "", 0, 2)]


def test_an_index_outside_the_store_is_an_error(tmp_path):
    store = open_store(write(tmp_path / "a.jsonl", [hits("a", 1, 0)]))
    for get, index in [(store.pair, 2), (store.pair, -1), (store.group, 1), (store.group, -1)]:
        with pytest.raises(IndexError, match=str(index)):
            get(index)


def test_a_group_of_pairs_without_exactly_one_positive_is_reported_with_its_first_line(tmp_path):
    triples = [("a", "1", 1), ("b", "1", 0), ("a", "2", 0), ("b", "2", 0), ("c", "1", 1), ("c", "2", 0.5)]
    triples += [("d", "1", 2), ("d", "2", 0)]
    path = write(tmp_path / "a.jsonl", pointwise(*triples))
    with pytest.raises(DataError) as caught:
        open_store(path, group_by_query=True, exactly_one_positive=True)
    expected = "expected exactly one 1 and the rest 0 for listwise cross entropy."
    assert str(caught.value).splitlines() == [
        f"{path}:2: the pairs of this query have the labels 0, 0; {expected}",
        f"{path}:5: the pairs of this query have the labels 1, 0.5; {expected}",
        f"{path}:7: the pairs of this query have the labels 2, 0; {expected}",
    ]


def test_more_than_twenty_groups_without_exactly_one_positive_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(record_store, "CHUNK", 4)
    path = write(tmp_path / "a.jsonl", pointwise(*((f"q{i}", "d", 0) for i in range(23))))
    with pytest.raises(DataError) as caught:
        open_store(path, group_by_query=True, exactly_one_positive=True)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in lines[:20]] == [str(i) for i in range(1, 21)]
    assert lines[20:] == ["... and 3 more bad lines"]


# ---- the cache


def test_a_second_opening_reads_nothing_of_the_source(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [hits("a", 1, 0)])
    first = open_store(path)
    monkeypatch.setattr(record_store, "read_records", None)
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


def test_the_same_content_with_another_time_is_rebuilt(tmp_path, cache_dir):
    path = write(tmp_path / "a.jsonl", pointwise(("q", "d", 1)))
    open_store(path)
    os.utime(path, ns=(1, 1))
    open_store(path)
    assert len(stores_in(cache_dir)) == 2


def test_each_setting_has_a_store_of_its_own(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"query": "q", "hits": [{"content": "d", "label": 1, "score": 1}]}])
    settings = [
        {}, {"label_key": "score"}, {"min_label": 0}, {"max_label": 1}, {"max_label": 2},
        {"group_by_query": True}, {"exactly_one_positive": True},
    ]  # fmt: skip
    assert len({open_store(path, **setting).folder for setting in settings}) == len(settings)


def _truncate(folder):
    with open(folder / "pairs.arrow", "r+b") as file:
        file.truncate(100)


def _zero(folder):
    (folder / "groups.arrow").write_bytes(bytes((folder / "groups.arrow").stat().st_size))


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _zero,
        lambda folder: (folder / "groups.arrow").unlink(),
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
    read_records = record_store.read_records

    def read_and_append(*arguments, **options):
        yield from read_records(*arguments, **options)
        with path.open("a") as file:
            file.write(json.dumps(hits("b", 1)) + "\n")

    monkeypatch.setattr(record_store, "read_records", read_and_append)
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
    barrier.wait(timeout=60)
    store = open_store(path, group_by_query=True)
    return (store.folder / "meta.json").stat().st_ino, groups_of(store)


def test_two_processes_that_build_at_once_share_one_store(tmp_path, cache_dir):
    path = write(tmp_path / "a.jsonl", random_records(seed=4, count=3000))
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(2, context) as pool:
        barrier = manager.Barrier(2)
        first, second = [pool.submit(_open_together, path, barrier) for _ in range(2)]
        assert first.result(60) == second.result(60)  # the same file, so that only one built it
    assert len(stores_in(cache_dir)) == 1


def test_a_pickled_store_is_its_path_and_opens_again(tmp_path):
    store = open_store(write(tmp_path / "a.jsonl", random_records(seed=5, count=500)))
    expected = groups_of(store)
    data = pickle.dumps(store)
    assert len(data) < 500
    copy = pickle.loads(data)
    assert isinstance(copy, RecordStore)
    assert groups_of(copy) == expected


# ---- the summary


def test_the_summary_counts_by_hand(tmp_path):
    records = [
        hits("a", 1, 0, 0),  # documents a0 a1 a2
        hits("a", 2, 2),  # a0 and a1 again; all labels equal
        {"query": "b", "pos": ["d"], "neg": ["", " "]},
        *pointwise(("c", "d", 1)),  # one document: its labels are all equal
    ]
    found = summary(open_store(write(tmp_path / "a.jsonl", records)))
    assert (found.records, found.groups, found.pairs, found.queries) == (4, 4, 9, 3)
    assert (found.repeated_pairs, found.empty_documents, found.equal_label_groups) == (2, 2, 2)
    assert (found.smallest_group, found.largest_group) == (1, 3)
    assert found.label_histogram == [(0, 0, 4), (1, 1, 3), (2, 2, 2)]


def test_records_and_queries_are_counted_before_grouping(tmp_path, monkeypatch):
    monkeypatch.setattr(record_store, "CHUNK", 2)
    path = write(tmp_path / "a.jsonl", pointwise(("a", "x", 1), ("b", "x", 0), ("a", "y", 0), ("b", "x", 1)))
    found = summary(open_store(path, group_by_query=True))
    assert (found.records, found.groups, found.pairs, found.queries) == (4, 2, 4, 2)
    assert (found.repeated_pairs, found.equal_label_groups) == (1, 0)


def test_continuous_labels_are_counted_in_ten_bins(tmp_path, monkeypatch):
    monkeypatch.setattr(record_store, "CHUNK", 7)
    values = [i / 64 for i in range(65)]  # 0 to 1; 65 values that float32 holds exactly
    path = write(tmp_path / "a.jsonl", pointwise(*(("q", "d", value) for value in values)))
    bars = summary(open_store(path)).label_histogram
    # bin k holds the values in [k/10, (k+1)/10), the last one 1.0 too
    bin_of = [min(int(value * 10), 9) for value in values]
    expected = [bin_of.count(k) for k in range(10)]
    assert [count for *_, count in bars] == expected
    assert (bars[0][0], bars[-1][1]) == (0, 1)


def test_the_scale_from_0_to_10_is_counted_level_by_level(tmp_path):
    path = write(tmp_path / "a.jsonl", pointwise(*(("q", "d", value) for value in [*range(11), 10])))
    expected = [(level, level, 1 + (level == 10)) for level in range(11)]
    assert summary(open_store(path)).label_histogram == expected


def test_the_summary_reads_as_text_with_bars(tmp_path):
    records = [hits("a", 1, 0, 0), hits("b", 0, 0), {"query": "c", "pos": [""]}]
    found = summary(open_store(write(tmp_path / "a.jsonl", records)))
    lengths = np.array([10, 20, 30, 40, 50, 600])
    text = format_summary(found, "train.jsonl", token_lengths=lengths, max_len=50, sampled=True)
    # sorted lengths at ranks 0.5 * 5, 0.95 * 5 and 0.99 * 5, rounded up: 40, 600, 600
    assert text.splitlines() == [
        "train.jsonl",
        "  records          3",
        "  pairs            6",
        "  queries          3 distinct",
        "  groups           3 of 1 to 3 documents",
        "                   2 of them with all labels equal",
        "  repeated pairs   0 (same query and document)",
        "  empty documents  1",
        "  tokens per pair  p50 40, p95 600, p99 600, max 600",
        "  truncated        1 pairs (16.7%) at 50 tokens",
        "                   (tokens counted on a sample of 6 pairs)",
        "  labels",
        "                     0             4   66.7%  " + "█" * 30,
        "                     1             2   33.3%  " + "█" * 15,
    ]


def test_the_summary_fits_80_columns_and_shows_rare_labels(tmp_path):
    count = 123_456_789
    bars = [(i / 1000 - 12.3456, i / 1000 - 11.3456, 10**i % count) for i in range(10)]
    found = record_store.StoreSummary(count, count, count, count, count, count, count, 1, count, bars)
    text = format_summary(found, "a", token_lengths=np.full(9, 10**6), max_len=512, sampled=True)
    assert max(map(len, text.splitlines())) <= 80
    assert text.splitlines()[-10].endswith("0.0%  █")


def test_building_and_reading_a_store_imports_neither_pandas_nor_torch(tmp_path):
    path = write(tmp_path / "a.jsonl", random_records(seed=6, count=20))
    program = (
        "import sys; from rag_retrieval.record_store import open_store; "
        f"store = open_store({str(path)!r}, group_by_query=True); store.group(0); store.positives; "
        "print([name for name in ('pandas', 'torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    root = Path(record_store.__file__).parents[1]
    printed = subprocess.check_output([sys.executable, "-c", program], cwd=root, text=True)
    assert printed.strip() == "[]"
