#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  cat <<'USAGE'
Usage: scripts/gpu_check.sh [OPTION...]

Checks the CUDA kernels on this machine's GPU: builds them for it, runs every case, compares the
emulated instructions with the GPU's, runs compute-sanitizer and the benchmark. Where TensorRT is
installed, builds engines with the plugin, compares them with onnxruntime, PyTorch and the float64
oracle, looks for copies around the plugin, and times it against TensorRT's own attention. What it
found is in docs/evidence/gpu-CARD.json, logs are in build/gpu_check. OPTIONs are the benchmark's.

Needs CUDA's compiler, PyTorch, numpy and pytest; for TensorRT this package and TensorRT's headers.
USAGE
  exit
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/nvcc.sh

look='import sys, torch
if not torch.cuda.is_available():
    sys.exit("gpu_check.sh needs a CUDA device, and PyTorch sees none")
major, minor = torch.cuda.get_device_capability()
print(10 * major + minor)'
if ! sm=$(python -c "$look"); then exit 3; fi
folder=build/gpu_check
rm -rf "$folder"
mkdir -p "$folder"
export PYTHONPATH=$PWD FASTMQA_KERNELS=$PWD/$folder/plugins/libfastmqa_kernels.so
export FASTMQA_KEEP_CONFORMANCE=$PWD/$folder/conformance.json
find_nvcc
PATH=$PATH:$(dirname "$CUDACXX")

failed=()
# Runs a step, its output to a log and to the terminal; a step that fails does not stop the others.
step() {
  local name=$1
  shift
  echo "== $name"
  local code=0
  "$@" 2>&1 | tee "$folder/$name.log" || code=$?
  echo "$code" >"$folder/$name.code"
  [[ $code == 0 ]] || failed+=("$name")
}
# Without conftest.py and pyproject.toml, which want more packages and the newest pytest.
tests() {
  python -m pytest -c /dev/null --rootdir . --noconftest -p no:cacheprovider -q -ra "$@"
}

step build scripts/build_kernels.sh -o "$folder/plugins" "$(python scripts/kernel_resources.py sms "$sm")"
step cases tests tests/test_device.py --junitxml="$folder/cases.xml"
step conformance tests tests/test_conformance.py

# A few cases that go through every path: split keys, several tiles, each mask, empty rows, latents.
reduced="falcon_71_1 or long_decode or long_window or lengths_zero_gqa_bshd or mla_576_512 or"
reduced+=" softcap_causal_mask_mqa_bhsd or mask_float_window_mqa_bshd or start_negative_mha_bhsd"
if command -v compute-sanitizer >/dev/null; then
  # Without PyTorch's allocator, whose large blocks would hide what lies beyond a tensor.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck initcheck; do
    step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$(python -c 'import sys; print(sys.executable)')" -m pytest -c /dev/null --rootdir . \
      --noconftest -p no:cacheprovider -q tests/test_device.py -k "test_case and ($reduced)"
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  echo "compute-sanitizer is not installed: memcheck, racecheck and initcheck were not run"
fi

benchmark=(python scripts/bench_attention.py "$@")
step benchmark "${benchmark[@]}" --json "$folder/benchmark.jsonl"

if python -c 'import tensorrt' 2>/dev/null; then
  export FASTMQA_TRT_PLUGIN=$PWD/$folder/plugins/libfastmqa_trt.so
  step tensorrt python scripts/check_tensorrt.py "$folder/tensorrt"
  step tensorrt_benchmark "${benchmark[@]}" --quick --tensorrt --json "$folder/tensorrt.jsonl"
else
  echo "TensorRT is not installed: its engines were neither built nor timed"
fi
python scripts/gpu_evidence.py "$folder"

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}; see the logs in $folder" >&2
  exit 1
fi
