"""Plants faults one by one and runs the tests that must notice; says which faults survive.

    python -m tests.mutations [--only=TEXT] [--sample=N | --random=N] [--seed=S] [--jobs=N] [--fresh] [--passed]

Every fault is written into a copy of the repository, never into the working tree. Before it, its tests must pass in
that copy. Verdicts are kept in .cache/mutations.json and taken from there while file and tests are the same.
Exits with 1 if tests fail without a fault, if a fault could not be tried, or if fewer than 95% die or one survives
without a reason in the list. --random plants faults that are not in the list, see drawn.py, before the tests that
mirror their file; whether a survivor changes anything is then for you to judge.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import random
import sys
import time
from collections.abc import Sequence

from tests.mutations import drawn, server
from tests.mutations.fault import Fault, problems
from tests.mutations.listed import FAULTS

ROOT = pathlib.Path(__file__).parents[2]
MUST_DIE = 0.95
LATE_S, LATE_FACTOR = 30.0, 4.0  # the time of a fault's tests: so many seconds and so many times that without it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="faults in whose line of the report it stands")
    parser.add_argument("--sample", type=int, metavar="N", help="N of the faults whose tests take seconds")
    parser.add_argument(
        "--random", type=int, metavar="N", help="N faults that nobody chose, instead of the listed ones"
    )
    parser.add_argument("--seed", type=int, default=0, help="which sample")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4), help="faults at once")
    parser.add_argument("--limit_s", type=float, default=600.0, help="seconds that a file of tests may take")
    parser.add_argument("--fresh", action="store_true", help="try again what was tried before")
    parser.add_argument("--passed", action="store_true", help="do not try the tests without a fault: they have passed")
    options = parser.parse_args(arguments)

    chosen = [fault for fault in FAULTS if options.only in fault.name]
    if options.random is not None:
        chosen = drawn.draw(ROOT, num=options.random, seed=options.seed, only=options.only)
    if options.sample is not None:
        fast = [fault for fault in chosen if not fault.slow]
        chosen = random.Random(options.seed).sample(fast, min(options.sample, len(fast)))
    if not chosen:
        print(f"no fault's line contains {options.only!r}")
        return 1
    if wrong := problems(chosen, ROOT):
        print("\n".join(wrong))
        return 1
    print(f"{len(chosen)} faults of {len({fault.file for fault in chosen})} files", flush=True)
    server.warm("detclipv2_jax", ROOT / "tests")
    sound = {} if options.passed else _sound(chosen)
    healthy = _try_all(list(sound.values()), [options.limit_s] * len(sound), options)
    failing = [
        (fault, verdict)
        for fault, verdict in zip(sound.values(), healthy, strict=True)
        if verdict.state != server.SURVIVED
    ]
    for fault, verdict in failing:
        print(f"\nwithout a fault, these tests do not pass: {' '.join(fault.tests)}\n{verdict.state}: {verdict.what}")
    seconds = {file: verdict.seconds for file, verdict in zip(sound, healthy, strict=True)}
    # tests that take far longer than without a fault have noticed it: they wait for what never comes
    limits = [LATE_S + LATE_FACTOR * sum(seconds.get(file, LATE_S) for file in _files(fault)) for fault in chosen]
    verdicts = _try_all(chosen, limits, options)
    return max(report(chosen, verdicts, judged=options.random is None), bool(failing))


def _files(fault: Fault) -> set[str]:
    return {test.split("::")[0] for test in fault.tests}


def _sound(faults: Sequence[Fault]) -> dict[str, Fault]:
    """Returns, for every file of tests, a fault that changes nothing."""
    by_file: dict[str, set[str]] = {}
    for test in (test for fault in faults for test in fault.tests):
        by_file.setdefault(test.split("::")[0], set()).add(test)
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("detclipv2_jax", "tests") for path in (ROOT / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    version = f"version {digest.hexdigest()}"  # part of the key, so that any change of the code asks again
    return {
        file: Fault("pyproject.toml", version, version, (file,) if file in tests else tuple(sorted(tests)), False, "")
        for file, tests in by_file.items()
    }


def _try_all(faults: Sequence[Fault], limits_s: Sequence[float], options: argparse.Namespace) -> list[server.Verdict]:
    """Returns the verdicts of faults; those that are known are not tried again."""
    path = ROOT / ".cache" / "mutations.json"
    path.parent.mkdir(exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() and not options.fresh else {}
    keys = [fault.key(ROOT) for fault in faults]
    todo = [i for i, key in enumerate(keys) if key not in known]
    print(f"{len(keys) - len(todo)} of {len(keys)} verdicts are known", flush=True)
    start = time.monotonic()
    tried = server.run(
        [faults[i] for i in todo],
        root=ROOT,
        folder=path.with_suffix(""),
        jobs=options.jobs,
        limits_s=[limits_s[i] for i in todo],
    )
    found = {}
    for done, (place, verdict) in enumerate(tried, start=1):
        index = todo[place]
        found[index] = verdict
        what = verdict.what if verdict.state in (server.DIED, server.LATE) else ""
        now = f"{done}/{len(todo)} {time.monotonic() - start:5.0f} s"
        print(f"{now}  {verdict.state:8} {verdict.seconds:5.1f} s  {faults[index].name}  {what}", flush=True)
        if verdict.state != server.BROKEN:
            known[keys[index]] = verdict
            path.write_text(json.dumps(known, indent=0))
    return [found[i] if i in found else server.Verdict(*known[key]) for i, key in enumerate(keys)]


def report(faults: Sequence[Fault], verdicts: Sequence[server.Verdict], *, judged: bool = True) -> int:
    """Prints what became of faults, of which those that survive must have a reason if they are judged; exit status."""
    pairs = list(zip(faults, verdicts, strict=True))
    survivors = [fault for fault, verdict in pairs if verdict.state == server.SURVIVED]
    broken = [(fault, verdict) for fault, verdict in pairs if verdict.state == server.BROKEN]
    for fault, verdict in broken:
        print(f"\ncould not be tried: {fault.name}\n{verdict.what}")
    for fault in survivors:
        print(f"\nsurvived: {fault.name}\n  {' '.join(fault.tests)}\n  {fault.reason or 'WITHOUT A REASON'}")
    died = [fault for fault, verdict in pairs if verdict.state in (server.DIED, server.LATE)]
    for fault in (fault for fault in died if fault.reason):
        print(f"\ndied although the list says that it cannot: {fault.name}")
    share = f"{len(died)} of {len(pairs)} died ({len(died) / len(pairs):.0%})"
    print(f"\n{share}, {len(survivors)} survived, {len(broken)} could not be tried")
    unexplained = judged and any(not fault.reason for fault in survivors)
    return int(bool(broken) or unexplained or len(died) < MUST_DIE * len(pairs))


if __name__ == "__main__":
    sys.exit(main())
