"""What the tests of the page share: where its coloured boxes are, and a server in a thread."""

import contextlib
import threading

from detclipv2_jax.demo.server import Server

RED, BLUE = (20, 10, 60, 50), (70, 5, 110, 45)


@contextlib.contextmanager
def served(answers, *, host="127.0.0.1"):
    """Yields a server that runs in a thread."""
    with Server(answers, host=host, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
