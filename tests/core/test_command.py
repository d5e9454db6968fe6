"""How commands end with an error."""

from rag_retrieval.core import command


def test_other_processes_leave_the_message_to_the_first(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(command, "GRACE", 0.0)
    assert command.report(ValueError("wrong"), 2, on_all_processes=True) == 2
    assert not capsys.readouterr().err
    command.report(ValueError("wrong"), 2, on_all_processes=False)
    assert capsys.readouterr().err == "error in process 3: wrong\n"


def test_an_error_of_the_system_begins_with_its_file(tmp_path, capsys):
    try:
        (tmp_path / "gone" / "a").touch()
    except OSError as error:
        assert command.report(error, 2, on_all_processes=True) == 2
    advice = "No such file or directory; check the path, its rights and the room on the disk"
    assert capsys.readouterr().err == f"error: {tmp_path}/gone/a: {advice}\n"
    command.report(OSError("the hub cannot be reached"), 2, on_all_processes=True)
    assert capsys.readouterr().err == "error: the hub cannot be reached\n"


def test_the_launcher_s_summary_gets_the_message_of_the_process_that_says_it(monkeypatch, tmp_path):
    """Read as torch's launcher reads it."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setattr(command, "GRACE", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    command.report(ValueError("a mistake"), 2, on_all_processes=True)
    assert not file.exists()
    command.report(ValueError("a mistake"), 2, on_all_processes=False)
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(file))
    assert failure.message["message"] == "error in process 1: a mistake"
