"""Update the table in the project's docs/findings.md: `uv run python -m tools.findings`."""

import runpy
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "{{cookiecutter.project_slug}}"
PAGE = PROJECT / "docs" / "findings.md"
HEAD = "| finding | what it means | what to do | try again? |\n"


def with_table(page: str) -> str:
    """Return the page with the table from `postgres/findings.py` at its end."""
    findings = runpy.run_path(str(PROJECT / "postgres" / "findings.py"))["FINDINGS"]
    rows = [f"| `{f.name}` | {f.cause} | {f.advice} | {f.retry} |\n" for f in findings]
    return "".join([page.partition(HEAD)[0], HEAD, "|---|---|---|---|\n", *rows])


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
