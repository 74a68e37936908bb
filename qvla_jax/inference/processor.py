"""From observations to model inputs: images, prompt tokens and proprio."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from qvla_jax.array_typing import Int, UInt8
from qvla_jax.config import OpenVLAConfig
from qvla_jax.errors import InputError
from qvla_jax.inference.images import reference_chain, resize_bicubic
from qvla_jax.inference.normalization import Normalizer
from qvla_jax.models import ModelInputs

CAMERA_KEYS = ("image", "wrist_image")


@dataclasses.dataclass(frozen=True)
class Processor:
    """Host-side preprocessing of one policy."""

    config: OpenVLAConfig
    tokenizer: tokenizers.Tokenizer
    actions: Normalizer
    proprio: Normalizer | None

    def __call__(self, batch: Mapping[str, Any], *, preprocessed: bool = False) -> ModelInputs:
        """A batch of observations -> model inputs (numpy).

        Args:
            batch: `image` and, for two cameras, `wrist_image` u8[b, H, W, 3]; `state` f32[b, p]
                where the policy takes proprio; `instruction`, b strings. Other keys are ignored.
            preprocessed: the images are what the reference's processor receives (resized and
                cropped uint8); only its own resize to the towers' size is left to do.

        Raises:
            InputError: a key is missing or has the wrong shape or dtype.
        """
        instructions = _require(batch, "instruction")
        cameras = CAMERA_KEYS[: self.config.num_images]
        images = [self._images(key, _require(batch, key), preprocessed) for key in cameras]
        input_ids, length = self.tokenize(instructions)
        sizes = {"instruction": len(input_ids)}
        sizes |= {key: len(value) for key, value in zip(cameras, images, strict=True)}
        proprio = None
        if self.proprio is not None:
            state = np.asarray(_require(batch, "state"))
            if state.ndim != 2 or state.shape[1] != self.config.proprio_dim:
                raise InputError(
                    f"state: expected [b, {self.config.proprio_dim}], got {list(state.shape)}"
                )
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

    def tokenize(
        self, instructions: Sequence[str]
    ) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, " b"]]:
        """Prompts -> padded token ids from BOS to the empty token, and their lengths.

        Raises:
            InputError: a prompt is longer than the policy's limit.
        """
        config = self.config
        ids = np.full((len(instructions), config.max_prompt_tokens), config.pad_token_id, np.int32)
        lengths = np.empty(len(instructions), np.int32)
        for row, instruction in enumerate(instructions):
            prompt = config.prompt_template.format(instruction=instruction.lower())
            tokens = self.tokenizer.encode(prompt).ids
            # The reference appends the lone word-boundary piece unless it stands there already.
            if config.empty_token_id is not None and tokens[-1] != config.empty_token_id:
                tokens = [*tokens, config.empty_token_id]
            if len(tokens) > config.max_prompt_tokens:
                raise InputError(
                    f"instruction {instruction!r}: {len(tokens)} tokens, the policy takes at most "
                    f"{config.max_prompt_tokens}"
                )
            ids[row, : len(tokens)] = tokens
            lengths[row] = len(tokens)
        return ids, lengths

    def _images(
        self, key: str, images: np.ndarray, preprocessed: bool
    ) -> UInt8[np.ndarray, "b H W 3"]:
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise InputError(
                f"{key}: expected uint8 [b, H, W, 3], got {images.dtype} {list(images.shape)}"
            )
        config = self.config
        if config.image_chain == "openvla" and not preprocessed:
            images = np.stack([reference_chain(i, center_crop=config.center_crop) for i in images])
        return np.stack([resize_bicubic(i, config.image_size) for i in images])


def _require(batch: Mapping[str, Any], key: str) -> Any:
    if key not in batch:
        raise InputError(f"observation has no {key!r}; it holds: {', '.join(sorted(batch))}")
    return batch[key]
