"""Checkpoint directories of openpi.

| below the directory              | what it holds                                         |
|----------------------------------|-------------------------------------------------------|
| `params/`                        | the weights, an orbax checkpoint (`orbax_tree`)       |
| `model.safetensors`              | or: PyTorch's, of openpi's or LeRobot's (`torch_file`) |
| `assets/<id>/norm_stats.json`    | statistics of state and actions                       |
| `train_state/`                   | the trainer's optimizer; not read                     |
| `tiny_archs.json`                | sizes that are not built in                           |
| `qvla_config.json`               | what our own export keeps and openpi has no file for  |

openpi's trainer writes such a directory for each step, `<experiment>/<step>/`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from qvla_jax.atomic import write_json
from qvla_jax.checkpoints.files import check_empty, emptied_on_error, folder_name, read_json
from qvla_jax.checkpoints.weights import flax_leaves
from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.families import family
from qvla_jax.families.openpi import torch_file
from qvla_jax.families.openpi.config import (
    GEMMA,
    PRESETS,
    SIGLIP,
    GemmaConfig,
    OpenpiConfig,
    SiglipConfig,
    preset,
)
from qvla_jax.families.openpi.lora import Adapters
from qvla_jax.families.openpi.names import Slot, public_shapes, slots
from qvla_jax.families.openpi.network import FlowMatching, abstract_model
from qvla_jax.families.openpi.orbax_tree import Parts, StoredTree, write_tree
from qvla_jax.families.openpi.tokenizer import FILES as TOKENIZERS
from qvla_jax.plain import finite, from_plain, to_plain

PARAMS: Final = "params"
ASSETS: Final = "assets"
STATISTICS_FILE: Final = "norm_stats.json"
SIZES_FILE: Final = "tiny_archs.json"
CONFIG_FILE: Final = "qvla_config.json"
# Leaves that only one of the two variants has.
_TELLING: Final = {"pi0": "state_proj/kernel", "pi05": "time_mlp_in/kernel"}
_TOWER: Final = "So400m/14"


def is_openpi(folder: Path) -> bool:
    """Whether a directory is a checkpoint of openpi, or holds those of several steps."""
    return _holds_weights(folder) or bool(_steps(folder))


def step_folder(folder: Path) -> Path:
    """The directory of the weights: this one, or that of the only step below it.

    Raises:
        CheckpointError: there is none, or there are several steps.
    """
    if _holds_weights(folder):
        return folder
    steps = _steps(folder)
    if len(steps) == 1:
        return steps[0]
    if steps:
        raise CheckpointError(
            f"{folder}: holds the steps {', '.join(s.name for s in steps)}; name one of them"
        )
    raise CheckpointError(
        f"{folder}: no checkpoint of openpi: there is neither {PARAMS}/ nor {torch_file.FILE}"
    )


def _holds_weights(folder: Path) -> bool:
    torch = folder / torch_file.FILE
    return (folder / PARAMS).is_dir() or (torch.is_file() and torch_file.is_openpi(torch))


def _steps(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.name.isdigit() and (p / PARAMS).is_dir()]
    return sorted(found, key=lambda p: int(p.name))


def public_files(source: str, names: Sequence[str]) -> list[str]:
    """See `Family.public_files`; the settings are in no config.json, and no option needs a file."""
    steps = {step for name in names if (step := _step_of(name)) is not None}
    if not steps:
        torch = torch_file.FILE in names
        return [name for name in names if torch and _is_read(name, torch=True)]
    if "" not in steps and len(steps) > 1:
        listed = ", ".join(sorted(steps, key=int))
        raise CheckpointError(f"{source}: holds the steps {listed}; name one of them")
    step = "" if "" in steps else f"{steps.pop()}/"
    return [n for n in names if n.startswith(step) and _is_read(n.removeprefix(step), torch=False)]


def _step_of(name: str) -> str | None:
    """The step whose weights a file is part of, "" without steps; None if it is of no weights."""
    first, _, rest = name.partition("/")
    if first == PARAMS and rest:
        return ""
    return first if first.isdigit() and rest.startswith(f"{PARAMS}/") else None


def _is_read(name: str, *, torch: bool) -> bool:
    folder, _, last = name.rpartition("/")
    if folder:
        first = folder.partition("/")[0]
        return (first == PARAMS and not torch) or (first == ASSETS and last == STATISTICS_FILE)
    return last in (SIZES_FILE, CONFIG_FILE, *TOKENIZERS, *([torch_file.FILE] if torch else ()))


def sizes_of(folder: Path) -> OpenpiConfig:
    """A configuration with the sizes of a directory; everything else about it is made up.

    Raises:
        CheckpointError: a file is damaged, or the weights are of neither pi0 nor pi0.5.
    """
    if (folder / CONFIG_FILE).is_file():
        return read_config(folder)
    config = dataclasses.replace(preset(f"{_variant(folder)}_base"), name=folder_name(folder))
    return _with_sizes(config, folder)


def read_config(folder: Path, *, preset_name: str | None = None) -> OpenpiConfig:
    """Combines the settings of a directory and a preset.

    Args:
        folder: as `step_folder` returns it.
        preset_name: openpi's training configuration, for what no file says; optional for
            directories that we wrote.

    Raises:
        CheckpointError: neither a preset nor our own file has the settings; the preset is for the
            other variant; a file is damaged.
        InputError: unknown preset.
    """
    variant = _variant(folder)
    if preset_name is not None:
        config = dataclasses.replace(preset(preset_name), name=preset_name)
    elif (folder / CONFIG_FILE).is_file():
        path = folder / CONFIG_FILE
        try:
            config = OpenpiConfig.from_dict(read_json(path))
        except InputError as error:
            raise CheckpointError(f"{path}: {error}") from error
    else:
        known = [name for name, c in PRESETS.items() if c.variant == variant]
        raise CheckpointError(
            f"{folder}: no file of a checkpoint tells its horizon, robot and normalization; name "
            f"the training configuration with preset=..., one of: {', '.join(known)}"
        )
    if config.variant != variant:
        raise CheckpointError(
            f"{folder}: the weights are those of {variant} ({_TELLING[variant]!r} is there), but "
            f"{config.name!r} is a configuration of {config.variant}"
        )
    return _with_sizes(config, folder)


def _variant(folder: Path) -> str:
    """pi0 or pi05, by the names of the weights."""
    if (folder / PARAMS).is_dir():
        names: Any = StoredTree(folder / PARAMS)
        where = folder / PARAMS
    else:
        where = folder / torch_file.FILE
        names = torch_file.leaves(where)
    found = [variant for variant, leaf in _TELLING.items() if leaf in names]
    if len(found) == 1:
        return found[0]
    hint = (
        "; PaliGemma without an action expert is pi0-FAST, which is not supported"
        if not found and "PaliGemma/llm/embedder/input_embedding" in names
        else ""
    )
    raise CheckpointError(
        f"{where}: holds {'both' if found else 'neither'} {_TELLING['pi0']!r} of pi0 "
        f"{'and' if found else 'nor'} {_TELLING['pi05']!r} of pi0.5{hint}"
    )


def _with_sizes(config: OpenpiConfig, folder: Path) -> OpenpiConfig:
    """The configuration with the sizes of `tiny_archs.json`, where there is one."""
    path = folder / SIZES_FILE
    if not path.is_file():
        return config
    raw = read_json(path)
    try:
        model = dict(raw["model_config"])
        gemma = {**GEMMA, **_described(GemmaConfig, raw.get("gemma_variants", {}), path)}
        towers = {**SIGLIP, **_described(SiglipConfig, raw.get("siglip_variants", {}), path)}
        told = {
            "vision": towers[_TOWER],
            "language": gemma[model["paligemma_variant"]],
            "action_expert": gemma[model["action_expert_variant"]],
            "vocab_size": raw["vocab_size"],
            "action_dim": model["action_dim"],
            "action_horizon": model["action_horizon"],
            "max_prompt_tokens": model["max_token_len"],
        }
        variant = "pi05" if model["pi05"] else "pi0"
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or unusable key ({error!r})") from error
    if variant != config.variant:
        raise CheckpointError(f"{path}: describes {variant}, but the weights are {config.variant}")
    try:
        plain = {key: to_plain(value) for key, value in told.items()}
        return OpenpiConfig.from_dict(config.to_dict() | plain)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _described(kind: Any, variants: Mapping[str, Any], path: Path) -> dict[str, Any]:
    found = {}
    for name, sizes in variants.items():
        sizes = dict(sizes)
        if "patch_size" in sizes:  # a pair there
            height, width = sizes["patch_size"]
            if height != width:
                raise CheckpointError(f"{path}: {name}: patches of {height} x {width}, not square")
            sizes["patch_size"] = height
        try:
            found[name] = from_plain(kind, sizes, name)
        except InputError as error:
            raise CheckpointError(f"{path}: {error}") from error
    return found


def public_sizes(config: OpenpiConfig) -> dict[str, Any] | None:
    """The content of `tiny_archs.json`; None if all sizes are built in."""
    built_in = (
        config.vision == SIGLIP[_TOWER]
        and config.language == GEMMA["gemma_2b"]
        and config.action_expert == GEMMA["gemma_300m"]
        and config.vocab_size == OpenpiConfig.__dataclass_fields__["vocab_size"].default
    )
    if built_in:
        return None
    tower = dataclasses.asdict(config.vision)
    return {
        "vocab_size": config.vocab_size,
        "gemma_variants": {
            "paligemma": dataclasses.asdict(config.language),
            "action_expert": dataclasses.asdict(config.action_expert),
        },
        "siglip_variants": {_TOWER: tower | {"patch_size": [config.vision.patch_size] * 2}},
        "model_config": {
            "paligemma_variant": "paligemma",
            "action_expert_variant": "action_expert",
            "action_dim": config.action_dim,
            "action_horizon": config.action_horizon,
            "max_token_len": config.max_prompt_tokens,
            "pi05": config.variant == "pi05",
        },
    }


def read_statistics(folder: Path, asset_id: str | None) -> dict[str, Any]:
    """The statistics of all assets by their ids, each as in its file.

    Args:
        folder: as `step_folder` returns it.
        asset_id: the one that is needed.

    Raises:
        CheckpointError: there is no such asset; the message lists the available ones.
    """
    assets = folder / ASSETS
    there = {str(p.parent.relative_to(assets)): p for p in sorted(assets.rglob(STATISTICS_FILE))}
    if asset_id not in there:
        what = (
            "which statistics are used is told by no file"
            if asset_id is None
            else f"{assets / asset_id / STATISTICS_FILE}: missing"
        )
        raise CheckpointError(
            f"{folder}: {what}; name one with unnorm_key=..., there are: "
            f"{', '.join(there) or 'none'}"
        )
    return {name: finite(read_json(path)) for name, path in there.items()}


class PublicTensors(Mapping[str, np.ndarray]):
    """The weights of a directory by the paths of our parameters, in Flax's layout.

    Names and shapes are checked on opening, values as each is read. The order is that of the file;
    requests in this order are read once.
    """

    def __init__(self, folder: Path, model: FlowMatching):
        """Reads names and shapes.

        Args:
            folder: as `step_folder` returns it.
            model: abstract or not; defines what should be there.

        Raises:
            CheckpointError: a leaf is missing, unexpected or of the wrong shape. The message names
                it.
        """
        self._slots = slots(model)
        self._tree = StoredTree(folder / PARAMS)
        shapes = public_shapes(model)
        self._adapters = Adapters(self._tree, shapes, str(self._tree.folder))
        self._check(shapes)
        self._open: str | None = None

    def dtype(self, path: str) -> np.dtype[Any]:
        """Of a parameter, as stored."""
        return self._tree[self._slots[path].leaf].dtype

    def __getitem__(self, path: str) -> np.ndarray:
        slot = self._slots[path]
        if self._open is not None and self._open != slot.leaf:
            self._tree[self._open].close()
        self._open = slot.leaf
        value = self._tree[slot.leaf].read(slot.index)
        if slot.leaf in self._adapters:
            value = self._adapters.merged(slot.leaf, slot.index, value)
        return slot.to_flax(value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        where = self._tree.folder
        found = self._tree.keys() - self._adapters.names
        missing, unexpected = sorted(shapes.keys() - found), sorted(found - shapes.keys())
        if missing:
            other = f"; there is {unexpected[0]!r}, which is unexpected" if unexpected else ""
            raise CheckpointError(
                f"{where}: parameter {missing[0]!r} of shape {shapes[missing[0]]} is missing "
                f"({len(missing)} in all){other}"
            )
        if unexpected:
            name = unexpected[0]
            raise CheckpointError(
                f"{where}: parameter {name!r} of shape {self._tree[name].shape} is unexpected "
                f"({len(unexpected)} in all): the checkpoint is of another architecture"
            )
        for name, shape in shapes.items():
            if self._tree[name].shape != shape:
                raise CheckpointError(
                    f"{where}: parameter {name!r} has shape {self._tree[name].shape}, expected "
                    f"{shape}; sizes that are not built in stand in {SIZES_FILE} beside {PARAMS}/"
                )


def open_tensors(folder: Path, model: FlowMatching) -> PublicTensors | torch_file.TorchTensors:
    """The weights of a directory in either format; see `PublicTensors` and `TorchTensors`."""
    if (folder / PARAMS).is_dir():
        return PublicTensors(folder, model)
    return torch_file.TorchTensors(folder / torch_file.FILE, model)


class NamedTensors(family.PublicTensors):
    """Parameters by our paths, in Flax's layout, under the names and in the layouts of files."""

    def __init__(
        self, model: FlowMatching, tensors: Mapping[str, np.ndarray], *, file: Path | str = ""
    ):
        """Wraps a mapping.

        Args:
            model: whose parameters they are; may be abstract.
            tensors: path of each parameter -> value.
            file: where they are, for errors.
        """
        names = {path: name for path, (name, _) in flax_leaves(model).items()}
        self._paths = {names[path]: path for path in tensors}
        self._tensors, self._file = tensors, file

    def file_of(self, name: str) -> str:
        """The directory."""
        return str(self._file)

    def path_of(self, name: str) -> str:
        """Our path of a tensor."""
        return self._paths[name]

    def __getitem__(self, name: str) -> np.ndarray:
        path = self._paths[name]
        value = self._tensors[path]
        return value.T if path.endswith(".kernel") else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def export(
    config: OpenpiConfig,
    tensors: Mapping[str, np.ndarray],
    statistics: Mapping[str, Any],
    out: Path,
    *,
    value_keys: bool = False,
) -> None:
    """Writes a directory as openpi publishes it; its `restore_params` reads it.

    Args:
        config: of the policy.
        tensors: path of each parameter -> value, in Flax's layout; requested once, one leaf's worth
            at a time, in the order of leaves.
        statistics: asset id -> the content of its `norm_stats.json`.
        out: an empty or new folder.
        value_keys: name leaves as openpi's trainer does.

    Raises:
        InputError: `out` holds files already, or an asset id is no path below a folder.
        CheckpointError: the parameters are not those of the configuration.
    """
    for asset in statistics:
        if Path(asset).is_absolute() or ".." in Path(asset).parts:
            raise InputError(f"{config.name}: {asset!r}: statistics are written below {ASSETS}/")
    model = abstract_model(config)
    places = slots(model)
    for path in places:
        if path not in tensors:
            raise CheckpointError(f"{config.name}: parameter {path!r} is missing")
    if unexpected := sorted(tensors.keys() - places.keys()):
        raise CheckpointError(f"{config.name}: parameter {unexpected[0]!r} is unexpected")
    check_empty(out)
    out.mkdir(parents=True, exist_ok=True)
    members: dict[str, list[tuple[str, Slot]]] = {}
    for path, slot in places.items():
        members.setdefault(slot.leaf, []).append((path, slot))
    shapes = public_shapes(model)
    with emptied_on_error(out):
        write_tree(
            out / PARAMS,
            {leaf: _parts(shapes[leaf], found, tensors) for leaf, found in members.items()},
            value_keys=value_keys,
        )
        for asset, content in statistics.items():
            write_json(out / ASSETS / asset / STATISTICS_FILE, content)
        if (sizes := public_sizes(config)) is not None:
            write_json(out / SIZES_FILE, sizes)
        write_json(out / CONFIG_FILE, config.to_dict())


def _parts(
    shape: tuple[int, ...], members: list[tuple[str, Slot]], tensors: Mapping[str, np.ndarray]
) -> Parts:
    """A leaf of the parameters that it holds."""

    def make() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        dtypes = set()
        for path, slot in members:
            value = np.asarray(tensors[path])
            dtypes.add(value.dtype.name)
            if len(dtypes) > 1:
                raise CheckpointError(
                    f"parameter {path!r} has dtype {value.dtype}, others of {slot.leaf!r}, which "
                    "is one array in the checkpoint, have another"
                )
            if value.shape != slot.flax_shape:
                raise CheckpointError(
                    f"parameter {path!r} has shape {value.shape}, expected {slot.flax_shape}"
                )
            yield slot.index, slot.to_public(value)

    return Parts(shape, make)
