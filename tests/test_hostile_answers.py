"""Any answer is either rejected before anything is written, or reproduced exactly as typed."""
# ruff: noqa: RUF001  (confusable letters are test data here)

import json
import logging
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cookiecutter.environment import StrictEnvironment
from cookiecutter.exceptions import FailedHookException
from cookiecutter.main import cookiecutter
from hypothesis import Phase, assume, event, given, settings
from hypothesis import strategies as st
from packaging.utils import is_normalized_name

from machine import Outcome, new_machine
from readings import files, has_format, lint, read, read_as_on_github, replace
from repository import REPOSITORY, load_hook

Answers = dict[str, str]

hook = load_hook("pre_gen_project")

GOOD = {
    "project_name": "Todo Backend",
    "project_slug": "todo-backend",
    "description": "A todo API",
    "python_version": "3.13",
    "database": "local",
}
CHOSEN = {"python_version": ("3.13", "3.14"), "database": ("local", "neon")}
LONGEST = {"project_name": 60, "description": 200}
# Texts that occur in no file otherwise. They mark where a file contains an answer.
MARKS = {
    "project_name": "Zqnameqz",
    "project_slug": "zq-slug-qz",
    "description": "Zqdescriptionqz",
}
HERE = "@here@"  # placeholder for the test's folder in absolute paths
NEVER_SEEN = {"Cc", "Co", "Cs", "Zl", "Zp", "Zs"}  # Unicode's categories

SEEN = [
    "O'Brien",
    'say "hi"',
    'say """hi""" \'\'\'ho\'\'\'',
    "“curly” ‘quotes’ «and» `ticks`",
    "back\\slash\\",
    "C:\\new\\table\\u0041",
    "\\N{BULLET} \\x41 \\",
    "{{ 7 * 7 }} {% raw %}{% endraw %} {# note #}",
    "{{ cookiecutter.project_slug }}",
    "{% endraw %}{{ cookiecutter }}",
    "#} %} }} -%} ${{ github.token }}",
    "${HOME} $(id) `id` %(here)s %s {0} $$",
    "'; import os; x='",
    '"\\"; title = "x"',
    '"]\n[tool.uv]'.replace("\n", " "),
    "key: value # comment",
    "- item",
    "? key",
    "* anchor &a !tag |",
    "%YAML 1.2",
    "@at `tick",
    "null",
    "yes",
    "true",
    "1e3",
    "2026-11-21",
    "0x1F",
    "~",
    "[link](https://example.com) <b>bold</b> &amp; &#x41; `code`",
    "<script>alert(1)</script></title>",
    "<!-- comment -->",
    "<script src=x",
    "<? instruction",
    "<div class=x",
    "# no heading, *nor* _emphasis_ ~~at~~ all #",
    "see https://example.com/a_b_c*d* or www.example.com/a_b_c and a_b@example.com",
    "$x_1$ is no formula",
    "- no list",
    "+ no list",
    "1. no list",
    "12) no list",
    "٣. no list either",
    "---",
    "===",
    "***",
    "> no quotation",
    "a | b",
    "!important",
    "![no picture](x)",
    "[^1]: no note",
    "[x]: no link",
    "FROM scratch AS x \\",
    "a  b   c",
    "👩‍💻 family 👨‍👩‍👧‍👦 🏴󠁧󠁢󠁳󠁣󠁴󠁿 ❤️‍🔥 1️⃣",
    "תזכורות שלי",
    "مهامي",
    "可愛い 葛\U000e0100",
    "می‌خواهم",
    "क्‍ष ශ්‍රී",
    "e\u0301 n\u0303 Z͑ͫ̓a͊l̈́g͢o",
    "ﬁ Å ℵ ½ İ ẞ",
    "\ufffd\ufffc",
    "../../etc/passwd",
    "C:\\CON",
]  # fmt: skip
UNSEEN = [
    "",
    " ",
    "\u00a0\u00a0",
    "\u3000",
    "\u2003x",
    " x",
    "x ",
    "x\u00a0y",
    "one\ntwo",
    "one\rtwo",
    "one\r\ntwo",
    "one\u2028two",
    "one\u2029two",
    "one\u0085two",
    "one\ttwo",
    "one\x0btwo\x0c",
    "nul\0l",
    "bell\a",
    "esc\x1b[31m",
    "delete\x7f",
    "rtl\u202eexe.txt",
    "isolated\u2066x\u2069",
    "mark\u200f",
    "arabic mark\u061c",
    "zero\u200bwidth",
    "\ufeffbom",
    "soft\u00adhyphen",
    "half\ud83d",
    "\udc80byte",
    "private\ue000",
    "no character \ufffe",
    "not yet \U000e01f0",
    "\u200d",
    "x\u200d\u200dy",
    "\u3164",
    "\u2800",
    "x\ufe0f\ufe0e",
    "tags\U000e0041\U000e0042",
    "\u0301x",
    "filler\u115f",
    *(
        each * 10_000
        for each in ("x", "\\", '"', "'", "{{", "👩‍💻", "e\u0301", "-", "\u202e", "\n")
    ),
]
SLUGS = [
    *("x", "test", "0", "007", "1e5", "0x1f", "1-2", "2026-11-21", "null", "true", "none", "off"),
    *("y", "if", "class", "user", "tests", "main", "env", "git", "a" * 60, "a-" * 29 + "a9"),
]
NO_SLUGS = [
    *("json", "concurrent", "antigravity", "fastapi", "pytest", "types-psutil"),
    *("con", "nul", "aux", "prn", "com1", "lpt9", "com¹", "CON", "con.txt", "todo.", "nul ."),
    *("postgres", "template0", "template1"),
    *("../x", "..", ".", "/", "a/b", "a/b/c", "a\\b", f"{HERE}/absolute", "~", "~/x", "C:\\x"),
    *("", "-", "-x", "x-", "x--y", "x_y", "X", "x.y", "tödo", "٣", "𝓍", "ⅷ", "ｘ", "ﬁ", "ß"),
    *("\u212a", "x\n", "\nx", "x\0", "x\ny", "x y", " x", "x\u00a0", "x\u200b", "x\u202ey"),
    *("\ud800", "\udc80", "{{ x }}", "{% raw %}", "{# #}", "$HOME", "$(id)", "`id`", "*", "?"),
    *("<x>", "a:b", "a|b", "'", '"', "a" * 61, "a" * 255, "a" * 10_000, "a-" * 30, "-" * 60),
    "_refused_x",
]
CHOICES = ["3.12", "3.15", "3.13 ", "3", "", "python", "3.13\n", "Neon", "sqlite", "\0"]

TAKEN = {*hook.PACKAGES, *sys.stdlib_module_names, *hook.WINDOWS_DEVICES, *hook.DATABASES}


def certainly_fits(name: str, answer: str) -> bool:
    """Return whether an answer must be accepted. Rare characters are undecided."""
    match name:
        case "python_version":
            return answer in {"3.13", "3.14"}
        case "database":
            return answer in {"local", "neon"}
        case "project_slug":
            return is_normalized_name(answer) and len(answer) <= 60 and answer not in TAKEN
    return (
        0 < len(answer) <= LONGEST[name]
        and answer == answer.strip()
        and all(character == " " or is_plain(character) for character in answer)
    )


def is_plain(character: str) -> bool:
    blank = "\u115f\u1160\u2800\u3164\uffa0"
    return unicodedata.category(character)[0] in "LNPS" and character not in blank


def certainly_unfit(name: str, answer: str) -> bool:
    """Return whether an answer must be rejected."""
    if name not in LONGEST:
        return not certainly_fits(name, answer)
    return (
        not answer.strip()
        or len(answer) > LONGEST[name]
        or any(unicodedata.category(each) in NEVER_SEEN and each != " " for each in answer)
    )


@dataclass(frozen=True)
class Oven:
    """Runs Cookiecutter in its own folder, on a template without the post_gen_project hook."""

    template: Path
    root: Path
    run_hook: Callable[[str, str], None]

    @property
    def out(self) -> Path:
        return self.root / "work" / "out"

    def bake(self, answers: Answers, *, typed: bool) -> Path:
        """Render a project. Raises cookiecutter's exceptions.

        typed: whether to type the answers, or pass them in the command, where they are templates.
        """
        given = {name: text if name in CHOSEN else quote(text) for name, text in answers.items()}
        config = self.root / "config.yaml"
        folders = {"replay_dir": "temp/replay", "cookiecutters_dir": "temp/templates"}
        config.write_text(json.dumps({key: str(self.root / at) for key, at in folders.items()}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logging.root.manager, "disable", logging.CRITICAL)
            patch.setattr(tempfile, "tempdir", str(self.root / "temp"))
            patch.setattr("cookiecutter.hooks.run_script", self.run_hook)
            for kind in ("variable", "choice"):
                ask = f"cookiecutter.prompt.read_user_{kind}"
                patch.setattr(ask, lambda name, *_args, **_options: answers[name])
            path = cookiecutter(
                str(self.template),
                no_input=not typed,
                extra_context=None if typed else given,
                output_dir=str(self.out),
                config_file=str(config),
            )
        return Path(path)

    def listing(self) -> list[str]:
        """Return all paths, except those in the temporary folder."""
        names = (file.relative_to(self.root).as_posix() for file in self.root.rglob("*"))
        return sorted(name for name in names if not name.startswith("temp/"))


def quote(text: str) -> str:
    """Return a template that renders as exactly this text."""
    return "{{ '" + "".join(f"\\U{ord(character):08x}" for character in text) + "' }}"


def run_here(script: str, _folder: str = ".") -> None:
    """Run a rendered hook in this process, which is ten times as fast."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        raise FailedHookException(end.code) from None


def run_apart(script: str, folder: str = ".") -> None:
    """Run a rendered hook as cookiecutter does, but capture its output."""
    done = subprocess.run(
        [sys.executable, script],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode:
        raise FailedHookException(done.stderr)


def new_oven(template: Path, root: Path, run_hook: Callable[[str, str], None]) -> Oven:
    oven = Oven(template, root, run_hook)
    oven.out.mkdir(parents=True)
    (root / "temp").mkdir()
    (root / "config.yaml").touch()
    (oven.out / "mine.txt").write_text("mine", "utf-8")
    return oven


@pytest.fixture(scope="module")
def slim_template(bare_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template with only the files that contain answers, and only the pre_gen_project hook."""
    slim = tmp_path_factory.mktemp("slim") / "template"
    project = "{{cookiecutter.project_slug}}"
    for name in files(bare_template / project):
        text = (bare_template / project / name).read_text("utf-8")
        if "cookiecutter." in text and not name.endswith(".py"):
            if name.endswith(".md"):  # text after the last answer takes long to parse
                head, _, last = text.rpartition("cookiecutter.")
                text = f"{head}cookiecutter.{last.splitlines()[0]}\n"
            (slim / project / name).parent.mkdir(parents=True, exist_ok=True)
            (slim / project / name).write_text(text, "utf-8")
    for name in ("cookiecutter.json", "hooks/pre_gen_project.py"):
        (slim / name).parent.mkdir(exist_ok=True)
        shutil.copy2(bare_template / name, slim / name)
    return slim


@pytest.fixture(scope="module")
def oven(slim_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Oven:
    return new_oven(slim_template, tmp_path_factory.mktemp("oven"), run_here)


@pytest.fixture(scope="module")
def whole_oven(bare_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Oven:
    return new_oven(bare_template, tmp_path_factory.mktemp("whole"), run_apart)


class Judge:
    """Checks what must hold for any answers, and counts the attempts."""

    def __init__(self, oven: Oven) -> None:
        self.oven = oven
        self.tried: Counter[str] = Counter()
        # By Python version, the files of a project whose answers are marks: parsed if they contain
        # a mark, as bytes otherwise.
        self.plain: dict[str, dict[str, Any]] = {}
        for version in CHOSEN["python_version"]:
            path = oven.bake(GOOD | MARKS | {"python_version": version}, typed=True)
            self.plain[version] = {
                name: read(path / name) if marks_in(path / name) else (path / name).read_bytes()
                for name in files(path)
            }
            path.rename(oven.root / version)

    @contextmanager
    def try_out(self, answers: Answers, *, typed: bool = True) -> Iterator[Path | None]:
        """Bake a project, check it, and remove it. Yields None if the answers were rejected."""
        answers = {name: text.replace(HERE, str(self.oven.root)) for name, text in answers.items()}
        before = self.oven.listing()
        self.tried["tried"] += 1
        try:
            path = self.oven.bake(answers, typed=typed)
        except (FailedHookException, SystemExit) as refusal:
            self.tried["refused"] += 1
            assert self.oven.listing() == before
            assert not list((self.oven.root / "temp").glob("tmp*"))
            check_refusal(answers, str(refusal))
            yield None
            return
        self.tried["accepted"] += 1
        try:
            assert path == self.oven.out / answers["project_slug"]
            self.check_project(path, answers)
            yield path
        finally:
            shutil.rmtree(path)

    def check_project(self, path: Path, answers: Answers) -> None:
        """Compare with a project with plain answers. Only the texts may differ."""
        assert [name for name in answers if certainly_unfit(name, answers[name])] == []
        plain = self.plain[answers["python_version"]]
        texts = {mark: answers[name] for name, mark in MARKS.items()}
        assert list(files(path)) == list(plain)
        for name, expected in plain.items():
            if isinstance(expected, bytes):
                assert (path / name).read_bytes() == expected, name
            else:
                assert read(path / name) == replace(expected, texts), name
        shown = [("h1", answers["project_name"]), ("p", answers["description"])]
        assert read_as_on_github((path / "README.md").read_text("utf-8"))[:2] == shown


def check_refusal(answers: Answers, message: str) -> None:
    """Check that a message names every invalid answer, no valid one, and says what to write."""
    named = {name for name in answers if re.search(rf"(?m)^{name} |variable {name},", message)}
    assert named, message
    assert not {name for name in named if certainly_fits(name, answers[name])}, message
    if "provided for choice variable" in message:  # cookiecutter's own; names only the first
        return
    assert named >= {name for name in answers if certainly_unfit(name, answers[name])}, message
    assert message.replace("\n", "").isprintable()
    problems = [line for line in message.splitlines() if line.split(" ")[0] in answers]
    assert all(re.search(": write|must be", line) for line in problems), message


def marks_in(file: Path) -> set[str]:
    """Return the names of the answers that a file contains."""
    content = file.read_bytes()
    return {name for name, mark in MARKS.items() if mark.encode() in content}


@pytest.fixture(scope="module")
def judge(oven: Oven) -> Iterator[Judge]:
    judge = Judge(oven)
    yield judge
    print("\nrendered without copied files:", dict(judge.tried))


@pytest.fixture(scope="module")
def whole_judge(whole_oven: Oven) -> Iterator[Judge]:
    judge = Judge(whole_oven)
    yield judge
    print("\nrendered completely, with hooks as processes:", dict(judge.tried))


def written(longest: int) -> st.SearchStrategy[str]:
    """Draw visible texts, most of which are accepted."""
    plain = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=12)
    ascii_signs = st.text("\"'\\`{}%#$&<>[]()*_-+=|~!?:;,.@/ ^0a", min_size=1, max_size=12)
    pieces = st.lists(st.one_of(st.sampled_from(SEEN), plain, ascii_signs), min_size=1, max_size=4)
    lines = st.builds(str.join, st.sampled_from(["", " "]), pieces)
    return lines.map(lambda line: line[:longest].strip() or "x")


def hostile(longest: int) -> st.SearchStrategy[str]:
    """Draw texts of all kinds, most of which are rejected."""
    piece = st.one_of(st.sampled_from(UNSEEN), st.sampled_from(SEEN), st.text(st.characters()))
    long = st.builds(
        lambda piece, length: (piece * length)[:length],
        st.sampled_from(["x", "\\", '"', "'", "{{", "👩‍💻", "e\u0301", "-", "\u202e"]),
        st.sampled_from([60, 61, 200, 201]),
    )
    bounds = st.sampled_from(["x" * longest, "x" * (longest + 1)])
    return st.one_of(st.lists(piece, max_size=4).map("".join), long, bounds)


def slugs() -> st.SearchStrategy[str]:
    return st.one_of(
        st.from_regex(r"[a-z0-9]{1,9}(-[a-z0-9]{1,9}){0,4}", fullmatch=True),
        st.sampled_from(SLUGS),
    )


HOSTILE = {
    "project_name": hostile(60),
    "project_slug": st.one_of(st.sampled_from(NO_SLUGS), st.text(st.characters(), max_size=9)),
    "description": hostile(200),
    "python_version": st.sampled_from(CHOICES),
    "database": st.sampled_from(CHOICES),
}
FITTING = {
    "project_name": written(60),
    "project_slug": slugs(),
    "description": written(200),
    "python_version": st.sampled_from(["3.13", "3.14"]),
    "database": st.sampled_from(["local", "neon"]),
}


@st.composite
def five_answers(draw: st.DrawFn) -> Answers:
    bad = draw(st.one_of(st.just(set()), st.sets(st.sampled_from(sorted(HOSTILE)), max_size=2)))
    return {name: draw((HOSTILE if name in bad else FITTING)[name]) for name in GOOD}


@settings(max_examples=200, deadline=None)
@given(answers=five_answers(), typed=st.booleans())
def test_answers_are_either_rejected_or_reproduced_as_typed(
    judge: Judge, answers: Answers, typed: bool
) -> None:
    with judge.try_out(answers, typed=typed) as path:
        event("accepted" if path else "refused")


@settings(
    max_examples=20, deadline=None, phases=[Phase.generate]
)  # shrinking is faster in the other test
@given(answers=five_answers(), typed=st.booleans())
def test_projects_pass_the_linter_with_any_answers(
    whole_judge: Judge, answers: Answers, typed: bool
) -> None:
    with whole_judge.try_out(answers, typed=typed) as path:
        event("accepted" if path else "refused")
        if path:
            assert lint(path) == ""


@pytest.mark.parametrize("text", SEEN)
def test_visible_text_is_reproduced_as_typed(judge: Judge, text: str) -> None:
    name = text[:60].strip()

    with judge.try_out(GOOD | {"project_name": name, "description": text}) as path:
        assert path


@pytest.mark.parametrize("answer", LONGEST)
@pytest.mark.parametrize("text", UNSEEN, ids=lambda text: ascii(text)[:20])
def test_invisible_text_is_rejected(judge: Judge, answer: str, text: str) -> None:
    with judge.try_out(GOOD | {answer: text}) as path:
        assert path is None


@pytest.mark.parametrize("slug", SLUGS)
def test_a_slug_that_looks_like_another_type_is_accepted(judge: Judge, slug: str) -> None:
    with judge.try_out(GOOD | {"project_slug": slug}) as path:
        assert path


@pytest.mark.parametrize("typed", [True, False], ids=["typed", "given"])
@pytest.mark.parametrize("slug", NO_SLUGS, ids=lambda slug: ascii(slug)[:20])
def test_an_invalid_slug_creates_no_folder(judge: Judge, slug: str, typed: bool) -> None:
    with judge.try_out(GOOD | {"project_slug": slug}, typed=typed) as path:
        assert path is None


@settings(max_examples=100, deadline=None)
@given(name=written(60))
def test_every_valid_name_gives_a_valid_slug(name: str) -> None:
    assume(not hook.find_problems(GOOD | {"project_name": name}))  # not cut within a flag
    questions = json.loads((REPOSITORY / "cookiecutter.json").read_text("utf-8"))
    default = StrictEnvironment(context=questions).from_string(questions["project_slug"])

    slug = default.render(cookiecutter={"project_name": name})
    problems = hook.find_problems(GOOD | {"project_slug": slug})

    # A package, a module or a device may have this name.
    assert [problem for problem in problems if " is a" not in problem] == []


def test_only_files_with_a_known_format_contain_texts(judge: Judge) -> None:
    plain = judge.oven.root / "3.13"

    shown = [name for name in files(plain) if marks_in(plain / name) & set(LONGEST)]

    assert {"README.md", "pyproject.toml"} <= set(shown)
    assert [name for name in shown if not has_format(plain / name)] == []


def test_python_files_are_copied_unchanged(whole_judge: Judge, bare_template: Path) -> None:
    plain = whole_judge.oven.root / "3.13"
    source = bare_template / "{{cookiecutter.project_slug}}"

    changed = [
        name
        for name in files(plain)
        if name.endswith((".py", ".mako"))
        and (plain / name).read_bytes() != (source / name).read_bytes()
    ]

    assert changed == []


# The most difficult valid answers: signs, scripts and joiners at once.
NASTIEST = {
    "project_name": '\'"""\\ {{ x }} </title><b>&amp; $HOME `id` 👩‍💻 תזכורות e\u0301 #',
    "project_slug": "2026-11-21-" + "0" * 48 + "7",
    "description": (
        "1. \\\"]'''{% raw %}{# x #} [a](b) <!-- *_~|!$x$ $(id) %(here)s \\N{BULLET} "
        "https://example.com/a_b www.example.com/a_b 👨‍👩‍👧‍👦 می‌خواهم 葛\U000e0100 \\"
    ),
}
PAGES = r"""
import html.parser, json, sys

from starlette.testclient import TestClient

import main

class Titles(html.parser.HTMLParser):
    inside = False
    found = ""

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "title"

    def handle_data(self, data):
        if self.inside:
            self.found += data

    def handle_endtag(self, tag):
        self.inside = False

client = TestClient(main.app)
seen = {
    "health": client.get("/health").json()["app"],
    "openapi": client.get("/openapi.json").json()["info"]["title"],
}
for path in ("/docs", "/redoc"):
    titles = Titles()
    titles.feed(client.get(path).text)
    seen[path] = titles.found.split(" - ")[0]
json.dump(seen, sys.stdout)
"""


@pytest.fixture(scope="module")
def nastiest(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """A project generated with the nastiest answers in an odd folder, including all setup steps."""
    with new_machine(tmp_path_factory.mktemp("nastiest") / "machine", template) as machine:
        folder = machine.work / "Ada's wörk folder"
        folder.mkdir()
        answers = [f"{name}={quote(text)}" for name, text in NASTIEST.items()]
        slug = f"{folder.name}/{NASTIEST['project_slug']}"
        yield machine.generate(*answers, "--output-dir", str(folder), slug=slug)


def test_the_nastiest_answers_give_a_working_project(nastiest: Outcome) -> None:
    assert nastiest.code == 0
    assert "It is ready." in nastiest.output
    assert NASTIEST["project_name"] in nastiest.output


# Only the tests that read what the answers change: the Python files are copied unchanged. `setup`
# has checked the database, which is named after the slug.
@pytest.mark.parametrize(
    "command",
    [
        "ruff check",
        "ruff format --check",
        # Other tests check the same files, on Python 3.14 only where it is installed. mypy keeps a
        # cache for each version, so this needs no lock.
        pytest.param("mypy --python-version 3.14 .", marks=pytest.mark.weekly),
        "pytest --quiet tests/test_health.py tests/test_settings.py",
    ],
)
def test_the_nastiest_project_passes_its_checks(nastiest: Outcome, command: str) -> None:
    outcome = nastiest.project.run("uv", "run", *command.split(), seconds=480)

    assert outcome.code == 0, outcome.output


def test_the_app_shows_the_nastiest_name_as_typed(nastiest: Outcome) -> None:
    outcome = nastiest.project.run("uv", "run", "python", "-c", PAGES)

    shown = json.loads(outcome.output.splitlines()[-1])
    assert shown == dict.fromkeys(shown, NASTIEST["project_name"])
    assert len(shown) == 4
