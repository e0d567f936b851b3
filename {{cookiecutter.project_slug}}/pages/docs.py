"""/docs and /redoc, with files that the package fastapi-offline ships.

FastAPI's own pages load theirs from other people's servers: without internet they stay empty, and
with it those servers learn who reads them. These load nothing from elsewhere.
"""

from html import escape
from importlib.resources import files

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

from pages.policy import hashes_of, secure_page

FILES = "/docs/files"
PACKAGE, FOLDER = "fastapi_offline", "static"
LOGO = b"https://cdn.redoc.ly/redoc/logo-mini.svg"  # Redoc would fetch it each time
SOURCES = {
    "style-src": "'self' 'unsafe-inline'",  # both make styles as they run
    "img-src": "'self' data:",
    "worker-src": "blob:",  # Redoc's search
}

router = APIRouter(include_in_schema=False)


def add_docs(app: FastAPI) -> None:
    """Serve /docs, /redoc and their files. The app has to serve /openapi.json."""
    app.include_router(router)
    app.mount(FILES, StaticFiles(packages=[(PACKAGE, FOLDER)]))


@router.get("/docs")
async def get_swagger_ui(request: Request) -> HTMLResponse:
    """Serve Swagger UI, to try the API with."""
    root = root_of(request)
    page = get_swagger_ui_html(
        openapi_url=f"{root}{request.app.openapi_url}",
        title=escape(request.app.title),
        swagger_js_url=f"{root}{FILES}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{FILES}/swagger-ui.css",
        swagger_favicon_url=f"{root}{FILES}/favicon.png",
        swagger_ui_parameters={"displayRequestDuration": True, "validatorUrl": None},
    )
    return secured(page)


@router.get("/redoc")
async def get_redoc(request: Request) -> HTMLResponse:
    """Serve Redoc, to read about the API."""
    root = root_of(request)
    page = get_redoc_html(
        openapi_url=f"{root}{request.app.openapi_url}",
        title=escape(request.app.title),
        redoc_js_url=f"{root}{FILES}/redoc.standalone.js",
        redoc_favicon_url=f"{root}{FILES}/favicon.png",
        with_google_fonts=False,
    )
    return secured(page)


@router.get(f"{FILES}/redoc.standalone.js")
def get_redoc_script() -> Response:
    """Serve Redoc's script without the address of its makers' logo."""
    script = files(PACKAGE).joinpath(FOLDER, "redoc.standalone.js").read_bytes()
    return Response(
        script.replace(LOGO, b"data:,"),
        media_type="text/javascript",
        headers={"Cache-Control": "max-age=86400"},
    )


def root_of(request: Request) -> str:
    """Return the prefix under which a proxy serves the app, if there is one."""
    root: str = request.scope.get("root_path", "")
    return root.rstrip("/")


def secured(page: HTMLResponse) -> HTMLResponse:
    html = bytes(page.body).decode()
    scripts = f"'self' {hashes_of('script', html)}".strip()
    return secure_page(html, SOURCES | {"script-src": scripts})
