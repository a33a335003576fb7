// Every instruction that C++ has no name for, each in a function of its own, and nothing else.
//
// The tests execute all other code of this folder on the CPU as it stands; these few functions they replace by their own
// (CUDA_ON_CPU). Names follow the PTX ISA. Below compute capability 8.0, asynchronous copies are ordinary ones.
#pragma once

#ifndef CUDA_ON_CPU

// Asynchronous copies, global to shared memory: cp.async. The first `bytes` are read, the rest of the 4, 8 or 16 are 0.

#if __CUDA_ARCH__ >= 800

__device__ __forceinline__ unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// .cg bypasses L1: a tile is read once per block.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void copy_async_8(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void copy_async_4(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's groups are still under way.
template <int N>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#else

// `Word` in one access where all of it exists, else two bytes at a time, and zeros after.
template <class Word>
__device__ __forceinline__ void copy_now(void* shared, const void* global, int bytes) {
    if (bytes == sizeof(Word)) {
        *static_cast<Word*>(shared) = *static_cast<const Word*>(global);
        return;
    }
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Word) / 2); ++i) {
        static_cast<unsigned short*>(shared)[i] = 2 * i < bytes ? static_cast<const unsigned short*>(global)[i] : 0;
    }
}

__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes) {
    copy_now<uint4>(shared, global, bytes);
}

__device__ __forceinline__ void copy_async_8(void* shared, const void* global, int bytes) {
    copy_now<uint2>(shared, global, bytes);
}

__device__ __forceinline__ void copy_async_4(void* shared, const void* global, int bytes) {
    copy_now<unsigned>(shared, global, bytes);
}

__device__ __forceinline__ void copy_async_commit() {}

template <int N>
__device__ __forceinline__ void copy_async_wait() {}

#endif

// 8 x 8 matrices of 16-bit entries out of shared memory, into the fragments of mma: ldmatrix. Lane i of each group of 8
// gives the address of row i of the group's matrix, aligned to 16 bytes.

__device__ __forceinline__ void load_matrix_x4(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
}

__device__ __forceinline__ void load_matrix_x4_transposed(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
}

// d += a b on the tensor cores, in float32: mma.sync, a (16, k), b (k, 8), d (16, 8), spread over the lanes of a warp.

#if __CUDA_ARCH__ >= 800

__device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// k = 8; the operands are float32 rounded by round_tf32.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

// Turing has half as deep an mma, and of the three only for float16.
__device__ __forceinline__ void mma_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    for (int half = 0; half < 2; ++half) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
}

#endif

// Narrow numbers, rounded to the nearest. `low` goes into the lower half.

#if __CUDA_ARCH__ >= 800

__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
    unsigned packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ unsigned round_tf32(float x) {
    unsigned rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
    return rounded;
}

#endif

__device__ __forceinline__ unsigned pack_f16(float low, float high) {
    unsigned short l, h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(l) : "f"(low));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(high));
    return l | static_cast<unsigned>(h) << 16;
}

__device__ __forceinline__ float unpack_bf16(unsigned short x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }

__device__ __forceinline__ float unpack_f16(unsigned short x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
    return wide;
}

#endif  // CUDA_ON_CPU
