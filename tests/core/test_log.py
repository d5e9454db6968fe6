"""What a person sees of a long job: numbers, lines in a file, a bar on a terminal."""

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import termios

import pytest

from rag_retrieval.core import log
from rag_retrieval.core.log import Progress, launched_rank, set_up_logging

JOB = """
import logging
from rag_retrieval.core.log import Progress, set_up_logging
set_up_logging()
with Progress(1000, "读取语料库读取语料库读取语料库读取语料库", "documents") as progress:
    progress.update(250)
    progress.note = "loss 0.5"
    if progress.bar:
        progress.bar.refresh()
    logging.getLogger("rag_retrieval").info("a line of [b]text[/b] " + "x" * 100)
    logging.getLogger("rag_retrieval").info(("word" * 5 + " ") * 10)
    progress.update(750)
"""


def test_speed_and_time_left_are_of_what_this_run_does():
    with Progress(4000, "scoring", "pairs", done=1000) as job:
        job.update(500)
        assert job.describe(50.0) == "1,500/4,000 pairs, 10.0/s, 0:04:10 left"


def test_nothing_done_yet_has_no_time_left():
    with Progress(10, "mining", "queries", done=4) as job:
        assert job.describe(60.0) == "4/10 queries, 0.0/s, ? left"


def test_without_a_terminal_a_line_is_logged_when_it_is_due_and_on_the_main_process_alone(monkeypatch, caplog, capsys):
    caplog.set_level(logging.INFO, "rag_retrieval")
    with Progress(10, "mining", "queries") as job:
        job.update()
        assert not caplog.messages
        monkeypatch.setattr(log, "LOG_EVERY", 0.0)
        job.update(2)
    (line,) = caplog.messages
    assert line.startswith("mining: 3/10 queries, ")
    with Progress(10, "mining", "queries", shown=False) as job:
        job.update(2)
    assert caplog.messages == [line] and not capsys.readouterr().err


def run_job(code: str = JOB, **streams) -> subprocess.Popen:
    settings = os.environ | {"COLUMNS": "80", "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
    settings.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)  # which a command leaves in the process of the tests
    return subprocess.Popen([sys.executable, "-c", code], env=settings, **streams)


def shown_on_a_terminal(code: str = JOB) -> str:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 80))
    process = run_job(code, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # how Linux says that the other end of a terminal is closed
        pass
    assert process.wait(600) == 0
    return shown.decode()


def test_on_a_terminal_a_bar_with_rate_and_time_left_fits_80_columns_below_the_lines():
    text = shown_on_a_terminal()
    assert "250/1,000 documents" in text and "1,000/1,000 documents" in text
    assert re.search(r"/s, \d+:\d\d:\d\d", text)
    assert " left" in text and "loss 0.5" in text
    assert "a line of [b]text[/b] " + "x" * 100 in text.replace("\r\n", "")
    assert text.count("word" * 5) == 10, "lines break between words"
    assert max(len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line)) for line in text.split("\n")) <= 80


@pytest.mark.slow  # two processes import torch
def test_a_command_shows_no_bar_of_a_loading_model_whenever_it_imports_transformers():
    loads = "import rag_retrieval.models.loading\nfrom transformers.utils.logging import tqdm\n"
    loads += "list(tqdm(range(3), desc='Loading weights'))\n"
    in_command = "from rag_retrieval.core.log import set_up_logging\nset_up_logging()\n"
    assert "Loading weights" not in shown_on_a_terminal(in_command + loads)
    assert "Loading weights" in shown_on_a_terminal(loads), "that of a Python caller stays"


def test_in_a_file_there_are_plain_lines():
    process = run_job(stderr=subprocess.PIPE)
    lines = process.communicate(timeout=600)[1].decode().splitlines()
    assert len(lines) == 2 and lines[0].endswith("a line of [b]text[/b] " + "x" * 100)
    assert "\x1b" not in "".join(lines)


def test_in_a_file_other_libraries_print_no_bar_and_their_warnings_once():
    code = """if True:
        from rag_retrieval.core.log import set_up_logging
        set_up_logging()
        from huggingface_hub.utils import logging
        logging.get_logger("huggingface_hub.utils._http").warning("no connection")
        from transformers.utils.logging import tqdm
        list(tqdm(range(3), desc="Loading weights"))
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert printed.stderr.count("no connection") == 1 and "Loading" not in printed.stderr


def test_a_long_description_and_a_long_note_are_cut_and_the_numbers_are_not(monkeypatch):
    """Chinese characters take two columns each."""
    from rich.console import Console

    console = Console(width=80, file=io.StringIO())
    monkeypatch.setattr(log, "_console", lambda: console)
    job = Progress(10**9, "读取语料库" * 9, "documents")
    job.note = "y" * 200
    lines = ["".join(part.text for part in line) for line in console.render_lines(job._display(), pad=False)]
    assert len(lines) == 2 and f"0/1,000,000,000 documents, {0.0}/s, ? left" in lines[0]
    for line in lines:
        assert "…" in line and sum(2 if "\u2e80" < character < "\uff00" else 1 for character in line) <= 80


def test_rank_counts_only_in_a_group(monkeypatch):
    for rank, size, expected in (("3", "4", 3), ("1", None, 0), ("1", "1", 0), (None, None, 0), ("", "", 0)):
        for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        assert launched_rank() == expected


def test_setting_up_imports_nothing_heavy_and_an_installed_deepspeed_is_quiet():
    code = (
        "import json, logging, sys; from rag_retrieval.core.log import set_up_logging; set_up_logging(); "
        "print(json.dumps(sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))); "
        "logger = logging.getLogger('DeepSpeed'); file = 'deepspeed/accelerator/real_accelerator.py'; "
        "logger.handle(logger.makeRecord('DeepSpeed', 30, file, 1, 'no GPU', (), None)); logger.warning('scale is 1')"
    )
    settings = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=600)
    assert json.loads(done.stdout) == []
    assert "no GPU" not in done.stderr and "scale is 1" in done.stderr


def test_logging_is_set_up_once_and_other_handlers_stay(monkeypatch):
    root = logging.getLogger()
    before = list(root.handlers)
    set_up_logging()
    assert root.handlers == before or not before
