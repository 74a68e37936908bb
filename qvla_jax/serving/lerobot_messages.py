"""The pickles that LeRobot's asynchronous client sends, and those that it gets.

What a client sends is read by a machine that can only build numbers, text, arrays and the two
records of `lerobot`; no pickle is run. What it gets is a pickle that its `pickle.loads` turns into
a list of its own `TimedAction` with tensors, written without PyTorch.
"""

import dataclasses
import reprlib
import struct
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import numpy as np

from qvla_jax.array_typing import Float
from qvla_jax.errors import InputError, first_line
from qvla_jax.plain_pickle import Global, Machine
from qvla_jax.serving.arrays import checked_array, scalar

# Where `lerobot` has the records: from 0.4 on, and before.
_MODULES: Final = ("lerobot.async_inference.helpers", "lerobot.scripts.server.helpers")
_FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "RemotePolicyConfig": (
        "policy_type",
        "pretrained_name_or_path",
        "lerobot_features",
        "actions_per_chunk",
        "device",
        "rename_map",
    ),
    "TimedObservation": ("timestamp", "timestep", "observation", "must_go"),
}
_OPTIONAL: Final = {"rename_map"}  # before 0.4
_STATE: Final = "observation.state"
_IMAGES: Final = "observation.images."
_VALUES: Final = (bool, int, float, str, np.ndarray)
# Of what is pickled as 32 bits here.
_FAR: Final = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Instructions:
    """What a client asks for when it connects.

    Attributes:
        module: where it has its records.
        policy: name of the policy.
        steps: entries of a chunk that it takes.
        joints: entries of the robot's observation that are its state, in order.
        cameras: camera, as it is to be understood here -> entry of the robot's observation.
    """

    module: str
    policy: str
    steps: int
    joints: tuple[str, ...]
    cameras: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Seen:
    """An observation of a robot.

    Attributes:
        timestamp: when it was captured, in seconds since 1970.
        timestep: of the latest action that was executed.
        must_go: the robot has no actions left.
        values: numbers, arrays and text, as the robot has them.
    """

    timestamp: float
    timestep: int
    must_go: bool
    values: Mapping[str, Any]


def read_instructions(data: bytes) -> Instructions:
    """Reads `RemotePolicyConfig`.

    `policy_type` and `device` say which PyTorch class a server of LeRobot loads, and where to; here
    the policies are loaded, and chosen by name.

    Raises:
        InputError: it is something else, or declares features that no robot of LeRobot has.
    """
    record = _read(data, "RemotePolicyConfig")
    policy, steps = record.fields["pretrained_name_or_path"], record.fields["actions_per_chunk"]
    if not isinstance(policy, str):
        raise InputError("pretrained_name_or_path: expected the name of a policy of this server")
    if type(steps) is not int or steps < 1:
        raise InputError(f"actions_per_chunk: expected a positive number, got {_short(steps)}")
    renamed = _renamed(record.fields.get("rename_map", {}))
    features = record.fields["lerobot_features"]
    if not isinstance(features, dict):
        raise InputError(f"lerobot_features: expected a map, got {type(features).__name__}")
    if absent := [name for name in renamed if name not in features]:
        raise InputError(f"rename_map: the robot has no {_short(absent[0])}")
    joints: tuple[str, ...] = ()
    cameras: dict[str, str] = {}
    for name, feature in features.items():
        called = renamed.get(name, name)
        if name == _STATE:
            joints = _joints(feature)
        elif isinstance(called, str) and called.startswith(_IMAGES):
            camera = called.removeprefix(_IMAGES)
            if camera in cameras:
                raise InputError(f"rename_map: two cameras are called {_short(camera)}")
            cameras[camera] = name.removeprefix(_IMAGES)
        else:
            raise InputError(f"lerobot_features: {_short(name)}: expected {_STATE} or {_IMAGES}...")
    return Instructions(record.module, policy, steps, joints, cameras)


def read_observation(data: bytes) -> Seen:
    """Reads `TimedObservation`. Arrays are read-only views of the message.

    Raises:
        InputError: it is something else, or has an entry that is no number, array or text.
    """
    fields = _read(data, "TimedObservation").fields
    timestamp, timestep, must_go = fields["timestamp"], fields["timestep"], fields["must_go"]
    if type(timestep) is not int or not 0 <= timestep <= _FAR:
        raise InputError(f"timestep: expected a number from 0 on, got {_short(timestep)}")
    if type(timestamp) is not float or type(must_go) is not bool:
        raise InputError("timestamp, must_go: expected a number and a truth value")
    observation = fields["observation"]
    if not isinstance(observation, dict):
        raise InputError(f"observation: expected a map, got {type(observation).__name__}")
    values: dict[str, Any] = {}
    for name, value in observation.items():
        value = value.array if isinstance(value, _Array) else value
        if not isinstance(name, str) or not isinstance(value, _VALUES):
            raise InputError(
                f"observation: {_short(name)}: expected a number, a numpy array or text, got "
                f"{type(value).__name__.strip('_')}"
            )
        values[name] = value
    return Seen(timestamp, timestep, must_go, values)


def write_actions(
    actions: Float[np.ndarray, "h a"],
    *,
    module: str,
    timestep: int,
    timestamp: float,
    step_seconds: float,
) -> bytes:
    """Pickles a list of `TimedAction`, one for each row.

    Args:
        actions: become tensors of PyTorch's default type (float32), by `torch.tensor`.
        module: where the client has `TimedAction`.
        timestep: of the first action.
        timestamp: of the first action, in seconds since 1970.
        step_seconds: between two actions.
    """
    record, tensor = (f"c{name}\n".encode() for name in (f"{module}\nTimedAction", "torch\ntensor"))
    parts = [b"\x80\x02("]
    for i, row in enumerate(actions.astype(np.float32)):
        numbers = b"".join(map(_number, row.tolist()))
        parts += [record, b")\x81}("]  # the record without its fields, and a map of them
        parts += [_word("timestamp"), _number(timestamp + i * step_seconds)]
        parts += [_word("timestep"), b"J" + struct.pack("<i", min(timestep + i, _FAR))]
        parts += [_word("action"), tensor, b"(", numbers, b"l\x85R", b"ub"]
    return b"".join(parts) + b"l."


def _number(value: float) -> bytes:
    return b"G" + struct.pack(">d", value)


def _word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _renamed(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(
        isinstance(name, str) for pair in value.items() for name in pair
    ):
        raise InputError("rename_map: expected a map of text")
    return value


def _joints(feature: Any) -> tuple[str, ...]:
    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"lerobot_features: {_STATE}: expected a list of names")
    return tuple(names)


# Names of numpy before 2.0, too.
_CORES: Final = ("numpy._core", "numpy.core")
_RECONSTRUCT: Final = {f"{core}.multiarray _reconstruct" for core in _CORES}
_SCALAR: Final = {f"{core}.multiarray scalar" for core in _CORES}
_FROM_BUFFER: Final = {f"{core}.numeric _frombuffer" for core in _CORES}
_DTYPE: Final = "numpy dtype"
_NDARRAY: Final = "numpy ndarray"
_RECORDS: Final = {f"{module} {kind}": (module, kind) for module in _MODULES for kind in _FIELDS}
_KNOWN: Final = {*_RECONSTRUCT, *_SCALAR, *_FROM_BUFFER, _DTYPE, _NDARRAY, *_RECORDS}


@dataclasses.dataclass
class _Record:
    module: str
    kind: str
    fields: dict[str, Any]


@dataclasses.dataclass
class _Dtype:
    code: str
    # Comes after the code.
    order: str | None = None

    @property
    def text(self) -> str:
        return f"{self.order}{self.code}"


@dataclasses.dataclass
class _Array:
    # Comes after the object.
    array: np.ndarray | None = None


class _Reader(Machine):
    error = InputError
    what: ClassVar[str] = "message"
    whole: ClassVar[str] = "an observation"
    operations = 10_000

    def _known(self, name: str) -> Global:
        if name not in _KNOWN:
            raise InputError(
                f"message: refuses {_short(name)}: expected numbers, text and numpy arrays"
            )
        return Global(name)

    def _op_binbytes(self, value: bytes) -> None:
        self._push(value)

    _op_short_binbytes = _op_binbytes8 = _op_binbytes

    def _op_bytearray8(self, value: bytearray) -> None:
        self._push(memoryview(value))

    def _op_newobj(self, _: None) -> None:
        arguments, kind = self._pop(), self._pop()
        if not isinstance(kind, Global) or kind.name not in _RECORDS or arguments != ():
            raise InputError(f"message: refuses to make {_short(kind)}")
        self._push(_Record(*_RECORDS[kind.name], {}))

    def _op_reduce(self, _: None) -> None:
        arguments, function = self._pop(), self._pop()
        name = function.name if isinstance(function, Global) else ""
        match arguments:
            case (str(code), bool(), bool()) if name == _DTYPE:
                self._push(_Dtype(code))
            case (Global(name=_NDARRAY), (0,), bytes()) if name in _RECONSTRUCT:
                self._push(_Array())
            case (_Dtype() as dtype, bytes(data)) if name in _SCALAR:
                self._push(scalar(checked_array(data, dtype.text, ()).item()))
            case (data, _Dtype() as dtype, tuple(shape), str(order)) if name in _FROM_BUFFER:
                self._push(_Array(_ordered(data, dtype, shape, fortran=order != "C")))
            case _:
                raise InputError(f"message: refuses to call {_short(function)}")

    def _op_build(self, _: None) -> None:
        state, built = self._pop(), self._peek()
        match built, state:
            case _Record(), dict():
                built.fields = state
            case _Dtype(), (3, str(order), None, None, None, -1, -1, 0):
                built.order = order
            case _Array(), (1, tuple(shape), _Dtype() as dtype, bool(fortran), bytes(data)):
                built.array = _ordered(data, dtype, shape, fortran=fortran)
            case _:
                raise InputError("message: refuses to set attributes")


def _ordered(data: Any, dtype: _Dtype, shape: tuple[Any, ...], *, fortran: bool) -> np.ndarray:
    if not all(type(length) is int for length in shape):
        raise InputError(f"array: shape {_short(shape)}; expected lengths")
    if not fortran:
        return checked_array(data, dtype.text, shape)
    return checked_array(data, dtype.text, shape[::-1]).T


def _read(data: bytes, kind: str) -> _Record:
    try:
        record = _Reader(data).run()
    except (ValueError, KeyError, RecursionError, OverflowError) as error:
        raise InputError(f"message: not a readable pickle ({first_line(error)[:100]})") from error
    if not isinstance(record, _Record) or record.kind != kind:
        raise InputError(f"message: expected a {kind} of lerobot")
    expected = _FIELDS[kind]
    if unknown := [name for name in record.fields if name not in expected]:
        raise InputError(f"{kind}: unknown field {_short(unknown[0])}")
    missing = [name for name in expected if name not in record.fields and name not in _OPTIONAL]
    if missing:
        raise InputError(f"{kind}: no {missing[0]}")
    return record


def _short(value: Any) -> str:
    # What is nested may take forever to be printed whole.
    text = value if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
