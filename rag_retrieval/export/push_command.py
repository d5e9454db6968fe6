"""`rag-retrieval push`: the command around `push_to_hub`.

The trap: --dry_run needs neither network nor token, and its folder is byte for byte what would be uploaded.
"""

from rag_retrieval.core.command import report, run_command
from rag_retrieval.export.push_config import PUSH, PushConfig

USAGE = "usage: rag-retrieval push --model DIR --repo_id ORGANISATION/NAME [--dry_run DIR] [--KEY VALUE ...]"


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0; 2 for a mistake in options, folder or card, and where the hub refuses or is out of
    reach. With RAG_RETRIEVAL_TRACEBACK=1 in the environment, errors are raised instead."""
    return run_command(PUSH, USAGE, arguments, run)


def run(config: PushConfig) -> int:
    try:
        print(push(config))
    except (ValueError, OSError) as error:
        return report(error, 2, on_all_processes=False)
    return 0


def push(config: PushConfig) -> str:
    """What to tell: where the model is now."""
    from rag_retrieval.export.hub import push_to_hub, stage

    card = {"language": config.language, "license": config.license, "evaluations": config.evaluations}
    if config.dry_run is not None:
        stage(config.model, config.dry_run, config.repo_id, **card)
        return f"{config.dry_run}: what would be uploaded to {config.repo_id}"
    options = {"private": config.private, "commit_message": config.commit_message}
    return push_to_hub(config.model, config.repo_id, **options, **card)
