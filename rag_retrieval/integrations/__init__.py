"""Rerankers as parts of other frameworks, one module each; what they share stands here.

Each module derives a class from its framework's, so importing it needs the framework; nothing else imports one.
"""

from typing import Any


def rerank_options(adapter: object) -> dict[str, Any]:
    """The attributes of the adapter that are options of `Reranker.rerank` under the same names."""
    names = ("batch_size", "max_length", "normalize", "long_document", "overlap")
    return {name: getattr(adapter, name) for name in names}


def missing_library(library: str, extra: str) -> ImportError:
    return ImportError(f"this adapter needs {library}; run: pip install -e '.[{extra}]'")
