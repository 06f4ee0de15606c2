# shellcheck shell=bash
# What the launch scripts share: their arguments, commands that are shown and run, starting again.

# shellcheck disable=SC2034 # Read by the scripts.
DRY_RUN=0 TRAIN_FLAGS=()

usage() { # The comment on top of the script.
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
}

# parse OPTION... -- ARGUMENT...: sets DRY_RUN, TRAIN_FLAGS (what follows --), and a variable for
# each --option (a switch: 1) or --option=value that is among those named.
parse() {
  local known=" dry_run "
  while (($#)) && [[ $1 != -- ]]; do
    known+="$1 "
    shift
  done
  shift
  while (($#)); do
    local name=${1#--}
    name=${name%%=*}
    case $1 in
      --help | -h)
        usage
        exit 0
        ;;
      --)
        shift
        # shellcheck disable=SC2034
        TRAIN_FLAGS=("$@")
        return
        ;;
      --*=*)
        [[ $known == *" $name= "* ]] || refuse "$1"
        printf -v "${name^^}" '%s' "${1#*=}"
        ;;
      --*)
        [[ $known == *" $name "* ]] || refuse "$1"
        printf -v "${name^^}" 1
        ;;
      *) refuse "$1" ;;
    esac
    shift
  done
}

refuse() {
  echo "error: unknown argument $1 (flags of train stand after --)" >&2
  usage >&2
  exit 2
}

show() { # A command as it could be typed.
  printf '+' >&2
  printf ' %q' "$@" >&2
  echo >&2
}

run() { # Shows a command, and runs it unless this is a dry run.
  show "$@"
  ((DRY_RUN)) || "$@"
}

quoted() { # Words as one string that a remote shell takes apart again.
  printf '%q ' "$@"
}

# 75: stopped by a signal, all saved. 143: by one that came before anything was done.
starts_again() { [[ $1 == 75 || $1 == 143 ]]; }
