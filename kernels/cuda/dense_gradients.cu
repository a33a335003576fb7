// dense_gradients: dW = a_prev^T delta, db = sum of delta over the rows; each block over rows of its own.
//
// Grid: (tiles of n_in, tiles of n_out, parts of the batch). Part p sums over rows [p rows_per_part, ...) and overwrites
// dW[p] and db[p]; `update`, or `sum_parts`, adds the parts in their order. db comes from the tiles of delta that the blocks
// of the first tile of n_in have in shared memory anyway.
#include "tensor_cores.cuh"

// Sums the columns of the tiles of delta that pass by: GROUPS threads a column, each over every GROUPS-th row.
template <class Math, int STRIDE>
struct ColumnSums {
    typedef Compute<typename Math::Input> T;
    static constexpr int GROUPS = Math::THREADS / Math::N < Math::K ? Math::THREADS / Math::N : Math::K;
    static_assert(GROUPS >= 1, "a thread a column");
    bool wanted;
    T sum;

    __device__ __forceinline__ void operator()(const typename Math::Input* tile) {
        const int column = threadIdx.x % Math::N, group = threadIdx.x / Math::N;
        if (!wanted || (Math::THREADS / Math::N > GROUPS && group >= GROUPS)) return;
#pragma unroll
        for (int k = 0; k < Math::K; k += GROUPS) {
            if (Math::K % GROUPS == 0 || k + group < Math::K) sum += widen(tile[(k + group) * STRIDE + column]);
        }
    }

    // The sums of all rows, one to a thread of the first N; `shared` is free.
    __device__ __forceinline__ T total(T* shared) const {
        const int column = threadIdx.x % Math::N, group = threadIdx.x / Math::N;
        if (group < GROUPS) shared[group * Math::N + column] = sum;
        __syncthreads();
        T all = 0;
        if (group == 0) {
            for (int g = 0; g < GROUPS; ++g) all += shared[g * Math::N + column];
        }
        __syncthreads();
        return all;
    }
};

template <class Math, int A_BYTES, int DELTA_BYTES>
__global__ void __launch_bounds__(Math::THREADS)
    dense_gradients(const typename Math::Input* __restrict__ a_prev,         // (n_rows, n_in)
                    const typename Math::Input* __restrict__ delta,          // (n_rows, n_out)
                    Compute<typename Math::Input>* __restrict__ dW,          // (parts, n_in, n_out)
                    Compute<typename Math::Input>* __restrict__ db,          // (parts, n_out)
                    int n_rows, int n_in, int n_out, int rows_per_part) {
    typedef Compute<typename Math::Input> T;
    typedef Product<Math, ALONG_MN, ALONG_MN, A_BYTES, DELTA_BYTES> Gradient;
    extern __shared__ __align__(16) unsigned char shared[];
    const int row0 = blockIdx.x * Math::M, column0 = blockIdx.y * Math::N;
    const int first = blockIdx.z * rows_per_part;
    const int end = n_rows - first < rows_per_part ? n_rows : first + rows_per_part;

    Gradient product;
    ColumnSums<Math, Gradient::BTile::STRIDE> bias = {blockIdx.x == 0, 0};
    product.multiply(a_prev, delta, n_in, n_out, n_rows, first, end, row0, column0, shared, bias);

    if (bias.wanted) {  // the same for the whole block
        const T all = bias.total(reinterpret_cast<T*>(shared));
        const int column = column0 + threadIdx.x;
        if (threadIdx.x < Math::N && column < n_out) db[static_cast<long long>(blockIdx.z) * n_out + column] = all;
    }
    T* part = dW + static_cast<long long>(blockIdx.z) * n_in * n_out;
    const bool fits = quads_fit(part, n_out);
    product.for_each_quad(n_in, n_out, row0, column0, shared, [&](int row, int column, T(&values)[4], int n) {
        store_quad(part + static_cast<long long>(row) * n_out + column, n, fits, values);
    });
}

// db alone, where cuBLAS makes dW. Grid: (128 columns each, parts of the batch).
template <class Input>
__global__ void __launch_bounds__(PASS_THREADS)
    bias_gradients(const Input* __restrict__ delta,                          // (n_rows, n_out)
                   Compute<Input>* __restrict__ db,                          // (parts, n_out)
                   int n_rows, int n_out, int rows_per_part) {
    const int column = blockIdx.x * PASS_THREADS + threadIdx.x, first = blockIdx.y * rows_per_part;
    const int end = n_rows - first < rows_per_part ? n_rows : first + rows_per_part;
    if (column >= n_out) return;
    Compute<Input> sum = 0;
    for (int row = first; row < end; ++row) sum += widen(delta[static_cast<long long>(row) * n_out + column]);
    db[static_cast<long long>(blockIdx.y) * n_out + column] = sum;
}
