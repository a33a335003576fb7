// checker.cpp -- finds races, accesses out of bounds, reads before writes, misalignment, overflow and endless loops.
//
// In checked builds g++ calls __tsan_read4(address) and the like before every load and store that it cannot prove to be
// private (-fsanitize=thread), __ubsan_handle_* on overflow, and __sanitizer_cov_trace_pc in every basic block. Those
// functions are here; no sanitizer's own run-time is linked.
//
// Races do not depend on the schedule: every access is stamped with its block, thread, and number of barriers passed,
// and two accesses to one address, one of them a write, must be ordered by a barrier, or within a warp by __syncwarp,
// or between blocks by __threadfence and an atomic.
//
// Every array argument is mapped a second time at an address of its own, far from all others, and the kernel gets that
// address. So a pointer tells which argument it came from, even where arguments are neighbours in one allocation.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

namespace cuda_on_cpu {
namespace {

// ---- what is remembered about 4 bytes of memory ----

struct Stamp {
  uint32_t block, thread, epoch, warp_epoch, pc;
  uint8_t bytes = 0;  // which of the 4; 0: no access yet
};

struct Cell {
  Stamp write, first_read, last_read;  // of this block's barrier epoch, or older
  uint32_t epoch;                      // of the latest access; 0 before
  uint8_t initialised;                 // which of the 4 bytes (shared memory)
  bool write_is_atomic, copy_pending;
};

// ---- global memory ----

struct Span {  // bytes of device memory that arguments cover; overlapping arguments share one
  uintptr_t begin, end;
  Cell* cells;
};

struct Window {  // one argument's own view of its array
  uintptr_t begin, end, device_address, mapped_begin;
  size_t mapped_size;
  int parameter;
  bool read_only;
  Span* span;
};

constexpr int SLOTS = 128;
constexpr uintptr_t SLOT_SIZE = uintptr_t(1) << 36;
uintptr_t slots;  // address of the first
std::vector<Window> windows;
std::vector<Span> spans;

// A block's __threadfence followed by an atomic: what the block did before is visible to who reads that atomic.
struct Release {
  const void* address;
  uint32_t block, thread, epoch;
};
std::vector<Release> releases;
std::vector<const void*> acquired_by_block, acquired_since_barrier;

// ---- shared memory ----

Cell shared_cells[(STATIC_SHARED + MAX_SHARED_PER_BLOCK) / 4 + 1];

// Where an address is: in an argument, in a static variable, or else in dynamic shared memory.
struct Place {
  const Window* window;
  const SharedVariable* variable;
  long offset;
  size_t size;
  bool inside;
};

bool contains(const std::vector<const void*>& addresses, const void* address) {
  return std::find(addresses.begin(), addresses.end(), address) != addresses.end();
}

bool ordered_across_blocks(const Stamp& earlier) {
  for (const Release& release : releases) {
    if (release.block != earlier.block) continue;
    const bool covered = earlier.epoch < release.epoch || earlier.thread == release.thread;
    if (covered && (contains(current->acquired, release.address) || contains(acquired_by_block, release.address)))
      return true;
  }
  return false;
}

bool ordered(const Stamp& earlier) {
  if (earlier.block != block_number) return ordered_across_blocks(earlier);
  if (earlier.thread == current->number || earlier.epoch != epoch) return true;
  return earlier.thread / 32 == current->number / 32 && earlier.warp_epoch != current->warp_epoch;
}

std::string name_of(const Place& place) {
  const std::string name = place.window     ? "global argument " + std::to_string(place.window->parameter)
                           : place.variable ? std::string("shared `") + place.variable->name + "`"
                                            : "shared dynamic memory";
  return name + " (" + std::to_string(place.size) + " bytes) at offset " + std::to_string(place.offset);
}

std::string here(const void* pc) { return thread_name(block_number, current->number) + " " + where(pc); }

void report_race(const Place& place, const Stamp& earlier, const char* earlier_kind, const char* kind,
                 const Stamp& now) {
  if (!first_time(uint64_t(earlier.pc) << 32 | now.pc)) return;
  const bool one_warp = earlier.block == now.block && earlier.thread / 32 == now.thread / 32;
  const char* missing = earlier.block != now.block ? "in different blocks"
                        : one_warp                 ? "with no __syncwarp between"
                                                   : "with no __syncthreads between";
  fail(false, "race on %s: %s by %s @0x%x, and %s by %s @0x%x, %s", name_of(place).c_str(), earlier_kind,
       thread_name(earlier.block, earlier.thread).c_str(), earlier.pc, kind, thread_name(now.block, now.thread).c_str(),
       now.pc, missing);
}

void check_race(Cell& cell, const Stamp& now, Access kind, const Place& place) {
  auto conflicts = [&](const Stamp& earlier) { return (earlier.bytes & now.bytes) && !ordered(earlier); };
  const char* what = kind == READ ? "read" : kind == WRITE ? "write" : "atomic";
  if (conflicts(cell.write) && !(kind == ATOMIC && cell.write_is_atomic))
    report_race(place, cell.write, cell.write_is_atomic ? "atomic" : "write", what, now);
  if (kind == READ) return;
  if (conflicts(cell.first_read))
    report_race(place, cell.first_read, "read", what, now);
  else if (conflicts(cell.last_read))
    report_race(place, cell.last_read, "read", what, now);
}

bool same_time(const Stamp& a, const Stamp& b) {
  return a.bytes && a.block == b.block && a.thread == b.thread && a.epoch == b.epoch && a.warp_epoch == b.warp_epoch;
}

void stamp(Stamp& old, Stamp now) {
  if (same_time(old, now)) now.bytes |= old.bytes;
  old = now;
}

// Keeps the first reader of an epoch and the last other one: then a write by any third thread is seen to race with one
// of them, and a write by either with the other.
void remember(Cell& cell, const Stamp& now, Access kind) {
  cell.epoch = epoch;
  if (kind != READ) {
    stamp(cell.write, now);
    cell.write_is_atomic = kind == ATOMIC;
    return;
  }
  const Stamp& first = cell.first_read;
  const bool mine = first.block == now.block && first.thread == now.thread;
  const bool stale = first.block == now.block && first.epoch != epoch;
  stamp(!first.bytes || mine || stale ? cell.first_read : cell.last_read, now);
}

// A read that has been seen before; had anyone written in between, that write would have been reported.
bool repeated(const Cell& cell, const Stamp& now) {
  auto covers = [&](const Stamp& read) { return same_time(read, now) && (read.bytes & now.bytes) == now.bytes; };
  return covers(cell.first_read) || covers(cell.last_read);
}

void touch(Cell& cell, const Stamp& now, Access kind, const Place& place) {
  if (cell.epoch) check_race(cell, now, kind, place);
  remember(cell, now, kind);
}

Stamp stamp_now(const void* pc) {
  return {block_number,
          current->number,
          epoch,
          current->warp_epoch,
          uint32_t(reinterpret_cast<uintptr_t>(pc) - image_begin),
          0};
}

// Calls visit(index of the cell, which of its bytes) for the bytes [offset, offset + size).
template <class Visit>
void for_each_cell(size_t offset, unsigned size, Visit visit) {
  for (size_t at = offset, end = offset + size; at < end;) {
    const size_t cell = at / 4, next = std::min(end, cell * 4 + 4);
    visit(cell, uint8_t(((1u << (next - at)) - 1) << at % 4));
    at = next;
  }
}

// Is the access within its array, and aligned?
bool allowed(const Place& place, uintptr_t address, unsigned size, Access kind, const void* pc) {
  const char* what = kind == READ ? "read" : "write";
  if (!place.inside)
    fail(true, "out of bounds: %s of %u bytes by %s, of %s", what, size, here(pc).c_str(), name_of(place).c_str());
  else if (size <= 16 && (address & (size - 1)))
    fail(true, "misaligned %s of %u bytes by %s, of %s", what, size, here(pc).c_str(), name_of(place).c_str());
  else
    return true;
  return false;
}

void access_global(uintptr_t address, unsigned size, Access kind, const void* pc) {
  const size_t slot = (address - slots) / SLOT_SIZE;
  if (slot >= windows.size())
    return fail(true, "access to an address that belongs to no argument, by %s", here(pc).c_str());
  const Window& window = windows[slot];
  const bool inside = address >= window.begin && address + size <= window.end;
  const Place place{&window, nullptr, long(address - window.begin), size_t(window.end - window.begin), inside};
  if (!allowed(place, address, size, kind, pc)) return;
  const uintptr_t device = address - window.begin + window.device_address;
  Stamp now = stamp_now(pc);
  if (kind != READ && window.read_only && first_time(now.pc))
    fail(false, "write through a const pointer by %s, to %s", here(pc).c_str(), name_of(place).c_str());
  uint8_t* written = options.written + (device - options.memory_base);
  if (kind != WRITE && memchr(written, 0, size) && first_time(uint64_t(1) << 63 | now.pc))
    fail(false, "read of memory that nothing has written, by %s, of %s", here(pc).c_str(), name_of(place).c_str());
  if (kind != READ) memset(written, 1, size);
  for_each_cell(device - (window.span->begin & ~uintptr_t(3)), size, [&](size_t index, uint8_t bytes) {
    Cell& cell = window.span->cells[index];
    now.bytes = bytes;
    if (kind == READ && repeated(cell, now)) return;
    touch(cell, now, kind, place);
  });
}

// The static variable that the address is in, or is nearest to; or dynamic shared memory.
Place place_in_shared(uintptr_t address, unsigned size) {
  const auto dynamic = reinterpret_cast<uintptr_t>(dynamic_shared);
  if (address + 64 >= dynamic) {
    const bool inside = address >= dynamic && address + size <= dynamic + dynamic_shared_size;
    return {nullptr, nullptr, long(address - dynamic), dynamic_shared_size, inside};
  }
  Place nearest{nullptr, nullptr, 0, 0, false};
  long distance = 0;
  for (const SharedVariable* variable : shared_variables) {
    const long offset = long(address - reinterpret_cast<uintptr_t>(static_shared) - variable->offset);
    const long outside = offset < 0 ? -offset : std::max(0L, offset + long(size) - long(variable->size));
    if (nearest.variable && outside >= distance) continue;
    nearest = {nullptr, variable, offset, variable->size, outside == 0};
    distance = outside;
    if (nearest.inside) break;
  }
  return nearest;
}

void access_shared(uintptr_t address, unsigned size, Access kind, const void* pc) {
  const Place place = place_in_shared(address, size);
  if (!allowed(place, address, size, kind, pc)) return;
  Stamp now = stamp_now(pc);
  for_each_cell(address - reinterpret_cast<uintptr_t>(static_shared), size, [&](size_t index, uint8_t bytes) {
    Cell& cell = shared_cells[index];
    now.bytes = bytes;
    if (cell.epoch < first_block_epoch) cell = Cell{};  // an earlier block's; epochs never repeat
    if (kind == READ && repeated(cell, now)) return;
    if (kind != WRITE && (cell.initialised & bytes) != bytes && first_time(uint64_t(1) << 62 | now.pc))
      fail(false, "read %s by %s, of %s",
           cell.copy_pending ? "before an asynchronous copy was waited for," : "of uninitialised memory",
           here(pc).c_str(), name_of(place).c_str());
    touch(cell, now, kind, place);
    if (kind == READ) return;
    cell.initialised |= bytes;
    cell.copy_pending = false;
  });
}

void note_atomic(const void* address) {
  if (current->fenced) releases.push_back({address, block_number, current->number, epoch});
  if (contains(current->acquired, address)) return;
  current->acquired.push_back(address);
  acquired_since_barrier.push_back(address);
}

// ---- mapping of arguments ----

void map_window(Window& window, int slot) {
  const size_t page = 4096;
  const uintptr_t begin = window.device_address & ~(page - 1),
                  end = window.device_address + (window.end - window.begin);
  window.mapped_begin = slots + slot * SLOT_SIZE + SLOT_SIZE / 2;
  window.mapped_size = std::max(page, (end - begin + page - 1) & ~(page - 1));
  mmap(reinterpret_cast<void*>(window.mapped_begin), window.mapped_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
       options.memory_file, off_t(begin - options.memory_base));
  const uintptr_t moved = window.mapped_begin + (window.device_address - begin);
  window.end = moved + (window.end - window.begin);
  window.begin = moved;
}

size_t bytes_of_cells(const Span& span) { return ((span.end - span.begin) / 4 + 2) * sizeof(Cell); }

// All zero, and where an array is large, most of them never touched.
Cell* new_cells(const Span& span) {
  return static_cast<Cell*>(mmap(nullptr, bytes_of_cells(span), PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

void make_spans() {
  std::vector<const Window*> sorted;
  for (const Window& window : windows) sorted.push_back(&window);
  std::sort(sorted.begin(), sorted.end(), [](auto* a, auto* b) { return a->device_address < b->device_address; });
  spans.clear();
  for (const Window* window : sorted) {
    const uintptr_t begin = window->device_address, end = begin + (window->end - window->begin);
    if (spans.empty() || begin >= spans.back().end) spans.push_back({begin, end, nullptr});
    spans.back().end = std::max(spans.back().end, end);
  }
  for (Span& span : spans) span.cells = new_cells(span);
  for (Window& window : windows)
    for (Span& span : spans)
      if (window.device_address >= span.begin && window.device_address < span.end) window.span = &span;
}

void overflow(const char* what, const void* location) {
  struct {  // the first three fields of all data that the compiler passes to handlers
    const char* file;
    uint32_t line, column;
  } place;
  memcpy(&place, location, sizeof place);
  if (!current) return;
  fail(true, "%s by %s at %s:%u", what, thread_name(block_number, current->number).c_str(), place.file, place.line);
}

// An access of any size as the largest aligned pieces.
void check_range(uintptr_t address, size_t size, Access kind, const void* pc) {
  while (size) {
    unsigned piece = 1;
    while (piece < 16 && piece * 2 <= size && address % (piece * 2) == 0) piece *= 2;
    check_access(address, piece, kind, pc);
    address += piece;
    size -= piece;
  }
}
}  // namespace

std::string where(const void* pc) {
  char text[32];
  snprintf(text, sizeof text, "@0x%zx", size_t(reinterpret_cast<uintptr_t>(pc) - image_begin));
  return text;
}

std::string thread_name(uint32_t block, uint32_t thread) {
  return "block " + std::to_string(block) + " thread " + std::to_string(thread);
}

void count_step(const void* pc) {
  if (++steps > options.step_limit && current)
    fail(true, "endless loop? after %llu steps, one is %s", (unsigned long long)steps, here(pc).c_str());
}

void check_access(uintptr_t address, unsigned size, Access kind, const void* pc) {
  if (!current) return;
  const auto stack = reinterpret_cast<uintptr_t>(stacks), shared = reinterpret_cast<uintptr_t>(static_shared);
  if (address - stack < MAX_THREADS * STACK_SIZE) {
    if ((address - stack) / STACK_SIZE != current->number)
      fail(true, "access to another thread's local memory by %s", here(pc).c_str());
    return;
  }
  count_step(pc);
  if (address - shared < STATIC_SHARED + MAX_SHARED_PER_BLOCK)
    access_shared(address, size, kind, pc);
  else if (address >= image_begin && address < image_end) {
  }  // __constant__ and __device__ variables, literals
  else
    access_global(address, size, kind, pc);
  if (kind == ATOMIC) note_atomic(reinterpret_cast<const void*>(address));
}

void checker_begin_launch(const ArrayArgument* arrays, int count, void** arguments) {
  if (!slots)
    slots = reinterpret_cast<uintptr_t>(
        mmap(nullptr, SLOTS * SLOT_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  windows.clear();
  releases.clear();
  for (int i = 0; i < count && i < SLOTS; ++i) {
    windows.push_back({arrays[i].address, arrays[i].address + arrays[i].size, arrays[i].address, 0, 0,
                       arrays[i].parameter, arrays[i].read_only != 0, nullptr});
    map_window(windows[i], i);
    memcpy(arguments[arrays[i].parameter], &windows[i].begin, sizeof(uintptr_t));
  }
  make_spans();
}

void checker_end_launch(void** arguments) {
  for (const Window& window : windows) {
    mmap(reinterpret_cast<void*>(window.mapped_begin), window.mapped_size, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    memcpy(arguments[window.parameter], &window.device_address, sizeof(uintptr_t));
  }
  for (Span& span : spans) munmap(span.cells, bytes_of_cells(span));
  spans.clear();
}

void checker_begin_block() {
  acquired_by_block.clear();
  acquired_since_barrier.clear();
}

void checker_barrier() {
  acquired_by_block.insert(acquired_by_block.end(), acquired_since_barrier.begin(), acquired_since_barrier.end());
  acquired_since_barrier.clear();
}

void checker_copy_issued(void* shared, int size) {
  for_each_cell(static_cast<char*>(shared) - static_shared, unsigned(size), [](size_t index, uint8_t bytes) {
    shared_cells[index].initialised &= uint8_t(~bytes);
    shared_cells[index].copy_pending = true;
  });
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

// ---- called by instrumented code ----
#define PC __builtin_return_address(0)
#define ACCESS(NAME, SIZE, KIND) \
  void __tsan_##NAME##SIZE(void* address) { check_access(reinterpret_cast<uintptr_t>(address), SIZE, KIND, PC); }
#define ACCESSES(SIZE)                 \
  ACCESS(read, SIZE, READ)             \
  ACCESS(write, SIZE, WRITE)           \
  ACCESS(unaligned_read, SIZE, READ)   \
  ACCESS(unaligned_write, SIZE, WRITE) \
  ACCESS(volatile_read, SIZE, READ)    \
  ACCESS(volatile_write, SIZE, WRITE)
#define ARITHMETIC(NAME, WHAT) \
  void __ubsan_handle_##NAME(void* location) { overflow(WHAT, location); }

extern "C" {
void cuda_on_cpu_access(const void* address, unsigned size, Access kind, const void* pc) {
  check_access(reinterpret_cast<uintptr_t>(address), size, kind, pc);
}
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* address, size_t size) {
  check_range(reinterpret_cast<uintptr_t>(address), size, READ, PC);
}
void __tsan_write_range(void* address, size_t size) {
  check_range(reinterpret_cast<uintptr_t>(address), size, WRITE, PC);
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __sanitizer_cov_trace_pc() { count_step(PC); }

ARITHMETIC(type_mismatch_v1, "misaligned pointer used")
ARITHMETIC(out_of_bounds, "array index out of bounds")
ARITHMETIC(add_overflow, "signed overflow in +")
ARITHMETIC(sub_overflow, "signed overflow in -")
ARITHMETIC(mul_overflow, "signed overflow in *")
ARITHMETIC(negate_overflow, "signed overflow in unary -")
ARITHMETIC(divrem_overflow, "integer division by zero, or overflow in /")
ARITHMETIC(shift_out_of_bounds, "shift by too many bits")
}
