"""Serve an app with one uvicorn worker until the parent process ends, however that ends.

`python serve.py MODULE:APP DESCRIPTOR`, with a pipe as standard input. The descriptor is that of a
listening socket, so that no other program can take the port in between.
"""

import os
import socket
import sys
import threading

import uvicorn

KEEP_ALIVE_SECONDS = 75  # no client loses its connection between two measurements


def end_with_parent() -> None:
    sys.stdin.read()  # the system closes the pipe
    os._exit(0)


def main() -> None:
    app, descriptor = sys.argv[1:]
    threading.Thread(target=end_with_parent, daemon=True).start()
    server = uvicorn.Server(uvicorn.Config(app, timeout_keep_alive=KEEP_ALIVE_SECONDS))
    server.run(sockets=[socket.socket(fileno=int(descriptor))])


if __name__ == "__main__":
    main()
