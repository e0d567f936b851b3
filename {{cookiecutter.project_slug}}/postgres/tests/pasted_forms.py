"""Forms of pasted connection strings: Neon's console, settings files, chats, other clients.

Each text contains the password npg_s3cr3t or another one with "s3", unless stated otherwise.
"""

from urllib.parse import quote

HOST = "ep-cool-name-a1b2c3d4.us-east-2.aws.neon.tech"
POOLED_HOST = "ep-cool-name-a1b2c3d4-pooler.us-east-2.aws.neon.tech"
PASSWORD = "npg_s3cr3t"
LOGIN = f"alex:{PASSWORD}"
QUERY = "sslmode=require&channel_binding=require"
REST = f"{LOGIN}@{HOST}/neondb?{QUERY}"
STRING = f"postgresql://{REST}"
POOLED = f"postgresql://{LOGIN}@{POOLED_HOST}/neondb?{QUERY}"

# Read as STRING.
WHOLE = {
    "Neon's console": STRING,
    "spaces and line ends around it": f"  {STRING}\r\n",
    "a byte order mark before it": f"\ufeff{STRING}",
    "single quotes": f"'{STRING}'",
    "double quotes": f'"{STRING}"',
    "backquotes": f"`{STRING}`",
    "typographic quotes": f"\u201c{STRING}\u201d",
    "German quotes": f"\u201e{STRING}\u201c",
    "quotes within quotes": f"\"'{STRING}'\"",
    "a quote at one end": f"'{STRING}",
    "angle brackets": f"<{STRING}>",
    "parentheses": f"({STRING})",
    "square brackets": f"[{STRING}]",
    "bold in Markdown": f"**{STRING}**",
    "a cell of a Markdown table": f"| DATABASE_URL | {STRING} |",
    "a table without spaces": f"|DATABASE_URL|{STRING}|",
    "a Markdown link": f"[{STRING}]({STRING})",
    "a Markdown link with a title": f"[connect]({STRING})",
    "an e-mail address made of PASSWORD@HOST": (
        f"postgresql://alex:[{PASSWORD}@{HOST}](mailto:{PASSWORD}@{HOST})/neondb?{QUERY}"
    ),
    "the same in Slack": (
        f"postgresql://alex:<mailto:{PASSWORD}@{HOST}|{PASSWORD}@{HOST}>/neondb?{QUERY}"
    ),
    "a link of Slack": f"<{STRING}|{STRING}>",
    "an HTML link": f'<a href="{STRING}">{STRING}</a>',
    "HTML's &amp;": STRING.replace("&", "&amp;"),
    "HTML's quotes": f"&quot;{STRING.replace('&', '&amp;')}&quot;",
    "JSON's \\u0026": STRING.replace("&", "\\u0026"),
    "JSON's \\/": f'{{"url":"{STRING.replace("/", chr(92) + "/")}"}}',
    "escaped quotes in JSON": f'{{"env": "DATABASE_URL=\\"{STRING}\\""}}',
    "zsh's \\? and \\&": STRING.replace("?", "\\?").replace("&", "\\&").replace("=", "\\="),
    "cmd's ^&": STRING.replace("&", "^&"),
    "percent-encoded as a whole": quote(STRING, safe=""),
    "the same, twice": quote(quote(STRING, safe=""), safe=""),
    "a deploy button's address": (
        f"https://example.com/?repo=x&DATABASE_URL={quote(STRING, safe='')}&region=fra"
    ),
    "non-breaking spaces around it": f"\xa0{STRING}\xa0",
    "a zero-width space after it": f"{STRING}\u200b",
    "a zero-width space inside": STRING.replace("aws", "a\u200bws"),
    "soft hyphens inside": STRING.replace("aws", "a\xadws"),
    "marks of writing direction": f"\u202a{STRING}\u202c",
    "the marks of a terminal's paste": f"\x1b[200~{STRING}\x1b[201~",
    "a terminal's colours": f"\x1b[32m{STRING}\x1b[0m",
    "a comma after it": f"{STRING},",
    "a semicolon after it": f"{STRING};",
    "a full stop after it": f"{STRING}.",
    "a sentence around it": f"Here is the string: {STRING}, use it with care.",
    "a space after the scheme": STRING.replace("://", ":// "),
    "broken in the password": f"postgresql://alex:npg_\ns3cr3t@{HOST}/neondb?{QUERY}",
    "broken in the host": STRING.replace("us-east", "us-\neast"),
    "broken in the endpoint": STRING.replace("cool-name", "cool-\nname"),
    "broken before the database": STRING.replace("/neondb", "\n/neondb"),
    "broken in the database": STRING.replace("neondb?", "neo\ndb?").replace("neo\ndb", "neon\ndb"),
    "broken before the parameters": STRING.replace("?", "\n?"),
    "broken between the parameters": STRING.replace("&", "&\n"),
    "broken in a parameter's name": STRING.replace("channel_binding", "channel_\nbinding"),
    "broken in a parameter's value": STRING[:-3] + "\n" + STRING[-3:],
    "broken in four lines": "\n".join(STRING[start : start + 40] for start in range(0, 160, 40)),
    "broken, indented, in quotes": f"psql '{STRING[:60]}\r\n   {STRING[60:]}'",
    "broken with backslashes": f"psql '{STRING[:60]}\\\n{STRING[60:]}'",
    "psql '…'": f"psql '{STRING}'",
    "psql without quotes": f"psql {STRING}",
    "psql with a command": f"psql {STRING} -c 'select 1'",
    "psql -d": f'psql -d "{STRING}"',
    "a prompt before it": f"(venv) ada@mac todo % psql '{STRING}'",
    "a prompt with a dollar": f"$ psql '{STRING}'",
    "psql and its answer": (
        f"$ psql '{STRING}'\npsql (17.2)\nSSL connection (protocol: TLSv1.3)\n"
        'Type "help" for help.\n\nneondb=>'
    ),
    "psql and its error": (
        f"% psql '{STRING}'\npsql: error: ERROR:  Endpoint ID is not specified. "
        "See more at https://neon.tech/sni"
    ),
    "pg_dump": f"pg_dump -Fc -d '{STRING}' -f dump.bak",
    ".env": f"DATABASE_URL={STRING}",
    ".env with quotes": f'DATABASE_URL="{STRING}"',
    ".env with spaces and a comment": f"DATABASE_URL = '{STRING}'  # of the branch main",
    ".env with an address in the comment": f"DATABASE_URL={STRING}  # ask me@example.com",
    "the name twice": f"DATABASE_URL=DATABASE_URL={STRING}",
    "another name": f"POSTGRES_URL={STRING}",
    "export": f"export DATABASE_URL='{STRING}'",
    "export with typographic quotes": f"export DATABASE_URL=\u201c{STRING}\u201d",
    "fish: set -x": f"set -x DATABASE_URL '{STRING}'",
    "fish: set -gx": f"set -gx DATABASE_URL {STRING}",
    "cmd: set": f"set DATABASE_URL={STRING}",
    "cmd: setx": f'setx DATABASE_URL "{STRING}"',
    "PowerShell": f'$env:DATABASE_URL = "{STRING}"',
    "Heroku": f"heroku config:set DATABASE_URL='{STRING}' --app todo",
    "Fly.io": f'fly secrets set DATABASE_URL="{STRING}"',
    "docker run": f"docker run --rm -e DATABASE_URL='{STRING}' -p 8000:8000 todo",
    "Dockerfile": f"ENV DATABASE_URL={STRING}",
    "Compose, a map": f"app:\n    environment:\n      DATABASE_URL: {STRING}\n      PORT: 1",
    "Compose, a list": f"    environment:\n      - DATABASE_URL={STRING}\n      - PORT=1",
    "YAML": f'database:\n  url: "{STRING}"',
    "YAML without a space": f"database_url:{STRING}",
    "JSON": f'{{"DATABASE_URL": "{STRING}", "PORT": 1}}',
    "JSON without spaces": f'{{"DATABASE_URL":"{STRING}","PORT":1}}',
    "TOML": f'[database]\nurl = "{STRING}"\nmax = 5',
    "systemd": f'Environment="DATABASE_URL={STRING}"',
    "nginx or PHP": f"env[DATABASE_URL] = '{STRING}';",
    "Prisma's schema": f'datasource db {{\n  provider = "postgresql"\n  url      = "{STRING}"\n}}',
    "Python": f"engine = create_engine('{STRING}', pool_size=5)",
    "JavaScript": f'const sql = neon("{STRING}");',
    "alembic.ini": f"sqlalchemy.url = {STRING}",
    "a comment alone": f"# DATABASE_URL={STRING}",
    "an old string in a comment": f"# DATABASE_URL=postgresql://old:s3@old/old\r\nDATABASE_URL={STRING}\r\n",
    "the same string twice": f"{STRING}\n{STRING}",
    "the scheme twice": f"postgresql://{STRING}",
    "postgres://": f"postgres://{REST}",
    "PostgreSQL://": f"PostgreSQL://{REST}",
    "POSTGRES://": f"POSTGRES://{REST}",
    "postgresql+psycopg://": f"postgresql+psycopg://{REST}",
    "postgresql+asyncpg://": f"postgresql+asyncpg://{REST}",
    "postgresql+psycopg2://": f"postgresql+psycopg2://{REST}",
    "pgsql://": f"pgsql://{REST}",
    "postgis://": f"postgis://{REST}",
    "a misspelt scheme": f"postgressql://{REST}",
    "a scheme whose first letter was not selected": f"ostgresql://{REST}",
    "one slash": f"postgresql:/{REST}",
    "no scheme": REST,
    "no scheme but slashes": f"//{REST}",
    "no scheme but a name": f"database: {REST}",
    "JDBC": f"jdbc:postgresql://{HOST}/neondb?user=alex&password={PASSWORD}&{QUERY}",
    "JDBC's spellings": (
        f"jdbc:postgresql://{HOST}/neondb?user=alex&password={PASSWORD}"
        "&sslmode=require&channelBinding=require"
    ),
    "capitals and spaces in values": STRING.replace("=require", "=Require"),
    "required": STRING.replace("=require", "=required"),
    "a slash after the database": STRING.replace("/neondb", "/neondb/"),
    "a port": STRING.replace(HOST, f"{HOST}:5432"),
    "an & at the end": f"{STRING}&",
    "Prisma's parameters": f"{STRING}&pgbouncer=true&connection_limit=1&schema=public",
    "node-postgres' parameter": f"{STRING}&uselibpqcompat=true",
}

# Read as STRING without channel_binding, which is not in the text.
VARIABLES = {
    "PGHOST": HOST,
    "PGDATABASE": "neondb",
    "PGUSER": "alex",
    "PGPASSWORD": PASSWORD,
    "PGSSLMODE": "require",
}
LINES = [f"{name}={value}" for name, value in VARIABLES.items()]
IN_PARTS = {
    "the four lines of the console": "\n".join(LINES),
    "the four lines on one": " ".join(LINES),
    "the lines in quotes": "\n".join(f"{name}='{value}'" for name, value in VARIABLES.items()),
    "the lines in typographic quotes": "\n".join(
        f"{name}=\u2018{value}\u2019" for name, value in VARIABLES.items()
    ),
    "the lines with Windows' line ends": "\r\n".join(LINES),
    "the lines with spaces and comments": "\n".join(f"{line}   # comment" for line in LINES),
    "export": "\n".join(f"export {line}" for line in LINES),
    "export, on one line": "; ".join(f"export {line}" for line in LINES) + ";",
    "cmd: set": "\r\n".join(f"set {line}" for line in LINES),
    "fish: set -x": "\n".join(f"set -x {line.replace('=', ' ', 1)}" for line in LINES),
    "PowerShell": "\n".join(f'$env:{name} = "{value}"' for name, value in VARIABLES.items()),
    "Dockerfile": "\n".join(f"ENV {line}" for line in LINES),
    "docker run -e": "docker run " + " ".join(f"-e {line}" for line in LINES),
    "YAML": "\n".join(f"  {name}: {value}" for name, value in VARIABLES.items()),
    "JSON": "{" + ", ".join(f'"{name}": "{value}"' for name, value in VARIABLES.items()) + "}",
    "Laravel": (
        f"DB_CONNECTION=pgsql\nDB_HOST={HOST}\nDB_PORT=5432\nDB_DATABASE=neondb\n"
        f"DB_USERNAME=alex\nDB_PASSWORD={PASSWORD}\nDB_SSLMODE=require\nMAIL_HOST=mail\nMAIL_USERNAME=s3"
    ),
    "POSTGRES_…": (
        f"POSTGRES_HOST={HOST}\nPOSTGRES_DB=neondb\nPOSTGRES_USER=alex\nPOSTGRES_PASSWORD={PASSWORD}"
    ),
    "an app's own HOST and PORT beside it": ("HOST=0.0.0.0\nPORT=3000\n" + "\n".join(LINES)),
    "Django": (
        "DATABASES = {\n    'default': {\n        'ENGINE': 'django.db.backends.postgresql',\n"
        f"        'NAME': 'neondb',\n        'USER': 'alex',\n        'PASSWORD': '{PASSWORD}',\n"
        f"        'HOST': '{HOST}',\n        'PORT': '5432',\n"
        "        'OPTIONS': {'sslmode': 'require'},\n    }\n}"
    ),
    "a YAML map": (
        f"production:\n  adapter: postgresql\n  host: {HOST}\n  database: neondb\n"
        f"  username: alex\n  password: {PASSWORD}\n  sslmode: require"
    ),
    "a TOML table": (
        f'[database]\nhost = "{HOST}"\nuser = "alex"\npassword = "{PASSWORD}"\ndbname = "neondb"'
    ),
    "the same, host first": (
        f'host = "{HOST}"\nuser = "alex"\npassword = "{PASSWORD}"\ndbname = "neondb"'
    ),
    "a JSON object": (
        f'{{"host": "{HOST}", "port": 5432, "user": "alex", "password": "{PASSWORD}", '
        '"database": "neondb", "ssl": true}'
    ),
    "a JavaScript object": (
        f"const pool = new Pool({{\n  host: '{HOST}',\n  database: 'neondb',\n  username: 'alex',\n"
        f"  password: '{PASSWORD}',\n  ssl: 'require',\n}})"
    ),
    "psycopg's arguments": (
        f'psycopg2.connect(host="{HOST}", dbname="neondb", user="alex", password="{PASSWORD}")'
    ),
    "PHP": (f"$host = '{HOST}';\n$db = 'neondb';\n$user = 'alex';\n$password = '{PASSWORD}';"),
    "Spring": (
        f"spring.datasource.url=jdbc:postgresql://{HOST}/neondb?sslmode=require\n"
        f"spring.datasource.username=alex\nspring.datasource.password={PASSWORD}\n"
        "spring.datasource.driver-class-name=org.postgresql.Driver"
    ),
    "libpq's keywords": (
        f"host={HOST} user=alex password={PASSWORD} dbname=neondb sslmode=require"
    ),
    "the same in quotes": (
        f'"host={HOST} user=alex password={PASSWORD} dbname=neondb sslmode=require"'
    ),
    "the same, quoted and broken": (
        f"user = 'alex' password = '{PASSWORD}' host = '{HOST}'\ndbname='neondb' sslmode='require'"
    ),
    "psql with keywords": (
        f'psql "host={HOST} user=alex password={PASSWORD} dbname=neondb sslmode=require"'
    ),
    "gorm": (
        f"host={HOST} user=alex password={PASSWORD} dbname=neondb port=5432 sslmode=require "
        "TimeZone=Asia/Shanghai"
    ),
    "psql with flags": f"PGPASSWORD={PASSWORD} psql -h {HOST} -U alex -d neondb",
    "psql with long flags": (
        f"PGPASSWORD='{PASSWORD}' psql --host={HOST} --username alex --dbname=neondb --port 5432"
    ),
    "psql with flags and the database last": (
        f"$ PGPASSWORD={PASSWORD} /usr/bin/psql -h{HOST} -Ualex -p 5432 -v x=1 -c 'select 1' neondb"
    ),
    "psql on several lines": (
        f"PGPASSWORD={PASSWORD} psql \\\n  -h {HOST} \\\n  -U alex \\\n  -d neondb"
    ),
    "psql in PowerShell": f'$env:PGPASSWORD="{PASSWORD}"; psql -h {HOST} -U alex -d neondb',
    "psql in Docker": (
        f"docker run -it --rm -e PGPASSWORD={PASSWORD} postgres:17 psql -h {HOST} -U alex neondb"
    ),
    "pg_dump with flags": f"PGPASSWORD={PASSWORD} pg_dump -h {HOST} -U alex -d neondb -f dump.sql",
    "psql with flags and keywords": (
        f'PGPASSWORD={PASSWORD} psql -h {HOST} -U alex "dbname=neondb sslmode=require"'
    ),
    "PGPASSWORD and a URL": f"PGPASSWORD={PASSWORD} psql 'postgresql://alex@{HOST}/neondb'",
    ".NET": f"Host={HOST};Database=neondb;Username=alex;Password={PASSWORD};SSL Mode=Require",
    ".NET's other names": (
        f"Server={HOST};Port=5432;Database=neondb;User Id=alex;Password='{PASSWORD}';"
        "Ssl Mode=Require;Trust Server Certificate=true;"
    ),
    ".NET in JSON": (
        '{\n  "ConnectionStrings": {\n    "Default": '
        f'"Host={HOST};Database=neondb;Username=alex;Password={PASSWORD}"\n  }}\n}}'
    ),
    ".NET in C#": (
        f'options.UseNpgsql("Host={HOST};Database=neondb;Username=alex;Password={PASSWORD}");'
    ),
    ".NET, small letters": f"host={HOST};database=neondb;username=alex;password={PASSWORD};",
    "a line of ~/.pgpass": f"{HOST}:5432:neondb:alex:{PASSWORD}",
    "a URL made of variables beside it": (
        "\n".join(LINES)
        + "\nDATABASE_URL=postgresql://${PGUSER}:${PGPASSWORD}@${PGHOST}/${PGDATABASE}"
    ),
    "the host without TLS": f"postgresql://{LOGIN}@{HOST}/neondb?sslmode=disable",
    "the host without parameters": f"postgresql://{LOGIN}@{HOST}/neondb",
    "the host without a database": f"postgresql://{LOGIN}@{HOST}",
    "sslmode=prefer": f"postgresql://{LOGIN}@{HOST}/neondb?sslmode=prefer",
    "ssl=true": f"postgresql://{LOGIN}@{HOST}/neondb?ssl=true",
    "ssl=require": f"postgresql+asyncpg://{LOGIN}@{HOST}/neondb?ssl=require",
    "sslmode=no-verify": f"postgresql://{LOGIN}@{HOST}/neondb?sslmode=no-verify",
    "a parameter cut off": f"postgresql://{LOGIN}@{HOST}/neondb?sslmode=require&channel_b",
    "another line of .env after it": f"DATABASE_URL=postgresql://{LOGIN}@{HOST}/neondb\nPORT=8000",
}

# Read as the pooled string, which is better for an application.
SEVERAL = {
    "pooled and direct, by name": (f"DATABASE_URL={POOLED}\nDATABASE_URL_UNPOOLED={STRING}"),
    "direct first": f"DIRECT_URL={STRING}\nDATABASE_URL={POOLED}",
    "on one line": f"DATABASE_URL='{POOLED}' DIRECT_URL='{STRING}' npm start",
    "compact JSON": f'{{"DIRECT_URL":"{STRING}","DATABASE_URL":"{POOLED}"}}',
    "two bare lines": f"{STRING}\n{POOLED}",
    "Prisma's schema": (
        "datasource db {\n"
        f'  provider  = "postgresql"\n  url       = "{POOLED}"\n  directUrl = "{STRING}"\n}}'
    ),
    "Vercel's block": (
        f"# Recommended for most uses\nDATABASE_URL={POOLED}\n\n"
        f"# For uses requiring a connection without pgbouncer\nDATABASE_URL_UNPOOLED={STRING}\n\n"
        "# Parameters for constructing your own connection string\n"
        f"PGHOST={POOLED_HOST}\nPGHOST_UNPOOLED={HOST}\nPGUSER=alex\nPGDATABASE=neondb\n"
        f"PGPASSWORD={PASSWORD}\n\n# Parameters for Vercel Postgres Templates\n"
        f"POSTGRES_URL={POOLED}\nPOSTGRES_URL_NON_POOLING={STRING}\nPOSTGRES_USER=alex\n"
        f"POSTGRES_HOST={POOLED_HOST}\nPOSTGRES_PASSWORD={PASSWORD}\nPOSTGRES_DATABASE=neondb\n"
        f"POSTGRES_URL_NO_SSL=postgresql://{LOGIN}@{POOLED_HOST}/neondb\n"
        f"POSTGRES_PRISMA_URL={POOLED.replace('?', '?connect_timeout=15&')}\n\n"
        "# Neon Auth\nNEXT_PUBLIC_STACK_PROJECT_ID=123"
    ),
    "Vercel's block without DATABASE_URL": (
        f"POSTGRES_PRISMA_URL={POOLED}&pgbouncer=true\nPOSTGRES_URL={POOLED}\n"
        f"POSTGRES_URL_NON_POOLING={STRING}"
    ),
    "a test database beside it": (
        f"DATABASE_URL={POOLED}\nTEST_DATABASE_URL=postgresql://postgres:s3@localhost/test"
    ),
    "an example beside it": (
        f"# postgresql://USER:PASSWORD@HOST/DATABASE\nPOSTGRES_URL={POOLED}\n"
    ),
}

# Read as user ann with this password on localhost.
PASSWORDS = {
    "s3%": "postgresql://ann:s3%@localhost/todo",
    "s3%!": "postgresql://ann:s3%!@localhost/todo",
    "s3@w": "postgresql://ann:s3@w@localhost/todo",
    "s3@@w": "postgresql://ann:s3@@w@localhost/todo",
    "@s3": "postgresql://ann:@s3@localhost/todo",
    "s3@": "postgresql://ann:s3@@localhost/todo",
    "s3/w": "postgresql://ann:s3/w@localhost/todo",
    "3/w": "postgresql://ann:3/w@localhost/todo",
    "/s3": "postgresql://ann:/s3@localhost/todo",
    "s3@/w": "postgresql://ann:s3@/w@localhost/todo",
    "s3@1/w": "postgresql://ann:s3@1/w@localhost/todo",
    "s3/?#w": "postgresql://ann:s3/?#w@localhost/todo",
    "s3@w?x=1": "postgresql://ann:s3@w?x=1@localhost/todo",
    "s3#w": "postgresql://ann:s3#w@localhost/todo",
    "s3?w": "postgresql://ann:s3?w@localhost/todo",
    "s3:w": "postgresql://ann:s3:w@localhost/todo",
    "s3+w": "postgresql://ann:s3+w@localhost/todo",
    "s3&w=x": "postgresql://ann:s3&w=x@localhost/todo",
    "s3[w]": "postgresql://ann:s3[w]@localhost/todo",
    "s3$w": "postgresql://ann:s3$w@localhost/todo",
    "$s3": "postgresql://ann:$s3@localhost/todo",
    "s3;w": "postgresql://ann:s3;w@localhost/todo",
    "s3,w": "postgresql://ann:s3,w@localhost/todo",
    "'s3'": "postgresql://ann:'s3'@localhost/todo",
    's3"w': 'postgresql://ann:s3"w@localhost/todo',
    "s3'w": "psql 'postgresql://ann:s3'w@localhost/todo'",
    "s3`w": "postgresql://ann:s3`w@localhost/todo",
    "s3<w>": "postgresql://ann:s3<w>@localhost/todo",
    "s3\\w": "postgresql://ann:s3\\w@localhost/todo",
    "s3|w": "postgresql://ann:s3|w@localhost/todo",
    "s3|x": "<postgresql://ann:s3|x@localhost/todo>",
    "s3~^!(w)": "postgresql://ann:s3~^!(w)@localhost/todo",
    "s3é€": "postgresql://ann:s3é€@localhost/todo",
    "s3@/%w": "postgresql://ann:s3%40%2F%25w@localhost/todo",
    "s3%40": "postgresql://ann:s3%2540@localhost/todo",
    "$PGPASSWORD": "postgresql://ann:%24PGPASSWORD@localhost/todo",
    "***": "postgresql://ann:%2A%2A%2A@localhost/todo",
    "it's \\ s3 b": r"host=localhost user=ann dbname=todo password='it\'s \\ s3 b'",
    "s3 b": r"host=localhost user=ann dbname=todo password=s3\ b",
    "s3=b": "host=localhost user=ann dbname=todo password=s3=b",
    "s3;b": "host=localhost user=ann dbname=todo password=s3;b",
    "s3 b#c": "PGHOST=localhost PGUSER=ann PGDATABASE=todo PGPASSWORD='s3 b#c'",
    "s3#c,": "PGHOST=localhost\nPGUSER=ann\nPGDATABASE=todo\nPGPASSWORD=s3#c,",
    "s3;c": "PGHOST=localhost\nPGUSER=ann\nPGDATABASE=todo\nPGPASSWORD=s3;c",
    "s3 c;": "PGPASSWORD='s3 c;' psql -h localhost -U ann todo",
    's3;"d': "Host=localhost;Username=ann;Database=todo;Password='s3;\"d'",
    "s3;'d": 'Host=localhost;Username=ann;Database=todo;Password="s3;\'d"',
    "s3=/d": "Host=localhost;Username=ann;Database=todo;Password=s3=/d",
    "s3:d": "localhost:5432:todo:ann:s3\\:d",
    "s3,d": "{'HOST': 'localhost', 'USER': 'ann', 'NAME': 'todo', 'PASSWORD': 's3,d'}",
    's3"e': '{"host": "localhost", "user": "ann", "database": "todo", "password": "s3\\"e"}',
}

SHOWN = f"postgresql://alex:***@{HOST}/neondb"

# Rejected, with this text in the message.
REFUSED = {
    "nothing": ("", "the text is empty"),
    "spaces and line ends": (" \r\n", "the text is empty"),
    "a word": ("hello", "not a connection string"),
    "a control character": (f"{STRING}\0", "control characters: copy it again"),
    "half a character": (f"{STRING}\ud800", "control characters: copy it again"),
    # placeholders
    ".env.example": (
        "postgresql://USER:PASSWORD@HOST/DATABASE",
        "USER:[***]@[HOST]/DATABASE: this is a pl",
    ),
    "<password>": (
        f"postgresql://alex:<password>@{HOST}/neondb",
        f"alex:[***]@{HOST}/neondb: this is a pl",
    ),
    "[YOUR-PASSWORD]": (f"postgresql://alex:[YOUR-PASSWORD]@{HOST}/neondb", "[***]"),
    "${PGPASSWORD}": (f"postgresql://alex:${{PGPASSWORD}}@{HOST}/neondb", "[***]"),
    "$PGPASSWORD": (f"postgresql://alex:$PGPASSWORD@{HOST}/neondb", "[***]"),
    "{{password}}": (f"postgresql://alex:{{{{password}}}}@{HOST}/neondb", "[***]"),
    "%DB_PASSWORD%": (f"postgresql://alex:%DB_PASSWORD%@{HOST}/neondb", "[***]"),
    "your_password": (f"postgresql://alex:your_password@{HOST}/neondb", "[***]"),
    "xxxxxxxx": (f"postgresql://alex:xxxxxxxx@{HOST}/neondb", "[***]"),
    "the template of Neon's documentation": (
        "postgresql://[user]:[password]@[neon_hostname]/[dbname]?sslmode=require",
        "postgresql://[USER]:[***]@[HOST]/[DATABASE]: this is a placeholder",
    ),
    "the example of Neon's documentation": (
        "postgresql://alex:AbC123dEf@ep-cool-darkness-a1b2c3d4-pooler.us-east-2.aws.neon.tech/dbname",
        "@[ep-cool-darkness-a1b2c3d4-pooler.us-east-2.aws.neon.tech]/dbname: this is a placeholder",
    ),
    "another example of Neon's": (
        'DATABASE_URL="postgresql://neondb_owner:...@ep-...us-east-1.aws.neon.tech/neondb"',
        "USER:[***]@HOST",
    ),
    "username:password@hostname": (
        "psql postgresql://username:password@hostname:5432/database?sslmode=require",
        "USER:***@[HOST]/DATABASE",
    ),
    "a percent-encoded placeholder": ("postgresql://alex:%50ASSWORD@localhost/todo", "[***]"),
    "a placeholder among keywords": (f"host={HOST} user=alex password=<password>", "[***]"),
    "a placeholder among variables": (f"PGHOST={HOST} PGUSER=alex PGPASSWORD=xxxxxxxx", "[***]"),
    "a reference in Django's settings": (
        f"'HOST': '{HOST}', 'USER': 'alex', 'PASSWORD': os.environ['DB_PW'],",
        "[***]",
    ),
    "what may be a placeholder, or a part of a password": (
        f"postgresql://ann:xxxx@localhost/s3?w@{HOST}/neondb",
        "USER:[***]@HOST/DATABASE",
    ),
    # masked
    "asterisks": (f"postgresql://alex:************@{HOST}/neondb?{QUERY}", "[***]@ep"),
    "SQLAlchemy's own": (f"postgresql://alex:***@{HOST}/neondb", "this is masked"),
    "dots": (f"postgresql://alex:npg_••••••@{HOST}/neondb", "this is masked"),
    "an ellipsis": (f"postgresql://alex:npg_s3…@{HOST}/neondb", "this is masked"),
    "asterisks among variables": (
        f"PGHOST={HOST}\nPGUSER=alex\nPGPASSWORD=*****",
        "this is masked",
    ),
    # missing parts
    "no password": (
        f"postgresql://alex@{HOST}/neondb",
        f"USER:[***]@{HOST}/neondb: the password is m",
    ),
    "an empty password": (f"postgresql://alex:@{HOST}/neondb", "the password is missing"),
    "a password and no user": (f"postgresql://npg_s3cr3t@{HOST}/neondb", "USER:[***]@"),
    "no password among variables": (f"PGHOST={HOST}\nPGUSER=alex", "the password is missing"),
    "psql with flags, no password": (
        f"psql -h {HOST} -U alex -d neondb",
        "the password is missing",
    ),
    "no user": ("postgresql://localhost/todo", "[USER]:***@localhost/todo: the user is missing"),
    "no user among variables": (f"PGHOST={HOST}", "the user is missing"),
    "psql without a user": ("psql -h pg.neon.tech", "the user is missing"),
    "no host": ("postgresql:///todo", "[HOST]/DATABASE: the host is missing"),
    "no host but a path": ("postgresql://ann:s3@/tmp/d", "the host is missing"),
    "the scheme alone": ("postgresql://", "there is nothing after the scheme"),
    # cut off
    "cut off after the user": ("postgresql://alex", "the user is missing"),
    "cut off in the password": (f"postgresql://{LOGIN}", 'postgresql://[…]: this has no "@"'),
    "cut off in a password of digits": ("postgresql://alex:123", "the user is missing"),
    "cut off before the host": (f"postgresql://{LOGIN}@", "the host is missing"),
    "cut off in the endpoint": (
        f"postgresql://{LOGIN}@ep-cool-na",
        "[HOST]/DATABASE: the host is cut",
    ),
    "cut off after the endpoint": (
        f"postgresql://{LOGIN}@ep-cool-name-a1b2c3d4",
        "the host is cut off",
    ),
    "cut off in the region": (
        f"postgresql://{LOGIN}@{HOST[:29]}",
        f"[{HOST[:29]}]/DATABASE: the host",
    ),
    "cut off in the domain": (
        f"postgresql://{LOGIN}@{HOST[:-3]}",
        f"[{HOST[:-3]}]/DATABASE: the host",
    ),
    "cut off in sslmode": (
        f"postgresql://{LOGIN}@{HOST}/neondb?sslmode=req",
        f"{SHOWN}?sslmode=[…]: unknown sslmode, perhaps cut off",
    ),
    "cut off in channel_binding": (
        STRING[:-2],
        f"{SHOWN}?channel_binding=[…]: unknown channel_binding",
    ),
    "a host alone": (HOST, "the text is only a host"),
    "a host and a database": (f"{HOST}/neondb", "the text is only a host"),
    "a password alone": (PASSWORD, "only a password or an API key"),
    "an API key of Neon": ("napi_s3cr3t", "only a password or an API key"),
    # not connection strings
    "the console's page": (
        "https://console.neon.tech/app/projects/cool-name-12345678?s3cr3t",
        "a web page: choose Connect on that page",
    ),
    "the same without https://": ("console.neon.tech/app/projects/s3cr3t", "a web page"),
    "MySQL": ("mysql://ann:s3cr3t@localhost/todo", "the text starts with mysql://"),
    "SQLite": ("sqlite:///todo.db", "the text starts with sqlite://"),
    "MongoDB": ("mongodb+srv://ann:s3cr3t@h/d", "the text starts with mongodb://"),
    "Prisma's proxy": ("prisma+postgres://x.net/?api_key=s3cr3t", "the text starts with prisma://"),
    "an unknown scheme": ("s3cr3t://ann", "the text starts with another scheme"),
    "an error of psql": (
        f'psql: error: connection to server at "{HOST}" (1.2.3.4), port 5432 failed: s3cr3t',
        "an error message",
    ),
    "an error of psycopg2": (
        f'psycopg2.OperationalError: could not translate host name "s3@{HOST}" to address: Name or',
        "an error message",
    ),
    "an error with an address": (
        "ERROR:  Endpoint ID is not specified. See more at https://neon.tech/sni",
        "an error message",
    ),
    "a variable of the shell": ("$DATABASE_URL", "names a variable"),
    "a variable of Node.js": ("process.env.DATABASE_URL", "names a variable"),
    "a variable of Python": ('os.environ["DATABASE_URL"]', "names a variable"),
    "a variable of Railway": ("DATABASE_URL=${{ Postgres.DATABASE_URL }}", "names a variable"),
    "two databases": (
        f"{STRING}\npostgresql://ann:s3@localhost/other",
        "several connection strings",
    ),
    "two of one name": (
        f"DATABASE_URL={STRING}\nDATABASE_URL=postgresql://ann:s3@localhost/other",
        "several connection strings",
    ),
    "a word in the next line": (f"postgresql://{LOGIN}@{HOST}/neondb\nCopied", "has more lines"),
    "broken after an @ in the password": (
        f"postgresql://ann:s3@s3\ns3cr3t@{HOST}:s3/neondb",
        "has more lines",
    ),
    # invalid parts
    "no colon in the login": (
        f"postgresql://alex@s3cr3t@{HOST}/neondb",
        f"[USER:***]@{HOST}/neondb: this is not USER:PASSWORD",
    ),
    "a page instead of a host": (
        f"PGHOST=https://{HOST}\nPGUSER=alex\nPGPASSWORD=s3",
        "host is missing or invalid",
    ),
    "an exclamation mark in the host": (
        "postgresql://ann:s3cr3t@ex!ample/todo",
        "USER:***@[HOST/DATABASE]: this is not HOST:PORT/DATABASE",
    ),
    "the same among keywords": (
        "host=ex!ample user=ann password=s3cr3t",
        "host is missing or invalid",
    ),
    "letters in the port": (
        "postgresql://ann:s3cr3t@localhost:s3cr3t/todo",
        "not HOST:PORT/DATABASE",
    ),
    "an IPv6 address without brackets": (
        "postgresql://ann:s3@::1:5432/todo",
        "not HOST:PORT/DATABASE",
    ),
    "port 0": (
        "postgresql://ann:s3@localhost:0/todo",
        "ann:***@localhost:[PORT]/todo: the port is no",
    ),
    "port 65536": (
        f"postgresql://{LOGIN}@{HOST}:65536/neondb",
        f"{HOST}:[PORT]/neondb: the port is no",
    ),
    "two hosts": ("postgresql://ann:s3cr3t@one,two/todo", "several hosts"),
    "two hosts among keywords": ("host=one,two port=5432,5433 user=ann", "several hosts"),
    "an unknown sslmode": (f"{STRING}&sslmode=s3cr3t", "?sslmode=[…]: unknown sslmode"),
    "a comment that touches it": (f"{STRING}#s3", "?channel_binding=[…]"),
    # characters
    "a code and a bare %": (
        f"postgresql://alex:s3%cr3t%20@{HOST}/neondb",
        f'alex:[***]@{HOST}/neondb: a "%" here does not start a code',
    ),
    "a code that is no UTF-8": (
        "postgresql://ann:s3%FF@localhost/todo",
        "[***]@localhost/todo: this is",
    ),
    "a code for NUL": ("postgresql://ann:s3%00@localhost/todo", "this is not text"),
    "a bad code in the database": (
        "postgresql://ann:s3@localhost/%FF",
        "localhost/[DATABASE]: this is",
    ),
    "a bad code in a parameter": (f"{STRING}&options=%FF", "?[…]: this is not text"),
    "a space in the password": (
        "postgresql://ann:s3 cr3t@localhost/todo",
        "[USER:***]@HOST/DATABASE: this contains a space: write it as %20",
    ),
    "the same in quotes": ("'postgresql://ann:s3 cr3t@localhost/todo'", "contains a space"),
    "a non-breaking space": ("postgresql://ann:s3\xa0cr3t@localhost/todo", "contains a space"),
    "a space in the database": (
        "postgresql://ann:s3@localhost/to do",
        "/[DATABASE]: this contains",
    ),
    "an @ in password or database": (
        "postgresql://ann:s3@h1/s3@h2/todo",
        "[USER:***]@HOST/DATABASE: this",
    ),
    "an @ and an unknown parameter": ("postgresql://ann:s3@h1?a=s3@h2/todo", "ambiguous"),
    "a space in a keyword's value": (
        "host=localhost user=ann password=s3 cr3t",
        "host=… user=… password=… […]: the rest is not KEYWORD=VALUE",
    ),
    "the same with an =": ("host=localhost user=ann password=s3 cr3t=x", "password=… […]"),
    "an open quote among keywords": ("host=localhost user=ann password='s3cr3t", "user=… […]"),
    "a space in a variable": (
        "PGHOST=h PGUSER=ann PGPASSWORD=s3 cr3t",
        "password=[…]: text follows",
    ),
    "an open quote among variables": ("PGHOST=h\nPGUSER=ann\nPGPASSWORD='s3 cr3t", "password=[…]"),
    "an open quote in .NET's form": (
        "Host=h1;Username=ann;Password='s3;x",
        "host is missing or invalid",
    ),
    "keywords with a semicolon": (
        "host=h1; user=ann password=s3 dbname=db",
        "host is missing or invalid",
    ),
    "a line break and more after it": (
        f"psql postgresql://alex:\ns3cr3t@{HOST}/neondb -c 'select 1'",
        "the user is missing",
    ),
    "8,000 characters": (f"postgresql://ann:{'s3' * 4000}@localhost/todo", "is too long"),
    "8,000 characters in a variable": (
        f"PGHOST=h\nPGUSER=a\nPGPASSWORD={'s3' * 4001}",
        "is too long",
    ),
    "20,000 characters": ("s3" * 10_001, "is too long"),
}
