/* megatron_gpt2.cu - megatron_gpt2.c on NVIDIA GPUs: its operators, function for function.
 *
 *     nvcc -O3 -arch=native megatron_gpt2.cu -o megatron_gpt2_cuda -lcublas -lcublasLt
 *                          the program with all its commands, in float
 *     .. -DPRECISION_BF16  mixed precision [§4.2]: weights, activations and their gradients in 16
 *     .. -DPRECISION_FP16  bits, but float master weights, moments, softmax, LayerNorm and sums
 *     .. -DPRECISION_TF32  float, but products with 10-bit mantissas on tensor cores
 *
 * Everything else is compiled from megatron_gpt2.c as it stands. On a machine without a GPU
 * dev/cudaemu runs these very kernels on the CPU, and test_gpt2.c compares their results with those
 * of the .c.
 *
 * Ranks are threads of one process: rank r works on GPU r mod their number, in a stream of its own.
 * An operator works in its own rank's memory; only reduce_slice and device_copy also reach into the
 * memory of other ranks, between the barriers of a collective. cuBLAS makes matrix products, with
 * bias and GeLU in their epilogues; kernels below do everything else.
 *
 * Every run repeats bit for bit: no kernel adds with atomics, and sums have an order that depends
 * on shapes alone. */

#ifdef __CUDACC__
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define HOST_DEVICE __host__ __device__
#else
#include "dev/cudaemu/cudaemu.h"
#endif

#ifdef PRECISION_BF16
#define ACT_TYPE __nv_bfloat16
static const cudaDataType CUDA_ACT = CUDA_R_16BF;
#elif defined PRECISION_FP16
#define ACT_TYPE __half
#define LOSS_SCALE "0" /* dynamic: small gradients would be lost */
static const cudaDataType CUDA_ACT = CUDA_R_16F;
#else
static const cudaDataType CUDA_ACT = CUDA_R_32F;
#endif
#ifdef PRECISION_TF32
static const cublasComputeType_t COMPUTE_TYPE = CUBLAS_COMPUTE_32F_FAST_TF32;
#else
static const cublasComputeType_t COMPUTE_TYPE = CUBLAS_COMPUTE_32F;
#endif

#ifndef PROGRAM
#define PROGRAM "megatron_gpt2_cuda"
#endif
#define OTHER_OPERATORS /* megatron_gpt2.c leaves out its own: they follow below */
#include "megatron_gpt2.c"

/* =================================================================================================
 * Chapters 4 and 11 for the GPU: how the operators of chapter 1 do it, products, memory
 * =================================================================================================
 *
 * Each operator does the same as its namesake in megatron_gpt2.c, which explains the arguments. It
 * puts work into the rank's stream and returns at once; only a function that hands numbers to the
 * host waits. A kernel has its operator's name with _kernel at the end, and a comment says which
 * thread works on which numbers.
 *
 * A thread reads 16 bytes at a time where the length and the address of rows allow it. Such kernels
 * have a parameter W, how many numbers a thread takes at once: WIDE, or 1 for rows of any
 * length. */

enum { WARP = 32, WIDE = 16 / sizeof(act), FULL_PRECISION = sizeof(act) == sizeof(real) };

template <typename T> static inline __host__ __device__ real to_real(T x) { return (real)x; }
static inline __host__ __device__ act to_act(real x) { return (act)x; }

/* ---- The device and its errors --------------------------------------------------------------- */

#define CUDA_CHECK(call) check_cuda(call, __LINE__)
static void check_cuda(cudaError_t error, int line)
{
    if (error != cudaSuccess)
        die("CUDA: %s (megatron_gpt2.cu, line %d)", cudaGetErrorString(error), line);
}

#define CUBLAS_CHECK(call) check_cublas(call, __LINE__)
static void check_cublas(cublasStatus_t status, int line)
{
    if (status != CUBLAS_STATUS_SUCCESS)
        die("cuBLAS: %s (megatron_gpt2.cu, line %d)", cublasGetStatusString(status), line);
}

/* What decides how a matrix product is computed. Products that are equal in all this share a
 * plan. */
typedef struct {
    size_t M, N, K;
    cublasLtEpilogue_t epilogue;
    int a_transposed, b_transposed;
    uint32_t alignment;                     /* of the matrices' addresses, bytes */
    uint32_t bias_alignment, aux_alignment; /* of the epilogue's addresses */
} Product;
static_assert(sizeof(Product) == 3 * sizeof(size_t) + 6 * 4,
              "it is compared byte by byte: no padding");

typedef struct {
    Product product;
    int possible; /* cuBLASLt offers an algorithm */
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
    size_t workspace; /* bytes */
} ProductPlan;

enum { PLANS = 64 };

/* What one rank, which is a thread, holds of its GPU. */
struct Gpu {
    int selected, device;
    cudaStream_t stream;
    cublasLtHandle_t lt;
    cublasHandle_t blas; /* only where cuBLASLt refused something */
    void *workspace;
    size_t workspace_bytes;
    ProductPlan plan[PLANS];
    size_t plans; /* made so far; the next one goes to plan[plans % PLANS] */
    ~Gpu();
};
static thread_local Gpu this_gpu;

static void plan_free(ProductPlan *p)
{
    cublasLtMatmulDescDestroy(p->desc);
    cublasLtMatrixLayoutDestroy(p->a);
    cublasLtMatrixLayoutDestroy(p->b);
    cublasLtMatrixLayoutDestroy(p->c);
}

Gpu::~Gpu() /* when the rank's thread ends */
{
    if (!selected) return;
    cudaStreamSynchronize(stream);
    for (size_t i = 0; i < min_size(plans, PLANS); i++) plan_free(&plan[i]);
    if (blas) cublasDestroy(blas);
    cublasLtDestroy(lt);
    cudaFree(workspace);
    cudaStreamDestroy(stream);
}

static const char *device_kind(void) { return "GPUs"; }

/* How many GPUs there are; dies if there are none. */
static int device_count(void)
{
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count < 1)
        die("no NVIDIA GPU was found (%s): megatron_gpt2, built by `make`, runs on the CPU",
            error == cudaSuccess ? "there are none" : cudaGetErrorString(error));
    return count;
}

/* Gives this thread its GPU: rank r gets number r mod count. Every GPU in use must reach the memory
 * of the others. */
static void device_select(int rank, int ranks)
{
    Gpu *g = &this_gpu;
    const int count = device_count(), used = ranks < count ? ranks : count;
    if (g->selected) return;
    g->device = rank % count;
    CUDA_CHECK(cudaSetDevice(g->device));
    for (int other = 0; other < used; other++) {
        int possible = 0;
        if (other == g->device) continue;
        CUDA_CHECK(cudaDeviceCanAccessPeer(&possible, g->device, other));
        if (!possible)
            die("GPU %d cannot reach into the memory of GPU %d: choose others by "
                "CUDA_VISIBLE_DEVICES, or only one",
                g->device, other);
        cudaError_t error = cudaDeviceEnablePeerAccess(other, 0);
        if (error == cudaErrorPeerAccessAlreadyEnabled)
            cudaGetLastError(); /* another rank on this GPU did it: no error */
        else CUDA_CHECK(error);
    }
    CUDA_CHECK(cudaStreamCreateWithFlags(&g->stream, cudaStreamNonBlocking));
    CUBLAS_CHECK(cublasLtCreate(&g->lt));
    g->selected = 1;
}

/* This thread's GPU. It is the first one if nobody has selected another. */
static Gpu *gpu(void)
{
    if (!this_gpu.selected) device_select(0, 1);
    return &this_gpu;
}

/* Starts a kernel in the rank's stream and checks for errors. All kernels start here. `bytes`:
 * dynamic shared memory. */
#define LAUNCH_SHARED(kernel, grid, block, bytes, ...)                                             \
    do {                                                                                           \
        kernel<<<grid, block, bytes, gpu()->stream>>>(__VA_ARGS__);                                \
        CUDA_CHECK(cudaGetLastError());                                                            \
    } while (0)
#define LAUNCH(kernel, grid, block, ...) LAUNCH_SHARED(kernel, grid, block, 0, __VA_ARGS__)

/* Starts a kernel that has a block for each of N rows of C numbers. A thread takes W neighbouring
 * columns out of each blockDim W. */
#define LAUNCH_ROWS(kernel, by_packs, N, C, ...)                                                   \
    do {                                                                                           \
        if (by_packs) LAUNCH(kernel<WIDE>, blocks(N, 1), row_threads(C, WIDE), __VA_ARGS__);       \
        else LAUNCH(kernel<1>, blocks(N, 1), row_threads(C, 1), __VA_ARGS__);                      \
    } while (0)

/* How many blocks n things need, `each` things a block, for a grid's x dimension. */
static unsigned blocks(size_t n, size_t each)
{
    const size_t count = ceil_div(n, each);
    if (count > INT_MAX)
        die("a kernel of %zu blocks: at most %d are possible; try a smaller batch", count, INT_MAX);
    return (unsigned)count;
}

/* ---- Memory ---------------------------------------------------------------------------------- */

static void device_synchronize(void) { CUDA_CHECK(cudaStreamSynchronize(gpu()->stream)); }
static void device_zero(void *p, size_t bytes)
{
    CUDA_CHECK(cudaMemsetAsync(p, 0, bytes, gpu()->stream));
}

/* Between arrays of this GPU, or of another. */
static void device_copy(void *to, const void *from, size_t bytes)
{
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, gpu()->stream));
}

static void *device_malloc(size_t bytes)
{
    void *p = NULL;
    size_t left = 0, all = 0;
    gpu();
    cudaError_t error = cudaMalloc(&p, max_size(bytes, 1));
    if (error == cudaErrorMemoryAllocation) {
        cudaMemGetInfo(&left, &all);
        die("out of GPU memory: %.3f GB were asked for, and of %.1f GB on GPU %d %.3f are free; "
            "try a smaller model, "
            "--micro-batch or --seq, or --recompute",
            (double)bytes / 1e9, (double)all / 1e9, gpu()->device, (double)left / 1e9);
    }
    CUDA_CHECK(error);
    return p;
}

static void *device_calloc(size_t bytes)
{
    void *p = device_malloc(bytes);
    device_zero(p, bytes);
    device_synchronize(); /* another rank may use it next */
    return p;
}

static void device_free(void *p)
{
    if (!p) return;
    if (this_gpu.selected)
        device_synchronize(); /* cudaFree itself may not wait for kernels that still use it */
    CUDA_CHECK(cudaFree(p));
}

/* The memory of all GPUs together, in bytes. */
static double device_memory(void)
{
    double total = 0;
    cudaDeviceProp properties;
    for (int i = 0; i < device_count(); i++) {
        CUDA_CHECK(cudaGetDeviceProperties(&properties, i));
        total += (double)properties.totalGlobalMem;
    }
    return total;
}

static void device_upload(void *to, const void *from, size_t bytes)
{
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, gpu()->stream));
    device_synchronize(); /* the caller may change `from` next */
}

static void device_download(void *to, const void *from, size_t bytes)
{
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, gpu()->stream));
    device_synchronize();
}

/* The rank's working space. Its contents last only until the next operator asks for it. It grows to
 * the largest size that was asked for, so later training steps allocate nothing. */
static void *workspace(size_t bytes)
{
    Gpu *g = gpu();
    if (bytes > g->workspace_bytes) {
        device_free(g->workspace);
        g->workspace = NULL, g->workspace_bytes = 0;
        g->workspace = device_malloc(bytes);
        g->workspace_bytes = bytes;
    }
    return g->workspace;
}

/* A thread for each number. */
template <typename To, typename From>
static __global__ void convert_kernel(To *to, const From *from, size_t n)
{
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) to[i] = (To)to_real(from[i]);
}

enum { CONVERT_RUN = 1 << 22 }; /* how many numbers are converted between float and act at a time */

static void act_upload(act *to, const real *from, size_t n)
{
    if (FULL_PRECISION) device_upload(to, from, n * sizeof *from);
    for (size_t i = 0; !FULL_PRECISION && i < n; i += CONVERT_RUN) {
        const size_t count = min_size(n - i, CONVERT_RUN);
        real *space = (real *)workspace(count * sizeof *space);
        device_upload(space, from + i, count * sizeof *space);
        LAUNCH((convert_kernel<act, real>), blocks(count, 256), 256, to + i, space, count);
    }
}

static void act_download(real *to, const act *from, size_t n)
{
    if (FULL_PRECISION) device_download(to, from, n * sizeof *to);
    for (size_t i = 0; !FULL_PRECISION && i < n; i += CONVERT_RUN) {
        const size_t count = min_size(n - i, CONVERT_RUN);
        real *space = (real *)workspace(count * sizeof *space);
        LAUNCH((convert_kernel<real, act>), blocks(count, 256), 256, space, from + i, count);
        device_download(to + i, space, count * sizeof *to);
    }
}

/* ---- What kernels share ---------------------------------------------------------------------- */

/* What one instruction moves, up to 16 bytes; 32 bytes take two. It may stand for numbers of any
 * type. */
template <int BYTES> struct alignas(BYTES < 16 ? BYTES : 16) Words {
    uint32_t w[BYTES / 4];
} __attribute__((may_alias));

#if defined PRECISION_BF16 || defined PRECISION_FP16
/* Two numbers packed into one word, x at the lower address. */
static __device__ inline uint32_t pack(float x, float y)
{
#ifdef PRECISION_BF16
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
#else
    const __half2 pair = __floats2half2_rn(x, y);
#endif
    uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
}

/* The word that holds the first two numbers of x, as act, or the first one, as real. */
static __device__ inline uint32_t first_word(const act *, const real *x)
{
    return pack(x[0], x[1]);
}
#endif
static __device__ inline uint32_t first_word(const real *, const real *x)
{
    return __float_as_uint(x[0]);
}

/* Reads W numbers from memory. It is aligned to the size of all W, or to 16 bytes if that is
 * more. */
template <int W, typename T> static __device__ inline void load(real (&x)[W], const T *from)
{
    T number[W];
    if constexpr (W == 1) number[0] = *from;
    else {
        const Words<W * sizeof(T)> words = *(const Words<W * sizeof(T)> *)from;
        memcpy(number, &words, sizeof number);
    }
#pragma unroll
    for (int i = 0; i < W; i++) x[i] = to_real(number[i]);
}

/* Writes W numbers to memory, aligned in the same way. */
template <int W, typename T> static __device__ inline void store(T *to, const real (&x)[W])
{
    if constexpr (W == 1) *to = (T)x[0];
    else {
        Words<W * sizeof(T)> words;
#pragma unroll
        for (int i = 0; i < (int)(W * sizeof(T)) / 4; i++)
            words.w[i] = first_word(to, x + i * 4 / sizeof(T));
        *(Words<W * sizeof(T)> *)to = words;
    }
}

/* Can rows of C numbers at these addresses be read WIDE numbers at a time? */
template <typename... P> static bool wide(size_t C, const P *...address)
{
    return C % WIDE == 0 && (((uintptr_t)address % 16 == 0) && ...);
}

/* How many threads a block has for one row of C numbers, when a thread takes W at a time. */
static unsigned row_threads(size_t C, size_t W)
{
    return (unsigned)min_size(round_up(ceil_div(C, W), WARP), 512);
}

struct Add {
    template <typename T> static __device__ T of(T a, T b) { return a + b; }
};
struct Max { /* ignores NaNs */
    template <typename T> static __device__ T of(T a, T b) { return b > a || a != a ? b : a; }
};

static const unsigned ALL_LANES = 0xFFFFFFFF;

/* Combines x[i] of all threads of the block, for each i < N; every thread gets the result. The
 * order is always the same. All threads must call it, and it ends with a barrier. First each warp
 * combines its values by shuffles, then the warps' results meet in shared memory. */
template <typename Op, int N, typename T> static __device__ void block_reduce(T (&x)[N])
{
    __shared__ T side[N][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
#pragma unroll
    for (int i = 0; i < N; i++) {
        for (int other = WARP / 2; other > 0; other /= 2)
            x[i] = Op::of(x[i], __shfl_xor_sync(ALL_LANES, x[i], other));
        if (lane == 0) side[i][warp] = x[i];
    }
    __syncthreads();
    for (int i = 0; i < N; i++) {
        x[i] = side[i][0];
        for (int w = 1; w < warps; w++) x[i] = Op::of(x[i], side[i][w]);
    }
    __syncthreads();
}

/* ---- Dropout --------------------------------------------------------------------------------- */

/* One site's dropout in the form that kernels use. */
typedef struct {
    Dropout d;
    uint32_t threshold;
    real scale; /* numbers that are kept are multiplied by this */
} Mask;

static Mask make_mask(Dropout d)
{
    Mask m = {d, dropout_threshold(d.p), 1 / (1 - d.p)};
    return m;
}

/* Bit i of the result: element index + i of the stream is kept, i < 4. Philox is called twice if
 * the four lie in two of its blocks, and not at all without dropout. */
static __device__ inline uint32_t keep_four(const Mask &m, uint64_t index)
{
    const int skip = (int)(index % 4);
    uint32_t word[4], bits = 0;
    if (m.d.p == 0) return 15;
    philox(word, m.d.seed, index / 4, m.d.site, m.d.step);
#pragma unroll
    for (int i = 0; i < 4; i++) bits |= (uint32_t)(word[i] >= m.threshold) << i;
    if (skip) {
        philox(word, m.d.seed, index / 4 + 1, m.d.site, m.d.step);
#pragma unroll
        for (int i = 0; i < 4; i++) bits |= (uint32_t)(word[i] >= m.threshold) << (4 + i);
    }
    return bits >> skip & 15;
}

/* x[i] *= the mask of element index + i of the tensor. */
template <int W> static __device__ inline void apply_mask(real (&x)[W], const Mask &m, size_t index)
{
#pragma unroll
    for (int i = 0; i < W; i += 4) {
        const uint32_t keep = keep_four(m, m.d.first + index + i);
#pragma unroll
        for (int j = 0; j < 4 && i + j < W; j++) x[i + j] *= keep >> j & 1 ? m.scale : 0;
    }
}

/* ---- Sums of columns ------------------------------------------------------------------------- */

enum { SUM_WARPS = 8, SUM_BLOCKS = 512 };

/* part (chunks,C) = column sums of each chunk of rows of x (N,C) times its mask. If y (N,C) is not
 * NULL, it gets the masked x. A warp has 32 W columns, W for each lane, and every eighth row of its
 * block's chunk. The block's eight warps add their sums up in shared memory. Grid: groups of
 * columns, chunks. */
template <int W>
static __global__ void column_sums_kernel(real *part, act *y, const act *x, size_t N, size_t C,
                                          size_t chunk, Mask mask)
{
    __shared__ real side[SUM_WARPS][WARP * W];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const size_t c0 = (size_t)blockIdx.x * WARP * W, c = c0 + lane * W, first = blockIdx.y * chunk;
    const size_t end = min_size(first + chunk, N);
    real sum[W] = {};
    for (size_t n = first + warp; c < C && n < end; n += SUM_WARPS) {
        /* This is a multiple of W anyway; now nvcc sees that too, and stores W numbers at once. */
        const size_t at = (n * C + c) / W * W;
        real v[W];
        load(v, x + at);
        apply_mask(v, mask, at);
        if (y) store(y + at, v);
#pragma unroll
        for (int i = 0; i < W; i++) sum[i] += v[i];
    }
#pragma unroll
    for (int i = 0; i < W; i++)
        side[warp][i * WARP + lane] = sum[i]; /* neighbouring lanes use neighbouring banks */
    __syncthreads();
    for (int i = threadIdx.x; i < WARP * W; i += blockDim.x) {
        const size_t column = c0 + i % WARP * W + i / WARP;
        real total = side[0][i];
        for (int w = 1; w < SUM_WARPS; w++) total += side[w][i];
        if (column < C) part[blockIdx.y * C + column] = total;
    }
}

/* db (C) += the sums over all chunks of part (chunks,columns). If columns = 2C, columns C .. 2C-1
 * go to db2 (C). A block has 32 columns, one for each lane; each of its eight warps has every
 * eighth chunk. */
static __global__ void add_parts_kernel(act *db, act *db2, const real *part, size_t chunks,
                                        size_t columns, size_t C)
{
    __shared__ real side[SUM_WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const size_t c = (size_t)blockIdx.x * WARP + lane;
    real sum = 0;
    for (size_t i = warp; c < columns && i < chunks; i += SUM_WARPS) sum += part[i * columns + c];
    side[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || c >= columns) return;
    for (int w = 1; w < SUM_WARPS; w++) sum += side[w][lane];
    act *to = c < C ? db + c : db2 + (c - C);
    *to = to_act(to_real(*to) + sum);
}

static void add_parts(act *db, act *db2, const real *part, size_t chunks, size_t C)
{
    const size_t columns = db2 ? 2 * C : C;
    LAUNCH(add_parts_kernel, blocks(columns, WARP), SUM_WARPS * WARP, db, db2, part, chunks,
           columns, C);
}

/* db (C) += column sums of x (N,C) times its mask. If y (N,C) is not NULL, it gets the masked x. */
static void add_column_sums(act *db, act *y, const act *x, size_t N, size_t C, Mask mask)
{
    const bool w = wide(C, x, y);
    const unsigned groups = blocks(C, WARP * (w ? WIDE : 1));
    const size_t chunk = round_up(ceil_div(N, ceil_div(SUM_BLOCKS, groups)), SUM_WARPS);
    const size_t chunks = ceil_div(N, chunk);
    real *part = (real *)workspace(chunks * C * sizeof *part);
    const dim3 grid(groups, (unsigned)chunks);
    if (w) LAUNCH(column_sums_kernel<WIDE>, grid, SUM_WARPS * WARP, part, y, x, N, C, chunk, mask);
    else LAUNCH(column_sums_kernel<1>, grid, SUM_WARPS * WARP, part, y, x, N, C, chunk, mask);
    add_parts(db, NULL, part, chunks, C);
}

/* ---- Matrix product -------------------------------------------------------------------------- */

/* The largest power of two, up to 256, that divides all the addresses. */
template <typename... P> static uint32_t alignment_of(const P *...address)
{
    const uintptr_t all = ((uintptr_t)address | ...) | 256;
    return (uint32_t)(all & -all);
}

static void set_attribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t name,
                          const void *value, size_t size)
{
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(desc, name, value, size));
}

static void set_preference(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t name,
                           uint64_t value, size_t size)
{
    /* Bytes are little-endian, so size may be 4. */
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(p, name, &value, size));
}

static cublasLtMatrixLayout_t matrix_layout(size_t rows, size_t cols)
{
    cublasLtMatrixLayout_t layout;
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&layout, CUDA_ACT, cols, rows, (int64_t)cols));
    return layout;
}

/* Sets the pointers that an epilogue reads or writes. */
static void set_epilogue(cublasLtMatmulDesc_t desc, const Product *p, const act *bias,
                         const act *aux)
{
    const int64_t row = (int64_t)p->N;
    const int32_t type = CUDA_ACT;
    if (bias) {
        set_attribute(desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type, sizeof type);
        set_attribute(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
    }
    if (aux) {
        set_attribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &row, sizeof row);
        set_attribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &aux, sizeof aux);
    }
}

/* Asks cuBLASLt for its best algorithm. cuBLAS's matrices are column-major, and ours are row-major:
 * cuBLAS sees the transpose of each. So it is told to compute c' = b' a'. */
static ProductPlan plan_product(const Product *p, const act *bias, const act *aux)
{
    enum { MOST = 32 << 20 }; /* bytes of working space, as NVIDIA advises for Hopper */
    /* cuBLASLt looks only at the alignment of these addresses and reads nothing there. */
    const act *const bias_like = bias ? (const act *)(uintptr_t)p->bias_alignment : NULL;
    const act *const aux_like = aux ? (const act *)(uintptr_t)p->aux_alignment : NULL;
    const cublasOperation_t ta = p->b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t tb = p->a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t found;
    int count = 0;
    ProductPlan plan;
    memset(&plan, 0, sizeof plan);
    plan.product = *p;
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&plan.desc, COMPUTE_TYPE, CUDA_R_32F));
    set_attribute(plan.desc, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof ta);
    set_attribute(plan.desc, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof tb);
    set_attribute(plan.desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &p->epilogue, sizeof p->epilogue);
    set_epilogue(plan.desc, p, bias_like, aux_like);
    plan.a = p->b_transposed ? matrix_layout(p->N, p->K) : matrix_layout(p->K, p->N);
    plan.b = p->a_transposed ? matrix_layout(p->K, p->M) : matrix_layout(p->M, p->K);
    plan.c = matrix_layout(p->M, p->N);

    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    set_preference(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, MOST, sizeof(uint64_t));
    /* 2: partial sums are kept in float. */
    set_preference(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, 2, sizeof(uint32_t));
    for (int i = 0; i < 4; i++) /* CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, and of B, C and D */
        set_preference(preference, (cublasLtMatmulPreferenceAttributes_t)(5 + i), p->alignment,
                       sizeof(uint32_t));
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        gpu()->lt, plan.desc, plan.a, plan.b, plan.c, plan.c, preference, 1, &found, &count);
    plan.possible =
        status == CUBLAS_STATUS_SUCCESS && count > 0 && found.state == CUBLAS_STATUS_SUCCESS;
    if (plan.possible) {
        plan.algorithm = found.algo;
        plan.workspace = found.workspaceSize;
    }
    cublasLtMatmulPreferenceDestroy(preference);
    return plan;
}

/* The plan of a product. It is made once, when the product first occurs, because asking takes
 * longer than many products do. */
static ProductPlan *find_plan(const Product *p, const act *bias, const act *aux)
{
    Gpu *g = gpu();
    for (size_t i = 0; i < min_size(g->plans, PLANS); i++)
        if (!memcmp(&g->plan[i].product, p, sizeof *p)) return &g->plan[i];
    ProductPlan *plan = &g->plan[g->plans % PLANS];
    if (g->plans >= PLANS) plan_free(plan);
    g->plans++;
    *plan = plan_product(p, bias, aux);
    return plan;
}

/* c (M,N) [+]= a b, then the epilogue. a is (M,K), or (K,M) if transposed; b is (K,N), or (N,K).
 * bias (N) and aux (M,N) belong to the epilogue; they may be NULL. Returns false and does nothing
 * if cuBLASLt cannot do it. */
static bool matmul_epilogue(act *c, const act *a, bool a_transposed, const act *b,
                            bool b_transposed, size_t M, size_t N, size_t K, bool add,
                            cublasLtEpilogue_t epilogue, const act *bias, act *aux)
{
    const float one = 1, beta = add;
    const Product p = {M,
                       N,
                       K,
                       epilogue,
                       a_transposed,
                       b_transposed,
                       alignment_of(a, b, c),
                       alignment_of(bias),
                       alignment_of(aux)};
    ProductPlan *plan = find_plan(&p, bias, aux);
    if (!plan->possible) return false;
    set_epilogue(plan->desc, &p, bias, aux);
    void *space = workspace(plan->workspace);
    cublasStatus_t status =
        cublasLtMatmul(gpu()->lt, plan->desc, &one, b, plan->a, a, plan->b, &beta, c, plan->c, c,
                       plan->c, &plan->algorithm, space, plan->workspace, gpu()->stream);
    /* cuBLASLt may still refuse to run an algorithm that it has proposed. */
    plan->possible = status != CUBLAS_STATUS_NOT_SUPPORTED && status != CUBLAS_STATUS_INVALID_VALUE;
    if (plan->possible) CUBLAS_CHECK(status);
    return plan->possible;
}

/* c (M,N) [+]= a b, as above. Where cuBLASLt refuses, cuBLAS does it, which takes any shape. */
static void matmul(act *c, const act *a, bool a_transposed, const act *b, bool b_transposed,
                   size_t M, size_t N, size_t K, bool add)
{
    const float one = 1, beta = add;
    Gpu *g = gpu();
    if (matmul_epilogue(c, a, a_transposed, b, b_transposed, M, N, K, add,
                        CUBLASLT_EPILOGUE_DEFAULT, NULL, NULL))
        return;
    if (!g->blas) {
        CUBLAS_CHECK(cublasCreate(&g->blas));
        CUBLAS_CHECK(cublasSetStream(g->blas, g->stream));
        /* Partial sums are kept in float. */
        const cublasMath_t mode = CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        CUBLAS_CHECK(cublasSetMathMode(g->blas, mode));
    }
    const cublasOperation_t op_a = a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t op_b = b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const int row_a = (int)(a_transposed ? M : K), row_b = (int)(b_transposed ? K : N);
    CUBLAS_CHECK(cublasGemmEx(g->blas, op_b, op_a, (int)N, (int)M, (int)K, &one, b, CUDA_ACT, row_b,
                              a, CUDA_ACT, row_a, &beta, c, CUDA_ACT, (int)N, COMPUTE_TYPE,
                              CUBLAS_GEMM_DEFAULT));
}

/* ---- Linear layers [§3 eq.1, eq.3] ----------------------------------------------------------- */

/* Can GeLU be the product's epilogue? cuBLASLt has the tanh form only, for rows whose length is a
 * multiple of 8. In float the product takes so long that a kernel of our own costs nothing, and its
 * GeLU is exact to the last bits of a float. */
static bool gelu_fits(Gelu kind, size_t columns)
{
    return !FULL_PRECISION && kind == GELU_TANH && columns % 8 == 0;
}

/* y (N,O) = x + b (O), or gelu of that if with_gelu. If pre (N,O) is not NULL, it gets x + b. x may
 * be the same array as y or pre. A block has a row, a thread W neighbouring columns at a time. */
template <int W>
static __global__ void bias_gelu_kernel(act *y, act *pre, const act *x, const act *b, size_t O,
                                        bool with_gelu, Gelu kind)
{
    for (size_t o = threadIdx.x * W; o < O; o += blockDim.x * W) {
        const size_t at = blockIdx.x * O + o;
        real v[W], bias[W] = {};
        load(v, x + at);
        if (b) load(bias, b + o);
#pragma unroll
        for (int i = 0; i < W; i++) v[i] += bias[i];
        if (pre) store(pre + at, v);
#pragma unroll
        for (int i = 0; i < W; i++) v[i] = with_gelu ? gelu(v[i], kind) : v[i];
        store(y + at, v);
    }
}

static void bias_gelu(act *y, act *pre, const act *x, const act *b, size_t N, size_t O,
                      bool with_gelu, Gelu kind)
{
    LAUNCH_ROWS(bias_gelu_kernel, wide(O, y, pre, x, b), N, O, y, pre, x, b, O, with_gelu, kind);
}

/* dx (N,I) *= gelu'(pre). A block has a row, a thread W neighbouring columns at a time. */
template <int W>
static __global__ void gelu_slope_kernel(act *dx, const act *pre, size_t I, Gelu kind)
{
    for (size_t c = threadIdx.x * W; c < I; c += blockDim.x * W) {
        const size_t at = blockIdx.x * I + c;
        real d[W], x[W];
        load(d, dx + at);
        load(x, pre + at);
#pragma unroll
        for (int i = 0; i < W; i++) d[i] *= gelu_slope(x[i], kind);
        store(dx + at, d);
    }
}

static void linear_forward(act *y, const act *x, const act *w, const act *b, size_t N, size_t I,
                           size_t O)
{
    if (b && matmul_epilogue(y, x, false, w, true, N, O, I, false, CUBLASLT_EPILOGUE_BIAS, b, NULL))
        return;
    matmul(y, x, false, w, true, N, O, I, false);
    if (b) bias_gelu(y, NULL, y, b, N, O, false, GELU_TANH);
}

static void linear_backward(act *dx, act *dw, act *db, const act *dy, const act *x, const act *w,
                            size_t N, size_t I, size_t O)
{
    const Dropout none = {0, 0, 0, 0, 0, 0};
    if (dx) matmul(dx, dy, false, w, false, N, I, O, false);
    if (dw) matmul(dw, dy, true, x, false, O, I, N, true);
    if (db) add_column_sums(db, NULL, dy, N, O, make_mask(none));
}

static void linear_gelu_forward(act *y, act *pre, const act *x, const act *w, const act *b,
                                size_t N, size_t I, size_t O, Gelu kind)
{
    const cublasLtEpilogue_t epilogue =
        pre ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_BIAS;
    if (gelu_fits(kind, O) &&
        matmul_epilogue(y, x, false, w, true, N, O, I, false, epilogue, b, pre))
        return;
    act *sum = pre ? pre : y;
    if (b &&
        matmul_epilogue(sum, x, false, w, true, N, O, I, false, CUBLASLT_EPILOGUE_BIAS, b, NULL))
        b = NULL;
    else matmul(sum, x, false, w, true, N, O, I, false);
    bias_gelu(y, b ? pre : NULL, sum, b, N, O, true, kind);
}

static void gelu_linear_backward(act *dpre, act *dw, const act *dz, const act *y, const act *pre,
                                 const act *w, size_t N, size_t I, size_t O, Gelu kind)
{
    if (!gelu_fits(kind, I) || !matmul_epilogue(dpre, dz, false, w, false, N, I, O, false,
                                                CUBLASLT_EPILOGUE_DGELU, NULL, (act *)pre)) {
        matmul(dpre, dz, false, w, false, N, I, O, false);
        LAUNCH_ROWS(gelu_slope_kernel, wide(I, dpre, pre), N, I, dpre, pre, I, kind);
    }
    matmul(dw, dz, true, y, false, O, I, N, true);
}

/* ---- Embeddings ------------------------------------------------------------------------------ */

/* A block has a row n, a thread W neighbouring columns. */
template <int W>
static __global__ void token_embedding_forward_kernel(act *x, const int *tokens, const act *wte,
                                                      size_t C, size_t v0, size_t Vp)
{
    const size_t n = blockIdx.x, row = (size_t)tokens[n] - v0;
    for (size_t c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        real v[W] = {};
        if (row < Vp) load(v, wte + row * C + c);
        store(x + n * C + c, v);
    }
}

static void token_embedding_forward(act *x, const int *tokens, const act *wte, size_t N, size_t C,
                                    size_t v0, size_t Vp)
{
    LAUNCH_ROWS(token_embedding_forward_kernel, wide(C, x, wte), N, C, x, tokens, wte, C, v0, Vp);
}

enum { SORT_TILE = 256 };

/* order (N) = the numbers 0 .. N-1, sorted by tokens[n], and by n where tokens are equal. Thread n
 * counts how many tokens come before its own; the count is its place. That takes N^2 comparisons,
 * but a billion of them need only a tenth of a millisecond. The tokens pass through shared memory
 * in tiles. */
static __global__ void sort_tokens_kernel(int *order, const int *tokens, int N)
{
    __shared__ int tile[SORT_TILE];
    const int n = blockIdx.x * SORT_TILE + threadIdx.x, mine = n < N ? tokens[n] : 0;
    int place = 0;
    for (int first = 0; first < N; first += SORT_TILE) {
        const int count = N - first < SORT_TILE ? N - first : SORT_TILE;
        if ((int)threadIdx.x < count) tile[threadIdx.x] = tokens[first + threadIdx.x];
        __syncthreads();
        for (int i = 0; i < count; i++)
            place += tile[i] < mine || (tile[i] == mine && first + i < n);
        __syncthreads();
    }
    if (n < N) order[place] = n;
}

/* dwte[token] += the sum of dx[n] over all n with this token. The block at a token's first place in
 * the order adds up all of them: it has 32 W columns, W for each lane, and each of its eight warps
 * takes every eighth n. Grid: places, groups of columns. */
template <int W>
static __global__ void token_embedding_backward_kernel(act *dwte, const act *dx, const int *tokens,
                                                       const int *order, size_t N, size_t C,
                                                       size_t v0, size_t Vp)
{
    __shared__ real side[SUM_WARPS][WARP * W];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int token = tokens[order[blockIdx.x]];
    const size_t row = (size_t)token - v0, c0 = (size_t)blockIdx.y * WARP * W, c = c0 + lane * W;
    if (row >= Vp || (blockIdx.x > 0 && tokens[order[blockIdx.x - 1]] == token)) return;
    real sum[W] = {};
    for (size_t i = blockIdx.x + warp; i < N; i += SUM_WARPS) {
        const size_t n = (size_t)order[i];
        if (tokens[n] != token) break;
        if (c >= C) continue;
        real v[W];
        load(v, dx + n * C + c);
#pragma unroll
        for (int j = 0; j < W; j++) sum[j] += v[j];
    }
#pragma unroll
    for (int j = 0; j < W; j++) side[warp][j * WARP + lane] = sum[j];
    __syncthreads();
    for (int i = threadIdx.x; i < WARP * W; i += blockDim.x) {
        const size_t column = c0 + i % WARP * W + i / WARP;
        if (column >= C) continue;
        real total = to_real(dwte[row * C + column]);
        for (int w = 0; w < SUM_WARPS; w++) total += side[w][i];
        dwte[row * C + column] = to_act(total);
    }
}

static void token_embedding_backward(act *dwte, const act *dx, const int *tokens, size_t N,
                                     size_t C, size_t v0, size_t Vp)
{
    const bool w = wide(C, dx);
    const dim3 grid(blocks(N, 1), blocks(C, WARP * (w ? WIDE : 1)));
    int *order = (int *)workspace(N * sizeof *order);
    LAUNCH(sort_tokens_kernel, blocks(N, SORT_TILE), SORT_TILE, order, tokens, (int)N);
    if (w)
        LAUNCH(token_embedding_backward_kernel<WIDE>, grid, SUM_WARPS * WARP, dwte, dx, tokens,
               order, N, C, v0, Vp);
    else
        LAUNCH(token_embedding_backward_kernel<1>, grid, SUM_WARPS * WARP, dwte, dx, tokens, order,
               N, C, v0, Vp);
}

/* A block has a row n, a thread W neighbouring columns. */
template <int W>
static __global__ void position_embedding_forward_kernel(act *x, const act *wpe, size_t T, size_t C,
                                                         size_t past, Mask mask)
{
    const size_t n = blockIdx.x, position = past + n % T;
    for (size_t c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        real v[W], p[W];
        load(v, x + n * C + c);
        load(p, wpe + position * C + c);
#pragma unroll
        for (int i = 0; i < W; i++) v[i] += p[i];
        apply_mask(v, mask, n * C + c);
        store(x + n * C + c, v);
    }
}

static void position_embedding_forward(act *x, const act *wpe, size_t B, size_t T, size_t C,
                                       size_t past, Dropout d)
{
    const Mask m = make_mask(d);
    LAUNCH_ROWS(position_embedding_forward_kernel, wide(C, x, wpe), B * T, C, x, wpe, T, C, past,
                m);
}

/* A block has a position t in all sequences, a thread W neighbouring columns at a time. */
template <int W>
static __global__ void position_embedding_backward_kernel(act *dx, act *dwpe, size_t B, size_t T,
                                                          size_t C, Mask mask)
{
    const size_t t = blockIdx.x;
    for (size_t c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        real sum[W];
        load(sum, dwpe + t * C + c);
        for (size_t b = 0; b < B; b++) {
            const size_t at = (b * T + t) * C + c;
            real v[W];
            load(v, dx + at);
            apply_mask(v, mask, at);
            store(dx + at, v);
#pragma unroll
            for (int i = 0; i < W; i++) sum[i] += v[i];
        }
        store(dwpe + t * C + c, sum);
    }
}

static void position_embedding_backward(act *dx, act *dwpe, size_t B, size_t T, size_t C, Dropout d)
{
    const Mask m = make_mask(d);
    LAUNCH_ROWS(position_embedding_backward_kernel, wide(C, dx, dwpe), T, C, dx, dwpe, B, T, C, m);
}

/* ---- LayerNorm ------------------------------------------------------------------------------- */

/* One block computes one row: y (C) = (x - mean) * rstd * g + b. It takes two passes, as on the
 * CPU. A thread has W neighbouring columns out of each blockDim W and reads only these. So x may be
 * memory that this thread has just written. */
template <int W>
static __device__ void layernorm_row(act *y, real *mean, real *rstd, const act *x, const act *g,
                                     const act *b, size_t C, real eps)
{
    real sum[1] = {}, squares[1] = {};
    for (size_t c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        real v[W];
        load(v, x + c);
#pragma unroll
        for (int i = 0; i < W; i++) sum[0] += v[i];
    }
    block_reduce<Add>(sum);
    const real m = sum[0] / (real)C;
    for (size_t c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        real v[W];
        load(v, x + c);
#pragma unroll
        for (int i = 0; i < W; i++) squares[0] += (v[i] - m) * (v[i] - m);
    }
    block_reduce<Add>(squares);
    const real r = 1 / sqrtf(squares[0] / (real)C + eps);
    for (size_t c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        real v[W], gain[W], bias[W];
        load(v, x + c);
        load(gain, g + c);
        load(bias, b + c);
#pragma unroll
        for (int i = 0; i < W; i++) v[i] = (v[i] - m) * r * gain[i] + bias[i];
        store(y + c, v);
    }
    if (threadIdx.x == 0) {
        *mean = m;
        *rstd = r;
    }
}

/* A block has a row. */
template <int W>
static __global__ void layernorm_forward_kernel(act *y, real *mean, real *rstd, const act *x,
                                                const act *g, const act *b, size_t C, real eps)
{
    const size_t n = blockIdx.x;
    layernorm_row<W>(y + n * C, mean + n, rstd + n, x + n * C, g, b, C, eps);
}

static void layernorm_forward(act *y, real *mean, real *rstd, const act *x, const act *g,
                              const act *b, size_t N, size_t C, real eps)
{
    LAUNCH_ROWS(layernorm_forward_kernel, wide(C, y, x, g, b), N, C, y, mean, rstd, x, g, b, C,
                eps);
}

/* dx as in megatron_gpt2.c, and part (gridDim,2,C) = sums of dg and of db over the block's rows:
 * every gridDim-th row is this block's. A thread has W neighbouring columns out of each blockDim W,
 * the same ones in all rows, and keeps their sums in shared memory. Column W p + i is stored at i
 * packs + p, so that the lanes use different banks. */
template <int W>
static __global__ void layernorm_backward_kernel(act *dx, real *part, const act *dy, const act *x,
                                                 const act *g, const real *mean, const real *rstd,
                                                 const act *dres, size_t N, size_t C)
{
    extern __shared__ float4 shared[];
    const size_t packs = C / W;
    real *sum_g = (real *)shared;
    real *sum_b = sum_g + C;
    for (size_t p = threadIdx.x; p < packs; p += blockDim.x)
        for (int i = 0; i < W; i++) {
            sum_g[i * packs + p] = 0;
            sum_b[i * packs + p] = 0;
        }
    for (size_t n = blockIdx.x; n < N; n += gridDim.x) {
        const act *dy_n = dy + n * C, *x_n = x + n * C;
        const real m = mean[n], r = rstd[n];
        real sums[2] = {}; /* sums of dh and of dh h */
        for (size_t p = threadIdx.x; p < packs; p += blockDim.x) {
            real d[W], v[W], gain[W];
            load(d, dy_n + p * W);
            load(v, x_n + p * W);
            load(gain, g + p * W);
#pragma unroll
            for (int i = 0; i < W; i++) {
                const real h = (v[i] - m) * r;
                sum_g[i * packs + p] += d[i] * h;
                sum_b[i * packs + p] += d[i];
                sums[0] += d[i] * gain[i];
                sums[1] += d[i] * gain[i] * h;
            }
        }
        block_reduce<Add>(sums);
        sums[0] /= (real)C;
        sums[1] /= (real)C;
        for (size_t p = threadIdx.x; p < packs; p += blockDim.x) {
            real d[W], v[W], gain[W], out[W] = {};
            load(d, dy_n + p * W);
            load(v, x_n + p * W);
            load(gain, g + p * W);
            if (dres) load(out, dres + n * C + p * W);
#pragma unroll
            for (int i = 0; i < W; i++)
                out[i] += r * (d[i] * gain[i] - sums[0] - (v[i] - m) * r * sums[1]);
            store(dx + n * C + p * W, out);
        }
    }
    real *to = part + (size_t)blockIdx.x * 2 * C;
    for (size_t p = threadIdx.x; p < packs; p += blockDim.x) {
        real g_sums[W], b_sums[W];
#pragma unroll
        for (int i = 0; i < W; i++) {
            g_sums[i] = sum_g[i * packs + p];
            b_sums[i] = sum_b[i * packs + p];
        }
        store(to + p * W, g_sums);
        store(to + C + p * W, b_sums);
    }
}

template <int W>
static void layernorm_backward_of(act *dx, real *part, const act *dy, const act *x, const act *g,
                                  const real *mean, const real *rstd, const act *dres, size_t N,
                                  size_t C, size_t chunks)
{
    const size_t bytes = 2 * C * sizeof(real);
    if (cudaFuncSetAttribute(layernorm_backward_kernel<W>,
                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)bytes) != cudaSuccess)
        die("a hidden size of %zu: LayerNorm's backward pass keeps 8 bytes a column in a GPU's "
            "shared memory, which is "
            "too small for it",
            C);
    LAUNCH_SHARED(layernorm_backward_kernel<W>, blocks(chunks, 1), row_threads(C, W), bytes, dx,
                  part, dy, x, g, mean, rstd, dres, N, C);
}

static void layernorm_backward(act *dx, act *dg, act *db, const act *dy, const act *x, const act *g,
                               const real *mean, const real *rstd, const act *dres, size_t N,
                               size_t C)
{
    const size_t chunks = min_size(N, SUM_BLOCKS);
    real *part = (real *)workspace(chunks * 2 * C * sizeof *part);
    if (wide(C, dx, dy, x, g, dres))
        layernorm_backward_of<WIDE>(dx, part, dy, x, g, mean, rstd, dres, N, C, chunks);
    else layernorm_backward_of<1>(dx, part, dy, x, g, mean, rstd, dres, N, C, chunks);
    add_parts(dg, db, part, chunks, C);
}

/* ---- Bias + dropout + residual (+ LayerNorm) ------------------------------------------------- */

/* One block computes one row: out (C) = residual + mask * (y + bias), for the elements index ..
 * index+C-1. */
template <int W>
static __device__ void bias_dropout_add_row(act *out, const act *y, const act *bias,
                                            const act *residual, size_t C, const Mask &mask,
                                            size_t index)
{
    for (size_t c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        real v[W], b[W], x[W];
        load(v, y + c);
        load(b, bias + c);
        load(x, residual + c);
#pragma unroll
        for (int i = 0; i < W; i++) v[i] += b[i];
        apply_mask(v, mask, index + c);
#pragma unroll
        for (int i = 0; i < W; i++) v[i] += x[i];
        store(out + c, v);
    }
}

/* A block has a row. */
template <int W>
static __global__ void bias_dropout_add_forward_kernel(act *out, const act *y, const act *bias,
                                                       const act *residual, size_t C, Mask mask)
{
    const size_t at = blockIdx.x * C;
    bias_dropout_add_row<W>(out + at, y + at, bias, residual + at, C, mask, at);
}

static void bias_dropout_add_forward(act *out, const act *y, const act *bias, const act *residual,
                                     size_t N, size_t C, Dropout d)
{
    const Mask m = make_mask(d);
    LAUNCH_ROWS(bias_dropout_add_forward_kernel, wide(C, out, y, bias, residual), N, C, out, y,
                bias, residual, C, m);
}

/* A block has a row. LayerNorm reads res as it was rounded, as the backward pass will; each thread
 * reads what it wrote itself. */
template <int W>
static __global__ void
bias_dropout_add_layernorm_forward_kernel(act *ln, act *res, real *mean, real *rstd, const act *y,
                                          const act *bias, const act *residual, const act *g,
                                          const act *b, size_t C, real eps, Mask mask)
{
    const size_t n = blockIdx.x, at = n * C;
    bias_dropout_add_row<W>(res + at, y + at, bias, residual + at, C, mask, at);
    layernorm_row<W>(ln + at, mean + n, rstd + n, res + at, g, b, C, eps);
}

static void bias_dropout_add_layernorm_forward(act *ln, act *res, real *mean, real *rstd,
                                               const act *y, const act *bias, const act *residual,
                                               const act *g, const act *b, size_t N, size_t C,
                                               real eps, Dropout d)
{
    const Mask m = make_mask(d);
    LAUNCH_ROWS(bias_dropout_add_layernorm_forward_kernel,
                wide(C, ln, res, y, bias, residual, g, b), N, C, ln, res, mean, rstd, y, bias,
                residual, g, b, C, eps, m);
}

static void bias_dropout_add_backward(act *dy, act *dbias, const act *dout, size_t N, size_t C,
                                      Dropout d)
{
    add_column_sums(dbias, dy, dout, N, C, make_mask(d));
}

/* ---- Causal self-attention [§3 Fig. 3b] ------------------------------------------------------ */

/* Attention for any head size and any type of act, with products in float. megatron_gpt2.c explains
 * the online softmax and lse. A block of 256 threads, 16 x 16, computes 64 x 64 scores of one head
 * at a time:
 *
 *                b' (D,64)
 *              +----------+      Thread (y, x) has rows 4y .. 4y+3 and columns x, x+16, x+32, x+48:
 *     a (64,D) | s (64,64)|      16 scores, in registers. Rows of a and b come through shared
 *              +----------+      memory, 32 columns of D at a time, read four numbers at a time.
 *
 * A row of scores belongs to the 16 neighbouring threads of one y, which find its maximum and sum
 * by shuffles. Then p (64,64) goes to shared memory, and o (64,COLUMNS) += p v. In that product
 * thread (y, x) has rows 4y .. 4y+3 again, and columns 4x .. 4x+3 of each 64. COLUMNS is 64, or 128
 * if D > 64. If D > 128, several blocks along the grid's z share the columns, and each computes the
 * scores for itself.
 *
 *     forward   a block owns queries and walks over keys   S = Q K', O += dropout(P) V
 *     dQ        a block owns queries and walks over keys   S, dP = dO V', dQ += dS K
 *     dK, dV    a block owns keys and walks over queries   S', dP' = V dO', dV += dropout(P)' dO,
 *                                                          dK += dS' Q
 *
 * Grid: heads of all sequences, blocks of 64 rows, groups of columns. Blocks above the diagonal are
 * skipped. The longest walks start first, so that the last ones to start are short. */
enum { SIDE = 64, CHUNK = 32, ATTENTION_THREADS = 256 };

/* Rows of one head in global memory: row i begins at p + i * row. */
typedef struct {
    const act *p;
    size_t row;
    int rows; /* how many rows exist from p on; further ones are read as zeros */
} Rows;

static __device__ inline Rows rows_from(const act *head, size_t row, int first, int T)
{
    Rows r = {head + first * row, row, T - first};
    return r;
}

/* What the threads of a block share. Rows are padded by one float4, so that rows which are read
 * together start in different banks. */
struct AttentionShared {
    union {
        float4 ab[2][SIDE][CHUNK / 4 + 1]; /* columns of a and b, for a product over D */
        float4 v64[CHUNK][64 / 4 + 1];     /* .. or rows of v, for a product over 64 */
        float4 v128[CHUNK][128 / 4 + 1];
    };
    float4 p[SIDE][SIDE / 4 + 1];
    uint16_t keep[SIDE][SIDE / 16]; /* dropout's bits for 64 queries x 64 keys */
};

/* Four numbers of row r, from column c on; zeros outside the matrix. `vectors`: they can be read at
 * once, because rows begin at multiples of four. */
static __device__ inline float4 load_four(const Rows &m, int r, int c, int columns, bool vectors)
{
    real x[4] = {};
    const act *from = m.p + r * m.row + c;
    if (vectors && r < m.rows && c < columns) load(x, from);
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (!vectors && r < m.rows && c + i < columns) x[i] = to_real(from[i]);
    return make_float4(x[0], x[1], x[2], x[3]);
}

/* s (64,64) = a (64,D) b' (D,64). */
static __device__ inline void multiply_rows(real (&s)[4][4], AttentionShared &shared, const Rows &a,
                                            const Rows &b, int D, bool vectors)
{
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
    for (int i = 0; i < 16; i++) s[i / 4][i % 4] = 0;
    for (int c0 = 0; c0 < D; c0 += CHUNK) {
        __syncthreads(); /* all threads are done with the old contents */
        for (int i = threadIdx.x; i < SIDE * CHUNK / 4; i += ATTENTION_THREADS) {
            const int r = i / (CHUNK / 4), c = i % (CHUNK / 4);
            shared.ab[0][r][c] = load_four(a, r, c0 + 4 * c, D, vectors);
            shared.ab[1][r][c] = load_four(b, r, c0 + 4 * c, D, vectors);
        }
        __syncthreads();
#pragma unroll 1
        for (int c = 0; c < CHUNK / 4; c++) {
            float4 u[4], w[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u[i] = shared.ab[0][4 * y + i][c];
                w[i] = shared.ab[1][x + 16 * i][c];
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    s[i][j] +=
                        u[i].x * w[j].x + u[i].y * w[j].y + u[i].z * w[j].z + u[i].w * w[j].w;
        }
    }
}

/* Stores a thread's 16 numbers where accumulate() reads them. */
static __device__ inline void put(AttentionShared &shared, const real (&p)[4][4])
{
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) ((real *)shared.p[4 * y + i])[x + 16 * j] = p[i][j];
}

/* to += factor * x. */
static __device__ inline void add_product(float4 &to, real factor, const float4 &x)
{
    to.x += factor * x.x;
    to.y += factor * x.y;
    to.z += factor * x.z;
    to.w += factor * x.w;
}

static __device__ inline void multiply_by(float4 &x, real factor)
{
    x.x *= factor;
    x.y *= factor;
    x.z *= factor;
    x.w *= factor;
}

/* o (64,COLUMNS) += shared.p (64,64) v (64,COLUMNS); only the first `columns` columns exist. It
 * begins with a barrier. */
template <int COLUMNS>
static __device__ inline void accumulate(float4 (&o)[4][COLUMNS / 64], AttentionShared &shared,
                                         const Rows &v, int columns, bool vectors)
{
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    float4(*const tile)[COLUMNS / 4 + 1] =
        (float4(*)[COLUMNS / 4 + 1])(COLUMNS == 64 ? (void *)shared.v64 : shared.v128);
    for (int k0 = 0; k0 < SIDE && k0 < v.rows; k0 += CHUNK) {
        __syncthreads(); /* p is complete, and all threads are done with the old tile */
        for (int i = threadIdx.x; i < CHUNK * COLUMNS / 4; i += ATTENTION_THREADS) {
            const int r = i / (COLUMNS / 4), c = i % (COLUMNS / 4);
            tile[r][c] = load_four(v, k0 + r, 4 * c, columns, vectors);
        }
        __syncthreads();
#pragma unroll 2
        for (int k = 0; k < CHUNK / 4; k++) {
            real p[4][4];
#pragma unroll
            for (int i = 0; i < 4; i++) load(p[i], (const real *)&shared.p[4 * y + i][k0 / 4 + k]);
#pragma unroll
            for (int j = 0; j < COLUMNS / 64; j++)
#pragma unroll
                for (int kk = 0; kk < 4; kk++) {
                    const float4 w = tile[4 * k + kk][x + 16 * j];
#pragma unroll
                    for (int i = 0; i < 4; i++) add_product(o[i][j], p[i][kk], w);
                }
        }
    }
}

/* to (64,COLUMNS) = o times factor[row], where rows and columns exist. Rows of `to` are to_row
 * apart. */
template <int COLUMNS>
static __device__ inline void
write_columns(act *to, size_t to_row, const float4 (&o)[4][COLUMNS / 64], const real (&factor)[4],
              int rows, int columns, bool vectors)
{
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < COLUMNS / 64; j++) {
            const int r = 4 * y + i, c = 64 * j + 4 * x;
            const float4 v = o[i][j];
            const real f = factor[i], four[4] = {v.x * f, v.y * f, v.z * f, v.w * f};
            act *at = to + r * to_row + c;
            if (r >= rows) continue;
            if (vectors) {
                if (c < columns) store(at, four);
            } else {
#pragma unroll
                for (int k = 0; k < 4; k++)
                    if (c + k < columns) at[k] = to_act(four[k]);
            }
        }
}

/* The dropout stream of head h of sequence b. */
static inline HOST_DEVICE Dropout head_dropout(Dropout d, size_t b, size_t h, size_t T)
{
    d.first += (b * d.heads + h) * T * T;
    return d;
}

/* Draws shared.keep for queries i0 .. i0+63 and keys j0 .. j0+63, 16 bits a thread. Others may read
 * it after the next barrier. */
static __device__ inline void draw_keep(AttentionShared &shared, const Mask &m, int i0, int j0,
                                        int T)
{
    const int row = threadIdx.x / 4, group = threadIdx.x % 4;
    const uint64_t index = m.d.first + (uint64_t)(i0 + row) * T + j0 + 16 * group;
    uint32_t bits = 0;
    for (int i = 0; i < 16; i += 4) bits |= keep_four(m, index + i) << i;
    shared.keep[row][group] = (uint16_t)bits;
}

static __device__ inline real keep_factor(const AttentionShared &shared, const Mask &m, int query,
                                          int key)
{
    if (m.d.p == 0) return 1;
    return shared.keep[query][key / 16] >> key % 16 & 1 ? m.scale : 0;
}

/* Combines x of the 16 neighbouring threads that share a row. */
template <typename Op> static __device__ inline real row_reduce(real x)
{
    for (int other = 8; other > 0; other /= 2) x = Op::of(x, __shfl_xor_sync(ALL_LANES, x, other));
    return x;
}

template <int COLUMNS>
static __global__ void __launch_bounds__(ATTENTION_THREADS)
    attention_forward_kernel(act *out, real *lse, const act *qkv, int T, int H, int D, bool vectors,
                             Mask mask)
{
    __shared__ AttentionShared shared;
    const int x = threadIdx.x % 16, y = threadIdx.x / 16, b = blockIdx.x / H, h = blockIdx.x % H;
    const int i0 = (gridDim.y - 1 - blockIdx.y) * SIDE, column = blockIdx.z * COLUMNS;
    const size_t C = (size_t)H * D;
    const act *q = qkv + (size_t)b * T * 3 * C + h * D, *k = q + C, *v = k + C + column;
    const real scale = 1 / sqrtf((real)D);
    float4 o[4][COLUMNS / 64] = {};
    real top[4], sum[4] = {};
    for (int i = 0; i < 4; i++) top[i] = -INFINITY;
    mask.d = head_dropout(mask.d, b, h, T);

    for (int j0 = 0; j0 < T && j0 <= i0; j0 += SIDE) {
        real s[4][4];
        if (mask.d.p > 0) draw_keep(shared, mask, i0, j0, T);
        multiply_rows(s, shared, rows_from(q, 3 * C, i0, T), rows_from(k, 3 * C, j0, T), D,
                      vectors);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            real now = -INFINITY, total = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) { /* is key j0 + x + 16 j after query i0 + 4 y + i? */
                s[i][j] = j0 + x + 16 * j > i0 + 4 * y + i ? -INFINITY : s[i][j] * scale;
                now = Max::of(now, s[i][j]);
            }
            now = Max::of(top[i], row_reduce<Max>(now));
            const real shrink = expf(top[i] - now); /* 0 the first time */
            top[i] = now;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[i][j] = expf(s[i][j] - now);
                total += s[i][j];
                s[i][j] *= keep_factor(shared, mask, 4 * y + i, x + 16 * j);
            }
            /* The sum is over all scores: dropout comes after the softmax. */
            sum[i] = sum[i] * shrink + row_reduce<Add>(total);
#pragma unroll
            for (int j = 0; j < COLUMNS / 64; j++) multiply_by(o[i][j], shrink);
        }
        put(shared, s);
        accumulate<COLUMNS>(o, shared, rows_from(v, 3 * C, j0, T), D - column, vectors);
    }

    real factor[4];
    for (int i = 0; i < 4; i++) {
        const int query = i0 + 4 * y + i;
        factor[i] = 1 / sum[i];
        if (x == 0 && blockIdx.z == 0 && query < T)
            lse[(size_t)blockIdx.x * T + query] = top[i] + logf(sum[i]);
    }
    write_columns<COLUMNS>(out + ((size_t)b * T + i0) * C + h * D + column, C, o, factor, T - i0,
                           D - column, vectors);
}

/* delta (B,H,T) = sum of dout * out over a head's columns; both are (B,T,H*D). A warp has a row. */
static __global__ void attention_delta_kernel(real *delta, const act *dout, const act *out,
                                              size_t rows, size_t T, size_t H, size_t D)
{
    const size_t row = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP; /* of (B,T,H) */
    const size_t h = row % H, t = row / H % T, b = row / H / T;
    real sum = 0;
    for (size_t c = threadIdx.x % WARP; row < rows && c < D; c += WARP)
        sum += to_real(dout[row * D + c]) * to_real(out[row * D + c]);
    for (int other = WARP / 2; other > 0; other /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, other);
    if (row < rows && threadIdx.x % WARP == 0) delta[(b * H + h) * T + t] = sum;
}

/* Turns scores s into P after dropout, and dp = dO V' into dS. */
static __device__ inline void softmax_backward(real &s, real &dp, bool visible, real scale,
                                               real lse, real delta, real keep)
{
    const real p = visible ? expf(s * scale - lse) : 0;
    s = p * keep;
    dp = s * dp - p * delta;
}

template <int COLUMNS>
static __global__ void __launch_bounds__(ATTENTION_THREADS)
    attention_backward_q_kernel(act *dqkv, const real *delta, const act *dout, const real *lse,
                                const act *qkv, int T, int H, int D, bool vectors, Mask mask)
{
    __shared__ AttentionShared shared;
    const int x = threadIdx.x % 16, y = threadIdx.x / 16, b = blockIdx.x / H, h = blockIdx.x % H;
    const int i0 = (gridDim.y - 1 - blockIdx.y) * SIDE, column = blockIdx.z * COLUMNS;
    const size_t C = (size_t)H * D, head = (size_t)b * T * 3 * C + h * D;
    const act *q = qkv + head, *k = q + C, *v = k + C, *go = dout + (size_t)b * T * C + h * D;
    const real scale = 1 / sqrtf((real)D), factor[4] = {scale, scale, scale, scale};
    float4 dq[4][COLUMNS / 64] = {};
    real lse_i[4], delta_i[4];
    for (int i = 0; i < 4; i++) {
        const int query = i0 + 4 * y + i;
        lse_i[i] = query < T ? lse[(size_t)blockIdx.x * T + query] : 0;
        delta_i[i] = query < T ? delta[(size_t)blockIdx.x * T + query] : 0;
    }
    mask.d = head_dropout(mask.d, b, h, T);

    for (int j0 = 0; j0 < T && j0 <= i0; j0 += SIDE) {
        real s[4][4], dp[4][4];
        if (mask.d.p > 0) draw_keep(shared, mask, i0, j0, T);
        multiply_rows(s, shared, rows_from(q, 3 * C, i0, T), rows_from(k, 3 * C, j0, T), D,
                      vectors);
        multiply_rows(dp, shared, rows_from(go, C, i0, T), rows_from(v, 3 * C, j0, T), D, vectors);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                softmax_backward(s[i][j], dp[i][j], j0 + x + 16 * j <= i0 + 4 * y + i, scale,
                                 lse_i[i], delta_i[i],
                                 keep_factor(shared, mask, 4 * y + i, x + 16 * j));
        put(shared, dp);
        accumulate<COLUMNS>(dq, shared, rows_from(k + column, 3 * C, j0, T), D - column, vectors);
    }
    write_columns<COLUMNS>(dqkv + head + i0 * 3 * C + column, 3 * C, dq, factor, T - i0, D - column,
                           vectors);
}

template <int COLUMNS>
static __global__ void __launch_bounds__(ATTENTION_THREADS)
    attention_backward_kv_kernel(act *dqkv, const real *delta, const act *dout, const real *lse,
                                 const act *qkv, int T, int H, int D, bool vectors, Mask mask)
{
    __shared__ AttentionShared shared;
    const int x = threadIdx.x % 16, y = threadIdx.x / 16, b = blockIdx.x / H, h = blockIdx.x % H;
    const int j0 = blockIdx.y * SIDE, column = blockIdx.z * COLUMNS;
    const size_t C = (size_t)H * D, head = (size_t)b * T * 3 * C + h * D;
    const act *q = qkv + head, *k = q + C, *v = k + C, *go = dout + (size_t)b * T * C + h * D;
    const real scale = 1 / sqrtf((real)D), scales[4] = {scale, scale, scale, scale};
    const real ones[4] = {1, 1, 1, 1};
    float4 dk[4][COLUMNS / 64] = {}, dv[4][COLUMNS / 64] = {};
    mask.d = head_dropout(mask.d, b, h, T);

    for (int i0 = j0; i0 < T; i0 += SIDE) {
        real s[4][4], dp[4][4]; /* rows are keys, columns are queries */
        if (mask.d.p > 0) draw_keep(shared, mask, i0, j0, T);
        multiply_rows(s, shared, rows_from(k, 3 * C, j0, T), rows_from(q, 3 * C, i0, T), D,
                      vectors);
        multiply_rows(dp, shared, rows_from(v, 3 * C, j0, T), rows_from(go, C, i0, T), D, vectors);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int query = i0 + x + 16 * j;
            const real lse_j = query < T ? lse[(size_t)blockIdx.x * T + query] : 0;
            const real delta_j = query < T ? delta[(size_t)blockIdx.x * T + query] : 0;
#pragma unroll
            for (int i = 0; i < 4; i++)
                softmax_backward(s[i][j], dp[i][j], query < T && j0 + 4 * y + i <= query, scale,
                                 lse_j, delta_j, keep_factor(shared, mask, x + 16 * j, 4 * y + i));
        }
        put(shared, s);
        accumulate<COLUMNS>(dv, shared, rows_from(go + column, C, i0, T), D - column, vectors);
        __syncthreads(); /* all threads are done with P */
        put(shared, dp);
        accumulate<COLUMNS>(dk, shared, rows_from(q + column, 3 * C, i0, T), D - column, vectors);
    }
    act *to = dqkv + head + j0 * 3 * C + column;
    write_columns<COLUMNS>(to + C, 3 * C, dk, scales, T - j0, D - column, vectors);
    write_columns<COLUMNS>(to + 2 * C, 3 * C, dv, ones, T - j0, D - column, vectors);
}

/* Starts the kernel<COLUMNS> that fits D. */
#define LAUNCH_ATTENTION(kernel, B, T, H, D, ...)                                                  \
    do {                                                                                           \
        const dim3 grid(blocks((B) * (H), 1), blocks(T, SIDE), blocks(D, (D) > 64 ? 128 : 64));    \
        if ((D) > 64)                                                                              \
            LAUNCH(kernel<128>, grid, ATTENTION_THREADS, __VA_ARGS__, (int)(T), (int)(H),          \
                   (int)(D), vectors, m);                                                          \
        else                                                                                       \
            LAUNCH(kernel<64>, grid, ATTENTION_THREADS, __VA_ARGS__, (int)(T), (int)(H), (int)(D), \
                   vectors, m);                                                                    \
    } while (0)

/* ---- The same on tensor cores, for act of 16 bits and heads of 64, 96 or 128 ----------------- */

#if defined PRECISION_BF16 || defined PRECISION_FP16
/* Flash attention: the online softmax of megatron_gpt2.c, with products on tensor cores. A block of
 * four warps owns some rows of one head, and the other side streams past them. Each warp works on
 * 16 M of the rows by itself; it waits for the other warps only when shared memory is refilled. No
 * two blocks write to the same place:
 *
 *     forward    a block owns queries, keys stream past    S = Q K', O = dropout(P) V
 *     dQ         a block owns queries, keys stream past    S, dP = dO V', dQ = dS K
 *     dK, dV     a block owns keys, queries stream past    S', dP', dV = dropout(P)' dO, dK = dS' Q
 *
 * The backward pass makes seven products where a single kernel would make five. But so each sum has
 * one fixed order and needs no atomics.
 *
 * One instruction multiplies tiles: C (16,8) += A (16,16) B (16,8). Lane 4 g + t of the warp holds
 * these elements of them:
 *
 *                 columns                        columns                             column
 *              2t    2t+1                2t, 2t+1   2t+8, 2t+9                          g
 *     row g    c[0]  c[1]       row g      a[0]        a[2]       rows 2t,   2t+1     b[0]
 *     row g+8  c[2]  c[3]       row g+8    a[1]        a[3]       rows 2t+8, 2t+9     b[1]
 *
 * c is in float; a and b have two act in a word. So two tiles of C side by side, rounded to act,
 * are one tile of A: the softmax goes from S to P V in registers. A matrix c (16 M, N) in registers
 * is c[M][N / 8][4].
 *
 * Dropout needs four neighbouring columns in one lane, because one call of philox draws for four.
 * So of every 16 rows that stream past, the order in shared memory is 0 1 4 5 8 9 12 13 2 3 6 7 10
 * 11 14 15. Columns 2t and 2t+1 of a tile and of the next one are then 4t .. 4t+3. The order does
 * not matter to sums over these rows. */

#ifdef __CUDACC__
#ifdef PRECISION_BF16
#define ACT_NAME "bf16"
#else
#define ACT_NAME "f16"
#endif

/* d += a b, one tile. */
template <typename T>
static __device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t *b)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." ACT_NAME "." ACT_NAME ".f32"
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

static __device__ inline uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* Loads four tiles of 8 x 8 act from shared memory: r[i] = columns 2t and 2t+1 of row g of tile i.
 * Lane l passes the address of row l % 8 of tile l / 8. */
static __device__ inline void ldmatrix_x4(uint32_t (&r)[4], const act *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* The same, but r[i] = rows 2t and 2t+1 of column g. */
static __device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const act *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* Copies 16 bytes to shared memory while the thread goes on. If not valid, it reads nothing and
 * writes zeros. */
static __device__ inline void cp_async_16(void *to, const void *from, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}

/* cp_async_commit ends a group of this thread's copies; cp_async_wait waits until all groups but
 * the latest N have arrived. */
static __device__ inline void cp_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> static __device__ inline void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#endif

enum { FLASH_WARPS = 4, FLASH_THREADS = FLASH_WARPS * WARP };

/* Rows in shared memory are padded by 16 bytes. So the eight rows that ldmatrix reads together are
 * in different banks. */
template <int D> struct SharedRow {
    enum { SIZE = D + 8 };
};

/* How much a kernel does at a time. M: how many tiles of 16 rows a warp owns. N: columns of S in
 * registers. STREAM: rows in each of the stream's two stages. KEEP: the owned rows stay in
 * registers, too. BLOCKS: how many blocks should fit on an SM. */
template <int D, bool DROP> struct FlashForward {
    enum {
        M = 2,
        N = D == 64 || (D == 96 && !DROP) ? 64 : 32,
        STREAM = N,
        KEEP = D == 64 && !DROP,
        BLOCKS = 2
    };
    enum {
        ROWS = FLASH_WARPS * 16 * M,
        BYTES = (ROWS + 4 * STREAM) * SharedRow<D>::SIZE * (int)sizeof(act)
    };
};
template <int D, bool DROP> struct FlashBackwardQ {
    enum {
        M = D == 64 ? 2 : 1,
        N = 32,
        STREAM = D == 64 ? 64 : 32,
        KEEP = D == 64,
        BLOCKS = D == 64 ? 2 : 3
    };
    enum {
        ROWS = FLASH_WARPS * 16 * M,
        BYTES = (2 * ROWS + 4 * STREAM) * SharedRow<D>::SIZE * (int)sizeof(act)
    };
};
template <int D, bool DROP> struct FlashBackwardKV {
    enum {
        M = 1,
        N = 32,
        STREAM = D < 128 ? 64 : 32,
        KEEP = D == 64 && !DROP,
        BLOCKS = D == 64 ? 3 : 2
    };
    enum {
        ROWS = FLASH_WARPS * 16 * M,
        BYTES = (2 * ROWS + 4 * STREAM) * SharedRow<D>::SIZE * (int)sizeof(act)
    };
};

/* Row and column of this lane's c[m][n][e] in the matrix. Columns are in the order of the
 * stream. */
static __device__ inline int row_of(int m, int e)
{
    return 16 * m + threadIdx.x % WARP / 4 + 8 * (e / 2);
}
static __device__ inline int column_of(int n, int e)
{
    return 16 * (n / 2) + 4 * (threadIdx.x % 4) + 2 * (n % 2) + e % 2;
}

/* Starts the copy of COUNT rows of D numbers to shared memory. A thread copies 16 bytes of every
 * eighth or sixteenth row, always of the same columns. */
template <int D, int COUNT, bool STREAMED>
static __device__ inline void load_rows(act *to, Rows from)
{
    enum {
        ACROSS = D / 8,
        DOWN = D == 64 ? 16 : 8
    }; /* ACROSS * DOWN threads; at D = 96 the last warp has none */
    const int r0 = threadIdx.x / ACROSS, c = threadIdx.x % ACROSS * 8;
    if (r0 >= DOWN) return;
    const act *at = from.p + r0 * from.row + c;
#pragma unroll
    for (int i = 0; i < COUNT; i += DOWN, at += DOWN * from.row) {
        const int r = i + r0;
        const int place = STREAMED ? (r & ~15) | (r & 2) << 2 | (r & 12) >> 1 | (r & 1) : r;
        cp_async_16(to + place * SharedRow<D>::SIZE + c, at, r < from.rows);
    }
}

/* Starts the copy of two matrices, one behind the other in shared memory, as one group to wait
 * for. */
template <int D, int COUNT, bool STREAMED>
static __device__ inline void load_pair(act *to, Rows x, Rows y)
{
    load_rows<D, COUNT, STREAMED>(to, x);
    load_rows<D, COUNT, STREAMED>(to + COUNT * SharedRow<D>::SIZE, y);
    cp_async_commit();
}

/* Loads a = 16 columns of the 16 M rows at `rows`. */
template <int M, int D>
static __device__ inline void load_tiles(uint32_t (&a)[M][4], const act *rows)
{
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < M; m++)
        ldmatrix_x4(a[m], rows + (16 * m + lane % 16) * SharedRow<D>::SIZE + lane / 16 * 8);
}

/* The owned side of a product over D. It is kept in registers, or read from shared memory again
 * each time. */
template <int M, int D, bool KEEP> struct Owned {
    const act *rows;
    uint32_t a[KEEP ? D / 16 : 1][M][4];

    __device__ explicit Owned(const act *rows_) : rows(rows_)
    {
#pragma unroll
        for (int k = 0; KEEP && k < D / 16; k++) load_tiles<M, D>(a[k], rows + 16 * k);
    }
};

/* c (16M,N) = a (16M,D) b', b (N,D) in shared memory. */
template <int M, int N, int D, bool KEEP>
static __device__ inline void multiply_nt(float (&c)[M][N / 8][4], Owned<M, D, KEEP> &a,
                                          const act *b)
{
    const int lane = threadIdx.x % WARP;
    b += (lane % 8 + lane / 16 * 8) * SharedRow<D>::SIZE + lane / 8 % 2 * 8;
    memset(c, 0, sizeof c);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t(&tile)[M][4] = a.a[KEEP ? k : 0];
        if (!KEEP) load_tiles<M, D>(tile, a.rows + 16 * k);
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            uint32_t word[4]; /* two tiles of B: columns 16n .. 16n+15 of c */
            ldmatrix_x4(word, b + 16 * n * SharedRow<D>::SIZE + 16 * k);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16<act>(c[m][2 * n], tile[m], word);
                mma_m16n8k16<act>(c[m][2 * n + 1], tile[m], word + 2);
            }
        }
    }
}

/* c (16M,D) += a (16M,N), rounded to act, times b (N,D) in shared memory. */
template <int M, int N, int D>
static __device__ inline void multiply_nn(float (&c)[M][D / 8][4], const float (&a)[M][N / 8][4],
                                          const act *b)
{
    const int lane = threadIdx.x % WARP;
    b += lane % 16 * SharedRow<D>::SIZE + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        uint32_t tile[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *pair = &a[m][2 * k + i / 2][i % 2 * 2];
                tile[m][i] = pack(pair[0], pair[1]);
            }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t word[4];
            ldmatrix_x4_trans(word, b + 16 * k * SharedRow<D>::SIZE + 16 * n);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16<act>(c[m][2 * n], tile[m], word);
                mma_m16n8k16<act>(c[m][2 * n + 1], tile[m], word + 2);
            }
        }
    }
}

/* Sets scores of keys after their query to -infinity. ahead = first key - first query of s. The
 * rows of s are queries, or keys if ROWS_ARE_KEYS. */
template <bool ROWS_ARE_KEYS, int M, int TILES>
static __device__ inline void mask_future(float (&s)[M][TILES][4], int ahead)
{
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                /* Query - key + ahead; if ROWS_ARE_KEYS, key - query - ahead. */
                const int below = row_of(m, e) - column_of(n, e);
                if (ROWS_ARE_KEYS ? ahead + below > 0 : ahead > below) s[m][n][e] = -INFINITY;
            }
}

/* Which elements of c (16M,N) dropout keeps: bit 4n + e of keep[m] is for c[m][n][e]. `index` is
 * that of row 0, column 0 of c; a row has T numbers. */
template <int M, int N>
static __device__ inline void keep_by_rows(uint32_t (&keep)[M], const Mask &mask, uint64_t index,
                                           int T)
{
#pragma unroll
    for (int m = 0; m < M; m++) {
        keep[m] = 0;
#pragma unroll 1
        for (int n = 0; n < N / 8; n += 2)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const uint64_t at = index + (uint64_t)row_of(m, e) * T + column_of(n, 0);
                const uint32_t bits = keep_four(mask, at); /* two for this tile, two for the next */
                keep[m] |= ((bits & 3) | (bits & 12) << 2) << (4 * n + e);
            }
    }
}

/* The same for c (16,N) of a transposed matrix, whose columns have T numbers. Four neighbouring
 * numbers of a column belong to four lanes with the same t and neighbouring g. These lanes share
 * four such groups in each tile: each lane draws one group for all four. */
template <int N>
static __device__ inline void keep_by_columns(uint32_t (&keep)[1], const Mask &mask, uint64_t index,
                                              int T)
{
    const int lane = threadIdx.x % WARP, mine = lane / 4 % 4;
    uint32_t drawn = 0;
#pragma unroll 1
    for (int n = 0; n < N / 8; n++) {
        const uint64_t at = index + (uint64_t)column_of(n, mine) * T + lane / 16 * 4 + mine / 2 * 8;
        drawn |= keep_four(mask, at) << 4 * n;
    }
    keep[0] = 0;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const uint32_t other = __shfl_sync(ALL_LANES, drawn, (lane & ~12) | e << 2);
        keep[0] |= (other >> mine & 0x11111111) << e;
    }
}

/* Writes the first `valid` rows of c (16M,D), times factor, to global memory, 16 bytes a lane. They
 * pass through the warp's own rows in shared memory. */
template <int M, int D>
static __device__ inline void write_rows(act *to, size_t to_row, int valid,
                                         const float (&c)[M][D / 8][4], float factor, act *rows)
{
    __syncwarp(); /* the last products no longer read the rows */
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const uint32_t word = pack(c[m][n][e] * factor, c[m][n][e + 1] * factor);
                memcpy(rows + row_of(m, e) * SharedRow<D>::SIZE + 8 * n + threadIdx.x % 4 * 2,
                       &word, sizeof word);
            }
    __syncwarp();
    for (int i = threadIdx.x % WARP; i < 16 * M * (D / 8); i += WARP) {
        const int r = i / (D / 8), column = i % (D / 8) * 8;
        if (r < valid)
            *(uint4 *)(to + r * to_row + column) =
                *(const uint4 *)(rows + r * SharedRow<D>::SIZE + column);
    }
}

static const float LOG2_E = 1.44269504f;

/* out (B,T,H*D) and lse (B,H,T) of qkv (B,T,3*H*D), as in attention_forward. Grid: heads of all
 * sequences, then blocks of queries. The longest blocks start first, so that the last to start are
 * short. */
template <int D, bool DROP>
static __global__ void __launch_bounds__(FLASH_THREADS, FlashForward<D, DROP>::BLOCKS)
    flash_forward_kernel(act *out, real *lse, const act *qkv, int T, int H, Mask mask)
{
    typedef FlashForward<D, DROP> Size;
    enum { M = Size::M, N = Size::N, ROWS = Size::ROWS, ROW = SharedRow<D>::SIZE };
    extern __shared__ float4 shared[];
    act *const queries = (act *)shared, *const stream = queries + ROWS * ROW;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int b = blockIdx.x / H, h = blockIdx.x % H;
    const int i0 = (gridDim.y - 1 - blockIdx.y) * ROWS, first = i0 + warp * 16 * M;
    const int keys = min(i0 + ROWS, T);
    const size_t C = (size_t)H * D;
    const act *const q = qkv + (size_t)b * T * 3 * C + h * D, *const k = q + C, *const v = k + C;
    const float scale = 1 / sqrtf(D), scale2 = scale * LOG2_E;
    mask.d = head_dropout(mask.d, b, h, T);

    load_rows<D, ROWS, false>(queries, rows_from(q, 3 * C, i0, T));
    load_pair<D, N, true>(stream, rows_from(k, 3 * C, 0, T), rows_from(v, 3 * C, 0, T));
    cp_async_wait<0>();
    __syncthreads();
    Owned<M, D, Size::KEEP> owned(queries + warp * 16 * M * ROW);

    /* Of this lane's rows; sum covers only this lane's columns. */
    float o[M][D / 8][4] = {}, top[M][2], sum[M][2] = {};
    for (int m = 0; m < M; m++) top[m][0] = top[m][1] = -INFINITY;
    for (int j0 = 0, stage = 0; j0 < keys; j0 += N, stage ^= 1) {
        const act *const k_rows = stream + stage * 2 * N * ROW, *const v_rows = k_rows + N * ROW;
        cp_async_wait<0>();
        __syncthreads(); /* this stage has come, and everyone is done with the other */
        if (j0 + N < keys)
            load_pair<D, N, true>(stream + (stage ^ 1) * 2 * N * ROW,
                                  rows_from(k, 3 * C, j0 + N, T), rows_from(v, 3 * C, j0 + N, T));
        if (j0 > first + 16 * M - 1) continue; /* keys after all of this warp's queries */

        uint32_t keep[M];
        float s[M][N / 8][4];
        if (DROP) keep_by_rows<M, N>(keep, mask, mask.d.first + (uint64_t)first * T + j0, T);
        multiply_nt<M, N, D>(s, owned, k_rows);
        if (j0 + N - 1 > first) mask_future<false>(s, j0 - first);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) { /* row_of(m, 2 * half) */
                float old = top[m][half], now = old;
#pragma unroll
                for (int n = 0; n < N / 8; n++)
                    now = fmaxf(now, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                now = fmaxf(now, __shfl_xor_sync(ALL_LANES, now, 1));
                now = fmaxf(now, __shfl_xor_sync(ALL_LANES, now, 2));
                const float shrink = exp2f((old - now) * scale2);
                top[m][half] = now;
                sum[m][half] *= shrink;
#pragma unroll
                for (int n = 0; n < N / 8; n++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        const float p = exp2f(s[m][n][e] * scale2 - now * scale2);
                        /* The sum is over all scores: dropout comes after the softmax. */
                        sum[m][half] += p;
                        s[m][n][e] = DROP && !(keep[m] >> (4 * n + e) & 1) ? 0 : p;
                    }
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    o[m][n][2 * half] *= shrink;
                    o[m][n][2 * half + 1] *= shrink;
                }
            }
        multiply_nn<M, N, D>(o, s, v_rows);
    }

#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = first + row_of(m, 2 * half);
            float all = sum[m][half];
            all += __shfl_xor_sync(ALL_LANES, all, 1);
            all += __shfl_xor_sync(ALL_LANES, all, 2);
            if (lane % 4 == 0 && i < T)
                lse[(size_t)blockIdx.x * T + i] = top[m][half] * scale + logf(all);
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                o[m][n][2 * half] *= 1 / all;
                o[m][n][2 * half + 1] *= 1 / all;
            }
        }
    write_rows<M, D>(out + ((size_t)b * T + first) * C + h * D, C, T - first, o,
                     DROP ? mask.scale : 1, queries + warp * 16 * M * ROW);
}

/* Turns scores s into P after dropout, without its factor 1/(1-p), and dp = dO V' into dS, at
 * c[m][n][e]. */
template <bool DROP>
static __device__ inline void flash_softmax_backward(float &s, float &dp, float scale2, float lse2,
                                                     float delta, bool keep, float keep_scale)
{
    const float p = exp2f(s * scale2 - lse2);
    if (DROP) dp = keep ? dp * keep_scale : 0;
    s = DROP && !keep ? 0 : p;
    dp = p * (dp - delta);
}

/* dq of dqkv (B,T,3*H*D). The grid is that of flash_forward_kernel. */
template <int D, bool DROP>
static __global__ void __launch_bounds__(FLASH_THREADS, FlashBackwardQ<D, DROP>::BLOCKS)
    flash_backward_q_kernel(act *dqkv, const real *delta, const act *dout, const real *lse,
                            const act *qkv, int T, int H, Mask mask)
{
    typedef FlashBackwardQ<D, DROP> Size;
    enum {
        M = Size::M,
        N = Size::N,
        STREAM = Size::STREAM,
        ROWS = Size::ROWS,
        ROW = SharedRow<D>::SIZE
    };
    extern __shared__ float4 shared[];
    act *const queries = (act *)shared, *const gradients = queries + ROWS * ROW;
    act *const stream = gradients + ROWS * ROW;
    const int warp = threadIdx.x / WARP, b = blockIdx.x / H, h = blockIdx.x % H;
    const int i0 = (gridDim.y - 1 - blockIdx.y) * ROWS, first = i0 + warp * 16 * M;
    const int keys = min(i0 + ROWS, T);
    const size_t C = (size_t)H * D, head = (size_t)b * T * 3 * C + h * D;
    const act *const q = qkv + head, *const k = q + C, *const v = k + C;
    const act *const go = dout + (size_t)b * T * C + h * D;
    const float scale = 1 / sqrtf(D), scale2 = scale * LOG2_E, keep_scale = DROP ? mask.scale : 1;
    mask.d = head_dropout(mask.d, b, h, T);

    load_pair<D, ROWS, false>(queries, rows_from(q, 3 * C, i0, T), rows_from(go, C, i0, T));
    load_pair<D, STREAM, true>(stream, rows_from(k, 3 * C, 0, T), rows_from(v, 3 * C, 0, T));
    float lse2[M][2], row_delta[M][2];
    for (int m = 0; m < M; m++)
        for (int half = 0; half < 2; half++) {
            const int i = first + row_of(m, 2 * half);
            lse2[m][half] = i < T ? lse[(size_t)blockIdx.x * T + i] * LOG2_E : 0;
            row_delta[m][half] = i < T ? delta[(size_t)blockIdx.x * T + i] : 0;
        }
    cp_async_wait<0>();
    __syncthreads();
    Owned<M, D, Size::KEEP> owned_q(queries + warp * 16 * M * ROW),
        owned_do(gradients + warp * 16 * M * ROW);

    float dq[M][D / 8][4] = {};
    for (int first_key = 0, stage = 0; first_key < keys; first_key += STREAM, stage ^= 1) {
        const act *const k_rows = stream + stage * 2 * STREAM * ROW;
        const act *const v_rows = k_rows + STREAM * ROW;
        const int next_key = first_key + STREAM;
        cp_async_wait<0>();
        __syncthreads(); /* this stage has come, and everyone is done with the other */
        if (next_key < keys)
            load_pair<D, STREAM, true>(stream + (stage ^ 1) * 2 * STREAM * ROW,
                                       rows_from(k, 3 * C, next_key, T),
                                       rows_from(v, 3 * C, next_key, T));
        for (int j = 0; j < STREAM && first_key + j < first + 16 * M; j += N) {
            const int j0 = first_key + j;
            uint32_t keep[M];
            float s[M][N / 8][4], dp[M][N / 8][4];
            if (DROP) keep_by_rows<M, N>(keep, mask, mask.d.first + (uint64_t)first * T + j0, T);
            multiply_nt<M, N, D>(s, owned_q, k_rows + j * ROW);
            multiply_nt<M, N, D>(dp, owned_do, v_rows + j * ROW);
            if (j0 + N - 1 > first) mask_future<false>(s, j0 - first);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        flash_softmax_backward<DROP>(
                            s[m][n][e], dp[m][n][e], scale2, lse2[m][e / 2], row_delta[m][e / 2],
                            DROP && (keep[m] >> (4 * n + e) & 1), keep_scale);
            multiply_nn<M, N, D>(dq, dp, k_rows + j * ROW);
        }
    }
    write_rows<M, D>(dqkv + head + first * 3 * C, 3 * C, T - first, dq, scale,
                     queries + warp * 16 * M * ROW);
}

/* lse times log2(e), and delta, of query i of this block's head; zeros if i >= T. */
static __device__ inline float2 query_statistics(const real *lse, const real *delta, int i, int T)
{
    const size_t at = (size_t)blockIdx.x * T + i;
    return i < T ? make_float2(lse[at] * LOG2_E, delta[at]) : make_float2(0, 0);
}

/* dk and dv of dqkv. Grid: heads of all sequences, then blocks of keys. The first blocks are the
 * longest. */
template <int D, bool DROP>
static __global__ void __launch_bounds__(FLASH_THREADS, FlashBackwardKV<D, DROP>::BLOCKS)
    flash_backward_kv_kernel(act *dqkv, const real *delta, const act *dout, const real *lse,
                             const act *qkv, int T, int H, Mask mask)
{
    typedef FlashBackwardKV<D, DROP> Size;
    enum {
        M = Size::M,
        N = Size::N,
        STREAM = Size::STREAM,
        ROWS = Size::ROWS,
        ROW = SharedRow<D>::SIZE
    };
    extern __shared__ float4 shared[];
    /* For two queries each: lse, delta, lse, delta. */
    __shared__ float4 statistics[2][STREAM / 2];
    act *const keys = (act *)shared, *const values = keys + ROWS * ROW;
    act *const stream = values + ROWS * ROW;
    const int warp = threadIdx.x / WARP, b = blockIdx.x / H, h = blockIdx.x % H;
    const int j0 = blockIdx.y * ROWS, first = j0 + warp * 16 * M;
    const size_t C = (size_t)H * D, head = (size_t)b * T * 3 * C + h * D;
    const act *const q = qkv + head, *const k = q + C, *const v = k + C;
    const act *const go = dout + (size_t)b * T * C + h * D;
    const float scale = 1 / sqrtf(D), scale2 = scale * LOG2_E, keep_scale = DROP ? mask.scale : 1;
    mask.d = head_dropout(mask.d, b, h, T);

    load_pair<D, ROWS, false>(keys, rows_from(k, 3 * C, j0, T), rows_from(v, 3 * C, j0, T));
    load_pair<D, STREAM, true>(stream, rows_from(q, 3 * C, j0, T), rows_from(go, C, j0, T));
    float2 next = query_statistics(lse, delta, j0 + threadIdx.x, T);
    cp_async_wait<0>();
    __syncthreads();
    Owned<M, D, Size::KEEP> owned_k(keys + warp * 16 * M * ROW),
        owned_v(values + warp * 16 * M * ROW);

    float dk[M][D / 8][4] = {}, dv[M][D / 8][4] = {};
    for (int first_query = j0, stage = 0; first_query < T; first_query += STREAM, stage ^= 1) {
        const act *const q_rows = stream + stage * 2 * STREAM * ROW;
        const act *const go_rows = q_rows + STREAM * ROW;
        const int next_query = first_query + STREAM;
        if (threadIdx.x < STREAM) ((float2 *)statistics[stage])[threadIdx.x] = next;
        cp_async_wait<0>();
        __syncthreads(); /* this stage has come, and everyone is done with the other */
        if (next_query < T) {
            load_pair<D, STREAM, true>(stream + (stage ^ 1) * 2 * STREAM * ROW,
                                       rows_from(q, 3 * C, next_query, T),
                                       rows_from(go, C, next_query, T));
            next = query_statistics(lse, delta, next_query + threadIdx.x, T);
        }
#pragma unroll
        for (int i = 0; i < STREAM; i += N) {
            const int i0 = first_query + i;
            if (i0 + N <= first) continue; /* queries before all of this warp's keys */
            uint32_t keep[M];
            float s[M][N / 8][4], dp[M][N / 8][4];
            if (DROP) keep_by_columns<N>(keep, mask, mask.d.first + (uint64_t)i0 * T + first, T);
            multiply_nt<M, N, D>(s, owned_k, q_rows + i * ROW);
            multiply_nt<M, N, D>(dp, owned_v, go_rows + i * ROW);
            if (first + 16 * M - 1 > i0) mask_future<true>(s, first - i0);
#pragma unroll
            for (int n = 0; n < N / 8; n++) {
                const float4 two = statistics[stage][(i + column_of(n, 0)) / 2];
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        flash_softmax_backward<DROP>(s[m][n][e], dp[m][n][e], scale2,
                                                     e % 2 ? two.z : two.x, e % 2 ? two.w : two.y,
                                                     DROP && (keep[m] >> (4 * n + e) & 1),
                                                     keep_scale);
            }
            multiply_nn<M, N, D>(dv, s, go_rows + i * ROW);
            multiply_nn<M, N, D>(dk, dp, q_rows + i * ROW);
        }
    }
    act *const to = dqkv + head + first * 3 * C;
    write_rows<M, D>(to + C, 3 * C, T - first, dk, scale, keys + warp * 16 * M * ROW);
    write_rows<M, D>(to + 2 * C, 3 * C, T - first, dv, keep_scale, values + warp * 16 * M * ROW);
}

/* Starts a kernel above. It needs more shared memory than a kernel has by default. */
#define LAUNCH_FLASH(kernel, Size, B, T, H, ...)                                                   \
    do {                                                                                           \
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,       \
                                        Size::BYTES));                                             \
        const dim3 grid(blocks((B) * (H), 1), blocks(T, Size::ROWS));                              \
        LAUNCH_SHARED(kernel, grid, FLASH_THREADS, Size::BYTES, __VA_ARGS__, (int)(T), (int)(H),   \
                      mask);                                                                       \
    } while (0)

template <int D, bool DROP>
static void flash_forward(act *out, real *lse, const act *qkv, size_t B, size_t T, size_t H,
                          Mask mask)
{
    typedef FlashForward<D, DROP> Size;
    LAUNCH_FLASH((flash_forward_kernel<D, DROP>), Size, B, T, H, out, lse, qkv);
}

template <int D, bool DROP>
static void flash_backward(act *dqkv, const real *delta, const act *dout, const real *lse,
                           const act *qkv, size_t B, size_t T, size_t H, Mask mask)
{
    typedef FlashBackwardQ<D, DROP> SizeQ;
    typedef FlashBackwardKV<D, DROP> SizeKV;
    LAUNCH_FLASH((flash_backward_q_kernel<D, DROP>), SizeQ, B, T, H, dqkv, delta, dout, lse, qkv);
    LAUNCH_FLASH((flash_backward_kv_kernel<D, DROP>), SizeKV, B, T, H, dqkv, delta, dout, lse, qkv);
}

#define FLASH_BY_DROP(f, D, drop, ...)                                                             \
    do {                                                                                           \
        if (drop) f<D, true>(__VA_ARGS__);                                                         \
        else f<D, false>(__VA_ARGS__);                                                             \
    } while (0)

/* Calls the f<D, DROP> that fits. There are three head sizes. */
#define FLASH_BY_SIZE(f, D, drop, ...)                                                             \
    do {                                                                                           \
        if ((D) == 64) FLASH_BY_DROP(f, 64, drop, __VA_ARGS__);                                    \
        if ((D) == 96) FLASH_BY_DROP(f, 96, drop, __VA_ARGS__);                                    \
        if ((D) == 128) FLASH_BY_DROP(f, 128, drop, __VA_ARGS__);                                  \
    } while (0)
#else
#define FLASH_BY_SIZE(...)
#endif

/* Are there tensor-core kernels for heads of D columns? */
static bool flash_fits(size_t D) { return !FULL_PRECISION && (D == 64 || D == 96 || D == 128); }

static void attention_forward(act *out, real *lse, const act *qkv, size_t B, size_t T, size_t H,
                              size_t D, Dropout d)
{
    const bool vectors = D % 4 == 0 && ((uintptr_t)out | (uintptr_t)qkv) % 16 == 0;
    const Mask m = make_mask(d);
    if (vectors && flash_fits(D)) {
        FLASH_BY_SIZE(flash_forward, D, d.p > 0, out, lse, qkv, B, T, H, m);
        return;
    }
    LAUNCH_ATTENTION(attention_forward_kernel, B, T, H, D, out, lse, qkv);
}

static void attention_backward(act *dqkv, real *delta, const act *dout, const act *out,
                               const real *lse, const act *qkv, size_t B, size_t T, size_t H,
                               size_t D, Dropout d)
{
    const bool vectors =
        D % 4 == 0 && ((uintptr_t)dqkv | (uintptr_t)dout | (uintptr_t)qkv) % 16 == 0;
    const Mask m = make_mask(d);
    LAUNCH(attention_delta_kernel, blocks(B * T * H, 256 / WARP), 256, delta, dout, out, B * T * H,
           T, H, D);
    if (vectors && flash_fits(D)) {
        FLASH_BY_SIZE(flash_backward, D, d.p > 0, dqkv, delta, dout, lse, qkv, B, T, H, m);
        return;
    }
    LAUNCH_ATTENTION(attention_backward_q_kernel, B, T, H, D, dqkv, delta, dout, lse, qkv);
    LAUNCH_ATTENTION(attention_backward_kv_kernel, B, T, H, D, dqkv, delta, dout, lse, qkv);
}

/* Appends K and V of qkv (n,3C) to the caches (positions,C), from row `past` on. A block has a
 * row. */
static __global__ void append_kernel(act *k_cache, act *v_cache, const act *qkv, size_t past,
                                     size_t C)
{
    const size_t from = blockIdx.x * 3 * C, to = (past + blockIdx.x) * C;
    for (size_t c = threadIdx.x; c < C; c += blockDim.x) {
        k_cache[to + c] = qkv[from + C + c];
        v_cache[to + c] = qkv[from + 2 * C + c];
    }
}

/* One query of one head meets all keys so far. Each of the block's eight warps takes every eighth
 * key and has a softmax of its own. Its lanes share the columns of the dot product, and each lane
 * has four columns of o, 32 apart. At the end the eight softmaxes become one. Grid: heads, queries,
 * groups of 128 columns. */
static __global__ void attention_cached_forward_kernel(act *out, const act *k_cache,
                                                       const act *v_cache, const act *qkv,
                                                       size_t past, int D)
{
    __shared__ real tops[SUM_WARPS], sums[SUM_WARPS], parts[SUM_WARPS][4 * WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, column = blockIdx.z * 4 * WARP;
    const size_t C = (size_t)gridDim.x * D, head = (size_t)blockIdx.x * D, i = blockIdx.y;
    const act *q = qkv + i * 3 * C + head, *k = k_cache + head, *v = v_cache + head + column;
    const real scale = 1 / sqrtf((real)D);
    real top = -INFINITY, sum = 0, o[4] = {};
    for (size_t j = warp; j <= past + i; j += SUM_WARPS) {
        real s = 0;
        for (int c = lane; c < D; c += WARP) s += to_real(q[c]) * to_real(k[j * C + c]);
        for (int other = WARP / 2; other > 0; other /= 2) s += __shfl_xor_sync(ALL_LANES, s, other);
        s *= scale;
        const real now = Max::of(top, s), shrink = expf(top - now), p = expf(s - now);
        top = now;
        sum = sum * shrink + p;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const bool exists = column + lane + WARP * c < D;
            o[c] = o[c] * shrink + (exists ? p * to_real(v[j * C + lane + WARP * c]) : 0);
        }
    }
    if (lane == 0) {
        tops[warp] = top;
        sums[warp] = sum;
    }
    for (int c = 0; c < 4; c++) parts[warp][lane + WARP * c] = o[c];
    __syncthreads();
    const int c = threadIdx.x;
    if (c >= 4 * WARP || column + c >= D) return;
    real all = tops[0], total = 0, value = 0;
    for (int w = 1; w < SUM_WARPS; w++) all = Max::of(all, tops[w]);
    for (int w = 0; w < SUM_WARPS; w++) {
        const real share = expf(tops[w] - all); /* 0 if the warp had no key */
        total += sums[w] * share;
        value += parts[w][c] * share;
    }
    out[i * C + head + column + c] = to_act(value / total);
}

static void attention_cached_forward(act *out, act *k_cache, act *v_cache, const act *qkv, size_t n,
                                     size_t past, size_t H, size_t D)
{
    const Dropout none = {0, 0, 0, 0, 0, H};
    LAUNCH(append_kernel, blocks(n, 1), row_threads(H * D, 1), k_cache, v_cache, qkv, past, H * D);
    if (past == 0 && n > 1) { /* a prompt attends only to itself */
        attention_forward(out, (real *)workspace(H * n * sizeof(real)), qkv, 1, n, H, D, none);
        return;
    }
    const dim3 grid(blocks(H, 1), blocks(n, 1), blocks(D, 4 * WARP));
    LAUNCH(attention_cached_forward_kernel, grid, SUM_WARPS * WARP, out, k_cache, v_cache, qkv,
           past, (int)D);
}

/* ---- Softmax and cross entropy over a slice of the vocabulary [§3] --------------------------- */

/* A block has a row of logits (N,Vp), a thread W neighbouring columns out of each blockDim W. The
 * two kernels below do the same. */
template <int W>
static __global__ void logits_max_kernel(real *max, const act *logits, size_t Vp, size_t valid)
{
    const act *z = logits + blockIdx.x * Vp;
    real top[1] = {-INFINITY};
    for (size_t v = threadIdx.x * W; v < valid; v += blockDim.x * W) {
        real x[W];
        load(x, z + v);
#pragma unroll
        for (int i = 0; i < W; i++)
            if (v + i < valid && x[i] > top[0]) top[0] = x[i];
    }
    block_reduce<Max>(top);
    if (threadIdx.x == 0) max[blockIdx.x] = top[0];
}

static void logits_max(real *max, const act *logits, size_t N, size_t Vp, size_t valid)
{
    LAUNCH_ROWS(logits_max_kernel, wide(Vp, logits), N, Vp, max, logits, Vp, valid);
}

template <int W>
static __global__ void logits_sum_exp_kernel(real *sum, real *target_logit, const act *logits,
                                             const real *max, const int *targets, size_t Vp,
                                             size_t valid, size_t v0)
{
    const size_t n = blockIdx.x, target = (size_t)targets[n] - v0;
    const act *z = logits + n * Vp;
    const real top = max[n];
    double total[1] = {};
    for (size_t v = threadIdx.x * W; v < valid; v += blockDim.x * W) {
        real x[W];
        load(x, z + v);
#pragma unroll
        for (int i = 0; i < W; i++)
            if (v + i < valid) total[0] += (double)expf(x[i] - top);
    }
    block_reduce<Add>(total);
    if (threadIdx.x > 0) return;
    sum[n] = (real)total[0];
    target_logit[n] = target < valid ? to_real(z[target]) - top : 0;
}

static void logits_sum_exp(real *sum, real *target_logit, const act *logits, const real *max,
                           const int *targets, size_t N, size_t Vp, size_t valid, size_t v0)
{
    LAUNCH_ROWS(logits_sum_exp_kernel, wide(Vp, logits), N, Vp, sum, target_logit, logits, max,
                targets, Vp, valid, v0);
}

/* A thread has a row. */
static __global__ void cross_entropy_loss_kernel(real *loss, const real *sum,
                                                 const real *target_logit, size_t N)
{
    const size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) loss[n] = (real)(log((double)sum[n]) - (double)target_logit[n]);
}

static void cross_entropy_loss(real *loss, const real *sum, const real *target_logit, size_t N)
{
    LAUNCH(cross_entropy_loss_kernel, blocks(N, 128), 128, loss, sum, target_logit, N);
}

template <int W>
static __global__ void cross_entropy_backward_kernel(act *logits, const real *max, const real *sum,
                                                     const int *targets, const real *weight,
                                                     real scale, size_t Vp, size_t valid, size_t v0)
{
    const size_t n = blockIdx.x, target = (size_t)targets[n] - v0;
    act *z = logits + n * Vp;
    const real top = max[n], w = weight[n] * scale, w_over_sum = w / sum[n];
    for (size_t v = threadIdx.x * W; v < Vp; v += blockDim.x * W) {
        real x[W];
        load(x, z + v);
#pragma unroll
        for (int i = 0; i < W; i++) {
            x[i] = v + i < valid ? expf(x[i] - top) * w_over_sum : 0;
            if (v + i == target && target < valid) x[i] -= w;
        }
        store(z + v, x);
    }
}

static void cross_entropy_backward(act *logits, const real *max, const real *sum,
                                   const int *targets, const real *weight, real scale, size_t N,
                                   size_t Vp, size_t valid, size_t v0)
{
    LAUNCH_ROWS(cross_entropy_backward_kernel, wide(Vp, logits), N, Vp, logits, max, sum, targets,
                weight, scale, Vp, valid, v0);
}

/* ---- Optimiser's and collectives' inner loops ------------------------------------------------ */

/* AdamW's numbers in float, the same for all threads. */
typedef struct {
    real lr, decay, eps, grad_scale, b1, b2, r1, r2, c1, c2;
} AdamWReal;

/* A thread has W neighbouring parameters. */
template <int W>
static __global__ void adamw_kernel(act *w, real *master, real *m, real *v, const act *g, size_t n,
                                    AdamWReal h)
{
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (i >= n) return;
    real p[W], gi[W], mi[W], vi[W];
    if (master) load(p, master + i);
    else load(p, w + i);
    load(gi, g + i);
    load(mi, m + i);
    load(vi, v + i);
#pragma unroll
    for (int j = 0; j < W; j++) {
        gi[j] *= h.grad_scale;
        mi[j] = h.b1 * mi[j] + h.r1 * gi[j];
        vi[j] = h.b2 * vi[j] + h.r2 * gi[j] * gi[j];
        p[j] -= h.lr * (mi[j] * h.c1 / (sqrtf(vi[j] * h.c2) + h.eps) + h.decay * p[j]);
    }
    store(m + i, mi);
    store(v + i, vi);
    if (master) store(master + i, p);
    store(w + i, p);
}

static void adamw(act *w, real *master, real *m, real *v, const act *g, size_t n, AdamW h)
{
    const AdamWReal r = {(real)h.lr,
                         (real)h.decay,
                         (real)h.eps,
                         (real)h.grad_scale,
                         (real)h.beta1,
                         (real)h.beta2,
                         (real)(1 - h.beta1),
                         (real)(1 - h.beta2),
                         (real)(1 / (1 - pow(h.beta1, (double)h.step))),
                         (real)(1 / (1 - pow(h.beta2, (double)h.step)))};
    if (wide(n, w, g) && wide(n, master, m, v))
        LAUNCH(adamw_kernel<4>, blocks(n, 4 * 256), 256, w, master, m, v, g, n, r);
    else LAUNCH(adamw_kernel<1>, blocks(n, 256), 256, w, master, m, v, g, n, r);
}

enum { SQUARES_BLOCKS = 1024 };

/* part[block] = sum of squares of the numbers that the block's threads read: W neighbouring ones
 * out of each gridDim blockDim W. */
template <int W> static __global__ void sum_squares_kernel(double *part, const act *x, size_t n)
{
    double sum[1] = {};
    const size_t stride = (size_t)gridDim.x * blockDim.x * W;
    for (size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * W; i < n; i += stride) {
        real v[W];
        load(v, x + i);
#pragma unroll
        for (int j = 0; j < W; j++) sum[0] += (double)v[j] * (double)v[j];
    }
    block_reduce<Add>(sum);
    if (threadIdx.x == 0) part[blockIdx.x] = sum[0];
}

static double sum_squares(const act *x, size_t n)
{
    double part[SQUARES_BLOCKS], total = 0;
    const size_t count = min_size(ceil_div(n, 1024), SQUARES_BLOCKS);
    if (n == 0) return 0;
    double *space = (double *)workspace(count * sizeof *space);
    if (wide(n, x)) LAUNCH(sum_squares_kernel<WIDE>, blocks(count, 1), 256, space, x, n);
    else LAUNCH(sum_squares_kernel<1>, blocks(count, 1), 256, space, x, n);
    device_download(part, space, count * sizeof *part);
    for (size_t i = 0; i < count; i++) total += part[i];
    return total;
}

/* x[r]: the array of rank r, which may be in the memory of another GPU. A thread has W neighbouring
 * elements of all the arrays, and takes them in rank order. A NaN wins every maximum. */
template <typename T, int W>
static __global__ void reduce_slice_kernel(void *const *x, int ranks, size_t begin, size_t n, Op op)
{
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (i >= n) return;
    real total[W];
    load(total, (const T *)x[0] + begin + i);
    for (int r = 1; r < ranks; r++) {
        real next[W];
        load(next, (const T *)x[r] + begin + i);
#pragma unroll
        for (int j = 0; j < W; j++) {
            if (op == SUM) total[j] += next[j];
            else if (next[j] > total[j] || next[j] != next[j]) total[j] = next[j];
        }
    }
    for (int r = 0; r < ranks; r++) store((T *)x[r] + begin + i, total);
}

/* The ranks' pointers go to the working space, where the kernel reads them. The copy runs in the
 * stream; the host's array x stays unchanged until the collective has waited for the stream. */
template <typename T>
static void reduce_slice_of(void *const *x, int ranks, size_t begin, size_t n, Op op)
{
    enum { MANY = 16 / sizeof(T) };
    const size_t bytes = (size_t)ranks * sizeof *x;
    uintptr_t addresses = 0;
    if (n == 0) return;
    void **space = (void **)workspace(bytes);
    CUDA_CHECK(cudaMemcpyAsync(space, x, bytes, cudaMemcpyHostToDevice, gpu()->stream));
    for (int r = 0; r < ranks; r++) addresses |= (uintptr_t)x[r];
    if (begin % MANY == 0 && n % MANY == 0 && addresses % 16 == 0)
        LAUNCH((reduce_slice_kernel<T, MANY>), blocks(n, MANY * 256), 256, space, ranks, begin, n,
               op);
    else LAUNCH((reduce_slice_kernel<T, 1>), blocks(n, 256), 256, space, ranks, begin, n, op);
}

static void reduce_slice(void *const *x, int ranks, size_t begin, size_t n, Type type, Op op)
{
    if (type == ACT) reduce_slice_of<act>(x, ranks, begin, n, op);
    if (type == REAL_ARRAY) reduce_slice_of<real>(x, ranks, begin, n, op);
}
