#!/usr/bin/env bash
# Set up and run the main job: the first README command. Classifier-free guidance, uncorrected against corrected, on the
# diffusion model of handwritten digits that is shipped. Arguments go to the run, for example:
# bash scripts/digits.sh --target.scale 4 --output outputs/stronger
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh digits
.venv/bin/rnejax steer configs/digits_guidance.yaml --output outputs/digits_guidance "$@"
