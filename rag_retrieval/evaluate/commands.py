"""`rag-retrieval evaluate`: a reranker on candidates or, with --retriever, retrievers over a whole corpus.

Heavy libraries are imported when an evaluation begins.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from rag_retrieval.core.command import Command, report, run_command
from rag_retrieval.core.log import launched_rank
from rag_retrieval.core.signals import leave_at_once, on_signals

if TYPE_CHECKING:
    from rag_retrieval.evaluate.config import EvaluationConfig
    from rag_retrieval.evaluate.retrieval_config import RetrievalEvaluationConfig

EVALUATIONS = {
    kind: Command(
        "evaluate",
        f"measure {what}; --{other}: {the_other}",
        config=f"rag_retrieval.evaluate.{config}",
        run=f"rag_retrieval.evaluate.commands:{run}",
        work=(work,),
        interrupted="the same command continues where this one stopped",
    )
    for kind, what, other, the_other, config, run, work in (
        ("reranker", "a reranker on judged queries", "retriever", "a corpus search", "config:EvaluationConfig",
         "evaluate", "rag_retrieval.evaluate.evaluation"),
        ("retriever", "searches of a whole corpus", "model", "a reranker on candidates",
         "retrieval_config:RetrievalEvaluationConfig", "evaluate_retrieval", "rag_retrieval.evaluate.retrieval"),
    )
}  # fmt: skip


def evaluate_any(arguments: list[str]) -> int:
    """The evaluation of retrievers where no `model` is given and a key that only it has, or the checkpoints of an
    embedder; else that of a reranker."""
    with on_signals(leave_at_once):
        from rag_retrieval.core.config_reader import ConfigError, asked_value
        from rag_retrieval.evaluate.config import EvaluationConfig
        from rag_retrieval.evaluate.other_commands import TRANSLATIONS
        from rag_retrieval.evaluate.retrieval_config import RetrievalEvaluationConfig
        from rag_retrieval.train.run_folder import CONFIGURATION_FILE

        given = {argument[2:].partition("=")[0].replace("-", "_") for argument in arguments if argument[:2] == "--"}
        names = {*RetrievalEvaluationConfig.model_fields, *RetrievalEvaluationConfig.aliases, *TRANSLATIONS}
        own = names - {*EvaluationConfig.model_fields, *EvaluationConfig.aliases}
        try:
            asked = {name: name in given or asked_value(name, arguments, [None]) for name in ("model", *own)}
            run = asked_value("checkpoints", arguments, [None])
            written = str(Path(run or "") / CONFIGURATION_FILE)
            trains = asked_value("task", ["--config", written], [None]) if run else None
        except ConfigError as error:
            return report(error, 2, on_all_processes=True)
    retrieves = not asked["model"] and (any(asked.values()) or trains == "embedding")
    return run_command(EVALUATIONS["retriever" if retrieves else "reranker"], arguments)


def evaluate(config: "EvaluationConfig") -> str:
    if config.checkpoints:
        return of_checkpoints(config)
    from rag_retrieval.core.terminal import terminal_columns
    from rag_retrieval.evaluate.evaluation import evaluate_reranker
    from rag_retrieval.evaluate.output import describe_evaluation, write_evaluation

    evaluation = evaluate_reranker(config)
    if launched_rank() > 0:
        return ""
    write_evaluation(evaluation)
    if config.report:
        from rag_retrieval.evaluate.report import write_report

        write_report(evaluation)
    return describe_evaluation(evaluation, terminal_columns())


def evaluate_retrieval(config: "RetrievalEvaluationConfig") -> str:
    if config.checkpoints:
        return of_checkpoints(config)
    from rag_retrieval.core.terminal import terminal_columns

    if Path(config.data).is_file():
        from rag_retrieval.evaluate.pairs import correlate_pairs, describe_pairs

        found = correlate_pairs(config)
        return "" if launched_rank() > 0 else describe_pairs(config, found, terminal_columns())
    from rag_retrieval.evaluate.retrieval import evaluate_retriever
    from rag_retrieval.evaluate.retrieval_output import describe_retrieval, write_retrieval

    evaluation = evaluate_retriever(config)
    if launched_rank() > 0:
        return ""
    write_retrieval(evaluation)
    return describe_retrieval(evaluation, terminal_columns())


def of_checkpoints(config: "EvaluationConfig | RetrievalEvaluationConfig") -> str:
    from rag_retrieval.core.terminal import terminal_columns
    from rag_retrieval.evaluate.checkpoints import describe_curve, evaluate_checkpoints, write_curve

    curve = evaluate_checkpoints(config)
    if launched_rank() > 0:
        return ""
    write_curve(curve)
    return describe_curve(curve, terminal_columns())
