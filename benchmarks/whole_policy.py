"""Estimates a chunk of a whole policy on TPUs that are not there: memory and latency.

    pip install 'qvla-jax[aot-tpu]'
    python benchmarks/whole_policy.py v5e-4 v6e-1 v6e-4
    python benchmarks/whole_policy.py v6e-1 --policy pi05_libero

**Every figure is an estimate; nothing runs on a TPU.** Policies have the shapes of the presets and
no numbers. A policy of 7B takes hours to compile as one program (`--whole` does that, for its
memory), so its parts are compiled for one chip each, and counted as often as a call runs them: the
products of quantized layers, joined as in a policy, packed or by XLA in bfloat16; and of each kind
of stage (a transformer block, a patch embedding, a projector, the head) what is left without these.
Each takes the longer of the time of its bundles and of that of its operands and results
(`static_schedule.py`). "with XLA's bytes" is an upper end: there the rest of a stage also waits for
all bytes that XLA counts, of which much stays in the chip's own memory.

Weights are in bfloat16, in 4 bits, or mixed as `qvla pack --mean-bits 4` mixes them; activations of
packed layers are rounded to 8 bits; what is not quantized stays in bfloat16, token embeddings too.
"weights" is all of them on one chip, or split over four (`kernels.shard`; in bfloat16 along the
largest axis); "working" is the largest of all stages' activations and temporaries.

The call of a policy splits observations over chips and keeps all weights on each, so a host with
four chips answers four observations in the time of one. Left out: what lies between stages (token
lookup, masks, the last norm), fusion of products with what is around them, waiting for memory
beyond the bytes, launches, and the host.

OpenVLA-OFT computes in float32 in this package, pi0.5 in what its configuration says. Here both do
in bfloat16, as the public policies: pixels and proprio are rounded, and what has parameters keeps
the type. `--whole --arithmetic float32` compiles the program of the package.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, Final

import ahead_of_time as aot
import full_size
import jax
import jax.numpy as jnp
import numpy as np
import static_schedule as static
import sweep_ahead_of_time as stages
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from qvla_jax import kernels, sharding
from qvla_jax.families.layout import Layout
from qvla_jax.families.openpi.config import OpenpiConfig
from qvla_jax.families.openpi.network import Pi0Inputs
from qvla_jax.families.openpi.robots import ROBOTS
from qvla_jax.families.prismatic.specs import inputs_spec
from qvla_jax.families.registry import family_of, preset
from qvla_jax.inference import policy
from qvla_jax.inference.packed_linear import PackedArrays, PackedLinear
from qvla_jax.kernels import tiles
from qvla_jax.kernels.packed import PackedWeight
from qvla_jax.models import named_modules, replace_modules
from qvla_jax.models.loops import looping, unrolled
from qvla_jax.quantization import quantizable_layers
from qvla_jax.sensitivity.stages import wrap_stages

ACTIVATION_BITS: Final = 8
# Channels of each width; none: bfloat16.
WEIGHTS: Final[dict[str, dict[int, float]]] = {
    "bfloat16": {},
    "4 bits": {4: 1.0},
    "mixed": {bits: share for bits, share in full_size.MIXED.items() if bits},
}
# Name -> chip and number of chips.
TARGETS: Final = {
    "v5e-1": ("v5e", 1), "v5e-4": ("v5e", 4), "v6e-1": ("v6e", 1), "v6e-4": ("v6e", 4),
}  # fmt: skip
# GB of a chip, by the vendor.
MEMORY: Final = {"v5e": 16, "v6e": 32}
# Modules that are no stages of a sweep and worth a program.
MORE_STAGES: Final = ("action_head",)


@dataclasses.dataclass(frozen=True)
class Product:
    """A packed product: of a layer, or of several with the same input, which are joined."""

    outputs: tuple[int, ...]
    inputs: int
    rows: int
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one call of a stage."""

    # The longer of bundles and of operands and results; and with all bytes that XLA counts.
    seconds: float
    counted: float
    # Bytes of what it reads besides weights, of its results and of its temporaries.
    working: int


class Costs:
    """What was compiled so far, in a file if there is one: an interrupted run goes on from it."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, list[float]] = {}
        if path is not None and path.exists():
            self.known = json.loads(path.read_text())

    def once(self, key: str, compute: Callable[[], Cost]) -> Cost:
        """What was computed for a key before, or now."""
        if key not in self.known:
            started = time.perf_counter()
            self.known[key] = list(dataclasses.astuple(compute()))
            print(f"{time.perf_counter() - started:.0f} s: {key}", file=sys.stderr, flush=True)
            if self.path is not None:
                self.path.write_text(json.dumps(self.known, indent=1))
        seconds, counted, working = self.known[key]
        return Cost(seconds, counted, int(working))


def main() -> int:
    """Prints a table; returns 1 if a whole program does not compile."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="+", choices=TARGETS)
    parser.add_argument("--policy", nargs="+", default=["openvla-oft-7b", "pi05_libero"])
    parser.add_argument("--weights", nargs="+", default=[*WEIGHTS], choices=WEIGHTS)
    parser.add_argument("--arithmetic", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--whole", action="store_true", help="compile the call as one program")
    parser.add_argument("--costs", type=Path, help="keeps what is compiled; an hour or more")
    arguments = parser.parse_args()
    if not arguments.whole and arguments.arithmetic != "bfloat16":
        parser.error("float32 needs --whole: products in bfloat16 stand for it otherwise")
    report = whole_programs if arguments.whole else estimates
    with jax.default_matmul_precision("float32"):  # as `Policy.run` has it
        return report(arguments)


def estimates(arguments: argparse.Namespace) -> int:
    """Stage by stage; what each takes goes to stderr."""
    print(
        "| policy | target | weights | all weights, on one chip | over four chips | working "
        "| memory of a chip | estimated latency | with XLA's bytes | observations a second |\n"
        + "|---" * 10
        + "|"
    )
    costs = Costs(arguments.costs)
    for name in arguments.policy:
        own, (model, inputs) = layout_of(name), abstract_policy(name, "bfloat16")
        with looping(unrolled):
            kinds = stages.kinds_of_stages(model, own, inputs)
        for target, label in itertools.product(arguments.targets, arguments.weights):
            chip, count = TARGETS[target]
            seconds, counted, working = 0.0, 0.0, 0
            for path, calls, kind in kinds:
                shapes = " ".join(str(value.shape) for value in kind.values[:1])
                stage = f"{name}, {path} of {shapes}, {arguments.arithmetic}"
                cost = cost_of(costs, chip, stage, kind, own, label)
                seconds, counted = seconds + calls * cost.seconds, counted + calls * cost.counted
                working = max(working, cost.working)
                each = static.microseconds(cost.seconds)
                print(f"{name}, {chip}, {label}: {path}: {calls} x {each}", file=sys.stderr)
            held = [f"{weight_bytes(name, label, n) / 2**30:.2f} GiB" for n in (1, 4)]
            print(
                f"| {name} | {target} | {label} | {held[0]} | {held[1]} | {working / 2**20:.0f} MiB"
                f" | {MEMORY[chip]} GB | {1e3 * seconds:.1f} ms | {1e3 * counted:.1f} ms "
                f"| {count / seconds:.1f} |",
                flush=True,
            )
    return 0


def layout_of(name: str) -> Layout:
    """The layout of a preset's network, with all stages that are worth a program."""
    config = preset(name)
    own = family_of(config).layout(config)
    return dataclasses.replace(own, stages=(*own.stages, *MORE_STAGES))


@functools.cache
def abstract_policy(name: str, arithmetic: str) -> tuple[Any, Any]:
    """Network and inputs of one observation, shapes alone; weights are in bfloat16."""
    config = preset(name)
    if isinstance(config, OpenpiConfig):
        config = dataclasses.replace(config, dtype=arithmetic)
    family = family_of(config)
    model = family.abstract_model(config, dtype=jnp.bfloat16)
    family.drop_unread(model)
    if isinstance(config, OpenpiConfig):
        return model, flow_inputs(config)
    if arithmetic == "bfloat16":
        # Where float32 enters; everything behind keeps the type.
        model.language_model.model.embed_tokens.dtype = jnp.bfloat16
        paths = [p for p in named_modules(model, nnx.Module) if p.endswith("patch_embed")]
        paths += ["proprio_projector"] if config.proprio_dim else []
        wrap_stages(model, paths, rounded)
    return model, inputs_spec(config)


def rounded(path: str, inner: Any, x: Any) -> Any:
    """A module's call on bfloat16."""
    del path
    return inner(x.astype(jnp.bfloat16))


def flow_inputs(config: OpenpiConfig) -> Pi0Inputs:
    """Of one observation, with the cameras of the robot."""
    cameras = len(ROBOTS[config.robot or "libero"].cameras)
    size, actions = config.image_size, (1, config.action_horizon, config.action_dim)
    state = jax.ShapeDtypeStruct(actions[::2], jnp.float32)
    return Pi0Inputs(
        images=jax.ShapeDtypeStruct((1, cameras, size, size, 3), jnp.uint8),
        image_mask=jax.ShapeDtypeStruct((1, cameras), jnp.bool_),
        tokens=jax.ShapeDtypeStruct((1, config.max_prompt_tokens), jnp.int32),
        token_mask=jax.ShapeDtypeStruct((1, config.max_prompt_tokens), jnp.bool_),
        noise=jax.ShapeDtypeStruct(actions, jnp.float32),
        state=None if config.variant == "pi05" else state,
    )


def cost_of(
    costs: Costs, chip: str, stage: str, kind: stages.Kind, own: Layout, label: str
) -> Cost:
    """Of one call of a stage with some kind of weights; `stage` names it in the file of costs."""
    products, rest_of = without_products(kind, own)
    found = costs.once(f"{chip}, {stage}, rest", lambda: rest_of(chip))
    total = found
    for product in products:
        c, k, rows = sum(product.outputs), product.inputs, product.rows
        key = f"{chip}, {c}x{k}, {label}, {rows} rows, {jnp.dtype(product.dtype)}"
        compute = functools.partial(product_cost, chip, product, label)
        cost = costs.once(key, compute)
        seconds, counted = total.seconds + cost.seconds, total.counted + cost.counted
        total = Cost(seconds, counted, max(total.working, cost.working))
    return total


def compiled_cost(chip: str, run: Callable[..., Any], values: Any, weights: Any) -> Cost:
    """Compiles a function of values and weights for one chip."""
    place = SingleDeviceSharding(aot.devices(chip)[0])
    given = jax.tree.map(lambda leaf: aot.placed_shape(leaf, place), (values, weights))
    found, own = static.compiled(run, *given, "", {}), static.CHIPS[chip]
    seconds = max(sum(found.bundles.values()) / own.clock, found.bytes / own.bandwidth)
    working = found.temporary + nbytes((values, jax.eval_shape(run, values, weights)))
    return Cost(seconds, max(seconds, found.accessed / own.bandwidth), working)


def without_products(kind: stages.Kind, own: Layout) -> tuple[list[Product], Callable[[str], Cost]]:
    """The products of a stage's quantized layers, and what the rest costs on a chip."""
    arguments = kind.stage.arguments(kind.fixed, kind.values)
    products: list[Product] = []

    def apart(state: Any, args: Any, product: Callable[[Product, Any], Any]) -> Any:
        """The stage's output and the products' inputs."""
        module = nnx.merge(kind.stage.graphdef, state)
        linears = named_modules(module, nnx.Linear)
        names = [name for name, *_ in kind.layers]
        taken: list[Any] = []
        done: dict[str, Any] = {}

        def call(path: str, inner: Any, x: Any) -> Any:
            if path not in done:
                paths = joined_with(path, linears, own)
                widths = [linears[each].out_features for each in paths]
                size = int(np.prod(x.shape[:-1]))
                made = Product(tuple(widths), x.shape[-1], size, x.dtype)
                y = product(made, x).reshape(*x.shape[:-1], sum(widths))
                taken.append(x)
                done.update(zip(paths, jnp.split(y, np.cumsum(widths)[:-1], -1), strict=True))
            return done.pop(path)

        wrap_stages(module, names, call)
        return module(*args), taken

    def noted(made: Product, x: Any) -> Any:
        products.append(made)
        return jnp.zeros((made.rows, sum(made.outputs)), x.dtype)

    jax.eval_shape(functools.partial(apart, product=noted), kind.state, arguments)
    outputs = [
        jax.ShapeDtypeStruct((made.rows, sum(made.outputs)), made.dtype) for made in products
    ]

    def run(values: Any, state: Any) -> Any:
        args, ys = values
        left = iter(ys)
        return apart(state, args, lambda made, x: next(left))

    return products, lambda chip: compiled_cost(chip, run, (arguments, outputs), kind.state)


def product_cost(chip: str, product: Product, label: str) -> Cost:
    """The longer of bundles and bytes of a product, with what XLA runs around a packed one."""
    if not WEIGHTS[label]:
        c, k = sum(product.outputs), product.inputs
        plain = static.plain_time(chip, c, k, product.rows, "bf16")
        return Cost(plain, plain, 0)
    w = joined_weight(product.outputs, product.inputs, label)
    found = static.packed(chip, w, product.rows, ACTIVATION_BITS, product.dtype)
    own = static.CHIPS[chip]
    seconds = max(sum(found.bundles.values()) / own.clock, found.bytes / own.bandwidth)
    return Cost(seconds, seconds, found.temporary)


def joined_weight(outputs: tuple[int, ...], k: int, label: str) -> PackedWeight:
    """Shapes of the packed weight of layers that are joined."""
    rows = {bits: 0 for bits in WEIGHTS[label]}
    for c in outputs:
        own = {bits: int(share * c) for bits, share in WEIGHTS[label].items()}
        pruned = int(full_size.MIXED[0] * c) if len(own) > 1 else 0
        own[max(own, key=own.__getitem__)] += c - pruned - sum(own.values())
        rows = {bits: rows[bits] + own[bits] for bits in rows}
    rows = {bits: n for bits, n in rows.items() if n}
    w = aot.shapes(sum(outputs), k, rows, None)
    return dataclasses.replace(w, index=None) if len(rows) == 1 else w


def joined_with(path: str, linears: Container[str], own: Layout) -> tuple[str, ...]:
    """The layers that share a product with a layer, as in `replace_by_packed`."""
    parent, dot, leaf = path.rpartition(".")
    groups = [[parent + dot + name for name in names] for names in own.same_input if leaf in names]
    whole = (group for group in groups if all(each in linears for each in group))
    return tuple(next(whole, [path]))


def nbytes(tree: Any) -> int:
    """Of all arrays, or shapes of them."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


@functools.cache
def weight_bytes(name: str, label: str, chips: int) -> int:
    """Of all weights of a call that each of some chips holds, if they are split."""
    own, (model, _) = layout_of(name), abstract_policy(name, "bfloat16")
    mesh = AbstractMesh((chips,), (sharding.CHANNEL_AXIS,))
    # A copy, whose layers are taken away as they are counted.
    model = nnx.merge(*nnx.split(model))
    linears = quantizable_layers(model, own.rules) if WEIGHTS[label] else {}
    total, arranged = 0, functools.cache(arranged_bytes)
    counted: set[str] = set()
    for path in linears:
        if path not in counted:
            group = joined_with(path, linears, own)
            counted.update(group)
            outputs = tuple(linears[each].out_features for each in group)
            total += arranged(outputs, linears[path].in_features, label, chips)
    for linear in linears.values():
        linear.kernel = linear.bias = None
    for leaf in jax.tree.leaves(nnx.state(model)):
        parts = chips if sharding.largest_axis(mesh, leaf.shape) != PartitionSpec() else 1
        total += nbytes(leaf) // parts
    return total


def arranged_bytes(outputs: tuple[int, ...], k: int, label: str, chips: int) -> int:
    """Of a packed weight as the kernel reads it, on each of some chips."""
    w = joined_weight(outputs, k, label)
    # A chip's share has as many channels of each width as all others' (`kernels.sharded.deal`).
    rows = {part.bits: part.tiles(chips) for part in tiles.plan(w.segments, chips)}
    share = aot.shapes(sum(rows.values()), k, {b: n for b, n in rows.items() if n}, None)
    if len(rows) == 1:
        share = dataclasses.replace(share, index=None)
    held = nbytes(jax.eval_shape(lambda w: kernels.prepare(w, "pallas_tpu"), share))
    return held + (4 * sum(outputs) if chips > 1 else 0)  # where channels are


def whole_programs(arguments: argparse.Namespace) -> int:
    """The call of a policy as one program: an observation for each chip, all weights on each."""
    os.environ.pop("LIBTPU_INIT_ARGS", None)  # nothing is to be dumped
    print(
        "| policy | target | weights | arguments of a chip | temporary | operations "
        "| seconds to compile |\n" + "|---" * 7 + "|"
    )
    failed = False
    for name, target, label in itertools.product(
        arguments.policy, arguments.targets, arguments.weights
    ):
        started = time.perf_counter()
        try:
            program = compiled_call(name, target, label, arguments.arithmetic)
        except Exception as error:  # whatever the compiler raises
            print(f"| {name} | {target} | {label} | does not compile: {str(error)[:600]} |")
            failed = True
            continue
        memory, costs = program.memory_analysis(), program.cost_analysis() or {}
        print(
            f"| {name} | {target} | {label} | {memory.argument_size_in_bytes / 2**20:.1f} MiB "
            f"| {memory.temp_size_in_bytes / 2**20:.1f} MiB | {costs.get('flops', 0) / 1e12:.3g} T "
            f"| {time.perf_counter() - started:.0f} |",
            flush=True,
        )
    return int(failed)


def compiled_call(name: str, target: str, label: str, arithmetic: str) -> Any:
    """The program of `Policy.run`."""
    chip, count = TARGETS[target]
    model, inputs = abstract_policy(name, arithmetic)
    model = nnx.merge(*nnx.split(model))
    if WEIGHTS[label]:
        pack(model, layout_of(name), label)
    mesh = Mesh(np.array(aot.devices(chip)[:count]), (sharding.DATA_AXIS,))
    structure, arrays = policy.Structure.split(model)
    family = family_of(preset(name))
    conditioning = jax.eval_shape(
        lambda arrays: family.conditioning(structure.merge(arrays)), arrays
    )
    every, split = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (sharding.DATA_AXIS,))
    )
    arrays, conditioning = jax.tree.map(
        lambda leaf: aot.placed_shape(leaf, every), (arrays, conditioning)
    )
    inputs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype, sharding=split),
        inputs,
    )
    return policy.forward.lower(structure, mesh, arrays, inputs, conditioning).compile()


def pack(model: Any, own: Layout, label: str) -> None:
    """Replaces quantized layers by packed ones, shapes alone, joined as in `replace_by_packed`."""
    linears = quantizable_layers(model, own.rules)
    found: dict[str, PackedLinear] = {}
    for path in linears:
        if path in found:
            continue
        group = joined_with(path, linears, own)
        widths = [linears[each].out_features for each in group]
        w = joined_weight(tuple(widths), linears[path].in_features, label)
        held = PackedArrays(jax.eval_shape(lambda w: kernels.prepare(w, "pallas_tpu"), w))
        for each, width, start in zip(group, widths, np.cumsum([0, *widths]), strict=False):
            alone = joined_weight((width,), w.shape[1], label)
            found[each] = PackedLinear(
                alone, activation_bits=ACTIVATION_BITS, joined=held, start=int(start)
            )
    replace_modules(model, found)


if __name__ == "__main__":
    sys.exit(main())
