// runtime.h -- what the device side (device.h), the run-time (runtime.cpp) and the checker (checker.cpp) share.
#pragma once
#include <cstddef>
#include <cstdint>

struct alignas(4) uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

// A place in the kernel's source: as a default argument it is the caller's.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// One `__shared__` variable of a kernel; compiler.py rewrites its declaration into a static one of these.
struct SharedVariable {
  size_t size, alignment;
  const char* name;
  uint64_t launch, block;  // the last ones that have seen it; 0 before
  size_t offset;           // in the block's shared memory, for this launch
};

// What all threads of a block answered at a barrier.
struct Votes {
  int count, any, all;
};

// Works on what the 32 lanes of a warp handed in; lanes outside the mask are null.
using Collective = void (*)(void** lanes, unsigned mask);

enum Access { READ, WRITE, ATOMIC };

}  // namespace cuda_on_cpu

extern "C" {
// "const": within one fiber they never change, so g++ may keep them in registers.
__attribute__((const)) uint3 cuda_on_cpu_thread_index();
__attribute__((const)) uint3 cuda_on_cpu_block_index();
__attribute__((const)) dim3 cuda_on_cpu_block_size();
__attribute__((const)) dim3 cuda_on_cpu_grid_size();

void* cuda_on_cpu_shared(cuda_on_cpu::SharedVariable* variable);
void* cuda_on_cpu_dynamic_shared();
cuda_on_cpu::Votes cuda_on_cpu_barrier(int vote, cuda_on_cpu::Site site);
void cuda_on_cpu_sync_warp(unsigned mask, cuda_on_cpu::Site site);
void cuda_on_cpu_collective(unsigned mask, cuda_on_cpu::Collective work, void* mine, cuda_on_cpu::Site site);
unsigned cuda_on_cpu_active_mask();
void cuda_on_cpu_fence();
void cuda_on_cpu_trap(const char* reason, cuda_on_cpu::Site site);
void cuda_on_cpu_copy_async(void* shared, const void* global, int size, int bytes);
void cuda_on_cpu_copy_async_commit();
void cuda_on_cpu_copy_async_wait(int groups_left);
void cuda_on_cpu_access(const void* address, unsigned size, cuda_on_cpu::Access kind, const void* pc);
}
