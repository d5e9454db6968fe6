"""`ListwiseReranker`: a chat model that is shown several documents at once and answers with their order.

Nothing is trained. A window of documents slides from the end of the list to its beginning, and the model's answer,
such as `[3] > [1] > [2]`, is the new order of the window (Sun et al., EMNLP 2023, arXiv 2304.09542, section 3). With
a window of w and steps of s, the best w - s documents of the whole list can reach its top in one pass.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from rag_retrieval.infer.results import RerankResult, RerankResults
from rag_retrieval.infer.torch_backend import digest_of_model
from rag_retrieval.models.devices import choose_device, choose_dtype
from rag_retrieval.models.inputs import check_documents, check_flag, check_number, check_text
from rag_retrieval.models.loading import load_causal_model, load_tokenizer, position_limit
from rag_retrieval.models.prompts import render
from rag_retrieval.models.settings import resolve_model_path

PROMPTS = {
    "en": "Here are {count} passages, each with a number in brackets, and a query. Order the passages by how well they "
    "answer the query, the best first.\n\n{passages}\n\nQuery: {query}\n\nAnswer with the numbers of all {count} "
    "passages and nothing else, in this form: [2] > [1]",
    "zh": "下面是 {count} 个段落，每个段落前有方括号编号，以及一个查询。请按照回答该查询的好坏给段落排序，"
    "最好的在前。\n\n{passages}\n\n查询：{query}\n\n只回答全部 {count} 个段落的编号，格式如：[2] > [1]",
}
FIELDS = ("{count}", "{passages}", "{query}")
TOKENS_OF_A_NUMBER = 8  # that an answer may take for one passage, as in " > [12]"
CONTENT = "content-of-the-message"  # a placeholder while the chat template is rendered


@dataclass(frozen=True)
class ListwiseResults(RerankResults):
    """windows: answers that the model gave. invalid_answers: those that were not a permutation of their window; what
    such an answer left out keeps its order behind what it named."""

    windows: int = 0
    invalid_answers: int = 0


class ListwiseReranker:
    """A causal language model with a chat template as a listwise ranker.

    model_name_or_path: a folder, a hub name, or `package:NAME`. window: documents in one prompt. step: how far the
    window moves, at most window. passage_tokens: tokens of a document that are read. prompt: the user's message, with
    {passages}, {query} and, if wanted, {count}; default by language, "en" or "zh". device, dtype: as for `Reranker`.

    Raises ValueError for a model that is not a causal language model or has no chat template, and for options that
    do not fit.
    """

    def __init__(
        self,
        model_name_or_path: str | os.PathLike,
        *,
        window: int = 20,
        step: int = 10,
        passage_tokens: int = 256,
        language: str = "en",
        prompt: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
    ):
        check_number("window", window, 2, "documents")
        check_number("step", step, 1, "documents")
        check_number("passage_tokens", passage_tokens, 1, "tokens")
        check_flag("trust_remote_code", trust_remote_code)
        if step > window:
            raise ValueError(f"step {step} is more than the window of {window}: documents between would not be read")
        if language not in PROMPTS:
            raise ValueError(f"language must be one of {', '.join(PROMPTS)}; found {language!r}")
        self.prompt = PROMPTS[language] if prompt is None else prompt
        for field in FIELDS[1:]:
            if self.prompt.count(field) != 1:
                raise ValueError(f"prompt: expected {field} once, found {self.prompt.count(field)} times")
        self.window, self.step, self.passage_tokens = window, step, passage_tokens
        path = resolve_model_path(model_name_or_path)
        self.tokenizer = load_tokenizer(path, trust_remote_code)
        if not self.tokenizer.chat_template:
            raise ValueError(f"{path}: its tokenizer has no chat template; give a chat model")
        model = load_causal_model(path, choose_dtype(dtype), trust_remote_code)
        self.model = model.eval().to(choose_device(device))

    @property
    def device(self) -> str:
        return str(self.model.device)

    def fingerprint(self) -> str:
        """A digest of everything that decides on an order: weights, prompt, windows, kind of device."""
        asked = [self.prompt, self.tokenizer.chat_template, self.tokenizer.backend_tokenizer.to_str()]
        kind = self.model.device.type
        return digest_of_model(self.model, [*asked, self.window, self.step, self.passage_tokens, kind])

    def rerank(
        self, query: str, documents: Sequence[str | Mapping | None], top_k: int | None = None
    ) -> ListwiseResults:
        """The documents, best first. documents, and those without a text: as for `Reranker.rerank`.

        score: 1 / rank, because an order has no scores; 0 for a document without text. Raises ValueError that names the
        argument and the position, and for a prompt that is longer than the model reads.
        """
        query, documents = check_text("query", query), check_documents("documents", documents)
        if top_k is not None:
            check_number("top_k", top_k, 1, "documents")
        passages = [self._passage(document.text) for document in documents]
        with_text = [place for place, document in enumerate(documents) if not document.is_empty]
        windows = invalid = 0

        def order_window(places: list[int]) -> list[int]:
            nonlocal windows, invalid
            answer = self._answer(query, [passages[place] for place in places])
            order, is_permutation = parse_order(answer, len(places))
            windows, invalid = windows + 1, invalid + (not is_permutation)
            return [places[number] for number in order]

        ranked = slide(with_text, self.window, self.step, order_window)
        ranked += [place for place, document in enumerate(documents) if document.is_empty]
        results = [
            RerankResult(
                documents[place].doc_id,
                documents[place].text,
                0.0 if documents[place].is_empty else 1 / rank,
                rank,
                documents[place].metadata,
                place,
                truncated=len(passages[place]) < len(documents[place].text),
            )
            for rank, place in enumerate(ranked, start=1)
        ]
        return ListwiseResults(query, results[:top_k], "reciprocal_rank", windows, invalid)

    def _passage(self, text: str) -> str:
        """The beginning of a document, up to `passage_tokens`."""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(offsets) <= self.passage_tokens else text[: offsets[self.passage_tokens - 1][1]]

    @torch.inference_mode()
    def _answer(self, query: str, passages: list[str]) -> str:
        ids = torch.tensor([self._prompt_ids(query, passages)], device=self.model.device)
        new_tokens = TOKENS_OF_A_NUMBER * len(passages)
        limit = position_limit(self.model)
        if limit is not None and ids.shape[1] + new_tokens > limit:
            raise ValueError(
                f"a prompt of {ids.shape[1]} tokens and an answer of up to {new_tokens} do not fit in the {limit} that "
                "the model reads; make window or passage_tokens smaller"
            )
        pad = self.tokenizer.pad_token_id
        generated = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
        )
        return self.tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)

    def _prompt_ids(self, query: str, passages: list[str]) -> list[int]:
        """The chat up to the answer. Special tokens in query and passages are read as plain text."""
        numbered = "\n".join(f"[{number}] {passage}" for number, passage in enumerate(passages, start=1))
        values = dict(zip(FIELDS, (str(len(passages)), numbered, query), strict=True))
        content = re.sub("|".join(map(re.escape, FIELDS)), lambda field: values[field[0]], self.prompt)
        chat = render(self.tokenizer, [{"role": "user", "content": CONTENT}])
        before, marker, after = (chat or "").partition(CONTENT)
        if not marker:
            raise ValueError("the chat template of the model leaves out the user's message; give another chat model")
        ids = [self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
        text = self.tokenizer(content, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*ids[0], *text, *ids[1]]


def slide(places: list[int], window: int, step: int, order_window: Callable[[list[int]], list[int]]) -> list[int]:
    """`places` in the order that windows from the end to the beginning give; lists of one place need no window."""
    ranked = list(places)
    end = len(ranked)
    while end > 1:
        start = max(0, end - window)
        ranked[start:end] = order_window(ranked[start:end])
        if start == 0:
            break
        end -= step
    return ranked


def parse_order(answer: str, count: int) -> tuple[list[int], bool]:
    """The places (from 0) in the order that the answer names, and whether it names each exactly once.

    Numbers in brackets are read, or all numbers where there are no brackets. Unknown and repeated ones are ignored;
    places that are not named follow in their order.
    """
    numbers = re.findall(r"\[(\d{1,9})\]", answer) or re.findall(r"\d{1,9}", answer)
    named = [int(number) - 1 for number in numbers]
    order = list(dict.fromkeys(place for place in named if 0 <= place < count))
    return order + [place for place in range(count) if place not in order], sorted(named) == list(range(count))
