// SPDX-License-Identifier: MIT
//
// The scheduler of simt.hpp, and what the kernels' host code needs of the CUDA runtime. Each OS
// thread that launches has its own machine, so several may launch at once.
#include <array>
#include <atomic>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <fastmqa/arch/simt.hpp>
#include <memory>
#include <numeric>
#include <string>
#include <utility>

constinit thread_local uint3 threadIdx{};
constinit thread_local uint3 blockIdx{};
constinit thread_local dim3 blockDim{};
constinit thread_local dim3 gridDim{};

// Stores the stack pointer, and takes up what was left with the stack pointer `to`.
extern "C" void fastmqa_emulation_switch(void** from, void* to);
asm(R"(
.text
.globl fastmqa_emulation_switch
.hidden fastmqa_emulation_switch
.type fastmqa_emulation_switch, @function
fastmqa_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastmqa_emulation_switch, . - fastmqa_emulation_switch
)");

namespace simt {

constinit thread_local Thread* thread = nullptr;
constinit thread_local Shared shared{};

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 << 10;  // what SM90 gives one block
constexpr size_t kGuard = 1 << 10;        // bytes on either side of the shared memory
constexpr int kGuardByte = 0xFE;          // read as float16: NaN
constexpr int kPoison = 0xFF;             // NaN in every float type
// Not a power of two: the stacks of a warp's lanes would all compete for the same cache lines.
constexpr size_t kStackBytes = (64 << 10) + 320;
static_assert(kStackBytes % 16 == 0 && __STDCPP_DEFAULT_NEW_ALIGNMENT__ % 16 == 0);
constexpr uint64_t kCanary = 0x5AFE57AC4B077035;

struct Fiber : Thread {
  void* stack_pointer;
};

struct Warp {
  // Each lane is in exactly one of these.
  uint32_t ready = kAllLanes;
  uint32_t meeting = 0;
  uint32_t at_barrier = 0;
  uint32_t exited = 0;
  // Of the lanes that meet:
  std::array<const char*, 32> kind = {};
  std::array<uint32_t, 32> mask = {};
  std::array<void*, 32> operands = {};
};

struct alignas(kSharedAlignment) GuardedShared {
  std::byte bytes[kGuard + kMaxShared + kGuard];
};

struct Machine {
  void* home;  // stack pointer of the scheduler while a fiber runs
  bool failed;
  void (*body)(void*);
  void* context;
  std::array<Fiber, kMaxThreads> fibers;
  std::array<Warp, kMaxThreads / 32> warps;
  std::unique_ptr<std::byte[]> stacks =
      std::make_unique_for_overwrite<std::byte[]>(kMaxThreads * kStackBytes);
  std::unique_ptr<GuardedShared> memory = std::make_unique_for_overwrite<GuardedShared>();

  std::byte* stack(unsigned index) { return &stacks[index * kStackBytes]; }
};

constinit std::atomic<uint32_t> seed = 0;
constinit thread_local char error_text[512] = "";
constinit thread_local Machine* machine = nullptr;

// SplitMix64. Seeds that are neighbours give unrelated orders.
class Random {
 public:
  using result_type = uint64_t;

  explicit Random(uint64_t stream) : state_{stream << 32 | seed.load()} {}

  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return UINT64_MAX; }

  uint64_t operator()() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
  }

 private:
  uint64_t state_;
};

std::vector<unsigned> random_order(unsigned count, Random& random) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

void report(const char* format, ...) __attribute__((format(printf, 1, 2)));
void report(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error_text, sizeof error_text, format, arguments);
  va_end(arguments);
  if (machine) machine->failed = true;
}

Warp& my_warp() { return machine->warps[threadIdx.x / 32]; }

uint32_t my_bit() { return 1u << threadIdx.x % 32; }

void park() {
  fastmqa_emulation_switch(&machine->fibers[threadIdx.x].stack_pointer, machine->home);
}

// What a fiber runs.
void enter() {
  machine->body(machine->context);
  if (!thread->copies.empty()) {
    fail("exits with %zu cp.async never waited for", thread->copies.size());
  }
  my_warp().ready &= ~my_bit();
  my_warp().exited |= my_bit();
  park();
}

void resume(unsigned index) {
  threadIdx.x = index;
  thread = &machine->fibers[index];
  fastmqa_emulation_switch(&machine->home, machine->fibers[index].stack_pointer);
}

// Makes `index` a fiber that begins with enter().
void prepare(unsigned index) {
  Fiber& fiber = machine->fibers[index];
  fiber.copies.clear();
  fiber.groups = 0;
  std::byte* stack = machine->stack(index);
  std::memcpy(stack, &kCanary, sizeof kCanary);
  // Six registers, enter() to return to, and what enter() finds in the place of a return address:
  // by the ABI that lies 8 bytes below a multiple of 16.
  void* frame[8] = {};
  frame[6] = reinterpret_cast<void*>(&enter);
  fiber.stack_pointer = stack + kStackBytes - sizeof frame;
  std::memcpy(fiber.stack_pointer, frame, sizeof frame);
}

void report_lanes_apart(unsigned index) {
  const Warp& warp = machine->warps[index];
  std::string text;
  const auto add = [&text](const char* state, uint32_t lanes) {
    if (!lanes) return;
    char one[64];
    std::snprintf(one, sizeof one, "%s %s: %08x", text.empty() ? "" : ",", state, lanes);
    text += one;
  };
  for (uint32_t left = warp.meeting; left;) {
    const int first = std::countr_zero(left);
    uint32_t alike = 0;
    for (int lane = first; lane < 32; ++lane) {
      if (left >> lane & 1 && !std::strcmp(warp.kind[lane], warp.kind[first])) alike |= 1u << lane;
    }
    add(warp.kind[first], alike);
    left &= ~alike;
  }
  add("__syncthreads", warp.at_barrier);
  add("exited", warp.exited);
  report("block %u, warp %u: its lanes do not meet;%s", blockIdx.x, index, text.c_str());
}

// Until every lane waits at the block barrier or has exited.
void run_warp(unsigned index, Random& random) {
  Warp& warp = machine->warps[index];
  const auto order = random_order(32, random);
  while (warp.ready) {
    for (const unsigned lane : order) {
      if (warp.ready >> lane & 1) resume(32 * index + lane);
      if (machine->failed) return;
    }
  }
  if (warp.meeting) report_lanes_apart(index);
}

void check_guards(unsigned warps) {
  const auto intact = [](const std::byte* guard) {
    return std::all_of(guard, guard + kGuard, [](auto x) { return x == std::byte{kGuardByte}; });
  };
  if (!intact(shared.begin - kGuard)) {
    report("block %u wrote before the start of its shared memory", blockIdx.x);
  } else if (!intact(shared.begin + shared.bytes)) {
    report("block %u wrote past the end of its shared memory", blockIdx.x);
  }
  for (unsigned i = 0; i < 32 * warps; ++i) {
    if (std::memcmp(machine->stack(i), &kCanary, sizeof kCanary)) {
      report("block %u, thread %u: stack overflow in the emulation", blockIdx.x, i);
    }
  }
}

void run_block(unsigned index) {
  blockIdx.x = index;
  std::memset(shared.begin - kGuard, kGuardByte, kGuard);
  std::memset(shared.begin, kPoison, shared.bytes);
  std::memset(shared.begin + shared.bytes, kGuardByte, kGuard);
  const unsigned warps = blockDim.x / 32;
  for (unsigned i = 0; i < blockDim.x; ++i) prepare(i);
  for (unsigned w = 0; w < warps; ++w) machine->warps[w] = {};
  Random random{index + uint64_t{1}};
  for (bool alive = true; alive;) {
    for (const unsigned w : random_order(warps, random)) {
      run_warp(w, random);
      if (machine->failed) return;
    }
    alive = false;
    for (unsigned w = 0; w < warps; ++w) {  // an exited thread counts as one that has arrived
      Warp& warp = machine->warps[w];
      warp.ready = std::exchange(warp.at_barrier, 0);
      alive |= warp.ready != 0;
    }
  }
  check_guards(warps);
}

}  // namespace

void fail(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  report("block %u, thread %u: %s", blockIdx.x, threadIdx.x, text);
  park();
  __builtin_unreachable();  // the scheduler gives the fiber up
}

void require_shared(const char* kind, const void* address) {
  const auto offset =
      reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(shared.begin);
  if (offset % 16) fail("%s at byte %td of shared memory, unaligned", kind, ptrdiff_t(offset));
  if (offset >= shared.bytes || shared.bytes - offset < 16) {
    fail("%s at byte %td of shared memory, which has %zu", kind, ptrdiff_t(offset), shared.bytes);
  }
}

void* const* meet(const char* kind, uint32_t mask, void* operands) {
  Warp& warp = my_warp();
  const unsigned self = threadIdx.x % 32;
  if (!(mask & my_bit())) fail("%s with the mask %08x, which lacks the caller", kind, mask);
  warp.kind[self] = kind;
  warp.mask[self] = mask;
  warp.operands[self] = operands;
  warp.ready &= ~my_bit();
  warp.meeting |= my_bit();
  if ((warp.meeting & mask) != mask) {
    park();
    return nullptr;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (warp.mask[lane] != mask || std::strcmp(warp.kind[lane], kind)) {
      report_lanes_apart(threadIdx.x / 32);
      park();
    }
  }
  warp.meeting &= ~mask;
  warp.ready |= mask;
  return warp.operands.data();
}

void block_barrier() {
  my_warp().ready &= ~my_bit();
  my_warp().at_barrier |= my_bit();
  park();
}

cudaError_t run_grid(unsigned grid, unsigned block, size_t shared_bytes, void (*body)(void*),
                     void* context) {
  static thread_local std::unique_ptr<Machine> own;
  if (!own) own = std::make_unique<Machine>();
  machine = own.get();
  error_text[0] = '\0';
  if (grid == 0 || block == 0 || block > kMaxThreads || block % 32 || shared_bytes > kMaxShared) {
    report(
        "launch of %u blocks of %u threads (whole warps, at most %u) with %zu bytes (at most "
        "%zu)",
        grid, block, kMaxThreads, shared_bytes, kMaxShared);
    return cudaErrorInvalidConfiguration;
  }
  machine->failed = false;
  machine->body = body;
  machine->context = context;
  blockDim = dim3(block);
  gridDim = dim3(grid);
  shared = {own->memory->bytes + kGuard, shared_bytes};
  Random random{0};
  for (const unsigned index : random_order(grid, random)) {
    run_block(index);
    if (machine->failed) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace simt

extern "C" {

void fastmqa_emulation_seed(uint32_t seed) { simt::seed = seed; }

const char* fastmqa_emulation_error() { return simt::error_text; }

const char* CUDARTAPI cudaGetErrorString(cudaError_t) {
  return *simt::error_text ? simt::error_text : "the emulation has no CUDA device";
}

cudaError_t CUDARTAPI cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) {
  return cudaErrorNoDevice;
}

}  // extern "C"
