"""OpenVLA, OpenVLA-OFT, UniVLA, and small policies of their kind."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from flax import nnx

from qvla_jax.atomic import write_bytes
from qvla_jax.checkpoints.files import (
    CONFIG_FILE,
    STATISTICS_FILE,
    TOKENIZER_FILE,
    check_fetched,
    read_json,
)
from qvla_jax.checkpoints.weights import Source, check_shapes, file_named
from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.families.family import Family, Parts
from qvla_jax.families.layout import Layout
from qvla_jax.families.observations import ObservationSpec
from qvla_jax.families.options import LoadOptions
from qvla_jax.families.prismatic import specs, unread
from qvla_jax.families.prismatic.checkpoint.components import component_file
from qvla_jax.families.prismatic.checkpoint.directory import PublicTensors
from qvla_jax.families.prismatic.checkpoint.export import export_model, reexport, synthesize
from qvla_jax.families.prismatic.checkpoint.huggingface import (
    OWN_KEY,
    check_tokenizer,
    is_huggingface,
    read_config,
)
from qvla_jax.families.prismatic.checkpoint.listing import public_files
from qvla_jax.families.prismatic.checkpoint.univla import check_latent_tokens
from qvla_jax.families.prismatic.config import CAMERA_KEYS, PRESETS, OpenVLAConfig
from qvla_jax.families.prismatic.layout import layout
from qvla_jax.families.prismatic.network import Prismatic, make_model
from qvla_jax.families.prismatic.processor import Processor, make_processor, read_tokenizer
from qvla_jax.families.prismatic.word_tokenizer import word_files


class PrismaticFamily(Family):
    """See `Family` for all methods."""

    name = "prismatic"
    kinds = "OpenVLA, OpenVLA-OFT and UniVLA"
    options = frozenset(
        {
            "unnorm_key",
            "num_images",
            "center_crop",
            "action_horizon",
            "action_normalization",
            "merge_adapter",
        }
    )
    files = (TOKENIZER_FILE,)
    input_images = "images"
    input_state = "proprio"

    @property
    def presets(self) -> Mapping[str, OpenVLAConfig]:
        return PRESETS

    def config(self, values: Mapping[str, Any]) -> OpenVLAConfig:
        return OpenVLAConfig.from_dict(values)

    def check_options(self, options: LoadOptions, source: str | Path) -> None:
        super().check_options(options, source)
        if options.num_images is not None and options.num_images not in CAMERA_KEYS:
            raise InputError(
                f"num_images: {options.num_images} images are not supported; at most "
                f"{max(CAMERA_KEYS)} are, the main camera's and those at the grippers"
            )

    def adjusted(
        self, config: OpenVLAConfig, options: LoadOptions, source: str | Path
    ) -> OpenVLAConfig:
        if options.merge_adapter:
            raise InputError(f"{source}: merge_adapter: only public directories hold adapters")
        if options.center_crop and config.image_chain != "openvla":
            raise InputError(
                f"{source}: center_crop=True: {config.name} takes its images as they are, without "
                "a crop"
            )
        if options.center_crop is not None:
            config = dataclasses.replace(config, center_crop=options.center_crop)
        return super().adjusted(config, options, source)

    def takes_options(self, config: OpenVLAConfig) -> bool:
        # Others use their images unchanged.
        return config.image_chain == "openvla"

    def make_model(self, config: OpenVLAConfig, *, rngs: nnx.Rngs) -> Prismatic:
        return make_model(config, rngs=rngs)

    def layout(self, config: OpenVLAConfig) -> Layout:
        return layout(config)

    def decodes(self, config: OpenVLAConfig) -> bool:
        return config.decoding != "l1"

    def drop_unread(self, model: Prismatic) -> None:
        unread.drop_unread(model)

    def is_dropped(self, model: Prismatic) -> bool:
        return unread.is_dropped(model)

    def observation(self, config: OpenVLAConfig) -> ObservationSpec:
        return specs.observation_spec(config)

    def make_processor(
        self,
        config: OpenVLAConfig,
        statistics: Mapping[str, Any],
        files: Mapping[str, bytes],
        *,
        source: Source,
    ) -> Processor:
        where = file_named(source, TOKENIZER_FILE)
        tokenizer = read_tokenizer(files.get(TOKENIZER_FILE), where)
        where = file_named(source, STATISTICS_FILE)
        return make_processor(config, statistics, tokenizer, source=where)

    def random_parts(self, config: OpenVLAConfig) -> tuple[dict[str, Any], dict[str, bytes]]:
        unit = {
            size: {"q01": [-1.0] * size, "q99": [1.0] * size}
            for size in (config.action_dim, config.proprio_dim)
        }
        action = {**unit[config.action_dim], "mask": [True] * (config.action_dim - 1) + [False]}
        entry = {"action": action, "proprio": unit[config.proprio_dim]}
        return {config.unnorm_key or "random": entry}, word_files()

    def recognizes(self, folder: Path) -> bool:
        return is_huggingface(folder)

    def public_files(
        self, source: str, names: Sequence[str], settings: Mapping[str, Any], options: LoadOptions
    ) -> list[str]:
        return public_files(source, names, settings, options)

    def read(self, folder: Path, options: LoadOptions) -> Parts:
        self.check_options(options, folder)
        path = folder / TOKENIZER_FILE
        check_fetched(path)
        tokenizer = read_tokenizer(path.read_bytes() if path.is_file() else None, str(path))
        check_tokenizer(folder, tokenizer)
        config, statistics = read_config(
            folder, options, empty_token_id=tokenizer.token_to_id("\u2581")
        )
        if tokenizer.get_vocab_size() > config.text.vocab_size:
            raise CheckpointError(
                f"{path}: has {tokenizer.get_vocab_size()} tokens, but the language model has "
                f"{config.text.vocab_size} (vocab_size of text_config)"
            )
        check_latent_tokens(config, tokenizer.token_to_id("<ACT_0>"), folder)
        own = folder / STATISTICS_FILE
        source = str(own if own.is_file() else folder / CONFIG_FILE)
        processor = make_processor(config, statistics, tokenizer, source=source)
        return Parts(config, processor, statistics)

    def tensors(self, folder: Path, config: OpenVLAConfig, options: LoadOptions) -> PublicTensors:
        return PublicTensors(folder, merge=options.merge_adapter)

    def stays_in_files(self, folder: Path) -> bool:
        return True

    def survey(self, folder: Path) -> tuple[OpenVLAConfig, Mapping[str, np.dtype[Any]]]:
        config, _ = read_config(folder, sizes_only=True)
        tensors = PublicTensors(folder)
        check_shapes(self.abstract_model(config), tensors, source=tensors.file_of)
        return config, {name: tensors[name].dtype for name in tensors}

    def undecided_statistics(self, folder: Path, options: LoadOptions) -> list[str]:
        if options.unnorm_key is not None:
            return []
        read, statistics = read_config(folder, options, sizes_only=True)
        return [] if read.unnorm_key or len(statistics) < 2 else list(statistics)

    def check_acting(self, folder: Path, options: LoadOptions) -> None:
        """Asks whether images are cropped, before a public OpenVLA policy acts in the simulator.

        Its files do not say. Fine-tunes were trained with random crops, and their public evaluation
        crops; the base model was not. Without the crop a fine-tune silently succeeds less often.

        Raises:
            InputError: the policy decodes action tokens, and neither its files nor the options say.
        """
        if options.center_crop is not None:
            return
        own = read_json(folder / CONFIG_FILE).get(OWN_KEY)
        if isinstance(own, dict) and "center_crop" in own:
            return
        # OpenVLA-OFT's and UniVLA's are always cropped.
        if any(component_file(folder, name) for name in ("action_head", "action_decoder")):
            return
        raise InputError(
            f"{folder}: its files do not tell whether images are cropped, and success in the "
            "simulator depends on it: say --center-crop (fine-tunes that were trained with random "
            "crops, as OpenVLA's on LIBERO) or --no-center-crop (the base model)"
        )

    def export(
        self,
        config: OpenVLAConfig,
        model: Prismatic,
        statistics: Mapping[str, Any],
        out: Path,
        *,
        dtype: Any = None,
    ) -> None:
        export_model(config, model, statistics, out, dtype=dtype)

    def reexport(self, folder: Path, out: Path, options: LoadOptions) -> bool:
        if options.said():
            return False
        reexport(folder, out)
        return True

    def synthesize(self, config: OpenVLAConfig, out: Path, *, seed: int = 0) -> None:
        synthesize(config, out, seed=seed)
        write_bytes(out / TOKENIZER_FILE, word_files()[TOKENIZER_FILE])


FAMILY: Final = PrismaticFamily()
