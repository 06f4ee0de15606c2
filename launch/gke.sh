#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster: fills in gke_jobset.yaml, applies it, shows the first log.
#
#   NAME=mine IMAGE=REGISTRY/vixml_jax launch/gke.sh [--dry_run] -- --flagfile=experiments/lf_wikipedia_500k_distilbert.flags
#   NAME=mine launch/gke.sh --delete
#
# --dry_run  prints the JobSet and the commands, and runs none.
# --delete   deletes the JobSet and exits.
#
# The image is that of launch/docker/Dockerfile.tpu, pushed to a registry that the cluster reads:
#
#   docker build -f launch/docker/Dockerfile.tpu -t REGISTRY/vixml_jax . && docker push REGISTRY/vixml_jax
#
# Runs and data are in a bucket (gs://), since a pod keeps no files.
set -euo pipefail
# ---- Settings -----------------------------------------------------------------------------------
: "${NAME:=vixml-jax}"
: "${IMAGE:=vixml_jax}"
: "${ACCELERATOR:=tpu-v5-lite-podslice}"   # https://cloud.google.com/kubernetes-engine/docs/concepts/tpus
: "${TOPOLOGY:=4x4}"
: "${HOSTS:=4}"                            # Chips of the topology divided by chips of a host.
: "${CHIPS:=4}"                            # Chips of a host.
: "${RESTARTS:=100}"                       # Restarts after preemptions and lost nodes.
: "${USER_ID:=1000}"                       # User of the container, as in its image; 0 is root.
# -------------------------------------------------------------------------------------------------
HERE=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/lib.sh
source "$HERE/lib.sh"
DELETE=0
parse delete -- "$@"

if ((DELETE)); then
  run kubectl delete jobset "$NAME"
  exit
fi

as_json() { # Prints arguments as a JSON list, which is YAML too.
  local word list=""
  for word in "$@"; do
    word=${word//\\/\\\\}
    list+="${list:+, }\"${word//\"/\\\"}\""
  done
  echo "[$list]"
}

filled=$(cat "$HERE/gke_jobset.yaml")
# shellcheck disable=SC2034 # Read by name.
COMMAND=$(as_json python -m vixml_jax.train --coordinator=auto "${TRAIN_FLAGS[@]}")
# shellcheck disable=SC2034
NON_ROOT=$([[ $USER_ID == 0 ]] && echo false || echo true)
for name in NAME IMAGE ACCELERATOR TOPOLOGY HOSTS CHIPS RESTARTS USER_ID NON_ROOT COMMAND; do
  filled=${filled//"@$name@"/"${!name}"}
done

show kubectl apply -f -
if ((DRY_RUN)); then
  echo "$filled"
else
  kubectl apply -f - <<< "$filled"
fi
run kubectl wait --for=condition=Ready --timeout=30m pod -l "jobset.sigs.k8s.io/jobset-name=$NAME"
run kubectl logs --follow -l "jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0"
