"""The summary counts right, and reads well at 80 columns."""

import numpy as np
import pytest
from record_samples import hits, pointwise, write

from rag_retrieval.data import store_build
from rag_retrieval.data import summary as summary_module
from rag_retrieval.data.store import open_store
from rag_retrieval.data.summary import StoreSummary, TokenLengths, format_summary, summary


@pytest.fixture(autouse=True)
def _cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RETRIEVAL_CACHE", str(tmp_path / "cache"))


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
    monkeypatch.setattr(store_build, "CHUNK", 2)
    path = write(tmp_path / "a.jsonl", pointwise(("a", "x", 1), ("b", "x", 0), ("a", "y", 0), ("b", "x", 1)))
    found = summary(open_store(path, group_by_query=True))
    assert (found.records, found.groups, found.pairs, found.queries) == (4, 2, 4, 2)
    assert (found.repeated_pairs, found.equal_label_groups) == (1, 0)


def test_continuous_labels_are_counted_in_ten_bins(tmp_path, monkeypatch):
    monkeypatch.setattr(summary_module, "CHUNK", 7)
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
    text = format_summary(found, "train.jsonl", [TokenLengths("pair", lengths, 50, sampled=True)])
    # sorted lengths at ranks 0.5 * 5, 0.95 * 5 and 0.99 * 5, rounded up: 40, 600, 600
    assert text.splitlines() == [
        "train.jsonl",
        "  records             3",
        "  pairs               6",
        "  queries             3 distinct",
        "  groups              3 of 1 to 3 documents",
        "                      2 of them with all labels equal",
        "  repeated pairs      0 (same query and document)",
        "  empty documents     1",
        "  tokens per pair     p50 40, p95 600, p99 600, max 600",
        "  truncated           1 pairs (16.7%) at 50 tokens",
        "                      (tokens counted on a sample of 6 pairs)",
        "  labels",
        "                     0             4   66.7%  " + "█" * 30,
        "                     1             2   33.3%  " + "█" * 15,
    ]


def test_the_summary_fits_80_columns_and_shows_rare_labels(tmp_path):
    count = 123_456_789
    bars = [(i / 1000 - 12.3456, i / 1000 - 11.3456, 10**i % count) for i in range(10)]
    found = StoreSummary(count, count, count, count, count, count, count, 1, count, bars)
    text = format_summary(found, "a", [TokenLengths("pair", np.full(9, 10**6), 512, sampled=True)])
    assert max(map(len, text.splitlines())) <= 80
    assert text.splitlines()[-10].endswith("0.0%  █")
