# shellcheck shell=bash
# SPDX-License-Identifier: MIT
# Sourced by the scripts that build the CPU kernel and onnxruntime's custom op, from the repository's
# root. Headers are looked for where a variable says, on this machine, and taken from Debian's packages
# else, into build/ and without root.

# Sets and exports ONNXRUNTIME_INCLUDE_DIR, the folder of onnxruntime_cxx_api.h (MIT). Debian's 1.21 is
# older than every onnxruntime that the library is for, and a library runs with newer ones.
find_onnxruntime_headers() {
  find_headers ONNXRUNTIME_INCLUDE_DIR onnxruntime_cxx_api.h libonnxruntime-dev \
    onnxruntime /usr/include/onnxruntime /usr/include/onnxruntime/core/session
}

# Sets and exports HWY_INCLUDE_DIR, the folder of hwy/highway.h (Apache-2.0 or BSD), 1.2 or newer.
find_highway_headers() {
  find_headers HWY_INCLUDE_DIR hwy/highway.h libhwy-dev highway
}

# find_headers VARIABLE HEADER PACKAGE NAME [FOLDER...]: sets VARIABLE to the folder that has HEADER,
# which may end up in build/NAME/include. Fails if it is nowhere.
find_headers() {
  local variable=$1 header=$2 package=$3 built=build/$4/include place
  shift 4
  for place in "${!variable:-}" "$@" "$built"; do
    if [[ -n $place && -f $place/$header ]]; then
      export "$variable=$(cd "$place" && pwd)"
      return
    fi
  done
  echo "taking $header from Debian's package $package" >&2
  local unpacked code=0
  unpacked=$(mktemp -d)
  unpack_debian "$package" "$unpacked" || code=$?
  if ((code == 0)); then
    place=$(find "$unpacked" -path "*/$header" -printf '%h' -quit)
    mkdir -p "${built%/*}"
    mv "${place%"/$(dirname "$header")"}" "$built"
    export "$variable=$PWD/$built"
  fi
  rm -r "$unpacked"
  return "$code"
}

# unpack_debian PACKAGE FOLDER: downloads Debian trixie's package and unpacks it. apt gets a
# configuration of its own, whose one source is this machine's with the release's name replaced.
unpack_debian() (
  local package=$1 unpacked=$2 release source keyring options
  release=$(. /etc/os-release && [[ $ID == debian ]] && echo "$VERSION_CODENAME") || release=
  if [[ -n $release ]]; then
    # shellcheck disable=SC2016  # apt's variables
    source=$(apt-get indextargets --no-release-info --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' \
      'Created-By: Packages' | awk -v release="$release" '$1 == release && $2 == "main" { print $3; exit }')
  fi
  if [[ -z ${source:-} ]]; then
    echo "apt has no source of Debian's packages here" >&2
    exit 1
  fi
  cd "$unpacked" || exit
  mkdir -p apt/lists/partial apt/cache/archives/partial
  keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  echo "deb [signed-by=$keyring] $source trixie main" >apt/sources.list
  # As this user: apt's own could not enter the folder.
  options=(-qq -o "APT::Sandbox::User=$(id -un)" -o Acquire::Languages=none
    -o "Dir::Etc::SourceList=$PWD/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o "Dir::State::Lists=$PWD/apt/lists" -o "Dir::Cache=$PWD/apt/cache")
  apt-get "${options[@]}" update && apt-get "${options[@]}" download "$package" &&
    dpkg-deb -x ./*.deb .
)
