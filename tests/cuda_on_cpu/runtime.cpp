// runtime.cpp -- runs a kernel: a fiber per thread, blocks one after another, barriers, warp operations, shared memory.
//
// A fiber runs until it has to wait for other threads; the schedule says which of those that can run is next. Nothing
// ever runs at the same time, so a run is repeatable. Compiled without sanitizers.
#include "state.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#if !defined(__x86_64__) || defined(CUDA_ON_CPU_UCONTEXT)
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

enum Schedule { FORWARD, REVERSE, SHUFFLED, WARPS, WARPS_REVERSED };

Options options;
Fiber* current;
uint32_t block_number, epoch = 1, first_block_epoch;
uintptr_t image_begin, image_end;
uint64_t steps;
char *stacks, *static_shared, *dynamic_shared;
size_t dynamic_shared_size;
std::vector<SharedVariable*> shared_variables;

namespace {
std::vector<Fiber> fibers;
size_t thread_count, first_stale_fiber;  // fibers from there on have no context, or a broken one
dim3 grid, block;
uint3 block_index;
uint64_t launch_serial, block_serial;
size_t static_shared_top, static_shared_used;
size_t alive, at_barrier;
Votes votes;
bool failed_fatally;
void (*entry)(void**);
void** entry_arguments;
std::string messages;
int message_count;
std::vector<uint64_t> keys_seen;
void* scheduler_context;

// ---- switching between fibers ----

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
// Saves the callee-saved registers on the old stack and takes those of the new one: 3 ns, where swapcontext makes two
// system calls.
extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch,@function
cuda_on_cpu_switch:
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
)");

void switch_context(void** save, void* load) { cuda_on_cpu_switch(save, load); }

void* new_context(char* stack_top, void (*start)()) {
  auto* slot = reinterpret_cast<void**>(stack_top);
  *--slot = nullptr;  // keeps the stack aligned as at a call
  *--slot = reinterpret_cast<void*>(start);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  return slot;
}
#else
void switch_context(void** save, void* load) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(load));
}

void* new_context(char* stack_top, void (*start)()) {
  auto* context = reinterpret_cast<ucontext_t*>(stack_top - (sizeof(ucontext_t) + 63) / 64 * 64);
  getcontext(context);
  context->uc_stack.ss_sp = stack_top - STACK_SIZE / 2;
  context->uc_stack.ss_size = reinterpret_cast<char*>(context) - static_cast<char*>(context->uc_stack.ss_sp);
  context->uc_link = nullptr;
  makecontext(context, start, 0);
  return context;
}
#endif

void yield() { switch_context(&current->context, scheduler_context); }

void resume(Fiber& fiber) {
  current = &fiber;
  switch_context(&scheduler_context, fiber.context);
}

void release_barrier() {
  votes = {0, 0, 1};
  Fiber* first = nullptr;
  bool divergent = false;
  for (size_t i = 0; i < thread_count; ++i) {
    Fiber& fiber = fibers[i];
    if (fiber.state != AT_BARRIER) continue;
    if (!first) first = &fiber;
    divergent |= fiber.site.line != first->site.line || strcmp(fiber.site.file, first->site.file) != 0;
    votes.count += fiber.vote;
    votes.any |= fiber.vote;
    votes.all &= fiber.vote;
    fiber.state = RUNNABLE;
  }
  if (divergent)
    fail(false, "divergent barriers: threads of block (%u,%u,%u) met at different __syncthreads, one at %s:%d",
         block_index.x, block_index.y, block_index.z, first->site.file, first->site.line);
  at_barrier = 0;
  ++epoch;
  if (options.checked) checker_barrier();
}

// A fiber outlives its block: after the kernel's end it waits to be the same thread of the next block.
void fiber_main() {
  for (;;) {
    entry(entry_arguments);
    if (!current->copies.empty())
      fail(false,
           "thread (%u,%u,%u) of block (%u,%u,%u) ends with asynchronous copies that it never waited for, issued %s",
           current->index.x, current->index.y, current->index.z, block_index.x, block_index.y, block_index.z,
           where(current->copies[0].pc).c_str());
    current->state = DONE;
    --alive;
    if (alive && at_barrier == alive) release_barrier();
    yield();
  }
}

void make_fibers(size_t count) {
  if (!stacks) {
    stacks = static_cast<char*>(mmap(nullptr, MAX_THREADS * STACK_SIZE, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (size_t i = 0; i < MAX_THREADS; ++i) mprotect(stacks + i * STACK_SIZE, 4096, PROT_NONE);  // ends overflow here
    fibers.resize(MAX_THREADS);
  }
  for (; first_stale_fiber < count; ++first_stale_fiber) {
    // Shifted by different numbers of cache lines: tops at one multiple of STACK_SIZE would share a cache set.
    char* top = stacks + (first_stale_fiber + 1) * STACK_SIZE - first_stale_fiber * 5 % 256 * 64;
    fibers[first_stale_fiber].context = new_context(top, fiber_main);
    fibers[first_stale_fiber].number = uint32_t(first_stale_fiber);
  }
}

// ---- one block ----

void begin_block(uint32_t number) {
  block_number = number;
  block_index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
  ++block_serial;
  first_block_epoch = ++epoch;
  alive = thread_count;
  at_barrier = 0;
  shared_variables.clear();
  static_shared_used = 0;
  if (dynamic_shared_size) memset(dynamic_shared, 0xff, dynamic_shared_size);  // NaN, to show reads before writes
  for (size_t i = 0; i < thread_count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = {unsigned(i % block.x), unsigned(i / block.x % block.y), unsigned(i / block.x / block.y)};
    fiber.state = RUNNABLE;
    fiber.copies.clear();
    fiber.copy_group = 0;
    fiber.warp_epoch = 0;
    fiber.fenced = false;
    fiber.acquired.clear();
  }
  if (options.checked) checker_begin_block();
}

// Every thread that can run, once, in the order given.
bool run_in_order(const std::vector<uint32_t>& order) {
  bool progress = false;
  for (size_t i = 0; i < thread_count && !failed_fatally; ++i) {
    Fiber& fiber = fibers[order[i]];
    if (fiber.state != RUNNABLE) continue;
    resume(fiber);
    progress = true;
  }
  return progress;
}

// Warp after warp, each as far as it can go: so one warp is a whole iteration ahead of the others.
bool run_by_warps(bool reverse) {
  bool progress = false;
  const size_t warps = (thread_count + 31) / 32;
  for (size_t i = 0; i < warps; ++i) {
    const size_t first = 32 * (reverse ? warps - 1 - i : i), end = std::min(thread_count, first + 32);
    for (bool again = true; again;) {
      again = false;
      for (size_t thread = first; thread < end && !failed_fatally; ++thread) {
        if (fibers[thread].state != RUNNABLE) continue;
        resume(fibers[thread]);
        again = progress = true;
      }
    }
  }
  return progress;
}

void report_deadlock() {
  std::string waiting;
  int shown = 0;
  for (size_t i = 0; i < thread_count; ++i) {
    const Fiber& fiber = fibers[i];
    if (fiber.state == DONE || shown++ == 4) continue;
    if (shown > 4) break;
    waiting += "\n  thread " + std::to_string(i) + " waits at " +
               (fiber.state == AT_BARRIER ? "__syncthreads" : "a warp operation") + ", " + fiber.site.file + ":" +
               std::to_string(fiber.site.line);
  }
  fail(true, "deadlock in block (%u,%u,%u): %zu of %zu threads are left, among them%s", block_index.x, block_index.y,
       block_index.z, alive, thread_count, waiting.c_str());
}

void run_block(std::vector<uint32_t>& order, std::mt19937& random) {
  while (alive && !failed_fatally) {
    if (options.schedule == SHUFFLED) std::shuffle(order.begin(), order.end(), random);
    const bool by_warps = options.schedule >= WARPS;
    const bool progress = by_warps ? run_by_warps(options.schedule == WARPS_REVERSED) : run_in_order(order);
    current = nullptr;
    if (!progress && !failed_fatally) report_deadlock();
  }
  current = nullptr;
}

std::vector<uint32_t> ascending(size_t begin, size_t end) {
  std::vector<uint32_t> order;
  for (size_t i = begin; i < end; ++i) order.push_back(uint32_t(i));
  if (options.schedule == REVERSE || options.schedule == WARPS_REVERSED) std::reverse(order.begin(), order.end());
  return order;
}

// ---- the launch ----

int find_image(dl_phdr_info* info, size_t, void* inside) {
  uintptr_t begin = UINTPTR_MAX, end = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
    const uintptr_t segment = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
    begin = std::min(begin, segment);
    end = std::max(end, segment + info->dlpi_phdr[i].p_memsz);
  }
  const auto address = reinterpret_cast<uintptr_t>(inside);
  if (address < begin || address >= end) return 0;
  image_begin = info->dlpi_addr;
  image_end = end;
  return 1;
}

void check_launch_shape() {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (!threads || threads > MAX_THREADS || block.z > 64)
    fail(true, "invalid launch: a block has 1 to 1024 threads; got (%u,%u,%u)", block.x, block.y, block.z);
  else if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    fail(true, "invalid launch: a grid has at least 1 and at most (2147483647,65535,65535) blocks; got (%u,%u,%u)",
         grid.x, grid.y, grid.z);
  else if (uint64_t(grid.x) * grid.y * grid.z > 0xffffffff)
    fail(true, "more blocks than this emulator counts: (%u,%u,%u)", grid.x, grid.y, grid.z);
  else if (dynamic_shared_size > options.max_dynamic_shared)
    fail(true, "invalid launch: %zu bytes of dynamic shared memory, of at most %zu (max_dynamic_shared_size_bytes)",
         dynamic_shared_size, options.max_dynamic_shared);
}

void run_grid() {
  thread_count = size_t(block.x) * block.y * block.z;
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  make_fibers(thread_count);
  std::mt19937 random(options.seed);
  const size_t first = options.last_blocks && options.last_blocks < blocks ? blocks - options.last_blocks : 0;
  std::vector<uint32_t> block_order = ascending(first, blocks), thread_order = ascending(0, thread_count);
  if (options.schedule == SHUFFLED) std::shuffle(block_order.begin(), block_order.end(), random);
  for (uint32_t number : block_order) {
    if (failed_fatally) break;
    begin_block(number);
    run_block(thread_order, random);
  }
  if (failed_fatally) first_stale_fiber = 0;  // they stopped in the middle of the kernel
}
}  // namespace

void fail(bool fatal, const char* format, ...) {
  if (message_count++ < 20) {
    char text[2048];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    messages += text;
    messages += '\n';
  }
  if (!fatal) return;
  failed_fatally = true;
  if (current) yield();
}

bool first_time(uint64_t key) {
  if (std::find(keys_seen.begin(), keys_seen.end(), key) != keys_seen.end()) return false;
  keys_seen.push_back(key);
  return true;
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

// ---- called by kernels ----
extern "C" {

uint3 cuda_on_cpu_thread_index() { return current->index; }
uint3 cuda_on_cpu_block_index() { return block_index; }
dim3 cuda_on_cpu_block_size() { return block; }
dim3 cuda_on_cpu_grid_size() { return grid; }

Votes cuda_on_cpu_barrier(int vote, Site site) {
  if (++steps > options.step_limit)
    fail(true, "endless loop? after %llu steps, a thread is at the __syncthreads of %s:%d", (unsigned long long)steps,
         site.file, site.line);
  current->state = AT_BARRIER;
  current->site = site;
  current->vote = vote;
  if (++at_barrier == alive) release_barrier();
  yield();
  return votes;
}

// The last lane of the mask to arrive does the work for all of them.
void cuda_on_cpu_collective(unsigned mask, Collective work, void* mine, Site site) {
  const size_t lane = current->number % 32, first = current->number - lane,
               lanes_in_warp = std::min<size_t>(32, thread_count - first);
  if (lanes_in_warp < 32 && mask == ~0u)
    mask = (1u << lanes_in_warp) - 1;  // the block's last warp may be a part of one
  if (!(mask >> lane & 1))
    return fail(true, "the calling lane %zu is not in the mask 0x%x of the warp operation at %s:%d", lane, mask,
                site.file, site.line);
  if (lanes_in_warp < 32 && mask >> lanes_in_warp)
    return fail(true, "the mask 0x%x of the warp operation at %s:%d names lanes that do not exist", mask, site.file,
                site.line);
  if (++steps > options.step_limit)
    fail(true, "endless loop? after %llu steps, a thread is at the warp operation of %s:%d", (unsigned long long)steps,
         site.file, site.line);
  current->state = IN_WARP_OPERATION;
  current->site = site;
  current->mask = mask;
  current->work = work;
  current->payload = mine;
  void* lanes[32] = {};
  for (size_t step = 1; step <= 32; ++step) {  // from the next lane on, which has most likely not arrived
    const size_t i = (lane + step) % 32;
    if (!(mask >> i & 1)) continue;
    Fiber& other = fibers[first + i];
    if (other.state != IN_WARP_OPERATION || other.mask != mask || other.work != work) return yield();
    if (other.site.line != site.line && first_time(uint64_t(site.line) << 32 | unsigned(other.site.line)))
      fail(false, "lanes of one warp met in different warp operations, %s:%d and %s:%d", other.site.file,
           other.site.line, site.file, site.line);
    lanes[i] = other.payload;
  }
  if (work) work(lanes, mask);
  for (size_t i = 0; i < lanes_in_warp; ++i) {
    if (!(mask >> i & 1)) continue;
    fibers[first + i].state = RUNNABLE;
    if (!work) ++fibers[first + i].warp_epoch;
  }
  yield();
}

void cuda_on_cpu_sync_warp(unsigned mask, Site site) { cuda_on_cpu_collective(mask, nullptr, nullptr, site); }
unsigned cuda_on_cpu_active_mask() { return ~0u; }
void cuda_on_cpu_fence() { current->fenced = true; }

void cuda_on_cpu_trap(const char* reason, Site site) {
  fail(true, "%s at %s:%d, %s", reason, site.file, site.line, thread_name(block_number, current->number).c_str());
}

// ---- shared memory ----

// Gives a variable its place in this launch, and in each block new, unwritten memory.
void* cuda_on_cpu_shared(SharedVariable* variable) {
  if (variable->launch != launch_serial) {
    // At an address that is aligned as declared and no better, so that an access that needs more is found.
    const size_t wanted = variable->alignment, step = 2 * std::max<size_t>(wanted, 16);
    const size_t gap = 64;
    variable->offset = (static_shared_top + gap + step - 1) / step * step + (wanted < 16 ? wanted : 0);
    static_shared_top = variable->offset + variable->size;
    variable->launch = launch_serial;
    if (static_shared_top > STATIC_SHARED) fail(true, "more than 48 KiB of static __shared__ variables");
  }
  char* address = static_shared + variable->offset;
  if (variable->block != block_serial) {
    variable->block = block_serial;
    static_shared_used += variable->size;
    shared_variables.push_back(variable);
    if (static_shared_used > DEFAULT_SHARED_PER_BLOCK) fail(true, "more than 48 KiB of static __shared__ variables");
    if (static_shared_used + dynamic_shared_size > options.max_shared)
      fail(true, "%zu bytes of static and %zu of dynamic shared memory are more than %zu", static_shared_used,
           dynamic_shared_size, options.max_shared);
    memset(address, 0xff, variable->size);  // NaN, to show reads before writes
  }
  return address;
}

void* cuda_on_cpu_dynamic_shared() { return dynamic_shared; }

// ---- asynchronous copies ----

// Hardware may write at any time between here and the wait; this writes at the wait, and NaN here, so that a reader in
// between, or without a wait, never sees the data.
void cuda_on_cpu_copy_async(void* shared, const void* global, int size, int bytes) {
  const void* pc = __builtin_return_address(0);
  const auto to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
  auto* target = static_cast<char*>(shared);
  const bool in_static = target >= static_shared && target + size <= static_shared + STATIC_SHARED;
  const bool in_dynamic = target >= dynamic_shared && target + size <= dynamic_shared + dynamic_shared_size;
  if (!in_static && !in_dynamic)
    return fail(true, "an asynchronous copy to outside of shared memory %s", where(pc).c_str());
  if (to % size || (bytes && from % size))
    return fail(true, "misaligned asynchronous copy of %d bytes %s, shared address mod %d = %d, global %d", size,
                where(pc).c_str(), size, int(to % size), int(from % size));
  if (bytes < 0 || bytes > size)
    return fail(true, "an asynchronous copy of %d bytes is told to read %d %s", size, bytes, where(pc).c_str());
  if (options.checked) {
    for (int done = 0; done < bytes; ++done)
      if (done % 4 == 0) check_access(from + done, unsigned(std::min(4, bytes - done)), READ, pc);
    check_access(to, unsigned(size), WRITE, pc);
    checker_copy_issued(shared, size);
  }
  memset(shared, 0xff, size);
  current->copies.push_back({target, global, size, bytes, current->copy_group, pc});
}

void cuda_on_cpu_copy_async_commit() { ++current->copy_group; }

void cuda_on_cpu_copy_async_wait(int groups_left) {
  auto& copies = current->copies;
  size_t kept = 0;
  for (const PendingCopy& copy : copies) {
    if (copy.group >= current->copy_group - groups_left) {
      copies[kept++] = copy;
      continue;
    }
    if (options.checked) check_access(reinterpret_cast<uintptr_t>(copy.shared), unsigned(copy.size), WRITE, copy.pc);
    memset(copy.shared + copy.bytes, 0, copy.size - copy.bytes);
    memcpy(copy.shared, copy.global, copy.bytes);
  }
  copies.resize(kept);
}

// ---- called by kernels.py ----

const char* cuda_on_cpu_messages() { return messages.c_str(); }

// Runs a kernel; returns the number of problems, which cuda_on_cpu_messages() describes.
int cuda_on_cpu_launch(void (*kernel)(void**), void** arguments, const unsigned* grid_size, const unsigned* block_size,
                       size_t dynamic_size, const ArrayArgument* arrays, int array_count,
                       const Options* launch_options) {
  static void (*last_kernel)(void**);
  if (kernel != last_kernel) dl_iterate_phdr(find_image, reinterpret_cast<void*>(last_kernel = kernel));
  if (!static_shared) {
    void* memory = mmap(nullptr, STATIC_SHARED + MAX_SHARED_PER_BLOCK + 4096, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    static_shared = static_cast<char*>(memory);
    dynamic_shared = static_shared + STATIC_SHARED;
  }
  options = *launch_options;
  grid = dim3(grid_size[0], grid_size[1], grid_size[2]);
  block = dim3(block_size[0], block_size[1], block_size[2]);
  dynamic_shared_size = dynamic_size;
  entry = kernel;
  entry_arguments = arguments;
  messages.clear();
  keys_seen.clear();
  message_count = 0;
  failed_fatally = false;
  steps = 0;
  static_shared_top = 0;
  ++launch_serial;
  check_launch_shape();
  if (failed_fatally) return message_count;
  if (options.checked) checker_begin_launch(arrays, array_count, arguments);
  run_grid();
  if (options.checked) checker_end_launch(arguments);
  return message_count;
}
}
