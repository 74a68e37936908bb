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
| `lora_adapter/`                      | a PEFT adapter, merged only if the user says so    |
| `tiny_vision_archs.json`             | sizes of towers that are not built in              |
| `tokenizer.json`                     | the tokenizer                                      |
| `tokenizer_config.json`              | must say what `tokenizer.json` does                |
| `generation_config.json`             | must ask for greedy decoding                       |

`qvla_jax.families.prismatic.checkpoint.keys` lists what each settings file may declare.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tokenizers

from qvla_jax.checkpoints.declared import check_declared, shown
from qvla_jax.checkpoints.files import CONFIG_FILE, STATISTICS_FILE, folder_name, read_json
from qvla_jax.errors import CheckpointError, InputError, unknown
from qvla_jax.families.options import LoadOptions
from qvla_jax.families.prismatic.checkpoint import keys
from qvla_jax.families.prismatic.checkpoint.components import (
    COMPONENTS,
    check_tensor_files,
    component_file,
)
from qvla_jax.families.prismatic.checkpoint.directory import component_names, component_shape
from qvla_jax.families.prismatic.checkpoint.platforms import PLATFORMS, platform_of
from qvla_jax.families.prismatic.checkpoint.statistics import check_entry
from qvla_jax.families.prismatic.checkpoint.univla import decoder_sizes
from qvla_jax.families.prismatic.checkpoint.weight_files import (
    check_not_adapter_only,
)
from qvla_jax.families.prismatic.config import (
    PRESETS,
    LlamaConfig,
    OpenVLAConfig,
    VisionTowerConfig,
)
from qvla_jax.plain import finite

# Key of config.json under which our export keeps what the public layout cannot express.
OWN_KEY: Final = "qvla_jax"
KNOWN_TOWERS: Final = {t.timm_id: t for t in PRESETS["openvla-7b"].vision}
TOWERS_FILE: Final = "tiny_vision_archs.json"
_BOS: Final = 1
_EOS: Final = 2
# Entries of an action, if no tensor determines them.
_ACTION_DIM: Final = 7
# Prompts are padded to this length, so that one compiled program serves nearly all instructions.
_MAX_PROMPT_TOKENS: Final = 96
_CAUSAL: Final = ("eager", "flash_attention_2", "flash_attention_3", "flex_attention")
_CLASSES: Final = {
    "OpenVLAConfig",
    "OpenVLAForActionPrediction",
    "PrismaticImageProcessor",
    "PrismaticProcessor",
}
# In OpenVLA-OFT's modeling_prismatic.py, and not in OpenVLA's.
_OFT_CODE: Final = re.compile(r"NUM_ACTIONS_CHUNK|_regression_or_discrete_prediction")


def is_huggingface(folder: Path) -> bool:
    """Whether a directory holds a public checkpoint rather than one of ours.

    Raises:
        CheckpointError: config.json is not JSON, or there is only an adapter.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        check_not_adapter_only(folder)
        return False
    return "model_type" in read_json(path)


def read_config(
    folder: Path,
    options: LoadOptions = LoadOptions(),  # noqa: B008 (frozen)
    *,
    empty_token_id: int | None = None,
    sizes_only: bool = False,
) -> tuple[OpenVLAConfig, dict[str, Any]]:
    """The architecture of a directory and its statistics.

    Settings that our own export kept (under `qvla_jax` in config.json) replace what is inferred.

    Args:
        folder: the directory.
        options: what the files do not say.
        empty_token_id: the tokenizer's lone word-boundary piece; by default Llama's 29871.
        sizes_only: the caller only needs the shapes of the parameters, which need no options: what
            the files do not say is made up.

    Raises:
        CheckpointError: a file is missing or would be silently ignored; a key has a missing,
            unknown or unsupported value; or an option is needed, or contradicts the files.
    """
    path = folder / CONFIG_FILE
    raw = read_json(path)
    check_declared(raw, keys.CONFIG, str(path))
    _check_classes(raw.get("auto_map") or {}, path)
    source, statistics = path, raw.get("norm_stats") or {}
    if (folder / STATISTICS_FILE).is_file():
        source = folder / STATISTICS_FILE
        statistics = read_json(source)
    if not isinstance(statistics, dict):
        raise CheckpointError(f"{path}: norm_stats is {shown(statistics)}, expected an object")
    statistics = finite(statistics)
    own = _own(raw, path, options)
    try:
        config = _inferred(folder, raw, empty_token_id)
        kept = raw.get(OWN_KEY, {}).get("num_images", 1)
        if config.decoding != "l1" and options.num_images not in (None, kept):
            raise CheckpointError(
                f"{folder}: num_images={options.num_images}: policies without a regression head "
                f"take {kept}"
            )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: missing or unusable key ({error!r})") from error
    _check_attention(raw, config, path)
    check_tensor_files(folder)
    if sizes_only:
        told: dict[str, Any] = {"unnorm_key": "", **_conventions(config, None)}
    else:
        key = own.get("unnorm_key") or _only_key(statistics, folder)
        told = _told(folder, config, key, own, statistics, source)
    try:
        config = OpenVLAConfig.from_dict(config.to_dict() | told | own)
    except InputError as error:
        raise CheckpointError(f"{path}: {OWN_KEY}: {error}") from error
    if config.decoding != "l1":
        generation = folder / "generation_config.json"
        if generation.is_file():
            check_declared(read_json(generation), keys.GENERATION_CONFIG, str(generation))
    if config.prompt_limit < 1:
        raise CheckpointError(
            f"{path}: text_config: max_position_embeddings is "
            f"{config.text.max_position_embeddings}, which leaves no place for a prompt"
        )
    return config, statistics


def _check_classes(auto_map: Any, path: Path) -> None:
    """Checks that transformers would load OpenVLA's code."""
    named = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    for name in named:
        if not isinstance(name, str) or name.rpartition(".")[2] not in _CLASSES:
            raise CheckpointError(
                f"{path}: 'auto_map' is {shown(auto_map)}, which is not supported; expected the "
                f"classes {' and '.join(sorted(_CLASSES))}"
            )


def _check_attention(raw: Mapping[str, Any], config: OpenVLAConfig, path: Path) -> None:
    """Checks that attention is as wide as ours: all implementations decode tokens alike.

    OpenVLA-OFT's own transformers attends both ways with "sdpa" only; others stay causal.
    """
    known = (None, "sdpa") if config.decoding == "l1" else (None, "sdpa", *_CAUSAL)
    for where, found in ((path, raw), (f"{path}: text_config", raw["text_config"])):
        for key in ("attn_implementation", "_attn_implementation"):
            if found.get(key) not in known:
                raise CheckpointError(
                    f"{where}: {key!r} is {shown(found[key])}, which is not supported; expected "
                    f"{' or '.join(map(repr, known))}"
                    f"{' (others are causal in OpenVLA-OFT)' if config.decoding == 'l1' else ''}"
                )


def _own(raw: Mapping[str, Any], path: Path, options: LoadOptions) -> dict[str, Any]:
    """The configuration kept by our own export, with the user's options."""
    kept = raw.get(OWN_KEY, {})
    if not isinstance(kept, dict):
        raise CheckpointError(f"{path}: {OWN_KEY}: expected an object, found {kept!r}")
    for name in ("num_images", "action_horizon", "action_normalization"):
        said = getattr(options, name)
        if said is not None and kept.get(name, said) != said:
            raise CheckpointError(
                f"{path}: {name}={said!r} contradicts the {kept[name]!r} under {OWN_KEY!r}"
            )
    names = ("unnorm_key", "num_images", "center_crop", "action_horizon", "action_normalization")
    said = {name: getattr(options, name) for name in names}
    return kept | {name: value for name, value in said.items() if value is not None}


def _inferred(folder: Path, raw: Mapping[str, Any], empty_token_id: int | None) -> OpenVLAConfig:
    """The architecture, as far as the files determine it."""
    head, proprio, film, decoder = (component_file(folder, name) for name in COMPONENTS)
    if head is not None and decoder is not None:
        raise CheckpointError(
            f"{folder}: holds {head.name} of an OpenVLA-OFT policy and {decoder.name} of a UniVLA "
            "policy; take one of them away"
        )
    for part in (proprio, film):
        if decoder is not None and part is not None:
            raise CheckpointError(
                f"{folder}: holds {decoder.name} of a UniVLA policy and {part.name}, which its "
                "decoder for chunks does not take; take one of them away"
            )
        if head is None and decoder is None and part is not None:
            kind = "proprio projector" if part is proprio else "vision backbone with FiLM"
            likely = sorted(path.name for path in folder.glob("*action_head*"))
            raise CheckpointError(
                f"{folder}: there is a {kind} of an OpenVLA-OFT policy ({part.name}), but no "
                f"action_head--*_checkpoint.pt{f'; is it {likely[0]}?' if likely else ''} Policies "
                "that decode tokens in parallel, without a head, are not supported"
            )
    names = [] if head is None else component_names(head)
    if any(name.startswith("noise_predictor.") for name in names):
        raise CheckpointError(f"{head}: is a diffusion head, which is not supported; L1 heads are")
    oft = head is not None
    text = _text_config(raw["text_config"], folder / CONFIG_FILE)
    # UniVLA's actions are those of its LIBERO evaluation, like OpenVLA's.
    window, latent = (1, None) if decoder is None else decoder_sizes(decoder, _ACTION_DIM)
    for key in ("pad_token_id", "pad_to_multiple_of"):
        if type(raw[key]) is not int:
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: {key!r} is {shown(raw[key])}, expected a whole number"
            )
    return OpenVLAConfig(
        name=folder_name(folder),
        vision=_towers(folder, raw),
        text=text,
        decoding="l1" if oft else "tokens" if latent is None else "latents",
        action_dim=_ACTION_DIM if head is None else _action_dim(head),
        action_horizon=window,
        proprio_dim=0 if proprio is None else component_shape(proprio, "fc1.weight", dims=2)[1],
        use_film=film is not None,
        image_chain="openvla",
        center_crop=oft or latent is not None,
        max_prompt_tokens=_MAX_PROMPT_TOKENS,
        pad_token_id=raw["pad_token_id"],
        empty_token_id=29871 if empty_token_id is None else empty_token_id,
        action_vocab_size=text.vocab_size - raw["pad_to_multiple_of"],
        latent_action=latent,
    )


def check_tokenizer(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Checks a tokenizer, and that the files next to `tokenizer.json` agree with it.

    Args:
        folder: the directory.
        tokenizer: the content of `tokenizer.json`.

    Raises:
        CheckpointError: a setting is not supported, a token has another id, or prompts do not begin
            with BOS, after which the image goes, or they end with EOS.
    """
    token_id = tokenizer.token_to_id
    ids = tokenizer.encode("a").ids
    if ids[:1] != [_BOS] or ids[1:][-1:] == [_EOS]:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: makes {ids} of 'a', expected BOS ({_BOS}) in front and "
            f"no EOS ({_EOS}) behind"
        )
    path = folder / "tokenizer_config.json"
    added: dict[str, Any] = {}
    if path.is_file():
        settings = read_json(path)
        check_declared(settings, keys.TOKENIZER, str(path))
        for number, token in (settings.get("added_tokens_decoder") or {}).items():
            content = token.get("content") if isinstance(token, dict) else token
            if not isinstance(content, str) or str(token_id(content)) != number:
                raise CheckpointError(
                    f"{path}: 'added_tokens_decoder' has {shown(content)} at {number}, but "
                    "tokenizer.json does not"
                )
    path = folder / "added_tokens.json"
    if path.is_file():
        added = read_json(path)
    for content, number in added.items():
        if token_id(content) != number:
            raise CheckpointError(
                f"{path}: {content!r} is {shown(number)}, but {token_id(content)} in tokenizer.json"
            )


def _only_key(statistics: Mapping[str, Any], folder: Path) -> str:
    if len(statistics) == 1:
        return next(iter(statistics))
    if not statistics:
        raise CheckpointError(
            f"{folder}: there are no statistics of actions, neither in {STATISTICS_FILE} nor under "
            f"'norm_stats' in {CONFIG_FILE}; put the {STATISTICS_FILE} of the training beside it"
        )
    raise CheckpointError(
        f"{folder}: statistics of several data sets; name one with unnorm_key: "
        f"{', '.join(statistics)}"
    )


def _conventions(config: OpenVLAConfig, key: str | None) -> dict[str, Any]:
    """Chunk length, normalization and images, as far as the policy or its robot fixes them."""
    if config.decoding != "l1":
        return {
            "action_horizon": config.action_horizon,
            "action_normalization": "quantiles",
            "num_images": 1,
        }
    sizes = {"action_dim": config.action_dim, "proprio_dim": config.proprio_dim}
    platform = PLATFORMS[0] if key is None else platform_of(key, **sizes)
    names = ("action_horizon", "action_normalization", "num_images")
    return {} if platform is None else {name: getattr(platform, name) for name in names}


def _told(
    folder: Path,
    config: OpenVLAConfig,
    key: str,
    own: Mapping[str, Any],
    statistics: Mapping[str, Any],
    source: Path,
) -> dict[str, Any]:
    """The statistics and what follows from them; raises an error if the user must choose."""
    if key not in statistics:
        raise CheckpointError(f"{source}: {unknown('statistics', key, statistics)}")
    check_entry(statistics, key, str(source))
    _check_sizes(folder, config, statistics[key], key)
    told = _conventions(config, key)
    asked = [
        name for name in ("action_horizon", "action_normalization", "num_images")
        if name not in told and name not in own
    ]  # fmt: skip
    if asked:
        proprio = f" and {config.proprio_dim} of the state" if config.proprio_dim else ""
        raise CheckpointError(
            f"{folder}: the files do not tell which robot this OpenVLA-OFT policy is for "
            f"(statistics {key!r}, {config.action_dim} entries of an action{proprio}); give "
            f"{', '.join(asked)}. The public constants are {'; '.join(map(str, PLATFORMS))}"
        )
    if config.decoding != "l1":
        _check_tokens(folder, config, own.get("action_horizon"))
    return {"unnorm_key": key, **told}


def _check_tokens(folder: Path, config: OpenVLAConfig, horizon: int | None) -> None:
    """Checks the given chunk length of a policy without a regression head."""
    kind = "OpenVLA" if config.decoding == "tokens" else "UniVLA"
    if horizon not in (None, config.action_horizon):
        raise CheckpointError(
            f"{folder}: action_horizon={horizon!r}: this {kind} policy has chunks of "
            f"{config.action_horizon}; decoding tokens in parallel (OpenVLA-OFT without a head) is "
            "not supported"
        )
    code = folder / "modeling_prismatic.py"
    if config.decoding != "tokens" or horizon is not None or not code.is_file():
        return
    if _OFT_CODE.search(code.read_text(encoding="utf-8", errors="replace")):
        raise CheckpointError(
            f"{folder}: {code.name} is that of OpenVLA-OFT, but there is no "
            "action_head--*_checkpoint.pt; policies that decode tokens in parallel, without a "
            "head, are not supported. If the weights are OpenVLA's, say so with action_horizon=1"
        )


def _text_config(raw: Mapping[str, Any], path: Path) -> LlamaConfig:
    where = f"{path}: text_config"
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where} is {shown(raw)}, expected an object")
    check_declared(raw, keys.TEXT_CONFIG, where)
    # Only what differs from LlamaConfig's defaults is stored: those of Llama-2-7B.
    heads = _whole(raw, "num_attention_heads", where, 32)
    hidden = _whole(raw, "hidden_size", where, 4096)
    if raw.get("head_dim") not in (None, hidden / heads):
        raise CheckpointError(
            f"{where}: 'head_dim' is {shown(raw['head_dim'])}, which is not supported; expected "
            f"{hidden / heads:g}, hidden_size / num_attention_heads"
        )
    theta = raw.get("rope_theta", 10000.0)
    rope = raw.get("rope_parameters") or {}
    if rope:  # as newer versions of transformers write it
        extra = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type", "type")}
        kinds = {rope.get(name, "default") for name in ("rope_type", "type")}
        if (
            extra
            or kinds != {"default"}
            or raw.get("rope_theta") not in (None, rope.get("rope_theta"))
        ):
            raise CheckpointError(
                f"{where}: 'rope_parameters' is {shown(rope)}, which is not supported; expected "
                "a rope_theta and rope_type 'default'"
            )
        theta = rope.get("rope_theta", theta)
    numbers = {"rms_norm_eps": raw.get("rms_norm_eps", 1e-6), "rope_theta": theta}
    for key, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise CheckpointError(f"{where}: {key!r} is {shown(value)}, expected a positive number")
    return LlamaConfig(
        vocab_size=_whole(raw, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=_whole(raw, "intermediate_size", where, 11008),
        num_hidden_layers=_whole(raw, "num_hidden_layers", where, 32),
        num_attention_heads=heads,
        num_key_value_heads=_whole(raw, "num_key_value_heads", where, heads),
        rms_norm_eps=float(numbers["rms_norm_eps"]),
        rope_theta=float(theta),
        max_position_embeddings=_whole(raw, "max_position_embeddings", where, 2048),
    )


def _whole(raw: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A positive whole number; null and a missing key mean the default."""
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"{where}: missing or unusable key ({key!r})")
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{where}: {key!r} must be a whole number, got {shown(value)}")
    return value


def _towers(folder: Path, raw: Mapping[str, Any]) -> tuple[VisionTowerConfig, VisionTowerConfig]:
    extra_path = folder / TOWERS_FILE
    extra = read_json(extra_path) if extra_path.is_file() else {}
    ids, sizes = raw["timm_model_ids"], raw["image_sizes"]
    constants = _colours(folder / "preprocessor_config.json", sizes)
    towers = []
    for timm_id, size, colours in zip(ids, sizes, constants, strict=True):
        if timm_id in extra:
            where = f"{extra_path}: {timm_id}"
            tower = _described_tower(where, timm_id, extra[timm_id], size, colours)
        elif timm_id in KNOWN_TOWERS:
            tower = dataclasses.replace(KNOWN_TOWERS[timm_id], **colours)
            if size != tower.image_size:
                raise CheckpointError(
                    f"{folder / CONFIG_FILE}: 'image_sizes' has {shown(size)} for {timm_id!r}, "
                    f"which is not supported; expected {tower.image_size}"
                )
        else:
            raise CheckpointError(
                f"{folder}: vision tower {timm_id!r} is not built in; describe its sizes in "
                f"{extra_path.name}"
            )
        towers.append(tower)
    first, second = towers
    if first.num_patches != second.num_patches or first.image_size != second.image_size:
        raise CheckpointError(
            f"{folder}: the towers have {first.num_patches} and {second.num_patches} patches of "
            f"images of {first.image_size} and {second.image_size} pixels; they must agree"
        )
    return first, second


def _colours(path: Path, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The normalization constants of each tower's input."""
    raw = read_json(path)
    check_declared(raw, keys.PREPROCESSOR, str(path))
    lists = {
        "tvf_normalize_params": (keys.NORMALIZE, None),
        "tvf_resize_params": (keys.RESIZE, "size"),
        "tvf_crop_params": (keys.CROP, "output_size"),
    }
    for name, (rules, side) in lists.items():
        for place, entry in enumerate(raw.get(name) or ()):
            check_declared(entry, rules, f"{path}: {name}[{place}]")
            if side is not None and entry.get(side) != [sizes[place]] * 2:
                raise CheckpointError(
                    f"{path}: {name}[{place}]: {side!r} is {shown(entry.get(side))}, which is not "
                    f"supported; expected {[sizes[place]] * 2}, as image_sizes of {CONFIG_FILE}"
                )
    inputs = raw.get("input_sizes")
    if inputs is not None and inputs != [[3, size, size] for size in sizes]:
        raise CheckpointError(
            f"{path}: 'input_sizes' is {shown(inputs)}, but image_sizes of {CONFIG_FILE} are "
            f"{sizes}"
        )
    constants = []
    if len(raw["tvf_normalize_params"]) != len(sizes):
        raise CheckpointError(
            f"{path}: 'tvf_normalize_params' has {len(raw['tvf_normalize_params'])} entries, but "
            f"{CONFIG_FILE} has {len(sizes)} towers"
        )
    for place, entry in enumerate(raw["tvf_normalize_params"]):
        for key in ("mean", "std"):
            least = 0.0 if key == "std" else -math.inf
            if len(entry[key]) != 3 or not all(
                type(v) in (int, float) and least < v < math.inf for v in entry[key]
            ):
                raise CheckpointError(
                    f"{path}: tvf_normalize_params[{place}]: {key!r} is {shown(entry[key])}, "
                    f"expected 3 {'positive ' if key == 'std' else ''}numbers"
                )
        constants.append({"mean": tuple(entry["mean"]), "std": tuple(entry["std"])})
    return constants


def _described_tower(
    where: str,
    timm_id: str,
    sizes: Mapping[str, Any],
    image_size: int,
    colours: Mapping[str, Any],
) -> VisionTowerConfig:
    check_declared(sizes, keys.TOWER, where)
    patch, width, depth, heads = (
        _whole(sizes, key, where) for key in ("patch_size", "embed_dim", "depth", "num_heads")
    )
    class_token, registers = sizes.get("class_token", True), sizes.get("reg_tokens", 0)
    if not isinstance(class_token, bool) or type(registers) is not int or registers < 0:
        raise CheckpointError(
            f"{where}: 'class_token' is {shown(class_token)} and 'reg_tokens' {shown(registers)}, "
            "expected a boolean and a number"
        )
    prefix = class_token or registers > 0
    expected = {"img_size": (image_size,), "no_embed_class": (True,) if prefix else (True, False)}
    for key, allowed in expected.items():
        if key in sizes and sizes[key] not in allowed:
            raise CheckpointError(
                f"{where}: {key!r} is {shown(sizes[key])}, which is not supported; expected "
                f"{allowed[0]!r}"
            )
    ratio = sizes.get("mlp_ratio", 4.0)
    if type(ratio) not in (int, float) or not 0 < ratio < math.inf:
        raise CheckpointError(f"{where}: 'mlp_ratio' is {shown(ratio)}, expected a number")
    return VisionTowerConfig(
        timm_id=timm_id,
        image_size=image_size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_dim=int(width * ratio),
        class_token=class_token,
        num_registers=registers,
        layer_scale=sizes.get("init_values") is not None,
        feature_block=depth - 2,
        final_norm=True,
        attention_pool=sizes.get("global_pool") == "map",
        **colours,
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


def _check_sizes(folder: Path, config: OpenVLAConfig, entry: Mapping[str, Any], key: str) -> None:
    """Raises an error if a component's sizes differ from those of the policy's statistics."""
    for block, part, name, size in (
        ("action", "action_head", "model.fc2.weight", config.action_dim),
        ("proprio", "proprio_projector", "fc1.weight", config.proprio_dim),
        ("action", "action_decoder", "proj.0.weight", config.action_dim),
    ):
        path = component_file(folder, part)
        values = entry.get(block, {})
        found = next((values[low] for low in ("q01", "min") if values.get(low)), None)
        if path is not None and isinstance(found, list) and len(found) != size:
            raise CheckpointError(
                f"{path}: tensor {name!r} is for {size} entries of {block}, expected {len(found)} "
                f"as the statistics of {key!r} have"
            )
