# shellcheck shell=bash
# shellcheck disable=SC2034 # foreground is read by the scripts
# Sourced by the experiment scripts: flags, the checks before a start, and the start in the background.
#
#   --dry-run      check, say what would be done, do nothing
#   --foreground   stay in the terminal; without it: nohup, with log and PID beside the runs
#
# All other words are settings for train.py (--train.epochs=1). GPU_GB and DISK_GB say what must be free.

experiment_words() { # $@: the words of the script; sets dry_run, foreground, settings
  dry_run=0 foreground=0 settings=()
  local word
  for word in "$@"; do
    case $word in
      --dry-run) dry_run=1 ;;
      --foreground) foreground=1 ;;
      -h | --help)
        sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//p}' "$0"
        exit 0
        ;;
      --run.name* | --run.folder*)
        echo "The script names the runs, so that all its stages mean the same: set RUNS=FOLDER in place of $word." >&2
        exit 2
        ;;
      *) settings+=("$word") ;;
    esac
  done
  case ${SCALE:=full} in cpu | full) ;; *)
    echo "SCALE is $SCALE: choose cpu or full." >&2
    exit 2
    ;;
  esac
  # Models of these sizes do not gain from a second thread, and threads that wait for a core cost a multiple.
  if [ "$SCALE" = cpu ]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
}

experiment_install() {
  if ! command -v minilm > /dev/null; then # not `import minilm`: any Python can import it from the checkout
    if [ "$dry_run" = 1 ]; then
      echo "would install minilm into .venv (run_file/install.sh)"
      return
    fi
    # shellcheck source=run_file/install.sh
    source run_file/install.sh
    install_minilm dashboard
  fi
}

experiment_checks() { # $1: folder of the runs; $2...: places of data that must be there. All problems at once.
  local runs=$1 free gpu problems=() place
  shift
  for place in "$@"; do
    if [[ "$place" != builtin:* && ! -e "${place%%,*}" ]]; then
      problems+=("data: there is no ${place%%,*}: give DATA=a store, a file or folder of texts, or builtin:python")
    else
      echo "data     $place"
    fi
  done
  place=$runs
  while [ ! -d "$place" ]; do place=$(dirname "$place"); done
  free=$(($(df -Pk "$place" | awk 'NR == 2 { print $4 }') / 1048576))
  echo "disk     $free GB free for $runs, $DISK_GB needed"
  if [ "$free" -lt "$DISK_GB" ]; then
    problems+=("disk: $free GB are free for $runs, $DISK_GB are needed: free some, or set RUNS=FOLDER or DISK_GB=")
  fi
  if [ "$SCALE" = full ]; then
    # Seen by torch, so that CUDA_VISIBLE_DEVICES is heeded.
    gpu=$(python run_file/free_gpu.py "$GPU_GB" 2>&1) || problems+=("${gpu##*$'\n'}")
    echo "GPU      ${gpu##*$'\n'}"
  else
    echo "GPU      none is used"
  fi
  if [ "${#problems[@]}" -gt 0 ]; then
    printf 'Cannot start:\n' >&2
    printf '  %s\n' "${problems[@]}" >&2
    exit 2
  fi
}

experiment_background() { # $1: folder of the runs; $2...: the words of the script. Starts it again in the background.
  local runs=$1 log="$1/experiment.log" pid="$1/experiment.pid"
  shift
  mkdir -p "$runs"
  if [ -f "$pid" ] && kill -0 "$(cat "$pid")" 2>/dev/null; then
    echo "It runs already: process $(cat "$pid"), log $log." >&2
    exit 2
  fi
  EXPERIMENT_BACKGROUND=1 nohup bash "$0" --foreground "$@" >>"$log" 2>&1 </dev/null &
  echo $! >"$pid"
  echo "started in the background"
  echo "  log    $log            tail -f $log"
  echo "  PID    $(cat "$pid"), in $pid"
  echo "  stop   kill -TERM -- $(cat "$pid")     training saves and ends; the same command goes on"
  echo "  state  minilm runs $runs"
}

experiment_launch() { # words for train.py; ZeRO-2 at the full size, one plain process on a CPU
  if [ "$SCALE" = full ]; then
    run_command accelerate launch --config_file run_file/accelerate/zero2.yaml --num_processes "${GPUS:-1}" train.py "$@"
  else
    run_command python train.py "$@"
  fi
}

experiment_evaluate() { # $1: run folder; $2...: further flags of eval.py
  local run=$1
  shift
  run_command python eval.py --checkpoint "$run" --per-document --agreement --json "$run/eval.json" "$@"
}

run_command() {
  if [ "$dry_run" = 1 ]; then
    printf 'would run:'
    printf ' %q' "$@"
    printf '\n'
    return
  fi
  if [ -z "${EXPERIMENT_BACKGROUND:-}" ]; then
    "$@"
    return
  fi
  # A shell that waits in the foreground would hear of kill -TERM only when the command is done.
  "$@" &
  local running=$! code=0
  # shellcheck disable=SC2064
  trap "kill -TERM $running 2>/dev/null || true" TERM
  wait "$running" || code=$?
  if [ "$code" -gt 128 ] && kill -0 "$running" 2>/dev/null; then # `wait` was cut short: the command still saves
    code=0
    wait "$running" || code=$?
  fi
  trap - TERM
  return "$code"
}
