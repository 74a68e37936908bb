"""Describes a policy: parameters, bytes and output channels, module by module.

Only shapes and dtypes are read, so a 7B policy is described in seconds. A module that every block
repeats takes one row, with `*` for its number.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx
from rich.table import Table

from qvla_jax.checkpoints.files import CONFIG_FILE, ORBAX_FOLDER, WEIGHTS_FILE, read_json
from qvla_jax.checkpoints.orbax_weights import orbax_dtypes
from qvla_jax.checkpoints.tensor_files import TensorFile
from qvla_jax.checkpoints.weights import Source, check_shapes, public_shapes
from qvla_jax.data.samples import bundled_policy_path
from qvla_jax.families.layout import Layout
from qvla_jax.families.registry import family_of, from_record, preset, public_family
from qvla_jax.inference.places import policy_outline
from qvla_jax.models.surgery import named_modules
from qvla_jax.quantization.index import ChannelIndex, LayerInfo
from qvla_jax.quantization.layers import LayerRules, quantizable_layers

# The dtype of the published checkpoints, used to count presets without weights.
_PUBLISHED = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """Parameters that one module owns itself, or those of the same module in all blocks."""

    # Dotted path; numbers of blocks are `*`.
    path: str
    # Modules in this row.
    count: int
    parameters: int
    # As stored.
    stored_bytes: int
    # Output channels of linear layers; 0 for everything else.
    channels: int
    # The weights are quantized by the rules; biases always keep the source's bits.
    quantized: bool
    # The group of the policy's modules that it belongs to (`Layout.groups`).
    part: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """A policy's modules, and its quantizable channels."""

    # Of its family.
    config: Any
    # Description of where shapes and dtypes come from.
    source: str
    modules: tuple[Module, ...]
    index: ChannelIndex

    @property
    def parameters(self) -> int:
        """Parameters of all modules."""
        return sum(module.parameters for module in self.modules)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parameters as stored."""
        return sum(module.stored_bytes for module in self.modules)


def describe(
    source: str, *, rules: LayerRules | None = None, folder: Path | None = None
) -> Description:
    """Describes a policy without loading it.

    Args:
        source: a preset (with weights or without), a directory written by `Policy.save` or
            `import_policy`, or a public directory, here or elsewhere (see `load_policy`).
        rules: which layers are quantized; None takes those of the policy's layout.
        folder: where it is, if `policy_outline` was asked already.

    Raises:
        InputError: neither a preset nor a directory, or a rule that matches nothing.
        CheckpointError: a file is missing or broken, or its tensors do not fit the architecture.
    """
    if folder is None:
        with policy_outline(source) as found:
            return describe(source, rules=rules, folder=found)
    # One that is elsewhere is not where its files are.
    name = str(folder) if Path(source).exists() else source
    if not folder.is_dir():
        config = preset(source)
        folder = bundled_policy_path(config.name)
        name = str(folder)
        if not folder.is_dir():
            model = family_of(config).abstract_model(config)
            dtypes = dict.fromkeys(public_shapes(model), _PUBLISHED)
            return _described(config, model, dtypes, "a preset without weights, in bfloat16", rules)
    if (family := public_family(folder)) is not None:
        config, stored = family.survey(folder)
        model = family.abstract_model(config)
        return _described(config, model, stored, f"{name}, public layout", rules)
    config = from_record(read_json(folder / CONFIG_FILE), folder / CONFIG_FILE)
    model = family_of(config).abstract_model(config)
    if (folder / ORBAX_FOLDER).is_dir():
        dtypes = orbax_dtypes(model, folder / ORBAX_FOLDER)
    else:
        dtypes = _dtypes(model, TensorFile(folder / WEIGHTS_FILE), str(folder / WEIGHTS_FILE))
    return _described(config, model, dtypes, name, rules)


def _dtypes(
    model: nnx.Module, tensors: Mapping[str, np.ndarray], source: Source
) -> dict[str, np.dtype[Any]]:
    """Public name -> stored dtype; raises an error if the tensors are not those of the model."""
    check_shapes(model, tensors, source=source)
    return {name: tensors[name].dtype for name in tensors}


def _described(
    config: Any,
    model: nnx.Module,
    dtypes: Mapping[str, np.dtype[Any]],
    source: str,
    rules: LayerRules | None,
) -> Description:
    own = family_of(config).layout(config)
    layers = quantizable_layers(model, own.rules if rules is None else rules)
    return Description(
        config=config,
        source=source,
        modules=_modules(model, dtypes, layers, own),
        index=_index(layers, dtypes),
    )


def _modules(
    model: nnx.Module,
    dtypes: Mapping[str, np.dtype[Any]],
    quantized: Mapping[str, nnx.Linear],
    layout: Layout,
) -> tuple[Module, ...]:
    shapes = public_shapes(model)
    linears = named_modules(model, nnx.Linear)
    # Row -> module -> its parameters.
    rows: dict[tuple[str, bool], dict[str, list[str]]] = {}
    for name in shapes:
        owner = name.rpartition(".")[0]
        row = re.sub(r"\.\d+(?=\.|$)", ".*", owner), owner in quantized
        rows.setdefault(row, {}).setdefault(owner, []).append(name)
    modules = []
    for (path, is_quantized), owners in rows.items():
        counts = {n: math.prod(shapes[n]) for names in owners.values() for n in names}
        modules.append(
            Module(
                path=path,
                count=len(owners),
                parameters=sum(counts.values()),
                stored_bytes=sum(c * dtypes[n].itemsize for n, c in counts.items()),
                channels=sum(linears[o].out_features for o in owners if o in linears),
                quantized=is_quantized,
                part=layout.group(path),
            )
        )
    return tuple(modules)


def _index(layers: Mapping[str, nnx.Linear], dtypes: Mapping[str, np.dtype[Any]]) -> ChannelIndex:
    infos = []
    for path, layer in layers.items():
        names = [n for n in (f"{path}.weight", f"{path}.bias") if n in dtypes]
        infos.append(
            LayerInfo(
                path=path,
                out_features=layer.out_features,
                fan_in=layer.in_features,
                has_bias=layer.bias is not None,
                source_bytes=max(dtypes[name].itemsize for name in names),
            )
        )
    return ChannelIndex(tuple(infos))


def modules_table(modules: Iterable[Module]) -> Table:
    """The table to print: each part of the policy with its modules, and the total."""
    modules = list(modules)
    table = Table("module", box=None, padding=(0, 1))
    for heading in ("modules", "parameters", "bytes", "output channels"):
        table.add_column(heading, justify="right")
    table.add_column("weights")
    for part in dict.fromkeys(module.part for module in modules):
        members = [module for module in modules if module.part == part]
        _add(table, part, members, style="bold")
        if len(members) > 1 or members[0].path != part:
            for member in members:
                inner = member.path.removeprefix(part).removeprefix(".")
                _add(table, f"  {inner or '(its own)'}", [member])
    _add(table, "all", modules, style="bold")
    return table


def _add(table: Table, label: str, modules: list[Module], *, style: str | None = None) -> None:
    kinds = {module.quantized for module in modules}
    channels = sum(module.channels for module in modules)
    table.add_row(
        label,
        f"{sum(m.count for m in modules):,}",
        f"{sum(m.parameters for m in modules):,}",
        f"{sum(m.stored_bytes for m in modules):,}",
        f"{channels:,}" if channels else "-",
        "in part quantized" if len(kinds) > 1 else "quantized" if True in kinds else "kept",
        style=style,
    )
