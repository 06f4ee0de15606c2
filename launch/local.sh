#!/usr/bin/env bash
# Trains on this machine, on all devices that it has; starts again where a signal stopped the run.
#
#   launch/local.sh [--dry_run] [--processes=N] -- --flagfile=experiments/quickstart.flags
#
# --processes=N  starts N processes that find each other on this machine.
# --dry_run      shows every command and runs none.
set -euo pipefail
# ---- What to change -----------------------------------------------------------------------------
: "${PYTHON:=python3.11}"        # Makes the environment.
: "${VENV:=.venv}"               # Made where it is missing; the project is installed into it.
: "${EXTRAS:=}"                  # "gpu" or "tpu": which jax to install.
: "${PROCESSES:=1}"              # On this machine.
: "${PORT:=8476}"                # Where they meet.
: "${RESTART_DELAY:=5}"          # Seconds.
# -------------------------------------------------------------------------------------------------
HERE=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/lib.sh
source "$HERE/lib.sh"
parse processes= -- "$@"

if [[ ! -x $VENV/bin/python ]]; then
  run "$PYTHON" -m venv "$VENV"
  run "$VENV/bin/pip" install -q "$HERE/..${EXTRAS:+[$EXTRAS]}"
fi

train() {
  local command=("$VENV/bin/python" -m vixml_jax.train)
  if ((PROCESSES == 1)); then
    run "${command[@]}" "${TRAIN_FLAGS[@]}"
    return
  fi
  command+=(--coordinator="localhost:$PORT" --num_processes="$PROCESSES")
  local index status=0 children=()
  for ((index = 0; index < PROCESSES; index++)); do
    show "${command[@]}" --process_index="$index" "${TRAIN_FLAGS[@]}"
    if ((DRY_RUN == 0)); then
      "${command[@]}" --process_index="$index" "${TRAIN_FLAGS[@]}" &
      children+=($!)
    fi
  done
  trap 'STOPPED=1; kill -TERM "${children[@]}" 2>/dev/null' TERM INT
  local child one
  for child in "${children[@]}"; do
    while true; do
      one=0
      wait "$child" || one=$?
      # A signal ends the wait, not the child.
      if ((one <= 128)) || ! kill -0 "$child" 2>/dev/null; then break; fi
    done
    ((one == 0)) || status=$one
  done
  return "$status"
}

STOPPED=0 # By a signal to this script: whoever sent it wants an end.
while true; do
  status=0
  train || status=$?
  if ((STOPPED)) || ! starts_again "$status"; then exit "$status"; fi
  echo "stopped by a signal: starting again in $RESTART_DELAY s" >&2
  sleep "$RESTART_DELAY"
done
