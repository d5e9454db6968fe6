"""Why a request gets no scores, and the one body in which every error is told.

What a reader would get wrong: `message` and `error` hold the same text, on purpose. Clients written for Cohere show
the first, those written for text-embeddings-inference the second.
"""

from starlette.responses import JSONResponse

KINDS = {
    400: "malformed",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "too_slow",
    413: "too_large",
    422: "validation",
    429: "overloaded",
    500: "internal",
    503: "stopping",
    504: "timeout",
}
CLIENT_GONE = 499  # in the metrics alone: nobody is there to read it


class Refusal(Exception):
    """status: of HTTP, a key of KINDS. retry_after: seconds, for the header of that name; None for no such header."""

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


def error_response(refusal: Refusal, request_id: str) -> JSONResponse:
    """`{"message", "error", "error_type", "id"}`; the id is in the header X-Request-Id, and in the log for a 500."""
    body = {
        "message": refusal.message,
        "error": refusal.message,
        "error_type": KINDS[refusal.status],
        "id": request_id,
    }
    headers = {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(refusal.retry_after)
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, refusal.status, headers)
