/* test_cudaemu.cu - every feature of the emulator against plain C. nvcc compiles the same file.
 *
 *     sed -f cu2cpp.sed test_cudaemu.cu > test.cpp
 *     g++ -std=gnu++17 -O2 -I. test.cpp cudaemu.cpp -lpthread && ./a.out */
#ifdef __CUDACC__
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <type_traits>
#else
#include "cudaemu.h"
#endif
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#if defined(__has_feature) && !defined(__SANITIZE_ADDRESS__)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif

#ifdef __CUDACC__ /* the wrappers that cudaemu.h emulates */
template <class T>
__device__ void mma_m16n8k16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    if (std::is_same<T, __half>::value)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
            "{%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
            "{%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ void ldmatrix_x4(uint32_t r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}
__device__ void ldmatrix_x4_trans(uint32_t r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}
__device__ void cp_async_16(void *shared, const void *global, bool valid = true)
{
    const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#endif

static int failures, checks;
#define CHECK(condition)                                                                           \
    do {                                                                                           \
        checks++;                                                                                  \
        if (!(condition)) {                                                                        \
            failures++;                                                                            \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);                \
        }                                                                                          \
    } while (0)
#define OK(call) CHECK((call) == 0)

/* Device memory with a copy on the host. */
template <class T> struct Buffer {
    std::vector<T> h;
    T *d;
    explicit Buffer(size_t n) : h(n) { OK(cudaMalloc((void **)&d, n * sizeof(T))); }
    explicit Buffer(std::vector<T> v) : h(v)
    {
        OK(cudaMalloc((void **)&d, h.size() * sizeof(T)));
        up();
    }
    Buffer(const Buffer &) = delete;
    ~Buffer() { OK(cudaFree(d)); }
    void up() { OK(cudaMemcpy(d, h.data(), h.size() * sizeof(T), cudaMemcpyHostToDevice)); }
    T *down()
    {
        OK(cudaMemcpy(h.data(), d, h.size() * sizeof(T), cudaMemcpyDeviceToHost));
        return h.data();
    }
};

static uint32_t rng = 1;
static uint32_t random_bits()
{
    rng ^= rng << 13;
    rng ^= rng >> 17;
    rng ^= rng << 5;
    return rng;
}
static float random_float() { return (float)(int32_t)random_bits() * 0x1p-31f; }
static float poison() { return nanf(""); }

/* ---- Indices, fresh memory, shared variables, barriers --------------------------------------- */

__global__ void indices(int *out)
{
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] =
        threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z +
        1000 * (blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z);
}

static void test_indices()
{
    dim3 g(2, 3, 4), b(5, 3, 2);
    Buffer<int> out(24 * 30);
    indices<<<g, b>>>(out.d);
    OK(cudaGetLastError());
    int *p = out.down(), bad = 0;
    for (unsigned bz = 0; bz < g.z; bz++)
        for (unsigned by = 0; by < g.y; by++)
            for (unsigned bx = 0; bx < g.x; bx++)
                for (unsigned z = 0; z < b.z; z++)
                    for (unsigned y = 0; y < b.y; y++)
                        for (unsigned x = 0; x < b.x; x++)
                            bad += *p++ !=
                                   (int)(x + 10 * y + 100 * z + 1000 * (bx + 10 * by + 100 * bz));
    CHECK(bad == 0);
}

struct Pair {
    float a;
    double b;
};
template <int N> __device__ float *twice_declared()
{
    __shared__ float x[N];
    return x;
}
__global__ void fresh(int *bad, const float *global, int n)
{
    extern __shared__ float dynamic[];
    __shared__ __align__(16) float x[8], y;
    __shared__ float m[3][4];
    __shared__ Pair pairs[2];
    int t = threadIdx.x, wrong = 0;
    if (t == 0) {
        for (int i = 0; i < 8; i++) wrong += !isnan(x[i]);
        for (int i = 0; i < 12; i++) wrong += !isnan(m[i / 4][i % 4]);
        for (int i = 0; i < n; i++) wrong += !isnan(dynamic[i]) + !isnan(global[i]);
        wrong += !isnan(y) + !isnan(pairs[1].a) + !isnan(pairs[1].b);
        wrong += sizeof x != 32 || (size_t)x % 16 || (size_t)pairs % 8 || (size_t)dynamic % 16;
    }
    __syncthreads();
    /* The next block must not see these. */
    x[t % 8] = 1;
    y = 1;
    m[t % 3][t % 4] = 1;
    pairs[t % 2].a = 1;
    dynamic[t % n] = 1;
    float *a = twice_declared<4>(), *b = twice_declared<8>();
    a[t % 4] = 1;
    b[t % 8] = 2; /* each instance has its own */
    __syncthreads();
    wrong += a[t % 4] != 1 || b[t % 8] != 2 || a != twice_declared<4>();
    bad[blockIdx.x * blockDim.x + t] = wrong;
}

static void test_fresh()
{
    Buffer<float> global(100);
    Buffer<int> bad(3 * 33);
    fresh<<<3, 33, 100 * sizeof(float)>>>(bad.d, global.d, 100);
    int sum = 0, *p = bad.down();
    for (int i = 0; i < 99; i++) sum += p[i];
    CHECK(sum == 0);
}

template <class T> __device__ T block_sum(T x)
{
    __shared__ T part[32];
    for (int o = 16; o; o /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, o);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    T sum = 0;
    for (unsigned i = 0; i < blockDim.x / 32; i++) sum += part[i];
    __syncthreads();
    return sum;
}
__global__ void sums(int *out, int *votes)
{
    int t = threadIdx.x;
    for (int i = 0; i < 5; i++) {
        int sum = block_sum(t + i);
        float fsum = block_sum((float)t);
        if (t == (i * 37) % (int)blockDim.x) out[blockIdx.x * 5 + i] = sum + (int)fsum;
    }
    int count = __syncthreads_count(t % 3 == 0), any = __syncthreads_or(t == 7);
    int none = __syncthreads_or(t < 0);
    int all = __syncthreads_and(t >= 0), most = __syncthreads_and(t != 9);
    votes[blockIdx.x * blockDim.x + t] = count * 16 + any * 8 + none * 4 + all * 2 + most;
}

static void test_barriers()
{
    for (int threads : {32, 64, 256, 1024}) {
        Buffer<int> out(4 * 5), votes(4 * threads);
        sums<<<4, threads>>>(out.d, votes.d);
        int *p = out.down(), bad = 0;
        for (int i = 0; i < 20; i++) bad += p[i] != threads * (threads - 1) + threads * (i % 5);
        int *v = votes.down();
        for (int i = 0; i < 4 * threads; i++) bad += v[i] != (threads + 2) / 3 * 16 + 8 + 2;
        CHECK(bad == 0);
    }
}

/* ---- Warps ----------------------------------------------------------------------------------- */

__global__ void warps(int *out, int width, int arg, unsigned mask)
{
    int l = threadIdx.x % 32, v = 100 + threadIdx.x * threadIdx.x, *o = out + threadIdx.x * 8;
    if (!(mask >> l & 1)) return;
    o[0] = __shfl_sync(mask, v, arg, width);
    o[1] = __shfl_xor_sync(mask, v, arg, width);
    o[2] = __shfl_up_sync(mask, (double)v, arg, width);
    o[3] = __shfl_down_sync(mask, (float)v, arg, width);
    o[4] = (int)__ballot_sync(mask, v % 3 == 0);
    o[5] = __any_sync(mask, l == arg);
    o[6] = __all_sync(mask, l != arg);
    __syncwarp(mask);
    o[7] = warpSize;
}

static void test_warps()
{
    for (int width = 1; width <= 32; width *= 2)
        for (int arg = 0; arg < 32; arg++) {
            Buffer<int> out(96 * 8);
            warps<<<1, 96>>>(out.d, width, arg, 0xFFFFFFFF);
            int *p = out.down(), bad = 0;
            for (int t = 0; t < 96; t++) {
                int l = t % 32, w = t - l, first = l / width * width, end = first + width;
                auto value = [&](int lane) { return 100 + (w + lane) * (w + lane); };
                unsigned ballot = 0;
                for (int i = 0; i < 32; i++) ballot |= (unsigned)(value(i) % 3 == 0) << i;
                int want[8] = {value(first + arg % width),
                               value((l ^ arg) < end ? l ^ arg : l),
                               value(l - arg >= first ? l - arg : l),
                               value(l + arg < end ? l + arg : l),
                               (int)ballot,
                               1,
                               0,
                               32};
                bad += memcmp(want, p + t * 8, sizeof want) != 0;
            }
            CHECK(bad == 0);
        }
}

/* The halves of a warp take different branches, each with its own mask, and then meet. Also lanes
 * of a short warp, and lanes that have left. */
__global__ void halves(int *out)
{
    int l = threadIdx.x, v = l;
    if (l < 16) {
        for (int o = 8; o; o /= 2) v += __shfl_xor_sync(0x0000FFFF, v, o);
    } else {
        for (int i = 0; i < 3; i++) v = __shfl_xor_sync(0xFFFF0000, v, 1);
    }
    __syncwarp();
    out[l] = __shfl_sync(0xFFFFFFFF, v, 31 - l);
}
__global__ void short_warp(int *out)
{
    if (threadIdx.x >= 10) return;
    out[threadIdx.x] = __shfl_sync(0xFFFFFFFF, (int)threadIdx.x, 9 - threadIdx.x);
}

static void test_partial_warps()
{
    Buffer<int> out(32);
    halves<<<1, 32>>>(out.d);
    int *p = out.down(), bad = 0;
    for (int l = 0; l < 32; l++) bad += p[l] != (31 - l < 16 ? 120 : (31 - l) ^ 1);
    short_warp<<<1, 20>>>(out.d);
    out.down();
    for (int l = 0; l < 10; l++) bad += p[l] != 9 - l;
    CHECK(bad == 0);
}

/* ---- Tensor cores, cp.async ------------------------------------------------------------------ */

/* One warp: c (16,8) = a (16,16) b (16,8). a is row-major and b is stored by columns; fragments
 * have the layouts of the PTX ISA. */
template <class T> __global__ void one_mma(float *c, const T *a, const T *b)
{
    int l = threadIdx.x, g = l / 4, t = l % 4;
    uint32_t ra[4], rb[2];
    float d[4] = {1, 1, 1, 1};
    for (int r = 0; r < 4; r++) memcpy(&ra[r], &a[(g + r % 2 * 8) * 16 + t * 2 + r / 2 * 8], 4);
    for (int r = 0; r < 2; r++) memcpy(&rb[r], &b[g * 16 + t * 2 + r * 8], 4);
    mma_m16n8k16<T>(d, ra, rb);
    for (int r = 0; r < 4; r++) c[(g + r / 2 * 8) * 8 + t * 2 + r % 2] = d[r];
}
__global__ void one_ldmatrix(uint32_t *out, const uint16_t *in, int transposed)
{
    __shared__ __align__(16) uint16_t x[32][24]; /* rows of 16 bytes, 48 apart */
    int l = threadIdx.x;
    for (int i = 0; i < 8; i++) x[l][i] = in[l * 8 + i];
    __syncwarp();
    uint32_t r[4];
    if (transposed) ldmatrix_x4_trans(r, x[l]);
    else ldmatrix_x4(r, x[l]);
    for (int i = 0; i < 4; i++) out[l * 4 + i] = r[i];
}

template <class T> static void test_mma()
{
    std::vector<T> a(256), b(128);
    for (T &x : a) x = T(random_float());
    for (T &x : b) x = T(random_float());
    Buffer<T> da(a), db(b);
    Buffer<float> c(128);
    one_mma<T><<<1, 32>>>(c.d, da.d, db.d);
    c.down();
    int bad = 0;
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) {
            double sum = 1;
            for (int k = 0; k < 16; k++) sum += (double)(float)a[i * 16 + k] * (float)b[j * 16 + k];
            /* 17 roundings of numbers below 17: 17 * 8 * 2^-24 = 8e-6 */
            bad += !(fabs(c.h[i * 8 + j] - sum) <= 4e-6);
        }
    CHECK(bad == 0);
}

static void test_ldmatrix()
{
    std::vector<uint16_t> in(256);
    for (int i = 0; i < 256; i++) in[i] = (uint16_t)i;
    Buffer<uint16_t> x(in);
    Buffer<uint32_t> out(128);
    for (int transposed = 0; transposed < 2; transposed++) {
        one_ldmatrix<<<1, 32>>>(out.d, x.d, transposed);
        out.down();
        int bad = 0;
        for (int l = 0; l < 32; l++)
            for (int tile = 0; tile < 4; tile++)
                for (int high = 0; high < 2; high++) {
                    int row = l / 4, col = l % 4 * 2 + high;
                    int want = tile * 64 + (transposed ? col * 8 + row : row * 8 + col);
                    bad += (int)(out.h[l * 4 + tile] >> 16 * high & 0xFFFF) != want;
                }
        CHECK(bad == 0);
    }
}

__global__ void copies(int *out, const int4 *in, int lazy)
{
    __shared__ __align__(16) int4 x[4];
    int wrong = 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; i++) x[i] = make_int4(-1, -1, -1, -1);
        for (int i = 0; i < 4; i++) { /* groups of one, one, no and two copies */
            cp_async_16(&x[i], &in[i], i != 3);
            if (i != 2) cp_async_commit();
            if (i == 1) cp_async_commit();
        }
        if (lazy) wrong += x[0].x != -1 || x[3].w != -1;
        cp_async_wait<3>();
        wrong += x[0].x != 0 || x[0].w != 3;
        if (lazy) wrong += x[1].x != -1;
        cp_async_wait<1>();
        wrong += x[1].x != 4;
        if (lazy) wrong += x[2].x != -1;
        cp_async_wait<0>();
        wrong += x[2].y != 9 || x[3].x != 0 || x[3].w != 0;
    }
    __syncthreads();
    if (threadIdx.x == 1) out[0] = x[2].z;
    if (threadIdx.x == 0) out[1] = wrong;
}

static void test_copies()
{
    std::vector<int4> in(4);
    for (int i = 0; i < 4; i++) in[i] = make_int4(4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3);
    Buffer<int4> x(in);
    Buffer<int> out(2);
#if defined(CUDAEMU) && !defined(CUDACHECK)
    copies<<<1, 32>>>(out.d, x.d, 1);
#else /* reading before the wait is undefined */
    copies<<<1, 32>>>(out.d, x.d, 0);
#endif
    out.down();
    CHECK(out.h[0] == 10 && out.h[1] == 0);
}

/* ---- 16-bit floats --------------------------------------------------------------------------- */

static float bits_to_float(uint32_t u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}
/* The value of a 16-bit float from its fields. */
static double value16(unsigned h, int mantissa_bits, int bias)
{
    int exponent = h >> mantissa_bits & ((1 << (15 - mantissa_bits)) - 1);
    int mantissa = h & ((1 << mantissa_bits) - 1);
    double x = exponent ? ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)
                        : ldexp(mantissa, 1 - bias - mantissa_bits);
    return h & 0x8000 ? -x : x;
}

template <class T, class FromBits, class ToBits>
static void test_16bit(int mantissa_bits, int bias, FromBits from_bits, ToBits to_bits)
{
    unsigned infinity = ((1u << (15 - mantissa_bits)) - 1) << mantissa_bits, bad = 0;
    for (unsigned h = 0; h < 0x10000; h++) {
        float x = (float)from_bits((unsigned short)h);
        if ((h & 0x7FFF) > infinity) {
            bad += !isnan(x) || to_bits(T(x)) != 0x7FFF;
            continue;
        }
        bad += to_bits(T(x)) != h; /* to float and back, with infinities and signed zeros */
        if ((h & 0x7FFF) == infinity) bad += !isinf(x) || (x < 0) != (h >> 15);
        else bad += x != value16(h, mantissa_bits, bias);
    }
    CHECK(bad == 0);
    /* Rounding can only go wrong at the midpoint of two neighbours, or right beside it. At the
     * midpoint the even one is right. */
    for (unsigned h = 0; h < infinity; h++) {
        double low = value16(h, mantissa_bits, bias);
        double high = h + 1 == infinity ? ldexp(1, (int)(infinity >> mantissa_bits) - bias)
                                        : value16(h + 1, mantissa_bits, bias);
        float middle = (float)((low + high) / 2); /* exact, since a float has more bits */
        for (unsigned sign = 0; sign < 2; sign++) {
            float m = sign ? -middle : middle, s = sign ? -1.0f : 1.0f;
            unsigned base = sign << 15;
            bad += to_bits(T(m)) != base + (h & 1 ? h + 1 : h);
            bad += to_bits(T(s * nextafterf(middle, 0))) != base + h;
            bad += to_bits(T(s * nextafterf(middle, INFINITY))) != base + h + 1;
        }
    }
    bad += to_bits(T(bits_to_float(0xFFC12345))) != 0x7FFF ||
           to_bits(T(bits_to_float(0x7F800001))) != 0x7FFF;
    bad += to_bits(T(3.4e38f)) != infinity || to_bits(T(-0.0f)) != 0x8000 ||
           to_bits(T(bits_to_float(1))) != 0;
    CHECK(bad == 0);
}

static void test_conversions()
{
    test_16bit<__half>(
        10, 15, [](unsigned short u) { return __ushort_as_half(u); },
        [](__half x) { return __half_as_ushort(x); });
    test_16bit<__nv_bfloat16>(
        7, 127, [](unsigned short u) { return __ushort_as_bfloat16(u); },
        [](__nv_bfloat16 x) { return __bfloat16_as_ushort(x); });
    CHECK(__half2float(__float2half(1.5f)) == 1.5f &&
          __bfloat162float(__float2bfloat16(-2.25f)) == -2.25f);
    float2 p = __bfloat1622float2(__floats2bfloat162_rn(1, 2));
    float2 q = __half22float2(__floats2half2_rn(3, 4));
    CHECK(p.x == 1 && p.y == 2 && q.x == 3 && q.y == 4);
}

/* ---- Intrinsics and atomics ------------------------------------------------------------------ */

__global__ void intrinsics(int *bad, int *counter, float *sum, const float *x)
{
    int w = 0, i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(counter, 2);
    atomicAdd(sum, 0.25f);
    atomicMax(counter + 1, i);
    if (i == 0) {
        w += __umulhi(0xFFFFFFFFu, 0xFFFFFFFFu) != 0xFFFFFFFEu || __popc(0xF0F0) != 8 ||
             __clz(1) != 31;
        w += __clz(0) != 32 || __ffs(8) != 4 || __float_as_uint(1.0f) != 0x3F800000u ||
             __int_as_float(0x40000000) != 2;
        w += min(3, 4) != 3 || max(3u, 4u) != 4u || max(1.0f, 2.0f) != 2 || __ldg(x) != 7 ||
             fmaf(2, 3, 4) != 10;
        w += fabsf(rsqrtf(4.0f) - 0.5f) > 1e-6f || fabsf(__expf(1.0f) - 2.718282f) > 1e-5f;
        w +=
            fabsf(__fdividef(1.0f, 4.0f) - 0.25f) > 1e-6f || fabsf(erff(0.5f) - 0.5204999f) > 1e-6f;
        int old = atomicCAS(counter + 2, 5, 6), same = atomicCAS(counter + 2, 5, 7);
        w += old != 5 || same != 6 || atomicExch(counter + 2, 9) != 6;
        __threadfence();
        *bad = w;
    }
}

static void test_intrinsics()
{
    Buffer<int> bad(1), counter(std::vector<int>{0, -1, 5});
    Buffer<float> sum(std::vector<float>{0}), x(std::vector<float>{7});
    intrinsics<<<10, 100>>>(bad.d, counter.d, sum.d, x.d);
    counter.down();
    CHECK(bad.down()[0] == 0 && counter.h[0] == 2000 && counter.h[1] == 999 && counter.h[2] == 9);
    CHECK(sum.down()[0] == 250);
}

/* ---- Streams, events, devices ---------------------------------------------------------------- */

__global__ void set(float *p, float v) { *p = v; }
__global__ void add(float *p, const float *q, float v) { *p = *q + v; }

static bool is_lazy()
{
#ifdef CUDAEMU
    const char *e = getenv("CUDAEMU_ASYNC");
    return e && atoi(e);
#else
    return false;
#endif
}

static void test_streams()
{
    cudaStream_t a, b;
    cudaEvent_t e, f;
    OK(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
    OK(cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking));
    OK(cudaEventCreate(&e));
    OK(cudaEventCreateWithFlags(&f, cudaEventDisableTiming));
    Buffer<float> x(std::vector<float>{0, 0, 0});
    float *h;
    OK(cudaMallocHost((void **)&h, 4));
    *h = 5;
    set<<<1, 1, 0, a>>>(x.d, 1); /* nothing runs until something waits */
    OK(cudaMemcpyAsync(h, x.d, 4, cudaMemcpyDeviceToHost, a));
#ifndef CUDACHECK /* the checker would report this read */
    if (is_lazy()) CHECK(*h == 5 && cudaStreamQuery(a) == cudaErrorNotReady);
#endif
    OK(cudaStreamSynchronize(a));
    CHECK(*h == 1 && cudaStreamQuery(a) == cudaSuccess);

    /* Without the event, b would run first, because it is waited for first. The wait is for the
     * record made before it, not for the later one. */
    set<<<1, 1, 0, a>>>(x.d, 2);
    OK(cudaEventRecord(e, a));
    OK(cudaStreamWaitEvent(b, e, 0));
    set<<<1, 1, 0, a>>>(x.d + 2, 9);
    OK(cudaEventRecord(e, a));
    add<<<1, 1, 0, b>>>(x.d + 1, x.d, 10);
    OK(cudaMemcpyAsync(h, x.d + 1, 4, cudaMemcpyDeviceToHost, b));
    OK(cudaStreamSynchronize(b));
    CHECK(*h == 12);
    if (is_lazy()) CHECK(cudaEventQuery(e) == cudaErrorNotReady);
    OK(cudaEventSynchronize(e));
    CHECK(cudaEventQuery(e) == cudaSuccess && x.down()[2] == 9);

    /* The default stream waits for blocking streams, and they wait for it. */
    cudaStream_t c;
    OK(cudaStreamCreate(&c));
    set<<<1, 1, 0, c>>>(x.d, 3);
    add<<<1, 1>>>(x.d + 1, x.d, 10);
    add<<<1, 1, 0, c>>>(x.d + 2, x.d + 1, 10);
    OK(cudaMemcpyAsync(h, x.d + 2, 4, cudaMemcpyDeviceToHost, c));
    OK(cudaStreamSynchronize(c));
    CHECK(*h == 23);
    set<<<1, 1, 0, c>>>(x.d, 4);
    OK(cudaMemcpy(h, x.d, 4, cudaMemcpyDeviceToHost));
    CHECK(*h == 4);
    float ms = -1;
    OK(cudaEventRecord(e, a));
    OK(cudaEventSynchronize(e));
    cudaEvent_t g;
    OK(cudaEventCreate(&g));
    OK(cudaEventRecord(g, a));
    OK(cudaDeviceSynchronize());
    OK(cudaEventElapsedTime(&ms, e, g));
    CHECK(ms >= 0 && ms < 1000);
    OK(cudaMemset(x.d, 0, 12));
    CHECK(x.down()[1] == 0);
    OK(cudaMemsetAsync(x.d, 0x40, 4, a));
    OK(cudaStreamSynchronize(a));
    CHECK(x.down()[0] == bits_to_float(0x40404040));
    float *p;
    OK(cudaMallocAsync((void **)&p, 4, a));
    set<<<1, 1, 0, a>>>(p, 4);
    OK(cudaMemcpyAsync(h, p, 4, cudaMemcpyDeviceToHost, a));
    OK(cudaFreeAsync(p, a));
    OK(cudaStreamDestroy(a)); /* this finishes the stream's work */
    OK(cudaDeviceSynchronize());
    CHECK(*h == 4);
    OK(cudaStreamDestroy(b));
    OK(cudaStreamDestroy(c));
    for (cudaEvent_t event : {e, f, g}) OK(cudaEventDestroy(event));
    OK(cudaFreeHost(h));
}

/* A ring of threads plays ranks: each sums what its neighbour wrote, on several devices. Only
 * events give the order. */
constexpr int RANKS = 4, ROUNDS = 20;
struct Ring {
    float *slot[RANKS][ROUNDS];
    cudaEvent_t written[RANKS][ROUNDS];
    pthread_barrier_t meet;
    int bad[RANKS];
};
static Ring ring;

__global__ void ring_sum(float *to, const float *own, const float *neighbour)
{
    __shared__ float x[64];
    x[threadIdx.x] = neighbour[threadIdx.x];
    __syncthreads();
    to[threadIdx.x] = own[threadIdx.x] + x[63 - threadIdx.x];
}

static void *rank_main(void *arg)
{
    int r = (int)(size_t)arg, count, next = (r + 1) % RANKS;
    cudaStream_t s;
    cudaGetDeviceCount(&count);
    cudaSetDevice(r % count);
    for (int d = 0; d < count; d++)
        if (d != r % count) cudaDeviceEnablePeerAccess(d, 0);
    cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking);
    for (int i = 0; i < ROUNDS; i++) {
        cudaMalloc((void **)&ring.slot[r][i], 64 * sizeof(float));
        cudaEventCreateWithFlags(&ring.written[r][i], cudaEventDisableTiming);
    }
    float h[64];
    for (float &v : h) v = (float)r;
    cudaMemcpyAsync(ring.slot[r][0], h, sizeof h, cudaMemcpyHostToDevice, s);
    cudaEventRecord(ring.written[r][0], s);
    for (int i = 1; i < ROUNDS; i++) {
        pthread_barrier_wait(&ring.meet); /* all records of round i - 1 exist */
        cudaStreamWaitEvent(s, ring.written[next][i - 1], 0);
        ring_sum<<<1, 64, 0, s>>>(ring.slot[r][i], ring.slot[r][i - 1], ring.slot[next][i - 1]);
        cudaEventRecord(ring.written[r][i], s);
    }
    cudaMemcpyAsync(h, ring.slot[r][ROUNDS - 1], sizeof h, cudaMemcpyDeviceToHost, s);
    cudaStreamSynchronize(s);
    double want[RANKS], sum[RANKS];
    for (int k = 0; k < RANKS; k++) want[k] = k;
    for (int i = 1; i < ROUNDS; i++) {
        for (int k = 0; k < RANKS; k++) sum[k] = want[k] + want[(k + 1) % RANKS];
        memcpy(want, sum, sizeof sum);
    }
    for (float v : h) ring.bad[r] += v != (float)want[r];
    pthread_barrier_wait(&ring.meet);
    for (int i = 0; i < ROUNDS; i++) {
        cudaFree(ring.slot[r][i]);
        cudaEventDestroy(ring.written[r][i]);
    }
    cudaStreamDestroy(s);
    return nullptr;
}

static void test_ranks()
{
    pthread_t threads[RANKS];
    pthread_barrier_init(&ring.meet, nullptr, RANKS);
    for (int r = 0; r < RANKS; r++)
        pthread_create(&threads[r], nullptr, rank_main, (void *)(size_t)r);
    for (int r = 0; r < RANKS; r++) pthread_join(threads[r], nullptr);
    for (int r = 0; r < RANKS; r++) CHECK(ring.bad[r] == 0);
}

static void test_devices()
{
    int count, device, can;
    OK(cudaGetDeviceCount(&count));
    cudaDeviceProp prop;
    OK(cudaGetDeviceProperties(&prop, 0));
    CHECK(prop.warpSize == 32 && prop.multiProcessorCount > 0 && prop.maxThreadsPerBlock == 1024);
    CHECK(cudaSetDevice(count) == cudaErrorInvalidDevice &&
          cudaGetLastError() == cudaErrorInvalidDevice);
    CHECK(cudaGetLastError() == cudaSuccess &&
          strlen(cudaGetErrorString(cudaErrorMemoryAllocation)) > 0);
    if (count < 2) return;
    float *p, *q, h = 3;
    OK(cudaSetDevice(1));
    OK(cudaGetDevice(&device));
    CHECK(device == 1);
    OK(cudaMalloc((void **)&q, 4));
    OK(cudaSetDevice(0));
    OK(cudaDeviceCanAccessPeer(&can, 0, 1));
    CHECK(can == 1);
    OK(cudaMalloc((void **)&p, 4));
    OK(cudaMemcpy(p, &h, 4, cudaMemcpyHostToDevice));
    OK(cudaMemcpyPeerAsync(q, 1, p, 0, 4, nullptr));
    OK(cudaDeviceEnablePeerAccess(1, 0));
    CHECK(cudaDeviceEnablePeerAccess(1, 0) == cudaErrorPeerAccessAlreadyEnabled);
    cudaGetLastError();
    add<<<1, 1>>>(p, q, 1);
    OK(cudaMemcpy(&h, p, 4, cudaMemcpyDeviceToHost));
    CHECK(h == 4);
    OK(cudaFree(p));
    OK(cudaFree(q));
}

static void test_memory()
{
    size_t before, after, total;
    void *p, *q;
    OK(cudaMemGetInfo(&before, &total));
    OK(cudaMalloc(&p, 1 << 20));
    OK(cudaMemGetInfo(&after, &total));
    CHECK(before - after >= 1 << 20 && total >= before);
    CHECK(cudaMalloc(&q, (size_t)1 << 50) == cudaErrorMemoryAllocation);
    cudaGetLastError();
    OK(cudaFree(p));
    OK(cudaFree(nullptr));
    OK(cudaMemGetInfo(&after, &total));
    CHECK(after == before);
}

/* ---- Matrix products ------------------------------------------------------------------------- */

template <class T> struct Type;
template <> struct Type<float> {
    static constexpr cudaDataType id = CUDA_R_32F;
    static constexpr double epsilon = 0x1p-24;
};
template <> struct Type<__half> {
    static constexpr cudaDataType id = CUDA_R_16F;
    static constexpr double epsilon = 0x1p-11;
};
template <> struct Type<__nv_bfloat16> {
    static constexpr cudaDataType id = CUDA_R_16BF;
    static constexpr double epsilon = 0x1p-8;
};

/* A random matrix of ld * cols numbers. Rows beyond `rows` are NaN and must not be read or
 * written. */
template <class T> static std::vector<T> random_matrix(int rows, int cols, int ld)
{
    std::vector<T> x((size_t)ld * cols);
    for (int j = 0; j < cols; j++)
        for (int i = 0; i < ld; i++)
            x[(size_t)j * ld + i] = T(i < rows ? random_float() : poison());
    return x;
}

/* op(A) op(B), and the sum of the products' magnitudes for the error bound. */
template <class T>
static double product(const T *a, const T *b, int ta, int tb, int lda, int ldb, int i, int j, int k,
                      double *magnitude)
{
    double sum = 0;
    *magnitude = 0;
    for (int l = 0; l < k; l++) {
        double x = (float)a[ta ? l + i * lda : i + l * lda];
        double y = (float)b[tb ? j + l * ldb : l + j * ldb];
        sum += x * y;
        *magnitude += fabs(x * y);
    }
    return sum;
}

/* Whether |got - want| exceeds the rounding of k float sums and of the result's type. */
template <class D> static int wrong(D got, double want, double magnitude, int k)
{
    double bound = 1.01 * (fabs(want) * Type<D>::epsilon + (k + 4) * 0x1p-24 * (magnitude + 1));
    return !(fabs((float)got - want) <= bound);
}

template <class T, class D> static void test_gemm(cublasHandle_t handle)
{
    int sizes[][3] = {{1, 1, 1},    {5, 3, 7},     {33, 17, 64},
                      {64, 64, 64}, {130, 9, 300}, {8, 70, 513}};
    for (auto &s : sizes)
        for (int t = 0; t < 8; t++) {
            int m = s[0], n = s[1], k = s[2], ta = t & 1, tb = t >> 1 & 1, batch = t >> 2 ? 3 : 1;
            int lda = (ta ? k : m) + t % 3, ldb = (tb ? n : k) + t % 2, ldc = m + t % 4;
            int ca = ta ? m : k, cb = tb ? k : n;
            long long sa = (long long)lda * ca, sb = (long long)ldb * cb, sc = (long long)ldc * n;
            float alpha = t % 2 ? 0.5f : 1, beta = t & 4 ? -2.0f : 0;
            Buffer<T> a(random_matrix<T>(ta ? k : m, ca * batch, lda)),
                b(random_matrix<T>(tb ? n : k, cb * batch, ldb));
            Buffer<D> c(random_matrix<D>(m, n * batch, ldc));
            std::vector<D> old = c.h;
            if (!beta) OK(cudaMemset(c.d, 0xFF, c.h.size() * sizeof(D))); /* C is not read */
            cublasOperation_t oa = ta ? CUBLAS_OP_T : CUBLAS_OP_N;
            cublasOperation_t ob = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
            if (batch > 1)
                OK(cublasGemmStridedBatchedEx(handle, oa, ob, m, n, k, &alpha, a.d, Type<T>::id,
                                              lda, sa, b.d, Type<T>::id, ldb, sb, &beta, c.d,
                                              Type<D>::id, ldc, sc, batch, CUBLAS_COMPUTE_32F,
                                              CUBLAS_GEMM_DEFAULT));
            else
                OK(cublasGemmEx(handle, oa, ob, m, n, k, &alpha, a.d, Type<T>::id, lda, b.d,
                                Type<T>::id, ldb, &beta, c.d, Type<D>::id, ldc, CUBLAS_COMPUTE_32F,
                                CUBLAS_GEMM_DEFAULT));
            c.down();
            int bad = 0;
            for (int q = 0; q < batch; q++)
                for (int j = 0; j < n; j++)
                    for (int i = 0; i < ldc; i++) {
                        size_t at = (size_t)(q * sc + (long long)j * ldc + i);
                        if (i >= m) {
                            bad += !isnan((float)c.h[at]);
                            continue;
                        }
                        double size, sum = product(&a.h[q * sa], &b.h[q * sb], ta, tb, lda, ldb, i,
                                                   j, k, &size);
                        sum *= alpha;
                        if (beta != 0) {
                            sum += beta * (float)old[at];
                            size += fabs(beta * (float)old[at]);
                        }
                        bad += wrong(c.h[at], sum, size, k);
                    }
            CHECK(bad == 0);
        }
}

static double gelu(double x)
{
    return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
static double gelu_slope(double x)
{
    double u = sqrt(2 / M_PI) * (x + 0.044715 * x * x * x), t = tanh(u);
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}

template <class T>
static void test_lt(cublasLtHandle_t lt, int epilogue, int ta, int tb, float beta)
{
    constexpr int m = 40, n = 21, k = 72;
    int lda = ta ? k : m, ldb = tb ? n : k;
    Buffer<T> a(random_matrix<T>(lda, ta ? m : k, lda)), b(random_matrix<T>(ldb, tb ? k : n, ldb));
    Buffer<T> c(random_matrix<T>(m, n, m)), d(random_matrix<T>(m, n, m)),
        aux(random_matrix<T>(m, n, m));
    Buffer<T> bias(random_matrix<T>(m, 1, m));
    std::vector<T> old_bias = bias.h, old_aux = aux.h;
    bool reads_bias = epilogue & 4, keeps = epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    bool derives = epilogue == CUBLASLT_EPILOGUE_DGELU || epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t la, lb, lc;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t result;
    int32_t oa = ta ? CUBLAS_OP_T : CUBLAS_OP_N, ob = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
    int64_t ld = m;
    int returned = 0;
    float alpha = 0.5f;
    void *bias_pointer = bias.d, *aux_pointer = aux.d;
    OK(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    OK(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &oa, sizeof oa));
    OK(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &ob, sizeof ob));
    OK(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue,
                                      sizeof epilogue));
    OK(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias_pointer,
                                      sizeof bias_pointer));
    if (keeps || derives) {
        OK(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
                                          &aux_pointer, sizeof aux_pointer));
        OK(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &ld,
                                          sizeof ld));
    }
    OK(cublasLtMatrixLayoutCreate(&la, Type<T>::id, lda, ta ? m : k, lda));
    OK(cublasLtMatrixLayoutCreate(&lb, Type<T>::id, ldb, tb ? k : n, ldb));
    OK(cublasLtMatrixLayoutCreate(&lc, Type<T>::id, m, n, m));
    OK(cublasLtMatmulPreferenceCreate(&preference));
    size_t workspace = 0;
    OK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                            &workspace, sizeof workspace));
    OK(cublasLtMatmulAlgoGetHeuristic(lt, desc, la, lb, lc, lc, preference, 1, &result, &returned));
    CHECK(returned == 1);
    OK(cublasLtMatmul(lt, desc, &alpha, a.d, la, b.d, lb, &beta, beta != 0 ? c.d : d.d, lc, d.d, lc,
                      &result.algo, nullptr, 0, nullptr));
    d.down();
    aux.down();
    bias.down();
    int bad = 0;
    std::vector<double> gradient(m, 0.0);
    for (int j = 0; j < n; j++)
        for (int i = 0; i < m; i++) {
            int at = j * m + i;
            double size,
                x = alpha * product(a.h.data(), b.h.data(), ta, tb, lda, ldb, i, j, k, &size);
            if (beta != 0) x += beta * (float)c.h[at];
            if (reads_bias) x += (float)old_bias[i];
            if (keeps) bad += wrong(aux.h[at], x, size, k);
            if (epilogue & 32 && !derives && epilogue != CUBLASLT_EPILOGUE_BGRADA) x = gelu(x);
            if (derives) x *= gelu_slope((float)old_aux[at]);
            gradient[i] += x;
            bad += wrong(d.h[at], x, 2 * size, k);
        }
    if (epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD)
        for (int i = 0; i < m; i++) bad += wrong(bias.h[i], gradient[i], 20.0 * n, k);
    if (epilogue == CUBLASLT_EPILOGUE_BGRADA)
        for (int i = 0; i < m; i++) {
            double sum = 0;
            for (int l = 0; l < k; l++) sum += (float)a.h[ta ? l + i * lda : i + l * lda];
            bad += wrong(bias.h[i], sum, k, k);
        }
    if (epilogue == CUBLASLT_EPILOGUE_BGRADB)
        for (int j = 0; j < n; j++) {
            double sum = 0;
            for (int l = 0; l < k; l++) sum += (float)b.h[tb ? j + l * ldb : l + j * ldb];
            bad += wrong(bias.h[j], sum, k, k);
        }
    CHECK(bad == 0);
    OK(cublasLtMatmulDescDestroy(desc));
    for (cublasLtMatrixLayout_t l : {la, lb, lc}) OK(cublasLtMatrixLayoutDestroy(l));
    OK(cublasLtMatmulPreferenceDestroy(preference));
}

template <class T> static void test_epilogues(cublasLtHandle_t lt)
{
    for (int epilogue :
         {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU_BIAS,
          CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU, CUBLASLT_EPILOGUE_DGELU_BGRAD,
          CUBLASLT_EPILOGUE_BGRADA, CUBLASLT_EPILOGUE_BGRADB})
        for (int t = 0; t < 4; t++) {
            test_lt<T>(lt, epilogue, t & 1, t >> 1, 0);
            if (epilogue < 8) test_lt<T>(lt, epilogue, t & 1, t >> 1, 1);
        }
}

static void test_products()
{
    cublasHandle_t handle;
    cublasLtHandle_t lt;
    OK(cublasCreate(&handle));
    OK(cublasLtCreate(&lt));
    test_gemm<float, float>(handle);
    test_gemm<__half, __half>(handle);
    test_gemm<__nv_bfloat16, __nv_bfloat16>(handle);
    test_gemm<__nv_bfloat16, float>(handle);
    test_epilogues<float>(lt);
    test_epilogues<__half>(lt);
    test_epilogues<__nv_bfloat16>(lt);
    Buffer<float> x(std::vector<float>{1, 2, 3, 4}), y(4);
    float one = 1, zero = 0;
    OK(cublasSgemm(handle, CUBLAS_OP_T, CUBLAS_OP_N, 2, 2, 2, &one, x.d, 2, x.d, 2, &zero, y.d, 2));
    y.down();
    CHECK(y.h[0] == 5 && y.h[1] == 11 && y.h[2] == 11 && y.h[3] == 25);
    OK(cublasDestroy(handle));
    OK(cublasLtDestroy(lt));
}

/* ---- Misuse ends the program with one line --------------------------------------------------- */

__global__ void exits_early()
{
    if (threadIdx.x == 40) return;
    __syncthreads();
}
__global__ void two_barriers()
{
    if (threadIdx.x < 32) __syncthreads();
    else __syncthreads();
}
__global__ void barrier_and_shuffle(int *p)
{
    if (threadIdx.x == 3) __syncthreads();
    else *p = __shfl_xor_sync(0xFFFFFFFF, 1, 1);
}
__global__ void mask_without_me(int *p) { *p = __shfl_xor_sync(0x0000FFFF, 1, 1); }
__global__ void waits_for_nobody(int *p)
{
    if (threadIdx.x < 16) *p = __shfl_xor_sync(0xFFFFFFFF, 1, 1);
    else __syncwarp(0xFFFF0000);
    __syncthreads();
}
__global__ void source_has_left(int *p)
{
    if (threadIdx.x >= 16) return;
    *p = __shfl_down_sync(0xFFFFFFFF, 1, 1);
}
__global__ void two_shuffles(int *p)
{
    if (threadIdx.x % 2) *p = __shfl_xor_sync(0xFFFFFFFF, 1, 2);
    else *p = __shfl_xor_sync(0xFFFFFFFF, 1, 2);
}
__global__ void half_mma(float *p)
{
    uint32_t a[4] = {}, b[2] = {};
    if (threadIdx.x < 16) mma_m16n8k16<__half>(p, a, b);
}
__global__ void much_shared(float *p)
{
    __shared__ float x[12288]; /* 48 KB */
    x[0] = *p;
    *p = x[0];
}
__global__ void crash(volatile int *p) { *p = 1; }
__device__ int deep(int n)
{
    volatile char x[1024];
    x[n % 1024] = (char)n;
    return n ? deep(n - 1) + x[n % 1024] : 0;
}
__global__ void overflow_stack(int *p, int n) { *p = deep(n); }

static int *some; /* 32 ints on the device */
static float host[4];

static const struct {
    const char *expect;
    void (*run)();
} misuses[] = {
    {"divergent __syncthreads", [] { exits_early<<<1, 64>>>(); }},
    {"divergent __syncthreads", [] { two_barriers<<<1, 64>>>(); }},
    {"waits for threads that never come", [] { barrier_and_shuffle<<<1, 32>>>(some); }},
    {"does not hold the calling lane", [] { mask_without_me<<<1, 32>>>(some); }},
    {"never come", [] { waits_for_nobody<<<1, 32>>>(some); }},
    {"takes no part in the shuffle", [] { source_has_left<<<1, 32>>>(some); }},
    {"waits in __shfl_xor_sync", [] { two_shuffles<<<1, 32>>>(some); }},
    {"all 32 lanes", [] { half_mma<<<1, 32>>>((float *)some); }},
    {"bytes of shared memory", [] { much_shared<<<1, 32, 4>>>((float *)some); }},
#ifdef CUDACHECK
    {"host-memory", [] { crash<<<1, 32>>>((int *)64); }},
#elif !defined __SANITIZE_ADDRESS__ /* ASan has its own messages for these */
    {"memory fault", [] { crash<<<1, 32>>>((int *)64); }},
    {"stack overflows", [] { overflow_stack<<<1, 32>>>(some, 1 << 20); }},
#endif
    {"may have 1 to 1024", [] { set<<<1, 1025>>>((float *)some, 0); }},
    {"may have 1 to 1024", [] { set<<<1, dim3(1, 1, 65)>>>((float *)some, 0); }},
    {"a grid of (0,1,1)", [] { set<<<0, 1>>>((float *)some, 0); }},
    {"cudaFuncSetAttribute", [] { set<<<1, 1, 49153>>>((float *)some, 0); }},
    {"pass the end", [] { cudaMemcpy(host, some, 129, cudaMemcpyDeviceToHost); }},
    {"no device memory", [] { cudaMemcpy(host, host, 4, cudaMemcpyHostToDevice); }},
    {"is device memory", [] { cudaMemcpy(some, some, 4, cudaMemcpyHostToDevice); }},
    {"no device memory", [] { cudaMemset(host, 0, 4); }},
    {"not allocated", [] { cudaFree(some + 1); }},
    {"freed already",
     [] {
         cudaFree(some);
         cudaFree(some);
     }},
    {"matrix B: 68 bytes",
     [] {
         cublasHandle_t h;
         float one = 1;
         cublasCreate(&h);
         cublasSgemm(h, CUBLAS_OP_N, CUBLAS_OP_N, 4, 1, 17, &one, (float *)some, 1,
                     (float *)some + 16, 17, &one, (float *)some, 4);
         cublasSgemm(h, CUBLAS_OP_N, CUBLAS_OP_N, 1, 1, 17, &one, (float *)some, 1,
                     (float *)some + 16, 17, &one, (float *)some, 4);
     }},
    {"stream has been destroyed",
     [] {
         cudaStream_t s;
         cudaStreamCreate(&s);
         cudaStreamDestroy(s);
         set<<<1, 1, 0, s>>>((float *)some, 0);
     }},
};

static void test_misuses()
{
    for (auto &m : misuses) {
        int pipe_ends[2], status = 0;
        char text[4096];
        size_t n = 0;
        if (pipe(pipe_ends)) exit(2);
        pid_t child = fork();
        if (!child) {
            dup2(pipe_ends[1], 2);
            cudaMalloc((void **)&some, 128);
            m.run();
            cudaDeviceSynchronize();
            _exit(0);
        }
        close(pipe_ends[1]);
        for (ssize_t got = 1; n < sizeof text - 1 && got > 0;) {
            got = read(pipe_ends[0], text + n, sizeof text - 1 - n);
            if (got > 0) n += (size_t)got;
        }
        text[n] = 0;
        close(pipe_ends[0]);
        waitpid(child, &status, 0);
        bool one_line = n && (strchr(text, '\n') == text + n - 1 ||
                              text[11] == '['); /* the checker's reports are longer */
        bool ok =
            WIFEXITED(status) && WEXITSTATUS(status) == 1 && one_line && strstr(text, m.expect);
        if (!ok)
            fprintf(stderr, "expected one line with \"%s\" and status 1, got %x: %s\n", m.expect,
                    status, text);
        if (getenv("VERBOSE")) fputs(text, stderr);
        CHECK(ok);
    }
}

static int test_all()
{
    test_indices();
#ifdef CUDAEMU
    test_misuses();
#ifndef CUDACHECK /* the checker would report reads of memory that nobody has written */
    test_fresh();
#endif
#endif
    test_barriers();
    test_warps();
    test_partial_warps();
    test_mma<__half>();
    test_mma<__nv_bfloat16>();
    test_ldmatrix();
    test_copies();
    test_conversions();
    test_intrinsics();
    test_streams();
    test_devices();
    test_ranks();
    test_memory();
    test_products();
    printf("%s streams: %d checks, %d failures\n", is_lazy() ? "lazy" : "eager", checks, failures);
    return failures != 0;
}

int main()
{
#ifdef CUDAEMU /* eager and lazy streams, on one and on three devices */
    int failed = 0;
    for (int mode = 0; mode < 4; mode++) {
        int status;
        setenv("CUDAEMU_ASYNC", mode % 2 ? "1" : "0", 1);
        setenv("CUDAEMU_DEVICES", mode / 2 ? "3" : "1", 1);
        fflush(stdout);
        pid_t child = fork();
        if (!child) exit(test_all());
        waitpid(child, &status, 0);
        failed |= status;
    }
    return failed != 0;
#else
    return test_all();
#endif
}
