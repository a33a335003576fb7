// Gradients in parts, as the blocks of `dense_gradients` sum them: how parts become whole; and what a step may do only when
// it has seen all gradients, to clip them, or to leave out a step that overflowed.
#pragma once

#include "numbers.cuh"

// What changes from step to step, computed by the host in float64.
struct StepNumbers {
    double learning_rate, alpha, correction_1, correction_2, epsilon;
};

// float16 has too small a range for most delta, so output_delta multiplies them by a scale, and the gradients are divided by
// it. Where one overflowed, the step is left out and the scale halved; after so many steps without, it is doubled.
constexpr double STEPS_UNTIL_DOUBLED = 2000;

struct LossScale {
    double scale, steps_since;

    __device__ __forceinline__ void adapt(bool finite) {
        steps_since = finite ? steps_since + 1 : 0;
        if (!finite) scale /= 2;
        if (steps_since == STEPS_UNTIL_DOUBLED) {
            scale *= 2;
            steps_since = 0;
        }
    }
};

// What all gradients together say of a step; stored in one access.
struct alignas(16) Clipping {
    double scale;  // that brings their norm down to clip_norm; NaN where it is not finite
    bool finite;
};

// squares: (n), of which the sum is the norm's square.
__device__ __forceinline__ Clipping clipping_of(const double* squares, int n, double clip_norm) {
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += squares[i];
    const double norm = sqrt(sum);
    const bool finite = norm - norm == 0;
    return {norm <= clip_norm ? 1.0 : finite ? clip_norm / norm : norm - norm, finite};
}

// Four neighbours of each part, added in the order of the parts, which lie `stride` numbers apart.
template <class T>
__device__ __forceinline__ void sum_of_parts(const T* parts, long long stride, long long n_parts, int n, T (&g)[4]) {
    const bool fits = n == 4 && quads_fit(parts, 4) && stride % 4 == 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) g[j] = 0;
    for (long long i = 0; i < n_parts; ++i) {
        T values[4];
        load_quad(parts + i * stride, n, fits, values);
#pragma unroll
        for (int j = 0; j < 4; ++j) g[j] += values[j];
    }
}

// The whole gradients of a layer: (accumulate: what was there +) the sum of their parts / loss scale (+ alpha W).
template <class T>
struct WholeGradients {
    const T* dW;        // (n_parts, n_in, n_out)
    const T* db;        // (n_parts, n_out)
    const T* W;         // (n_in, n_out), or null where there is no penalty
    T* gradient_W;      // (n_in, n_out)
    T* gradient_b;      // (n_out)
    int n_in, n_out, n_parts;
    T alpha, unscale;
    bool accumulate;

    // Four neighbours of a row of W, or of b; the sum of their squares.
    __device__ __forceinline__ double add_weights(int row, int column) const {
        const long long at = static_cast<long long>(row) * n_out + column;
        return add(dW + at, static_cast<long long>(n_in) * n_out, column, W ? W + at : nullptr, gradient_W + at);
    }
    __device__ __forceinline__ double add_biases(int column) const {
        return add(db + column, n_out, column, nullptr, gradient_b + column);
    }

   private:
    __device__ __forceinline__ double add(const T* parts, long long stride, int column, const T* w, T* gradient) const {
        const int n = n_out - column < 4 ? n_out - column : 4;
        const bool fits = n == 4 && quads_fit(gradient, 4);
        T g[4], before[4] = {}, of_w[4] = {};
        sum_of_parts(parts, stride, n_parts, n, g);
        if (accumulate) load_quad(gradient, n, fits, before);
        if (w) load_quad(w, n, n == 4 && quads_fit(w, 4), of_w);
        double squares = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            g[j] = before[j] + g[j] * unscale + alpha * of_w[j];
            squares += static_cast<double>(g[j]) * g[j];
        }
        store_quad(gradient, n, fits, g);
        return squares;
    }
};
