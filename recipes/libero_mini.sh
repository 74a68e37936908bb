#!/usr/bin/env bash
# Trains libero-mini for LIBERO-Spatial: behaviour cloning of the scripted expert, then four rounds of DAgger, in which the
# expert labels what the last policy visits. Starts are drawn at random: the official initial states are never seen.
#
#   recipes/libero_mini.sh FOLDER
#
# Needs `pip install -e '.[libero,rlds]'` and 20 GB of memory; about 7 hours on two cores. Run it again to go on after an
# interruption: finished episodes, sets and checkpoints are kept.
set -euo pipefail
folder=${1:?usage: recipes/libero_mini.sh FOLDER}
data=$folder/data
runs=$folder/runs

collect() { # NAME OPTIONS...: one RLDS set
  local name=$1
  shift
  [ -d "$data/$name/1.0.0" ] || qvla collect --sim libero_spatial --out "$data" --name "$name" "$@"
}

train() { # NAME OPTIONS...: one stage
  local name=$1
  shift
  [ -d "$runs/$name/policy" ] || qvla train --data "$data/demonstrations/1.0.0" --out "$runs/$name" "$@"
}

sets() { printf "$data/%s/1.0.0 " "$@"; }

collect demonstrations --episodes-per-task 21 --seed 0
train cloned --seed 0 --steps 2500 --decay-steps 1500

refine=(--warmup-steps 50 --proprio-noise 0.004) # from trained weights; rotations have ranges of a few hundredths

acting=(--policy "$runs/cloned/policy" --seed 101)
collect visited1 "${acting[@]}" --episodes-per-task 15
train dagger1 "${refine[@]}" --initial-policy "$runs/cloned/policy" --seed 1 --steps 2000 --decay-steps 1000 \
  --more-data $(sets visited1)

acting=(--policy "$runs/dagger1/policy" --seed 202 --heldout 0)
collect visited2 "${acting[@]}" --tasks 1 2 3 4 7 9 --episodes-per-task 18
collect visited3 "${acting[@]}" --tasks 0 5 6 8 --episodes-per-task 6
train dagger2 "${refine[@]}" --initial-policy "$runs/dagger1/policy" --seed 2 --steps 3000 --decay-steps 1500 \
  --more-data $(sets visited1 visited2 visited3)

# The bowl in the drawer (task 4) is the hardest: more of it, from the expert as well.
acting=(--policy "$runs/dagger2/policy" --seed 303 --heldout 0)
collect drawer --seed 303 --heldout 0 --tasks 4 --episodes-per-task 40
collect visited4 "${acting[@]}" --tasks 4 --episodes-per-task 24
collect visited5 "${acting[@]}" --tasks 6 7 --episodes-per-task 20
collect visited6 "${acting[@]}" --tasks 1 2 3 9 --episodes-per-task 10
collect visited7 "${acting[@]}" --tasks 5 8 --episodes-per-task 6
collect demonstrations2 --seed 404 --heldout 0 --episodes-per-task 10
acting=(--policy "$runs/dagger2/policy" --seed 404 --heldout 0)
collect visited8 "${acting[@]}" --tasks 4 6 --episodes-per-task 16
collect visited9 "${acting[@]}" --tasks 0 1 2 3 5 7 8 9 --episodes-per-task 8
train dagger3 "${refine[@]}" --initial-policy "$runs/dagger2/policy" --seed 3 --steps 2800 --decay-steps 1500 \
  --more-data $(sets visited1 visited2 visited3 drawer visited4 visited5 visited6 visited7 demonstrations2 visited8 visited9)

# What the first policy visited has served its turn.
acting=(--policy "$runs/dagger3/policy" --seed 505 --heldout 0)
collect visited10 "${acting[@]}" --tasks 4 --episodes-per-task 40
collect visited11 "${acting[@]}" --tasks 5 --episodes-per-task 16
train dagger4 "${refine[@]}" --initial-policy "$runs/dagger3/policy" --seed 4 --steps 1000 --decay-steps 900 \
  --peak-learning-rate 0.0007 --more-data $(sets visited2 visited3 drawer visited4 visited5 visited6 visited7 \
  demonstrations2 visited8 visited9 visited10 visited11)

echo "trained: $runs/dagger4/policy"
echo "measure it: qvla evaluate --sim libero_spatial --episodes-per-task 20 --policy $runs/dagger4/policy --out $folder/evaluation"
