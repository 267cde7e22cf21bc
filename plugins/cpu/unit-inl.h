// SPDX-License-Identifier: MIT
//
// One unit of work from q, k and v to y: rows that share a KV head against a part of their keys.
#if defined(FASTMQA_CPU_UNIT_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTMQA_CPU_UNIT_INL_H
#undef FASTMQA_CPU_UNIT_INL_H
#else
#define FASTMQA_CPU_UNIT_INL_H
#endif

#include <fastmqa/attention.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "fetch.h"
#include "lanes-inl.h"
#include "mask.h"
#include "plan.h"
#include "products-inl.h"
#include "softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fastmqa::cpu::HWY_NAMESPACE {

// Rows in lanes are worth it where there are more than a dozen, by measurement, and at least five
// of eight lanes have one.
HWY_INLINE bool rows_fit_lanes(int32_t rows) {
  const int32_t padded = (rows + kLanes - 1) / kLanes * kLanes;
  return rows > 12 && 8 * rows >= 5 * padded;
}

// How a unit of few rows reads K and V, by measurement: so many lines ahead, 16 KB, which L1 holds
// beside what is computed with, and all columns of so many keys of V before the next keys.
constexpr int32_t kLinesAhead = 256;
constexpr int32_t kRunKeys = 32;

template <class T>
class UnitWork {
 public:
  UnitWork(const AttentionParams& params, const Plan& plan, const Unit& unit,
           const Scratch& scratch)
      : a_(params), plan_(plan), unit_(unit), s_(scratch) {}

  HWY_INLINE void run() {
    const Partials partials = partials_of(plan_, a_);
    if (plan_.splits > 1) s_.outputs = partials.outputs + partial_row() * a_.v_head_size;
    find_keys();
    std::fill_n(s_.outputs, int64_t{unit_.rows} * a_.v_head_size, 0.0f);
    std::fill_n(s_.largest, padded_rows(), -kInfinity);
    std::fill_n(s_.sums, padded_rows(), 0.0f);
    const Range keys = part_of(range_, plan_, unit_.split);
    if (rows_fit_lanes(unit_.rows)) {
      run_panels(keys);
    } else {
      run_rows(keys);
    }
    if (plan_.splits == 1) {
      write_outputs();
    } else {
      write_partials(partials);
    }
  }

  // y and lse of row `row` of a row block whose keys were split; of the unit, any split will do.
  HWY_INLINE void combine(int32_t row) const {
    const Partials partials = partials_of(plan_, a_);
    const int64_t first = unit_.block * plan_.splits * plan_.block_rows + row;
    const auto at = [&](int32_t split) { return first + int64_t{split} * plan_.block_rows; };
    float largest = -kInfinity;
    for (int32_t i = 0; i < plan_.splits; ++i) largest = std::max(largest, partials.largest[at(i)]);
    const float subtracted = largest == -kInfinity ? 0.0f : largest;
    float sum = 0.0f;
    std::fill_n(s_.outputs, a_.v_head_size, 0.0f);
    for (int32_t i = 0; i < plan_.splits; ++i) {
      const float weight = std::exp(partials.largest[at(i)] - subtracted);
      if (weight == 0.0f) continue;
      sum += weight * partials.sums[at(i)];
      const float* const outputs = partials.outputs + at(i) * a_.v_head_size;
      const EightLanes eight;
      const auto by = hn::Set(eight, weight);
      for (int32_t c = 0; c < a_.v_head_size; c += kEightLanes) {
        hn::StoreU(hn::MulAdd(by, hn::LoadU(eight, outputs + c), hn::LoadU(eight, s_.outputs + c)),
                   eight, s_.outputs + c);
      }
    }
    write_row(row, s_.outputs, largest, sum);
  }

 private:
  int32_t padded_rows() const { return (unit_.rows + kMostLanes - 1) / kMostLanes * kMostLanes; }
  int32_t head_of(int32_t row) const {
    return unit_.kv_head * plan_.group + (unit_.first_row + row) % plan_.group;
  }
  int32_t position_of(int32_t row) const { return (unit_.first_row + row) / plan_.group; }

  // The keys of each row, and those that any of them sees.
  HWY_INLINE void find_keys() {
    range_ = {a_.keys, 0};
    for (int32_t row = 0; row < unit_.rows; ++row) {
      const Range keys = visible_keys(a_, unit_.batch, position_of(row));
      s_.begins[row] = keys.begin;
      s_.ends[row] = keys.end;
      if (keys.begin < keys.end) {
        range_ = {std::min(range_.begin, keys.begin), std::max(range_.end, keys.end)};
      }
      if (a_.mask_dtype != DType::kNone) {
        const MaskStrides& stride = a_.mask_strides;
        s_.mask_starts[row] =
            unit_.batch * stride.batch + head_of(row) * stride.head + position_of(row) * stride.row;
      }
    }
    if (range_.begin > range_.end) range_ = {0, 0};
    for (int32_t row = unit_.rows; row < padded_rows(); ++row) s_.begins[row] = s_.ends[row] = 0;
  }

  const T* query(int32_t row) const {
    return static_cast<const T*>(a_.q) + unit_.batch * a_.q_strides.batch +
           head_of(row) * a_.q_strides.head + position_of(row) * a_.q_strides.row;
  }
  const T* keys_of_head() const {
    return static_cast<const T*>(a_.k) + unit_.batch * a_.k_strides.batch +
           unit_.kv_head * a_.k_strides.head;
  }
  bool values_in_keys() const { return a_.v == nullptr; }
  const T* values_of_head() const {
    return values_in_keys() ? keys_of_head()
                            : static_cast<const T*>(a_.v) + unit_.batch * a_.v_strides.batch +
                                  unit_.kv_head * a_.v_strides.head;
  }
  int64_t values_stride() const { return values_in_keys() ? a_.k_strides.row : a_.v_strides.row; }

  // Few rows: q is (rows, D), K and V are read where they are.
  HWY_INLINE void run_rows(Range keys) {
    if (!unit_.follows) {
      const Lines first_lines = lines_of_keys(block_from(keys.begin, kFewRowsKeys));
      first_lines.fetch<kL1>(0, kLinesAhead);  // while q is converted
      for (int32_t row = 0; row < unit_.rows; ++row) {
        convert(query(row), a_.head_size, a_.scale, s_.queries + int64_t{row} * a_.head_size);
      }
    }
    for (int32_t key = keys.begin; key < keys.end; key += kFewRowsKeys) {
      const Range block{key, std::min(key + kFewRowsKeys, keys.end)};
      if (a_.head_size % kLanes == 0) {
        add_rows(Lanes(), block);
      } else {
        add_rows(EightLanes(), block);
      }
    }
  }

  // Rows in lanes: q is a panel after the other, each (D, width).
  HWY_INLINE void run_panels(Range keys) {
    if (!unit_.follows) {
      const Lines first_lines = lines_of_keys(block_from(keys.begin, kBlockKeys));
      first_lines.fetch<kL2>(0, first_lines.count);  // while q is packed
      for_each_panel([&](auto vectors, int32_t row)
                         HWY_ATTR { pack_panel(row, vectors() * kLanes); });
    }
    for (int32_t key = keys.begin; key < keys.end; key += kBlockKeys) {
      const Range block{key, std::min(key + kBlockKeys, keys.end)};
      const int32_t count = block.end - block.begin;
      // Register tiles reach beyond a block that is not a multiple of theirs. What they find there
      // makes scores that nobody reads, but there has to be memory.
      const bool in_place = count % kSplitStep == 0 || block.end + kMostTileKeys <= a_.keys;
      const Rows<float> k = keys_of(block, in_place);
      for_each_panel([&](auto vectors, int32_t row)
                         HWY_ATTR { add_panel(vectors, k, block, row); });
    }
  }

  // Calls do_panel(number of vectors, first row), with about as many vectors in each panel.
  template <class F>
  HWY_INLINE void for_each_panel(const F& do_panel) const {
    const int32_t vectors = (unit_.rows + kLanes - 1) / kLanes;
    const int32_t panels = (vectors + kPanelVectors - 1) / kPanelVectors;
    for (int32_t i = 0; i < panels; ++i) {
      const int32_t first = vectors * i / panels;
      switch (vectors * (i + 1) / panels - first) {
        case 1:
          do_panel(std::integral_constant<int32_t, 1>(), first * kLanes);
          break;
        case 2:
          do_panel(std::integral_constant<int32_t, 2>(), first * kLanes);
          break;
        case 3:
          do_panel(std::integral_constant<int32_t, 3>(), first * kLanes);
          break;
        case 4:
          do_panel(std::integral_constant<int32_t, std::min(4, kPanelVectors)>(), first * kLanes);
          break;
      }
    }
  }

  // Rows of q from `first` on, times scale and transposed. Lanes beyond the last row repeat it.
  HWY_INLINE void pack_panel(int32_t first, int32_t width) {
    const hn::FixedTag<float, 4> d;
    const hn::Repartition<double, decltype(d)> pairs;
    const auto scale = hn::Set(d, a_.scale);
    float* const panel = s_.queries + int64_t{first} * a_.head_size;
    for (int32_t row = 0; row < width; row += 4) {
      const T* q[4];
      for (int32_t i = 0; i < 4; ++i) q[i] = query(std::min(first + row + i, unit_.rows - 1));
      for (int32_t column = 0; column < a_.head_size; column += 4) {
        const auto q0 = hn::Mul(load(d, q[0] + column), scale);
        const auto q1 = hn::Mul(load(d, q[1] + column), scale);
        const auto q2 = hn::Mul(load(d, q[2] + column), scale);
        const auto q3 = hn::Mul(load(d, q[3] + column), scale);
        const auto a = hn::BitCast(pairs, hn::InterleaveLower(d, q0, q1));  // of columns 0 and 1
        const auto b = hn::BitCast(pairs, hn::InterleaveLower(d, q2, q3));
        const auto c = hn::BitCast(pairs, hn::InterleaveUpper(d, q0, q1));  // of columns 2 and 3
        const auto e = hn::BitCast(pairs, hn::InterleaveUpper(d, q2, q3));
        float* const to = panel + int64_t{column} * width + row;
        hn::Store(hn::BitCast(d, hn::InterleaveLower(pairs, a, b)), d, to);
        hn::Store(hn::BitCast(d, hn::InterleaveUpper(pairs, a, b)), d, to + width);
        hn::Store(hn::BitCast(d, hn::InterleaveLower(pairs, c, e)), d, to + 2 * width);
        hn::Store(hn::BitCast(d, hn::InterleaveUpper(pairs, c, e)), d, to + 3 * width);
      }
    }
  }

  // A block of K in float32: where it is, or a copy.
  HWY_INLINE Rows<float> keys_of(Range block, bool in_place) const {
    const Rows<T> from{keys_of_head(), a_.k_strides.row};
    if constexpr (std::is_same_v<T, float>) {
      if (in_place) return from.from(block.begin, 0);
    }
    for (int32_t key = block.begin; key < block.end; ++key) {
      convert(from[key], a_.head_size, 1.0f, s_.keys + int64_t{key - block.begin} * a_.head_size);
    }
    return {s_.keys, a_.head_size};
  }

  // Where a block of K or V lies; a latent cache has its values in K.
  HWY_INLINE Lines lines_of_keys(Range block) const {
    return Lines::of(keys_of_head() + block.begin * a_.k_strides.row, a_.k_strides.row,
                     block.end - block.begin, a_.head_size);
  }
  HWY_INLINE Lines lines_of_values(Range block) const {
    if (values_in_keys()) return {};
    return Lines::of(values_of_head() + block.begin * a_.v_strides.row, a_.v_strides.row,
                     block.end - block.begin, a_.v_head_size);
  }
  // The block of up to `keys` keys that begins where another one ended.
  HWY_INLINE Range block_from(int32_t begin, int32_t keys) const {
    return {begin, std::min(begin + keys, range_.end)};
  }

  // The part of a block that any of some rows sees.
  HWY_INLINE Range seen_by_any(int32_t first, int32_t rows, Range block) const {
    const int32_t begin = *std::min_element(s_.begins + first, s_.begins + first + rows);
    const int32_t end = *std::max_element(s_.ends + first, s_.ends + first + rows);
    return {std::max(begin, block.begin), std::min(end, block.end)};
  }
  HWY_INLINE bool is_seen_by_all(int32_t first, int32_t rows, Range keys) const {
    return *std::max_element(s_.begins + first, s_.begins + first + rows) <= keys.begin &&
           *std::min_element(s_.ends + first, s_.ends + first + rows) >= keys.end;
  }
  Adjustment adjustment(const float* mask) const {
    return {a_.softcap, a_.softmax_precision == DType::kFloat16,
            a_.mask_dtype == DType::kNone ? nullptr : mask};
  }
  bool is_plain() const {
    return a_.softcap == 0.0f && a_.mask_dtype == DType::kNone && !is_half();
  }
  bool is_half() const { return a_.softmax_precision == DType::kFloat16; }

  // A block of keys for the rows of one panel, which lie in lanes.
  template <int32_t kVectors>
  HWY_INLINE void add_panel(std::integral_constant<int32_t, kVectors>, Rows<float> k, Range block,
                            int32_t first) {
    const Lanes d;
    constexpr int32_t kWidth = kVectors * kLanes;
    const int32_t rows = std::min(kWidth, unit_.rows - first);
    const Range keys = seen_by_any(first, rows, block);
    if (keys.begin >= keys.end) return;
    const SoftmaxState state{s_.largest + first, s_.sums + first, s_.factors + first};
    // Register tiles begin at the block's first key, beyond whose last one K has no rows.
    const int32_t skipped = (keys.begin - block.begin) / tile_keys(kVectors) * tile_keys(kVectors);
    const int32_t first_key = block.begin + skipped;
    const int32_t n = keys.end - first_key;
    // Others of the unit's panels find in L2 what the first one has fetched.
    const auto fetching = [&](const Lines& next, int32_t lines) HWY_ATTR {
      return first == 0 ? FetchNext::of(next, n * lines) : FetchNext{};
    };
    scores_of_panel<kVectors>(
        d, k.from(skipped, 0), s_.queries + int64_t{first} * a_.head_size, n, a_.head_size,
        fetching(lines_of_values(block), lines_of(4 * a_.head_size)), s_.scores);
    if (!is_plain() || !is_seen_by_all(first, rows, {first_key, keys.end})) {
      if (a_.mask_dtype != DType::kNone) {
        fill_mask(a_, s_.mask_starts + first, rows, first_key, n, MaskTile{s_.mask, 1, kWidth});
      }
      adjust_panel(d, adjustment(s_.mask), kWidth, first_key, n, s_.begins + first, s_.ends + first,
                   s_.scores);
    }
    if (is_half()) {
      exponentiate_panel<true>(d, kWidth, n, s_.scores, state);
    } else {
      exponentiate_panel<false>(d, kWidth, n, s_.scores, state);
    }
    const Lines next_keys = lines_of_keys(block_from(block.end, kBlockKeys));
    // Values are converted as they are loaded, unless they are in K, which has been converted.
    const auto add = [&](const auto& v) HWY_ATTR {
      const int32_t lines = lines_of(a_.v_head_size * int32_t{sizeof(v[0][0])});
      add_outputs(d, Weights<1>{s_.scores, kWidth}, v, rows, first_key, n, n, s_.ends + first,
                  state.factors, a_.v_head_size, fetching(next_keys, lines),
                  s_.outputs + int64_t{first} * a_.v_head_size);
    };
    if (values_in_keys()) {
      add(k.from(skipped, 0));
    } else {
      add(Rows<T>{values_of_head(), a_.v_strides.row}.from(first_key, 0));
    }
  }

  // The same for a unit of few rows, with keys in lanes. A vector of D divides a row of q.
  template <class D>
  HWY_INLINE void add_rows(D d, Range block) {
    const int32_t count = block.end - block.begin;
    const Rows<T> k{keys_of_head(), a_.k_strides.row};
    const Rows<T> v{values_of_head(), values_stride()};
    const Lines keys = lines_of_keys(block);
    const Lines next_keys = lines_of_keys(block_from(block.end, kFewRowsKeys));
    const Lines values = lines_of_values(block);
    scores_of_rows(d, k.from(block.begin, 0), Rows<float>{s_.queries, a_.head_size}, unit_.rows,
                   count, a_.head_size,
                   FetchAhead::of(keys, values_in_keys() ? next_keys : values, kLinesAhead),
                   s_.scores);
    if (a_.mask_dtype != DType::kNone) {
      fill_mask(a_, s_.mask_starts, unit_.rows, block.begin, count,
                MaskTile{s_.mask, kFewRowsKeys, 1});
    }
    for (int32_t row = 0; row < unit_.rows; ++row) {
      float* const scores = s_.scores + row * kFewRowsKeys;
      const int32_t begin = std::clamp(s_.begins[row] - block.begin, 0, count);
      const int32_t end = std::clamp(s_.ends[row] - block.begin, begin, count);
      adjust_row(adjustment(s_.mask + row * kFewRowsKeys), is_plain(), begin, end, scores);
      const int32_t whole = (count + kLanes - 1) / kLanes * kLanes;
      const int32_t used = (end + kLanes - 1) / kLanes * kLanes;
      std::fill(scores + used, scores + whole, -kInfinity);
      const SoftmaxState state{s_.largest + row, s_.sums + row, s_.factors + row};
      if (is_half()) {
        exponentiate_row<true>(count, scores, state);
      } else {
        exponentiate_row<false>(count, scores, state);
      }
    }
    add_outputs(Lanes(), Weights<kFewRowsKeys>{s_.scores, 1}, v.from(block.begin, 0), unit_.rows,
                block.begin, count, kRunKeys, s_.ends, s_.factors, a_.v_head_size,
                values_in_keys() ? FetchAhead{} : FetchAhead::of(values, next_keys, kLinesAhead),
                s_.outputs);
  }

  // Outputs of a split are in place already.
  HWY_INLINE void write_partials(const Partials& partials) const {
    const int64_t first = partial_row();
    std::copy_n(s_.largest, unit_.rows, partials.largest + first);
    std::copy_n(s_.sums, unit_.rows, partials.sums + first);
  }
  int64_t partial_row() const {
    return (unit_.block * plan_.splits + unit_.split) * plan_.block_rows;
  }

  HWY_INLINE void write_outputs() const {
    for (int32_t row = 0; row < unit_.rows; ++row) {
      write_row(row, s_.outputs + int64_t{row} * a_.v_head_size, s_.largest[row], s_.sums[row]);
    }
  }

  // y and lse of one row, from its undivided outputs.
  HWY_INLINE void write_row(int32_t row, const float* outputs, float largest, float sum) const {
    const int32_t head = head_of(row);
    const int32_t position = position_of(row);
    T* const y = static_cast<T*>(a_.y) + unit_.batch * a_.y_strides.batch +
                 head * a_.y_strides.head + position * a_.y_strides.row;
    const EightLanes d;
    if (sum == 0.0f) {
      // Nothing was visible; what V holds there, a NaN perhaps, is not to be seen.
      for (int32_t column = 0; column < a_.v_head_size; column += kEightLanes) {
        store(d, hn::Zero(d), y + column);
      }
    } else {
      const auto factor = hn::Set(d, 1.0f / sum);
      for (int32_t column = 0; column < a_.v_head_size; column += kEightLanes) {
        store(d, hn::Mul(hn::LoadU(d, outputs + column), factor), y + column);
      }
    }
    if (a_.lse != nullptr) {
      a_.lse[unit_.batch * a_.lse_strides.batch + head * a_.lse_strides.head +
             position * a_.lse_strides.row] = sum == 0.0f ? -kInfinity : largest + std::log(sum);
    }
  }

  const AttentionParams& a_;
  const Plan& plan_;
  const Unit& unit_;
  Scratch s_;
  Range range_;  // keys that any row sees
};

}  // namespace fastmqa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
