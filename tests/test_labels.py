"""Labels of boxes: apart from each other, inside the picture, legible on their colour; one box a place."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from detclipv2_jax import labels
from detclipv2_jax.colors import BLACK, WHITE, color_of, ink_on, luminance
from detclipv2_jax.visualize import drawing


def has(picture, color):
    return (picture == np.array(color)).all(-1)


def test_a_text_can_be_read_on_every_colour():
    for color in [*map(color_of, map(str, range(300))), BLACK, WHITE, (118, 118, 118)]:
        low, high = sorted([luminance(color), luminance(ink_on(color))])
        assert (high + 0.05) / (low + 0.05) > 4.5, color
    assert (luminance(BLACK), luminance(WHITE)) == (0.0, pytest.approx(1.0))
    assert luminance((10, 188, 255)) == pytest.approx(0.4325, abs=1e-4)  # W3C's formula, by hand
    assert luminance((64, 64, 64)) == pytest.approx(0.0513, abs=1e-4)


def test_a_place_is_drawn_once_and_the_best_few_where_nothing_scores_enough():
    boxes = np.array(
        [[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 5], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]]
    )
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])

    def chosen(**options):
        return labels.best_places(boxes, scores, **{"min_score": 0.0, "max_drawn": 20, **options}).tolist()

    assert chosen() == [0, 2, 3, 4, 5]  # the third overlaps the first by no more than a half
    assert chosen(max_iou=1.0) == [0, 1, 2, 3, 4, 5]
    assert chosen(max_iou=0.95) == [0, 1, 2, 3, 4, 5]
    assert chosen(max_iou=0.4) == [0, 3, 4, 5]
    assert chosen(min_score=0.6) == [0, 2, 3]
    assert chosen(max_drawn=2) == [0, 2]
    assert chosen(min_score=0.95) == [0, 2, 3]  # the best three
    assert chosen(min_score=0.95, max_drawn=1) == [0]
    apart = np.array([[0, 0, 9, 0.4], [20, 8, 20.25, 17], [50, 50, 50.5, 50.5], [9, 0.4, 18, 0.8]])  # thin or tiny
    assert labels.best_places(apart, scores[:4], min_score=0.0, max_drawn=9, max_iou=0.0).tolist() == [0, 1, 2, 3]
    assert labels.best_places(boxes[:0], scores[:0], min_score=0.5, max_drawn=9).tolist() == []


def test_labels_in_any_script_need_no_font():
    font, picture = labels.AsciiFont(20), Image.new("RGB", (300, 60))
    labels.draw(picture, np.array([[5.0, 30, 290, 55]]), ["猫 0.50"], [(0, 90, 0)], font=font)
    same = Image.new("RGB", (300, 60))
    labels.draw(same, np.array([[5.0, 30, 290, 55]]), ["Mao 0.50"], [(0, 90, 0)], font=font)
    np.testing.assert_array_equal(picture, same)
    assert font.getlength("猫") == font.getlength("Mao") > 0
    assert labels.in_ascii("a 猫\u0301\ufe0f\ue000") == "a MaoU+E000"
    assert [labels.is_invisible(letter) for letter in "\u200d\ufe0fa\u0301"] == [True, True, False, False]


@pytest.mark.parametrize(("color", "text"), [((0, 114, 178), WHITE), ((240, 228, 66), BLACK)])
def test_labels_are_legible_on_their_colour_and_no_wider_than_the_photo(color, text, monkeypatch):
    sizes = []
    place = labels.place_label
    monkeypatch.setattr(
        labels, "place_label", lambda box, label, *more: sizes.append(label) or place(box, label, *more)
    )
    photo = np.full((900, 300, 3), 128, np.uint8)
    picture = drawing.photo(photo, np.array([[50.0, 300, 250, 600]]), ["words " * 20], [color])
    ((width, height),) = sizes
    assert 280 < width < 300
    sizes.clear()
    drawing.photo(photo, np.array([[50.0, 300, 250, 600]]), ["l" * 400], [color])
    assert 292 - 6 < sizes[0][0] - 6 <= 292  # 8 px less than the photo has
    label = picture[int(300 - height) + 2 : 298, 5:290]
    assert has(label, text).sum() > 100
    other = {WHITE: BLACK, BLACK: WHITE}[text]
    assert not has(label, other).any()


def test_a_label_keeps_its_beginning_and_all_that_fits():
    font = labels.AsciiFont(12)
    width = font.getlength("abcde…")
    assert labels.shorten("abcdefgh", font, width) == "abcde…"
    assert labels.shorten("abcde", font, font.getlength("abcde")) == "abcde"


def test_labels_prefer_the_corner_above_their_box():
    box, size = np.array([100.0, 100, 180, 160]), (400, 300)
    assert labels.place_label(box, (50, 20), size, []) == (100, 80, 150, 100)
    # each covers the one before less than half: the right end above the box
    assert labels.place_label(box, (50, 20), size, [(100, 80, 125, 100)]) == (130, 80, 180, 100)
    assert labels.place_label(np.array([390.0, 5, 399, 9]), (50, 20), size, []) == (349, 0, 399, 20)
    assert labels.place_label(np.array([0.0, 0, 9, 9]), (50, 500), size, []) == (0, 0, 50, 500)


def test_where_a_label_stands_when_better_places_are_taken():
    box, size = np.array([100.0, 100, 180, 160]), (400, 300)
    above, left = (0, 70, 400, 100), (0, 0, 100, 300)
    assert labels.place_label(box, (50, 20), size, [(150, 70, 400, 100), left]) == (100, 80, 150, 100)  # it may touch
    assert labels.place_label(box, (50, 20), size, [above]) == (100, 100, 150, 120)  # in the box
    assert labels.place_label(box, (50, 20), size, [above, (0, 100, 400, 125)]) == (100, 160, 150, 180)  # below it
    middle = [above, (0, 100, 400, 119), (0, 141, 400, 190)]
    assert labels.place_label(box, (50, 20), size, middle) == (100, 120, 150, 140)
    for taken, left_end in (
        ([(95, 80, 125, 100), (155, 80, 200, 100)], 130), ([(100, 80, 180, 100)], 180), ([(100, 80, 300, 100)], 80),
    ):  # fmt: skip
        assert labels.place_label(box, (20, 20), size, taken) == (left_end, 80, left_end + 20, 100)
    # away from it: where it is nearest, first from the left
    assert labels.place_label(box, (50, 20), size, [(0, 0, 400, 200)]) == (54, 204, 104, 224)
    assert labels.place_label(box, (50, 20), size, [(0, 90, 400, 300), (0, 0, 222, 90)]) == (222, 66, 272, 86)


@pytest.mark.parametrize(("size", "line"), [((600, 400), 2), ((100, 90), 2), ((400, 1500), 5)])
def test_lines_of_boxes_have_a_rim_and_the_first_lie_on_top(size, line):
    picture, ground = Image.new("RGB", size, (90, 90, 90)), (90, 90, 90)
    boxes = np.array([[20.0, 20, 70, 70], [40, 10, 80, 60], [9, 9, 9, 9]])
    red, blue, green = (200, 0, 0), (0, 0, 200), (0, 200, 0)
    labels.draw(picture, boxes, [""] * 3, [red, blue, green], font=labels.AsciiFont(12))
    across = [picture.getpixel((x, 50)) for x in range(17, 20 + line + 3)]
    assert across == [ground] * 2 + [WHITE] + [red] * line + [WHITE] + [ground] * 2
    assert picture.getpixel((40, 20)) == red  # where both lines cross
    assert picture.getpixel((40, 30)) == blue
    boxes[2, 2:] = 10
    same = Image.new("RGB", size, (90, 90, 90))
    labels.draw(same, boxes, [""] * 3, [red, blue, green], font=labels.AsciiFont(12))
    np.testing.assert_array_equal(picture, same)  # a box without extent is seen


def test_a_label_is_written_in_its_field_and_led_to_its_box_from_afar(monkeypatch):
    font, color = labels.AsciiFont(12), (0, 90, 0)
    box, places = np.array([[100.0, 70, 150, 110]]), []
    monkeypatch.setattr(labels, "place_label", lambda *_: places[-1])
    for at, led_from in (
        ((100, 50, 160, 69), None),  # at each side, just beside the box
        ((110, 111, 170, 130), None),
        ((39, 80, 99, 100), None),
        ((151, 80, 211, 100), None),
        ((100, 48, 160, 68), (130, 70)),  # and away from it
        ((110, 112, 170, 132), (140, 110)),
        ((38, 80, 98, 100), (100, 90)),
        ((152, 80, 212, 100), (150, 90)),
        ((200, 150, 260, 170), (150, 110)),  # beyond a corner
        ((10, 20, 70, 40), (100, 70)),
    ):
        places.append(at)
        picture, plain = Image.new("RGB", (300, 200)), Image.new("RGB", (300, 200))
        labels.draw(picture, box, ["a\n b"], [color], font=font)
        labels.draw(plain, box, [""], [color], font=font)
        brush = ImageDraw.Draw(plain)
        if led_from:
            brush.line((*led_from, (at[0] + at[2]) / 2, (at[1] + at[3]) / 2), fill=color, width=2)
        brush.rectangle(at, fill=color, outline=WHITE)
        font.write(brush, (at[0] + 3, at[1] + 1), "a b", fill=WHITE)
        np.testing.assert_array_equal(picture, plain)


def test_labels_lie_inside_and_apart():
    rng = np.random.default_rng(0)
    size, taken = (900, 600), []
    for i in range(30):
        x, y = rng.uniform(-20, 880), rng.uniform(-20, 580)
        box = np.array([x, y, x + rng.uniform(1, 400), y + rng.uniform(1, 300)])
        place = labels.place_label(box, (60 + i % 5 * 15, 20), size, taken)
        assert 0 <= place[0] <= place[2] < size[0]
        assert 0 <= place[1] <= place[3] < size[1]
        taken.append(place)
    assert not any(map(_overlap, itertools.combinations(taken, 2)))
    # the same small box sixty times: sixty labels, none over another, none further than they must be
    box, taken = np.array([400.0, 300, 420, 310]), []
    for _ in range(60):
        taken.append(labels.place_label(box, (50, 20), size, taken))
    assert not any(map(_overlap, itertools.combinations(taken, 2)))
    assert max(abs(x - 400) for x, *_ in taken) < 450
    # no room is left
    assert labels.place_label(box, (50, 20), size, [(0, 0, 440, 600), (470, 0, 900, 600)]) is None
    # wider than the photo: at its left edge
    assert labels.place_label(box, (2000, 20), size, [])[0] == 0


def _overlap(places):
    a, b = places
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def test_labels_of_a_crowd_are_drawn_apart(monkeypatch):
    """Thirty boxes in one place; where the photo has no room for all labels, some are left out."""
    drawn = []
    monkeypatch.setattr(labels, "_draw_label", lambda draw, place, *rest: drawn.append(place))
    for long_side, most in ((900, 30), (150, 16)):
        boxes = np.tile([[40.0, 40, 60, 60]], (30, 1))
        texts = [f"thing {i}" for i in range(30)]
        drawing.photo(np.full((100, 100, 3), 128, np.uint8), boxes, texts, [(9, 9, 9)] * 30, long_side=long_side)
        assert 4 < len(drawn) <= most
        assert not any(map(_overlap, itertools.combinations(drawn, 2)))
        assert len(drawn) == 30 or long_side == 150
        drawn.clear()
