"""Takes the pictures of docs/page.md from a run of the demo.

python tests/demo/screenshots.py --run=runs/demo --output=docs
"""

import pathlib
import sys
import tempfile

import browser
import numpy as np
from page_server import served
from PIL import Image

from detclipv2_jax import commands
from detclipv2_jax.data import truth
from detclipv2_jax.demo.album import MAX_LISTED, Album
from detclipv2_jax.demo.answers import Answers
from detclipv2_jax.inference import Predictor

NUM_COLORS = 256  # of a picture


def main(*, run: str, output: str) -> None:
    """Writes page_words.png, page_caption.png and page_examples.png.

    Args:
      run: workdir of the demo
      output: folder
    """
    data, folder = pathlib.Path(run, "data"), pathlib.Path(output)
    answers = Answers(Predictor.from_checkpoint(run, keep_vocabularies=False), Album(data / "images" / "eval"))
    answers.warm_up()
    known = truth.read(data / "eval.json")
    names = [category["name"] for category in known.categories]
    shown = known.category[known.image < MAX_LISTED]
    # a photo with four things, none of them twice, of which one is on most of the others
    index = max(
        (i for i in range(8) if len(set(known.category[known.image == i])) == sum(known.image == i) == 4),
        key=lambda i: max(sum(shown == category) for category in known.category[known.image == i]),
    )
    category = known.category[known.image == index]
    there = [names[i] for i in category]
    box = known.boxes[known.image == index][np.argmax([sum(shown == i) for i in category])]
    photo = f"#photos button:nth-child({index + 1})"
    with (
        served(answers) as server,
        tempfile.TemporaryDirectory() as profile,
        browser.started(pathlib.Path(profile)) as page,
    ):
        page.open(server.address, width=1180, height=760)
        page.click(photo)
        page.wait(f"document.querySelector({photo!r}).getAttribute('aria-pressed') === 'true'")
        page.type("#words", ", ".join([*there, "blue house", "pink key"]))
        page.wait("document.querySelector('#status').textContent.includes('of 6 names')")
        take(page, folder / "page_words.png")
        page.type("#words", "")
        page.type("#caption", f"a {there[0]}, a {there[1]} and a {there[2]}")
        page.click("#align")
        page.wait("document.querySelectorAll('#phrases button').length === 3")
        take(page, folder / "page_caption.png")
        page.click("#phrases button:first-child")  # the photo again
        page.click("#draw-example")
        page.run("scrollTo(0, 0)")
        area = "document.querySelector('#canvas').getBoundingClientRect()"
        left, top, width = page.run(f"(r => [r.x, r.y, r.width])({area})")
        x, y, wide, high = box * width / known.images[index]["width"]
        page.mouse((left + x, top + y), (left + x + wide / 2, top + y + high / 2), (left + x + wide, top + y + high))
        page.wait("document.querySelectorAll('#examples li').length")
        page.wait("document.querySelector('#status').textContent.includes('of 1 names')")
        page.run(
            "(s => { s.value = 0.25; s.dispatchEvent(new Event('input')); })(document.querySelector('#threshold'))"
        )
        page.click("#find-everywhere")
        page.wait("/on [0-9]+ of/.test(document.querySelector('#status').textContent)")
        take(page, folder / "page_examples.png")


def take(page: browser.Page, path: pathlib.Path) -> None:
    """Writes a picture of the page in few colours."""
    page.run("scrollTo(0, 0)")
    page.screenshot(path)
    with Image.open(path) as picture:
        whole = picture.convert("RGB")
    small = whole.quantize(palette=whole.quantize(NUM_COLORS))  # dithered: maps have no steps
    small.save(path, optimize=True)
    print(path, np.asarray(small).shape, path.stat().st_size)


if __name__ == "__main__":
    sys.exit(commands.run(main, about=__doc__))
