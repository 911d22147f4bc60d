/* gpu.cu - how fast megatron_gpt2.cu is on this GPU. dev/bench/gpu.sh builds and runs it; README.md
 * has more.
 *
 *     gpu ceilings CONFIG      the GPU's name; what a copy and a large product reach on it
 *     gpu operators CONFIG B   each operator of chapter 1 alone, at the shapes of CONFIG, B
 *                              sequences
 *     gpu step CONFIG B DROPOUT TP [paced]
 *                              whole training steps, by TP ranks; paced: prints `ready` after
 *                              warm-up and `done` after each round, and after each waits for a line
 *                              on stdin, so that a peer's rounds can take turns with ours
 *
 * A record is a line of name=value pairs on stdout. ms is the median of the rounds and ms_least the
 * shortest, both for one call or step. flops and bytes are what the work needs, not what the GPU
 * really does. The program is built once for each precision. CONFIG tiny is for trying it where
 * kernels are emulated; its ceilings are tiny, too. */

#define main gpt2_main
#define PROGRAM "gpu"
#ifdef TWIN_SOURCE
#include TWIN_SOURCE
#else
#include "../../megatron_gpt2.cu"
#endif
#undef main
#include "bench.h"

#ifdef PRECISION_BF16
#define PRECISION "bf16"
#elif defined PRECISION_FP16
#define PRECISION "fp16"
#elif defined PRECISION_TF32
#define PRECISION "tf32"
#else
#define PRECISION "fp32"
#endif

enum {
    WARMUP = 3,
    ROUNDS = 9,
    STEPS = 3
}; /* rounds that do not count, rounds that count, training steps in a round */

/* ---- Time ------------------------------------------------------------------------------------ */

/* How many milliseconds the stream needs for everything that run() puts into it. */
template <typename F> static double timed(F run)
{
    cudaEvent_t begin, end;
    float ms;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    CUDA_CHECK(cudaEventRecord(begin, gpu()->stream));
    run();
    CUDA_CHECK(cudaEventRecord(end, gpu()->stream));
    CUDA_CHECK(cudaEventSynchronize(end));
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return ms;
}

static int compare_doubles(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Prints the first part of a record. Sorts ms (ROUNDS). */
static void print_times(const char *kind, const char *name, double *ms)
{
    qsort(ms, ROUNDS, sizeof *ms, compare_doubles);
    printf("who=megatron precision=" PRECISION " kind=%s name=%s ms=%.6g ms_least=%.6g", kind, name,
           ms[ROUNDS / 2], ms[0]);
}

/* ---- One operator alone ---------------------------------------------------------------------- */

/* Memory that is read to empty the GPU's second-level cache. */
typedef struct {
    float4 *p;
    size_t n;
} Flood;

static Flood flood_create(bool tiny)
{
    const size_t bytes = tiny ? 1 << 16 : (size_t)512 << 20; /* several times any cache */
    Flood f = {(float4 *)device_calloc(bytes), bytes / sizeof(float4)};
    return f;
}

/* Reads x (n), which is all zeros. It writes nothing: written lines would leave the cache later, in
 * the next operator's time. */
static __global__ void flood_kernel(float4 *x, size_t n)
{
    float sum = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        sum += x[i].x + x[i].y + x[i].z + x[i].w;
    if (sum != 0) x[0].x = sum;
}

/* Times run(), always with a cold cache, because in a training step other operators fill the cache
 * in between. While the flood runs, the host puts all of run() into the stream. */
template <typename F>
static void measure(Flood flood, const char *kind, const char *name, double flops, double bytes,
                    F run)
{
    double ms[ROUNDS];
    for (int i = -WARMUP; i < ROUNDS; i++) {
        LAUNCH(flood_kernel, 1024, 256, flood.p, flood.n);
        const double time = timed(run);
        if (i >= 0) ms[i] = time;
    }
    print_times(kind, name, ms);
    printf(" flops=%.6g bytes=%.6g\n", flops, bytes);
    fflush(stdout);
}

/* n normal numbers times scale. They repeat after a million. A product's power, and so its speed,
 * depends on many different numbers, but a million is enough. */
static act *numbers(size_t n, real scale)
{
    const size_t some = min_size(n, 1 << 20);
    real *host = (real *)xcalloc(some, sizeof *host);
    act *x = (act *)device_malloc(n * sizeof *x);
    random_normals(host, 1, 0, 0, some);
    for (size_t i = 0; i < some; i++) host[i] *= scale;
    act_upload(x, host, some);
    for (size_t done = some; done < n; done *= 2)
        device_copy(x + done, x, min_size(done, n - done) * sizeof *x);
    device_synchronize();
    free(host);
    return x;
}

static real *ones(size_t n)
{
    real *host = (real *)xcalloc(n, sizeof *host), *x = (real *)device_malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) host[i] = 1;
    device_upload(x, host, n * sizeof *x);
    free(host);
    return x;
}

/* A model of this name, but its heads have 64 columns even if it is tiny, because there are
 * tensor-core kernels for 64. */
static Config bench_config(const char *name)
{
    Config c = find_preset(name);
    c.H = c.C / 64;
    return c;
}

/* FLOP/s of dense products in this precision by the data sheet; 0: not known here. */
static double sheet_peak(const char *name)
{
    static const struct {
        const char *name;
        double half, tf32, fp32;
    } known[] = {
        {"H200", 989, 494, 67}, {"H100 80GB HBM3", 989, 494, 67}, {"A100", 312, 156, 19.5}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strstr(name, known[i].name)) {
            if (!FULL_PRECISION) return 1e12 * known[i].half;
            return 1e12 * (COMPUTE_TYPE == CUBLAS_COMPUTE_32F ? known[i].fp32 : known[i].tf32);
        }
    return 0;
}

static void ceilings(bool tiny)
{
    const size_t side = tiny ? 128 : 8192, n = tiny ? 1 << 18 : 1 << 29;
    const double flops = 2.0 * (double)side * (double)side * (double)side;
    Flood flood = flood_create(tiny);
    cudaDeviceProp properties;
    CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
    const double peak = sheet_peak(properties.name);
    for (char *c = properties.name; *c; c++) *c = *c == ' ' ? '_' : *c;
    printf("who=megatron precision=" PRECISION " kind=device name=%s peak=%.6g memory=%.6g\n",
           properties.name, peak, (double)properties.totalGlobalMem);

    void *from = device_calloc(n), *to = device_calloc(n);
    measure(flood, "ceiling", "copy", 0, 2.0 * (double)n, [&] { device_copy(to, from, n); });
    device_free(from);
    device_free(to);
    act *a = numbers(side * side, 1), *b = numbers(side * side, 1), *c = numbers(side * side, 1);
    measure(flood, "ceiling", "product", flops, 0,
            [&] { matmul(c, a, false, b, true, side, side, side, false); });
    device_free(a);
    device_free(b);
    device_free(c);
    device_free(flood.p);
}

/* Times every operator, in the order of chapter 1. Backward passes add to the same few arrays again
 * and again; the numbers become meaningless, but not infinite. The process ends afterwards and
 * frees all memory. */
static void operators(const Config *config, bool tiny, size_t B)
{
    const size_t T = config->P, N = B * T, C = config->C, F = config->F, H = config->H, D = C / H;
    const size_t V = padded_vocab(config->V, 1), valid = config->V, P = max_size(V, F) * C;
    const double e = sizeof(act), NC = (double)(N * C), NV = (double)(N * V), nc = e * NC;
    const double nv = e * NV;
    /* Half of T x T scores, times 2 C: the FLOPs of one product for all heads. */
    const double scores = NC * (double)T;
    const Dropout off = {1, 2, 3, 0, 0, H}, on = {1, 2, 3, (real)0.1, 0, H};
    const AdamW step = {1e-4, 0.9, 0.999, 1e-8, 0.01, 1, 1};
    const Gelu gelu = config->gelu;
    const real eps = config->eps;
    Flood flood = flood_create(tiny);

    int *host = random_tokens(N, valid), *tokens = (int *)device_malloc(N * sizeof *tokens);
    device_upload(tokens, host, N * sizeof *tokens);
    free(host);
    act *x = numbers(N * C, 1), *y = numbers(N * C, 1), *res = numbers(N * C, 1);
    act *ln = numbers(N * C, 1);
    act *qkv = numbers(N * 3 * C, 1), *dqkv = numbers(N * 3 * C, (real)0.01);
    act *pre = numbers(N * F, 1), *z = numbers(N * F, 1), *dpre = numbers(N * F, 1);
    act *logits = numbers(N * V, 1);
    act *w = numbers(P, (real)0.02), *dw = numbers(P, (real)0.02), *b = numbers(F, (real)0.02);
    act *db = numbers(F, (real)0.02);
    real *mean = ones(N), *rstd = ones(N), *lse = ones(N * H), *delta = ones(N * H);
    real *max = ones(N), *sum = ones(N), *target = ones(N), *loss = ones(N), *weight = ones(N);
    real *m = ones(P), *v = ones(P), *master = FULL_PRECISION ? NULL : ones(P);

#define PRODUCT(name, passes, I, O, call)                                                          \
    measure(flood, "product", name, 2.0 * passes * (double)(N * (I) * (O)), 0, [&] { call; })
#define MOVE(name, bytes, call) measure(flood, "move", name, 0, bytes, [&] { call; })
#define ATTENTION(name, products, call)                                                            \
    measure(flood, "attention", name, products *scores, 0, [&] { call; })
    PRODUCT("linear_forward/qkv", 1, C, 3 * C, linear_forward(qkv, x, w, b, N, C, 3 * C));
    PRODUCT("linear_forward/proj", 1, C, C, linear_forward(y, x, w, NULL, N, C, C));
    PRODUCT("linear_gelu_forward/fc", 1, C, F, linear_gelu_forward(z, pre, x, w, b, N, C, F, gelu));
    PRODUCT("linear_forward/out", 1, F, C, linear_forward(y, z, w, NULL, N, F, C));
    PRODUCT("linear_forward/logits", 1, C, V, linear_forward(logits, x, w, NULL, N, C, V));
    PRODUCT("linear_backward/qkv", 2, C, 3 * C,
            linear_backward(y, dw, db, dqkv, x, w, N, C, 3 * C));
    PRODUCT("linear_backward/proj", 2, C, C, linear_backward(y, dw, NULL, res, x, w, N, C, C));
    PRODUCT("linear_backward/fc", 2, C, F, linear_backward(y, dw, db, dpre, x, w, N, C, F));
    PRODUCT("gelu_linear_backward/out", 2, F, C,
            gelu_linear_backward(dpre, dw, x, z, pre, w, N, F, C, gelu));
    PRODUCT("linear_backward/logits", 2, C, V, linear_backward(y, dw, NULL, logits, x, w, N, C, V));

    ATTENTION("attention_forward", 2, attention_forward(y, lse, qkv, B, T, H, D, off));
    ATTENTION("attention_backward", 5,
              attention_backward(dqkv, delta, x, y, lse, qkv, B, T, H, D, off));
    ATTENTION("attention_forward/dropout", 2, attention_forward(y, lse, qkv, B, T, H, D, on));
    ATTENTION("attention_backward/dropout", 5,
              attention_backward(dqkv, delta, x, y, lse, qkv, B, T, H, D, on));
    /* One more token after T-1 others. */
    MOVE("attention_cached_forward", 2 * e * (double)(T * C),
         attention_cached_forward(y, x, res, qkv, 1, T - 1, H, D));

    MOVE("token_embedding_forward", 2 * nc, token_embedding_forward(x, tokens, w, N, C, 0, V));
    MOVE("token_embedding_backward", nc + 2 * e * (double)(min_size(N, V) * C),
         token_embedding_backward(dw, x, tokens, N, C, 0, V));
    MOVE("position_embedding_forward", 2 * nc, position_embedding_forward(x, w, B, T, C, 0, off));
    MOVE("position_embedding_backward", 2 * nc, position_embedding_backward(x, dw, B, T, C, off));
    MOVE("layernorm_forward", 2 * nc, layernorm_forward(y, mean, rstd, x, b, b, N, C, eps));
    MOVE("layernorm_backward", 4 * nc,
         layernorm_backward(y, db, db + C, ln, x, b, mean, rstd, y, N, C));
    MOVE("bias_dropout_add_forward", 3 * nc, bias_dropout_add_forward(y, x, b, res, N, C, off));
    MOVE("bias_dropout_add_forward/dropout", 3 * nc,
         bias_dropout_add_forward(y, x, b, res, N, C, on));
    MOVE("bias_dropout_add_layernorm_forward", 4 * nc,
         bias_dropout_add_layernorm_forward(ln, y, mean, rstd, x, b, res, b, b, N, C, eps, off));
    MOVE("bias_dropout_add_backward", 2 * nc, bias_dropout_add_backward(y, db, x, N, C, off));

    MOVE("logits_max", nv, logits_max(max, logits, N, V, valid));
    MOVE("logits_sum_exp", nv, logits_sum_exp(sum, target, logits, max, tokens, N, V, valid, 0));
    MOVE("cross_entropy_loss", 12.0 * (double)N, cross_entropy_loss(loss, sum, target, N));
    MOVE("cross_entropy_backward", 2 * nv,
         cross_entropy_backward(logits, max, sum, tokens, weight, 1, N, V, valid, 0));
    MOVE("adamw", (FULL_PRECISION ? 28 : 24 + 2 * e) * (double)P,
         adamw(w, master, m, v, dw, P, step));
    MOVE("sum_squares", e * (double)P, (void)sum_squares(dw, P));
    void *two[] = {x, y};
    MOVE("reduce_slice/2", 4 * nc, reduce_slice(two, 2, 0, N * C, ACT, SUM));
}

/* ---- Training steps -------------------------------------------------------------------------- */

typedef struct {
    const char *name;
    RankOptions ranks;
    bool paced;
    double memory; /* free bytes before the model */
} Steps;

static double free_memory(void)
{
    size_t left, all;
    CUDA_CHECK(cudaMemGetInfo(&left, &all));
    return (double)left;
}

/* Rank 0 prints `word` and waits for the peer's round. The others wait for rank 0. */
static void take_turns(Rank *k, const Steps *s, const char *word)
{
    if (s->paced && k->world.rank == 0) await_turn(word);
    barrier(&k->world);
}

static void step_rank(Comm *world, void *arg)
{
    const Steps *s = (const Steps *)arg;
    const Config *c = &s->ranks.config;
    Progress progress = {0, 0, 0, make_loss_scaler(1)};
    StepResult r = {0, 0, 0, 0, 0};
    double ms[ROUNDS], memory = 0;
    Rank *k = rank_create(world, &s->ranks);
    const size_t N = k->B * k->T;
    int *tokens = random_tokens(N + k->B, c->V);
    k->seed = 1;
    init_rank(k);
    for (int i = -1; i < ROUNDS; i++) { /* a round of warm-up is STEPS steps */
        if (i == 0) memory = s->memory - free_memory();
        if (i >= 0) take_turns(k, s, i == 0 ? "ready" : "done");
        const double time = timed([&] {
            for (int j = 0; j < STEPS; j++)
                r = train_step(k, &bench_optimizer, &progress, 1, feed_same, tokens);
        });
        if (i >= 0) ms[i] = time / STEPS;
    }
    take_turns(k, s, "done");
    if (!isfinite(r.loss) || r.skipped)
        die("the loss became %g, the gradient's norm %g", r.loss, r.grad_norm);
    if (world->rank == 0) {
        const double full = flops_exact(c, s->ranks.layout.tp, k->B, k->T, 0);
        /* The FLOPs that causality saves. */
        const double half_attention = 6.0 * (double)c->L * (double)N * (double)(k->T * c->C);
        print_times("step", s->name, ms);
        printf(" batch=%zu seq=%zu dropout=%g tp=%d tokens=%zu flops=%.6g flops_full=%.6g "
               "memory=%.6g loss=%.6f\n",
               k->B, k->T, (double)c->resid_pdrop, s->ranks.layout.tp, N, full - half_attention,
               full, memory, r.loss);
    }
    free(tokens);
    rank_free(k);
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "", *name = argc > 2 ? argv[2] : "";
    const size_t B = argc > 3 ? (size_t)strtoul(argv[3], NULL, 10) : 0;
    const bool tiny = !strcmp(name, "tiny");
    if (argc == 3 && !strcmp(what, "ceilings")) ceilings(tiny);
    else if (argc == 4 && B > 0 && !strcmp(what, "operators")) {
        const Config config = bench_config(name);
        operators(&config, tiny, B);
    } else if (argc >= 6 && B > 0 && !strcmp(what, "step")) {
        Config c = bench_config(name);
        c.embd_pdrop = c.attn_pdrop = c.resid_pdrop = (real)atof(argv[4]);
        const Layout layout = {atoi(argv[5]), 1, 1};
        device_synchronize(); /* now the GPU's context exists; its memory is not ours to count */
        Steps s = {name, {c, layout, B, 1, c.P, 1, 0, 1}, argc > 6, free_memory()};
        check_layout(&c, layout);
        run_ranks(layout.tp, step_rank, &s);
    } else
        usage_error(
            "give: ceilings CONFIG | operators CONFIG B | step CONFIG B DROPOUT TP [paced]");
    if (fflush(stdout) || ferror(stdout)) die("cannot write to stdout: %s", strerror(errno));
    return 0;
}
