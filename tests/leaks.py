"""Search for a secret in text, folders, git objects and running programs."""

import base64
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

from machine import Machine, Project

SHORTEST = 12  # length of the pieces to search for
PAUSE_SECONDS = 0.01
URL_SAFE = bytes.maketrans(b"+/", b"-_")


def local_secrets(project: Project) -> tuple[str, str]:
    """Return the embedded server's password, and the secret that signs tokens."""
    (password,) = re.findall(r"//embedded:([\w-]+)@", project.read(".env"))
    return str(password), secret_of(project)


def secret_of(project: Project) -> str:
    """Return the secret that signs tokens."""
    (secret,) = re.findall(r"(?m)^BETTER_AUTH_SECRET=(\S{64})$", project.read(".env"))
    return str(secret)


def forms(*secrets: str) -> set[bytes]:
    """Return what to search for: pieces of the secrets in several encodings.

    A piece has only characters that percent-encoding and escaping do not change. Its forms are
    plain, reversed, hexadecimal, UTF-16 and base64.
    """
    found = set()
    for piece in pieces(secrets):
        raw = piece.encode("ascii")
        found |= {raw, raw[::-1], raw.hex().encode(), raw.hex().upper().encode()}
        found.add(piece.encode("utf-16-le"))
        for before in range(3):  # bytes of the preceding text in the first group of three
            coded = base64.b64encode(bytes(before) + raw)
            coded = coded[(0, 2, 3)[before] : (before + len(raw)) * 8 // 6]
            found |= {coded, coded.translate(URL_SAFE)}
    return found


def pieces(secrets: tuple[str, ...]) -> Iterator[str]:
    for secret in secrets:
        plain = re.findall(rf"[\w-]{{{SHORTEST},}}", secret, re.ASCII)
        assert plain, "there is nothing to search for"
        for text in plain:
            yield text[-SHORTEST:]
            for start in range(0, len(text) - SHORTEST + 1, SHORTEST):
                yield text[start : start + SHORTEST]


def holds(data: bytes | str, needles: set[bytes]) -> bool:
    data = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
    return any(needle in data for needle in needles)


def files_with(folder: Path, needles: set[bytes]) -> list[Path]:
    """Return the files of any type that contain one of the needles."""
    command = ["grep", "--recursive", "--fixed-strings", "--text", "--files-with-matches", "--null"]
    done = subprocess.run(
        [*command, "--no-messages", "--devices=skip", "--file=-", folder],
        check=False,
        input=b"\n".join(sorted(needles)),
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        timeout=120,
    )
    return sorted(Path(os.fsdecode(name)) for name in done.stdout.split(b"\0") if name)


def repositories_with(folder: Path, needles: set[bytes]) -> list[Path]:
    """Return the repositories that contain one of the needles in any object, even unreachable."""
    everything = ["cat-file", "--batch-all-objects", "--batch", "--unordered"]
    found = []
    for repository in folder.rglob(".git"):
        done = subprocess.run(
            ["git", "--git-dir", repository, *everything],
            check=False,
            capture_output=True,
            timeout=60,
        )
        if holds(done.stdout, needles):
            found.append(repository)
    return found


def read(path: str) -> bytes:
    with suppress(OSError), open(path, "rb") as file:  # noqa: PTH123  (fast)
        return file.read()
    return b""


# What a program that this process starts looks like until it executes.
OWN_COMMAND = read("/proc/self/cmdline")


@dataclass
class Watch:
    """Command lines and environments of a machine's programs, recorded while watching."""

    machine: Machine
    seen: set[tuple[bytes, bytes]] = field(default_factory=set, repr=False)

    @property
    def commands(self) -> set[str]:
        return {shown(command) for command, _ in self.seen}

    def leaks(self, *secrets: str) -> set[str]:
        """Return the programs that had a secret, except those that need it."""
        needles = forms(*secrets)
        found = set()
        for command, environment in self.seen:
            if holds(command, needles):
                found.add(f"the command line of {shown(command).split()[0]}")
            if holds(environment, needles) and not may_know(shown(command)):
                found.add(f"the environment of {shown(command)}")
        return found

    def look(self, foreign: set[str]) -> None:
        """Look at each program once. foreign: pids known not to belong to the machine."""
        for pid in os.listdir("/proc"):  # noqa: PTH208  (fast: this runs all the time)
            if pid in foreign or not pid.isdigit():
                continue
            # Read the command line first. If the process executes another program in between, a
            # new program's command line is never paired with the old one's environment.
            command = read(f"/proc/{pid}/cmdline")
            if not command:
                continue  # it is executing a program right now: it has a command line next time
            environment = read(f"/proc/{pid}/environ")
            if f"HOME={self.machine.home}".encode() in environment.split(b"\0"):
                self.seen.add((command, environment))
            elif environment and command != OWN_COMMAND:  # otherwise it ended, or just forked
                foreign.add(pid)


def shown(command: bytes) -> str:
    return command.replace(b"\0", b" ").decode("utf-8", "replace").strip()


def may_know(command: str) -> bool:
    """Return whether a program needs a secret.

    Cookiecutter, its hooks and `uv run manage.py setup` get the variable, and psql the password.
    """
    known = r"-m cookiecutter|/cookiecutter |/tmp\w+\.py$|manage\.py setup( --local)?$|/psql -X"
    known += "|get_interpreter_info"  # uv's query of the project's Python
    return bool(re.search(known, command))


@contextmanager
def watching(machine: Machine) -> Iterator[Watch]:
    """Watch all programs of a machine until the end of the block. Linux only."""
    watch, end = Watch(machine), Event()

    def go_on() -> None:
        foreign: set[str] = {str(os.getpid())}
        while not end.wait(PAUSE_SECONDS):
            watch.look(foreign)

    thread = Thread(target=go_on)
    thread.start()
    try:
        yield watch
    finally:
        end.set()
        thread.join()


def leaks(folder: Path, output: str, *secrets: str) -> list[str]:
    """Return where a secret is found, except in any `.env` that only its owner may read.

    Searches all files of a folder, the objects of its repositories, and the output.
    """
    needles = forms(*secrets)
    found = [
        str(file.relative_to(folder))
        for file in files_with(folder, needles)
        if not (file.name == ".env" and file.stat().st_mode & 0o077 == 0)
    ]
    found += [
        f"an object in {repository.relative_to(folder)}"
        for repository in repositories_with(folder, needles)
    ]
    return found + ["the output"] * holds(output, needles)
