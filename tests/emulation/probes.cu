// SPDX-License-Identifier: MIT
//
// Small kernels with which test_emulation.py examines the emulation. Each host function launches
// one and returns CUDA's error; `mode` picks a variant, described where it is used.
#include <fastmqa/arch/launch.cuh>
#include <fastmqa/arch/ptx.cuh>

namespace {

using namespace fastmqa;

struct Params {
  const void* in;
  void* out;
  int mode;
};

struct Tile {
  alignas(128) uint16_t rows[32][8];
};

// in: (32, 8) elements; lane l points to row (5 l + 3) % 32. out: (32, 4) registers.
__global__ void ldmatrix_kernel(const __grid_constant__ Params params) {
  auto& tile = dynamic_smem<Tile>();
  const int lane = static_cast<int>(threadIdx.x);
  std::memcpy(tile.rows[lane], static_cast<const char*>(params.in) + 16 * lane, 16);
  __syncwarp();
  const void* row = tile.rows[(5 * lane + 3) % 32];
  auto* out = static_cast<uint32_t (*)[4]>(params.out)[lane];
  uint32_t four[4] = {}, two[2] = {};
  if (params.mode == 0) ptx::ldmatrix_x4(four, row);
  if (params.mode == 1) ptx::ldmatrix_x4_trans(four, row);
  if (params.mode == 2) ptx::ldmatrix_x2(two, row);
  if (params.mode == 3) ptx::ldmatrix_x2_trans(two, row);
  for (int i = 0; i < 4; ++i) out[i] = params.mode < 2 ? four[i] : i < 2 ? two[i] : 0;
}

struct Fragments {
  uint32_t a[32][4];
  uint32_t b[32][2];
};

// in: Fragments. out: (32, 4) sums, added to. mode 1: bfloat16.
__global__ void mma_kernel(const __grid_constant__ Params params) {
  const auto& in = *static_cast<const Fragments*>(params.in);
  const int lane = static_cast<int>(threadIdx.x);
  auto& d = static_cast<float (*)[4]>(params.out)[lane];
  if (params.mode) {
    ptx::mma_16x8x16(d, in.a[lane], in.b[lane][0], in.b[lane][1], __nv_bfloat16{});
  } else {
    ptx::mma_16x8x16(d, in.a[lane], in.b[lane][0], in.b[lane][1], __half{});
  }
}

// in, out: (32) words. mode m < 32: xor m; otherwise all read lane m - 32. Odd: as float.
__global__ void shuffle_kernel(const __grid_constant__ Params params) {
  const unsigned value = static_cast<const unsigned*>(params.in)[threadIdx.x];
  const auto shuffle = [m = params.mode](auto value) {
    return m < 32 ? __shfl_xor_sync(0xFFFFFFFF, value, m) : __shfl_sync(0xFFFFFFFF, value, m - 32);
  };
  static_cast<unsigned*>(params.out)[threadIdx.x] =
      params.mode % 2 ? __float_as_uint(shuffle(__uint_as_float(value))) : shuffle(value);
}

// in: 3 x 16 bytes. out: copies of the 4 rows at the 6 moments named below.
__global__ void cp_async_kernel(const __grid_constant__ Params params) {
  auto& tile = dynamic_smem<Tile>();
  auto* in = static_cast<const uint4*>(params.in);
  auto* out = static_cast<char*>(params.out);
  const auto record = [&](int moment) { std::memcpy(out + 64 * moment, tile.rows, 64); };
  if (params.mode == 1) {
    ptx::cp_async_16(tile.rows[0], in, true);
    ptx::cp_async_commit();
    return;  // never waits
  }
  if (params.mode == 2) ptx::cp_async_16(&tile.rows[0][4], in, true);
  if (params.mode == 3) ptx::cp_async_16(tile.rows[0], &in->z, true);
  if (params.mode == 4) ptx::cp_async_16(tile.rows[32], in, true);  // behind the last row
  std::memset(tile.rows, 0, 64);
  ptx::cp_async_16(tile.rows[0], in, true);
  ptx::cp_async_commit();
  ptx::cp_async_16(tile.rows[1], in + 1, true);
  ptx::cp_async_16(tile.rows[2], reinterpret_cast<const void*>(16), false);  // must not be read
  ptx::cp_async_commit();
  ptx::cp_async_16(tile.rows[3], in + 2, true);
  record(0);  // two groups and a copy without a group are under way
  ptx::cp_async_wait<2>();
  record(1);
  ptx::cp_async_wait<1>();
  record(2);  // the first group has arrived
  ptx::cp_async_wait<0>();
  record(3);  // the second as well
  ptx::cp_async_commit();
  record(4);  // the last copy now has a group
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  record(5);  // an empty group is all that is left
}

// Every thread of two warps writes a word and reads one of the other warp, or of its own with mode
// 2 or 3. Odd modes do without the barrier.
__global__ void exchange_kernel(const __grid_constant__ Params params) {
  auto* words = dynamic_smem<float[64]>();
  const unsigned thread = threadIdx.x;
  words[thread] = static_cast<float>(thread);
  if (params.mode == 0) __syncthreads();
  if (params.mode == 2) __syncwarp();
  static_cast<float*>(params.out)[thread] = words[thread ^ (params.mode < 2 ? 32 : 1)];
}

// Lanes that part ways in the second of two warps of each block.
__global__ void part_kernel(const __grid_constant__ Params params) {
  const bool odd = threadIdx.x % 2 != 0;
  if (threadIdx.x >= 32) {
    if (params.mode == 0) {
      if (odd) __syncwarp();
      __shfl_xor_sync(0xFFFFFFFF, 1.0f, 1);
    }
    if (params.mode == 1 && odd) return;
    if (params.mode == 2 && odd) __syncthreads();
    if (params.mode == 3 && odd) __trap();
    if (params.mode == 4) __syncwarp(0xFFFF0000);
    if (params.mode == 5) __shfl_sync(odd ? 0xAAAAAAAA : 0x55555555, 1, 0);
    if (params.mode == 6) __syncwarp(odd ? 0xAAAAAAAA : 0x55555555);  // as it should be
    __syncwarp();
  }
  if (threadIdx.x == 5) return;  // counts as arrived
  __syncthreads();
  static_cast<float*>(params.out)[threadIdx.x] = 1.0f;
}

// Writes the byte `mode` of shared memory in block 1.
__global__ void stray_kernel(const __grid_constant__ Params params) {
  auto* begin = reinterpret_cast<volatile char*>(&dynamic_smem<Tile>());
  if (blockIdx.x == 1 && threadIdx.x == 0) begin[params.mode] = 0;
}

// out[0] counts the threads, out[1 ...] lists block and thread in the order they run in.
__global__ void order_kernel(const __grid_constant__ Params params) {
  auto* out = static_cast<unsigned*>(params.out);
  out[++out[0]] = blockIdx.x * blockDim.x + threadIdx.x;
}

// in: (3, 32) half2, out: (32) half2 of a b + c; or mode 1, 2: in (32) half2 or float, out 2^in.
__global__ void arithmetic_kernel(const __grid_constant__ Params params) {
  const unsigned i = threadIdx.x;
  auto* in = static_cast<const __half2*>(params.in);
  auto* out = static_cast<__half2*>(params.out);
  if (params.mode == 0) out[i] = ptx::fma(in[i], in[i + 32], in[i + 64]);
  if (params.mode == 1) out[i] = ptx::ex2(in[i]);
  if (params.mode == 2) {
    static_cast<float*>(params.out)[i] = ptx::ex2(static_cast<const float*>(params.in)[i]);
  }
}

}  // namespace

extern "C" {

int ldmatrix(const void* in, void* out, int mode) {
  return launch(ldmatrix_kernel, 1, 32, sizeof(Tile), nullptr, {in, out, mode});
}

int mma(const void* in, void* out, int mode) {
  return launch(mma_kernel, 1, 32, 0, nullptr, {in, out, mode});
}

int shuffle(const void* in, void* out, int mode) {
  return launch(shuffle_kernel, 1, 32, 0, nullptr, {in, out, mode});
}

int cp_async(const void* in, void* out, int mode) {
  return launch(cp_async_kernel, 1, 32, sizeof(Tile), nullptr, {in, out, mode});
}

int exchange(const void* in, void* out, int mode) {
  return launch(exchange_kernel, 1, 64, 64 * sizeof(float), nullptr, {in, out, mode});
}

int part(const void* in, void* out, int mode) {
  return launch(part_kernel, 1, 64, 0, nullptr, {in, out, mode});
}

int stray(const void* in, void* out, int mode) {
  return launch(stray_kernel, 3, 32, sizeof(Tile), nullptr, {in, out, mode});
}

int too_little_shared_memory(const void* in, void* out, int mode) {
  return launch(stray_kernel, 3, 32, sizeof(Tile) - 1, nullptr, {in, out, mode});
}

int order(const void* in, void* out, int mode) {
  return launch(order_kernel, 4, 128, 0, nullptr, {in, out, mode});
}

int arithmetic(const void* in, void* out, int mode) {
  return launch(arithmetic_kernel, 1, 32, 0, nullptr, {in, out, mode});
}

int launch_threads(const void* in, void* out, int mode) {
  return launch(stray_kernel, 1, static_cast<unsigned>(mode), sizeof(Tile), nullptr, {in, out, 0});
}

// The conversion that mma uses; in: `mode` float16, out: as many float32.
int convert(const void* in, void* out, int mode) {
  for (int i = 0; i < mode; ++i) {
    static_cast<float*>(out)[i] =
        ptx::emulated::to_float(static_cast<const uint16_t*>(in)[i], __half{});
  }
  return cudaSuccess;
}

}  // extern "C"
