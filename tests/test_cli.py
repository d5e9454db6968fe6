"""The command line as a whole."""

import os
import subprocess
import sys

from rag_retrieval import cli


def test_every_command_is_in_the_help(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in cli.COMMANDS)


def test_a_command_without_options_says_what_is_missing(capsys):
    for name in cli.COMMANDS.keys() - {"quickstart"}:
        assert cli.main([name]) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("error: --") and "is missing" in shown.err and not shown.out


def test_an_unknown_command_is_a_mistake(capsys):
    assert cli.main(["trian"]) == 2
    assert "error: unknown command 'trian'" in capsys.readouterr().err
    assert cli.main([]) == 2
    assert "error: a command is missing" in capsys.readouterr().err


def test_output_that_nobody_reads_is_no_error():
    """As after `| head`: the other end of the pipe is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "rag_retrieval.cli", "train", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
