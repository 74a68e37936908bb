"""The methods by name, and `quantize_by`: policy and calibration frames in, packed policy out."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Final

from qvla_jax.array_typing import Array, Float
from qvla_jax.errors import InputError, unknown
from qvla_jax.inference.policy import Policy
from qvla_jax.kernels.activations import ACTIVATION_BITS
from qvla_jax.kernels.packed import GROUP_MULTIPLE
from qvla_jax.methods.action import RECIPES
from qvla_jax.methods.awq import awq
from qvla_jax.methods.gptq import gptq
from qvla_jax.methods.job import Job, layer_by_layer
from qvla_jax.methods.measurements import Measurements
from qvla_jax.methods.moments import InputMoments
from qvla_jax.methods.numerics import WIDTHS, nearest
from qvla_jax.methods.omniquant import omniquant_policy
from qvla_jax.methods.qvla import qvla_paper, qvla_released
from qvla_jax.methods.settings import Setting
from qvla_jax.methods.smoothquant import smoothquant_policy
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization import LayerRules
from qvla_jax.quantization.rows import QuantizedRows
from qvla_jax.sensitivity.batches import Calibration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method.

    Attributes:
        title: for tables.
        make: applies the method.
        grouped: whether groups of inputs may have scales of their own.
        allocates: whether bits are a budget, which may be fractional.
        rounds_activations: whether it only works with rounded activations.
        allocates_activations: whether bits of activations are a budget, too.
    """

    title: str
    make: Callable[[Job], Policy]
    grouped: bool = False
    allocates: bool = False
    rounds_activations: bool = False
    allocates_activations: bool = False


def _rtn(job: Job) -> Policy:
    bits, group = int(job.setting.bits), job.setting.group
    return layer_by_layer(
        job, lambda weight, _: nearest(weight, bits, group), {},
        made_with={"calibration hash": None},
    )  # fmt: skip


def _by_moments(
    rows_of: Callable[[Float[Array, "c k"], InputMoments, int, int | None], QuantizedRows],
) -> Callable[[Job], Policy]:
    """A method that reads a layer's input moments, and rounds to nearest where there are none."""

    def make(job: Job) -> Policy:
        bits, group = int(job.setting.bits), job.setting.group

        def rows(weight: Float[Array, "c k"], moments: InputMoments | None) -> QuantizedRows:
            if moments is None:
                return nearest(weight, bits, group)
            return rows_of(weight, moments, bits, group)

        return layer_by_layer(job, rows, job.measured.moments)

    return make


_awq = _by_moments(lambda weight, m, bits, group: awq(weight, m.mean_magnitude, bits, group))
_gptq = _by_moments(lambda weight, m, bits, group: gptq(weight, m.hessian, bits, group))


METHODS: Final[Mapping[str, Method]] = {
    "rtn": Method(title="round to nearest (qwix)", make=_rtn, grouped=True),
    "smoothquant": Method(
        title="SmoothQuant (qwix)", make=smoothquant_policy, grouped=True,
        rounds_activations=True,
    ),
    "awq": Method(title="AWQ (qwix)", make=_awq, grouped=True),
    "gptq": Method(title="GPTQ (qwix)", make=_gptq, grouped=True),
    "omniquant": Method(
        title="OmniQuant's learned clips", make=omniquant_policy, grouped=True
    ),
    "qvla": Method(title="QVLA, as the paper describes it", make=qvla_paper, allocates=True),
    "qvla-released": Method(title="QVLA, as released", make=qvla_released, allocates=True),
    **{
        name: Method(
            title=recipe.title, make=recipe, allocates=recipe.options is not None,
            allocates_activations=recipe.allocates_activations,
        )
        for name, recipe in RECIPES.items()
    },
}  # fmt: skip


def check_setting(name: str) -> Setting:
    """Reads a row's name and checks that its method has such a setting.

    Raises:
        InputError: unknown method, or bits, activation bits or groups that it does not have.
    """
    setting = Setting.parse(name)
    if setting.method not in METHODS:
        raise InputError(f"{name}: {unknown('method', setting.method, METHODS)}")
    method = METHODS[setting.method]
    if method.allocates and not 0 < setting.bits <= 16:
        raise InputError(f"{name}: a budget lies above 0 and at most 16 bits for each weight")
    if not method.allocates and setting.bits not in WIDTHS:
        raise InputError(f"{name}: {setting.method} has weights of {WIDTHS} bits")
    if method.allocates_activations:
        if not 4 < setting.activation_bits < 16:
            raise InputError(
                f"{name}: a budget of activations lies between 4 and 16 bits, such as a5; at "
                "either end there is nothing to allocate"
            )
    elif setting.activation_bits not in ACTIVATION_BITS:
        raise InputError(f"{name}: activations have {ACTIVATION_BITS} bits")
    if method.rounds_activations and setting.activation_bits == 16:
        raise InputError(f"{name}: {setting.method} rounds activations: give a8 or a4")
    if setting.group is not None and not method.grouped:
        raise InputError(f"{name}: {setting.method} has one scale for each channel")
    if setting.group is not None and (setting.group < 1 or setting.group % GROUP_MULTIPLE):
        raise InputError(f"{name}: groups hold a multiple of {GROUP_MULTIPLE} inputs")
    return setting


def title(setting: Setting) -> str:
    """The row's title, without the bits of its weights."""
    group = "" if setting.group is None else f", groups of {setting.group}"
    bits = setting.activation_bits
    return METHODS[setting.method].title + group + ("" if bits == 16 else f", A{bits:g}")


def quantize_by(
    policy: Policy,
    calibration: Calibration,
    name: str,
    *,
    measured: Measurements | None = None,
    rules: LayerRules | None = None,
    progress: Progress = no_progress,
) -> Policy:
    """The policy quantized by a method, running from packed weights.

    Args:
        policy: the full-precision policy; it is not changed.
        calibration: the only frames that a method may see.
        name: METHOD-wBITS[aBITS][-gGROUP], such as "gptq-w4"; see `METHODS`.
        measured: shared measurements on the same policy and frames; their rules and progress then
            apply.
        rules: which layers are quantized; None takes those of the policy's layout.
        progress: reports progress.

    Raises:
        InputError: the name is wrong, the set is empty, or a weight or input is not finite.
        BudgetError: the budget of a method that allocates is below what can be stored.
    """
    setting = check_setting(name)
    if policy.quantization is not None:
        raise InputError("the policy is quantized already; quantize the full-precision one")
    if measured is None:
        measured = Measurements(policy, calibration, rules=rules, progress=progress)
    return METHODS[setting.method].make(Job(measured=measured, setting=setting))
