"""The page of `GET /` of a server with an index, on which a person searches: one document with everything inside."""

from pathlib import Path

from starlette.responses import HTMLResponse

from rag_retrieval.retrieval import stage_view
from rag_retrieval.serve.endpoints import Endpoint, Work

FOLDER = Path(__file__).parent


class PageEndpoint(Endpoint):
    """The page holds no data, so that it needs no token; the requests that it sends do."""

    method = "GET"
    paths = ("/",)
    public = True

    def __init__(self):
        style, script, page = ((FOLDER / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html"))
        style, script = stage_view.STYLE + style, stage_view.SCRIPT + script
        self.page = page.replace("{style}", style).replace("{script}", script)
        policy = stage_view.content_policy(style, script, connect="'self'")
        self.headers = {
            "Content-Security-Policy": f"{policy}; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }

    def parse(self, body: bytes, path: str) -> None:
        return None

    def size(self, task: None) -> int:
        return 0

    async def answer(self, task: None, work: Work) -> HTMLResponse:
        return HTMLResponse(self.page, headers=self.headers)
