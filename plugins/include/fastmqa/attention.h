// SPDX-License-Identifier: MIT
//
// The contract of the CUDA kernels: everything that TensorRT's plugin, onnxruntime's custom op and
// PyTorch know of them. Plain C++17, no CUDA syntax and no CUDA header.
//
// Shape letters: B batch, H query heads, Hkv key/value heads, S queries, T keys, D head size of q
// and k, V head size of v and y. The op itself is described in docs/op.md.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;  // what cudaStream_t points to

namespace fastmqa {

// Numbers of onnx.TensorProto.DataType.
enum class DType : int32_t { kNone = 0, kFloat32 = 1, kBool = 9, kFloat16 = 10, kBFloat16 = 16 };

// Distances in elements; the last axis, of the head's columns, is always contiguous.
struct Strides {
  int64_t batch;
  int64_t head;
  int64_t row;  // from one position to the next
};

// Distances in elements, 0 along an axis that is broadcast.
struct MaskStrides {
  int64_t batch;
  int64_t head;
  int64_t row;
  int64_t key;
};

struct AttentionParams {
  const void* q;              // (B, H, S, D), dtype
  const void* k;              // (B, Hkv, T, D), dtype
  const void* v;              // (B, Hkv, T, V), dtype; null: the first V columns of k
  const void* attn_mask;      // (B, H, S, T), mask_dtype; null: none
  const int32_t* kv_lengths;  // (B,) valid leading keys, clamped to [0, T]; null: T
  const int32_t* q_start;     // (B,) position of the first query; null: length - S
  void* y;                    // (B, H, S, V), dtype
  float* lse;                 // (B, H, S) natural log of the sum of exponentials; null: not wanted
  void* workspace;  // at least workspace_bytes(), 16-byte aligned; may be null if that is 0

  Strides q_strides;
  Strides k_strides;
  Strides v_strides;
  Strides y_strides;
  Strides lse_strides;
  MaskStrides mask_strides;

  int32_t batch;         // B
  int32_t heads;         // H, a multiple of Hkv
  int32_t kv_heads;      // Hkv
  int32_t queries;       // S
  int32_t keys;          // T
  int32_t head_size;     // D
  int32_t v_head_size;   // V
  int32_t window_left;   // sees positions >= p - window_left; -1: unbounded
  int32_t window_right;  // sees positions <= p + window_right; -1: unbounded; causal is 0

  DType dtype;              // of q, k, v and y: kFloat16, kBFloat16 or kFloat32
  DType mask_dtype;         // kBool (true: may attend), kFloat32 or dtype (added); kNone: no mask
  DType softmax_precision;  // kFloat32, or kFloat16 with dtype kFloat16

  float scale;    // multiplies q.k
  float softcap;  // c > 0: a score x becomes c * tanh(x / c); 0: off
};

// What a launch is chosen for; query_device() fills it in once, run() asks the driver nothing.
struct Device {
  int32_t sm;            // compute capability, 75 for 7.5
  int32_t sm_count;      // streaming multiprocessors
  int32_t shared_bytes;  // of shared memory that one block may have (opt-in)
};

enum class Code : int32_t {
  kOk = 0,
  kInvalid = 1,      // the arguments contradict each other or the contract above
  kUnsupported = 2,  // no variant covers them; the text names those that are near
  kCudaError = 3,    // what CUDA answered to a launch
};

struct Status {
  Code code;
  char text[448];  // empty if ok; otherwise what was given, what is accepted, what to do
};

// How a call may be divided, for callers that measure: 0 is the planner's own choice, 1 to kTactics
// are others of tile and splits. Each of them takes every call that is supported.
constexpr int32_t kTactics = 5;

// Whether run() would take these arguments; pointers are not looked at.
Status supports(const AttentionParams& params, const Device& device);

// Writes those tactics whose launches differ for this call, 0 first, and returns how many; 0 if it
// is not supported.
int32_t distinct_tactics(const AttentionParams& params, const Device& device,
                         int32_t (&tactics)[kTactics + 1]);

// Bytes of scratch memory that run() needs for exactly these sizes; 0 if they are not supported.
size_t workspace_bytes(const AttentionParams& params, const Device& device, int32_t tactic = 0);

// Enough of them for every call whose B, S and T are at most these, whatever the tactic.
size_t workspace_bound(const AttentionParams& largest, const Device& device);

// Enqueues the kernels and returns; refuses bad arguments before the launch. Allocates nothing,
// waits for nothing. The same inputs and tactic give the same bits.
Status run(const AttentionParams& params, const Device& device, CUstream_st* stream,
           int32_t tactic = 0);

// Describes the CUDA device `ordinal`.
Status query_device(int ordinal, Device* device);

}  // namespace fastmqa

// The same for C and for Python's ctypes. Functions return a Code and write its text (never more
// than text_bytes, always terminated).
extern "C" {
int32_t fastmqa_supports(const fastmqa::AttentionParams*, const fastmqa::Device*, char* text,
                         size_t text_bytes);
size_t fastmqa_workspace_bytes(const fastmqa::AttentionParams*, const fastmqa::Device*,
                               int32_t tactic);
size_t fastmqa_workspace_bound(const fastmqa::AttentionParams*, const fastmqa::Device*);
int32_t fastmqa_run(const fastmqa::AttentionParams*, const fastmqa::Device*, int32_t tactic,
                    void* stream, char* text, size_t text_bytes);
int32_t fastmqa_query_device(int32_t ordinal, fastmqa::Device*, char* text, size_t text_bytes);

// The launches that run() would enqueue, as JSON: see docs/kernels.md. Returns the bytes that the
// whole text takes, its terminator included, and writes as much of it as fits.
size_t fastmqa_describe_launches(const fastmqa::AttentionParams*, const fastmqa::Device*,
                                 int32_t tactic, char* json, size_t json_bytes);

// The table of variants that this library was built with, as JSON; likewise.
size_t fastmqa_describe_variants(char* json, size_t json_bytes);
}
