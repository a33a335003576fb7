// dense_backward: delta = (delta_next W_next^T) * sigma'(z), with the forward pass's dropout.
//
// Grid: (row tiles, column tiles) of (n_rows, n_out). Overwrites delta.
#include "activations.cuh"
#include "dropout.cuh"
#include "tensor_cores.cuh"

// What follows the product, four neighbours of a row at a time.
template <class Sigma, class T, class Output, class Dropout>
struct Backward {
    const Output* kept;
    Output* delta;
    int n_out;
    Dropout dropout;
    bool kept_fits = quads_fit(kept, n_out), delta_fits = quads_fit(delta, n_out);

    __device__ __forceinline__ void operator()(int row, int column, T (&values)[4], int n) const {
        const long long at = static_cast<long long>(row) * n_out + column;
        T of_sigma[4];
        load_quad(kept + at, n, kept_fits, of_sigma);
        dropout.apply(row, column, values);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            values[j] *= Sigma::derivative(Sigma::FROM_Z ? of_sigma[j] : dropout.before(of_sigma[j]));
        }
        store_quad(delta + at, n, delta_fits, values);
    }
};

template <class Sigma, class Math, int DELTA_BYTES, int W_BYTES, class Output, bool DROPOUT>
__global__ void __launch_bounds__(Math::THREADS)
    dense_backward(const typename Math::Input* __restrict__ delta_next,      // (n_rows, n_next)
                   const typename Math::Input* __restrict__ W_next,          // (n_out, n_next)
                   const Output* __restrict__ kept,                          // (n_rows, n_out): z where FROM_Z, else a
                   Output* __restrict__ delta,                               // (n_rows, n_out)
                   int n_rows, int n_next, int n_out,
                   unsigned threshold, double keep, double scale, unsigned long long seed, unsigned layer, unsigned step,
                   const unsigned* __restrict__ steps_done) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int row0 = blockIdx.x * Math::M, column0 = blockIdx.y * Math::N;
    Product<Math, ALONG_K, ALONG_K, DELTA_BYTES, W_BYTES> product;
    NoObserver none;
    product.multiply(delta_next, W_next, n_rows, n_out, n_next, 0, n_next, row0, column0, shared, none);

    const auto dropout = DropoutOf<DROPOUT>::from(threshold, keep, scale, seed, layer, step, steps_done);
    typedef Backward<Sigma, Compute<typename Math::Input>, Output, typename DropoutOf<DROPOUT>::type> Epilogue;
    product.for_each_quad(n_rows, n_out, row0, column0, shared, Epilogue{kept, delta, n_out, dropout});
}

// The same after a product that cuBLAS made. Grid: enough blocks for four numbers a thread.
template <class Sigma, class T, class Output, bool DROPOUT>
__global__ void __launch_bounds__(PASS_THREADS)
    dense_backward_pass(const T* __restrict__ product,                       // (n_rows, n_out)
                        const Output* __restrict__ kept, Output* __restrict__ delta, int n_rows, int n_out,
                        unsigned threshold, double keep, double scale, unsigned long long seed, unsigned layer,
                        unsigned step, const unsigned* __restrict__ steps_done) {
    const auto dropout = DropoutOf<DROPOUT>::from(threshold, keep, scale, seed, layer, step, steps_done);
    typedef Backward<Sigma, T, Output, typename DropoutOf<DROPOUT>::type> Epilogue;
    for_each_quad_of(product, n_rows, n_out, Epilogue{kept, delta, n_out, dropout});
}
