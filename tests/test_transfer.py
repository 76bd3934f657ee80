"""All runs of GLIP's protocol with stand-ins for training and scoring: commands, resumption, table."""

import json
import pathlib
import signal

import numpy as np
import pytest

from detclipv2_jax import commands, transfer
from detclipv2_jax.eval import odinw

MEMBERS = ("Packages", "Raccoon")


def value(flags, name):
    """Returns the value of a flag."""
    [found] = [flag.partition("=")[2] for flag in flags if flag.startswith(f"--{name}=")]
    return found


def write_members(folder, names=MEMBERS):
    categories = [{"id": 0, "name": "all", "supercategory": "none"}, {"id": 1, "name": "a", "supercategory": "all"}]
    for name in names:
        for split in ("train", "valid", "test"):
            path = folder / name / split / "_annotations.coco.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"categories": categories, "annotations": [{"category_id": 1}]}))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two members, and programs that do what is asked: `calls` are the commands, `fails` what of them fail."""
    write_members(tmp_path / "data")
    everyone = {m.name: m for m in odinw.members()}
    monkeypatch.setattr(odinw, "groups", lambda suite: {"mean_13": [everyone[name] for name in MEMBERS]})
    calls, fails = [], []

    def call(command, log):
        calls.append(command)
        if any(part in " ".join(command) for part in fails):
            return 1
        if command[2] == "detclipv2_jax.main":
            (pathlib.Path(value(command, "workdir")) / "checkpoints").mkdir(parents=True)
            return 0
        kind = "zero_shot" if any(flag.startswith("--checkpoint=") for flag in command) else "finetuned"
        source = value(command, "checkpoint" if kind == "zero_shot" else "finetuned")
        found = {name: ap_of(source, name) for name in value(command, "only").split(",")}
        output = pathlib.Path(value(command, "output"))
        output.mkdir(parents=True)
        (output / "scores.json").write_text(json.dumps({kind: found | {"mean_13": None}}))
        return 0

    monkeypatch.setattr(transfer, "_call", call)
    arguments = [f"--checkpoint={tmp_path}/run", f"--data={tmp_path}/data", f"--output={tmp_path}/out"]
    return tmp_path, arguments, calls, fails


def ap_of(source, name):
    """Returns a score that depends on setting, seed and member."""
    setting, _, seed = source.partition("/seed_")
    return int(seed or 50) / 1000 + 0.1 * MEMBERS.index(name) + (0.2 if setting.endswith("/10") else 0.0)


def test_what_is_run_and_its_table(world, capsys):
    folder, arguments, calls, _ = world
    arguments += [
        "--settings=zero_shot,1,10,full",
        "--config=c.py:Raccoon:swin_l",
        '--flags=--config.epochs=3 --x="a b"',
    ]
    assert commands.run(transfer.main, arguments=arguments) == 0
    assert len(calls) == 1 + 2 * 2 * (3 + 3 + 1)
    zero_shot, trained, scored = calls[:3]
    assert (zero_shot[2], value(zero_shot, "only")) == ("detclipv2_jax.eval.odinw", "Packages,Raccoon")
    assert trained[2] == "detclipv2_jax.main"
    assert trained[-2:] == ["--config.epochs=3", "--x=a b"]
    workdir = folder / "out" / "1" / "seed_3" / "Packages"
    assert (value(trained, "config"), value(trained, "workdir")) == ("c.py:Raccoon:swin_l", str(workdir))
    for section, split in (("detection", "train"), ("eval", "valid")):
        place = folder / "data" / "Packages" / split
        assert value(trained, f"config.{section}.annotations") == f"{place}/_annotations.coco.json"
        assert value(trained, f"config.{section}.images") == str(place)
        assert value(trained, f"config.{section}.drop_categories") == "('all',)"
    keys = [f"config.detection.{name}" for name in ("num_shots", "few_shot_seed", "weight")]
    assert [value(trained, key) for key in keys] == ["1", "3", "8"]
    assert (value(scored, "finetuned"), value(scored, "only")) == (str(workdir.parent), "Packages")
    few = [[value(flags, key) for key in keys] for flags in calls if any("num_shots" in flag for flag in flags)]
    assert few[::2] == [[k, seed, passes] for k, passes in (("1", "8"), ("10", "1")) for seed in ("3", "30", "300")]
    assert not list((folder / "out").rglob("checkpoints"))
    with pytest.raises(SystemExit, match="143"):  # what stops it stops the run that it waits for
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
    *lines, last = capsys.readouterr().out.strip().splitlines()
    assert lines[1].startswith("[1/15] zero-shot, Packages, Raccoon: AP 10.0 after 0.0 minutes")
    assert lines[0] == f"[1/15] zero-shot, Packages, Raccoon: {folder}/out/zero_shot/log.txt"
    assert lines[2] == f"[2/15] 1 shot, seed 3, Packages: {folder}/out/1/seed_3/Packages/log.txt"
    spread = np.std([0.3, 3.0, 30.0], ddof=1)
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == "| AP in % | zero-shot | 1 shot | 10 shots | full |"
    assert table[2:] == [
        f"| Packages | 5.0 | 11.1 ± {spread:.1f} | 31.1 ± {spread:.1f} | 5.0 |",
        f"| Raccoon | 15.0 | 21.1 ± {spread:.1f} | 41.1 ± {spread:.1f} | 15.0 |",
        f"| mean_13 | 10.0 | 16.1 ± {spread:.1f} | 36.1 ± {spread:.1f} | 10.0 |",
    ]
    assert (folder / "out" / "table.md").read_text().splitlines() == table
    content = json.loads(last)
    assert content == json.loads((folder / "out" / "scores.json").read_text())
    assert content["scores"]["10"]["seed_30"] == {"Packages": pytest.approx(0.23), "Raccoon": pytest.approx(0.33)}
    assert content["means"]["full"] == {"all": {"mean_13": pytest.approx(0.1)}}


def test_it_goes_on_where_it_stopped(world, capsys):
    folder, arguments, calls, fails = world
    arguments += ["--settings=zero_shot,5", "--seeds=3,30", "--keep"]
    fails.append("5/seed_30/Raccoon")
    assert commands.run(transfer.main, arguments=arguments) == 1
    captured = capsys.readouterr()
    assert calls[-1][2] == "detclipv2_jax.main"  # what was not trained is not scored
    assert (
        "1 runs failed; the same command tries them again:\n[5/5] 5 shots, seed 30, Raccoon: ended with status 1"
        in captured.err
    )
    table = [line for line in captured.out.splitlines() if line.startswith("| ")]
    assert table[-1] == "| mean_13 | 10.0 | 5.3 |"  # of the seed that has both
    assert (folder / "out" / "5" / "seed_3" / "Packages" / "checkpoints").is_dir()
    fails.clear()
    calls.clear()
    assert commands.run(transfer.main, arguments=arguments) == 0
    assert [command[2].rpartition(".")[2] for command in calls] == ["main", "odinw"]
    assert "| mean_13 | 10.0 | 6.7 ± 1.9 |" in capsys.readouterr().out
    calls.clear()
    assert commands.run(transfer.main, arguments=arguments) == 0
    assert not calls
    for change in ("--config=other.py", f"--checkpoint={folder}/other"):
        assert commands.run(transfer.main, arguments=[*arguments, change]) == 1
        assert "give another --output or delete it" in capsys.readouterr().err
    zero_shot = [*arguments, "--settings=zero_shot", "--config=other.py", "--flags=--config.epochs=3"]
    assert commands.run(transfer.main, arguments=zero_shot) == 0  # which knows no recipe


def test_the_table_is_written_after_each_run(world, monkeypatch):
    folder, _, calls, _ = world
    call = transfer._call

    def stop_at_third(command, log):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return call(command, log)

    monkeypatch.setattr(transfer, "_call", stop_at_third)
    given = {"checkpoint": "run", "data": folder / "data", "output": folder / "out", "settings": "full"}
    with pytest.raises(KeyboardInterrupt):
        transfer.main(**given)
    assert json.loads((folder / "out" / "scores.json").read_text())["scores"] == {"full": {"all": {"Packages": 0.05}}}
    assert "| Packages | 5.0 |" in (folder / "out" / "table.md").read_text()


@pytest.mark.parametrize(("shots", "passes"), [("1", 8), ("2", 1), ("3", 4), ("5", 2), ("10", 1), ("20", 1)])
def test_few_shots_are_passed_several_times_an_epoch(world, shots, passes):
    folder, *_ = world
    plan = transfer.Plan("run", folder / "data", "odinw13", "c.py", "", folder / "out")
    assert f"--config.detection.weight={passes}" in plan.training(plan.members[0], shots, 3)


def test_what_is_missing_is_listed_and_the_rest_is_run(world, capsys):
    folder, arguments, calls, _ = world
    for split in ("train", "test"):
        (folder / "data" / "Raccoon" / split / "_annotations.coco.json").unlink()
    assert commands.run(transfer.main, arguments=[*arguments, "--settings=full"]) == 0
    captured = capsys.readouterr()
    assert f"1 of 2 members are not in {folder}/data as <name>/{{test,train,valid}}/annotations.json" in captured.err
    assert captured.err.rstrip().endswith("Raccoon: test, train")
    assert "| Packages | 5.0 |\n" in captured.out
    assert "mean_13" not in captured.out.splitlines()[-2]
    assert len(calls) == 2
    (folder / "data" / "Raccoon" / "test" / "_annotations.coco.json").write_text('{"annotations": []}')
    assert commands.run(transfer.main, arguments=[*arguments, "--settings=zero_shot"]) == 0
    assert "are not in" not in capsys.readouterr().err  # photos for training are not needed
    assert value(calls[-1], "only") == "Packages,Raccoon"
    (folder / "data" / "Raccoon" / "test" / "_annotations.coco.json").unlink()
    (folder / "data" / "Packages" / "test" / "_annotations.coco.json").unlink()
    assert commands.run(transfer.main, arguments=arguments) == 1
    assert "2 of 2 members are not in" in capsys.readouterr().err


def test_settings():
    assert transfer.settings_of("rf20", "", "3,30") == [("zero_shot", 0), ("10", 3), ("10", 30)]
    assert [setting for setting, _ in transfer.settings_of("odinw35", "", "7")] == [
        "zero_shot", "1", "3", "5", "10", "full"
    ]  # fmt: skip
    for wrong in ("0", "two", "full,"):
        with pytest.raises(ValueError, match=r"--settings has .*; allowed: zero_shot, full and numbers of shots"):
            transfer.settings_of("odinw13", wrong, "3")


def test_suites_have_their_members_and_means(tmp_path):
    for suite, num, means in (
        ("odinw13", 13, {"mean_13"}), ("odinw35", 35, {"mean_13", "mean_35"}), ("rf20", 20, {"mean_20"}),
        ("rf100", 100, {"mean_20", "mean_100"}),
    ):  # fmt: skip
        plan = transfer.Plan("run", tmp_path, suite, "c.py", "", tmp_path)
        assert len(plan.members) == num
        scores = {("full", 0): dict.fromkeys((m.name for m in plan.members), 0.5)}
        assert transfer.means_of(plan, scores) == {("full", 0): dict.fromkeys(means, 0.5)}


def test_a_run_that_is_stopped_is_told_so(tmp_path):
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved'))); "
    code += "print('ready', flush=True); time.sleep(60)"
    log = tmp_path / "log.txt"

    def wait(process, wait=transfer.subprocess.Popen.wait):
        while "ready" not in log.read_text():
            pass
        monkeypatch.undo()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(transfer.subprocess.Popen, "wait", wait)
        with pytest.raises(KeyboardInterrupt):
            transfer._call([transfer.sys.executable, "-c", code], log)
    assert log.read_text().split() == ["ready", "saved"]
    code = "import os; print(os.getsid(0) == os.getpid()); raise SystemExit(7)"
    assert transfer._call([transfer.sys.executable, "-c", code], log) == 7
    assert log.read_text().split()[2:] == ["True"]  # Ctrl-C is for the command alone, which tells it
