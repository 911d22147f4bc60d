/* planted.cu - kernels and host code with one bug each, and for each a twin without the bug. The
 * checker must report every bug, with the right kind and at the line marked BUG(name). It must not
 * report any twin.
 *
 *     planted               runs all; exit status 0 if every report is right
 *     planted NAME          runs one bug, to see its report
 *     planted NAME fixed    runs its twin
 *
 * It is compiled like any program to check (../cudacheck.cpp), and reads its own source,
 * planted.cu, to find the marked lines. */
#include "cudaemu.h"
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

constexpr int N = 128; /* threads of most blocks */

/* ---- Races in shared memory ------------------------------------------------------------------ */

template <bool bug> __global__ void barrier_missing(float *out)
{
    __shared__ float x[N];
    int t = threadIdx.x;
    x[t] = 0;
    __syncthreads();
    x[t] = t; /* BUG(barrier_missing) */
    if (!bug) __syncthreads();
    out[t] = x[N - 1 - t];
}

/* Called in a loop. The next call writes part[] while slow warps still read it. */
template <bool bug> __device__ float block_sum(float v)
{
    __shared__ float part[N / 32];
    for (int o = 16; o; o /= 2) v += __shfl_xor_sync(0xFFFFFFFF, v, o);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v; /* BUG(second_barrier) */
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < N / 32; i++) sum += part[i];
    if (!bug) __syncthreads();
    return sum;
}
template <bool bug> __global__ void second_barrier(float *out)
{
    for (int i = 0; i < 3; i++) out[i * N + threadIdx.x] = block_sum<bug>(threadIdx.x * (i + 1));
}

template <bool bug> __global__ void overwritten_too_soon(float *out)
{
    __shared__ float x[N];
    int t = threadIdx.x;
    x[t] = t;
    __syncthreads();
    float next = x[(t + 32) % N];
    if (!bug) __syncthreads();
    x[t] = next * 2; /* BUG(overwritten_too_soon) */
    out[t] = x[t];
}

/* The emulator runs the reader before the others have written anything. */
template <bool bug> __global__ void read_before_written(float *out)
{
    __shared__ float x[N];
    int t = threadIdx.x;
    x[t] = t;
    if (!bug) __syncthreads();
    out[t] = x[N - 1 - t]; /* BUG(read_before_written) */
}

template <bool bug> __global__ void warp_barrier_missing(float *out)
{
    __shared__ float x[N];
    int t = threadIdx.x;
    x[t] = 0;
    __syncwarp();
    x[t] = t; /* BUG(warp_barrier_missing) */
    if (!bug) __syncwarp();
    out[t] = x[t ^ 1];
}

/* A shuffle does not order memory. */
template <bool bug> __global__ void shuffle_is_no_barrier(float *out)
{
    __shared__ float x[N];
    int t = threadIdx.x;
    x[t] = t;
    float v = __shfl_xor_sync(0xFFFFFFFF, (float)t, 1);
    if (!bug) __syncwarp();
    out[t] = v + x[t ^ 1]; /* BUG(shuffle_is_no_barrier) */
}

/* __syncwarp orders one warp only. */
template <bool bug> __global__ void warp_for_block_barrier(float *out)
{
    __shared__ float x[N];
    int t = threadIdx.x;
    x[t] = 0;
    __syncthreads();
    x[t] = t; /* BUG(warp_for_block_barrier) */
    if (bug) __syncwarp();
    else __syncthreads();
    out[t] = x[(t + 1) % N];
}

/* Two 16-bit numbers share a word. Writing neighbours is no race; writing the same one is. */
template <bool bug> __global__ void half_words(__half *out)
{
    __shared__ __half x[N];
    int t = threadIdx.x;
    x[bug ? t / 2 : t] = __float2half(t); /* BUG(half_words) */
    __syncthreads();
    out[t] = x[bug ? t / 2 : t];
}

/* A running sum over the lanes. Nothing separates a step's reads from its writes. */
template <bool bug> __global__ void scan(float *out)
{
    __shared__ float x[32];
    int t = threadIdx.x;
    x[t] = t;
    __syncwarp();
    for (int o = 1; o < 32; o *= 2) {
        float left = t >= o ? x[t - o] : 0; /* BUG(scan) */
        if (!bug) __syncwarp();
        x[t] += left;
        __syncwarp();
    }
    out[t] = x[t];
}

/* Two threads may each write one half of a word. A thread that reads the whole word must come after
 * both. */
template <bool bug> __global__ void words_and_halves(int *out)
{
    typedef uint32_t word __attribute__((may_alias));
    __shared__ __align__(4) uint16_t x[2 * N];
    int t = threadIdx.x;
    ((word *)x)[t] = 0;
    __syncthreads();
    x[2 * t + 1] = (uint16_t)t;
    x[2 * (t ^ 1)] = (uint16_t)t;
    if (!bug) __syncthreads();
    out[t] = (int)((word *)x)[(t + N - 32) % N]; /* BUG(words_and_halves) */
}

template <bool bug> __global__ void half_of_a_word(int *out)
{
    typedef uint32_t word __attribute__((may_alias));
    __shared__ __align__(4) uint16_t x[2 * N];
    int t = threadIdx.x;
    ((word *)x)[t] = 7;
    __syncthreads();
    x[2 * t + 1] = (uint16_t)(x[2 * t + 1] + t);
    if (!bug) __syncthreads();
    out[t] = (int)((word *)x)[(t + N - 32) % N]; /* BUG(half_of_a_word) */
}

template <bool bug> __global__ void half_after_word(int *out)
{
    typedef uint32_t word __attribute__((may_alias));
    __shared__ __align__(4) uint16_t x[2 * N];
    int t = threadIdx.x;
    ((word *)x)[t] = 7;
    __syncthreads();
    ((word *)x)[(t + 32) % N] = 8;
    if (!bug) __syncthreads();
    out[t] = x[2 * t + 1]; /* BUG(half_after_word) */
}

/* Lane 0 waits for lane 30 only, but other lanes have read too before it writes. */
template <bool bug> __global__ void partial_warp_barrier(float *out)
{
    __shared__ float x;
    int t = threadIdx.x;
    x = 1;
    __syncwarp();
    if (t < 31) out[t] = x;
    unsigned half = t % 30 ? 0xBFFFFFFE : 0x40000001;
    __syncwarp(bug ? half : 0xFFFFFFFF);
    if (t == 0) x = 2; /* BUG(partial_warp_barrier) */
}

/* Three threads read x: two of the last warp, which __syncwarp then orders before the write, and
 * one of another warp. Two barriers change the order of threads so that those two come first. */
template <bool bug> __global__ void far_reader(float *out)
{
    __shared__ float x;
    int t = threadIdx.x;
    if (t == 0) x = 1;
    __syncthreads();
    __syncthreads();
    if (t == 5 || t >= N - 2) out[t] = x;
    __syncwarp();
    if (!bug) __syncthreads();
    if (t == N - 2) x = 2; /* BUG(far_reader) */
}

/* ---- Races in global memory ------------------------------------------------------------------ */

template <bool bug> __global__ void sum_over_blocks(float *out)
{
    if (threadIdx.x) return;
    if (bug) out[0] += blockIdx.x + 1; /* BUG(sum_over_blocks) */
    else atomicAdd(out, (float)blockIdx.x + 1);
}

template <bool bug> __global__ void other_blocks_result(float *out)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = i; /* BUG(other_blocks_result) */
    __syncthreads();
    int other = bug ? (i + N) % (int)(gridDim.x * N) : blockIdx.x * N + (i + 1) % N;
    out[gridDim.x * N + i] = out[other];
}

/* Rows overlap: each block writes one number too many, the first of its neighbour's row. */
template <bool bug> __global__ void rows_overlap(float *out)
{
    int width = N + bug;
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        out[blockIdx.x * N + i] = blockIdx.x; /* BUG(rows_overlap) */
}

/* The last block to arrive adds up all blocks' sums. */
template <int fences> __global__ void last_block(float *part, int *counter, float *out)
{
    __shared__ int last;
    if (threadIdx.x == 0) {
        part[blockIdx.x] = blockIdx.x;
        if (fences == 2 || (fences == 1 && blockIdx.x != 1)) __threadfence();
        last = atomicAdd(counter, 1) == (int)gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        float sum = 0;
        for (unsigned i = 0; i < gridDim.x; i++)
            sum += part[i]; /* BUG(fence_missing) BUG(fence_in_a_branch) */
        *out = sum;
    }
}

template <bool bug> __global__ void atomic_and_plain(int *counter, int *out)
{
    atomicAdd(counter, 1); /* BUG(atomic_and_plain) */
    if (!bug) __syncthreads();
    if (threadIdx.x == 5) *out = *counter;
}

/* ---- Bounds, alignment, overflow ------------------------------------------------------------- */

template <bool bug> __global__ void off_by_one(float *out, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (bug ? i <= n : i < n) out[i] = i; /* BUG(off_by_one) */
}
template <bool bug> __global__ void before_the_start(float *out, const float *x, int n)
{
    int i = threadIdx.x;
    if (i < n) out[i] = bug || i > 0 ? x[i - 1] : 0; /* BUG(before_the_start) */
}
template <bool bug> __global__ void far_outside(float *out, int n)
{
    int i = threadIdx.x;
    if (bug || i < n) out[i * 1000] = i; /* BUG(far_outside) */
}
template <bool bug> __global__ void static_shared(float *out)
{
    __shared__ float x[N];
    int t = threadIdx.x;
    x[bug ? t + 1 : t] = t; /* BUG(static_shared) */
    __syncthreads();
    out[t] = x[t];
}
template <bool bug> __global__ void shared_by_pointer(float *out)
{
    __shared__ float x[N], y[N];
    float *p = x;
    int t = threadIdx.x;
    y[t] = 0;
    p[bug ? t + 1 : t] = t; /* BUG(shared_by_pointer) */
    __syncthreads();
    out[t] = x[t] + y[t];
}
template <bool bug> __global__ void dynamic_too_small(float *out)
{
    extern __shared__ float x[];
    int t = threadIdx.x;
    x[t] = t; /* BUG(dynamic_too_small) */
    __syncthreads();
    out[t] = x[N - 1 - t];
}
template <bool bug> __global__ void misaligned(float4 *out, const float *x)
{
    out[threadIdx.x] = *(const float4 *)(x + 4 * threadIdx.x + (bug ? 1 : 0)); /* BUG(misaligned) */
}
template <bool bug> __global__ void row_misaligned(uint32_t *out)
{
    __shared__ __align__(16) uint16_t x[32][8 + (bug ? 4 : 8)]; /* rows of 24 or 32 bytes */
    int l = threadIdx.x;
    for (int i = 0; i < 8; i++) x[l][i] = (uint16_t)i;
    __syncwarp();
    uint32_t r[4];
    ldmatrix_x4(r, x[l]); /* BUG(row_misaligned) */
    out[l] = r[0];
}
template <bool bug> __global__ void int_overflow(float *out, int big)
{
    int row = 1 << 20;
    if (bug) out[(row * big) & 127] = 1; /* BUG(int_overflow) */
    else out[((size_t)row * big) & 127] = 1;
}

/* ---- Uninitialised memory -------------------------------------------------------------------- */

template <bool bug> __global__ void shared_unwritten(float *out)
{
    __shared__ float x[N];
    int t = threadIdx.x;
    if (!bug || t % 2) x[t] = t;
    __syncthreads();
    out[t] = x[t] + 1; /* BUG(shared_unwritten) */
}
template <bool bug> __global__ void shared_does_not_stay(float *out)
{
    __shared__ float x[N];
    int t = threadIdx.x;
    if (!bug || blockIdx.x == 0) x[t] = t;
    __syncthreads();
    out[blockIdx.x * N + t] = x[t]; /* BUG(shared_does_not_stay) */
}
__global__ void add_one(float *x) { x[threadIdx.x] += 1; /* BUG(global_unwritten) */ }
__global__ void fill(float *x, float v)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    x[i] = v; /* BUG(ranks_unordered) BUG(default_stream_does_not_wait) */
}
__global__ void copy_to(float *to, const float *from)
{
    to[threadIdx.x] = from[threadIdx.x]; /* BUG(event_missing) BUG(waited_before_record) */
}

/* ---- Warps and barriers ---------------------------------------------------------------------- */

template <bool bug> __global__ void mask_without_lane(int *out)
{
    unsigned mask = bug ? 0x0000FFFF : 0xFFFFFFFF;
    out[threadIdx.x] = __shfl_xor_sync(mask, (int)threadIdx.x, 1); /* BUG(mask_without_lane) */
}
template <bool bug> __global__ void shuffle_in_branch(int *out)
{
    int t = threadIdx.x, v = t;
    if (t < 16)
        v = __shfl_xor_sync(bug ? 0xFFFFFFFF : 0x0000FFFF, v, 1); /* BUG(shuffle_in_branch) */
    __syncthreads();
    out[t] = v;
}
template <bool bug> __global__ void absent_source(int *out)
{
    int t = threadIdx.x, v = t;
    if (t < 16) v = __shfl_xor_sync(0x0000FFFF, v, bug ? 16 : 8); /* BUG(absent_source) */
    out[t] = v;
}
template <bool bug> __global__ void divergent_barrier(float *out)
{
    int t = threadIdx.x;
    if (bug ? t < N / 2 : t < N) __syncthreads(); /* BUG(divergent_barrier) */
    out[t] = t;
}
template <bool bug> __global__ void early_return(float *out, int n)
{
    int t = threadIdx.x;
    if (bug && t >= n) return;
    if (t < n) out[t] = t;
    __syncthreads(); /* BUG(early_return) */
    if (t < n) out[t] += 1;
}
template <bool bug> __global__ void half_a_warp_multiplies(float *out)
{
    float d[4] = {};
    uint32_t a[4] = {}, b[2] = {};
    if (!bug || threadIdx.x < 16)
        mma_m16n8k16<__nv_bfloat16>(d, a, b); /* BUG(half_a_warp_multiplies) */
    out[threadIdx.x] = d[0];
}

/* ---- cp.async -------------------------------------------------------------------------------- */

template <bool bug> __global__ void wait_missing(float *out, const float *in)
{
    __shared__ __align__(16) float x[4 * N];
    int t = threadIdx.x;
    cp_async_16(&x[4 * t], &in[4 * t]);
    cp_async_commit();
    if (!bug) cp_async_wait<0>();
    out[t] = x[4 * t]; /* BUG(wait_missing) */
}
template <bool bug> __global__ void wait_too_weak(float *out, const float *in)
{
    __shared__ __align__(16) float x[2][4 * N];
    int t = threadIdx.x;
    for (int i = 0; i < 2; i++) {
        cp_async_16(&x[i][4 * t], &in[4 * (i * N + t)]);
        cp_async_commit();
    }
    cp_async_wait<bug ? 1 : 0>();
    out[t] = x[0][4 * t] + x[1][4 * t]; /* BUG(wait_too_weak) */
}
template <bool bug> __global__ void barrier_after_wait(float *out, const float *in)
{
    __shared__ __align__(16) float x[4 * N];
    int t = threadIdx.x;
    cp_async_16(&x[4 * t], &in[4 * t]);
    cp_async_commit();
    cp_async_wait<0>();
    if (!bug) __syncthreads();
    out[t] = x[4 * (N - 1 - t)]; /* BUG(barrier_after_wait) */
}
/* The next tile is copied into the buffer while other threads still read it. */
template <bool bug> __global__ void refilled_too_soon(float *out, const float *in)
{
    __shared__ __align__(16) float x[4 * N];
    int t = threadIdx.x;
    float sum = 0;
    for (int i = 0; i < 2; i++) {
        cp_async_16(&x[4 * t], &in[4 * (i * N + t)]);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        sum += x[4 * (N - 1 - t)]; /* BUG(refilled_too_soon) */
        if (!bug) __syncthreads();
    }
    out[t] = sum;
}

template <bool bug> __global__ void row_copied_beyond(float *out, const float *in, int n)
{
    __shared__ __align__(16) float x[4 * N];
    int t = threadIdx.x;
    cp_async_16(&x[4 * t], &in[4 * t], bug || t < n); /* BUG(row_copied_beyond) */
    cp_async_commit();
    cp_async_wait<0>();
    out[t] = x[4 * t];
}

/* ---- The host's side ------------------------------------------------------------------------- */

__global__ void read_pointer(float *out, const float *p)
{
    int t = threadIdx.x;
    out[t] = p[t]; /* BUG(host_pointer) BUG(null_pointer) BUG(no_peer_access) BUG(use_after_free) */
}

static float *device_floats(size_t n, float v = 0) /* filled */
{
    float *p;
    std::vector<float> h(n, v);
    cudaMalloc(&p, n * sizeof(float));
    cudaMemcpy(p, h.data(), n * sizeof(float), cudaMemcpyHostToDevice);
    return p;
}
static float host_floats[1024];

struct Bug {
    const char *name, *kind; /* the first line of the report contains the kind */
    void (*run)(bool bug);
};

#define RUN(kernel, grid, block, ...)                                                              \
    do {                                                                                           \
        if (bug) kernel<true><<<grid, block>>>(__VA_ARGS__);                                       \
        else kernel<false><<<grid, block>>>(__VA_ARGS__);                                          \
    } while (0)

/* a (8,8) b (8,8). Either a was never written, or its columns are so far apart that the last lies
 * outside. */
static void product(bool bug, bool unwritten)
{
    float one = 1, zero = 0, *a = device_floats(64), *b = device_floats(64), *c = device_floats(64);
    float *fresh;
    cudaMalloc(&fresh, 64 * sizeof(float));
    cublasHandle_t h;
    cublasCreate(&h);
    auto op = CUBLAS_OP_N;
    if (bug && unwritten) a = fresh;
    int lda = bug && !unwritten ? 9 : 8;
    cublasSgemm(h, op, op, 8, 8, 8, &one, a, lda, /* BUG(factor_unwritten) BUG(factor_too_small) */
                b, 8, &zero, c, 8);
}

static void two_streams(bool event)
{
    cudaStream_t a, b;
    cudaEvent_t e;
    cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&e, cudaEventDisableTiming);
    float *x = device_floats(N), *y = device_floats(N);
    fill<<<1, N, 0, a>>>(x, 1);
    cudaEventRecord(e, a);
    if (event) cudaStreamWaitEvent(b, e, 0);
    copy_to<<<1, N, 0, b>>>(y, x);
    cudaStreamSynchronize(a);
    cudaStreamSynchronize(b);
}

static const Bug bugs[] = {
    {"barrier_missing", "[race]", [](bool bug) { RUN(barrier_missing, 1, N, device_floats(N)); }},
    {"read_before_written", "[uninitialised]",
     [](bool bug) { RUN(read_before_written, 1, N, device_floats(N)); }},
    {"second_barrier", "[race]", [](bool bug) { RUN(second_barrier, 1, N, device_floats(3 * N)); }},
    {"overwritten_too_soon", "[race]",
     [](bool bug) { RUN(overwritten_too_soon, 1, N, device_floats(N)); }},
    {"warp_barrier_missing", "[race]",
     [](bool bug) { RUN(warp_barrier_missing, 1, N, device_floats(N)); }},
    {"shuffle_is_no_barrier", "[race]",
     [](bool bug) { RUN(shuffle_is_no_barrier, 1, N, device_floats(N)); }},
    {"warp_for_block_barrier", "[race]",
     [](bool bug) { RUN(warp_for_block_barrier, 1, N, device_floats(N)); }},
    {"half_words", "[race]", [](bool bug) { RUN(half_words, 1, N, (__half *)device_floats(N)); }},
    {"words_and_halves", "[race]",
     [](bool bug) { RUN(words_and_halves, 1, N, (int *)device_floats(N)); }},
    {"half_of_a_word", "[race]",
     [](bool bug) { RUN(half_of_a_word, 1, N, (int *)device_floats(N)); }},
    {"half_after_word", "[race]",
     [](bool bug) { RUN(half_after_word, 1, N, (int *)device_floats(N)); }},
    {"partial_warp_barrier", "[race]",
     [](bool bug) { RUN(partial_warp_barrier, 1, 32, device_floats(32)); }},
    {"far_reader", "[race]", [](bool bug) { RUN(far_reader, 1, N, device_floats(N)); }},
    {"scan", "[race]", [](bool bug) { RUN(scan, 1, 32, device_floats(32)); }},
    {"sum_over_blocks", "[race]", [](bool bug) { RUN(sum_over_blocks, 4, 32, device_floats(1)); }},
    {"other_blocks_result", "[race]",
     [](bool bug) { RUN(other_blocks_result, 3, N, device_floats(6 * N)); }},
    {"rows_overlap", "[race]", [](bool bug) { RUN(rows_overlap, 3, N, device_floats(4 * N)); }},
    {"fence_missing", "[race]",
     [](bool bug) {
         float *part = device_floats(5), *out = device_floats(1);
         int *counter = (int *)device_floats(1);
         if (bug) last_block<0><<<5, 32>>>(part, counter, out);
         else last_block<2><<<5, 32>>>(part, counter, out);
     }},
    {"fence_in_a_branch", "[race]", /* one block does not take the branch */
     [](bool bug) {
         float *part = device_floats(5), *out = device_floats(1);
         int *counter = (int *)device_floats(1);
         if (bug) last_block<1><<<5, 32>>>(part, counter, out);
         else last_block<2><<<5, 32>>>(part, counter, out);
     }},
    {"atomic_and_plain", "[race]",
     [](bool bug) {
         RUN(atomic_and_plain, 1, N, (int *)device_floats(1), (int *)device_floats(1));
     }},
    {"off_by_one", "[bounds]", [](bool bug) { RUN(off_by_one, 1, N, device_floats(100), 100); }},
    {"before_the_start", "[bounds]",
     [](bool bug) { RUN(before_the_start, 1, N, device_floats(N), device_floats(N), N); }},
    {"far_outside", "[bounds]",
     [](bool bug) { RUN(far_outside, 1, N, device_floats(1 << 16), 64); }},
    {"static_shared", "[bounds]", [](bool bug) { RUN(static_shared, 1, N, device_floats(N)); }},
    {"shared_by_pointer", "[bounds]",
     [](bool bug) { RUN(shared_by_pointer, 1, N, device_floats(N)); }},
    {"dynamic_too_small", "[bounds]",
     [](bool bug) {
         dynamic_too_small<false><<<1, N, (N - bug) * sizeof(float)>>>(device_floats(N));
     }},
#ifndef __clang__ /* clang copies structures without a check of their alignment */
    {"misaligned", "[misaligned]",
     [](bool bug) { RUN(misaligned, 1, 32, (float4 *)device_floats(128), device_floats(132)); }},
#endif
    {"row_misaligned", "must be a multiple of 16",
     [](bool bug) { RUN(row_misaligned, 1, 32, (uint32_t *)device_floats(32)); }},
    {"int_overflow", "[overflow]",
     [](bool bug) { RUN(int_overflow, 1, 1, device_floats(128), 4096); }},
    {"shared_unwritten", "[uninitialised]",
     [](bool bug) { RUN(shared_unwritten, 1, N, device_floats(N)); }},
    {"shared_does_not_stay", "[uninitialised]",
     [](bool bug) { RUN(shared_does_not_stay, 2, N, device_floats(2 * N)); }},
    {"global_unwritten", "[uninitialised]",
     [](bool bug) {
         float *x;
         cudaMalloc(&x, N * sizeof(float));
         if (!bug) cudaMemset(x, 0, N * sizeof(float));
         add_one<<<1, N>>>(x);
     }},
    {"unwritten_copied", "[uninitialised]", /* a copy of unwritten memory is unwritten as well */
     [](bool bug) {
         float *x, *y = device_floats(N);
         cudaMalloc(&x, N * sizeof(float));
         if (!bug) cudaMemset(x, 0, N * sizeof(float));
         cudaMemcpy(y, x, N * sizeof(float), cudaMemcpyDeviceToDevice);
         add_one<<<1, N>>>(y);
     }},
    {"mask_without_lane", "does not hold the calling lane",
     [](bool bug) { RUN(mask_without_lane, 1, 32, (int *)device_floats(32)); }},
    {"shuffle_in_branch", "never come",
     [](bool bug) { RUN(shuffle_in_branch, 1, 32, (int *)device_floats(32)); }},
    {"absent_source", "takes no part",
     [](bool bug) { RUN(absent_source, 1, 32, (int *)device_floats(32)); }},
    {"divergent_barrier", "divergent __syncthreads",
     [](bool bug) { RUN(divergent_barrier, 1, N, device_floats(N)); }},
    {"early_return", "divergent __syncthreads",
     [](bool bug) { RUN(early_return, 1, N, device_floats(N), 100); }},
    {"half_a_warp_multiplies", "needs all 32 lanes",
     [](bool bug) { RUN(half_a_warp_multiplies, 1, 32, device_floats(32)); }},
    {"wait_missing", "[cp.async]",
     [](bool bug) { RUN(wait_missing, 1, N, device_floats(N), device_floats(4 * N)); }},
    {"wait_too_weak", "[cp.async]",
     [](bool bug) { RUN(wait_too_weak, 1, N, device_floats(N), device_floats(8 * N)); }},
    {"barrier_after_wait", "[uninitialised]",
     [](bool bug) { RUN(barrier_after_wait, 1, N, device_floats(N), device_floats(4 * N)); }},
    {"refilled_too_soon", "[race]",
     [](bool bug) { RUN(refilled_too_soon, 1, N, device_floats(N), device_floats(8 * N)); }},
    {"row_copied_beyond", "[bounds]",
     [](bool bug) { RUN(row_copied_beyond, 1, N, device_floats(N), device_floats(4 * 100), 100); }},
    {"too_many_threads", "may have 1 to 1024",
     [](bool bug) {
         float *x = device_floats(2048);
         fill<<<1, bug ? 1025 : 1024>>>(x, 1); /* BUG(too_many_threads) */
     }},
    {"much_dynamic_shared", "cudaFuncSetAttribute",
     [](bool bug) {
         if (!bug)
             cudaFuncSetAttribute(dynamic_too_small<false>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, 65536);
         float *x = device_floats(N);
         dynamic_too_small<false><<<1, N, 65536>>>(x); /* BUG(much_dynamic_shared) */
     }},
    {"copy_too_long", "pass the end",
     [](bool bug) {
         float *x = device_floats(N);
         size_t size = (N + bug) * sizeof(float);
         cudaMemcpy(host_floats, x, size, cudaMemcpyDeviceToHost); /* BUG(copy_too_long) */
     }},
    {"copy_wrong_way", "is device memory",
     [](bool bug) {
         float *x = device_floats(N);
         auto kind = bug ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
         cudaMemcpy(x, host_floats, N * sizeof(float), kind); /* BUG(copy_wrong_way) */
     }},
    {"host_pointer", "[host-memory]",
     [](bool bug) {
         std::vector<float> h(N);
         float *x = device_floats(N);
         read_pointer<<<1, N>>>(device_floats(N), bug ? h.data() : x);
         cudaDeviceSynchronize();
     }},
    {"null_pointer", "[host-memory]",
     [](bool bug) { read_pointer<<<1, N>>>(device_floats(N), bug ? nullptr : device_floats(N)); }},
    {"device_pointer_on_host", "[device-memory]",
     [](bool bug) {
         float *x = device_floats(N), *h = host_floats;
         h[0] = *(bug ? x : h + 1); /* BUG(device_pointer_on_host) */
     }},
    {"no_peer_access", "[peer]",
     [](bool bug) {
         cudaSetDevice(1);
         float *x = device_floats(N, 1);
         cudaSetDevice(0);
         if (!bug) cudaDeviceEnablePeerAccess(1, 0);
         read_pointer<<<1, N>>>(device_floats(N), x);
     }},
    {"use_after_free", "[use-after-free]",
     [](bool bug) {
         float *x = device_floats(N), *y = device_floats(N);
         if (bug) cudaFree(x);
         read_pointer<<<1, N>>>(y, x);
         if (!bug) cudaFree(x);
     }},
    {"freed_twice", "freed already",
     [](bool bug) {
         float *x = device_floats(N);
         cudaFree(x);
         if (bug) cudaFree(x); /* BUG(freed_twice) */
     }},
    {"factor_unwritten", "[uninitialised]", [](bool bug) { product(bug, true); }},
    {"factor_too_small", "pass the end", [](bool bug) { product(bug, false); }},
    {"event_missing", "[stream-order]", [](bool bug) { two_streams(!bug); }},
    {"waited_before_record", "[stream-order]",
     [](bool bug) {
         cudaStream_t a, b;
         cudaEvent_t e;
         cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking);
         cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking);
         cudaEventCreate(&e);
         float *x = device_floats(N), *y = device_floats(N);
         cudaEventRecord(e, a);
         if (bug) cudaStreamWaitEvent(b, e, 0); /* this means the record above, not the one below */
         fill<<<1, N, 0, a>>>(x, 1);
         cudaEventRecord(e, a);
         if (!bug) cudaStreamWaitEvent(b, e, 0);
         copy_to<<<1, N, 0, b>>>(y, x);
     }},
    {"ranks_unordered", "[stream-order]", /* the same on two devices, as ranks do it */
     [](bool bug) {
         cudaStream_t s[2];
         cudaEvent_t e[2];
         float *x[2];
         for (int r = 0; r < 2; r++) {
             cudaSetDevice(r);
             cudaDeviceEnablePeerAccess(1 - r, 0);
             cudaStreamCreateWithFlags(&s[r], cudaStreamNonBlocking);
             cudaEventCreate(&e[r]);
             x[r] = device_floats(2 * N);
         }
         for (int r = 0; r < 2; r++) {
             cudaSetDevice(r);
             fill<<<1, N, 0, s[r]>>>(x[r], r);
             cudaEventRecord(e[r], s[r]);
         }
         for (int r = 0; r < 2; r++) {
             cudaSetDevice(r);
             if (!bug) cudaStreamWaitEvent(s[r], e[1 - r], 0);
             copy_to<<<1, N, 0, s[r]>>>(x[r] + N, x[1 - r]);
         }
     }},
    {"default_stream_does_not_wait",
     "[stream-order]", /* a copy in the default stream, which does not wait for s */
     [](bool bug) {
         cudaStream_t s;
         cudaStreamCreateWithFlags(&s, bug ? cudaStreamNonBlocking : cudaStreamDefault);
         float *x = device_floats(N);
         fill<<<1, N, 0, s>>>(x, 1);
         cudaMemcpy(host_floats, x, N * sizeof(float), cudaMemcpyDeviceToHost);
     }},
    {"host_does_not_wait", "[stream-order]",
     [](bool bug) {
         cudaStream_t s;
         cudaStreamCreate(&s);
         float *x = device_floats(N, 3), *h;
         cudaMallocHost(&h, N * sizeof(float));
         cudaMemcpyAsync(h, x, N * sizeof(float), cudaMemcpyDeviceToHost, s);
         if (!bug) cudaStreamSynchronize(s);
         host_floats[0] = h[5]; /* BUG(host_does_not_wait) */
     }},
    {"source_changed", "[stream-order]",
     [](bool bug) {
         cudaStream_t s;
         cudaStreamCreate(&s);
         float *x = device_floats(N), *h;
         cudaMallocHost(&h, N * sizeof(float));
         for (int i = 0; i < N; i++) h[i] = 1;
         cudaMemcpyAsync(x, h, N * sizeof(float), cudaMemcpyHostToDevice, s);
         if (!bug) cudaStreamSynchronize(s);
         h[7] = 2; /* BUG(source_changed) */
     }},
};

/* ---- The driver ------------------------------------------------------------------------------ */

/* The line of planted.cu that is marked BUG(name), or 0. */
static int marked_line(const char *name)
{
    static std::vector<char> source;
    if (source.empty()) {
        FILE *f = fopen("planted.cu", "r");
        if (!f) f = fopen(__FILE__, "r");
        if (!f) {
            fprintf(stderr, "planted: run it where planted.cu is\n");
            exit(2);
        }
        for (int c; (c = fgetc(f)) != EOF;) source.push_back((char)c);
        source.push_back(0);
        fclose(f);
    }
    char mark[100];
    snprintf(mark, sizeof mark, "BUG(%s)", name);
    const char *at = strstr(source.data(), mark);
    int line = 1;
    for (const char *c = source.data(); at && c < at; c++) line += *c == '\n';
    return at ? line : 0;
}

/* Runs one bug in a process of its own; its output goes to text. Returns the wait status. */
static int run_apart(const Bug &b, bool bug, char *text, size_t size)
{
    int ends[2], status = 0;
    size_t n = 0;
    if (pipe(ends)) exit(2);
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        dup2(ends[1], 2);
        close(ends[1]);
        b.run(bug);
        cudaSetDevice(0);
        cudaDeviceSynchronize();
        cudaSetDevice(1);
        cudaDeviceSynchronize();
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t got = 1; n < size - 1 && got > 0;) {
        got = read(ends[0], text + n, size - 1 - n);
        if (got > 0) n += (size_t)got;
    }
    text[n] = 0;
    close(ends[0]);
    waitpid(child, &status, 0);
    return status;
}

int main(int argc, char **argv)
{
    int wrong = 0, count = 0;
    setenv("CUDAEMU_DEVICES", "2", 1);
    for (const Bug &b : bugs) {
        char text[8192], line[100];
        count++;
        if (argc > 1) {
            if (strcmp(argv[1], b.name)) continue;
            run_apart(b, argc == 2, text, sizeof text);
            fputs(text, stdout);
            return 0;
        }
        int status = run_apart(b, true, text, sizeof text), at = marked_line(b.name);
        snprintf(line, sizeof line, ":%d", at);
        const char *place = at ? strstr(text, line) : text, *other = strstr(text, "    against ");
        if (other && place > other)
            place = nullptr; /* the mark must be at the access that shows the bug */
        bool caught =
            WIFEXITED(status) && WEXITSTATUS(status) == 1 && strstr(text, b.kind) && place;
        if (!caught)
            fprintf(stderr, "%s: expected \"%s\" at line %d, got status %x:\n%s", b.name, b.kind,
                    at, status, text);
        status = run_apart(b, false, text, sizeof text);
        if (status)
            fprintf(stderr, "%s: its twin without the bug is reported, status %x:\n%s", b.name,
                    status, text);
        wrong += !caught || status;
        printf("%-28s %s, twin %s\n", b.name, caught ? "reported" : "MISSED",
               status ? "REPORTED" : "silent");
    }
    printf("%d planted bugs, %d not as they must be\n", count, wrong);
    return wrong != 0;
}
