// SPDX-License-Identifier: MIT
#include "../instantiate.cuh"

namespace fastmqa {
[[maybe_unused]] static const bool kEntered = instantiate<DType::kFloat32, 32, 32, kTuring>() &&
                                              instantiate<DType::kFloat32, 64, 64, kTuring>() &&
                                              instantiate<DType::kFloat32, 80, 80, kTuring>() &&
                                              instantiate<DType::kFloat32, 96, 96, kTuring>() &&
                                              instantiate<DType::kFloat32, 128, 128, kTuring>() &&
                                              instantiate<DType::kFloat32, 192, 192, kTuring>() &&
                                              instantiate<DType::kFloat32, 256, 256, kTuring>() &&
                                              instantiate<DType::kFloat32, 288, 256, kTuring>() &&
                                              instantiate<DType::kFloat32, 576, 512, kTuring>();
}  // namespace fastmqa
