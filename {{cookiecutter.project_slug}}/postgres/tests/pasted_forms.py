"""What people paste, form by form: what hosts offer to copy, and what is refused.

Each text contains the password npg_s3cr3t or another one with "s3", unless stated otherwise.
"""

HOST = "ep-cool-name-a1b2c3d4.us-east-2.aws.neon.tech"
POOLED_HOST = "ep-cool-name-a1b2c3d4-pooler.us-east-2.aws.neon.tech"
PASSWORD = "npg_s3cr3t"
LOGIN = f"alex:{PASSWORD}"
QUERY = "sslmode=require&channel_binding=require"
REST = f"{LOGIN}@{HOST}/neondb?{QUERY}"
STRING = f"postgresql://{REST}"
POOLED = f"postgresql://{LOGIN}@{POOLED_HOST}/neondb?{QUERY}"

VARIABLES = {
    "PGHOST": HOST,
    "PGDATABASE": "neondb",
    "PGUSER": "alex",
    "PGPASSWORD": PASSWORD,
    "PGSSLMODE": "require",
    "PGCHANNELBINDING": "require",
}
LINES = [f"{name}={value}" for name, value in VARIABLES.items()]

SUPABASE = "aws-0-eu-central-1.pooler.supabase.com"
SUPABASE_DIRECT = "db.abcdefgh.supabase.co"
AZURE = "srv.postgres.database.azure.com"
RENDER = "dpg-abc123-a.oregon-postgres.render.com"
SOCKET = "/cloudsql/my-proj:europe-west3:inst"
AT_SOCKET = f"ann@{SOCKET}:5432/todo"

# What hosts and tools offer to copy, by the place that it names.
CONSOLES = {
    f"alex@{HOST}:5432/neondb": {
        "Neon": STRING,
        "Neon: psql": f"psql '{STRING}'",
        "Neon: .env": f"DATABASE_URL='{STRING}'",
        "Neon: parameters only": "\n".join(LINES),
        "Neon: Node.js": "// .env\n"
        + "\n".join(f"{name}='{value}'" for name, value in VARIABLES.items()),
        "Neon: Java": (
            f"jdbc:postgresql://{HOST}/neondb?user=alex&password={PASSWORD}"
            "&sslmode=require&channelBinding=require"
        ),
        "Neon: .NET": (
            f"Host={HOST}; Database=neondb; Username=alex; Password={PASSWORD}; "
            "SSL Mode=VerifyFull; Channel Binding=Require;"
        ),
        "Neon: Laravel": (
            f"DB_CONNECTION=pgsql\nDB_HOST={HOST}\nDB_PORT=5432\nDB_DATABASE=neondb\n"
            f"DB_USERNAME=alex\nDB_PASSWORD={PASSWORD}\nDB_SSLMODE=require"
        ),
        "Neon: Symfony": (
            f'DATABASE_URL="postgresql://{LOGIN}@{HOST}/neondb?serverVersion=16&charset=utf8"'
        ),
        "Neon: SQLAlchemy": f'engine = create_engine("postgresql+psycopg2://{REST}")',
        "Neon: JavaScript": f"const sql = neon('{STRING}');",
        "Neon's documentation": f"# psql example connection string\npsql {STRING}",
    },
    f"alex@{POOLED_HOST}:5432/neondb": {
        "Neon: Prisma": f'# .env\nDATABASE_URL="{POOLED}"\nDATABASE_URL_UNPOOLED="{STRING}"',
        "Vercel": (
            f"# Recommended for most uses\nDATABASE_URL={POOLED}\n\n"
            "# For uses requiring a connection without pgbouncer\n"
            f"DATABASE_URL_UNPOOLED={STRING}\n\n"
            "# Parameters for constructing your own connection string\n"
            f"PGHOST={POOLED_HOST}\nPGHOST_UNPOOLED={HOST}\nPGUSER=alex\nPGDATABASE=neondb\n"
            f"PGPASSWORD={PASSWORD}\n\n# Parameters for Vercel Postgres Templates\n"
            f"POSTGRES_URL={POOLED}\nPOSTGRES_URL_NON_POOLING={STRING}\nPOSTGRES_USER=alex\n"
            f"POSTGRES_HOST={POOLED_HOST}\nPOSTGRES_PASSWORD={PASSWORD}\nPOSTGRES_DATABASE=neondb\n"
            f"POSTGRES_URL_NO_SSL=postgresql://{LOGIN}@{POOLED_HOST}/neondb\n"
            f"POSTGRES_PRISMA_URL={POOLED.replace('?', '?connect_timeout=15&')}\n\n"
            "# Neon Auth\nNEXT_PUBLIC_STACK_PROJECT_ID=123"
        ),
        "Vercel: another beginning": (
            f"POSTGRES_PRISMA_URL={POOLED}&pgbouncer=true\nPOSTGRES_URL={POOLED}\n"
            f"POSTGRES_URL_NON_POOLING={STRING}"
        ),
        "vercel env pull": f'DATABASE_URL="{POOLED}\\n"',
    },
    f"postgres.abcdefgh@{SUPABASE}:6543/postgres": {
        "Supabase": f"postgresql://postgres.abcdefgh:{PASSWORD}@{SUPABASE}:6543/postgres",
    },
    f"postgres@{SUPABASE_DIRECT}:5432/postgres": {
        "Supabase: psql": f"psql -h {SUPABASE_DIRECT} -p 5432 -d postgres -U postgres",
        "Supabase: Go": (
            f"user=postgres password={PASSWORD} host={SUPABASE_DIRECT} port=5432 dbname=postgres"
        ),
        "Supabase: Python": (
            f"user=postgres \npassword={PASSWORD} \nhost={SUPABASE_DIRECT} \nport=5432 \n"
            "database=postgres"
        ),
        "Supabase: JDBC": (
            f"jdbc:postgresql://{SUPABASE_DIRECT}:5432/postgres?user=postgres&password={PASSWORD}"
        ),
        "Supabase: .NET": (
            f"User Id=postgres;Password={PASSWORD};Server={SUPABASE_DIRECT};Port=5432;"
            "Database=postgres"
        ),
        "Supabase: .NET in JSON": (
            '{\n  "ConnectionStrings": {\n    "DefaultConnection": '
            f'"Host={SUPABASE_DIRECT};Database=postgres;Username=postgres;Password={PASSWORD};'
            'SSL Mode=Require;Trust Server Certificate=true"\n  }\n}'
        ),
    },
    f"postgres.abc@{SUPABASE}:6543/postgres": {
        "Supabase: Prisma": (
            "# Connect to Supabase via connection pooling\n"
            f'DATABASE_URL="postgresql://postgres.abc:{PASSWORD}@{SUPABASE}:6543/postgres'
            '?pgbouncer=true"\n\n# Direct connection to the database. Used for migrations\n'
            f'DIRECT_URL="postgresql://postgres.abc:{PASSWORD}@{SUPABASE}:5432/postgres"'
        ),
    },
    "postgres@roundhouse.proxy.rlwy.net:40001/railway": {
        "Railway": f"postgresql://postgres:{PASSWORD}@roundhouse.proxy.rlwy.net:40001/railway",
        "Railway: psql": (
            f"PGPASSWORD={PASSWORD} psql -h roundhouse.proxy.rlwy.net -U postgres -p 40001 "
            "-d railway"
        ),
        "Railway: variables": (
            "PGHOST=roundhouse.proxy.rlwy.net\nPGPORT=40001\nPGUSER=postgres\n"
            f"PGPASSWORD={PASSWORD}\nPGDATABASE=railway\nPOSTGRES_USER=postgres\n"
            f"POSTGRES_PASSWORD={PASSWORD}\nPOSTGRES_DB=railway\nSSL_CERT_DAYS=820"
        ),
    },
    f"ann@{RENDER}:5432/todo": {
        "Render": f"postgresql://ann:{PASSWORD}@{RENDER}/todo",
        "Render: psql": f"PGPASSWORD={PASSWORD} psql -h {RENDER} -U ann todo",
    },
    "ann@ec2-1-2-3-4.compute-1.amazonaws.com:5432/d1abc": {
        "Heroku": f"postgres://ann:{PASSWORD}@ec2-1-2-3-4.compute-1.amazonaws.com:5432/d1abc",
    },
    "ann@h1:5432/d1abc": {
        "heroku config": f"DATABASE_URL:      postgres://ann:{PASSWORD}@h1:5432/d1abc",
        "heroku pg:credentials:url": (
            f'"dbname=d1abc host=h1 port=5432 user=ann password={PASSWORD} sslmode=require"'
        ),
    },
    "doadmin@h1:25060/defaultdb": {
        "DigitalOcean": (
            f"username = doadmin\npassword = {PASSWORD}\nhost = h1\nport = 25060\n"
            "database = defaultdb\nsslmode = require"
        ),
        "DigitalOcean: psql": (
            f"PGPASSWORD={PASSWORD} psql -U doadmin -h h1 -p 25060 -d defaultdb "
            "--set=sslmode=require"
        ),
    },
    "ann@h1:5432/todo": {
        "Elastic Beanstalk": (
            "RDS_HOSTNAME=h1\nRDS_PORT=5432\nRDS_DB_NAME=todo\nRDS_USERNAME=ann\n"
            f"RDS_PASSWORD={PASSWORD}"
        ),
        "pgAdmin": (
            f"host=h1 port=5432 dbname=todo user=ann password={PASSWORD} sslmode=prefer "
            "connect_timeout=10"
        ),
        "gorm": (
            f"host=h1 user=ann password={PASSWORD} dbname=todo port=5432 sslmode=disable "
            "TimeZone=Asia/Shanghai"
        ),
        "psycopg2's documentation": (
            'conn = psycopg2.connect(database="todo", host="h1", user="ann", '
            f'password="{PASSWORD}")'
        ),
    },
    "ann@10.1.2.3:5432/todo": {
        "Cloud SQL: psql, by address": (
            f'PGPASSWORD={PASSWORD} psql "sslmode=verify-ca sslrootcert=server-ca.pem '
            'hostaddr=10.1.2.3 port=5432 user=ann dbname=todo"'
        ),
    },
    "postgres@todo.abc.us-east-1.rds.amazonaws.com:5432/todo": {
        "RDS: psql": (
            f"PGPASSWORD={PASSWORD} psql --host=todo.abc.us-east-1.rds.amazonaws.com --port=5432 "
            "--username=postgres --password --dbname=todo"
        ),
    },
    f"ann%40srv@{AZURE}:5432/todo": {
        "Azure: single server": f"postgres://ann%40srv:{PASSWORD}@{AZURE}/todo",
        "Azure: single server, keywords": (
            f"host={AZURE} port=5432 dbname=todo user=ann@srv password={PASSWORD}"
        ),
        "Azure: single server, .NET": (
            f"Server={AZURE};Database=todo;Port=5432;User Id=ann@srv;Password={PASSWORD};"
        ),
    },
    f"ann@{AZURE}:5432/todo": {
        "Azure: psql": (
            f'psql "host={AZURE} port=5432 dbname=todo user=ann password={PASSWORD} '
            'sslmode=require"'
        ),
        "Azure: ADO.NET": (
            f"Server={AZURE};Database=todo;Port=5432;User Id=ann;Password={PASSWORD};Ssl "
            "Mode=Require;"
        ),
        "Azure: JDBC": (
            f"jdbc:postgresql://{AZURE}:5432/todo?user=ann&password={PASSWORD}&sslmode=require"
        ),
        "Azure: Python": (
            f'cnx = psycopg2.connect(user="ann", password="{PASSWORD}", host="{AZURE}", port=5432, '
            'database="todo")'
        ),
        "Azure: Ruby": (
            f'connection = PG::Connection.new(user => "ann", password => "{PASSWORD}", '
            f'database => "todo", host => "{AZURE}", port => \'5432\')'
        ),
        "Azure: PHP": (
            f'pg_connect("host={AZURE} port=5432 dbname=todo user=ann password={PASSWORD}");'
        ),
        "Azure: web app": f"Database=todo; Data Source={AZURE}; User Id=ann; Password={PASSWORD}",
        "Azure: variables": (
            "\n".join(
                [
                    f"export PGHOST={AZURE}",
                    "export PGUSER=ann",
                    "export PGPORT=5432",
                    "export PGDATABASE=todo",
                    f'export PGPASSWORD="{PASSWORD}"',
                ]
            )
        ),
    },
    "avnadmin@pg-1-todo.a.aivencloud.com:12345/defaultdb": {
        "Aiven": (
            f"postgres://avnadmin:{PASSWORD}@pg-1-todo.a.aivencloud.com:12345/defaultdb"
            "?sslmode=require"
        ),
    },
    "abc@db.prisma.io:5432/postgres": {
        "Prisma Postgres": f"postgres://abc:{PASSWORD}@db.prisma.io:5432/postgres?sslmode=require",
    },
    AT_SOCKET: {
        "Cloud SQL": f"postgresql://ann:{PASSWORD}@/todo?host={SOCKET}",
        "Cloud SQL, encoded": (
            f"postgresql://ann:{PASSWORD}@%2Fcloudsql%2Fmy-proj%3Aeurope-west3%3Ainst/todo"
        ),
        "Cloud SQL: Prisma": f"postgresql://ann:{PASSWORD}@localhost/todo?host={SOCKET}",
        "Cloud SQL: pg8000": (
            f"postgresql+pg8000://ann:{PASSWORD}@/todo?unix_sock={SOCKET}/.s.PGSQL.5432"
        ),
        "Cloud SQL: keywords": f"host={SOCKET} user=ann password={PASSWORD} dbname=todo",
        "Cloud SQL: variables": (
            f"PGHOST={SOCKET}\nPGUSER=ann\nPGPASSWORD={PASSWORD}\nPGDATABASE=todo"
        ),
        "Cloud SQL: .NET": f"Host={SOCKET};Username=ann;Password={PASSWORD};Database=todo",
        "Cloud SQL: psql": f"PGPASSWORD={PASSWORD} psql -h {SOCKET} -U ann todo",
    },
}

# Understood as STRING, all of it.
WHOLE = {
    "spaces and line ends around it": f"  {STRING}\r\n",
    "a byte order mark before it": f"\ufeff{STRING}",
    "double quotes": f'"{STRING}"',
    "backquotes": f"`{STRING}`",
    "typographic quotes": f"\u201c{STRING}\u201d",
    "German quotes": f"\u201e{STRING}\u201c",
    "quotes within quotes": f"\"'{STRING}'\"",
    "a quote at one end": f"'{STRING}",
    "a quote at the other end": f"{STRING}'",
    "angle brackets": f"<{STRING}>",
    "parentheses": f"({STRING})",
    "square brackets": f"[{STRING}]",
    "bold in Markdown": f"**{STRING}**",
    "a block in Markdown": f"```shell\n{STRING}\n```",
    "a quoted line of a chat": f"> {STRING}",
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
    "HTML's &amp;": STRING.replace("&", "&amp;"),
    "JSON's \\u0026": STRING.replace("&", "\\u0026"),
    "zsh's \\? and \\&": STRING.replace("?", "\\?").replace("&", "\\&").replace("=", "\\="),
    "non-breaking spaces around it": f"\xa0{STRING}\xa0",
    "a zero-width space inside": STRING.replace("aws", "a\u200bws"),
    "soft hyphens inside": STRING.replace("aws", "a\xadws"),
    "marks of writing direction": f"\u202a{STRING}\u202c",
    "the marks of a terminal's paste": f"\x1b[200~{STRING}\x1b[201~",
    "a terminal's colours": f"\x1b[32m{STRING}\x1b[0m",
    "a comma after it": f"{STRING},",
    "a semicolon after it": f"{STRING};",
    "a full stop after it": f"{STRING}.",
    "a line end as \\n": f"{STRING}\\n",
    "broken in four lines": "\n".join(STRING[start : start + 40] for start in range(0, 160, 40)),
    "broken, indented, in quotes": f"psql '{STRING[:60]}\r\n   {STRING[60:]}'",
    "psql with a command": f"psql {STRING} -c 'select 1'",
    "psql -d": f'psql -d "{STRING}"',
    "psql and keywords": (
        f'psql "host={HOST} user=alex password={PASSWORD} dbname=neondb sslmode=require '
        'channel_binding=require"'
    ),
    "psql with flags": (
        f"PGPASSWORD='{PASSWORD}' PGSSLMODE=require PGCHANNELBINDING=require /usr/bin/psql "
        f"-h{HOST} -Ualex -p 5432 neondb"
    ),
    "psql on several lines": (
        f"PGPASSWORD={PASSWORD} psql \\\n  -h {HOST} \\\n  -U alex \\\n"
        '  "dbname=neondb sslmode=require channel_binding=require"'
    ),
    "psql, its password before it": (
        f"PGPASSWORD={PASSWORD} psql 'postgresql://alex@{HOST}/neondb?{QUERY}'"
    ),
    "a prompt before it": f"(venv) ada@mac todo % psql '{STRING}'",
    "a prompt with a dollar": f"$ psql '{STRING}'",
    "pg_dump": f"pg_dump -Fc -d '{STRING}' -f dump.bak",
    "a list of a chat": f"\u2022 {STRING}",
    "a name and a comment": f"url: {STRING} # postgresql://old:s3@old/old",
    "spaces and a comment": f"DATABASE_URL = '{STRING}'  # of the branch main",
    "an address in the comment": f"DATABASE_URL={STRING}  # ask me@example.com",
    "another name": f"TEST_URL={STRING}",
    "export": f"export DATABASE_URL='{STRING}'",
    "fish: set -gx": f"set -gx DATABASE_URL {STRING}",
    "cmd: set": f"set DATABASE_URL={STRING}",
    "cmd: setx": f'setx DATABASE_URL "{STRING}"',
    "PowerShell": f'$env:DATABASE_URL = "{STRING}"',
    "Dockerfile": f"ENV DATABASE_URL={STRING}",
    "Compose": f"      - DATABASE_URL={STRING}",
    "YAML": f'DATABASE_URL: "{STRING}"',
    "JSON": f'{{"DATABASE_URL": "{STRING}"}}',
    "systemd": f'Environment="DATABASE_URL={STRING}"',
    "alembic.ini": f"sqlalchemy.url = {STRING}",
    "an app's own settings beside it": f"HOST=0.0.0.0\nPORT=3000\nDATABASE_URL={STRING}\nDEBUG=1",
    "an old string in a comment": f"# DATABASE_URL=postgresql://o:s3@o/o\r\nDATABASE_URL={STRING}",
    "others in comments": f"# B=${{A}}\n// C=mysql://s3@h/d\nDATABASE_URL={STRING}",
    "the same string twice": f"{STRING}\n{STRING}",
    "postgres://": f"postgres://{REST}",
    "PostgreSQL://": f"PostgreSQL://{REST}",
    "postgresql+asyncpg://": f"postgresql+asyncpg://{REST}",
    "pgsql://": f"pgsql://{REST}",
    "other spellings of names": STRING.replace("sslm", "ssl-m").replace("l_b", "l%20b"),
    "capitals in values": STRING.replace("=require", "=Require"),
    "a port": STRING.replace(HOST, f"{HOST}:5432"),
    "Prisma's parameters": f"{STRING}&pgbouncer=true&connection_limit=1&schema=public",
    "node-postgres' parameter": f"{STRING}&uselibpqcompat=true",
    "the variables on one line": " ".join(LINES),
    "the variables in typographic quotes": "\n".join(
        f"{name}=\u2018{value}\u2019" for name, value in VARIABLES.items()
    ),
    "the variables with comments": "\r\n".join(f"{line}   # comment" for line in LINES),
    "the variables in PowerShell": "\n".join(
        f'$env:{name} = "{value}"' for name, value in VARIABLES.items()
    ),
    "the variables in YAML": "\n".join(f"  {name}: {value}" for name, value in VARIABLES.items()),
    "keywords with spaces": (
        f"user = 'alex' password = '{PASSWORD}' host = '{HOST}'\ndbname='neondb' sslmode='require' "
        "channel_binding=require"
    ),
    "keywords in DATABASE_URL": (
        f'DATABASE_URL="host={HOST} user=alex password={PASSWORD} dbname=neondb sslmode=require '
        'channel_binding=require"'
    ),
    "keywords in DATABASE_URL, without quotes": (
        f"DATABASE_URL=host={HOST} user=alex password={PASSWORD} dbname=neondb sslmode=require "
        "channel_binding=require"
    ),
    "no TLS, to Neon": (
        f"postgresql://{LOGIN}@{HOST}/neondb?sslmode=disable&channel_binding=require"
    ),
}

# Read as user ann with this password on localhost.
PASSWORDS = {
    "s3@w": "postgresql://ann:s3@w@localhost/todo",
    "s3@@w": "postgresql://ann:s3@@w@localhost/todo",
    "@s3": "postgresql://ann:@s3@localhost/todo",
    "@s3*": "**postgresql://ann:@s3*@localhost/todo**",
    "s3@": "postgresql://ann:s3@@localhost/todo",
    "s3/w": "postgresql://ann:s3/w@localhost/todo",
    "s3/?#w": "postgresql://ann:s3/?#w@localhost/todo",
    "s3?w": "postgresql://ann:s3?w@localhost/todo",
    "s3:w": "postgresql://ann:s3:w@localhost/todo",
    "s3+w": "postgresql://ann:s3+w@localhost/todo",
    "s3&w=x": "postgresql://ann:s3&w=x@localhost/todo",
    "s3[w]": "postgresql://ann:s3[w]@localhost/todo",
    "s3$w": "postgresql://ann:s3$w@localhost/todo",
    "s3;w": "postgresql://ann:s3;w@localhost/todo",
    "'s3'": "postgresql://ann:'s3'@localhost/todo",
    's3"w': 'postgresql://ann:s3"w@localhost/todo',
    "s3|x": "<postgresql://ann:s3|x@localhost/todo>",
    "s3~^!(w)": "postgresql://ann:s3~^!(w)@localhost/todo",
    "s3é€": "postgresql://ann:s3é€@localhost/todo",
    "s3@/%w": "postgresql://ann:s3%40%2F%25w@localhost/todo",
    "s3\\&amp;": "postgresql://ann:s3%5C%26amp;@localhost/todo",
    "s3%40": "postgresql://ann:s3%2540@localhost/todo",
    "$PGPASSWORD": "postgresql://ann:%24PGPASSWORD@localhost/todo",
    "***": "postgresql://ann:%2A%2A%2A@localhost/todo",
    "it's \\ s3 b": r"host=localhost user=ann dbname=todo password='it\'s \\ s3 b'",
    "s3 b": r"host=localhost user=ann dbname=todo password=s3\ b",
    "s3=b": "host=localhost user=ann dbname=todo password=s3=b",
    "s3;b": "host=localhost user=ann dbname=todo password=s3;b",
    "s3 b#c": "PGHOST=localhost PGUSER=ann PGDATABASE=todo PGPASSWORD='s3 b#c'",
    "": "PGHOST=localhost PGUSER=ann PGDATABASE=todo PGPASSWORD= S3=s3",
    "s3;c": "PGHOST=localhost\nPGUSER=ann\nPGDATABASE=todo\nPGPASSWORD='s3;c'",
    "s3 c;": "PGPASSWORD='s3 c;' psql -h localhost -U ann todo",
    's3;"d': "Host=localhost;Username=ann;Database=todo;Password='s3;\"d'",
    "s3;'d": 'Host=localhost;Username=ann;Database=todo;Password="s3;\'d"',
    "s3=/d": "Host=localhost;Username=ann;Database=todo;Password=s3=/d",
    "s3@w/": "jdbc:postgresql://localhost/todo?user=ann&password=s3@w/",
}

UNCLEAR = "USER:PASSWORD is unclear"
NO_PLACE = "no HOST/DATABASE"
FOLLOWS = "text follows"
AROUND = "text around the connection string"
SETTINGS = "the settings are not clearly those of one connection"
SEVERAL = "parts of several connections"
REPLACED = "a placeholder, which a program replaces"
HAS_PORT = "the host has a port: write the port in its own setting"
ELSEWHERE = "the command runs in a container, on another machine or as another user"
LOCAL = "postgresql://ann:s3@localhost/todo"

# What programs and shells replace, alone or within a value.
REFERENCES = [
    "$PGPASSWORD",
    "${PGPASSWORD}",
    "$(op read s3)",
    "{{password}}",
    "%(password)s",
    "#{pw}",
]
REFERENCES += ["<%= s3 %>", "config('DB_PW')", "env('DB_PW')", "os.getenv('DB_PW')", "ENV['DB_PW']"]
REFERENCES += ["os.environ['DB_PW']", "process.env.DB_PW", "import.meta.env.DB_PW", "Bun.env.DB_PW"]
REFERENCES += ["Deno.env.get('DB_PW')", "settings.DB_PW", "secrets.DB_PW", "var.db_pw", "env.DB_PW"]

# What shells, JSON, HTML and programs write for a character. It may stand for itself too.
ESCAPES = [
    "\\!",
    "\\$",
    "\\/",
    "\\w",
    "\\\\",
    "\\u0026",
    "\\x26",
    "&amp;",
    "&lt;",
    "&#38;",
    "&#x26;",
]
# Where an escape is not certainly one.
ESCAPED = {
    "a URL": "postgresql://ann:{}@localhost/todo?sslmode=require",
    "a URL in quotes": 'DATABASE_URL="postgresql://ann:{}@localhost/todo"',
    "a URL, escaped behind the password": (
        "postgresql://ann:{}@localhost/todo\\?sslmode=require&amp;channel_binding=require"
    ),
    "JDBC": "jdbc:postgresql://localhost/todo?user=ann&password={}&sslmode=require",
    "psql": "psql 'postgresql://ann:{}@localhost/todo'",
    "psql in quotes of the shell": 'psql "postgresql://ann:{}@localhost/todo"',
    ".NET": "Host=localhost;Username=ann;Password={};Database=todo",
    ".NET in JSON": '{{"Default": "Host=localhost;Username=ann;Password={};Database=todo"}}',
    "keywords in quotes": 'DATABASE_URL="host=localhost user=ann password={} dbname=todo"',
    "a variable": "PGHOST=localhost PGUSER=ann PGDATABASE=todo PGPASSWORD={}",
    "a variable in quotes": "PGHOST=localhost PGUSER=ann PGDATABASE=todo PGPASSWORD='{}'",
    "an argument": 'connect(host="localhost", user="ann", password="{}", database="todo")',
}

# Rejected, with this text in the message.
REFUSED = {
    "nothing": ("", "the text is empty"),
    "spaces and line ends": (" \r\n", "the text is empty"),
    "only a comment": ("# s3", "not a connection string"),
    "a commented string": (f"# DATABASE_URL={STRING}", "or it is a comment"),
    "a word": ("hello", "not a connection string"),
    "a control character": (f"{STRING}\0", "control characters: copy it again"),
    "half a character": (f"{STRING}\ud800", "control characters: copy it again"),
    # numbers
    "a time with a unit": (
        "postgresql://ann:s3@h1/d?connect_timeout=10s",
        "connect_timeout is not a whole number",
    ),
    "a switch that is a number": (
        "host=h1 user=ann password=s3 dbname=d keepalives=on",
        "keepalives is not a whole number",
    ),
    # placeholders
    ".env.example": ("postgresql://USER:PASSWORD@HOST/DATABASE", "the user is a placeholder"),
    "<password>": (f"postgresql://alex:<password>@{HOST}/neondb", "the password is a placeholder"),
    "[YOUR-PASSWORD]": (f"postgresql://alex:[YOUR-PASSWORD]@{HOST}/neondb", "the password is a pl"),
    "{your_password}": ("host=h1 dbname=d user=ann password={your_password}", "is a placeholder"),
    "<host>": ("postgresql://ann:s3@<host>/todo", "the host is a placeholder"),
    "%DB_PASSWORD%": (f"postgresql://alex:%DB_PASSWORD%@{HOST}/neondb", "is a placeholder"),
    "$pw": ("postgresql://ann:$pw@h1/d", "the password is a placeholder"),
    "%s": ("postgresql://ann:%s@h1/d", "the password is a placeholder"),
    "__PASSWORD__": ("postgresql://ann:__PASSWORD__@h1/d", "the password is a placeholder"),
    "DATABASE": ("postgresql://ann:s3@h1/DATABASE", "the database is a placeholder"),
    "your_password": (f"postgresql://alex:your_password@{HOST}/neondb", "is a placeholder"),
    "xxxxxxxx": (f"PGHOST={HOST} PGUSER=alex PGPASSWORD=xxxxxxxx", "is a placeholder"),
    "a percent-encoded placeholder": ("postgresql://alex:%50ASSWORD@localhost/todo", "placeholder"),
    "the template of Neon's documentation": (
        "postgresql://[user]:[password]@[neon_hostname]/[dbname]?sslmode=require",
        "is a placeholder",
    ),
    "the example of Neon's documentation": (
        "postgresql://alex:AbC123dEf@ep-cool-darkness-a1b2c3d4-pooler.us-east-2.aws.neon.tech/dbname",
        "the host is a placeholder",
    ),
    "a default of Spring's": (f"${{DATABASE_URL:{LOCAL}}}", REPLACED),
    "a default of Django's": (f'DATABASE_URL=config("DATABASE_URL", default="{LOCAL}")', REPLACED),
    "a reference to a vault": ("PGHOST=h PGUSER=ann PGPASSWORD=op://s3/x", "is a placeholder"),
    "a file with the password": ("PGHOST=h PGUSER=ann PGPASSWORD=file:/s3", "is a placeholder"),
    "a variable of Railway": ("DATABASE_URL=${{ Postgres.DATABASE_URL }}", REPLACED),
    "a variable of the shell": ("$DATABASE_URL", REPLACED),
    "a variable in a command": (f'psql "{LOCAL.replace("s3", "s3$w")}"', "has a variable"),
    "a URL made of variables": (
        "\n".join(LINES) + "\nDATABASE_URL=postgresql://${PGUSER}:${PGPASSWORD}@${PGHOST}/x",
        REPLACED,
    ),
    # masked
    "asterisks": (f"postgresql://alex:************@{HOST}/neondb?{QUERY}", "password is masked"),
    "dots": (f"postgresql://alex:npg_••••••@{HOST}/neondb", "the password is masked"),
    "an ellipsis": (f"PGHOST={HOST}\nPGUSER=alex\nPGPASSWORD=npg_s3…", "the password is masked"),
    # parts that are missing
    "no password": (f"postgresql://alex@{HOST}/neondb", "the password is missing"),
    "no password beside variables": (
        f"DATABASE_URL=postgresql://alex@{HOST}/neondb\nPGPASSWORD=s3",
        "the password is missing",
    ),
    "no user": ("postgresql://localhost/todo", "the user is missing"),
    "DBeaver's URL": ("jdbc:postgresql://localhost:5432/todo", "the user is missing"),
    "no host": ("postgresql:///todo", "the host is missing"),
    "no database": (f"postgresql://{LOGIN}@{HOST}", NO_PLACE),
    "an empty database": (f"postgresql://{LOGIN}@{HOST}/", "the database is missing"),
    "no database among variables": (f"PGHOST={HOST}\nPGUSER=alex", "the database is missing"),
    "the scheme alone": ("postgresql://", NO_PLACE),
    "cut off in the password": (f"postgresql://{LOGIN}", NO_PLACE),
    "cut off in the domain": (f"postgresql://{LOGIN}@{HOST[:-3]}", NO_PLACE),
    "cut off in sslmode": (f"{LOCAL}?sslmode=req", "unknown sslmode, perhaps cut off"),
    "cut off in a parameter": (f"{LOCAL}?sslmode=require&channel_b", "perhaps it is cut off"),
    "a host alone": (HOST, "the text is only a host"),
    "a password alone": (PASSWORD, "only a password or an API key"),
    # a URL that is cut off, and another text in the next line
    "cut off, and an address": (
        "postgresql://ann:s3@db.example.com\ngit@github.com/todo",
        "perhaps it is cut off",
    ),
    "cut off, and a prompt": (f"postgresql://ann:s3@{HOST}\nada@mac/todo", "perhaps it is cut off"),
    "cut off in the login": ("postgresql://ann:s3\nbob@h2/db", "perhaps it is cut off"),
    "cut off, and a path": ("postgresql://ann:s3@h1.example\nand/or", "perhaps it is cut off"),
    "cut off in psql": ("psql 'postgresql://ann:s3@h1.example\nada@h2/x'", "several lines"),
    # two values
    "a host in the parameters": (f"{LOCAL}?host=h2", "two different values for the host"),
    "a user in the parameters": (f"{LOCAL}?user=bob", "two different values for the user"),
    "psql and another host": (f"psql {LOCAL} -h h2", "two different values for the host"),
    "two hosts in .NET": (
        "Host=h1;Host=h2;Username=ann;Password=s3;Database=todo",
        "two different values for the host",
    ),
    "a variable twice": ("PGHOST=h1\nPGHOST=h2\nPGUSER=ann", "two different values for the host"),
    "a socket of another port": (
        "host=/tmp/.s.PGSQL.5433 port=5432 user=ann dbname=todo",
        "two different values for the port",
    ),
    "a host and a socket": (
        "PGHOST=localhost\nPGHOST=/tmp\nPGUSER=ann\nPGDATABASE=todo",
        "two different values for the host",
    ),
    "a blank keyword": (
        "host=h1 user=ann password=s3 password=",
        "two different values for the password",
    ),
    "two modes": (f"{LOCAL}?ssl=true&sslmode=disable", "two different values for the sslmode"),
    # parts of two connections
    "two databases": (f"{STRING}\npostgresql://ann:s3@localhost/other", SEVERAL),
    "two of one name": (f"DATABASE_URL={STRING}\nDATABASE_URL={LOCAL}", SEVERAL),
    "a test database beside it": (f"DATABASE_URL={STRING}\nTEST_DATABASE_URL={LOCAL}", SEVERAL),
    "two ports": (f"DB_URL={LOCAL}\nURL={LOCAL.replace('/todo', ':5433/todo')}", SEVERAL),
    "a port in one": (f"DB_URL={LOCAL}\nPGHOST=localhost\nPGPORT=5433", SEVERAL),
    "variables of another": (f"DATABASE_URL={STRING}\nPGHOST=h1", SEVERAL),
    "two families": (
        "PGHOST=h1\nPGUSER=ann\nPGDATABASE=d\nDB_HOST=h2\nDB_USER=ann\nDB_NAME=d\nDB_PASSWORD=s3",
        SEVERAL,
    ),
    "half of two families": ("PGHOST=h1\nPGDATABASE=d\nDB_USER=ann\nDB_PASSWORD=s3", SETTINGS),
    "two blocks": ("DB_HOST=h1\nDB_NAME=d\n\nDB_USER=ann\nDB_PASSWORD=s3", SETTINGS),
    "two blocks of keywords": ("host=h1\ndbname=d\n# old\nuser=ann\npassword=s3", SETTINGS),
    "two sections": ("[a]\nDB_HOST=h1\nDB_NAME=d\n[b]\nDB_USER=ann\nDB_PASSWORD=s3", SETTINGS),
    "keywords and a URL": ("host=h1 user=ann password=s3 dbname=\nbob:s3@h2/d", SETTINGS),
    "half of .NET's and a line": ("Host=h1;Username=ann;Password=s3;\nDB_NAME=d", SETTINGS),
    "JDBC and a URL": ("jdbc:postgresql://h1/d?user=ann\nbob:s3@h2/d", "line 2: there is text"),
    "JDBC, cut off, and a word": ("jdbc:postgresql://h1/d?user=\ns3", "line 2: there is text"),
    "two commands": (f"psql {LOCAL}\npsql postgresql://ann:s3@h2/d", "more than a connection"),
    "a password before a command": ("export PGPASSWORD=s3\npsql -h h1 -U ann d", "one command"),
    "psql and its input": ("psql -h h1 d <<EOF", "more than a connection"),
    "psql and its answer": (f"psql '{LOCAL}'\npsql (17.2)", "more than a connection"),
    "arguments beside a URL": (f'create_engine("{LOCAL}", connect_args={{"host": "h"}})', AROUND),
    # in which line
    "a word in a line": (f"A=1\n\n# b\nDATABASE_URL={LOCAL}\nCopied s3", "line 5: there is text"),
    "a setting in a line": ("A=1\nPGHOST=h1\nPGUSER=ann\nPGHOST=h2", "line 4: there are two diff"),
    "a URL in a line": (f"A=1\r\nDATABASE_URL={LOCAL.replace('s3', 's3@/')}", "line 2: USER:PASS"),
    "another connection in a line": (f"A=1\n{LOCAL}\nB=2\nPGHOST=h1", "line 4: there are parts"),
    "a placeholder in a line": (f"DATABASE_URL={LOCAL}\nHOME=${{S3}}", "line 2: there is a placeh"),
    "another database in a line": (f"A=1\nB=mysql://s3@h\nC={LOCAL}", "line 2: the text is for"),
    # unknown names
    "HOST=db:5432": ("HOST=db:5432", HAS_PORT),
    "HOST: db:5432": ("'HOST': 'db:5432'\n'PASSWORD': 's3'", HAS_PORT),
    "DB_HOST=db:5432": ("DB_HOST=db:5432", HAS_PORT),
    "a port in PGHOST": ("PGHOST=db:5432\nPGUSER=ann\nPGDATABASE=d", HAS_PORT),
    "a port in .NET": ("Host=db:5432;Username=ann;Database=d;Password=s3", HAS_PORT),
    "a port behind a comma": ("Host=db,5432;Username=ann;Database=d;Password=s3", HAS_PORT),
    "a port in psql": ("PGPASSWORD=s3 psql -h db:5432 -U ann d", HAS_PORT),
    "HOST and others": ("HOST=h1\nUSER=ann\nPASSWORD=s3\nNAME=todo", SETTINGS),
    "a word as a name": ("APP_HOST=h1\nAPP_USER=ann\nAPP_PASSWORD=s3\nAPP_NAME=d", SETTINGS),
    "a string as a password": (f"password={STRING.replace('&', '&amp;')}", "a placeholder"),
    "an unknown parameter": (f"{LOCAL}?what=ever", "a parameter that libpq does not know"),
    "an unknown keyword": ("host=h1 user=ann dbname=d secret=s3", SETTINGS),
    "an unknown name in .NET": ("Host=h1;Username=ann;Database=d;Secret=s3", SETTINGS),
    "an unknown flag": (f"psql {LOCAL} --what", "more than a connection"),
    "YAML": ("production:\n  host: h1\n  database: d\n  username: ann\n  password: s3", SETTINGS),
    "JSON": ('{"host": "h1", "user": "ann", "database": "d", "password": "s3"}', SETTINGS),
    # other databases
    "MySQL": ("mysql://ann:s3cr3t@localhost/todo", "another database (mysql)"),
    "MySQL, JDBC": ("jdbc:mysql://localhost/todo?user=ann&password=s3", "another database (mysql)"),
    "MySQL, Laravel": ("DB_CONNECTION=mysql\nDB_HOST=h\nDB_PASSWORD=s3", "database (mysql)"),
    "MySQL, its port": (f"{LOCAL.replace('/todo', ':3306/todo')}", "another database (MySQL)"),
    "MySQL, variables": ("MYSQL_HOST=h1\nMYSQL_USER=ann", "another database (mysql)"),
    "MySQL, its client": ("mysql -h localhost -u ann -ps3 todo", "another database (mysql)"),
    "MySQL, Django": ("'ENGINE': 'django.db.backends.mysql', 'PASSWORD': 's3'", "(mysql)"),
    "SQLite": ("sqlite:///todo.db", "another database (sqlite)"),
    "MySQL, its other port": (f"{LOCAL.replace('/todo', ':33060/todo')}", "database (MySQL)"),
    "SQLite, JDBC": ("jdbc:sqlite:s3.db", "another database (sqlite)"),
    "SQLite, Prisma": ('DATABASE_URL="file:./s3.db"', "a file, such as SQLite's"),
    "SQLite, its file": ("DATABASE_URL=s3.sqlite3", "a file, such as SQLite's"),
    "Oracle": ("jdbc:oracle:thin:ann/s3@//localhost:1521/todo", "another database (oracle)"),
    "SQL Server": (
        "Server=tcp:s3.database.windows.net,1433;Initial Catalog=d;User ID=ann;Password=s3;",
        "another database (sql server)",
    ),
    "SQL Server, JDBC": (
        "jdbc:sqlserver://localhost;databaseName=todo;user=ann;password=s3",
        "another database (sqlserver)",
    ),
    **{
        f"SQL Server, {host}": (
            f"Server={host};Database=d;User Id=ann;Password=s3",
            "another database (sql server)",
        )
        for host in ["tcp:h1", "h1,1433", "h1, 5000", ".", "(local)", r".\SQLEXPRESS", r"h1\DEV"]
    },
    "SQL Server, its user": ("Server=h1;Database=d;User Id=sa;Password=s3", "(sql server)"),
    "MongoDB": ("mongodb+srv://ann:s3cr3t@h/d", "another database (mongodb)"),
    "Redis beside it": (f"DATABASE_URL={LOCAL}\nREDIS_URL=redis://:s3@h", "database (redis)"),
    "Prisma's proxy": ("prisma+postgres://x.net/?api_key=s3cr3t", "another database (prisma)"),
    # other things altogether
    "the console's page": ("https://console.neon.tech/app/projects/s3cr3t", "URL of a web page"),
    "the same without https://": ("console.neon.tech/app/projects/s3cr3t", "URL of a web page"),
    "an unknown scheme": ("s3cr3t://ann", "another scheme"),
    "a misspelled scheme": (f"postgress://{REST}", "another scheme"),
    "no scheme": (REST, "not a connection string"),
    "an error of psql": (
        f'psql: error: connection to server at "{HOST}" (1.2.3.4), port 5432 failed: s3cr3t',
        "an error message",
    ),
    "a sentence around it": (f"Here is the string: {STRING}, use it with care.", AROUND),
    "a comment behind a setting": ("PORT=1 # postgresql://ann:s3@localhost/old", AROUND),
    "a comment behind a word": ("PORT # postgresql://ann:s3@localhost/old", AROUND),
    "a word in the next line": (f"{LOCAL}\nCopied", AROUND),
    # where a URL ends
    ",OTHER_KEY=abc": (f"{LOCAL},OTHER_KEY=abc", FOLLOWS),
    ";OTHER=1": (f"{LOCAL};OTHER=1", FOLLOWS),
    "</url>": (f"{LOCAL}</url>", FOLLOWS),
    "#comment": (f"{LOCAL}#s3", FOLLOWS),
    ",OTHER_KEY=abc behind parameters": (f"{STRING},OTHER_KEY=abc", FOLLOWS),
    ";OTHER=1 behind parameters": (f"{STRING};OTHER=1", FOLLOWS),
    "</url> behind parameters": (f"{STRING}</url>", FOLLOWS),
    "a space in the database": ("postgresql://ann:s3@localhost/to do", FOLLOWS),
    "a slash after the database": (f"{LOCAL}/", FOLLOWS),
    # values that libpq does not know
    "a slash behind sslmode": (f"{LOCAL}?sslmode=require/", "unknown sslmode"),
    "a sign behind sslmode": (f"{LOCAL}?sslmode=require!", "unknown sslmode"),
    "a sign in a mode": (f"{LOCAL}?sslmode=verify:full", "unknown sslmode"),
    "a dot in a mode": (f"{LOCAL}?channel_binding=re.quire", "unknown channel_binding"),
    "a sign in a name": (f"{LOCAL}?sslmode!=require", "a parameter that libpq does not know"),
    # what may be a part of the password, or not
    "Azure's user with its server": (
        f"postgresql://ann@srv:s3@{AZURE}:5432/todo",
        'USER:PASSWORD is unclear: write "@" in the user as %40',
    ),
    "an address for a user": ("postgresql://ann@h2.example:s3@h1/todo", "in the user as %40"),
    "a link with ) in the password": (
        f"postgresql://alex:[npg_@s3/)1@{HOST}](mailto:npg_@s3/)1@{HOST})/neondb",
        UNCLEAR,
    ),
    "another text in the link": (f"postgresql://alex:[s3@{HOST}](mailto:s4@{HOST})/d", NO_PLACE),
    "no colon in the log-in": (f"postgresql://alex@s3cr3t@{HOST}/neondb", UNCLEAR),
    "an @ in password or database": ("postgresql://ann:s3@h1/s3@h2/todo", UNCLEAR),
    "an @ in a parameter": (f"{LOCAL}?application_name=me@work/todo", UNCLEAR),
    "a port before a slash": ("postgresql://ann:3/s3@localhost/todo", UNCLEAR),
    "two strings in one": (f'"{LOCAL}" "{LOCAL}"', FOLLOWS),
    "a setting in the next line": ("postgresql://ann:s3\nMAIL=s3@h1/todo", NO_PLACE),
    "a space in the password": ("'postgresql://ann:s3 cr3t@localhost/todo'", NO_PLACE),
    "a bare %": ("postgresql://ann:s3%@h1/d", "starts no code"),
    "a code and a bare %": ("postgresql://ann:s3%cr%20@h1/d", "starts no code"),
    "a code that is no UTF-8": ("postgresql://ann:s3%FF@localhost/todo", "is not text"),
    "other letters behind it": (f"{LOCAL}\u3092", FOLLOWS),
    "a code for a line end": (f"{LOCAL}%0A", "is not text"),
    "a code for NUL": ("postgresql://ann:s3%00@localhost/todo", "is not text"),
    "a bad code in a parameter": (f"{LOCAL}?options=%FF", "is not text"),
    "two hosts": ("postgresql://ann:s3cr3t@one,two/todo", NO_PLACE),
    "two hosts among keywords": ("host=one,two user=ann dbname=d", "several hosts"),
    "a page instead of a host": ("PGHOST=https://h1 PGUSER=ann PGDATABASE=d", "more than one word"),
    "letters in the port": ("postgresql://ann:s3@localhost:s3/todo", NO_PLACE),
    "port 0": ("postgresql://ann:s3@localhost:0/todo", "from 1 to 65535"),
    "port 65536": ("postgresql://ann:s3@localhost:65536/todo", "from 1 to 65535"),
    "an empty keyword": ("host=h user=ann dbname=d password= sslmode=require", SETTINGS),
    "an empty flag": ("psql -h h1 -U -d d", "a flag has no value"),
    "-h=h1": ("psql -h=h1 -U ann d", "a flag has no value: write -h HOST"),
    "sudo": ("sudo -u postgres psql s3", ELSEWHERE),
    "sudo and a prompt": ("ada@mac:~$ sudo psql -h h1 -U ann s3", ELSEWHERE),
    "docker exec": (f"docker exec -it db psql {LOCAL}", ELSEWHERE),
    "docker compose": ("docker compose exec db psql -h localhost -U ann s3", ELSEWHERE),
    "kubectl": (f"kubectl exec -it db-0 -- psql '{LOCAL}'", ELSEWHERE),
    "ssh": ("ssh h1 PGPASSWORD=s3 psql -h localhost -U ann d", ELSEWHERE),
    "su": ("su - postgres -c 'psql -h localhost -U ann s3'", ELSEWHERE),
    "a space in a keyword's value": ("host=h user=ann dbname=d password=s3 cr3t", SETTINGS),
    "an open quote in a command": ("psql -h h1 -U ann -d 's3", "is not closed"),
    "a semicolon in a variable": ("PGHOST=h\nPGUSER=ann\nPGDATABASE=d\nPGPASSWORD=s3;c", SETTINGS),
    "4,000 characters": (f"postgresql://ann:{'s3' * 2000}@localhost/todo", "is too long"),
    "100 kB": ("s3 \n" * 25_000, "is too long"),
}
