"""pi0 and pi0.5, and small policies of their kind."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from flax import nnx

from qvla_jax.atomic import write_bytes
from qvla_jax.checkpoints.files import TOKENIZER_FILE
from qvla_jax.checkpoints.weights import Source
from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.families.family import Family, Parts
from qvla_jax.families.layout import Layout
from qvla_jax.families.observations import ObservationSpec
from qvla_jax.families.openpi import unread
from qvla_jax.families.openpi.checkpoint import (
    ASSETS,
    NamedTensors,
    export,
    is_openpi,
    open_tensors,
    public_files,
    read_config,
    read_statistics,
    sizes_of,
    step_folder,
)
from qvla_jax.families.openpi.config import (
    PALIGEMMA_TOKENS,
    PRESETS,
    SHORT_NAMES,
    OpenpiConfig,
)
from qvla_jax.families.openpi.layout import layout
from qvla_jax.families.openpi.names import parameters
from qvla_jax.families.openpi.network import Conditioning, FlowMatching, make_model
from qvla_jax.families.openpi.processor import Processor, make_processor
from qvla_jax.families.openpi.robots import ROBOTS, from_client
from qvla_jax.families.openpi.synthetic import synthesize, unit_statistics
from qvla_jax.families.openpi.tokenizer import FILES, SOURCES, read_file, word_tokenizer
from qvla_jax.families.options import LoadOptions


class OpenpiFamily(Family):
    """See `Family` for all methods."""

    name = "openpi"
    kinds = "pi0 and pi0.5"
    options = frozenset({"executed_steps", "preset", "tokenizer", "unnorm_key"})
    files = FILES
    input_images = "images"
    input_state = "state"

    @property
    def presets(self) -> Mapping[str, OpenpiConfig]:
        return {**PRESETS, **SHORT_NAMES}

    def config(self, values: Mapping[str, Any]) -> OpenpiConfig:
        return OpenpiConfig.from_dict(values)

    def with_statistics(self, config: OpenpiConfig, unnorm_key: str) -> OpenpiConfig:
        return dataclasses.replace(config, asset_id=unnorm_key)

    def adjusted(
        self, config: OpenpiConfig, options: LoadOptions, source: str | Path
    ) -> OpenpiConfig:
        if options.tokenizer is not None:
            raise InputError(f"{source}: tokenizer: only public directories come without one")
        if options.preset not in (None, config.name):
            raise InputError(
                f"{source}: preset={options.preset!r} contradicts the recorded {config.name!r}"
            )
        config = _executing(config, options, source)
        rest = dataclasses.replace(options, preset=None, executed_steps=None)
        return super().adjusted(config, rest, source)

    def public_statistics(
        self, config: OpenpiConfig, statistics: Mapping[str, Any]
    ) -> dict[str, Any]:
        assert config.robot is not None
        convert = ROBOTS[config.robot].from_standard

        def public(entry: Mapping[str, Any], block: str) -> dict[str, list[float]]:
            mean, std, q01, q99 = (np.asarray(entry[key]) for key in ("mean", "std", "q01", "q99"))
            if block == "actions":  # which a falling line may convert
                std = np.abs(convert(std) - convert(np.zeros_like(std)))
                mean, q01, q99 = map(convert, (mean, q01, q99))
                q01, q99 = np.minimum(q01, q99), np.maximum(q01, q99)
            found = {"mean": mean, "std": std, "q01": q01, "q99": q99}
            return {key: values.tolist() for key, values in found.items()}

        blocks = (("state", "proprio"), ("actions", "action"))
        return {
            name: {
                "norm_stats": {
                    block: public(entry[ours], block) for block, ours in blocks if ours in entry
                }
            }
            for name, entry in statistics.items()
        }

    def random_parts(self, config: OpenpiConfig) -> tuple[dict[str, Any], dict[str, bytes]]:
        # PaliGemma's vocabulary has a tokenizer of its own.
        if config.vocab_size >= PALIGEMMA_TOKENS or None in (config.robot, config.asset_id):
            return super().random_parts(config)
        return unit_statistics(config), {TOKENIZER_FILE: word_tokenizer().to_str().encode()}

    def make_model(self, config: OpenpiConfig, *, rngs: nnx.Rngs) -> FlowMatching:
        return make_model(config, rngs=rngs)

    def layout(self, config: OpenpiConfig) -> Layout:
        return layout(config)

    def conditioning(self, model: FlowMatching) -> Conditioning:
        return model.conditioning(model.times[None])

    def drop_unread(self, model: FlowMatching) -> None:
        unread.drop_unread(model)

    def is_dropped(self, model: FlowMatching) -> bool:
        return unread.is_dropped(model)

    def observation(self, config: OpenpiConfig) -> ObservationSpec:
        if config.robot is None:
            raise InputError(f"{config.name}: serves several robots and names none")
        robot = ROBOTS[config.robot]
        has_prompt = config.default_prompt is not None
        return ObservationSpec(
            cameras=robot.cameras,
            state_dim=robot.state_dim,
            optional=frozenset((*robot.optional, *(["instruction"] if has_prompt else []))),
            image_size=config.image_size,
            sampled=True,
            state_dtype=np.float64,
            from_client=functools.partial(from_client, robot),
            metadata={} if config.reset_pose is None else {"reset_pose": list(config.reset_pose)},
        )

    def make_processor(
        self,
        config: OpenpiConfig,
        statistics: Mapping[str, Any],
        files: Mapping[str, bytes],
        *,
        source: Source,
    ) -> Processor:
        return make_processor(config, statistics, files, source=source)

    def recognizes(self, folder: Path) -> bool:
        return is_openpi(folder)

    def public_files(
        self, source: str, names: Sequence[str], settings: Mapping[str, Any], options: LoadOptions
    ) -> list[str]:
        return public_files(source, names)

    def read(self, folder: Path, options: LoadOptions) -> Parts:
        self.check_options(options, folder)
        folder, config = _config(folder, options)
        statistics = read_statistics(folder, config.asset_id)
        path = _tokenizer_file(folder, options)
        name, content = read_file(path)

        def source(file: str) -> str:
            return str(path if file == name else folder / ASSETS)

        processor = make_processor(config, statistics, {name: content}, source=source)
        return Parts(config, processor, statistics)

    def tensors(self, folder: Path, config: OpenpiConfig, options: LoadOptions) -> NamedTensors:
        folder = step_folder(folder)
        model = self.abstract_model(config)
        return NamedTensors(model, open_tensors(folder, model), file=folder)

    def stays_in_files(self, folder: Path) -> bool:
        return True

    def survey(self, folder: Path) -> tuple[OpenpiConfig, Mapping[str, np.dtype[Any]]]:
        folder = step_folder(folder)
        config = sizes_of(folder)
        model = self.abstract_model(config)
        stored = open_tensors(folder, model)
        named = NamedTensors(model, stored, file=folder)
        return config, {name: stored.dtype(named.path_of(name)) for name in named}

    def export(
        self,
        config: OpenpiConfig,
        model: FlowMatching,
        statistics: Mapping[str, Any],
        out: Path,
        *,
        dtype: Any = None,
    ) -> None:
        tensors = {path: np.asarray(v[...]) for path, v in parameters(model)}
        if dtype is not None:
            tensors = {path: value.astype(dtype) for path, value in tensors.items()}
        export(config, tensors, statistics, out)

    def reexport(self, folder: Path, out: Path, options: LoadOptions) -> bool:
        self.check_options(options, folder)
        folder, config = _config(folder, options)
        statistics = read_statistics(folder, config.asset_id)
        export(config, open_tensors(folder, self.abstract_model(config)), statistics, out)
        if options.tokenizer is not None:
            name, content = read_file(Path(options.tokenizer))
            write_bytes(out / name, content)
        return True

    def synthesize(self, config: OpenpiConfig, out: Path, *, seed: int = 0) -> None:
        synthesize(config, out, seed=seed)


def _config(folder: Path, options: LoadOptions) -> tuple[Path, OpenpiConfig]:
    """The folder of the weights, and its configuration."""
    folder = step_folder(folder)
    config = read_config(folder, preset_name=options.preset)
    if options.unnorm_key is not None:
        config = dataclasses.replace(config, asset_id=options.unnorm_key)
    return folder, _executing(config, options, folder)


def _executing(config: OpenpiConfig, options: LoadOptions, source: str | Path) -> OpenpiConfig:
    """The configuration with the client's steps that the user says, if any.

    Raises:
        InputError: a chunk has fewer actions.
    """
    steps = options.executed_steps
    if steps is None:
        return config
    if steps > config.action_horizon:
        raise InputError(
            f"{source}: executed_steps={steps}: a chunk of {config.name} has "
            f"{config.action_horizon} actions"
        )
    return dataclasses.replace(config, executed_steps=steps)


def _tokenizer_file(folder: Path, options: LoadOptions) -> Path:
    """The user's, or one beside the weights."""
    if options.tokenizer is not None:
        return Path(options.tokenizer)
    beside = [path for name in FILES if (path := folder / name).is_file()]
    if not beside:
        raise CheckpointError(
            f"{folder}: checkpoints of openpi come without their tokenizer; name its file with "
            f"tokenizer=..., {SOURCES}"
        )
    return beside[0]


FAMILY: Final = OpenpiFamily()
