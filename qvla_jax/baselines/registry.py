"""The methods by name, and `quantize_by`: policy and calibration frames in, packed policy out."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Final

from flax import nnx

from qvla_jax.array_typing import Array, Float
from qvla_jax.baselines.gptq import gptq
from qvla_jax.baselines.moments import InputMoments, input_moments
from qvla_jax.baselines.numerics import WIDTHS, QuantizedRows, nearest
from qvla_jax.baselines.packing import packed_policy
from qvla_jax.baselines.settings import Setting
from qvla_jax.errors import InputError
from qvla_jax.inference.policy import Policy
from qvla_jax.kernels.packed import GROUP_MULTIPLE
from qvla_jax.progress import Progress, no_progress
from qvla_jax.quantization import DEFAULT_RULES, LayerRules, policy_index, quantizable_layers
from qvla_jax.sensitivity.batches import Calibration

Moments = Mapping[str, InputMoments]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method.

    Attributes:
        title: For tables.
        make: Applies it.
        needs_moments: Whether it reads the layers' input moments.
        grouped: Whether groups of inputs may have scales of their own.
    """

    title: str
    make: Callable[["Job"], Policy]
    needs_moments: bool = False
    grouped: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a method works on."""

    policy: Policy
    calibration: Calibration
    setting: Setting
    rules: LayerRules
    # Empty where the method reads none.
    moments: Moments
    progress: Progress


Rows = Callable[[Float[Array, "c k"], InputMoments | None, Setting], QuantizedRows]


def _layer_by_layer(rows: Rows, *, calibrated: bool = True) -> Callable[[Job], Policy]:
    """A method that looks at one layer at a time.

    Layers that the forward pass never reaches have no moments; they are rounded to nearest, as in
    qwix.
    """

    def make(job: Job) -> Policy:
        index = policy_index(job.policy, job.rules)
        layers: dict[str, nnx.Linear] = quantizable_layers(job.policy.model, job.rules)

        def each():
            for done, layer in enumerate(index.layers):
                job.progress(job.setting.name, done, len(index.layers))
                weight = layers[layer.path].kernel[...].T
                yield layer, rows(weight, job.moments.get(layer.path), job.setting)
            job.progress(job.setting.name, len(index.layers), len(index.layers))

        return packed_policy(
            job.policy,
            index,
            each(),
            job.setting,
            rules=job.rules,
            calibration=job.calibration.manifest["sha256"] if calibrated else None,
        )

    return make


def _nearest_rows(
    weight: Float[Array, "c k"], moments: InputMoments | None, setting: Setting
) -> QuantizedRows:
    del moments
    return nearest(weight, int(setting.bits), setting.group)


def _gptq_rows(
    weight: Float[Array, "c k"], moments: InputMoments | None, setting: Setting
) -> QuantizedRows:
    if moments is None:
        return _nearest_rows(weight, None, setting)
    return gptq(weight, moments.hessian, int(setting.bits), setting.group)


METHODS: Final[Mapping[str, Method]] = {
    "rtn": Method(
        title="round to nearest (qwix)",
        make=_layer_by_layer(_nearest_rows, calibrated=False),
        grouped=True,
    ),
    "gptq": Method(
        title="GPTQ (qwix)", make=_layer_by_layer(_gptq_rows), needs_moments=True, grouped=True
    ),
}


def check_setting(name: str) -> Setting:
    """Reads a row's name and checks that its method has such a setting.

    Raises:
        InputError: unknown method, or bits, activation bits or groups that it does not have.
    """
    setting = Setting.parse(name)
    if setting.method not in METHODS:
        close = difflib.get_close_matches(setting.method, METHODS, n=2)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(METHODS)}"
        raise InputError(f"unknown method {setting.method!r} in {name!r}; {hint}")
    method = METHODS[setting.method]
    if setting.bits not in WIDTHS:
        raise InputError(f"{name}: {setting.method} has weights of {WIDTHS} bits")
    if setting.activation_bits != 16:
        raise InputError(f"{name}: {setting.method} leaves activations at 16 bits")
    if setting.group is not None and not method.grouped:
        raise InputError(f"{name}: {setting.method} has one scale for each channel")
    if setting.group is not None and (setting.group < 1 or setting.group % GROUP_MULTIPLE):
        raise InputError(f"{name}: groups hold a multiple of {GROUP_MULTIPLE} inputs")
    return setting


def title(setting: Setting) -> str:
    """The row for people, without its bits."""
    group = "" if setting.group is None else f", groups of {setting.group}"
    return METHODS[setting.method].title + group


def quantize_by(
    policy: Policy,
    calibration: Calibration,
    name: str,
    *,
    moments: Moments | None = None,
    rules: LayerRules = DEFAULT_RULES,
    progress: Progress = no_progress,
) -> Policy:
    """The policy quantized by a baseline, running from packed weights.

    Args:
        policy: the full-precision policy; it is left as it is.
        calibration: the only frames that a method may see.
        name: METHOD-wBITS[aBITS][-gGROUP], such as "gptq-w4"; see `METHODS`.
        moments: from `input_moments` on the same policy and frames, if they are known already.
        rules: which layers are quantized.
        progress: called as it goes on.

    Raises:
        InputError: the name is wrong, the set is empty, or a weight or input is not finite.
    """
    setting = check_setting(name)
    method = METHODS[setting.method]
    if policy.quantization is not None:
        raise InputError("the policy is quantized already; quantize the full-precision one")
    if method.needs_moments and moments is None:
        index = policy_index(policy, rules)
        moments = input_moments(policy, calibration, index, progress=progress)
    job = Job(
        policy=policy, calibration=calibration, setting=setting, rules=rules,
        moments=moments or {}, progress=progress,
    )  # fmt: skip
    return method.make(job)
