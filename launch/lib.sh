# shellcheck shell=bash
# Shared by the launch scripts: parsing arguments, showing and running commands, restarting.

# shellcheck disable=SC2034 # Read by the scripts.
DRY_RUN=0 TRAIN_FLAGS=()

usage() { # Prints the comment at the top of the script.
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
}

# parse OPTION... -- ARGUMENT...: sets DRY_RUN, TRAIN_FLAGS (the arguments after --), and a variable
# for each given --option (to 1) or --option=value among the known options.
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
  echo "error: unknown argument $1 (flags of train go after --)" >&2
  usage >&2
  exit 2
}

show() { # Prints a command as it could be typed.
  printf '+' >&2
  printf ' %q' "$@" >&2
  echo >&2
}

run() { # Prints a command, and runs it unless this is a dry run.
  show "$@"
  ((DRY_RUN)) || "$@"
}

quoted() { # Quotes arguments as one string for a remote shell.
  printf '%q ' "$@"
}

# 75: stopped by a signal with everything saved. 143: stopped before Python had started.
should_restart() { [[ $1 == 75 || $1 == 143 ]]; }
