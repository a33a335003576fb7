// The kinds of numbers that the kernels store, what they compute with, and moving four at a time.
#pragma once

#include "intrinsics.cuh"

struct bfloat16 {
    unsigned short bits;
};

struct float16 {
    unsigned short bits;
};

// What an operation computes in: the number itself, or float32 for the 16-bit kinds.
template <class T>
struct ComputeType {
    typedef T type;
};
template <>
struct ComputeType<bfloat16> {
    typedef float type;
};
template <>
struct ComputeType<float16> {
    typedef float type;
};
template <class T>
using Compute = typename ComputeType<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) { return unpack_bf16(x.bits); }
__device__ __forceinline__ float widen(float16 x) { return unpack_f16(x.bits); }

template <class T>
struct Narrow {
    static __device__ __forceinline__ T from(T x) { return x; }
};
#if !(defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)
template <>
struct Narrow<bfloat16> {
    static __device__ __forceinline__ bfloat16 from(float x) {
        return {static_cast<unsigned short>(pack_bf16(x, 0.0f) & 0xffff)};
    }
};
#endif
template <>
struct Narrow<float16> {
    static __device__ __forceinline__ float16 from(float x) {
        return {static_cast<unsigned short>(pack_f16(x, 0.0f) & 0xffff)};
    }
};

// Four numbers in one access: of 8, 16 or 2 x 16 bytes.
template <class T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Quad {
    T x[4];
};

// Whether rows of `columns` numbers from p on may be accessed by aligned quads. A null p may.
template <class T>
__device__ __forceinline__ bool quads_fit(const T* p, int columns) {
    return (reinterpret_cast<unsigned long long>(p) % sizeof(Quad<T>)) == 0 && columns % 4 == 0;
}

// The first n of four numbers at p, in one access where they are all there and aligned.
template <class T>
__device__ __forceinline__ void load_quad(const T* p, int n, bool aligned, Compute<T> (&values)[4]) {
    if (aligned) {
        const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(p);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] = widen(quad.x[j]);
    } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] = j < n ? widen(p[j]) : Compute<T>(0);
    }
}

template <class T>
__device__ __forceinline__ void store_quad(T* p, int n, bool aligned, const Compute<T> (&values)[4]) {
    if (aligned) {
        Quad<T> quad;
#pragma unroll
        for (int j = 0; j < 4; ++j) quad.x[j] = Narrow<T>::from(values[j]);
        *reinterpret_cast<Quad<T>*>(p) = quad;
    } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (j < n) p[j] = Narrow<T>::from(values[j]);
        }
    }
}
