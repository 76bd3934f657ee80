"""What a compiled program moves through memory and over the network, read from its optimised HLO text.

XLA's own cost analysis counts the body of a loop once and is missing for GPUs. Here a body counts as often as it runs,
also where the number of concepts decides, and a conditional as the branch that moves more, which is chosen for memory
and for each kind of collective. A branch that few batches take (`models.split.RARELY`) does not count.

Every instruction knows the place in the model that it was traced from, so that traffic, and the times of a profile
(`tests/benchmarks/accelerator.py`), can be summed by module.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from detclipv2_jax.models.split import RARELY

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id"}
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?(\S+) = (.*?) ([a-z][a-z0-9\-]*)\((.*?)\)(.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?(\S+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+)([0-9]*)\w*\[([0-9,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|body|to_apply|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")  # of long lists of operands: /*index=5*/
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TRANSFORMED = re.compile(r"(?:(?:jvp|transpose|vmap)\()+([^()]*)\)+")
# what JAX and Flax write into the name of an operation beside modules and scopes: functions, loops, classes, einsums
_NO_MODULE = re.compile(
    r"$|[A-Z]|.*[(<.>]|(eval_jaxpr|while|body|cond|branch_\d+_fun|closed_call|checkpoint|remat2?|rematted_computation"
    rf"|shard_map|{RARELY}|chunks_of_\d+_of_\d+_concepts)$"
)
_CHUNKS = re.compile(r'chunks_of_(\d+)_of_(\d+)_concepts\)*/while"')  # `losses.devices.in_chunks`
_RARE = re.compile(rf"\b{RARELY}\b")
MODULE_DEPTH = 3  # parts of a module's path that are told apart


class Moved(NamedTuple):
    """What one instruction moves through memory."""

    instruction: str
    place: str  # of the operation that it was made from, as JAX names it
    times: float  # that it runs
    memory: float  # bytes read and written, all times together


class Traffic(NamedTuple):
    """Bytes of one device."""

    rows: list[Moved]  # in the order of the program
    network: dict[str, float]  # by kind of collective: the larger one of operand and result
    unknown_loops: int  # loops whose number of turns depends on other data; counted once

    @property
    def memory(self) -> float:
        """Bytes read and written in the device's main memory."""
        return sum(row.memory for row in self.rows)


def module_of(place: str) -> tuple[str, str]:
    """Returns (module or scope, pass) of an operation's name; pass is forward, recomputed or backward."""
    direction = "backward" if "transpose(" in place else "forward"
    if "rematted_computation" in place:
        direction = "recomputed"
    *parts, _ = place.split("/")  # the last part is the operation itself
    # a gradient's name has that of what it differentiates within it
    first = max((i for i, part in enumerate(parts) if "jvp(" in part), default=0)
    parts = [_TRANSFORMED.sub(r"\1", part) for part in parts[first:]]
    parts = [part for part in parts if not _NO_MODULE.match(part)]
    return "/".join(parts[:MODULE_DEPTH]) or "other", direction


def by_module(rows: Iterable[tuple[str, float]]) -> dict[tuple[str, str], float]:
    """Returns sums by (module, pass), the largest first, of pairs (place, amount)."""
    total: dict[tuple[str, str], float] = collections.defaultdict(float)
    for place, amount in rows:
        total[module_of(place)] += amount
    return dict(sorted(total.items(), key=lambda item: -item[1]))


class _Instruction(NamedTuple):
    root: bool
    name: str
    type: str
    opcode: str
    operands: list[str]
    attributes: str


def traffic(text: str, *, num_concepts: int = 0) -> Traffic:
    """Returns what a program moves, from `compiled.as_text()`.

    Args:
      text: the program.
      num_concepts: distinct ones of a batch, over which some loops run in chunks; 0: not known, and neither is their
        number of turns.
    """
    computations: dict[str, list[_Instruction]] = {}
    entry = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif computations and (match := _INSTRUCTION.match(line)):
            listed = _COMMENT.sub("", match[5])
            operands = re.findall(r"%?([\w.\-]+)", listed) if match[4] != "constant" else [match[5]]
            computations[name].append(_Instruction(bool(match[1]), match[2], match[3], match[4], operands, match[6]))

    @functools.cache
    def cost(name: str) -> Traffic:
        rows: list[Moved] = []
        network: dict[str, float] = collections.defaultdict(float)
        unknown = 0

        def add(part: Traffic, times: int = 1) -> None:
            nonlocal unknown
            rows.extend(row._replace(times=times * row.times, memory=times * row.memory) for row in part.rows)
            for kind, size in part.network.items():
                network[kind] += times * size
            unknown += part.unknown_loops

        types = {instruction.name: instruction.type for instruction in computations[name]}
        for instruction in computations[name]:
            opcode = instruction.opcode
            kind = opcode.removesuffix("-start")
            if opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", instruction.attributes)
                turns = _turns(instruction, computations, num_concepts)
                unknown += turns == 0
                if body:
                    add(cost(body[1]), max(turns, 1))
            elif opcode == "conditional":
                names = [part for found in _BRANCHES.findall(instruction.attributes) for part in found if part]
                branches = [cost(branch) for branch in re.findall(r"[\w.\-]+", " ".join(names))]
                usual = [branch for branch in branches if not _is_rare(branch)]
                branches = usual or branches
                most = {kind: max(branch.network.get(kind, 0.0) for branch in branches) for kind in COLLECTIVES}
                add(max(branches, key=lambda branch: branch.memory)._replace(network=most))
            elif opcode in ("call", "async-start"):
                for called in _CALLED.findall(instruction.attributes):
                    add(cost(called))
            elif kind in COLLECTIVES:
                sizes = [_size(array) for array in _ARRAY.findall(instruction.type)]
                # an asynchronous operation's result is (operand, result)
                size = max(sizes) if opcode.endswith("-start") and len(sizes) > 1 else sum(sizes)
                if kind == "reduce-scatter":
                    size = max(size, sum(_bytes(types.get(operand, "")) for operand in instruction.operands))
                network[kind] += size
            elif opcode not in _FREE and not opcode.endswith("-done"):
                place = _OP_NAME.search(instruction.attributes)
                moved = _moved(instruction, types, computations)
                rows.append(Moved(instruction.name, place[1] if place else "", 1.0, moved))
        return Traffic(rows, {kind: size for kind, size in network.items() if size}, unknown)

    return cost(entry)


def _is_rare(branch: Traffic) -> bool:
    """Returns whether most of what has a name is named so; what two branches share has the name of one of them."""
    named = [row.place for row in branch.rows if row.place]
    return 2 * sum(bool(_RARE.search(place)) for place in named) > len(named)


def _turns(loop: _Instruction, computations: dict[str, list[_Instruction]], num_concepts: int) -> int:
    """Returns how often the body of a loop runs, 0 if the program does not tell: for TPUs only the condition does."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    if chunks := _CHUNKS.search(loop.attributes):
        return -(-min(num_concepts, int(chunks[2])) // int(chunks[1]))
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    instructions = computations[condition[1]] if condition else []
    constants = {
        x.name: int(x.operands[0].strip("{}"))  # of s32[1] it is {300}
        for x in instructions
        if x.opcode == "constant" and re.match(r"s32\[1?\]", x.type)
    }
    compare = [x for x in instructions if x.root and x.opcode == "compare" and "direction=LT" in x.attributes]
    return constants.get(compare[0].operands[1], 0) if compare else 0


def _moved(instruction: _Instruction, types: dict[str, str], computations: dict[str, list[_Instruction]]) -> float:
    """Returns the bytes an instruction reads and writes; of an array it takes a slice from, the slice."""
    result = _bytes(instruction.type)
    operands = instruction.operands
    if instruction.opcode == "custom-call":  # a kernel is given an array once for each of the parts that it reads
        operands = list(dict.fromkeys(operands))
    reads = [_bytes(types.get(operand, "")) for operand in operands]
    if instruction.opcode == "copy-start":  # (target, source, context)
        return result
    if instruction.opcode in ("slice-start", "dynamic-slice-start"):  # ((whole, …), slice, context)
        whole, part, *_ = _ARRAY.findall(instruction.type)
        return _size(part) * (_in_main_memory(whole) + _in_main_memory(part))
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * result
    if instruction.opcode == "dynamic-update-slice":
        return 2 * reads[1]
    called = _CALLED.search(instruction.attributes)
    if instruction.opcode == "fusion" and called:
        body = computations[called[1]]
        inner = {x.name: x for x in body}
        for x in body:
            if x.opcode != "parameter":
                continue
            same, users = _views(x.name, body)
            position = int(x.operands[0])
            if (taken := _taken(x.name, body, computations)) is not None:
                reads[position] = min(reads[position], taken)
            elif any(user.opcode == "dynamic-update-slice" and user.operands[0] in same for user in users):
                updates = [inner[user.operands[1]].type for user in users if user.opcode == "dynamic-update-slice"]
                reads[position], result = 0.0, max(0.0, result - reads[position]) + sum(map(_bytes, updates))
    return result + sum(reads)


def _taken(name: str, body: list[_Instruction], computations: dict[str, list[_Instruction]]) -> float | None:
    """Returns the bytes of the slices taken from an array, in fusions within fusions, too; None: all of it is read."""
    same, users = _views(name, body)
    total = 0.0
    for user in users:
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            total += _bytes(user.type)
            continue
        called = _CALLED.search(user.attributes)
        if user.opcode != "fusion" or not called:
            return None
        inner = computations[called[1]]
        for x in inner:
            if x.opcode == "parameter" and user.operands[int(x.operands[0])] in same:
                if (part := _taken(x.name, inner, computations)) is None:
                    return None
                total += part
    return total if users else None


def _views(name: str, body: list[_Instruction]) -> tuple[set[str], list[_Instruction]]:
    """Returns the names under which an array is known in a computation, and what uses it: a bitcast moves nothing."""
    same, users = {name}, []
    for x in body:  # in order: what is used stands before its users
        if same.isdisjoint(x.operands):
            continue
        if x.opcode == "bitcast":
            same.add(x.name)
        else:
            users.append(x)
    return same, users


def _bytes(shape: str) -> float:
    """Returns the bytes of all arrays of a type that lie in main memory; S(1) marks a TPU's vector memory."""
    return sum(_size(array) for array in _ARRAY.findall(shape) if _in_main_memory(array))


def _in_main_memory(array: tuple[str, str, str, str]) -> bool:
    return not re.search(r"S\([1-9]", array[3])


def _size(array: tuple[str, str, str, str]) -> float:
    kind, bits, dims, _ = array
    return (1.0 if kind == "pred" else int(bits or 0) / 8) * math.prod(int(n) for n in dims.split(",") if n)
