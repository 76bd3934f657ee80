"""A page in the browser: photos of a run or your own, free words, similarity maps, example boxes.

    python -m detclipv2_jax.demo --checkpoint=runs/demo

Nothing is fetched from other hosts or sent to them. Photos of one folder and of nothing else are shown; what is
uploaded stays in memory. Only this machine reaches the page unless --host says otherwise. Ctrl-C ends it.
"""

from __future__ import annotations

import pathlib
import sys

from detclipv2_jax import commands


def run(*, checkpoint: str, photos: str = "", host: str = "127.0.0.1", port: int = 8765) -> None:
    """Serves the page until it is interrupted.

    Args:
      checkpoint: workdir of a training run
      photos: folder of the photos to choose from; default: those that the run was evaluated on
      host: address to listen at; 0.0.0.0 lets everybody who reaches this machine see the photos and use the model
      port: of the address; 0: a free one

    Raises:
      ValueError: no checkpoint, or no such folder.
      OSError: the address cannot be used.
    """
    from detclipv2_jax.demo.album import Album
    from detclipv2_jax.demo.answers import Answers
    from detclipv2_jax.demo.server import Server, is_loopback
    from detclipv2_jax.inference import Predictor

    if not 0 <= port < 65536:
        raise ValueError(f"--port is {port}; it must lie between 0 and 65535")
    predictor = Predictor.from_checkpoint(checkpoint, keep_vocabularies=False)
    known = (pathlib.Path(checkpoint, "data", "images", "eval"), pathlib.Path(predictor.config.eval.images or "-"))
    folder = photos or next((path for path in known if path.is_dir()), None)
    answers = Answers(predictor, Album(folder))
    with Server(answers, host=host, port=port) as server:
        print("compiling", flush=True)
        answers.warm_up()
        if not is_loopback(host):
            print("note: everybody who reaches this machine can use the page; there is no password", flush=True)
        print(f"the page is at {server.address} (Ctrl-C ends it)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    sys.exit(commands.run(run, about=__doc__))
