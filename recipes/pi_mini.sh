#!/usr/bin/env bash
# Trains pi-mini for LIBERO-Spatial and LIBERO-Object by flow matching: behaviour cloning of the scripted expert, then two rounds
# of DAgger, in which the expert labels what the last policy visits. Starts are drawn at random: the official initial states are
# never seen.
#
#   recipes/pi_mini.sh FOLDER
#
# Needs `pip install -e '.[libero,rlds]'` and 16 GB of memory. Run it again to go on after an interruption: finished episodes, sets
# and checkpoints are kept.
set -euo pipefail
folder=${1:?usage: recipes/pi_mini.sh FOLDER}
suites=(libero_spatial libero_object)
runs=$folder/runs

collect() { # NAME OPTIONS...: one RLDS set of each suite
  local name=$1 suite
  shift
  for suite in "${suites[@]}"; do
    [ -d "$folder/data/$suite/${name}_$suite/1.0.0" ] ||
      qvla collect --sim "$suite" --out "$folder/data/$suite" --name "${name}_$suite" "$@"
  done
}

sets() { # NAMES...: their folders
  local name suite
  for name in "$@"; do
    for suite in "${suites[@]}"; do printf "$folder/data/$suite/${name}_$suite/1.0.0 "; done
  done
}

train() { # NAME OPTIONS...: one stage
  local name=$1
  shift
  [ -d "$runs/$name/policy" ] ||
    qvla train --model pi-mini --data $(sets demonstrations) --out "$runs/$name" --average-decay 0.995 --evaluate-every 500 "$@"
}

collect demonstrations --episodes-per-task 25 --seed 0
train cloned --seed 0 --steps 6000 --decay-steps 1000

collect visited1 --policy "$runs/cloned/policy" --seed 101 --heldout 0 --episodes-per-task 15
train dagger1 --seed 1 --steps 4000 --decay-steps 1000 --warmup-steps 50 --initial-policy "$runs/cloned/policy" \
  --more-data $(sets visited1)

collect visited2 --policy "$runs/dagger1/policy" --seed 202 --heldout 0 --episodes-per-task 15
train dagger2 --seed 2 --steps 4000 --decay-steps 2000 --warmup-steps 50 --initial-policy "$runs/dagger1/policy" \
  --more-data $(sets visited1 visited2)

echo "trained: $runs/dagger2/policy"
for suite in "${suites[@]}"; do
  echo "measure it: qvla evaluate --sim $suite --episodes-per-task 20 --policy $runs/dagger2/policy --out $folder/evaluation_$suite"
done
