#!/usr/bin/env bash
# Measure everything on one GPU in less than 10 minutes, on a machine without network access and with nothing installed
# but torch, transformers, peft and accelerate. The first part proves that the fast paths compute what the stock model
# computes; the others measure speed, memory and what it depends on.
#
#   benchmarks/gpu.sh                        # Qwen2-VL-2B with random weights, made on the machine
#   benchmarks/gpu.sh --smoke                # all parts at tiny sizes, on a CPU in 3 minutes
#
#   --parts "NAME ..."   only these: sameness step-lora step-full decode step-4bit update step-vllm scaling
#   --out FOLDER         results (default: benchmarks/results; with --smoke build/gpu-smoke)
#   --limit SECONDS      for everything (default: 540; with --smoke 1800, for a busy machine); parts have shares of it
#   --tokenizer FOLDER   use the tokenizer of Qwen2-VL instead of the embedded one, for realistic prompt lengths
#   --wheels FOLDER      use the packages in these wheels too, unpacked to a temporary folder
#
# Each part has its own time limit, and writes NAME-GPU.json when it ends; gpu-GPU.txt gets what it prints. A part that
# fails or is stopped does not end the others: the exit code is then 1, and 2 if nothing could start.
set -uo pipefail
cd "$(dirname "$0")/.."

all="sameness step-lora step-full decode step-4bit update step-vllm scaling"
out='' smoke=no tokenizer=() wheels='' parts=$all whole=540 limit=''
while [ $# -gt 0 ]; do
  case $1 in
    --smoke) smoke=yes; shift ;;
    --parts | --out | --limit | --tokenizer | --wheels)
      if [ $# -lt 2 ]; then echo "$1 needs a value after it." >&2; exit 2; fi
      case $1 in
        --parts) parts=$2 ;;
        --out) out=$2 ;;
        --limit) limit=$2 ;;
        --tokenizer) tokenizer=(--tokenizer "$2") ;;
        --wheels) wheels=$2 ;;
      esac
      shift 2 ;;
    *) echo "There is no option $1: use --smoke, --parts, --out, --limit, --tokenizer or --wheels." >&2; exit 2 ;;
  esac
done
if [ -z "$limit" ]; then if [ $smoke = yes ]; then limit=1800; else limit=$whole; fi; fi
if ! [[ $limit =~ ^[1-9][0-9]{0,5}$ ]]; then echo "--limit is $limit: give whole seconds, such as $whole." >&2; exit 2; fi
for name in $parts; do
  case " $all " in *" $name "*) ;; *) echo "There is no part $name: choose from $all." >&2; exit 2 ;; esac
done

python=${PYTHON:-python}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if [ -n "$wheels" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" "$wheels"/*.whl || exit 2
  PYTHONPATH="$PYTHONPATH:$scratch/site"
fi

# missing PACKAGE...: print those that cannot be found
missing() {
  "$python" - "$@" <<'PYTHON'
import sys
from importlib.util import find_spec


def is_missing(name):
    try:
        return find_spec(name) is None
    except ModuleNotFoundError:  # the package that it is in
        return True


print(*filter(is_missing, sys.argv[1:]))
PYTHON
}
needed=$(missing torch transformers peft accelerate pydantic typer rich ruamel.yaml psutil filelock scipy PIL jinja2 packaging) || exit 2
if [ -n "$needed" ]; then
  echo "These packages are missing: $needed. Install them, or give a folder with their wheels as --wheels." >&2
  exit 2
fi
if [ $smoke = yes ]; then
  gpu=smoke
  out=${out:-build/gpu-smoke}
else
  gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))' 2>/dev/null) || {
    echo "torch finds no GPU: use --smoke to try the parts on a CPU." >&2
    exit 2
  }
  out=${out:-benchmarks/results}
fi
mkdir -p "$out" || exit 2
log=$out/gpu-$gpu.txt
: >"$log"
names=() states=()

# ended NAME STATE: remember and print how a part ended
ended() {
  names+=("$1") states+=("$2")
  printf '\n== %s: %s\n' "$1" "$2" | tee -a "$log"
}

# part NAME SECONDS MODULE ARGUMENTS...: run a benchmark for at most SECONDS (of the whole 540), or the remaining time
part() {
  local name=$1 seconds=$(($2 * limit / whole)) left=$((limit - SECONDS)) began=$SECONDS code
  shift 2
  case " $parts " in *" $name "*) ;; *) return ;; esac
  if [ $left -lt "$seconds" ]; then seconds=$left; fi
  if [ "$seconds" -lt 1 ]; then ended "$name" "no time left"; return; fi
  rm -f "$out/$name-$gpu.json"
  timeout -k 5 "$seconds" "$python" -m "$@" --models "$scratch/models" --output "$out/$name-$gpu.json" \
    >"$scratch/stdout" 2>"$scratch/stderr"
  code=$?
  case $code in
    0) ended "$name" "ok, $((SECONDS - began)) s" ;;
    124 | 137) ended "$name" "stopped after $seconds s" ;;
    *) ended "$name" "failed with code $code" ;;
  esac
  cat "$scratch/stdout" | tee -a "$log"
  if [ $code != 0 ]; then tail -n 15 "$scratch/stderr" | tee -a "$log"; fi
}

# optional NAME PACKAGE ...: a part that needs a package, or a line that says what is missing
optional() {
  local name=$1 package=$2 why=''
  shift 2
  case " $parts " in *" $name "*) ;; *) return ;; esac
  if [ -n "$(missing "$package")" ]; then
    why="$package is not installed"
  elif [ "$package$smoke${tokenizer[*]}" = vllmno ]; then # tokens that the tokenizer lacks would be sampled
    why="vLLM can suppress 1,024 tokens, and the model has 151,936: give --tokenizer"
  fi
  if [ -n "$why" ]; then ended "$name" "skipped: $why"; else part "$name" "$@"; fi
}

if [ $smoke = yes ]; then
  preset=(--preset smoke) same=(--preset smoke) update=(--preset smoke)
  once=(--rounds 1 --steps 1 --warmup 0) twice=("${once[@]}") engines=(eager)
else
  preset=(--preset paper-gpu) same=(--preset gpu) update=(--preset gpu)
  once=(--rounds 1 --steps 1 --warmup 1) twice=(--rounds 1 --steps 2 --warmup 1) engines=(eager graph)
fi
against=(ours trl)
if [ -n "$(missing trl datasets)" ]; then
  echo "TRL is not installed: steps of this package only." | tee -a "$log"
  against=(ours)
fi
step=(benchmarks.step "${preset[@]}" "${tokenizer[@]}")
part sameness 90 benchmarks.sameness "${same[@]}" "${tokenizer[@]}"
part step-lora 150 "${step[@]}" "${twice[@]}" --lora 16 --engine "${against[@]}"
part step-full 150 "${step[@]}" "${twice[@]}" --engine "${against[@]}"
part decode 100 benchmarks.decode "${preset[@]}" "${tokenizer[@]}" --rounds 1 --engine "${engines[@]}"
optional step-4bit bitsandbytes 80 "${step[@]}" "${once[@]}" --lora 16 --engine ours 4bit
part update 60 benchmarks.update "${update[@]}" --lora 16 --repeats 1
optional step-vllm vllm 150 "${step[@]}" "${once[@]}" --lora 16 --engine ours vllm
part scaling 60 benchmarks.update "${update[@]}" --lora 16 --scaling --repeats 1

failed=0
printf '\n' | tee -a "$log"
for index in "${!names[@]}"; do
  printf '%-10s %s\n' "${names[$index]}" "${states[$index]}" | tee -a "$log"
  case ${states[$index]} in ok* | skipped*) ;; *) failed=1 ;; esac
done
printf '%s s in total; results in %s\n' "$SECONDS" "$out" | tee -a "$log"
exit $failed
