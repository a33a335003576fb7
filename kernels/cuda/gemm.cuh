// One tiled product C = A B behind all operations, in the layouts that they need:
//
//     nn   a_prev W             dense_forward     A contiguous along k, B along n
//     nt   delta_next W_next^T  dense_backward    A along k, B along k
//     tn   a_prev^T delta       dense_gradients   A along m, B along n
//
// A block computes one M x N tile of C. It walks along k, K at a time, in a ring of STAGES pairs of tiles in shared memory
// that asynchronous copies fill ahead. A tile keeps the direction that the matrix has in global memory, so every copy is of
// consecutive bytes, 16 at a time where alignment allows (BYTES), and nothing is transposed on the way. What lies beyond
// the matrices is filled with zeros, which add nothing.
//
// What happens between the tiles and the registers is the `Math`: Simt here, on the ordinary cores; TensorCores in
// tensor_cores.cuh. When the sum is done, C goes through shared memory once more, and from there, four columns at a time,
// to the epilogue of the operation: rows of C are then written in whole lines, dropout takes the four words of one Philox,
// and sums that were divided among slices of the block are added, always in the same order.
#pragma once

#include "numbers.cuh"

// The dimension along which a matrix is contiguous: k, the one that is summed over, or the other one.
enum Along { ALONG_K, ALONG_MN };

// 16 bytes.
template <class T>
struct alignas(16) Chunk {
    static constexpr int SIZE = 16 / sizeof(T);
    T x[SIZE];
};

// A copy of BYTES, or where `bytes` is 0, as many zeros.
template <int BYTES, class T>
__device__ __forceinline__ void copy_async(T* shared, const T* global, int bytes) {
    if constexpr (BYTES == 16) {
        copy_async_16(shared, global, bytes);
    } else if constexpr (BYTES == 8) {
        copy_async_8(shared, global, bytes);
    } else if constexpr (BYTES == 4) {
        copy_async_4(shared, global, bytes);
    } else {
        *shared = bytes ? *global : T();  // 2 bytes: there is no asynchronous copy of so few
    }
}

// One operand's tile in shared memory: MN rows of A or columns of B, and K of k.
template <class T, Along ALONG, int MN, int K, int BYTES, int THREADS>
struct OperandTile {
    static constexpr int ROWS = ALONG == ALONG_K ? MN : K;
    static constexpr int COLUMNS = ALONG == ALONG_K ? K : MN;
    // Padding so that the lanes that read at once meet different banks: 8 rows, 16 bytes each, of a tile along k; 4 rows and
    // 8 columns of one along m or n, for tf32.
    static constexpr int STRIDE = COLUMNS + (ALONG == ALONG_K ? Chunk<T>::SIZE : 8);
    static constexpr int ENTRIES = ROWS * STRIDE;

    // From row0, column0 of a matrix with `stride` columns, what lies before row_end and column_end.
    static __device__ __forceinline__ void copy(T* tile, const T* matrix, int stride, int row0, int row_end, int column0,
                                                int column_end) {
        constexpr int SIZE = BYTES / sizeof(T), COPIES = COLUMNS / SIZE;
        // Copies of 2 bytes go through registers: all at once they would take them all.
        constexpr int AT_ONCE = BYTES == 2 ? 4 : (ROWS * COPIES + THREADS - 1) / THREADS;
#pragma unroll AT_ONCE
        for (int first = 0; first < ROWS * COPIES; first += THREADS) {  // from a constant on: unrolled, without a branch
            const int i = first + threadIdx.x;
            if (first + THREADS > ROWS * COPIES && i >= ROWS * COPIES) break;
            const int row = i / COPIES, column = i % COPIES * SIZE;
            // A copy is of all its bytes or of none: where SIZE > 1, rows are of whole copies.
            const bool exists = row0 + row < row_end && column0 + column < column_end;
            const T* from = matrix + (exists ? static_cast<long long>(row0 + row) * stride + column0 + column : 0);
            copy_async<BYTES>(tile + row * STRIDE + column, from, exists ? BYTES : 0);
        }
    }
};

// Nothing to do with a pair of tiles but multiply them.
struct NoObserver {
    template <class T>
    __device__ __forceinline__ void operator()(const T* b_tile) const {}
};

template <class Math, Along A_ALONG, Along B_ALONG, int A_BYTES, int B_BYTES>
struct Product {
    typedef typename Math::Input Input;
    typedef Compute<Input> Sum;
    typedef OperandTile<Input, A_ALONG, Math::M, Math::K, A_BYTES, Math::THREADS> ATile;
    typedef OperandTile<Input, B_ALONG, Math::N, Math::K, B_BYTES, Math::THREADS> BTile;

    static constexpr int STAGE_BYTES = (ATile::ENTRIES + BTile::ENTRIES) * sizeof(Input);
    // Rows of C pass through shared memory padded by four, in Math::PASSES parts.
    static constexpr int C_STRIDE = Math::N + 4;
    static constexpr int C_ROWS = Math::M / Math::PASSES;
    static constexpr int C_BYTES = Math::SLICES * C_ROWS * C_STRIDE * sizeof(Sum);
    static constexpr int SHARED_BYTES = Math::STAGES * STAGE_BYTES > C_BYTES ? Math::STAGES * STAGE_BYTES : C_BYTES;

    Math math;

    // The sum over k in [k_begin, k_end) for the tile of C at m0, n0; C is m x n, and k is what A and B have in all.
    template <class Observer>
    __device__ __forceinline__ void multiply(const Input* A, const Input* B, int m, int n, int k, int k_begin, int k_end,
                                             int m0, int n0, unsigned char* shared, Observer& observe) {
        const int n_tiles = (k_end - k_begin + Math::K - 1) / Math::K;
#pragma unroll
        for (int tile = 0; tile < Math::STAGES - 1; ++tile) {
            copy(A, B, m, n, k, k_begin + tile * Math::K, k_end, m0, n0, shared, tile);
        }
        math.clear();
        for (int tile = 0; tile < n_tiles; ++tile) {
            // The tile is here, and after the barrier it is for everyone; and everyone is done with the one before, whose
            // place the next copy takes.
            copy_async_wait<Math::STAGES - 2>();
            __syncthreads();
            const int ahead = tile + Math::STAGES - 1;
            copy(A, B, m, n, k, k_begin + ahead * Math::K, k_end, m0, n0, shared, ahead % Math::STAGES);
            const Input* a_tile = a_at(shared, tile % Math::STAGES);
            const Input* b_tile = a_tile + ATile::ENTRIES;
            observe(b_tile);
            math.template accumulate<A_ALONG, B_ALONG, ATile::STRIDE, BTile::STRIDE>(a_tile, b_tile);
        }
        __syncthreads();  // all copies have come, as the last turns waited for them: what is left are empty groups
    }

    // epilogue(row, column, values[4], n): four neighbours of a row, of which the first n are in C.
    template <class Epilogue>
    __device__ __forceinline__ void for_each_quad(int m, int n, int m0, int n0, unsigned char* shared, Epilogue epilogue) {
        Sum* c = reinterpret_cast<Sum*>(shared);
#pragma unroll
        for (int pass = 0; pass < Math::PASSES; ++pass) {
            if (pass) __syncthreads();
            math.template unload<A_ALONG, B_ALONG, C_ROWS, C_STRIDE>(c, pass);
            __syncthreads();
            constexpr int QUADS = Math::N / 4;
            for (int i = threadIdx.x; i < C_ROWS * QUADS; i += Math::THREADS) {
                const int c_row = i / QUADS, c_column = i % QUADS * 4;
                const int row = m0 + pass * C_ROWS + c_row, column = n0 + c_column;
                if (row >= m || column >= n) continue;
                Sum values[4] = {};
#pragma unroll
                for (int slice = 0; slice < Math::SLICES; ++slice) {
                    const Quad<Sum> quad =
                        *reinterpret_cast<const Quad<Sum>*>(c + (slice * C_ROWS + c_row) * C_STRIDE + c_column);
#pragma unroll
                    for (int j = 0; j < 4; ++j) values[j] += quad.x[j];
                }
                epilogue(row, column, values, n - column < 4 ? n - column : 4);
            }
        }
    }

   private:
    static __device__ __forceinline__ Input* a_at(unsigned char* shared, int stage) {
        return reinterpret_cast<Input*>(shared + stage * STAGE_BYTES);
    }

    // Both tiles at k0, as one group of copies; empty where there are no more.
    static __device__ __forceinline__ void copy(const Input* A, const Input* B, int m, int n, int k, int k0, int k_end,
                                                int m0, int n0, unsigned char* shared, int stage) {
        Input* a_tile = a_at(shared, stage);
        Input* b_tile = a_tile + ATile::ENTRIES;
        if (k0 < k_end) {
            if constexpr (A_ALONG == ALONG_K) {
                ATile::copy(a_tile, A, k, m0, m, k0, k_end);
            } else {
                ATile::copy(a_tile, A, m, k0, k_end, m0, m);
            }
            if constexpr (B_ALONG == ALONG_K) {
                BTile::copy(b_tile, B, k, n0, n, k0, k_end);
            } else {
                BTile::copy(b_tile, B, n, k0, k_end, n0, n);
            }
        }
        copy_async_commit();
    }
};

// What one thread multiplies at a time: COUNT rows of A, or columns of B, and as many k as 16 bytes hold. PLACES threads
// share the tile's rows or columns.
template <class T, Along ALONG, int COUNT, int PLACES, int STRIDE>
struct Fragment {
    static constexpr int SIZE = Chunk<T>::SIZE;
    T x[COUNT][SIZE];

    // Which of the tile's rows or columns is number i of the thread at `place`. Along k, neighbouring threads take neighbours;
    // otherwise each takes whole chunks.
    static __device__ __forceinline__ int index(int place, int i) {
        return ALONG == ALONG_K ? place + i * PLACES : (i / SIZE * PLACES + place) * SIZE + i % SIZE;
    }

    __device__ __forceinline__ void load(const T* tile, int place, int k) {
        if constexpr (ALONG == ALONG_K) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(tile + index(place, i) * STRIDE + k);
#pragma unroll
                for (int j = 0; j < SIZE; ++j) x[i][j] = chunk.x[j];
            }
        } else {
#pragma unroll
            for (int j = 0; j < SIZE; ++j) {
#pragma unroll
                for (int i = 0; i < COUNT; i += SIZE) {
                    const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(tile + (k + j) * STRIDE + index(place, i));
#pragma unroll
                    for (int e = 0; e < SIZE; ++e) x[i + e][j] = chunk.x[e];
                }
            }
        }
    }
};

// The product on the ordinary cores, float32 or float64: every thread sums ROWS x COLUMNS entries of C in registers. Where C
// is small, SLICES of the block sum over different k, so that enough threads are at work.
template <class T, int M_, int N_, int K_, int ROWS, int COLUMNS, int SLICES_, int STAGES_>
struct Simt {
    typedef T Input;
    static constexpr int M = M_, N = N_, K = K_, SLICES = SLICES_, STAGES = STAGES_;
    static constexpr int ROW_PLACES = M / ROWS, COLUMN_PLACES = N / COLUMNS;
    static constexpr int THREADS = ROW_PLACES * COLUMN_PLACES * SLICES;
    static constexpr int PASSES = ROWS * COLUMNS > 32 ? 2 : 1;  // the largest tile would not fit next to nothing else
    static constexpr int SIZE = Chunk<T>::SIZE;
    static_assert(K % (SLICES * SIZE) == 0 && ROWS % SIZE == 0 && COLUMNS % SIZE == 0, "whole chunks");

    T sum[ROWS][COLUMNS];

    static __device__ __forceinline__ int column_place() { return threadIdx.x % COLUMN_PLACES; }
    static __device__ __forceinline__ int row_place() { return threadIdx.x / COLUMN_PLACES % ROW_PLACES; }
    static __device__ __forceinline__ int slice() { return threadIdx.x / (COLUMN_PLACES * ROW_PLACES); }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) sum[i][j] = 0;
        }
    }

    template <Along A_ALONG, Along B_ALONG, int A_STRIDE, int B_STRIDE>
    __device__ __forceinline__ void accumulate(const T* a_tile, const T* b_tile) {
        constexpr int K_OF_SLICE = K / SLICES;
#pragma unroll
        for (int k = 0; k < K_OF_SLICE; k += SIZE) {
            Fragment<T, A_ALONG, ROWS, ROW_PLACES, A_STRIDE> a;
            Fragment<T, B_ALONG, COLUMNS, COLUMN_PLACES, B_STRIDE> b;
            a.load(a_tile, row_place(), slice() * K_OF_SLICE + k);
            b.load(b_tile, column_place(), slice() * K_OF_SLICE + k);
#pragma unroll
            for (int step = 0; step < SIZE; ++step) {
#pragma unroll
                for (int i = 0; i < ROWS; ++i) {
#pragma unroll
                    for (int j = 0; j < COLUMNS; ++j) sum[i][j] += a.x[i][step] * b.x[j][step];
                }
            }
        }
    }

    // This thread's part of rows [pass C_ROWS, (pass + 1) C_ROWS) of the tile, to its slice's copy of them.
    template <Along A_ALONG, Along B_ALONG, int C_ROWS, int C_STRIDE>
    __device__ __forceinline__ void unload(T* c, int pass) const {
        typedef Fragment<T, A_ALONG, ROWS, ROW_PLACES, 0> Rows;
        typedef Fragment<T, B_ALONG, COLUMNS, COLUMN_PLACES, 0> Columns;
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            if (i / (ROWS / PASSES) != pass) continue;
            T* row = c + (slice() * C_ROWS + Rows::index(row_place(), i) - pass * C_ROWS) * C_STRIDE;
#pragma unroll
            for (int j = 0; j < COLUMNS; j += SIZE) {
                if constexpr (B_ALONG == ALONG_K) {
#pragma unroll
                    for (int e = 0; e < SIZE; ++e) row[Columns::index(column_place(), j + e)] = sum[i][j + e];
                } else {
                    Chunk<T> chunk;
#pragma unroll
                    for (int e = 0; e < SIZE; ++e) chunk.x[e] = sum[i][j + e];
                    *reinterpret_cast<Chunk<T>*>(row + Columns::index(column_place(), j)) = chunk;
                }
            }
        }
    }
};

// An epilogue alone, on a product that is there already: n_rows x n_out, four neighbours of a row to a thread.
constexpr int PASS_THREADS = 128;

template <class T, class Epilogue>
__device__ __forceinline__ void for_each_quad_of(const T* product, int n_rows, int n_out, Epilogue epilogue) {
    const int quads = (n_out + 3) / 4;
    const long long i = static_cast<long long>(blockIdx.x) * PASS_THREADS + threadIdx.x;
    if (i >= static_cast<long long>(n_rows) * quads) return;
    const int row = static_cast<int>(i / quads), column = static_cast<int>(i % quads) * 4;
    const int n = n_out - column < 4 ? n_out - column : 4;
    T values[4];
    load_quad(product + static_cast<long long>(row) * n_out + column, n, quads_fit(product, n_out), values);
    epilogue(row, column, values, n);
}
