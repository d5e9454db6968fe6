import zlib

from accelerate import Accelerator
from training_runs import write_jsonl

from rag_retrieval.train import provenance
from rag_retrieval.train.provenance import Provenance, content_digest, engine_of, library_versions


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


def test_the_digest_is_of_sizes_and_content_not_of_names(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"abc"), second.write_bytes(b"abc")
    expected = f"{zlib.crc32(b'3abc'):08x}"
    assert content_digest([first]) == content_digest([second]) == expected
    second.write_bytes(b"abd")
    assert content_digest([second]) != expected
    assert content_digest([first, second]) != content_digest([second, first])


def test_a_large_file_is_read_in_evenly_spread_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "BLOCK", 4)
    monkeypatch.setattr(provenance, "SAMPLED_BLOCKS", 2)
    path = tmp_path / "a"
    path.write_bytes(b"aaaabbbbccccdd")  # blocks 0 and 2 of four
    assert content_digest([path]) == f"{zlib.crc32(b'14aaaacccc'):08x}"


def test_the_same_data_under_another_name_have_the_same_store(tmp_path):
    from rag_retrieval.data.store import open_store
    from rag_retrieval.train.reranker.resume_checks import store_digest

    lines = [{"query": "rain", "content": "wet", "label": 1}, {"query": "rain", "content": "dry", "label": 0}]
    one = open_store(write_jsonl(tmp_path / "a.jsonl", lines), cache_dir=tmp_path)
    two = open_store(write_jsonl(tmp_path / "b.jsonl", lines), cache_dir=tmp_path)
    assert one.folder != two.folder and store_digest(one) == store_digest(two)
    lines[1]["content"] = "dri"
    assert store_digest(open_store(write_jsonl(tmp_path / "c.jsonl", lines), cache_dir=tmp_path)) != store_digest(one)
