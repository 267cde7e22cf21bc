# shellcheck shell=bash
# SPDX-License-Identifier: MIT
# Sourced by the scripts that build the TensorRT plugin, from the repository's root, after nvcc.sh.

# Sets and exports TENSORRT_INCLUDE_DIR, the folder of NvInfer.h: where it is set, or on this
# machine, or taken from the PyPI package that bundles NVIDIA's headers (Apache-2.0). Fails without.
find_tensorrt_headers() {
  local place
  for place in "${TENSORRT_INCLUDE_DIR:-}" "${TENSORRT_ROOT:+$TENSORRT_ROOT/include}" /usr/include \
    "/usr/include/$(uname -m)-linux-gnu" build/tensorrt/include; do
    if [[ -n $place && -f $place/NvInfer.h ]]; then
      TENSORRT_INCLUDE_DIR=$(cd "$place" && pwd)
      export TENSORRT_INCLUDE_DIR
      return
    fi
  done
  echo "taking TensorRT's headers from the package kernel-lens" >&2
  local download
  # Beside its place first, so that a download that was cut short leaves nothing.
  download=$(mktemp -d)
  local code=0
  python -m pip --disable-pip-version-check download -q --no-deps -c constraints.txt \
    -d "$download" kernel-lens &&
    python -m zipfile -e "$download"/kernel_lens-*.whl "$download/wheel" &&
    mkdir -p build/tensorrt &&
    mv "$download/wheel/kernel_lens/include/tensorrt" build/tensorrt/include || code=$?
  rm -r "$download"
  export TENSORRT_INCLUDE_DIR=$PWD/build/tensorrt/include
  return "$code"
}
