// state.h -- the state of the launch that is running, shared by runtime.cpp and checker.cpp.
#pragma once
#include <cstdarg>
#include <string>
#include <vector>

#include "runtime.h"

namespace cuda_on_cpu {

// An array argument, from Python.
struct ArrayArgument {
  uintptr_t address;
  size_t size;
  int parameter, read_only;
};

// Options of a launch, from Python.
struct Options {
  int schedule;
  unsigned seed;
  int checked;
  size_t max_dynamic_shared, max_shared;  // bytes that a block may have: dynamic, and static and dynamic
  uint64_t step_limit;                    // memory accesses, basic blocks and barriers
  int memory_file;                        // device memory: this file, mapped at memory_base
  uintptr_t memory_base;
  size_t memory_size;
  uint8_t* written;    // one byte per byte of device memory: has it ever been written?
  size_t last_blocks;  // of the grid, the only ones that run; 0: all
};

}  // namespace cuda_on_cpu

#pragma GCC visibility push(hidden)  // so that calls within the run-time are direct
namespace cuda_on_cpu {

constexpr size_t STACK_SIZE = 128 << 10, MAX_THREADS = 1024;
constexpr size_t STATIC_SHARED = 64 << 10;          // room for 48 KiB of variables with gaps between them
constexpr size_t MAX_SHARED_PER_BLOCK = 227 << 10;  // compute capability 9.0; 48 KiB unless a kernel asks for more
constexpr size_t DEFAULT_SHARED_PER_BLOCK = 48 << 10;

enum State { RUNNABLE, AT_BARRIER, IN_WARP_OPERATION, DONE };

struct PendingCopy {
  char* shared;
  const void* global;
  int size, bytes, group;
  const void* pc;
};

// One CUDA thread of the block that is running.
struct Fiber {
  void* context;
  uint3 index;
  uint32_t number;  // within the block
  State state;
  Site site;  // where it waits
  int vote;
  unsigned mask;
  Collective work;
  void* payload;
  std::vector<PendingCopy> copies;
  int copy_group;
  // For the checker: how many __syncwarp it has passed, and the memory fences and atomics that order blocks.
  uint32_t warp_epoch;
  bool fenced;
  std::vector<const void*> acquired;
};

// ---- runtime.cpp ----
extern Options options;
extern Fiber* current;  // null outside of kernels
extern uint32_t block_number;
extern uint32_t epoch;                    // counts barriers and blocks; never twice the same in a process
extern uint32_t first_block_epoch;        // of this block
extern uintptr_t image_begin, image_end;  // the kernel's shared object
extern uint64_t steps;
extern char* stacks;
extern char* static_shared;
extern char* dynamic_shared;
extern size_t dynamic_shared_size;
extern std::vector<SharedVariable*> shared_variables;  // those that this block has touched

// Notes a problem; one that is fatal ends the launch and does not return to the kernel.
void fail(bool fatal, const char* format, ...) __attribute__((format(printf, 2, 3)));
// The same, but only once per launch for each key.
bool first_time(uint64_t key);

// ---- checker.cpp ----
void checker_begin_launch(const ArrayArgument* arrays, int count, void** arguments);
void checker_end_launch(void** arguments);
void checker_begin_block();
void checker_barrier();  // publishes what the threads of the block have acquired
void checker_copy_issued(void* shared, int size);
void check_access(uintptr_t address, unsigned size, Access kind, const void* pc);
void count_step(const void* pc);
std::string where(const void* pc);  // "@0x<offset in the shared object>", which kernels.py turns into file:line
std::string thread_name(uint32_t block, uint32_t thread);

}  // namespace cuda_on_cpu
#pragma GCC visibility pop
