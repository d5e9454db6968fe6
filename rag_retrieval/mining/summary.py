"""What a mining run kept and dropped, counted query by query, for the terminal and for a file.

The trap: every fetched candidate has exactly one fate, so `kept` and all of `dropped` add up to `candidates`.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field

from rag_retrieval.mining.choice import REASONS
from rag_retrieval.mining.output import Mined


@dataclass
class MiningSummary:
    """documents: of the corpus. queries_read: of the source; queries_without_text: blank ones, left out; queries:
    the distinct others; positives: theirs.

    short_queries: written with fewer negatives than asked for; empty_queries: not written, none was found.
    candidates: fetched; kept: negatives; dropped: the others by reason. lines: of the output.
    words: how BM25's words were made, "" for vectors alone.
    """

    documents: int
    queries_read: int
    queries_without_text: int
    queries: int
    positives: int
    short_queries: int = 0
    empty_queries: int = 0
    candidates: int = 0
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    lines: int = 0
    words: str = ""

    def add(self, mined: Mined, wanted: int) -> None:
        found = len(mined.negatives)
        self.short_queries += 0 < found < wanted
        self.empty_queries += not found
        self.candidates += mined.candidates
        self.kept += found
        self.dropped.update(mined.dropped)

    def to_dict(self) -> dict:
        return asdict(self) | {"dropped": {reason: self.dropped[reason] for reason in REASONS}}

    def describe(self, wanted: int) -> str:
        """Some lines for a terminal; reasons that dropped nothing are left out."""
        repeated = self.queries_read - self.queries_without_text - self.queries
        rows = [
            (self.queries, f"queries with {self.positives:,} positives" + _note(repeated, "repeated and merged")),
            (self.queries_without_text, "without text, left out"),
            (self.queries - self.short_queries - self.empty_queries, f"have {wanted} negatives"),
            (self.short_queries, "have fewer, and are written all the same"),
            (self.empty_queries, "have none, and are not written"),
            (self.candidates, f"candidates from {self.documents:,} documents"),
            (self.kept, "kept as negatives"),
            *((self.dropped[reason], f"dropped: {text}") for reason, text in REASONS.items()),
        ]
        shown = [(count, text) for place, (count, text) in enumerate(rows) if count or not place]
        width = max(len(f"{count:,}") for count, _ in shown)
        lines = [f"  {count:>{width},}  {text}" for count, text in shown]
        return "\n".join(lines + [f"  distinct words: {self.words}"] * bool(self.words))


def _note(count: int, text: str) -> str:
    return f" ({count:,} {text})" if count else ""
