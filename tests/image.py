"""Execute a Dockerfile on this machine, without Docker.

A folder replaces /app, and this machine replaces the base image. An unknown instruction, or an
unknown form of one, is an error.
"""

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template

import dockerfile
from docker.utils.build import exclude_paths  # reads .dockerignore like the engine

APP = "/app"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BUILD_SECONDS = 300


@dataclass(frozen=True)
class Image:
    """The image of a stage. folder: replaces /app."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=lambda: {"PATH": SYSTEM_PATH})
    user: str = "0"
    labels: Mapping[str, str] = field(default_factory=dict)
    stop_signal: str = ""
    health: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


def copy_context(project: Path, context: Path) -> Path:
    """Copy the build context of a project: all files that .dockerignore does not exclude."""
    patterns = (project / ".dockerignore").read_text("utf-8").splitlines()
    for name in exclude_paths(str(project), patterns) - {"Dockerfile", ".dockerignore"}:
        if (
            project / name
        ).is_file():  # those two are sent to the engine, but are not in the context
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(project / name, context / name)
    return context


class Builder:
    """Executes one Dockerfile.

    context: a folder. folder: replaces /app, must not exist yet. uv: the program. machine:
    environment variables of the build, such as the folder of uv's cache.
    """

    def __init__(self, context: Path, folder: Path, uv: Path, machine: Mapping[str, str]) -> None:
        self._context = context
        self._uv = uv
        self._machine = machine
        self._images: dict[str, Image] = {}
        self._name = ""
        self._image = Image(folder)

    def build(self, text: str) -> Image:
        """Return the last stage's image."""
        for command in dockerfile.parse_string(text):
            carry_out = getattr(self, f"_{command.cmd.lower()}")
            carry_out(command)
        return self._image

    def _from(self, command: dockerfile.Command) -> None:
        base, *alias = command.value
        self._put_away()
        self._name = alias[1] if alias else ""
        folder = self._image.folder
        self._image = replace(self._images.get(base, Image(folder)), folder=folder)
        if base in self._images:
            shutil.copytree(self._images[base].folder, folder, symlinks=True)
        else:
            folder.mkdir(mode=0o755)

    def _put_away(self) -> None:
        """Move the previous stage's files away: every stage has its own /app."""
        folder = self._image.folder
        if folder.exists():
            away = folder.with_name(f"{folder.name}-{len(self._images)}")
            folder.rename(away)
            self._images[self._name] = replace(self._image, folder=away)

    def _workdir(self, command: dockerfile.Command) -> None:
        assert command.value == (APP,)

    def _env(self, command: dockerfile.Command) -> None:
        self._image = replace(
            self._image, environment={**self._image.environment, **self._pairs(command)}
        )

    def _label(self, command: dockerfile.Command) -> None:
        self._image = replace(self._image, labels=self._pairs(command))

    def _pairs(self, command: dockerfile.Command) -> dict[str, str]:
        values = Template("\0".join(command.value)).substitute(self._image.environment)
        parts = [self._place(part.strip('"')) for part in values.split("\0")]
        return dict(zip(parts[::2], parts[1::2], strict=True))

    def _place(self, text: str) -> str:
        """Replace /app by its folder."""
        return text.replace(APP, str(self._image.folder))

    def _copy(self, command: dockerfile.Command) -> None:
        source, target = command.value
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in command.flags)
        match flags:
            case {"from": "uv"}:
                assert (source, target) == ("/uv", "/bin/")
                path = f"{self._uv.parent}:{self._image.environment['PATH']}"
                self._image = replace(
                    self._image, environment={**self._image.environment, "PATH": path}
                )
            case {"from": stage}:
                folder = Path(source.replace(APP, str(self._images[stage].folder)))
                folder.rename(self._image.folder / target)  # the stage is not needed any more
            case {"chmod": mode}:
                assert (source, target) == (".", ".")
                for file in self._context.rglob("*"):
                    copy = self._image.folder / file.relative_to(self._context)
                    copy.mkdir() if file.is_dir() else shutil.copyfile(file, copy)
                    copy.chmod(int(mode, 8))
            case _:
                raise AssertionError(command.original)

    def _run(self, command: dockerfile.Command) -> None:
        mounted = [self._bind(flag) for flag in command.flags]
        line = command.value if command.json else ("/bin/sh", "-c", *command.value)
        done = subprocess.run(
            line,
            check=False,
            cwd=self._image.folder,
            env={**self._image.environment, **self._machine},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BUILD_SECONDS,
        )
        assert done.returncode == 0, f"{command.original}\n{done.stdout}"
        for file in mounted:
            file.unlink()

    def _bind(self, flag: str) -> Path:
        options = dict(part.split("=", 1) for part in flag.removeprefix("--mount=").split(","))
        assert options.keys() == {"type", "source", "target"}
        assert options["type"] == "bind"
        target = self._image.folder / options["target"]
        shutil.copyfile(self._context / options["source"], target)
        return target

    def _user(self, command: dockerfile.Command) -> None:
        self._image = replace(self._image, user=command.value[0])

    def _expose(self, command: dockerfile.Command) -> None:
        assert command.value == (self._image.environment["PORT"],)

    def _stopsignal(self, command: dockerfile.Command) -> None:
        self._image = replace(self._image, stop_signal=command.value[0])

    def _healthcheck(self, command: dockerfile.Command) -> None:
        kind, *line = command.value
        assert kind == "CMD"
        self._image = replace(self._image, health=tuple(line))

    def _cmd(self, command: dockerfile.Command) -> None:
        assert command.json, "a shell would not forward signals to the app"
        self._image = replace(self._image, command=command.value)
