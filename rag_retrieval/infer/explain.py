"""Why a document scores as it does: which of its tokens each query token meets, and which tokens both have.

A text table for the terminal, or one HTML file that needs nothing else. Nothing here imports torch.
"""

from dataclasses import dataclass
from functools import cached_property
from html import escape
from os import PathLike
from pathlib import Path

import numpy as np
from rich.text import Text

from rag_retrieval.core.files import write_text
from rag_retrieval.core.terminal import on_one_line, plain_table, rendered, terminal_columns
from rag_retrieval.infer.encoded_texts import EncodedTexts
from rag_retrieval.infer.pair_scores import PairScores

STYLE = """body{font:14px/1.5 system-ui,sans-serif;margin:2em;color:#222}
table{border-collapse:collapse;margin:.5em 0 2em}td,th{padding:2px 6px;text-align:left;white-space:pre}
.grid td{text-align:right;font-variant-numeric:tabular-nums;font-size:12px}.grid .best{outline:2px solid #c2410c}
.grid thead th{writing-mode:vertical-rl;vertical-align:bottom}.scroll{overflow-x:auto}
.text span{padding:1px 0}"""


@dataclass(frozen=True, eq=False)
class Explanation:
    """`print` shows it as a table, a notebook and `save` as a picture.

    scores: of the pair, in every way that the model has, and mixed. query_tokens, document_tokens: names of the tokens
    that have a vector. similarity: of each query vector with each document vector, float32 [query tokens, document
    tokens]. common: of the tokens that both texts have, (weight in the query, weight in the document), the largest
    product first. The last four are empty where the model has no such representation.
    """

    query: str
    document: str
    scores: PairScores
    query_tokens: list[str]
    document_tokens: list[str]
    similarity: np.ndarray
    common: dict[str, tuple[float, float]]

    @cached_property
    def best(self) -> np.ndarray:
        """Position of the document token that each query token meets: [query tokens]; [0] without token vectors."""
        return self.similarity.argmax(axis=1) if self.similarity.size else np.empty(0, int)

    @cached_property
    def received(self) -> np.ndarray:
        """What each document token adds to the sum of MaxSim: [document tokens], float32. Those that no query token
        meets have 0."""
        values = self.similarity.max(axis=1) if self.similarity.size else np.empty(0)
        return np.bincount(self.best, values, minlength=len(self.document_tokens)).astype(np.float32)

    def table(self, columns: int | None = None) -> str:
        """Text, with the beginning of query and document. columns: of the terminal; None for those that it has."""
        texts = (f"{name:<10}{on_one_line(getattr(self, name))}" for name in ("query", "document"))
        parts = [*map(Text, texts), "", self._score_line]
        if self.similarity.size:
            rows = [
                [token, self.document_tokens[place], str(place), f"{self.similarity[row, place]:.3f}"]
                for row, (token, place) in enumerate(zip(self.query_tokens, self.best, strict=True))
            ]
            parts += ["", plain_table(["query token", "meets", "at", "similarity"], rows)]
        if self.common:
            rows = [[token, f"{q:.3f}", f"{d:.3f}", f"{q * d:.3f}"] for token, (q, d) in self.common.items()]
            parts += ["", plain_table(["common token", "in query", "in document", "product"], rows)]
        return rendered(parts, columns or terminal_columns())

    def __str__(self) -> str:
        return self.table()

    @property
    def _score_line(self) -> str:
        shown = {name: value for name, value in vars(self.scores).items() if value is not None}
        return "   ".join(f"{name} {value[0]:.4f}" for name, value in shown.items())

    # ---- HTML -------------------------------------------------------------------------------------------

    def to_html(self) -> str:
        """One page without scripts and links: the document's tokens shaded by what they add, every similarity of two
        tokens with the largest of each row framed, and the common tokens."""
        parts = [f"<h3>{escape(self.query)}</h3>", f"<p>{escape(self._score_line)}</p>"]
        if self.similarity.size:
            most = max(float(self.received.max()), 1e-9)
            spans = (
                f'<span style="background:{shade(value / most)}" title="{value:.3f}">{escape(token)}</span>'
                for token, value in zip(self.document_tokens, self.received.tolist(), strict=True)
            )
            parts += [f'<p class="text">{" ".join(spans)}</p>', f'<div class="scroll">{self._grid()}</div>']
        else:
            parts.append(f"<p>{escape(self.document)}</p>")
        if self.common:
            rows = ([token, f"{q:.3f}", f"{d:.3f}", f"{q * d:.3f}"] for token, (q, d) in self.common.items())
            head = ("common token", "in query", "in document", "product")
            parts.append(f"<table>{html_row(head, 'th')}{''.join(map(html_row, rows))}</table>")
        body = "\n".join(parts)
        return f'<!DOCTYPE html>\n<meta charset="utf-8">\n<title>MaxSim</title>\n<style>{STYLE}</style>\n{body}\n'

    def _repr_html_(self) -> str:
        return self.to_html()

    def save(self, file: str | PathLike) -> None:
        """The page of `to_html`, whole or not at all."""
        write_text(Path(file), self.to_html())

    def _grid(self) -> str:
        rows = []
        for token, row, best in zip(self.query_tokens, self.similarity.tolist(), self.best.tolist(), strict=True):
            cells = (
                f'<td{" class=best" if place == best else ""} style="background:{shade(value)}">{value:.2f}</td>'
                for place, value in enumerate(row)
            )
            rows.append(f"<tr><th>{escape(token)}</th>{''.join(cells)}</tr>")
        head = html_row(["", *self.document_tokens], "th")
        return f'<table class="grid"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def explained(
    query: str,
    document: str,
    scores: PairScores,
    of_query: EncodedTexts,
    of_document: EncodedTexts,
    query_tokens: list[str],
    document_tokens: list[str],
) -> Explanation:
    """of_query, of_document: the representations of the one query and the one document."""
    similarity, common = np.empty((0, 0), np.float32), {}
    if of_query.multi_vector is not None:
        similarity = of_query.multi_vector[0] @ of_document.multi_vector[0].T
    if of_query.lexical is not None:
        left, right = of_query.lexical[0], of_document.lexical[0]
        both = sorted(left.keys() & right.keys(), key=lambda token: (-left[token] * right[token], token))
        common = {token: (left[token], right[token]) for token in both}
    return Explanation(query, document, scores, query_tokens, document_tokens, similarity, common)


def html_row(cells, tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def shade(value: float) -> str:
    """Of a value in [0, 1], darker for more; those outside count as the nearest."""
    return f"rgba(234,88,12,{min(max(value, 0), 1):.2f})"
