// gather: the rows of a mini-batch out of the data, by the order of the epoch; and whole arrays from one kind of number
// to another.
//
// Grid: (rows), a block a row. Row `row` of the mini-batch of step s is row order[s batch_size + row] of the data.
#include "numbers.cuh"

constexpr int GATHER_THREADS = 128;

template <class T, class Output>
__global__ void __launch_bounds__(GATHER_THREADS)
    gather(const T* __restrict__ data,                    // (..., columns)
           const long long* __restrict__ order,           // (rows of the epoch)
           const unsigned* __restrict__ steps_done,
           Output* __restrict__ batch,                    // (gridDim.x, columns)
           int batch_size, int columns) {
    const long long from = order[static_cast<long long>(*steps_done) * batch_size + blockIdx.x] * columns;
    const long long to = static_cast<long long>(blockIdx.x) * columns;
    const bool fits = quads_fit(data, columns) && quads_fit(batch, columns);
    for (int column = 4 * threadIdx.x; column < columns; column += 4 * GATHER_THREADS) {
        const int n = columns - column < 4 ? columns - column : 4;
        Compute<T> values[4];
        load_quad(data + from + column, n, fits, values);
        store_quad(batch + to + column, n, fits, values);
    }
}

// Grid: enough blocks for four numbers a thread.
template <class T, class Output>
__global__ void __launch_bounds__(GATHER_THREADS)
    convert(const T* __restrict__ x, Output* __restrict__ y, long long n) {
    const long long i = 4 * (static_cast<long long>(blockIdx.x) * GATHER_THREADS + threadIdx.x);
    if (i >= n) return;
    const bool fits = quads_fit(x, 4) && quads_fit(y, 4) && i + 4 <= n;
    const int left = n - i < 4 ? static_cast<int>(n - i) : 4;
    Compute<T> values[4];
    load_quad(x + i, left, fits, values);
    store_quad(y + i, left, fits, values);
}
