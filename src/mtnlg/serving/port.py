"""The address to listen on, taken before anything heavy is imported."""

from __future__ import annotations

import errno
import socket

from mtnlg.config.errors import MtnlgError
from mtnlg.config.serving import ServerConfig


class PortError(MtnlgError, OSError):
    """The address cannot be listened on."""


def listen(config: ServerConfig) -> socket.socket:
    """A socket that listens on the address; what connects waits until the server runs.

    Raises:
        PortError: it is taken, or not this machine's.
    """
    try:
        found = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise PortError(f"--host is {config.host!r}: no such address ({error.strerror}).") from error
    family, kind, number, _name, address = found[0]
    listener = socket.socket(family, kind, number)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        where = f"{config.host}:{config.port}"
        reasons = {
            errno.EADDRINUSE: "something listens there already: choose another --port, or end it.",
            errno.EACCES: "ports below 1024 are for root: choose another --port.",
            errno.EADDRNOTAVAIL: "this machine has no such address: choose another --host.",
        }
        why = reasons.get(error.errno or 0, f"{error.strerror}.")
        raise PortError(f"cannot listen on {where}: {why}") from error
    listener.setblocking(False)
    return listener
