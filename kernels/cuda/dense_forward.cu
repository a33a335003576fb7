// dense_forward: a = sigma(z), z = a_prev W + b, with dropout on a.
//
// Grid: (row tiles, column tiles) of (n_rows, n_out). Overwrites a, and z where it is not null.
#include "activations.cuh"
#include "dropout.cuh"
#include "tensor_cores.cuh"

// What follows the product, four neighbours of a row at a time.
template <class Sigma, class T, class Output, class Dropout>
struct Forward {
    const T* b;
    Output* a;
    Output* z;
    int n_out;
    Dropout dropout;
    bool b_fits = quads_fit(b, n_out), a_fits = quads_fit(a, n_out), z_fits = quads_fit(z, n_out);

    __device__ __forceinline__ void operator()(int row, int column, T (&values)[4], int n) const {
        const long long at = static_cast<long long>(row) * n_out + column;
        T bias[4];
        load_quad(b + column, n, b_fits, bias);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] += bias[j];
        if (z) store_quad(z + at, n, z_fits, values);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] = Sigma::forward(values[j]);
        dropout.apply(row, column, values);
        store_quad(a + at, n, a_fits, values);
    }
};

template <class Sigma, class Math, int A_BYTES, int W_BYTES, class Output, bool DROPOUT>
__global__ void __launch_bounds__(Math::THREADS)
    dense_forward(const typename Math::Input* __restrict__ a_prev,           // (n_rows, n_in)
                  const typename Math::Input* __restrict__ W,                // (n_in, n_out)
                  const Compute<typename Math::Input>* __restrict__ b,       // (n_out)
                  Output* __restrict__ a,                                    // (n_rows, n_out)
                  Output* __restrict__ z,                                    // (n_rows, n_out) or null
                  int n_rows, int n_in, int n_out,
                  unsigned threshold, double keep, double scale, unsigned long long seed, unsigned layer, unsigned step,
                  const unsigned* __restrict__ steps_done) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int row0 = blockIdx.x * Math::M, column0 = blockIdx.y * Math::N;
    Product<Math, ALONG_K, ALONG_MN, A_BYTES, W_BYTES> product;
    NoObserver none;
    product.multiply(a_prev, W, n_rows, n_out, n_in, 0, n_in, row0, column0, shared, none);

    const auto dropout = DropoutOf<DROPOUT>::from(threshold, keep, scale, seed, layer, step, steps_done);
    typedef Forward<Sigma, Compute<typename Math::Input>, Output, typename DropoutOf<DROPOUT>::type> Epilogue;
    product.for_each_quad(n_rows, n_out, row0, column0, shared, Epilogue{b, a, z, n_out, dropout});
}

// The same after a product that cuBLAS made. Grid: enough blocks for four numbers a thread.
template <class Sigma, class T, class Output, bool DROPOUT>
__global__ void __launch_bounds__(PASS_THREADS)
    dense_forward_pass(const T* __restrict__ product,                        // (n_rows, n_out)
                       const T* __restrict__ b, Output* __restrict__ a, Output* __restrict__ z, int n_rows, int n_out,
                       unsigned threshold, double keep, double scale, unsigned long long seed, unsigned layer,
                       unsigned step, const unsigned* __restrict__ steps_done) {
    const auto dropout = DropoutOf<DROPOUT>::from(threshold, keep, scale, seed, layer, step, steps_done);
    typedef Forward<Sigma, T, Output, typename DropoutOf<DROPOUT>::type> Epilogue;
    for_each_quad_of(product, n_rows, n_out, Epilogue{b, a, z, n_out, dropout});
}
