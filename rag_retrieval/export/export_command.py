"""`rag-retrieval export --model DIR --output DIR`: the command around `export_reranker`.

The trap: options are `--key value`, but `--force` may stand alone, as in other commands of this kind.
"""

from itertools import pairwise

from rag_retrieval.core.command import report, run_command
from rag_retrieval.export.export_config import EXPORTING, ExportConfig

USAGE = (
    "usage: rag-retrieval export --model DIR --output DIR [--quantize int8] "
    "[--data DIR] [--force]"
)
SWITCHES = ("--force",)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0; 1 where the exported model differs too much; 2 for a mistake in options, model or data;
    130 for Ctrl-C. With RAG_RETRIEVAL_TRACEBACK=1 in the environment, errors are raised instead."""
    return run_command(EXPORTING, USAGE, switched_on(arguments), run)


def switched_on(arguments: list[str]) -> list[str]:
    """`--force` without a value written out as `--force=true`."""
    return [
        f"{argument}=true" if argument in SWITCHES and after.startswith("--") else argument
        for argument, after in pairwise([*arguments, "--"])
    ]


def run(config: ExportConfig) -> int:
    try:
        from rag_retrieval.export.run import export_reranker
        from rag_retrieval.export.verify import DifferenceError
    except ImportError as error:
        return report(ImportError(f"{error}; run: pip install -e '.[onnx]'"), 2, on_all_processes=True)
    try:
        exported = export_reranker(config)
    except KeyboardInterrupt:
        return report(InterruptedError("interrupted; nothing was written"), 130, on_all_processes=True)
    except DifferenceError as error:
        return report(error, 1, on_all_processes=True)
    except (ValueError, OSError, ImportError) as error:
        return report(error, 2, on_all_processes=True)
    print(exported.describe())
    return 0
