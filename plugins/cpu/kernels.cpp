// SPDX-License-Identifier: MIT
//
// Compiles the kernels once for each instruction set. Highway's headers alone are used: choosing
// takes a few lines, and its library, a shared one in Debian, need not be found at run time then.
#include "kernels.h"

#ifdef __x86_64__
// A baseline that every machine has, AVX2 and AVX-512: those between and above bring these loops
// nothing.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_AVX3_ZEN4 | HWY_AVX3_SPR)
#elif !defined(HWY_COMPILE_ONLY_STATIC)
#define HWY_COMPILE_ONLY_STATIC  // NEON, or what else the compiler may assume
#endif

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#if HWY_MAJOR == 1 && HWY_MINOR < 2
#error "Highway 1.2 or newer is needed; Debian trixie has it as libhwy-dev"
#endif

#include "unit-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fastmqa::cpu::HWY_NAMESPACE {

// Calls f(T()) with the element type of q, k, v and y.
template <class F>
HWY_INLINE void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float());
    case DType::kFloat16:
      return f(hwy::float16_t());
    default:
      return f(hwy::bfloat16_t());
  }
}

void run_unit(const AttentionParams& params, const Plan& plan, const Unit& unit,
              const Scratch& scratch) {
  with_type(params.dtype, [&](auto type) HWY_ATTR {
    UnitWork<decltype(type)>(params, plan, unit, scratch).run();
  });
}

void combine_rows(const AttentionParams& params, const Plan& plan, const Unit& unit,
                  const Scratch& scratch, int32_t first, int32_t count) {
  with_type(params.dtype, [&](auto type) HWY_ATTR {
    const UnitWork<decltype(type)> work(params, plan, unit, scratch);
    for (int32_t row = first; row < first + count; ++row) work.combine(row);
  });
}

extern const Kernels kKernels;
const Kernels kKernels{hwy::TargetName(HWY_TARGET), &run_unit, &combine_rows};

}  // namespace fastmqa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fastmqa::cpu {
namespace {

struct Target {
  bool is_here;
  const Kernels* kernels;
};

// Best first. The last is what the compiler was allowed to assume.
const Target kTargets[] = {
#if HWY_TARGETS & HWY_AVX3 & ~HWY_STATIC_TARGET
    {__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd"),
     &N_AVX3::kKernels},
#endif
#if HWY_TARGETS & HWY_AVX2 & ~HWY_STATIC_TARGET
    {__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2"),
     &N_AVX2::kKernels},
#endif
    {true, &HWY_STATIC_DISPATCH(kKernels)},
};

}  // namespace

const Kernels* available_kernels(int32_t i) {
  for (const auto& [is_here, kernels] : kTargets) {
    if (is_here && i-- == 0) return kernels;
  }
  return nullptr;
}

}  // namespace fastmqa::cpu
#endif  // HWY_ONCE
