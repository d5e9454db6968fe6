import pytest
from beir_samples import write, write_lines, write_toy

from rag_retrieval.data.records import DataError
from rag_retrieval.evaluate.ranking_data import read_ranking_data

pytest.importorskip("bm25s")
pytest.importorskip("Stemmer")


@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path / "toy")


def ranked(path, depth=20, candidates="bm25", split="test"):
    """Document ids by query, in the order of the first stage."""
    data = read_ranking_data(path, split, candidates, depth)
    return {query: list(documents) for query, documents in data.candidates.items()}


def test_the_folders_own_bm25_run_is_used_to_the_given_depth(toy):
    assert ranked(toy, depth=3)["q8"] == ["d8-1", "d8-2", "d8-0"]


def test_a_judged_pool_limits_the_candidates(toy):
    write(toy / "candidates.test.tsv", "query-id\tcorpus-id\nq8\td8-4\nq8\td8-0\n")
    assert ranked(toy) == {"q8": ["d8-0", "d8-4"], "q9": [], "q10": [], "q11": []}


def test_without_a_run_file_bm25_is_computed_and_finds_the_shared_words(toy):
    (toy / "runs/bm25.test.tsv").unlink()
    data = read_ranking_data(toy, "test", "bm25", depth=4)
    # "windows" and "window" have one stem; documents without the word are not listed
    scores = data.candidates["q8"]
    assert len(scores) == 4 and all(document.startswith("d8-") for document in scores)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_a_computed_bm25_ranks_the_whole_pool_even_without_a_shared_word(toy):
    (toy / "runs/bm25.test.tsv").unlink()
    write(toy / "candidates.test.tsv", "query-id\tcorpus-id\nq8\td1-0\nq8\td8-4\n")
    data = read_ranking_data(toy, "test", "bm25", depth=20)
    assert list(data.candidates["q8"]) == ["d8-4", "d1-0"] and data.candidates["q8"]["d1-0"] == 0


def test_a_run_file_gives_the_candidates_and_its_best_are_taken(toy, tmp_path):
    lines = ["q8 Q0 d8-5 1 0.5 x", "q8 Q0 d1-1 2 7.5 x", "q8 Q0 d8-2 3 1.5 x", "q0 Q0 d0-0 1 1 x"]
    write(tmp_path / "other.trec", "\n".join(lines))
    data = read_ranking_data(toy, "test", tmp_path / "other.trec", depth=2)
    assert data.candidates == {"q8": {"d1-1": 7.5, "d8-2": 1.5}, "q9": {}, "q10": {}, "q11": {}}
    assert (data.source, data.num_pairs) == ("other.trec", 2)


def test_a_run_of_other_queries_or_documents_is_refused(toy, tmp_path):
    write(tmp_path / "train.trec", "q0 Q0 d0-0 1 1 x\n")
    with pytest.raises(ValueError, match="has none of the 4 judged queries .such as 'q8'., but 1 others"):
        ranked(toy, candidates=tmp_path / "train.trec")
    write(tmp_path / "alien.trec", "q8 Q0 d77 1 1 x\n")
    with pytest.raises(ValueError, match="document 'd77' of query 'q8' is not in the data's corpus"):
        ranked(toy, candidates=tmp_path / "alien.trec")


def test_records_are_their_own_candidates_with_labels_as_grades(tmp_path):
    hits = [{"content": "a cat sleeps", "label": 0}, {"content": "the dog barks", "label": 2}]
    pairs = [{"query": "bird", "content": text, "label": label} for text, label in (("a bird sings", 1), ("a fish", 0))]
    write_lines(tmp_path / "dev.jsonl", [pairs[0], {"query": "dog", "hits": hits}, pairs[1]])
    data = read_ranking_data(tmp_path / "dev.jsonl", "ignored", "bm25", depth=20)
    assert data.qrels == {"q1": {"q1-0": 1, "q1-1": 0}, "q2": {"q2-0": 0, "q2-1": 2}}
    assert data.queries == {"q1": "bird", "q2": "dog"} and data.documents["q1-1"] == "a fish"
    # by BM25: a document that holds the query's word is first
    assert {query: list(documents) for query, documents in data.candidates.items()} == {
        "q1": ["q1-0", "q1-1"],
        "q2": ["q2-1", "q2-0"],
    }


def test_a_teacher_s_scores_are_no_grades_but_pos_and_neg_are(tmp_path):
    record = {"query": "dog", "pos": ["the dog"], "neg": ["a cat"], "pos_scores": [0.9], "neg_scores": [0.2]}
    write_lines(tmp_path / "soft.jsonl", [record])
    assert read_ranking_data(tmp_path / "soft.jsonl", "", "bm25", 9).qrels == {"q1": {"q1-0": 1, "q1-1": 0}}


@pytest.mark.parametrize(("label", "shown"), [(0.7, "0.7"), (1e30, "1e\\+30")])
def test_the_record_whose_labels_are_no_grades_is_named(tmp_path, label, shown):
    whole, odd = (
        {"query": query, "hits": [{"content": "x", "label": top}, {"content": "y", "label": 1}]}
        for query, top in (("cat", 2), ("dog", label))
    )
    write_lines(tmp_path / "hits.jsonl", [whole, odd])
    with pytest.raises(DataError, match=rf"hits.jsonl:2: found the labels {shown}, 1; expected whole grades"):
        ranked(tmp_path / "hits.jsonl")


def test_data_in_which_nothing_can_be_ranked_are_refused(toy):
    write(toy / "candidates.test.tsv", "q0\td0-0\n")
    with pytest.raises(ValueError, match="toy test: BM25 .* has no candidate for any of the 4 judged queries"):
        ranked(toy)


def arguana(tmp_path):
    """Query a1 is also a document, and has the same words as no other."""
    texts = {"a1": "cats should vote", "b1": "cats should not vote", "c1": "vote"}
    write_lines(tmp_path / "corpus.jsonl", [{"_id": id_, "text": text} for id_, text in texts.items()])
    write_lines(tmp_path / "queries.jsonl", [{"_id": "a1", "text": texts["a1"]}, {"_id": "q", "text": "vote"}])
    write(tmp_path / "qrels/test.tsv", "query-id\tcorpus-id\tscore\na1\tb1\t1\nq\tc1\t1\n")
    return tmp_path


def test_a_document_with_its_querys_id_is_no_candidate(tmp_path):
    folder = arguana(tmp_path)
    data = read_ranking_data(folder, "test", "bm25", 2)
    assert list(data.candidates["a1"]) == ["b1", "c1"] and "a1" in data.candidates["q"]
    assert data.identical_ids == 1
    data = read_ranking_data(folder, "test", "bm25", 2, ignore_identical_ids=False)
    assert (list(data.candidates["a1"]), data.identical_ids) == (["a1", "b1"], 0)


def test_a_run_s_identical_ids_are_left_out_before_the_depth_counts(tmp_path):
    folder = arguana(tmp_path)
    write(folder / "run", "a1 Q0 a1 1 3 x\na1 Q0 c1 2 2 x\na1 Q0 b1 3 1 x\nq Q0 c1 1 1 x\n")
    data = read_ranking_data(folder, "test", folder / "run", 2)
    assert (data.candidates["a1"], data.identical_ids) == ({"c1": 2, "b1": 1}, 1)
    assert read_ranking_data(folder, "test", folder / "run", 1).candidates["q"] == {"c1": 1}


def test_how_words_were_made_is_kept_where_they_were_counted(toy):
    assert read_ranking_data(toy, "test", "bm25", 3).words == "", "the folder's own run"
    (toy / "runs/bm25.test.tsv").unlink()
    assert read_ranking_data(toy, "test", "bm25", 3).words.startswith("english ")
    assert read_ranking_data(toy, "test", "bm25", 3, language="plain").words.startswith("plain ")


def test_a_chinese_query_finds_chinese_documents_in_an_english_corpus(tmp_path):
    pytest.importorskip("jieba")
    english = [{"_id": f"e{number}", "text": f"an English text number {number}"} for number in range(300)]
    write_lines(tmp_path / "corpus.jsonl", [*english, {"_id": "zh", "text": "大熊猫主要吃竹子"}])
    write_lines(tmp_path / "queries.jsonl", [{"_id": "q", "text": "大熊猫吃什么"}])
    write(tmp_path / "qrels/test.tsv", "q\tzh\t1\n")
    data = read_ranking_data(tmp_path, "test", "bm25", 5)
    assert list(data.candidates["q"]) == ["zh"]
    assert "english" in data.words and "chinese" in data.words


def test_triples_of_a_query_are_its_candidates_each_document_once(tmp_path):
    write(tmp_path / "dev.tsv", "cat\ta cat\ta dog\nfish\ta fish\ta cow\ncat\ta cat\ta bird\n")
    data = read_ranking_data(tmp_path / "dev.tsv", "", "bm25", 9)
    assert data.qrels == {"q1": {"q1-0": 1, "q1-1": 0, "q1-2": 0}, "q2": {"q2-0": 1, "q2-1": 0}}
    assert [data.documents[f"q1-{place}"] for place in range(3)] == ["a cat", "a dog", "a bird"]
