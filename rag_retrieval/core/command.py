"""A command as a process: help, options, signals, errors, output and exit code.

What a command computes never depends on being printed: `run` does the work, writes its files and returns the text for
stdout. Only the standard library is imported before a Ctrl-C is handled.
"""

import importlib
import io
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_retrieval.core.log import launched_rank, set_up_logging
from rag_retrieval.core.signals import Interrupted, exit_code, interrupt, leave_at_once, on_signals

if TYPE_CHECKING:
    from rag_retrieval.core.config import Config

logger = logging.getLogger(__name__)

GRACE = 5.0  # seconds in which the first process prints what went wrong, before a launcher ends all
WIDTH = 80  # columns of the help
EXTRAS = {  # library: the extra of this package that installs it
    **dict.fromkeys(("bm25s", "jieba", "Stemmer", "sentence_transformers"), "mine"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "onnx"),
    **dict.fromkeys(("prometheus_client", "starlette", "uvicorn"), "serve"),
    **{"faiss": "faiss", "matplotlib": "report", "mteb": "mteb", "openvino": "openvino", "peft": "lora", "ray": "ray"},
}


class CommandFailure(RuntimeError):
    """The work failed, and not by a mistake in options, data or models. on_all_processes: all of them raise it."""

    exit_code = 1
    on_all_processes = False


@dataclass(frozen=True)
class Command:
    """A command and its help.

    config: `module:class` of its configuration. run: `module:function`, which takes the configuration and returns the
    text for stdout or an exit code. work: the heavy modules that `run` needs, imported before it begins. interrupted:
    what an interrupted run leaves, for the message. config_folder: where `--config` is looked up after the current
    folder.
    """

    name: str
    about: str
    config: str
    run: str
    work: tuple[str, ...] = ()
    interrupted: str = "nothing was written"
    config_folder: Path | None = None


def run_command(command: Command, arguments: list[str]) -> int:
    """The exit code: 0; 1 where the work or the output failed; 2 for a mistake in options, data or models, or a missing
    library; 130 and 143 for SIGINT and SIGTERM; 141 for a closed pipe. With RAG_RETRIEVAL_TRACEBACK=1 in
    the environment, errors are raised instead."""
    prepare_streams()
    with on_signals(leave_at_once):
        from rag_retrieval.core.config_reader import ConfigError, current_folder, load_config, split_arguments

        try:
            current_folder()
            config_class: type[Config] = load_object(command.config)
            asked = {argument.replace("-", "_") for argument in arguments} & {"_h", "__help", "__help_all"}
            if asked:
                return print_result(describe_command(command, config_class, everything="__help_all" in asked))
            set_up_logging()
            path, options = split_arguments(arguments)
            config = load_config(config_class, path, options, command.config_folder)
            run: Callable[[Any], str | int] = load_object(command.run)
            for module in command.work:
                importlib.import_module(module)
        except ConfigError as error:
            return report(error, 2, on_all_processes=True)
        except ImportError as error:
            return report(with_extra(error), 2, on_all_processes=True)
        if config.ignored:
            logger.warning(config.ignored)
        return print_result(run_interruptibly(command, run, config))


def run_interruptibly(command: Command, run: Callable[[Any], str | int], config: Any) -> str | int:
    try:
        with on_signals(interrupt):
            return run(config)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        message = f"interrupted by {signal.Signals(number).name}; {command.interrupted}"
        return report(InterruptedError(message), exit_code(number), on_all_processes=True)
    except CommandFailure as error:
        return report(error, error.exit_code, error.on_all_processes)
    except ImportError as error:
        return report(with_extra(error), 2, on_all_processes=True)
    except (ValueError, OSError) as error:
        return report(error, 2, on_all_processes=False)
    except RuntimeError as error:
        if has_home():
            raise
        advice = "set HOME, or RAG_RETRIEVAL_CACHE and HF_HOME, to a folder that you may write to"
        no_home = OSError(f"{error} This user has none, and libraries keep their caches there: {advice}")
        return report(no_home, 2, on_all_processes=True)


def has_home() -> bool:
    """False for a user without HOME and without an entry in the system's list of users, as in some containers."""
    try:
        return bool(Path.home())
    except RuntimeError:
        return False


def load_object(name: str) -> Any:
    """What `module:name` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def load_own(key: str, name: str) -> Any:
    """What a user's `module:name` names, for the option `key`; the current folder is searched too. ValueError where it
    cannot be imported."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        return load_object(name)
    except Exception as error:  # whatever a user's module raises
        where = f"cannot be imported from sys.path or {os.getcwd()}"
        raise ValueError(f"{key} {name}: {where}: {type(error).__name__}: {error}") from error


def with_extra(error: ImportError) -> ImportError:
    """The error with the command that installs what is missing, where the library is one of ours."""
    extra = EXTRAS.get((error.name or "").partition(".")[0])
    return ImportError(f"{error}; run: pip install -e '.[{extra}]'") if extra else error


def report(error: Exception, code: int, on_all_processes: bool) -> int:
    """Print the error, once where all processes have it, and return the exit code."""
    if os.environ.get("RAG_RETRIEVAL_TRACEBACK"):
        raise error
    rank = launched_rank()
    if rank and on_all_processes:
        time.sleep(GRACE)
        return code
    text = f"error{f' in process {rank}' if rank else ''}: {describe_error(error)}"
    if summary := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun and accelerate print what it says, last of all
        message = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(summary).write_text(json.dumps({"message": message}), encoding="utf-8")
    with suppress(OSError):  # stderr is full, and there is no other place to say so
        print(text, file=sys.stderr, flush=True)
    return code


def describe_error(error: Exception) -> str:
    """The message; the system's about a file with the file first and with what to look at."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    names = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{names}: {error.strerror}; check the path, its rights and the room on the disk"


# stdout


def prepare_streams() -> None:
    """Let every character be written in some way, and closed streams swallow what is written."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed before the start; its descriptor must not become that of a file
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_result(result: str | int) -> int:
    """Print a text and return the exit code; an exit code returns as it is, after what was printed before it."""
    code = result if isinstance(result, int) else 0
    try:
        if isinstance(result, str) and result:
            print(result)
        sys.stdout.flush()
        return code
    except OSError as error:
        # what is still buffered would be written, and fail, at the end of Python
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return exit_code(signal.SIGPIPE)
        message = f"stdout: {error.strerror}; all work was done before, and its files are written"
        return report(OSError(message), 1, on_all_processes=False)


# Help


def describe_command(command: Command, config_class: "type[Config]", everything: bool) -> str:
    """The main keys with their meaning and the names of all others by group; or all with their meaning."""
    from click import HelpFormatter

    formatter = HelpFormatter(width=WIDTH)
    formatter.write_usage(f"rag-retrieval {command.name}", "[--config FILE] [--KEY VALUE ...]")
    formatter.write(f"\n{command.about[0].upper()}{command.about[1:]}.\n")
    groups: dict[str, list[str]] = {}
    title = "Options"
    for key in config_class.model_fields:
        title = config_class.groups.get(key, title)
        groups.setdefault(title, []).append(key)
    if everything:
        for title, keys in groups.items():
            with formatter.section(title):
                formatter.write_dl([describe_key(key, config_class) for key in keys], col_max=26)
    else:
        with formatter.section("Most used"):
            main_keys = [describe_key(key, config_class, short=True) for key in config_class.main_keys]
            formatter.write_dl(main_keys, col_max=26)
        others = [(title, [key for key in keys if key not in config_class.main_keys]) for title, keys in groups.items()]
        if lines := [f"{title}: {', '.join(keys)}" for title, keys in others if keys]:
            with formatter.section("All others (--help_all explains them)"):
                for line in lines:
                    formatter.write_text(line)
    formatter.write_paragraph()
    formatter.write_text(
        "Each is a key of the YAML file (--config) and an option, which wins: --key value, --key=value; --key alone "
        "is true. None means not given."
    )
    return formatter.getvalue().rstrip()


def describe_key(key: str, config_class: "type[Config]", short: bool = False) -> tuple[str, str]:
    """(`--lr`, meaning, what it takes and default). short: of the meaning the first sentence, and nothing in
    parentheses."""
    from rag_retrieval.core.config import expected, shown_value

    key_field = config_class.model_fields[key]
    default, takes = key_field.get_default(), expected(key_field)
    notes = [] if takes.endswith("text") else [takes]
    if key_field.is_required():
        notes.append("required")
    elif default not in (None, (), []):
        notes.append(f"default {','.join(default) if isinstance(default, tuple) else shown_value(default)}")
    meaning = key_field.description
    if short:
        meaning = re.sub(r" \([^()]*\)", "", meaning).partition(". ")[0].removesuffix(".")
    return f"--{key}", f"{meaning} ({', '.join(notes)})" if notes else meaning
