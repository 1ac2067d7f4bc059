#!/usr/bin/env bash
# Run all speed benchmarks on one GPU in less than 8 minutes. Each part first checks that the fast paths give the same
# results as the plain ones. Measures updates, decoding and whole steps against TRL. Result files and logs go to a
# folder; all tables are printed at the end. If a part fails or times out, the others still run and the exit code is 1.
#
#   benchmarks/gpu.sh                        # Qwen2-VL-2B with random weights
#   benchmarks/gpu.sh --smoke                # quick test of all parts: tiny sizes, a few minutes on a CPU
#
#   --out FOLDER         output folder (default: benchmarks/results)
#   --tokenizer FOLDER   use the tokenizer of Qwen2-VL instead of the embedded one, for realistic prompt lengths
#   --wheels FOLDER      install trl and datasets from the wheels in this folder first, without network access
set -uo pipefail
cd "$(dirname "$0")/.."

out=benchmarks/results smoke=no tokenizer=() wheels=
while [ $# -gt 0 ]; do
  case $1 in
    --smoke) smoke=yes; shift ;;
    --out | --tokenizer | --wheels)
      if [ $# -lt 2 ]; then echo "$1 needs a folder after it." >&2; exit 2; fi
      case $1 in --out) out=$2 ;; --tokenizer) tokenizer=(--tokenizer "$2") ;; --wheels) wheels=$2 ;; esac
      shift 2 ;;
    *) echo "There is no option $1: use --smoke, --out, --tokenizer or --wheels." >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python}
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
limit=470 # seconds for everything
if [ $smoke = yes ]; then limit=900; fi
mkdir -p "$out"
names=() states=()

# part NAME SECONDS MODULE ARGUMENTS...: run one benchmark for at most SECONDS or the remaining time, if shorter
part() {
  local name=$1 seconds=$2 left=$((limit - SECONDS)) began=$SECONDS code
  shift 2
  if [ $smoke = yes ]; then seconds=$limit; fi
  if [ $left -lt "$seconds" ]; then seconds=$left; fi
  names+=("$name")
  if [ "$seconds" -le 5 ]; then states+=("no time left"); return; fi
  timeout "$seconds" "$python" -m "$@" --output "$out/$name.json" >"$out/$name.txt" 2>"$out/$name.err"
  code=$?
  if [ $code = 0 ]; then states+=("ok, $((SECONDS - began)) s"); rm -f "$out/$name.err"
  elif [ $code = 124 ]; then states+=("stopped after $seconds s")
  else states+=("failed with code $code"); fi
  echo "$name: ${states[-1]}"
}

if [ -n "$wheels" ]; then
  "$python" -m pip install --quiet --no-index --find-links "$wheels" trl datasets || exit 1
fi
if [ $smoke = yes ]; then
  part update_smoke 0 benchmarks.update --preset smoke --repeats 1
  part scaling_smoke 0 benchmarks.update --preset smoke --repeats 1 --scaling
  part decode_smoke 0 benchmarks.decode --preset smoke --rounds 1
  part step_smoke 0 benchmarks.step --preset smoke --rounds 1 --steps 1 --warmup 0
  part step_lora_smoke 0 benchmarks.step --preset smoke --rounds 1 --steps 1 --warmup 0 --lora 4
else
  gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "_"))') || {
    echo "torch finds no GPU: use --smoke to try the parts on a CPU." >&2
    exit 2
  }
  part "update_lora_$gpu" 60 benchmarks.update --preset gpu --lora 16
  part "update_full_$gpu" 60 benchmarks.update --preset gpu
  steps=(benchmarks.step --preset paper-gpu --rounds 1 --steps 2 --warmup 1 "${tokenizer[@]}")
  part "step_lora_beta_$gpu" 150 "${steps[@]}" --lora 16 --beta 0.04
  part "step_full_beta_$gpu" 150 "${steps[@]}" --beta 0.04
  decode=(benchmarks.decode --preset paper-gpu --rounds 1 "${tokenizer[@]}")
  part "decode_$gpu" 90 "${decode[@]}"
  part "decode_graph_$gpu" 90 "${decode[@]}" --engine graph
  part "step_lora_beta_graph_$gpu" 60 "${steps[@]}" --lora 16 --beta 0.04 --engine ours --rollout graph
  part "step_lora_$gpu" 60 "${steps[@]}" --lora 16 --beta 0 --engine ours
  part "step_full_$gpu" 60 "${steps[@]}" --beta 0 --engine ours
  part "scaling_$gpu" 90 benchmarks.update --preset gpu --lora 16 --scaling --repeats 1
fi

failed=0
for index in "${!names[@]}"; do
  name=${names[$index]}
  printf '\n== %s (%s)\n' "$name" "${states[$index]}"
  cat "$out/$name.txt" 2>/dev/null
  if [[ ${states[$index]} != ok* ]]; then
    failed=1
    tail -n 5 "$out/$name.err" 2>/dev/null
  fi
done
printf '\n%s s in total\n' "$SECONDS"
exit $failed
