// The product on the tensor cores: 16-bit numbers, or float32 rounded to tf32, summed in float32.
//
// A warp computes a part of the tile of C, as 16 x 8 fragments. ldmatrix brings a fragment's operands from shared memory as
// they lie there or transposed, so both directions of a tile serve without a copy; tf32 it can only bring as they lie.
#pragma once

#include "gemm.cuh"

// One kind of number on the tensor cores: `STEP` of k at a time. Turing has float16 only.
#if !(defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)

struct Bf16 {
    typedef bfloat16 Input;
    static constexpr int STEP = 16;
    static __device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
        mma_bf16(c, a, b);
    }
    static __device__ __forceinline__ unsigned rounded(unsigned x) { return x; }
};

struct Tf32 {
    typedef float Input;
    static constexpr int STEP = 8;
    static __device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
        mma_tf32(c, a, b);
    }
    static __device__ __forceinline__ unsigned rounded(unsigned x) { return round_tf32(__uint_as_float(x)); }
};

#endif

struct F16 {
    typedef float16 Input;
    static constexpr int STEP = 16;
    static __device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
        mma_f16(c, a, b);
    }
    static __device__ __forceinline__ unsigned rounded(unsigned x) { return x; }
};

template <class Kind, int M_, int N_, int K_, int WARPS_M, int WARPS_N, int STAGES_>
struct TensorCores {
    typedef typename Kind::Input Input;
    static constexpr int M = M_, N = N_, K = K_, SLICES = 1, STAGES = STAGES_;
    static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
    static constexpr int WARP_M = M / WARPS_M, WARP_N = N / WARPS_N;
    static constexpr int PASSES = WARP_M * WARP_N > 1024 ? 2 : 1;  // as in Simt: no more shared memory than the ring takes
    static_assert(K % Kind::STEP == 0 && WARP_M % 16 == 0 && WARP_N % 16 == 0, "whole fragments, two side by side");

    float sum[WARP_M / 16][WARP_N / 8][4];

    static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
    static __device__ __forceinline__ int warp_m() { return threadIdx.x / 32 / WARPS_N * WARP_M; }
    static __device__ __forceinline__ int warp_n() { return threadIdx.x / 32 % WARPS_N * WARP_N; }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < WARP_M / 16; ++i) {
#pragma unroll
            for (int j = 0; j < WARP_N / 8; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[i][j][e] = 0;
            }
        }
    }

    template <Along A_ALONG, Along B_ALONG, int A_STRIDE, int B_STRIDE>
    __device__ __forceinline__ void accumulate(const Input* a_tile, const Input* b_tile) {
#pragma unroll
        for (int k = 0; k < K; k += Kind::STEP) {
            unsigned a[WARP_M / 16][4], b[WARP_N / 8][2];
#pragma unroll
            for (int i = 0; i < WARP_M / 16; ++i) load_a<A_ALONG, A_STRIDE>(a_tile, warp_m() + 16 * i, k, a[i]);
#pragma unroll
            for (int j = 0; j < WARP_N / 8; j += 2) load_b<B_ALONG, B_STRIDE>(b_tile, warp_n() + 8 * j, k, b[j], b[j + 1]);
#pragma unroll
            for (int i = 0; i < WARP_M / 16; ++i) {
#pragma unroll
                for (int j = 0; j < WARP_N / 8; ++j) Kind::multiply(sum[i][j], a[i], b[j]);
            }
        }
    }

    // Lane 4 g + t holds columns 2 t, 2 t + 1 of rows g and g + 8 of each fragment of C.
    template <Along A_ALONG, Along B_ALONG, int C_ROWS, int C_STRIDE>
    __device__ __forceinline__ void unload(float* c, int pass) const {
        const int g = lane() / 4, t = lane() % 4;
#pragma unroll
        for (int i = 0; i < WARP_M / 16; ++i) {
            const int row = warp_m() + 16 * i - pass * C_ROWS;
            if (row < 0 || row >= C_ROWS) continue;  // the same for the warp: 16 rows never straddle two passes
#pragma unroll
            for (int j = 0; j < WARP_N / 8; ++j) {
                float* upper = c + (row + g) * C_STRIDE + warp_n() + 8 * j + 2 * t;
                *reinterpret_cast<float2*>(upper) = make_float2(sum[i][j][0], sum[i][j][1]);
                *reinterpret_cast<float2*>(upper + 8 * C_STRIDE) = make_float2(sum[i][j][2], sum[i][j][3]);
            }
        }
    }

   private:
    static constexpr int SIZE = Chunk<Input>::SIZE;  // k of one 8 x 16-byte matrix of ldmatrix

    // Rows m to m + 15 of A, k to k + STEP: four matrices, by rows first.
    template <Along ALONG, int STRIDE>
    static __device__ __forceinline__ void load_a(const Input* tile, int m, int k, unsigned (&a)[4]) {
        const int matrix = lane() / 8, row = lane() % 8;
        if constexpr (ALONG == ALONG_K) {
            load_matrix_x4(a, tile + (m + matrix % 2 * 8 + row) * STRIDE + k + matrix / 2 * SIZE);
        } else if constexpr (sizeof(Input) == 2) {
            load_matrix_x4_transposed(a, tile + (k + matrix / 2 * 8 + row) * STRIDE + m + matrix % 2 * 8);
        } else {
            const unsigned* from = reinterpret_cast<const unsigned*>(tile) + (k + lane() % 4) * STRIDE + m + lane() / 4;
#pragma unroll
            for (int e = 0; e < 4; ++e) a[e] = from[e / 2 * 4 * STRIDE + e % 2 * 8];
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) a[e] = Kind::rounded(a[e]);
    }

    // Columns n to n + 15 of B, k to k + STEP: two fragments, of two matrices each, by k first.
    template <Along ALONG, int STRIDE>
    static __device__ __forceinline__ void load_b(const Input* tile, int n, int k, unsigned (&left)[2],
                                                  unsigned (&right)[2]) {
        const int matrix = lane() / 8, row = lane() % 8;
        unsigned b[4];
        if constexpr (ALONG == ALONG_K) {
            load_matrix_x4(b, tile + (n + matrix / 2 * 8 + row) * STRIDE + k + matrix % 2 * SIZE);
        } else if constexpr (sizeof(Input) == 2) {
            load_matrix_x4_transposed(b, tile + (k + matrix % 2 * 8 + row) * STRIDE + n + matrix / 2 * 8);
        } else {
            const unsigned* from = reinterpret_cast<const unsigned*>(tile) + (k + lane() % 4) * STRIDE + n + lane() / 4;
#pragma unroll
            for (int e = 0; e < 4; ++e) b[e] = from[e % 2 * 4 * STRIDE + e / 2 * 8];
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            left[e] = Kind::rounded(b[e]);
            right[e] = Kind::rounded(b[2 + e]);
        }
    }
};
