// output_forward: a = sigma(z) at the output layer, where sigma may also be softmax over each row.
#include "activations.cuh"
#include "numbers.cuh"
#include "reductions.cuh"
#include "softmax.cuh"

constexpr int OUTPUT_THREADS = 128;

// Grid: enough blocks for four numbers a thread.
template <class Sigma, class T>
__global__ void __launch_bounds__(OUTPUT_THREADS)
    output_forward(const T* __restrict__ z, T* __restrict__ a, long long n) {
    const long long i = 4 * (static_cast<long long>(blockIdx.x) * OUTPUT_THREADS + threadIdx.x);
    if (i >= n) return;
    const bool fits = quads_fit(z, 4) && quads_fit(a, 4) && i + 4 <= n;
    const int left = n - i < 4 ? static_cast<int>(n - i) : 4;
    T values[4];
    load_quad(z + i, left, fits, values);
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] = Sigma::forward(values[j]);
    store_quad(a + i, left, fits, values);
}

// Grid: enough blocks for LANES threads a row.
template <class T, int LANES>
__global__ void __launch_bounds__(OUTPUT_THREADS)
    output_softmax(const T* __restrict__ z,  // (n_rows, n_out)
                   T* __restrict__ a,        // (n_rows, n_out)
                   int n_rows, int n_out) {
    const long long thread = static_cast<long long>(blockIdx.x) * OUTPUT_THREADS + threadIdx.x;
    const int lane = threadIdx.x % LANES;
    const bool exists = thread / LANES < n_rows;
    const long long at = (exists ? thread / LANES : n_rows - 1) * n_out;  // every lane takes part in the sums
    const Softmax<T, LANES> softmax(z + at, n_out, lane);
    if (!exists) return;
    for (int k = lane; k < n_out; k += LANES) a[at + k] = softmax.probability(z[at + k]);
}
