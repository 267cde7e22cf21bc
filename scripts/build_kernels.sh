#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: scripts/build_kernels.sh [-o DIR] [SM...]

Builds the library of CUDA kernels, DIR/libfastmqa_kernels.so (DIR: build/plugins), and with the same
kernels the TensorRT plugin, DIR/libfastmqa_trt.so, and onnxruntime's custom op,
DIR/libfastmqa_ort.so, for the compute capabilities SM (75 80); and the CPU kernel, which the custom
op has too, DIR/libfastmqa_cpu.so. Fails if a CUDA kernel spills registers or uses a stack. What did
not change is not compiled again. Takes nvcc, CMake and headers from the machine, or from PyPI and
Debian where they are missing.
USAGE
}

folder=build/plugins
while getopts ":o:h-:" option; do
  case $option in
    o) folder=$OPTARG ;;
    h) usage && exit ;;
    -) [[ $OPTARG == help ]] && usage && exit ;&
    *) usage >&2 && exit 2 ;;
  esac
done
shift $((OPTIND - 1))
sms=("${@:-75 80}")
list=${sms[*]}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/nvcc.sh
source scripts/tensorrt_headers.sh
source scripts/debian_headers.sh
find_nvcc
plugin=OFF
if find_tensorrt_headers; then
  plugin=ON
else
  echo "TensorRT's headers are missing, so its plugin is left out; set TENSORRT_INCLUDE_DIR" >&2
fi
custom_op=OFF
if find_onnxruntime_headers && find_highway_headers; then
  custom_op=ON
else
  echo "headers of onnxruntime or Highway are missing, so its custom op and the CPU kernel are left" \
    "out; set ONNXRUNTIME_INCLUDE_DIR and HWY_INCLUDE_DIR" >&2
fi
PATH=$PWD/.venv/bin:$PATH
if ! command -v c++ >/dev/null; then
  echo "a C++ compiler is missing; on Debian and Ubuntu: sudo apt-get install g++" >&2
  exit 3
fi
if ! command -v cmake >/dev/null && [[ -x .venv/bin/python ]]; then install_tools cmake ninja; fi

with_cmake() {
  local generator=()
  if [[ ! -f $folder/CMakeCache.txt ]] && command -v ninja >/dev/null; then generator=(-G Ninja); fi
  cmake -S plugins -B "$folder" "${generator[@]}" "-DFASTMQA_SMS=${list// /;}" \
    -DFASTMQA_TRT="$plugin" "-DTENSORRT_INCLUDE_DIR=${TENSORRT_INCLUDE_DIR:-}" \
    -DFASTMQA_ORT="$custom_op" "-DONNXRUNTIME_INCLUDE_DIR=${ONNXRUNTIME_INCLUDE_DIR:-}" \
    "-DHWY_INCLUDE_DIR=${HWY_INCLUDE_DIR:-}" &&
    nice cmake --build "$folder" --parallel "$(nproc)"
}

# The same files and options as in plugins/CMakeLists.txt, for a bare machine: compiles all of them,
# for the library of kernels alone.
with_nvcc() {
  rm -f "$folder"/*.o "$folder"/*.o.log
  export -f compile
  export folder list
  printf '%s\0' plugins/kernels/{dispatch.cu,check.cpp,describe.cpp,plan.cpp,instantiations/*.cu} |
    xargs -0 -P "$(nproc)" -I FILE bash -c "compile FILE" &&
    "$CUDACXX" -shared -cudart static -Xlinker --version-script=plugins/exports.map "$folder"/*.o \
      -o "$folder/libfastmqa_kernels.so"
}
compile() {
  local sm codes=()
  for sm in $list; do
    if [[ $1 == *_turing.cu && $sm -ge 80 || $1 == *_ampere.cu && $sm -lt 80 ]]; then continue; fi
    codes+=(-gencode "arch=compute_$sm,code=sm_$sm")
    [[ $sm != 80 ]] || codes+=(-gencode "arch=compute_80,code=compute_80")
  done
  ((${#codes[@]})) || return 0
  bash plugins/keep_log.sh "$CUDACXX" --options-file plugins/nvcc.options -DNDEBUG \
    -I plugins/include "${codes[@]}" -c "$1" -o "$folder/${1##*/}.o"
}

started=$SECONDS
mkdir -p "$folder"
log=$folder/build.log
how=with_cmake
command -v cmake >/dev/null || how=with_nvcc
if ! "$how" >"$log" 2>&1; then
  grep -v '^\[.*Building' "$log" >&2
  echo "the kernels were not built" >&2
  exit 1
fi
python scripts/kernel_resources.py check "$folder"
size=$(stat -c %s "$folder/libfastmqa_kernels.so")
echo "$folder/libfastmqa_kernels.so for SM ${list// /, }: $((size / 1000000)) MB," \
  "$((SECONDS - started)) s"
