#!/usr/bin/env bash
# From openpi's published pi0.5 for LIBERO to a packed policy behind openpi's websocket protocol.
#
#   recipes/pi05_libero.sh FOLDER
#
# Needs the network and `pip install 'qvla-jax[serve,openpi]' gsutil`; 20 GB of disk (the checkpoint, and once as much for its
# decoded weights in TMPDIR). Run it again to go on after an interruption: what is there is kept.
set -euo pipefail
folder=${1:?usage: recipes/pi05_libero.sh FOLDER}
checkpoint=$folder/pi05_libero
tokenizer=$folder/paligemma_tokenizer.model
policy=$folder/pi05_libero.qvla

# Everything but the optimizer's state. openpi keeps the same files in ~/.cache/openpi; a link to them does as well.
for part in params assets; do
  mkdir -p "$checkpoint/$part"
  gsutil -m rsync -r "gs://openpi-assets/checkpoints/pi05_libero/$part" "$checkpoint/$part"
done
# No checkpoint contains the tokenizer, which is PaliGemma's.
[ -e "$tokenizer" ] || gsutil cp gs://big_vision/paligemma_tokenizer.model "$tokenizer"

qvla inspect "$checkpoint" --preset pi05_libero --tokenizer "$tokenizer"

# 4 bits a weight on average, by weight error. `qvla run` allocates by effect on the actions; it needs frames of the robot.
[ -e "$policy" ] || qvla pack --model "$checkpoint" --preset pi05_libero --tokenizer "$tokenizer" \
  --mean-bits 4 --embedding-bits 8 --file "$policy"
qvla inspect "$policy"

echo "next, in a checkout of openpi: python examples/libero/main.py --args.host 127.0.0.1 --args.port 8000"
qvla serve --policy "$policy" --port 8000
