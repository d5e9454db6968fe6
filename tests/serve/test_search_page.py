"""The search page: its policy, and what a person sees and does, in Chromium over a real server and index."""

import base64
import hashlib
import re
from contextlib import contextmanager
from urllib.parse import quote

import httpx
import pytest
from index_samples import corpus_file, documents
from serve_samples import listening
from tiny_models import tiny_bert

from rag_retrieval import Retriever
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.index import build_index
from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.page import PageEndpoint
from rag_retrieval.serve.server import opened_service

pytest.importorskip("bm25s")

HOSTILE = {"_id": "<b>&lt;\u202eid", "metadata": {"<i>key</i>": "<script>alert(3)</script>", "animal": "none"},
           "text": "<script>document.title = 'hacked'</script> &lt;b&gt; <img src=x onerror=alert(1)> "
                   "\u202etfel-ot-thgir zeppelin"}  # fmt: skip
FILLER = "The river runs by the train station, and the water is full of light. " * 6
LONG = {
    "_id": "long/😀 1",
    "text": f"😀😀 {FILLER}The lemur sleeps at the lagoon. {FILLER}",
    "metadata": {"year": 2021},
}
CHINESE_LONG = {"_id": "z3", "text": "大熊猫生活在四川的山区，" * 10, "metadata": {"language": "zh"}}
OPTIONS = {"long_document": "max_slice", "max_length": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from embedder_samples import save_by_sentence_transformers

    root = tmp_path_factory.mktemp("models")
    save_by_sentence_transformers(tiny_bert(root / "base"), root / "embedder", "mean", {})
    return {"embedder": str(root / "embedder"), "reranker": tiny_bert(root / "reranker", head_labels=1)}


@pytest.fixture(scope="module")
def index(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("index")
    corpus = corpus_file(root / "corpus.jsonl", [*documents(), HOSTILE, LONG, CHINESE_LONG])
    options = IndexOptions(embedder=models["embedder"], vector_precision="float32", device="cpu")
    return str(build_index(corpus, root / "animals", options).folder)


@contextmanager
def served(models, index, token=None):
    """The service and its address."""
    config = ServeConfig(index=index, model=models["reranker"], device="cpu", timeout=3600, **OPTIONS)
    with opened_service(config, token) as service, listening(service) as address:
        yield service, address


@pytest.fixture(scope="module")
def server(models, index):
    with served(models, index) as running:
        yield running


@pytest.fixture
def service(server):
    return server[0]


@pytest.fixture
def address(server):
    return server[1]


@pytest.fixture(scope="module")
def retriever(models, index):
    from rag_retrieval import Reranker

    reranker = Reranker(models["reranker"], device="cpu", max_length=64)
    with Retriever(index, reranker=reranker, device="cpu", long_document="max_slice") as opened:
        yield opened


# ---- without a browser


def test_the_policy_admits_the_page_s_own_style_and_script_and_nothing_else():
    endpoint = PageEndpoint()
    policy = endpoint.headers["Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", endpoint.page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules.pop(f"{kind}-src") == f"'sha256-{digest}'"
    assert rules == {
        "default-src": "'none'", "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'",
        "form-action": "'none'", "frame-ancestors": "'none'", "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }  # fmt: skip
    assert not re.search(r'\b(?:src|href|style|on\w+)="(?!data:)', endpoint.page), "nothing outside, and nothing inline"


def test_the_page_needs_no_token_and_a_search_does(models, index):
    with served(models, index, token=b"secret") as (_, address):
        page = httpx.get(address, timeout=60)
        assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["x-content-type-options"] == "nosniff" and "lemur" not in page.text
        assert httpx.post(f"{address}/search", json={"query": "lemur"}, timeout=60).status_code == 401


# ---- in a browser

DOWN, UP, LEFT, RIGHT, ENTER, ESCAPE = "\ue015", "\ue013", "\ue012", "\ue014", "\ue007", "\ue00c"
HIT, LAST = ".hit", ".stage.last .hit"
in_a_browser = pytest.mark.slow


def ask(browser, query: str) -> None:
    browser.run("document.querySelector('#query').select()")
    browser.press(query, ENTER)
    finished(browser)


def finished(browser) -> None:
    """The newest search has its answer or its problem."""
    browser.wait(lambda: browser.run("return document.querySelector('#status').innerText !== 'searching …'"))


def search(browser, address: str, query: str, **window) -> None:
    browser.open(f"{address}/?q={quote(query)}", **window)
    finished(browser)


def columns(browser) -> dict[str, list[dict]]:
    """By name of the stage: rank, id, score and moves of every document that is shown."""
    script = """return [...document.querySelectorAll('.stage')].map(stage => [stage.getAttribute('aria-label'),
        [...stage.querySelectorAll('.hit')].map(hit => Object.fromEntries(['rank', 'id', 'score', 'moves'].map(
            name => [name, hit.querySelector('.' + name)?.innerText])))])"""
    return dict(browser.run(script))


def visible_moves(browser) -> list[list[str]]:
    """Of the documents of the last but one column: what each arrow says."""
    script = """return [...document.querySelectorAll('.stage')].map(stage => [...stage.querySelectorAll('.hit')].map(
        hit => [...hit.querySelectorAll('.moves [aria-hidden]')].map(one => one.innerText)))"""
    return browser.run(script)


def arrow(before: dict[str, int], id_: str, rank: int, name: str = "") -> str:
    change = before[id_] - rank if id_ in before else None
    sign = "–" if change is None else "=" if change == 0 else f"▲{change}" if change > 0 else f"▼{-change}"
    return f"{name} {sign}".strip()


@in_a_browser
def test_typing_and_enter_show_every_stage_as_the_retriever_finds_it(browser, address, retriever):
    query = "which panda lives near a river"
    browser.open(address)
    ask(browser, query)
    (stages,) = retriever.search_stages([query])
    found = {
        name: {retriever.index.documents.id(row): rank for rank, row in enumerate(one.rows.tolist(), 1)}
        for name, one in stages.items()
    }
    assert list(found) == ["bm25", "dense", "fused", "reranked"]
    shown, moves = columns(browser), visible_moves(browser)
    assert list(shown) == ["words", "vectors", "fused", "reranked"]
    for (stage, ranks), hits in zip(found.items(), shown.values(), strict=True):
        assert [(hit["id"], int(hit["rank"])) for hit in hits] == list(ranks.items())[:10], stage
    words = [float(hit["score"]) for hit in shown["words"]]
    assert words == pytest.approx(stages["bm25"].scores[: len(words)].tolist(), rel=1e-3)
    assert moves[0] == [[]] * len(shown["words"])
    for place, (id_, rank) in enumerate(list(found["fused"].items())[:10]):
        expected = [arrow(found["bm25"], id_, rank, "words"), arrow(found["dense"], id_, rank, "vectors")]
        assert moves[2][place] == expected
    for place, (id_, rank) in enumerate(list(found["reranked"].items())[:10]):
        assert moves[3][place] == [arrow(found["fused"], id_, rank)]
    assert len({one for of_hit in moves[2] for one in of_hit}) > 3, "not all alike"
    assert all(re.search(r"\d (ms|s)$", heading) for heading in browser.texts(".stage h3"))
    more = len(found["fused"]) - 10
    button = browser.run("return document.querySelectorAll('.stage')[2].querySelector('.more')")
    assert button.text == f"show {more} more"
    button.click()
    assert [hit["id"] for hit in columns(browser)["fused"]] == list(found["fused"])


@in_a_browser
def test_the_address_keeps_query_number_and_filter_and_back_returns(browser, address):
    browser.open(address)
    ask(browser, "the tiger sleeps")
    first = columns(browser)
    browser.one("#options summary").click()
    browser.run("document.querySelector('#top_k').value = 3")
    browser.run("document.querySelector('#where').value = '{\"animal\": \"otter\"}'")
    ask(browser, "otter & river?")
    second, link = columns(browser), browser.driver.current_url
    assert len(second["fused"]) == 3 and second != first
    browser.driver.back()
    browser.wait(lambda: columns(browser) == first)
    assert browser.run("return [query.value, top_k.value, where.value]") == ["the tiger sleeps", "10", ""]
    browser.driver.forward()
    browser.wait(lambda: columns(browser) == second)
    browser.open(link)
    finished(browser)
    assert columns(browser) == second
    values = browser.run("return [query.value, top_k.value, where.value, document.title]")
    assert values == ["otter & river?", "3", '{"animal": "otter"}', "otter & river? – Search"]
    before = browser.run("return history.length")
    ask(browser, "otter & river?")
    assert browser.run("return history.length") == before, "the same search again is no new page"


@in_a_browser
def test_a_document_opens_in_full_with_its_passage_by_keyboard_alone(browser, address, retriever):
    query = "where does the lemur sleep"
    browser.open(f"{address}/?top_k=50")
    ask(browser, query)
    results = {result.doc_id: result for result in retriever.search(query, 50)}
    start, end = results[LONG["_id"]].slice
    assert start > 0, "the best passage is not the beginning"
    place = f"best passage: characters {start} to {end} of {len(LONG['text'])}"
    browser.press(DOWN)
    order = [hit["id"] for hit in columns(browser)["reranked"]]
    assert focused_id(browser) == order[0]
    browser.press(*[DOWN] * order.index(LONG["_id"]))
    assert focused_id(browser) == LONG["_id"]
    focused = browser.driver.switch_to.active_element
    assert place in focused.text and "lemur" in focused.text
    browser.press(ENTER)
    browser.one("dialog .text")
    assert browser.run("return document.querySelector('dialog .text').textContent") == LONG["text"]
    assert browser.run("return document.querySelector('dialog mark').textContent") == LONG["text"][start:end]
    said = browser.one("dialog").text
    assert place in said and "year\n2021" in said and LONG["_id"] in said
    assert f"reranked {order.index(LONG['_id']) + 1} " in said
    wait_for_request = f"{address}/documents/{quote(LONG['_id'], safe='')}"
    browser.wait(lambda: wait_for_request in browser.requested())
    browser.press(ESCAPE)
    browser.wait(lambda: not browser.all("dialog"))
    assert focused_id(browser) == LONG["_id"], "the focus comes back"
    browser.press(LEFT)
    assert focused_id(browser) == LONG["_id"], "the same document in the stage before"
    assert browser.run("return document.activeElement.closest('.stage').getAttribute('aria-label')") == "fused"
    assert browser.run("return document.querySelectorAll('.hit.same').length") > 1
    browser.press(ESCAPE)
    assert browser.run("return document.activeElement.id") == "query"
    browser.run("document.activeElement.blur()")
    browser.press("/")
    assert browser.run("return [document.activeElement.id, query.value]") == ["query", query]


def focused_id(browser) -> str:
    return browser.run("return document.activeElement.querySelector('.id')?.innerText")


@in_a_browser
def test_what_has_the_focus_is_outlined_and_one_document_is_a_tab_stop(browser, address):
    search(browser, address, "panda")
    browser.press(DOWN)
    style = browser.run("const {outlineStyle, outlineWidth} = getComputedStyle(document.activeElement);"
                        "return [outlineStyle, outlineWidth]")  # fmt: skip
    assert style == ["solid", "3px"]
    assert browser.run("return document.querySelectorAll('.hit[tabindex=\"0\"]').length") == 1
    names = browser.run("return [...document.querySelectorAll('button, input')].map(one => one.textContent.trim() "
                        "|| one.labels?.[0]?.textContent)")  # fmt: skip
    assert all(names), "each control has a name"
    readers = browser.run("return [...document.querySelectorAll('.moves .for-readers')].map(one => one.textContent)")
    assert any(re.fullmatch(r"(up|down) \d+ from rank \d+ in \w+", said) for said in readers)


@in_a_browser
def test_a_query_that_was_cut_is_told(browser, address):
    search(browser, address, "panda")
    assert "cut" not in browser.one("#status").text
    search(browser, address, "panda " * 600)
    status = browser.one("#status").text
    assert "; 1 of 1 queries were too long and were cut, the first of them query; " in status
    assert re.search(r"; \d+ of \d+ reranked documents were too long and were cut, the first of them '", status)


@in_a_browser
def test_a_filter_leaves_matching_documents_and_a_broken_one_asks_nothing(browser, address):
    where = quote('{"animal": {"in": ["panda", "tiger"]}}')
    browser.open(f"{address}/?q=river&where={where}")
    finished(browser)
    ids = {hit["id"] for hits in columns(browser).values() for hit in hits}
    assert {id_.split("-")[0] for id_ in ids} == {"panda", "tiger"}
    browser.requested()
    browser.run("document.querySelector('#where').value = '{animal: 1}'")
    ask(browser, "river")
    assert "The filter is no JSON" in browser.one("#problem").text and not browser.all(HIT)
    assert not [one for one in browser.requested() if one.endswith("/search")]
    browser.run("document.querySelector('#where').value = '{\"year\": {\"above\": 1}}'")
    ask(browser, "river")
    assert browser.one("#problem").text.startswith("The request is refused: where") and not browser.all(
        "#problem button"
    )


@in_a_browser
def test_hostile_texts_ids_and_metadata_are_shown_as_they_are(browser, address):
    query = "zeppelin <img src=x onerror=alert(2)>"
    search(browser, address, query)
    assert browser.driver.title == f"{query} – Search"
    (hit,) = [one for one in browser.all(LAST) if one.find_element("css selector", ".id").text == HOSTILE["_id"]]
    assert HOSTILE["text"] in hit.get_property("textContent")
    hit.click()
    browser.one("dialog .text")
    browser.wait(lambda: browser.run("return document.querySelector('dialog dt')?.textContent") == "<i>key</i>")
    assert browser.run("return document.querySelector('dialog dd').textContent") == "<script>alert(3)</script>"
    assert browser.run("return document.querySelector('dialog .text').textContent") == HOSTILE["text"]
    assert browser.run("return document.querySelectorAll('script, img, #found b, #found i, dialog i').length") == 1
    isolated = """return ['.hit .id', '.hit .snippet', 'dialog h2 bdi', 'dialog .text'].map(
        selector => getComputedStyle(document.querySelector(selector)).unicodeBidi)"""
    assert set(browser.run(isolated)) <= {"isolate", "plaintext"}, "its direction stays inside"
    assert browser.complaints() == []


@in_a_browser
def test_the_token_is_asked_for_once_kept_for_the_tab_and_a_wrong_one_is_told(browser, models, index):
    with served(models, index, token=b"secret") as (_, address):
        search(browser, address, "panda")
        assert "This server asks for its token" in browser.one("#problem").text
        assert browser.run("return document.activeElement.id") == "token"
        browser.press("wrong", ENTER)
        browser.wait(lambda: "does not accept this token" in browser.one("#problem").text)
        browser.press("秘密", ENTER)
        assert "visible ASCII characters" in browser.one("#problem").text
        browser.run("token.value = ''")
        browser.press("secret", ENTER)
        browser.one(HIT)
        assert not browser.one("#token-form").is_displayed() and browser.one("#problem").text == ""
        browser.driver.refresh()
        browser.one(HIT)
        assert "secret" not in browser.driver.current_url
        assert browser.run("return localStorage.length + document.cookie.length") == 0


@in_a_browser
def test_a_full_queue_a_stopping_server_and_a_lost_one_are_told_in_words(browser, service, address, monkeypatch):
    search(browser, address, "panda")
    with monkeypatch.context() as patch:
        patch.setattr(service.admission, "max_requests", 0)
        ask(browser, "panda")
        assert browser.one("#problem").text.startswith("The server is busy: the queue is full")
        assert re.search(r"Try again( in \d+ s)?$", browser.one("#problem button").text)
    browser.wait(lambda: browser.one("#problem button").is_enabled())
    browser.one("#problem button").click()
    browser.one(HIT)
    with monkeypatch.context() as patch:
        patch.setattr(service.admission, "requests", 1)  # something is inside, so that the server stays
        patch.setattr(service.admission, "stopping", True)
        ask(browser, "tiger")
        assert browser.one("#problem").text.startswith(
            "The server takes no requests at present: the server is stopping"
        )
        patch.undo()
        ask(browser, "tiger")
        assert browser.all(HIT)
    browser.command("Network.enable")
    browser.command(
        "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0
    )
    try:
        ask(browser, "otter")
        assert browser.one("#problem").text.startswith("The server could not be reached.") and not browser.all(HIT)
    finally:
        browser.command(
            "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
    browser.one("#problem button").click()
    browser.one(HIT)


@in_a_browser
def test_a_narrow_window_scrolls_no_page_sideways_and_shows_the_result_first(browser, address):
    search(browser, address, "which panda lives near a river", width=360)
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    place = browser.run("return document.querySelector('.stage.last').getBoundingClientRect()")
    assert 0 <= place["left"] < place["right"] <= 360
    browser.all(LAST)[0].click()
    browser.one("dialog .text")
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("return document.querySelector('dialog').getBoundingClientRect().right <= innerWidth")


def luminance(color: str) -> float:
    """WCAG 2.2, of `rgb(r, g, b)`."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@in_a_browser
def test_dark_and_light_have_colors_of_their_own_that_can_be_read(browser, address):
    colors = {}
    for dark in (False, True):
        browser.open(f"{address}/?q=lemur&top_k=50", dark=dark)
        finished(browser)
        script = """return ['.hit .snippet', '.hit .score', '.hit mark', '.up', '.down', '#status'].map(selector => {
            const one = document.querySelector(selector);
            let behind = one;
            while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
            return [getComputedStyle(one).color, getComputedStyle(behind).backgroundColor];
        })"""
        colors[dark] = browser.run(script)
        assert all(contrast(*pair) >= 4.5 for pair in colors[dark]), colors[dark]
    assert all(one != other for one, other in zip(colors[False], colors[True], strict=True))


@in_a_browser
def test_chinese_is_composed_searched_and_broken_into_lines(browser, address, retriever):
    browser.open(address)
    browser.one("#query").click()
    browser.requested()
    browser.command("Input.imeSetComposition", text="daxiongmao", selectionStart=10, selectionEnd=10)
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
    browser.command("Input.dispatchKeyEvent", type="keyDown", **enter)
    browser.command("Input.dispatchKeyEvent", type="keyUp", **enter)
    assert browser.run("return location.search") == "", "Enter while a word is composed does not search"
    browser.command("Input.imeSetComposition", text="", selectionStart=0, selectionEnd=0)
    browser.command("Input.insertText", text="大熊猫吃什么")
    browser.command("Input.dispatchKeyEvent", type="keyDown", **enter)
    browser.one(HIT)
    assert [one for one in browser.requested() if one.endswith("/search")] == [f"{address}/search"]
    expected = [result.doc_id for result in retriever.search("大熊猫吃什么")]
    assert [hit["id"] for hit in columns(browser)["reranked"]] == expected
    snippets = browser.run("return [...document.querySelectorAll('.snippet:lang(zh)')].map(one => one.textContent)")
    assert snippets and all(re.search("[\u4e00-\u9fff]", text) for text in snippets)
    assert browser.run("return document.querySelector('.snippet:not(:lang(zh))').lang") == ""
    long = [one for one in browser.all(f"{HIT} .snippet:lang(zh)") if "四川" in one.text]
    assert long and all(one.size["height"] > 30 for one in long), "no spaces, and more than one line"
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")


@in_a_browser
def test_nothing_is_asked_of_another_origin_and_the_policy_stops_what_would(browser, address):
    browser.open(address)
    ask(browser, "panda")
    browser.all(LAST)[0].click()
    browser.one("dialog .text")
    requested = browser.requested()
    assert requested and {one.split("/")[2] for one in requested if not one.startswith("data:")} == {address[7:]}
    assert browser.complaints() == []
    tried = browser.driver.execute_async_script(
        "const done = arguments[0]; fetch('http://127.0.0.2:9/').then(() => done('sent'), error => done(String(error)))"
    )
    assert tried.startswith("TypeError") and any("Content Security Policy" in one for one in browser.complaints())
    made = "try { document.body.innerHTML = '<b>x</b>'; return 'made' } catch (error) { return String(error) }"
    assert "TypeError" in browser.run(made)
