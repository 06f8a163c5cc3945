#!/usr/bin/env bash
# From a fresh clone to pictures: makes the environment, renders the example cases with the shipped pocket weights, trains the
# adapter for a short while from the shipped base, and writes outputs/quickstart/report.html.
# STEPS (default 240) sets the length of the training.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
STEPS="${STEPS:-240}"
out=outputs/quickstart
bash scripts/environment.sh
python=.venv/bin/python
rm -rf "$out"

echo "quickstart 1/4: rendering the example cases with the shipped weights"
"$python" inference.py --output-dir "$out/examples" --report

echo "quickstart 2/4: drawing a small training set"
"$python" scripts/make_pocket_world.py --output "$out/data" --num-samples 400 --num-heldout 48

echo "quickstart 3/4: training a fresh adapter for $STEPS steps"
bash train.sh configs/pocket.json \
  --set data.root="$out/data" --set training.output_dir="$out/run" --set training.max_steps="$STEPS" \
  --set training.log_every=2 --set training.checkpoint_every="$STEPS" --set validation.every="$STEPS"

echo "quickstart 4/4: writing the report"
"$python" scripts/report.py --examples "$out/examples" --run "$out/run" --output "$out/report.html"
echo "open $out/report.html in a browser; the pictures are in $out/examples"
