"""Letters of any script are drawn with glyphs that a font has, or spelled in ASCII."""

import types
import unicodedata

import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image, ImageDraw

from detclipv2_jax.colors import BLACK
from detclipv2_jax.visualize import charts, drawing, letters

FIRST = letters._own_font(bold=False)
SCRIPTS = (
    "猫",
    "a猫",
    "बिल्ली",
    "قطة حمراء",
    "кошка",
    "γάτα",
    "חתול",
    "แมว",
    "고양이",
    "日本語",
    "🐱",
    "a\u200db",
    "\ue000",
    "\ud800",
)


@pytest.mark.parametrize("text", SCRIPTS)
@pytest.mark.parametrize("raqm", [True, False])
def test_every_letter_that_is_drawn_has_a_glyph(text, raqm, monkeypatch):
    monkeypatch.setattr(letters, "features", types.SimpleNamespace(check=lambda name: raqm))
    for fonts in ((), letters._machine_fonts()):
        monkeypatch.setattr(letters, "_machine_fonts", lambda fonts=fonts: fonts)
        pieces = letters.runs(f"a {text} 0.50", FIRST)
        assert "".join(piece for _, piece in pieces).endswith(" 0.50")
        assert len("".join(piece for _, piece in pieces)) > len("a  0.50")
        for font, piece in pieces:
            missing = [letter for letter in piece if ord(letter) not in letters._glyphs(font) and letter != "\u200d"]
            assert not missing, (font, missing)
            assert raqm or not any(map(letters._is_shaped, piece))
        assert all(ord(letter) in letters._glyphs(FIRST) for letter in letters.plain(text) if letter != "\u200d")


def test_what_no_font_has_is_spelled(monkeypatch):
    monkeypatch.setattr(letters, "_machine_fonts", lambda: ())
    assert letters.runs("猫 बिल्ली red", FIRST) == [(FIRST, "Mao billi red")]
    assert letters.runs("\ue000", FIRST) == [(FIRST, "U+E000")]
    assert letters.plain("猫 кошка") == "Mao кошка"


def test_another_font_is_taken_for_the_words_that_the_first_lacks(monkeypatch):
    files = [
        entry.fname for entry in font_manager.fontManager.ttflist if entry.name in ("STIXGeneral", "cmsy10", "cmr10")
    ]
    more = {file: sorted(letters._glyphs(file) - letters._glyphs(FIRST) - {*range(33)}) for file in files}
    other, codes = next((file, codes) for file, codes in more.items() if codes)
    letter = chr(next(code for code in codes if unicodedata.category(chr(code))[0] in "LS"))
    monkeypatch.setattr(letters, "_machine_fonts", lambda: ("no such font", other))
    assert letters.runs(f"a {letter} b", FIRST) == [(FIRST, "a "), (other, f"{letter} "), (FIRST, "b")]
    font, image = letters.Letters(20), Image.new("L", (200, 40))
    font.write(ImageDraw.Draw(image), (10, 5), f"a {letter} b", fill=255)
    columns = np.flatnonzero(np.asarray(image).any(axis=0))
    assert font.getlength(f"a {letter} b") == pytest.approx(columns.max() - 10, abs=4)


def test_a_font_that_cannot_be_drawn_has_no_glyphs(tmp_path):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    assert not letters._glyphs(str(tmp_path / "broken.ttf"))
    assert not letters._glyphs(str(tmp_path / "LastResort.otf"))


def test_charts_spell_what_their_font_lacks_and_take_dollars_as_they_are():
    picture = charts.bars(["猫", "$x$", "$_"], np.array([1.0, 2, 3]), x="$ and 犬")  # a missing glyph is a warning
    assert picture.std() > 5


def test_labels_in_any_script_are_drawn():
    picture = drawing.photo(np.zeros((90, 90, 3), np.uint8), [[9, 9, 80, 80]], ["قطة\nबिल्ली 猫"], [(200, 200, 200)])
    assert (picture == np.array(BLACK)).all(-1).sum() > 20


def test_upright_fonts_without_serifs_are_asked_first(monkeypatch):
    fonts = ["/b/Sans-Bold.ttf", "/a/Serif-Regular.ttf", "/c/Sans-Regular.otf", "/a/Other.ttf"]
    monkeypatch.setattr(letters.font_manager, "findSystemFonts", lambda: fonts)
    order = letters._machine_fonts.__wrapped__()
    assert order == (fonts[2], fonts[1], fonts[0], fonts[3])


def test_a_line_hangs_from_its_place():
    image = Image.new("L", (40, 60), 255)
    font = letters.Letters(30)
    font.write(ImageDraw.Draw(image), (5, 10), "H", fill=0)
    rows, columns = (np.flatnonzero((np.asarray(image) < 128).any(axis=axis)) for axis in (1, 0))
    ascent = letters._font(letters._own_font(bold=False), 30).getmetrics()[0]
    assert rows[-1] == 10 + ascent - 1  # it stands on the baseline
    assert 10 + ascent // 4 < rows[0] + 8
    assert 5 <= columns[0] < columns[-1] < 5 + font.getlength("H")
