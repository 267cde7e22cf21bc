// SPDX-License-Identifier: MIT
//
// Scores become exponentials in place, block by block of keys, with the largest score of a row and
// the sum of its exponentials kept up to date (online softmax). Rows lie in lanes (`..._panel`), or
// keys do
// (`..._row`).
#if defined(FASTMQA_CPU_SOFTMAX_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTMQA_CPU_SOFTMAX_INL_H
#undef FASTMQA_CPU_SOFTMAX_INL_H
#else
#define FASTMQA_CPU_SOFTMAX_INL_H
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>

#include "lanes-inl.h"
#include "plan.h"

HWY_BEFORE_NAMESPACE();
namespace fastmqa::cpu::HWY_NAMESPACE {

// What happens to scores before the softmax.
struct Adjustment {
  float softcap;      // 0: none
  bool half;          // rounded to float16
  const float* mask;  // added, laid out as the scores are; null: none
};

// Adjusted scores; key by key what the op says, but for visibility.
template <class D>
HWY_INLINE hn::Vec<D> adjusted(D d, hn::Vec<D> score, const Adjustment& how, int64_t at) {
  if (how.softcap > 0.0f) {
    const auto cap = hn::Set(d, how.softcap);
    score = hn::Mul(cap, hn::Tanh(d, hn::Div(score, cap)));
  }
  if (how.mask != nullptr) {
    // Chosen, not added, where it excludes: a score of NaN or infinity must not come through.
    const auto excluded = hn::Set(d, -kInfinity);
    const auto mask = hn::LoadU(d, how.mask + at);
    score = hn::IfThenElse(hn::Eq(mask, excluded), excluded, hn::Add(score, mask));
  }
  return how.half ? rounded_to_half(d, score) : score;
}

// State of a row's, or of a vector of rows', online softmax.
struct SoftmaxState {
  float* largest;
  float* sums;
  float* factors;  // of what was summed before this block
};

// Largest scores as they are subtracted: 0 for rows without keys so far, where -inf - -inf is NaN.
template <class D>
HWY_INLINE hn::Vec<D> anchor(D d, hn::Vec<D> largest) {
  return hn::IfThenZeroElse(hn::Eq(largest, hn::Set(d, -kInfinity)), largest);
}

template <bool kHalf, class D>
HWY_INLINE hn::Vec<D> exponential_of_distance(D d, hn::Vec<D> score, hn::Vec<D> anchor) {
  const auto distance = hn::Sub(score, anchor);
  if constexpr (!kHalf) return exponential(d, distance);
  return rounded_to_half(d, exponential(d, rounded_to_half(d, distance)));
}

// Adjusts scores (keys, width), and excludes those outside of their row's [begins, ends).
template <class D>
HWY_NOINLINE void adjust_panel(D d, const Adjustment& how, int32_t width, int32_t first_key,
                               int32_t keys, const int32_t* begins, const int32_t* ends,
                               float* scores) {
  const hn::RebindToSigned<D> ints;
  const auto excluded = hn::Set(d, -kInfinity);
  const auto lanes = static_cast<int32_t>(hn::Lanes(d));
  for (int32_t i = 0; i < keys; ++i) {
    const auto key = hn::Set(ints, first_key + i);
    for (int32_t row = 0; row < width; row += lanes) {
      const int64_t at = int64_t{i} * width + row;
      const auto begin = hn::Load(ints, begins + row);
      const auto end = hn::Load(ints, ends + row);
      const auto visible = hn::AndNot(hn::Lt(key, begin), hn::Lt(key, end));
      const auto score = adjusted(d, hn::Load(d, scores + at), how, at);
      hn::Store(hn::IfThenElse(hn::RebindMask(d, visible), score, excluded), d, scores + at);
    }
  }
}

// Scores (keys, width) to exponentials.
template <bool kHalf, class D>
HWY_NOINLINE void exponentiate_panel(D d, int32_t width, int32_t keys, float* scores,
                                     SoftmaxState state) {
  const auto lanes = static_cast<int32_t>(hn::Lanes(d));
  for (int32_t row = 0; row < width; row += lanes) {
    float* const column = scores + row;
    const auto before = hn::Load(d, state.largest + row);
    auto largest = before;
    for (int32_t i = 0; i < keys; ++i) {
      largest = hn::Max(largest, hn::Load(d, column + int64_t{i} * width));
    }
    const auto subtracted = anchor(d, largest);
    const auto factor = exponential(d, hn::Sub(before, subtracted));
    auto sum = hn::Mul(hn::Load(d, state.sums + row), factor);
    for (int32_t i = 0; i < keys; ++i) {
      float* const score = column + int64_t{i} * width;
      const auto weight = exponential_of_distance<kHalf>(d, hn::Load(d, score), subtracted);
      sum = hn::Add(sum, weight);
      hn::Store(weight, d, score);
    }
    hn::Store(largest, d, state.largest + row);
    hn::Store(factor, d, state.factors + row);
    hn::Store(sum, d, state.sums + row);
  }
}

// Scores (kFewRowsKeys,) of one row: those outside of [begin, end) are excluded, the rest adjusted.
HWY_NOINLINE void adjust_row(const Adjustment& how, bool is_plain, int32_t begin, int32_t end,
                             float* scores) {
  const Lanes d;
  if (!is_plain) {
    for (int32_t i = begin / kLanes * kLanes; i < end; i += kLanes) {
      hn::Store(adjusted(d, hn::Load(d, scores + i), how, i), d, scores + i);
    }
  }
  const int32_t whole = (end + kLanes - 1) / kLanes * kLanes;
  std::fill(scores, scores + begin, -kInfinity);
  std::fill(scores + end, scores + whole, -kInfinity);
}

// Scores of one row to exponentials; `keys` of them, and up to a whole vector.
template <bool kHalf>
HWY_NOINLINE void exponentiate_row(int32_t keys, float* scores, SoftmaxState state) {
  const Lanes d;
  const float before = *state.largest;
  auto most = hn::Set(d, before);
  for (int32_t i = 0; i < keys; i += kLanes) most = hn::Max(most, hn::Load(d, scores + i));
  const auto largest = hn::MaxOfLanes(d, most);
  const auto subtracted = anchor(d, largest);
  auto sum = hn::Zero(d);
  for (int32_t i = 0; i < keys; i += kLanes) {
    const auto weight = exponential_of_distance<kHalf>(d, hn::Load(d, scores + i), subtracted);
    sum = hn::Add(sum, weight);
    hn::Store(weight, d, scores + i);
  }
  const float factor = hn::GetLane(exponential(d, hn::Sub(hn::Set(d, before), subtracted)));
  *state.largest = hn::GetLane(largest);
  *state.factors = factor;
  *state.sums = *state.sums * factor + hn::GetLane(hn::SumOfLanes(d, sum));
}

}  // namespace fastmqa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
