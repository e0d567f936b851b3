"""Parsing pasted connection strings, compared with libpq and SQLAlchemy."""

import re
from pathlib import Path
from urllib.parse import quote, unquote

import psycopg2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg2 import ProgrammingError
from psycopg2.extensions import make_dsn, parse_dsn
from psycopg2.sql import SQL, Identifier, Literal
from sqlalchemy import create_engine, make_url

from postgres.pasted.url import FOREIGN, KEYWORDS, MAX_URL_LENGTH, MODES, SPELLINGS
from postgres.tests.pasted_forms import (
    CONSOLES,
    ESCAPED,
    ESCAPES,
    HOST,
    LINES,
    PASSWORD,
    PASSWORDS,
    POOLED_HOST,
    REFERENCES,
    REFUSED,
    SOCKET,
    STRING,
    WHOLE,
)
from postgres.url import OTHER_PORTS, DatabaseUrl, DatabaseUrlError, Reading, parse, read

PACKAGE = Path(__file__).parents[1]
TLS = (("sslmode", "require"), ("channel_binding", "require"))
NEON = DatabaseUrl("alex", PASSWORD, HOST, 5432, "neondb", TLS)
LOCAL = DatabaseUrl("ann", "pw", "localhost", 5432, "todo")
NEON_LOGIN = f"postgresql://alex:{PASSWORD}"


def test_neons_connection_string_is_accepted_unchanged() -> None:
    reading = read(STRING)

    assert reading == Reading(NEON, ())


@pytest.mark.parametrize(
    ("place", "text"),
    [
        pytest.param(place, text, id=name)
        for place, texts in CONSOLES.items()
        for name, text in texts.items()
    ],
)
def test_what_a_host_offers_to_copy_is_read(place: str, text: str) -> None:
    url = parse(text)

    assert f"{quote(url.user)}@{url.address}/{url.database}" == place
    assert url.password == (PASSWORD if PASSWORD in text else "")


@pytest.mark.parametrize("text", WHOLE.values(), ids=WHOLE)
def test_a_string_is_read_without_its_wrapping(text: str) -> None:
    assert parse(text) == NEON


@pytest.mark.parametrize("before", ["", "psql '", 'DATABASE_URL="'])
@pytest.mark.parametrize("line_end", ["\n", "\r\n    "])
def test_it_may_be_broken_at_any_character(before: str, line_end: str) -> None:
    end = before[-1:]
    breaks = range(len("postgresql://") + 1, len(STRING))

    found = [parse(f"{before}{STRING[:index]}{line_end}{STRING[index:]}{end}") for index in breaks]

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


@pytest.mark.parametrize("form", ESCAPED.values(), ids=ESCAPED)
def test_what_may_be_an_escape_in_a_password_is_refused(form: str) -> None:
    read = [
        escape for escape in ESCAPES if isinstance(outcome_of(form.format(f"s{escape}3")), Reading)
    ]

    assert parse(form.format("s3")).password == "s3"
    assert read == []


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("around", ["{}", "s3-{}", "{}-s3"])
def test_what_a_program_replaces_is_refused_anywhere(reference: str, around: str) -> None:
    value = around.format(reference)
    texts = [f"postgresql://ann:{value}@localhost/todo", f"postgresql://ann:s3@{value}/todo"]
    texts += [f"url = {value}", f"host=localhost user=ann dbname=todo password={value}"]
    texts += [f"Host=h1;Username={value};Database=d", f"DB_HOST=h1\nDB_USER=ann\nDB_NAME={value}"]

    for text in texts:
        with pytest.raises(DatabaseUrlError, match="a placeholder, which a program replaces"):
            parse(text)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (f"  {STRING}\r\n", []),
        (f"\ufeff{STRING}\u200b", []),
        (f"psql '{STRING}'", ["ignored the text around the connection string"]),
        (f"[{STRING}]({STRING})", ["extracted the string from a link"]),
        (STRING.replace("aws", "\u200baws"), ["replaced invisible and typographic characters"]),
        (STRING.replace("aws", "\naws"), ["joined the lines of the string"]),
        (STRING.replace("&", "&amp;"), ['unescaped "&", "?" and "="']),
        (STRING.replace("postgresql", "postgres"), ['wrote "postgresql://" at the start']),
        (STRING.replace("=require&", "=Require&"), ["wrote sslmode=require, as libpq spells it"]),
        (STRING.replace("=require&", "=allow&"), ["set sslmode=require, since Neon requires TLS"]),
        (
            f"{STRING}&pgbouncer=true&schema=public",
            ["removed pgbouncer, which libpq rejects", "removed schema, which libpq rejects"],
        ),
        ("PGHOST=localhost\nPGUSER=ann\nPGDATABASE=todo", ["combined the separate settings"]),
        (
            "DIRECT_URL=postgresql://ann@h2/todo\nDATABASE_URL=postgresql://ann@h1/todo",
            ["ignored the text around the connection string", "took the string in line 2"],
        ),
    ],
)
def test_every_change_is_reported(text: str, changes: list[str]) -> None:
    assert list(read(text).changes) == changes


@pytest.mark.parametrize("host", [HOST, HOST.upper(), f"{HOST}.", POOLED_HOST])
@pytest.mark.parametrize("query", ["", "?sslmode=disable", "?sslmode=prefer", "?ssl=0"])
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
    "form",
    [
        "options=endpoint%3D{}%20-c%20geqo%3Doff",
        "options=-c%20geqo%3Doff%20project%3D{}",
        "options=endpoint%253D{}",
        "options=project%25253d{}%20-c%20geqo",
        "password=endpoint%3D{}%3Bs3cr3t",
        "password=project%3D{}%24s3cr3t",
    ],
)
def test_the_endpoint_is_the_same_wherever_it_is_named(form: str) -> None:
    def named(host: str, label: str) -> DatabaseUrl:
        text = f"jdbc:postgresql://{host}/neondb?user=alex&{form.format(label)}"
        return parse(text if "password" in form else f"{text}&password=pw")

    direct, pooled = (named(host, host.partition(".")[0]) for host in (HOST, POOLED_HOST))

    assert pooled != direct
    assert pooled.direct == direct
    assert direct.pooled == pooled
    assert direct.replace(host=POOLED_HOST).direct == direct


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
    for name in FOREIGN.keys() | (SPELLINGS.keys() - KEYWORDS - {"requiressl"}):
        with pytest.raises(ProgrammingError):
            parse_dsn(f"{name}=1")


def urls_of(text: st.SearchStrategy[str]) -> st.SearchStrategy[DatabaseUrl]:
    return st.builds(
        DatabaseUrl,
        user=text,
        password=text,
        host=st.sampled_from([HOST, POOLED_HOST, "localhost", "10.0.0.1", "::1", SOCKET]),
        port=st.integers(1, 65535).filter(lambda port: port not in OTHER_PORTS),
        database=text,
        options=st.dictionaries(
            st.sampled_from(["application_name", "options", "sslpassword", "sslrootcert"]), text
        ).map(lambda options: (("sslmode", "require"), *options.items())),
    )


# Every placeholder contains one of the first characters, every mask one of the others.
PLACEHOLDERS, MASKS = "hHWxXyY.<[{$%oO_", "*•●·…"
text = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters=PLACEHOLDERS),
    min_size=1,
)
urls = urls_of(text)

# Pieces of pasted texts, to combine in any order, and to insert into valid strings.
URL_PIECES = ["ann", "pw", "h1", "db", *":@/?&=,#%", "%41", "%FF", "%40", "5432", "[::1]", "a=b"]
URL_PIECES += ["sslmode=require", "ssl=true", "user=", "password=", "host=", "port=", "localhost"]
URL_PIECES += ["options=", "application_name=", "%75ser=", "&amp;"]
TEXT_PIECES = ["postgresql://", "postgres://", "psql", *"'\"\\é…<*$[)|{;#", "xxxx", "](", "'user':"]
TEXT_PIECES += ["PGHOST=", "PGUSER=", "PGPASSWORD=", "DATABASE_URL=", "pgbouncer=1", "mailto:"]
TEXT_PIECES += ["Host=", "Username=", "Password=", "host:", " -h ", "%3A%2F%2F", r":\/\/"]
TEXT_PIECES += [" ", "\n", "\0", "\ud800", "\x1b", "\u200b", "\xa0", "\u201c", STRING, HOST]
TEXT_PIECES += ["DIRECT_URL: ", "user = ", " -U ", "PGPASSWORD=pw psql ", "\n".join(LINES)]
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


ALL_FORMS = [*WHOLE.values(), *(text for texts in CONSOLES.values() for text in texts.values())]
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
@settings(max_examples=500)
def test_any_text_is_understood_once_and_for_all_or_refused(text: str) -> None:
    outcome = outcome_of(text)

    if isinstance(outcome, DatabaseUrlError):
        assert "\n" not in str(outcome)
    else:
        mode = dict(outcome.url.options).get("sslmode")
        assert read(outcome.url.for_libpq()) == Reading(outcome.url, ())
        assert mode in {"require", "verify-ca", "verify-full"} or not outcome.url.is_neon


def around(text: str) -> set[str]:
    """Return a text as its parts may appear in it: in one line, decoded, unescaped, unquoted."""
    plain = re.sub(r"[\s\x1b\xad\u200b]", "", text)
    unquoted = re.sub(r"['\"]", "", plain)  # a shell joins 'a''b'
    return {plain, unquote(plain), re.sub(r"\\(.)", r"\1", plain), unquoted, unquote(unquoted)}


@given(pasted | damaged_urls | damaged(*ALL_FORMS, pieces=URL_PIECES + TEXT_PIECES))
@settings(max_examples=500)
def test_nothing_is_read_that_does_not_stand_in_the_text(text: str) -> None:
    outcome = outcome_of(text)

    if isinstance(outcome, Reading):
        url = outcome.url
        for part in (url.user, url.password, url.host, url.database):
            assert any(part.replace(" ", "") in each for each in around(text)), text


# Two configurations, each with its own number in every part.
RENDERINGS = [
    "postgresql://u{n}u{n}:p{n}p{n}@h{n}h{n}/d{n}d{n}",
    "DATABASE_URL='postgresql://u{n}u{n}:p{n}p{n}@h{n}h{n}/d{n}d{n}?sslmode=require'",
    "PGHOST=h{n}h{n}\nPGUSER=u{n}u{n}\nPGPASSWORD=p{n}p{n}\nPGDATABASE=d{n}d{n}",
    "DB_HOST=h{n}h{n}\nDB_USER=u{n}u{n}\nDB_PASSWORD=p{n}p{n}\nDB_NAME=d{n}d{n}",
    "host=h{n}h{n} user=u{n}u{n}\npassword=p{n}p{n} dbname=d{n}d{n}",
    "Host=h{n}h{n};Username=u{n}u{n};Password=p{n}p{n};Database=d{n}d{n}",
    "PGPASSWORD=p{n}p{n} psql -h h{n}h{n} -U u{n}u{n} d{n}d{n}",
    "psql 'postgresql://u{n}u{n}:p{n}p{n}@h{n}h{n}/d{n}d{n}'",
    "jdbc:postgresql://h{n}h{n}/d{n}d{n}?user=u{n}u{n}&password=p{n}p{n}",
    'connect(host="h{n}h{n}", user="u{n}u{n}", password="p{n}p{n}", database="d{n}d{n}")',
    "u{n}u{n}:p{n}p{n}@h{n}h{n}/d{n}d{n}",
]
GLUE = ["\n", " ", ", ", "; ", " && ", "&", "\nA=", '", "']
BLOCKS = ["\n\n", "\n# old\n", "\n[other]\n", "\nother:\n"]


@st.composite
def two_configurations(draw: st.DrawFn) -> str:
    """Draw two texts in one line or block, or pieces of them in two blocks or in lines."""
    forms = [draw(st.sampled_from(RENDERINGS)) for _ in range(2)]
    texts = [form.format(n=number) for number, form in enumerate(forms, 1)]
    if draw(st.booleans()):
        return draw(st.sampled_from(GLUE)).join(texts)
    cuts = [draw(st.integers(0, len(text))) for text in texts]
    if forms[0] != forms[1] and draw(st.booleans()):  # else nobody could tell them apart
        return f"{texts[0][: cuts[0]]}\n{texts[1][texts[1].rfind('\n', 0, cuts[1]) + 1 :]}"
    pieces = [
        draw(st.sampled_from([text[:cut], text[cut:]]))
        for text, cut in zip(texts, cuts, strict=True)
    ]
    return draw(st.sampled_from(BLOCKS)).join(pieces)


@given(two_configurations())
@settings(max_examples=500)
def test_parts_of_two_configurations_are_never_put_together(text: str) -> None:
    outcome = outcome_of(text)

    if isinstance(outcome, Reading):
        url = outcome.url
        parts = f"{url.user}{url.password}{url.host}{url.database}"
        assert len(set(re.findall("[12]", parts))) < 2, text


@given(
    st.text("JX19@:/?#&=+,;<>[]{}()|$*'\"`~^!", min_size=1),
    st.sampled_from(
        [
            "postgresql://ann:npg@h1.example/todo?sslmode=require",
            "**postgresql://ann:npg@h1.example/todo**",
            "'postgresql://ann:npg@h1.example/todo'",
            'DATABASE_URL="postgresql://ann:npg@h1.example/todo"',
            "<postgresql://ann:npg@h1.example/todo>",
            "[postgresql://ann:npg@h1.example/todo](postgresql://ann:npg@h1.example/todo)",
            "postgresql://ann:[npg@h1.example](mailto:npg@h1.example)/todo",
            "postgresql://ann:<mailto:npg@h1.example|npg@h1.example>/todo",
            "jdbc:postgresql://h1.example/todo?user=ann&password=npg",
            '{"x": "postgresql://ann:npg@h1.example/todo"}',
            "host=h1.example user=ann dbname=todo password=npg",
            "Host=h1.example;Username=ann;Database=todo;Password=npg;",
            "PGHOST=h1.example\nPGUSER=ann\nPGPASSWORD=npg\nPGDATABASE=todo",
        ]
    ),
)
@settings(max_examples=500)
def test_a_password_goes_to_its_own_host_or_nowhere(password: str, form: str) -> None:
    outcome = outcome_of(form.replace("npg", password))

    if isinstance(outcome, Reading):
        url = outcome.url
        assert (url.user, url.host, url.database) == ("ann", "h1.example", "todo")
        assert url.password in {password, password[1:-1]}  # the latter if it is in quotes


FORMS = [
    text.replace(PASSWORD, "{}") for text in (*ALL_FORMS, *(text for text, _ in REFUSED.values()))
]
FORMS += ["postgresql://ann:{}@localhost", "postgresql://ann:{}@db.example.com:5432/todo", "{}"]
FORMS += ["postgresql://ann:{}", "ann:{}@localhost/todo"]


@given(
    # No message contains any of these letters.
    st.text("JXΩ19@:/?#%&=+,;<>[]{}()|$*'\"`\\ ", min_size=1).filter(set("JXΩ").intersection),
    st.sampled_from(FORMS),
)
@settings(max_examples=500)
def test_no_piece_of_the_password_is_in_any_message(password: str, form: str) -> None:
    outcome = outcome_of(form.replace("{}", password))

    if isinstance(outcome, DatabaseUrlError):
        assert not set("JXΩ") & set(str(outcome))
    elif password in outcome.url.password:
        assert not set("JXΩ") & set(f"{outcome}{outcome.url}")


@given(urls)
def test_a_written_url_is_read_back(url: DatabaseUrl) -> None:
    assert read(url.for_libpq()) == Reading(url, ())


def parts_of(url: DatabaseUrl) -> dict[str, str]:
    """Return a URL as libpq's keywords and values."""
    named = {"user": url.user, "password": url.password, "host": url.host, "port": str(url.port)}
    return {**named, "dbname": url.database, **dict(url.options)}


@given(urls)
def test_libpq_reads_a_written_url_the_same_way(url: DatabaseUrl) -> None:
    assert parse_dsn(url.for_libpq()) == parts_of(url)


# Some quotes are treated as those of a word processor.
QUOTES = "\u2018\u2019\u201a\u201c\u201d\u201e\xab\xbb"
visible = st.characters(
    exclude_categories=["C", "Z"], exclude_characters=PLACEHOLDERS + MASKS + QUOTES
)


@given(urls_of(st.text(visible | st.sampled_from(" '\\"), min_size=1)))
def test_keywords_are_read_as_libpq_writes_them_or_refused(url: DatabaseUrl) -> None:
    outcome = outcome_of(make_dsn(**parts_of(url)))

    assert isinstance(outcome, DatabaseUrlError) or outcome.url == url


@given(
    damaged(
        "host=h1 user=ann password=pw dbname=db",
        "user = 'ann' host = h1 port = 5432 password = 'p w'",
        pieces=KEYWORD_PIECES,
    )
)
@settings(max_examples=500)
def test_keywords_and_values_are_read_like_libpq(text: str) -> None:
    if (both := understood_by_both(text)) is None:
        return

    theirs, ours = both
    if can_be_connected_to(theirs):
        assert parts_of(ours.url) == with_defaults(theirs)


@given(damaged_urls)
@settings(max_examples=500)
def test_what_libpq_accepts_as_a_url_is_understood_as_libpq_does(text: str) -> None:
    if (both := understood_by_both(text)) is None:
        return

    theirs, ours = both
    is_wrapped = text[-1] in ".,;)]}>*|`'\""  # which libpq takes for a part of the last value
    if can_be_connected_to(theirs) and not is_wrapped:
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
    given |= {name: re.sub("[-_ ]", "", given[name]) for name in MODES if name in given}
    tls = {"sslmode": "require"} if "neon.tech" in given["host"] else {}
    return {"port": "5432", "password": ""} | tls | given


@given(urls)
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


@pytest.mark.timeout(60)  # it takes a second; with a quadratic regex, minutes
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_parsing_is_fast_for_any_text(beginning: str) -> None:
    for piece in NASTY:
        line = piece * ((MAX_URL_LENGTH - len(beginning)) // len(piece) - 1)

        for text in (beginning + line, "\n".join([beginning, line, line]), line * 10):
            outcome = outcome_of(text)

            assert isinstance(outcome, Reading) or len(str(outcome)) < 400
