#!/usr/bin/env bash
# Trains on all devices of this machine; restarts a run that a signal stopped.
#
#   launch/local.sh [--dry_run] [--processes=N] -- --flagfile=experiments/quickstart.flags
#
# --processes=N  starts N processes on this machine, each with its share of the GPUs: of those that
#                CUDA_VISIBLE_DEVICES lists, or of all that nvidia-smi finds.
# --dry_run      prints every command and runs none.
set -euo pipefail
# ---- Settings -----------------------------------------------------------------------------------
: "${PYTHON:=python3}"           # Creates the environment; 3.11 to 3.13.
: "${VENV:=.venv}"               # Created if missing, with the project installed.
: "${EXTRAS:=}"                  # "gpu" or "tpu": the JAX to install.
: "${PROCESSES:=1}"              # Processes on this machine.
: "${PORT:=8476}"                # Port of the coordinator.
: "${RESTART_DELAY:=5}"          # Seconds before a restart.
# -------------------------------------------------------------------------------------------------
HERE=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/lib.sh
source "$HERE/lib.sh"
parse processes= -- "$@"
if [[ ! $PROCESSES =~ ^[1-9][0-9]*$ ]]; then
  echo "error: --processes=$PROCESSES: expected a number from 1" >&2
  exit 2
fi

find_gpus() { # Sets GPUS to the GPUs that a run of several processes shares; to none on a CPU.
  GPUS=()
  if [[ -n ${JAX_PLATFORMS:-} && ! $JAX_PLATFORMS =~ gpu|cuda ]]; then return; fi
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=', ' read -r -a GPUS <<< "$CUDA_VISIBLE_DEVICES"
    if [[ ${GPUS[0]:-} == -1 ]]; then GPUS=(); fi
  elif command -v nvidia-smi > /dev/null; then
    mapfile -t GPUS < <(
      nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | grep -x '[0-9]*'
    )
  fi
}

GPUS=()
if ((PROCESSES > 1)); then find_gpus; fi
SHARE=$((${#GPUS[@]} / PROCESSES)) # GPUs of a process.
if ((${#GPUS[@]} % PROCESSES)); then
  echo "error: --processes=$PROCESSES: expected a number that divides the ${#GPUS[@]} GPUs" \
    "(${GPUS[*]}); list fewer GPUs in CUDA_VISIBLE_DEVICES, or set JAX_PLATFORMS=cpu to use none" >&2
  exit 2
fi

if [[ ! -x $VENV/bin/python ]]; then
  run "$PYTHON" -m venv "$VENV"
  run "$VENV/bin/pip" install -q -c "$HERE/../constraints.txt" "$HERE/..${EXTRAS:+[$EXTRAS]}"
fi

share() { # Prints the GPUs of a process, by its index.
  local IFS=,
  echo "${GPUS[*]:$1*SHARE:SHARE}"
}

train() {
  local command=("$VENV/bin/python" -m vixml_jax.train)
  if ((PROCESSES == 1)); then
    run "${command[@]}" "${TRAIN_FLAGS[@]}"
    return
  fi
  command+=(--coordinator="localhost:$PORT" --num_processes="$PROCESSES")
  local index status=0 children=() own
  for ((index = 0; index < PROCESSES; index++)); do
    own=("${command[@]}" --process_index="$index" "${TRAIN_FLAGS[@]}")
    if ((SHARE)); then
      own=(env "CUDA_VISIBLE_DEVICES=$(share "$index")" "${own[@]}")
    fi
    show "${own[@]}"
    if ((DRY_RUN == 0)); then
      "${own[@]}" &
      children+=($!)
    fi
  done
  trap 'STOPPED=1; kill -TERM "${children[@]}" 2>/dev/null' TERM INT
  local child one
  for child in "${children[@]}"; do
    while true; do
      one=0
      wait "$child" || one=$?
      # A signal to this script ends `wait` but not the child.
      if ((one <= 128)) || ! kill -0 "$child" 2>/dev/null; then break; fi
    done
    ((one == 0)) || status=$one
  done
  return "$status"
}

STOPPED=0 # 1 after a signal to this script, which must not restart then.
while true; do
  status=0
  train || status=$?
  if ((STOPPED)) || ! should_restart "$status"; then exit "$status"; fi
  echo "stopped by a signal: restarting in $RESTART_DELAY s" >&2
  sleep "$RESTART_DELAY"
done
