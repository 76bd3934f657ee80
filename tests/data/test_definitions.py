"""What is said of names without a definition, and of how many names negatives are drawn from, before and in a run."""

import logging

from detclipv2_jax import train
from detclipv2_jax.data import batches
from detclipv2_jax.data.definitions import defined, evaluation_notes, training_notes
from detclipv2_jax.data.streams import eval_streams, train_streams
from detclipv2_jax.eval import loop

WORDS = "cat\ta pet\ndog\ta friend\nred car\ta vehicle\nzebra\ta horse\nanvil\n"


def named(config, folder, *kinds):
    """Makes the sections name one dictionary, which has three of six categories."""
    (folder / "words.tsv").write_text(WORDS)
    for kind in kinds:
        config[kind].dictionary = str(folder / "words.tsv")
    return config


def test_names_without_a_definition_are_counted_and_the_first_of_them_named():
    assert defined(["a", "b"], ["x", "y"]) == "2 of 2 names have a definition"
    names = [f"n{i}" for i in range(7)]
    assert defined(names, ["x", *[""] * 6]) == "1 of 7 names have a definition (first without: n1, n2, n3, n4, n5, …)"
    assert defined(names, ["x", "y", *[""] * 5]).endswith("(first without: n2, n3, n4, n5, n6)")
    assert "(first without: 'a\\x1b[0m')" in defined(["a\x1b[0m"], [""])


def test_a_line_for_each_source_and_each_pool(config, tmp_path):
    negatives = "grounding: 5 names to draw negatives from, those of the dictionary"
    found = "detection, detection: 3 of 6 names have a definition (first without: tree, traffic light, cup)"
    assert training_notes(train_streams(named(config, tmp_path, "detection", "grounding"))) == [found, negatives]
    config.grounding.definitions = config.image_text.definitions = True
    config.detection.definitions = False
    lacking = "tree, a cup, traffic light, a blue boat, a man, …"
    assert training_notes(train_streams(named(config, tmp_path, "image_text"))) == [
        f"grounding, grounding: 4 of 12 names have a definition (first without: {lacking})",
        negatives,
        "image_text, pairs: of the dictionary 4 of 5 names have a definition (first without: anvil); "
        "phrases without one are counted",
    ]
    config.grounding.dictionary, config.grounding.definitions = "", False
    own = "grounding, grounding: 12 names to draw negatives from, its own phrases"
    assert training_notes(train_streams(config))[0] == own


def test_phrases_of_captions_without_a_definition_are_counted_as_they_come(config, tmp_path):
    named(config, tmp_path, "image_text")
    for definitions in (False, True):
        config.image_text.definitions = definitions
        stream = train_streams(config)[-1]
        for n in range(7):  # seven examples in batches of four
            stream.batch(n)
        # of their 13 phrases 5 are cats, dogs and a red car
        assert stream.counters[batches.BARE_PHRASES] == 4 * 8 * definitions


def test_a_run_says_so_at_its_start(config, micro, tmp_path, caplog):
    named(config, tmp_path, "detection", "grounding", "eval").model = micro.model
    config.init_from.swin = config.init_from.text = ""
    config.eval.batch_size = 8
    with caplog.at_level(logging.INFO, logger="absl"):
        run = train.make_run(config, tmp_path / "run")
    said = [record.getMessage() for record in caplog.records]
    [asked] = evaluation_notes(eval_streams(config.eval, input_config=config.input)[0].ground_truth)
    assert asked == "eval: 3 of 6 names have a definition (first without: tree, traffic light, cup)"
    assert [line for line in said if "names" in line] == [asked, *training_notes(run.streams)]
    config.eval.definitions = False
    assert evaluation_notes(loop.make_streams(config)[0].ground_truth) == []
