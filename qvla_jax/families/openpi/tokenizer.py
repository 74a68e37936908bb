"""PaliGemma's tokenizer, from the file that the user has, and openpi's prompts."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from qvla_jax.array_typing import Bool, Float, Int
from qvla_jax.checkpoints.files import TOKENIZER_FILE
from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.families.libero_words import LIBERO_WORDS

# Where openpi gets it from, and the same as a tokenizers file.
SOURCES: Final = (
    "gs://big_vision/paligemma_tokenizer.model, which openpi keeps as "
    "~/.cache/openpi/big_vision/paligemma_tokenizer.model, or tokenizer.json of "
    "google/paligemma-3b-pt-224"
)
# Its names in directories and files of ours: a SentencePiece model, or a tokenizers file.
MODEL_FILE: Final = "tokenizer.model"
FILES: Final = (MODEL_FILE, TOKENIZER_FILE)
# Lower edges of the 256 bins of a normalized state; one below the first is bin -1, as there.
_BINS: Final = np.linspace(-1.0, 1.0, 257)[:-1]
_PAD: Final = 0
# PaliGemma's tokens that are no text.
_SPECIAL: Final = ("<pad>", "<eos>", "<bos>", "<unk>")


class Encoder(Protocol):
    """Text -> ids, without special tokens."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ...


@dataclasses.dataclass(frozen=True)
class PromptTokenizer:
    """Writes prompts as openpi does, and pads or cuts their tokens to one length."""

    encoder: Encoder
    bos: int
    max_tokens: int
    # Ids of text are below this.
    vocab_size: int

    @classmethod
    def from_file(cls, path: Path, *, max_tokens: int) -> "PromptTokenizer":
        """Reads a SentencePiece model (`.model`) or a tokenizers file (`.json`).

        Raises:
            CheckpointError: the file is missing or damaged; the message says where to get it.
            InputError: SentencePiece is not installed.
        """
        name, content = read_file(path)
        return cls.from_content(name, content, where=str(path), max_tokens=max_tokens)

    @classmethod
    def from_content(
        cls, name: str, content: bytes, *, where: str, max_tokens: int
    ) -> "PromptTokenizer":
        """As `from_file`, with the content of one of `FILES`; errors name `where`."""
        if name == MODEL_FILE:
            encoder = _sentencepiece(content, where)
            return cls(encoder, encoder.bos, max_tokens, encoder.vocab_size)
        try:
            tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{where}: not a tokenizers file ({error})") from error
        bos = tokenizer.token_to_id("<bos>")
        if bos is None:
            raise CheckpointError(f"{where}: has no token '<bos>'; the tokenizer is {SOURCES}")
        # Tokens added after those of text, such as `<image>`, have no row in the embeddings.
        return cls(_Tokenizers(tokenizer), bos, max_tokens, tokenizer.get_vocab_size(False))

    def __call__(
        self, prompt: str, state: Float[np.ndarray, " p"] | None = None
    ) -> tuple[Int[np.ndarray, " t"], Bool[np.ndarray, " t"]]:
        """Token ids of a prompt, and which are not padding.

        A prompt that is too long is cut after the last token that fits, with a warning, as in
        openpi.

        Args:
            prompt: the instruction.
            state: normalized and not padded, to be written into the prompt; None where the policy
                does not read it there.
        """
        text = prompt.strip().replace("_", " ").replace("\n", " ")
        if state is None:
            # The line break is the start of the answer.
            ids = [self.bos, *self.encoder.encode(text), *self.encoder.encode("\n")]
        else:
            bins = " ".join(map(str, np.digitize(state, _BINS) - 1))
            ids = [self.bos, *self.encoder.encode(f"Task: {text}, State: {bins};\nAction: ")]
        if len(ids) > self.max_tokens:
            logging.getLogger(__name__).warning(
                "prompt %r has %d tokens and is cut to %d", prompt, len(ids), self.max_tokens
            )
        ids = ids[: self.max_tokens]
        padded = np.full(self.max_tokens, _PAD, np.int32)
        padded[: len(ids)] = ids
        return padded, np.arange(self.max_tokens) < len(ids)


@dataclasses.dataclass(frozen=True)
class _Tokenizers:
    tokenizer: tokenizers.Tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


@dataclasses.dataclass(frozen=True)
class _SentencePiece:
    processor: Any
    bos: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)


def read_file(path: Path) -> tuple[str, bytes]:
    """Which of `FILES` a tokenizer is, and its content.

    Raises:
        CheckpointError: it is missing; the message says where to get it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the tokenizer is {SOURCES}")
    return TOKENIZER_FILE if path.suffix == ".json" else MODEL_FILE, path.read_bytes()


def _sentencepiece(content: bytes, where: str) -> _SentencePiece:
    try:
        import sentencepiece
    except ImportError:
        raise InputError(
            f"{where}: a SentencePiece model needs the package sentencepiece: pip install "
            "'qvla-jax[openpi]'; or give the tokenizer.json of google/paligemma-3b-pt-224"
        ) from None
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except (RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{where}: not a SentencePiece model ({error}); the tokenizer is {SOURCES}"
        ) from error
    return _SentencePiece(processor, processor.bos_id(), processor.vocab_size())


def word_tokenizer(words: Sequence[str] = LIBERO_WORDS) -> tokenizers.Tokenizer:
    """A tokenizer with one token for each of `words`, for small policies; others are `<unk>`.

    Line breaks are no tokens, nor is a space.
    """
    vocabulary = {token: number for number, token in enumerate((*_SPECIAL, *words))}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made
