"""Everything about connecting to PostgreSQL: from a pasted connection string to an engine.

It imports nothing from the app, so it can be read, tested and changed on its own. The app imports
only from these modules (tests/test_structure.py); all others may change:

- url: connection strings, checked and completed: `DatabaseUrl`, `parse`
- env_file: creates and changes `.env`
- console: what the commands print
- choose: chooses the database that `.env` names
- migrate: runs migrations, on a database that may be asleep
- embedded_commands: `manage.py postgres`
- embedded: the PostgreSQL server for development and tests, from a wheel
- connect: logs in, with retries and time limits
- check: checks the connection step by step, for `manage.py check`
- copy_data: copies all rows of one database into another
- findings: everything that can be wrong with a database, and what to do
- explain: finds out what an error means
- outage_log: logs when the database is lost and when it is back
- engine: SQLAlchemy's asynchronous engine, and the queue for its connections
- deadline: time limits for what a request does in the database
- dialect: psycopg2 on the event loop
- statements: statements that are compiled only once
- tests.servers, tests.scripted_server, tests.counting_proxy, tests.terminal: for the app's tests

Behind them: `prompt` asks for a connection string without showing it, `pasted` parses what people
paste, and `copy_tables` copies rows.
"""
