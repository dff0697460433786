"""The numbers of the corpus of sentences, and what counting alone makes of it, as the pages of the docs quote them.

    python scripts/describe_text.py [--orders 5]

Prints, as markdown, how many sentences each part has, their mean length and the share of PAD; and the cross-entropy of
count models, of the token given up to four before it, on the validation and the test sentences: per sentence in nats,
and in bits for each of the 32 tokens, PAD included. In brackets, standard errors over sentences. A model of the text
should be well below. Takes seconds.

The count models are interpolated (Witten and Bell 1991): with c(h w) how often w followed the k tokens h in the
training sentences, and d(h) the number of different tokens that did,

    p_k(w | h) = [c(h w) + d(h) p_{k-1}(w | h without its first token)] / [c(h) + d(h)],

down to the uniform law; what was never followed by anything leaves p_{k-1}. A sentence ends with its first PAD, or when
it is full; all that follows is certain. Before its first token stands a sign of its own.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np

from rnejax.systems import text

BASE = text.VOCAB_SIZE + 1
"""The tokens and the sign before the first one: contexts are numbers to this base."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=5, help="the most tokens that are counted together, up to 6")
    arguments = parser.parse_args()
    if not 1 <= arguments.orders <= 6:
        parser.error(f"--orders must be from 1 to 6: got {arguments.orders}")
    rows = {split: text.load(split) for split in text.SPLITS}

    print("| part | sentences | mean tokens | PAD |\n|---|---|---|---|")
    for split, part in rows.items():
        lengths = np.sum(part != text.PAD, axis=1)
        mean = f"{lengths.mean():.2f} ({lengths.std() / np.sqrt(len(part)):.2f})"
        print(f"| {split} | {len(part):,} | {mean} | {np.mean(part == text.PAD):.1%} |")

    tables = [count(rows["train"], order) for order in range(1, arguments.orders + 1)]
    print(
        f"\n| tokens counted together | part | nats per sentence | bits per token of the {text.LENGTH} |\n"
        "|---|---|---|---|"
    )
    in_bits = 1 / (text.LENGTH * np.log(2))
    for split in ("validation", "test"):
        for order in range(1, arguments.orders + 1):
            losses = -log_probabilities(rows[split], tables[:order])
            mean, error = losses.mean(), losses.std() / np.sqrt(len(losses))
            print(f"| {order} | {split} | {mean:.2f} ({error:.2f}) | {mean * in_bits:.4f} ({error * in_bits:.4f}) |")


class Counts(NamedTuple):
    """Of contexts of one length: `followed`, code * BASE + token, and how often; `contexts`, how often each was there,
    and how many different tokens followed it. Codes are in order.
    """

    followed: np.ndarray
    followed_count: np.ndarray
    contexts: np.ndarray
    context_count: np.ndarray
    context_types: np.ndarray


def count(rows: np.ndarray, order: int) -> Counts:
    """The counts of the tokens of sentences, shape (n, length), given the order - 1 tokens before each."""
    codes, is_event = _contexts(rows, order - 1), _is_event(rows)
    followed, followed_count = np.unique((codes * BASE + rows)[is_event], return_counts=True)
    contexts, context_count = np.unique(codes[is_event], return_counts=True)
    context_types = np.bincount(np.searchsorted(contexts, followed // BASE), minlength=len(contexts))
    return Counts(followed, followed_count, contexts, context_count, context_types)


def log_probabilities(rows: np.ndarray, tables: list[Counts]) -> np.ndarray:
    """log p of each sentence, in nats, shape (n,), from the tables of orders 1, 2, ..."""
    p = np.full(rows.shape, 1 / text.VOCAB_SIZE)
    for order, table in enumerate(tables, start=1):
        codes = _contexts(rows, order - 1)
        total = _look_up(codes, table.contexts, table.context_count)
        types = _look_up(codes, table.contexts, table.context_types)
        times = _look_up(codes * BASE + rows, table.followed, table.followed_count)
        p = np.where(total > 0, (times + types * p) / np.maximum(total + types, 1), p)
    return np.sum(np.log(p), axis=1, where=_is_event(rows))


def _contexts(rows: np.ndarray, length: int) -> np.ndarray:
    """The tokens before each one as a number, shape (n, length of a row)."""
    start = np.full((len(rows), length), text.VOCAB_SIZE)
    before = np.concatenate([start, rows], axis=1).astype(np.int64)
    codes = np.zeros(rows.shape, np.int64)
    for i in range(length):
        codes = codes * BASE + before[:, i : i + rows.shape[1]]
    return codes


def _is_event(rows: np.ndarray) -> np.ndarray:
    """Whether anything is open about a token: it is not, after the first PAD."""
    is_pad = rows == text.PAD
    return np.cumsum(is_pad, axis=1) - is_pad == 0


def _look_up(codes: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    places = np.minimum(np.searchsorted(known, codes), len(known) - 1)
    return np.where(known[places] == codes, values[places], 0)


if __name__ == "__main__":
    main()
