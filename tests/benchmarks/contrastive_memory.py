"""Memory and bytes on the network of the contrastive loss, ours and plain, read from compiled programs; nothing runs.

    python tests/benchmarks/contrastive_memory.py                      # 8, 32 and 128 simulated CPU devices
    python tests/benchmarks/contrastive_memory.py --platform=tpu       # TPU v5e programs; needs libtpu, no TPU

The last line of stdout is the table's content as one JSON list.
"""

import argparse
import json
import os
import re

TOPOLOGIES = {8: "v5e:2x4", 16: "v5e:4x4", 32: "v5e:4x8", 64: "v5e:8x8", 128: "v5e:8x16", 256: "v5e:16x16"}
ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "u64": 8,
    "s64": 8,
}


def collectives(hlo: str, num_devices: int) -> list[tuple[str, int]]:
    """Returns (kind, bytes of the larger one of operand and result) of every collective of a compiled program."""
    found = []
    for line in hlo.splitlines():
        match = re.search(
            r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(", line
        )
        if match:
            shapes = re.findall(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]", match[1])
            sizes = [ITEM_BYTES[kind] * _product(dims) for kind, dims in shapes]
            # an asynchronous operation's result is (operand, result); several operands are merged into one operation
            size = max(sizes) if match[3] else sum(sizes)
            found.append((match[2], size * num_devices if match[2] == "reduce-scatter" else size))
    return found


def _product(dims: str) -> int:
    result = 1
    for dim in filter(None, dims.split(",")):
        result *= int(dim)
    return result


def arguments(num_images, num_proposals, num_concepts, dim, num_phrases, split, replicated):
    """Returns the array arguments of `word_region_loss` as shapes."""
    import jax
    import jax.numpy as jnp

    def rows(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=split)

    return {
        "regions": rows((num_images, num_proposals, dim), jnp.bfloat16),
        "text": rows((num_concepts, dim), jnp.float32),
        "scale": jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated),
        "region_mask": rows((num_images, num_proposals), bool),
        "concept_mask": rows((num_concepts,), bool),
        "canonical": rows((num_concepts,), jnp.int32),
        "caption_concepts": rows((num_images, num_phrases), jnp.int32),
        "caption_mask": rows((num_images, num_phrases), bool),
        "image_mask": rows((num_images,), bool),
    }


def measure(loss, shapes, num_devices):
    """Returns what the compiled forward and backward pass needs on each device."""
    import jax

    learned = {name: shapes[name] for name in ("regions", "text", "scale")}
    rest = {name: x for name, x in shapes.items() if name not in learned}
    gradient = jax.value_and_grad(lambda learned, rest: loss(learned | rest), has_aux=True)
    program = jax.jit(gradient).lower(learned, rest).compile()
    found = collectives(program.as_text(), num_devices)
    return {
        "memory": program.memory_analysis().temp_size_in_bytes,
        "network": sum(size for _, size in found),
        "collectives": found,
        "flops": program.cost_analysis()["flops"],  # one turn of each loop
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="*", default=[8, 32, 128])
    parser.add_argument("--images", type=int, default=192, help="a device")
    parser.add_argument("--proposals", type=int, default=100)
    parser.add_argument("--concepts", type=int, default=6, help="an image, distinct over the batch")
    parser.add_argument("--phrases", type=int, default=9, help="places for concepts a caption")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--chunk_mb", type=int, default=128)
    parser.add_argument("--platform", default="cpu", choices=["cpu", "tpu"])
    parser.add_argument("--no_plain", action="store_true")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"  # a TPU program is compiled for a described topology
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max(args.devices)}"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    import contrastive as benchmark  # beside this file
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    def plain(arrays):
        return benchmark.plain(arrays, temperature=0.5, label_smoothing=0.1)

    def ours(arrays):
        return benchmark.ours(
            arrays | {"region_areas": None},
            temperature=0.5,
            label_smoothing=0.1,
            chunk_bytes=args.chunk_mb << 20,
        )

    results = []
    for num_devices in args.devices:
        if args.platform == "tpu":
            topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[num_devices])
            devices = topology.devices
        else:
            devices = jax.devices()[:num_devices]
        shape = (num_devices // 2, 2) if num_devices > 1 else (1, 1)
        mesh = Mesh(np.array(devices).reshape(shape), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        split, replicated = (NamedSharding(mesh, spec) for spec in (PartitionSpec(("data", "fsdp")), PartitionSpec()))
        num_images = args.images * num_devices
        num_concepts = -(-args.concepts * args.images // 8) * 8 * num_devices
        shapes = arguments(num_images, args.proposals, num_concepts, args.dim, args.phrases, split, replicated)
        result = {"devices": num_devices, "images": num_images, "concepts": num_concepts}
        with jax.set_mesh(mesh):
            result["ours"] = measure(ours, shapes, num_devices)
            if not args.no_plain:
                result["plain"] = measure(plain, shapes, num_devices)
        results.append(result)

    print("| images | devices | concepts | memory, plain | memory, ours | network, plain | network, ours |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        row = [f"{r['images']:,}", r["devices"], f"{r['concepts']:,}"]
        for what in ("memory", "network"):
            row += [f"{r[form][what] / 1e9:.2f} GB" if form in r else "–" for form in ("plain", "ours")]
        print("| " + " | ".join(map(str, row)) + " |")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
