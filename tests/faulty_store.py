"""An S3 server on loopback that fails on a schedule: moto behind a small middleware."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "parts"
HANG = 2.0  # seconds, more than READ_TIMEOUT
READ_TIMEOUT = 1.0
KINDS = ("500", "503", "hang", "cut", "short", "lost")
ERRORS = {"500": ("500 Internal Server Error", "InternalError"), "503": ("503 Slow Down", "SlowDown")}


class Faults:
    """Lets requests through, or fails the n-th in the way that a seeded schedule says.

    ``500`` and ``503`` do nothing and say so; ``hang`` does nothing and answers too late; ``lost`` does what
    was asked and answers 500; ``cut`` ends a body early; ``short`` does so and says that this was all.
    """

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app
        self.requests: list[tuple[str, str]] = []  # (method, path)
        self.injected: Counter[str] = Counter()
        self._schedule: Iterator[str] | None = None
        self._methods: tuple[str, ...] = ()
        self._lock = threading.Lock()

    @contextmanager
    def failing(
        self, rate: float, seed: int, kinds: tuple[str, ...] = KINDS, methods: tuple[str, ...] = ()
    ) -> Iterator[Counter[str]]:
        """While it lasts, requests (of ``methods``, if any are named) fail at ``rate``; yields how many."""
        rng = random.Random(seed)
        self.injected.clear()
        self._methods = methods
        self._schedule = (rng.choice(kinds) if rng.random() < rate else "" for _ in iter(int, 1))
        try:
            yield self.injected
        finally:
            self._schedule = None

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._lock:
            self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
            concerned = not self._methods or environ["REQUEST_METHOD"] in self._methods
            kind = next(self._schedule) if self._schedule and concerned else ""
        if kind in ("cut", "short") and environ["REQUEST_METHOD"] != "GET":
            kind = ""
        self.injected.update([kind] * bool(kind))
        if not kind:
            return self.app(environ, start_response)
        if kind == "hang":
            time.sleep(HANG)
        if kind in ("500", "503", "hang", "lost"):
            if kind == "lost":
                list(self.app(environ, lambda *_: None))
            else:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status, code = ERRORS["503" if kind == "503" else "500"]
            body = f"<Error><Code>{code}</Code><Message>injected {kind}</Message></Error>".encode()
            body = b"" if environ["REQUEST_METHOD"] == "HEAD" else body
            start_response(status, [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
            return [body]
        return self._cut(environ, start_response, told=kind == "short")

    def _cut(self, environ: dict[str, Any], start_response: Any, *, told: bool) -> Iterable[bytes]:
        answer: list[Any] = []
        body = b"".join(self.app(environ, lambda *args: answer.extend(args[:2])))
        half = body[: len(body) // 2]
        length = len(half) if told else len(body)
        headers = [(k, v) for k, v in answer[1] if k.lower() not in ("content-length", "content-encoding")]
        headers = [(k, v) for k, v in headers if not k.lower().startswith("x-amz-checksum")]
        start_response(answer[0], [*headers, ("Content-Length", str(length))])
        return [half]


class _Quiet(WSGIRequestHandler):
    def log(self, *args: Any) -> None:
        pass


@contextmanager
def s3_server() -> Iterator[Faults]:
    """The server, this process and those that it starts set to use it, and an empty bucket."""
    faults = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faults, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    options = {"config_kwargs": {"read_timeout": READ_TIMEOUT}}
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "FSSPEC_S3": json.dumps(options),
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    fsspec.config.conf["s3"] = options  # what FSSPEC_S3 says to processes that start later
    try:
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().makedirs(BUCKET, exist_ok=True)  # moto keeps its buckets as long as its process
        yield faults
    finally:
        fsspec.config.conf.pop("s3", None)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.shutdown()
        thread.join()
