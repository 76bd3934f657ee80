"""Which phrases the spans of one box give."""

import pytest

from detclipv2_jax.data import spans


def spans_of(caption, parts):
    """Returns the spans of words in their order in a caption."""
    found, start = [], 0
    for part in parts:
        start = caption.index(part, start)
        found.append([start, start + len(part)])
        start += len(part)
    return found


@pytest.mark.parametrize(
    ("caption", "parts", "phrases"),
    [
        ("A man waits while the man reads.", ["A man", "the man"], ["A man", "the man"]),
        ("A man waits while the tall man reads.", ["man", "man"], ["man"]),  # once
        ("young man and another old men", ["young man", "old men"], ["young man", "old men"]),
        ("A dog runs. big animal in snow", ["A dog", "big animal"], ["A dog", "big animal"]),
        ("a dog. big animal", ["a dog.", "big animal"], ["a dog", "big animal"]),  # its full stop is in the span
        ("A girl with her kite, she laughs", ["A girl", "she"], ["A girl", "she"]),
        # one phrase in parts, without what stands between them
        ("a red and shiny car", ["a red", "car"], ["a red car"]),
        ("a red, shiny car", ["a red", "car"], ["a red car"]),
        ("Look! A red and shiny car", ["A red", "car"], ["A red car"]),
        ("the man in a really big red hat", ["the man in", "red hat"], ["the man in red hat"]),
        ("both of them, the twins, sing", ["both of", "the twins"], ["both of the twins"]),
        ("the shop on, say, the corner", ["the shop on", "the corner"], ["the shop on the corner"]),
        ("a red and shiny car near that wreck", ["a red", "car", "that wreck"], ["a red car", "that wreck"]),
        ("a cat - and", ["a cat", "-"], ["a cat -"]),
        ("a cat. - and", ["a cat", "-"], ["a cat"]),  # a part that says nothing
        ("see a dog: it", ["a dog:"], ["a dog"]),
        ("a dog; big animal", ["a dog", "big animal"], ["a dog", "big animal"]),
        ("a cat meets another dog", ["a cat", "another dog"], ["a cat", "another dog"]),
        ("the man IN the hat", ["the man IN", "the hat"], ["the man IN the hat"]),
        # names of one box beside each other
        ("woman in red dress, lady smiling", ["woman", "lady"], ["woman", "lady"]),
        ("woman in red, lady smiling", ["woman in red", "lady"], ["woman in red", "lady"]),
        ("kid and children", ["kid", "children"], ["kid", "children"]),
        ("a sofa, or couch", ["a sofa", "couch"], ["a sofa", "couch"]),
        ("sofa/couch", ["sofa", "couch"], ["sofa", "couch"]),
        ("two dogs , one brown", ["two dogs", "one"], ["two dogs", "one"]),
        ("two dogs beside one", ["two dogs", "one"], ["two dogs", "one"]),
        ("dogs with 2 cats", ["dogs", "2 cats"], ["dogs", "2 cats"]),
        ("the player with number 12", ["the player", "12"], ["the player 12"]),
        ("a big red one", ["a big", "one"], ["a big one"]),
        ("the happy two dogs", ["the", "two dogs"], ["the two dogs"]),
        ("a black and white dog", ["a black", "white dog"], ["a black white dog"]),
        ("a striped, small dog", ["a striped", "small dog"], ["a striped small dog"]),
        ("small and old, white dog", ["small and old", "white dog"], ["small and old white dog"]),
        ("a man, in a hat", ["a man", "in a hat"], ["a man in a hat"]),
        ("woman, sitting", ["woman", "sitting"], ["woman sitting"]),
        ("a dog, brown", ["a dog", "brown"], ["a dog brown"]),
        ("a house, red building", ["a house", "red building"], ["a house", "red building"]),
        ("a sandy car", ["a", "car"], ["a car"]),
        ("cold 😀 here", ["😀"], ["😀"]),  # a sign says something
    ],
)  # fmt: skip
def test_phrases_of_one_box(caption, parts, phrases):
    given = spans_of(caption, parts)
    assert list(spans.phrases_of(caption, given)) == phrases
    assert list(spans.phrases_of(caption, given[::-1])) == phrases
    assert spans.phrase_of(caption, given) == phrases[0]


def test_spans_without_words_give_no_phrase():
    assert spans.phrases_of("a, cat", [[1, 2]]) == spans.phrases_of("a cat", []) == spans.phrases_of("a cat", 3) == ()


@pytest.mark.parametrize(
    ("caption", "phrase", "taken", "span"),
    [
        ("A Red car, a red car", "red car", (), (2, 9)),
        ("A red car, a red car", "red car", ((0, 9),), (13, 20)),
        ("a striped red car", "red car", ((2, 17),), (10, 17)),  # there is no other
        ("bored cards, red cards", "red card", (), None),  # whole words
        ("bored of red", "red", (), (9, 12)),
        ("a car (new)", "car (new)", (), (2, 11)),
        ("猫と犬", "犬", (), (2, 3)),
        ("a car", "", (), None),
    ],
)
def test_where_a_phrase_stands(caption, phrase, taken, span):
    assert spans.span_of(caption, phrase, taken=taken) == span


def test_spans_that_overlap_are_one_and_those_that_touch_are_two():
    assert spans._joined([[3, 6], [0, 3], [4, 9], [7, 7]]) == [(0, 3), (3, 9)]
    assert spans._joined([[-2, 1], [5, 4]]) == [(0, 1)]
