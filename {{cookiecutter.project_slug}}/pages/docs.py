"""/docs and /redoc, with the files of the package fastapi-offline.

FastAPI's own pages load these files from a CDN: without internet access they stay empty, and with
it the CDN sees who opens them. These pages load nothing from other servers.
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
LOGO = b"https://cdn.redoc.ly/redoc/logo-mini.svg"  # Redoc would load it on each visit
SOURCES = {
    "style-src": "'self' 'unsafe-inline'",  # both pages add styles while they run
    "img-src": "'self' data:",
    "worker-src": "blob:",  # Redoc's search
}

router = APIRouter(include_in_schema=False)


def add_docs(app: FastAPI) -> None:
    """Serve /docs, /redoc and their files. The app must serve /openapi.json."""
    app.include_router(router)
    app.mount(FILES, StaticFiles(packages=[(PACKAGE, FOLDER)]))


@router.get("/docs")
async def get_swagger_ui(request: Request) -> HTMLResponse:
    """Serve Swagger UI, for trying the API."""
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
    """Serve Redoc, for reading about the API."""
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
    """Serve Redoc's script, without the logo that it would load from another server."""
    script = files(PACKAGE).joinpath(FOLDER, "redoc.standalone.js").read_bytes()
    return Response(
        script.replace(LOGO, b"data:,"),
        media_type="text/javascript",
        headers={"Cache-Control": "max-age=86400"},
    )


def root_of(request: Request) -> str:
    """Return the path prefix under which a proxy serves the app; empty without one."""
    root: str = request.scope.get("root_path", "")
    return root.rstrip("/")


def secured(page: HTMLResponse) -> HTMLResponse:
    html = bytes(page.body).decode()
    scripts = "'self'"
    if hashes := hashes_of("script", html):
        scripts = f"{scripts} {hashes}"
    return secure_page(html, SOURCES | {"script-src": scripts})
