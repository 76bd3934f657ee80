"""The page in a real browser: words, slider, upload, maps, example boxes, results, wrong input."""

import itertools
import json

import browser
import numpy as np
import planted
import pytest
from page_server import RED
from PIL import Image

from detclipv2_jax import colors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        browser.executable() is None, reason="needs Chromium: none was found, and DETCLIP_BROWSER names none"
    ),
]


@pytest.fixture
def page(server, tmp_path):
    with browser.started(tmp_path / "profile") as page:
        page.open(server.address)
        yield page
        elsewhere = [url for url in page.requested if not url.startswith((server.address, "data:", "blob:"))]
        assert elsewhere == ["about:blank"][: len(elsewhere)]  # nothing but the page itself was asked


def found(page):
    """Returns the words in the list of what was found."""
    return page.run("[...document.querySelectorAll('#found li')].map(item => item.textContent.split(' ')[0])")


def error(page):
    return page.run("document.querySelector('#error').hidden ? '' : document.querySelector('#error').textContent")


def status(page):
    return page.run("document.querySelector('#status').textContent")


def color(page, x, y):
    """Returns the canvas's colour at a point of the photo, which is 128 px wide."""
    code = "(c => [...c.getContext('2d').getImageData({x} * c.width / 128, {y} * c.width / 128, 1, 1).data])"
    return page.run(code.format(x=x, y=y) + "(document.querySelector('#canvas'))")[:3]


def drag(page, box):
    """Draws a box (px of the photo of 128 px) on the canvas."""
    page.run("document.querySelector('#canvas').scrollIntoView({block: 'center'})")
    left, top, width = page.run("(r => [r.x, r.y, r.width])(document.querySelector('#canvas').getBoundingClientRect())")
    x1, y1, x2, y2 = (side * width / 128 for side in box)
    page.mouse((left + x1, top + y1), (left + (x1 + x2) / 2, top + y2 - 1), (left + x2, top + y2))


def test_words_slider_and_results(page, tmp_path):
    assert status(page) == "a.png, 128 × 64 px"
    page.type("#words", "red, blue")
    page.wait("document.querySelectorAll('#found li').length")  # at once: nothing was pressed
    assert set(found(page)) == {"red", "blue"}
    assert status(page).startswith("2 found, of 2 names, in ")
    assert int(page.run("document.querySelector('#canvas').dataset.boxes")) == 2
    page.run("(s => { s.value = 1; s.dispatchEvent(new Event('input')); })(document.querySelector('#threshold'))")
    assert found(page) == []
    assert status(page).startswith("nothing scores 1.00; the best: ")
    assert page.run("document.querySelector('#threshold-value').textContent") == "1.00"
    page.run("(s => { s.value = 0.05; s.dispatchEvent(new Event('input')); })(document.querySelector('#threshold'))")
    page.click("#one-name")  # every box of every word
    assert len(found(page)) >= 2
    page("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), eventsEnabled=True)
    for button, name in (("#json", "found.json"), ("#picture", "found.png")):
        page.click(button)
        for _ in range(200):
            if (tmp_path / name).exists():
                break
            page.run("new Promise(done => setTimeout(done, 50))")
    rows = json.loads((tmp_path / "found.json").read_text())
    assert {row["name"] for row in rows} == {"red", "blue"}
    best = next(row for row in rows if row["name"] == "red")
    np.testing.assert_allclose(best["bbox"], [20, 10, 40, 40], atol=1)
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.width > 900
    page.run(
        "(s => { s.value = 'coco'; s.dispatchEvent(new Event('change')); })(document.querySelector('#vocabulary'))"
    )
    page.wait("document.querySelector('#status').textContent.includes('of 82 names')")


def test_labels_lie_apart_and_can_be_read(page):
    page.click("#one-name")  # every box of every word
    page.run("(s => { s.value = 0; s.dispatchEvent(new Event('input')); })(document.querySelector('#threshold'))")
    names = ["red", "blue", "\ue000 red", *(f"red {i}" for i in range(40))]
    page.type("#words", ", ".join(names))
    page.wait("document.querySelector('#status').textContent.includes('of 43 names')")
    places = page.run("page.labels.map(({left, top, width, height}) => [left, top, left + width, top + height])")
    width, height = page.run("(c => [c.width, c.height])(document.querySelector('#canvas'))")
    assert len(places) == min(40, int(page.run("document.querySelector('#canvas').dataset.boxes")))
    for (x1, y1, x2, y2), (left, top, right, bottom) in itertools.combinations(places, 2):
        assert x1 >= right or left >= x2 or y1 >= bottom or top >= y2
    assert np.all(np.array(places) >= 0)
    assert np.all(np.array(places)[:, 2:] <= [width, height])
    for look in page.run("Object.values(page.looks)"):
        color, ink = (colors.luminance(tuple(bytes.fromhex(look[key][1:]))) for key in ("color", "ink"))
        assert (max(color, ink) + 0.05) / (min(color, ink) + 0.05) > 4.5
    assert page.run("page.looks['red'].color") == colors.hex_color(colors.color_of("red"))
    # a letter that no font of the browser has
    assert page.run("[legible('red', 'other'), labelOf({name: '\ue000 red', score: 0.5})]") == [
        "red",
        "U+E000 red 0.50",
    ]
    assert page.run("placeLabel([5, 5, 9, 9], 50, {width: 60, height: 20}, [{left: 0, top: 0, width: 60}])") is None


def test_upload_and_wrong_input(page, tmp_path):
    page.click("#find")
    page.wait("!document.querySelector('#error').hidden")
    assert error(page) == "type what to look for, choose a list of names, or draw an example"
    page.click("#align")
    page.wait("document.querySelector('#error').textContent.startsWith('type a caption')")
    page.click("#json")
    page.wait("document.querySelector('#error').textContent === 'nothing was looked for yet'")
    (tmp_path / "text.jpg").write_text("no image")
    page.choose_file("#upload", tmp_path / "text.jpg")
    page.wait("document.querySelector('#error').textContent.startsWith('this cannot be used as a photo: not an image')")
    (tmp_path / "large.jpg").write_bytes(b"x" * 20_000_001)
    page.choose_file("#upload", tmp_path / "large.jpg")
    page.wait("document.querySelector('#error').textContent.startsWith('large.jpg has more than 20 MB')")
    page.type("#words", "blue, red")
    page.wait("document.querySelectorAll('#found li').length")
    assert error(page) == ""
    Image.fromarray(planted.paint((64, 128), {"blue": (80, 10, 120, 50)})).save(tmp_path / "mine.png")
    page.choose_file("#upload", tmp_path / "mine.png")
    page.wait("document.querySelector('#photos button').title === 'mine.png'")
    page.wait("document.querySelector('#status').textContent.startsWith('1 found')")  # the words were asked of it
    assert found(page) == ["blue"]
    page.type("#words", "x" * 5001)
    page.wait("document.querySelector('#error').textContent.includes('5001 characters are too many')")


def test_phrases_show_where_they_are_similar(page):
    page.type("#caption", "a picture of a red and a blue")
    page.click("#align")
    page.wait("document.querySelectorAll('#phrases button').length === 2")
    assert status(page) == "“red”: similarity 10.00 at its best region"
    assert sum(color(page, 40, 32)) > sum(color(page, 90, 32))
    assert page.run("document.querySelector('#high').textContent") == "10.00"
    page.click("#phrases button:nth-child(2)")
    assert status(page).startswith("“blue”")
    assert sum(color(page, 40, 32)) < sum(color(page, 90, 32))
    page.click("#phrases button:nth-child(2)")  # the photo again
    assert page.run("document.querySelector('#scale').hidden")
    assert color(page, 40, 32) == pytest.approx([255, 0, 0], abs=12)
    page.run("(c => { c.focus(); c.setSelectionRange(13, 18); })(document.querySelector('#caption'))")
    page.click("#align")
    page.wait("document.querySelector('#phrases button').textContent === 'a red'")  # the marked part


def test_a_box_on_one_photo_finds_the_same_on_others(page):
    page.click("#draw-example")
    drag(page, RED)
    page.wait("document.querySelectorAll('#found li').length")
    assert page.run("[...document.querySelectorAll('#found li')].map(i => i.textContent)")[0].startswith("like this 0.")
    assert page.run("document.querySelectorAll('#examples li').length") == 1
    page.click("#find-everywhere")
    page.wait("/on . of 4 photos/.test(document.querySelector('#status').textContent)")
    names = page.run("[...document.querySelectorAll('#everywhere button')].map(button => button.title)")
    assert sorted(names) == ["a.png", "b.png", "z.png"]  # c.png has nothing red
    page.click("#everywhere button[title='b.png']")
    page.wait("document.querySelector('#status').textContent.startsWith('1 found')")
    page.click("#draw-example")
    page.run("document.querySelector('#canvas').scrollIntoView({block: 'center'})")
    page.click("#canvas")  # no box
    page.wait("document.querySelector('#error').textContent.startsWith('the box has no area')")
    page.type("#example-name", " ")
    drag(page, RED)
    page.wait("document.querySelector('#error').textContent === 'give the example a name'")
    page.click("#examples button")
    page.wait("document.querySelectorAll('#examples li').length === 0")
    assert found(page) == []
