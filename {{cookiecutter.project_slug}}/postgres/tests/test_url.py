"""Parsing pasted connection strings, compared with libpq and SQLAlchemy."""

import re
from pathlib import Path

import psycopg2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg2 import ProgrammingError
from psycopg2.extensions import make_dsn, parse_dsn
from psycopg2.sql import SQL, Identifier, Literal
from sqlalchemy import create_engine, make_url

from postgres.pasted.text import LEFT_OVER, MAX_TEXT_LENGTH
from postgres.pasted.url import FOREIGN, KEYWORDS, MODES, SPELLINGS
from postgres.tests.pasted_forms import (
    HOST,
    IN_PARTS,
    PASSWORD,
    PASSWORDS,
    POOLED_HOST,
    REFUSED,
    SEVERAL,
    STRING,
    WHOLE,
)
from postgres.url import DatabaseUrl, DatabaseUrlError, Reading, parse, read

PACKAGE = Path(__file__).parents[1]
TLS = (("sslmode", "require"), ("channel_binding", "require"))
NEON = DatabaseUrl("alex", PASSWORD, HOST, 5432, "neondb", TLS)
LOCAL = DatabaseUrl("ann", "pw", "localhost", 5432, "todo")
NEON_LOGIN = f"postgresql://alex:{PASSWORD}"


def test_neons_connection_string_is_accepted_unchanged() -> None:
    reading = read(STRING)

    assert reading == Reading(NEON, ())


@pytest.mark.parametrize("text", WHOLE.values(), ids=WHOLE)
def test_a_complete_string_is_found_in_any_text(text: str) -> None:
    assert parse(text) == NEON


@pytest.mark.parametrize("text", IN_PARTS.values(), ids=IN_PARTS)
def test_parts_are_combined_and_missing_ones_are_added(text: str) -> None:
    assert parse(text) == NEON.replace(options=(("sslmode", "require"),))


@pytest.mark.parametrize("text", SEVERAL.values(), ids=SEVERAL)
def test_of_several_strings_the_one_for_applications_is_chosen(text: str) -> None:
    assert parse(text) == NEON.replace(host=POOLED_HOST)


@pytest.mark.parametrize("before", ["", "psql '", 'DATABASE_URL="', '{"url": "'])
@pytest.mark.parametrize("line_end", ["\n", "\r\n    "])
def test_a_line_break_at_any_character_is_removed(before: str, line_end: str) -> None:
    breaks = range(len("postgresql://") + 1, len(STRING))

    found = [parse(f"{before}{STRING[:index]}{line_end}{STRING[index:]}") for index in breaks]

    assert found == [NEON] * len(breaks)


@pytest.mark.parametrize(("password", "text"), PASSWORDS.items(), ids=PASSWORDS.values())
def test_a_password_can_contain_any_character(password: str, text: str) -> None:
    assert parse(text) == LOCAL.replace(password=password)


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_an_error_shows_the_place_and_what_to_write(text: str, message: str) -> None:
    with pytest.raises(DatabaseUrlError) as refusal:
        parse(text)

    line = str(refusal.value)
    assert message in line
    assert "\n" not in line
    assert "s3" not in line
    assert refusal.value.__context__ is None


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (f"  {STRING}\r\n", []),
        (f"\ufeff{STRING}\u200b", []),
        (f"psql '{STRING}'", ["ignored the text around the connection string"]),
        (f"[{STRING}]({STRING})", ["extracted the string from a link"]),
        (STRING.replace("aws", "\u200baws"), ["removed invisible characters"]),
        (STRING.replace("aws", "\naws"), ["joined the lines of the string"]),
        (STRING.replace("&", "&amp;"), ['unescaped "&", "?" and "="']),
        (STRING.replace("postgresql", "postgres"), ['wrote "postgresql://" for "postgres://"']),
        (
            STRING.replace("postgresql", "postgress"),
            ['wrote "postgresql://" for a misspelled one'],
        ),
        (STRING.replace("postgresql://", ""), ['added "postgresql://" at the start']),
        (STRING.replace("=require&", "=Require&"), ["wrote sslmode=require, as libpq spells it"]),
        (STRING.replace("sslmode", "ssl"), ["wrote sslmode, as libpq calls it"]),
        (STRING.replace("neondb", ""), ["added the missing database name"]),
        (STRING.replace("=require&", "=allow&"), ["set sslmode=require, since Neon requires TLS"]),
        (
            f"{STRING}&pgbouncer=true&schema=public&what=ever",
            ["removed parameters that libpq rejects: pgbouncer, schema, unknown names"],
        ),
        (
            "postgresql://ann:p@w@localhost/todo",
            ["percent-encoded special characters in the password"],
        ),
        ("postgresql://ann:5%@localhost/todo", ['wrote "%" in the password as %25']),
        ("PGHOST=localhost\nPGUSER=ann\nPGDATABASE=todo", ["combined the separate settings"]),
        (
            "DATABASE_URL=postgresql://ann@h1/todo\nDIRECT_URL=postgres://ann@h1/todo?a=b",
            [
                "ignored the text around the connection string",
                "took DATABASE_URL of 2 connection strings",
            ],
        ),
        (
            f"PGPASSWORD={PASSWORD} psql postgresql://alex@{HOST}/neondb?sslmode=require",
            [
                "ignored the text around the connection string",
                "took the password from next to the connection string",
            ],
        ),
    ],
)
def test_every_change_is_reported(text: str, changes: list[str]) -> None:
    assert list(read(text).changes) == changes


@pytest.mark.parametrize("host", [HOST, HOST.upper(), f"{HOST}.", POOLED_HOST])
@pytest.mark.parametrize(
    "query", ["", "?sslmode=", "?sslmode=disable", "?sslmode=prefer", "?ssl=0"]
)
def test_connections_to_neon_always_use_tls(host: str, query: str) -> None:
    reading = read(f"{NEON_LOGIN}@{host}/neondb{query}")

    assert dict(reading.url.options) == {"sslmode": "require"}
    assert "set sslmode=require, since Neon requires TLS" in reading.changes


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
def test_a_mode_that_forces_tls_is_kept(mode: str) -> None:
    reading = read(f"{NEON_LOGIN}@{HOST}/neondb?sslmode={mode}")

    assert reading.url.options == (("sslmode", mode),)
    assert reading.changes == ()


def test_the_systems_certificates_imply_full_verification() -> None:
    url = parse(f"{NEON_LOGIN}@{HOST}/neondb?sslrootcert=system")

    assert dict(url.options) == {"sslrootcert": "system", "sslmode": "verify-full"}


@pytest.mark.parametrize("mode", ["disable", "prefer"])
def test_for_other_servers_the_users_tls_mode_is_kept(mode: str) -> None:
    assert parse(f"postgresql://ann@localhost/todo?sslmode={mode}").options == (("sslmode", mode),)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("postgresql://ann@[::1]:5433/todo", "::1", 5433),
        ("postgresql://ann@[::1]/todo", "::1", 5432),
        ("host=::1 user=ann dbname=todo", "::1", 5432),
        ("postgresql://ann@%2Fvar%2Frun%2Fpostgresql:5433/todo", "/var/run/postgresql", 5433),
        ("postgresql://ann@/todo?host=/var/run/postgresql", "/var/run/postgresql", 5432),
        ("postgresql://ann@db_1:5433/todo", "db_1", 5433),
    ],
)
def test_hosts_can_be_names_addresses_and_sockets(text: str, host: str, port: int) -> None:
    assert parse(text) == DatabaseUrl("ann", "", host, port, "todo")


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://ann:pw@h1/todo?application_name=me@work",
        "postgresql://h1/todo?user=ann&password=pw&application_name=me@work",
    ],
)
def test_a_string_that_libpq_accepts_is_not_reinterpreted(text: str) -> None:
    reading = read(text)

    url = LOCAL.replace(host="h1", options=(("application_name", "me@work"),))
    assert reading == Reading(url, ())


@pytest.mark.parametrize("host", ["ep-cool-name-a1b2c3d4.databricks.com", "ep-1.example.com"])
def test_a_host_like_neons_can_have_another_domain(host: str) -> None:
    assert parse(f"postgresql://ann:pw@{host}/todo").host == host


def neon_hosts() -> st.SearchStrategy[str]:
    labels = st.from_regex(r"ep-[a-z]{2,9}-[a-z]{2,9}-[a-z0-9]{8}", fullmatch=True)
    regions = st.sampled_from(["us-east-2.aws", "c-2.eu-central-1.aws", "eastus2.azure"])
    poolers = st.sampled_from(["", "-pooler"])
    return st.builds("{}{}.{}.neon.tech".format, labels, poolers, regions)


@given(neon_hosts() | st.sampled_from(["localhost", "h1", "db.example.com"]))
def test_pooled_and_direct_are_each_others_inverse(host: str) -> None:
    url = NEON.replace(host=host)

    assert url in {url.pooled, url.direct}
    assert url.direct.pooled == url.pooled
    assert url.pooled.direct == url.direct
    assert url.pooled.is_pooled or not url.is_neon
    assert not (url.direct.is_pooled and url.is_neon)


def test_the_pooled_host_differs_in_its_first_label() -> None:
    assert NEON.pooled == NEON.replace(host=POOLED_HOST)
    assert NEON.pooled.direct == NEON
    assert NEON.replace(host=POOLED_HOST.upper()).direct == NEON.replace(host=HOST.upper())


@pytest.mark.parametrize(
    ("host", "is_neon"),
    [
        (HOST, True),
        (HOST.upper(), True),
        (f"{HOST}.", True),
        ("ep-cool-name-12345678-pooler.us-east-1.postgres.vercel-storage.com", True),
        (f"{HOST}.example.com", False),
        ("notneon.tech", False),
    ],
)
def test_neon_is_recognized_by_its_domains(host: str, is_neon: bool) -> None:
    assert NEON.replace(host=host).is_neon == is_neon


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "::1"])
def test_the_embedded_server_is_recognized_by_host_and_user(host: str) -> None:
    url = DatabaseUrl("embedded", "pw", host, 20_000, "todo")

    assert url.is_embedded
    assert not url.replace(user="ann").is_embedded
    assert not url.replace(host="10.0.0.1").is_embedded


def test_no_secret_is_shown() -> None:
    url = NEON.replace(options=(("sslpassword", "s3cr3t"),))

    assert str(url) == f"postgresql://alex:***@{HOST}:5432/neondb?sslpassword="
    assert repr(url) == f"<DatabaseUrl {url}>"


def test_the_keywords_are_those_of_libpq() -> None:
    assert parse_dsn(" ".join(f"{keyword}=1" for keyword in KEYWORDS)).keys() == KEYWORDS
    for name in FOREIGN | (SPELLINGS.keys() - KEYWORDS - {"requiressl"}):
        with pytest.raises(ProgrammingError):
            parse_dsn(f"{name}=1")


def urls_of(text: st.SearchStrategy[str]) -> st.SearchStrategy[DatabaseUrl]:
    return st.builds(
        DatabaseUrl,
        user=text,
        password=text,
        host=st.sampled_from([HOST, POOLED_HOST, "localhost", "10.0.0.1", "::1", "/var/run/x y"]),
        port=st.integers(1, 65535),
        database=text,
        options=st.dictionaries(
            st.sampled_from(["application_name", "options", "sslpassword", "sslrootcert"]), text
        ).map(lambda options: (("sslmode", "require"), *options.items())),
    )


# Every placeholder contains one of the first characters, every mask one of the others.
PLACEHOLDERS, MASKS = "hHWxXyY.<[{$%oO", "*•●·…"
text = st.text(st.characters(codec="utf-8", exclude_characters=f"\0{PLACEHOLDERS}"), min_size=1)
urls = urls_of(text)

# Pieces of pasted texts, to combine in any order, and to insert into valid strings.
URL_PIECES = ["ann", "pw", "h1", "db", *":@/?&=,#%", "%41", "%FF", "%40", "5432", "[::1]", "a=b"]
URL_PIECES += ["sslmode=require", "ssl=true", "user=", "password=", "host=", "port=", "localhost"]
URL_PIECES += ["options=", "application_name=", "%75ser=", "&amp;"]
TEXT_PIECES = ["postgresql://", "postgres://", "psql", *"'\"\\é…<*$[)|{;#", "xxxx", "](", "'user':"]
TEXT_PIECES += ["PGHOST=", "PGUSER=", "PGPASSWORD=", "DATABASE_URL=", "pgbouncer=1", "mailto:"]
TEXT_PIECES += ["Host=", "Username=", "Password=", "host:", " -h ", "%3A%2F%2F", r":\/\/"]
TEXT_PIECES += [" ", "\n", "\0", "\ud800", "\x1b", "\u200b", "\xa0", "\u201c", STRING, HOST]
TEXT_PIECES += ["DIRECT_URL: ", "user = ", " -U ", "PGPASSWORD=pw psql ", IN_PARTS["export"]]
KEYWORD_PIECES = ["host", "user", "password=", "dbname", "=", " ", "'", "\\", "h1", ";", '"', "\n"]
pasted = st.lists(st.sampled_from(URL_PIECES + TEXT_PIECES), max_size=12).map("".join)


def damaged(*texts: str, pieces: list[str]) -> st.SearchStrategy[str]:
    """Return texts with up to three pieces inserted."""

    def damage(text: str, insertions: list[tuple[float, str]]) -> str:
        for place, piece in insertions:
            index = int(place * len(text))
            text = text[:index] + piece + text[index:]
        return text

    insertion = st.tuples(st.floats(0, 1), st.sampled_from(pieces))
    return st.builds(damage, st.sampled_from(texts), st.lists(insertion, max_size=3))


damaged_urls = damaged(
    STRING,
    "postgresql://ann:pw@h1:5432/db?application_name=x&options=y",
    "postgresql://ann@h1",
    "postgresql://h1/db?user=ann&password=pw",
    pieces=URL_PIECES,
)


def outcome_of(text: str) -> Reading | DatabaseUrlError:
    try:
        return read(text)
    except DatabaseUrlError as refusal:
        return refusal


@given(pasted | st.text() | damaged_urls | damaged(*WHOLE.values(), pieces=TEXT_PIECES))
@settings(deadline=None, max_examples=1000)
def test_any_text_is_rejected_or_read_as_a_stable_url(text: str) -> None:
    outcome = outcome_of(text)

    if isinstance(outcome, DatabaseUrlError):
        assert "\n" not in str(outcome)
    else:
        mode = dict(outcome.url.options).get("sslmode")
        assert read(outcome.url.for_libpq()) == Reading(outcome.url, ())
        assert mode in {"require", "verify-ca", "verify-full"} or not outcome.url.is_neon


# A text that is percent-encoded as a whole does not contain the plain password.
WITH_PASSWORD = [*WHOLE.values(), *IN_PARTS.values(), *(text for text, _ in REFUSED.values())]
FORMS = [
    text.replace(PASSWORD, "{}")
    for text in WITH_PASSWORD
    if f"{PASSWORD}%40" not in text and f"//{PASSWORD}@" not in text
]
FORMS += ["postgresql://ann:{}@localhost", "postgresql://ann:{}@db.example.com:5432/todo", "{}"]
FORMS += ["postgresql://ann:{}", "ann:{}@localhost/todo"]


@given(
    # No message contains any of these letters.
    st.text("JXΩ19@:/?#%&=+,;<>[]{}()|$*'\"`\\ ", min_size=1).filter(set("JXΩ").intersection),
    st.sampled_from(FORMS),
)
@settings(deadline=None, max_examples=1000)
def test_no_message_contains_a_piece_of_the_password(password: str, form: str) -> None:
    before, _, after = form.partition("{}")
    # A quoted password has no quotes. If no host follows, text after an "@" may be the host.
    impossible = [mark for mark in "'\"`" if mark in before]
    impossible += [] if HOST in after or "localhost" in after else ["@"]
    for mark in impossible:
        password = password.replace(mark, "")

    outcome = outcome_of(form.replace("{}", password))

    shown = str(outcome) if isinstance(outcome, DatabaseUrlError) else f"{outcome}{outcome.url}"
    assert not set("JXΩ") & set(shown)


@given(urls)
@settings(deadline=None)
def test_a_written_url_is_read_back(url: DatabaseUrl) -> None:
    assert read(url.for_libpq()) == Reading(url, ())


def parts_of(url: DatabaseUrl) -> dict[str, str]:
    """Return a URL as libpq's keywords and values."""
    named = {"user": url.user, "password": url.password, "host": url.host, "port": str(url.port)}
    return {**named, "dbname": url.database, **dict(url.options)}


@given(urls)
@settings(deadline=None)
def test_libpq_reads_a_written_url_the_same_way(url: DatabaseUrl) -> None:
    assert parse_dsn(url.for_libpq()) == parts_of(url)


# Some quotes are treated as those of a word processor.
QUOTES = "\u2018\u2019\u201a\u201c\u201d\u201e\xab\xbb"
visible = st.characters(
    exclude_categories=["C", "Z"], exclude_characters=PLACEHOLDERS + MASKS + QUOTES
)


@given(urls_of(st.text(visible | st.sampled_from(" '\\"), min_size=1)))
@settings(deadline=None)
def test_keywords_and_values_written_by_libpq_are_read_back(url: DatabaseUrl) -> None:
    assert parse(make_dsn(**parts_of(url))) == url


@given(
    damaged(
        "host=h1 user=ann password=pw dbname=db",
        "user = 'ann' host = h1 port = 5432 password = 'p w'",
        pieces=KEYWORD_PIECES,
    )
)
@settings(deadline=None, max_examples=500)
def test_keywords_and_values_are_read_like_libpq(text: str) -> None:
    if (both := understood_by_both(text)) is None:
        return

    theirs, ours = both
    if can_be_connected_to(theirs):
        assert parts_of(ours.url) == with_defaults(theirs)


@given(damaged_urls)
@settings(deadline=None, max_examples=1000)
def test_urls_are_read_like_libpq(text: str) -> None:
    if (both := understood_by_both(text)) is None:
        return

    theirs, ours = both
    if can_be_connected_to(theirs) and text[-1] not in LEFT_OVER:
        assert parts_of(ours.url) == with_defaults(theirs)


def can_be_connected_to(theirs: dict[str, str]) -> bool:
    """Return whether host, port and database are plausible: libpq accepts any text for them."""
    host, port, database = (theirs.get(name, "") for name in ("host", "port", "dbname"))
    return bool(
        re.fullmatch(r"[\w.-]+|::1", host)
        and re.fullmatch(r"\d*", port)
        and re.fullmatch(r"[^@]*[^@/]|", database)
    )


def understood_by_both(text: str) -> tuple[dict[str, str], Reading] | None:
    try:
        theirs = parse_dsn(text)
    except (ProgrammingError, UnicodeDecodeError):
        return None
    ours = outcome_of(text)
    return (theirs, ours) if isinstance(ours, Reading) else None


def with_defaults(theirs: dict[str, str]) -> dict[str, str]:
    """Add libpq's missing defaults, and fix the two values that it checks only on connecting."""
    given = {name: value for name, value in theirs.items() if value}
    given |= {name: re.sub(r"\W", "", given[name]) for name in MODES if name in given}
    neon = "neon.tech" in given["host"]
    defaults = {"port": "5432", "dbname": "neondb" if neon else given["user"], "password": ""}
    return defaults | ({"sslmode": "require"} if neon else {}) | given


@given(urls)
@settings(deadline=None)
def test_sqlalchemy_reads_the_same_parts_and_the_driver(url: DatabaseUrl) -> None:
    theirs = make_url(url.for_sqlalchemy())

    _, arguments = theirs.get_dialect()().create_connect_args(theirs)
    assert theirs.drivername == "postgresql+psycopg2"
    assert {name: str(value) for name, value in arguments.items()} == parts_of(url)


@pytest.mark.parametrize("password", ["p@ss/w:rd?#", "5%", "it's \\ \"", "é€ %41", "a b&c=d"])
def test_postgresql_accepts_the_role_and_password_of_a_url(
    embedded_server: DatabaseUrl, password: str
) -> None:
    name = 'o\'dd "näme" @/?#%'
    url = embedded_server.replace(user=name, password=password, database=name)
    connection = psycopg2.connect(embedded_server.for_libpq())
    connection.autocommit = True

    def run(statement: str) -> None:
        parts = {"name": Identifier(name), "password": Literal(password)}
        with connection.cursor() as cursor:
            cursor.execute(SQL(statement).format(**parts))

    run("CREATE ROLE {name} LOGIN PASSWORD {password}")
    run("CREATE DATABASE {name} OWNER {name}")
    try:
        with psycopg2.connect(url.for_libpq()) as ours, ours.cursor() as cursor:
            cursor.execute("SELECT current_user, current_database()")
            seen = cursor.fetchone()
        ours.close()
        engine = create_engine(url.for_sqlalchemy())
        engine.connect().close()
        engine.dispose()
    finally:
        run("DROP DATABASE {name}")
        run("DROP ROLE {name}")
        connection.close()

    assert seen == (name, name)


BEGINNINGS = ["", "postgresql://ann:", "postgresql://ann:pw@h1/db?", "host=h1 password=", "psql "]
BEGINNINGS += ["PGHOST=h1\nPGPASSWORD=", "Host=h1;Username=ann;Password=", '{"url": "']
NASTY = [*"@:/?#&=%[{(<|*_'\"`\\;, \n-+.a1", "@/", "a@", "a=", "a= ", "a='", 'a="', "a:b ", "psql "]
NASTY += ["postgres://a ", "postgres://a\n", "host=", "host=a;", "PGHOST=a ", "[a](b)", "<a|b>"]
NASTY += [
    "a://",
    "%41",
    "&quot;)",
    "${A}",
    "$pass",
    "ep-a-",
    "-pooler",
    "\u201d",
    "\x1b[1m",
    "\\\n",
]


@pytest.mark.timeout(60)  # it takes a few seconds; with a quadratic regex, minutes
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_no_text_takes_long(beginning: str) -> None:
    for piece in NASTY:
        longest = piece * ((MAX_TEXT_LENGTH - len(beginning)) // len(piece))

        for text in (beginning + longest, beginning + longest * 10):
            outcome = outcome_of(text)

            assert isinstance(outcome, Reading) or len(str(outcome)) < 400
