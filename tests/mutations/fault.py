"""A planted fault, and what becomes of it."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence
from typing import NamedTuple


class Fault(NamedTuple):
    """A change of one place in one file that tests must notice.

    file: path from the root of the repository.
    original: stands in the file exactly once.
    mutated: what is put in its place.
    tests: as pytest takes them; one of them must fail.
    slow: whether they take longer than some seconds; samples leave such faults out.
    reason: why no test can notice it, for a fault that is known to survive.

    With the same text before and after it is no fault: its tests must pass.
    """

    file: str
    original: str
    mutated: str
    tests: tuple[str, ...]
    slow: bool
    reason: str

    @property
    def name(self) -> str:
        """Returns one line that says which fault it is."""
        if self.mutated == self.original:
            return f"no fault: {' '.join(self.tests)}"
        before, after = (" ".join(text.split()) for text in (self.original, self.mutated))
        return f"{self.file}: {before} → {after}"

    def key(self, root: pathlib.Path) -> str:
        """Returns a hash of all that decides the verdict but the rest of the package."""
        digest = hashlib.sha256(repr((self.original, self.mutated, self.tests)).encode())
        for path in (self.file, *(test.split("::")[0] for test in self.tests)):
            digest.update((root / path).read_bytes())
        return digest.hexdigest()[:16]


def plant(
    file: str, tests: str, *changes: tuple[str, str] | tuple[str, str, str], slow: bool = False, reason: str = ""
) -> list[Fault]:
    """Returns the faults of one file.

    Args:
      file: within the package.
      tests: within tests/, several with spaces between them.
      changes: (original, mutated), or (original, mutated, tests) where others than `tests` must fail; "::name" is a
        test of the first file of `tests`.
      slow: see `Fault`.
      reason: see `Fault`.
    """
    faults = []
    for original, mutated, *others in changes:
        names = others[0].split() if others else tests.split()
        names = [tests.split()[0].split("::")[0] + name if name.startswith("::") else name for name in names]
        paths = tuple(f"tests/{name}" for name in names)
        faults.append(Fault(f"detclipv2_jax/{file}", original, mutated, paths, slow, reason))
    return faults


def problems(faults: Sequence[Fault], root: pathlib.Path) -> list[str]:
    """Returns what is wrong with a list of faults; nothing is run."""
    found = []
    for fault in faults:
        text = (root / fault.file).read_text(encoding="utf-8")
        if (count := text.count(fault.original)) != 1:
            found.append(f"{fault.name}: the original stands {count} times in the file, not once")
            continue
        try:
            compile(text.replace(fault.original, fault.mutated), fault.file, "exec")
        except SyntaxError as error:
            found.append(f"{fault.name}: the mutated file is no Python: {error}")
        for test in fault.tests:
            path, *names = test.split("[")[0].split("::")
            if not (root / path).is_file():
                found.append(f"{fault.name}: there is no {path}")
            elif any(f"def {name}(" not in (root / path).read_text(encoding="utf-8") for name in names):
                found.append(f"{fault.name}: there is no {test}")
    if twice := len(faults) - len({fault[:3] for fault in faults}):
        found.append(f"{twice} faults are listed twice")
    return found
