"""Fine-tuning: plateaus and early stops across restarts, frozen towers, the best checkpoint, a second set, ODinW."""

import json
import shutil

import flax
import jax
import numpy as np
import pytest
import stand_in
from test_main import _steps_are_compiled_once, lines, start, with_steps  # noqa: F401  (steps are shared here too)

from configs import finetune_odinw
from detclipv2_jax import interpolate, session, train
from detclipv2_jax.data import scenes
from detclipv2_jax.eval import loop, odinw
from detclipv2_jax.inference import Detector
from detclipv2_jax.runs import checkpoints, exported
from detclipv2_jax.runs.optimizer import param_name, verdict
from detclipv2_jax.runs.state import TrainState
from detclipv2_jax.visualize import charts


@pytest.fixture(scope="module")
def recipe(micro_session, tmp_path_factory):
    """ODinW's recipe with less patience for the micro model, on 64 px: two steps an epoch, all parts switched on."""
    c = finetune_odinw.get_config()
    with c.unlocked():
        for key in ("model", "loss", "scenes"):
            c[key] = micro_session[key].copy_and_resolve_references()
    for section, short_side in ((c.detection, (48, 64)), (c.eval, 64)):
        section.canvases, section.short_side, section.long_side, section.batch_size = ((64, 64),), short_side, 64, 8
    c.detection.max_boxes, c.detection.num_concepts, c.detection.max_concepts = 8, 12, 96
    c.scenes.update({"num_grounding": 0, "num_image_text": 0, "num_detection": 16})
    c.detection.annotations = c.detection.images = c.eval.annotations = c.eval.images = ""
    c.forgetting.definitions = False
    c.optimizer.learning_rate, c.optimizer.min_learning_rate, c.optimizer.warmup_steps = 1e-3, 2e-4, 0
    c.optimizer.patience, c.optimizer.stop_patience = 1, 2
    c.optimizer.frozen, c.optimizer.ema_decay = "text_encoder.*", 0.9
    c.epochs, c.seed, c.log_every_steps, c.pictures_every_steps, c.eval.num_pictures = 20, 0, 1, 0, 0
    c.checkpoint.every_steps, c.checkpoint.keep = 3, 100
    second = tmp_path_factory.mktemp("second")
    scenes.write(**c.scenes.to_dict() | {"folder": second, "num_detection": 0, "num_eval": 4, "seed": 5})
    c.forgetting.annotations, c.forgetting.images = str(second / "eval.json"), str(second)
    return c


@pytest.fixture(scope="module", autouse=True)
def _detectors_are_traced_once():
    """Runs of the same model, a stand-in, share what predicts, as they share their steps."""
    detectors = {}

    def shared(model, *, mesh):
        return detectors.setdefault((repr(model), mesh), Detector(model, mesh=mesh))

    with stand_in.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Detector", shared)
        patch.setattr(loop, "Detector", shared)
        patch.setattr(charts, "curves", lambda *_, **__: None)  # they take longer than the steps
        yield


@pytest.fixture(scope="module")
def tuned(recipe, tmp_path_factory):
    """A run until its early stop; (workdir, scores)."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, start(recipe, workdir)


def scores_of(workdir, name="eval/AP"):
    """Returns a score by step."""
    return {step: row[name] for step, row in lines(workdir).items() if name in row}


@pytest.mark.slow
def test_a_plateau_lowers_the_logged_rate_and_ends_the_run(recipe, tuned):
    workdir, _ = tuned
    scores, rates = scores_of(workdir), scores_of(workdir, "detection/learning_rate")
    last = max(scores)
    assert sorted(scores) == list(range(2, last + 1, 2))  # every epoch
    assert sorted(rates) == list(range(1, last + 1))
    assert last == 8  # of 40
    for step, rate in rates.items():
        known = {at: score for at, score in scores.items() if at < step}
        assert rate == pytest.approx(1e-3 * verdict(known, recipe.optimizer).factor), step
    assert rates[last] == pytest.approx(2e-4)
    assert verdict(scores, recipe.optimizer).over
    assert not verdict({at: score for at, score in scores.items() if at < last}, recipe.optimizer).over


@pytest.mark.slow
def test_the_best_checkpoint_is_known_and_scored(tuned):
    workdir, result = tuned
    scores = scores_of(workdir)
    best = max(scores, key=lambda step: (scores[step], -step))
    assert json.loads((workdir / "best.json").read_text()) == {"step": best, "score": "AP", "value": scores[best]}
    assert checkpoints.load_for_inference(workdir)[2] == best
    assert result["AP"] == scores[best]
    # the second set: before the first step, and the best checkpoint
    second = scores_of(workdir, "forgetting/AP")
    assert sorted(second) == [0, best]
    assert (result["forgetting/before/AP"], result["forgetting/after/AP"]) == (second[0], second[best])
    for step, ending in ((0, "before"), (best, "after")):
        stored = json.loads((workdir / "forgetting" / "eval" / f"step_{step:08d}_scores.json").read_text())
        assert stored["AP"] == result[f"forgetting/{ending}/AP"]
        assert (stored["protocol"]["images_evaluated"], stored["protocol"]["ema"]) == (4, True)
        assert stored["protocol"]["checkpoint_step"] == step


@pytest.mark.slow
def test_weights_between_a_run_and_its_start_are_scored_on_both_sets(tuned, tmp_path, monkeypatch):
    workdir, _ = tuned
    config, params, _ = checkpoints.load_for_inference(workdir)
    exported.save(tmp_path / "start", config=config, params=jax.tree.map(lambda x: 0.5 * x, params), step=0)
    scored, evaluate = [], loop.Evaluator.__call__
    # of α = 0, 1, 0.5, on the new data and the old; what such a model really reaches is 0
    given = iter((0.1, 0.4, 0.5, 0.2, 0.48, 0.39))

    def call(self, params, *, step):
        scored.append((len(evaluate(self, params, step=step)) > 10, float(jax.numpy.abs(params["logit_bias"]))))
        return {"AP": next(given)}

    monkeypatch.setattr(loop.Evaluator, "__call__", call)
    data = {"new_annotations": f"{workdir}/data/eval.json", "new_images": f"{workdir}/data"}
    options = {"before": str(tmp_path / "start"), "output": str(tmp_path / "kept"), "steps": 2}
    assert "| 0.5 (best) | 48.0 | 39.0 | 95.0 | 97.5 |" in interpolate.run(checkpoint=str(workdir), **options, **data)
    bias = float(abs(params["logit_bias"]))
    assert scored == [(True, pytest.approx(share * bias)) for share in (0.5, 0.5, 1.0, 1.0, 0.75, 0.75)]
    kept = checkpoints.load_for_inference(tmp_path / "kept")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, 0.75 * y, rtol=1e-6), kept[1], params)


@pytest.mark.slow
def test_the_report_names_both_sets(tuned, capsys):
    workdir, result = tuned
    session.report(workdir, result, minutes=1.0)
    printed = capsys.readouterr().out
    assert f"scores in %: AP {100 * result['AP']:.1f}, " in printed
    for ending in ("before", "after"):
        value = 100 * result[f"forgetting/{ending}/AP"]
        assert f"second set, {ending} training in %: AP {value:.1f}, " in printed
    assert f"best checkpoint: step 2, AP {100 * result['AP']:.1f}\n" in printed


@pytest.mark.slow
def test_killed_before_an_evaluation_it_is_the_same_run(recipe, tuned, tmp_path):
    whole, result = tuned
    broken = tmp_path / "run"
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "8")
    rows = [json.loads(row) for row in (broken / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] <= 6 and not (row["step"] == 6 and "eval/AP" in row)]
    rows.append({"step": 3, "eval/AP": 0.9})  # what was evaluated where a run once ended does not count
    (broken / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert start(recipe, broken) == result
    assert {step: row for step, row in lines(broken).items() if step > 3} == {
        step: row for step, row in lines(whole).items() if step > 3
    }
    jax.tree.map(np.testing.assert_array_equal, read(broken, 8), read(whole, 8))
    jax.tree.map(np.testing.assert_array_equal, read(broken, 8, "ema"), read(whole, 8, "ema"))
    # what is over stays over, and the second set was scored once before
    assert start(recipe, broken) == result
    steps = [json.loads(row)["step"] for row in (broken / "metrics.jsonl").read_text().splitlines()]
    assert (max(steps), steps.count(0)) == (8, 1)


def read(workdir, step, item="params"):
    """Returns the parameters, or their averages, of the checkpoint of a step by name."""
    manager = checkpoints.Checkpoints(workdir)
    leaves = jax.tree_util.tree_leaves_with_path(manager.restore_params(step, item))
    manager.close()
    return {param_name(path): np.asarray(value) for path, value in leaves}


@pytest.mark.slow
def test_a_frozen_tower_stays_and_the_average_follows_the_rest(tuned):
    workdir, _ = tuned
    first, kept, params, average = (read(workdir, *which) for which in ((2,), (2, "ema"), (3,), (3, "ema")))
    for name, value in params.items():
        if name.startswith("text_encoder"):
            for other in (first, kept, average):
                np.testing.assert_array_equal(value, other[name], name)
        else:
            np.testing.assert_allclose(average[name], 0.9 * kept[name] + 0.1 * value, rtol=1e-5, atol=1e-7)
    rest = [name for name in params if not name.startswith("text_encoder")]
    assert sum(np.any(params[name] != first[name]) for name in rest) > 0.9 * len(rest)


@pytest.mark.slow
def test_names_encoded_once_train_as_with_the_frozen_tower_in_the_step_and_resume_exactly(recipe, tuned, tmp_path):
    config = recipe.copy_and_resolve_references()
    config.optimizer.text_once, config.forgetting.annotations, config.forgetting.images = True, "", ""
    for num_steps, name in ((4, "whole"), (3, "broken"), (4, "broken")):
        start(with_steps(config, num_steps), tmp_path / name)
    inside, whole, broken = (lines(workdir) for workdir in (tuned[0], tmp_path / "whole", tmp_path / "broken"))
    for step in range(1, 5):
        found = {name: value for name, value in whole[step].items() if name.startswith("detection/")}
        assert found == {name: broken[step][name] for name in found}, step
        assert found == pytest.approx({name: inside[step][name] for name in found}, rel=1e-4), step
    one, other = (read(tmp_path / name, 4) for name in ("whole", "broken"))
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], name)
    one, tower = (read(workdir, 3) for workdir in (tmp_path / "whole", tuned[0]))
    for name, value in one.items():
        np.testing.assert_allclose(value, tower[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_odinw_members_are_tuned_from_a_checkpoint_and_scored(recipe, tuned, shared_data, tmp_path):
    config = with_steps(recipe, 3)
    config.scenes.num_detection = config.scenes.num_eval = 0
    config.init_from.checkpoint = str(tuned[0])
    config.forgetting.annotations = ""
    config.forgetting.images = ""
    _, source, _ = checkpoints.load_for_inference(tuned[0])
    for name in ("Packages", "NorthAmericaMushrooms"):
        folder = shared_data / "odinw" / name
        for section, split in ((config.detection, "train"), (config.eval, "valid")):
            section.annotations, section.images = str(folder / split / "annotations.json"), str(folder / split)
        scores = start(config, tmp_path / "tuned" / name)
        assert scores["AP"] >= 0
        # the averages of the other run are what this one starts from: its tower is frozen
        params = read(tmp_path / "tuned" / name, 3)
        jax.tree.map(np.testing.assert_array_equal, source["text_encoder"], unflatten(params)["text_encoder"])
    result = odinw.run(data=shared_data / "odinw", output=tmp_path / "scores", finetuned=str(tmp_path / "tuned"))
    assert set(result["finetuned"]) == {"Packages", "NorthAmericaMushrooms", "mean_13", "mean_35"}
    protocol = json.loads(
        next((tmp_path / "scores" / "finetuned" / "NorthAmericaMushrooms").rglob("*_scores.json")).read_text()
    )["protocol"]
    assert protocol["prompts"] == ["CoW", "chanterelle"]  # as in training


def unflatten(params):
    """Returns the tree of parameters given by name."""
    return flax.traverse_util.unflatten_dict(params, sep="/")


@pytest.mark.slow
def test_a_run_starts_from_another_with_other_words_and_canvases_but_not_another_model(recipe, tuned, tmp_path):
    config = recipe.copy_and_resolve_references()
    config.init_from.checkpoint = str(tuned[0])
    config.detection.canvases = config.eval.canvases = ((96, 64), (64, 96))
    config.scenes.seed = 7
    run = train.make_run(session.with_scenes(config, tmp_path / "run"), tmp_path / "run")
    manager = checkpoints.Checkpoints(tmp_path / "run", keep=1)
    state = train.initial_state(run, manager)
    manager.close()
    assert int(state.step) == 0
    _, params, _ = checkpoints.load_for_inference(tuned[0])
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    config.model.head.num_convs, config.model.embed_dim = 2, 32
    with pytest.raises(ValueError, match=r"init_from\.checkpoint .* does not fit") as error:
        train.make_run(session.with_scenes(config, tmp_path / "other"), tmp_path / "other")
    for part in (
        "config.model.head.num_convs: 1 -> 2",
        "config.model.embed_dim: 16 -> 32",
        "text_encoder (64, 16) -> (64, 32)",
    ):
        assert part in str(error.value), part
    config.init_from.checkpoint = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere is no workdir"):
        train.make_run(session.with_scenes(config, tmp_path / "third"), tmp_path / "third")


def test_the_newest_checkpoints_stay_and_the_best(tmp_path):
    state = TrainState(step=jax.numpy.zeros((), int), params={"a": jax.numpy.ones(2)}, opt_state=(), ema=None)
    manager = checkpoints.Checkpoints(tmp_path, keep=2)
    for step in range(1, 7):
        if step in (2, 3):
            manager.mark_best(step, score="AP", value=0.1 * step)
        manager.save(step, state)
    manager.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "5", "6"]
    manager = checkpoints.Checkpoints(tmp_path)
    assert (manager.best_step(), manager.latest_step()) == (3, 6)
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    manager.close()
    manager = checkpoints.Checkpoints(tmp_path)
    assert manager.best_step() == 6  # marked, but never written
    manager.close()


def test_a_second_set_that_is_missing_is_named(micro, tmp_path):
    micro.forgetting.annotations, micro.forgetting.images = str(tmp_path / "none.json"), str(tmp_path)
    with pytest.raises(ValueError, match=r"config\.forgetting\.annotations"):
        train.make_run(session.with_scenes(micro, tmp_path), tmp_path)
    micro.forgetting.annotations = micro.forgetting.images = ""
    micro.eval.monitor = "fixed_AP"
    scenes_are_federated = train.make_run(session.with_scenes(micro, tmp_path), tmp_path)
    assert scenes_are_federated.second is None
    plain = json.loads((tmp_path / "data" / "eval.json").read_text())
    for image in plain["images"]:
        del image["neg_category_ids"]
    micro.eval.annotations, micro.eval.images = str(tmp_path / "plain.json"), str(tmp_path / "data")
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    config = session.with_scenes(micro, tmp_path)
    config.eval.annotations = micro.eval.annotations
    with pytest.raises(ValueError, match=r"config\.eval\.monitor 'fixed_AP' is a score of LVIS"):
        train.make_run(config, tmp_path)
