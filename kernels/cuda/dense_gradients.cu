// dense_gradients: dW = a_prev^T delta, db = sum of delta over the rows; each block over rows of its own.
//
// Grid: (tiles of n_in, tiles of n_out, parts of the batch). Part p sums over rows [p rows_per_part, ...) and overwrites
// dW[p] and db[p]. `update` adds the parts in their order; or where whole gradients are wanted before that, the last of the
// blocks of a tile does, whichever that is. db comes from the tiles of delta that the blocks of the first tile of n_in have
// in shared memory anyway.
#include "gradients.cuh"
#include "reductions.cuh"
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

// Of a kernel's arguments.
template <class T>
__device__ __forceinline__ WholeGradients<T> whole_gradients_of(
    const T* dW, const T* db, const T* W, T* gradient_W, T* gradient_b, int n_in, int n_out, int n_parts, double alpha,
    int accumulate, const StepNumbers* numbers, const unsigned* steps_done, const LossScale* loss_scale) {
    if (numbers) alpha = numbers[*steps_done].alpha;
    const T* penalised = alpha != 0 ? W : nullptr;  // 0 times an infinite weight would be NaN
    const T unscale = T(loss_scale ? 1 / loss_scale->scale : 1.0);
    return {dW, db, penalised, gradient_W, gradient_b, n_in, n_out, n_parts, T(alpha), unscale, accumulate != 0};
}

template <class Math, int A_BYTES, int DELTA_BYTES>
__global__ void __launch_bounds__(Math::THREADS)
    dense_gradients(const typename Math::Input* __restrict__ a_prev,         // (n_rows, n_in)
                    const typename Math::Input* __restrict__ delta,          // (n_rows, n_out)
                    Compute<typename Math::Input>* __restrict__ dW,          // (parts, n_in, n_out)
                    Compute<typename Math::Input>* __restrict__ db,          // (parts, n_out)
                    int n_rows, int n_in, int n_out, int rows_per_part,
                    const Compute<typename Math::Input>* __restrict__ W,     // (n_in, n_out), or null: no penalty
                    Compute<typename Math::Input>* __restrict__ gradient_W,  // (n_in, n_out), or null: parts will do
                    Compute<typename Math::Input>* __restrict__ gradient_b,  // (n_out), or null
                    double alpha, int accumulate,
                    const StepNumbers* __restrict__ numbers,                 // whose alpha counts, or null
                    const unsigned* __restrict__ steps_done, const LossScale* __restrict__ loss_scale,
                    double* __restrict__ squares,                            // the sum of all gradients' squares, or null
                    double* __restrict__ of_tile, unsigned* __restrict__ tickets) {  // (tiles), (1 + tiles)
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
    if (!gradient_W) return;

    const unsigned tile = blockIdx.y * gridDim.x + blockIdx.x, n_tiles = gridDim.x * gridDim.y;
    if (!is_last_block(tickets + 1 + tile, gridDim.z)) return;
    const auto whole = whole_gradients_of<T>(dW, db, W, gradient_W, gradient_b, n_in, n_out, gridDim.z, alpha, accumulate,
                                             numbers, steps_done, loss_scale);
    double sum = 0;
    constexpr int QUADS = Math::N / 4;
    for (int i = threadIdx.x; i < Math::M * QUADS; i += Math::THREADS) {
        const int row = row0 + i / QUADS, column = column0 + i % QUADS * 4;
        if (row < n_in && column < n_out) sum += whole.add_weights(row, column);
    }
    if (bias.wanted) {
        const int column = column0 + 4 * threadIdx.x;
        if (threadIdx.x < QUADS && column < n_out) sum += whole.add_biases(column);
    }
    double all;
    if (squares && blocks_sum<Math::THREADS>(sum, tile, n_tiles, of_tile, tickets, all)) *squares = all;
}

// Whole gradients alone, where cuBLAS makes the parts of dW. Grid: enough blocks for four numbers a thread of W and of b.
template <class T>
__global__ void __launch_bounds__(PASS_THREADS)
    whole_gradients(const T* __restrict__ dW, const T* __restrict__ db, int n_parts, int n_in, int n_out,
                    const T* __restrict__ W, T* __restrict__ gradient_W, T* __restrict__ gradient_b, double alpha,
                    int accumulate, const StepNumbers* __restrict__ numbers, const unsigned* __restrict__ steps_done,
                    const LossScale* __restrict__ loss_scale, double* __restrict__ squares,
                    double* __restrict__ of_block, unsigned* __restrict__ ticket) {
    const auto whole = whole_gradients_of<T>(dW, db, W, gradient_W, gradient_b, n_in, n_out, n_parts, alpha, accumulate,
                                             numbers, steps_done, loss_scale);
    const int quads = (n_out + 3) / 4;
    const long long i = static_cast<long long>(blockIdx.x) * PASS_THREADS + threadIdx.x, row = i / quads;
    const int column = static_cast<int>(i % quads) * 4;
    double sum = 0;
    if (row < n_in) sum = whole.add_weights(static_cast<int>(row), column);
    if (row == n_in) sum = whole.add_biases(column);
    double all;
    if (squares && grid_sum<PASS_THREADS>(sum, of_block, ticket, all)) *squares = all;
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
