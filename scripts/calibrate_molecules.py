"""Give a stored model of a molecule the covariance of an elastic network, measured on its own reference samples.

    python scripts/calibrate_molecules.py MODEL.safetensors --reference alanine_dipeptide --temperature 800 [--knots 1]

The file is written anew; all else in it stays. `rnejax train` with `calibration: elastic_network` does the same at the
end of training, on its validation examples.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
from benchmark_molecules import InChunks

import rnejax as rj
from rnejax.checkpoint import load_metadata
from rnejax.systems.references import load_reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--temperature", type=float, required=True)
    parser.add_argument("--knots", type=int, default=12)
    parser.add_argument("--times", type=int, default=24)
    parser.add_argument("--samples", type=int, default=128)
    options = parser.parse_args()
    stored, model, header = (
        load_reference(options.reference, options.temperature),
        rj.load_model(options.model),
        load_metadata(options.model),
    )
    began = time.perf_counter()
    found = rj.calibrate_elastic_network(
        jax.random.key(5),
        rj.load_model(options.model, fn=InChunks(model.fn)),
        rj.time_grid(model.process, options.times),
        stored.x[0][: options.samples],
        kinds=getattr(stored.system, "kinds", None),
        num_knots=options.knots,
        num_samples=options.samples,
    )
    print(f"springs in {time.perf_counter() - began:.0f} s")
    network = (header["network"]["name"], header["network"]["arguments"])
    kept = {name: value for name, value in header.items() if name not in ("diffusion", "network")}
    rj.save_model(options.model, model.with_covariance(found.covariance), network=network, metadata=kept)


if __name__ == "__main__":
    main()
