"""The tokenizer equals CLIP's: known ids, and a plain-Python byte-pair encoder over captions in many
languages.

`clip_tokens.json` holds the captions and the ids (no padding, not cut) that `Reference` gave for them.
"""

from __future__ import annotations

import html
import json
import pickle
import unicodedata
from itertools import pairwise

import ftfy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading import tokenizer as tokenizer_module
from data_pipeline.loading.tokenizer import EOT, SOT, Tokenizer, load_merges
from tests.support.paths import CLIP_TOKENS

GOLDEN = CLIP_TOKENS
CONTRACTIONS = ("s", "t", "re", "ve", "m", "ll", "d")
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


class Reference:
    """CLIP's tokenizer written as plainly as it goes, from the description of what it does."""

    def __init__(self) -> None:
        printing = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
        self.byte_char = {b: chr(b) for b in printing}
        for byte in range(256):
            if byte not in self.byte_char:
                self.byte_char[byte] = chr(256 + len(self.byte_char) - len(printing))
        chars = list(self.byte_char.values())
        merges = load_merges()
        self.rank = {pair: rank for rank, pair in enumerate(merges)}
        self.ids: dict[str, int] = {}
        for word in [*chars, *(c + "</w>" for c in chars), *("".join(pair) for pair in merges), *SPECIAL]:
            self.ids[word] = len(self.ids)

    def __call__(self, caption: str) -> list[int]:
        text = html.unescape(html.unescape(ftfy.fix_text(caption)))
        text = " ".join(text.split()).lower()
        return [i for piece in self.split(text) for i in self.word(piece)]

    def split(self, text: str) -> list[str]:
        pieces, at = [], 0
        while at < len(text):
            end = self.piece_end(text, at)
            if end > at:
                pieces.append(text[at:end])
            at = max(end, at + 1)
        return pieces

    def piece_end(self, text: str, at: int) -> int:
        for word in SPECIAL:
            if text.startswith(word, at):
                return at + len(word)
        if text[at] == "'":
            for tail in CONTRACTIONS:
                found = text[at + 1 : at + 1 + len(tail)]
                # U+017F, the long s, is an s to whoever ignores case.
                if len(found) == len(tail) and found.replace("\u017f", "s") == tail:
                    return at + 1 + len(tail)
        kind = self.kind(text[at])
        if kind == "space":
            return at
        end = at + 1
        while kind != "number" and end < len(text) and self.kind(text[end]) == kind:
            end += 1
        return end

    @staticmethod
    def kind(char: str) -> str:
        if char.isspace():
            return "space"
        return {"L": "letter", "N": "number"}.get(unicodedata.category(char)[0], "other")

    def word(self, piece: str) -> list[int]:
        if piece in SPECIAL:
            return [self.ids[piece]]
        parts = [self.byte_char[byte] for byte in piece.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: self.rank.get(pair, len(self.rank)))
            if best not in self.rank:
                break
            merged, at = [], 0
            while at < len(parts):
                if tuple(parts[at : at + 2]) == best:
                    merged.append("".join(best))
                    at += 2
                else:
                    merged.append(parts[at])
                    at += 1
            parts = merged
        return [self.ids[part] for part in parts]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def framed(ids: list[int], length: int = 77) -> list[int]:
    row = [SOT, *ids[: length - 2], EOT]
    return row + [0] * (length - len(row))


# Ids that CLIP's own tokenizer is known to give.
KNOWN = {
    "a diagram": [320, 22697],
    "Hello world!": [3306, 1002, 256],
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "": [],
}


@pytest.mark.parametrize("caption", KNOWN)
def test_known_ids(caption: str, tokenizer: Tokenizer, reference: Reference) -> None:
    assert reference(caption) == KNOWN[caption]
    assert tokenizer.encode([caption]).tolist() == [framed(KNOWN[caption])]


def test_golden_captions(tokenizer: Tokenizer, reference: Reference) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    captions, ids = golden["captions"], golden["ids"]
    assert len(captions) == len(ids) >= 300
    assert [reference(caption) for caption in captions] == ids
    assert tokenizer.encode(captions).tolist() == [framed(row) for row in ids]
    assert sum(len(row) > 75 for row in ids) >= 5  # some are cut


@given(
    caption=st.text(
        # Letters, marks, numbers, punctuation, symbols, white space; assigned in old Unicode versions too.
        st.characters(codec="utf-8", categories=["L", "M", "N", "P", "S", "Z", "Cc"], max_codepoint=0x24FF),
        max_size=60,
    )
)
@settings(max_examples=300, deadline=None)
def test_any_text(caption: str) -> None:
    assert _TOKENIZER.encode([caption]).tolist() == [framed(_REFERENCE(caption))]


@given(caption=st.text(st.characters(codec="ascii"), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_ascii(caption: str) -> None:
    """Its words are remembered: the second time is the first time again."""
    expected = [framed(_REFERENCE(caption))] * 2
    assert _TOKENIZER.encode([caption] * 2).tolist() == expected


def test_a_full_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_KEPT_WORDS", 2)
    captions = ["a photo of a cat", "a diagram, isn't it?", "x" * 100] * 2
    assert Tokenizer().encode(captions).tolist() == [framed(_REFERENCE(caption)) for caption in captions]


_TOKENIZER, _REFERENCE = Tokenizer(), Reference()


def test_shape_length_and_pickle(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(["a diagram", "word " * 100, "x"], context_length=16)
    assert tokens.shape == (3, 16)
    assert tokens.dtype == np.int64
    assert tokens[1].tolist() == [SOT, *[2653] * 14, EOT]
    assert tokens.max() == EOT == tokenizer.vocab_size - 1
    assert tokenizer.encode([]).shape == (0, 77)
    payload = pickle.dumps(tokenizer)
    assert len(payload) < 100
    assert np.array_equal(pickle.loads(payload).encode(["a diagram"]), tokenizer.encode(["a diagram"]))
