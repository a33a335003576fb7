// softmax over a row, and its logarithm, shared by LANES lanes.
#pragma once

#include "reductions.cuh"

template <class T>
struct Limits;
template <>
struct Limits<float> {
    static constexpr float QUARTER_OF_LARGEST = 3.40282346638528859812e38f / 4;
};
template <>
struct Limits<double> {
    static constexpr double QUARTER_OF_LARGEST = 1.7976931348623157e308 / 4;
};

// Infinities as the largest numbers whose differences are still finite; NaN stays.
template <class T>
__device__ __forceinline__ T without_infinities(T z) {
    constexpr T LARGEST = Limits<T>::QUARTER_OF_LARGEST;
    return z < -LARGEST ? -LARGEST : z > LARGEST ? LARGEST : z;
}

// Both from z less the largest entry of its row, whose exp cannot overflow. An entry of +infinity takes all the
// probability, several share it; one of -infinity gets none, and a large finite cost.
template <class T, int LANES>
struct Softmax {
    T largest, total;

    // z: (n), a row; the same for all of its lanes.
    __device__ __forceinline__ Softmax(const T* z, int n, int lane) {
        T mine = z[lane < n ? lane : 0];
        for (int k = lane + LANES; k < n; k += LANES) mine = mine < z[k] ? z[k] : mine;
        largest = lanes_max<LANES>(mine);
        T sum = 0;
        for (int k = lane; k < n; k += LANES) sum += exp(shifted(z[k]));
        total = lanes_sum<LANES>(sum);
    }

    __device__ __forceinline__ T shifted(T z) const {
        const T least = -Limits<T>::QUARTER_OF_LARGEST, d = z - largest;
        return z == largest ? T(0) : d < least ? least : d;
    }
    __device__ __forceinline__ T probability(T z) const { return exp(shifted(z)) / total; }
    __device__ __forceinline__ T log_probability(T z) const { return shifted(z) - log(total); }
};
