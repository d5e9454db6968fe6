"""Parts of whole records: the same ones whatever was finished before, and one whole file at the end."""

import pytest

from rag_retrieval.core.files import check_new_file
from rag_retrieval.data.records import Record
from rag_retrieval.distill.parts import Part, PartFolder, plan_parts, records_of


def record(documents: int, query: str = "q") -> Record:
    return Record(query, ["d"] * documents, [1.0] * documents, [True] * documents, "hits", 1)


def test_a_part_is_closed_by_the_record_that_fills_it():
    plan = plan_parts(map(record, [2, 1, 4, 9, 1, 1]), pairs_per_part=3)
    assert plan == [Part(0, 2, 3), Part(2, 1, 4), Part(3, 1, 9), Part(4, 2, 2)]
    assert plan_parts([record(3)], 3) == [Part(0, 1, 3)]
    assert plan_parts([], 3) == []


def test_the_records_of_some_parts_are_found_among_all():
    records = [record(documents, f"q{place}") for place, documents in enumerate([2, 1, 4, 9, 1, 1])]
    plan = plan_parts(records, 3)
    expected = [["q0", "q1"], ["q2"], ["q3"], ["q4", "q5"]]
    for wanted in [[], [0], [1, 3], [0, 1, 2, 3]]:
        found = dict(records_of([plan[place] for place in wanted], iter(records)))
        assert [[one.query for one in found[plan[place]]] for place in wanted] == [expected[place] for place in wanted]


@pytest.fixture
def folder(tmp_path) -> PartFolder:
    return PartFolder(tmp_path / "out.jsonl")


def test_parts_become_the_output_in_order_and_leave_nothing_beside_it(folder, tmp_path):
    parts = [Part(0, 1, 1), Part(1, 2, 2)]
    folder.begin({"dataset": "a"}, overwrite=False)
    folder.write(parts[1], ["b\n", "c\n"])
    assert [folder.is_finished(part) for part in parts] == [False, True] and not folder.output.exists()
    folder.write(parts[0], ["a\n"])
    assert list(folder.lines(parts)) == ["a\n", "b\n", "c\n"]
    folder.finish(parts)
    assert folder.output.read_text() == "a\nb\nc\n" and list(tmp_path.iterdir()) == [folder.output]


def test_parts_that_others_finished_are_counted_once(folder):
    parts = [Part(0, 1, 2), Part(1, 1, 3), Part(2, 1, 4)]
    folder.begin({"dataset": "a"}, overwrite=False)
    waiting = list(parts)
    assert folder.take_finished(waiting) == 0 and waiting == parts
    folder.write(parts[2], ["c\n"])
    folder.write(parts[0], ["a\n"])
    assert folder.take_finished(waiting) == 6 and waiting == [parts[1]]
    assert folder.take_finished(waiting) == 0


def test_the_same_run_keeps_its_finished_parts_and_drops_the_torn_one(folder):
    part = Part(0, 1, 1)
    folder.begin({"dataset": "a"}, overwrite=False)
    folder.write(part, ["a\n"])
    (folder.path / ".from-000000001.jsonl.0a1b2c3d.tmp").write_text("half")
    folder.begin({"dataset": "a"}, overwrite=True)
    assert folder.is_finished(part) and not list(folder.path.glob("*.tmp"))


def test_parts_of_another_run_are_refused_with_the_difference_unless_overwritten(folder):
    part = Part(0, 1, 1)
    folder.begin({"dataset": "a", "max_len": 64}, overwrite=False)
    folder.write(part, ["a\n"])
    with pytest.raises(ValueError, match=r"parts of a run that differs:\n  max_len: was 64, now 128\nRestore"):
        folder.begin({"dataset": "a", "max_len": 128}, overwrite=False)
    assert folder.is_finished(part)
    folder.begin({"dataset": "a", "max_len": 128}, overwrite=True)
    assert not folder.is_finished(part)


def test_an_output_is_replaced_only_on_request(folder):
    check_new_file(folder.output, overwrite=False)
    folder.output.write_text("old")
    check_new_file(folder.output, overwrite=True)
    with pytest.raises(ValueError, match="out.jsonl exists; take another output, or overwrite: true"):
        check_new_file(folder.output, overwrite=False)


def test_a_run_without_a_finished_part_does_not_block_another(folder):
    folder.begin({"teachers": ["wrong"]}, overwrite=False)
    folder.begin({"teachers": ["right"]}, overwrite=False)
    folder.write(Part(0, 1, 1), ["a\n"])
    with pytest.raises(ValueError, match=r"teachers: was \['right'\], now \['wrong'\]"):
        folder.begin({"teachers": ["wrong"]}, overwrite=False)


def test_an_output_that_is_a_folder_is_refused_whatever_may_be_overwritten(folder):
    folder.output.mkdir()
    with pytest.raises(ValueError, match="out.jsonl is a folder; give the name of a file"):
        check_new_file(folder.output, overwrite=True)


def test_a_part_that_lost_lines_is_named_and_nothing_is_written(folder):
    folder.begin({"dataset": "a"}, overwrite=False)
    folder.write(Part(0, 2, 2), ["a\n"])
    with pytest.raises(ValueError, match="from-000000000.jsonl: has 1 lines and was written with 2; delete it"):
        list(folder.lines([Part(0, 2, 2)]))
    assert not folder.output.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused_and_kept(tmp_path, overwrite):
    folder = PartFolder(tmp_path / "soft.jsonl")
    folder.path.mkdir()
    (folder.path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="soft.jsonl.parts .*notes.txt"):
        folder.begin({"dataset": "a"}, overwrite)
    assert (folder.path / "notes.txt").read_text() == "mine"


def test_a_link_in_place_of_the_folder_is_refused_and_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "from-000000000.jsonl").write_text("{}")
    folder = PartFolder(tmp_path / "soft.jsonl")
    folder.path.symlink_to(elsewhere)
    with pytest.raises(ValueError, match="soft.jsonl.parts"):
        folder.begin({"dataset": "a"}, overwrite=True)
    assert (elsewhere / "from-000000000.jsonl").exists()
