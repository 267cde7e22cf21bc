// SPDX-License-Identifier: MIT
//
// Vectors of float32: the exponential, and loads and stores of the three element types. Included
// once for each instruction set, as Highway's own headers are.
#if defined(FASTMQA_CPU_LANES_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTMQA_CPU_LANES_INL_H
#undef FASTMQA_CPU_LANES_INL_H
#else
#define FASTMQA_CPU_LANES_INL_H
#endif

#include <hwy/highway.h>

#include <cstdint>
#include <limits>

HWY_BEFORE_NAMESPACE();
namespace fastmqa::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// As many lanes as a vector has, and 8 of them where it has more: columns come in multiples of 8.
using Lanes = hn::ScalableTag<float>;
using EightLanes = hn::CappedTag<float, 8>;
constexpr int32_t kLanes = static_cast<int32_t>(hn::MaxLanes(Lanes()));
constexpr int32_t kEightLanes = static_cast<int32_t>(hn::MaxLanes(EightLanes()));

// Vector registers, most of which accumulate in the products.
constexpr int32_t kRegisters = HWY_ARCH_ARM_A64 || HWY_TARGET <= HWY_AVX3 ? 32 : 16;

// exp(x) for x <= 0; 0 below -87, where float32 has no more normal numbers. NaN stays NaN.
//
// x = n ln 2 + r ln 2 with an integer n and |r| <= 1/2. 2^r is 1 + r p(r), p a polynomial of degree
// 4 whose largest relative error there, 9.2e-8, is the smallest possible (found by linear
// programming).
template <class D>
HWY_INLINE hn::Vec<D> exponential(D d, hn::Vec<D> x) {
  const hn::RebindToUnsigned<D> bits;
  // Of a float32 of this size the last bit is worth 1, so that adding it rounds to an integer,
  // which stands in its low bits together with the exponent's bias.
  const auto shifter = hn::Set(d, 0x1.8p23f + 127.0f);
  const auto t = hn::Mul(x, hn::Set(d, 0x1.715476p0f));  // log2(e)
  const auto shifted = hn::Add(t, shifter);
  const auto r = hn::Sub(t, hn::Sub(shifted, shifter));
  auto p = hn::Set(d, 1.326481102e-3f);
  p = hn::MulAdd(p, r, hn::Set(d, 9.671511845e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 5.55073349e-2f));
  p = hn::MulAdd(p, r, hn::Set(d, 2.402224211e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 6.931469777e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0f));
  const auto power = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(bits, shifted)));
  return hn::IfThenZeroElse(hn::Lt(t, hn::Set(d, -126.0f)), hn::Mul(p, power));
}

// Rounded to float16 and back.
template <class D>
HWY_INLINE hn::Vec<D> rounded_to_half(D d, hn::Vec<D> x) {
  return hn::PromoteTo(d, hn::DemoteTo(hn::Rebind<hwy::float16_t, D>(), x));
}

template <class D>
HWY_INLINE hn::Vec<D> load(D d, const float* from) {
  return hn::LoadU(d, from);
}
template <class D>
HWY_INLINE hn::Vec<D> load(D d, const hwy::float16_t* from) {
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<hwy::float16_t, D>(), from));
}
template <class D>
HWY_INLINE hn::Vec<D> load(D d, const hwy::bfloat16_t* from) {
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<hwy::bfloat16_t, D>(), from));
}

template <class D>
HWY_INLINE void store(D d, hn::Vec<D> x, float* to) {
  hn::StoreU(x, d, to);
}
template <class D>
HWY_INLINE void store(D, hn::Vec<D> x, hwy::float16_t* to) {
  const hn::Rebind<hwy::float16_t, D> half;
  hn::StoreU(hn::DemoteTo(half, x), half, to);
}
// Highway cuts bits off in some versions; this rounds to the nearest, ties to even.
template <class D>
HWY_INLINE void store(D d, hn::Vec<D> x, hwy::bfloat16_t* to) {
  const hn::RebindToUnsigned<D> bits;
  const hn::Rebind<uint16_t, D> half_bits;
  const auto u = hn::BitCast(bits, x);
  const auto odd = hn::And(hn::ShiftRight<16>(u), hn::Set(bits, 1));
  const auto up = hn::Add(u, hn::Add(odd, hn::Set(bits, 0x7fff)));
  const auto quiet = hn::Or(u, hn::Set(bits, 0x400000));  // a NaN that stays one when it is cut
  const auto number = hn::RebindMask(bits, hn::Eq(x, x));
  const auto high = hn::ShiftRight<16>(hn::IfThenElse(number, up, quiet));
  hn::StoreU(hn::TruncateTo(half_bits, high), half_bits, reinterpret_cast<uint16_t*>(to));
  static_cast<void>(d);
}

// `count` elements, a multiple of 8, in float32 and times `factor`.
template <class T>
HWY_INLINE void convert(const T* from, int32_t count, float factor, float* to) {
  const Lanes d;
  const EightLanes eight;
  const auto by = hn::Set(d, factor);
  int32_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(d, hn::Mul(load(d, from + i), by), to + i);
  for (; i < count; i += kEightLanes) {
    store(eight, hn::Mul(load(eight, from + i), hn::Set(eight, factor)), to + i);
  }
}

}  // namespace fastmqa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
