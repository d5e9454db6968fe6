"""The page of `GET /` of a server with an index, on which a person searches: one document with everything inside."""

from pathlib import Path

from starlette.responses import HTMLResponse

from rag_retrieval.retrieval import stage_view

FOLDER = Path(__file__).parent


def page_response() -> HTMLResponse:
    """It holds no data, so it needs no token; the requests that it sends do."""
    style, script, page = ((FOLDER / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html"))
    style, script = stage_view.STYLE + style, stage_view.SCRIPT + script
    policy = stage_view.content_policy(style, script, connect="'self'")
    headers = {
        "Content-Security-Policy": f"{policy}; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(page.replace("{style}", style).replace("{script}", script), headers=headers)
