#!/usr/bin/env bash
# Trains on a slice of Cloud TPUs: creates it or uses the existing one, installs this commit on all of
# its hosts, trains, shows the log of the first host, and continues after a preemption.
#
#   NAME=mine ZONE=us-west4-a launch/tpu_pod.sh [--dry_run] -- --flagfile=experiments/lf_wikipedia_500k_distilbert.flags
#   NAME=mine ZONE=us-west4-a launch/tpu_pod.sh --delete
#
# --dry_run  prints every command and runs none (as if the slice did not exist).
# --delete   deletes the slice and exits. A running slice is never deleted otherwise.
set -euo pipefail
# ---- Settings -----------------------------------------------------------------------------------
: "${NAME:=vixml-jax}"                # Name of the slice.
: "${ZONE:=us-west4-a}"
: "${PROJECT:=}"                      # Empty: the project of gcloud's configuration.
: "${TYPE:=v5litepod-16}"             # https://cloud.google.com/tpu/docs/v5e
: "${VERSION:=v2-alpha-tpuv5-lite}"   # https://cloud.google.com/tpu/docs/runtimes
: "${SPOT:=1}"                        # 1: cheaper, but may be preempted at any time.
: "${PYTHON:=python3}"                # On the hosts; 3.11 to 3.13.
: "${DIRECTORY:=vixml_jax}"           # On the hosts, in the home directory.
: "${POLL:=20}"                       # Seconds between checks of the state.
# -------------------------------------------------------------------------------------------------
HERE=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/lib.sh
source "$HERE/lib.sh"
DELETE=0
parse delete -- "$@"

WHERE=("$NAME" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
KIND=()
if ((SPOT)); then KIND=(--spot); fi
tpu() { run gcloud compute tpus tpu-vm "$@"; }
on() { # on WORKERS COMMAND: runs a command on these hosts of the slice.
  tpu ssh "${WHERE[@]}" --worker="$1" --command="$2"
}
state() { # READY, CREATING, PREEMPTED, ...; empty if there is no slice.
  ((DRY_RUN)) || gcloud compute tpus tpu-vm describe "${WHERE[@]}" --format='value(state)' 2>/dev/null || true
}

if ((DELETE)); then
  tpu delete "${WHERE[@]}" --quiet
  exit
fi

make_ready() { # Waits until the slice is ready; status 1 if it existed already.
  local found new=1
  while true; do
    found=$(state)
    case $found in
      READY) return "$new" ;;
      "")
        tpu create "${WHERE[@]}" --accelerator-type="$TYPE" --version="$VERSION" "${KIND[@]}"
        new=0
        ((DRY_RUN)) && return 0
        ;;
      PREEMPTED | TERMINATED | STOPPED)
        echo "$NAME is $found: deleting it to create a new one" >&2
        tpu delete "${WHERE[@]}" --quiet
        ;;
      *) sleep "$POLL" ;;
    esac
  done
}

install() {
  local archive
  archive=$(mktemp -d)/source.tar.gz
  run git -C "$HERE/.." archive --format=tar.gz -o "$archive" HEAD
  tpu scp "$archive" "$NAME:source.tar.gz" "${WHERE[@]:1}" --worker=all
  on all "mkdir -p $DIRECTORY && tar -xzf source.tar.gz -C $DIRECTORY && cd $DIRECTORY && { [ -d .venv ] || $PYTHON -m venv .venv; } && .venv/bin/pip install -q -c constraints.txt '.[tpu,gcs]' -f https://storage.googleapis.com/jax-releases/libtpu_releases.html"
}

begin() { # Starts training in the background on all hosts, so that a lost connection does no harm.
  local command
  command=$(quoted .venv/bin/python -m vixml_jax.train --coordinator=auto "${TRAIN_FLAGS[@]}")
  command="cd $DIRECTORY && rm -f status && : > log && { nohup sh -c $(quoted "$command > log 2>&1; echo \$? > status.new; mv status.new status") > /dev/null 2>&1 & }"
  on all "$command"
}

follow() { # Shows the log of the first host until the run ends; exits with the status of the run.
  on 0 "cd $DIRECTORY && { while [ ! -e status ]; do sleep 2; done & tail --pid=\$! -n +1 -F log; } && exit \$(cat status)"
}

make_ready || true
install
begin
while true; do
  status=0
  follow || status=$?
  ((DRY_RUN)) && exit
  if should_restart "$status"; then
    echo "stopped by a signal: restarting" >&2
    begin
  elif [[ $status == 255 ]]; then # The connection or the host was lost.
    sleep "$POLL"
    if make_ready; then
      install
      begin
    fi
  else
    exit "$status"
  fi
done
