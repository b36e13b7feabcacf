"""Captions: which text of a row becomes one, how repetitive it is, and in which language it is written.

None of this is from the paper, which takes its captions as prepared. Language is told by py3langid (BSD-3;
139 languages, its model comes with it), a naive Bayes model over byte n-grams: Lui and Baldwin,
"Cross-domain Feature Selection for Language Identification", IJCNLP 2011.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from cluster.errors import ConfigError
from data_pipeline.keyed import uniform

CaptionChoice = Literal["first", "draw", "join"]

_UNSEEN = frozenset({"Cc", "Cf", "Mn"})  # control, format (zero-width and byte order marks too), combining
_DRAW_STREAM = 0x63617074  # of the draws that share a seed; any fixed number would do


def visible(text: str) -> bool:
    """Whether anything of the text can be seen: more than white space and characters of no width."""
    return any(not c.isspace() and unicodedata.category(c) not in _UNSEEN for c in text)


def choose_caption(texts: Sequence[str | None], choice: CaptionChoice, sample_id: int, seed: int) -> str:
    """The caption of a row that has several texts; "" where all are null or blank, see `visible`.

    first: the first that is not blank. draw: one of those that are not blank, each as likely, by a number
    that depends on (seed, sample id) alone, so the same in every run. join: all that are not blank, in order,
    with a space between.
    """
    filled = [text for text in texts if text is not None and visible(text)]
    if not filled:
        return ""
    if choice == "join":
        return " ".join(filled)
    if choice == "first" or len(filled) == 1:
        return filled[0]
    return filled[int(uniform(seed, 0, sample_id, _DRAW_STREAM) * len(filled))]


def word_share(words: Sequence[str]) -> float:
    """Share of the most frequent word, upper and lower case being one."""
    return max(Counter(word.casefold() for word in words).values()) / len(words)


def repeated_runs(words: Sequence[str], length: int = 3) -> float:
    """Share of the runs of `length` words that stood before in the same text; 0 for shorter ones."""
    folded = [word.casefold() for word in words]
    runs = [tuple(folded[i : i + length]) for i in range(len(folded) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def detect_language(text: str) -> tuple[str, float]:
    """(ISO 639 code, probability) of the most likely language; short texts have low probabilities."""
    return _detector().classify(text)


def check_languages(codes: Sequence[str]) -> None:
    """Raise ConfigError if the detector does not know one of `codes`."""
    unknown = sorted(set(codes) - set(_detector().labels)) if codes else []
    if unknown:
        raise ConfigError(
            f"no language detector for {', '.join(unknown)}; it knows "
            f"{', '.join(sorted(_detector().labels))}: change filters.caption_languages"
        )


@cache
def _detector() -> Any:
    # Imported here: the model takes half a second and 100 MB, which only those who ask for it should pay.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
