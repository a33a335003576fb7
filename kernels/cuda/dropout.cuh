// Dropout masks by Philox4x32-10 (Salmon et al., 2011): a function of seed, layer, step and place, so nothing is stored.
#pragma once

// Four words for one counter.
struct Philox {
    unsigned word[4];

    __device__ __forceinline__ Philox(unsigned c0, unsigned c1, unsigned c2, unsigned c3, unsigned long long key)
        : word{c0, c1, c2, c3} {
        unsigned k0 = static_cast<unsigned>(key), k1 = static_cast<unsigned>(key >> 32);
#pragma unroll
        for (int round = 0; round < 10; ++round) {
            const unsigned high0 = __umulhi(0xD2511F53u, word[0]), low0 = 0xD2511F53u * word[0];
            const unsigned high1 = __umulhi(0xCD9E8D57u, word[2]), low1 = 0xCD9E8D57u * word[2];
            word[0] = high1 ^ word[1] ^ k0;
            word[1] = low1;
            word[2] = high0 ^ word[3] ^ k1;
            word[3] = low0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
    }
};

// No neuron is left out.
struct NoDropout {
    template <class T>
    __device__ __forceinline__ void apply(int row, int column, T (&values)[4]) const {}
    template <class T>
    __device__ __forceinline__ T before(T a) const {
        return a;
    }
};

// Neuron `column` of row `row` is kept if word column % 4 of Philox(column / 4, row, layer, step) is at least `threshold`
// = floor(rate 2^32). One that is kept is multiplied by `scale` = 1 / (1 - rate), one that is left out is 0, whatever it was.
struct PhiloxDropout {
    unsigned threshold;
    double keep;  // 1 - rate
    double scale;
    unsigned long long seed;
    unsigned layer;
    unsigned step;

    // On the four columns from `column`, a multiple of 4, on.
    template <class T>
    __device__ __forceinline__ void apply(int row, int column, T (&values)[4]) const {
        const Philox random(column / 4, row, layer, step, seed);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] = random.word[j] >= threshold ? values[j] * T(scale) : T(0);
    }

    // The activation as it was before dropout: sigma' is computed from it.
    template <class T>
    __device__ __forceinline__ T before(T a) const {
        return a * T(keep);
    }
};

// Which of the two a kernel takes, from the arguments that it has in either case.
template <bool DROPOUT>
struct DropoutOf {
    typedef NoDropout type;
    static __device__ __forceinline__ NoDropout from(unsigned, double, double, unsigned long long, unsigned, unsigned,
                                                     const unsigned*) {
        return {};
    }
};
template <>
struct DropoutOf<true> {
    typedef PhiloxDropout type;
    // `steps_done`, where there is one, counts the steps of a run on the device: a captured graph's arguments never change.
    static __device__ __forceinline__ PhiloxDropout from(unsigned threshold, double keep, double scale,
                                                         unsigned long long seed, unsigned layer, unsigned step,
                                                         const unsigned* steps_done) {
        return {threshold, keep, scale, seed, layer, step + (steps_done ? *steps_done : 0u)};
    }
};
