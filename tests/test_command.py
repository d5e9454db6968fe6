"""How commands end with an error."""

from rag_retrieval import command


def test_other_processes_leave_the_message_to_the_first(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(command, "GRACE", 0.0)
    assert command.report(ValueError("wrong"), 2, on_all_processes=True) == 2
    assert not capsys.readouterr().err
    command.report(ValueError("wrong"), 2, on_all_processes=False)
    assert capsys.readouterr().err == "error in process 3: wrong\n"
