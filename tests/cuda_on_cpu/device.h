// device.h -- CUDA C++ for g++: put in front of a kernel's source, which then runs on the CPU, one fiber per thread.
//
// What needs the other threads goes to the run-time; the rest is defined here. Semantics are those of the CUDA C++
// Programming Guide; where hardware is only approximate (__expf, __fdividef), this computes the accurate function.
#pragma once
#define CUDA_ON_CPU 1

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#include "runtime.h"

// NVRTC has neither without headers, so no kernel may use them.
#undef INFINITY
#undef NAN

// ---- qualifiers ----
#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))

// Functions that touch memory for a kernel: never instrumented; in checked builds a call of their own, so that the
// return address is in the kernel.
#define CUDA_ON_CPU_UNCHECKED __attribute__((no_sanitize("thread", "undefined"), no_sanitize_coverage))
#ifdef CUDA_ON_CPU_CHECKED
#define CUDA_ON_CPU_CALL CUDA_ON_CPU_UNCHECKED __attribute__((noinline))
#define CUDA_ON_CPU_ACCESS(address, size, kind) \
  cuda_on_cpu_access(address, size, cuda_on_cpu::kind, __builtin_return_address(0))
#else
#define CUDA_ON_CPU_CALL inline
#define CUDA_ON_CPU_ACCESS(address, size, kind) (void)0
#endif

// compiler.py turns `__shared__ T name dims;` and `extern __shared__ T name[];` into these two.
#define CUDA_ON_CPU_SHARED(alignment, name, dims, ...)                                                  \
  static cuda_on_cpu::SharedVariable cuda_on_cpu_variable_##name = {                                    \
      sizeof(__VA_ARGS__ dims), alignof(cuda_on_cpu::Aligned<alignment, __VA_ARGS__>), #name, 0, 0, 0}; \
  auto& name = *reinterpret_cast<__VA_ARGS__(*) dims>(cuda_on_cpu_shared(&cuda_on_cpu_variable_##name));
#define CUDA_ON_CPU_DYNAMIC_SHARED(name, ...) auto* name = reinterpret_cast<__VA_ARGS__*>(cuda_on_cpu_dynamic_shared());

// The same for `__launch_bounds__(threads)`, at the beginning of a kernel's body.
#define CUDA_ON_CPU_LAUNCH_BOUNDS(...)                      \
  if (blockDim.x * blockDim.y * blockDim.z > (__VA_ARGS__)) \
    cuda_on_cpu_trap("more threads than __launch_bounds__(" #__VA_ARGS__ ")", cuda_on_cpu::Site::here());

namespace cuda_on_cpu {
template <size_t ALIGNMENT, class T>
struct alignas(ALIGNMENT < alignof(T) ? alignof(T) : ALIGNMENT) Aligned {
  char unused;
};
}  // namespace cuda_on_cpu

// ---- vector types ----
#define CUDA_ON_CPU_VECTORS(T, NAME)                                                 \
  struct NAME##1 { T x; };                                                           \
  struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };                                 \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) NAME##4 { T x, y, z, w; }; \
  static inline NAME##1 make_##NAME##1(T x) { return {x}; }                          \
  static inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                  \
  static inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define CUDA_ON_CPU_VECTOR_3(T, NAME) \
  struct NAME##3 { T x, y, z; };      \
  static inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }
CUDA_ON_CPU_VECTORS(signed char, char)
CUDA_ON_CPU_VECTORS(unsigned char, uchar)
CUDA_ON_CPU_VECTORS(short, short)
CUDA_ON_CPU_VECTORS(unsigned short, ushort)
CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(unsigned, uint)
CUDA_ON_CPU_VECTORS(long long, longlong)
CUDA_ON_CPU_VECTORS(unsigned long long, ulonglong)
CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(double, double)
CUDA_ON_CPU_VECTOR_3(int, int)
CUDA_ON_CPU_VECTOR_3(float, float)
CUDA_ON_CPU_VECTOR_3(double, double)
static inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

// ---- threads, barriers, fences ----
#define threadIdx cuda_on_cpu_thread_index()
#define blockIdx cuda_on_cpu_block_index()
#define blockDim cuda_on_cpu_block_size()
#define gridDim cuda_on_cpu_grid_size()
#define warpSize 32
#define CUDA_ON_CPU_SITE cuda_on_cpu::Site site = cuda_on_cpu::Site::here()

static inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu_barrier(0, site); }
static inline int __syncthreads_count(int p, CUDA_ON_CPU_SITE) { return cuda_on_cpu_barrier(p != 0, site).count; }
static inline int __syncthreads_and(int p, CUDA_ON_CPU_SITE) { return cuda_on_cpu_barrier(p != 0, site).all; }
static inline int __syncthreads_or(int p, CUDA_ON_CPU_SITE) { return cuda_on_cpu_barrier(p != 0, site).any; }
static inline void __syncwarp(unsigned mask = ~0u, CUDA_ON_CPU_SITE) { cuda_on_cpu_sync_warp(mask, site); }
static inline void __threadfence() { cuda_on_cpu_fence(); }
static inline void __threadfence_system() { cuda_on_cpu_fence(); }
static inline void __threadfence_block() {}
static inline unsigned __activemask() { return cuda_on_cpu_active_mask(); }
static inline void __trap(CUDA_ON_CPU_SITE) { cuda_on_cpu_trap("__trap()", site); }
#undef assert
#define assert(condition) \
  ((condition) ? (void)0 : cuda_on_cpu_trap("assertion failed: " #condition, {__FILE__, __LINE__}))

// ---- warp shuffles and votes ----
namespace cuda_on_cpu {
enum Shuffle { FROM, UP, DOWN, XOR };

template <class T>
struct ShuffleLane {
  T value, result;
  Shuffle kind;
  int by, width;
  Site site;
};

template <class T>
CUDA_ON_CPU_UNCHECKED void shuffle_work(void** lanes, unsigned mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto& me = *static_cast<ShuffleLane<T>*>(lanes[lane]);
    const int first = lane / me.width * me.width, position = lane - first;
    int source = lane;
    if (me.kind == FROM) source = first + (me.by & (me.width - 1));
    if (me.kind == UP && position >= me.by) source = lane - me.by;
    if (me.kind == DOWN && position + me.by < me.width) source = lane + me.by;
    if (me.kind == XOR && (lane ^ me.by) < first + me.width) source = lane ^ me.by;
    if (!(mask >> source & 1)) return cuda_on_cpu_trap("a shuffle reads a lane outside its mask", me.site);
    me.result = static_cast<ShuffleLane<T>*>(lanes[source])->value;
  }
}

template <class T>
CUDA_ON_CPU_UNCHECKED T shuffle(unsigned mask, T value, Shuffle kind, int by, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "a shuffle moves 4 or 8 bytes");
  ShuffleLane<T> lane{value, value, kind, by, width, site};
  cuda_on_cpu_collective(mask, shuffle_work<T>, &lane, site);
  return lane.result;
}

template <class T>
struct ReduceLane {
  T value, result;
  T (*combine)(T, T);
};

template <class T>
CUDA_ON_CPU_UNCHECKED void reduce_work(void** lanes, unsigned mask) {
  const int first = __builtin_ctz(mask);
  auto& leader = *static_cast<ReduceLane<T>*>(lanes[first]);
  T total = leader.value;
  for (int lane = first + 1; lane < 32; ++lane)
    if (mask >> lane & 1) total = leader.combine(total, static_cast<ReduceLane<T>*>(lanes[lane])->value);
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) static_cast<ReduceLane<T>*>(lanes[lane])->result = total;
}

template <class T>
CUDA_ON_CPU_UNCHECKED T reduce(unsigned mask, T value, T (*combine)(T, T), Site site) {
  ReduceLane<T> lane{value, value, combine};
  cuda_on_cpu_collective(mask, reduce_work<T>, &lane, site);
  return lane.result;
}

CUDA_ON_CPU_UNCHECKED inline void ballot_work(void** lanes, unsigned mask) {
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) votes |= unsigned(*static_cast<unsigned*>(lanes[lane]) != 0) << lane;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) *static_cast<unsigned*>(lanes[lane]) = votes;
}

CUDA_ON_CPU_UNCHECKED inline unsigned ballot(unsigned mask, unsigned vote, Site site) {
  cuda_on_cpu_collective(mask, ballot_work, &vote, site);
  return vote;
}
}  // namespace cuda_on_cpu

template <class T>
static inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::FROM, lane, width, site);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::UP, int(by), width, site);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::DOWN, int(by), width, site);
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::XOR, by, width, site);
}
static inline unsigned __ballot_sync(unsigned mask, int p, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot(mask, p != 0, site);
}
static inline int __any_sync(unsigned mask, int p, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot(mask, p != 0, site) != 0;
}
static inline int __all_sync(unsigned mask, int p, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot(mask, p == 0, site) == 0;
}
#define CUDA_ON_CPU_REDUCE(NAME, T, EXPRESSION)                                                 \
  static inline T NAME(unsigned mask, T value, CUDA_ON_CPU_SITE) {                              \
    return cuda_on_cpu::reduce<T>(mask, value, [](T a, T b) -> T { return EXPRESSION; }, site); \
  }
CUDA_ON_CPU_REDUCE(__reduce_add_sync, unsigned, a + b)
CUDA_ON_CPU_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
CUDA_ON_CPU_REDUCE(__reduce_max_sync, unsigned, a < b ? b : a)
CUDA_ON_CPU_REDUCE(__reduce_add_sync, int, int(unsigned(a) + unsigned(b)))
CUDA_ON_CPU_REDUCE(__reduce_min_sync, int, a < b ? a : b)
CUDA_ON_CPU_REDUCE(__reduce_max_sync, int, a < b ? b : a)
CUDA_ON_CPU_REDUCE(__reduce_and_sync, unsigned, a& b)
CUDA_ON_CPU_REDUCE(__reduce_or_sync, unsigned, a | b)
CUDA_ON_CPU_REDUCE(__reduce_xor_sync, unsigned, a ^ b)

// ---- atomics: integers only, because sums of floating-point numbers must not depend on the schedule ----
#define CUDA_ON_CPU_ATOMIC(NAME, EXPRESSION)                                                                          \
  template <class T, class U>                                                                                         \
  CUDA_ON_CPU_CALL T NAME(T* address, U operand) {                                                                    \
    static_assert(std::is_integral_v<T>, #NAME ": floating-point atomics would make results depend on the schedule"); \
    CUDA_ON_CPU_ACCESS(address, sizeof(T), ATOMIC);                                                                   \
    const T value = T(operand), old = *address;                                                                       \
    *address = (EXPRESSION);                                                                                          \
    (void)value;                                                                                                      \
    return old;                                                                                                       \
  }
CUDA_ON_CPU_ATOMIC(atomicAdd, T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(value)))
CUDA_ON_CPU_ATOMIC(atomicSub, T(std::make_unsigned_t<T>(old) - std::make_unsigned_t<T>(value)))
CUDA_ON_CPU_ATOMIC(atomicExch, value)
CUDA_ON_CPU_ATOMIC(atomicMax, old < value ? value : old)
CUDA_ON_CPU_ATOMIC(atomicMin, value < old ? value : old)
CUDA_ON_CPU_ATOMIC(atomicAnd, old& value)
CUDA_ON_CPU_ATOMIC(atomicOr, old | value)
CUDA_ON_CPU_ATOMIC(atomicXor, old ^ value)
CUDA_ON_CPU_ATOMIC(atomicInc, old >= value ? T(0) : T(old + 1))
CUDA_ON_CPU_ATOMIC(atomicDec, old == 0 || old > value ? value : T(old - 1))
template <class T, class U, class V>
CUDA_ON_CPU_CALL T atomicCAS(T* address, U compare, V value) {
  static_assert(std::is_integral_v<T>, "atomicCAS takes integers");
  CUDA_ON_CPU_ACCESS(address, sizeof(T), ATOMIC);
  const T old = *address;
  if (old == T(compare)) *address = T(value);
  return old;
}

// ---- loads and stores with cache hints ----
#define CUDA_ON_CPU_LOAD(NAME)                      \
  template <class T>                                \
  static __forceinline__ T NAME(const T* address) { \
    return *address;                                \
  }
#define CUDA_ON_CPU_STORE(NAME)                           \
  template <class T>                                      \
  static __forceinline__ void NAME(T* address, T value) { \
    *address = value;                                     \
  }
CUDA_ON_CPU_LOAD(__ldg)
CUDA_ON_CPU_LOAD(__ldca)
CUDA_ON_CPU_LOAD(__ldcg)
CUDA_ON_CPU_LOAD(__ldcs)
CUDA_ON_CPU_LOAD(__ldcv)
CUDA_ON_CPU_LOAD(__ldlu)
CUDA_ON_CPU_STORE(__stwb)
CUDA_ON_CPU_STORE(__stcg)
CUDA_ON_CPU_STORE(__stcs)
CUDA_ON_CPU_STORE(__stwt)

// ---- bits ----
namespace cuda_on_cpu {
template <class To, class From>
static __forceinline__ To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace cuda_on_cpu
static inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits<unsigned>(x); }
static inline int __float_as_int(float x) { return cuda_on_cpu::bits<int>(x); }
static inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits<float>(x); }
static inline float __int_as_float(int x) { return cuda_on_cpu::bits<float>(x); }
static inline long long __double_as_longlong(double x) { return cuda_on_cpu::bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return cuda_on_cpu::bits<double>(x); }
static inline int __double2hiint(double x) { return int(cuda_on_cpu::bits<unsigned long long>(x) >> 32); }
static inline int __double2loint(double x) { return int(unsigned(cuda_on_cpu::bits<unsigned long long>(x))); }
static inline double __hiloint2double(int high, int low) {
  return cuda_on_cpu::bits<double>((unsigned long long)unsigned(high) << 32 | unsigned(low));
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1) << (31 - bit);
  return reversed;
}
static inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
static inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return unsigned(((unsigned long long)high << 32 | low) << (by & 31) >> 32);
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return unsigned(((unsigned long long)high << 32 | low) >> (by & 31));
}
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selectors) {
  const unsigned long long bytes = (unsigned long long)y << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned selector = selectors >> 4 * i & 15;
    unsigned byte = unsigned(bytes >> 8 * (selector & 7) & 255);
    if (selector & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

// ---- arithmetic ----
#define CUDA_ON_CPU_MIN_MAX(A, B, T)     \
  static inline T min(A left, B right) { \
    const T a = left, b = right;         \
    return b < a ? b : a;                \
  }                                      \
  static inline T max(A left, B right) { \
    const T a = left, b = right;         \
    return a < b ? b : a;                \
  }
CUDA_ON_CPU_MIN_MAX(int, int, int)
CUDA_ON_CPU_MIN_MAX(unsigned, unsigned, unsigned)
CUDA_ON_CPU_MIN_MAX(int, unsigned, unsigned)
CUDA_ON_CPU_MIN_MAX(unsigned, int, unsigned)
CUDA_ON_CPU_MIN_MAX(long, long, long)
CUDA_ON_CPU_MIN_MAX(unsigned long, unsigned long, unsigned long)
CUDA_ON_CPU_MIN_MAX(long long, long long, long long)
CUDA_ON_CPU_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }

static inline float rsqrtf(float x) { return float(1 / std::sqrt(double(x))); }
static inline double rsqrt(double x) { return 1 / std::sqrt(x); }
static inline float rcbrtf(float x) { return 1 / cbrtf(x); }
static inline float normcdff(float x) { return float(0.5 * std::erfc(-0.70710678118654752440 * double(x))); }
static inline double normcdf(double x) { return 0.5 * std::erfc(-0.70710678118654752440 * x); }
static inline float sinpif(float x) { return float(std::sin(3.14159265358979323846 * double(x))); }
static inline float cospif(float x) { return float(std::cos(3.14159265358979323846 * double(x))); }
namespace cuda_on_cpu {
template <class T>
static inline T sinpi(T x) {
  return T(std::sin(3.14159265358979323846 * double(x)));
}
template <class T>
static inline T cospi(T x) {
  return T(std::cos(3.14159265358979323846 * double(x)));
}
}  // namespace cuda_on_cpu
#define sinpi cuda_on_cpu::sinpi  // newer C libraries have functions of these names
#define cospi cuda_on_cpu::cospi
static inline float __saturatef(float x) {
  return x > 0 ? (x < 1 ? x : 1.f) : 0.f;
}  // NaN becomes 0, as cvt.sat has it
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __frcp_rn(float x) { return 1 / x; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __frsqrt_rn(float x) { return rsqrtf(x); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline double __ddiv_rn(double a, double b) { return a / b; }
// These four are never contracted into a fused multiply-add: the result passes through memory that g++ must respect.
#define CUDA_ON_CPU_EXACT(NAME, T, OP) \
  static inline T NAME(T a, T b) {     \
    T result = a OP b;                 \
    asm("" : "+x"(result));            \
    return result;                     \
  }
CUDA_ON_CPU_EXACT(__fadd_rn, float, +)
CUDA_ON_CPU_EXACT(__fsub_rn, float, -)
CUDA_ON_CPU_EXACT(__fmul_rn, float, *)
CUDA_ON_CPU_EXACT(__dadd_rn, double, +)
CUDA_ON_CPU_EXACT(__dsub_rn, double, -)
CUDA_ON_CPU_EXACT(__dmul_rn, double, *)
static inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
static inline int __float2int_rz(float x) { return int(x); }
static inline int __float2int_rd(float x) { return int(std::floor(x)); }
static inline int __float2int_ru(float x) { return int(std::ceil(x)); }
static inline unsigned __float2uint_rn(float x) { return unsigned(std::nearbyint(x)); }
static inline unsigned __float2uint_rz(float x) { return unsigned(x); }
static inline float __int2float_rn(int x) { return float(x); }
static inline float __uint2float_rn(unsigned x) { return float(x); }
static inline float __double2float_rn(double x) { return float(x); }
// glibc declares these names itself, so they cannot be functions here.
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)

#include "intrinsics.h"

// ---- launching: one entry per kernel, and its signature for kernels.py to check arguments against ----
namespace cuda_on_cpu {
template <class T>
int describe_value(char* out) {  // f4 i8 u2 ?1 v0, or s<bytes> for a struct
  const char kind = std::is_floating_point_v<T> ? 'f'
                    : std::is_same_v<T, bool>   ? '?'
                    : std::is_void_v<T>         ? 'v'
                    : !std::is_integral_v<T>    ? 's'
                    : std::is_signed_v<T>       ? 'i'
                                                : 'u';
  if constexpr (std::is_void_v<T>)
    return sprintf(out, "v0");
  else
    return sprintf(out, "%c%d", kind, int(sizeof(T)));
}

template <class T>
void describe_parameter(char*& out) {  // pointers: p for T*, c for const T*
  using Pointee = std::remove_pointer_t<T>;
  if (std::is_pointer_v<T>) *out++ = std::is_const_v<Pointee> ? 'c' : 'p';
  out += describe_value<std::remove_cv_t<Pointee>>(out);
  *out++ = ',';
  *out = 0;
}

template <auto KERNEL>
struct Entry;

template <class... Parameters, void (*KERNEL)(Parameters...)>
struct Entry<KERNEL> {
  template <size_t... I>
  CUDA_ON_CPU_UNCHECKED static void call(void** arguments, std::index_sequence<I...>) {
    KERNEL(*static_cast<std::remove_cv_t<Parameters>*>(arguments[I])...);
  }
  CUDA_ON_CPU_UNCHECKED static void run(void** arguments) { call(arguments, std::index_sequence_for<Parameters...>{}); }
  static const char* signature() {
    static char text[24 * sizeof...(Parameters) + 1];
    char* out = text;
    (describe_parameter<std::remove_cv_t<Parameters>>(out), ...);
    return text;
  }
};
}  // namespace cuda_on_cpu
#define CUDA_ON_CPU_EXPORT(index, ...)                                                                            \
  extern "C" void cuda_on_cpu_run_##index(void** arguments) { cuda_on_cpu::Entry<&__VA_ARGS__>::run(arguments); } \
  extern "C" const char* cuda_on_cpu_signature_##index() { return cuda_on_cpu::Entry<&__VA_ARGS__>::signature(); }
