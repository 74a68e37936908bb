"""Converts observations to model inputs: images, prompt tokens and proprio."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from qvla_jax.array_typing import Float, Int, UInt8
from qvla_jax.checkpoints.files import TOKENIZER_FILE
from qvla_jax.errors import CheckpointError, InputError, unknown
from qvla_jax.families import family
from qvla_jax.families.prismatic.checkpoint.statistics import check_entry
from qvla_jax.families.prismatic.config import OpenVLAConfig
from qvla_jax.families.prismatic.images import reference_chain, resize_bicubic
from qvla_jax.families.prismatic.network import ModelInputs
from qvla_jax.families.prismatic.normalization import Normalizer


@dataclasses.dataclass(frozen=True)
class Processor(family.Processor):
    """Host-side preprocessing of one policy."""

    config: OpenVLAConfig
    tokenizer: tokenizers.Tokenizer
    actions: Normalizer
    proprio: Normalizer | None

    def __call__(self, batch: Mapping[str, Any], *, preprocessed: bool = False) -> ModelInputs:
        """A batch of observations -> model inputs (numpy).

        Args:
            batch: `image` and, for two cameras, `wrist_image`, for three, `left_wrist_image` and
                `right_wrist_image` u8[b, H, W, 3], or a sequence of u8[H, W, 3] of any sizes;
                `state` f32[b, p] if the policy takes proprio; `instruction`, b strings; optionally,
                for UniVLA, `history`, b strings that `history` made from the previous call. Other
                keys are ignored.
            preprocessed: the images are what the reference's processor receives (resized and
                cropped uint8); only its own resize to the towers' size remains.

        Raises:
            InputError: a key is missing or has the wrong shape or dtype.
        """
        instructions = _texts("instruction", _require(batch, "instruction"))
        cameras = self.config.camera_keys
        images = [self._images(key, _require(batch, key), preprocessed) for key in cameras]
        histories = batch.get("history") if self.config.latent_action is not None else None
        if histories is not None:
            histories = _texts("history", histories)
        input_ids, length = self.tokenize(instructions, histories)
        sizes = {"instruction": len(input_ids)}
        sizes |= {key: len(value) for key, value in zip(cameras, images, strict=True)}
        proprio = None
        if self.proprio is not None:
            state = np.asarray(_require(batch, "state"))
            if state.ndim != 2 or state.shape[1] != self.config.proprio_dim:
                raise InputError(
                    f"state: expected [b, {self.config.proprio_dim}], got {list(state.shape)}"
                )
            if state.dtype.kind not in "fiu":
                raise InputError(f"state: expected numbers, got {state.dtype}")
            if not np.isfinite(state).all():
                raise InputError("state: holds NaN or inf")
            proprio = self.proprio.normalize(state)
            sizes["state"] = len(proprio)
        if len(set(sizes.values())) != 1:
            raise InputError(f"observation batch: entries differ in length: {sizes}")
        arrays: dict[str, Any] = {
            "images": np.stack(images, axis=1),
            "input_ids": input_ids,
            "prompt_length": length,
            "proprio": proprio,
        }
        return ModelInputs(**arrays)

    def normalize_actions(
        self, actions: Float[np.ndarray, "*b h a"], state: Any = None
    ) -> Float[np.ndarray, "*b h a"]:
        """Actions in the robot's units -> the normalized action space."""
        return self.actions.normalize(actions)

    def unnormalize_actions(
        self, actions: Float[np.ndarray, "*b h a"], state: Any = None
    ) -> Float[np.ndarray, "*b h a"]:
        """Normalized actions -> the robot's units."""
        return self.actions.unnormalize(actions)

    @property
    def action_units(self) -> Float[np.ndarray, " a"]:
        """The robot's units in one unit of each entry of a normalized action."""
        return self.actions.units

    def files(self) -> dict[str, bytes]:
        """The tokenizer."""
        return {TOKENIZER_FILE: self.tokenizer.to_str().encode()}

    def tokenize(
        self, instructions: Sequence[str], histories: Sequence[str] | None = None
    ) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, " b"]]:
        """Prompts -> padded token ids from BOS to the empty token, and their lengths.

        All are padded to `max_prompt_tokens`, or to a multiple of it if one is longer.

        Args:
            instructions: the instructions.
            histories: for UniVLA, the latent actions of the previous call as text; empty at first.

        Raises:
            InputError: a prompt is longer than the policy's limit, or the numbers of histories and
                instructions differ.
        """
        if histories is None:
            histories = [""] * len(instructions)
        if len(histories) != len(instructions):
            raise InputError(
                f"history: {len(histories)} entries, but there are {len(instructions)} instructions"
            )
        config = self.config
        prompts = []
        for instruction, history in zip(instructions, histories, strict=True):
            template = config.prompt_template
            if history:
                assert config.latent_action is not None  # only UniVLA has histories
                template = config.latent_action.history_template
            prompt = template.format(instruction=instruction.lower(), history=history)
            tokens = self.tokenizer.encode(prompt).ids
            # The reference appends the lone word-boundary piece unless it is already there.
            if config.empty_token_id is not None and tokens[-1] != config.empty_token_id:
                tokens = [*tokens, config.empty_token_id]
            if len(tokens) > config.prompt_limit:
                raise InputError(
                    f"instruction {instruction!r:.200}: {len(tokens)} tokens, the policy takes at "
                    f"most {config.prompt_limit}"
                )
            prompts.append(tokens)
        lengths = np.array([len(tokens) for tokens in prompts], np.int32)
        width = config.padded_prompt(max(lengths, default=0))
        ids = np.full((len(prompts), width), config.pad_token_id, np.int32)
        for row, tokens in enumerate(prompts):
            ids[row, : len(tokens)] = tokens
        return ids, lengths

    def widened(self, batches: Sequence[ModelInputs]) -> list[ModelInputs]:
        """Prepared batches with all prompts padded to the longest, so that arrays fit together."""
        width = max((batch.input_ids.shape[1] for batch in batches), default=0)

        def pad(ids: Int[np.ndarray, "b t"]) -> Int[np.ndarray, "b t"]:
            extra = width - ids.shape[1]
            return np.pad(ids, ((0, 0), (0, extra)), constant_values=self.config.pad_token_id)

        return [
            dataclasses.replace(batch, input_ids=pad(np.asarray(batch.input_ids)))
            for batch in batches
        ]

    def history(self, inputs: ModelInputs) -> list[str]:
        """The `history` of the next observations, from inputs that `Policy.complete` completed.

        As in UniVLA's evaluation, it takes the last four latent tokens of prompt and answer, which
        are those of the answer unless it also holds other tokens.
        """
        latent = self.config.latent_action
        if latent is None or inputs.action_tokens is None:
            raise InputError(
                f"{self.config.name}: no latent actions in these inputs; complete them with a "
                "UniVLA policy first"
            )
        first = self.config.pad_token_id + 1
        texts = []
        lengths, prompts, answers = (
            np.asarray(x) for x in (inputs.prompt_length, inputs.input_ids, inputs.action_tokens)
        )
        for length, prompt, answer in zip(lengths, prompts, answers, strict=True):
            tokens = np.concatenate([prompt[:length], answer])
            latents = tokens[tokens >= first][-latent.num_tokens :]
            texts.append("".join(f"<ACT_{token - first}>" for token in latents))
        return texts

    def _images(
        self, key: str, images: Sequence[np.ndarray] | np.ndarray, preprocessed: bool
    ) -> UInt8[np.ndarray, "b H W 3"]:
        config = self.config
        prepared = []
        for image in map(np.asarray, images):
            if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
                raise InputError(
                    f"{key}: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}"
                )
            if not image.size:
                raise InputError(f"{key}: an image of {list(image.shape)} has no pixels")
            if config.image_chain == "openvla" and not preprocessed:
                image = reference_chain(image, center_crop=config.center_crop)
            prepared.append(resize_bicubic(image, config.image_size))
        return np.stack(prepared)


def _require(batch: Mapping[str, Any], key: str) -> Any:
    if key not in batch:
        raise InputError(f"observation has no {key!r}; it holds: {', '.join(sorted(batch))}")
    return batch[key]


def _texts(key: str, values: Any) -> list[str]:
    """One text for each frame, never what Python prints for something else."""
    if isinstance(values, str | bytes) or np.ndim(values) != 1:
        raise InputError(f"{key}: expected one text for each frame, got {values!r:.80}")
    for value in values:
        if not isinstance(value, str):
            raise InputError(f"{key}: expected text, got {type(value).__name__} {value!r:.80}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{key}: holds half a character ({error.reason})") from error
    return [str(value) for value in values]


def make_processor(
    config: OpenVLAConfig,
    statistics: Mapping[str, Any],
    tokenizer: tokenizers.Tokenizer,
    *,
    source: str,
) -> Processor:
    """Assembles a processor.

    Args:
        config: architecture.
        statistics: data set name -> public statistics.
        tokenizer: its tokenizer.
        source: file of the statistics, named in errors.

    Raises:
        CheckpointError: the statistics lack the policy's data set, or do not fit it.
    """
    key = config.unnorm_key
    if key is None and len(statistics) == 1:
        key = next(iter(statistics))
    if key is None or key not in statistics:
        raise CheckpointError(f"{source}: {unknown('statistics', key, statistics)}")
    check_entry(statistics, key, source)
    entry = statistics[key]
    blocks = {"action": config.action_dim}
    if config.proprio_dim:
        blocks["proprio"] = config.proprio_dim
    normalizers = {}
    for block, size in blocks.items():
        where = f"{source}: {key}.{block}"
        if block not in entry:
            raise CheckpointError(f"{where}: missing")
        normalizer = Normalizer.from_statistics(
            entry[block],
            where=where,
            kind=config.action_normalization,
            clip_unscaled=block == "proprio",
        )
        if len(normalizer.low) != size:
            raise CheckpointError(f"{where}: {len(normalizer.low)} entries, the policy has {size}")
        normalizers[block] = normalizer
    return Processor(
        config=config,
        tokenizer=tokenizer,
        actions=normalizers["action"],
        proprio=normalizers.get("proprio"),
    )


def read_tokenizer(content: bytes | None, where: str) -> tokenizers.Tokenizer:
    """A tokenizer from the content of `TOKENIZER_FILE`.

    Truncation and padding that the file may ask for are disabled, as in transformers.

    Args:
        content: None if the file is missing.
        where: the file, for errors.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if content is None:
        raise CheckpointError(f"{where}: missing")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{where}: not a tokenizers file ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
