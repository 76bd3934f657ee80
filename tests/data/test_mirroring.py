"""Words that a mirrored photo makes wrong."""

from detclipv2_jax.data.mirroring import pattern, speaks_of_sides


def test_one_text_with_a_side_is_enough():
    english = pattern((), english=True)
    assert speaks_of_sides(["dog", "left shoe"], english)
    assert speaks_of_sides(["turnLeft_sign2"], english)
    for word in ("leftmost", "Rightwards", "left-hand", "right handed", "lefthander", "clockwise", "anti-clock-wise"):
        assert speaks_of_sides([f"a {word} one"], english), word
    assert not speaks_of_sides(["dog", "leftover", "bright"], english)
    assert not speaks_of_sides(["left"], pattern((), english=False))
    assert speaks_of_sides(["\uff34urn \uff2c\uff25\uff26\uff34"], english)  # wide letters
    assert speaks_of_sides(["zuru\u0308ck"], pattern(("zur\u00fcck",), english=False))  # an accent apart


def test_words_of_other_languages():
    found = pattern((" links ", "左"), english=False)
    assert speaks_of_sides(["Links der Katze"], found)
    assert not speaks_of_sides(["Linkshänder", "left"], found)
    assert speaks_of_sides(["links_1"], found)
    assert speaks_of_sides(["links2"], found)
    dotted = pattern(("l.r", "a(b"), english=False)  # words, no patterns
    assert speaks_of_sides(["the l.r side"], dotted)
    assert not speaks_of_sides(["the lir side", "ab"], dotted)
    assert speaks_of_sides(["猫の左側"], found)  # no spaces between words there
