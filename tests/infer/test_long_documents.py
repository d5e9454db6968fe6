"""Long documents: against an implementation that cuts by hand and scores one slice at a time."""

import itertools

import pytest
import torch
from tiny_models import CHINESE, ENGLISH, tiny_joining_qwen2
from yes_no_samples import YES_NO, prompt, tiny_causal

from rag_retrieval import LLMDecoder
from rag_retrieval.infer.long_documents import document_tokens, slice_starts
from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.infer.torch_backend import TorchBackend

QUERY = {"english": "what are the symptoms of influenza?", "chinese": "感冒的症状是什么？"}
LONG = {"english": " ".join(ENGLISH) * 2, "chinese": "".join(CHINESE) * 8}
FAMILIES = ["bert", "xlm_roberta", "qwen2", "llama", "joining qwen2"]  # the last: a sign and a line break join
LANGUAGES = ["english", "chinese"]
MAX_LENGTH, OVERLAP = 60, 7


def slow_slices(scorer, query: str, document: str) -> list[tuple[float, str, list[int]]]:
    """(score, text, ids) of each slice, cut by hand with the tokenizer's own offsets and scored alone."""
    before, content, after = whole_text(scorer, query, document)
    ends = after[len(after) - len(scorer.pair_encoder.template.suffix) :]
    ends = [*scorer.pair_encoder.template.document_end, *ends]
    room = MAX_LENGTH - len(before) - max(len(after), len(ends))
    slices, start = [], 0
    while True:
        start = min(start, len(content) - room)
        part, last = content[start : start + room], start + room >= len(content)
        ids = [*before, *(token for token, _ in part), *(after if last else ends)]
        text = document[max(0, part[0][1][0]) : part[-1][1][1]]
        slices.append((score_alone(scorer, ids, len(before)), text, ids))
        if last:
            return slices
        start += room - OVERLAP


def whole_text(scorer, query: str, document: str) -> tuple[list[int], list[tuple[int, tuple[int, int]]], list[int]]:
    """The tokens of the whole pair: before the document's own, those with their offsets in it, after them."""
    if scorer.model_type == "bert_encoder":
        encoded = scorer.tokenizer(query, document, return_offsets_mapping=True)
        start, owned = 0, [owner == 1 for owner in encoded.sequence_ids()]
    else:
        settings = scorer.settings
        text = settings.query_format.replace("{}", query) + settings.seq + settings.document_format.partition("{}")[0]
        start, end = len(text), len(text) + len(document)
        text += document + settings.document_format.partition("{}")[2] + settings.special_token
        encoded = scorer.tokenizer(text, return_offsets_mapping=True)
        owned = [last > start and first < end for first, last in encoded["offset_mapping"]]
    tokens, places = encoded["input_ids"], encoded["offset_mapping"]
    first, stop = owned.index(True), len(owned) - owned[::-1].index(True)
    content = [(tokens[at], (places[at][0] - start, places[at][1] - start)) for at in range(first, stop)]
    return tokens[:first], content, tokens[stop:]


@torch.no_grad()
def score_alone(scorer, ids: list[int], before: int) -> float:
    """By the model of transformers itself. before: tokens before the document."""
    inputs = {"input_ids": torch.tensor([ids])}
    if scorer.pair_encoder.template.types is not None:
        inputs["token_type_ids"] = torch.tensor([[0] * before + [1] * (len(ids) - before)])
    return scorer.model(**inputs).logits.item()


@pytest.fixture(scope="module")
def rerankers(load_tiny, tmp_path_factory):
    made = {family: load_tiny(family, max_length=MAX_LENGTH) for family in FAMILIES[:4]}
    folder = tiny_joining_qwen2(tmp_path_factory.mktemp("joining"), head_labels=1)
    made["joining qwen2"] = LLMDecoder.from_pretrained(folder, max_length=MAX_LENGTH)
    return {family: Reranker.from_backend(TorchBackend(scorer)) for family, scorer in made.items()}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_slices_score_as_when_cut_by_hand_and_scored_alone(family, language, rerankers):
    reranker, query, document = rerankers[family], QUERY[language], LONG[language]
    slow = slow_slices(reranker.backend.scorer, query, document)
    assert len(slow) > 3
    scores = [score for score, _, _ in slow]
    expected = {"max_slice": max(scores), "mean_slice": sum(scores) / len(scores), "first_slice": scores[0]}
    for long_document, score in expected.items():
        result = reranker.rerank(query, ["a", document], long_document=long_document, overlap=OVERLAP)
        found = next(result for result in result if result.document_index == 1)
        assert found.score == pytest.approx(score, abs=2e-5)
        assert found.truncated == (long_document == "first_slice")
        best = 0 if long_document == "first_slice" else scores.index(max(scores))
        assert document[slice(*found.slice)] == slow[best][1]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_slice_holds_the_whole_query_and_all_slices_hold_the_whole_document(family, language, rerankers):
    reranker, query, document = rerankers[family], QUERY[language], LONG[language]
    encoder = reranker.backend.pair_encoder
    seen = []
    backend = reranker.backend
    score, backend.score = backend.score, lambda pairs, size: seen.extend(pairs) or score(pairs, size)
    try:
        reranker.rerank(query, [document], overlap=OVERLAP, long_document="max_slice")
    finally:
        del backend.score
    assert [pair.ids.tolist() for pair in seen] == [ids for _, _, ids in slow_slices(backend.scorer, query, document)]
    beginning = [*encoder.template.prefix, *encoder.text_ids([query], "query")[0], *encoder.template.middle]
    assert all(pair.ids[: len(beginning)].tolist() == beginning for pair in seen)
    assert all(len(pair) == MAX_LENGTH for pair in seen[:-1])
    # the last is shorter where what follows the document joins its last sign
    assert 0 <= MAX_LENGTH - len(seen[-1]) <= len(encoder.template.document_end)


def test_the_best_slice_is_where_the_answer_stands(rerankers):
    """A backend that counts a word's tokens finds the slice that has the word."""
    reranker = rerankers["bert"]
    word = reranker.backend.pair_encoder.text_ids(["Paris"], "document")[0]

    class Counts:
        calibration, pair_encoder, model_type = None, reranker.backend.pair_encoder, "bert_encoder"

        def score(self, pairs, batch_size):
            import numpy as np

            return np.array([sum(pair.ids.tolist().count(token) for token in word) for pair in pairs], np.float32)

    filler = "water boils at sea level and at lower temperatures on high mountains. "
    document = filler * 10 + "The capital is Paris Paris Paris. " + filler * 10
    result = Reranker.from_backend(Counts()).rerank("capital?", [document], long_document="max_slice")[0]
    start, end = result.slice
    assert "Paris Paris Paris" in document[start:end] and end - start < len(document) / 3


def test_slices_cover_every_token_and_overlap_by_what_was_asked():
    for room, overlap, tokens in itertools.product((1, 2, 3, 8, 13), (0, 1, 5, 100), range(1, 40)):
        starts = slice_starts(tokens, room, overlap)
        covered = {place for start in starts for place in range(start, min(start + room, tokens))}
        assert covered == set(range(tokens))
        assert starts == sorted(set(starts)) and starts[-1] == max(0, tokens - room)
        shared = [first + room - second for first, second in zip(starts, starts[1:], strict=False)]
        assert all(count == min(overlap, room // 2) for count in shared[:-1])
        assert all(count >= min(overlap, room // 2) for count in shared[-1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_a_document_are_its_tokens_and_spans_lie_in_its_text(family, rerankers):
    encoder = rerankers[family].backend.pair_encoder
    for text in (LONG["english"], LONG["chinese"], "", " ", "😀", "naïve 北京 😀x", "\n\na"):
        tokens = document_tokens(encoder, text)
        assert [*tokens.head, *tokens.content, *tokens.tail] == encoder.text_ids([text], "document")[0].tolist()
        spans = [tokens.span(place, place + 1) for place in range(len(tokens.content))]
        assert all(0 <= start < end <= len(text) for start, end in spans)
        assert not spans or tokens.span(0, len(spans) + 5) == (spans[0][0], spans[-1][1])
        end = list(encoder.template.document_end)
        assert tokens.tail == end or not tokens.tail and end, "the line break after it joins a sign or white space"
        before = encoder.template.before_document
        if before and text.strip():
            assert encoder.fast_tokenizer.decode(tokens.head).strip() == before.strip()


def test_what_follows_the_text_in_a_format_ends_every_slice(load_tiny):
    scorer = load_tiny("qwen2", max_length=40, document_format="<d>{}</d>", head=None)
    reranker = Reranker.from_backend(TorchBackend(scorer))
    seen = []
    score = reranker.backend.score
    reranker.backend.score = lambda pairs, size: seen.extend(pairs) or score(pairs, size)
    reranker.rerank("a", [LONG["english"]], overlap=3, long_document="max_slice")
    texts = [scorer.tokenizer.decode(pair.ids) for pair in seen]
    assert len(texts) > 5
    assert all(text.startswith("query: a\n<d>") and text.endswith("</d>\nrelevance") for text in texts)


def test_a_query_is_cut_only_beyond_three_quarters_of_the_room(rerankers):
    reranker = rerankers["bert"]
    encoder = reranker.backend.pair_encoder
    words = ENGLISH[0].split() * 20
    for share, cut in ((0.7, False), (1.5, True)):
        query = ""
        for word in words:
            if len(encoder.text_ids([f"{query} {word}"], "query")[0]) > share * encoder.budget:
                break
            query = f"{query} {word}"
        found = reranker.rerank(query, [LONG["english"]], long_document="max_slice")[0]
        assert found.truncated == cut and found.slice is not None


def test_formats_that_leave_no_room_for_a_slice_are_an_error_that_says_so(load_tiny):
    scorer = load_tiny("qwen2", document_format="a very long format of many words: {}")
    fixed = scorer.pair_encoder.template.fixed_tokens
    reranker = Reranker.from_backend(TorchBackend(scorer))
    with pytest.raises(ValueError, match="leaves no room for slices"):
        reranker.rerank("what is water", [LONG["english"]], max_length=fixed + 8, long_document="max_slice")


def test_truncate_reads_the_beginning_as_compute_score_does(rerankers):
    for family in FAMILIES:
        reranker, document = rerankers[family], LONG["english"]
        found = reranker.rerank(QUERY["english"], [document], long_document="truncate")[0]
        expected = reranker.backend.scorer.compute_score([[QUERY["english"], document]]).item()
        assert found.score == expected and found.truncated and found.slice is None


def test_a_document_that_fits_is_read_in_one_piece_by_every_choice(rerankers):
    reranker = rerankers["bert"]
    expected = reranker.compute_score([["a question", "a short text"]])[0]
    for long_document in ("max_slice", "mean_slice", "first_slice", "truncate"):
        found = reranker.rerank("a question", ["a short text"], long_document=long_document)[0]
        assert (found.score, found.slice, found.truncated) == (expected, None, False)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_slices_of_a_head_that_answers_stand_in_the_whole_prompt(family, tmp_path):
    """llama's texts are tokenized behind an anchor, which counts neither as a token nor as characters."""
    scorer = LLMDecoder.from_pretrained(tiny_causal(tmp_path, family), **YES_NO, max_length=300)
    reranker, document = Reranker.from_backend(TorchBackend(scorer)), LONG["english"] * 2
    parts = document_tokens(scorer.pair_encoder, document)
    (ids,) = scorer.pair_encoder.text_ids([document], "document")
    assert [*parts.head, *parts.content, *parts.tail] == ids.tolist()
    seen = []
    score = reranker.backend.score
    reranker.backend.score = lambda pairs, size: seen.extend(pairs) or score(pairs, size)
    result = reranker.rerank("where?", [document], long_document="max_slice")[0]
    before, after = prompt("where?", "DOCUMENT").split("DOCUMENT")
    start, end = result.slice
    texts = [plain(scorer.tokenizer.decode(pair.ids)).removeprefix("<s>") for pair in seen]
    assert len(texts) > 2 and any(plain(document[start:end]) in text for text in texts)
    for text in texts:
        assert text.startswith(plain(before)) and text.endswith(plain(after))
        assert text.removeprefix(plain(before)).removesuffix(plain(after)) in plain(document)


def plain(text: str) -> str:
    """Without spaces: llama's decoder adds and drops some."""
    return text.replace(" ", "")
