#!/usr/bin/env bash
# Trains on a slice of Cloud TPUs: makes it or takes the one that is there, installs this commit on
# all of its hosts, trains, shows the log of the first host, and goes on after a preemption.
#
#   NAME=mine ZONE=us-west4-a launch/tpu_pod.sh [--dry_run] -- --flagfile=experiments/lf_wiki.flags
#   NAME=mine ZONE=us-west4-a launch/tpu_pod.sh --delete
#
# --dry_run  shows every command and runs none (it takes the slice to be absent).
# --delete   deletes the slice, and does nothing else. Nothing else deletes one that is alive.
set -euo pipefail
# ---- What to change -----------------------------------------------------------------------------
: "${NAME:=vixml-jax}"                # Of the slice.
: "${ZONE:=us-west4-a}"
: "${PROJECT:=}"                      # Empty: that of gcloud's configuration.
: "${TYPE:=v5litepod-16}"             # https://cloud.google.com/tpu/docs/v5e
: "${VERSION:=v2-alpha-tpuv5-lite}"   # https://cloud.google.com/tpu/docs/runtimes
: "${SPOT:=1}"                        # 1: cheaper, and may be taken away at any time.
: "${PYTHON:=python3.11}"             # On the hosts.
: "${DIRECTORY:=vixml_jax}"           # On the hosts, in the home directory.
: "${POLL:=20}"                       # Seconds between looks.
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
on() { # on WORKERS COMMAND: on these hosts of the slice.
  tpu ssh "${WHERE[@]}" --worker="$1" --command="$2"
}
state() { # READY, CREATING, PREEMPTED, ...; empty: there is none.
  ((DRY_RUN)) || gcloud compute tpus tpu-vm describe "${WHERE[@]}" --format='value(state)' 2>/dev/null || true
}

if ((DELETE)); then
  tpu delete "${WHERE[@]}" --quiet
  exit
fi

make_ready() { # Returns once there is a slice; 1: it was there already.
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
        echo "$NAME is $found: what is left of it makes room for a new one" >&2
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
  on all "mkdir -p $DIRECTORY && tar -xzf source.tar.gz -C $DIRECTORY && cd $DIRECTORY && { [ -d .venv ] || $PYTHON -m venv .venv; } && .venv/bin/pip install -q '.[tpu,gcs]' -f https://storage.googleapis.com/jax-releases/libtpu_releases.html"
}

begin() { # On all hosts, in the background, so that a lost connection loses nothing.
  local command
  command=$(quoted .venv/bin/python -m vixml_jax.train --coordinator=auto "${TRAIN_FLAGS[@]}")
  command="cd $DIRECTORY && rm -f status && : > log && { nohup sh -c $(quoted "$command > log 2>&1; echo \$? > status.new; mv status.new status") > /dev/null 2>&1 & }"
  on all "$command"
}

follow() { # The log of the first host until the run ends; the status is that of the run.
  on 0 "cd $DIRECTORY && { while [ ! -e status ]; do sleep 2; done & tail --pid=\$! -n +1 -F log; } && exit \$(cat status)"
}

make_ready || true
install
begin
while true; do
  status=0
  follow || status=$?
  ((DRY_RUN)) && exit
  if starts_again "$status"; then
    echo "stopped by a signal: starting again" >&2
    begin
  elif [[ $status == 255 ]]; then # The connection was lost, or the host.
    sleep "$POLL"
    if make_ready; then
      install
      begin
    fi
  else
    exit "$status"
  fi
done
