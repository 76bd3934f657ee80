"""The list of planted faults applies to the code as it is; the program that tries them tells death from survival."""

import json
import pathlib
import subprocess
import sys

from mutations import drawn, fault, listed
from mutations.fault import Fault

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = (
    "geometry", "models", "losses", "data", "runs", "inference", "visualize", "eval", "train_step.py", "train.py",
    "config.py", "chips.py", "files.py", "prepare", "preflight", "convert", "export", "claims", "demo",
)  # fmt: skip


def test_every_fault_applies_and_no_room_is_left_out():
    assert not fault.problems(listed.FAULTS, ROOT)
    assert len(listed.FAULTS) >= 150
    missing = [room for room in ROOMS if not any(f.file.startswith(f"detclipv2_jax/{room}") for f in listed.FAULTS)]
    assert not missing
    assert sum(bool(f.reason) for f in listed.FAULTS) <= 0.05 * len(listed.FAULTS)


def test_what_cannot_be_planted_is_named():
    good = Fault(
        "detclipv2_jax/geometry/boxes.py", "EPSILON = 1e-6", "EPSILON = 0.0", ("tests/test_files.py",), False, ""
    )
    assert not fault.problems([good], ROOT)
    wrong = [
        (good._replace(original="boxes"), "times in the file, not once"),
        (good._replace(original="EPSILON = 2"), "stands 0 times"),
        (good._replace(mutated="EPSILON ="), "is no Python"),
        (good._replace(tests=("tests/test_absent.py",)), "there is no tests/test_absent.py"),
        (good._replace(tests=("tests/test_files.py::test_absent",)), "there is no tests/test_files.py::test_absent"),
    ]
    for change, message in wrong:
        assert message in " ".join(fault.problems([change], ROOT))
    assert "1 faults are listed twice" in fault.problems([good, good], ROOT)


def test_drawn_faults_apply_are_those_of_their_seed_and_leave_out_what_people_read():
    first = drawn.draw(ROOT, num=25, seed=1)
    assert not fault.problems(first, ROOT)
    assert len(first) == 25
    assert first == drawn.draw(ROOT, num=25, seed=1) != drawn.draw(ROOT, num=25, seed=2)
    assert {f.file.split("/")[1] for f in drawn.draw(ROOT, num=5, seed=0, only="geometry/")} == {"geometry"}
    text = "def f(x: int = 3) -> bool:\n print(5)\n if x < 1.0 and g(x, 7):\n  raise E(f'{x + 1}')\n return -x\n"
    changed = {text[start:end] + " → " + new for start, end, new in drawn._changes(text)}
    assert changed == {
        "3 → 4", " <  →  <= ", "1.0 → 1.25", "7 → 8", "x, 7 → 7, x", " and  →  or ",
        "x < 1.0 and g(x, 7) → (not (x < 1.0 and g(x, 7)))", "-x → (x)",
    }  # fmt: skip


def test_arguments_are_swapped_only_where_their_order_can_matter():
    def swapped(text):
        return [new for start, end, new in drawn._changes(text) if text[start:end] == "a, b"]

    assert swapped("jnp.subtract(a, b)") == swapped("f(a, b)") == swapped("x[0](a, b)") == ["b, a"]
    for text in ("jnp.minimum(a, b)", "np.maximum(a, b)", "jnp.logical_and(a, b)", "math.gcd(a, b)", "max(a, b)"):
        assert not swapped(text)


PROGRAM = """
import json, pathlib, sys
from tests.mutations import server
from tests.mutations.fault import Fault

root = pathlib.Path(sys.argv[1])
changes = ["n + 2", "n + 1 + 0", "n +", "n + 1 if n else loop()", "n + 1"]
faults = [Fault("package.py", "n + 1", text, ("test_package.py",), False, "") for text in changes]
faults.append(faults[0]._replace(tests=("absent.py",)))
found = server.run(faults, root=root, folder=root / "copies", jobs=2, limits_s=[20.0, 20.0, 20.0, 3.0, 20.0, 20.0])
print(json.dumps({index: verdict[:2] for index, verdict in found}))
"""


def test_verdicts(tmp_path):
    (tmp_path / "package.py").write_text(
        "def loop():\n    while True:\n        pass\n\n\ndef after(n):\n    return n + 1\n"
    )
    (tmp_path / "test_package.py").write_text(
        "import subprocess, sys\n\nfrom package import after\n\n\ndef test_here():\n    assert after(0) == 1\n\n\n"
        "def test_in_another_process():\n"
        "    code = 'import package; print(package.after(1))'\n"
        "    assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == '2'\n"
    )
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path], cwd=ROOT, check=True, capture_output=True, text=True
    )
    found = json.loads(run.stdout.splitlines()[-1])
    assert {index: state for index, (state, _) in found.items()} == {
        "0": "died", "1": "survived", "2": "died", "3": "late", "4": "survived", "5": "broken"
    }  # fmt: skip
    assert found["0"][1] == "test_package.py::test_here"
    assert "n + 1\n" in (tmp_path / "package.py").read_text()
