"""Everything about reaching PostgreSQL: from a string that somebody pasted to an engine.

It imports nothing of the app, so it can be read, tested and changed without it. The app imports
from these modules only; what is in the others may change (tests/test_structure.py):

- url: a connection string, checked and complete; `DatabaseUrl`, `parse`
- env_file: creates and changes `.env`
- prompt: asks for a connection string without showing it
- console: what the commands print
- embedded: the PostgreSQL of development and tests, from a wheel
- connect: one log-in, with patience where a compute wakes up
- check: the way to the database step by step, for `manage.py check`
- copy_data: copies all rows of one database into another
- findings: all that can be wrong with a database, and what to do
- explain: from an error to its finding
- outage_log: what the log says when the database goes and comes back
- engine: SQLAlchemy's asynchronous engine, and the queue for its connections
- dialect: psycopg2 on the event loop, and the time limit of what a request asks
- statements: statements that are compiled once
- tests.servers, tests.scripted_server, tests.counting_proxy: for the app's tests

Behind them: `pasted` understands what people paste, and `copy_tables` copies the rows.
"""
