// CUDA kernels on a CPU, one block after the other: every thread is a fiber that runs until it waits for its warp or its block.
// Included before the .cu sources, which g++ then compiles as C++ (`build.py` rewrites the launches). Correctness only; time means nothing.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#undef __shared__
#define __shared__ static  // blocks run one after the other
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace emulator {

enum Waiting { kNot, kWarp, kBlock };
constexpr int kWarpSize = 32, kStack = 1 << 17;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  Waiting waiting;
  bool done;
  uint64_t slot;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline int count = 0, now = 0;
inline ucontext_t scheduler;
inline dim3 block_index, block_size, grid_size;
inline const std::function<void()>* kernel = nullptr;

inline Fiber& self() { return *fibers[now]; }
inline void wait(Waiting what) {
  Fiber& f = self();
  f.waiting = what;
  swapcontext(&f.context, &scheduler);
}
inline void enter() {
  (*kernel)();
  Fiber& f = self();
  f.done = true;
  swapcontext(&f.context, &scheduler);
}

// Lets everybody in [first, last) go on if all who still run wait for the same thing. True: somebody goes on.
inline bool release(int first, int last, Waiting what) {
  bool any = false;
  for (int i = first; i < last; ++i) {
    if (fibers[i]->done) continue;
    if (fibers[i]->waiting != what) return false;
    any = true;
  }
  for (int i = first; any && i < last; ++i) fibers[i]->waiting = kNot;
  return any;
}

inline void run_block() {
  for (int i = 0; i < count; ++i) {
    Fiber& f = *fibers[i];
    f.index = dim3(i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y));
    f.waiting = kNot;
    f.done = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (now = 0; now < count; ++now) {
      Fiber& f = *fibers[now];
      if (!f.done && f.waiting == kNot) swapcontext(&scheduler, &f.context);
    }
    bool moved = release(0, count, kBlock);
    for (int w = 0; w < count; w += kWarpSize) moved |= release(w, w + kWarpSize < count ? w + kWarpSize : count, kWarp);
    for (int i = 0; i < count; ++i) left |= !fibers[i]->done;
    if (left && !moved) {
      std::fprintf(stderr, "emulator: threads of one block wait for different things\n");
      std::abort();
    }
  }
}

template <class F> void launch(dim3 grid, dim3 block, size_t, cudaStream_t, const F& body) {
  const std::function<void()> call = body;
  kernel = &call;
  grid_size = grid;
  block_size = block;
  count = int(block.x * block.y * block.z);
  if (count < 1 || count > 1024 || grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535) {
    std::fprintf(stderr, "emulator: a launch with %d threads, grid %u x %u x %u\n", count, grid.x, grid.y, grid.z);
    std::abort();
  }
  while (int(fibers.size()) < count) fibers.push_back(std::make_unique<Fiber>());
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) block_index = dim3(x, y, z), run_block();
}

// What another lane of the warp holds; a lane that has ended, or is not there, leaves a thread its own.
template <class T> T from_lane(T value, int lane) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  std::memcpy(&self().slot, &value, sizeof value);
  wait(kWarp);
  const int own = now, other = own / kWarpSize * kWarpSize + lane;
  if (lane >= 0 && lane < kWarpSize && other < count && !fibers[other]->done) std::memcpy(&value, &fibers[other]->slot, sizeof value);
  wait(kWarp);
  return value;
}
inline int lane() { return now % kWarpSize; }

}  // namespace emulator

#define threadIdx (emulator::self().index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

inline void __syncthreads() { emulator::wait(emulator::kBlock); }
inline void __syncwarp(unsigned = ~0u) { emulator::wait(emulator::kWarp); }
template <class T> T __shfl_sync(unsigned, T v, int lane) { return emulator::from_lane(v, lane % emulator::kWarpSize); }
template <class T> T __shfl_down_sync(unsigned, T v, unsigned by) { return emulator::from_lane(v, emulator::lane() + int(by)); }
template <class T> T __shfl_up_sync(unsigned, T v, unsigned by) { return emulator::from_lane(v, emulator::lane() - int(by)); }
template <class T> T __shfl_xor_sync(unsigned, T v, int mask) { return emulator::from_lane(v, emulator::lane() ^ mask); }
inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned all = 0;
  for (int i = 0; i < emulator::kWarpSize; ++i) {
    const int other = emulator::now / emulator::kWarpSize * emulator::kWarpSize + i;
    const bool there = other < emulator::count && !emulator::fibers[other]->done;
    const bool said = emulator::from_lane(vote, i);
    all |= unsigned(there && said) << i;
  }
  return all;
}
template <class T> T __ldg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }
template <class T, class U> T atomicAdd(T* p, U v) { T old = *p; *p = T(old + v); return old; }
template <class A, class B> std::common_type_t<A, B> min(A a, B b) { using C = std::common_type_t<A, B>; return C(b) < C(a) ? C(b) : C(a); }
template <class A, class B> std::common_type_t<A, B> max(A a, B b) { using C = std::common_type_t<A, B>; return C(b) > C(a) ? C(b) : C(a); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __longlong_as_double(long long v) { double out; std::memcpy(&out, &v, 8); return out; }
