# SPDX-License-Identifier: MIT
"""Compiles the libraries into the wheel where the machine can, and says there what it lacked.

Variables: ``FASTMQA_BUILD_LIBRARIES=0`` leaves the libraries out, ``FASTMQA_SMS="75;80"`` chooses
the compute capabilities; nvcc and headers are looked for as plugins/CMakeLists.txt does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARIES = (
    "libfastmqa_cpu.so",
    "libfastmqa_kernels.so",
    "libfastmqa_ort.so",
    "libfastmqa_trt.so",
)


class Libraries(BuildHookInterface):
    """Adds ``fastmqa_export/lib``: the libraries, and what `fastmqa-export doctor` says of them."""

    def dependencies(self) -> list[str]:
        """What compiling needs from PyPI."""
        return [] if self._reason_not_to_build() else ["cmake>=3.25", "ninja"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless the build is editable: a clone has ``scripts/build_kernels.sh``."""
        if version == "editable":
            return
        self.folder = Path(tempfile.mkdtemp(prefix="fastmqa-build-"))
        include = build_data["force_include"]
        if reason := self._reason_not_to_build():
            said = f"no library was compiled at installation: {reason}"
        else:
            said = self._compile()
            for name in LIBRARIES:
                if (built := self.folder / name).is_file():
                    include[str(built)] = f"fastmqa_export/lib/{name}"
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"
        note = self.folder / "built.txt"
        note.write_text(f"{said}\n", encoding="utf-8")
        include[str(note)] = "fastmqa_export/lib/built.txt"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled."""
        if version != "editable":
            shutil.rmtree(self.folder, ignore_errors=True)

    def _reason_not_to_build(self) -> str:
        if os.environ.get("FASTMQA_BUILD_LIBRARIES") == "0":
            return "FASTMQA_BUILD_LIBRARIES is 0"
        nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
        places = (Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc",)
        if not nvcc and not any(place.is_file() for place in places):
            return "nvcc is neither in CUDACXX, on PATH, in CUDA_HOME nor in /usr/local/cuda"
        if not shutil.which("c++"):
            return "there is no C++ compiler (c++)"
        return ""

    def _compile(self) -> str:
        """Run CMake; what it says of TensorRT and onnxruntime is the note."""
        configure = ["cmake", "-S", str(Path(self.root) / "plugins"), "-B", str(self.folder)]
        configure += ["-G", "Ninja"]
        if sms := os.environ.get("FASTMQA_SMS"):
            configure.append(f"-DFASTMQA_SMS={sms}")
        said = self._run(configure)
        self._run(["cmake", "--build", str(self.folder)])
        about = [
            line.removeprefix("-- ")
            for line in said.splitlines()
            if "TensorRT" in line or "onnxruntime" in line
        ]
        return "\n".join(["compiled at installation", *about])

    @staticmethod
    def _run(command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} failed; FASTMQA_BUILD_LIBRARIES=0 installs without the "
                f"libraries.\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            )
        return done.stdout
