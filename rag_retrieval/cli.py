"""The command `rag-retrieval`: a line in `COMMANDS` for each thing that the package does, and a function that runs it.

Nothing is imported before it is needed, so that `--help`, mistakes and Ctrl-C are answered at once.
"""

import logging
import sys
import time
from typing import TYPE_CHECKING

from rag_retrieval.core.command import Command, prepare_streams, print_result, run_command
from rag_retrieval.core.log import launched_rank
from rag_retrieval.evaluate.commands import EVALUATIONS, evaluate_any
from rag_retrieval.train.script import TRAINERS, train_any

if TYPE_CHECKING:
    from rag_retrieval.distill.config import DistillConfig
    from rag_retrieval.export.config import ExportConfig, PushConfig
    from rag_retrieval.mining.config import MiningConfig
    from rag_retrieval.retrieval.config import IndexConfig

logger = logging.getLogger(__name__)

CONTINUES = "the same command continues where this one stopped"

COMMANDS = {
    command.name: command
    for command in (
        TRAINERS["reranker"],
        EVALUATIONS["reranker"],
        Command(
            "index",
            "encode and index a corpus, change an index, or export it",
            config="rag_retrieval.retrieval.config:IndexConfig",
            run="rag_retrieval.cli:index",
            work=("rag_retrieval.retrieval.building",),
            interrupted=CONTINUES,
        ),
        Command(
            "search",
            "search an index, and rerank what is found",
            config="rag_retrieval.retrieval.search:SearchConfig",
            run="rag_retrieval.retrieval.search:run",
            work=("rag_retrieval.retrieval.retriever",),
        ),
        Command(
            "fit-fusion",
            "fit how much each stage of an index counts",
            config="rag_retrieval.retrieval.fit_fusion:FitFusionConfig",
            run="rag_retrieval.retrieval.fit_fusion:run",
            work=("rag_retrieval.retrieval.retriever",),
        ),
        Command(
            "mteb",
            "measure a model on tasks of MTEB",
            config="rag_retrieval.integrations.mteb_config:MtebConfig",
            run="rag_retrieval.integrations.mteb:run",
            interrupted="what was measured is kept, and the same command continues",
        ),
        Command(
            "mine",
            "find hard negatives in a corpus",
            config="rag_retrieval.mining.config:MiningConfig",
            run="rag_retrieval.cli:mine",
            work=("rag_retrieval.mining.run",),
            interrupted=CONTINUES,
        ),
        Command(
            "distill",
            "score training pairs with teacher models",
            config="rag_retrieval.distill.config:DistillConfig",
            run="rag_retrieval.cli:distill",
            work=("rag_retrieval.distill.run",),
            interrupted=CONTINUES,
        ),
        Command(
            "export",
            "write a reranker or embedder as ONNX",
            config="rag_retrieval.export.config:ExportConfig",
            run="rag_retrieval.cli:export",
            work=("rag_retrieval.export.run",),
        ),
        Command(
            "benchmark",
            "measure how fast models compute on this machine",
            config="rag_retrieval.infer.benchmark:BenchmarkConfig",
            run="rag_retrieval.infer.benchmark:run",
        ),
        Command(
            "serve",
            "answer requests to rerank, embed and search over HTTP",
            config="rag_retrieval.serve.config:ServeConfig",
            run="rag_retrieval.serve.server:serve",
            interrupted="the server did not listen yet",
        ),
        Command(
            "push",
            "upload a model with its card to a hub",
            config="rag_retrieval.export.config:PushConfig",
            run="rag_retrieval.cli:push",
            work=("rag_retrieval.export.hub",),
            interrupted="the upload is not complete",
        ),
        Command(
            "quickstart",
            "train on the example data and show what it brought",
            config="rag_retrieval.quickstart:QuickstartConfig",
            run="rag_retrieval.quickstart:run",
        ),
    )
}
HELP = "\n".join(
    [
        "Usage: rag-retrieval COMMAND [--config FILE] [--KEY VALUE ...]\n",
        *(f"  {command.name:<12}{command.about}" for command in COMMANDS.values()),
        "\nrag-retrieval COMMAND --help shows the keys of a command.",
    ]
)


def main(arguments: list[str] | None = None) -> int:
    prepare_streams()
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [None]
    if name == "train":
        return train_any(rest)
    if name == "evaluate":
        return evaluate_any(rest)
    if name in COMMANDS:
        return run_command(COMMANDS[name], rest)
    if name in ("-h", "--help"):
        return print_result(HELP)
    print(f"error: {f'unknown command {name!r}' if name else 'a command is missing'}\n\n{HELP}", file=sys.stderr)
    return 2


def mine(config: "MiningConfig") -> str:
    from rag_retrieval.mining.config import summary_file
    from rag_retrieval.mining.run import mine

    started = time.monotonic()
    summary = mine(config)
    if launched_rank() > 0:
        return ""
    logger.info("the same as JSON: %s", summary_file(config.output))
    first = f"{config.output}: {summary.lines:,} lines in {time.monotonic() - started:.0f} s"
    return f"{first}\n{summary.describe(config.num_negatives)}"


def index(config: "IndexConfig") -> str:
    from rag_retrieval.retrieval.config import IndexOptions
    from rag_retrieval.retrieval.index import Index, build_index
    from rag_retrieval.retrieval.index_files import LOCAL_KEYS

    started = time.monotonic()
    if config.corpus is not None:
        built = build_index(config.corpus, config.output, config.only(IndexOptions), config)
    else:
        built = Index(config.output, **config.given(*LOCAL_KEYS))
    if config.add or config.remove:
        built.update(config.add, config.ids_to_remove(), config)
    if launched_rank() > 0:
        return ""
    if config.parquet is not None:
        built.to_parquet(config.parquet)
    return f"{config.output}: {built.describe()} in {time.monotonic() - started:.0f} s"


def distill(config: "DistillConfig") -> str:
    from rag_retrieval.distill.run import distill

    started = time.monotonic()
    summary = distill(config)
    logger.info("%.0f s", time.monotonic() - started)
    return "" if launched_rank() > 0 else f"{config.output}: {summary.describe()}"


def export(config: "ExportConfig") -> str:
    from rag_retrieval.export.run import export_model

    return export_model(config).describe()


def push(config: "PushConfig") -> str:
    from rag_retrieval.export.hub import push_to_hub, stage

    card = {"language": config.language, "license": config.license, "evaluations": config.evaluations}
    if config.dry_run is not None:
        stage(config.model, config.dry_run, config.repo_id, **card)
        return f"{config.dry_run}: what would be uploaded to {config.repo_id}"
    options = {"private": config.private, "commit_message": config.commit_message}
    return push_to_hub(config.model, config.repo_id, **options, **card)


if __name__ == "__main__":
    sys.exit(main())
