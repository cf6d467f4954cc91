"""The program of the embedded S3 server: moto on a socket that its starter has bound and passes as standard input.

Run as a file, not as a module, so that it needs nothing but moto. Its argument is not used by it: it shows in `ps`
which stack it belongs to.
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
    os.chdir("/")  # keep no folder of the starter busy
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else every request is a line in the log
    with socket.socket(fileno=os.dup(0)) as inherited:
        host, port = inherited.getsockname()
    app = DomainDispatcherApplication(create_backend_app)
    make_server(host, port, app, threaded=True, request_handler=MotoRequestHandler, fd=0).serve_forever()


if __name__ == "__main__":
    main()
