// SPDX-License-Identifier: MIT
//
// Every function of arch/ptx.cuh on given registers, lane by lane. test_conformance.py compiles
// this file twice, for the host with the emulation and for a GPU, runs both and compares their
// outputs.
//
//   conformance INPUTS OUTPUTS SM
//
// INPUTS is a file of struct Input, OUTPUTS becomes one of as many struct Output; SM is the GPU's
// compute capability, 75 for 7.5.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fastmqa/arch/launch.cuh>
#include <fastmqa/arch/ptx.cuh>

namespace {

using namespace fastmqa;

// What one warp gets.
struct Input {
  alignas(16) uint16_t rows[32][8];  // also what cp.async copies
  uint32_t row_of[32];               // the row of `rows` that a lane points to
  uint32_t half_a[32][4], half_b[32][2];
  uint32_t bfloat16_a[32][4], bfloat16_b[32][2];
  float c[32][4];
  float exponents[32];
  uint32_t half_exponents[32];  // two float16 each, as the next
  uint32_t factors[3][32];
};

struct Output {
  uint32_t ldmatrix_x4[32][4], ldmatrix_x4_trans[32][4];
  uint32_t ldmatrix_x2[32][2], ldmatrix_x2_trans[32][2];
  float mma_half[32][4], mma_bfloat16[32][4];
  uint16_t stored[32][8];     // by store_shared_16
  uint16_t copied[2][32][8];  // after the wait for one group of cp.async, and for both
  float ex2[32];
  uint32_t ex2_half[32];
  uint32_t fma[32];
  uint32_t opaque[32];
};

struct Params {
  const Input* inputs;
  Output* outputs;
  int has_bfloat16;
};

struct Shared {
  alignas(128) uint16_t rows[32][8];
  uint16_t stored[32][8];
  uint16_t copied[2][32][8];
};

__device__ __half2 halves(uint32_t bits) {
  __half2 x;
  std::memcpy(static_cast<void*>(&x), &bits, sizeof x);
  return x;
}

__device__ uint32_t bits_of(__half2 x) {
  uint32_t bits;
  std::memcpy(&bits, static_cast<const void*>(&x), sizeof bits);
  return bits;
}

__device__ void multiply_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // as in ptx.cuh
  ptx::mma_16x8x16(d, a, b[0], b[1], __nv_bfloat16{});
#endif
}

// A warp per block.
__global__ void conformance_kernel(const __grid_constant__ Params params) {
  const Input& in = params.inputs[blockIdx.x];
  Output& out = params.outputs[blockIdx.x];
  auto& shared = dynamic_smem<Shared>();
  const int lane = static_cast<int>(threadIdx.x);

  std::memcpy(shared.rows[lane], in.rows[lane], sizeof in.rows[lane]);
  __syncwarp();
  const void* row = shared.rows[in.row_of[lane]];
  ptx::ldmatrix_x4(out.ldmatrix_x4[lane], row);
  ptx::ldmatrix_x4_trans(out.ldmatrix_x4_trans[lane], row);
  ptx::ldmatrix_x2(out.ldmatrix_x2[lane], row);
  ptx::ldmatrix_x2_trans(out.ldmatrix_x2_trans[lane], row);

  for (int i = 0; i < 4; ++i) {
    out.mma_half[lane][i] = in.c[lane][i];
    out.mma_bfloat16[lane][i] = in.c[lane][i];
  }
  ptx::mma_16x8x16(out.mma_half[lane], in.half_a[lane], in.half_b[lane][0], in.half_b[lane][1],
                   __half{});
  if (params.has_bfloat16) {
    multiply_bfloat16(out.mma_bfloat16[lane], in.bfloat16_a[lane], in.bfloat16_b[lane]);
  }

  uint4 chunk;
  std::memcpy(static_cast<void*>(&chunk), in.rows[lane], sizeof chunk);
  ptx::store_shared_16(shared.stored[lane], chunk);
  // Odd lanes copy zeros, from an address that must not be read.
  const bool valid = lane % 2 == 0;
  const void* nowhere = reinterpret_cast<const void*>(16);
  ptx::cp_async_16(shared.copied[0][lane], valid ? in.rows[lane] : nowhere, valid);
  ptx::cp_async_commit();
  ptx::cp_async_16(shared.copied[1][lane], valid ? in.rows[31 - lane] : nowhere, valid);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncwarp();
  std::memcpy(out.stored[lane], shared.stored[lane], sizeof out.stored[lane]);
  std::memcpy(out.copied[0][lane], shared.copied[0][lane ^ 1], sizeof out.copied[0][lane]);
  ptx::cp_async_wait<0>();
  __syncwarp();
  std::memcpy(out.copied[1][lane], shared.copied[1][lane ^ 1], sizeof out.copied[1][lane]);

  out.ex2[lane] = ptx::ex2(in.exponents[lane]);
  out.ex2_half[lane] = bits_of(ptx::ex2(halves(in.half_exponents[lane])));
  out.fma[lane] = bits_of(ptx::fma(halves(in.factors[0][lane]), halves(in.factors[1][lane]),
                                   halves(in.factors[2][lane])));
  out.opaque[lane] = static_cast<uint32_t>(ptx::opaque(static_cast<int>(in.row_of[lane])));
}

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Memory that host and device share.
template <class T>
T* allocate(size_t count) {
  void* memory = nullptr;
  require(cudaMallocManaged(&memory, count * sizeof(T), cudaMemAttachGlobal), "allocation");
  std::memset(memory, 0, count * sizeof(T));
  return static_cast<T*>(memory);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  std::FILE* file = std::fopen(argv[1], "rb");
  if (file == nullptr) return 2;
  std::fseek(file, 0, SEEK_END);
  const size_t count = static_cast<size_t>(std::ftell(file)) / sizeof(Input);
  std::rewind(file);
  auto* inputs = allocate<Input>(count);
  auto* outputs = allocate<Output>(count);
  const size_t read = std::fread(inputs, sizeof(Input), count, file);
  std::fclose(file);
  if (count == 0 || read != count) return 2;

  const Params params{inputs, outputs, std::atoi(argv[3]) >= 80};
  require(
      launch(conformance_kernel, static_cast<unsigned>(count), 32, sizeof(Shared), nullptr, params),
      "launch");
  require(cudaDeviceSynchronize(), "kernel");

  file = std::fopen(argv[2], "wb");
  if (file == nullptr) return 2;
  const size_t written = std::fwrite(outputs, sizeof(Output), count, file);
  return std::fclose(file) == 0 && written == count ? 0 : 2;
}
