"""The app. `uv run main.py` serves it for development; a server runs `uvicorn main:app`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Request, status
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse

from config import ENV_FILE, PROJECT_DIR, VERSION, Settings, get_settings
from db import Database, DatabaseUnavailable
from routes import health


def create_app(settings: Settings) -> FastAPI:
    """Build the app. The database is reached when the first request needs it, not before."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        database = Database(settings)
        app.state.database = database
        app.state.readiness = health.Readiness(database)
        yield
        database.close()

    app = FastAPI(
        title=settings.app_name,
        version=VERSION,
        lifespan=lifespan,
        # Client generators make function names of these: get_health, getHealth.
        generate_unique_id_function=lambda route: route.name,
    )
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.frontend_url,
        allow_credentials=True,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["Link", "Location", "Retry-After"],
    )
    app.add_exception_handler(DatabaseUnavailable, answer_unavailable)
    app.include_router(health.router)
    return app


async def answer_unavailable(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(
        {"detail": str(error)},
        status.HTTP_503_SERVICE_UNAVAILABLE,
        headers={"Retry-After": str(health.RETRY_SECONDS)},
    )


def serve(settings: Settings) -> None:
    """Serve the app on this machine; in development anew after each change of a file."""
    if settings.database_url.is_embedded:
        import local_postgres  # noqa: PLC0415  (a development dependency, absent in production)

        local_postgres.ensure_running(ENV_FILE)
    uvicorn.run(
        "main:app",
        app_dir=str(PROJECT_DIR),
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level.lower(),
        reload=settings.environment == "development",
        reload_dirs=[str(PROJECT_DIR)],
    )


app = create_app(get_settings())

if __name__ == "__main__":
    serve(get_settings())
