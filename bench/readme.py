"""The benchmark section of the template's README: the figures to see at a glance."""

from pathlib import Path

from .goals import COMPARED, shares
from .measure import Results
from .processes import BenchError
from .report import PLOTS, round_trips

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
SHOWN = ("speed", "trips")
CONCLUSION = """\
All goals, with what falls short and why, and what the apps in the plots are:
[results]({place}/results.md). Run the benchmark yourself with
`uv run python -m bench`: expect similar ratios, but different absolute numbers.
"""


def glance(results: Results) -> str:
    """Return the figures that need no table, one to a line."""
    lines = []
    cells = [one for one in results.of("speed") if one.cell.clients == 16]
    cells = [one for one in cells if one.cell.operation in COMPARED]
    if ratios := [ratio for one in cells if (ratio := one.ratio("ours", "textbook"))]:
        farthest = max(one.cell.latency_ms for one in cells)
        lines.append(
            f"- **{min(ratios):.1f} to {max(ratios):.1f} times** the responses per second of the"
            f" app that tutorials lead to, with a database 0 to {farthest} ms away."
        )
    if found := round_trips(results):
        slowest = max(of_app["ours"] for operation, of_app in found if operation != "mixed")
        lines.append(
            f"- **One round trip** to the database: a median response takes at most {slowest:.2f}"
            " of them."
        )
    if crowds := results.of("crowd"):
        most = max(one.cell.clients for one in crowds)
        sent = sum(one.total("ours", "sent") for one in crowds)
        succeeded = 100 * sum(one.total("ours", "succeeded") for one in crowds) / sent
        failed = sum(one.total("ours", "failed") for one in crowds)
        rest = f"{failed} fail" if failed else "the rest get a prompt 503"
        lines.append(
            f"- **Up to {most:,} clients at once**: {succeeded:.1f} % of the requests succeed, and"
            f" {rest}."
        )
    if rivals := [one for one in crowds if one.cell.clients == 200 and "textbook" in one.cell.apps]:
        succeeded_any = any(one.total("textbook", "succeeded") for one in rivals)
        part = shares(rivals, "textbook") if succeeded_any else "none"
        lines[-1] += f" With 200 clients, {part} of the textbook app's requests succeed."
    return "".join(f"{line}\n" for line in lines)


def summary(results: Results, folder: Path, root: Path) -> str:
    """Return the text between the README's markers. folder: of the plots. root: of the README."""
    place = folder.relative_to(root).as_posix()
    drawn = [name for name in SHOWN if (folder / f"{name}.svg").exists()]
    return "\n".join(
        [
            glance(results),
            *[f"![{PLOTS[name]}]({place}/{name}.svg)\n" for name in drawn],
            CONCLUSION.format(place=place),
        ]
    )


def write(readme: Path, text: str) -> None:
    """Replace the text between the markers. Raises BenchError if there are none."""
    old = readme.read_text("utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise BenchError(f"{readme.name} has no lines {BEGIN} and {END} to write between")
    readme.write_text(f"{before}{BEGIN}\n{text}{END}{after}", "utf-8")
