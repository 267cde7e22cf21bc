// SPDX-License-Identifier: MIT
//
// The contract of the CPU kernel: everything that onnxruntime's custom op, PyTorch and the tests
// know of it. Arguments, types and results are those of attention.h; every pointer is to host
// memory.
#pragma once

#include <fastmqa/attention.h>

#include <cstddef>
#include <cstdint>

namespace fastmqa::cpu {

// The caller's threads. parallel_for(pool, count, task, context) calls task(context, i) once for
// each i in [0, count), in any order, on at most `threads` threads, and returns when all of them
// are done. Tasks do not wait for each other, so a pool that runs them one after the other is as
// right.
struct ThreadPool {
  void* pool;
  int32_t threads;
  void (*parallel_for)(void* pool, int32_t count, void (*task)(void* context, int32_t i),
                       void* context);
};

// Whether run() would take these arguments; pointers are not looked at. Any head sizes that are
// multiples of 8 are taken, those of docs/op.md among them.
Status supports(const AttentionParams& params);

// Bytes of scratch memory that run() needs for these sizes and as many threads; 0 if they are not
// supported. It does not grow with S x T.
size_t workspace_bytes(const AttentionParams& params, int32_t threads);

// Computes y and lse, and returns when they are written. Allocates nothing and throws nothing. The
// same inputs give the same bits on the same machine, whatever the pool.
Status run(const AttentionParams& params, const ThreadPool& pool);

}  // namespace fastmqa::cpu

// The same for C and for Python's ctypes. Functions return a Code and write its text (never more
// than text_bytes, always terminated).
extern "C" {
int32_t fastmqa_cpu_supports(const fastmqa::AttentionParams*, char* text, size_t text_bytes);
size_t fastmqa_cpu_workspace_bytes(const fastmqa::AttentionParams*, int32_t threads);
int32_t fastmqa_cpu_run(const fastmqa::AttentionParams*, const fastmqa::cpu::ThreadPool*,
                        char* text, size_t text_bytes);

// Threads of the library's own, for callers that have none: `threads` of them, the caller's among
// them. Sets `pool`; `pool->pool` is null if there are no more, or none were asked for.
void fastmqa_cpu_create_pool(int32_t threads, fastmqa::cpu::ThreadPool* pool);
void fastmqa_cpu_destroy_pool(const fastmqa::cpu::ThreadPool* pool);

// Name of the i-th instruction set that this machine has code for, best first; null beyond the
// last.
const char* fastmqa_cpu_target(int32_t i);

// Uses that instruction set from now on instead of the best, for tests; calls must not be running.
void fastmqa_cpu_use_target(int32_t i);
}
