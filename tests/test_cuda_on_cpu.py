"""What runs CUDA kernels on the CPU is itself right: deliberate bugs are found at their line, correct code passes."""

import numpy as np
import pytest

from cuda_on_cpu import EmulationError, emulated, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

i4, f4 = np.int32, np.float32


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache folder of these tests' own: the emulator is what changes here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BACKPROP_GPU_CUDA_ON_CPU_CACHE", str(tmp_path_factory.mktemp("cuda_on_cpu")))
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def kernels(cp, code, *names, options=()):
    """The kernels of `code` by name."""
    module = cp.RawModule(code=code, options=("-std=c++17", *options), name_expressions=names)
    return module.get_function


# Deliberate bugs, each on the line that ends in its kernel's name

BUGS = r"""
__global__ void unused() {}
extern "C" __global__ void no_syncthreads(float* x) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = s[63 - threadIdx.x];  // no_syncthreads
}
extern "C" __global__ void no_second_syncthreads(float* x) {
  __shared__ float s[64];
  for (int i = 0; i < 2; ++i) {
    s[threadIdx.x] = i;  // no_second_syncthreads
    __syncthreads();
    x[threadIdx.x] += s[63 - threadIdx.x];
  }
}
extern "C" __global__ void no_syncwarp(float* x) {
  __shared__ float s[32];
  s[threadIdx.x] = 1;
  __syncwarp();
  float v = s[31 - threadIdx.x];
  s[threadIdx.x] = v + x[threadIdx.x];  // no_syncwarp
}
extern "C" __global__ void same_output(float* x) {
  x[threadIdx.x / 2] = 1;  // same_output
}
extern "C" __global__ void same_output_of_blocks(float* x) {
  x[threadIdx.x] += 1;  // same_output_of_blocks
}
extern "C" __global__ void no_fence(float* x, unsigned* ticket) {
  __shared__ bool last;
  x[blockIdx.x] = 1;
  if (threadIdx.x == 0) last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (last && threadIdx.x == 0) x[gridDim.x] = x[0] + x[1];  // no_fence
}
extern "C" __global__ void past_the_end(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x + 1];  // past_the_end
}
extern "C" __global__ void before_the_start(const float* x, float* y) {
  y[threadIdx.x] = x[int(threadIdx.x) - 1];  // before_the_start
}
extern "C" __global__ void past_shared(float* y) {
  __shared__ float a[8], b[8];
  float* p = a;
  a[threadIdx.x] = b[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = p[threadIdx.x + 1];  // past_shared
}
extern "C" __global__ void past_a_shared_row(float* y) {
  __shared__ float a[4][8];
  a[threadIdx.x / 8][threadIdx.x % 8] = 1;
  __syncthreads();
  y[threadIdx.x] = a[threadIdx.x / 8][threadIdx.x % 8 + 1];  // past_a_shared_row
}
extern "C" __global__ void past_dynamic(float* y) {
  extern __shared__ __align__(16) unsigned char memory[];
  float* s = reinterpret_cast<float*>(memory);
  s[threadIdx.x] = y[threadIdx.x];  // past_dynamic
}
extern "C" __global__ void past_local(const float* x, float* y, int n) {
  float a[4];
  for (int i = 0; i < n; ++i)
    a[i] = x[i];  // past_local
  y[0] = a[n / 2];
}
struct Sums {
  int n;
  float of[4];
};
extern "C" __global__ void past_a_struct(float* y, int n) {
  Sums sums;
  for (int i = 0; i < n; ++i)
    sums.of[i] = y[i];  // past_a_struct
  y[0] = sums.of[n / 2];
}
extern "C" __global__ void uninitialised(float* y) {
  __shared__ float s[32];
  if (threadIdx.x < 31) s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];  // uninitialised
}
extern "C" __global__ void misaligned(const float* x, float* y) {
  *reinterpret_cast<float4*>(y) = *reinterpret_cast<const float4*>(x + 1);  // misaligned
}
extern "C" __global__ void misaligned_shared(float* y) {
  __shared__ float s[8];
  *reinterpret_cast<float4*>(s) = make_float4(1, 2, 3, 4);  // misaligned_shared
  y[0] = s[3];
}
extern "C" __global__ void overflow(int* y, int a) {
  y[0] = a * a;  // overflow
}
extern "C" __global__ void divergent_barriers(float* y) {
  if (threadIdx.x < 32)
    __syncthreads();  // divergent_barriers
  else
    __syncthreads();
  y[threadIdx.x] = 1;
}
extern "C" __global__ void divergent_shuffle(float* y) {
  float v = 1;
  if (threadIdx.x < 16)
    v = __shfl_xor_sync(0xffffffffu, v, 1);  // divergent_shuffle
  y[threadIdx.x] = v;
}
extern "C" __global__ void shuffle_from_outside(float* y) {
  float v = 1;
  if (threadIdx.x < 16) v = __shfl_xor_sync(0x0000ffffu, v, 16);  // shuffle_from_outside
  y[threadIdx.x] = v;
}
extern "C" __global__ void endless(unsigned* y) {
  const unsigned stride = y[0];
  unsigned total = 0;
  for (unsigned i = threadIdx.x; i < 100; i += stride)
    total += i;  // endless
  y[0] = total;
}
extern "C" __global__ void endless_barriers(unsigned* y) {
  unsigned i = y[0];
  while (i != 1) __syncthreads(), i *= 2;  // endless_barriers
  y[0] = i;
}
extern "C" __global__ void through_const(const float* y) {
  const_cast<float*>(y)[threadIdx.x] = 1;  // through_const
}
extern "C" __global__ void no_wait(const float* x, float* y) {
  __shared__ __align__(16) float s[8];
  copy_async_16(s + 4 * threadIdx.x, x + 4 * threadIdx.x, 16);
  copy_async_commit();
  copy_async_wait<1>();
  y[threadIdx.x] = s[4 * threadIdx.x];  // no_wait
  copy_async_wait<0>();
}
extern "C" __global__ void no_barrier_after_wait(const float* x, float* y) {
  __shared__ __align__(16) float s[8];
  copy_async_16(s + 4 * threadIdx.x, x + 4 * threadIdx.x, 16);
  copy_async_commit();
  copy_async_wait<0>();
  y[threadIdx.x] = s[4 - 4 * threadIdx.x];  // no_barrier_after_wait
}
extern "C" __global__ void copy_past_the_end(const float* x, float* y) {
  __shared__ __align__(16) float s[4];
  copy_async_16(s, x, 16);  // copy_past_the_end
  copy_async_commit();
  copy_async_wait<0>();
  y[0] = s[0];
}
extern "C" __global__ void never_waited(const float* x, float* y) {
  __shared__ __align__(16) float s[4];
  copy_async_16(s, x, 16);  // never_waited
  y[0] = 1;
}
extern "C" __global__ void misaligned_rows(unsigned* y) {
  __shared__ __align__(16) unsigned short s[32][12];
  for (int i = 0; i < 12; ++i) s[threadIdx.x][i] = 1;
  __syncthreads();
  unsigned r[4];
  load_matrix_x4(r, s[threadIdx.x]);  // misaligned_rows
  y[threadIdx.x] = r[0] + r[1] + r[2] + r[3];
}
extern "C" __global__ void unwritten(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x];  // unwritten
}
extern "C" __global__ void failing_assert(int* y) {
  assert(threadIdx.x < 3);  // failing_assert
  y[threadIdx.x] = 1;
}
extern "C" __global__ void half_a_block_waits(float* y) {
  if (threadIdx.x < 32) {
    y[threadIdx.x] = 1;
    __syncwarp(0xffffffffu);
  } else if (threadIdx.x < 48) {
    __syncwarp(0xffffffffu);  // half_a_block_waits
  }
}
"""


@pytest.fixture(scope="module")
def checked():
    cp = emulated(checked=True, step_limit=100_000)
    return cp, kernels(cp, BUGS)


def bug_line(name):
    """Where BUGS has a line that ends in // name."""
    lines = [number for number, line in enumerate(BUGS.split("\n"), 1) if line.endswith(f"// {name}")]
    assert len(lines) == 1
    return f"RawModule:{lines[0]}"


@pytest.mark.parametrize(
    ("name", "threads", "what"),
    [
        ("no_syncthreads", 64, "race on shared `s`"),
        ("no_second_syncthreads", 64, "race on shared `s`"),
        ("no_syncwarp", 32, "no __syncwarp between"),
        ("same_output", 32, "race on global argument 0"),
        ("divergent_barriers", 64, "divergent barriers"),
        ("divergent_shuffle", 32, "deadlock"),
        ("half_a_block_waits", 64, "deadlock"),
        ("shuffle_from_outside", 32, "outside its mask"),
        ("past_shared", 8, "out of bounds: read of 4 bytes by block 0 thread 7"),
        ("past_a_shared_row", 32, "array index out of bounds"),
        ("past_dynamic", 32, "of shared dynamic memory (64 bytes) at offset 64"),
        ("uninitialised", 32, "uninitialised memory by block 0 thread 31"),
        ("misaligned_shared", 1, "misaligned"),
        ("through_const", 32, "through a const pointer"),
    ],
)
def test_bug_in_one_array(checked, name, threads, what):
    cp, get = checked
    y = cp.zeros(64, f4)
    with pytest.raises(EmulationError) as error:
        get(name)((1,), (threads,), (y,), shared_mem=64)
    assert what in str(error.value)
    assert bug_line(name) in str(error.value)


@pytest.mark.parametrize(
    ("name", "threads", "x_size", "what"),
    [
        ("past_the_end", 8, 8, "out of bounds: read of 4 bytes by block 0 thread 7"),
        ("before_the_start", 8, 8, "at offset -4"),
        ("misaligned", 1, 8, "misaligned"),
        ("no_wait", 2, 8, "before an asynchronous copy was waited for"),
        ("no_barrier_after_wait", 2, 8, "race on shared `s`"),
        ("copy_past_the_end", 1, 3, "out of bounds"),
        ("never_waited", 1, 4, "never waited for"),
    ],
)
def test_bug_between_two_arrays(checked, name, threads, x_size, what):
    cp, get = checked
    neighbours = cp.zeros(64, f4)  # of x, which are not x
    x, y = neighbours[32 : 32 + x_size], cp.zeros(64, f4)
    with pytest.raises(EmulationError) as error:
        get(name)((1,), (threads,), (x, y))
    assert what in str(error.value)
    assert bug_line(name) in str(error.value)


@pytest.mark.parametrize(
    ("name", "dtype", "args", "what"),
    [
        ("endless", "uint32", (), "endless loop"),
        ("endless_barriers", "uint32", (), "endless loop"),
        ("misaligned_rows", "uint32", (), "misaligned read of 16 bytes"),
        ("overflow", "int32", (i4(70000),), "signed overflow in *"),
        ("failing_assert", "int32", (), "assertion failed: threadIdx.x < 3"),
    ],
)
def test_bug_in_integers(checked, name, dtype, args, what):
    cp, get = checked
    with pytest.raises(EmulationError) as error:
        get(name)((1,), (32,), (cp.zeros(32, dtype), *args))
    assert what in str(error.value)
    assert bug_line(name) in str(error.value)


def test_bug_between_blocks(checked):
    cp, get = checked
    with pytest.raises(EmulationError, match="in different blocks") as error:
        get("same_output_of_blocks")((2,), (4,), (cp.zeros(4, f4),))
    assert bug_line("same_output_of_blocks") in str(error.value)
    with pytest.raises(EmulationError, match="in different blocks") as error:
        get("no_fence")((2,), (1,), (cp.zeros(3, f4), cp.zeros(1, np.uint32)))
    assert bug_line("no_fence") in str(error.value)


def test_two_arguments_may_share_memory(checked):
    cp, get = checked
    x = cp.zeros(64, f4)
    get("unwritten")((1,), (32,), (x[:32], x[32:]))
    get("unwritten")((1,), (32,), (x, x))  # each thread reads what it writes
    with pytest.raises(EmulationError, match="race on global argument"):
        get("unwritten")((1,), (32,), (x[1:], x))


def test_local_array_out_of_bounds(checked):
    cp, get = checked
    x, y = cp.zeros(8, f4), cp.zeros(8, f4)
    get("past_local")((1,), (1,), (x, y, i4(4)))
    with pytest.raises(EmulationError, match="array index out of bounds") as error:
        get("past_local")((1,), (1,), (x, y, i4(5)))
    assert bug_line("past_local") in str(error.value)


def test_last_array_of_a_struct_out_of_bounds(checked):
    """Not taken for one of the old kind, that goes on behind its struct."""
    cp, get = checked
    y = cp.zeros(8, f4)
    get("past_a_struct")((1,), (1,), (y, i4(4)))
    with pytest.raises(EmulationError, match="array index out of bounds") as error:
        get("past_a_struct")((1,), (1,), (y, i4(5)))
    assert bug_line("past_a_struct") in str(error.value)


def test_static_and_dynamic_shared_memory_count_together(cp):
    """A block without asking has 48 KiB of both; one that asks, what the device has."""
    code = """extern "C" __global__ void f(int* x) {
      __shared__ int s[4];
      extern __shared__ int t[];
      s[threadIdx.x] = t[threadIdx.x] = 1;
      x[threadIdx.x] = s[threadIdx.x] + t[threadIdx.x];
    }"""
    f, x = kernels(cp, code)("f"), cp.zeros(4, i4)
    f((1,), (4,), (x,), shared_mem=(48 << 10) - 16)
    with pytest.raises(
        EmulationError, match="16 bytes of static and 49152 of dynamic shared memory are more than 49152"
    ):
        f((1,), (4,), (x,), shared_mem=48 << 10)
    f.max_dynamic_shared_size_bytes = (48 << 10) + 4
    f((1,), (4,), (x,), shared_mem=(48 << 10) + 4)


def test_the_last_blocks_alone(cp):
    code = 'extern "C" __global__ void f(int* x) { x[blockIdx.y * gridDim.x + blockIdx.x] = 1; }'
    x = cp.zeros(12, i4)
    cp.emulator.last_blocks = 5
    kernels(cp, code)("f")((3, 4), (1,), (x,))
    assert x.get().tolist() == [0] * 7 + [1] * 5


def test_large_arrays_take_no_room(cp):
    x = cp.empty(1 << 33, f4)  # 32 GiB
    x[-3:] = 7.0
    assert x[-4:].get().tolist() == [0, 7, 7, 7]


def test_read_of_what_nothing_wrote(checked):
    cp, get = checked
    x, y = cp.empty(8, f4), cp.empty(8, f4)
    x[:7] = 1.0
    get("unwritten")((1,), (7,), (x, y))
    get("unwritten")((1,), (7,), (y, x))  # what a kernel wrote may be read
    with pytest.raises(EmulationError, match="nothing has written, by block 0 thread 7") as error:
        get("unwritten")((1,), (8,), (y, x))
    assert bug_line("unwritten") in str(error.value)


def test_after_a_bug_kernels_still_run(checked):
    cp, get = checked
    y = cp.zeros(64, f4)
    with pytest.raises(EmulationError):
        get("past_the_end")((1,), (64,), (y[:8], y[8:]))
    get("unwritten")((1,), (32,), (y[:32], y[32:]))


def test_bug_in_an_included_file(tmp_path):
    (tmp_path / "inner.cuh").write_text(
        "#pragma once\n"
        "template <int N> struct Tile { static constexpr int size = N; };\n"
        "template <class T, int N> __device__ T reverse(T x) {\n"
        "  __shared__ T tile[Tile<N>::size], /* , */ more[2][N + 4];  // [\n"
        "  tile[threadIdx.x] = x;\n"
        "  more[1][threadIdx.x] = x;\n"
        "  return tile[N - 1 - threadIdx.x] + more[1][threadIdx.x];\n"
        "}\n"
    )
    (tmp_path / "outer.cuh").write_text('#pragma once\n#include "inner.cuh"\n')
    code = (
        '#include "outer.cuh"\n#include "inner.cuh"\n'
        "template <class T, int N> __global__ void f(T* x) {\n\n"
        "  x[threadIdx.x] = reverse<T, N>(x[threadIdx.x]);\n}\n"
    )
    (tmp_path / "file.cu").write_text(code)
    cp = emulated(checked=True)
    f = kernels(cp, code, "f<double, 64>", options=(f"-I{tmp_path}",))("f<double, 64>")
    with pytest.raises(EmulationError, match=r"inner.cuh:5 \(inlined at file.cu:5\)") as error:
        f((1,), (64,), (cp.zeros(64, np.float64),))
    assert "inner.cuh:7" in str(error.value)


# Correct kernels

WARP = r"""
extern "C" __global__ void warp(const int* x, int* out, unsigned long long* wide, double* d) {
  const int i = threadIdx.x, v = x[i];
  out[i] = __reduce_add_sync(~0u, v);
  out[32 + i] = int(__ballot_sync(~0u, v & 1));
  out[64 + i] = __shfl_up_sync(~0u, v, 3);
  out[96 + i] = __shfl_down_sync(~0u, v, 5, 16);
  out[128 + i] = __shfl_sync(~0u, v, 7);
  if (i < 16) out[160 + i] = __shfl_xor_sync(0x0000ffffu, v, 1);
  else out[160 + i] = __shfl_xor_sync(0xffff0000u, v, 2);
  out[192 + i] = __any_sync(~0u, v == 3) + 2 * __all_sync(~0u, v < 100);
  wide[i] = __shfl_xor_sync(~0u, (unsigned long long)v << 40, 16);
  d[i] = __shfl_down_sync(~0u, v + 0.25, 16);
}
extern "C" __global__ void votes(int* out) {
  const int i = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int count = __syncthreads_count(i < 50), any = __syncthreads_or(i == 3), all = __syncthreads_and(i != 3);
  out[i] = count + 1000 * any + 10000 * all;
}
extern "C" __global__ void bits(const unsigned* x, unsigned* out) {
  const unsigned i = threadIdx.x, v = x[i];
  out[i] = __umulhi(v, 0xD2511F53u);
  out[32 + i] = __popc(v);
  out[64 + i] = __clz(int(v));
  out[96 + i] = __brev(v);
  out[128 + i] = __ffs(int(v));
  out[160 + i] = __byte_perm(v, 0x01020304u, 0x4123u);
  out[192 + i] = min(v, 77u) + max(int(v & 7), 3);
  out[224 + i] = unsigned(__umul64hi((unsigned long long)v << 32, 1000));
}
"""


@pytest.mark.parametrize("is_checked", [True, False])
def test_warp_operations(is_checked, rng):
    cp = emulated(checked=is_checked)
    get = kernels(cp, WARP)
    v, i = rng.integers(0, 100, 32).astype(i4), np.arange(32)
    out, wide, d = cp.empty(224, i4), cp.empty(32, np.uint64), cp.empty(32, np.float64)
    get("warp")((1,), (32,), (cp.asarray(v), out, wide, d))
    sum_, ballot, up, down, seventh, xor, votes = out.get().reshape(7, 32)
    assert (sum_ == v.sum()).all()
    assert (ballot.view(np.uint32) == ((v & 1).astype(np.uint64) << i.astype(np.uint64)).sum()).all()
    assert (up == np.where(i < 3, v, v[i - 3])).all()
    assert (down == np.where(i % 16 + 5 < 16, v[np.minimum(i + 5, 31)], v)).all()
    assert (seventh == v[7]).all()
    assert (xor == np.where(i < 16, v[i ^ 1], v[i ^ 2])).all()
    assert (votes == (3 in v) + 2).all()
    assert (wide.get() == v[i ^ 16].astype(np.uint64) << np.uint64(40)).all()
    assert (d.get() == v[np.where(i < 16, i + 16, i)] + 0.25).all()


@pytest.mark.parametrize("is_checked", [True, False])
def test_block_votes_count_every_thread(is_checked):
    cp = emulated(checked=is_checked, schedules=("forward", "reverse", "shuffled", "warps", "warps_reversed"))
    out = cp.empty(100, i4)
    kernels(cp, WARP)("votes")((1,), (5, 10, 2), (out,))
    assert (out.get() == 1050).all()


def test_bits(rng):
    cp = emulated()
    v = rng.integers(0, 2**32, 32).astype(np.uint32)
    v[:3] = 0, 1, 2**32 - 1
    out = cp.empty(256, np.uint32)
    kernels(cp, WARP)("bits")((1,), (32,), (cp.asarray(v), out))
    high, ones, zeros, reverse, first, bytes_, clamped, high64 = out.get().reshape(8, 32)
    text = [f"{n:032b}" for n in v.tolist()]
    assert (high == [n * 0xD2511F53 >> 32 for n in v.tolist()]).all()
    assert (ones == [t.count("1") for t in text]).all()
    assert (zeros == [32 - n.bit_length() for n in v.tolist()]).all()
    assert (reverse == [int(t[::-1], 2) for t in text]).all()
    assert (first == [t[::-1].find("1") + 1 for t in text]).all()
    assert (
        bytes_.view(np.uint8).reshape(32, 4) == np.c_[v.view(np.uint8).reshape(32, 4)[:, 3:0:-1], np.full(32, 4)]
    ).all()
    assert (clamped == np.minimum(v, 77) + np.maximum(v & 7, 3)).all()
    assert (high64 == [(n << 32) * 1000 >> 64 for n in v.tolist()]).all()


PRODUCT = r"""
// One warp: C (16, 8) = A (16, K) B (K, 8), with A, and B or its transpose, in shared memory, K in steps of 16.
struct Bits { unsigned short bits; };
template <bool HALF, bool TRANSPOSED>
__global__ void product(const Bits* A, const Bits* B, float* C, int K) {
  __shared__ __align__(16) Bits tile_a[16][24], tile_b[TRANSPOSED ? 8 : 16][TRANSPOSED ? 24 : 8];
  const int lane = threadIdx.x;
  float c[4] = {0, 0, 0, 0};
  for (int k0 = 0; k0 < K; k0 += 16) {
    for (int i = lane; i < 256; i += 32) tile_a[i / 16][i % 16] = A[i / 16 * K + k0 + i % 16];
    for (int i = lane; i < 128; i += 32)
      if (TRANSPOSED) tile_b[i / 16][i % 16] = B[i / 16 * K + k0 + i % 16];
      else tile_b[i / 8][i % 8] = B[(k0 + i / 8) * 8 + i % 8];
    __syncwarp();
    unsigned a[4], b[2];
    load_matrix_x4(a, &tile_a[lane % 16][lane / 16 * 8]);
    if (TRANSPOSED) load_matrix_x2(b, &tile_b[lane % 8][lane / 8 % 2 * 8]);
    else load_matrix_x2_transposed(b, &tile_b[lane % 16][0]);
    if (HALF) mma_f16(c, a, b); else mma_bf16(c, a, b);
    __syncwarp();
  }
  for (int i = 0; i < 4; ++i) C[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}
extern "C" __global__ void product_tf32(const float* A, const float* B, float* C) {  // (16, 8), (8, 8), (16, 8)
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  unsigned a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = round_tf32(A[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) b[i] = round_tf32(B[(t + i * 4) * 8 + g]);
  float c[4] = {1, 1, 1, 1};
  mma_tf32(c, a, b);
  for (int i = 0; i < 4; ++i) C[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = c[i];
}
extern "C" __global__ void transposed_x4(const unsigned short* x, unsigned* out) {
  __shared__ __align__(16) unsigned short s[32][8];
  for (int i = threadIdx.x; i < 256; i += 32) s[i / 8][i % 8] = x[i];
  __syncwarp();
  unsigned r[4];
  load_matrix_x4_transposed(r, s[threadIdx.x]);
  for (int i = 0; i < 4; ++i) out[i * 32 + threadIdx.x] = r[i];
}
extern "C" __global__ void round_all(const float* x, unsigned* bf16, unsigned* f16, unsigned* tf32, float* back,
                                     int n) {
  for (int i = threadIdx.x; i < n; i += 32) {
    bf16[i] = pack_bf16(x[i], -x[i]);
    f16[i] = pack_f16(x[i], -x[i]);
    tf32[i] = round_tf32(x[i]);
    back[i] = unpack_bf16((unsigned short)bf16[i]);
    back[n + i] = unpack_f16((unsigned short)f16[i]);
  }
}
"""
PRODUCTS = tuple(f"product<{half}, {transposed}>" for half in ("false", "true") for transposed in ("false", "true"))


def bf16(x):
    """Bits of x rounded to bf16, to nearest even."""
    u = x.astype(f4).view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(f4)


def tf32(x):
    """x rounded to 10 bits after the first, ties away from zero."""
    return (x.view(np.uint32) + np.uint32(0x1000) & np.uint32(0xFFFFE000)).view(f4)


@pytest.mark.parametrize("is_checked", [True, False])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_tensor_core_product(is_checked, half, transposed, rng):
    cp = emulated(checked=is_checked)
    product = kernels(cp, PRODUCT, *PRODUCTS)(f"product<{str(half).lower()}, {str(transposed).lower()}>")
    K = 48
    A, B, C = rng.standard_normal((16, K)), rng.standard_normal((K, 8)), cp.empty((16, 8), f4)
    to_bits = (lambda x: x.astype(np.float16).view(np.uint16)) if half else bf16
    from_bits = (lambda x: x.view(np.float16).astype(np.float64)) if half else lambda x: from_bf16(x).astype(np.float64)
    A, B = to_bits(A), to_bits(B)
    product((1,), (32,), (cp.asarray(A), cp.asarray(np.ascontiguousarray(B.T if transposed else B)), C, i4(K)))
    np.testing.assert_allclose(C.get(), from_bits(A) @ from_bits(B), rtol=1e-5, atol=1e-5)


def test_tf32_product(rng):
    cp = emulated(checked=True)
    A, B, C = rng.standard_normal((16, 8)).astype(f4), rng.standard_normal((8, 8)).astype(f4), cp.empty((16, 8), f4)
    kernels(cp, PRODUCT, *PRODUCTS)("product_tf32")((1,), (32,), (cp.asarray(A), cp.asarray(B), C))
    np.testing.assert_allclose(C.get(), 1 + tf32(A).astype(np.float64) @ tf32(B), rtol=1e-5, atol=1e-5)


def test_load_matrix_transposed():
    cp = emulated(checked=True)
    x, out = np.arange(256, dtype=np.uint16), cp.empty(128, np.uint32)
    kernels(cp, PRODUCT, *PRODUCTS)("transposed_x4")((1,), (32,), (cp.asarray(x), out))
    tiles = out.get().view(np.uint16).reshape(4, 8, 8)  # lane 4 i + j has row i, columns 2 j and 2 j + 1
    assert (tiles == x.reshape(4, 8, 8).transpose(0, 2, 1)).all()


def test_roundings(rng):
    cp = emulated()
    x = np.concatenate([rng.standard_normal(1000) * 10.0 ** rng.integers(-9, 9, 1000), [0, 1 + 2**-8, 1 + 3 * 2**-8]])
    x = np.concatenate([x, [1 + 2**-11, 65519, 65520, 1e-8, np.inf, 2**-25, 3e38]]).astype(f4)
    n = len(x)
    b, h, t = (cp.empty(n, np.uint32) for _ in range(3))
    back = cp.empty(2 * n, f4)
    kernels(cp, PRODUCT, *PRODUCTS)("round_all")((1,), (32,), (cp.asarray(x), b, h, t, back, i4(n)))
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    assert (b.get() & 0xFFFF == bf16(x)).all()
    assert (b.get() >> 16 == bf16(-x)).all()
    assert (h.get() & 0xFFFF == half.view(np.uint16)).all()
    assert (h.get() >> 16 == (-half).view(np.uint16)).all()
    assert (t.get().view(f4) == tf32(x)).all()
    assert (back.get()[:n] == from_bf16(bf16(x))).all()
    assert (back.get()[n:] == half.astype(f4)).all()


COPIES = r"""
// Each thread copies 16, 8 and 4 bytes, of which `bytes` are read, and looks at them before and after it waits.
extern "C" __global__ void copies(const float* x, float* before, float* after, int bytes) {
  __shared__ __align__(16) float s[4][8];
  float* mine = s[threadIdx.x];
  for (int i = 0; i < 8; ++i) mine[i] = 5;
  copy_async_16(mine, x, bytes);
  copy_async_commit();
  copy_async_8(mine + 4, x, min(bytes, 8));
  copy_async_4(mine + 6, x, min(bytes, 4));
  copy_async_commit();
  copy_async_wait<1>();
#ifdef PEEK
  for (int i = 0; i < 8; ++i) before[threadIdx.x * 8 + i] = mine[i];
#endif
  copy_async_wait<0>();
  for (int i = 0; i < 8; ++i) after[threadIdx.x * 8 + i] = mine[i];
}
"""


@pytest.mark.parametrize(("is_checked", "peek"), [(True, False), (False, True)])
def test_asynchronous_copies_arrive_at_their_wait(is_checked, peek):
    cp = emulated(checked=is_checked)
    copies = kernels(cp, COPIES, options=("-DPEEK",) if peek else ())("copies")
    x, before, after = cp.asarray(np.arange(1, 5, dtype=f4)), cp.zeros((4, 8), f4), cp.empty((4, 8), f4)
    copies((1,), (4,), (x, before, after, i4(12)))
    assert (after.get() == [1, 2, 3, 0, 1, 2, 1, 5]).all()
    if peek:
        np.testing.assert_array_equal(before.get(), [[1, 2, 3, 0, np.nan, np.nan, np.nan, 5]] * 4)
    copies((1,), (4,), (None, before, after, i4(0)))  # of which nothing is read
    assert (after.get() == [0] * 7 + [5]).all()


LAST_BLOCK = r"""
// Sums of blocks, then their sum by the block that comes last, in a fixed order.
extern "C" __global__ void sum(const float* x, float* part, float* total, unsigned* ticket, int n) {
  __shared__ float s[64];
  __shared__ bool last;
  float v = 0;
  for (int i = blockIdx.x * 64 + threadIdx.x; i < n; i += gridDim.x * 64) v += x[i];
  s[threadIdx.x] = v;
  __syncthreads();
  for (int half = 32; half; half /= 2) {
    if (threadIdx.x < half) s[threadIdx.x] += s[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    part[blockIdx.x] = s[0];
    __threadfence();
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    v = 0;
    for (int i = 0; i < gridDim.x; ++i) v += part[i];
    *total = v;
  }
}
"""


def test_last_block_finishes_the_sum(rng):
    x = rng.standard_normal(1009).astype(f4)
    totals = set()
    for is_checked in (True, False):
        cp = emulated(checked=is_checked, schedules=("forward", "reverse", "shuffled", "warps", "warps_reversed"))
        total, ticket = cp.empty(1, f4), cp.zeros(1, np.uint32)
        kernels(cp, LAST_BLOCK)("sum")((7,), (64,), (cp.asarray(x), cp.empty(7, f4), total, ticket, i4(1009)))
        assert ticket.item() == 0
        totals.add(total.item())
    assert len(totals) == 1
    assert abs(totals.pop() - x.sum()) < 1e-4


def test_fast_builds_show_a_result_that_depends_on_the_schedule():
    cp = emulated(schedules=("forward", "reverse"))
    code = 'extern "C" __global__ void sync(float* x) { x[threadIdx.x / 2] = threadIdx.x; }'  # also a C function's name
    with pytest.raises(EmulationError, match=r"argument 0 differs from byte .* between 'forward' and 'reverse'"):
        kernels(cp, code)("sync")((1,), (8,), (cp.zeros(8, f4),))


def test_several_schedules_start_from_the_same_contents():
    cp = emulated(schedules=("forward", "reverse", "shuffled"))
    x = cp.zeros(64, f4)
    kernels(cp, 'extern "C" __global__ void increment(float* x) { x[threadIdx.x] += 1; }')("increment")(
        (1,), (64,), (x,)
    )
    assert (x.get() == 1).all()


def test_floating_point_atomics_do_not_compile():
    cp = emulated()
    code = 'extern "C" __global__ void add(float* x) { atomicAdd(x, 1.0f); }'
    with pytest.raises(cp.cuda.compiler.CompileException, match="depend on the schedule"):
        kernels(cp, code)("add")


def test_compile_errors(tmp_path):
    cp = emulated()
    error = cp.cuda.compiler.CompileException
    with pytest.raises(error, match=r"RawModule:2.*undeclared_name"):
        kernels(cp, '\nextern "C" __global__ void f(int* x) { x[0] = undeclared_name; }')("f")
    with pytest.raises(error, match=r"cannot open source file 'absent\.cuh'"):
        kernels(cp, '#include "absent.cuh"')("f")
    with pytest.raises(error, match="no system headers"):
        kernels(cp, "#include <cmath>")("f")
    with pytest.raises(error, match="unrecognized option --fast"):
        kernels(cp, "", options=("--fast",))("f")
    with pytest.raises(cp.cuda.driver.CUDADriverError, match="NOT_FOUND"):
        kernels(cp, 'extern "C" __global__ void f() {}')("g")


def test_a_changed_include_is_compiled_anew(tmp_path):
    cp = emulated()
    results = []
    for value in (1, 2):
        (tmp_path / "value.cuh").write_text(f"constexpr int value = {value};\n")
        code = '#include "value.cuh"\nextern "C" __global__ void f(int* x) { x[0] = value * __CUDA_ARCH__ + MORE; }'
        x = cp.empty(1, i4)
        kernels(cp, code, options=(f"-I{tmp_path}", "-DMORE=7"))("f")((1,), (1,), (x,))
        results.append(x.item())
    assert results == [907, 1807]


# The CuPy-shaped front


ARGUMENTS = r"""
struct Bits { unsigned short bits; };
struct Record { float rate; int step; double scale; };
extern "C" __global__ void f(const float* x, int* y, int n, float a, bool flag) {
  if (flag) y[threadIdx.x] = int(x[threadIdx.x] * a) + n;
}
template <int N> struct Tile { static constexpr int threads = N; };
template <class T> __global__ void __launch_bounds__((T::threads), 2) bounded(int* x);
template <class T>
__global__ void __launch_bounds__((T::threads), 2) bounded(int* x) {
  x[threadIdx.x] = 1;
}
extern "C" __global__ void doubles(double* x, double a, long long n) { x[0] = a + n; }
extern "C" __global__ void structs(Bits* b, const float4* v, Record r, const float* maybe) {
  b[0].bits = (unsigned short)(r.rate + r.step + r.scale + v[1].w);
  b[1].bits = maybe == nullptr;
}
extern "C" __global__ void dynamic(int* x) {
  extern __shared__ __align__(16) unsigned char memory[];
  int* s = reinterpret_cast<int*>(memory);
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  x[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}
"""


@pytest.fixture
def cp():
    return emulated()


def test_launch_bounds(cp):
    bounded, x = kernels(cp, ARGUMENTS, "bounded<Tile<64>>")("bounded<Tile<64>>"), cp.zeros(96, i4)
    bounded((1,), (64,), (x,))
    with pytest.raises(EmulationError, match=r"more threads than __launch_bounds__\(\(T::threads\)\)"):
        bounded((1,), (96,), (x,))


def test_arguments(cp):
    f = kernels(cp, ARGUMENTS)("f")
    x, y = cp.asarray(np.arange(8, dtype=f4)), cp.zeros(8, i4)
    good = [x, y, i4(3), f4(2), True]
    f((1,), (8,), good)
    assert (y.get() == np.arange(8) * 2 + 3).all()
    for position, bad, message in [
        (0, x.astype(np.float64), "float64 array where the kernel takes const float32"),
        (0, cp.zeros((8, 2), f4)[:, 0], "not C-contiguous"),
        (0, np.arange(8, dtype=f4), "numpy.ndarray of shape .* use cupy.asarray"),
        (0, 3, "int64 .* takes const float32"),
        (0, emulated().zeros(8, f4), "another device"),
        (2, 3, "int64 .* takes int32"),
        (2, x, "float32 array where the kernel takes int32"),
        (3, 2.0, "float64 .* takes float32"),
        (4, None, "Unsupported type"),
    ]:
        args = list(good)
        args[position] = bad
        with pytest.raises(TypeError, match=f"argument {position} is .*{message}"):
            f((1,), (8,), args)
    with pytest.raises(TypeError, match="takes 5 arguments; got 4"):
        f((1,), (8,), good[:4])


def test_python_numbers_are_eight_bytes_as_in_cupy(cp):
    x = cp.empty(1, np.float64)
    kernels(cp, ARGUMENTS)("doubles")((1,), (1,), (x, 0.5, 3))
    assert x.item() == 3.5


def test_structs(cp):
    record = np.zeros((), np.dtype([("rate", f4), ("step", i4), ("scale", np.float64)]))
    record["rate"], record["step"], record["scale"] = 1, 20, 300
    structs = kernels(cp, ARGUMENTS)("structs")
    v = cp.asarray(np.arange(8, dtype=f4))
    for dtype in (np.uint16, np.float16):
        bits = cp.zeros(2, dtype)
        structs((1,), (1,), (bits, v, record[()], None))
        assert (bits.get().view(np.uint16) == [328, 1]).all()
    with pytest.raises(TypeError, match="struct of 16 bytes"):
        structs((1,), (1,), (bits, v, i4(3), None))
    with pytest.raises(TypeError, match="struct of 16 bytes"):
        structs((1,), (1,), (bits, v[:7], record, None))


def test_dynamic_shared_memory_is_limited(cp):
    dynamic, x = kernels(cp, ARGUMENTS)("dynamic"), cp.empty(32, i4)
    dynamic((1,), (32,), (x,), shared_mem=48 << 10)
    assert (x.get() == np.arange(32)[::-1]).all()
    with pytest.raises(EmulationError, match="dynamic shared memory"):
        dynamic((1,), (32,), (x,), shared_mem=(48 << 10) + 4)
    dynamic.max_dynamic_shared_size_bytes = 227 << 10
    dynamic((1,), (32,), (x,), shared_mem=227 << 10)
    with pytest.raises(cp.cuda.driver.CUDADriverError, match="INVALID_VALUE"):
        dynamic.max_dynamic_shared_size_bytes = (227 << 10) + 1
    older = emulated(compute_capability="86")
    with pytest.raises(older.cuda.driver.CUDADriverError, match="INVALID_VALUE"):
        kernels(older, ARGUMENTS)("dynamic").max_dynamic_shared_size_bytes = 100 << 10


@pytest.mark.parametrize(("grid", "block"), [((0,), (32,)), ((1,), (1025,)), ((1, 65536), (32,)), ((1,), (1, 1, 65))])
def test_impossible_launches(cp, grid, block):
    with pytest.raises(EmulationError, match="invalid launch"):
        kernels(cp, ARGUMENTS)("dynamic")(grid, block, (cp.empty(32, i4),), shared_mem=4096)


def test_arrays(cp, rng):
    host = rng.standard_normal((3, 5)).astype(f4)
    x = cp.asarray(host)
    assert isinstance(x, cp.ndarray)
    assert (x.shape, x.ndim, x.dtype, x.size, x.nbytes, x.itemsize, len(x)) == ((3, 5), 2, f4, 15, 60, 4, 3)
    assert x.data.ptr % 512 == 0
    assert (x[1].data.ptr - x.data.ptr, x[1:, 2:].shape, x[2, 3].shape) == (20, (2, 3), ())
    assert x.flags.c_contiguous
    assert not x[:, 1:].flags.c_contiguous
    np.testing.assert_array_equal(x.get(), host)
    np.testing.assert_array_equal(cp.asnumpy(x[:, ::2]), host[:, ::2])
    np.testing.assert_array_equal(x.reshape(5, 3).get(), host.reshape(5, 3))
    np.testing.assert_array_equal(x.ravel().view(np.uint32).get(), host.ravel().view(np.uint32))
    np.testing.assert_array_equal(x.astype(np.float64).get(), host.astype(np.float64))
    np.testing.assert_array_equal(cp.ascontiguousarray(x[:, 1:3]).get(), host[:, 1:3])
    assert cp.asarray(x) is x
    assert float(x[1, 2]) == host[1, 2] == x[1, 2].item()
    x.reshape(15)[2:4] = 7  # through a view
    x[2] = x[1]
    x[0, 0] = f4(3)
    host.reshape(15)[2:4], host[2], host[0, 0] = 7, host[1], 3
    np.testing.assert_array_equal(x.get(), host)
    x.fill(2)
    x[1:].set(host[1:])
    np.testing.assert_array_equal(x.get(), np.concatenate([np.full((1, 5), 2, f4), host[1:]]))
    assert np.isnan(cp.empty(100, f4).get()).all()
    assert (cp.full((2, 2), 3, i4).get() == 3).all()


def test_a_reshape_that_takes_a_copy_is_the_devices_work(cp):
    host = np.arange(15, dtype=f4).reshape(3, 5)
    x = cp.asarray(host)
    cp.emulator.reset()
    copy = x[:, 1:3].reshape(6)
    assert cp.emulator.counters.bytes_on_device == copy.nbytes
    x.fill(9)
    np.testing.assert_array_equal(copy.get(), host[:, 1:3].reshape(6))
    assert x[:0].reshape(5, 0).shape == (5, 0)


def test_arrays_refuse_what_cupy_refuses(cp):
    x = cp.zeros(3, f4)
    with pytest.raises(TypeError, match="Implicit conversion to a NumPy array is not allowed"):
        np.asarray(x)
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.concatenate([x, x])
    with pytest.raises(TypeError, match=r"cupy\.asarray"):
        x[...] = np.zeros(3, f4)
    with pytest.raises(TypeError, match="float64 array cannot be set to float32"):
        x.set(np.zeros(3))
    with pytest.raises(ValueError, match="Shape mismatch"):
        x.set(np.zeros(4, f4))
    with pytest.raises(IndexError, match="basic slicing"):
        x[np.array([0, 1])]
    with pytest.raises(TypeError):
        x + 1
    for absent in ("sum", "T", "mean"):
        with pytest.raises(AttributeError):
            getattr(x, absent)
    for absent in ("matmul", "random", "show_config"):
        with pytest.raises(AttributeError, match=f"cupy.{absent} is not in cuda_on_cpu"):
            getattr(cp, absent)


def test_exchange_without_a_copy(cp):
    x = cp.asarray(np.arange(6, dtype=f4).reshape(2, 3))
    assert x.__dlpack_device__() == (2, 0)

    class Foreign:
        __dlpack__, __dlpack_device__ = x[1].__dlpack__, x.__dlpack_device__

    class Older:
        __cuda_array_interface__ = x[:, 1].__cuda_array_interface__

    for y in (cp.from_dlpack(x[1]), cp.from_dlpack(Foreign())):
        assert y.data.ptr == x[1].data.ptr
        assert (y.get() == [3, 4, 5]).all()
    assert (cp.asarray(Older()).get() == [1, 4]).all()
    with pytest.raises(TypeError, match="CPU arrays"):
        cp.from_dlpack(np.zeros(3))


def test_out_of_memory(cp):
    cp.emulator.memory_size = 1 << 20
    x = cp.empty(200_000, f4)
    assert cp.cuda.Device().mem_info == ((1 << 20) - 800_000, 1 << 20)
    with pytest.raises(cp.cuda.memory.OutOfMemoryError, match="allocating 400,000 bytes"):
        cp.empty(100_000, f4)
    del x
    cp.empty(100_000, f4)


def test_counters(cp):
    f, x, y = kernels(cp, ARGUMENTS)("f"), cp.asarray(np.zeros(8, f4)), cp.zeros(8, i4)
    cp.emulator.reset()
    for _ in range(3):
        f((1,), (8,), (x, y, i4(1), f4(1), True))
    y.get()
    cp.cuda.get_current_stream().synchronize()
    counters = cp.emulator.counters
    assert counters.launches == counters.direct_launches == {"f": 3}
    assert (counters.synchronisations, counters.bytes_to_host, counters.bytes_to_device, counters.allocations) == (
        2,
        32,
        0,
        0,
    )


def test_device(cp):
    device = cp.cuda.Device()
    with device:
        assert (device.id, device.compute_capability) == (0, "90")
    assert emulated(compute_capability="120").cuda.Device(0).compute_capability == "120"
    assert device.attributes["MaxSharedMemoryPerBlockOptin"] == 227 << 10
    assert cp.cuda.runtime.getDeviceCount() == 1
    assert cp.cuda.runtime.getDeviceProperties(0)["major"] == 9
    with pytest.raises(cp.cuda.runtime.CUDARuntimeError, match="cudaErrorInvalidDevice"):
        cp.cuda.Device(1)


# Streams and graphs

INCREMENT = 'extern "C" __global__ void increment(const int* x, int* y) { y[threadIdx.x] = x[threadIdx.x] + 1; }'


@pytest.mark.parametrize("late", [False, True])
def test_a_graph_replays_on_the_memory_it_recorded(late):
    cp = emulated(late=late)
    increment, x, y = kernels(cp, INCREMENT)("increment"), cp.zeros(4, i4), cp.zeros(4, i4)
    stream = cp.cuda.Stream(non_blocking=True)
    stream.wait_event(cp.cuda.get_current_stream().record())
    with stream:
        stream.begin_capture()
        assert stream.is_capturing()
        increment((1,), (4,), (x, y))
        increment((1,), (4,), (y, x))
        graph = stream.end_capture()
    assert not stream.is_capturing()
    stream.synchronize()
    assert (x.get() == 0).all()  # recorded, not run
    cp.emulator.reset()
    for _ in range(3):
        graph.launch(stream)
    stream.synchronize()
    assert (x.get() == 6).all()
    assert (y.get() == 5).all()
    counters = cp.emulator.counters
    assert (counters.graph_launches, counters.launches, counters.direct_launches) == (3, {"increment": 6}, {})


def test_a_graph_does_not_keep_its_memory(cp):
    increment, x, y = kernels(cp, INCREMENT)("increment"), cp.zeros(4, i4), cp.zeros(4, i4)
    with cp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        increment((1,), (4,), (x, y))
        graph = stream.end_capture()
        graph.launch()
        del y
        with pytest.raises(EmulationError, match="replays increment, but memory that it uses has been freed"):
            graph.launch()


def test_what_may_not_happen_in_a_capture(cp):
    x, error = cp.zeros(4, i4), cp.cuda.runtime.CUDARuntimeError
    stream, event = cp.cuda.Stream(non_blocking=True), cp.cuda.Event()
    event.record()
    forbidden = {
        "get": x.get,
        "item": x[0].item,
        "set": lambda: x.set(np.zeros(4, i4)),
        "asarray": lambda: cp.asarray(np.zeros(4, i4)),
        "empty": lambda: cp.empty(3, f4),
        "synchronize": stream.synchronize,
        "device": cp.cuda.Device().synchronize,
        "pinned": lambda: cp.cuda.alloc_pinned_memory(4),
        "outer event": lambda: stream.wait_event(event),
        "inner event": lambda: stream.record().synchronize(),
    }
    for name, act in forbidden.items():
        with stream:
            stream.begin_capture()
            with pytest.raises(error, match=r"capturing|uncaptured"):
                act()
            with pytest.raises(error, match="cudaErrorStreamCaptureInvalidated"):
                stream.end_capture()
        assert not stream.is_capturing(), name
    with pytest.raises(RuntimeError, match="default"):
        cp.cuda.Stream.null.begin_capture()


@pytest.mark.parametrize("late", [False, True])
def test_a_captured_fork_must_join(late):
    cp = emulated(late=late)
    increment, x, y, z = kernels(cp, INCREMENT)("increment"), *(cp.zeros(4, i4) for _ in range(3))
    cp.cuda.Device().synchronize()
    main, side = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)

    def capture(join):
        with main:
            main.begin_capture()
            increment((1,), (4,), (x, x))
            side.wait_event(main.record())
            with side:
                increment((1,), (4,), (x, y))
            if join:
                main.wait_event(side.record())
            increment((1,), (4,), (y, z))
            return main.end_capture()

    with pytest.raises(cp.cuda.runtime.CUDARuntimeError, match="cudaErrorStreamCaptureUnjoined"):
        capture(join=False)
    assert not side.is_capturing()
    capture(join=True).launch(main)
    main.synchronize()
    assert [a.get()[0] for a in (x, y, z)] == [1, 2, 3]


@pytest.mark.parametrize("waits", [False, True])
def test_late_streams_show_a_missing_event(waits):
    cp = emulated(late=True)
    increment, x, y, z = kernels(cp, INCREMENT)("increment"), *(cp.zeros(4, i4) for _ in range(3))
    cp.cuda.Device().synchronize()
    first, second = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)
    with first:
        increment((1,), (4,), (x, y))
    if waits:
        second.wait_event(first.record())
    with second:
        increment((1,), (4,), (y, z))
        assert z.get()[0] == (2 if waits else 1)
    first.synchronize()
    assert y.get()[0] == 1


def test_late_copies_see_pinned_memory_as_it_is_when_they_run():
    cp = emulated(late=True)
    runtime, x = cp.cuda.runtime, cp.zeros(4, f4)
    pinned = cp.cuda.alloc_pinned_memory(16)
    host = np.frombuffer(pinned, f4, 4)
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    host[:] = 1
    runtime.memcpyAsync(x.data.ptr, pinned.ptr, 16, runtime.memcpyHostToDevice, stream.ptr)
    host[:] = 2  # too early
    stream.synchronize()
    assert (x.get() == 2).all()
    pageable = host.copy()
    for source, seen in ((host, 3), (pageable, 2)):  # what is not pinned is taken before `set` returns
        with stream:
            x.set(source)
        source[:] = 3
        stream.synchronize()
        assert (x.get() == seen).all()


def test_copies_by_pointer(cp):
    runtime, error = cp.cuda.runtime, cp.cuda.runtime.CUDARuntimeError
    x, y, host = cp.asarray(np.arange(4, dtype=f4)), cp.zeros(4, f4), np.zeros(4, f4)
    cp.emulator.reset()
    runtime.memcpyAsync(y.data.ptr, x.data.ptr, 16, runtime.memcpyDeviceToDevice, 0)
    runtime.memcpyAsync(host.ctypes.data, y.data.ptr, 16, runtime.memcpyDeviceToHost, 0)
    assert (host == np.arange(4)).all()
    runtime.memsetAsync(y.data.ptr, 0, 8, 0)
    assert (y.get() == [0, 0, 2, 3]).all()
    counters = cp.emulator.counters
    assert (counters.bytes_on_device, counters.bytes_to_host, counters.synchronisations) == (16, 32, 1)
    with pytest.raises(error, match="not in one living allocation"):
        runtime.memcpyAsync(y.data.ptr, x.data.ptr, 17, runtime.memcpyDeviceToDevice, 0)
    with pytest.raises(error, match="on the device, where the copy's kind says host"):
        runtime.memcpyAsync(y.data.ptr, x.data.ptr, 16, runtime.memcpyHostToDevice, 0)
    address = y.data.ptr
    del y
    with pytest.raises(error, match="not in one living allocation"):
        runtime.memsetAsync(address, 0, 4, 0)


def test_events(cp):
    start, end = cp.cuda.Event(), cp.cuda.Event()
    with pytest.raises(cp.cuda.runtime.CUDARuntimeError, match="cudaErrorInvalidResourceHandle"):
        cp.cuda.get_elapsed_time(start, end)
    start.record()
    end.record()
    end.synchronize()
    assert cp.cuda.get_elapsed_time(start, end) >= 0
    assert end.done
