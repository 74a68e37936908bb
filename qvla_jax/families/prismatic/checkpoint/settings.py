"""The settings files of a public directory, written from our configuration."""

import dataclasses
from typing import Any

from qvla_jax.families.prismatic.checkpoint.huggingface import CONFIG_FILE, KNOWN_TOWERS
from qvla_jax.families.prismatic.config import OpenVLAConfig, VisionTowerConfig


def public_settings(config: OpenVLAConfig) -> dict[str, Any]:
    """File name -> content: config.json, preprocessor_config.json.

    Sizes of towers that are not built in go to `tiny_vision_archs.json`.
    """
    sizes = [[3, tower.image_size, tower.image_size] for tower in config.vision]
    squares = [{"output_size": size[1:]} for size in sizes]
    files = {
        CONFIG_FILE: {
            "architectures": ["OpenVLAForActionPrediction"],
            "auto_map": {
                "AutoConfig": "configuration_prismatic.OpenVLAConfig",
                "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
            },
            "model_type": "openvla",
            "vision_backbone_id": "dinosiglip-vit-so-224px",
            "timm_model_ids": [tower.timm_id for tower in config.vision],
            "timm_override_act_layers": [None, None],
            "image_sizes": [tower.image_size for tower in config.vision],
            "image_resize_strategy": "resize-naive",
            "use_fused_vision_backbone": True,
            "arch_specifier": "no-align+fused-gelu-mlp",
            "llm_backbone_id": "llama2-7b-pure",
            "hf_llm_id": "meta-llama/Llama-2-7b-hf",
            "llm_max_length": 2048,
            "pad_token_id": config.pad_token_id,
            "pad_to_multiple_of": config.text.vocab_size - config.action_vocab_size,
            "n_action_bins": 256,
            "output_projector_states": False,
            "text_config": {"model_type": "llama", **dataclasses.asdict(config.text)},
        },
        "preprocessor_config.json": {
            "image_processor_type": "PrismaticImageProcessor",
            "processor_class": "PrismaticProcessor",
            "use_fused_vision_backbone": True,
            "image_resize_strategy": "resize-naive",
            "input_sizes": sizes,
            "interpolations": ["bicubic", "bicubic"],
            "means": [list(tower.mean) for tower in config.vision],
            "stds": [list(tower.std) for tower in config.vision],
            "tvf_do_letterbox": False,
            "tvf_letterbox_fill": None,
            "tvf_crop_params": squares,
            # 3 is torchvision's bicubic.
            "tvf_resize_params": [
                {"antialias": True, "interpolation": 3, "max_size": None, "size": size[1:]}
                for size in sizes
            ],
            "tvf_normalize_params": [
                {"inplace": False, "mean": list(tower.mean), "std": list(tower.std)}
                for tower in config.vision
            ],
        },
    }
    unknown = {t.timm_id: _sizes(t) for t in config.vision if KNOWN_TOWERS.get(t.timm_id) != t}
    return files | ({"tiny_vision_archs.json": unknown} if unknown else {})


def _sizes(tower: VisionTowerConfig) -> dict[str, Any]:
    return {
        "patch_size": tower.patch_size,
        "embed_dim": tower.embed_dim,
        "depth": tower.depth,
        "num_heads": tower.num_heads,
        # The width is the integer part of the product; half a unit more guards against rounding
        # down.
        "mlp_ratio": (tower.mlp_dim + 0.5) / tower.embed_dim,
        "class_token": tower.class_token,
        "reg_tokens": tower.num_registers,
        "init_values": 1e-5 if tower.layer_scale else None,
        "global_pool": "map" if tower.attention_pool else "",
    }
