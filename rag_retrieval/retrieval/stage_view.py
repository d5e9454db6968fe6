"""The stages of a search side by side in a browser: style and script that the server's page and reports share."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
STYLE = (FOLDER / "stage_view.css").read_text(encoding="utf-8")
SCRIPT = (FOLDER / "stage_view.js").read_text(encoding="utf-8")  # defines drawStages


def content_policy(style: str, *scripts: str, connect: str = "'none'") -> str:
    """A Content-Security-Policy under which a page has this style and these scripts, images inside itself, requests to
    `connect`, and nothing else; and under which no text can become HTML."""
    allowed = " ".join(map(source_of, scripts))
    return (
        f"default-src 'none'; style-src {source_of(style)}; script-src {allowed}; connect-src {connect}; "
        "img-src data:; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def source_of(text: str) -> str:
    """What a policy calls an inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def script_json(value: Any) -> str:
    """JSON that stands inside a script element: no `<` that could end it. Raises ValueError for NaN and infinity."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
