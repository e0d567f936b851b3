"""A Next.js app that is made by following docs/frontend.md, and its servers."""

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from urllib.request import urlopen

import pytest

import processes
from machine import Project, usual_path
from postgres_server import free_port
from test_extending import Step, apply, read_steps

BETTER_AUTH = "Accounts of Better Auth"
OWN = "Our own accounts"
KINDS = {"better-auth": BETTER_AUTH, "own": OWN}  # of accounts: the section of the page about each
MORE = "More of Better Auth"

NODE = "node@24"  # the package of npm that has Node.js itself
OLDEST_NODE = (22, 18)
PINNED = re.compile(r"(?<=[\w-])@\d[\d.]*$")  # the version of a package
FILE = re.compile(r"`([\w./]+)`")  # in the sentence before a code block
STEP_SECONDS = 240
START_SECONDS = 60

# The fonts of create-next-app come from a server that tests cannot reach.
FONTS = """
const url = (name) => `https://fonts.googleapis.com/css2?family=${name}:wght@100..900&display=swap`;
const css = `@font-face { font-family: "Geist"; src: local("Arial"); }`;
module.exports = { [url("Geist")]: css, [url("Geist+Mono")]: css };
"""
# The call must be a type error: without one, `@ts-expect-error` is an error itself.
REFUSED = """\
import { createTask } from "@/lib/api";

// @ts-expect-error: the field has another name
createTask({ body: { titel: "Buy milk" } });
"""


def run(
    command: list[str], folder: Path, environment: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [shutil.which(command[0], path=environment["PATH"]) or command[0], *command[1:]],
        check=False,
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=STEP_SECONDS,
    )


def node_path(folder: Path) -> str:
    """Return a PATH with a Node.js that is new enough, from npm if the system's is too old.

    npm keeps it in its cache. folder: where to run npm. Skips the test if there is none.
    """
    path = os.pathsep.join(usual_path())
    version = run(["node", "--version"], folder, os.environ).stdout.strip().removeprefix("v")
    if tuple(map(int, version.split(".")[:2])) >= OLDEST_NODE:
        return path
    command = ["npm", "exec", "--silent", "--yes", f"--package={NODE}"]
    found = run([*command, "--", "node", "-p", "process.execPath"], folder, os.environ)
    if found.returncode != 0:
        pytest.skip(f"needs Node.js {'.'.join(map(str, OLDEST_NODE))}, this one is {version}")
    return os.pathsep.join([str(Path(found.stdout.splitlines()[-1]).parent), path])


@dataclass
class FrontEnd:
    """The folder of the app while somebody follows the page.

    workshop: where `frontend/` is created. newest: whether to take the newest packages.
    """

    workshop: Path
    project: Project
    newest: bool
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        fonts = self.workshop / "fonts.js"
        fonts.write_text(FONTS, "utf-8")
        self.environment = {
            **os.environ,
            "PATH": node_path(self.workshop),
            "NEXT_FONT_GOOGLE_MOCKED_RESPONSES": str(fonts),
            "NEXT_TELEMETRY_DISABLED": "1",
            "BETTER_AUTH_TELEMETRY": "0",
            "XDG_CONFIG_HOME": str(self.workshop / "config"),  # of create-next-app: answers
            "npm_config_audit": "false",
            "npm_config_fund": "false",
            "npm_config_yes": "true",
        }

    @property
    def folder(self) -> Path:
        return self.workshop / "frontend"

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    def steps(self, kind: str) -> list[Step]:
        """Return the steps that somebody takes who wants these accounts."""
        left_out = {MORE} | {section for name, section in KINDS.items() if name != kind}
        return [step for step in self.all_steps() if step.section not in left_out]

    def all_steps(self) -> list[Step]:
        return read_steps(self.project.read("docs/frontend.md"))

    def take(self, step: Step, api_port: int = 0) -> None:
        """Take a step of the page, with other ports than those on the page."""
        code = step.code.replace("localhost:3000", f"localhost:{self.port}")
        code = code.replace("localhost:8000", f"localhost:{api_port}")
        if step.language == "shell":
            for line in code.splitlines():
                self.type(line)
        elif step.language in {"js", "ts", "tsx"}:
            comment, _, code = code.partition("\n")
            file = self.folder / comment.removeprefix("// ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(code, "utf-8")
        else:
            file = self.folder / FILE.findall(step.where)[-1]
            text = file.read_text("utf-8") if file.exists() else ""
            text = apply(code, text) if step.language == "diff" else f"{text}\n{code}"
            file.write_text(text, "utf-8")

    def type(self, line: str) -> None:
        """Type a command of the page into a shell."""
        command = shlex.split(line)
        if command[0] == "cd":
            assert command[1:] == [self.folder.name]
        elif command[0] == "uv":
            outcome = self.project.run(*command)
            assert outcome.code == 0, outcome.output
        else:
            if self.newest:
                command = [PINNED.sub("@latest", part) for part in command]
            folder = self.folder if self.folder.exists() else self.workshop
            done = run(command, folder, self.environment)
            assert done.returncode == 0, f"{line}\n{done.stdout}"

    @contextmanager
    def served(
        self, log: Path, port: int | None = None, command: str = "start", **settings: str
    ) -> Iterator[str]:
        """Serve the app that was built, or with `dev`, its files. Yields its URL.

        settings: override .env.local.
        """
        port = port or self.port
        next_js = str(self.folder / "node_modules" / "next" / "dist" / "bin" / "next")
        node = shutil.which("node", path=self.environment["PATH"]) or "node"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [node, next_js, command, f"--port={port}"],
                cwd=self.folder,
                env={**self.environment, **settings},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        url = f"http://localhost:{port}"
        try:
            limit = time.monotonic() + START_SECONDS
            while not answers(f"{url}/login"):
                assert process.poll() is None, log.read_text("utf-8")
                assert time.monotonic() < limit, log.read_text("utf-8")
                time.sleep(0.1)
            yield url
        finally:
            processes.end(process)


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=START_SECONDS) as answer:  # noqa: S310  (of this machine)
            return bool(answer.status == HTTPStatus.OK)
    except OSError:
        return False
