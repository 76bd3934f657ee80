import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detclipv2_jax.data import concepts, tokenizer
from detclipv2_jax.data.concepts import Encoded, Encoder, Pool, Vocabulary


def pool(*names, definitions=None):
    vocabulary = Vocabulary(names, definitions or ("",) * len(names))
    return Pool(vocabulary, definitions=False, encoder=Encoder())


def encoded(numbers):
    """Returns concepts named by numbers; equal numbers are equal concepts."""
    tokens = np.array([[49406, n + 1, 49407] for n in numbers], np.int32).reshape(-1, 3)
    return Encoded(tokens, np.array(numbers, np.uint64), np.zeros(len(numbers), bool))


@pytest.mark.parametrize(
    ("text", "visible"),
    [("a", True), (" \u200b.", True), ("\U0001f600", True), ("", False), (" \t\u200b\u00a0\0", False)],
)
def test_whether_anything_of_a_text_is_seen(text, visible):
    assert concepts.is_visible(text) is visible


def test_names_and_texts():
    assert concepts.display_name("bow_(decorative_ribbons)") == "bow (decorative ribbons)"
    assert concepts.concept_text("cat", "a small animal") == "cat, a small animal"
    assert concepts.concept_text("cat") == "cat"
    for name in ("A Cat", "cats", "the cat ", "Some  cats"):
        assert concepts.key(name) == "cat"
    assert concepts.key("glass") == "glass"
    assert concepts.key("bus") == "bus"
    assert concepts.key("lenses") == "len"  # followed to the end


@pytest.mark.parametrize(
    ("singular", "plural"),
    [
        ("bus", "buses"), ("wine glass", "wine glasses"), ("T-shirt", "T-shirts"), ("woman", "women"),
        ("man", "men"), ("knife", "knives"), ("leaf", "the leaves"), ("mouse", "mice"), ("goose", "geese"),
        ("berry", "berries"), ("box", "boxes"), ("cookie", "cookies"), ("lens", "lenses"), ("person", "people"),
        ("sheep", "sheep"), ("menu", "menus"), ("tooth", "teeth"), ("church", "churches"),
    ],
)  # fmt: skip
def test_a_plural_is_the_same_concept(singular, plural):
    assert concepts.key(singular) == concepts.key(plural)
    source = pool(singular, "anvil")
    for name, caption in ((plural, ""), ("", f"a photo of {plural}.")):
        assert drawn_names(source, (singular, "anvil"), 9, present=[name], caption=caption) == ["anvil"]


def test_dictionary(tmp_path):
    path = tmp_path / "dictionary.tsv"
    path.write_text("name\tdefinition\tsource\ncat\ta small animal\tlvis\n\nred_car\n")
    vocabulary = concepts.read_dictionary(path)
    assert vocabulary.names == ("cat", "red car")
    assert vocabulary.definition("Cats") == "a small animal"
    assert vocabulary.definition("red car") == vocabulary.definition("house") == ""
    path.write_text(" Name \tDefinition\ncat\t a pet \tx\n")
    assert concepts.read_dictionary(path) == Vocabulary(("cat",), ("a pet",))
    for text in ('{"cat": "a pet"}', ' [{"name": "cat"}]', '["cat"]'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"is a json; it is to be a TSV"):
            concepts.read_dictionary(path)
    path.write_text("[cat]\tin brackets")
    assert concepts.read_dictionary(path).names == ("[cat]",)
    path.write_text("name\tdefinition\n")
    with pytest.raises(ValueError, match="is empty"):
        concepts.read_dictionary(path)
    path.write_text("cat\tx\n\ty\n")
    with pytest.raises(ValueError, match="no name in line 2"):
        concepts.read_dictionary(path)
    with pytest.raises(ValueError, match="does not exist"):
        concepts.read_dictionary(tmp_path / "absent.tsv")


def test_an_exact_name_wins_over_its_plural():
    vocabulary = Vocabulary(("socks", "sock", "sock"), ("two", "one", "again"))
    assert vocabulary.definition("sock") == "one"
    assert vocabulary.definition("socks") == "two"


def test_ids_are_hashes_of_what_is_encoded():
    encode = Encoder()
    first, same, other = encode(["Red  Star", "red star", "blue star"]).ids
    assert first == same != other
    tokens = tokenizer.tokenize("red star")[0]
    assert int(first) == int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "big")
    # texts that differ only beyond the cut are one concept
    long = "a b c d e f g h i j k l m n"
    ids = encode([long, long + " o", long + " p"])
    assert len(set(ids.ids.tolist())) == 1
    assert ids.truncated.tolist() == [False, True, True]
    np.testing.assert_array_equal(ids.tokens, tokenizer.tokenize([long, long + " o", long + " p"]))


def test_encoder_gives_the_same_with_a_full_cache_and_without():
    texts = [f"thing {i % 7}" for i in range(20)]
    expected = Encoder()(texts)
    tiny = Encoder(cache_size=3)
    for remember in (True, True, False):
        for part, again in zip(expected, tiny(texts, remember=remember), strict=True):
            np.testing.assert_array_equal(part, again)
    assert Encoder()([]).tokens.shape == (0, 16)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=20), st.lists(st.integers(0, 20), max_size=30), st.integers(0, 40))
def test_table_against_a_loop(positives, negatives, spare):
    order = list(dict.fromkeys(positives))
    capacity = len(order) + spare
    both = list(dict.fromkeys(positives + negatives))
    table = concepts.build_table(encoded(positives), encoded(negatives), capacity=capacity)
    assert table.tokens.shape == (capacity, 3)
    assert table.ids[table.mask].tolist() == both[:capacity]
    assert table.mask.tolist() == [i < len(both) for i in range(capacity)]
    assert not table.tokens[~table.mask].any()
    assert not table.ids[~table.mask].any()
    assert [int(table.ids[row]) for row in table.rows] == positives
    assert table.tokens[table.mask][:, 1].tolist() == [n + 1 for n in both[:capacity]]
    assert table.num_cut == max(len(both) - capacity, 0)


def test_table_never_cuts_a_positive():
    with pytest.raises(ValueError, match=r"3 positive concepts but its table 2 rows; raise max_concepts"):
        concepts.build_table(encoded([1, 2, 3]), encoded([4]), capacity=2)


def draws(num, seed=0):
    return np.random.default_rng(seed).random(concepts.num_draws(num))


def drawn_names(source, names, num, seed=0, **options):
    drawn = source.draw(num, draws(num, seed), **options)
    assert len(set(drawn.tolist())) == len(drawn)
    return [names[i] for i in drawn]


def test_negatives_leave_out_positives_synonyms_and_the_caption():
    names = ("cat", "kitty", "dog", "dogs", "a bird", "horse", "art")
    definitions = ("small animal", "small animal", "loyal", "", "", "", "")
    source = pool(*names, definitions=definitions)
    for seed in range(20):
        assert set(drawn_names(source, names, 10, seed, present=["cat"])) == set(names[2:])
        assert set(drawn_names(source, names, 10, seed, present=["A dog"])) == {
            "cat",
            "kitty",
            "a bird",
            "horse",
            "art",
        }
        caption = "the birds at a PARTY on horseback"
        assert set(drawn_names(source, names, 10, seed, present=[], caption=caption)) == set(names[:4])


def test_known_negatives_come_first_and_unsure_ones_never():
    names = tuple(f"thing {i} x" for i in range(50))
    source = pool(*names)
    for seed in range(20):
        drawn = drawn_names(source, names, 10, seed, present=[names[0]], first=names[5:8], never=names[10:40])
        assert set(drawn[:3]) == set(names[5:8])
        assert not {names[0], *names[10:40]} & set(drawn)
    assert len(source.draw(99, draws(99), present=[names[0]])) == 49
    assert len(source.draw(0, draws(0), present=[])) == 0
    assert len(source.draw(-3, draws(0), present=[])) == 0


def test_negatives_are_drawn_evenly_and_by_the_given_numbers_alone():
    names = tuple(f"thing {i} x" for i in range(20))
    source = pool(*names)
    counts = np.zeros(20)
    np.testing.assert_array_equal(np.sort(source.draw(20, draws(20)[:2], present=[])), np.arange(20))
    for seed in range(400):
        drawn = source.draw(5, draws(5, seed), present=[])
        np.testing.assert_array_equal(drawn, source.draw(5, draws(5, seed), present=[]))
        counts[drawn] += 1
    assert counts.min() > 60  # 100 expected, 8.7 standard deviation
    assert counts.max() < 140


def test_numbers_for_draws_come_in_fours_and_the_memory_of_texts_has_a_bound():
    for num in range(200):
        assert concepts.num_draws(num) % 4 == 0  # a generator counts in fours
        assert concepts.num_draws(num) >= 2 * num
    encoder = concepts.Encoder(cache_size=3)
    for texts in (["a", "b"], ["c", "d"], ["c", "d", "e"], ["a", "b", "c", "d"], ["a"]):
        encoded = encoder(texts)
        np.testing.assert_array_equal(encoded.tokens, concepts.Encoder()(texts).tokens)
        assert len(encoder._cache) <= max(3, len(texts))


def test_long_texts_of_positives_and_negatives_are_counted_once_each():
    encoder = Encoder(max_length=5)
    long, short = "a long red thing", "cat"
    table = concepts.build_table(encoder([short, long]), encoder(["a long blue thing", long, short]), capacity=8)
    assert (table.num_truncated, table.num_cut, table.rows.tolist()) == (2, 0, [0, 1])


def test_classes_of_a_closed_vocabulary_differ_in_their_tokens():
    classes = ("cat", "traffic light", "dog")
    np.testing.assert_array_equal(
        concepts.class_tokens(classes, context_length=8), tokenizer.tokenize(classes, max_length=8)
    )
    with pytest.raises(ValueError, match="'dog' and 'DOG', which are the same 8 tokens; name every class once"):
        concepts.class_tokens((*classes, "DOG"), context_length=8)
    section = {"context_length": 8, "classes": classes}
    concepts.check_classes(["CAT", "dog"], section, where="w")
    concepts.check_classes(["anything"], section | {"classes": ()}, where="w")
    for texts, said in (
        (["cup", "cat"], r"w: 1 of 2 texts are none of the 3 classes .*: 'cup'\. "),
        (["a", "b", "c"], r"w: 3 of 3 texts .*: 'a', 'b', 'c'\. "),
        (["a", "b", "c", "d"], r"w: 4 of 4 texts .*: 'a', 'b', 'c', …\. "),
    ):
        with pytest.raises(ValueError, match=said):
            concepts.check_classes(texts, section, where="w")
