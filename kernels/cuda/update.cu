// update: parameters <- optimizer(parameters, gradients, state), the whole flat vector in one pass.
//
// A gradient comes as the parts that `dense_gradients` made of it, or whole, in one. The vector's stretches, the W or the b of
// one layer, each have parts of their own number; a table tells them. Blocks are dealt to stretches, BLOCK_PARAMETERS to a
// block.
#include "gradients.cuh"
#include "reductions.cuh"

constexpr int UPDATE_THREADS = 128;
constexpr int BLOCK_PARAMETERS = 4 * UPDATE_THREADS;

// A row of the table. `parts` lie one after the other from parts_begin on, each of `count` numbers.
struct Stretch {
    long long begin, count, parts_begin, n_parts, first_block, is_weights;
};

__device__ __forceinline__ Stretch stretch_of_block(const Stretch* table, int n_stretches) {
    int i = n_stretches - 1;
    while (table[i].first_block > blockIdx.x) --i;
    return table[i];
}

// Where the four neighbours of a thread begin in its stretch, and how many of them there are: at most 0 where none are.
struct Place {
    long long at;
    int n;

    __device__ __forceinline__ explicit Place(const Stretch& stretch) {
        at = (blockIdx.x - stretch.first_block) * BLOCK_PARAMETERS + 4 * threadIdx.x;
        const long long left = stretch.count - at;
        n = left < 4 ? static_cast<int>(left) : 4;
    }
};

// v <- momentum v - rate g, then w <- w + v, or with Nesterov's momentum w <- w + momentum v - rate g.
template <bool NESTEROV>
struct Sgd {
    template <class T>
    static __device__ __forceinline__ void step(T& w, T g, T& v, T&, const StepNumbers& now, double momentum, double, double,
                                                bool) {
        v = T(momentum) * v - T(now.learning_rate) * g;
        w += NESTEROV ? T(momentum) * v - T(now.learning_rate) * g : v;
    }
};

// m <- beta_1 m + (1 - beta_1) g, v <- beta_2 v + (1 - beta_2) g^2, w <- w - rate m^ / (sqrt v^ + epsilon); before that,
// AdamW's decay of the weights: W <- W (1 - rate decay).
struct Adam {
    template <class T>
    static __device__ __forceinline__ void step(T& w, T g, T& m, T& v, const StepNumbers& now, double beta_1, double beta_2,
                                                double decay, bool is_weight) {
        if (is_weight) w *= T(1 - now.learning_rate * decay);
        m = T(beta_1) * m + T(1 - beta_1) * g;
        v = T(beta_2) * v + T(1 - beta_2) * g * g;
        w -= T(now.learning_rate) * (m * T(now.correction_1)) / (sqrt(v * T(now.correction_2)) + T(now.epsilon));
    }
};

// v <- decay v + (1 - decay) g^2, w <- w - rate g / (sqrt v + epsilon).
struct RMSprop {
    template <class T>
    static __device__ __forceinline__ void step(T& w, T g, T& v, T&, const StepNumbers& now, double decay, double, double,
                                                bool) {
        v = T(decay) * v + T(1 - decay) * g * g;
        w -= T(now.learning_rate) * g / (sqrt(v) + T(now.epsilon));
    }
};

// Overwrites parameters and slots, and the narrow copy of the parameters where Copy is another kind of number. The last
// block adds the penalty of the weights as they were, alpha/2 sum W^2, to the step's loss, adapts the loss scale, and counts
// the step, which all others have read by then. With a loss scale, a step whose gradients are not finite changes nothing else.
template <class Optimizer, class T, class Copy, bool TWO_SLOTS>
__global__ void __launch_bounds__(UPDATE_THREADS)
    update(T* __restrict__ parameters, T* __restrict__ slot_1, T* __restrict__ slot_2, Copy* __restrict__ copy,
           const T* __restrict__ parts, const Stretch* __restrict__ table, int n_stretches,
           const StepNumbers* __restrict__ numbers,
           const double* __restrict__ squares, int n_squares,  // of gradients that are whole, alpha W included; or null
           double clip_norm, LossScale* __restrict__ loss_scale,
           double setting_1, double setting_2, double setting_3,
           unsigned* __restrict__ counters,                 // steps of this run, updates of the network
           double* __restrict__ losses,
           double* __restrict__ of_block, unsigned* __restrict__ ticket) {
    const unsigned step = counters[0];
    const StepNumbers now = numbers[step];
    const Stretch stretch = stretch_of_block(table, n_stretches);
    const Place place(stretch);
    __shared__ Clipping clipping;
    if (squares) {
        if (threadIdx.x == 0) clipping = clipping_of(squares, n_squares, clip_norm);
        __syncthreads();
    }
    const bool left_out = loss_scale && !clipping.finite;
    const T alpha = T(squares ? 0.0 : now.alpha), scale = T(squares ? clipping.scale : 1.0);
    double of_weights = 0;
    if (place.n > 0 && !left_out) {
        const long long i = stretch.begin + place.at;
        const bool fits = place.n == 4 && quads_fit(parameters + i, 4) && quads_fit(slot_1 + i, 4) &&
                          (!TWO_SLOTS || quads_fit(slot_2 + i, 4));
        T w[4], g[4], s1[4], s2[4] = {};
        load_quad(parameters + i, place.n, fits, w);
        load_quad(slot_1 + i, place.n, fits, s1);
        if (TWO_SLOTS) load_quad(slot_2 + i, place.n, fits, s2);
        sum_of_parts(parts + stretch.parts_begin + place.at, stretch.count, stretch.n_parts, place.n, g);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (stretch.is_weights) {
                of_weights += static_cast<double>(w[j]) * w[j];
                if (alpha != 0) g[j] += alpha * w[j];
            }
            Optimizer::step(w[j], g[j] * scale, s1[j], s2[j], now, setting_1, setting_2, setting_3, stretch.is_weights);
        }
        store_quad(parameters + i, place.n, fits, w);
        store_quad(slot_1 + i, place.n, fits, s1);
        if (TWO_SLOTS) store_quad(slot_2 + i, place.n, fits, s2);
        if (copy) store_quad(copy + i, place.n, place.n == 4 && quads_fit(copy + i, 4), w);
    }
    double all;
    if (grid_sum<UPDATE_THREADS>(of_weights, of_block, ticket, all)) {
        if (now.alpha != 0) losses[step] += 0.5 * now.alpha * all;
        if (loss_scale) loss_scale->adapt(clipping.finite);
        counters[0] = step + 1;
        ++counters[1];
    }
}

// Sum of x^2, in float64. Grid: one block, or as many as of_block has places for.
template <class T>
__global__ void __launch_bounds__(UPDATE_THREADS)
    sum_squares(const T* __restrict__ x, long long n, double* __restrict__ result, double* __restrict__ of_block,
                unsigned* __restrict__ ticket) {
    double sum = 0;
    for (long long i = static_cast<long long>(blockIdx.x) * UPDATE_THREADS + threadIdx.x; i < n;
         i += static_cast<long long>(gridDim.x) * UPDATE_THREADS) {
        sum += static_cast<double>(x[i]) * x[i];
    }
    double all;
    if (grid_sum<UPDATE_THREADS>(sum, of_block, ticket, all)) *result = all;
}
