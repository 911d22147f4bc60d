/* cudaemu.h - CUDA C++ for a machine without a GPU: keywords, intrinsics, types and the host API,
 * run by cudaemu.cpp.
 *
 *     sed -f dev/cudaemu/cu2cpp.sed program.cu > program.cpp
 *     g++ -std=gnu++17 -O2 -I. program.cpp dev/cudaemu/cudaemu.cpp -lpthread
 *
 * Every CUDA thread is a fiber. A block runs on the OS thread that launches it, or with lazy
 * streams on the one that waits for it. A misuse that CUDA leaves undefined ends the program with
 * one line that names kernel, thread and source line.
 *
 *     CUDAEMU_DEVICES=n   number of emulated devices (1)
 *     CUDAEMU_ASYNC=1     lazy streams: work runs only when something waits for it
 *
 * README.md explains how it works and what it cannot show. */
#ifndef CUDAEMU_H
#define CUDAEMU_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#define CUDAEMU 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

/* ---- Vectors and indices --------------------------------------------------------------------- */

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define CUDAEMU_VECTORS(T, name)                                                                   \
    struct __align__(2 * sizeof(T)) name##2 { T x, y; };                                           \
    struct name##3 { T x, y, z; };                                                                 \
    struct __align__(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; };           \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                     \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                             \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define uint3 cudaemu_uint3 /* uint3 exists already, for the indices */
CUDAEMU_VECTORS(unsigned, uint)
#undef uint3
CUDAEMU_VECTORS(float, float)
CUDAEMU_VECTORS(double, double)
CUDAEMU_VECTORS(int, int)
CUDAEMU_VECTORS(unsigned short, ushort)
CUDAEMU_VECTORS(unsigned char, uchar)
#undef CUDAEMU_VECTORS

extern __thread uint3 threadIdx, blockIdx;
extern __thread dim3 blockDim, gridDim;
constexpr int warpSize = 32;

/* ---- Host API: types ------------------------------------------------------------------------- */

enum cudaError {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorPeerAccessAlreadyEnabled = 704,
    cudaErrorPeerAccessNotEnabled = 705,
    cudaErrorNotReady = 600,
};
typedef enum cudaError cudaError_t;
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout
};
enum {
    cudaStreamDefault = 0,
    cudaStreamNonBlocking = 1,
    cudaEventDefault = 0,
    cudaEventBlockingSync = 1,
    cudaEventDisableTiming = 2,
    cudaHostAllocDefault = 0,
    cudaHostAllocPortable = 1
};
enum cudaDeviceAttr {
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76
};
typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int regsPerBlock, warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor,
        multiProcessorCount, major, minor;
    int maxThreadsDim[3], maxGridSize[3], l2CacheSize, memoryBusWidth, unifiedAddressing;
};

/* ---- The engine's side: what the macros and templates below call ----------------------------- */

namespace cudaemu
{
struct Site { /* a place in the source; as a default argument it is the place of the call */
    const char *file;
    int line;
};
constexpr Site here(const char *file = __builtin_FILE(), int line = __builtin_LINE())
{
    return {file, line};
}

/* Ends the program with status 1 and one line: the message, and which kernel, block, thread and
 * place it concerns. */
[[noreturn]] void fail(Site at, const char *format, ...) __attribute__((format(printf, 2, 3)));

struct Config { /* the launch arguments between <<< and >>> */
    const char *name;
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
    Site at;
    template <class... Args>
    std::tuple<Config, std::tuple<typename std::decay<Args>::type...>> operator()(Args &&...args)
    {
        return {*this, std::tuple<typename std::decay<Args>::type...>(std::forward<Args>(args)...)};
    }
};
inline Config launch(const char *name, dim3 grid, dim3 block, size_t shared = 0,
                     cudaStream_t stream = nullptr, Site at = here())
{
    return {name, grid, block, shared, stream, at};
}
void submit(const Config &config, const void *kernel, void (*call)(void *bound),
            std::shared_ptr<void> bound, size_t bound_size);

/* kernel << launch(..)(args): the arguments are converted to the kernel's parameters at once, as in
 * CUDA. */
template <class... Params> struct Bound {
    void (*kernel)(Params...);
    std::tuple<typename std::decay<Params>::type...> params;
    static void call(void *bound)
    {
        std::apply(((Bound *)bound)->kernel, ((Bound *)bound)->params);
    }
};
template <class... Params, class... Args>
void operator<<(void (*kernel)(Params...), std::tuple<Config, std::tuple<Args...>> call)
{
    static_assert(sizeof...(Params) == sizeof...(Args),
                  "a launch has as many arguments as the kernel has parameters");
    auto bound =
        std::make_shared<Bound<Params...>>(Bound<Params...>{kernel, std::move(std::get<1>(call))});
    submit(std::get<0>(call), (const void *)kernel, Bound<Params...>::call, bound, sizeof *bound);
}

/* A variable in the block's shared memory. `tag` identifies it; all threads of the block get the
 * same one. */
void *shared(const void *tag, size_t size, const char *name, Site at = here());
void *dynamic_shared(size_t align, Site at = here());

/* __syncthreads. Returns how many threads of the block passed a true predicate. */
int barrier(bool predicate, Site at);
void fence();

/* A warp operation. Every live lane in mask calls it with its slot; the last one to arrive calls
 * combine(slots, mask of the lanes that came) for all of them. It returns when that is done. A lane
 * that does not take part has a null slot. */
typedef void (*Combine)(void *const slots[32], unsigned mask, Site at);
void warp(unsigned mask, void *slot, Combine combine, const char *name, Site at);
void sync_lanes(void *const slots[32], unsigned mask, Site at); /* for __syncwarp */
int lane(); /* of the running thread in its warp */

/* Copies 16 bytes, which become visible only after the wait. */
void copy_async(void *shared, const void *global, bool valid, Site at);
void copy_async_commit();
void copy_async_wait(int pending);

/* Lane `reader` takes the value of lane `source`: that lane must take part. */
inline void check_source(void *const slots[32], int reader, int source, Site at)
{
    if (!slots[source & 31])
        fail(at, "lane %d takes the value of lane %d, which takes no part in the shuffle", reader,
             source);
}

template <class T> struct Shuffle {
    T in, out;
    int source; /* the lane whose value this lane takes */
};
template <class T> T shuffle(unsigned mask, T value, int source, const char *name, Site at)
{
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8,
                  "shuffles move 2, 4 or 8 bytes");
    Shuffle<T> slot = {value, value, source};
    warp(
        mask, &slot,
        [](void *const slots[32], unsigned, Site where) {
            for (int l = 0; l < 32; l++) {
                Shuffle<T> *s = (Shuffle<T> *)slots[l];
                if (!s) continue;
                check_source(slots, l, s->source, where);
                s->out = ((Shuffle<T> *)slots[s->source])->in;
            }
        },
        name, at);
    return slot.out;
}

struct Vote {
    unsigned in, out;
};
inline unsigned ballot(unsigned mask, bool predicate, const char *name, Site at)
{
    Vote slot = {predicate, 0};
    warp(
        mask, &slot,
        [](void *const slots[32], unsigned, Site) {
            unsigned all = 0;
            for (int l = 0; l < 32; l++)
                if (slots[l]) all |= (unsigned)((Vote *)slots[l])->in << l;
            for (int l = 0; l < 32; l++)
                if (slots[l]) ((Vote *)slots[l])->out = all;
        },
        name, at);
    return slot.out;
}
} // namespace cudaemu

#define CUDAEMU_NAME(...) #__VA_ARGS__
#define CUDAEMU_SHARED(T, name, dims)                                                              \
    typedef T name##_shared_type dims;                                                             \
    static char name##_shared_tag;                                                                 \
    name##_shared_type &name = *(name##_shared_type *)cudaemu::shared(                             \
        &name##_shared_tag, sizeof(name##_shared_type), #name)
#define CUDAEMU_DYNAMIC_SHARED(T, name)                                                            \
    typedef T name##_shared_type;                                                                  \
    name##_shared_type *name =                                                                     \
        (name##_shared_type *)cudaemu::dynamic_shared(alignof(name##_shared_type))

/* ---- Device side: synchronisation, warps, atomics -------------------------------------------- */

inline void __syncthreads(cudaemu::Site at = cudaemu::here()) { cudaemu::barrier(false, at); }
inline int __syncthreads_count(int p, cudaemu::Site at = cudaemu::here())
{
    return cudaemu::barrier(p, at);
}
inline int __syncthreads_or(int p, cudaemu::Site at = cudaemu::here())
{
    return cudaemu::barrier(p, at) != 0;
}
inline int __syncthreads_and(int p, cudaemu::Site at = cudaemu::here())
{
    return cudaemu::barrier(!p, at) == 0;
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, cudaemu::Site at = cudaemu::here())
{
    static char slot;
    cudaemu::warp(mask, &slot, cudaemu::sync_lanes, "__syncwarp", at);
}

/* Shuffles work within segments of `width` lanes, a power of two. A lane whose source is outside
 * its segment keeps its own value. */
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              cudaemu::Site at = cudaemu::here())
{
    int l = cudaemu::lane();
    return cudaemu::shuffle(mask, value, (l & ~(width - 1)) | (source & (width - 1)), "__shfl_sync",
                            at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  cudaemu::Site at = cudaemu::here())
{
    int l = cudaemu::lane(), source = l ^ lane_mask;
    if (source > (l | (width - 1))) source = l; /* an earlier segment may be read */
    return cudaemu::shuffle(mask, value, source, "__shfl_xor_sync", at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cudaemu::Site at = cudaemu::here())
{
    int l = cudaemu::lane(), source = l + (int)delta;
    return cudaemu::shuffle(mask, value, source > (l | (width - 1)) ? l : source,
                            "__shfl_down_sync", at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 cudaemu::Site at = cudaemu::here())
{
    int l = cudaemu::lane(), source = l - (int)delta;
    return cudaemu::shuffle(mask, value, source < (l & ~(width - 1)) ? l : source, "__shfl_up_sync",
                            at);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, cudaemu::Site at = cudaemu::here())
{
    return cudaemu::ballot(mask, predicate, "__ballot_sync", at);
}
inline int __any_sync(unsigned mask, int predicate, cudaemu::Site at = cudaemu::here())
{
    return cudaemu::ballot(mask, predicate, "__any_sync", at) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cudaemu::Site at = cudaemu::here())
{
    return cudaemu::ballot(mask, !predicate, "__all_sync", at) == 0;
}

inline int atomicAdd(int *p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned *p, unsigned v)
{
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
inline unsigned long long atomicAdd(unsigned long long *p, unsigned long long v)
{
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
inline float atomicAdd(float *p, float v)
{
    uint32_t seen = __atomic_load_n((uint32_t *)p, __ATOMIC_RELAXED), next;
    float old;
    do {
        memcpy(&old, &seen, 4);
        float sum = old + v;
        memcpy(&next, &sum, 4);
    } while (!__atomic_compare_exchange_n((uint32_t *)p, &seen, next, false, __ATOMIC_RELAXED,
                                          __ATOMIC_RELAXED));
    return old;
}
inline int atomicExch(int *p, int v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }
inline unsigned atomicExch(unsigned *p, unsigned v)
{
    return __atomic_exchange_n(p, v, __ATOMIC_RELAXED);
}
inline int atomicOr(int *p, int v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }
inline int atomicCAS(int *p, int compare, int v)
{
    __atomic_compare_exchange_n(p, &compare, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return compare;
}
inline int atomicMax(int *p, int v)
{
    int old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (old < v &&
           !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
inline void __threadfence() { cudaemu::fence(); }
inline void __threadfence_block() { cudaemu::fence(); }
inline void __threadfence_system() { cudaemu::fence(); }
inline void __trap() { cudaemu::fail({nullptr, 0}, "__trap"); }

/* ---- Device side: arithmetic ----------------------------------------------------------------- */

template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> void __stcs(T *p, T v) { *p = v; }
template <class T> void __stcg(T *p, T v) { *p = v; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline void __sincosf(float x, float *s, float *c)
{
    *s = sinf(x);
    *c = cosf(x);
}
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __saturatef(float x)
{
    if (!(x > 0)) return 0;
    return x < 1 ? x : 1;
}
inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned)((uint64_t)x * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y)
{
    return (unsigned long long)((unsigned __int128)x * y >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x)
{
    unsigned u;
    memcpy(&u, &x, 4);
    return u;
}
inline int __float_as_int(float x)
{
    int u;
    memcpy(&u, &x, 4);
    return u;
}
inline float __uint_as_float(unsigned u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}
inline float __int_as_float(int u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}
inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x > y ? x : y; }
inline unsigned min(unsigned x, unsigned y) { return x < y ? x : y; }
inline unsigned max(unsigned x, unsigned y) { return x > y ? x : y; }
inline long min(long x, long y) { return x < y ? x : y; }
inline long max(long x, long y) { return x > y ? x : y; }
inline unsigned long min(unsigned long x, unsigned long y) { return x < y ? x : y; }
inline unsigned long max(unsigned long x, unsigned long y) { return x > y ? x : y; }
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }

/* ---- 16-bit floats --------------------------------------------------------------------------- */

/* Numbers are rounded to nearest, ties to even. Every NaN becomes 0x7FFF, as on the GPU. */

namespace cudaemu
{
inline uint16_t bf16_from_float(float x)
{
    uint32_t u = __float_as_uint(x);
    if ((u & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
    return (uint16_t)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}
inline float bf16_to_float(uint16_t b) { return __uint_as_float((uint32_t)b << 16); }

inline uint16_t half_from_float(float x)
{
    uint32_t u = __float_as_uint(x), sign = u >> 16 & 0x8000, a = u & 0x7FFFFFFF;
    if (a > 0x7F800000) return 0x7FFF;
    if (a >= 0x477FF000) return (uint16_t)(sign | 0x7C00); /* 65520 and more round to infinity */
    if (a >= 0x38800000) /* 2^-14; the exponent's bias changes from 127 to 15 */
        return (uint16_t)(sign | (a - 0x38000000 + 0xFFF + (a >> 13 & 1)) >> 13);
    /* Below 2^-14 the unit is 2^-24. That is the last bit of floats from 0.5 to 1, so the sum
     * rounds. */
    float grid = __uint_as_float(a) + 0.5f;
    return (uint16_t)(sign | (__float_as_uint(grid) - 0x3F000000));
}
inline float half_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, a = h & 0x7FFF;
    if (a > 0x7C00) return __uint_as_float(0x7FFFFFFF);
    if (a == 0x7C00) return __uint_as_float(sign | 0x7F800000);
    if (a >= 0x0400) return __uint_as_float(sign | ((a << 13) + 0x38000000));
    float magnitude = (float)a * 0x1p-24f; /* subnormal */
    return __uint_as_float(sign | __float_as_uint(magnitude));
}
} // namespace cudaemu

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) : bits(cudaemu::bf16_from_float(x)) {}
    operator float() const { return cudaemu::bf16_to_float(bits); }
};
struct __half {
    uint16_t bits;
    __half() = default;
    __half(float x) : bits(cudaemu::half_from_float(x)) {}
    operator float() const { return cudaemu::half_to_float(bits); }
};
struct __align__(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct __align__(4) __half2 { __half x, y; };
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;
typedef __half half;
typedef __half2 half2;

inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y)
{
    return {__nv_bfloat16(x), __nv_bfloat16(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline float __low2float(__nv_bfloat162 v) { return v.x; }
inline float __high2float(__nv_bfloat162 v) { return v.y; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u)
{
    __nv_bfloat16 x;
    x.bits = u;
    return x;
}
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short u)
{
    __half x;
    x.bits = u;
    return x;
}

/* ---- PTX of tensor cores, under the names that the .cu gives its wrappers -------------------- */

namespace cudaemu
{
/* Layouts as in the PTX ISA, "Matrix fragments for mma.m16n8k16". With g = lane / 4 and t = 2 (lane
 * % 4), each register holds columns (of B: rows) t and t+1 of row (of B: column) g. The loops below
 * add 8 where a register has another row or column. */
struct Mma {
    float *d;
    const uint32_t *a, *b;
    float (*to_float)(uint16_t);
};
inline void mma_combine(void *const slots[32], unsigned mask, Site at)
{
    if (mask != 0xFFFFFFFFu) fail(at, "mma needs all 32 lanes of the warp; came %08x", mask);
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; l++) {
        const Mma *m = (const Mma *)slots[l];
        int g = l / 4, t = l % 4 * 2;
        for (int high = 0; high < 2; high++) { /* the low half of a register comes first */
            for (int r = 0; r < 4; r++)
                a[g + r % 2 * 8][t + r / 2 * 8 + high] =
                    m->to_float((uint16_t)(m->a[r] >> 16 * high));
            for (int r = 0; r < 2; r++)
                b[t + r * 8 + high][g] = m->to_float((uint16_t)(m->b[r] >> 16 * high));
        }
    }
    for (int l = 0; l < 32; l++) {
        float *d = ((const Mma *)slots[l])->d;
        int g = l / 4, t = l % 4 * 2;
        for (int r = 0; r < 4; r++) {
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += a[g + r / 2 * 8][k] * b[k][t + r % 2];
            d[r] += sum;
        }
    }
}

struct Ldmatrix {
    uint32_t row[4]; /* the 16 bytes at the lane's address */
    uint32_t r[4];   /* what the lane gets */
};
template <bool trans> void ldmatrix_combine(void *const slots[32], unsigned mask, Site at)
{
    if (mask != 0xFFFFFFFFu) fail(at, "ldmatrix needs all 32 lanes of the warp; came %08x", mask);
    uint16_t tile[4][8][8];
    for (int l = 0; l < 32; l++) memcpy(tile[l / 8][l % 8], ((Ldmatrix *)slots[l])->row, 16);
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) {
            int g = l / 4, t = l % 4 * 2;
            uint32_t low = trans ? tile[i][t][g] : tile[i][g][t];
            uint32_t high = trans ? tile[i][t + 1][g] : tile[i][g][t + 1];
            ((Ldmatrix *)slots[l])->r[i] = low | high << 16;
        }
}
template <bool trans> void ldmatrix(uint32_t r[4], const void *row, Site at)
{
    Ldmatrix slot;
    if ((uintptr_t)row % 16) fail(at, "ldmatrix: the address of a row must be a multiple of 16");
    const uint32_t *word = (const uint32_t *)row;
    for (int i = 0; i < 4; i++) slot.row[i] = word[i];
    warp(0xFFFFFFFFu, &slot, ldmatrix_combine<trans>, "ldmatrix", at);
    for (int i = 0; i < 4; i++) r[i] = slot.r[i];
}
} // namespace cudaemu

/* d (16,8) += a (16,16) b (16,8), in a warp's fragments; T is __nv_bfloat16 or __half. */
template <class T>
void mma_m16n8k16(float d[4], const uint32_t a[4], const uint32_t b[2],
                  cudaemu::Site at = cudaemu::here())
{
    constexpr bool bf16 = std::is_same<T, __nv_bfloat16>::value;
    static_assert(bf16 || std::is_same<T, __half>::value, "mma_m16n8k16 multiplies bf16 or fp16");
    cudaemu::Mma slot = {d, a, b, bf16 ? cudaemu::bf16_to_float : cudaemu::half_to_float};
    cudaemu::warp(0xFFFFFFFFu, &slot, cudaemu::mma_combine, "mma", at);
}
/* Loads four 8x8 tiles of 16-bit numbers from shared memory. Lane l passes the address of row l % 8
 * of tile l / 8. */
inline void ldmatrix_x4(uint32_t r[4], const void *row, cudaemu::Site at = cudaemu::here())
{
    cudaemu::ldmatrix<false>(r, row, at);
}
inline void ldmatrix_x4_trans(uint32_t r[4], const void *row, cudaemu::Site at = cudaemu::here())
{
    cudaemu::ldmatrix<true>(r, row, at);
}
/* Copies 16 bytes from global to shared memory, or zeros if not valid. They arrive at the wait, not
 * before. */
inline void cp_async_16(void *shared, const void *global, bool valid = true,
                        cudaemu::Site at = cudaemu::here())
{
    cudaemu::copy_async(shared, global, valid, at);
}
inline void cp_async_commit() { cudaemu::copy_async_commit(); }
template <int N> void cp_async_wait()
{
    cudaemu::copy_async_wait(N);
} /* all groups but the latest N have arrived */

/* ---- Host API: memory, streams, events, devices ---------------------------------------------- */

cudaError_t cudaMalloc(void **p, size_t size, cudaemu::Site at = cudaemu::here());
cudaError_t cudaMallocAsync(void **p, size_t size, cudaStream_t stream,
                            cudaemu::Site at = cudaemu::here());
cudaError_t cudaFree(void *p, cudaemu::Site at = cudaemu::here());
cudaError_t cudaFreeAsync(void *p, cudaStream_t stream, cudaemu::Site at = cudaemu::here());
cudaError_t cudaMallocHost(void **p, size_t size, cudaemu::Site at = cudaemu::here());
cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags,
                          cudaemu::Site at = cudaemu::here());
cudaError_t cudaFreeHost(void *p, cudaemu::Site at = cudaemu::here());
template <class T> cudaError_t cudaMalloc(T **p, size_t size, cudaemu::Site at = cudaemu::here())
{
    return cudaMalloc((void **)p, size, at);
}
template <class T>
cudaError_t cudaMallocAsync(T **p, size_t size, cudaStream_t stream,
                            cudaemu::Site at = cudaemu::here())
{
    return cudaMallocAsync((void **)p, size, stream, at);
}
template <class T>
cudaError_t cudaMallocHost(T **p, size_t size, cudaemu::Site at = cudaemu::here())
{
    return cudaMallocHost((void **)p, size, at);
}
cudaError_t cudaMemGetInfo(size_t *free, size_t *total);
cudaError_t cudaMemset(void *p, int byte, size_t size, cudaemu::Site at = cudaemu::here());
cudaError_t cudaMemsetAsync(void *p, int byte, size_t size, cudaStream_t stream = nullptr,
                            cudaemu::Site at = cudaemu::here());
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind kind,
                       cudaemu::Site at = cudaemu::here());
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr, cudaemu::Site at = cudaemu::here());
cudaError_t cudaMemcpyPeer(void *to, int to_device, const void *from, int from_device, size_t size,
                           cudaemu::Site at = cudaemu::here());
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device,
                                size_t size, cudaStream_t stream = nullptr,
                                cudaemu::Site at = cudaemu::here());

cudaError_t cudaStreamCreate(cudaStream_t *stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaEventCreate(cudaEvent_t *event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end);

cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *prop, int device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaDeviceReset();
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer);
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char *cudaGetErrorString(cudaError_t error);
const char *cudaGetErrorName(cudaError_t error);
cudaError_t cudaRuntimeGetVersion(int *version);
cudaError_t cudaDriverGetVersion(int *version);

namespace cudaemu
{
cudaError_t set_max_dynamic_shared(const void *kernel, int attribute, int value);
cudaError_t max_active_blocks(int *blocks, const void *kernel, int threads, size_t shared);
} // namespace cudaemu
template <class F>
cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute attribute, int value)
{
    return cudaemu::set_max_dynamic_shared((const void *)kernel, attribute, value);
}
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, F *kernel, int threads,
                                                          size_t shared)
{
    return cudaemu::max_active_blocks(blocks, (const void *)kernel, threads, shared);
}

/* ---- cuBLAS: column-major, sums in float ----------------------------------------------------- */

typedef enum { CUDA_R_32F = 0, CUDA_R_64F = 1, CUDA_R_16F = 2, CUDA_R_16BF = 14 } cudaDataType;
typedef cudaDataType cudaDataType_t;
typedef enum {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_NOT_SUPPORTED = 15
} cublasStatus_t;
typedef enum { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1, CUBLAS_OP_C = 2 } cublasOperation_t;
typedef enum {
    CUBLAS_COMPUTE_32F = 68,
    CUBLAS_COMPUTE_32F_PEDANTIC = 69,
    CUBLAS_COMPUTE_32F_FAST_TF32 = 77
} cublasComputeType_t;
typedef enum { CUBLAS_GEMM_DEFAULT = -1, CUBLAS_GEMM_DEFAULT_TENSOR_OP = 99 } cublasGemmAlgo_t;
typedef enum {
    CUBLAS_DEFAULT_MATH = 0,
    CUBLAS_PEDANTIC_MATH = 2,
    CUBLAS_TF32_TENSOR_OP_MATH = 3,
    CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16
} cublasMath_t;
typedef struct cublasContext *cublasHandle_t;

cublasStatus_t cublasCreate(cublasHandle_t *handle);
cublasStatus_t cublasDestroy(cublasHandle_t handle);
cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream);
cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode);
cublasStatus_t cublasSetWorkspace(cublasHandle_t handle, void *workspace, size_t size);
const char *cublasGetStatusString(cublasStatus_t status);
cublasStatus_t cublasSgemm(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m,
                           int n, int k, const float *alpha, const float *a, int lda,
                           const float *b, int ldb, const float *beta, float *c, int ldc,
                           cudaemu::Site at = cudaemu::here());
cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t handle, cublasOperation_t ta,
                                         cublasOperation_t tb, int m, int n, int k,
                                         const float *alpha, const float *a, int lda,
                                         long long stride_a, const float *b, int ldb,
                                         long long stride_b, const float *beta, float *c, int ldc,
                                         long long stride_c, int batch,
                                         cudaemu::Site at = cudaemu::here());
cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb,
                            int m, int n, int k, const void *alpha, const void *a,
                            cudaDataType a_type, int lda, const void *b, cudaDataType b_type,
                            int ldb, const void *beta, void *c, cudaDataType c_type, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t algo,
                            cudaemu::Site at = cudaemu::here());
cublasStatus_t
cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m,
                           int n, int k, const void *alpha, const void *a, cudaDataType a_type,
                           int lda, long long stride_a, const void *b, cudaDataType b_type, int ldb,
                           long long stride_b, const void *beta, void *c, cudaDataType c_type,
                           int ldc, long long stride_c, int batch, cublasComputeType_t compute,
                           cublasGemmAlgo_t algo, cudaemu::Site at = cudaemu::here());

/* ---- cuBLASLt: D = epilogue(alpha op(A) op(B) + beta C) -------------------------------------- */

typedef enum {
    CUBLASLT_MATMUL_DESC_COMPUTE_TYPE = 0,
    CUBLASLT_MATMUL_DESC_SCALE_TYPE = 1,
    CUBLASLT_MATMUL_DESC_TRANSA = 3,
    CUBLASLT_MATMUL_DESC_TRANSB = 4,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 12,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE = 13,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE = 22,
    CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE = 26
} cublasLtMatmulDescAttributes_t;
typedef enum {
    CUBLASLT_EPILOGUE_DEFAULT = 1,
    CUBLASLT_EPILOGUE_BIAS = 4,
    CUBLASLT_EPILOGUE_GELU = 32,
    CUBLASLT_EPILOGUE_GELU_BIAS = 36,
    CUBLASLT_EPILOGUE_GELU_AUX = 160,
    CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 164,
    CUBLASLT_EPILOGUE_DGELU = 192,
    CUBLASLT_EPILOGUE_DGELU_BGRAD = 208,
    CUBLASLT_EPILOGUE_BGRADA = 256,
    CUBLASLT_EPILOGUE_BGRADB = 512
} cublasLtEpilogue_t;
typedef enum {
    CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT = 5,
    CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET = 6
} cublasLtMatrixLayoutAttribute_t;
typedef enum {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3
} cublasLtMatmulPreferenceAttributes_t;
typedef struct cublasLtContext *cublasLtHandle_t;
typedef struct cublasLtMatmulDescOpaque *cublasLtMatmulDesc_t;
typedef struct cublasLtMatrixLayoutOpaque *cublasLtMatrixLayout_t;
typedef struct cublasLtMatmulPreferenceOpaque *cublasLtMatmulPreference_t;
typedef struct {
    int id;
} cublasLtMatmulAlgo_t;
typedef struct {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
} cublasLtMatmulHeuristicResult_t;

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle);
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle);
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute,
                                        cudaDataType_t scale);
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc);
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void *value, size_t size);
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t ld);
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout);
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute,
                                                const void *value, size_t size);
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference);
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference);
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void *value, size_t size);
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t *results,
                                              int *returned);
cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                              cublasLtMatrixLayout_t b_layout, const void *beta, const void *c,
                              cublasLtMatrixLayout_t c_layout, void *d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algo,
                              void *workspace, size_t workspace_size, cudaStream_t stream,
                              cudaemu::Site at = cudaemu::here());

#endif
