"""How far a long job is, in numbers and in a log file."""

import logging

from rag_retrieval.core import log
from rag_retrieval.core.log import Progress


def test_speed_and_time_left_are_of_what_this_run_does():
    with Progress(4000, "scoring", "pairs", done=1000) as job:
        job.update(500)
        assert job.describe(50.0) == "1,500 of 4,000 pairs, 10.0 a second, 0:04:10 left"


def test_nothing_done_yet_has_no_time_left():
    with Progress(10, "mining", "queries", done=4) as job:
        assert job.describe(60.0) == "4 of 10 queries, 0.0 a second, ? left"


def test_without_a_terminal_a_line_is_logged_when_it_is_due_and_on_the_main_process_alone(monkeypatch, caplog, capsys):
    caplog.set_level(logging.INFO, "rag_retrieval")
    with Progress(10, "mining", "queries") as job:
        job.update()
        assert not caplog.messages
        monkeypatch.setattr(log, "LOG_EVERY", 0.0)
        job.update(2)
    (line,) = caplog.messages
    assert line.startswith("mining: 3 of 10 queries, ")
    with Progress(10, "mining", "queries", shown=False) as job:
        job.update(2)
    assert caplog.messages == [line] and not capsys.readouterr().err
