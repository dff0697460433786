"""What the shipped model of sentences is worth, as its card and the docs quote it.

    python scripts/describe_verses.py [--samples 2000] [--word king]

Prints the variational bound on -log p of 2,000 training sentences and of all validation and test sentences (8 noised
states each), with standard errors over sentences; and of samples that are revealed one token per step the share of
words that the training text has not, of sentences with such a word, and of sentences with one given word. Takes four
minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import re

import jax
import numpy as np

import rnejax as rj
from rnejax.systems import text
from rnejax.systems.text_rewards import ContainsWord
from rnejax.training import likelihood_bound


def words(sequences: np.ndarray) -> list[list[str]]:
    return [re.findall("[a-z]+", text.decode(each)) for each in sequences]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--word", default="king")
    arguments = parser.parse_args()
    model = rj.load_model("verses")
    for split in text.SPLITS:
        x = text.load(split)[:2000]  # of the training sentences, which are in no order, a sample
        nats = np.asarray(likelihood_bound(jax.random.key(0), model, x, num_samples=8, batch_size=64).bound, np.float64)
        error = nats.std(ddof=1) / np.sqrt(len(nats))
        bits = 1 / (text.LENGTH * np.log(2))
        print(
            f"{split}: {nats.mean():.2f} ± {error:.2f} nats per sentence, "
            f"{nats.mean() * bits:.3f} ± {error * bits:.3f} bits per token, {len(x):,} sentences",
            flush=True,
        )
    one_by_one = model.with_process(model.process.one_token_per_step())
    times = rj.time_grid(one_by_one.process, text.LENGTH)
    x = np.asarray(rj.sample(jax.random.key(1), one_by_one, times, arguments.samples, progress=False).x)
    known = {word for sentence in words(text.load("train")) for word in sentence}
    unknown = [[word not in known for word in sentence] for sentence in words(x)]
    print(f"{len(x):,} samples: {np.mean(np.concatenate(unknown)):.1%} of the words are none of the training text's,")
    print(f"{np.mean([any(sentence) for sentence in unknown]):.1%} of the sentences have one;")
    for name, sequences in (("samples", x), ("training sentences", text.load("train"))):
        share = np.mean(np.asarray(ContainsWord(arguments.word)(sequences)) == 0)
        print(f"{share:.2%} of the {name} have {arguments.word!r}")


if __name__ == "__main__":
    main()
