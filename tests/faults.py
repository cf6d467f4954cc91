"""An S3 endpoint with faults: passes everything on to the real server but for the keys it is told about."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

#: What S3 answers, by HTTP status.
_ANSWERS = {
    403: "AccessDenied",
    404: "NoSuchKey",
    412: "PreconditionFailed",
    503: "SlowDown",
}


@contextmanager
def faulty_s3(endpoint_url: str, faults: Mapping[str, int | list[int]]) -> Iterator[str]:
    """The URL of a server that answers a GET or HEAD of a key in `faults` with that status; they may
    be changed while it runs. A list is of one status for each request to come, 0 to let it through."""
    upstream = urlsplit(endpoint_url)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body are written one after the other; with the algorithm each answer waits 40 ms.
        disable_nagle_algorithm = True

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            _, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
            status = faults.get(key) if self.command in ("GET", "HEAD") else None
            if isinstance(status, list):
                status = status.pop(0) if status else 0
            if status:
                text = f"<Error><Code>{_ANSWERS[status]}</Code><Message>fault</Message></Error>".encode()
                self._answer(status, [("Content-Type", "application/xml")], text)
                return
            connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=30)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            headers["Host"] = upstream.netloc
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            kept = [
                (name, value)
                for name, value in answer.getheaders()
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date")
            ]
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
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
