"""A word-level tokenizer for small policies, behind the same interface as Llama's.

It knows the words of the instructions of every LIBERO suite; others become `<unk>`.
"""

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from qvla_jax.checkpoints.files import TOKENIZER_FILE
from qvla_jax.families.libero_words import LIBERO_WORDS

# Ids 0 to 4. The last one represents Llama's lone word-boundary piece, OpenVLA's "empty token".
SPECIAL_TOKENS = ("<PAD>", "<s>", "</s>", "<unk>", "\u2581")


def word_tokenizer(words: tuple[str, ...] = LIBERO_WORDS) -> tokenizers.Tokenizer:
    """A tokenizer with one token for each of `words`, BOS in front."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return tokenizer


def word_files() -> dict[str, bytes]:
    """The files of a policy with this tokenizer: name -> content."""
    return {TOKENIZER_FILE: word_tokenizer().to_str().encode()}
