"""Check briefly whether the Hugging Face hub answers.

The hub's own libraries would retry for half a minute. Every package uses this module, which
imports none of them.
"""

import socket
import urllib.request
from concurrent.futures import Future
from threading import Thread
from urllib.parse import urlsplit

from huggingface_hub import constants

SECONDS = 3.0
"""How long to wait for an answer before the hub is called unreachable."""


def silence() -> str | None:
    """Connect to the hub, or the proxy to it; return why it does not answer, or None if it does.

    If HF_HUB_OFFLINE is set, no connection is made, since the cache is read instead.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    hub = urlsplit(constants.ENDPOINT)
    proxy = None
    if not urllib.request.proxy_bypass(hub.hostname or ""):
        proxy = urllib.request.getproxies().get(hub.scheme)
    server = urlsplit(proxy or constants.ENDPOINT)
    port = server.port or (443 if server.scheme == "https" else 80)
    try:
        _connect(server.hostname or "", port)
    except OSError as error:
        return f"{server.hostname}:{port}: {error}; HF_HUB_OFFLINE=1 reads its cache"
    return None


def _connect(host: str, port: int) -> None:
    """Open a connection and close it; raises OSError if that takes longer than `SECONDS`."""
    connected: Future[None] = Future()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=SECONDS).close()
            connected.set_result(None)
        except OSError as error:
            connected.set_exception(error)

    # In a daemon thread, because no timeout limits the lookup of a host name.
    Thread(target=connect, daemon=True).start()
    try:
        connected.result(SECONDS)
    except TimeoutError as error:
        raise OSError("timed out") from error
