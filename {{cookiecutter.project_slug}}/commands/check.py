"""What `manage.py check` tests: the settings, the database, and the replica."""

import os
from collections.abc import Iterator
from dataclasses import replace

import config
from postgres.check import Check, check_connection
from postgres.connect import OnWait
from postgres.explain import BY_NAME
from postgres.url import DatabaseUrl

REPLICA_ADVICE = "correct READ_DATABASE_URL, or remove it; meanwhile, lists come from the primary"


def run_checks(on_wait: OnWait) -> Iterator[Check]:
    """Yield the results: of the settings, of each step of the connection, and of the replica."""
    try:
        settings = config.load_settings(config.ENV_FILE)
    except config.SettingsError as error:
        finding = BY_NAME["settings-wrong"]
        for mistake in error.mistakes:
            yield Check("settings", False, mistake.problem, mistake.advice, finding)
        return
    config.clear_libpq_variables(settings)
    source = "the environment" if "DATABASE_URL" in os.environ else ".env"
    yield Check("settings", ok=True, detail=f"complete; DATABASE_URL comes from {source}")
    url = settings.database_url
    yield from check_connection(url, history, on_wait, columns)
    if settings.read_database_url:
        yield check_replica(settings.read_database_url, on_wait)


def check_replica(url: DatabaseUrl, on_wait: OnWait) -> Check:
    """Return the first problem with READ_DATABASE_URL, other than that it is read-only."""
    for check in check_connection(url, history, on_wait):
        if check.finding and check.finding.name != "read-only":  # as a replica should be
            detail = f"{check.name}: {check.detail}"
            return replace(check, name="replica", detail=detail, advice=REPLICA_ADVICE)
    return Check("replica", ok=True, detail=f"lists come from {url.address}")


def history() -> list[str]:
    import migrations  # with SQLAlchemy and Alembic, which only the last steps need

    return migrations.history()


def columns() -> set[str]:
    import migrations

    return migrations.columns()
