"""Arrays that are a pure function of a name and a shape, so that fixtures need not hold weights or inputs.

Integer hashing instead of a random generator: equal on every NumPy version and machine.
"""

import zlib

import numpy as np


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns float32 values spread evenly over [-sqrt(3), sqrt(3)): mean 0, variance 1."""
    size = int(np.prod(shape, dtype=np.int64))
    x = np.arange(size, dtype=np.uint32)
    x ^= np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 0x9E3779B9), (13, 1)):  # lowbias32, one round more
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    return ((x.astype(np.float32) / np.float32(2**31) - 1) * np.float32(3**0.5)).reshape(shape)


def parameter(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the value of a model parameter: sizes that make every part of the model matter to the output."""
    x = uniform(path, shape)
    leaf = path.rsplit("/", 1)[-1]
    if leaf == "scale":
        return 1 + 0.2 * x
    if leaf == "kernel":
        return x * np.float32(np.prod(shape[:-1]) ** -0.5)
    size = {"bias": 0.2, "embedding": 0.5, "position_embedding": 0.5}
    size |= dict.fromkeys(("relative_position_table", "level_scales", "logit_scale", "logit_bias"), 1.0)
    return size[leaf] * x


def foreign(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the value of a parameter of a PyTorch library, by its name there."""
    x = uniform(name, shape)
    if name.endswith("weight") and len(shape) == 1:
        return 1 + 0.2 * x
    if len(shape) > 1 and not name.endswith(("embedding.weight", "positional_embedding", "table")):
        return x * np.float32(np.prod(shape[1:]) ** -0.5)  # kernels are (outputs, inputs)
    return np.asarray(x * np.float32(0.2 if name.endswith("bias") else 0.5))


def sample(x: np.ndarray, count: int = 256) -> np.ndarray:
    """Returns evenly spaced entries of the flattened array, first and last included."""
    x = np.asarray(x).reshape(-1)
    return x[np.linspace(0, x.size - 1, min(count, x.size)).round().astype(np.int64)]


def digest(name: str, x: np.ndarray) -> np.ndarray:
    """Returns float64[7] that any change of the array would change, the first its root mean square.

    The others are of its size too: two sums with random signs and sizes over the square root of the number of entries,
    and four entries.
    """
    x = np.asarray(x, np.float64)
    sums = [np.sum(x * uniform(f"digest{i}/{name}", x.shape)) / max(x.size, 1) ** 0.5 for i in range(2)]
    return np.array([np.mean(x**2) ** 0.5, *sums, *np.resize(sample(x, 4), 4)])


def difference(name: str, x: np.ndarray, expected: np.ndarray) -> float:
    """Returns how far an array is from a digest of it, in parts of its root mean square."""
    return float(np.abs(digest(name, x) - expected).max() / max(expected[0], 1e-30))
