#!/usr/bin/env bash
# Proves, times and runs the packed product on the GPU that is there, in at most 8 minutes.
#
#     benchmarks/gpu.sh [FILE]
#
# A checkout, Python 3.11 or newer and an NVIDIA driver are enough: it installs into build/gpu (with
# pip, from WHEELS=FOLDER alone if that is set) unless PYTHON=... names an interpreter that has the
# package with JAX for CUDA. FILE, gpu.json by default, holds what was found, also where it stops
# early. Without a GPU, SMALL=1 interprets a few small cases.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
file=${1:-gpu.json}
limit=470 began=$SECONDS
if [ -z "${PYTHON:-}" ]; then
  for found in python3.11 python3.12 python3.13 python3; do
    "$found" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
  done
  [ -x build/gpu/bin/python ] || "$found" -m venv build/gpu
  PYTHON=build/gpu/bin/python
  options=(--quiet)
  [ -z "${WHEELS:-}" ] || options+=(--no-index --find-links "$WHEELS")
  extra=cuda
  [ -z "${SMALL:-}" ] || extra=aot-gpu
  "$PYTHON" -m pip install "${options[@]}" --editable ".[$extra]"
fi
arguments=(--out "$file")
if [ -n "${SMALL:-}" ]; then
  export JAX_PLATFORMS=cpu
  arguments+=(--small)
else
  # Whole weights leave no room for JAX's usual three quarters at once.
  export XLA_PYTHON_CLIENT_PREALLOCATE=false
fi
left=$((limit - (SECONDS - began)))
[ "$left" -gt 60 ] || { echo "$left seconds are left after the installation" >&2; exit 1; }
# Nothing begins in the last minute and a half: a chunk takes about as long with its compilation.
timeout "$left" "$PYTHON" benchmarks/gpu_check.py "${arguments[@]}" --seconds $((left - 90))
