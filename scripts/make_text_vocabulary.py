"""Make rnejax/systems/data/text_vocabulary.json, the word pieces of `rnejax.systems.text`, from its training verses.

    python scripts/make_text_vocabulary.py [--output rnejax/systems/data/text_vocabulary.json]

Byte pair encoding (Sennrich et al. 2016): start from characters, and again and again merge the two neighbours that
stand side by side most often within words. Needs the extra `text` and five seconds. The same text gives the same file,
to the byte: of pairs that are equally frequent the first in the alphabet is merged. The package `tokenizers` breaks
such ties otherwise (70 of its 2,012 merges are others, and it writes 97 words by other pieces); it is not used, since
it and what it needs are 40 MB for these thirty lines.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from rnejax.systems import text

Pair = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=text.VOCABULARY)
    arguments = parser.parse_args()
    arguments.output.write_text(vocabulary(), encoding="utf-8")
    print(f"{text.VOCAB_SIZE} tokens in {arguments.output}")


def vocabulary() -> str:
    """The file's content: the alphabet, then the merges in the order in which they were learned."""
    counts = Counter(word for verse in text.verses("train") for word in text.words(verse))
    alphabet = sorted({character for word in counts for character in word})
    merges = learn_merges(counts, text.VOCAB_SIZE - 1 - len(alphabet))  # the one is PAD
    lines = ",\n".join(f"  {json.dumps(merge)}" for merge in merges)
    return f'{{\n"alphabet": {json.dumps("".join(alphabet))},\n"merges": [\n{lines}\n]\n}}\n'


def learn_merges(counts: Mapping[str, int], number: int) -> list[Pair]:
    """The first `number` merges of byte pair encoding, for words that occur so many times.

    Raises:
        ValueError: if two different merges give one piece, which would then have two tokens.
    """
    spelled = {word: list(word) for word in counts}
    frequency: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[str]] = defaultdict(set)  # which words have the pair, or had it once

    def add(word: str, sign: int) -> None:
        for pair in pairwise(spelled[word]):
            frequency[pair] += sign * counts[word]
            places[pair].add(word)

    for word in counts:
        add(word, 1)
    merges: list[Pair] = []
    for _ in range(number):
        best = min(frequency, key=lambda pair: (-frequency[pair], pair))
        merges.append(best)
        for word in list(places[best]):
            add(word, -1)
            spelled[word] = merge(spelled[word], best)
            add(word, 1)
    if len({left + right for left, right in merges}) < number:
        raise ValueError("two merges give the same piece: the vocabulary would have fewer pieces than tokens")
    return merges


def merge(parts: list[str], pair: Pair) -> list[str]:
    """The parts with each occurrence of the pair, from left to right, made one."""
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


if __name__ == "__main__":
    main()
