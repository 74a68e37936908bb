"""The pictures of a camera as a data set stores them, decoded on request.

Encoded files are decoded here and not by TensorFlow, so that every file format gives the same
pixels. As in TensorFlow, they become three 8-bit channels: grayscale is repeated, palettes are
looked up, transparency is dropped, CMYK is converted. Anything else stored in place of a picture
raises a `DatasetError` that names set, episode, step and feature.
"""

import abc
import io
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, Self, TypeAlias, TypeVar

import numpy as np

from qvla_jax.array_typing import NpArray, UInt8
from qvla_jax.errors import DatasetError

Picture: TypeAlias = UInt8[NpArray, "height width 3"]
_T = TypeVar("_T")

# What TensorFlow's decoder of pictures reads; Pillow reads many more, some by calling programs.
_FORMATS: Final = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
# 8-bit modes; Pillow clips the others ("I;16", "I", "F") when it converts them.
_MODES: Final = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")
# Offset of the bit depth in a PNG file.
_PNG_BIT_DEPTH: Final = 24


class LazyPictures(abc.ABC):
    """Pictures that stay in their file until they are asked for."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of pictures."""

    @abc.abstractmethod
    def __getitem__(self, kept: slice) -> Self:
        """The same with only some of the pictures."""

    @abc.abstractmethod
    def only(self, steps: Collection[int]) -> "Sequence[bytes | NpArray] | LazyPictures":
        """What `Pictures.only` keeps of them."""

    @abc.abstractmethod
    def read(self, steps: Sequence[int]) -> list[bytes | NpArray | DatasetError]:
        """The pictures of some steps, read in one pass.

        Returns:
            Each as `Pictures.stored` has it, or the error why it cannot be read.
        """


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The pictures of one camera in an episode, one per step.

    Attributes:
        stored: JPEG or PNG files (also BMP, GIF, WebP), or u8[height, width, 3].
        size: height and width that the data set declares; None if it does not.
        feature: the feature that they are stored in.
        episode: names set and episode in errors.
        first_step: number of the first step in the record.
    """

    stored: Sequence[bytes | NpArray] | LazyPictures
    size: tuple[int | None, int | None]
    feature: str
    episode: str
    first_step: int

    def __len__(self) -> int:
        return len(self.stored)

    def only(self, steps: Collection[int]) -> "Pictures":
        """The same with only the pictures of some steps; the others are empty."""
        if isinstance(self.stored, LazyPictures):
            return replace(self, stored=self._of_file(self.stored.only, steps))
        kept = [file if step in steps else b"" for step, file in enumerate(self.stored)]
        return replace(self, stored=kept)

    def decode(self, steps: Sequence[int]) -> list[Picture]:
        """The pictures of some steps.

        Raises:
            DatasetError: one is not a picture, not 8 bits deep, or not of the declared size.
        """
        if isinstance(self.stored, LazyPictures):
            found = self._of_file(self.stored.read, steps)
        else:
            found = [self.stored[step] for step in steps]
        return [self._decoded(step, one) for step, one in zip(steps, found, strict=True)]

    def _of_file(self, read: Callable[[Any], _T], steps: Collection[int]) -> _T:
        try:
            return read(steps)
        except DatasetError as error:
            raise DatasetError(f"{self.episode}: {self.feature}: {error}") from error

    def _decoded(self, step: int, stored: bytes | NpArray | DatasetError) -> Picture:
        try:
            if isinstance(stored, DatasetError):
                raise stored
            image = _decode(stored)
            self._check_size(image.shape[:2], self.size, "the data set declares")
        except DatasetError as error:
            raise DatasetError(f"{self._where(step)}: {error}") from error
        return image

    def decode_all(self) -> UInt8[NpArray, "t height width 3"]:
        """The pictures of all steps, which must have the same size."""
        images = _decoded([(self, step) for step in range(len(self))])
        for step, image in enumerate(images):
            self.check_same_size(step, image.shape[:2], (0, images[0].shape[:2]))
        return np.stack(images)

    def check_same_size(
        self, step: int, size: tuple[int, ...], other: tuple[int, tuple[int, ...]]
    ) -> None:
        """Raises DatasetError if a picture's size is not that of another step, (step, size)."""
        try:
            self._check_size(size, other[1], f"step {other[0] + self.first_step} has")
        except DatasetError as error:
            raise DatasetError(f"{self._where(step)}: {error}") from error

    def _where(self, step: int) -> str:
        return f"{self.episode}: step {step + self.first_step}: {self.feature}"

    @staticmethod
    def _check_size(found: tuple[int, ...], expected: tuple[int | None, ...], because: str) -> None:
        if any(e not in (None, f) for f, e in zip(found, expected, strict=True)):
            raise DatasetError(
                f"a picture of {found[0]} x {found[1]} pixels, but {because} "
                f"{' x '.join('any' if e is None else str(e) for e in expected)}"
            )


def decode_each(
    chosen: Sequence[tuple[Pictures, int]],
) -> UInt8[NpArray, "b height width 3"] | list[Picture]:
    """Decodes pictures, each given as (pictures of its camera, step); a list if sizes differ."""
    images = _decoded(chosen)
    same = len({image.shape for image in images}) == 1
    return np.stack(images) if same else images


def check_each(chosen: Sequence[tuple[Pictures, int]]) -> None:
    """Decodes pictures as `decode_each` does and keeps none.

    Raises:
        DatasetError: one does not decode, or pictures of one episode and camera differ in size.
    """
    passes = _passes(chosen)
    first: dict[int, tuple[int, tuple[int, ...]]] = {}
    for one, sizes in zip(passes, _threads().map(_sizes, passes), strict=True):
        for step, size in zip(one.steps, sizes, strict=True):
            one.pictures.check_same_size(
                step, size, first.setdefault(id(one.pictures), (step, size))
            )


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """Steps that one thread decodes, and where each was asked for."""

    pictures: Pictures
    steps: list[int]
    places: list[int]


def _passes(chosen: Iterable[tuple[Pictures, int]]) -> list[_Pass]:
    """One for each picture, or for each file that holds several."""
    passes: list[_Pass] = []
    by_file: dict[int, _Pass] = {}
    for place, (pictures, step) in enumerate(chosen):
        known = by_file.get(id(pictures.stored))
        if known is not None:
            known.steps.append(step)
            known.places.append(place)
            continue
        passes.append(_Pass(pictures=pictures, steps=[step], places=[place]))
        if isinstance(pictures.stored, LazyPictures):
            by_file[id(pictures.stored)] = passes[-1]
    return passes


def _decoded(chosen: Iterable[tuple[Pictures, int]]) -> list[Picture]:
    passes = _passes(chosen)
    images: dict[int, Picture] = {}
    for one, found in zip(
        passes, _threads().map(lambda one: one.pictures.decode(one.steps), passes), strict=True
    ):
        images.update(zip(one.places, found, strict=True))
    return [image for _, image in sorted(images.items())]


def _sizes(one: _Pass) -> list[tuple[int, ...]]:
    return [image.shape[:2] for image in one.pictures.decode(one.steps)]


@cache
def _threads() -> ThreadPoolExecutor:
    """Decoders release the GIL."""
    return ThreadPoolExecutor(thread_name_prefix="decode")


def _decode(stored: bytes | NpArray) -> Picture:
    if isinstance(stored, np.ndarray) and stored.dtype == object and stored.size == 1:
        stored = stored.item()
    if isinstance(stored, np.ndarray):
        if stored.dtype != np.uint8 or stored.ndim != 3 or stored.shape[-1] != 3:
            raise DatasetError(
                f"expected a picture uint8 [H, W, 3], found {stored.dtype} {list(stored.shape)}"
            )
        return stored
    if not stored:
        raise DatasetError(
            "the picture is missing (an empty string, which the public loaders read as black); "
            "leave the episode out when the data set is built"
        )
    return _decode_file(stored)


def _decode_file(file: bytes) -> Picture:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file), formats=_FORMATS) as image:
            image.verify()  # The checksums of PNG, which decoding ignores; it needs a new file.
        with Image.open(io.BytesIO(file), formats=_FORMATS) as image:
            deep = image.format == "PNG" and file[_PNG_BIT_DEPTH] > 8
            if not deep and image.mode in _MODES:
                return np.asarray(image.convert("RGB"))
            found = f"{image.format} of mode {image.mode}{', 16 bits' if deep else ''}"
    except Exception as error:
        # Decoders can raise almost anything on damaged files.
        kind = "the file is damaged"
        if isinstance(error, Image.UnidentifiedImageError):
            kind = f"none of {', '.join(_FORMATS)}"
        raise DatasetError(
            f"the picture does not decode: {kind} ({len(file)} bytes that begin with "
            f"{file[:8].hex(' ')}; {type(error).__name__}); build the data set again"
        ) from error
    raise DatasetError(f"expected a picture with 8 bits for each channel, found {found}")
