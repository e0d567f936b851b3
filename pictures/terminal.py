"""The terminal from an empty folder to a checked connection, drawn from a real run."""

import os
import re
import subprocess
import tempfile
from io import StringIO
from itertools import groupby
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

REPOSITORY = Path(__file__).parents[1]
COLUMNS, ROWS = 96, 60
PROMPT = "$ "
SECONDS = 120
QUESTIONS = ("as people read it", "folder's and", "in one line", "Which Python", "Which PostgreSQL")
# An SVG that loads nothing: Rich's default template fetches a font.
FORMAT = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<title>A terminal: five questions, and a project whose connection is checked</title>
<style>
.{unique_id}-matrix {{
    font: {char_height}px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
    line-height: {line_height}px;
    font-variant-east-asian: full-width;
}}
.{unique_id}-title {{ font: bold 18px system-ui, sans-serif }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""


# Where an interpreter is, which uv says, differs from one machine to the next.
PLACE_OF_PYTHON = re.compile(r"(interpreter at: (?:\x1b\[\d+m)*)[^\s\x1b]*/")


def draw(folder: Path) -> Path:
    """Generate a project on a terminal, as a reader would, and draw it. Returns the file."""
    screen = pyte.Screen(COLUMNS, ROWS)
    with tempfile.TemporaryDirectory() as work:
        clone = ["git", "clone", "--quiet", str(REPOSITORY), "template"]
        subprocess.run(clone, check=True, cwd=work, timeout=SECONDS)
        play(Path(work), pyte.Stream(screen))
    picture = folder / "terminal.svg"
    picture.write_text(svg(screen), "utf-8")
    return picture


def play(work: Path, stream: pyte.Stream) -> None:
    """Type the README's commands, and feed all output to the screen."""
    # `uv run` and pyenv change the PATH; on a reader's terminal, uv comes first.
    path = os.pathsep.join([str(Path(os.environ["UV"]).parent), os.environ["PATH"]])
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VIRTUAL_ENV", "PYENV_", "UV"))
    }
    environment |= {"PATH": path, "PS1": PROMPT, "TERM": "xterm-256color"}
    shell = pexpect.spawn(
        "bash",
        ["--noprofile", "--norc", "-i"],
        cwd=work,
        env=environment,
        encoding="utf-8",
        timeout=SECONDS,
        dimensions=(ROWS, COLUMNS),
    )

    def expect(text: str) -> None:
        shell.expect_exact(text)
        # Readers do not have this temporary folder.
        shown = f"{shell.before}{text}".replace(str(work), "~")
        stream.feed(PLACE_OF_PYTHON.sub(r"\1", shown))

    expect(PROMPT)
    shell.sendline("uvx cookiecutter template")
    for question in QUESTIONS:
        expect(question)
        shell.sendline("")
    expect(PROMPT)
    shell.sendline("cd todo-backend && uv run manage.py check")
    expect("schema")
    expect(PROMPT)
    shell.sendline("uv run manage.py postgres stop")
    shell.expect_exact(PROMPT)
    shell.close(force=True)


def svg(screen: pyte.Screen) -> str:
    lines = [line_of(screen, row) for row in range(ROWS)]
    while not lines[-1].plain.strip() or lines[-1].plain.strip() == PROMPT.strip():
        lines.pop()
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    for line in lines:
        console.print(line, soft_wrap=True)
    return console.export_svg(
        title="todo-backend", theme=MONOKAI, code_format=FORMAT, unique_id="terminal"
    )


def line_of(screen: pyte.Screen, row: int) -> Text:
    """Return a screen line with its colours."""
    cells = [screen.buffer[row][column] for column in range(COLUMNS)]
    line = Text()
    for look, group in groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
        colour, bold = look
        style = " ".join(
            ["bold"] * bold + [colour.replace("brown", "yellow")] * (colour != "default")
        )
        line.append("".join(cell.data for cell in group), style)
    line.rstrip()
    return line
