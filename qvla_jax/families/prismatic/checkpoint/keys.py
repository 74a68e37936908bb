"""What the settings files of a public directory may declare (docs/checkpoints.md has the lists).

Facts are those of OpenVLA's and OpenVLA-OFT's `configuration_prismatic.py`,
`modeling_prismatic.py` and `processing_prismatic.py`, of transformers' `PretrainedConfig`,
`LlamaConfig`, `GenerationConfig` and `LlamaTokenizerFast`, and of PEFT's `LoraConfig`.
"""

from collections.abc import Mapping
from typing import Final

from qvla_jax.checkpoints.declared import Follow, Ignore, Only, Rule

_READ = Follow()
_ABOUT = Ignore("says where the files come from")
_DTYPE = Ignore("arithmetic is in float32, whatever the weights are stored in")
_RUNTIME = Ignore("how the public code runs, not what it computes")
_TRAINING = Ignore("read in training only")
_CLASSES = Ignore("names a class for transformers to load")
_GREEDY = Ignore("decoding is greedy, as the public evaluation asks for")
_RECOMPUTED = Ignore("the public code takes `tvf_*`")

# Defaults of transformers that a configuration may spell out, and that decoding relies on.
_GENERATION: Final[Mapping[str, Rule]] = {
    "bos_token_id": Only((1, None)),
    "eos_token_id": Only((2, None)),
    "do_sample": _GREEDY,
    "temperature": _GREEDY,
    "top_k": _GREEDY,
    "top_p": _GREEDY,
    "min_p": _GREEDY,
    "typical_p": _GREEDY,
    "epsilon_cutoff": _GREEDY,
    "eta_cutoff": _GREEDY,
    "max_length": Ignore("as many tokens are decoded as an action has"),
    "max_new_tokens": Ignore("as many tokens are decoded as an action has"),
    "min_length": Only((0, None)),
    "min_new_tokens": Only((0, None)),
    "early_stopping": Only((False, None)),
    "num_beams": Only((1, None)),
    "num_beam_groups": Only((1, None)),
    "diversity_penalty": Only((0.0, None)),
    "repetition_penalty": Only((1.0, None)),
    "length_penalty": Ignore("read in beam search only"),
    "no_repeat_ngram_size": Only((0, None)),
    "encoder_no_repeat_ngram_size": Only((0, None)),
    "bad_words_ids": Only((None, [])),
    "num_return_sequences": Only((1, None)),
    "forced_bos_token_id": Only((None,)),
    "forced_eos_token_id": Only((None,)),
    "remove_invalid_values": Only((False, None)),
    "exponential_decay_length_penalty": Only((None,)),
    "suppress_tokens": Only((None, [])),
    "begin_suppress_tokens": Only((None, [])),
    "use_cache": _RUNTIME,
    "output_scores": _RUNTIME,
    "return_dict_in_generate": _RUNTIME,
}

# Keys that both `PretrainedConfig`s, the model's and its language model's, may hold.
_PRETRAINED: Final[Mapping[str, Rule]] = {
    **_GENERATION,
    "_name_or_path": _ABOUT,
    "_commit_hash": _ABOUT,
    "name_or_path": _ABOUT,
    "transformers_version": _ABOUT,
    "architectures": Only(
        (["OpenVLAForActionPrediction"], ["LlamaForCausalLM"], None), "another model computes else"
    ),
    "torch_dtype": _DTYPE,
    "dtype": _DTYPE,
    "use_bfloat16": _DTYPE,
    "return_dict": _RUNTIME,
    "use_return_dict": _RUNTIME,
    "output_hidden_states": _RUNTIME,
    "output_attentions": _RUNTIME,
    "torchscript": _RUNTIME,
    "tf_legacy_loss": _RUNTIME,
    "gradient_checkpointing": _RUNTIME,
    "_attn_implementation_autoset": _RUNTIME,
    "attn_implementation": _READ,
    "_attn_implementation": _READ,
    "quantization_config": Only((None,), "weights are read as they are"),
    "pruned_heads": Only(({}, None)),
    "tie_word_embeddings": Only((False, None), "the output layer has weights of its own"),
    "tie_encoder_decoder": Only((False, None)),
    "chunk_size_feed_forward": Only((0, None)),
    "is_encoder_decoder": Only((False, None)),
    "is_decoder": Only((False, None)),
    "add_cross_attention": Only((False, None)),
    "cross_attention_hidden_size": Only((None,)),
    "finetuning_task": _ABOUT,
    "problem_type": _TRAINING,
    "task_specific_params": Only((None,)),
    "id2label": Ignore("there are no labels"),
    "label2id": Ignore("there are no labels"),
    "tokenizer_class": _CLASSES,
    "prefix": Only((None, "")),
    "sep_token_id": Ignore("not in any prompt"),
    "decoder_start_token_id": Only((None,)),
}

CONFIG: Final[Mapping[str, Rule]] = {
    **_PRETRAINED,
    "model_type": Only(("openvla",)),
    "auto_map": _READ,
    "arch_specifier": Only(("no-align+fused-gelu-mlp",)),
    "vision_backbone_id": Only(("dinosiglip-vit-so-224px",)),
    "use_fused_vision_backbone": Only((True, None)),
    "timm_model_ids": _READ,
    "timm_override_act_layers": Only(([None, None], None)),
    "image_sizes": _READ,
    "image_resize_strategy": Only(("resize-naive",)),
    "llm_backbone_id": Only(("llama2-7b-pure",)),
    "hf_llm_id": Only(("meta-llama/Llama-2-7b-hf",)),
    "llm_max_length": _TRAINING,
    "text_config": _READ,
    "pad_token_id": _READ,
    "pad_to_multiple_of": _READ,
    "norm_stats": _READ,
    "n_action_bins": Only((256,)),
    "output_projector_states": Only((False, None)),
    "qvla_jax": _READ,
}

TEXT_CONFIG: Final[Mapping[str, Rule]] = {
    **_PRETRAINED,
    "model_type": Only(("llama",)),
    "vocab_size": _READ,
    "hidden_size": _READ,
    "intermediate_size": _READ,
    "num_hidden_layers": _READ,
    "num_attention_heads": _READ,
    "num_key_value_heads": _READ,
    "head_dim": _READ,
    "rms_norm_eps": _READ,
    "rope_theta": _READ,
    "rope_parameters": _READ,
    "max_position_embeddings": _READ,
    "rope_scaling": Only((None,)),
    "partial_rotary_factor": Only((None, 1.0)),
    "hidden_act": Only(("silu",)),
    "attention_bias": Only((False, None)),
    "mlp_bias": Only((False, None)),
    "sliding_window": Only((None,)),
    "attention_dropout": _TRAINING,
    "initializer_range": _TRAINING,
    "pretraining_tp": Ignore("the same sums in parts"),
    "pad_token_id": Ignore("nothing attends to padding"),
}

GENERATION_CONFIG: Final[Mapping[str, Rule]] = {
    **_GENERATION,
    "_from_model_config": _ABOUT,
    "transformers_version": _ABOUT,
    "pad_token_id": Ignore("nothing attends to padding"),
    "output_attentions": _RUNTIME,
    "output_hidden_states": _RUNTIME,
    "cache_implementation": _RUNTIME,
}

PREPROCESSOR: Final[Mapping[str, Rule]] = {
    "tvf_normalize_params": _READ,
    "tvf_resize_params": _READ,
    "tvf_crop_params": _READ,
    "input_sizes": _READ,
    "tvf_do_letterbox": Only((False, None)),
    "tvf_letterbox_fill": Ignore("read with letterboxing only"),
    "image_resize_strategy": Only(("resize-naive",)),
    "use_fused_vision_backbone": Only((True,)),
    "interpolations": Only((["bicubic", "bicubic"], None)),
    "means": _RECOMPUTED,
    "stds": _RECOMPUTED,
    "image_processor_type": Only(("PrismaticImageProcessor", "AutoImageProcessor", None)),
    "processor_class": _CLASSES,
    "auto_map": _CLASSES,
    "transformers_version": _ABOUT,
    "_name_or_path": _ABOUT,
}
# Keys of each entry of `tvf_normalize_params`, `tvf_resize_params` and `tvf_crop_params`.
NORMALIZE: Final[Mapping[str, Rule]] = {"mean": _READ, "std": _READ, "inplace": _RUNTIME}
RESIZE: Final[Mapping[str, Rule]] = {
    "size": _READ,
    "interpolation": Only((3, "bicubic")),
    "max_size": Only((None,)),
    "antialias": Ignore("pictures are always smoothed"),
}
CROP: Final[Mapping[str, Rule]] = {"output_size": _READ}

# Keys of each tower in tiny_vision_archs.json.
TOWER: Final[Mapping[str, Rule]] = {
    "patch_size": _READ,
    "embed_dim": _READ,
    "depth": _READ,
    "num_heads": _READ,
    "mlp_ratio": _READ,
    "class_token": _READ,
    "reg_tokens": _READ,
    "init_values": _READ,
    "img_size": _READ,
    "no_embed_class": _READ,
    "global_pool": Only(("", "token", "map", None)),
    "num_classes": Ignore("a tower has no head"),
    "act_layer": Only(("gelu", "gelu (exact, erf)", None)),
    "norm_eps": Only((1e-6,)),
    "qkv_bias": Only((True,)),
}

# `tokenizer_config.json` next to `tokenizer.json`, which defines how text becomes tokens.
TOKENIZER: Final[Mapping[str, Rule]] = {
    "added_tokens_decoder": _READ,
    "add_bos_token": Only((True, None)),
    "add_eos_token": Only((False, None)),
    "add_prefix_space": Only((True, None)),
    "tokenizer_class": Only(
        (
            "LlamaTokenizer",
            "LlamaTokenizerFast",
            "PreTrainedTokenizerFast",
            "TokenizersBackend",
            None,
        )
    ),
    "bos_token": Ignore("in tokenizer.json"),
    "eos_token": Ignore("not in any prompt"),
    "unk_token": Ignore("in tokenizer.json"),
    "pad_token": Ignore("nothing attends to padding"),
    "additional_special_tokens": Ignore("in tokenizer.json"),
    "extra_special_tokens": Ignore("in tokenizer.json"),
    "model_max_length": Ignore("prompts are not cut"),
    "padding_side": Only(("right", "left", None), "nothing attends to padding"),
    "truncation_side": Ignore("prompts are not cut"),
    "model_input_names": _RUNTIME,
    "clean_up_tokenization_spaces": Ignore("read in decoding text only"),
    "spaces_between_special_tokens": Ignore("read in decoding text only"),
    "chat_template": Ignore("prompts are written by the policy"),
    "use_default_system_prompt": Ignore("prompts are written by the policy"),
    "legacy": Ignore("in tokenizer.json"),
    "from_slow": _RUNTIME,
    "use_fast": _RUNTIME,
    "backend": _RUNTIME,
    "is_local": _ABOUT,
    "sp_model_kwargs": Only(({}, None)),
    "split_special_tokens": Only((False, None)),
    "processor_class": _CLASSES,
    "auto_map": _CLASSES,
    "name_or_path": _ABOUT,
    "tokenizer_file": _ABOUT,
    "special_tokens_map_file": _ABOUT,
}

# Keys of each data set in dataset_statistics.json or `norm_stats`.
STATISTICS: Final[Mapping[str, Rule]] = {
    "action": _READ,
    "proprio": _READ,
    "num_transitions": _ABOUT,
    "num_trajectories": _ABOUT,
}
_UNUSED = Ignore("no normalization reads it")
# Keys of its blocks, `action` and `proprio`.
BLOCK: Final[Mapping[str, Rule]] = {
    "q01": _READ,
    "q99": _READ,
    "min": _READ,
    "max": _READ,
    "mask": _READ,
    "mean": _UNUSED,
    "std": _UNUSED,
    "q10": _UNUSED,
    "q50": _UNUSED,
    "q90": _UNUSED,
    "count": _UNUSED,
}

# PEFT's `adapter_config.json`. Unknown keys pass if they are null, false or empty.
ADAPTER: Final[Mapping[str, Rule]] = {
    "r": _READ,
    "lora_alpha": _READ,
    "rank_pattern": _READ,
    "alpha_pattern": _READ,
    "use_rslora": _READ,
    "target_modules": _READ,
    "peft_type": Only(("LORA",)),
    "bias": Only(("none",)),
    "use_dora": Only((False, None)),
    "use_qalora": Only((False, None)),
    "lora_bias": Only((False, None)),
    "fan_in_fan_out": Only((False, None)),
    "init_lora_weights": Only(
        (True, False, None, "gaussian", "eva", "orthogonal"), "others change the base"
    ),
    "modules_to_save": Only((None, [])),
    "exclude_modules": Only((None, [], "")),
    "layers_to_transform": Only((None,)),
    "layers_pattern": Only((None, [], "")),
    "layer_replication": Only((None, [])),
    "trainable_token_indices": Only((None, [], {})),
    "target_parameters": Only((None, [])),
    "ensure_weight_tying": Only((False, None)),
    "megatron_config": Only((None,)),
    "loftq_config": Only(({}, None)),
    "lora_dropout": _TRAINING,
    "inference_mode": _TRAINING,
    "runtime_config": _RUNTIME,
    "megatron_core": Ignore("read with `megatron_config` only"),
    "qalora_group_size": Ignore("read with `use_qalora` only"),
    "task_type": _CLASSES,
    "auto_mapping": _CLASSES,
    "base_model_name_or_path": _ABOUT,
    "revision": _ABOUT,
    "peft_version": _ABOUT,
}
