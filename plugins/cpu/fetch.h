// SPDX-License-Identifier: MIT
//
// Memory that is read soon, fetched while something else is computed: with few rows of queries
// reading takes about as long as computing, and no processor fetches that far ahead by itself.
// Lines are fetched in the order in which they lie, a few at a time: memory gives them fastest so,
// and a processor that waits for many at once computes nothing meanwhile.
//
// Everything between here and a loop that fetches has to be inlined by force: to GCC a function
// that only fetches has no effect, and so it drops the calls of one that it has not inlined yet.
#pragma once

#include <hwy/base.h>

#include <algorithm>
#include <cstdint>

namespace fastmqa::cpu {

constexpr int32_t kLineBytes = 64;

constexpr int32_t lines_of(int32_t bytes) { return (bytes + kLineBytes - 1) / kLineBytes; }

// The cache that lines are fetched into, as __builtin_prefetch has it.
constexpr int kL1 = 3;
constexpr int kL2 = 2;

// The lines of rows of memory. Rows that follow one another are one.
struct Lines {
  const char* data;
  int64_t stride;  // in bytes
  int32_t in_row;
  int32_t count;  // of all rows

  template <class T>
  HWY_INLINE static Lines of(const T* data, int64_t stride, int32_t rows, int32_t columns) {
    const int32_t bytes = columns * int32_t{sizeof(T)};
    const int32_t count = rows * lines_of(bytes);
    const bool is_one_row = stride == columns && bytes % kLineBytes == 0;
    return {reinterpret_cast<const char*>(data), stride * int64_t{sizeof(T)},
            is_one_row ? count : lines_of(bytes), count};
  }

  // Lines [first, first + n), as far as there are that many. Rows apart go into L2 always: their
  // strides are often powers of two, so that they would drive each other out of L1.
  template <int kCache>
  HWY_INLINE void fetch(int32_t first, int32_t n) const {
    const int32_t end = std::min(first + n, count);
    if (in_row == count) {
      for (; first < end; ++first) __builtin_prefetch(data + first * kLineBytes, 0, kCache);
    } else if (first < end) {
      int32_t at = first % in_row;
      const char* row = data + first / in_row * stride;
      for (; first < end; ++first) {
        __builtin_prefetch(row + at * kLineBytes, 0, kL2);
        if (++at == in_row) {
          at = 0;
          row += stride;
        }
      }
    }
  }
};

// What a product fetches while it reads lines [first, first + n) of its operand: in its course the
// next product's operand, into L2.
struct FetchNext {
  Lines next;
  int32_t rate;  // lines for each line that is read

  static constexpr bool kInRuns = false;  // P V reads some columns of all keys, then the next ones
  HWY_INLINE static FetchNext of(const Lines& next, int32_t lines) {
    return {next, std::max(next.count / lines, 1)};
  }
  HWY_INLINE void fetch(int32_t first, int32_t n) const { next.fetch<kL2>(first * rate, n * rate); }
};

// The same: what the product itself reads `distance` lines later, and at its end what the next one
// begins with, into L1.
struct FetchAhead {
  Lines own;
  Lines next;
  int32_t distance;

  static constexpr bool kInRuns = true;  // P V reads all columns of some keys, then the next keys
  HWY_INLINE static FetchAhead of(const Lines& own, const Lines& next, int32_t distance) {
    return {own, next, std::min(distance, own.count)};
  }
  HWY_INLINE void fetch(int32_t first, int32_t n) const {
    const int32_t at = first + distance;
    if (at < own.count) {
      own.fetch<kL1>(at, n);
    } else {
      next.fetch<kL1>(at - own.count, n);
    }
  }
};

}  // namespace fastmqa::cpu
