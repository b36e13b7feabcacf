"""CLIP's byte-pair tokenizer: captions to rows of 77 token ids.

B captions, L context length. Cleaning, splitting, merges and ids are those of the tokenizer published with
CLIP (Radford et al., 2021, section 2.4): lower-cased byte-level BPE with 49,152 entries, 49,408 words with
the two special ones. The cleaning is done in Python, as there; the `tokenizers` library splits and merges.
"""

from __future__ import annotations

import gzip
import html
import re
from collections.abc import Sequence
from pathlib import Path

import ftfy
import numpy as np
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as BpeTokenizer

VOCABULARY = Path(__file__).parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"
NUM_MERGES = 49_152 - 256 - 2  # the file goes on, CLIP uses this many
VOCAB_SIZE = 49_408
CONTEXT_LENGTH = 77
PAD = 0
SOT = 49_406
EOT = 49_407
SPECIAL = {"<|startoftext|>": SOT, "<|endoftext|>": EOT}
_WORD_END = "</w>"
_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# The same pieces of lower-cased ASCII.
_ASCII_PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")
_KEPT_WORDS = 1 << 16
_KEPT_LENGTH = 32


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes, in the order in which CLIP numbers them.

    Bytes that print keep their character and come first; the others get the code points from 256 on.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = 256 - len(printing)
    return [chr(code) for code in [*printing, *range(256, 256 + hidden)]]


def clean(caption: str) -> str:
    """Repair mojibake, resolve HTML entities (twice escaped ones too), fold white space, lower the case."""
    # Printable ASCII without an ampersand is what most captions are, and is in need of none of this.
    plain = caption.isascii() and caption.isprintable() and "&" not in caption
    text = caption if plain else html.unescape(html.unescape(ftfy.fix_text(caption)))
    return " ".join(text.split()).lower()


def load_merges() -> list[tuple[str, str]]:
    """The merges of the vocabulary file, best first."""
    with gzip.open(VOCABULARY, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : NUM_MERGES + 1]  # the first line is a header
    merges = [tuple(line.split()) for line in lines]
    return [(left, right) for left, right in merges]


def vocabulary() -> dict[str, int]:
    """The id of every word: bytes, bytes at a word's end, what the merges make, the special words."""
    symbols = byte_symbols()
    words = [*symbols, *(s + _WORD_END for s in symbols), *(a + b for a, b in load_merges()), *SPECIAL]
    return {word: number for number, word in enumerate(words)}


class Tokenizer:
    """Turns captions into token ids. Building one reads the vocabulary (about 0.1 s); pickles to nothing."""

    vocab_size = VOCAB_SIZE

    def __init__(self) -> None:
        model = models.BPE(vocab=vocabulary(), merges=load_merges(), end_of_word_suffix=_WORD_END)
        self._bpe = BpeTokenizer(model)
        self._known: dict[str, list[int]] = {}
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[()]]:
        return Tokenizer, ()

    def encode(self, captions: Sequence[str], context_length: int = CONTEXT_LENGTH) -> np.ndarray:
        """Token ids int64 [B, L]: SOT, the words, EOT, then 0. A caption that is cut still ends in EOT."""
        out_BL = np.full((len(captions), context_length), PAD, dtype=np.int64)
        for row_L, caption in zip(out_BL, captions, strict=True):
            ids = [SOT, *self._words(clean(caption))[: context_length - 2], EOT]
            row_L[: len(ids)] = ids
        return out_BL

    def _words(self, text: str) -> list[int]:
        if not any(word in text for word in SPECIAL):
            if not text.isascii():
                return self._bpe.encode(text, add_special_tokens=False).ids
            found: list[int] = []
            for piece in _ASCII_PIECES.findall(text):
                found += self._known.get(piece) or self._piece(piece)
            return found
        # Spelled out in a caption, the special words are one piece of the split, as in CLIP, but no merge
        # makes them.
        ids: list[int] = []
        for piece, _ in self._bpe.pre_tokenizer.pre_tokenize_str(text):  # type: ignore[union-attr]
            ids += (
                [SPECIAL[piece]]
                if piece in SPECIAL
                else [token.id for token in self._bpe.model.tokenize(piece)]
            )
        return ids

    def _piece(self, piece: str) -> list[int]:
        """Ids of one piece of the split, remembered: most words of a caption were in another one."""
        ids = self._bpe.encode(piece, add_special_tokens=False).ids
        if len(self._known) < _KEPT_WORDS and len(piece) <= _KEPT_LENGTH:
            self._known[piece] = ids
        return ids
