"""The `.qvla` file: a packed policy in one safetensors file (docs/file_formats.md).

Everything is checked before it is used: the container by the safetensors library, names, dtypes and
shapes against the segment table before a tensor is read, and each layer's digest and invariants
before its arrays are placed. Nothing in the file is executed.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from qvla_jax import kernels
from qvla_jax.checkpoints.tensor_files import TensorFile, write_file
from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.kernels.activations import ACTIVATION_BITS
from qvla_jax.kernels.codes import num_words
from qvla_jax.kernels.packed import GROUP_MULTIPLE, SOURCE_DTYPES, WIDTHS
from qvla_jax.quantization.codes import SOURCE, CodeMap
from qvla_jax.quantization.layout import source_bytes

SUFFIX: Final = ".qvla"
_KIND: Final = "qvla_jax.packed_policy"
# 2 if a layer scales or rounds its inputs, 3 if one rotates them: older readers would not.
_VERSION, _VERSION_WITH_INPUTS, _VERSION_WITH_ROTATION = 1, 2, 3
_VERSIONS: Final = (_VERSION, _VERSION_WITH_INPUTS, _VERSION_WITH_ROTATION)
_FIELDS: Final = ("words", "scales", "index", "bias", "input_scale")


def write_packed(
    path: Path,
    *,
    layers: Iterable[tuple[str, kernels.PackedWeight, kernels.LayerInputs]],
    tensors: Mapping[str, np.ndarray],
    files: Mapping[str, bytes],
    header: Mapping[str, Any],
) -> None:
    """Writes a packed policy, completely or not at all.

    Args:
        path: ends in `.qvla`.
        layers: path and packed weight of each quantized layer, on the host, and what it does to its
            inputs; each is requested once, and written before the next.
        tensors: all other parameters under their public names, read one at a time; each is stored
            in the narrowest type that holds it exactly.
        files: what the policy's processor needs besides, such as `tokenizer.json`: name -> content.
        header: JSON object: `config`, `statistics`, `quantization`, `packages`.
    """
    table: list[dict[str, Any]] = []
    versions = {_VERSION}
    others = _Digest("others")

    def content() -> Iterator[tuple[str, np.ndarray]]:
        for name, weight, own in layers:
            arrays, entry = _flat(weight), _describe(name, weight)
            if not own.is_plain:
                versions.add(_VERSION_WITH_INPUTS)
                entry |= {
                    "activation_bits": own.activation_bits,
                    "input_scale": own.scale is not None,
                }
                if own.rotated:
                    versions.add(_VERSION_WITH_ROTATION)
                    entry |= {"rotated": True}
                if own.scale is not None:
                    arrays["input_scale"] = own.scale.astype(ml_dtypes.bfloat16)
            table.append({**entry, "sha256": _digest(entry, arrays)})
            yield from ((f"{name}.{field}", array) for field, array in arrays.items())
        for name in sorted({*tensors, *files}):
            if name in files:
                tensor = np.frombuffer(files[name], np.uint8)
            else:
                tensor = _narrow(tensors[name])
            others.update(name, tensor)
            yield name, tensor

    def metadata() -> dict[str, str]:
        text = json.dumps(
            {
                "kind": _KIND,
                "version": max(versions),
                **header,
                "files": sorted(files),
                "layers": table,
                "sha256": others.hexdigest(),
            },
            allow_nan=False,
        )
        return {"header": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}

    write_file(path, content(), metadata)


@dataclasses.dataclass(frozen=True)
class LayerEntry:
    """A layer in the segment table of a file.

    Raises:
        ValueError: a value is out of range; types are those of JSON and are checked, too.
    """

    path: str
    shape: tuple[int, int]
    segments: tuple[kernels.Segment, ...]
    group: int | None
    source_dtype: str
    index: bool
    bias: str | None
    sha256: str
    activation_bits: int = 16
    input_scale: bool = False
    rotated: bool = False

    def __post_init__(self) -> None:
        rows = sum(segment.rows for segment in self.segments)
        if min(self.shape) < 1 or rows > self.shape[0]:
            raise ValueError(f"{rows} rows for shape {list(self.shape)}")
        if self.source_dtype not in SOURCE_DTYPES or self.bias not in (None, *SOURCE_DTYPES):
            raise ValueError(f"dtypes {self.source_dtype!r} and {self.bias!r}")
        if self.group is not None and (self.group < 1 or self.group % GROUP_MULTIPLE):
            raise ValueError(f"group {self.group}")
        if self.activation_bits not in ACTIVATION_BITS:
            raise ValueError(f"activation bits {self.activation_bits}")
        if any(s.bits not in WIDTHS or s.rows < 1 for s in self.segments):
            raise ValueError(f"segments {[(s.bits, s.rows) for s in self.segments]}")

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "LayerEntry":
        """Of the header's entry."""
        segments = []
        for bits, rows, multiplier, offset in raw["segments"]:
            numbers = (bits, rows, multiplier, offset)
            if not all(type(v) is int for v in numbers):
                raise ValueError(f"segment {numbers}")
            segments.append(kernels.Segment(bits, rows, CodeMap(multiplier, offset)))
        c, k = raw["shape"]
        group = raw["group"]
        if not all(type(v) is int for v in (c, k)) or type(group) not in (int, type(None)):
            raise ValueError(f"shape {raw['shape']}, group {group!r}")
        return cls(
            path=str(raw["path"]), shape=(c, k), segments=tuple(segments), group=group,
            source_dtype=raw["source_dtype"], index=bool(raw["index"]), bias=raw["bias"],
            sha256=str(raw["sha256"]), activation_bits=raw.get("activation_bits", 16),
            input_scale=bool(raw.get("input_scale", False)),
            rotated=bool(raw.get("rotated", False)),
        )  # fmt: skip

    @property
    def word_shapes(self) -> list[tuple[int, int]]:
        """[rows, words] of each segment."""
        source = 8 * np.dtype(SOURCE_DTYPES[self.source_dtype]).itemsize
        k = self.shape[1]
        widths = [source if s.bits == SOURCE else s.bits for s in self.segments]
        return [
            (s.rows, num_words(k, width)) for s, width in zip(self.segments, widths, strict=True)
        ]

    @property
    def scale_shapes(self) -> list[tuple[int, int]]:
        """[rows, groups] of each segment."""
        groups = 1 if self.group is None else -(-self.shape[1] // self.group)
        return [(s.rows, 0 if s.bits == SOURCE else groups) for s in self.segments]

    @property
    def specs(self) -> dict[str, tuple[np.dtype[Any], tuple[int]]]:
        """Dtype and shape of each stored array."""
        specs = {
            "words": (np.dtype(np.uint32), _total(self.word_shapes)),
            "scales": (np.dtype(ml_dtypes.bfloat16), _total(self.scale_shapes)),
        }
        if self.index:
            specs["index"] = (np.dtype(np.uint16), (sum(s.rows for s in self.segments),))
        if self.bias is not None:
            specs["bias"] = (np.dtype(SOURCE_DTYPES[self.bias]), (self.shape[0],))
        if self.input_scale:
            specs["input_scale"] = (np.dtype(ml_dtypes.bfloat16), (self.shape[1],))
        return specs

    @property
    def nbytes(self) -> int:
        """Stored bytes of the layer."""
        return sum(dtype.itemsize * shape[0] for dtype, shape in self.specs.values())


class PackedFile:
    """An open `.qvla` file; the header is checked, the tensors are not read yet."""

    def __init__(self, path: Path):
        """Opens it.

        Raises:
            CheckpointError: it is missing, truncated, of another kind or version, or its tensors
                are not those of its segment table.
        """
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no such file")
        self.path, self._file = path, TensorFile(path)
        text = self._file.metadata.get("header", "")
        try:
            self.header: dict[str, Any] = json.loads(text)
            kind, version = self.header["kind"], self.header["version"]
            if kind != _KIND or version not in _VERSIONS:
                raise CheckpointError(
                    f"{path}: {kind!r} of version {version!r}; this library reads {_KIND!r} of "
                    f"versions {', '.join(map(str, _VERSIONS))}"
                )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: no packed policy ({error!r})") from error
        if hashlib.sha256(text.encode()).hexdigest() != self._file.metadata.get("sha256"):
            raise CheckpointError(f"{path}: the header was changed; fetch or pack the file again")
        self.layers = {entry.path: entry for entry in self._entries()}
        self._attached = self._attached_names()
        self._check_names()

    def weight(self, name: str) -> kernels.PackedWeight:
        """A layer's packed weight, as views of the file if they are aligned.

        Raises:
            CheckpointError: its bytes were changed, or an invariant is violated.
        """
        entry = self.layers[name]
        arrays = {field: self._file[f"{name}.{field}"] for field in entry.specs}
        raw = next(raw for raw in self.header["layers"] if raw["path"] == name)
        described = {key: value for key, value in raw.items() if key != "sha256"}
        if _digest(described, arrays) != entry.sha256:
            raise CheckpointError(
                f"{self.path}: {name}: its bytes are not those that were written; fetch or pack "
                "the file again"
            )
        weight = kernels.PackedWeight(
            words=_split(arrays["words"], entry.word_shapes),
            scales=_split(arrays["scales"], entry.scale_shapes),
            index=arrays.get("index"),
            bias=arrays.get("bias"),
            segments=entry.segments,
            shape=entry.shape,
            group=entry.group,
            source_dtype=entry.source_dtype,
        )
        try:
            kernels.validate(weight, where=f"{self.path}: {name}")
        except InputError as error:
            raise CheckpointError(str(error)) from error
        return weight

    def inputs(self, name: str) -> kernels.LayerInputs:
        """What a layer does to its inputs.

        Raises:
            CheckpointError: the input scale is not positive and finite.
        """
        entry = self.layers[name]
        scale = self._file[f"{name}.input_scale"] if entry.input_scale else None
        try:
            return kernels.LayerInputs(entry.activation_bits, scale, entry.rotated)
        except InputError as error:
            raise CheckpointError(f"{self.path}: {name}: {error}") from error

    @property
    def tensors(self) -> Mapping[str, np.ndarray]:
        """All parameters that are not packed."""
        names = [name for name in self._others() if name not in self._attached]
        return _Chosen(self._file, names)

    @property
    def files(self) -> dict[str, bytes]:
        """What the policy's processor needs besides: file name -> content."""
        return {name: bytes(self._file[name]) for name in self._attached}

    def check_others(self) -> None:
        """Raises a `CheckpointError` if tensors that are not packed were changed."""
        digest = _Digest("others")
        for name in sorted(self._others()):
            digest.update(name, self._file[name])
        if digest.hexdigest() != self.header.get("sha256"):
            raise CheckpointError(
                f"{self.path}: the bytes of the tensors that are not packed are not those that "
                "were written; fetch or pack the file again"
            )

    @property
    def packed_bytes(self) -> int:
        """Stored bytes of the packed layers, as the allocator counts them."""
        return sum(entry.nbytes for entry in self.layers.values())

    @property
    def other_bytes(self) -> int:
        """Stored bytes of all other tensors, the attached files included."""
        specs = (self._file.spec(name) for name in self._others())
        return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in specs)

    def _others(self) -> list[str]:
        packed = {f"{e.path}.{field}" for e in self.layers.values() for field in e.specs}
        return [name for name in self._file if name not in packed]

    def _entries(self) -> Iterator[LayerEntry]:
        seen: set[str] = set()
        try:
            raw_entries = list(self.header["layers"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path}: the header lists no layers") from error
        for number, raw in enumerate(raw_entries):
            name = raw.get("path", number) if isinstance(raw, dict) else number
            try:
                entry = LayerEntry.from_json(raw)
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{self.path}: layer {name}: unusable entry ({error!r})"
                ) from error
            if entry.path in seen:
                raise CheckpointError(f"{self.path}: layer {name} is listed twice")
            seen.add(entry.path)
            yield entry

    def _attached_names(self) -> list[str]:
        names = self.header.get("files")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{self.path}: the header does not list the files that it holds")
        return names

    def _check_names(self) -> None:
        for entry in self.layers.values():
            for field in _FIELDS:
                name, expected = f"{entry.path}.{field}", entry.specs.get(field)
                found = self._file.spec(name) if name in self._file else None
                # A layer without a bias has no such tensor, and no other parameter has its name.
                if found != expected:
                    raise CheckpointError(
                        f"{self.path}: layer {entry.path}: {field} is {_spell(found)}, the segment "
                        f"table says {_spell(expected)}"
                    )
        for name in self._attached:
            if name not in self._file or self._file.spec(name)[0] != np.uint8:
                raise CheckpointError(f"{self.path}: {name} is missing")


class _Chosen(Mapping[str, np.ndarray]):
    """Some tensors of a file, read on request."""

    def __init__(self, file: Mapping[str, np.ndarray], names: list[str]):
        self._file, self._names = file, dict.fromkeys(names)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._file[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _describe(name: str, w: kernels.PackedWeight) -> dict[str, Any]:
    return {
        "path": name,
        "shape": list(w.shape),
        "segments": [[s.bits, s.rows, *s.code_map] for s in w.segments],
        "group": w.group,
        "source_dtype": w.source_dtype,
        "index": w.index is not None,
        "bias": None if w.bias is None else np.dtype(w.bias.dtype).name,
    }


def _flat(w: kernels.PackedWeight) -> dict[str, np.ndarray]:
    """The arrays of a weight, concatenated over segments."""
    arrays = {
        "words": np.concatenate([np.zeros(0, np.uint32), *(a.ravel() for a in w.words)]),
        "scales": np.concatenate([np.zeros(0, ml_dtypes.bfloat16), *(a.ravel() for a in w.scales)]),
    }
    if w.index is not None:
        arrays["index"] = np.asarray(w.index)
    if w.bias is not None:
        arrays["bias"] = np.asarray(w.bias)
    return arrays


def _split(flat: np.ndarray, shapes: list[tuple[int, int]]) -> tuple[np.ndarray, ...]:
    ends = np.cumsum([a * b for a, b in shapes])[:-1]
    return (
        tuple(part.reshape(shape) for part, shape in zip(np.split(flat, ends), shapes, strict=True))
        if shapes
        else ()
    )


def _total(shapes: list[tuple[int, int]]) -> tuple[int]:
    return (sum(a * b for a, b in shapes),)


class _Digest:
    """SHA-256 over a JSON value and arrays, names and shapes included, in the order of names."""

    def __init__(self, described: Any):
        self._sum = hashlib.sha256(json.dumps(described, sort_keys=True).encode())

    def update(self, name: str, array: np.ndarray) -> None:
        self._sum.update(f"{name}{array.dtype}{array.shape}".encode())
        self._sum.update(np.ascontiguousarray(array).view(np.uint8).data)

    def hexdigest(self) -> str:
        return self._sum.hexdigest()


def _digest(described: Any, arrays: Mapping[str, np.ndarray]) -> str:
    digest = _Digest(described)
    for name in sorted(arrays):
        digest.update(name, arrays[name])
    return digest.hexdigest()


def _narrow(tensor: np.ndarray) -> np.ndarray:
    narrow = tensor.dtype == np.float32 and source_bytes(tensor) == 2
    return tensor.astype(ml_dtypes.bfloat16) if narrow else tensor


def _spell(spec: tuple[np.dtype[Any], tuple[int, ...]] | None) -> str:
    return "missing" if spec is None else f"{spec[0]}{list(spec[1])}"
