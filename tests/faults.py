"""An S3 endpoint with faults: passes everything on to the real server but for what it is told about."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

#: What S3 answers, by HTTP status.
_ANSWERS = {
    403: "AccessDenied",
    404: "NoSuchKey",
    412: "PreconditionFailed",
    503: "SlowDown",
}


@dataclass(frozen=True)
class Fault:
    """What is wrong with one answer."""

    #: This HTTP status instead; 0: the real one.
    status: int = 0
    #: The connection is closed after half of the body that was announced.
    cut: bool = False
    #: If-Match is ignored, as some servers do: whatever is there is sent.
    deaf: bool = False
    #: It is sent with the ETag that was asked for.
    lies: bool = False


@contextmanager
def faulty_s3(endpoint_url: str, faults: Mapping[str, int | list[int]] | Callable[[str, str], Fault]) -> Iterator[str]:
    """The URL of a server that answers a GET or HEAD of a key in `faults` with that status; they may
    be changed while it runs. A list is of one status for each request to come, 0 to let it through.

    Or `faults` is asked for each GET and HEAD of a key, from several threads, with the method and the key.
    """
    wrong = faults if callable(faults) else _by_key(faults)
    upstream = urlsplit(endpoint_url)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body are written one after the other; with the algorithm each answer waits 40 ms.
        disable_nagle_algorithm = True

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            _, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
            fault = wrong(self.command, key) if key and self.command in ("GET", "HEAD") else Fault()
            if fault.status:
                text = f"<Error><Code>{_ANSWERS[fault.status]}</Code><Message>fault</Message></Error>".encode()
                self._answer(fault.status, [("Content-Type", "application/xml")], text)
                return
            connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=30)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            headers["Host"] = upstream.netloc
            wanted = headers.pop("If-Match", None) if fault.deaf else None
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            kept = [
                (name, value)
                for name, value in answer.getheaders()
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date")
            ]
            if wanted and fault.lies:
                kept = [(name, wanted if name.lower() == "etag" else value) for name, value in kept]
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            if fault.cut and self.command == "GET":
                length, content = str(len(content)), content[: len(content) // 2]
                self.close_connection = True
            self._answer(answer.status, kept, content, length)
            connection.close()

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: str | None = None) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _by_key(faults: Mapping[str, int | list[int]]) -> Callable[[str, str], Fault]:
    def wrong(_: str, key: str) -> Fault:
        status = faults.get(key, 0)
        if isinstance(status, list):
            status = status.pop(0) if status else 0
        return Fault(status)

    return wrong
