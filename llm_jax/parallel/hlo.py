"""Collectives, FLOPs and estimated cycles of a compiled program, parsed from its text, including loop iterations.

    module = hlo.parse(executable.as_text())
    hlo.collectives(module, dict(mesh.shape))      hlo.flops(module)      hlo.cycles(module)

`cost_analysis()` of XLA counts the body of a loop only once, so a scan over layers is counted as one layer.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
SLICES = "slices"
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation|to)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: such as "dot.3" and "dot".
      shape: the text of the result's shape.
      operands: the text between the parentheses of the opcode.
      attributes: the text after them.
    """

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str

    @property
    def operand_names(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.operands)

    def attribute(self, name: str) -> str:
        """The value of NAME=VALUE up to the next comma outside of braces, or ""."""
        match = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return match[1] if match else ""

    @property
    def callees(self) -> list[str]:
        callees = [name for text in _BRANCHES.findall(self.attributes) for name in re.findall(r"[\w.\-]+", text)]
        return _CALLS.findall(self.attributes) + callees


@dataclasses.dataclass(frozen=True)
class HloModule:
    """A compiled program.

    Attributes:
      computations: {name: instructions}, called computations before their callers.
      entry: the name of the computation that runs first.
    """

    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def trips(self) -> dict[str, int]:
        """The number of executions of each computation; a loop with an unknown trip count is counted once."""
        count: collections.Counter[str] = collections.Counter({self.entry: 1})
        for name in reversed(self.computations):
            for instruction in self.computations[name] if count[name] else ():
                factor = _trip_count(instruction, self.computations) if instruction.opcode == "while" else 1
                for callee in instruction.callees:
                    count[callee] += count[name] * factor
        return dict(count)

    def executed(self) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, number of executions) of all executed instructions."""
        for name, instructions in self.computations.items():
            if times := self.trips.get(name, 0):
                for instruction in instructions:
                    yield name, instruction, times

    def shapes(self, computation: str) -> dict[str, str]:
        """{name: shape} of the instructions of a computation."""
        return {i.name: i.shape for i in self.computations[computation]}


@dataclasses.dataclass(frozen=True, order=True)
class Collectives:
    """All collectives of one kind over the same mesh axes.

    Attributes:
      kind: one of `KINDS`.
      axes: the mesh axes that the devices of a group differ in, such as "fsdp" or "data+fsdp"; "other" for groups that
        are no product of axes; "slices" for what is sent between the slices of a TPU.
      count: how many run, loop trips counted.
      bytes: of the whole array that a device takes part in (the result of a gather, the operand of a reduction),
        added up.
    """

    kind: str
    axes: str
    count: int
    bytes: int


def parse(text: str) -> HloModule:
    """The module of the text of `Compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    instructions: list[Instruction] = []
    entry = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].split("(", 1)[0].lstrip("%")
            entry = name if line.startswith("ENTRY") else entry
            instructions = computations[name] = []
        elif line.startswith("  ") and " = " in line and (instruction := _instruction(line)):
            instructions.append(instruction)
    if not entry:
        raise ValueError("the text of a compiled program has an ENTRY computation; this one has none")
    return HloModule(computations, entry)


def _instruction(line: str) -> Instruction | None:
    name, value = line.split(" = ", 1)
    end = _closing(value, 0) + 1 if value.startswith("(") else value.find(" ")
    shape, rest = value[:end], value[end:].lstrip()
    start = rest.find("(")
    if start < 0:
        return None
    stop = _closing(rest, start)
    name = name.split()[-1].lstrip("%")
    return Instruction(name, shape, rest[:start], rest[start + 1 : stop], rest[stop + 1 :])


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return start + match.start()
    return len(text)


def _trip_count(loop: Instruction, computations: Mapping[str, list[Instruction]]) -> int:
    """The trips of a `while`: those that the compiler recorded, or what its condition and its counter say.

    The condition compares a counter, from 0, with a constant; the body of an unrolled loop adds more than 1 to it.
    """
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(match[1])
    condition, body = (computations.get(loop.attribute(name).lstrip("%"), []) for name in ("condition", "body"))
    limit = max((int(i.operands) for i in condition if i.opcode == "constant" and i.operands.isdigit()), default=1)
    counters = [i.attribute("index") for i in condition if i.opcode == "get-tuple-element"]
    step = 0
    if len(counters) == 1 and body and int(counters[0]) < len(body[-1].operand_names):
        step = _added(body[-1].operand_names[int(counters[0])], body, computations)
    return max(-(-limit // (step or 1)), 1)


def _added(name: str, body: list[Instruction], computations: Mapping[str, list[Instruction]]) -> int:
    """The sum of the constants that additions and the fusions of them add up to the value `name`."""
    by_name = {i.name: i for i in body}
    instruction = by_name.get(name)
    if instruction is None:
        return 0
    if instruction.opcode == "constant":
        return int(instruction.operands) if instruction.operands.isdigit() else 0
    inputs = instruction.operand_names
    if instruction.opcode == "fusion":
        fused = computations[instruction.callees[0]]
        inner = _added(fused[-1].name, fused, computations)
        constants = [n for n in inputs if by_name[n].opcode == "constant"] if fused[-1].opcode == "add" else []
        return inner + sum(_added(n, body, computations) for n in inputs if n not in constants and len(inputs) == 1)
    if instruction.opcode in ("add", "copy", "bitcast"):
        return sum(_added(n, body, computations) for n in inputs)
    return 0


def dimensions(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, sizes) of every array of a shape, which may be a tuple."""
    return [(t, tuple(int(n) for n in sizes.split(",") if n)) for t, sizes in _ARRAY.findall(shape)]


def num_bytes(shape: str) -> int:
    """The size of the arrays of a shape in bytes, without padding."""
    return sum(math.prod(sizes) * _bits(dtype) // 8 for dtype, sizes in dimensions(shape))


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    match = re.match(r"[a-z]+(\d+)", dtype)
    return int(match[1]) if match else 8


# ---------------------------------------------------------------- collectives


def collectives(module: HloModule, mesh: Mapping[str, int]) -> list[Collectives]:
    """The collectives of a program by kind and mesh axes, sorted.

    An asynchronous collective may stand in several computations, with one channel; it counts once.

    Args:
      mesh: {axis: size}, in the order of the mesh, over whose devices the program was compiled.
    """
    largest: dict[str, tuple[int, str, str, int]] = {}
    for i, (computation, instruction, times) in enumerate(module.executed()):
        kind = instruction.opcode.removesuffix("-start")
        between = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        if kind == "send" and between:
            kind = between[1].lower().replace("_", "-")
        elif kind not in KINDS:
            continue
        # Sends between slices count their channels apart from collectives.
        channel = f"{instruction.opcode == 'send'} {instruction.attribute('channel_id') or f'line {i}'}"
        moved = _moved(kind, instruction, module.shapes(computation))
        if channel not in largest or times > largest[channel][0]:
            axes = SLICES if instruction.opcode == "send" else _axes(instruction, mesh)
            largest[channel] = times, kind, axes, moved
    totals: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
    for times, kind, axes, moved in largest.values():
        totals[kind, axes][0] += times
        totals[kind, axes][1] += times * moved
    return sorted(Collectives(kind, axes, count, size) for (kind, axes), (count, size) in totals.items() if axes)


def _moved(kind: str, instruction: Instruction, shapes: Mapping[str, str]) -> int:
    """The bytes of the whole array: the result of a gather, the operands of all others."""
    if kind != "all-gather":
        return sum(num_bytes(shapes.get(name, "")) for name in instruction.operand_names)
    if instruction.opcode.endswith("-start"):  # the shape is (operands, results)
        operands = sum(num_bytes(shapes.get(name, "")) for name in instruction.operand_names)
        return num_bytes(instruction.shape) - operands
    return num_bytes(instruction.shape)


def _axes(instruction: Instruction, mesh: Mapping[str, int]) -> str:
    """The mesh axes that the devices of a group differ in; "" for groups of one device."""
    sizes, names = tuple(mesh.values()), list(mesh)
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.attributes)
    if pairs:
        ids = [int(n) for n in re.findall(r"\d+", pairs[1])]
        coordinates = np.array(np.unravel_index(ids, sizes)).T.reshape(-1, 2, len(sizes))
        changed = np.any(coordinates[:, 0] != coordinates[:, 1], 0)
        return "+".join(name for name, flag in zip(names, changed, strict=True) if flag)
    group = _first_group(instruction.attributes, math.prod(sizes))
    coordinates = np.array(np.unravel_index(group, sizes)).T
    changed = np.any(coordinates != coordinates[0], 0)
    expected = math.prod(size for size, flag in zip(sizes, changed, strict=True) if flag)
    return "+".join(n for n, flag in zip(names, changed, strict=True) if flag) if expected == len(group) else "other"


def _first_group(attributes: str, devices: int) -> list[int]:
    """The devices of the first of the replica groups, in any of the three notations of XLA."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return [int(n) for n in match[1].split(",")]
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        groups, size = int(match[1]), int(match[2])
        return [int(n) for n in _device_ids(match[3], groups * size).reshape(groups, size)[0]]
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? ?\{([^}]*)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        ids = _device_ids(match[2] or "", math.prod(axes.values())).reshape(tuple(axes.values()))
        listed = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3])
        index: list = [slice(None) if any(n == name for n, *_ in listed) else 0 for name in axes]
        for name, before, size in listed:  # a part of an axis: `size` neighbours at a stride of what follows them
            if size:
                stride = axes[name] // (int(before) * int(size))
                index[list(axes).index(name)] = slice(0, stride * int(size), stride)
        return [int(n) for n in ids[tuple(index)].reshape(-1)]
    return list(range(devices))


def _device_ids(text: str, devices: int) -> np.ndarray:
    """The devices of a mesh in a notation such as "[4,2]T(1,0)": 0, 1, ... in that shape, transposed; or a list."""
    if match := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, order = ([int(n) for n in (part or "").split(",") if n] for part in match.groups())
        return np.arange(devices).reshape(shape).transpose(order or range(len(shape)))
    return np.array([int(n) for n in re.findall(r"\d+", text)] or range(devices))


# ---------------------------------------------------------------- floating-point operations


def flops(module: HloModule) -> int:
    """The multiplications and additions of all matrix products and convolutions, without those in other kernels."""
    total = 0
    for computation, instruction, times in module.executed():
        is_blas = instruction.attribute("custom_call_target").startswith('"__cublas$')
        if instruction.opcode in ("dot", "convolution") or is_blas:
            shapes = module.shapes(computation)
            operands = [dimensions(shapes[name])[0][1] for name in instruction.operand_names[:2]]
            count = _convolution_flops if instruction.opcode == "convolution" else _dot_flops
            total += times * count(instruction, *operands)
    return total


def product_kernel_flops(module: HloModule) -> int:
    """The multiplications and additions of the kernels of Pallas for products with quantized weights."""
    total = 0
    for computation, instruction, times in module.executed():
        if instruction.opcode == "custom-call" and re.match(r"llm_jax_\w+_product", instruction.name):
            inputs = dimensions(module.shapes(computation)[instruction.operand_names[0]])[0][1][-1]
            total += times * 2 * inputs * math.prod(dimensions(instruction.shape)[0][1])
    return total


def _dot_flops(instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> int:
    text = instruction.attribute("lhs_contracting_dims")
    if match := re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes):  # a call of cuBLAS
        text = match[1]
    contracted = [int(n) for n in re.findall(r"\d+", text)]
    outputs = math.prod(dimensions(instruction.shape)[0][1])
    return 2 * outputs * math.prod(lhs[axis] for axis in contracted)


def _convolution_flops(instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> int:
    """A TPU computes matrix products as convolutions, in which only the pairs within the operand are computed."""
    lhs_labels, rhs_labels, out_labels = re.split("_|->", instruction.attribute("dim_labels"))
    out = dimensions(instruction.shape)[0][1]
    spatial = sorted(label for label in out_labels if label.isdigit())
    window = _window(instruction.attributes, len(spatial))
    products = out[out_labels.index("b")] * out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    for i, label in enumerate(spatial):
        low, stride, base, dilation = (window[name][i] for name in ("pad", "stride", "lhs_dilate", "rhs_dilate"))
        width, inputs = rhs[rhs_labels.index(label)], lhs[lhs_labels.index(label)]
        at = np.arange(out[out_labels.index(label)])[:, None] * stride + np.arange(width) * dilation - low
        products *= int(np.sum((at >= 0) & (at <= (inputs - 1) * base) & (at % base == 0)))
    batches = int(instruction.attribute("batch_group_count") or 1)
    return 2 * products // batches


def _window(attributes: str, rank: int) -> dict[str, list[int]]:
    """The low padding, strides and dilations of a window, {name: one number for each spatial axis}."""
    text = match[1] if (match := re.search(r"window=\{([^}]*)\}", attributes)) else ""
    fields = dict(field.split("=") for field in text.split())
    defaults = {"pad": "0_0", "stride": "1", "lhs_dilate": "1", "rhs_dilate": "1"}
    return {
        name: [int(n.split("_")[0]) for n in fields.get(name, "x".join([value] * rank)).split("x") if n]
        for name, value in defaults.items()
    }


def cycles(module: HloModule) -> int:
    """The cycles that the TPU compiler estimates, one after the other; 0 for programs of other compilers.

    Kernels of Pallas and waiting for collectives are not included.
    """
    total = 0
    for _, instruction, times in module.executed():
        numbers = re.findall(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        total += times * sum(int(n) for n in itertools.islice(numbers, 1) if int(n) < 2**62)
    return total


def largest(module: HloModule, count: int) -> list[tuple[int, str, str]]:
    """The largest arrays that instructions produce, (bytes, shape, name of the operation in the source), by shape."""
    by_shape: dict[str, tuple[int, str, str]] = {}
    fused = {c for ins in module.computations.values() for i in ins if i.opcode == "fusion" for c in i.callees}
    for computation, instruction, _ in module.executed():
        if computation in fused or instruction.opcode in ("tuple", "get-tuple-element", "while", "bitcast"):
            continue
        for dtype, sizes in dimensions(instruction.shape):
            shape = f"{dtype}[{','.join(map(str, sizes))}]"
            source = re.search(r'op_name="([^"]*)"', instruction.attributes)
            by_shape.setdefault(shape, (num_bytes(shape), shape, source[1] if source else instruction.opcode))
    return sorted(by_shape.values(), reverse=True)[:count]
