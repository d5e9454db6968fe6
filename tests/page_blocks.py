"""Code blocks of a page, and what a page shows as printed beside what is printed now."""

import re


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each; what a block prints has no language."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def masked(line: str) -> str:
    return " ".join(re.sub(r"(?:< )?[-+]?\d[\d.,]*", "0", line).split())


def missing_lines(shown: str, printed: str) -> list[str]:
    """Lines of a page that are not printed, whatever the numbers."""
    lines = {masked(line) for line in printed.splitlines()}
    return [line for line in shown.splitlines() if masked(line) not in lines]
