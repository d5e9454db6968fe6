"""The command line as a whole."""

import importlib
import os
import subprocess
import sys

import pytest

from rag_retrieval import cli


@pytest.mark.parametrize("name", cli.MODULES)
def test_every_command_is_in_the_help_and_has_a_main(name, capsys):
    assert cli.main(["--help"]) == 0
    assert f"\n  {name} " in capsys.readouterr().out
    assert callable(importlib.import_module(cli.MODULES[name]).main)


@pytest.mark.parametrize("name", sorted(cli.MODULES.keys() - {"quickstart"}))
def test_a_command_without_options_says_what_is_missing(name, capsys):
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
