// SPDX-License-Identifier: MIT
//
// The two products, as register tiles. Where a unit has about as many rows as vectors have lanes,
// its rows lie in lanes for Q K^T (`scores_of_panel`): Q is transposed once, K's elements are
// broadcast from where they are, and nothing is summed across lanes. Fewer rows take dot products
// along D instead (`scores_of_rows`). P V always has V's columns in lanes.
#if defined(FASTMQA_CPU_PRODUCTS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTMQA_CPU_PRODUCTS_INL_H
#undef FASTMQA_CPU_PRODUCTS_INL_H
#else
#define FASTMQA_CPU_PRODUCTS_INL_H
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "fetch.h"
#include "lanes-inl.h"
#include "plan.h"

HWY_BEFORE_NAMESPACE();
namespace fastmqa::cpu::HWY_NAMESPACE {

// Rows of a matrix in memory, `stride` elements apart.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;

  HWY_INLINE const T* operator[](int64_t row) const { return data + row * stride; }
  HWY_INLINE Rows from(int64_t row, int64_t column) const {
    return {(*this)[row] + column, stride};
  }
};

// Accumulators of a register tile; the rest hold operands.
constexpr int32_t kAccumulators = kRegisters == 32 ? 24 : 12;

// Vectors of rows in one panel, at most: 48 rows with AVX-512, 32 with AVX2.
constexpr int32_t kPanelVectors = kRegisters == 32 ? 3 : 4;

// Keys of a register tile beside that many vectors of rows. Divides kSplitStep.
constexpr int32_t tile_keys(int32_t vectors) {
  return std::min(kMostTileKeys, kAccumulators / vectors);
}

// Columns of D after which scores are put aside, so that the panel of Q stays in L1.
constexpr int32_t kDepth = 192;

constexpr int32_t kLineColumns = kLineBytes / 4;  // of float32

// scores[key][row] of a register tile, (tile_keys, W) with W = kVectors lanes: plus K Q^T over
// `depth` columns. k: (tile_keys, depth), of which `line` lines of the product come before;
// queries: (depth, W).
template <int32_t kVectors, bool kFirst, class D>
HWY_INLINE void scores_tile(D d, Rows<float> k, const float* HWY_RESTRICT queries, int32_t depth,
                            float* HWY_RESTRICT scores, const FetchNext& fetching, int32_t line) {
  constexpr int32_t kKeys = tile_keys(kVectors);
  constexpr int32_t kWidth = kVectors * static_cast<int32_t>(hn::MaxLanes(D()));
  constexpr int32_t kN = static_cast<int32_t>(hn::MaxLanes(D()));
  hn::Vec<D> sums[kKeys][kVectors];
#pragma GCC unroll 16
  for (int32_t i = 0; i < kKeys; ++i) {
#pragma GCC unroll 4
    for (int32_t v = 0; v < kVectors; ++v) {
      sums[i][v] = kFirst ? hn::Zero(d) : hn::Load(d, scores + i * kWidth + v * kN);
    }
  }
  for (int32_t column = 0; column < depth;) {
    fetching.fetch(line, kKeys);
    line += kKeys;
    for (const int32_t end = std::min(column + kLineColumns, depth); column < end; ++column) {
      hn::Vec<D> q[kVectors];
#pragma GCC unroll 4
      for (int32_t v = 0; v < kVectors; ++v) q[v] = hn::Load(d, queries + v * kN);
#pragma GCC unroll 16
      for (int32_t i = 0; i < kKeys; ++i) {
        const auto element = hn::Set(d, k[i][column]);
#pragma GCC unroll 4
        for (int32_t v = 0; v < kVectors; ++v) sums[i][v] = hn::MulAdd(element, q[v], sums[i][v]);
      }
      queries += kWidth;
    }
  }
#pragma GCC unroll 16
  for (int32_t i = 0; i < kKeys; ++i) {
#pragma GCC unroll 4
    for (int32_t v = 0; v < kVectors; ++v) hn::Store(sums[i][v], d, scores + i * kWidth + v * kN);
  }
}

// scores (keys, W) = K Q^T for `keys` of them, rounded up to whole register tiles; k must have as
// many rows. queries: (head_size, W).
template <int32_t kVectors, class D>
HWY_NOINLINE void scores_of_panel(D d, Rows<float> k, const float* queries, int32_t keys,
                                  int32_t head_size, const FetchNext& fetching, float* scores) {
  constexpr int32_t kKeys = tile_keys(kVectors);
  constexpr int32_t kWidth = kVectors * static_cast<int32_t>(hn::MaxLanes(D()));
  for (int32_t column = 0; column < head_size; column += kDepth) {
    const int32_t depth = std::min(kDepth, head_size - column);
    for (int32_t key = 0; key < keys; key += kKeys) {
      const Rows<float> rows = k.from(key, column);
      float* const tile = scores + key * kWidth;
      const int32_t line = keys * (column / kLineColumns) + key * lines_of(4 * depth);
      if (column == 0) {
        scores_tile<kVectors, true>(d, rows, queries, depth, tile, fetching, line);
      } else {
        scores_tile<kVectors, false>(d, rows, queries, depth, tile, fetching, line);
      }
    }
    queries += kDepth * kWidth;
  }
}

// Sums of the lanes of four vectors, side by side.
template <class D>
HWY_INLINE hn::Vec<hn::FixedTag<float, 4>> sums_of_four(D d, hn::Vec<D> a, hn::Vec<D> b,
                                                        hn::Vec<D> c, hn::Vec<D> e) {
  if constexpr (hn::MaxLanes(D()) > 4) {
    const hn::Half<D> half;
    const auto fold = [&](auto x) HWY_ATTR {
      return hn::Add(hn::LowerHalf(half, x), hn::UpperHalf(half, x));
    };
    return sums_of_four(half, fold(a), fold(b), fold(c), fold(e));
  } else {
    const hn::Repartition<double, D> pairs;
    const auto ab = hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
    const auto ce = hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e));
    const auto lower = hn::InterleaveLower(pairs, hn::BitCast(pairs, ab), hn::BitCast(pairs, ce));
    const auto upper = hn::InterleaveUpper(pairs, hn::BitCast(pairs, ab), hn::BitCast(pairs, ce));
    return hn::Add(hn::BitCast(d, lower), hn::BitCast(d, upper));
  }
}

// scores[row][key] of kRows rows and four keys, whose elements are converted as they are loaded:
// each is used for few products. `line` lines of the product come before, or it is none that
// fetches.
template <int32_t kRows, class D, class T>
HWY_INLINE void dot_tile(D d, const T* const (&k)[4], Rows<float> queries, int32_t head_size,
                         const FetchAhead& fetching, int32_t line, float* HWY_RESTRICT scores) {
  constexpr int32_t kN = static_cast<int32_t>(hn::MaxLanes(D()));
  constexpr int32_t kLineColumns = kLineBytes / int32_t{sizeof(T)};
  hn::Vec<D> sums[kRows][4];
#pragma GCC unroll 4
  for (int32_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int32_t i = 0; i < 4; ++i) sums[r][i] = hn::Zero(d);
  }
  for (int32_t column = 0; column < head_size; column += kN) {
    hn::Vec<D> keys[4];
#pragma GCC unroll 4
    for (int32_t i = 0; i < 4; ++i) keys[i] = load(d, k[i] + column);
    if (line >= 0 && column % kLineColumns == 0) {
      fetching.fetch(line, 4);
      line += 4;
    }
#pragma GCC unroll 4
    for (int32_t r = 0; r < kRows; ++r) {
      const auto q = hn::Load(d, queries[r] + column);
#pragma GCC unroll 4
      for (int32_t i = 0; i < 4; ++i) sums[r][i] = hn::MulAdd(q, keys[i], sums[r][i]);
    }
  }
  const hn::FixedTag<float, 4> four;
#pragma GCC unroll 4
  for (int32_t r = 0; r < kRows; ++r) {
    hn::StoreU(sums_of_four(d, sums[r][0], sums[r][1], sums[r][2], sums[r][3]), four,
               scores + r * kFewRowsKeys);
  }
}

// Rows of such a tile.
constexpr int32_t kDotRows = kRegisters == 32 ? 4 : 2;

// scores (rows, kFewRowsKeys) = Q K^T for `keys` of them, and up to three more that mean nothing.
template <class D, class T>
HWY_NOINLINE void scores_of_rows(D d, Rows<T> k, Rows<float> queries, int32_t rows, int32_t keys,
                                 int32_t head_size, const FetchAhead& fetching, float* scores) {
  const int32_t lines = lines_of(head_size * int32_t{sizeof(T)});
  for (int32_t key = 0; key < keys; key += 4) {
    const T* four[4];
    for (int32_t i = 0; i < 4; ++i) four[i] = k[std::min(key + i, keys - 1)];
    int32_t row = 0;
    const auto tile = [&](auto count) HWY_ATTR {
      dot_tile<count()>(d, four, queries.from(row, 0), head_size, fetching,
                        row == 0 ? key * lines : -1, scores + row * kFewRowsKeys + key);
      row += count();
    };
    while (rows - row >= kDotRows) tile(std::integral_constant<int32_t, kDotRows>());
    if constexpr (kDotRows == 4) {
      if (rows - row == 3) tile(std::integral_constant<int32_t, 3>());
      if (rows - row == 2) tile(std::integral_constant<int32_t, 2>());
    }
    if (rows - row == 1) tile(std::integral_constant<int32_t, 1>());
  }
}

// Exponentials as P V reads them: that of a row and a key is at data[row kRowStride + key
// key_stride].
template <int64_t kRowStride>
struct Weights {
  const float* data;
  int64_t key_stride;

  HWY_INLINE Weights from(int32_t row, int32_t key) const {
    return {data + row * kRowStride + key * key_stride, key_stride};
  }
};

// Rows of a register tile of the second product, at most, and vectors of columns beside them:
// enough sums to hide the latency of a multiplication.
constexpr int32_t kTileRows = kRegisters == 32 ? 8 : 6;
constexpr int32_t tile_columns(int32_t rows) {
  return rows == 1 ? 8 : rows <= (kRegisters == 32 ? 4 : 3) ? 4 : 2;
}

// Some rows of the product with a run of keys, and how many of these they need.
template <int64_t kRowStride, class Fetch>
struct OutputRows {
  Weights<kRowStride> weights;
  const float* factors;  // or null, where outputs are not to be multiplied
  float* outputs;
  int64_t outputs_stride;
  int32_t rows;
  int32_t keys;
  Fetch fetching;  // of which these rows take the keys turn, turn + turns, ...
  int32_t turn;
  int32_t turns;
  int32_t line;       // of V, that the run begins with
  int32_t key_lines;  // of V
  int32_t run_keys;
};

// outputs (kRows, kVectors lanes) = outputs factors + P V over the keys, from `column` on.
template <int32_t kRows, int32_t kVectors, int64_t kRowStride, class Fetch, class D, class T>
HWY_INLINE void outputs_tile(D d, const OutputRows<kRowStride, Fetch>& tile, Rows<T> v,
                             int32_t column) {
  constexpr int32_t kN = static_cast<int32_t>(hn::MaxLanes(D()));
  float* HWY_RESTRICT outputs = tile.outputs + column;
  hn::Vec<D> sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int32_t r = 0; r < kRows; ++r) {
    const auto factor = hn::Set(d, tile.factors == nullptr ? 1.0f : tile.factors[r]);
#pragma GCC unroll 8
    for (int32_t c = 0; c < kVectors; ++c) {
      sums[r][c] = hn::Mul(hn::LoadU(d, outputs + r * tile.outputs_stride + c * kN), factor);
    }
  }
  const float* HWY_RESTRICT weights = tile.weights.data;
  const T* HWY_RESTRICT values = v.data + column;
  constexpr int32_t kT = sizeof(T);
  const int32_t lines_before = lines_of(column * kT);
  const int32_t lines = lines_of((column + kVectors * kN) * kT) - lines_before;
  // A long run is not read as it lies, but all of these columns and then all of the next: what it
  // fetches comes evenly in any order. A short one fetches what lies together.
  const int32_t line = tile.line + lines_before * (Fetch::kInRuns ? tile.run_keys : 1);
  const int32_t key_lines = Fetch::kInRuns ? lines : tile.key_lines;
  int32_t fetched = tile.turn;
  for (int32_t key = 0; key < tile.keys; ++key) {
    if (key == fetched) {
      tile.fetching.fetch(line + key * key_lines, lines);
      fetched += tile.turns;
    }
    hn::Vec<D> columns[kVectors];
#pragma GCC unroll 8
    for (int32_t c = 0; c < kVectors; ++c) columns[c] = load(d, values + c * kN);
#pragma GCC unroll 8
    for (int32_t r = 0; r < kRows; ++r) {
      const auto weight = hn::Set(d, weights[r * kRowStride]);
#pragma GCC unroll 8
      for (int32_t c = 0; c < kVectors; ++c) {
        sums[r][c] = hn::MulAdd(weight, columns[c], sums[r][c]);
      }
    }
    weights += tile.weights.key_stride;
    values += v.stride;
  }
#pragma GCC unroll 8
  for (int32_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int32_t c = 0; c < kVectors; ++c) {
      hn::StoreU(sums[r][c], d, outputs + r * tile.outputs_stride + c * kN);
    }
  }
}

// The same for as many rows as the tile has.
template <int32_t kVectors, class D, int64_t kRowStride, class Fetch, class T>
HWY_NOINLINE void outputs_of_tile(D d, const OutputRows<kRowStride, Fetch>& tile, Rows<T> v,
                                  int32_t column) {
  const auto compute = [&](auto rows) HWY_ATTR {
    if constexpr (rows() <= kTileRows && kVectors <= tile_columns(rows())) {
      outputs_tile<rows(), kVectors>(d, tile, v, column);
    }
  };
  switch (tile.rows) {
    case 1:
      return compute(std::integral_constant<int32_t, 1>());
    case 2:
      return compute(std::integral_constant<int32_t, 2>());
    case 3:
      return compute(std::integral_constant<int32_t, 3>());
    case 4:
      return compute(std::integral_constant<int32_t, 4>());
    case 5:
      return compute(std::integral_constant<int32_t, 5>());
    case 6:
      return compute(std::integral_constant<int32_t, 6>());
    case 7:
      return compute(std::integral_constant<int32_t, 7>());
    case 8:
      return compute(std::integral_constant<int32_t, 8>());
  }
}

// Columns [column, v_head_size) of some tiles, kVectors vectors at a time and the rest by fewer.
// All tiles take a panel of columns in turn: a block of it is read from L2 once, and then lies in
// L1.
template <int32_t kVectors, class D, int64_t kRowStride, class Fetch, class T>
HWY_INLINE void outputs_of_tiles(D d, const OutputRows<kRowStride, Fetch>* tiles, int32_t count,
                                 Rows<T> v, int32_t column, int32_t v_head_size) {
  constexpr int32_t kColumns = kVectors * static_cast<int32_t>(hn::MaxLanes(D()));
  for (; column + kColumns <= v_head_size; column += kColumns) {
    for (int32_t i = 0; i < count; ++i) outputs_of_tile<kVectors>(d, tiles[i], v, column);
  }
  if (column == v_head_size) return;
  if constexpr (kVectors > 1) {
    outputs_of_tiles<kVectors / 2>(d, tiles, count, v, column, v_head_size);
  } else if constexpr (kColumns > 8) {
    outputs_of_tiles<1>(EightLanes(), tiles, count, v, column, v_head_size);
  }
}

// outputs (rows, V) = outputs factors + P V over keys [first_key, first_key + keys), of which a row
// needs those before `ends`. All columns of run_keys keys come before the next keys, so that what
// is read from memory is read in long runs.
template <class D, int64_t kRowStride, class Fetch, class T>
HWY_NOINLINE void add_outputs(D d, Weights<kRowStride> weights, Rows<T> v, int32_t rows,
                              int32_t first_key, int32_t keys, int32_t run_keys,
                              const int32_t* ends, const float* factors, int32_t v_head_size,
                              const Fetch& fetching, float* outputs) {
  constexpr int32_t kMostTiles = 8;  // of a panel, or of rows that fill few lanes
  OutputRows<kRowStride, Fetch> tiles[kMostTiles];
  const int32_t count = (rows + kTileRows - 1) / kTileRows;
  const int32_t lines = lines_of(v_head_size * int32_t{sizeof(T)});
  for (int32_t key = 0; key < keys; key += run_keys) {
    const int32_t run = std::min(run_keys, keys - key);
    for (int32_t i = 0; i < count; ++i) {
      const int32_t row = rows * i / count;
      const int32_t next = rows * (i + 1) / count;
      const int32_t end = *std::max_element(ends + row, ends + next);
      tiles[i] = {weights.from(row, key),
                  key == 0 ? factors + row : nullptr,
                  outputs + int64_t{row} * v_head_size,
                  v_head_size,
                  next - row,
                  std::clamp(end - first_key - key, 0, run),
                  fetching,
                  i,
                  count,
                  key * lines,
                  lines,
                  run};
    }
    const Rows<T> values = v.from(key, 0);
    switch (tile_columns(tiles[count - 1].rows)) {  // it has no fewer rows than the others
      case 8:
        outputs_of_tiles<8>(d, tiles, count, values, 0, v_head_size);
        break;
      case 4:
        outputs_of_tiles<4>(d, tiles, count, values, 0, v_head_size);
        break;
      case 2:
        outputs_of_tiles<2>(d, tiles, count, values, 0, v_head_size);
        break;
    }
  }
}

}  // namespace fastmqa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
