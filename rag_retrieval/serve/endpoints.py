"""What an endpoint is, and what the server gives it for the work of a request.

    body -> parse -> task -> admission of its documents -> answer: tokens in pieces, batches of a model -> response

A new kind of request is one subclass of `Endpoint`. Ids, tokens, limits, time-outs, cancellation, metrics and
errors are the application's (`app.py`), the same for all.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from starlette.responses import Response
from typing_extensions import TypeAliasType

from rag_retrieval.serve.batching import TURNS, Batcher
from rag_retrieval.serve.http import Admission, RequestError, error_body

PIECE_CHARACTERS = 50_000  # tokenized at a time: some 20 ms, for which other requests wait
MOST_ERRORS = 100  # of a request that are looked at
DECAY = 0.9  # of the weight of earlier work in the measured speed

Request = TypeVar("Request", bound=BaseModel)
Position = TypeVar("Position")


@dataclass(frozen=True)
class ServedModel:
    """A model as /health, /info and the metrics see it. batcher: None for what computes nothing itself, as an index.
    info: what /info says of it, with the keys of text-embeddings-inference where there are such."""

    name: str
    batcher: Batcher | None
    info: dict[str, Any]


class Endpoint(Protocol):
    """One kind of request; a subclass is made once, at the start, with the models that it needs.

    method: "POST", or "GET" for requests without a body. paths: of Starlette, such as "/documents/{id:path}"; metrics
    count by them. public: whether it is answered without the token. batchers: in whose lines its requests wait, for the
    refusal before a body is read. first: whether some of its requests go before others' documents (see `Work`).
    """

    method: str = "POST"
    paths: Sequence[str]
    public: bool = False
    batchers: Sequence[Batcher] = ()
    first: bool = False

    def parse(self, body: bytes, path: str) -> Any:
        """The task that a body asks for. path: the one asked, decoded. Runs in a thread and reads nothing but its
        arguments. Raises RequestError."""

    def size(self, task: Any) -> int:
        """Documents, texts or queries of the task, which count towards `queue_pairs`."""

    async def answer(self, task: Any, work: "Work") -> Response:
        """Runs on the event loop: all that takes more than a millisecond goes through `work`. Raises RequestError."""

    def error_body(self, error: RequestError, request_id: str) -> dict[str, Any]:
        """Of every error of its paths, also those of the server such as 401 and 429."""
        return error_body(error, request_id)


class PieceThreads:
    """Threads for short work of many requests, which hand in one piece after another and so take turns.

    Pieces that go `first` go before others, of which one in TURNS is worked on all the same. cost: of a piece, in any
    unit, from which the wait of a new request is estimated.
    """

    def __init__(self, threads: int, name: str):
        self.threads = threads
        self._first: deque[_Piece] = deque()
        self._others: deque[_Piece] = deque()
        self._passed = 0  # turns of first pieces since one of the others
        self._cost = {True: 0.0, False: 0.0}  # of pieces that are not done, by whether they go first
        self._seconds_per_cost = 0.0
        self._changed = threading.Condition()
        self._closing = False
        for number in range(threads):
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True).start()

    async def run(self, work: Callable[..., Any], *arguments: Any, cost: float = 0.0, first: bool = False) -> Any:
        """What `work` gives. A piece whose request is cancelled meanwhile is left out."""
        piece = _Piece(work, arguments, cost, first, Future())
        with self._changed:
            self._cost[first] += cost
            (self._first if first else self._others).append(piece)
            self._changed.notify()
        piece.result.add_done_callback(lambda _: self._forget(piece))
        return await asyncio.wrap_future(piece.result)

    def expected_seconds(self, first: bool = False) -> float:
        """How long a new request waits for its first turn."""
        cost = self._cost[True] if first else sum(self._cost.values())
        return cost * self._seconds_per_cost / self.threads

    def close(self) -> None:
        """The threads end after the pieces at hand; what waits is cancelled."""
        with self._changed:
            self._closing = True
            waiting = [*self._first, *self._others]
            self._changed.notify_all()
        for piece in waiting:
            piece.result.cancel()

    def _forget(self, piece: "_Piece") -> None:
        with self._changed:
            self._cost[piece.first] -= piece.cost

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._first or self._others or self._closing)
                if self._closing:
                    return
                piece = self._next()
            if piece.result.set_running_or_notify_cancel():
                self._work_on(piece)

    def _next(self) -> "_Piece":
        if self._first and (not self._others or self._passed < TURNS - 1):
            self._passed += 1
            return self._first.popleft()
        self._passed = 0
        return self._others.popleft()

    def _work_on(self, piece: "_Piece") -> None:
        started = time.perf_counter()
        try:
            result = piece.work(*piece.arguments)
        except Exception as error:  # its request gets it, and the thread lives on
            piece.result.set_exception(error)
            return
        if piece.cost:
            seconds = (time.perf_counter() - started) / piece.cost
            with self._changed:
                self._seconds_per_cost = DECAY * self._seconds_per_cost + (1 - DECAY) * seconds
        piece.result.set_result(result)


@dataclass(frozen=True, eq=False)
class _Piece:
    work: Callable[..., Any]
    arguments: tuple
    cost: float
    first: bool
    result: Future


class Work:
    """One request inside. What it has started is cancelled with it. id: in answers, and in the log.

    first: for what a person waits for, such as a query: it goes before the documents of others, which move on slowly
    all the same.
    """

    def __init__(self, request_id: str, texts: PieceThreads, others: PieceThreads, admission: Admission):
        self.id = request_id
        self._texts, self._others, self._admission = texts, others, admission

    async def encode(
        self, pieces: Iterable[Sequence[str]], encode: Callable[[Sequence[str]], Any], first: bool = False
    ) -> list[Any]:
        """What `encode` gives for each piece, in a thread, while other requests take turns. pieces: see
        `pieces_of`."""
        return [await self._texts.run(encode, piece, cost=sum(map(len, piece)), first=first) for piece in pieces]

    async def compute(self, batcher: Batcher, items: Sequence[Sized], first: bool = False) -> list[Any]:
        """What the model gives for each item, whose length is its tokens. Raises RequestError (429) where they would
        wait too long, and what the model raises."""
        self._admission.check_wait(batcher.expected_seconds(sum(map(len, items)), first))
        return await asyncio.wrap_future(batcher.submit(items, first))

    async def run(self, function: Callable[..., Any], *arguments: Any, first: bool = False) -> Any:
        """Other work that blocks, such as a search in an index, in one of a few threads. Raises RequestError (429)
        where it would wait too long."""
        self._admission.check_wait(self._others.expected_seconds(first))
        return await self._others.run(function, *arguments, cost=1, first=first)


def pieces_of(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts with at most PIECE_CHARACTERS together, or of one longer text."""
    piece, characters = [], 0
    for text in texts:
        if piece and characters + len(text) > PIECE_CHARACTERS:
            yield piece
            piece, characters = [], 0
        piece.append(text)
        characters += len(text)
    if piece:
        yield piece


# ---- bodies ---------------------------------------------------------------------------------------------


class StrictRequest(BaseModel):
    """A key that is not named is refused, and so is a value of another type."""

    model_config = ConfigDict(strict=True, extra="forbid")


def limited_list(name: str, entry: Any, most: int) -> Any:
    """The type of a list that ends at its first mistake and at its limit: a hostile body costs no more than a good
    one. name: of the type, in pydantic's messages."""
    return TypeAliasType(name, Annotated[list[entry], FailFast(), Field(max_length=most)])


def parse_json(body: bytes, schema: type[Request], expected: Mapping[str, str]) -> Request:
    """Raises RequestError: 400 for what is no JSON, 422 for a field, named with its position, that is not as expected.

    Lists of the schema should be a `limited_list`. expected: of keys with texts, what they hold, in words.
    """
    if body.count(b"[") + body.count(b"{") > 1000 + len(body) // 10:  # no text has so many of them
        raise RequestError(422, "the body: too many lists and objects for its length; send texts as strings")
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error, expected) from error


def _refusal(error: ValidationError, expected: Mapping[str, str]) -> RequestError:
    """From the problem that pydantic met deepest in a list: of a key that may be several things, it is that of the one
    that was meant. The values themselves may be huge, so they are not shown."""
    if error.error_count() > MOST_ERRORS:
        return RequestError(422, f"{error.error_count()} keys or values are not as expected; see docs/serve.md")
    problems = error.errors(include_url=False, include_input=False)
    problem = max(problems, key=lambda each: (each["type"] == "too_long", _positions(each)))
    kind, place = problem["type"], problem["loc"]
    if kind == "json_invalid":
        return RequestError(400, f"the body is no JSON: {problem['msg']}")
    if not place:
        return RequestError(422, f"the body: expected an object with {next(iter(expected))}")
    name = f"{place[0]!s:.100}" + "".join(f"[{position}]" for position in _positions(problem))
    if kind == "extra_forbidden":
        return RequestError(422, f"{name}: this server does not know the key; leave it out")
    if kind == "too_long":
        return RequestError(422, f"{name}: at most {problem['ctx']['max_length']} are taken; send them in parts")
    if place[0] in expected:
        wrong = "missing" if kind == "missing" else "not as expected"
        return RequestError(422, f"{name}: {wrong}; {place[0]} takes {expected[place[0]]}")
    return RequestError(422, f"{name}: {problem['msg'].replace('Input should be', 'expected')}")


def _positions(problem: Mapping[str, Any]) -> list[int]:
    return [part for part in problem["loc"] if isinstance(part, int)]


def check_characters(texts: Iterable[tuple[str, str]], most: int) -> None:
    """texts: each with its place in the body, such as `documents[3]`. Raises RequestError (422) for one of more than
    `most` characters."""
    for place, text in texts:
        if len(text) > most:
            raise RequestError(422, f"{place}: found {len(text)} characters, at most {most} are taken; cut it")


# ---- answers --------------------------------------------------------------------------------------------


def cut_warning(truncated: Sequence[Position], count: int, things: str, place: Callable[[Position], str]) -> str:
    """Cohere's, of things that were not read whole. truncated: where they stand among `count`, at least one."""
    cut = f"{len(truncated)} of {count} {things} were too long and were cut"
    return f"{cut}, the first of them {place(truncated[0])}"
