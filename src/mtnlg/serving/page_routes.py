"""The web chat page as routes of the server's app."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from mtnlg.serving.page_files import PageFile, page_files

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response


def add_page_routes(app: Starlette) -> None:
    """Serve the page at ``/`` and its parts at ``/page/NAME`` (GET and HEAD), without a key.

    The routes stay out of the OpenAPI description: they are for browsers.
    """
    for path, file in page_files().items():
        app.add_route(path, _answer_with(file), methods=["GET"], include_in_schema=False)


def _answer_with(file: PageFile) -> Callable[[Request], Awaitable[Response]]:
    from starlette.responses import Response

    async def answer(request: Request) -> Response:
        if file.headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=dict(file.headers))
        return Response(file.content, media_type=file.media_type, headers=dict(file.headers))

    return answer
