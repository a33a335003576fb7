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
        return sin(z);
    }
    template <class T>
    static __device__ __forceinline__ T derivative(T z) {
        return cos(z);
    }
};

// Of the output layer alone.
struct Exp {
    template <class T>
    static __device__ __forceinline__ T forward(T z) {
        return exp(z);
    }
};
