"""The files of the web chat page, with the headers that keep it to itself.

The page is plain HTML, CSS and ES modules. ``/`` is its index, ``/page/NAME`` the rest; it asks nothing
of any other origin, and the Content-Security-Policy makes the browser hold it to that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}

# Scripts, styles and connections from this origin only, nothing written into the page as code: with
# trusted types required, even a mistake that hands a model's words to innerHTML throws instead.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


@dataclass(frozen=True)
class PageFile:
    """One file of the page, ready to be sent.

    Args:
        content: the bytes.
        media_type: value of Content-Type.
        headers: further headers. The browser asks again at each visit (``no-cache``) and is told by
            ``ETag`` that nothing has changed, so a new version of the server has a new page at once.
    """

    content: bytes
    media_type: str
    headers: Mapping[str, str]


@cache
def page_files() -> Mapping[str, PageFile]:
    """Every file of the page by its URL path: ``/`` and ``/page/NAME``."""
    found = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in MEDIA_TYPES:
            found["/" if path.name == INDEX else f"/page/{path.name}"] = _read(path)
    return found


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    tag = hashlib.sha256(content).hexdigest()[:20]
    headers = {**SECURITY_HEADERS, "Cache-Control": "no-cache", "ETag": f'"{tag}"'}
    return PageFile(content, MEDIA_TYPES[path.suffix], headers)
