// Sums in a fixed order, so that they repeat to the bit: within a few lanes, a block, a grid. No floating-point atomics.
#pragma once

// The sum over the LANES neighbouring lanes of a warp, for each of them; LANES is a power of two, and all lanes take part.
template <int LANES, class T>
__device__ __forceinline__ T lanes_sum(T x) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

// The largest, or NaN where the comparison meets one first: who divides by a sum of exponentials gets NaN all the same.
template <int LANES, class T>
__device__ __forceinline__ T lanes_max(T x) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        const T other = __shfl_xor_sync(0xffffffffu, x, distance);
        x = x < other ? other : x;
    }
    return x;
}

// The sum over a block of THREADS, for its first thread.
template <int THREADS>
__device__ __forceinline__ double block_sum(double x) {
    __shared__ double of_warp[THREADS / 32];
    x = lanes_sum<32>(x);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    double all = 0;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int warp = 0; warp < THREADS / 32; ++warp) all += of_warp[warp];
    }
    __syncthreads();
    return all;
}

// True for the one of n blocks that comes here last, when what all of them wrote before is there for it to read. `ticket`
// starts at 0 and is 0 again afterwards.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned n) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == n - 1;
    __syncthreads();
    if (last) {
        __threadfence();
        if (threadIdx.x == 0) *ticket = 0;
    }
    return last;
}

// Each of n blocks gives its sum, and the first thread of the last to come, for which this is true, gets them all. `of_block`
// has a place for every block.
template <int THREADS>
__device__ __forceinline__ bool blocks_sum(double x, unsigned block, unsigned n, double* of_block, unsigned* ticket,
                                           double& all) {
    x = block_sum<THREADS>(x);
    if (threadIdx.x == 0) of_block[block] = x;
    if (!is_last_block(ticket, n)) return false;
    double sum = 0;
    for (unsigned i = threadIdx.x; i < n; i += THREADS) sum += *static_cast<volatile double*>(of_block + i);
    all = block_sum<THREADS>(sum);
    return threadIdx.x == 0;
}

// The same of all blocks of a one-dimensional grid.
template <int THREADS>
__device__ __forceinline__ bool grid_sum(double x, double* of_block, unsigned* ticket, double& all) {
    return blocks_sum<THREADS>(x, blockIdx.x, gridDim.x, of_block, ticket, all);
}
