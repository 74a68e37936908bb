"""A packed policy at full size: memory, and the latency of one action phase by phase.

    qvla synthesize --preset openvla-oft-7b --out synthetic
    qvla pack --model synthetic --mean-bits 4 --activation-bits 8 --file oft.qvla
    python benchmarks/full_size.py oft.qvla
    qvla synthesize --preset pi05 --out synthetic-pi05
    qvla pack --model synthetic-pi05 --mean-bits 4 --embedding-bits 8 --file pi05.qvla
    python benchmarks/full_size.py pi05.qvla

`--random openvla-7b` makes a packed policy of random codes in memory instead, with as many channels
of each width as such a file has: the same work, without 15 GB of files.

The packed policy runs whole. The same architecture in bfloat16 and float32 does not fit beside it
(nor, at 7B, at all on a small machine), so of PyTorch (bfloat16) and JAX (both) one transformer
block of each kind runs, with random weights and the same inputs' shapes, and its time is multiplied
by the number of blocks: those figures are **extrapolated**, and leave out patch embeddings and
norms between blocks. PyTorch runs prompts without padding, which favors it. All are timed in turn,
round after round; figures are medians of wall time on all cores or, with `--cpu-time`, of the time
of all cores added up.
"""

import argparse
import dataclasses
import gc
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

import qvla_jax
from qvla_jax import kernels
from qvla_jax.families.openpi.config import OpenpiConfig
from qvla_jax.families.openpi.network import Pi0Inputs, gemma, siglip
from qvla_jax.families.prismatic.config import LlamaConfig, OpenVLAConfig, VisionTowerConfig, preset
from qvla_jax.families.prismatic.layout import layout
from qvla_jax.families.prismatic.network import ModelInputs, abstract_model
from qvla_jax.families.prismatic.network.llama import (
    LlamaDecoderLayer,
    bidirectional_mask,
    causal_mask,
    rotary_angles,
)
from qvla_jax.families.prismatic.network.projector import PrismaticProjector
from qvla_jax.families.prismatic.network.vision import Block
from qvla_jax.families.prismatic.unread import drop_unread
from qvla_jax.families.prismatic.word_tokenizer import word_files
from qvla_jax.inference import Policy
from qvla_jax.inference.packed_linear import replace_by_packed
from qvla_jax.inference.policy import make_policy
from qvla_jax.kernels import cpu
from qvla_jax.kernels.codes import num_words
from qvla_jax.models import named_modules
from qvla_jax.quantization import quantizable_layers
from qvla_jax.quantization.codes import SIGNED

# Channels of each width in `openvla-oft-7b` at 4.0 bits.
MIXED = {16: 0.02, 8: 0.215, 4: 0.592, 2: 0.151, 0: 0.022}
TOWERS, PROJECTOR, PREFILL = "towers", "projector", "language model, all tokens"
HEAD, STEP, WHOLE = "action head", "decode step", "whole call"
PREFIX, EULER = "language model, images and prompt", "Euler steps"


@dataclasses.dataclass
class Timer:
    """One call of a part that runs `count` times in the phase."""

    system: str
    phase: str
    count: int
    call: Callable[[], object]
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def milliseconds(self) -> float:
        """Median of the phase."""
        return 1e3 * self.count * statistics.median(self.seconds)


def random_packed_policy(name: str) -> Policy:
    """A preset with random packed layers, at 4.0 bits as `qvla pack` mixes them.

    Layers that are not quantized have 16 bits; quantized ones round their inputs to 8.
    """
    config, rng = preset(name), np.random.default_rng(0)
    model = abstract_model(config, dtype=jnp.bfloat16)
    drop_unread(model)
    own = layout(config)
    linears, quantized = named_modules(model, nnx.Linear), quantizable_layers(model, own.rules)

    def packed(path: str) -> kernels.PackedWeight:
        k, c = linears[path].kernel.shape
        shares = MIXED if path in quantized else {16: 1.0}
        rows = {bits: int(share * c) for bits, share in shares.items()}
        rows[max(rows, key=rows.__getitem__)] += c - sum(rows.values())
        order = rng.permutation(c)
        ends = np.cumsum(list(rows.values()))
        parts = zip(rows.items(), np.split(order, ends[:-1]), strict=True)
        kept = [(bits, np.sort(own)) for (bits, n), own in parts if n and bits]
        bias = None if linears[path].bias is None else np.zeros(c, ml_dtypes.bfloat16)
        return kernels.PackedWeight(
            words=tuple(random_words(rng, len(own), k, bits) for bits, own in kept),
            scales=tuple(
                np.full((len(own), int(bits < 16)), 0.04 / 2**bits, ml_dtypes.bfloat16)
                for bits, own in kept
            ),
            index=np.concatenate([own for _, own in kept]).astype(np.uint16),
            bias=bias,
            segments=tuple(
                kernels.Segment(bits, len(own), SIGNED[bits])
                if bits < 16
                else kernels.Segment(bits, len(own))
                for bits, own in kept
            ),
            shape=(c, k),
            group=None,
            source_dtype="bfloat16",
        )

    names = sorted(linears, key=lambda path: path.rpartition("."))
    weights = ((path, packed(path)) for path in names)
    inputs = {path: kernels.LayerInputs(8) for path in quantized}
    replace_by_packed(model, weights, inputs, same_input=own.same_input)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        values = np.ones if path[-1] in ("scale", "scale_factor") else np.zeros
        table = path[-1] == "embedding"
        dtype = jnp.bfloat16 if table else jnp.float32
        filled = rng.standard_normal(variable.shape, np.float32) if table else None
        variable.set_value(jnp.asarray(values(variable.shape) if filled is None else filled, dtype))
    limits = {"q01": [-1.0] * config.action_dim, "q99": [1.0] * config.action_dim}
    proprio = {"q01": [-1.0] * config.proprio_dim, "q99": [1.0] * config.proprio_dim}
    statistics = {config.unnorm_key or "random": {"action": limits, "proprio": proprio}}
    policy = make_policy(config, model, word_files(), statistics, source=name)
    return dataclasses.replace(policy, quantization={"random": True})


def random_words(rng: np.random.Generator, rows: int, k: int, bits: int) -> np.ndarray:
    """Words of random codes; of small numbers at 16 bits."""
    if bits == 16:
        numbers = 0.02 * rng.standard_normal((rows, k + k % 2), np.float32)
        return numbers.astype(ml_dtypes.bfloat16).view(np.uint32)[:, : num_words(k, bits)]
    words = rng.integers(0, 2**32, (rows, num_words(k, bits)), np.uint32)
    used = (k * bits - 1) % 32 + 1
    words[:, -1] &= np.uint32(2**used - 1)
    return words


def compiled(module: nnx.Module, function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """`function(module, *args)` under `jit`, waiting for the result."""
    graphdef, state = nnx.split(module)
    run = jax.jit(lambda state, args: function(nnx.merge(graphdef, state), *args))
    return lambda: jax.block_until_ready(run(state, args))


def packed_timers(policy: Policy, inputs: ModelInputs) -> list[Timer]:
    """The packed policy, whole and phase by phase."""
    model: Any = policy.model
    given = jax.tree.map(jnp.asarray, inputs)

    def timer(phase: str, module: nnx.Module, function: Callable[..., Any], *args: Any) -> Timer:
        return Timer("packed", phase, 1, compiled(module, function, *args))

    towers = timer(TOWERS, model.vision_backbone, lambda m, x: m(x), given.images)
    features = towers.call()
    timers = [
        Timer("packed", WHOLE, 1, lambda: policy.run(inputs)),
        towers,
        timer(PROJECTOR, model.projector, lambda m, x: m(x), features),
    ]
    embeddings, valid = compiled(model, lambda m, x: m.embed(x), given)()
    language = model.language_model
    if policy.config.decoding == "l1":
        mask = bidirectional_mask(valid)
        prefill = timer(PREFILL, language.model, lambda m, x, v: m(x, v), embeddings, mask)
        states = model.action_states(prefill.call(), given.prompt_length)
        return [*timers, prefill, timer(HEAD, model.action_head, lambda m, x: m(x), states)]
    mask = causal_mask(valid)
    prefill = timer(PREFILL, language.model, lambda m, x, v: m.fill(x, v), embeddings, mask)
    _, caches = prefill.call()
    place = policy.config.num_prefix_tokens + given.prompt_length

    def step(m: Any, caches: Any, place: Any) -> Any:
        state, updated = m.model.step(m.model.embed_tokens(place[:, None]), place, caches)
        return m.lm_head(state), updated

    decode = timer(STEP, language, step, caches, place)
    decode.count = policy.config.num_decoded_tokens - 1
    return [*timers, prefill, decode]


def flow_timers(policy: Policy, inputs: Pi0Inputs) -> list[Timer]:
    """A packed pi0 or pi0.5, whole and phase by phase."""
    model: Any = policy.model
    given, llm = jax.tree.map(jnp.asarray, inputs), model.PaliGemma.llm

    def timer(phase: str, module: nnx.Module, function: Callable[..., Any], *args: Any) -> Timer:
        return Timer("packed", phase, 1, compiled(module, function, *args))

    pixels = given.images.reshape(-1, *given.images.shape[2:]) / 127.5 - 1.0
    towers = timer(TOWERS, model.PaliGemma.img, lambda m, x: m(x), pixels)
    tokens, valid = compiled(model, lambda m, x: m.embed_prefix(x), given)()
    positions, mask = jnp.cumsum(valid, axis=1) - 1, valid[:, None, None]
    fill = timer(PREFIX, llm, lambda m, *args: m.fill(*args), tokens, positions, mask)
    prefix = compiled(model, lambda m, x: m.prefix(x), given)()
    now = policy.conditioning.at(0)
    step = timer(EULER, model, lambda m, *args: m.step(*args), given.noise, prefix, now)
    step.count = policy.config.num_steps
    return [Timer("packed", WHOLE, 1, lambda: policy.run(inputs)), towers, fill, step]


def flow_jax_timers(config: OpenpiConfig, inputs: Pi0Inputs, dtype: Any) -> list[Timer]:
    """One block of each kind of pi0 or pi0.5 in JAX, weights and activations of one dtype."""
    name, rng = f"JAX {jnp.dtype(dtype).name}", np.random.default_rng(0)
    language, expert = config.language, config.action_expert
    cameras = inputs.images.shape[1]
    length = cameras * config.vision.num_patches + inputs.tokens.shape[1]
    adaptive = config.variant == "pi05"
    suffix = config.action_horizon + (not adaptive)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    def angles(start: int, count: int) -> Any:
        return gemma.rotary_angles(start + jnp.arange(count)[None], language.head_dim)

    tower = filled(
        lambda: siglip.EncoderBlock(config.vision, dtype=dtype, rngs=nnx.Rngs(0)), rng, dtype
    )
    block = filled(
        lambda: gemma.Block((language, expert), adaptive=adaptive, dtype=dtype, rngs=nnx.Rngs(0)),
        rng,
        dtype,
    )
    x = random(cameras, config.vision.num_patches, config.vision.width)
    patches = compiled(tower, lambda m, x: m(x), x)
    valid = jnp.ones((1, 1, 1, length), bool)
    prefix = [random(1, length, language.width), angles(0, length), valid]
    fill = compiled(block, lambda m, *args: m.fill(*args), *prefix)
    held = fill()[1]
    own = random(1, 1, 3 * expert.width)
    now = (own, own) if adaptive else None
    tokens = [random(1, suffix, expert.width), angles(length, suffix)]
    step = compiled(block, lambda m, *args: m.step(*args), *tokens, held, valid, None, now)
    return [
        Timer(name, TOWERS, config.vision.depth, patches),
        # Of the last layer only keys and values are made.
        Timer(name, PREFIX, language.depth - 1, fill),
        Timer(name, EULER, config.num_steps * language.depth, step),
    ]


def filled(make: Callable[[], nnx.Module], rng: np.random.Generator, dtype: Any) -> nnx.Module:
    """A module with random weights of a dtype."""
    module = nnx.eval_shape(make)
    state = jax.tree.map(
        lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32), dtype),
        nnx.state(module, nnx.Param),
    )
    nnx.update(module, state)
    return module


def jax_timers(config: OpenVLAConfig, tokens: int, dtype: Any) -> list[Timer]:
    """One block of each kind in JAX, weights and activations of one dtype."""
    name = f"JAX {jnp.dtype(dtype).name}"
    rng = np.random.default_rng(0)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    timers = []
    for tower in config.vision:
        x = random(config.num_images, patches(tower), tower.embed_dim)
        block = filled(lambda tower=tower: Block(tower, rngs=nnx.Rngs(0)), rng, dtype)
        call = compiled(block, lambda m, x: m(x), x)
        timers.append(Timer(name, TOWERS, tower.feature_block + 1, call))
    text, width = config.text, sum(tower.embed_dim for tower in config.vision)
    projector = filled(
        lambda: PrismaticProjector(width, text.hidden_size, rngs=nnx.Rngs(0)), rng, dtype
    )
    x = random(1, config.num_images * config.vision[0].num_patches, width)
    timers.append(Timer(name, PROJECTOR, 1, compiled(projector, lambda m, x: m(x), x)))
    layer = filled(lambda: LlamaDecoderLayer(text, rngs=nnx.Rngs(0)), rng, dtype)
    head_dim = text.hidden_size // text.num_attention_heads
    lengths = {PREFILL: (tokens, 1)}
    if config.decoding != "l1":
        lengths[STEP] = (1, config.num_decoded_tokens - 1)
    for phase, (length, times) in lengths.items():
        angles = rotary_angles(jnp.arange(length)[None], head_dim, text.rope_theta)
        mask = jnp.ones((1, 1, 1, length), bool)
        call = compiled(
            layer, lambda m, x, a, v: m(x, a, v), random(1, length, text.hidden_size), angles, mask
        )
        timers.append(Timer(name, phase, times * text.num_hidden_layers, call))
    return timers


def torch_timers(config: OpenVLAConfig, tokens: int) -> list[Timer]:
    """One block of each kind in PyTorch, bfloat16; none where it is not installed."""
    try:
        import torch
        import torch_twin
    except ImportError:
        return []
    torch.set_grad_enabled(False)
    half, filled = torch.bfloat16, torch_filled
    name, timers = "PyTorch bfloat16", []
    for tower in config.vision:
        x = torch.randn(config.num_images, patches(tower), tower.embed_dim).to(half)
        block = filled(lambda tower=tower: torch_twin.Block(tower))
        timers.append(
            Timer(name, TOWERS, tower.feature_block + 1, lambda block=block, x=x: block(x))
        )
    text, width = config.text, sum(tower.embed_dim for tower in config.vision)
    dim, linear, gelu = text.hidden_size, torch.nn.Linear, torch.nn.GELU
    projector = filled(
        lambda: torch.nn.Sequential(
            linear(width, 4 * width), gelu(), linear(4 * width, dim), gelu(), linear(dim, dim)
        )
    )
    x = torch.randn(1, config.num_images * config.vision[0].num_patches, width).to(half)
    timers.append(Timer(name, PROJECTOR, 1, lambda: projector(x)))
    layer = filled(lambda: torch_twin.Layer(text))

    head = head_dim(text)
    inside = [torch.randn(1, tokens, dim).to(half), *torch_angles(head, 0, tokens)]
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool)
    timers.append(
        Timer(name, PREFILL, text.num_hidden_layers, lambda: layer(*inside, mask)),
    )
    if config.decoding == "l1":
        return timers
    steps = config.num_decoded_tokens - 1
    one = [
        torch.randn(1, 1, dim).to(half),
        *torch_angles(head, 0, 1),
        torch.ones(1, 1, 1, 1, dtype=torch.bool),
    ]
    heads = text.num_attention_heads
    q = torch.randn(1, heads, 1, head_dim(text)).to(half)
    k, v = (torch.randn(1, heads, tokens, head_dim(text)).to(half) for _ in range(2))

    def step() -> object:
        # The layer attends to its own token, so attention to the cache comes on top.
        return layer(*one), torch.nn.functional.scaled_dot_product_attention(q, k, v)

    output = filled(lambda: linear(dim, text.vocab_size, bias=False))
    timers.append(Timer(name, STEP, steps * text.num_hidden_layers, step))
    timers.append(Timer(name, STEP, steps, lambda: output(one[0])))
    return timers


def flow_torch_timers(config: OpenpiConfig, inputs: Pi0Inputs) -> list[Timer]:
    """One block of each kind of pi0 or pi0.5 in PyTorch, bfloat16; none where it is missing.

    Prompts have no padding, as in `torch_timers`.
    """
    try:
        import torch
        import torch_flow
    except ImportError:
        return []
    torch.set_grad_enabled(False)
    name, half = "PyTorch bfloat16", torch.bfloat16
    language, expert = config.language, config.action_expert
    cameras, adaptive = inputs.images.shape[1], config.variant == "pi05"
    length = cameras * config.vision.num_patches + int(np.asarray(inputs.token_mask).sum())
    suffix = config.action_horizon + (not adaptive)

    tower = torch_filled(lambda: torch_flow.TowerBlock(config.vision))
    first = torch_filled(lambda: torch_flow.GemmaBlock(language, adaptive=False))
    second = torch_filled(lambda: torch_flow.GemmaBlock(expert, adaptive=adaptive))
    x = torch.randn(cameras, config.vision.num_patches, config.vision.width).to(half)
    prefix = [
        torch.randn(1, length, language.width).to(half),
        *torch_angles(language.head_dim, 0, length),
    ]
    held = first(*prefix)[1]
    now = torch.randn(1, 1, 3 * expert.width).to(half) if adaptive else None
    angles = torch_angles(language.head_dim, length, suffix)
    step = [torch.randn(1, suffix, expert.width).to(half), *angles, held, now]
    return [
        Timer(name, TOWERS, config.vision.depth, lambda: tower(x)),
        Timer(name, PREFIX, language.depth - 1, lambda: first(*prefix)),
        Timer(name, EULER, config.num_steps * language.depth, lambda: second(*step)),
    ]


def torch_angles(width: int, start: int, count: int) -> list[Any]:
    """Cosines and sines of rotary positions in bfloat16; their values do not change times."""
    import torch

    place = start + torch.arange(count)[:, None]
    angle = place / torch.arange(1, width // 2 + 1)[None]
    return [angle.cos().to(torch.bfloat16), angle.sin().to(torch.bfloat16)]


def torch_filled(make: Callable[[], Any]) -> Any:
    """A module with random weights in bfloat16."""
    import torch

    with torch.device("meta"):
        module = make().to(torch.bfloat16)
    module = module.to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.normal_(0.0, 0.02)
    return module


def head_dim(text: LlamaConfig) -> int:
    """Width of an attention head."""
    return text.hidden_size // text.num_attention_heads


def patches(tower: VisionTowerConfig) -> int:
    """Tokens of one image in a tower."""
    return tower.num_patches + tower.num_registers + tower.class_token


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def held_bytes(policy: Policy) -> int:
    """Bytes of all arrays of the model, those that layers share once."""
    arrays = {id(array): array for array in jax.tree.leaves(nnx.state(policy.model))}
    return sum(array.nbytes for array in arrays.values())


def main() -> None:
    """Prints memory and a table of phases, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", help="written by `qvla pack`")
    parser.add_argument("--random", help="a preset, with random codes, in place of a file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cpu-time", action="store_true",
        help="time of all cores added up in place of wall time, for a machine with other work",
    )  # fmt: skip
    parser.add_argument("--alone", action="store_true", help="no PyTorch, no JAX in full precision")
    arguments = parser.parse_args()
    jax.block_until_ready(jnp.zeros(1))  # what JAX itself takes
    before = resident()
    start = time.perf_counter()
    if arguments.random:
        policy = random_packed_policy(arguments.random)
    elif arguments.file:
        policy = qvla_jax.load_policy(arguments.file)
    else:
        parser.error("give a file or --random")
    gc.collect()
    loaded, load_seconds = resident() - before, time.perf_counter() - start
    config = policy.config
    shapes = jax.tree.leaves(nnx.state(policy.family.abstract_model(config), nnx.Param))
    whole = 2 * sum(int(np.prod(x.shape)) for x in shapes)
    print(f"{config.name}: kernel {cpu.instruction_set()}, {os.cpu_count()} cores, load "
          f"{os.getloadavg()[0]:.1f}")  # fmt: skip
    if arguments.file:
        print(f"file {arguments.file.stat().st_size / 1e9:.3f} GB")
    print(f"all weights in bfloat16 {whole / 1e9:.3f} GB")
    held = held_bytes(policy)
    print(f"weights in memory {held / 1e9:.3f} GB = {held / whole:.2%} of bfloat16; the process "
          f"has grown by {loaded / 1e9:.3f} GB, loaded in {load_seconds:.0f} s")  # fmt: skip
    observation = policy.fake_observation()
    batch = {
        key: [value] if isinstance(value, str) else value[None]
        for key, value in observation.items()
    }
    inputs = policy.prepare(batch)
    sys.stdout.flush()
    # As in `Policy.run`; JAX's own precision for the others.
    with jax.default_matmul_precision("float32"):
        flow = isinstance(config, OpenpiConfig)
        timers = flow_timers(policy, inputs) if flow else packed_timers(policy, inputs)
        clock = time.process_time if arguments.cpu_time else time.perf_counter
        measure(timers[:1], 1, clock)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"peak resident memory of the first call {peak / 2**20:.2f} GiB")
        if flow and not arguments.alone:
            timers += flow_torch_timers(config, inputs)
            timers += flow_jax_timers(config, inputs, jnp.bfloat16)
            timers += flow_jax_timers(config, inputs, jnp.float32)
        elif not arguments.alone:
            tokens = 1 + config.num_prefix_tokens + int(np.asarray(inputs.prompt_length)[0]) - 1
            if config.decoding == "l1":
                tokens += config.num_action_tokens + 1
            timers += torch_timers(config, tokens)
            timers += jax_timers(config, tokens, jnp.bfloat16)
            timers += jax_timers(config, tokens, jnp.float32)
        measure(timers, arguments.rounds, clock)
    print("\ntime of all cores added up" if arguments.cpu_time else "\nwall time on all cores")
    print_phases(timers)


def measure(timers: list[Timer], rounds: int, clock: Callable[[], float]) -> None:
    """Times all in turn; first calls, which compile, are left out."""
    for timer in timers:
        timer.call()
        timer.seconds.clear()
    for _ in range(rounds):
        for timer in timers:
            start = clock()
            timer.call()
            timer.seconds.append(clock() - start)


def print_phases(timers: list[Timer]) -> None:
    """Milliseconds by phase and system, and how many times as long as packed."""
    systems = list(dict.fromkeys(timer.system for timer in timers))
    phases = list(dict.fromkeys(timer.phase for timer in timers))
    found: dict[tuple[str, str], float] = {}
    for timer in timers:
        at = timer.system, timer.phase
        found[at] = found.get(at, 0.0) + timer.milliseconds
    for system in systems[1:]:  # what was extrapolated has no call of its own
        both = [p for p in phases if (system, p) in found and p != WHOLE]
        found[system, "sum of phases measured in both"] = sum(found[system, p] for p in both)
        found.setdefault(("packed", "sum of phases measured in both"), 0.0)
        found["packed", "sum of phases measured in both"] = sum(found["packed", p] for p in both)
    labels = [s if s == "packed" else f"{s}, extrapolated" for s in systems]
    print("\n| milliseconds | " + " | ".join(labels) + " |")
    print("|---" * (1 + len(labels)) + "|")
    for phase in dict.fromkeys(phase for _, phase in found):
        cells = []
        for system in systems:
            value = found.get((system, phase))
            if value is None:
                cells.append("")
            elif system == "packed":
                cells.append(f"{value:,.1f}")
            else:
                cells.append(f"{value:,.1f} ({value / found['packed', phase]:.2f}x)")
        print(f"| {phase} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
