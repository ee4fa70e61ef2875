"""A server that speaks the API and does as a test tells it: slow, broken, busy. And a browser."""

import json
import math
import shutil
import socket
import threading
import time

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse

from mtnlg.serving.page_routes import add_page_routes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MODEL = {"id": "pretend", "object": "model", "created": 0, "owned_by": "mtnlg"}
SECONDS = 60  # a test that waits longer than this has failed


def chat_chunk(text="", finish=None, token=None, others=()):
    logprobs = None
    if token is not None:
        top = [{"token": name, "logprob": math.log(share), "bytes": None} for name, share in others]
        share = dict(others).get(token, 0.01)
        logprobs = {"content": [{"token": token, "logprob": math.log(share), "top_logprobs": top}]}
    choice = {"index": 0, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": finish}
    return {"object": "chat.completion.chunk", "choices": [choice]}


def text_chunk(text="", finish=None, token=None, others=()):
    logprobs = None
    if token is not None:
        top = {name: math.log(share) for name, share in others}
        logprobs = {"tokens": [token], "token_logprobs": [top.get(token, -5.0)], "top_logprobs": [top]}
    choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish}
    return {"object": "text_completion", "choices": [choice]}


def split(text):
    """Tokens of a text, roughly as a tokenizer makes them: words with their space, or characters."""
    tokens = []
    for letter in text:
        joins = tokens and letter.isascii() and letter.isalpha() and tokens[-1][-1:].isascii()
        if joins and (tokens[-1][-1].isalpha() or tokens[-1] == " "):
            tokens[-1] += letter
        else:
            tokens.append(letter)
    return tokens


class Pretend:
    """The app. A test sets ``answers`` (text of each answer in turn, the last one stays), ``failures``
    (responses given first), ``breaks_after`` (tokens after which the stream is cut) and ``gate`` (tokens
    that may be sent; ``None`` does not hold back). ``requests`` is what arrived."""

    def __init__(self):
        self.answers = ["Hello there."]
        self.failures = []
        self.breaks_after = None
        self.seconds_per_token = 0.0
        self.gate = None
        self.key = None
        self.models = [MODEL]
        self.requests = []
        self.disconnected = threading.Event()
        self.app = Starlette()
        add_page_routes(self.app)
        self.app.add_route("/v1/models", self.list_models)
        self.app.add_route("/v1/chat/completions", self.complete, methods=["POST"])
        self.app.add_route("/v1/completions", self.complete, methods=["POST"])

    def refusal(self, request):
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return failure(401, "Incorrect API key provided.")
        return None

    async def list_models(self, request):
        return self.refusal(request) or JSONResponse({"object": "list", "data": self.models})

    async def complete(self, request):
        body = await request.json()
        self.requests.append(body)
        if refused := self.refusal(request):
            return refused
        if self.failures:
            return self.failures.pop(0)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        make = chat_chunk if "messages" in body else text_chunk
        return StreamingResponse(self.stream(body, answer, make), media_type="text/event-stream")

    async def stream(self, body, answer, make):
        import anyio

        tokens = split(answer)
        try:
            for at, token in enumerate(tokens):
                while self.gate is not None and at >= self.gate:
                    await anyio.sleep(0.005)
                await anyio.sleep(self.seconds_per_token)
                if at == self.breaks_after:
                    raise RuntimeError("the stream breaks here, as the test wants")
                others = [(token, 0.6), (f"{token}~", 0.2), ("other", 0.1), ("a", 0.05), ("b", 0.02)]
                with_top = others if body.get("logprobs") else ()
                yield event(make(token, token=token if with_top else None, others=with_top))
            yield event(make(finish="stop"))
            usage = {"prompt_tokens": 3, "completion_tokens": len(tokens), "total_tokens": 3 + len(tokens)}
            yield event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        finally:
            self.disconnected.set()


def event(chunk):
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def failure(status, message="no", headers=None, **more):
    return JSONResponse({"error": {"message": message, "code": None, **more}}, status, headers)


class Served:
    """An app on a free port of this machine, in a thread."""

    def __init__(self, app):
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)

    def __enter__(self):
        self.thread.start()
        end = time.monotonic() + SECONDS
        while not self.server.started and time.monotonic() < end:
            time.sleep(0.005)
        assert self.server.started
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(SECONDS)
        self.socket.close()
