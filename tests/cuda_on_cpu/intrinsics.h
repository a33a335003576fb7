// intrinsics.h -- what kernels/cuda/intrinsics.cuh wraps of PTX, computed: asynchronous copies, ldmatrix, mma,
// roundings.
//
// The fragment layouts are those of the PTX ISA, "Matrix Fragments for mma.m16n8k16 / mma.m16n8k8": in every 8x8 tile
// of an accumulator, lane 4 i + j holds row i, columns 2 j and 2 j + 1.
#pragma once

// ---- cp.async: the first `bytes` of `size` from global memory, the rest zeros; delivered by the wait ----
static __forceinline__ void copy_async_16(void* shared, const void* global, int bytes) {
  cuda_on_cpu_copy_async(shared, global, 16, bytes);
}
static __forceinline__ void copy_async_8(void* shared, const void* global, int bytes) {
  cuda_on_cpu_copy_async(shared, global, 8, bytes);
}
static __forceinline__ void copy_async_4(void* shared, const void* global, int bytes) {
  cuda_on_cpu_copy_async(shared, global, 4, bytes);
}
static __forceinline__ void copy_async_commit() { cuda_on_cpu_copy_async_commit(); }
template <int N>
static __forceinline__ void copy_async_wait() {
  cuda_on_cpu_copy_async_wait(N);
}

// ---- narrow floating-point types ----
static inline float unpack_bf16(unsigned short x) { return __uint_as_float(unsigned(x) << 16); }
static inline float unpack_f16(unsigned short x) { return float(cuda_on_cpu::bits<_Float16>(x)); }

namespace cuda_on_cpu {
static inline unsigned bf16_bits(float x) {  // cvt.rn.bf16.f32
  const unsigned u = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}
static inline unsigned f16_bits(float x) {  // cvt.rn.f16.f32
  if (x != x) return 0x7fff;
  return bits<unsigned short>(_Float16(x));
}
}  // namespace cuda_on_cpu
static inline unsigned pack_bf16(float low, float high) {
  return cuda_on_cpu::bf16_bits(low) | cuda_on_cpu::bf16_bits(high) << 16;
}
static inline unsigned pack_f16(float low, float high) {
  return cuda_on_cpu::f16_bits(low) | cuda_on_cpu::f16_bits(high) << 16;
}
static inline unsigned round_tf32(float x) {  // cvt.rna.tf32.f32: to nearest, ties away from zero
  const unsigned u = __float_as_uint(x);
  if (x != x) return 0x7fffffff & 0xffffe000u;
  if ((u & 0x7f800000u) == 0x7f800000u) return u;
  return (u + 0x1000u) & 0xffffe000u;
}

// ---- ldmatrix: 8x8 tiles of 16-bit entries, one row of 16 bytes per lane's address ----
namespace cuda_on_cpu {
struct LoadLane {
  unsigned* registers;
  const void* row;
  int tiles;
  bool transposed;
};

CUDA_ON_CPU_UNCHECKED inline void load_matrix_work(void** lanes, unsigned) {
  for (int lane = 0; lane < 32; ++lane) {
    auto& me = *static_cast<LoadLane*>(lanes[lane]);
    for (int tile = 0; tile < me.tiles; ++tile) {
      unsigned short pair[2];
      for (int i = 0; i < 2; ++i) {
        const int along = lane / 4, across = lane % 4 * 2 + i;
        const int row = me.transposed ? across : along, column = me.transposed ? along : across;
        const void* address = static_cast<LoadLane*>(lanes[8 * tile + row])->row;
        __builtin_memcpy(&pair[i], static_cast<const char*>(address) + 2 * column, 2);
      }
      me.registers[tile] = pair[0] | unsigned(pair[1]) << 16;
    }
  }
}

CUDA_ON_CPU_CALL void load_matrix(unsigned* registers, const void* row, int tiles, bool transposed, Site site) {
  if (int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32 < 8 * tiles)
    CUDA_ON_CPU_ACCESS(row, 16, READ);
  LoadLane lane{registers, row, tiles, transposed};
  cuda_on_cpu_collective(~0u, load_matrix_work, &lane, site);
}
}  // namespace cuda_on_cpu

static __forceinline__ void load_matrix_x4(unsigned (&r)[4], const void* row, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::load_matrix(r, row, 4, false, site);
}
static __forceinline__ void load_matrix_x4_transposed(unsigned (&r)[4], const void* row, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::load_matrix(r, row, 4, true, site);
}
static __forceinline__ void load_matrix_x2(unsigned (&r)[2], const void* row, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::load_matrix(r, row, 2, false, site);
}
static __forceinline__ void load_matrix_x2_transposed(unsigned (&r)[2], const void* row, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::load_matrix(r, row, 2, true, site);
}

// ---- mma.sync: D (16x8) += A (16xK) B (Kx8), accumulated in float32 ----
namespace cuda_on_cpu {
struct Bf16 {
  static constexpr int K = 16;
  static float entry(unsigned r, int half) { return unpack_bf16((unsigned short)(r >> 16 * half)); }
};
struct F16 {
  static constexpr int K = 16;
  static float entry(unsigned r, int half) { return unpack_f16((unsigned short)(r >> 16 * half)); }
};
struct Tf32 {
  static constexpr int K = 8;
  static float entry(unsigned r, int) { return __uint_as_float(r & 0xffffe000u); }  // hardware ignores 13 bits
};

struct MmaLane {
  float* d;
  const unsigned *a, *b;
  Site site;
};

template <class Type>
CUDA_ON_CPU_UNCHECKED void mma_work(void** lanes, unsigned mask) {
  constexpr int K = Type::K, PACKED = K / 8;  // entries in a 32-bit register
  if (mask != ~0u)
    return cuda_on_cpu_trap("mma by a partial warp", static_cast<MmaLane*>(lanes[__builtin_ctz(mask)])->site);
  float A[16][K], B[K][8], D[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& me = *static_cast<MmaLane*>(lanes[lane]);
    const int i = lane / 4, j = lane % 4;
    for (int r = 0; r < 4; ++r)
      for (int h = 0; h < PACKED; ++h) A[i + r % 2 * 8][j * PACKED + h + r / 2 * K / 2] = Type::entry(me.a[r], h);
    for (int r = 0; r < 2; ++r)
      for (int h = 0; h < PACKED; ++h) B[j * PACKED + h + r * K / 2][i] = Type::entry(me.b[r], h);
    for (int r = 0; r < 4; ++r) D[i + r / 2 * 8][j * 2 + r % 2] = me.d[r];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < K; ++k)
      for (int column = 0; column < 8; ++column) D[row][column] += A[row][k] * B[k][column];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& me = *static_cast<MmaLane*>(lanes[lane]);
    for (int r = 0; r < 4; ++r) me.d[r] = D[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
  }
}

template <class Type>
CUDA_ON_CPU_UNCHECKED void mma(float* d, const unsigned* a, const unsigned* b, Site site) {
  MmaLane lane{d, a, b, site};
  cuda_on_cpu_collective(~0u, mma_work<Type>, &lane, site);
}
}  // namespace cuda_on_cpu

static __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], CUDA_ON_CPU_SITE) {
  cuda_on_cpu::mma<cuda_on_cpu::Bf16>(d, a, b, site);
}
static __forceinline__ void mma_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], CUDA_ON_CPU_SITE) {
  cuda_on_cpu::mma<cuda_on_cpu::F16>(d, a, b, site);
}
static __forceinline__ void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], CUDA_ON_CPU_SITE) {
  cuda_on_cpu::mma<cuda_on_cpu::Tf32>(d, a, b, site);
}
