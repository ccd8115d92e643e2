#!/usr/bin/env bash
# One command for a machine with one NVIDIA GPU, 8 minutes at most: kernels against float64, speed against GELU, a
# calibration against the CPU's, and a comparison of activations in SFT and DPO. See README.md beside this file.
set -uo pipefail

usage() {
    cat <<'TEXT'
usage: eval/gpu/run.sh [--dry-run] OUT      (OUT: a new or empty folder)

Without a GPU, and with --dry-run, everything is done with tiny sizes on the CPU. The environment says:
  CARRY             the folder that pack.sh made (default: .carry in the checkout, where there is one)
  MODEL             hub name, directory or .gguf file (default: the carried weights, else builtin:nano)
  SFT_DATA DPO_DATA hub name, file or folder (default: what was carried, else made from the standard library)
  CALIBRATION_DATA  the same (default: what was carried, else builtin:docstrings)
  PYTHON            (default: python3)
TEXT
}

dry=0
case ${1-} in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry=1; shift ;;
esac
[ $# -eq 1 ] || { usage >&2; exit 2; }
stop() { echo "run: $*" >&2; exit 2; }
[ ! -e "$1" ] || [ -d "$1" ] || stop "$1 is a file; choose a folder"
[ -z "$(ls -A "$1" 2>/dev/null)" ] || stop "$1 is not empty; choose another folder"
mkdir -p "$1" || stop "$1 cannot be made; choose another folder"

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
OUT=$(cd "$1" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
PYTHON=${PYTHON:-python3}
CARRY=${CARRY:-$root/.carry}
BUDGET=462
. "$here/parts.sh"

weights=
if ls "$CARRY"/weights-* >/dev/null 2>&1 && [ -z "${MODEL-}" ] && ((!dry)); then
    "$PYTHON" "$here/carry.py" check "$CARRY" || exit 2 # before minutes are spent
    weights=$CARRY
fi
export PYTHONPATH=$root HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
if ls "$CARRY"/wheels/*.whl >/dev/null 2>&1; then
    "$PYTHON" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
        --target "$WORK/site" "$CARRY"/wheels/*.whl || stop "the carried wheels cannot be installed by $PYTHON -m pip"
    export PYTHONPATH=$root:$WORK/site
fi
# Do not contact the hub unless a hub name may be given.
[ -n "${MODEL-}${SFT_DATA-}${DPO_DATA-}${CALIBRATION_DATA-}" ] || export HF_HUB_OFFLINE=1
((!dry)) || export CUDA_VISIBLE_DEVICES=

# Starts torch for the first time on a cold machine; the sizes depend on whether there is a GPU.
part environment 120 bash -c '(nvidia-smi || true); "$0" -m crrelu_llm env --json >"$1" && cat "$1"' \
    "$PYTHON" "$WORK/parts/environment/environment.json"
device=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["environment"]["device"])' \
    "$WORK/parts/environment/environment.json" 2>/dev/null) || { cat "$WORK/parts/environment/log" >&2; exit 1; }
if [ "$device" = cpu ]; then
    echo "run: no GPU: a dry run with tiny sizes" >&2
    BUDGET=1500
    tokens=512 rows=16
    op=(--shapes 64x96) mlp=(--layers 1 --hidden 32 --width 64 --tokens 64) train=(--batch_size 1 --length 32)
    quick=(--repeats 2)
    sizes=(--most 2 --seeds 0)
    recipe=(--use_cpu true --bf16 false --max_length 64 --per_device_train_batch_size 2)
    limits=(prepare 120 calibrate 300 tests 120 op 240 train 120 mlp 120 sft 240 dpo 240)
else
    tokens=8192 rows=2000
    # 8 192 tokens of Llama 3 8B's MLP, 16 384 of SmolLM2's.
    op=(--shapes 8192x14336 16384x1536) mlp=(--layers 1 --hidden 4096 --width 14336 --tokens 8192)
    train=(--batch_size 8 --length 512)
    quick=(--repeats 10)
    sizes=(--most 200)
    recipe=()
    limits=(prepare 80 calibrate 120 tests 140 op 50 train 40 mlp 35 sft 150 dpo 150)
fi
limit() { # NAME
    local index
    for ((index = 0; index < ${#limits[@]}; index += 2)); do
        [ "${limits[index]}" = "$1" ] && echo "${limits[index + 1]}"
    done
}

carried() { # NAME DEFAULT: the carried data of this name, else the default
    local found
    for found in "$CARRY/data/$1" "$CARRY/data/$1".*; do
        [ ! -e "$found" ] || { echo "$found"; return; }
    done
    echo "$2"
}
model=${MODEL:-${weights:-builtin:nano}}
sft_data=${SFT_DATA:-$(carried sft builtin:docstrings)}
dpo_data=${DPO_DATA:-$(carried dpo builtin:pairs)}
calibration_data=${CALIBRATION_DATA:-$(carried calibration builtin:docstrings)}
calibrated=(--calibration_data "$calibration_data" --calibration_tokens "$tokens")
echo "run: $device, model $model, SFT on $sft_data, DPO on $dpo_data, calibration on $calibration_data" >&2

patched() { # ARM FOLDER PART OPTIONS OF THE RECIPE
    local arm=$1 folder=$2 name=$3
    shift 3
    part "$name" "$(limit calibrate)" "$PYTHON" "$here/calibrate.py" "$arm" --model "$(<"$WORK/model.txt")" --data "$WORK/data/sft" \
        --out "$WORK/$folder" --perplexity_tokens "$((tokens / 2))" "${calibrated[@]}" "$@"
}
# In parallel with the tests, which are not timed: the model as a directory, and the arms' calibrated starting points.
background() {
    ((BUDGET = BUDGET < 190 ? BUDGET : 190))
    [ "$device" != cpu ] || BUDGET=600
    part prepare "$(limit prepare)" "$PYTHON" "$here/prepare.py" --model "$model" --sft "$sft_data" \
        --dpo "$dpo_data" --work "$WORK" --rows "$rows"
    [ -s "$WORK/model.txt" ] || return 0
    for arm in gelu relu crrelu; do patched "$arm" "patched/$arm" "calibrate-$arm" "${recipe[@]}" & done
    CUDA_VISIBLE_DEVICES='' patched crrelu patched-cpu calibrate-cpu --use_cpu true --bf16 false &
    wait
}
background &
preparing=$!
part tests "$(limit tests)" "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu --durations=8 -rfEs \
    --junitxml "$WORK/parts/tests/tests.xml" "$root/tests/kernels"
wait $preparing

if [ -s "$WORK/model.txt" ]; then
    model=$(<"$WORK/model.txt")
    part calibration 30 "$PYTHON" "$here/calibration.py" "$WORK/patched/crrelu" "$WORK/patched-cpu" \
        "$WORK/parts/calibration/calibration.json"
fi
bench() { # PART LIMIT OP|MLP|TRAIN OPTIONS
    local name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" "$PYTHON" -m crrelu_llm bench "$@" "${quick[@]}" --output_dir "$WORK/parts/$name"
}
bench bench-op-bfloat16 "$(limit op)" op "${op[@]}" --dtypes bfloat16
if [ -s "$WORK/model.txt" ]; then
    bench bench-train "$(limit train)" train "$model" "${train[@]}" --dtypes bfloat16 float32
else
    skip bench-train "the model could not be prepared"
fi
bench bench-mlp "$(limit mlp)" mlp "${mlp[@]}" --dtypes bfloat16 float32
bench bench-op-float32 "$(limit op)" op "${op[@]}" --dtypes float32

learn() { # KIND SECONDS
    local seconds=$2
    if ((seconds > $(limit "$1"))); then seconds=$(limit "$1"); fi
    part "$1" "$seconds" "$PYTHON" "$here/train.py" "$1" --model "$model" --data "$WORK/data/$1" --work "$WORK" \
        --out "$WORK/parts/$1" --seconds "$seconds" "${sizes[@]}" "${recipe[@]}" \
        "${calibrated[@]}"
}
if [ -s "$WORK/model.txt" ]; then
    learn sft $(($(left) / 2))
    learn dpo "$(left)"
else
    skip sft "the model could not be prepared"
    skip dpo "the model could not be prepared"
fi
"$PYTHON" "$here/summary.py" "$WORK" "$OUT"
echo "run: $SECONDS s in all; results in $OUT" >&2
