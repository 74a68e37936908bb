"""All methods, by name: published quantizers, and our own from uniform rounding on, an ablation.

QVLA (Xu et al., ICLR 2026, arXiv 2602.03782) stands here as the paper describes it and as it was
released. Both give every output channel 0, 2, 4, 8 or 16 bits and round to nearest on the grid of
QVLA, without bias correction.

Paper: the cost of a channel at a bit-width is the squared error of the action when it alone is
quantized; it is taken to first order (`jacobian`), which ranks channels as exact probing does
(docs/sensitivity.md). Channels are demoted where the cost rises least for each byte saved, until
all stored bytes are within the budget.

Released: the cost is the weight error under the layer's input covariance (`input_hessian`), a step
is ranked by the absolute cost at its new bit-width, and the budget is an average over *channels*,
of codes alone; the file's header says what is actually stored.
"""

from collections.abc import Mapping
from typing import Final

from qvla_jax.errors import InputError, unknown
from qvla_jax.kernels.activations import ACTIVATION_BITS
from qvla_jax.kernels.packed import GROUP_MULTIPLE
from qvla_jax.methods import bitvla, hbvla
from qvla_jax.methods.awq import awq_policy
from qvla_jax.methods.bitvla import bitvla_policy
from qvla_jax.methods.gptq import gptq_policy
from qvla_jax.methods.hbvla import hbvla_policy
from qvla_jax.methods.omniquant import omniquant_policy
from qvla_jax.methods.packing import round_to_nearest
from qvla_jax.methods.recipe import Recipe
from qvla_jax.methods.settings import Setting
from qvla_jax.methods.smoothquant import smoothquant_policy
from qvla_jax.quantization import QuantizerSettings
from qvla_jax.quantization.quantizer import (
    NEAREST_UNCORRECTED,
    UNIFORM_BASELINE,
    UNIFORM_FEEDBACK,
)

_AWARE: Final = QuantizerSettings(weighting="action")
_ALL: Final = (0, 2, 4, 8, 16)
_WITH_THREE: Final = (0, 2, 3, 4, 8, 16)

RECIPES: Final[Mapping[str, Recipe]] = {
    "rtn": Recipe(title="round to nearest (qwix)", quantizer=round_to_nearest, grouped=True),
    "smoothquant": Recipe(
        title="SmoothQuant (qwix)", quantizer=smoothquant_policy, grouped=True,
        activations="rounded",
    ),
    "awq": Recipe(title="AWQ (qwix)", quantizer=awq_policy, grouped=True),
    "gptq": Recipe(title="GPTQ (qwix)", quantizer=gptq_policy, grouped=True),
    "omniquant": Recipe(
        title="OmniQuant's learned clips", quantizer=omniquant_policy, grouped=True
    ),
    "bitvla": Recipe(
        title="BitVLA's ternary rounding, after training", quantizer=bitvla_policy,
        widths=(bitvla.BITS,),
    ),
    "hbvla": Recipe(
        title="HBVLA's binarization, from its outline", quantizer=hbvla_policy,
        widths=(hbvla.BITS,),
    ),
    "qvla": Recipe(
        title="QVLA, as the paper describes it", quantizer=UNIFORM_BASELINE, options=_ALL,
        joint=False, solver="greedy:qvla",
    ),
    "qvla-released": Recipe(
        title="QVLA, as released", quantizer=UNIFORM_BASELINE, options=_ALL,
        estimator="input_hessian", joint=False, solver="greedy:released", budget="codes",
    ),
    "nearest": Recipe(
        title="uniform, fitted grid, round to nearest", quantizer=NEAREST_UNCORRECTED
    ),
    "feedback": Recipe(
        title="uniform, fitted grid, error feedback", quantizer=UNIFORM_FEEDBACK
    ),
    "aware": Recipe(
        title="uniform, action-aware rounding",
        quantizer=QuantizerSettings(bias_correction=False, weighting="action"),
    ),
    "action-layers": Recipe(
        title="action sensitivity, bits of layers", options=(2, 4, 8, 16), unit="layer"
    ),
    "action-unpruned": Recipe(
        title="action sensitivity, bits of channels", options=(2, 4, 8, 16)
    ),
    "action": Recipe(title="action sensitivity, with pruning", options=_ALL),
    "action-uncorrected": Recipe(
        title="the same without bias correction", quantizer=UNIFORM_FEEDBACK, options=_ALL
    ),
    "action-rotated": Recipe(
        title="action sensitivity, with pruning and rotated inputs",
        quantizer=QuantizerSettings(rotation=True), options=_ALL,
    ),
    "action-three": Recipe(title="action sensitivity, with 3 bits", options=_WITH_THREE),
    "action-aware": Recipe(
        title="action sensitivity, with 3 bits and action-aware rounding", quantizer=_AWARE,
        options=_WITH_THREE,
    ),
    "action-alternating": Recipe(
        title="action-aware, allocated anew with its own joint errors", quantizer=_AWARE,
        options=_WITH_THREE, alternates=True,
    ),
    "action-gripper": Recipe(
        title="action-aware, the gripper counts ten times", quantizer=_AWARE,
        options=_WITH_THREE, gripper=10,
    ),
    "action-tuned": Recipe(
        title="action-aware, scales and biases tuned on the action error", quantizer=_AWARE,
        options=_WITH_THREE, rotates=True, tuned=True,
    ),
    "action-activations": Recipe(
        title="the same, activation bits of layers allocated", quantizer=_AWARE,
        options=_WITH_THREE, rotates=True, activations="allocated", tuned=True,
    ),
}  # fmt: skip
# What `qvla run` carries out, with the estimator and the solver of its settings.
RUN_RECIPE: Final = RECIPES["action"]
RUN_OPTIONS: Final = _ALL


def check_setting(name: str) -> Setting:
    """Reads a row's name and checks that its method has such a setting.

    Raises:
        InputError: unknown method, or bits, activation bits or groups that it does not have.
    """
    setting = Setting.parse(name)
    if setting.method not in RECIPES:
        raise InputError(f"{name}: {unknown('method', setting.method, RECIPES)}")
    recipe = RECIPES[setting.method]
    if recipe.allocates and not 0 < setting.bits <= 16:
        raise InputError(f"{name}: a budget lies above 0 and at most 16 bits for each weight")
    if not recipe.allocates and setting.bits not in recipe.widths:
        widths = ", ".join(map(str, recipe.widths))
        raise InputError(f"{name}: {setting.method} has weights of {widths} bits")
    if recipe.activations == "allocated":
        if not 4 < setting.activation_bits < 16:
            raise InputError(
                f"{name}: a budget of activations lies between 4 and 16 bits, such as a5; at "
                "either end there is nothing to allocate"
            )
    elif setting.activation_bits not in ACTIVATION_BITS:
        raise InputError(f"{name}: activations have {ACTIVATION_BITS} bits")
    if recipe.activations == "rounded" and setting.activation_bits == 16:
        raise InputError(f"{name}: {setting.method} rounds activations: give a8 or a4")
    if setting.group is not None and not recipe.grouped:
        raise InputError(f"{name}: {setting.method} has one scale for each channel")
    if setting.group is not None and (setting.group < 1 or setting.group % GROUP_MULTIPLE):
        raise InputError(f"{name}: groups hold a multiple of {GROUP_MULTIPLE} inputs")
    return setting


def title(setting: Setting) -> str:
    """The row's title, without the bits of its weights."""
    group = "" if setting.group is None else f", groups of {setting.group}"
    bits = setting.activation_bits
    return RECIPES[setting.method].title + group + ("" if bits == 16 else f", A{bits:g}")
