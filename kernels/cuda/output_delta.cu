// output_delta: C and delta = dC/dz at the output layer, from z and the target, in one pass over z.
//
// Grid: enough blocks for LANES threads a row. Overwrites delta, and writes C, summed in float64 in a fixed order, to
// losses[steps done]. 1/N enters here: `share` is each row's part in the mean. A row of share 0 is absent, also where its
// cost is infinite.
#include "activations.cuh"
#include "numbers.cuh"
#include "reductions.cuh"
#include "softmax.cuh"

constexpr int DELTA_THREADS = 128;

// The target of a row: a label, or a number for every output.
template <class T>
struct Target {
    int label;
    const T* values;
};

// A loss gives dc/dz of each entry of a row and adds its part of the row's cost c. `setting` is the loss's own number.

// c = -sum t log softmax(z), dc/dz = softmax(z) - t, with t smoothed: (1 - setting) t + setting / n.
struct CrossEntropy {
    template <class Sigma, int LANES, class T, class Write>
    static __device__ __forceinline__ double row(const T* z, Target<T> target, int n, int lane, double setting, Write write) {
        const Softmax<T, LANES> softmax(z, n, lane);
        double cost = 0;
        for (int k = lane; k < n; k += LANES) {
            T t = target.values ? target.values[k] : T(k == target.label);
            t = T(1 - setting) * t + T(setting / n);
            cost -= t * softmax.log_probability(z[k]);
            write(k, softmax.probability(z[k]) - t);
        }
        return cost;
    }
};

// The losses of each output by itself.
template <class Loss>
struct Elementwise {
    template <class Sigma, int LANES, class T, class Write>
    static __device__ __forceinline__ double row(const T* z, Target<T> target, int n, int lane, double setting, Write write) {
        double cost = 0;
        for (int k = lane; k < n; k += LANES) {
            T slope;
            cost += Loss::template entry<Sigma>(z[k], target.values[k], T(setting), slope);
            write(k, slope);
        }
        return cost;
    }
};

// c = sum log(1 + exp(z)) - y z, dc/dz = sigmoid(z) - y; in this order a confident right answer keeps its small cost.
struct BinaryCrossEntropyEntry {
    template <class Sigma, class T>
    static __device__ __forceinline__ T entry(T z, T y, T setting, T& slope) {
        const T bounded = without_infinities(z);
        slope = sigmoid(z) - y;
        return (bounded < 0 ? T(0) : bounded) - y * bounded + log1p(exp(-fabs(bounded)));
    }
};

// c = sum exp(z) - y z + y log y - y, dc/dz = exp(z) - y. With d = z - log y, a term is y (exp(d) - 1 - d): near a = y,
// that has no large numbers to cancel.
struct PoissonEntry {
    template <class Sigma, class T>
    static __device__ __forceinline__ T entry(T z, T y, T setting, T& slope) {
        const T a = exp(z), d = without_infinities(z) - log(y == 0 ? T(1) : y);
        slope = a - y;
        return y == 0 ? a : y * (expm1(d) - d);
    }
};

// Of the error e = a - y under any sigma: dc/dz = dc/da * sigma'(z).
template <class Error>
struct OfError {
    template <class Sigma, class T>
    static __device__ __forceinline__ T entry(T z, T y, T setting, T& slope) {
        const T a = Sigma::forward(z), e = a - y;
        slope = Error::derivative(e, setting) * Sigma::derivative(Sigma::FROM_Z ? z : a);
        return Error::cost(e, setting);
    }
};

struct Squared {
    template <class T>
    static __device__ __forceinline__ T cost(T e, T) {
        return T(0.5) * e * e;
    }
    template <class T>
    static __device__ __forceinline__ T derivative(T e, T) {
        return e;
    }
};

struct Absolute {
    template <class T>
    static __device__ __forceinline__ T cost(T e, T) {
        return fabs(e);
    }
    template <class T>
    static __device__ __forceinline__ T derivative(T e, T) {
        return e > 0 ? T(1) : e < 0 ? T(-1) : e;
    }
};

// Squared up to the threshold, linear beyond.
struct HuberError {
    template <class T>
    static __device__ __forceinline__ T cost(T e, T threshold) {
        const T size = fabs(e), m = size > threshold ? threshold : size;
        return T(0.5) * m * m + threshold * (size - m);
    }
    template <class T>
    static __device__ __forceinline__ T derivative(T e, T threshold) {
        return e < -threshold ? -threshold : e > threshold ? threshold : e;
    }
};

typedef Elementwise<BinaryCrossEntropyEntry> BinaryCrossEntropy;
typedef Elementwise<PoissonEntry> Poisson;
typedef Elementwise<OfError<Squared>> SquaredError;
typedef Elementwise<OfError<Absolute>> AbsoluteError;
typedef Elementwise<OfError<HuberError>> Huber;

template <class Loss, class Sigma, class T, class Output, int LANES>
__global__ void __launch_bounds__(DELTA_THREADS)
    output_delta(const T* __restrict__ z,                       // (n_rows, n_out)
                 const int* __restrict__ labels,                // of all data, or null
                 const T* __restrict__ values,                  // (..., n_out) of all data, where there are no labels
                 const long long* __restrict__ order,           // which rows of the data, or null: the first ones
                 const double* __restrict__ share,              // by place in the order, or null: 1 / n_rows
                 const unsigned* __restrict__ steps_done,       // or null: none
                 const double* __restrict__ delta_scale,        // multiplies delta, or null
                 Output* __restrict__ delta,                    // (n_rows, n_out)
                 double* __restrict__ losses,
                 double* __restrict__ of_block, unsigned* __restrict__ ticket,
                 int batch_size, int n_rows, int n_out, double setting) {
    const long long thread = static_cast<long long>(blockIdx.x) * DELTA_THREADS + threadIdx.x;
    const int lane = threadIdx.x % LANES;
    const bool exists = thread / LANES < n_rows;
    const int row = exists ? static_cast<int>(thread / LANES) : n_rows - 1;  // every lane takes part in the sums of a row
    const unsigned step = steps_done ? *steps_done : 0u;
    const long long place = static_cast<long long>(step) * batch_size + row;
    const long long index = order ? order[place] : row;
    const double part = share ? share[place] : 1.0 / n_rows;
    const T factor = T(part * (delta_scale ? *delta_scale : 1.0));
    const Target<T> target = {labels ? labels[index] : 0, labels ? nullptr : values + index * n_out};
    Output* const delta_row = delta + static_cast<long long>(row) * n_out;

    double cost = Loss::template row<Sigma, LANES>(z + static_cast<long long>(row) * n_out, target, n_out, lane, setting,
                                                   [&](int k, T slope) {
                                                       if (!exists) return;
                                                       delta_row[k] = Narrow<Output>::from(part != 0 ? slope * factor : T(0));
                                                   });
    cost = exists && part != 0 ? part * cost : 0.0;
    double C;
    if (grid_sum<DELTA_THREADS>(cost, of_block, ticket, C)) losses[step] = C;
}

// The part of each row in a mean with weights: w / sum of w, or 0 where that sum is 0. Grid: one block.
template <class T>
__global__ void __launch_bounds__(DELTA_THREADS)
    shares(const T* __restrict__ weight, double* __restrict__ share, int n_rows) {
    __shared__ double total;
    double sum = 0;
    for (int row = threadIdx.x; row < n_rows; row += DELTA_THREADS) sum += weight[row];
    sum = block_sum<DELTA_THREADS>(sum);
    if (threadIdx.x == 0) total = sum;
    __syncthreads();
    for (int row = threadIdx.x; row < n_rows; row += DELTA_THREADS) share[row] = total != 0 ? weight[row] / total : 0.0;
}
