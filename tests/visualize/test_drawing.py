"""Pieces of figures, pixel by pixel: text, legends, labels, stacks, grids, maps."""

import matplotlib
import numpy as np
import pytest

from detclipv2_jax.visualize import drawing, letters


def has(picture, color):
    return (picture == np.array(color)).all(-1)


def test_text_is_wrapped_at_spaces_to_the_width():
    width = int(letters.Letters(15).getlength("one two")) + 1
    wrapped = drawing.text_block("one two six\nten", width=width, size=15)
    np.testing.assert_array_equal(wrapped, drawing.text_block("one two\nsix\nten", width=width, size=15))
    assert wrapped.shape == (3 * 20 + 7, width, 3)  # a line is 1.3 times its size
    assert wrapped.min() < 50
    long = drawing.text_block("unbreakable on", width=20, size=15)
    np.testing.assert_array_equal(long, drawing.text_block("unbreakable\non", width=20, size=15))
    bold, pale = (
        drawing.text_block("one", width=60, size=15, **more) for more in ({"bold": True}, {"color": (9, 0, 0)})
    )
    assert (bold < 128).sum() > 1.2 * (drawing.text_block("one", width=60, size=15) < 128).sum()
    assert has(pale, (9, 0, 0)).any()


def test_a_legend_goes_on_in_the_next_line():
    entries = [((200, 0, 0), "a"), ((0, 200, 0), "b"), ((0, 0, 200), "c")]
    length = 16 + 6 + round(letters.Letters(15).getlength("a")) + 22
    picture = drawing.legend(entries, width=2 * length + 2)
    assert picture.shape == (2 * 26, 2 * length + 2, 3)
    places = [[int(x.min()) for x in np.nonzero(has(picture, color))] for color, _ in entries]
    assert places[0] == [3, 1]  # in its outline
    assert places[1][0] == 3
    assert abs(places[1][1] - (length + 1)) <= 1  # the letters are not of one width
    assert places[2] == [29, 1]
    one_line = drawing.legend(entries, width=400)
    assert one_line.shape[0] == 26
    assert (one_line[:, 18:] == np.array(drawing.INK)).all(-1).any()  # its text


@pytest.mark.parametrize(("side", "shown", "line"), [(100, 900, 3), (1200, 1200, 4), (2000, 1600, 5)])
def test_photos_are_shown_in_a_legible_size(side, shown, line):
    box = np.array([[0.2, 0.1, 0.8, 0.4]]) * side
    picture = drawing.photo(np.zeros((side // 2, side, 3), np.uint8), box, [""], [(255, 0, 0)])
    assert picture.shape == (shown // 2, shown, 3)
    middle = picture[: shown // 4, shown // 2]  # from above through the upper side of the box
    places = [np.flatnonzero(has(middle, color)) for color in ((255, 0, 0), drawing.PAPER)]
    top = round(0.1 * shown)
    assert places[0].tolist() == list(range(top, top + line))  # as thick as a 300th of the photo is long
    assert places[1].tolist() == [top - 1, top + line]  # in a rim


def test_small_photos_have_lines_that_can_be_seen():
    picture = drawing.photo(
        np.zeros((64, 64, 3), np.uint8), np.array([[16.0, 16, 48, 48]]), [""], [(255, 0, 0)], long_side=64
    )
    assert np.flatnonzero(has(picture[:32, 32], (255, 0, 0))).tolist() == [16, 17]


def test_the_first_box_lies_on_top_and_an_empty_one_is_drawn():
    photo = np.full((450, 900, 3), 128, np.uint8)
    boxes = np.array([[100.0, 100, 300, 300], [100, 100, 400, 300], [700, 200, 650, 150]])
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    picture = drawing.photo(photo, boxes, ["", "", ""], colors)
    assert has(picture, colors[0])[100:103, 110:290].all()  # the side that both have
    assert has(picture, colors[1])[100:103, 310:390].all()
    assert has(picture, colors[2])[198:204, 698:704].any()
    assert has(picture, drawing.PAPER)[200, 97:100].any()  # a rim


def test_pictures_are_stacked_at_the_left_with_a_gap():
    low, wide = np.full((2, 3, 3), 1, np.uint8), np.full((4, 5, 3), 2, np.uint8)
    picture = drawing.stack([low, wide])[..., 0]
    assert picture.shape == (2 + 6 + 4 + 6, 5)
    assert (picture[:2, :3] == 1).all()
    assert (picture[8:12] == 2).all()
    assert (picture == 255).sum() == picture.size - 6 - 20


def test_cells_fill_rows():
    cells = [np.full((4, 5, 3), i, np.uint8) for i in range(3)]
    picture = drawing.grid(cells, columns=2)[..., 0]
    step = 5 + drawing.MARGIN_PX
    assert picture.shape == (2 * (4 + 6), step + 5)
    for i, (y, x) in enumerate([(0, 0), (0, step), (10, 0)]):
        assert (picture[y : y + 4, x : x + 5] == i).all()
    assert (picture == 255).sum() == picture.size - 3 * 20
    assert drawing.grid(cells[:1], columns=4).shape == (10, 5, 3)  # no room for cells that are not there


def test_a_map_is_dark_and_thin_where_it_is_low_and_bright_and_thick_where_it_is_high():
    photo = np.zeros((39, 60, 3), np.uint8) + np.array([90, 120, 150], np.uint8)  # grey 120
    similarity = np.repeat([[-2.0], [-1.0], [2.0]], 4, axis=1)
    shown = drawing.heat(photo, similarity, low=-2.0, high=2.0).astype(float)
    for row, level in ((0, 0.0), (19, 0.25), (38, 1.0)):
        color = np.array(matplotlib.colormaps["inferno"](level)[:3]) * 255
        opacity = 0.3 + 0.4 * level
        np.testing.assert_allclose(shown[row, 30], (1 - opacity) * 120 + opacity * color, atol=3)
    assert drawing.heat(photo, np.ones((3, 3), np.float32), low=1.0, high=1.0).shape == photo.shape  # no division by 0


def test_the_scale_of_a_map_has_five_numbers(monkeypatch):
    written, write = [], letters.Letters.write
    monkeypatch.setattr(
        letters.Letters, "write", lambda self, draw, place, text, **more: written.append((place[0], text))
        or write(self, draw, place, text, **more),
    )  # fmt: skip
    picture = drawing.color_bar(low=-1.0, high=3.0, title="similarity", width=200)
    assert picture.shape[1] == 200
    (_, title), *numbers = written[-1:] + written[:-1]
    assert title == "similarity"
    assert [text for _, text in numbers] == ["-1.00", "0.00", "1.00", "2.00", "3.00"]
    lengths = [letters.Letters(13).getlength(text) for _, text in numbers]
    middles = [x + length / 2 for (x, _), length in zip(numbers, lengths, strict=True)]
    np.testing.assert_allclose(middles[1:4], [49.75, 99.5, 149.25])
    assert (numbers[0][0], numbers[4][0] + lengths[4]) == (0, 200)


def test_stripes_of_padding_are_diagonal():
    hatched = drawing.hatch_padding(np.zeros((320, 400, 3), np.uint8), np.array([0, 0]))[..., 0]
    row, moved = hatched[0], hatched[3]
    np.testing.assert_array_equal(row[:10], [225] * 5 + [200] * 5)  # a fortieth of the long side
    np.testing.assert_array_equal(moved[:-3], row[3:])
