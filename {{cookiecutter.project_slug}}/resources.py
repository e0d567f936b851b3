"""What the app opens when it starts and closes when it ends: main.py fills it, requests use it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi.requests import HTTPConnection

if TYPE_CHECKING:  # these modules import this one
    from sqlalchemy.ext.asyncio import AsyncEngine

    from auth import TokenVerifier
    from auth.passwords import Passwords, Throttle
    from config import Settings
    from db import Replica
    from mail import Mailer
    from pagination import Cursors, UserLimit
    from postgres.outage_log import Availability
    from routes.health import Readiness
    from routes.new_tasks import Quota


@dataclass(frozen=True, slots=True)
class Resources:
    """One per app, as `app.state.resources`."""

    settings: "Settings"
    engine: "AsyncEngine"
    replica: "Replica | None"
    availability: "Availability"
    readiness: "Readiness"
    cursors: "Cursors"
    user_limit: "UserLimit"
    quota: "Quota"
    verifier: "TokenVerifier"
    passwords: "Passwords"
    throttle: "Throttle"
    mailer: "Mailer"


def resources(connection: HTTPConnection) -> Resources:
    """Return the resources of the app that a request came to."""
    found: Resources = connection.app.state.resources
    return found
