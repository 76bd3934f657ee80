"""Compares outputs and gradients of a part of the model with torch's (tests/golden/detector.py)."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import seeded  # noqa: E402  (lives beside the fixtures, which are made in another environment)

TOLERANCE = 5e-5  # of an array's root mean square: float32 against float64


def seeded_params(prefix, module, *arguments, **options):
    """Returns parameters of a module with the seeded values of their names."""
    shapes = jax.eval_shape(lambda key: module.init(key, *arguments, **options), jax.random.key(0))["params"]

    def fill(path, leaf):
        return seeded.parameter(prefix + jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def check(part, run, *, params, inputs=None, tolerance=TOLERANCE):
    """Asserts that a part's outputs and gradients are those of torch.

    Args:
      part: its key in gradients.npz.
      run: (params, inputs) -> outputs by name.
      params: by the names of the whole model.
      inputs: arrays by name, whose gradients are compared too.
      tolerance: of an array's root mean square.
    """

    @jax.jit
    def evaluate(operands):
        def loss(operands):
            outputs = run(*operands)
            weights = {name: seeded.uniform(f"above/{name}", x.shape) for name, x in outputs.items()}
            return sum(jnp.sum(x * weights[name]) for name, x in outputs.items()), outputs

        (_, outputs), found = jax.value_and_grad(loss, has_aux=True)(operands)
        return outputs, found

    outputs, found = evaluate((params, inputs or {}))
    arrays = dict(outputs)
    for tree in found:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays["gradient/" + jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
    with np.load(GOLDEN / "gradients.npz") as golden:
        names, digests = golden[f"{part}/names"], golden[f"{part}/digests"]
    assert sorted(arrays) == names.tolist()
    wrong = {}
    for name, digest in zip(names.tolist(), digests, strict=True):
        if (error := seeded.difference(name, arrays[name], digest)) > tolerance:
            wrong[name] = error
    assert not wrong
