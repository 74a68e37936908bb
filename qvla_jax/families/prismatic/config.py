"""Model configurations: frozen dataclasses with a JSON round trip, and the presets by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal

from qvla_jax.errors import InputError, unknown
from qvla_jax.plain import from_plain

# Number of cameras -> what observations call their images, in the order that policies take them. On
# ALOHA, each of the two grippers has a camera; names follow OpenVLA-OFT's.
CAMERA_KEYS: Final[Mapping[int, tuple[str, ...]]] = {
    1: ("image",),
    2: ("image", "wrist_image"),
    3: ("image", "left_wrist_image", "right_wrist_image"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionTowerConfig:
    """One ViT tower of the fused vision backbone (timm naming)."""

    timm_id: str
    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    # A class token and registers are put in front of the patches (DINOv2), or nothing (SigLIP).
    class_token: bool = False
    num_registers: int = 0
    layer_scale: bool = False
    # 0-based index of the block whose output is the feature. The public policies read the
    # second-to-last block and never use the last one.
    feature_block: int
    # Stored in the public checkpoints and never read by a policy.
    final_norm: bool = False
    attention_pool: bool = False
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The language model, in Hugging Face's terms and with its defaults."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    # Positions of the longest sequence that it supports, which bound the prompt. None: only
    # `max_prompt_tokens` does.
    max_position_embeddings: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentActionConfig:
    """How UniVLA acts: latent action tokens, and a decoder that reads their states."""

    # Width of the decoder's pooling blocks: the width of a head times the number of heads.
    embed_dim: int
    num_heads: int
    mlp_dim: int
    # Latent tokens that are decoded for each chunk.
    num_tokens: int = 4
    # The prompt when the latent tokens of the previous call are given.
    history_template: str = (
        "In: What action should the robot take to {instruction}? History action {history}\nOut:"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenVLAConfig:
    """A Prismatic VLA: two towers, a projector, Llama, and a way to decode actions."""

    family: ClassVar[str] = "prismatic"

    name: str
    # featurizer (DINOv2), then fused_featurizer (SigLIP)
    vision: tuple[VisionTowerConfig, VisionTowerConfig]
    text: LlamaConfig
    # Cameras: the main one, then those at the grippers (see `CAMERA_KEYS`).
    num_images: int = 1
    # "l1": OpenVLA-OFT's parallel decoding with a regression head; "tokens": OpenVLA's
    # autoregressive action tokens; "latents": UniVLA's latent action tokens, and a decoder.
    decoding: Literal["l1", "tokens", "latents"] = "l1"
    action_dim: int = 7
    action_horizon: int = 8
    # What scales actions and proprio to [-1, 1]: q01 and q99, or min and max.
    action_normalization: Literal["quantiles", "min_max"] = "quantiles"
    # 0: the policy takes no proprio.
    proprio_dim: int = 0
    # Language modulates the towers' blocks (OpenVLA-OFT+).
    use_film: bool = False
    # How raw camera images become what the towers take: "openvla" as the reference does it in
    # LIBERO (JPEG round trip, lanczos3 to 224 pixels), "plain" by one resize where sizes differ.
    image_chain: Literal["plain", "openvla"] = "plain"
    # Crop the central 90 % of the area: for policies that were trained with random crops.
    center_crop: bool = False
    prompt_template: str = "In: What action should the robot take to {instruction}?\nOut:"
    # Prompts are padded to this many tokens (BOS and the empty token included). If the language
    # model has positions for more, longer ones are padded to twice as many, and so on.
    max_prompt_tokens: int = 64
    bos_token_id: int = 1
    stop_token_id: int = 2
    placeholder_token_id: int = 1
    pad_token_id: int = 32000
    # The lone word-boundary piece that the reference appends after "Out:".
    empty_token_id: int | None = 29871
    # Size of the vocabulary without padding rows; action bins are its last 256 tokens.
    action_vocab_size: int = 32000
    # Statistics entry used where a checkpoint holds several data sets.
    unnorm_key: str | None = None
    # With "latents", and only then.
    latent_action: LatentActionConfig | None = None

    def __post_init__(self) -> None:
        """Checks what the types do not express.

        Raises:
            InputError: there are no names for this many cameras, or the decoder's sizes are missing
                or not needed.
        """
        if self.num_images not in CAMERA_KEYS:
            raise InputError(
                f"{self.name}: num_images is {self.num_images}, but 1 to {max(CAMERA_KEYS)} are "
                "supported: the main camera, and those at the grippers"
            )
        if (self.decoding == "latents") != (self.latent_action is not None):
            raise InputError(
                f"{self.name}: decoding is {self.decoding!r} and latent_action is "
                f"{self.latent_action}; give the sizes with 'latents', and only then"
            )

    @property
    def camera_keys(self) -> tuple[str, ...]:
        """What observations call the images, in the order that the policy takes them."""
        return CAMERA_KEYS[self.num_images]

    @property
    def prompt_limit(self) -> int:
        """Tokens of the longest prompt: positions left free by images, proprio and actions."""
        places = self.text.max_position_embeddings
        if places is None:
            return self.max_prompt_tokens
        behind = self.num_action_tokens + 1 if self.decoding == "l1" else self.num_decoded_tokens
        return places - self.num_prefix_tokens - behind

    def padded_prompt(self, tokens: int) -> int:
        """The length a prompt is padded to; there are few, because each takes a compilation."""
        width = self.max_prompt_tokens
        while width < tokens:
            width *= 2
        return min(width, max(self.prompt_limit, self.max_prompt_tokens))

    @property
    def image_size(self) -> int:
        """Side of the square images that the towers take, in pixels."""
        return self.vision[0].image_size

    @property
    def num_action_tokens(self) -> int:
        """Action placeholders in the sequence: one for each entry of the chunk."""
        return self.action_horizon * self.action_dim

    @property
    def num_decoded_tokens(self) -> int:
        """Tokens that a call decodes one after the other; 0 with a regression head."""
        if self.latent_action is not None:
            return self.latent_action.num_tokens
        return self.action_dim if self.decoding == "tokens" else 0

    @property
    def num_prefix_tokens(self) -> int:
        """Patch tokens of all images, plus the proprio token where there is one."""
        return self.num_images * self.vision[0].num_patches + (self.proprio_dim > 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = dataclasses.asdict(self)
        # Policies without these keep the fingerprints they had before the keys existed.
        if self.latent_action is None:
            del values["latent_action"]
        if self.action_normalization == "quantiles":
            del values["action_normalization"]
        if self.text.max_position_embeddings is None:
            del values["text"]["max_position_embeddings"]
        return values

    def identity(self) -> dict[str, Any]:
        """`to_dict` without the entries that change no action; part of a fingerprint."""
        values = self.to_dict()
        values["text"].pop("max_position_embeddings", None)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OpenVLAConfig":
        """Inverse of `to_dict`.

        Raises:
            InputError: a key is unknown, missing or of the wrong type; the message names it.
        """
        return from_plain(cls, values, "config")


_IMAGENET_MEAN = (0.484375, 0.455078125, 0.40625)
_IMAGENET_STD = (0.228515625, 0.2236328125, 0.224609375)

_DINOV2_L = VisionTowerConfig(
    timm_id="vit_large_patch14_reg4_dinov2.lvd142m",
    image_size=224,
    patch_size=14,
    embed_dim=1024,
    depth=24,
    num_heads=16,
    mlp_dim=4096,
    class_token=True,
    num_registers=4,
    layer_scale=True,
    feature_block=22,
    final_norm=True,
    # timm stores the ImageNet constants in bfloat16, and so does the public preprocessor.
    mean=_IMAGENET_MEAN,
    std=_IMAGENET_STD,
)
_SIGLIP_SO400M = VisionTowerConfig(
    timm_id="vit_so400m_patch14_siglip_224",
    image_size=224,
    patch_size=14,
    embed_dim=1152,
    depth=27,
    num_heads=16,
    mlp_dim=4304,
    feature_block=25,
    final_norm=True,
    attention_pool=True,
)
_LLAMA_2_7B = LlamaConfig(
    vocab_size=32064,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=2048,
)


def _small_towers(
    *, image_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int
) -> tuple[VisionTowerConfig, VisionTowerConfig]:
    """The two towers at a small width; every block is used."""
    common: dict[str, Any] = dict(
        image_size=image_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=4 * embed_dim,
        feature_block=depth - 1,
    )
    dino = VisionTowerConfig(
        timm_id="small_reg4_dinov2",
        class_token=True,
        num_registers=4,
        layer_scale=True,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        **common,
    )
    return dino, VisionTowerConfig(timm_id="small_siglip", **common)


_SMALL: dict[str, Any] = dict(
    num_images=2,
    decoding="l1",
    proprio_dim=8,
    prompt_template="{instruction}",
    max_prompt_tokens=24,
    pad_token_id=0,
    empty_token_id=4,
    unnorm_key="libero_spatial",
)

PRESETS: dict[str, OpenVLAConfig] = {
    c.name: c
    for c in (
        OpenVLAConfig(
            name="openvla-7b",
            vision=(_DINOV2_L, _SIGLIP_SO400M),
            text=_LLAMA_2_7B,
            decoding="tokens",
            image_chain="openvla",
            action_horizon=1,
        ),
        OpenVLAConfig(
            name="openvla-oft-7b",
            vision=(_DINOV2_L, _SIGLIP_SO400M),
            text=_LLAMA_2_7B,
            num_images=2,
            proprio_dim=8,
            image_chain="openvla",
            center_crop=True,
        ),
        # As fine-tuned on LIBERO: chunks of 12.
        OpenVLAConfig(
            name="univla-7b",
            vision=(_DINOV2_L, _SIGLIP_SO400M),
            text=_LLAMA_2_7B,
            decoding="latents",
            image_chain="openvla",
            center_crop=True,
            action_horizon=12,
            latent_action=LatentActionConfig(embed_dim=512, num_heads=8, mlp_dim=2048),
        ),
        OpenVLAConfig(
            name="libero-mini",
            vision=_small_towers(
                image_size=128, patch_size=16, embed_dim=128, depth=3, num_heads=4
            ),
            text=LlamaConfig(
                vocab_size=96,
                hidden_size=192,
                intermediate_size=512,
                num_hidden_layers=4,
                num_attention_heads=6,
                num_key_value_heads=6,
            ),
            **_SMALL,
        ),
        # For unit tests: the complete architecture at widths that compile in seconds.
        OpenVLAConfig(
            name="tiny-test",
            vision=_small_towers(image_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2),
            text=LlamaConfig(
                vocab_size=96,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
            ),
            **_SMALL,
        ),
    )
}


def preset(name: str) -> OpenVLAConfig:
    """Returns the configuration called `name`.

    Raises:
        InputError: the name is unknown; the message lists close matches.
    """
    if name not in PRESETS:
        raise InputError(unknown("model", name, PRESETS))
    return PRESETS[name]
