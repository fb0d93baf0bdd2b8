"""Whether the Hugging Face hub answers, asked once and briefly.

Its libraries would retry for half a minute. All packages ask by this module, which imports none.
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
    """Knock at the hub, or at the proxy to it; return why there is no answer, None if there is.

    Nothing is asked where HF_HUB_OFFLINE is set: the cache is read then.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    hub = urlsplit(constants.ENDPOINT)
    proxy = None
    if not urllib.request.proxy_bypass(hub.hostname or ""):
        proxy = urllib.request.getproxies().get(hub.scheme)
    door = urlsplit(proxy or constants.ENDPOINT)
    port = door.port or (443 if door.scheme == "https" else 80)
    try:
        _knock(door.hostname or "", port)
    except OSError as error:
        return f"{door.hostname}:{port}: {error}; HF_HUB_OFFLINE=1 reads its cache"
    return None


def _knock(host: str, port: int) -> None:
    """Open a connection and close it; raises OSError if there is none within `SECONDS`."""
    answered: Future[None] = Future()

    def knock() -> None:
        try:
            socket.create_connection((host, port), timeout=SECONDS).close()
            answered.set_result(None)
        except OSError as error:
            answered.set_exception(error)

    # In a thread that nobody waits for at the end: no timeout holds for the search of a name.
    Thread(target=knock, daemon=True).start()
    try:
        answered.result(SECONDS)
    except TimeoutError as error:
        raise OSError("timed out") from error
