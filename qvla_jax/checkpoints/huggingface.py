"""Reads OpenVLA, OpenVLA-OFT and UniVLA directories in the public Hugging Face layout.

| file                                 | what it holds                                      |
|--------------------------------------|----------------------------------------------------|
| `config.json`                        | timm ids, Llama's sizes, statistics of the mixture |
| `model*.safetensors`                 | the weights, under the names of `qvla_jax.models`  |
| `preprocessor_config.json`           | the towers' normalization constants                |
| `dataset_statistics.json`            | a fine-tune's, instead of config.json's            |
| `action_head--*_checkpoint.pt`       | OFT's regression head                              |
| `proprio_projector--*_checkpoint.pt` | OFT's proprio projector                            |
| `vision_backbone--*_checkpoint.pt`   | towers with FiLM and LoRA, instead of the weights' |
| `action_decoder*.pt`                 | UniVLA's action decoder                            |
| `lora_adapter/`                      | a PEFT adapter that was not merged                 |
| `tiny_vision_archs.json`             | sizes of towers that are not built in              |
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qvla_jax.checkpoints.directory import COMPONENTS, component_file, component_shape
from qvla_jax.checkpoints.univla import decoder_sizes
from qvla_jax.config import PRESETS, LlamaConfig, OpenVLAConfig, VisionTowerConfig
from qvla_jax.errors import CheckpointError, InputError

CONFIG_FILE: Final = "config.json"
STATISTICS_FILE: Final = "dataset_statistics.json"
# Of config.json: what our own export keeps and the public layout has no word for.
OWN_KEY: Final = "qvla_jax"
KNOWN_TOWERS: Final = {t.timm_id: t for t in PRESETS["openvla-7b"].vision}
# OpenVLA-OFT's constant for LIBERO; the head's weights do not tell it.
_ACTION_HORIZON: Final = 8
# Entries of an action, where no tensor tells them.
_ACTION_DIM: Final = 7
# Every prompt is padded to this, so that one compiled program serves all instructions.
_MAX_PROMPT_TOKENS: Final = 96


def is_huggingface(folder: Path) -> bool:
    """Whether a directory holds a public checkpoint rather than one of ours."""
    path = folder / CONFIG_FILE
    return path.is_file() and "model_type" in read_json(path)


def read_config(
    folder: Path,
    *,
    unnorm_key: str | None = None,
    num_images: int | None = None,
    center_crop: bool | None = None,
    empty_token_id: int | None = None,
) -> tuple[OpenVLAConfig, dict[str, Any]]:
    """The architecture of a directory and its statistics.

    Settings that our own export kept (under `qvla_jax` in config.json) replace what is inferred.

    Args:
        folder: the directory.
        unnorm_key: statistics entry to use; may be left out where there is one, or one of LIBERO.
        num_images: cameras, which the files do not tell; 2 for OFT, else 1, if left out.
        center_crop: whether raw images are cropped; False for OpenVLA, else True, if left out.
        empty_token_id: the tokenizer's lone word-boundary piece; Llama's 29871 if left out.

    Raises:
        CheckpointError: a file is missing or a key has no or an unsupported value.
    """
    path = folder / CONFIG_FILE
    raw = read_json(path)
    statistics = raw.get("norm_stats", {})
    if (folder / STATISTICS_FILE).is_file():
        statistics = read_json(folder / STATISTICS_FILE)
    head, proprio, film, decoder = (component_file(folder, name) for name in COMPONENTS)
    if head is not None and decoder is not None:
        raise CheckpointError(
            f"{folder}: holds {head.name} of an OpenVLA-OFT policy and {decoder.name} of a UniVLA "
            "policy; take one of them away"
        )
    oft = head is not None
    asked = {"unnorm_key": unnorm_key, "num_images": num_images, "center_crop": center_crop}
    own = raw.get(OWN_KEY, {})
    if not isinstance(own, dict):
        raise CheckpointError(f"{path}: {OWN_KEY}: expected an object, found {own!r}")
    own = own | {key: value for key, value in asked.items() if value is not None}
    try:
        if raw["arch_specifier"] != "no-align+fused-gelu-mlp":
            raise CheckpointError(f"{path}: arch_specifier {raw['arch_specifier']!r} unsupported")
        text = _text_config(raw["text_config"])
        # UniVLA's actions are those of its LIBERO evaluation, as OpenVLA's.
        window, latent = (1, None) if decoder is None else decoder_sizes(decoder, _ACTION_DIM)
        config = OpenVLAConfig(
            name=folder.resolve().name,
            vision=_towers(folder, raw),
            text=text,
            num_images=2 if oft else 1,
            decoding="l1" if oft else "tokens" if latent is None else "latents",
            action_dim=_ACTION_DIM if head is None else _action_dim(head),
            action_horizon=_ACTION_HORIZON if oft else window,
            proprio_dim=0 if proprio is None else component_shape(proprio, "fc1.weight", dims=2)[1],
            use_film=film is not None,
            image_chain="openvla",
            center_crop=oft or latent is not None,
            max_prompt_tokens=_MAX_PROMPT_TOKENS,
            pad_token_id=raw["pad_token_id"],
            empty_token_id=29871 if empty_token_id is None else empty_token_id,
            action_vocab_size=text.vocab_size - raw["pad_to_multiple_of"],
            unnorm_key=_unnorm_key(statistics, own.get("unnorm_key"), folder),
            latent_action=latent,
        )
        sizes = {}
        if head is not None:
            sizes["action"] = (head, "model.fc2.weight", config.action_dim)
        if proprio is not None:
            sizes["proprio"] = (proprio, "fc1.weight", config.proprio_dim)
        if decoder is not None:
            sizes["action"] = (decoder, "proj.0.weight", config.action_dim)
        _check_statistics(statistics, str(config.unnorm_key), sizes)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: missing or unusable key ({error!r})") from error
    try:
        return OpenVLAConfig.from_dict(config.to_dict() | own), statistics
    except InputError as error:
        raise CheckpointError(f"{path}: {OWN_KEY}: {error}") from error


def _text_config(raw: Mapping[str, Any]) -> LlamaConfig:
    # Only what differs from LlamaConfig's defaults is stored: those of Llama-2-7B.
    heads = raw.get("num_attention_heads", 32)
    return LlamaConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw.get("hidden_size", 4096),
        intermediate_size=raw.get("intermediate_size", 11008),
        num_hidden_layers=raw.get("num_hidden_layers", 32),
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=raw.get("rope_theta", 10000.0),
    )


def _towers(folder: Path, raw: Mapping[str, Any]) -> tuple[VisionTowerConfig, VisionTowerConfig]:
    extra_path = folder / "tiny_vision_archs.json"
    extra = read_json(extra_path) if extra_path.is_file() else {}
    constants = read_json(folder / "preprocessor_config.json")["tvf_normalize_params"]
    ids, sizes = raw["timm_model_ids"], raw["image_sizes"]
    towers = []
    for timm_id, size, normalize in zip(ids, sizes, constants, strict=True):
        colours = {"mean": tuple(normalize["mean"]), "std": tuple(normalize["std"])}
        if timm_id in extra:
            tower = _described_tower(timm_id, extra[timm_id], size, colours)
        elif timm_id in KNOWN_TOWERS:
            tower = KNOWN_TOWERS[timm_id]
            if size != tower.image_size or any(colours[k] != getattr(tower, k) for k in colours):
                raise CheckpointError(f"{folder}: {timm_id} with size {size} and {colours}")
        else:
            raise CheckpointError(
                f"{folder}: vision tower {timm_id!r} is not built in; describe its sizes in "
                f"{extra_path.name}"
            )
        towers.append(tower)
    first, second = towers
    return first, second


def _described_tower(
    timm_id: str, sizes: Mapping[str, Any], image_size: int, colours: Mapping[str, Any]
) -> VisionTowerConfig:
    for key in ("patch_size", "embed_dim", "depth", "num_heads"):
        if not isinstance(sizes[key], int):
            raise CheckpointError(
                f"{timm_id}: {key} must be a whole number, got {sizes[key]!r:.80}"
            )
    ratio = float(sizes.get("mlp_ratio", 4.0))
    class_token = sizes.get("class_token", True)
    return VisionTowerConfig(
        timm_id=timm_id,
        image_size=image_size,
        patch_size=sizes["patch_size"],
        embed_dim=sizes["embed_dim"],
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        mlp_dim=int(sizes["embed_dim"] * ratio),
        class_token=class_token,
        num_registers=sizes.get("reg_tokens", 0),
        layer_scale=sizes.get("init_values") is not None,
        feature_block=sizes["depth"] - 2,
        final_norm=True,
        attention_pool=sizes.get("global_pool") == "map",
        **colours,
    )


def _unnorm_key(statistics: Mapping[str, Any], asked: str | None, folder: Path) -> str:
    if asked is not None:
        return asked
    libero = [key for key in statistics if key.startswith("libero")]
    for candidates in (list(statistics), libero):
        if len(candidates) == 1:
            return candidates[0]
    raise CheckpointError(
        f"{folder}: statistics of several data sets; name one with unnorm_key: "
        f"{', '.join(statistics) or 'there are none'}"
    )


def _action_dim(head: Path) -> int:
    """Entries of an action, in which the last layer's two tensors must agree."""
    (bias,) = component_shape(head, "model.fc2.bias", dims=1)
    rows, columns = component_shape(head, "model.fc2.weight", dims=2)
    if rows != bias:
        raise CheckpointError(
            f"{head}: tensor 'model.fc2.weight' has shape {(rows, columns)}, expected "
            f"{(bias, columns)}, or 'model.fc2.bias' of shape {(bias,)} is wrong"
        )
    return bias


def _check_statistics(
    statistics: Mapping[str, Any], key: str, tensors: Mapping[str, tuple[Path, str, int]]
) -> None:
    """Raises if a component's sizes are not those of the statistics that the policy uses."""
    entry = statistics.get(key, {})
    for block, (path, name, size) in tensors.items():
        expected = len(entry.get(block, {}).get("q01", ())) or size
        if size != expected:
            raise CheckpointError(
                f"{path}: tensor {name!r} is for {size} entries of {block}, expected {expected} as "
                f"the statistics of {key!r} have"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON file that holds an object.

    Raises:
        CheckpointError: it is missing, not JSON, or another value.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
