// SPDX-License-Identifier: MIT
//
// What no attention can be faster than on this machine: its multiplications alone, and reading K
// and V alone. For benchmarks; compiled for the machine at hand.
#include <fastmqa/attention_cpu.h>
#include <hwy/highway.h>

#include <cstdint>

namespace {

namespace hn = hwy::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using Vector = hn::Vec<D>;

constexpr int kChains = 12;  // independent sums, enough to hide the latency of an addition

// A number that depends on everything that was computed, so that it is computed.
volatile float result;

void keep(const Vector (&sums)[kChains]) {
  const D d;
  Vector total = hn::Zero(d);
  for (const Vector& sum : sums) total = hn::Add(total, sum);
  result = hn::GetLane(hn::SumOfLanes(d, total));
}

struct Work {
  int64_t steps;  // of kChains vectors each, of all threads
  int32_t threads;
  const float* data;

  int64_t begin(int32_t i) const { return steps * i / threads; }
};

void multiply(void* context, int32_t i) {
  const Work& work = *static_cast<const Work*>(context);
  const D d;
  const Vector factor = hn::Set(d, 0.999f);
  const Vector term = hn::Set(d, 0.001f);
  Vector sums[kChains];
  for (Vector& sum : sums) sum = hn::Set(d, 1.0f);
  for (int64_t step = work.begin(i); step < work.begin(i + 1); ++step) {
#pragma GCC unroll 12
    for (Vector& sum : sums) sum = hn::MulAdd(sum, factor, term);
  }
  keep(sums);
}

void read(void* context, int32_t i) {
  const Work& work = *static_cast<const Work*>(context);
  const D d;
  const int64_t lanes = hn::Lanes(d);
  Vector sums[kChains];
  for (Vector& sum : sums) sum = hn::Zero(d);
  for (int64_t step = work.begin(i); step < work.begin(i + 1); ++step) {
    const float* const from = work.data + step * kChains * lanes;
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) {
      sums[chain] = hn::Add(sums[chain], hn::LoadU(d, from + chain * lanes));
    }
  }
  keep(sums);
}

}  // namespace

extern "C" {

// As many multiplications with additions.
void limit_products(const fastmqa::cpu::ThreadPool* pool, int64_t products) {
  const int64_t in_step = kChains * static_cast<int64_t>(hn::Lanes(D()));
  Work work{products / in_step, pool->threads, nullptr};
  pool->parallel_for(pool->pool, pool->threads, &multiply, &work);
}

// Reads as many numbers once.
void limit_reading(const fastmqa::cpu::ThreadPool* pool, const float* data, int64_t count) {
  const int64_t in_step = kChains * static_cast<int64_t>(hn::Lanes(D()));
  Work work{count / in_step, pool->threads, data};
  pool->parallel_for(pool->pool, pool->threads, &read, &work);
}
}
