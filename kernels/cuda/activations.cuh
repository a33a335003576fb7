// sigma and sigma' of every activation, by the formulas of backprop_gpu/backends/numpy.py and in its order.
//
// An activation is one struct, LeakyRelu for leaky_relu: `forward` takes z; `derivative` takes what the backward pass
// keeps, which is z where FROM_Z, else a. NaN in, NaN out: a NaN falls through every comparison to the formula.
#pragma once

// 1 / (1 + e^-z), from e^-|z|, which cannot overflow.
template <class T>
__device__ __forceinline__ T sigmoid(T z) {
    const T e = exp(-fabs(z));
    return (z < 0 ? e : T(1)) / (1 + e);
}

// log(1 + e^z) = max(z, 0) + log(1 + e^-|z|), which cannot overflow.
template <class T>
__device__ __forceinline__ T softplus(T z) {
    return (z < 0 ? T(0) : z) + log1p(exp(-fabs(z)));
}

// The standard normal distribution function.
template <class T>
__device__ __forceinline__ T normal_cdf(T z) {
    return T(0.5) * erfc(z * T(-0.70710678118654752440));
}

template <class T>
__device__ __forceinline__ T normal_pdf(T z) {
    return exp(T(-0.5) * z * z) * T(0.39894228040143267794);
}

// z for the activations z gate(z), where an infinite z would make infinity times 0: every gate is exactly 0 or 1 beyond
// 1000 either way.
template <class T>
__device__ __forceinline__ T gated(T z) {
    return z < -1000 ? T(-1000) : z > 1000 ? T(1000) : z;
}

// 2u with u = sqrt(2 / pi)(z + 0.044715 z^3): (1 + tanh u) / 2 = sigmoid(2u), which keeps its digits on the left.
template <class T>
__device__ __forceinline__ T gelu_tanh_inner(T z) {
    return T(1.5957691216057308) * (z + T(0.044715) * z * z * z);
}

// 1 / pi in two numbers, and below which z they do: beyond, too few digits of z / pi would be left behind its point.
template <class T>
struct OneOverPi;
template <>
struct OneOverPi<float> {
    static constexpr float HIGH = 0.31830987334251404f, LOW = 1.2841276486597053e-08f, ENOUGH = 16777216.0f;
};
template <>
struct OneOverPi<double> {
    static constexpr double HIGH = 0.3183098861837907, LOW = -1.9678676675182486e-17, ENOUGH = 4503599627370496.0;
};

// 64 zero bits, and 1 / pi behind its point: as far as the largest double needs it.
__constant__ unsigned long long BITS_OF_ONE_OVER_PI[19] = {
    0x0000000000000000, 0x517CC1B727220A94, 0xFE13ABE8FA9A6EE0, 0x6DB14ACC9E21C820, 0xFF28B1D5EF5DE2B0,
    0xDB92371D2126E970, 0x0324977504E8C90E, 0x7F0EF58E5894D39F, 0x74411AFA975DA242, 0x74CE38135A2FBF20,
    0x9CC8EB1CC1A99CFA, 0x4E422FC5DEFC941D, 0x8FFC4BFFEF02CC07, 0xF79788C5AD05368F, 0xB69B3F6793E584DB,
    0xA7A31FB34F2FF516, 0xBA93DD63F5F2F8BD, 0x9E839CFBC5294975, 0x35FDAFD88FC6AE84};

// z / pi modulo 2, in [-1, 1], of a large finite z = m 2^e (Payne and Hanek, 1983): m, of 53 bits, times those 128 bits of
// 2^e / (2 pi) that stand behind the point. The bits before would add whole turns, those after less than 2^-74.
__device__ __forceinline__ double half_turns_of_large(double z) {
    const unsigned long long bits = __double_as_longlong(z);
    const unsigned long long m = (bits & 0x000FFFFFFFFFFFFF) | 0x0010000000000000;
    const int first = static_cast<int>(bits >> 52 & 0x7FF) - 1012, shift = first % 64;  // first of those bits: 63 + e
    const unsigned long long* word = BITS_OF_ONE_OVER_PI + first / 64;
    const unsigned long long high = shift ? word[0] << shift | word[1] >> (64 - shift) : word[0];
    const unsigned long long low = shift ? word[1] << shift | word[2] >> (64 - shift) : word[1];
    const double turns = static_cast<long long>(m * high + __umul64hi(m, low)) * 5.42101086242752217e-20;  // 2^-64
    return z < 0 ? -2 * turns : 2 * turns;
}

// z / pi less whole turns, of which sinpi and cospi are sin z and cos z. CUDA's own sin keeps an array in local memory.
template <class T>
__device__ __forceinline__ T half_turns(T z) {
    typedef OneOverPi<T> By;
    if (!(fabs(z) < By::ENOUGH)) return z - z == 0 ? T(half_turns_of_large(z)) : z - z;
    return fma(z, By::LOW, fma(z, By::HIGH, -2 * rint(z * (By::HIGH / 2))));
}

struct Identity {
    static constexpr bool FROM_Z = false;
    template <class T>
    static __device__ __forceinline__ T forward(T z) {
        return z;
    }
    template <class T>
    static __device__ __forceinline__ T derivative(T a) {
        return a == a ? T(1) : a;
    }
};

struct Relu {
    static constexpr bool FROM_Z = false;
    template <class T>
    static __device__ __forceinline__ T forward(T z) {
        return z < 0 ? T(0) : z;
    }
    template <class T>
    static __device__ __forceinline__ T derivative(T a) {
        return a > 0 ? T(1) : a;  // a = 0, or NaN
    }
};

struct LeakyRelu {
    static constexpr bool FROM_Z = false;
    template <class T>
    static __device__ __forceinline__ T forward(T z) {
        return z < 0 ? T(0.01) * z : z;
    }
    template <class T>
    static __device__ __forceinline__ T derivative(T a) {
        return a > 0 ? T(1) : a <= 0 ? T(0.01) : a;
    }
};

struct Elu {
    static constexpr bool FROM_Z = false;
    template <class T>
    static __device__ __forceinline__ T forward(T z) {
        return z > 0 ? z : expm1(z);
    }
    template <class T>
    static __device__ __forceinline__ T derivative(T a) {
        return a > 0 ? T(1) : a + 1;
    }
};

struct Selu {
    static constexpr bool FROM_Z = false;
    static constexpr double SCALE = 1.0507009873554805, SCALE_ALPHA = 1.7580993408473766;
    template <class T>
    static __device__ __forceinline__ T forward(T z) {
        return z > 0 ? T(SCALE) * z : T(SCALE_ALPHA) * expm1(z);
    }
    template <class T>
    static __device__ __forceinline__ T derivative(T a) {
        return a > 0 ? T(SCALE) : a + T(SCALE_ALPHA);
    }
};

struct Sigmoid {
    static constexpr bool FROM_Z = false;
    template <class T>
    static __device__ __forceinline__ T forward(T z) {
        return sigmoid(z);
    }
    template <class T>
    static __device__ __forceinline__ T derivative(T a) {
        return a * (1 - a);
    }
};

struct Tanh {
    static constexpr bool FROM_Z = false;
    template <class T>
    static __device__ __forceinline__ T forward(T z) {
        return tanh(z);
    }
    template <class T>
    static __device__ __forceinline__ T derivative(T a) {
        return (1 - a) * (1 + a);
    }
};

struct Softplus {
    static constexpr bool FROM_Z = true;
    template <class T>
    static __device__ __forceinline__ T forward(T z) {
        return softplus(z);
    }
    template <class T>
    static __device__ __forceinline__ T derivative(T z) {
        return sigmoid(z);
    }
};

struct Silu {
    static constexpr bool FROM_Z = true;
    template <class T>
    static __device__ __forceinline__ T forward(T z) {
        return z > 1000 ? z : gated(z) * sigmoid(z);
    }
    template <class T>
    static __device__ __forceinline__ T derivative(T z) {
        z = gated(z);
        const T s = sigmoid(z);
        return s + z * s * sigmoid(-z);
    }
};

struct Gelu {
    static constexpr bool FROM_Z = true;
    template <class T>
    static __device__ __forceinline__ T forward(T z) {
        return z > 1000 ? z : gated(z) * normal_cdf(z);
    }
    template <class T>
    static __device__ __forceinline__ T derivative(T z) {
        z = gated(z);
        return normal_cdf(z) + z * normal_pdf(z);
    }
};

struct GeluTanh {
    static constexpr bool FROM_Z = true;
    template <class T>
    static __device__ __forceinline__ T forward(T z) {
        return z > 1000 ? z : gated(z) * sigmoid(gelu_tanh_inner(gated(z)));
    }
    template <class T>
    static __device__ __forceinline__ T derivative(T z) {
        z = gated(z);
        const T u2 = gelu_tanh_inner(z), s = sigmoid(u2);
        return s + z * s * sigmoid(-u2) * (T(1.5957691216057308) * (1 + T(3 * 0.044715) * z * z));
    }
};

struct Mish {
    static constexpr bool FROM_Z = true;
    template <class T>
    static __device__ __forceinline__ T forward(T z) {
        return z > 1000 ? z : gated(z) * tanh(softplus(gated(z)));
    }
    template <class T>
    static __device__ __forceinline__ T derivative(T z) {
        z = gated(z);
        const T t = tanh(softplus(z));
        return t + z * (1 - t) * (1 + t) * sigmoid(z);
    }
};

struct Sine {
    static constexpr bool FROM_Z = true;
    template <class T>
    static __device__ __forceinline__ T forward(T z) {
        return sinpi(half_turns(z));
    }
    template <class T>
    static __device__ __forceinline__ T derivative(T z) {
        return cospi(half_turns(z));
    }
};

// Of the output layer alone.
struct Exp {
    template <class T>
    static __device__ __forceinline__ T forward(T z) {
        return exp(z);
    }
};
