"""What people paste, and what is understood; libpq and SQLAlchemy are asked for theirs."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from psycopg2 import ProgrammingError
from psycopg2.extensions import make_dsn, parse_dsn
from sqlalchemy import make_url

import database_url
from database_url import KEYWORDS, PLACEHOLDER, DatabaseUrl, DatabaseUrlError, parse, read

HOST = "ep-cool-name-a1b2c3d4.us-east-2.aws.neon.tech"
POOLED_HOST = "ep-cool-name-a1b2c3d4-pooler.us-east-2.aws.neon.tech"
PASSWORD = "npg_s3cr3t"
TLS = (("sslmode", "require"), ("channel_binding", "require"))
NEON = DatabaseUrl("alex", PASSWORD, HOST, 5432, "neondb", TLS)
PASTED = f"postgresql://alex:{PASSWORD}@{HOST}/neondb?sslmode=require&channel_binding=require"
NEON_LOGIN = f"postgresql://alex:{PASSWORD}"


def test_what_neon_shows_is_taken_as_it_is() -> None:
    reading = read(PASTED)

    assert reading.url == NEON
    assert reading.changes == ()


@pytest.mark.parametrize("text", [f"  {PASTED}\n", f"{PASTED}\r\n", f"\ufeff{PASTED}"])
def test_blanks_and_line_ends_around_it_are_not_worth_a_word(text: str) -> None:
    assert read(text) == read(PASTED)


@pytest.mark.parametrize(
    "text",
    [
        f"'{PASTED}'",
        f'"{PASTED}"',
        f"`{PASTED}`",
        f"“{PASTED}”",
        f"<{PASTED}>",
        f"'{PASTED}",
        f"{PASTED};",
        f"psql '{PASTED}'",
        f"psql {PASTED} -c 'select 1'",
        f"$ psql '{PASTED}'",
        f"DATABASE_URL={PASTED}",
        f'DATABASE_URL="{PASTED}"',
        f"DATABASE_URL = '{PASTED}'  # of the branch main",
        f"export DATABASE_URL='{PASTED}'",
        f"set DATABASE_URL={PASTED}",
        f'$env:DATABASE_URL = "{PASTED}"',
        f'DATABASE_URL: "{PASTED}"',
        f'{{"DATABASE_URL": "{PASTED}", "PORT": 1}}',
        f"# for the app\nDATABASE_URL={PASTED}\nDATABASE_URL_UNPOOLED={PASTED}x\nPGHOST={HOST}",
        f"# DATABASE_URL=postgresql://old:old@old/old\r\nDATABASE_URL={PASTED}\r\n",
    ],
)
def test_it_is_taken_out_of_the_text_around_it(text: str) -> None:
    reading = read(text)

    assert reading.url == NEON
    assert reading.changes == ("took the connection string out of the text around it",)


@pytest.mark.parametrize(
    "text",
    [
        f"PGHOST={HOST}\nPGDATABASE=neondb\nPGUSER=alex\nPGPASSWORD={PASSWORD}\nPGSSLMODE=require",
        f"""
        export PGHOST='{HOST}'
        export PGDATABASE='neondb'; export PGUSER='alex'  # its owner
        $env:PGPASSWORD = "{PASSWORD}"
        set PGSSLMODE=require
        """,
        f"PGHOST={HOST} PGDATABASE=neondb PGUSER=alex PGPASSWORD={PASSWORD} PGSSLMODE=require",
    ],
)
def test_the_variables_of_psql_are_put_together(text: str) -> None:
    reading = read(text)

    assert reading.url == NEON.replace(options=(("sslmode", "require"),))
    assert reading.changes == ("put the PG… variables together",)


@pytest.mark.parametrize(
    "text",
    [
        f"host={HOST} user=alex password={PASSWORD} dbname=neondb sslmode=require",
        f"user = 'alex' password = '{PASSWORD}' host = '{HOST}'\ndbname='neondb' sslmode='require'",
        f'psql "host={HOST} user=alex password={PASSWORD} dbname=neondb sslmode=require"',
    ],
)
def test_keywords_and_values_are_understood(text: str) -> None:
    assert parse(text) == NEON.replace(options=(("sslmode", "require"),))


TOLD_TLS = "set sslmode=require, as Neon wants it"
TOLD_PASSWORD = "percent-encoded the special characters of the password"
LOCAL = "postgresql://ann:{}@localhost:5432/todo"


@pytest.mark.parametrize(
    ("text", "mended", "told"),
    [
        # other clients' schemes
        ("postgres://ann:pw@localhost/todo", LOCAL, 'wrote "postgresql://" for "postgres://"'),
        ("PostgreSQL://ann:pw@localhost/todo", LOCAL, 'wrote "postgresql://" for "PostgreSQL://"'),
        (
            "postgresql+asyncpg://ann:pw@localhost/todo",
            LOCAL,
            'wrote "postgresql://" for "postgresql+asyncpg://"',
        ),
        (
            "jdbc:postgresql://localhost/todo?user=ann&password=pw",
            LOCAL,
            "took the connection string out of the text around it",
        ),
        # parameters that libpq refuses
        (
            "postgresql://ann:pw@localhost/todo?pgbouncer=true&schema=public&pool_timeout=0",
            LOCAL,
            "dropped parameters that libpq refuses: pgbouncer, pool_timeout, schema",
        ),
        (
            "postgresql://ann:pw@localhost/todo?connection_limit=1&what=ever",
            LOCAL,
            "dropped parameters that libpq refuses: connection_limit, unknown ones",
        ),
        (
            "postgresql://ann:pw@localhost/todo?ssl=true",
            LOCAL + "?sslmode=require",
            'wrote "ssl" as "sslmode"',
        ),
        (
            "postgresql://ann:pw@localhost/todo?channelBinding=require",
            LOCAL + "?channel_binding=require",
            'wrote "channelBinding" as "channel_binding"',
        ),
        # TLS
        (f"{NEON_LOGIN}@{HOST}/db", f"{NEON_LOGIN}@{HOST}:5432/db?sslmode=require", TOLD_TLS),
        *(
            (
                f"{NEON_LOGIN}@{host}/db?sslmode={mode}",
                f"{NEON_LOGIN}@{host}:5432/db?sslmode=require",
                TOLD_TLS,
            )
            for mode in ("disable", "allow", "prefer", "")
            for host in (HOST, HOST.upper(), HOST + ".")
        ),
        (
            f"{NEON_LOGIN}@{HOST}/db?sslrootcert=system",
            f"{NEON_LOGIN}@{HOST}:5432/db?sslrootcert=system&sslmode=verify-full",
            "set sslmode=verify-full, as Neon wants it",
        ),
        # a missing database
        (
            f"{NEON_LOGIN}@{HOST}?sslmode=require",
            f"{NEON_LOGIN}@{HOST}:5432/neondb?sslmode=require",
            "added the database, which was missing",
        ),
        (
            "postgresql://ann:pw@localhost/",
            "postgresql://ann:pw@localhost:5432/ann",
            "added the database, which was missing",
        ),
        # characters of a password that should have been encoded
        ("postgresql://ann:p@w@localhost/todo", LOCAL.format("p%40w"), TOLD_PASSWORD),
        ("postgresql://ann:p/w@localhost/todo", LOCAL.format("p%2Fw"), TOLD_PASSWORD),
        ("postgresql://ann:1/w@localhost/todo", LOCAL.format("1%2Fw"), TOLD_PASSWORD),
        ("postgresql://ann:p@/w@localhost/todo", LOCAL.format("p%40%2Fw"), TOLD_PASSWORD),
        ("postgresql://ann:p/?#w@localhost/todo", LOCAL.format("p%2F%3F%23w"), TOLD_PASSWORD),
        (
            "postgresql://ann:5%@localhost/todo",
            LOCAL.format("5%25"),
            'wrote "%" in the password as %25',
        ),
    ],
)
def test_what_can_be_mended_is_mended_and_told(text: str, mended: str, told: str) -> None:
    reading = read(text)

    assert reading.url.for_libpq() == mended.format("pw")
    assert told in reading.changes


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
def test_a_mode_that_forces_tls_is_kept(mode: str) -> None:
    reading = read(f"{NEON_LOGIN}@{HOST}/neondb?sslmode={mode}")

    assert reading.url.options == (("sslmode", mode),)
    assert reading.changes == ()


@pytest.mark.parametrize("mode", ["disable", "prefer"])
def test_elsewhere_than_on_neon_tls_is_left_to_the_user(mode: str) -> None:
    assert parse(f"postgresql://ann@localhost/todo?sslmode={mode}").options == (("sslmode", mode),)


@pytest.mark.parametrize(
    ("text", "password"),
    [
        ("postgresql://ann:p%40%2F%25w@localhost/todo", "p@/%w"),
        ("postgresql://ann:p#w@localhost/todo", "p#w"),
        ("postgresql://ann:p?w@localhost/todo", "p?w"),
        ("postgresql://ann:p:w@localhost/todo", "p:w"),
        ("postgresql://ann:p+w@localhost/todo", "p+w"),
        ("postgresql://ann:%24PGPASSWORD@localhost/todo", "$PGPASSWORD"),
        ("postgresql://ann:%2A%2A%2A@localhost/todo", "***"),
        (r"host=localhost user=ann dbname=todo password='it\'s \\ a b'", r"it's \ a b"),
        (r"host=localhost user=ann dbname=todo password=a\ b", "a b"),
        ("PGHOST=localhost PGUSER=ann PGDATABASE=todo PGPASSWORD='a b#c'", "a b#c"),
    ],
)
def test_a_password_is_read_as_libpq_or_the_shell_reads_it(text: str, password: str) -> None:
    reading = read(text)

    assert reading.url == DatabaseUrl("ann", password, "localhost", 5432, "todo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text is empty"),
        (" \r\n", "the text is empty"),
        ("hello", "no connection string"),
        (f"alex:{PASSWORD}@{HOST}/neondb", "no connection string"),
        (PLACEHOLDER, "type `uv run manage.py env`"),
        (f"postgresql://alex:<password>@{HOST}/neondb", "placeholder"),
        (f"postgresql://alex:[YOUR-PASSWORD]@{HOST}/neondb", "placeholder"),
        (f"postgresql://alex:${{PGPASSWORD}}@{HOST}/neondb", "placeholder"),
        (f"postgresql://alex:your_password@{HOST}/neondb", "placeholder"),
        ("postgresql://[user]:[password]@[neon_hostname]/[dbname]", "placeholder"),
        ("postgresql://alex:%50ASSWORD@localhost/todo", "placeholder"),
        (f"host={HOST} user=alex password=<password>", "placeholder"),
        (f"PGHOST={HOST} PGUSER=alex PGPASSWORD=xxxxxxxx", "placeholder"),
        (f"postgresql://alex:****************@{HOST}/neondb", "the password is masked"),
        (f"postgresql://alex:npg_••••••@{HOST}/neondb", "the password is masked"),
        (f"postgresql://alex:npg_s3…@{HOST}/neondb", "the password is masked"),
        (f"postgresql://alex@{HOST}/neondb", "the password is missing"),
        ("https://console.neon.tech/app/projects/cool-name-12345678", "choose Connect"),
        ("mysql://ann:s3cr3t@localhost/todo", "the text starts with mysql://"),
        ("sqlite:///todo.db", "the text starts with sqlite://"),
        ("prisma+postgres://accelerate.prisma-data.net/?api_key=s3cr3t", "starts with prisma://"),
        ("s3cr3t://ann", "the text starts with another scheme"),
        (f"{PASTED}\n{PASTED}", "several connection strings"),
        # cut off
        (f"postgresql://alex:{PASSWORD}", "perhaps it is cut off"),
        ("postgresql://alex:123", "the user is missing"),
        (f"postgresql://alex:{PASSWORD}@", "the host is missing"),
        (f"postgresql://alex:{PASSWORD}@{HOST[:-3]}", 'aws.neon.t" is cut off'),
        (f"postgresql://alex:{PASSWORD}@{HOST}/neondb?sslmode=req", "the sslmode is unknown"),
        # parts that are missing, or are not what they should be
        ("postgresql://localhost/todo", "the user is missing"),
        ("postgresql:///todo", "the host is missing"),
        (f"PGHOST={HOST}", "the user is missing"),
        ("postgresql://ann:s3cr3t@ex!ample/todo", 'what follows the "@" is not HOST:PORT/DATABASE'),
        ("postgresql://ann:s3cr3t@localhost:s3cr3t/todo", "is not HOST:PORT/DATABASE"),
        ("postgresql://ann:s3cr3t@localhost:0/todo", "the port is not a number"),
        ("postgresql://ann:s3cr3t@localhost:65536/todo", "the port is not a number"),
        ("postgresql://ann:s3cr3t@one,two/todo", "several hosts"),
        ("host=ex!ample user=ann password=s3cr3t", "not a host name"),
        ("host=one,two port=5432,5433 user=ann", "several hosts"),
        # characters
        ("postgresql://ann:s3%cr3t%20@localhost/todo", 'a "%" in the password starts no code'),
        ("postgresql://ann:s3cr3t%FF@localhost/todo", "the password is not text"),
        ("postgresql://ann:s3cr3t%00@localhost/todo", "the password is not text"),
        ("postgresql://ann:s3cr3t\0@localhost/todo", "invisible characters"),
        ("postgresql://ann:s3cr3t\x1b[201~@localhost/todo", "invisible characters"),
        ("postgresql://ann:s3cr3t\ud800@localhost/todo", "invisible characters"),
        ("postgresql://ann:s3 cr3t@localhost/todo", "holds a blank: write it as %20"),
        ("postgresql://ann:s3@cr3t?a=b@localhost/todo", "can be read in several ways"),
        ("host=localhost user=ann password=s3 cr3t", "put a value with blanks in '…'"),
        ("host=localhost user=ann password='s3cr3t", "put a value with blanks in '…'"),
        ("host=localhost user=ann password=s3 cr3t=x", "put a value with blanks in '…'"),
        ("PGHOST=localhost PGUSER=ann PGPASSWORD=s3 cr3t", "put a value with blanks in '…'"),
    ],
)
def test_what_cannot_be_mended_is_refused_with_what_to_write(text: str, message: str) -> None:
    with pytest.raises(DatabaseUrlError) as refusal:
        parse(text)

    line = str(refusal.value)
    assert message in line
    assert "\n" not in line
    assert "s3" not in line
    assert refusal.value.__context__ is None


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
def test_hosts_may_be_names_addresses_and_sockets(text: str, host: str, port: int) -> None:
    assert parse(text) == DatabaseUrl("ann", "", host, port, "todo")


def test_where_libpq_is_content_there_is_no_second_reading() -> None:
    reading = read("postgresql://ann:pw@localhost/todo?application_name=me@work")

    assert reading.url.host == "localhost"
    assert reading.url.options == (("application_name", "me@work"),)
    assert reading.changes == ()


@pytest.mark.parametrize(
    ("url", "pooled", "direct"),
    [
        (NEON, POOLED_HOST, HOST),
        (NEON.replace(host=POOLED_HOST), POOLED_HOST, HOST),
        (NEON.replace(host="db.example.com"), "db.example.com", "db.example.com"),
    ],
)
def test_pooled_and_direct_hosts_come_from_each_other(
    url: DatabaseUrl, pooled: str, direct: str
) -> None:
    assert url.pooled == url.replace(host=pooled)
    assert url.direct == url.replace(host=direct)
    assert url.is_pooled == (url.host == POOLED_HOST)


@pytest.mark.parametrize(
    ("host", "is_neon"),
    [
        (HOST, True),
        (HOST.upper(), True),
        (f"{HOST}.", True),
        (f"{HOST}.example.com", False),
        ("notneon.tech", False),
    ],
)
def test_neon_is_known_by_its_domain(host: str, is_neon: bool) -> None:
    assert NEON.replace(host=host).is_neon == is_neon


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "::1"])
def test_the_embedded_server_is_known_by_host_and_user(host: str) -> None:
    url = DatabaseUrl("embedded", "pw", host, 20_000, "todo")

    assert url.is_embedded
    assert not url.replace(user="ann").is_embedded
    assert not url.replace(host="10.0.0.1").is_embedded


def test_nothing_secret_is_shown() -> None:
    url = NEON.replace(options=(("sslpassword", "s3cr3t"),))

    assert str(url) == f"postgresql://alex:***@{HOST}:5432/neondb?sslpassword="
    assert repr(url) == f"<DatabaseUrl {url}>"


def test_the_keywords_are_those_of_libpq() -> None:
    assert parse_dsn(" ".join(f"{keyword}=1" for keyword in KEYWORDS)).keys() == KEYWORDS
    for name in database_url.FOREIGN | database_url.ALIASES.keys():
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


# No placeholder is without one of these characters, no mask without one of the others.
STAND_INS, MASKS = "hHWxXyY.<[{$", "*•●·…"
text = st.text(st.characters(codec="utf-8", exclude_characters=f"\0{STAND_INS}"), min_size=1)
urls = urls_of(text)

# Pieces of the grammar, to be put together in any order.
URL_PIECES = ["ann", "pw", "h1", "db", ":", "@", "/", "?", "&", "=", ",", "#", "%", "%41", "%FF"]
URL_PIECES += [
    "5432",
    "[::1]",
    "sslmode=require",
    "ssl=true",
    "user=",
    "password=",
    "host=",
    "port=",
]
PIECES = [
    "postgresql://",
    "psql ",
    "'",
    '"',
    "\\",
    " ",
    "\n",
    "\0",
    "\ud800",
    "\x1b",
    "é",
    "…",
    "<",
]
PIECES += ["*", "$", "xxxx", "[", "PGHOST=", "PGPASSWORD=", "DATABASE_URL=", "pgbouncer=1", HOST]
pasted = st.lists(st.sampled_from(URL_PIECES + PIECES), max_size=12).map("".join)
pasted_urls = st.lists(st.sampled_from(URL_PIECES), max_size=10).map(
    lambda pieces: "postgresql://ann:pw@h1" + "".join(pieces)
)


@given(pasted | st.text() | pasted_urls)
@settings(deadline=None, max_examples=300)
def test_any_text_is_understood_or_refused(text: str) -> None:
    try:
        understood = parse(text)
    except DatabaseUrlError:
        return
    assert parse(understood.for_libpq()) == understood
    assert understood.options or not understood.is_neon


@given(
    # No message has a letter of these.
    st.text("JQXZ19@:/?#%&=+,;<>[]{}$*'\"\\ ", min_size=1),
    st.sampled_from(
        [
            f"postgresql://ann:{{}}@{HOST}/neondb",
            f"psql 'postgres://ann:{{}}@{HOST}:5432/neondb?sslmode=require&pgbouncer=true'",
            "postgresql://ann:{}@localhost",
            f"postgresql://{HOST}/neondb?user=ann&password={{}}&sslmode=require",
            f"host={HOST} user=ann password={{}} dbname=neondb",
            f"PGHOST={HOST}\nPGUSER=ann\nPGPASSWORD={{}}",
        ]
    ),
)
@settings(deadline=None, max_examples=500)
def test_no_piece_of_the_password_is_in_any_message(password: str, form: str) -> None:
    try:
        reading = read(form.replace("{}", password))
    except DatabaseUrlError as refusal:
        messages = str(refusal)
    else:
        messages = f"{reading}{reading.url}"

    assert not set("JQXZ") & set(messages)


@given(urls)
@settings(deadline=None)
def test_what_is_written_is_read_back(url: DatabaseUrl) -> None:
    assert read(url.for_libpq()) == database_url.Reading(url, ())


def parts_of(url: DatabaseUrl) -> dict[str, str]:
    """Return a URL in libpq's own words."""
    named = {"user": url.user, "password": url.password, "host": url.host, "port": str(url.port)}
    return {**named, "dbname": url.database, **dict(url.options)}


@given(urls)
@settings(deadline=None)
def test_libpq_understands_what_is_written(url: DatabaseUrl) -> None:
    assert parse_dsn(url.for_libpq()) == parts_of(url)


visible = st.characters(exclude_categories=["C", "Z"], exclude_characters=STAND_INS + MASKS)


@given(urls_of(st.text(visible | st.sampled_from(" '\\"), min_size=1)))
@settings(deadline=None)
def test_keywords_and_values_are_read_as_libpq_writes_them(url: DatabaseUrl) -> None:
    assert parse(make_dsn(**parts_of(url))) == url


@given(pasted_urls)
@settings(deadline=None, max_examples=500)
def test_what_libpq_accepts_is_understood_as_libpq_does(text: str) -> None:
    try:
        theirs = parse_dsn(text)
        ours = read(text)
    except (ProgrammingError, ValueError):
        return
    assume(set(ours.changes) <= {"added the database, which was missing"})

    defaults = {"port": "5432", "dbname": theirs.get("user", ""), "password": ""}
    assert parts_of(ours.url) == defaults | {k: v for k, v in theirs.items() if v}


@given(urls)
@settings(deadline=None)
def test_sqlalchemy_sees_the_same_parts_and_the_driver(url: DatabaseUrl) -> None:
    theirs = make_url(url.for_sqlalchemy())

    _, arguments = theirs.get_dialect()().create_connect_args(theirs)
    assert theirs.drivername == "postgresql+psycopg2"
    assert {name: str(value) for name, value in arguments.items()} == parts_of(url)
