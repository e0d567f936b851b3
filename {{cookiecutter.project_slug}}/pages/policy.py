"""Content-Security-Policy: a page allows only the scripts and styles that it names."""

import base64
import hashlib
import re
from collections.abc import Mapping

from fastapi.responses import HTMLResponse


def secure_page(html: str, sources: Mapping[str, str]) -> HTMLResponse:
    """Return a page as a response. sources: more directives of its policy, by name."""
    policy = {
        "default-src": "'none'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        **sources,
    }
    directives = (f"{name} {value}" for name, value in policy.items())
    return HTMLResponse(html, headers={"Content-Security-Policy": "; ".join(directives)})


def hashes_of(tag: str, html: str) -> str:
    """Return the hashes of a page's inline scripts or styles, as a policy lists them."""
    inline = re.findall(rf"<{tag}(?: type=\S+)?>(.*?)</{tag}>", html, re.DOTALL)
    digests = (hashlib.sha256(content.encode()).digest() for content in inline)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
