// SPDX-License-Identifier: MIT
//
// Random calls of the CPU kernel against the naive kernels, for sanitizers: each operand is an
// allocation of exactly its size, several callers run at once, each with threads of its own, and
// keys beyond the lengths are NaN. Arguments: how many calls, and the seed. Prints how many were
// right.
#include <fastmqa/attention_cpu.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

using fastmqa::AttentionParams;
using fastmqa::DType;

namespace {

constexpr int kCallers = 3;

// A call and its operands; q, k and v in float32 as well, for the naive kernels.
class Call {
 public:
  explicit Call(uint32_t seed) : random_(seed) {
    constexpr int kHeadSizes[] = {8, 16, 24, 40, 64, 72, 80, 128, 192, 288};
    AttentionParams& a = params_;
    a.batch = any(1, 2);
    a.kv_heads = any(1, 2);
    a.heads = a.kv_heads * any(1, 5) * any(1, 8);
    a.queries = any(0, 1) == 0 ? 1 : any(1, 20);
    a.keys = a.queries == 1 ? any(1, 900) : any(1, 220);
    a.head_size = kHeadSizes[any(0, 9)];
    const bool values_in_keys = any(0, 4) == 0;
    a.v_head_size = values_in_keys ? 8 * any(1, a.head_size / 8) : kHeadSizes[any(0, 9)];
    a.window_left = any(0, 2) == 0 ? any(0, 50) : -1;
    a.window_right = any(0, 1) == 0 ? 0 : -1;
    a.dtype = any(0, 1) == 0 ? DType::kFloat32 : DType::kBFloat16;
    a.softmax_precision = DType::kFloat32;
    a.scale = 1.0f / std::sqrt(static_cast<float>(a.head_size));
    a.softcap = any(0, 3) == 0 ? 5.0f : 0.0f;
    if (any(0, 1) == 0) {
      for (int b = 0; b < a.batch; ++b) lengths_.push_back(any(-1, a.keys + 1));
      a.kv_lengths = lengths_.data();
    }
    a.q_strides = strides(a.heads, a.queries, a.head_size);
    a.k_strides = strides(a.kv_heads, a.keys, a.head_size);
    a.v_strides = strides(a.kv_heads, a.keys, a.v_head_size);
    a.y_strides = strides(a.heads, a.queries, a.v_head_size);
    a.lse_strides = strides(a.heads, a.queries, 1);
    q_ = numbers(a.batch * a.q_strides.batch);
    k_ = numbers(a.batch * a.k_strides.batch);
    v_ = numbers(values_in_keys ? 0 : a.batch * a.v_strides.batch);
    poison(k_, a.k_strides);
    if (!values_in_keys) poison(v_, a.v_strides);
    if (any(0, 2) == 0) make_mask();
    narrow_q_ = narrowed(q_);
    narrow_k_ = narrowed(k_);
    narrow_v_ = narrowed(v_);
  }

  // Whether the kernel, with that pool, finds what the naive kernels find.
  bool is_right(const fastmqa::cpu::ThreadPool& pool) {
    AttentionParams a = params_;
    const int64_t outputs = a.batch * a.y_strides.batch;
    const int64_t rows = a.batch * a.lse_strides.batch;
    const bool is_float = a.dtype == DType::kFloat32;
    std::vector<float> expected(outputs), expected_lse(rows), y(outputs), lse(rows);
    std::vector<uint16_t> narrow_y(outputs);
    AttentionParams naive = a;
    set_operands(&naive, q_.data(), k_.data(), v_.empty() ? nullptr : v_.data());
    std::vector<char> naive_workspace(fastmqa_workspace_bytes(&naive, nullptr, 0));
    naive.workspace = naive_workspace.data();
    naive.dtype = DType::kFloat32;
    naive.y = expected.data();
    naive.lse = expected_lse.data();
    char text[512] = "";
    if (fastmqa_run(&naive, nullptr, 0, nullptr, text, sizeof text) != 0) return complain(text);

    if (is_float) {
      set_operands(&a, q_.data(), k_.data(), v_.empty() ? nullptr : v_.data());
      a.y = y.data();
    } else {
      set_operands(&a, narrow_q_.data(), narrow_k_.data(), v_.empty() ? nullptr : narrow_v_.data());
      a.y = narrow_y.data();
    }
    a.lse = lse.data();
    const size_t bytes = fastmqa_cpu_workspace_bytes(&a, pool.threads);
    const std::unique_ptr<void, decltype(&std::free)> workspace(
        std::aligned_alloc(16, (bytes + 15) / 16 * 16), &std::free);
    a.workspace = workspace.get();
    if (fastmqa_cpu_run(&a, &pool, text, sizeof text) != 0) return complain(text);
    for (int64_t i = 0; i < outputs; ++i) {
      if (!is_float) y[i] = widened(narrow_y[i]);
      const float tolerance = is_float ? 2e-5f : 2e-2f;
      if (!(std::abs(y[i] - expected[i]) <= tolerance)) return complain("y");
    }
    for (int64_t i = 0; i < rows; ++i) {
      if (lse[i] != expected_lse[i] && !(std::abs(lse[i] - expected_lse[i]) <= 1e-4f)) {
        return complain("lse");
      }
    }
    return true;
  }

 private:
  static void set_operands(AttentionParams* a, const void* q, const void* k, const void* v) {
    a->q = q;
    a->k = k;
    a->v = v;
  }
  int any(int least, int most) { return std::uniform_int_distribution<int>(least, most)(random_); }
  static fastmqa::Strides strides(int64_t heads, int64_t positions, int64_t columns) {
    return {heads * positions * columns, positions * columns, columns};
  }
  // bfloat16 numbers, which both types have.
  std::vector<float> numbers(int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> made(static_cast<size_t>(count));
    for (float& x : made) x = widened(narrowed_number(normal(random_)));
    return made;
  }
  void poison(std::vector<float>& of, const fastmqa::Strides& strides) const {
    for (size_t b = 0; b < lengths_.size(); ++b) {
      for (int head = 0; head < params_.kv_heads; ++head) {
        for (int key = std::max(lengths_[b], 0); key < params_.keys; ++key) {
          const auto row = static_cast<int64_t>(b) * strides.batch + head * strides.head;
          std::fill_n(of.begin() + row + key * strides.row, strides.row,
                      std::numeric_limits<float>::quiet_NaN());
        }
      }
    }
  }
  // (1 or B, 1, 1 or S, T), bool or float.
  void make_mask() {
    AttentionParams& a = params_;
    const bool by_batch = any(0, 1) == 0;
    const bool by_row = any(0, 1) == 0;
    const int64_t rows = by_row ? a.queries : 1;
    const int64_t count = (by_batch ? a.batch : 1) * rows * a.keys;
    a.mask_strides = {by_batch ? rows * a.keys : 0, 0, by_row ? a.keys : 0, 1};
    if (any(0, 1) == 0) {
      for (int64_t i = 0; i < count; ++i) bool_mask_.push_back(any(0, 3) != 0);
      a.mask_dtype = DType::kBool;
      a.attn_mask = bool_mask_.data();
    } else {
      float_mask_ = numbers(count);
      for (float& x : float_mask_) {
        if (x < -1.0f) x = -std::numeric_limits<float>::infinity();
      }
      a.mask_dtype = DType::kFloat32;
      a.attn_mask = float_mask_.data();
    }
  }
  static float widened(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
  static uint16_t narrowed_number(float x) {
    return static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16);
  }
  static std::vector<uint16_t> narrowed(const std::vector<float>& from) {
    std::vector<uint16_t> made;
    for (const float x : from) made.push_back(narrowed_number(x));
    return made;
  }
  bool complain(const char* what) const {
    const AttentionParams& a = params_;
    std::printf("%s of B=%d H=%d Hkv=%d S=%d T=%d D=%d V=%d dtype=%d\n", what, a.batch, a.heads,
                a.kv_heads, a.queries, a.keys, a.head_size, a.v_head_size,
                static_cast<int>(a.dtype));
    return false;
  }

  std::mt19937 random_;
  AttentionParams params_{};
  std::vector<int32_t> lengths_;
  std::vector<float> q_, k_, v_, float_mask_;
  std::vector<uint16_t> narrow_q_, narrow_k_, narrow_v_;
  std::vector<uint8_t> bool_mask_;
};

}  // namespace

int main(int, char** arguments) {
  const int calls = std::atoi(arguments[1]);
  const uint32_t seed = static_cast<uint32_t>(std::atoi(arguments[2]));
  std::atomic<int> right = 0;
  // One pool is shared by two callers, which it has to keep apart.
  fastmqa::cpu::ThreadPool pools[2];
  fastmqa_cpu_create_pool(3, &pools[0]);
  fastmqa_cpu_create_pool(2, &pools[1]);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&, caller] {
      for (int i = caller; i < calls; i += kCallers) {
        if (Call(seed + static_cast<uint32_t>(i)).is_right(pools[caller % 2])) ++right;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const auto& pool : pools) fastmqa_cpu_destroy_pool(&pool);
  std::printf("%s: %d of %d\n", fastmqa_cpu_target(0), right.load(), calls);
  return right == calls ? 0 : 1;
}
