"""Where tokens end in the text that they spell, for samples that come without their text."""

import logging
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from carryon.cache.corpus.vocabulary.token_bytes import token_bytes
from carryon.cache.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class CharEnds:
    """Ends of tokens in characters of the text that they spell, special tokens included."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, vocab_size: int) -> None:
        """Count the characters that begin in each token.

        Where tokens are not bytes of a text, ends are unknown: 0, which the log says.

        Args:
            tokenizer: of the base.
            vocab_size: token ids are below it.
        """
        begun = np.zeros(vocab_size, dtype=np.int32)
        try:
            spelled = token_bytes(tokenizer, vocab_size=vocab_size)
        except InputError as error:
            logger.warning(f"ends of tokens in characters are unknown and stored as 0: {error}")
            spelled = ()
        for number, content in enumerate(spelled):
            # the first byte of a character is not 10xxxxxx
            begun[number] = sum(byte & 0xC0 != 0x80 for byte in content or b"")
        if spelled:
            for number, token in tokenizer.added_tokens_decoder.items():
                if number < vocab_size:
                    begun[number] = len(token.content)
        self._begun = begun

    def __call__(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return [T] int32 ends of tokens [T], whose ids are below the size of the vocabulary."""
        return np.cumsum(self._begun[tokens], dtype=np.int32)
