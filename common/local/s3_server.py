"""The program of the embedded S3 server: moto on a socket that the starting process has bound and passes as stdin.

Run as a file, not as a module, so that it needs nothing but moto. The program ignores its argument, which shows in `ps`
to which stack the process belongs.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server


def main() -> None:
    os.chdir("/")  # so that it keeps no folder in use
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else every request is a line in the log
    with socket.socket(fileno=os.dup(0)) as inherited:
        host, port = inherited.getsockname()
    app = DomainDispatcherApplication(create_backend_app)
    make_server(host, port, app, threaded=True, request_handler=MotoRequestHandler, fd=0).serve_forever()


if __name__ == "__main__":
    main()
