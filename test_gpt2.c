/* test_gpt2.c - all tests: of megatron_gpt2.c, which is included whole, of convert and of the twin.
 *
 *     ./test_gpt2    all tests    ./test_gpt2 NAME..    some     ./test_gpt2 --list    their names
 *
 * The same source is built twice. test_gpt2 computes in float, as the program does.
 * test_gpt2_double is built with -DREAL=double. There the operators and the whole model are
 * compared with finite differences, and the gradients of all layouts must agree to 4e-14.
 *
 * Each row shows a measured value and its bound. A bound follows from the arithmetic (epsilon, the
 * number of terms), never from what the code happened to give; it is at most about ten times the
 * measured value. A NaN fails. Tests run in the project's folder. They check more where
 * ../shared/data and ../shared/fixtures exist. */

#define main gpt2_main
#ifdef TWIN_SOURCE
#include TWIN_SOURCE
#else
#include "megatron_gpt2.c"
#endif
#undef main

#include <float.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

/* ---- The twin: CUDA against the CPU -------------------------------------------------------------
 *
 * This section is compiled twice: here, over the CPU's operators, and with TWIN_SOURCE set to
 * megatron_gpt2.cu, over CUDA's operators (test_twin_fp32, _bf16, _fp16; on a GPU, or emulated).
 * Both programs make the same record: the named results of every operator and of whole models on
 * equal inputs. test_twin writes its record to stdout. The tests twin_operators and twin_models
 * make their own record and compare the two, tensor by tensor.
 *
 * Inputs have 8 significant bits. float, bf16 and fp16 all hold such numbers exactly, so that only
 * the arithmetic differs. */

/* Writes one tensor of a record. roundings counts how often a number was rounded to act on its way
 * here, where the twin's act is narrower than float. These errors are independent, so the bound may
 * grow with their number. */
static void put_tensor(FILE *out, const char *name, const real *x, size_t n, double roundings)
{
    fprintf(out, "%s\n%zu %g\n", name, n, roundings);
    for (size_t i = 0; i < n; i++) {
        double value = (double)x[i];
        fwrite(&value, sizeof value, 1, out);
    }
}

/* x: on the device */
static void put_act(FILE *out, const char *name, const act *x, size_t n, double roundings)
{
    real *host = (real *)xcalloc(n, sizeof *host);
    device_synchronize();
    act_download(host, x, n);
    put_tensor(out, name, host, n, roundings);
    free(host);
}

static void put_real(FILE *out, const char *name, const real *x, size_t n, double roundings)
{
    real *host = (real *)xcalloc(n, sizeof *host);
    device_synchronize();
    device_download(host, x, n * sizeof *host);
    put_tensor(out, name, host, n, roundings);
    free(host);
}

/* Rounds to 8 significant bits. Builds in float and in double get the same number. */
static real coarse(real x)
{
    int exponent;
    double mantissa = frexp((double)(float)x, &exponent);
    return (real)ldexp(nearbyint(mantissa * 256), exponent - 8);
}

/* n normal variates * 2^scale on the host, rounded by coarse(). The stream is the test's own. */
static real *coarse_reals(size_t n, uint32_t stream, int scale)
{
    real *x = (real *)xcalloc(n, sizeof *x);
    random_normals(x, 1909, 0x71000000 + stream, 0, n);
    for (size_t i = 0; i < n; i++) x[i] = (real)ldexp((double)coarse(x[i]), scale);
    return x;
}

/* The same on the device. */
static act *input(size_t n, uint32_t stream, int scale)
{
    real *x = coarse_reals(n, stream, scale);
    act *to = (act *)device_calloc(n * sizeof *to);
    act_upload(to, x, n);
    free(x);
    return to;
}

static act *zeros(size_t n) { return (act *)device_calloc(n * sizeof(act)); }
static real *zero_reals(size_t n) { return (real *)device_calloc(n * sizeof(real)); }

static real *input_reals(size_t n, uint32_t stream, int scale)
{
    real *x = coarse_reals(n, stream, scale), *to = zero_reals(n);
    device_upload(to, x, n * sizeof *to);
    free(x);
    return to;
}

/* n tokens below V, on the device. */
static int *input_tokens(size_t n, uint32_t stream, size_t V)
{
    int *id = (int *)xcalloc(n, sizeof *id), *to = (int *)device_calloc(n * sizeof *to);
    for (size_t i = 0; i < n; i++) id[i] = (int)(random_word(1909, stream, 0, i) % V);
    device_upload(to, id, n * sizeof *to);
    free(id);
    return to;
}

static Dropout twin_dropout(double p, size_t first, size_t heads)
{
    Dropout d = {77, 5, 3, (real)p, first, heads};
    return d;
}

/* Frees the arrays of a case. */
static void device_free_all(void *const *p, size_t n)
{
    device_synchronize();
    for (size_t i = 0; i < n; i++) device_free(p[i]);
}
#define DEVICE_FREE(...)                                                                           \
    do {                                                                                           \
        void *const all_[] = {__VA_ARGS__};                                                        \
        device_free_all(all_, sizeof all_ / sizeof *all_);                                         \
    } while (0)

/* The name of a case's tensor: it begins with the case. */
static const char *named(char name[128], const char *format, ...)
    __attribute__((format(printf, 2, 3)));
static const char *named(char name[128], const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(name, 128, format, args);
    va_end(args);
    return name;
}

static void record_linear(FILE *out, size_t N, size_t I, size_t O, Gelu kind)
{
    char s[128];
    int down = -(int)(log2((double)I) / 2); /* keeps y near 1 */
    act *x = input(N * I, 1, 0), *w = input(O * I, 2, down), *b = input(O, 3, 0);
    act *dy = input(N * O, 4, 0);
    act *y = zeros(N * O), *pre = zeros(N * O), *dx = zeros(N * I), *dw = input(O * I, 5, 0);
    act *db = input(O, 6, 0);
    linear_forward(y, x, w, NULL, N, I, O);
    put_act(out, named(s, "linear %zux%zux%zu y", N, I, O), y, N * O, 1);
    linear_forward(y, x, w, b, N, I, O);
    put_act(out, named(s, "linear %zux%zux%zu y with bias", N, I, O), y, N * O, 1);
    linear_backward(dx, dw, db, dy, x, w, N, I, O);
    put_act(out, named(s, "linear %zux%zux%zu dx", N, I, O), dx, N * I, 1);
    put_act(out, named(s, "linear %zux%zux%zu dw", N, I, O), dw, O * I, 1);
    put_act(out, named(s, "linear %zux%zux%zu db", N, I, O), db, O, 1);

    const char *form = kind == GELU_TANH ? "tanh" : "erf";
    act *w2 = input(I * O, 7, -(int)(log2((double)O) / 2)), *dz = input(N * I, 8, 0);
    act *dw2 = zeros(I * O);
    /* y (N,O) = gelu(x w' + b) is the first layer; z (N,I) = y w2' is the second */
    linear_gelu_forward(y, pre, x, w, b, N, I, O, kind);
    put_act(out, named(s, "gelu %s %zux%zux%zu pre", form, N, I, O), pre, N * O, 1);
    put_act(out, named(s, "gelu %s %zux%zux%zu y", form, N, I, O), y, N * O, 2);
    gelu_linear_backward(dy, dw2, dz, y, pre, w2, N, O, I, kind);
    put_act(out, named(s, "gelu %s %zux%zux%zu dpre", form, N, I, O), dy, N * O, 4);
    put_act(out, named(s, "gelu %s %zux%zux%zu dw", form, N, I, O), dw2, I * O, 2);
    DEVICE_FREE(x, w, b, dy, y, pre, dx, dw, db, w2, dz, dw2);
}

static void record_embedding(FILE *out, size_t B, size_t T, size_t C, size_t V, double p)
{
    char s[128];
    size_t N = B * T, v0 = V / 3, Vp = V - v0;
    act *wte = input(Vp * C, 11, 0), *wpe = input((T + 2) * C, 12, 0), *dx = input(N * C, 13, 0);
    act *x = zeros(N * C), *dwte = input(Vp * C, 14, 0), *dwpe = input((T + 2) * C, 15, 0);
    int *tokens = input_tokens(N, 16, V);
    Dropout d = twin_dropout(p, 12345, 1);
    token_embedding_forward(x, tokens, wte, N, C, v0, Vp);
    put_act(out, named(s, "embedding %zux%zux%zu tokens", N, C, V), x, N * C, 0);
    position_embedding_forward(x, wpe, B, T, C, 2, d);
    put_act(out, named(s, "embedding %zux%zux%zu x", N, C, V), x, N * C, 2);
    position_embedding_backward(dx, dwpe, B, T, C, d);
    put_act(out, named(s, "embedding %zux%zux%zu dx", N, C, V), dx, N * C, 1);
    put_act(out, named(s, "embedding %zux%zux%zu dwpe", N, C, V), dwpe, (T + 2) * C, 2);
    token_embedding_backward(dwte, dx, tokens, N, C, v0, Vp);
    put_act(out, named(s, "embedding %zux%zux%zu dwte", N, C, V), dwte, Vp * C, 2);
    DEVICE_FREE(wte, wpe, dx, x, dwte, dwpe, tokens);
}

static void record_layernorm(FILE *out, size_t N, size_t C, double p)
{
    char s[128];
    act *x = input(N * C, 21, 0), *g = input(C, 22, 0), *b = input(C, 23, 0);
    act *dy = input(N * C, 24, 0);
    act *bias = input(C, 25, 0), *residual = input(N * C, 26, 0), *dg = input(C, 27, 0);
    act *db = input(C, 28, 0);
    act *y = zeros(N * C), *res = zeros(N * C), *dx = zeros(N * C), *dres = input(N * C, 29, 0);
    real *mean = zero_reals(N), *rstd = zero_reals(N), eps = (real)1e-5;
    Dropout d = twin_dropout(p, 4 * C, 1);
    layernorm_forward(y, mean, rstd, x, g, b, N, C, eps);
    put_act(out, named(s, "layernorm %zux%zu y", N, C), y, N * C, 1);
    put_real(out, named(s, "layernorm %zux%zu mean", N, C), mean, N, 0);
    put_real(out, named(s, "layernorm %zux%zu rstd", N, C), rstd, N, 0);
    layernorm_backward(dx, dg, db, dy, x, g, mean, rstd, dres, N, C);
    put_act(out, named(s, "layernorm %zux%zu dx with residual", N, C), dx, N * C, 1);
    layernorm_backward(dx, dg, db, dy, x, g, mean, rstd, NULL, N, C);
    put_act(out, named(s, "layernorm %zux%zu dx", N, C), dx, N * C, 1);
    put_act(out, named(s, "layernorm %zux%zu dg, twice", N, C), dg, C, 2);
    put_act(out, named(s, "layernorm %zux%zu db, twice", N, C), db, C, 2);

    bias_dropout_add_layernorm_forward(y, res, mean, rstd, x, bias, residual, g, b, N, C, eps, d);
    put_act(out, named(s, "bias_dropout_add p=%g %zux%zu res", p, N, C), res, N * C, 1);
    put_act(out, named(s, "bias_dropout_add_layernorm p=%g %zux%zu y", p, N, C), y, N * C, 2);
    bias_dropout_add_forward(res, x, bias, residual, N, C, d);
    put_act(out, named(s, "bias_dropout_add p=%g %zux%zu out", p, N, C), res, N * C, 1);
    bias_dropout_add_backward(dx, db, dy, N, C, d);
    put_act(out, named(s, "bias_dropout_add p=%g %zux%zu dy", p, N, C), dx, N * C, 1);
    put_act(out, named(s, "bias_dropout_add p=%g %zux%zu dbias", p, N, C), db, C, 3);
    DEVICE_FREE(x, g, b, dy, bias, residual, dg, db, y, res, dx, dres, mean, rstd);
}

static void record_attention(FILE *out, size_t B, size_t T, size_t H, size_t D, double p)
{
    char s[128];
    size_t n = B * T * H * D;
    act *qkv = input(3 * n, 31, 0), *dout = input(n, 32, 0), *o = zeros(n), *dqkv = zeros(3 * n);
    real *lse = zero_reals(B * H * T), *delta = zero_reals(B * H * T);
    Dropout d = twin_dropout(p, 7 * T * T, H + 2);
    attention_forward(o, lse, qkv, B, T, H, D, d);
    put_act(out, named(s, "attention p=%g %zux%zux%zux%zu out", p, B, T, H, D), o, n, 2);
    put_real(out, named(s, "attention p=%g %zux%zux%zux%zu lse", p, B, T, H, D), lse, B * H * T, 0);
    attention_backward(dqkv, delta, dout, o, lse, qkv, B, T, H, D, d);
    put_act(out, named(s, "attention p=%g %zux%zux%zux%zu dqkv", p, B, T, H, D), dqkv, 3 * n, 3);

    /* The same rows again, as generation sees them: a prompt of T - 1 tokens, then one token. */
    act *keys = zeros(T * H * D), *values = zeros(T * H * D);
    if (T > 1) attention_cached_forward(o, keys, values, qkv, T - 1, 0, H, D);
    attention_cached_forward(o + (T - 1) * H * D, keys, values, qkv + (T - 1) * 3 * H * D, 1, T - 1,
                             H, D);
    put_act(out, named(s, "attention with a cache %zux%zux%zu out", T, H, D), o, T * H * D, 2);
    DEVICE_FREE(qkv, dout, o, dqkv, lse, delta, keys, values);
}

static void record_cross_entropy(FILE *out, size_t N, size_t Vp, size_t valid)
{
    char s[128];
    size_t v0 = 100;
    act *z = input(N * Vp, 41, 1);
    int *targets = input_tokens(N, 42, v0 + valid); /* some belong to another rank */
    real *max = zero_reals(N), *sum = zero_reals(N), *target_logit = zero_reals(N);
    real *loss = zero_reals(N);
    real *weight = input_reals(N, 43, 0);
    logits_max(max, z, N, Vp, valid);
    put_real(out, named(s, "cross entropy %zux%zu max", N, Vp), max, N, 0);
    logits_sum_exp(sum, target_logit, z, max, targets, N, Vp, valid, v0);
    put_real(out, named(s, "cross entropy %zux%zu sum", N, Vp), sum, N, 0);
    put_real(out, named(s, "cross entropy %zux%zu target_logit", N, Vp), target_logit, N, 0);
    cross_entropy_loss(loss, sum, target_logit, N);
    put_real(out, named(s, "cross entropy %zux%zu loss", N, Vp), loss, N, 0);
    cross_entropy_backward(z, max, sum, targets, weight, (real)0.25, N, Vp, valid, v0);
    put_act(out, named(s, "cross entropy %zux%zu dlogits", N, Vp), z, N * Vp, 1);
    DEVICE_FREE(z, targets, max, sum, target_logit, loss, weight);
}

static void record_optimizer(FILE *out, size_t n)
{
    char s[128];
    real *start = coarse_reals(n, 51, 0), *p = zero_reals(n), *m = zero_reals(n);
    real *v = zero_reals(n);
    act *w = zeros(n), *g = input(n, 52, 0);
    act_upload(w, start, n);
    device_upload(p, start, n * sizeof *p);
    for (size_t step = 1; step <= 3; step++) {
        AdamW h = {1e-2, 0.9, 0.999, 1e-8, 0.1, 0.5, step};
        adamw(w, sizeof(act) < sizeof(real) ? p : NULL, m, v, g, n, h);
    }
    put_act(out, named(s, "adamw %zu w", n), w, n, 1);
    put_real(out, named(s, "adamw %zu m", n), m, n, 0);
    put_real(out, named(s, "adamw %zu v", n), v, n, 0);
    real sum = (real)sum_squares(g, n);
    put_tensor(out, named(s, "sum of squares %zu", n), &sum, 1, 0);
    free(start);
    DEVICE_FREE(p, m, v, w, g);
}

static void record_reduce(FILE *out, size_t n, Op op)
{
    enum { RANKS = 3 };
    char s[128];
    act *x[RANKS];
    real *y[RANKS];
    for (uint32_t r = 0; r < RANKS; r++) {
        x[r] = input(n, 61 + r, 0);
        y[r] = input_reals(n, 61 + r, 0);
    }
    device_synchronize(); /* as the barrier of all_reduce does */
    reduce_slice((void *const *)x, RANKS, n / 5, n - n / 4, ACT, op);
    reduce_slice((void *const *)y, RANKS, n / 5, n - n / 4, REAL_ARRAY, op);
    for (int r = 0; r < RANKS; r++) {
        put_act(out, named(s, "reduce_slice %s act rank %d", op == SUM ? "sum" : "max", r), x[r], n,
                1);
        put_real(out, named(s, "reduce_slice %s real rank %d", op == SUM ? "sum" : "max", r), y[r],
                 n, 0);
        DEVICE_FREE(x[r], y[r]);
    }
}

/* Ranks are added in their order: 0 and 1 cancel exactly. In any other order the small
 * numbers of rank 2 are lost. */
static void record_rank_order(FILE *out, size_t n)
{
    real *host = coarse_reals(n, 64, 30);
    real *x[3] = {input_reals(n, 64, 30), zero_reals(n), input_reals(n, 65, 0)};
    for (size_t i = 0; i < n; i++) host[i] = -host[i];
    device_upload(x[1], host, n * sizeof *host);
    device_synchronize();
    reduce_slice((void *const *)x, 3, 0, n, REAL_ARRAY, SUM);
    put_real(out, "reduce_slice in the order of ranks", x[2], n, 0);
    free(host);
    DEVICE_FREE(x[0], x[1], x[2]);
}

/* Every operator, on sizes that are multiples of its blocks, on sizes that are
 * not, and on the smallest. */
static void record_operators(FILE *out)
{
    record_linear(out, 66, 96, 100, GELU_TANH);
    record_linear(out, 66, 36, 27, GELU_ERF);
    record_linear(out, 128, 128, 192, GELU_TANH);
    record_linear(out, 1, 40, 3, GELU_TANH);
    record_embedding(out, 2, 33, 96, 1003, 0.1);
    record_embedding(out, 3, 1, 20, 7, 0.5);
    record_embedding(out, 2, 64, 128, 50, 0);
    record_embedding(out, 3, 90, 20, 50, 0.1); /* more tokens than one tile of the sort holds */
    record_layernorm(out, 66, 96, 0.1);
    record_layernorm(out, 1, 37, 0.3);
    record_layernorm(out, 128, 128, 0);
    record_layernorm(out, 150, 1030, 0.1); /* sums of columns: more than one row for each warp */
    record_layernorm(out, 600, 20, 0.1);   /* LayerNorm's sums: more than one row for each block */
    /* all the shared memory that a block has without asking for more */
    record_layernorm(out, 2, 6144, 0.1);
    record_attention(out, 2, 33, 3, 9, 0.1);
    record_attention(out, 1, 1, 1, 64, 0);
    record_attention(out, 2, 130, 2, 64, 0.1);
    record_attention(out, 1, 200, 1, 64, 0);
    record_attention(out, 1, 97, 2, 96, 0.2);
    record_attention(out, 1, 65, 1, 128, 0.1);
    record_attention(out, 1, 129, 1, 64, 0.1); /* one row past a block */
    record_cross_entropy(out, 66, 1003, 1003);
    record_cross_entropy(out, 5, 128, 57);
    record_cross_entropy(out, 1, 2048, 2000);
    record_optimizer(out, 1003);
    record_optimizer(out, 70000);
    record_reduce(out, 1003, SUM);
    record_reduce(out, 1003, MAX);
    record_rank_order(out, 1024); /* long enough for several at a time */
}

/* ---- Whole models */

/* Sizes that divide only where they must: heads of 9, 13 tokens, a vocabulary of 300. At tp 4 the
 * ranks own 128, 128, 44 and 0 of its tokens. */
static Config awkward_config(void)
{
    Config c = make_config(4, 36, 4, 13, 300);
    return c;
}

typedef struct {
    const char *what;
    Config config;
    Layout layout;
    size_t micro_batch, batch, steps;
    FILE *out[MAX_RANKS]; /* one record for each rank, since ranks run at once */
} TwinModel;

/* Weights are N(0, 1/8), LayerNorm's gains are around 1, and no bias is 0. Each number is drawn by
 * its index in the whole tensor, so that every layout has the same model. All are coarse. */
static void draw_weights(Rank *k)
{
    for (size_t i = 0; i < k->tensors; i++) {
        const Tensor *t = &k->tensor[i];
        real *x = (real *)xcalloc(t->n, sizeof *x);
        for (size_t row = 0; row < unpadded_rows(t, k->tp.rank); row++)
            for (size_t col = 0; col < t->local_cols; col++) {
                real z = 0;
                size_t index =
                    whole_row(t, k->tp.rank, row) * t->cols + whole_col(t, k->tp.rank) + col;
                random_normals(&z, 99, (uint32_t)(t->layer * 100 + (size_t)(t->spec - specs)),
                               index, 1);
                x[row * t->local_cols + col] =
                    coarse((t->spec->init == INIT_ONE) + (real)0.125 * coarse(z));
            }
        act_upload(k->weights + t->offset, x, t->n);
        if (k->master) device_upload(k->master + t->offset, x, t->n * sizeof *x);
        free(x);
    }
}

/* Tokens depend only on the place of their sequence in the run. */
static void feed_twin(void *source, Rank *k, MicroBatch *mb, size_t i)
{
    const TwinModel *m = (const TwinModel *)source;
    size_t n = k->B * (k->T + 1);
    int *tokens = (int *)xcalloc(n, sizeof *tokens);
    mb->sequence =
        ((size_t)k->dp.rank * (m->batch / m->micro_batch / (size_t)m->layout.dp) + i) * k->B;
    for (size_t j = 0; j < n; j++)
        tokens[j] = (int)(random_word(7, SITE_SAMPLE, k->step, mb->sequence * (k->T + 1) + j) %
                          k->config.V);
    set_tokens(k, mb, tokens, NULL);
    free(tokens);
}

/* Records the first micro-batch, forward and backward, in the order of computation. */
static void record_layers(FILE *out, TwinModel *m, Rank *k)
{
    MicroBatch *mb = &k->flight[0];
    size_t N = k->B * k->T, C = k->config.C, H = k->B * k->Hp * k->T;
    char s[128], from[64];
    const double scale = 128; /* keeps fp16's gradients above its smallest numbers */
    snprintf(from, sizeof from, "%s rank %d", m->what, k->world.rank);
    feed_twin(m, k, mb, 0);
    device_zero(k->gradients, k->elements * sizeof(act));
    stage_forward(k, mb);
    for (size_t l = 0; l < k->depth; l++) {
        const Saved *a = &mb->layer[l];
        double r = 4 * (double)l + 1;
        put_act(out, named(s, "%s layer %zu input", from, l), a->x, N * C, r);
        put_act(out, named(s, "%s layer %zu ln1", from, l), a->ln1, N * C, r + 1);
        put_act(out, named(s, "%s layer %zu qkv", from, l), a->qkv, N * 3 * k->Cp, r + 2);
        put_real(out, named(s, "%s layer %zu lse", from, l), a->lse, H, r + 2);
        put_act(out, named(s, "%s layer %zu attention", from, l), a->att, N * k->Cp, r + 3);
        put_act(out, named(s, "%s layer %zu residual", from, l), a->res, N * C, r + 3);
        put_act(out, named(s, "%s layer %zu ln2", from, l), a->ln2, N * C, r + 3);
        put_act(out, named(s, "%s layer %zu before gelu", from, l), a->pre, N * k->Fp, r + 4);
        put_act(out, named(s, "%s layer %zu gelu", from, l), a->gelu, N * k->Fp, r + 5);
    }
    double r = 4 * (double)k->depth + 1;
    put_act(out, named(s, "%s output", from), mb->layer[k->depth].x, N * C, r);
    put_act(out, named(s, "%s final ln", from), mb->lnf, N * C, r + 1);
    put_act(out, named(s, "%s logits", from), mb->logits, N * k->Vp, r + 2);
    put_real(out, named(s, "%s losses", from), mb->loss, N, r + 2);
    stage_backward(k, mb, (real)(scale / (double)N));
    for (size_t i = k->tensors; i-- > 0;) { /* gradients of the last layer come first */
        const Tensor *t = &k->tensor[i];
        char name[NAME_SIZE];
        put_act(out, named(s, "%s gradient of %s", from, tensor_name(name, t)),
                k->gradients + t->offset, t->n, 2 * r);
    }
    put_act(out, named(s, "%s gradient of the embeddings' sum", from), k->dx, N * C, 2 * r);
}

static void record_rank(Comm *world, void *arg)
{
    TwinModel *m = (TwinModel *)arg;
    RankOptions o;
    memset(&o, 0, sizeof o);
    o.config = m->config;
    o.layout = m->layout;
    o.micro_batch = m->micro_batch;
    o.micro_batches = m->batch / m->micro_batch / (size_t)m->layout.dp;
    o.seq = m->config.P;
    o.training = 1;
    o.seed = 1234;
    Rank *k = rank_create(world, &o);
    FILE *out = m->out[world->rank];
    Optimizer optimizer = {1e-3, 1e-5, 2, 100, DECAY_PAPER, 0.9, 0.999, 1e-8, 0.01, 1, 128};
    Progress p = {0, 0, 0, make_loss_scaler(optimizer.loss_scale)};
    char s[128];
    draw_weights(k);
    if (m->layout.pp == 1) record_layers(out, m, k);
    for (size_t step = 0; step < m->steps; step++) {
        StepResult r = train_step(k, &optimizer, &p, o.micro_batches, feed_twin, m);
        real loss = (real)r.loss, norm = (real)r.grad_norm;
        if (world->rank > 0) continue;
        put_tensor(out, named(s, "%s loss of step %zu", m->what, step), &loss, 1, 1);
        put_tensor(out, named(s, "%s gradient norm of step %zu", m->what, step), &norm, 1, 8);
    }
    rank_free(k);
}

static void record_model(FILE *out, const char *what, Config config, int tp, int pp, int dp,
                         size_t steps)
{
    TwinModel m;
    char *text[MAX_RANKS];
    size_t size[MAX_RANKS];
    memset(&m, 0, sizeof m);
    m.what = what;
    m.config = config;
    m.steps = steps;
    m.layout.tp = tp;
    m.layout.pp = pp;
    m.layout.dp = dp;
    m.micro_batch = 2;
    m.batch = 4;
    for (int r = 0; r < world_size(m.layout); r++) {
        m.out[r] = open_memstream(&text[r], &size[r]);
        if (!m.out[r]) die("out of memory");
    }
    run_ranks(world_size(m.layout), record_rank, &m);
    for (int r = 0; r < world_size(m.layout); r++) {
        fclose(m.out[r]);
        fwrite(text[r], 1, size[r], out);
        free(text[r]);
    }
}

/* With one pipeline stage, layer by layer; in every layout, the losses of some steps. */
static void record_models(FILE *out)
{
    /* heads of 64 use the attention of the tensor cores */
    Config flash = make_config(2, 128, 2, 80, 500);
    record_model(out, "awkward", awkward_config(), 1, 1, 1, 10);
    record_model(out, "t=2", awkward_config(), 2, 1, 1, 10);
    record_model(out, "t=4", awkward_config(), 4, 1, 1, 2);
    record_model(out, "p=2", awkward_config(), 1, 2, 1, 3);
    record_model(out, "d=2", awkward_config(), 1, 1, 2, 2);
    record_model(out, "t=2 p=2 d=2", awkward_config(), 2, 2, 2, 3);
    record_model(out, "heads of 64", flash, 1, 1, 1, 3);
}

#ifdef TWIN_SOURCE

/* Unit roundoff of act: the largest power of two that is lost when added to 1. */
static double act_roundoff(void)
{
    double u = 1;
    act *x = (act *)device_calloc(sizeof *x);
    for (real y = 2; y != 1; u /= 2) {
        y = (real)(1 + u / 2);
        act_upload(x, &y, 1);
        device_synchronize();
        act_download(&y, x, 1);
    }
    device_free(x);
    return u;
}

/* test_twin operators | models writes the record, which test_gpt2 reads. test_twin
 * device says what it runs on. */
int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    device_select(0, 1);
    if (!strcmp(what, "device")) {
#ifdef __CUDACC__
        cudaDeviceProp gpu;
        CUDA_CHECK(cudaGetDeviceProperties(&gpu, 0));
        printf("CUDA: %s (real GPU)\n", gpu.name);
#else
        puts("CUDA: EMULATED ON THE CPU (no NVIDIA GPU). Kernel results and synchronisation are "
             "tested; speed and "
             "tensor-core rounding are not.");
#endif
    } else {
        printf("%.17g\n", act_roundoff());
        if (!strcmp(what, "operators")) record_operators(stdout);
        else record_models(stdout);
    }
    return fflush(stdout) || ferror(stdout);
}

#else

/* ---- The harness ----------------------------------------------------------------------------- */

static int checks, failures; /* in the running test */

/* One row: name, measured value, bound, ok. A NaN fails, because its comparison is false. */
static void check(const char *what, double measured, double bound)
{
    int ok = measured <= bound;
    checks++;
    failures += !ok;
    printf("    %-60s %12.4g <= %-10.4g %s\n", what, measured, bound, ok ? "ok" : "FAILED");
}

/* For exact values. */
static void check_equal(const char *what, double measured, double expected)
{
    int ok = measured == expected;
    checks++;
    failures += !ok;
    printf("    %-60s %12.10g == %-10.10g %s\n", what, measured, expected, ok ? "ok" : "FAILED");
}

static void check_true(const char *what, int ok)
{
    checks++;
    failures += !ok;
    printf("    %-60s %s\n", what, ok ? "ok" : "FAILED");
}

/* The larger of two errors; `worst` is the largest so far. A NaN stays, unlike in fmax() or in
 * `if (!(e <= worst)) worst = e`. */
static int is_worse(double worst, double e) { return !isnan(worst) && !(e <= worst); }
static double worse(double worst, double e) { return is_worse(worst, e) ? e : worst; }

/* |a - b| / |b| in the 2-norm; NaN if any element is; 0 when both are zero. */
static double relative_error(const real *a, const real *b, size_t n)
{
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)b[i] * b[i];
    }
    return difference == 0 ? 0 : sqrt(difference / norm);
}

/* n normal variates * std. The stream is the test's own. */
static real *random_reals(size_t n, uint32_t stream, double std)
{
    real *x = (real *)xcalloc(n, sizeof *x);
    random_normals(x, 2019, 0x70000000 + stream, 0, n);
    for (size_t i = 0; i < n; i++) x[i] *= (real)std;
    return x;
}

/* Runs body(arg) in a child process. Passes if it exits 1 after exactly one line on stderr, which
 * contains `message`. */
static void check_dies(const char *what, void (*body)(void *), void *arg, const char *message)
{
    char line[4096] = "";
    int ends[2], status = 0;
    size_t n = 0;
    fflush(stdout);
    if (pipe(ends)) die("cannot make a pipe: %s", strerror(errno));
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        close(ends[1]);
        alarm(60);
#ifdef _OPENMP
        omp_set_num_threads(1); /* a child does not have its parent's threads */
#endif
        body(arg);
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t got; (got = read(ends[0], line + n, sizeof line - 1 - n)) > 0;) n += (size_t)got;
    close(ends[0]);
    waitpid(child, &status, 0);
    line[n] = 0;
    int refused = WIFEXITED(status) && WEXITSTATUS(status) == 1 && n &&
                  strchr(line, '\n') == line + n - 1 && strstr(line, message);
    checks++;
    failures += !refused;
    printf("    %-60s %s\n", what, refused ? "refused, ok" : "FAILED");
    if (!refused)
        printf("      status %d, expected exit 1 and one line with \"%s\"; got: %s\n", status,
               message, n ? line : "nothing\n");
}

/* The folder for the tests' files: emptied at the start, removed at the end. */
static const char *const SCRATCH = sizeof(real) == 4 ? "test_scratch" : "test_scratch_double";

static int run_command(const char *format, ...) __attribute__((format(printf, 1, 2)));
static int run_command(const char *format, ...)
{
    char command[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    fflush(stdout);
    int status = system(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

/* FREE(a, b, ..) frees them all. */
static void free_all(void *const *p, size_t n)
{
    for (size_t i = 0; i < n; i++) free(p[i]);
}
#define FREE(...)                                                                                  \
    do {                                                                                           \
        void *const all_[] = {__VA_ARGS__};                                                        \
        free_all(all_, sizeof all_ / sizeof *all_);                                                \
    } while (0)

/* Says that something was not tested, and why. */
static int skips;
static void skip(const char *why)
{
    skips++;
    printf("    skipped: %s\n", why);
}

static void *no_work(void *arg) { return arg; }

/* Can a forked child start threads? Under qemu-user it cannot, once its parent has had some. */
static int have_forked_threads(void)
{
    int status = 1;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        pthread_t thread;
        if (!freopen("/dev/null", "w", stderr)) _exit(1);
        _exit(pthread_create(&thread, NULL, no_work, NULL) || pthread_join(thread, NULL));
    }
    waitpid(child, &status, 0);
    if (status) skip("a forked process cannot have threads here (qemu-user)");
    return status == 0;
}

/* ---- The twin's record against our own ------------------------------------------------------- */

typedef struct {
    char name[128];
    size_t n;
    double roundings, *x;
} RecordEntry;

/* Reads the next tensor of a record; 0 at its end. The caller frees x. */
static int next_entry(FILE *record, RecordEntry *e)
{
    if (!fgets(e->name, sizeof e->name, record)) return 0;
    e->name[strcspn(e->name, "\n")] = 0;
    if (fscanf(record, "%zu %lf", &e->n, &e->roundings) != 2 || fgetc(record) != '\n' ||
        e->n > (size_t)1 << 28)
        return 0;
    e->x = (double *)xcalloc(e->n, sizeof *e->x);
    return fread(e->x, sizeof *e->x, e->n, record) == e->n;
}

/* |a - b| / |b| in the 2-norm. Equal infinities do not differ; any other, or a NaN,
 * makes it infinite or NaN. */
static double entry_error(const RecordEntry *a, const RecordEntry *b)
{
    double difference = 0, norm = 0;
    for (size_t i = 0; i < a->n; i++) {
        if (isinf(b->x[i]) && a->x[i] == b->x[i]) continue;
        difference += (a->x[i] - b->x[i]) * (a->x[i] - b->x[i]);
        norm += b->x[i] * b->x[i];
    }
    return difference == 0 ? 0 : sqrt(difference / norm);
}

/* Compares the record of `program` with that of make(). The bound: sums of up to a thousand terms,
 * in another order, fused or not, differ by at most some 30 roundings of float (the root of the
 * number of terms), 2e-6 of the norm; whole models by a few times that. Where the twin's act is
 * narrower, its roundings are added. */
static void compare_twin(const char *program, const char *what, void (*make)(FILE *), double bound)
{
    char command[PATH_MAX], *own = NULL, first[128] = "";
    size_t size;
    double u = NAN;
    if (access(program, X_OK)) {
        skip("the twin was not built: make test builds it where g++ or nvcc is, unless CUDA=off");
        return;
    }
    fflush(stdout);
    snprintf(command, sizeof command, "./%s %s", program, what);
    FILE *twin = popen(command, "r"), *memory = open_memstream(&own, &size);
    if (!twin || !memory) die("cannot run %s: %s", command, strerror(errno));
    make(memory);
    fclose(memory);
    memory = fmemopen(own, size, "r");
    if (!memory || !fgets(first, sizeof first, twin) || sscanf(first, "%lf", &u) != 1)
        check_true("the twin's record begins with its roundoff", 0);
    RecordEntry a = {"", 0, 0, NULL}, b = {"", 0, 0, NULL};
    while (memory && next_entry(memory, &b)) {
        if (!next_entry(twin, &a) || strcmp(a.name, b.name) || a.n != b.n) {
            char row[192];
            snprintf(row, sizeof row, "%s is missing from the record of %s", b.name, program);
            check_true(row, 0);
            break;
        }
        check(b.name, entry_error(&a, &b), bound + (u > 0x1p-24 ? u * b.roundings : 0));
        free(a.x);
        free(b.x);
        a.x = b.x = NULL;
    }
    free(a.x);
    free(b.x);
    check_equal("exit status of the twin", pclose(twin), 0);
    if (memory) fclose(memory);
    free(own);
}

static void test_twin_operators(void)
{
    for (int fallback = 0; fallback < 2; fallback++) {
        /* The emulated cuBLASLt refuses: products go through cuBLAS, and kernels do the rest. */
        if (fallback) setenv("CUDAEMU_LT", "off", 1);
        if (sizeof(real) == sizeof(float))
            compare_twin("test_twin_fp32", "operators", record_operators, 2e-6);
        else {
            compare_twin("test_twin_bf16", "operators", record_operators, 2e-6);
            compare_twin("test_twin_fp16", "operators", record_operators, 2e-6);
        }
    }
    unsetenv("CUDAEMU_LT");
}

static void test_twin_models(void)
{
    if (sizeof(real) == sizeof(float))
        compare_twin("test_twin_fp32", "models", record_models, 1e-5);
    else {
        compare_twin("test_twin_bf16", "models", record_models, 1e-5);
        compare_twin("test_twin_fp16", "models", record_models, 1e-5);
    }
}

/* ---- Chapters 1 and 4: every operator against a naive double version ------------------------- */

/* The mask's definition, one element at a time: 0 or 1/(1-p). */
static inline real dropout_factor(Dropout d, size_t index)
{
    uint32_t word = random_word(d.seed, d.site, d.step, d.first + index);
    return word >= dropout_threshold(d.p) ? 1 / (1 - d.p) : 0;
}

/* Forward and backward are compared with naive versions in double. In the build with -DREAL=double
 * every backward is also compared with central differences of its own forward. U is the unit
 * roundoff; bounds are small multiples of it. */
static const double U = sizeof(real) == sizeof(float) ? 0x1p-24 : 0x1p-53;

static double *random_doubles(const real *from, size_t n)
{
    double *to = (double *)xcalloc(n, sizeof *to);
    for (size_t i = 0; i < n; i++) to[i] = from[i];
    return to;
}

static real *copy_reals(const real *from, size_t n)
{
    return (real *)memcpy(xcalloc(n, sizeof(real)), from, n * sizeof(real));
}

/* |a - b| / |b| in the 2-norm, where b is a double oracle. NaN if any element is. */
static double error_of(const real *a, const double *b, size_t n)
{
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        difference += (a[i] - b[i]) * (a[i] - b[i]);
        norm += b[i] * b[i];
    }
    return difference == 0 ? 0 : sqrt(difference / norm);
}

static void use_threads(int n)
{
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

static Dropout test_dropout(double p, size_t first, size_t heads)
{
    Dropout d;
    d.seed = 0x123456789abcdefull;
    d.site = 7;
    d.step = 3;
    d.p = (real)p;
    d.first = first;
    d.heads = heads;
    return d;
}

/* Largest |numeric - grad| / |grad|_inf over a sample of x's elements; loss(arg) must read x.
 * Central differences with h = 1e-5 have a truncation error of h^2 = 1e-10, and a rounding error of
 * 1e-16 / h = 1e-11 for a loss near 1. This makes sense in double only. */
static double finite_difference_error(real *x, const real *grad, size_t n, double (*loss)(void *),
                                      void *arg)
{
    double worst = 0, top = 0;
    const double h = 1e-5;
    for (size_t i = 0; i < n; i++) top = fabs((double)grad[i]) > top ? fabs((double)grad[i]) : top;
    for (size_t s = 0; s < 24; s++) {
        const size_t i = (s * 2654435761u + 5) % n;
        const real saved = x[i];
        x[i] = (real)(saved + h);
        const double above = loss(arg);
        x[i] = (real)(saved - h);
        const double below = loss(arg);
        x[i] = saved;
        const double e = fabs((above - below) / (2 * h) - grad[i]) / top;
        worst = worse(worst, e);
    }
    return worst;
}

static double weighted_sum(const real *y, const real *weight, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)y[i] * weight[i];
    return sum;
}

/* ---- Functions of one number, random numbers ------------------------------------------------- */

static void test_exponential(void)
{
    if (sizeof(real) == sizeof(float)) {
        check_equal("e^x is 0 below -86.5", exponential(-86.6f), 0);
        check_true("e^x < 2^-124 there", exp(-86.5) < 0x1p-124);
        check_equal("e^x at -1e30 and -inf", exponential(-1e30f) + exponential((real)-INFINITY), 0);
        check_true("e^88.72283 is finite", isfinite(exponential(88.72283f)));
        check_true("e^88.72284 is inf", isinf(exponential(88.72284f)));
        check_true("e^1e30 is inf", isinf(exponential(1e30f)));
    }
    check_true("e^inf is inf", isinf(exponential((real)INFINITY)));
    check_true("e^NaN is NaN", isnan(exponential((real)NAN)));
    check_equal("e^0", exponential(0), 1);
    real x[67], y[67]; /* a vectorised loop must give the same as a single call */
    for (int i = 0; i < 67; i++) x[i] = (real)((i - 33) * 3.1);
    for (int i = 0; i < 67; i++) y[i] = exponential(x[i]);
    double worst = 0;
    for (int i = 0; i < 67; i++) {
        const double exact = x[i] < -86.5 && sizeof(real) == sizeof(float) ? 0 : exp((double)x[i]);
        const double e =
            exact == y[i] || (exact > 3.4e38 && isinf(y[i])) ? 0 : fabs(y[i] / exact - 1);
        worst = worse(worst, e);
    }
    check("e^x in a loop, relative", worst, 2.1 * U);
}

/* Functions of one number and the bounds that doc/accuracy.md states. A row is a function on a
 * range of floats. Its error is given in a unit: an ulp of the result; an ulp times a condition
 * number, where the rounding of the argument counts; or absolute. Each float is tried twice: in a
 * row of many, as chapter 4 computes it, and alone, because compilers make different code of the
 * two. */
typedef enum { EXPONENTIAL, GELU_OF_TANH, GELU_OF_ERF, SLOPE_OF_TANH, SLOPE_OF_ERF } Function;
typedef enum { ULP, ULP_1_V, ULP_1_XX, ABSOLUTE } ErrorUnit;
typedef struct {
    const char *what;
    Function f;
    float low, high; /* both included */
    ErrorUnit unit;
    double bound;
} FunctionBound;

static const FunctionBound function_bounds[] = {
    {"e^x, ulp", EXPONENTIAL, -86.5f, INFINITY, ULP, 1.02},
    {"e^x below -86.5, absolute", EXPONENTIAL, -INFINITY, -86.5f, ABSOLUTE, 0x1p-124},
    {"gelu tanh, x >= 0, ulp", GELU_OF_TANH, 0, INFINITY, ULP, 2.2},
    {"gelu tanh, x < 0, ulp (1 + |2u|)", GELU_OF_TANH, -10.05f, -0.0f, ULP_1_V, 3.3},
    {"gelu tanh, x < -10.05, absolute", GELU_OF_TANH, -FLT_MAX, -10.05f, ABSOLUTE, 4e-38},
    {"gelu erf, x >= 0, ulp", GELU_OF_ERF, 0, INFINITY, ULP, 1.8},
    {"gelu erf, x < 0, ulp (1 + x^2)", GELU_OF_ERF, -FLT_MAX, -0.0f, ULP_1_XX, 1.8},
    {"gelu' tanh, absolute", SLOPE_OF_TANH, -INFINITY, INFINITY, ABSOLUTE, 0x1p-22},
    {"gelu' tanh, x <= -1, ulp (1 + |2u|)", SLOPE_OF_TANH, -9.96f, -1, ULP_1_V, 4.2},
    {"gelu' tanh, x < -9.96, absolute", SLOPE_OF_TANH, -INFINITY, -9.96f, ABSOLUTE, 7e-36},
    {"gelu' erf, absolute", SLOPE_OF_ERF, -INFINITY, INFINITY, ABSOLUTE, 1.6e-7},
    {"gelu' erf, x <= -1, ulp (1 + x^2)", SLOPE_OF_ERF, -13.0f, -1, ULP_1_XX, 3.8},
    {"gelu' erf, x < -13, absolute", SLOPE_OF_ERF, -INFINITY, -13.0f, ABSOLUTE, 2e-37},
};
enum { N_FUNCTION_BOUNDS = sizeof function_bounds / sizeof *function_bounds, FUNCTION_RUN = 512 };

/* 2u, where gelu(x) = x / 2 (1 + tanh u). */
static double tanh_argument(double x) { return 2 * sqrt(2 / M_PI) * (x + 0.044715 * x * x * x); }

/* In double. The logistic function is used where 1 + tanh would cancel. */
static double exact_function(Function f, double x)
{
    if (f == EXPONENTIAL) return exp(x);
    if (f == GELU_OF_ERF) return isinf(x) ? fmax(x, 0) : x * erfc(-x / sqrt(2)) / 2;
    if (f == GELU_OF_TANH) return isinf(x) ? fmax(x, 0) : x / (1 + exp(-tanh_argument(x)));
    x = fmin(fmax(x, -100), 100);
    if (f == SLOPE_OF_ERF) return erfc(-x / sqrt(2)) / 2 + x * exp(-x * x / 2) / sqrt(2 * M_PI);
    const double v = tanh_argument(x);
    return (1 + x / (1 + exp(v)) * 2 * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x)) / (1 + exp(-v));
}

/* A row of results. GeLU and its slope are computed by a product's epilogue. */
static void function_row(Function f, real *y, const real *x, size_t n)
{
    const Gelu kind = f == GELU_OF_ERF || f == SLOPE_OF_ERF ? GELU_ERF : GELU_TANH;
    const int forward = f == GELU_OF_TANH || f == GELU_OF_ERF;
    const Epilogue e = {forward ? BIAS_GELU : GELU_SLOPE, NULL, forward ? NULL : (act *)x, kind};
    for (size_t i = 0; i < n; i++) y[i] = f == EXPONENTIAL || forward ? x[i] : 1;
    if (f != EXPONENTIAL) finish(y, n, 0, 0, 1, n, &e);
    else
#pragma omp simd
        for (size_t i = 0; i < n; i++) y[i] = exponential(y[i]);
}

static real function_alone(Function f, real x)
{
    volatile real alone = x; /* not vectorised */
    if (f == EXPONENTIAL) return exponential(alone);
    if (f == GELU_OF_TANH || f == GELU_OF_ERF)
        return gelu(alone, f == GELU_OF_ERF ? GELU_ERF : GELU_TANH);
    return gelu_slope(alone, f == SLOPE_OF_ERF ? GELU_ERF : GELU_TANH);
}

static float float_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static uint32_t bits_of_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* The distance between neighbouring floats at y, also for subnormal y. */
static double ulp(double y)
{
    int e;
    if (y == 0) return 0x1p-149;
    frexp(y, &e);
    return ldexp(1, (e < -125 ? -125 : e) - 24);
}

/* The error of y against exact = f(x), in b's unit. Where exact rounds to
 * infinity, y should be infinite. */
static double function_error(const FunctionBound *b, double x, double y, double exact)
{
    const double units[] = {1, 1 + fabs(tanh_argument(x)), 1 + x * x}, limit = 0x1.ffffffp127;
    if (isinf(y)) return exact >= limit && y > 0 ? 0 : INFINITY;
    const double error = fabs(y - (exact < limit ? exact : 0x1p128));
    if (b->unit == ABSOLUTE) return error;
    return error / ulp(exact < limit ? exact : FLT_MAX) / units[b->unit];
}

/* Floats at which runs are centred: 0; powers of two; the points where the exponential's n steps,
 * for x itself, 2u and x^2/2; the ends of ranges. */
static size_t special_floats(float *special, size_t room)
{
    static const float ends[] = {0,  86.5f, 88.72283f, 89, 88.02969f,  10.05f,  10,
                                 13, 14.2f, 1,         40, 0.7517916f, INFINITY};
    size_t n = 0;
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) special[n++] = ends[i];
    for (int e = -149; e < 128; e++) special[n++] = (float)ldexp(1, e);
    for (int i = 0; i <= 258; i++) {
        const double step = i * M_LN2 / 2;
        double low = 0, high = 100;
        for (int j = 0; j < 60; j++) {
            const double middle = (low + high) / 2;
            if (tanh_argument(middle) < step) low = middle;
            else high = middle;
        }
        special[n++] = (float)step;
        special[n++] = (float)low;
        special[n++] = (float)sqrt(2 * step);
    }
    for (size_t i = 0, half = n; i < half; i++) special[n++] = -special[i];
    return n <= room ? n : 0;
}

/* Tries runs of neighbours around special floats, and every 1021st float. With `all`, also each
 * float of absolute value from 2^-26 to 128. Below that range e^x is 1, gelu is x / 2 and its slope
 * is 1/2; above it they are 0, infinite, x or 1. */
static void check_functions(int all)
{
    enum { ROOM = 4096, STRIDE = 1021 };
    float special[ROOM];
    const uint32_t first = bits_of_float(0x1p-26f), count = bits_of_float(128) - first;
    const size_t n_special = special_floats(special, ROOM);
    const size_t n_sparse = 0x100000000u / STRIDE / FUNCTION_RUN + 1;
    const size_t runs = n_special + n_sparse + (all ? 2 * (size_t)count / FUNCTION_RUN : 0);
    check_true("special floats", n_special > 0);
    for (const FunctionBound *b = function_bounds; b < function_bounds + N_FUNCTION_BOUNDS; b++) {
        double worst = 0, worst_at = 0;
        size_t tried = 0;
#pragma omp parallel for schedule(static) reduction(+ : tried)
        for (size_t run = 0; run < runs; run++) {
            real x[FUNCTION_RUN], y[FUNCTION_RUN];
            size_t n = 0;
            double error = 0, at = 0;
            for (size_t i = 0; i < FUNCTION_RUN; i++) {
                size_t bits = ((run - n_special) * FUNCTION_RUN + i) * STRIDE;
                if (run < n_special) bits = bits_of_float(special[run]) + i - FUNCTION_RUN / 2;
                if (run >= n_special + n_sparse) {
                    const size_t nth = (run - n_special - n_sparse) * FUNCTION_RUN + i;
                    bits = first + nth / 2 + (nth % 2 << 31); /* both signs */
                }
                const float candidate = float_of_bits((uint32_t)bits);
                if (candidate >= b->low && candidate <= b->high) x[n++] = (real)candidate;
            }
            function_row(b->f, y, x, n);
            for (size_t i = 0; i < n; i++) {
                const double exact = exact_function(b->f, (double)x[i]);
                const double e = worse(
                    function_error(b, (double)x[i], (double)y[i], exact),
                    function_error(b, (double)x[i], (double)function_alone(b->f, x[i]), exact));
                if (is_worse(error, e)) {
                    error = e;
                    at = (double)x[i];
                }
            }
            tried += n;
#pragma omp critical
            if (is_worse(worst, error)) {
                worst = error;
                worst_at = at;
            }
        }
        check(b->what, worst, b->bound);
        printf("      %zu floats; worst at %.9g\n", tried, worst_at);
    }
}

/* The polynomial's own error. Write x = n ln 2 + r: over many x of nearly equal
 * r, roundings average out. */
static void check_polynomial(void)
{
    enum { BINS = 64, STRIDE = 37 };
    double sum[BINS] = {0}, count[BINS] = {0}, worst = 0;
    for (uint32_t bits = bits_of_float(0.25f); bits < bits_of_float(64); bits += STRIDE) {
        const double x = bits % 2 ? float_of_bits(bits) : -float_of_bits(bits), exact = exp(x);
        const size_t bin = (size_t)((x / M_LN2 - rint(x / M_LN2) + 0.5) * BINS) % BINS;
        sum[bin] += ((double)exponential((real)x) - exact) / ulp(exact);
        count[bin]++;
    }
    for (size_t bin = 0; bin < BINS; bin++) worst = worse(worst, fabs(sum[bin] / count[bin]));
    check("e^x: mean error at equal r, ulp", worst, 0.05);
}

static void test_functions(void)
{
    int nan = 1, zero = 1, ends = 1;
    for (int f = EXPONENTIAL; f <= SLOPE_OF_ERF; f++) {
        const real x[] = {(real)NAN, 0, (real)-0.0, INFINITY, -INFINITY};
        real y[5];
        function_row((Function)f, y, x, 5);
        nan &= isnan(y[0]) && isnan(function_alone((Function)f, x[0]));
        zero &= y[1] == exact_function((Function)f, 0) && y[2] == y[1];
        if (f == EXPONENTIAL) ends &= isinf(y[3]) && y[4] == 0;
        else if (f < SLOPE_OF_TANH) ends &= isinf(y[3]) && isnan(y[4]);
        else ends &= y[3] == 1 && fabs((double)y[4]) <= (f == SLOPE_OF_TANH ? 7e-36 : 0);
    }
    check_true("NaN of NaN", nan);
    check_true("exact at 0 and -0", zero);
    check_true("infinities", ends);
    check_polynomial();
    check_functions(0);
}
static void test_all_floats(void) { check_functions(1); }

static double exact_gelu(double x, Gelu kind)
{
    if (kind == GELU_ERF) return 0.5 * x * erfc(-x / sqrt(2));
    return (double)(0.5L * x *
                    (1 + tanhl(sqrtl(2 / 3.14159265358979323846L) * (x + 0.044715L * x * x * x))));
}

static double exact_gelu_slope(double x, Gelu kind)
{
    if (kind == GELU_ERF) return 0.5 * erfc(-x / sqrt(2)) + x * exp(-x * x / 2) / sqrt(2 * M_PI);
    const long double slope_at_0 = sqrtl(2 / 3.14159265358979323846L);
    const long double t = tanhl(slope_at_0 * (x + 0.044715L * x * x * x));
    return (double)(0.5L * (1 + t) +
                    0.5L * x * (1 - t * t) * slope_at_0 * (1 + 3 * 0.044715L * x * x));
}

static void test_gelu(void)
{
    double error[2] = {0}, slope_error[2] = {0}, difference = 0, gap = 0, gap_at = 0;
    for (int kind = GELU_TANH; kind <= GELU_ERF; kind++)
        for (int i = -12000; i <= 12000; i++) {
            const real x = (real)(i * 1e-3);
            const double exact = exact_gelu(x, (Gelu)kind), slope = exact_gelu_slope(x, (Gelu)kind);
            const double h = 1e-6;
            const double e = fabs(gelu(x, (Gelu)kind) - exact) / fmax(fabs(exact), 0.01);
            const double s = fabs(gelu_slope(x, (Gelu)kind) - slope);
            const double d = fabs(
                (exact_gelu(x + h, (Gelu)kind) - exact_gelu(x - h, (Gelu)kind)) / (2 * h) - slope);
            error[kind] = worse(error[kind], e);
            slope_error[kind] = worse(slope_error[kind], s);
            difference = worse(difference, d);
        }
    /* e^-2u turns an error of U in 2u into |2u| U */
    check("gelu tanh, relative above 0.01", error[GELU_TANH], 32 * U);
    check("gelu erf, relative above 0.01", error[GELU_ERF], 40 * U); /* erfc amplifies U by x^2 */
    check("gelu' tanh, absolute", slope_error[GELU_TANH], 8 * U);
    check("gelu' erf, absolute", slope_error[GELU_ERF], 8 * U);
    check("the oracle's gelu' against its differences", difference, 1e-8);
    check_equal("gelu(-1e6), both kinds",
                (double)gelu(-1000000, GELU_TANH) + (double)gelu(-1000000, GELU_ERF), 0);
    check_equal("gelu'(+-100)",
                (double)gelu_slope(100, GELU_TANH) + (double)gelu_slope(-100, GELU_TANH), 1);
    check("[P41] gelu_tanh(1) = 0.8411920", fabs(gelu(1, GELU_TANH) - 0.8411920), 1e-7);
    check("[P41] gelu_erf(1) = 0.8413447", fabs(gelu(1, GELU_ERF) - 0.8413447), 1e-7);
    for (double x = 0; x < 6; x += 1e-3) {
        const double g = fabs((double)gelu((real)x, GELU_TANH) - (double)gelu((real)x, GELU_ERF));
        if (g > gap) {
            gap = g;
            gap_at = x;
        }
    }
    check("[P41] largest gap is 4.73e-4", fabs(gap - 4.73e-4), 1e-6);
    check("[P41] at x = 2.699", fabs(gap_at - 2.699), 0.01);
}

static void test_philox_and_dropout(void)
{
    static const struct {
        uint32_t counter[4], key[2], out[4];
    } known[] = {
        /* Random123's kat_vectors */
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}};
    for (size_t i = 0; i < 3; i++) {
        uint32_t out[4];
        philox(out, known[i].key[0] | (uint64_t)known[i].key[1] << 32,
               known[i].counter[0] | (uint64_t)known[i].counter[1] << 32, known[i].counter[2],
               known[i].counter[3]);
        check_true("philox known answer", memcmp(out, known[i].out, sizeof out) == 0);
    }
    /* the number of the block crosses 2^32 within the range */
    const Dropout d = test_dropout(0.3, (size_t)4 * 0xfffffff0u + 2, 1);
    int same = 1, guarded = 1;
    for (size_t offset = 0; offset < 9; offset++)
        for (size_t n = 0; n < 200; n += 1 + n / 8) {
            real out[201];
            out[n] = 42;
            dropout_factors(out, d, offset, n);
            for (size_t i = 0; i < n; i++) same &= out[i] == dropout_factor(d, offset + i);
            guarded &= out[n] == 42;
        }
    check_true("dropout_factors = dropout_factor, all alignments", same);
    check_true("dropout_factors stays inside", guarded);
    int agrees = 1;
    for (size_t i = 0; i < 1000; i++) {
        const double word = random_word(d.seed, d.site, d.step, d.first + i);
        agrees &= dropout_factor(d, i) == (word >= (double)d.p * 4294967296.0 ? 1 / (1 - d.p) : 0);
    }
    check_true("dropout_factor keeps iff word >= p * 2^32", agrees);
    Dropout exact = test_dropout(0.5, 0, 1);
    size_t round = 0; /* find an element whose random word is a float: p * 2^32 can equal it */
    while (random_word(exact.seed, exact.site, exact.step, round) % 256) round++;
    exact.p = (real)(random_word(exact.seed, exact.site, exact.step, round) * 0x1p-32);
    real edge;
    dropout_factors(&edge, exact, round, 1);
    check_true("a word equal to p * 2^32 is kept", dropout_factor(exact, round) > 1 && edge > 1);
    enum { DRAWS = 400000 };
    real *out = (real *)xcalloc(DRAWS, sizeof *out);
    for (int i = 1; i <= 2; i++) {
        const double p = i == 1 ? 0.1 : 0.5;
        double dropped = 0;
        dropout_factors(out, test_dropout(p, 0, 1), 0, DRAWS);
        for (size_t j = 0; j < DRAWS; j++) dropped += out[j] == 0;
        check("observed drop rate - p, in standard deviations",
              fabs(dropped / DRAWS - p) / sqrt(p * (1 - p) / DRAWS), 4);
    }
    free(out);
}

/* ---- Matrix product, linear layers ----------------------------------------------------------- */

/* c (M,N) [+]= a b in double, strides as in Matrix. */
static void naive_product(double *c, const real *a, size_t a_row, size_t a_col, const real *b,
                          size_t b_row, size_t b_col, size_t M, size_t N, size_t K, int add)
{
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++) {
            double sum = add ? c[i * N + j] : 0;
            for (size_t k = 0; k < K; k++)
                sum += (double)a[i * a_row + k * a_col] * b[k * b_row + j * b_col];
            c[i * N + j] = sum;
        }
}

/* One shape, with all four combinations of strides, with and without add. Returns
 * the worst relative error. */
static double product_error(size_t M, size_t N, size_t K)
{
    double worst = 0;
    real *a = random_reals(M * K, 1, 1), *b = random_reals(K * N, 2, 1);
    real *c0 = random_reals(M * N, 3, 1);
    for (int way = 0; way < 8; way++) {
        const size_t a_row = way & 1 ? 1 : K, a_col = way & 1 ? M : 1, b_row = way & 2 ? 1 : N;
        const size_t b_col = way & 2 ? K : 1;
        const Matrix ma = {a, M, K, a_row, a_col}, mb = {b, K, N, b_row, b_col};
        real *c = copy_reals(c0, M * N);
        double *exact = random_doubles(c0, M * N);
        matmul(c, ma, mb, way >> 2 ? ADD : WRITE, NULL);
        naive_product(exact, a, a_row, a_col, b, b_row, b_col, M, N, K, way >> 2);
        const double e = error_of(c, exact, M * N);
        worst = worse(worst, e);
        free(c);
        free(exact);
    }
    FREE(a, b, c0);
    return worst;
}

static void test_matmul(void)
{
    double worst = 0;
    for (size_t s = 1; s <= 70; s++) { /* every M, N and K in 1..70, in changing combinations */
        const double e = product_error(s, (s * 29) % 71, (s * 43) % 71);
        worst = worse(worst, e);
    }
    check("matmul, shapes 1..70, all strides", worst, 8 * U);
    check("matmul, K over two blocks", product_error(66, 130, 801), 16 * U);
    check("matmul, M over two blocks", product_error(1543, 70, 40), 8 * U);
    for (size_t M = 1; M < 5; M++) worst = fmax(worst, product_error(M, 50, 301));
    check("matmul of a few rows", worst, 16 * U);
}

typedef struct {
    size_t N, I, O;
    Gelu kind;
    /* (N,I) (O,I) (O) (I,O) (N,O) (N,O) (N,I or O) (N,O) */
    real *x, *w, *b, *w2, *y, *pre, *z, *weight;
} LinearCase;

static double linear_loss(void *arg)
{
    LinearCase *c = (LinearCase *)arg;
    linear_forward(c->y, c->x, c->w, c->b, c->N, c->I, c->O);
    return weighted_sum(c->y, c->weight, c->N * c->O);
}

/* z = gelu(pre) w2' as a function of pre and w2. */
static double gelu_linear_loss(void *arg)
{
    LinearCase *c = (LinearCase *)arg;
    for (size_t i = 0; i < c->N * c->O; i++) c->y[i] = gelu(c->pre[i], c->kind);
    linear_forward(c->z, c->y, c->w2, NULL, c->N, c->O, c->I);
    return weighted_sum(c->z, c->x, c->N * c->I);
}

static void linear_case(size_t N, size_t I, size_t O, Gelu kind)
{
    printf("  N %zu I %zu O %zu %s\n", N, I, O, kind == GELU_ERF ? "erf" : "tanh");
    LinearCase c;
    c.N = N;
    c.I = I;
    c.O = O;
    c.kind = kind;
    c.x = random_reals(N * I, 1, 1);
    c.w = random_reals(O * I, 2, 1 / sqrt((double)I));
    c.b = random_reals(O, 3, 1);
    c.w2 = random_reals(I * O, 4, 1 / sqrt((double)O));
    c.weight = random_reals(N * O, 5, 1);
    c.y = random_reals(N * O, 6, 1);
    c.pre = random_reals(N * O, 7, 1);
    c.z = random_reals(N * (I + O), 8, 1);
    double *pre = (double *)xcalloc(N * O, sizeof *pre);
    double *activated = (double *)xcalloc(N * O, sizeof *activated);
    naive_product(pre, c.x, I, 1, c.w, 1, I, N, O, I, 0);
    linear_forward(c.y, c.x, c.w, NULL, N, I, O);
    check("linear, no bias", error_of(c.y, pre, N * O), 16 * U);
    for (size_t i = 0; i < N * O; i++) {
        pre[i] += c.b[i % O];
        activated[i] = exact_gelu(pre[i], kind);
    }
    linear_forward(c.y, c.x, c.w, c.b, N, I, O);
    check("linear", error_of(c.y, pre, N * O), 16 * U);
    linear_gelu_forward(c.y, c.pre, c.x, c.w, c.b, N, I, O, kind);
    check("bias + GeLU epilogue: pre", error_of(c.pre, pre, N * O), 16 * U);
    check("bias + GeLU epilogue: y", error_of(c.y, activated, N * O), 16 * U);
    linear_gelu_forward(c.z, NULL, c.x, c.w, c.b, N, I, O, kind);
    check_true("the same without pre", memcmp(c.z, c.y, N * O * sizeof(real)) == 0);

    real *dx = random_reals(N * I, 9, 1), *dw0 = random_reals(O * I, 10, 1);
    real *db0 = random_reals(O, 11, 1);
    real *dw = copy_reals(dw0, O * I), *db = copy_reals(db0, O);
    double *edx = (double *)xcalloc(N * I, sizeof *edx), *edw = random_doubles(dw0, O * I);
    double *edb = random_doubles(db0, O);
    linear_backward(dx, dw, db, c.weight, c.x, c.w, N, I, O);
    naive_product(edx, c.weight, O, 1, c.w, I, 1, N, I, O, 0);
    naive_product(edw, c.weight, 1, O, c.x, I, 1, O, I, N, 1);
    for (size_t i = 0; i < N * O; i++) edb[i % O] += c.weight[i];
    check("linear backward dx", error_of(dx, edx, N * I), 8 * U);
    check("linear backward dw +=", error_of(dw, edw, O * I), 8 * U);
    check("linear backward db +=", error_of(db, edb, O), 8 * U);
    /* with NULL for all results it must do nothing */
    linear_backward(NULL, NULL, NULL, c.weight, c.x, c.w, N, I, O);
    if (sizeof(real) == sizeof(double)) {
        for (size_t i = 0; i < O * I; i++) dw[i] -= dw0[i];
        for (size_t i = 0; i < O; i++) db[i] -= db0[i];
        check("linear dx, differences", finite_difference_error(c.x, dx, N * I, linear_loss, &c),
              1e-8);
        check("linear dw, differences", finite_difference_error(c.w, dw, O * I, linear_loss, &c),
              1e-8);
        check("linear db, differences", finite_difference_error(c.b, db, O, linear_loss, &c), 1e-8);
    }

    linear_gelu_forward(c.y, c.pre, c.x, c.w, c.b, N, I, O, kind);
    /* Backward of GeLU: here dz is x (N,I), the second layer's weight is w2
     * (I,O), and pre is (N,O). */
    real *dpre = random_reals(N * O, 12, 1), *dw2 = copy_reals(dw0, O * I);
    double *edpre = (double *)xcalloc(N * O, sizeof *edpre), *edw2 = random_doubles(dw0, O * I);
    gelu_linear_backward(dpre, dw2, c.x, c.y, c.pre, c.w2, N, O, I, kind);
    naive_product(edpre, c.x, I, 1, c.w2, O, 1, N, O, I, 0);
    for (size_t i = 0; i < N * O; i++) edpre[i] *= exact_gelu_slope(c.pre[i], kind);
    naive_product(edw2, c.x, 1, I, c.y, O, 1, I, O, N, 1);
    check("gelu + linear backward dpre", error_of(dpre, edpre, N * O), 12 * U);
    check("gelu + linear backward dw +=", error_of(dw2, edw2, I * O), 8 * U);
    if (sizeof(real) == sizeof(double)) {
        for (size_t i = 0; i < O * I; i++) dw2[i] -= dw0[i];
        check("dpre, differences",
              finite_difference_error(c.pre, dpre, N * O, gelu_linear_loss, &c), 1e-8);
        check("dw2, differences", finite_difference_error(c.w2, dw2, I * O, gelu_linear_loss, &c),
              1e-8);
    }
    FREE(c.x, c.w, c.b, c.w2, c.y, c.pre, c.z, c.weight, pre, activated, dx, dw0, db0, dw, db, edx,
         edw, edb, dpre, dw2, edpre, edw2);
}

static void test_linear(void)
{
    linear_case(66, 96, 130, GELU_TANH);
    linear_case(66, 7, 33, GELU_ERF);
    linear_case(5, 400, 7, GELU_TANH);
    linear_case(1, 96, 70, GELU_TANH); /* one row, as in generation: a matrix times a vector */
    linear_case(3, 770, 9, GELU_ERF);
}

/* [§3 eq.1-3] on one thread: the paper's two ways to split a GEMM, and their limits. */
static void test_split_gemm(void)
{
    enum { N = 66, C = 96, F = 384, T = 4 };
    real *x = random_reals(N * C, 1, 1), *a = random_reals(F * C, 2, 0.1);
    real *b = random_reals(C * F, 3, 0.05);
    real *no_bias = (real *)xcalloc(F, sizeof(real)), *bias = random_reals(C, 4, 1);
    real *y = random_reals(N * F, 5, 1), *part = random_reals(N * F, 6, 1);
    real *z = random_reals(N * C, 7, 1);
    real *sum = (real *)xcalloc(N * F, sizeof(real)), *out = (real *)xcalloc(N * C, sizeof(real));
    real *wrong = (real *)xcalloc(N * C, sizeof(real)), *slice = random_reals(C * F, 8, 1);
    real *cut = random_reals(F * C, 9, 1);
    linear_gelu_forward(y, NULL, x, a, no_bias, N, C, F, GELU_TANH);

    /* columns: rank r holds the output features from r*F/T on, which are rows of a (F,C) */
    double worst = 0;
    for (size_t r = 0; r < T; r++) {
        linear_gelu_forward(part, NULL, x, a + r * F / T * C, no_bias, N, C, F / T, GELU_TANH);
        for (size_t n = 0; n < N; n++) {
            const double e = relative_error(part + n * F / T, y + n * F + r * F / T, F / T);
            worst = worse(worst, e);
        }
    }
    check("[P2] concatenated GeLU(X A_i) = GeLU(X A)", worst, 4 * U);

    for (size_t r = 0; r < T; r++) { /* rows: each rank holds some input features of x and a */
        for (size_t i = 0; i < F; i++)
            memcpy(cut + i * C / T, a + i * C + r * C / T, C / T * sizeof(real));
        for (size_t n = 0; n < N; n++)
            memcpy(slice + n * C / T, x + n * C + r * C / T, C / T * sizeof(real));
        linear_gelu_forward(part, NULL, slice, cut, no_bias, N, C / T, F, GELU_TANH);
        for (size_t i = 0; i < N * F; i++) sum[i] += part[i];
    }
    const double gap = relative_error(sum, y, N * F);
    printf("    sum of GeLU(X_i A_i) is off by %.3g of GeLU(X A)\n", gap);
    check_true("[P3] GeLU of a sum is not the sum of GeLUs", gap > 0.1);

    linear_forward(z, y, b, bias, N, F, C);
    for (size_t r = 0; r < T; r++) {
        for (size_t n = 0; n < N; n++)
            memcpy(slice + n * F / T, y + n * F + r * F / T, F / T * sizeof(real));
        for (size_t i = 0; i < C; i++)
            memcpy(cut + i * F / T, b + i * F + r * F / T, F / T * sizeof(real));
        linear_forward(part, slice, cut, NULL, N, F / T, C);
        for (size_t i = 0; i < N * C; i++) {
            out[i] += part[i];
            wrong[i] += part[i] + bias[i % C];
        }
    }
    memset(sum, 0, N * C * sizeof(real)); /* as the residual */
    bias_dropout_add_forward(out, out, bias, sum, N, C, test_dropout(0, 0, 1));
    check("[P4] sum of Y_i B_i + bias = Y B + bias", relative_error(out, z, N * C), 8 * U);
    check_true("[P4] a bias on every rank would show", relative_error(wrong, z, N * C) > 0.5);
    FREE(x, a, b, no_bias, bias, y, part, z, sum, out, wrong, slice, cut);
}

/* ---- Embeddings, LayerNorm, bias + dropout + residual ---------------------------------------- */

static void test_embedding(void)
{
    enum { B = 3, T = 22, N = B * T, C = 70, V = 40, V0 = 10, VP = 20, PAST = 4 };
    int tokens[N];
    /* some repeat; half of them belong to another slice */
    for (int n = 0; n < N; n++) tokens[n] = n * 7 % V;
    real *wte = random_reals(VP * C, 1, 1), *wpe = random_reals((PAST + T) * C, 2, 1);
    real *x = random_reals(N * C, 3, 1);
    real *dwte = random_reals(VP * C, 4, 1), *dx = random_reals(N * C, 5, 1);
    real *dwpe = random_reals(T * C, 6, 1);
    double *edwte = random_doubles(dwte, VP * C), *edwpe = random_doubles(dwpe, T * C);
    token_embedding_forward(x, tokens, wte, N, C, V0, VP);
    int same = 1, inside = 0;
    for (size_t n = 0; n < N; n++)
        for (size_t c = 0; c < C; c++) {
            const int own = tokens[n] >= V0 && tokens[n] < V0 + VP;
            same &= x[n * C + c] == (own ? wte[(size_t)(tokens[n] - V0) * C + c] : 0);
            inside += own;
            if (own) edwte[(size_t)(tokens[n] - V0) * C + c] += dx[n * C + c];
        }
    check_true("token embedding = lookup, 0 outside the slice",
               same && inside > 0 && inside < N * C);
    token_embedding_backward(dwte, dx, tokens, N, C, V0, VP);
    check("token embedding backward +=", error_of(dwte, edwte, VP * C), 4 * U);
    static const double p[3] = {0, 0.1, 0.5};
    for (int i = 0; i < 3; i++) {
        const Dropout d = test_dropout(p[i], 12345, 1);
        real *y = copy_reals(x, N * C), *dy = copy_reals(dx, N * C), *dw = copy_reals(dwpe, T * C);
        double *ey = random_doubles(x, N * C), *edy = random_doubles(dx, N * C);
        double *edw = random_doubles(dwpe, T * C);
        position_embedding_forward(y, wpe, B, T, C, PAST, d);
        position_embedding_backward(dy, dw, B, T, C, d);
        for (size_t e = 0; e < N * C; e++) {
            const double keep = d.p > 0 ? dropout_factor(d, e) : 1;
            ey[e] = (ey[e] + wpe[(PAST + e / C % T) * C + e % C]) * keep;
            edy[e] *= keep;
            edw[e / C % T * C + e % C] += edy[e];
        }
        check("position embedding", error_of(y, ey, N * C), 2 * U);
        check("position embedding backward dx", error_of(dy, edy, N * C), 2 * U);
        check("position embedding backward dwpe +=", error_of(dw, edw, T * C), 4 * U);
        FREE(y, dy, dw, ey, edy, edw);
    }
    FREE(wte, wpe, x, dwte, dx, dwpe, edwte, edwpe);
}

typedef struct {
    size_t N, C;
    Dropout d;
    real *ln, *res, *mean, *rstd, *y, *bias, *residual, *g, *b, *weight, *weight_res;
} NormCase;

/* The fused operator as a function of y, bias, residual, g and b. The loss reads both outputs. */
static double norm_loss(void *arg)
{
    NormCase *c = (NormCase *)arg;
    bias_dropout_add_layernorm_forward(c->ln, c->res, c->mean, c->rstd, c->y, c->bias, c->residual,
                                       c->g, c->b, c->N, c->C, (real)1e-5, c->d);
    return weighted_sum(c->ln, c->weight, c->N * c->C) +
           weighted_sum(c->res, c->weight_res, c->N * c->C);
}

static void norm_case(size_t N, size_t C, double p, double mean)
{
    printf("  N %zu C %zu p %g mean %g\n", N, C, p, mean);
    const size_t n = N * C;
    NormCase c;
    c.N = N;
    c.C = C;
    c.d = test_dropout(p, 98765432101, 1);
    c.ln = random_reals(n, 1, 1);
    c.res = random_reals(n, 2, 1);
    c.mean = random_reals(N, 3, 1);
    c.rstd = random_reals(N, 4, 1);
    c.y = random_reals(n, 5, 1);
    c.bias = random_reals(C, 6, 1);
    c.residual = random_reals(n, 7, 1);
    c.g = random_reals(C, 8, 1);
    c.b = random_reals(C, 9, 1);
    c.weight = random_reals(n, 10, 1);
    c.weight_res = random_reals(n, 11, 1);
    for (size_t i = 0; i < n; i++) c.residual[i] += (real)mean;
    norm_loss(&c);

    double *res = (double *)xcalloc(n, sizeof *res), *ln = (double *)xcalloc(n, sizeof *ln);
    double *h = (double *)xcalloc(n, sizeof *h);
    double *em = (double *)xcalloc(N, sizeof *em), *er = (double *)xcalloc(N, sizeof *er);
    for (size_t e = 0; e < n; e++)
        res[e] = c.residual[e] +
                 ((double)c.y[e] + c.bias[e % C]) * (p > 0 ? (double)dropout_factor(c.d, e) : 1);
    double worst = 0; /* in units of the bound that LayerNorm states, from the same input */
    for (size_t i = 0; i < N; i++) {
        double m = 0, size = 0, square = 0, terms = (double)C;
        for (size_t j = 0; j < C; j++) {
            m += c.res[i * C + j] / terms;
            size += fabs((double)c.res[i * C + j]) / terms;
        }
        for (size_t j = 0; j < C; j++)
            square += (c.res[i * C + j] - m) * (c.res[i * C + j] - m) / terms;
        const double r = 1 / sqrt(square + 1e-5), of_mean = (terms / 4 + 4) * size * r;
        for (size_t j = 0; j < C; j++) {
            const double x = (c.res[i * C + j] - m) * r * c.g[j], y = x + c.b[j];
            const double allowed =
                fabs(x) * (terms / 8 + 8 + of_mean * of_mean * U) + fabs((double)c.g[j]) * of_mean;
            worst = worse(worst, fabs(c.ln[i * C + j] - y) / U / (allowed + fabs(y)));
        }
    }
    if (sizeof(real) == sizeof(float)) /* in double the oracle is not more exact */
        check("each element of layernorm, in what is allowed", worst, 1);
    for (size_t i = 0; i < N; i++) {
        double square = 0;
        for (size_t j = 0; j < C; j++) em[i] += res[i * C + j] / (double)C;
        for (size_t j = 0; j < C; j++)
            square += (res[i * C + j] - em[i]) * (res[i * C + j] - em[i]) / (double)C;
        er[i] = 1 / sqrt(square + 1e-5);
        for (size_t j = 0; j < C; j++) {
            h[i * C + j] = (res[i * C + j] - em[i]) * er[i];
            ln[i * C + j] = h[i * C + j] * c.g[j] + c.b[j];
        }
    }
    /* res holds mean with a rounding error of U * mean, and LayerNorm subtracts the mean */
    const double grow = 1 + fabs(mean);
    check("bias + dropout + residual", error_of(c.res, res, n), 4 * U);
    check("layernorm mean", error_of(c.mean, em, N), 32 * U); /* a mean near 0 of numbers near 1 */
    check("layernorm rstd", error_of(c.rstd, er, N), 8 * U * grow);
    check("layernorm", error_of(c.ln, ln, n), 8 * U * grow);
    real *ln2 = random_reals(n, 12, 1), *m2 = random_reals(N, 13, 1), *r2 = random_reals(N, 14, 1);
    real *out = copy_reals(c.y, n);
    layernorm_forward(ln2, m2, r2, c.res, c.g, c.b, N, C, (real)1e-5);
    bias_dropout_add_forward(out, out, c.bias, c.residual, N, C, c.d);
    check_true("fused = bias_dropout_add, then layernorm, bit for bit",
               !memcmp(ln2, c.ln, n * sizeof(real)) && !memcmp(out, c.res, n * sizeof(real)) &&
                   !memcmp(m2, c.mean, N * sizeof(real)) && !memcmp(r2, c.rstd, N * sizeof(real)));

    real *dres = copy_reals(c.weight_res, n), *dg = random_reals(C, 15, 1);
    real *db = random_reals(C, 16, 1), *alone = random_reals(n, 17, 1);
    real *dbias = random_reals(C, 18, 1), *dy = random_reals(n, 19, 1), *dg0 = copy_reals(dg, C);
    real *db0 = copy_reals(db, C), *dbias0 = copy_reals(dbias, C);
    double *edres = random_doubles(c.weight_res, n), *ealone = (double *)xcalloc(n, sizeof *ealone);
    double *edg = random_doubles(dg, C);
    double *edb = random_doubles(db, C), *edbias = random_doubles(dbias, C);
    double *edy = (double *)xcalloc(n, sizeof *edy);
    layernorm_backward(alone, dg, db, c.weight, c.res, c.g, c.mean, c.rstd, NULL, N, C);
    real zero_g[600] = {0}, zero_b[600] = {0};
    layernorm_backward(dres, zero_g, zero_b, c.weight, c.res, c.g, c.mean, c.rstd, dres, N, C);
    bias_dropout_add_backward(dy, dbias, dres, N, C, c.d);
    for (size_t i = 0; i < N; i++) {
        double sum = 0, sum_h = 0;
        for (size_t j = 0; j < C; j++) {
            const double dh = (double)c.weight[i * C + j] * c.g[j];
            sum += dh / (double)C;
            sum_h += dh * h[i * C + j] / (double)C;
            edg[j] += c.weight[i * C + j] * h[i * C + j];
            edb[j] += c.weight[i * C + j];
        }
        for (size_t j = 0; j < C; j++) {
            const size_t e = i * C + j;
            ealone[e] = er[i] * ((double)c.weight[e] * c.g[j] - sum - h[e] * sum_h);
            edres[e] += ealone[e];
            edy[e] = edres[e] * (p > 0 ? (double)dropout_factor(c.d, e) : 1);
            edbias[j] += edy[e];
        }
    }
    check("layernorm backward dx", error_of(alone, ealone, n), 16 * U * grow);
    check("layernorm backward dx + dres, in place", error_of(dres, edres, n), 16 * U * grow);
    check("layernorm backward dg +=", error_of(dg, edg, C), 16 * U * grow);
    check("layernorm backward db +=", error_of(db, edb, C), 8 * U);
    check("bias + dropout + residual backward dy", error_of(dy, edy, n), 16 * U * grow);
    check("bias + dropout + residual backward dbias +=", error_of(dbias, edbias, C), 16 * U * grow);
    if (sizeof(real) == sizeof(double) && mean == 0) {
        for (size_t i = 0; i < C; i++) {
            dg[i] -= dg0[i];
            db[i] -= db0[i];
            dbias[i] -= dbias0[i];
        }
        check("residual, differences", finite_difference_error(c.residual, dres, n, norm_loss, &c),
              1e-7);
        check("y, differences", finite_difference_error(c.y, dy, n, norm_loss, &c), 1e-7);
        check("bias, differences", finite_difference_error(c.bias, dbias, C, norm_loss, &c), 1e-7);
        check("g, differences", finite_difference_error(c.g, dg, C, norm_loss, &c), 1e-7);
        check("b, differences", finite_difference_error(c.b, db, C, norm_loss, &c), 1e-7);
    }
    FREE(c.ln, c.res, c.mean, c.rstd, c.y, c.bias, c.residual, c.g, c.b, c.weight, c.weight_res,
         res, ln, h, em, er, ln2, m2, r2, out, dres, dg, db, alone, dbias, dy, dg0, db0, dbias0,
         edres, ealone, edg, edb, edbias, edy);
}

static void test_layernorm(void)
{
    norm_case(66, 96, 0, 0);
    norm_case(66, 7, 0.5, 0);
    norm_case(5, 530, 0.1, 0);    /* a row spans two blocks of dropout factors, misaligned */
    norm_case(9, 130, 0.1, 1000); /* E[x^2] - E[x]^2 would lose everything here */
}

/* ---- Attention ------------------------------------------------------------------------------- */

typedef struct {
    size_t B, T, H, D;
    Dropout d;
    real *out, *lse, *qkv, *weight;
} AttentionCase;

static double attention_loss(void *arg)
{
    AttentionCase *c = (AttentionCase *)arg;
    attention_forward(c->out, c->lse, c->qkv, c->B, c->T, c->H, c->D, c->d);
    return weighted_sum(c->out, c->weight, c->B * c->T * c->H * c->D);
}

/* The textbook's attention, one query at a time, with P as a row: out, lse, and dqkv from dout. */
static void naive_attention(double *out, double *lse, double *dqkv, const real *dout,
                            const real *qkv, size_t B, size_t T, size_t H, size_t D, Dropout d)
{
    const size_t C = H * D;
    double *p = (double *)xcalloc(T, sizeof *p), *dp = (double *)xcalloc(T, sizeof *dp);
    double *keep = (double *)xcalloc(T, sizeof *keep);
    for (size_t b = 0; b < B; b++)
        for (size_t h = 0; h < H; h++)
            for (size_t i = 0; i < T; i++) {
                const size_t q = (b * T + i) * 3 * C + h * D, o = (b * T + i) * C + h * D;
                double top = -INFINITY, sum = 0, delta = 0;
                for (size_t j = 0; j <= i; j++) {
                    const size_t k = (b * T + j) * 3 * C + C + h * D;
                    p[j] = 0;
                    for (size_t c = 0; c < D; c++)
                        p[j] += (double)qkv[q + c] * qkv[k + c] / sqrt((double)D);
                    if (p[j] > top) top = p[j];
                    keep[j] = d.p > 0
                                  ? (double)dropout_factor(d, ((b * d.heads + h) * T + i) * T + j)
                                  : 1;
                }
                for (size_t j = 0; j <= i; j++) sum += exp(p[j] - top);
                lse[(b * H + h) * T + i] = top + log(sum);
                for (size_t j = 0; j <= i; j++) {
                    const size_t v = (b * T + j) * 3 * C + 2 * C + h * D;
                    p[j] = exp(p[j] - top) / sum;
                    dp[j] = 0;
                    for (size_t c = 0; c < D; c++) {
                        out[o + c] += p[j] * keep[j] * qkv[v + c];
                        dp[j] += keep[j] * dout[o + c] * qkv[v + c];
                        dqkv[v + c] += p[j] * keep[j] * dout[o + c];
                    }
                    delta += p[j] * dp[j];
                }
                for (size_t j = 0; j <= i; j++) {
                    const size_t k = (b * T + j) * 3 * C + C + h * D;
                    const double ds = p[j] * (dp[j] - delta) / sqrt((double)D);
                    for (size_t c = 0; c < D; c++) {
                        dqkv[q + c] += ds * qkv[k + c];
                        dqkv[k + c] += ds * qkv[q + c];
                    }
                }
            }
    FREE(p, dp, keep);
}

static void attention_case(size_t B, size_t T, size_t H, size_t D, double p, double std)
{
    printf("  B %zu T %zu H %zu D %zu p %g std %g\n", B, T, H, D, p, std);
    const size_t C = H * D, n = B * T * C;
    AttentionCase c;
    c.B = B;
    c.T = T;
    c.H = H;
    c.D = D;
    c.d = test_dropout(p, 1003, H + 2);
    c.out = random_reals(n, 1, 1);
    c.lse = random_reals(B * H * T, 2, 1);
    c.qkv = random_reals(3 * n, 3, std);
    c.weight = random_reals(n, 4, 1);
    real *dqkv = random_reals(3 * n, 5, 1), *delta = random_reals(B * H * T, 6, 1);
    double *out = (double *)xcalloc(n, sizeof *out);
    double *lse = (double *)xcalloc(B * H * T, sizeof *lse);
    double *edqkv = (double *)xcalloc(3 * n, sizeof *edqkv);
    attention_loss(&c);
    attention_backward(dqkv, delta, c.weight, c.out, c.lse, c.qkv, B, T, H, D, c.d);
    naive_attention(out, lse, edqkv, c.weight, c.qkv, B, T, H, D, c.d);
    /* scores grow as std^2; their absolute error is the relative error of P */
    const double grow = 1 + std * std;
    check("attention", error_of(c.out, out, n), 8 * U * grow);
    check("attention lse", error_of(c.lse, lse, B * H * T), 16 * U);
    check("attention backward", error_of(dqkv, edqkv, 3 * n), 16 * U * grow);
    if (sizeof(real) == sizeof(double) && std == 1)
        check("attention, differences",
              finite_difference_error(c.qkv, dqkv, 3 * n, attention_loss, &c), 1e-7);

    if (p == 0) { /* generation on sequence 0: 1 row, then all but the last, then the last */
        real *keys = (real *)xcalloc(T * C, sizeof(real));
        real *values = (real *)xcalloc(T * C, sizeof(real));
        real *o = random_reals(T * C, 7, 1);
        const size_t cut[4] = {0, T > 2 ? 1 : 0, T > 1 ? T - 1 : 0, T};
        for (int i = 0; i < 3; i++)
            if (cut[i + 1] > cut[i])
                attention_cached_forward(o + cut[i] * C, keys, values, c.qkv + cut[i] * 3 * C,
                                         cut[i + 1] - cut[i], cut[i], H, D);
        check("attention over a cache", error_of(o, out, T * C), 8 * U * grow);
        attention_cached_forward(o, keys, values, c.qkv, T, 0, H, D);
        check("the same, all at once", error_of(o, out, T * C), 8 * U * grow);
        int same = 1;
        for (size_t i = 0; i < T * C; i++)
            same &= keys[i] == c.qkv[i / C * 3 * C + C + i % C] &&
                    values[i] == c.qkv[i / C * 3 * C + 2 * C + i % C];
        check_true("the caches hold K and V", same);
        FREE(keys, values, o);
    }
    FREE(c.out, c.lse, c.qkv, c.weight, dqkv, delta, out, lse, edqkv);
}

static void test_attention(void)
{
    attention_case(2, 1, 2, 64, 0, 1);
    attention_case(2, 5, 3, 1, 0, 1);
    attention_case(2, 5, 2, 24, 0.5, 1);
    attention_case(1, 64, 2, 64, 0.1, 1);
    attention_case(2, 130, 3, 24, 0, 1);
    attention_case(2, 130, 2, 80, 0.1, 1);
    attention_case(1, 130, 2, 64, 0.5, 1);
    attention_case(1, 300, 2, 64, 0, 1);
    /* two blocks of keys; the second is not full */
    attention_case(1, KEYS + 70, 1, 24, 0.1, 1);
    /* a head longer than one block of the products' K */
    attention_case(1, 5, 1, K_BLOCK + 10, 0, 1);
    /* scores near +-400: the softmax must subtract its maximum */
    attention_case(1, 97, 1, 64, 0, 7);
}

/* ---- Cross entropy --------------------------------------------------------------------------- */

/* four slices of 256, the last with 21 dummies */
enum { CE_N = 66, CE_V = 1003, CE_VP = 256, CE_T = 4 };

typedef struct {
    real *logits; /* (CE_T, CE_N, CE_VP): each rank's slice */
    int targets[CE_N];
    real weight[CE_N], max[CE_N], sum[CE_N], target[CE_N], loss[CE_N];
    real scale;
} CrossEntropyCase;

/* The work of chapter 3 on one thread: loops over ranks stand for its three all-reduces. */
static double cross_entropy_case_loss(void *arg)
{
    CrossEntropyCase *c = (CrossEntropyCase *)arg;
    double total = 0;
    for (size_t r = 0; r < CE_T; r++) {
        real max[CE_N];
        logits_max(max, c->logits + r * CE_N * CE_VP, CE_N, CE_VP,
                   min_size(CE_VP, CE_V - r * CE_VP));
        for (size_t n = 0; n < CE_N; n++)
            c->max[n] = r == 0 || max[n] > c->max[n] ? max[n] : c->max[n];
    }
    for (size_t r = 0; r < CE_T; r++) {
        real sum[CE_N], target[CE_N];
        logits_sum_exp(sum, target, c->logits + r * CE_N * CE_VP, c->max, c->targets, CE_N, CE_VP,
                       min_size(CE_VP, CE_V - r * CE_VP), r * CE_VP);
        for (size_t n = 0; n < CE_N; n++) {
            c->sum[n] = (r ? c->sum[n] : 0) + sum[n];
            c->target[n] = (r ? c->target[n] : 0) + target[n];
        }
    }
    cross_entropy_loss(c->loss, c->sum, c->target, CE_N);
    for (size_t n = 0; n < CE_N; n++) total += (double)c->loss[n] * c->weight[n];
    return total * c->scale;
}

static CrossEntropyCase *cross_entropy_case(double std)
{
    CrossEntropyCase *c = (CrossEntropyCase *)xcalloc(1, sizeof *c);
    real *weight = random_reals(CE_N, 2, 1);
    c->logits = random_reals(CE_T * CE_N * CE_VP, 1, std);
    c->scale = (real)0.125;
    for (size_t n = 0; n < CE_N; n++) {
        c->weight[n] = n % 5 ? weight[n] : 0;
        c->targets[n] = (int)(n * 389 % CE_V);
        for (size_t v = CE_V % CE_VP; v < CE_VP; v++) /* dummies must not matter, however large */
            c->logits[((CE_T - 1) * CE_N + n) * CE_VP + v] = (real)(v % 2 ? 1000 : NAN);
    }
    free(weight);
    return c;
}

/* The bounds that doc/accuracy.md states for each element of a softmax, in float, against double:
 * for wide logits, where the rounding of z - max counts, and for sums of many terms. Errors are
 * relative to these bounds. */
static void softmax_bounds(size_t V, double std)
{
    enum { N = 12 };
    real *z = random_reals(N * V, 21, std), max[N], sum[N], target_logit[N], loss[N];
    real *weight = random_reals(N, 22, 1);
    double worst_sum = 0, worst_loss = 0, worst_p = 0;
    int target[N];
    for (size_t n = 0; n < N; n++) target[n] = (int)(n * 389 % V);
    real *p = copy_reals(z, N * V);
    logits_max(max, z, N, V, V);
    logits_sum_exp(sum, target_logit, z, max, target, N, V, V, 0);
    for (size_t n = 0; n < N; n++) loss[n] = sum[n];
    cross_entropy_loss(loss, sum, target_logit, N);
    cross_entropy_backward(p, max, sum, target, weight, (real)0.125, N, V, V, 0);
    for (size_t n = 0; n < N; n++) {
        double total = 0, depth = 0;
        for (size_t v = 0; v < V; v++) {
            const double d = (double)max[n] - z[n * V + v];
            total += exp(-d);
            depth += exp(-d) * d;
        }
        depth /= total;
        const double dt = (double)max[n] - z[n * V + (size_t)target[n]];
        const double exact_loss = log(total) + dt;
        const double w = (double)weight[n] * 0.125;
        worst_sum = worse(worst_sum, fabs(sum[n] / total - 1) / U / (3.1 + depth));
        worst_loss =
            worse(worst_loss, fabs(loss[n] - exact_loss) / U / (3.1 + depth + dt + exact_loss));
        for (size_t v = 0; v < V; v++) {
            const double d = (double)max[n] - z[n * V + v], q = exp(-d) / total;
            const double hit = v == (size_t)target[n];
            const double allowed =
                fabs(w) * (U * (q * (9 + d + depth) + 2 * hit) + 0x1p-124) + 0x1p-149;
            worst_p = worse(worst_p, fabs(p[n * V + v] - (q - hit) * w) / allowed);
        }
    }
    printf("  %zu logits of deviation %g\n", V, std);
    check("sum of exponentials, in U (3.1 + mean of max - z)", worst_sum, 1);
    check("loss, in U (3.1 + that + target's + loss)", worst_loss, 1);
    check("each element of the gradient, in what is allowed", worst_p, 1);
    FREE(z, p, weight);
}

static void test_cross_entropy(void)
{
    if (sizeof(real) == sizeof(float)) {
        softmax_bounds(7, 1);
        softmax_bounds(5003, 1);
        softmax_bounds(5003, 12);
    }
    CrossEntropyCase *c = cross_entropy_case(3);
    double *loss = (double *)xcalloc(CE_N, sizeof *loss);
    double *grad = (double *)xcalloc(CE_T * CE_N * CE_VP, sizeof *grad);
    for (size_t n = 0; n < CE_N; n++) {
        double top = -INFINITY, sum = 0;
        for (int pass = 0; pass < 3; pass++)
            for (size_t v = 0; v < CE_V; v++) {
                const size_t at = (v / CE_VP * CE_N + n) * CE_VP + v % CE_VP;
                if (pass == 0 && c->logits[at] > top) top = c->logits[at];
                if (pass == 1) sum += exp(c->logits[at] - top);
                if (pass == 2)
                    grad[at] = (exp(c->logits[at] - top) / sum - (v == (size_t)c->targets[n])) *
                               c->weight[n] * c->scale;
                if (pass == 2 && v == (size_t)c->targets[n])
                    loss[n] = log(sum) + top - c->logits[at];
            }
    }
    cross_entropy_case_loss(c);
    real *keep = copy_reals(c->logits, CE_T * CE_N * CE_VP);
    check("[P16] loss, slices summed", error_of(c->loss, loss, CE_N), 2 * U);
    double worst = 0;
    for (size_t n = 0; n < CE_N; n++) {
        const double e = fabs(c->loss[n] - loss[n]) / fmax(1, loss[n]);
        worst = worse(worst, e);
    }
    check("[P16] loss, worst row, relative above 1", worst, 4 * U); /* 2.4e-7; P16 asks for 1e-6 */
    for (size_t r = 0; r < CE_T; r++)
        cross_entropy_backward(c->logits + r * CE_N * CE_VP, c->max, c->sum, c->targets, c->weight,
                               c->scale, CE_N, CE_VP, min_size(CE_VP, CE_V - r * CE_VP), r * CE_VP);
    check("[P16] gradient", error_of(c->logits, grad, CE_T * CE_N * CE_VP), 4 * U);
    real *g = c->logits;
    double rows = 0, dummies = 0;
    for (size_t n = 0; n < CE_N; n++) {
        double sum = 0;
        for (size_t v = 0; v < CE_T * CE_VP; v++) {
            const real z = g[(v / CE_VP * CE_N + n) * CE_VP + v % CE_VP];
            sum += z;
            if (v >= CE_V) dummies += !(z == 0);
        }
        rows = worse(rows, fabs(sum));
    }
    check("[P19] gradient rows sum to 0 over the slices", rows, 16 * U);
    check_equal("dummies with a gradient", dummies, 0);
    if (sizeof(real) == sizeof(double)) {
        c->logits = keep;
        check(
            "cross entropy, differences",
            finite_difference_error(keep, g, (CE_T - 1) * CE_N * CE_VP, cross_entropy_case_loss, c),
            1e-7);
    }

    for (size_t i = 0; i < CE_T * CE_N * CE_VP; i++) keep[i] = rint(keep[i] * 64) / 64;
    c->logits = keep;
    cross_entropy_case_loss(c);
    real *before = copy_reals(c->loss, CE_N);
    for (size_t i = 0; i < CE_T * CE_N * CE_VP; i++) keep[i] += 1024;
    cross_entropy_case_loss(c);
    check_true("[P20] logits on a 1/64 grid, shifted by 1024: same bits",
               !memcmp(before, c->loss, sizeof c->loss));
    real *noise = random_reals(CE_T * CE_N * CE_VP, 9, 1);
    c->logits = noise;
    cross_entropy_case_loss(c);
    memcpy(before, c->loss, sizeof c->loss);
    for (size_t i = 0; i < CE_T * CE_N * CE_VP; i++) noise[i] += 1000;
    cross_entropy_case_loss(c);
    worst = 0;
    for (size_t n = 0; n < CE_N; n++) worst = worse(worst, fabs((double)before[n] - c->loss[n]));
    check("[P20] any logits, shifted by 1000", worst, 1e-4);

    enum { V = 51200 };
    real *uniform_logits = (real *)xcalloc(V, sizeof(real)), max, sum, target, l;
    const int last = V - 1;
    logits_max(&max, uniform_logits, 1, V, V);
    logits_sum_exp(&sum, &target, uniform_logits, &max, &last, 1, V, V, 0);
    cross_entropy_loss(&l, &sum, &target, 1);
    check("[P21] uniform logits cost ln 51200 = 10.843495", fabs(l - 10.843495), 1e-6);
    real *logits = random_reals(V, 10, 2);
    double exact_sum = 0, exact_max = -INFINITY;
    for (size_t v = 0; v < V; v++) exact_max = logits[v] > exact_max ? logits[v] : exact_max;
    for (size_t v = 0; v < V; v++) exact_sum += exp(logits[v] - exact_max);
    logits_max(&max, logits, 1, V, V);
    logits_sum_exp(&sum, &target, logits, &max, &last, 1, V, V, 0);
    check_equal("largest of 51200", max, exact_max);
    check("[P16] sum of 51200 exponentials, relative", fabs(sum / exact_sum - 1),
          fmax(2 * U, 1e-13));
    for (size_t v = 1; v < V; v++) logits[v] = (real)-0.3;
    logits[0] = max = 0;
    logits_sum_exp(&sum, &target, logits, &max, &last, 1, V, V, 0);
    /* equal terms have equal roundings: a sum in float would drift */
    exact_sum = 1 + (V - 1) * exp((double)(real)-0.3);
    check("[P16] the same of equal terms", fabs(sum / exact_sum - 1), fmax(4 * U, 2e-12));
    free(logits);
    logits_max(&max, uniform_logits, 1, V, 0);
    logits_sum_exp(&sum, &target, uniform_logits, &l, &last, 1, V, 0, 0);
    check_true("a slice of dummies: max -inf, sum 0, target 0",
               max == -INFINITY && sum == 0 && target == 0);
    FREE(uniform_logits, before, keep, g, noise, loss, grad, c);
}

/* ---- Optimiser, reductions, threads ---------------------------------------------------------- */

static void test_adamw(void)
{
    enum { N = 1003, STEPS = 5 };
    real *w = random_reals(N, 1, 1), *m = (real *)xcalloc(N, sizeof *m);
    real *v = (real *)xcalloc(N, sizeof *v);
    double *ew = random_doubles(w, N), *em = random_doubles(m, N), *ev = random_doubles(v, N);
    real *w2 = copy_reals(w, N), *master = copy_reals(w, N), *m2 = copy_reals(m, N);
    real *v2 = copy_reals(v, N), *w0 = copy_reals(w, N);
    AdamW h = {1e-2, 0.9, 0.999, 1e-8, 0.01, 0.25, 0};
    for (int step = 1; step <= STEPS; step++) {
        real *g = random_reals(N, (uint32_t)(10 + step), 1);
        h.step = (size_t)step;
        adamw(w, NULL, m, v, g, N, h);
        adamw(w2, master, m2, v2, g, N, h);
        for (size_t i = 0; i < N; i++) {
            const double gi = g[i] * h.grad_scale;
            em[i] = h.beta1 * em[i] + (1 - h.beta1) * gi;
            ev[i] = h.beta2 * ev[i] + (1 - h.beta2) * gi * gi;
            ew[i] -= h.lr * (em[i] / (1 - pow(h.beta1, step)) /
                                 (sqrt(ev[i] / (1 - pow(h.beta2, step))) + h.eps) +
                             h.decay * ew[i]);
        }
        free(g);
    }
    check("[P32] AdamW, 5 steps: p", error_of(w, ew, N), 4 * U);
    check("AdamW: m", error_of(m, em, N), 8 * U);
    check("AdamW: v", error_of(v, ev, N), 8 * U);
    check_true("AdamW over master weights: the same",
               !memcmp(w, master, N * sizeof(real)) && !memcmp(w, w2, N * sizeof(real)));
    double moved = 0;
    for (size_t i = 0; i < N; i++) moved += fabs((double)w[i] - w0[i]) / N;
    check_true("AdamW moved p by about lr a step",
               moved > 0.2 * STEPS * h.lr && moved < 1.1 * STEPS * h.lr);
    memset(m, 0, N * sizeof *m);
    memset(v, 0, N * sizeof *v);
    real *zero = (real *)xcalloc(N, sizeof *zero);
    memcpy(w, w0, N * sizeof *w);
    h.step = 1;
    adamw(w, NULL, m, v, zero, N, h);
    for (size_t i = 0; i < N; i++) ew[i] = w0[i] * (1 - h.lr * h.decay);
    check("[P32] gradient 0: decay only", error_of(w, ew, N), 2 * U);
    FREE(w, m, v, ew, em, ev, w2, master, m2, v2, w0, zero);
}

static void test_reductions(void)
{
    for (int i = 0; i < 2; i++) {
        const size_t n = i ? 30011 : 7;
        real *x = random_reals(n, 1, 1);
        double exact = 0;
        for (size_t j = 0; j < n; j++) exact += (double)x[j] * x[j];
        check("sum_squares", fabs(sum_squares(x, n) / exact - 1), 1e-13);
        x[n - 1] = (real)INFINITY;
        check_true("sum_squares lets inf through", isinf(sum_squares(x, n)));
        x[0] = (real)NAN;
        check_true("sum_squares lets NaN through", isnan(sum_squares(x, n)));
        free(x);
    }
    check_equal("sum_squares of nothing", sum_squares(NULL, 0), 0);
    enum { RANKS = 3, N = 2600, BEGIN = 5, MIDDLE = 2500 };
    for (int op = SUM; op <= MAX; op++)
        for (int type = ACT; type <= DOUBLE_ARRAY; type++) {
            double *array[RANKS], old[RANKS][N];
            for (int r = 0; r < RANKS; r++) {
                array[r] = (double *)xcalloc(N, sizeof(double));
                real *fill = random_reals(N, (uint32_t)(20 + r), 1);
                for (size_t i = 0; i < N; i++) {
                    old[r][i] = fill[i];
                    if (type == DOUBLE_ARRAY) array[r][i] = fill[i];
                    else ((real *)array[r])[i] = fill[i];
                }
                free(fill);
            }
            void *const x[RANKS] = {array[0], array[1], array[2]};
            if (type == DOUBLE_ARRAY) reduce_scalars(x, RANKS, BEGIN, MIDDLE, (Op)op);
            else reduce_slice(x, RANKS, BEGIN, MIDDLE, (Type)type, (Op)op);
            int same = 1;
            for (size_t i = 0; i < N; i++)
                for (int r = 0; r < RANKS; r++) {
                    const double got =
                        type == DOUBLE_ARRAY ? array[r][i] : (double)((real *)array[r])[i];
                    double want;
                    if (i < BEGIN || i >= BEGIN + MIDDLE) want = old[r][i];
                    else if (op == MAX) want = fmax(fmax(old[0][i], old[1][i]), old[2][i]);
                    else if (type == DOUBLE_ARRAY) want = old[0][i] + old[1][i] + old[2][i];
                    else want = (real)((real)((real)old[0][i] + (real)old[1][i]) + (real)old[2][i]);
                    same &= got == want;
                }
            check_true("reduce_slice, in rank order, and nothing outside the slice", same);
            for (int r = 0; r < RANKS; r++) free(array[r]);
        }
    real a[2] = {1, (real)NAN}, b[2] = {(real)NAN, 1};
    void *const pair[2] = {a, b};
    reduce_slice(pair, 2, 0, 2, REAL_ARRAY, MAX);
    check_true("MAX keeps a NaN, whoever brings it",
               isnan(a[0]) && isnan(a[1]) && isnan(b[0]) && isnan(b[1]));
    double wide_a[2] = {1, NAN}, wide_b[2] = {NAN, 1};
    void *const wide[2] = {wide_a, wide_b};
    reduce_scalars(wide, 2, 0, 2, MAX);
    check_true("in doubles too",
               isnan(wide_a[0]) && isnan(wide_a[1]) && isnan(wide_b[0]) && isnan(wide_b[1]));
}

/* Runs every operator that may use threads and writes all results one after the other.
 * Returns the number of reals. */
static size_t all_results(real *r)
{
    enum { B = 2, T = 130, H = 3, D = 24, C = H * D, N = B * T, V = 1003 };
    real *const start = r;
    real *x = random_reals(N * 3 * C, 1, 1), *w = random_reals(V * C, 2, 0.3);
    real *b = random_reals(V, 3, 1), *y = random_reals(N * V, 4, 1);
    int tokens[N];
    for (int n = 0; n < N; n++) tokens[n] = n * 31 % V;
    const Dropout d = test_dropout(0.1, 77, H);
    AdamW h = {1e-2, 0.9, 0.999, 1e-8, 0.01, 1, 1};
    linear_forward(r, x, w, b, N, C, V);
    r += N * V;
    linear_forward(r, x, w, b, 1, C, V);
    r += V;
    linear_gelu_forward(r, r + N * V, x, w, b, N, C, V, GELU_TANH);
    r += 2 * N * V;
    memset(r, 0, (N * C + V * C + V) * sizeof *r);
    linear_backward(r, r + N * C, r + N * C + V * C, y, x, w, N, C, V);
    r += N * C + V * C + V;
    attention_forward(r, r + N * C, x, B, T, H, D, d);
    attention_backward(r + N * C + B * H * T, r + N * C + B * H * T + 3 * N * C, y, r, r + N * C, x,
                       B, T, H, D, d);
    r += N * C + B * H * T + 3 * N * C + B * H * T;
    real *caches = (real *)xcalloc(2 * T * C, sizeof *caches);
    for (size_t t = 0; t < T; t += 26, r += 26 * C)
        attention_cached_forward(r, caches, caches + T * C, x + t * 3 * C, 26, t, H, D);
    free(caches);
    memset(r, 0, (2 * V * C + T * C + 3 * C) * sizeof *r);
    token_embedding_forward(r, tokens, w, N, C, 0, V);
    r += N * C;
    memset(r, 0, (V * C + T * C + 3 * C) * sizeof *r);
    token_embedding_backward(r, y, tokens, N, C, 0, V);
    r += V * C;
    memcpy(r + T * C, y, N * C * sizeof *r);
    position_embedding_backward(r + T * C, r, B, T, C, d);
    r += T * C + N * C;
    bias_dropout_add_layernorm_forward(r, r + N * C, r + 2 * N * C, r + 2 * N * C + N, x, b, y, w,
                                       w + C, N, C, (real)1e-5, d);
    memset(r + 2 * N * C + 2 * N, 0, (N * C + 2 * C) * sizeof *r);
    layernorm_backward(r + 2 * N * C + 2 * N, r + 3 * N * C + 2 * N, r + 3 * N * C + 2 * N + C, y,
                       r + N * C, w, r + 2 * N * C, r + 2 * N * C + N, NULL, N, C);
    r += 3 * N * C + 2 * N + 2 * C;
    memset(r, 0, (N * C + C) * sizeof *r);
    bias_dropout_add_backward(r, r + N * C, y, N, C, d);
    r += N * C + C;
    logits_max(r, y, N, V, V);
    logits_sum_exp(r + N, r + 2 * N, y, r, tokens, N, V, V, 0);
    memcpy(r + 3 * N, y, N * V * sizeof *r);
    cross_entropy_backward(r + 3 * N, r, r + N, tokens, b, 1, N, V, V, 0);
    r += 3 * N + N * V;
    const double squares = sum_squares(y, N * V);
    r[0] = (real)squares;
    r[1] = (real)((squares - (real)squares) * 0x1p20);
    r += 2;
    memcpy(r, w, V * C * sizeof *r);
    memset(r + V * C, 0, 2 * V * C * sizeof *r);
    adamw(r, NULL, r + V * C, r + 2 * V * C, y, V * C, h);
    r += 3 * V * C;
    FREE(x, w, b, y);
    return (size_t)(r - start);
}

static void test_threads(void)
{
    enum { ROOM = 3000000 };
    real *one = (real *)xcalloc(ROOM, sizeof *one), *two = (real *)xcalloc(ROOM, sizeof *two);
    use_threads(1);
    const size_t n = all_results(one);
    int same = 1;
    for (int threads = 2; threads <= 3; threads++) {
        use_threads(threads);
        memset(two, 0, ROOM * sizeof *two);
        same &= all_results(two) == n && !memcmp(one, two, n * sizeof *one);
    }
    use_threads(2);
    check_true("1, 2 and 3 threads: the same bits from every operator", same);
    double finite = 0;
    for (size_t i = 0; i < n; i++) finite += isfinite(one[i]) != 0;
    check_equal("and all of them finite", finite, (double)n);
    free(one);
    free(two);
}

/* ---- Chapters 7, 9 and 15: text and data ----------------------------------------------------- */

/* A new folder in SCRATCH; text_path(f, name) is a path in it. */
typedef struct {
    char *path, **name;
    size_t n, capacity;
} TextFolder;

static TextFolder *open_folder(const char *name)
{
    TextFolder *f = (TextFolder *)xcalloc(1, sizeof(TextFolder));
    f->path = join_path((char *)xcalloc(PATH_MAX, 1), SCRATCH, name);
    if (mkdir(f->path, 0700)) die("cannot make the folder %s: %s", f->path, strerror(errno));
    return f;
}

static void close_folder(TextFolder *f)
{
    for (size_t i = 0; i < f->n; i++) free(f->name[i]);
    FREE(f->name, f->path, f);
}

static const char *text_path(TextFolder *f, const char *name)
{
    f->name = (char **)grow(f->name, f->n, &f->capacity, sizeof(char *));
    f->name[f->n] = (char *)xcalloc(PATH_MAX, 1);
    f->n++;
    return join_path(f->name[f->n - 1], f->path, name);
}

static void write_bytes(TextFolder *f, const char *name, const void *data, size_t n)
{
    FILE *out = fopen(text_path(f, name), "wb");
    if (!out || fwrite(data, 1, n, out) != n || fclose(out)) die("cannot write %s", name);
}

static void write_string(TextFolder *f, const char *name, const char *text)
{
    write_bytes(f, name, text, strlen(text));
}

static int same_tokens(const Tokens *a, const int *b, size_t n)
{
    return a->n == n && !memcmp(a->id, b, n * sizeof(int));
}

/* decode(encode(text)) == text */
static int round_trips(const Tokenizer *t, const char *text, size_t n)
{
    Tokens tokens = {NULL, 0, 0};
    size_t at = 0, length;
    int ok = 1;
    encode(&tokens, t, text, n);
    for (size_t i = 0; i < tokens.n && ok; i++) {
        const char *bytes = decode(&length, t, tokens.id[i]);
        ok = length > 0 && at + length <= n && !memcmp(bytes, text + at, length);
        at += length;
    }
    free(tokens.id);
    return ok && at == n;
}

#define REFERENCE "dev/reference/bpe"

/* Texts of every kind. dev/reference/bpe_cases.py encoded them with a plain Python encoder
 * and with Hugging Face's. */
static void test_encode_reference(void)
{
    Tokenizer *t = tokenizer_open(REFERENCE);
    Map map = map_file(REFERENCE "/cases.jsonl");
    size_t cases = 0, wrong = 0, broken = 0;
    Tokens tokens = {NULL, 0, 0};
    for (const char *line = map.data, *end; line < map.data + map.size; line = end + 1, cases++) {
        end = (const char *)memchr(line, '\n', (size_t)(map.data + map.size - line));
        Json json = json_parse(line, (size_t)(end - line), REFERENCE "/cases.jsonl");
        const JsonValue *text = json_get(&json, json.value, "text");
        const JsonValue *ids = json_get(&json, json.value, "ids");
        tokens.n = 0;
        encode(&tokens, t, text->string, text->length);
        int ok = tokens.n == ids->length;
        for (size_t i = 0; ok && i < tokens.n; i++) ok = tokens.id[i] == ids[1 + i].number;
        if (!ok) printf("    %.*s\n", (int)(end - line), line);
        wrong += !ok;
        broken += !round_trips(t, text->string, text->length);
        json_free(&json);
    }
    check_equal("vocabulary", (double)t->vocabulary, 677);
    check_equal("<|endoftext|>", t->end_of_text, 676);
    check_true("more than 300 cases were read", cases > 300);
    check_equal("cases with other tokens than the reference", (double)wrong, 0);
    check_equal("cases that do not decode to themselves", (double)broken, 0);
    unmap_file(map);
    free(tokens.id);
    tokenizer_close(t);
}

/* Writes a vocab.json of the 256 bytes, in the format's alphabet, and of the names in `more`. */
static void write_vocabulary(TextFolder *f, const char *const *more, size_t n)
{
    char json[1 << 16], *p = json;
    int byte_of[BYTE_CHARACTERS], id = 0;
    byte_characters(byte_of);
    for (int c = 0; c < BYTE_CHARACTERS; c++) {
        if (byte_of[c] < 0) continue;
        *p++ = id ? ',' : '{';
        if (c < 0x80) p += sprintf(p, c == '"' || c == '\\' ? "\"\\%c\":%d" : "\"%c\":%d", c, id);
        else p += sprintf(p, "\"%c%c\":%d", 0xC0 | c >> 6, 0x80 | (c & 0x3F), id);
        id++;
    }
    for (size_t i = 0; i < n; i++) p += sprintf(p, ",\"%s\":%d", more[i], id + (int)i);
    strcpy(p, "}");
    write_string(f, "vocab.json", json);
}

/* A tokenizer of `count` random merges over the letters a, b, c, in random order. Some orders do
 * not come from any training: a merge may stand before the merges that make its halves. */
static Tokenizer *random_tokenizer(TextFolder *f, size_t count, uint64_t seed)
{
    char name[64][64] = {"a", "b", "c"}, merges[64 * 130], *p = merges;
    const char *more[64];
    size_t pair[64][2], order[64], names = 3, n = 0;
    for (uint64_t draw = 0; n < count && draw < 1000; draw++) {
        size_t a = random_word(seed, 0, 0, 2 * draw) % names;
        size_t b = random_word(seed, 0, 0, 2 * draw + 1) % names;
        size_t found = 0;
        char joined[128];
        snprintf(joined, sizeof(joined), "%s%s", name[a], name[b]);
        for (size_t i = 0; i < n; i++) found |= pair[i][0] == a && pair[i][1] == b;
        if (found || strlen(joined) > 40) continue;
        for (size_t i = 0; i < names; i++) found |= !strcmp(name[i], joined);
        if (!found) strcpy(name[names++], joined);
        pair[n][0] = a;
        pair[n][1] = b;
        n++;
    }
    shuffle(order, n, seed, 1, 0);
    for (size_t i = 0; i < n; i++)
        p += sprintf(p, "%s %s\n", name[pair[order[i]][0]], name[pair[order[i]][1]]);
    *p = 0;
    for (size_t i = 3; i < names; i++) more[i - 3] = name[i];
    write_vocabulary(f, more, names - 3);
    write_string(f, "merges.txt", merges);
    return tokenizer_open(f->path);
}

/* By definition: while any pair has a merge, merge the leftmost pair of the lowest rank. */
static void encode_naively(Tokens *out, const Tokenizer *t, const char *text, size_t n)
{
    uint32_t id[512];
    for (size_t i = 0; i < n; i++) id[i] = (uint32_t)t->byte_id[(unsigned char)text[i]];
    for (;;) {
        uint32_t best = UINT32_MAX, merged = 0;
        size_t at = 0;
        for (size_t i = 0; i + 1 < n; i++)
            for (size_t m = 0; m < t->row[t->vocabulary]; m++)
                if (t->merge[m].left == id[i] && t->merge[m].right == id[i + 1] &&
                    t->merge[m].rank < best) {
                    best = t->merge[m].rank;
                    merged = t->merge[m].id;
                    at = i;
                }
        if (best == UINT32_MAX) break;
        id[at] = merged;
        n--;
        memmove(id + at + 1, id + at + 2, (n - at - 1) * sizeof(uint32_t));
    }
    for (size_t i = 0; i < n; i++) push_token(out, (int)id[i]);
}

static void test_encode_brute_force(void)
{
    TextFolder *f = open_folder("encode_brute_force");
    Tokens fast = {NULL, 0, 0}, slow = {NULL, 0, 0};
    size_t wrong = 0, merged = 0;
    for (uint32_t table = 0; table < 40; table++) {
        Tokenizer *t = random_tokenizer(f, 4 + table, table);
        for (uint32_t i = 0; i < 30; i++) {
            char text[160];
            size_t n = 1 + random_word(7, 2, table, i) % sizeof(text);
            for (size_t j = 0; j < n; j++) text[j] = (char)('a' + random_word(i, 3, table, j) % 3);
            fast.n = slow.n = 0;
            encode(&fast, t, text, n);
            encode_naively(&slow, t, text, n);
            wrong += !same_tokens(&fast, slow.id, slow.n);
            merged += slow.n < n;
        }
        tokenizer_close(t);
    }
    check_true("nearly all of 1200 strings had merges", merged > 1150);
    check_equal("strings on which heap and rescan differ", (double)wrong, 0);
    free(fast.id);
    free(slow.id);
    close_folder(f);
}

static void test_encode_any_bytes(void)
{
    enum { SIZE = 700000 };
    Tokenizer *t = tokenizer_open(REFERENCE), *bytes = tokenizer_bytes();
    Tokens whole = {NULL, 0, 0}, parts = {NULL, 0, 0};
    char *text = (char *)xcalloc(SIZE, 1);
    size_t broken = 0, length;

    for (uint32_t i = 0; i < 300; i++) {
        size_t n = random_word(1, 0, 1, i) % 200;
        /* even i: any bytes; odd i: mostly first and middle bytes of characters */
        for (size_t j = 0; j < n; j++) {
            uint32_t word = random_word(i, 4, 0, j);
            text[j] = i % 2 ? "\xE2\x80\xA8\xF0\x9F\xC2\xED\xA0 '\xFF\n"[word % 12] : (char)word;
        }
        broken += !round_trips(t, text, n) + !round_trips(bytes, text, n);
    }
    check_equal("random byte strings that do not decode to themselves", (double)broken, 0);

    /* 0xC3 begins a letter, but the rest is missing: it counts as a sign, which ends a word */
    Tokens invalid = {NULL, 0, 0};
    encode(&invalid, t, "the\xC3river", 9);
    encode(&whole, t, "the", 3);
    push_token(&whole, t->byte_id[0xC3]);
    encode(&whole, t, "river", 5);
    check_true("a stray byte is one sign between two words",
               same_tokens(&invalid, whole.id, whole.n));
    whole.n = 0;

    static const char *const pairs[] = {"\xC4\xA0\xC4\xA0", "\xC4\xA0\xC4\x8A", "\xC4\x8A\xC4\xA0",
                                        "\xC4\x8A\xC4\x8A"};
    /* blanks and newlines merge in pairs, so that a wrong cut shows */
    TextFolder *f = open_folder("encode_any_bytes");
    write_vocabulary(f, pairs, 4);
    write_string(f, "merges.txt",
                 "\xC4\xA0 \xC4\xA0\n\xC4\xA0 \xC4\x8A\n\xC4\x8A \xC4\xA0\n\xC4\x8A \xC4\x8A\n");
    Tokenizer *white = tokenizer_open(f->path);
    size_t different = 0;
    for (uint32_t i = 0; i < 4; i++) {
        for (size_t j = 0; j < SIZE; j++)
            text[j] = "ab.'s  \n \n\xC2\xA0"[random_word(9, 4, i, j) % 12];
        whole.n = parts.n = 0;
        encode_part(&whole, white, text, SIZE);
        encode(&parts, white, text, SIZE);
        different += !same_tokens(&parts, whole.id, whole.n);
    }
    check_equal("texts that have other tokens in parts than whole", (double)different, 0);
    memset(text, 'x', SIZE); /* no place to cut */
    whole.n = parts.n = 0;
    encode_part(&whole, t, text, SIZE);
    encode(&parts, t, text, SIZE);
    check_true("a word too long for a part has the same tokens",
               same_tokens(&parts, whole.id, whole.n));

    decode(&length, t, (int)t->vocabulary);
    check_equal("an id behind the vocabulary decodes to nothing", (double)length, 0);
    decode(&length, t, -1);
    check_equal("so does a negative one", (double)length, 0);
    whole.n = 0;
    encode(&whole, bytes, "a<|endoftext|>\xFF", 15);
    const int expected[3] = {'a', 256, 255};
    check_true("bytes: <|endoftext|> is 256",
               bytes->vocabulary == 257 && same_tokens(&whole, expected, 3));
    FREE(text, whole.id, parts.id, invalid.id);
    tokenizer_close(t);
    tokenizer_close(bytes);
    tokenizer_close(white);
    close_folder(f);
}

/* Encoding takes O(n log n). With a rescan of the word for each merge this would take days. The
 * 2^20 letters merge into tokens of eight. */
static void test_encode_long_word(void)
{
    enum { SIZE = 1 << 20 };
    static const char *const more[] = {"aa", "aaaa", "aaaaaaaa"};
    TextFolder *f = open_folder("encode_long_word");
    write_vocabulary(f, more, 3);
    write_string(f, "merges.txt", "#version: 0.2\na a\naa aa\naaaa aaaa\n");
    Tokenizer *t = tokenizer_open(f->path);
    Tokens tokens = {NULL, 0, 0};
    char *text = (char *)xcalloc(SIZE + 7, 1);
    memset(text, 'a', SIZE + 7);
    encode(&tokens, t, text, SIZE + 7);
    check_equal("tokens of 2^20 + 7 letters: eights, then 4 2 1", (double)tokens.n, SIZE / 8 + 3);
    const int last[] = {258, 257, 256, t->byte_id['a']};
    check_true("the short ones come last",
               tokens.n > 4 && !memcmp(tokens.id + tokens.n - 4, last, sizeof(last)));
    check_equal("no <|endoftext|> in this vocabulary", t->end_of_text, -1);
    free(text);
    free(tokens.id);
    tokenizer_close(t);
    close_folder(f);
}

static void open_tokenizer(void *folder)
{
    tokenizer_close(tokenizer_open(((TextFolder *)folder)->path));
}

static void test_tokenizer_refuses(void)
{
    static const char *const more[] = {"ab", "xyz"};
    static const struct {
        const char *what, *vocabulary, *message;
    } bad[] = {
        {"an array", "[]", "not a JSON object"},
        {"no tokens", "{}", "not a JSON object"},
        {"an id given twice", "{\"a\":0,\"b\":0}", "given twice"},
        {"an id too large", "{\"a\":0,\"b\":2}", "below 2"},
        {"a negative id", "{\"a\":-1,\"b\":1}", "below 2"},
        {"half an id", "{\"a\":0.5,\"b\":1}", "below 2"},
        {"a word for an id", "{\"a\":\"0\"}", "below 1"},
        {"a blank in a name", "{\"a b\":0}", "alphabet"},
        {"a name of other letters", "{\"\xE6\xB0\xB4\":0}", "alphabet"},
        {"an empty name", "{\"\":0}", "alphabet"},
        {"a token given twice", "{\"a\":0,\"a\":1}", "twice"},
        {"missing bytes", "{\"!\":0}", "0x00"},
        {"half a file", "{\"a\":0,", "JSON"},
    };
    static const char *const bad_merges[][3] = {
        {"one token in a line", "a b\nab\n", "line 2: expected two"},
        {"three tokens", "a b c\n", "line 1: expected two"},
        {"a second blank", "a  b\n", "line 1: expected two"},
        {"a name of other letters", "#version: 0.2\na \xE6\xB0\xB4\n", "line 2: expected two"},
        {"an unknown left token", "xy z\n", "line 1: the left token"},
        {"an unknown right token", "x yz\n", "line 1: the right token"},
        {"an unknown result", "b a\n", "line 1: what the two tokens merge into"},
        {"a merge given twice", "a b\na b\n", "merges 0 and 1"},
    };
    TextFolder *f = open_folder("tokenizer_refuses");
    check_dies("no vocab.json", open_tokenizer, f, "vocab.json");
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        write_string(f, "vocab.json", bad[i].vocabulary);
        check_dies(bad[i].what, open_tokenizer, f, bad[i].message);
    }
    write_vocabulary(f, more, 2);
    check_dies("no merges.txt", open_tokenizer, f, "merges.txt");
    for (size_t i = 0; i < sizeof(bad_merges) / sizeof(bad_merges[0]); i++) {
        write_string(f, "merges.txt", bad_merges[i][1]);
        check_dies(bad_merges[i][0], open_tokenizer, f, bad_merges[i][2]);
    }

    /* the older names of the files, and lines that end as on Windows */
    write_string(f, "vocab.bpe", "#version: 0.2\r\na b\r\n\r\n");
    if (rename(text_path(f, "vocab.json"), text_path(f, "encoder.json")))
        die("rename: %s", strerror(errno));
    Tokenizer *t = tokenizer_open(f->path);
    Tokens tokens = {NULL, 0, 0};
    encode(&tokens, t, "ab", 2);
    check_true("encoder.json and vocab.bpe are read", tokens.n == 1 && tokens.id[0] == 256);
    check_true("<|endoftext|> is text to a vocabulary without it",
               round_trips(t, "a<|endoftext|>b", 15));
    free(tokens.id);
    tokenizer_close(t);
    close_folder(f);
}

/* ---- Documents */

/* Does a corpus have these tokens? In `expected`, '|' stands for <|endoftext|>. The
 * tokenizer is that of bytes. */
static int reads_as(const Corpus *c, const char *expected)
{
    Tokens tokens = {NULL, 0, 0};
    corpus_tokens(&tokens, c);
    int ok = tokens.n == strlen(expected) && c->tokens == tokens.n;
    for (size_t i = 0; ok && i < tokens.n; i++)
        ok = tokens.id[i] == (expected[i] == '|' ? 256 : expected[i]);
    if (!ok)
        for (size_t i = 0; i < tokens.n; i++) putchar(tokens.id[i] < 256 ? tokens.id[i] : '|');
    free(tokens.id);
    return ok;
}

static void test_corpus_of_files(void)
{
    TextFolder *f = open_folder("corpus_of_files");
    Tokenizer *t = tokenizer_bytes();
    write_string(f, "z.txt", "zz<|endoftext|>");
    write_string(f, "b.txt", "one<|endoftext|><|endoftext|>two");
    write_string(f, ".hidden", "hidden");
    write_bytes(f, "picture", "PNG\0\1\2", 6);
    write_string(f, "empty", "");
    mkdir(text_path(f, "c"), 0700);
    write_string(f, "c/2.txt", "c2");
    write_string(f, "c/1.txt", "c1");
    if (symlink(".", text_path(f, "c/loop"))) die("symlink: %s", strerror(errno));
    const char *folder[] = {f->path}, *files[] = {text_path(f, "z.txt"), text_path(f, "c")};
    Corpus *c = corpus_open(folder, 1, t, 257);
    check_true("a folder: by name, folders in it too, the rest skipped",
               reads_as(c, "one|two|c1|c2|zz|"));
    check_equal("documents", (double)c->documents, 5);
    corpus_close(c);
    c = corpus_open(files, 2, t, 257);
    check_true("a list: in its order", reads_as(c, "zz|c1|c2|"));
    corpus_close(c);
    t->end_of_text = -1;
    c = corpus_open(files + 1, 1, t, 257);
    check_true("no <|endoftext|> in the vocabulary: nothing is added", reads_as(c, "c1c2"));
    corpus_close(c);
    tokenizer_close(t);
    close_folder(f);
}

/* Builds PREFIX.bin and .idx number by number, after the description of the format. */
typedef struct {
    char bytes[4096];
    size_t n;
} Buffer;

static void append(Buffer *b, long long x, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) b->bytes[b->n++] = (char)((unsigned long long)x >> 8 * i);
}

/* Two documents of three sequences, {1 2 3 | 4 5} and {6}, in 16 or 32 bits. The field that
 * `broken` names is wrong; 0 for none. */
enum {
    BAD_MAGIC = 1,
    BAD_VERSION,
    BAD_TYPE,
    BAD_SEQUENCES,
    BAD_SEQUENCES_HUGE,
    BAD_MARKS,
    BAD_SIZE_NEGATIVE,
    BAD_SIZE_LONG,
    BAD_POINTER,
    BAD_POINTER_ODD,
    BAD_FIRST_MARK,
    BAD_LAST_MARK,
    BAD_MARK_LARGE,
    BAD_MARK_BACK,
    BAD_CUT,
    BAD_LONGER,
    BAD_BIN_CUT,
    BAD_BIN_LONGER,
    BAD_TOKEN,
    BAD_NEGATIVE_TOKEN,
    BAD_NO_BIN,
    BAD_COUNT
};

static void write_index(TextFolder *f, size_t width, int broken)
{
    Buffer idx = {{0}, 0}, bin = {{0}, 0};
    memcpy(idx.bytes, broken == BAD_MAGIC ? "TNTIDX\0\0\0" : "MMIDIDX\0\0", 9);
    idx.n = 9;
    append(&idx, broken == BAD_VERSION ? 2 : 1, 8);
    int type = width == 2 ? 8 : 4;
    if (broken == BAD_TYPE) type = 5;
    append(&idx, type, 1);
    long long sequences = 3, marks = 3;
    if (broken == BAD_SEQUENCES) sequences = 4;
    if (broken == BAD_SEQUENCES_HUGE) sequences = 0x4000000000000003;
    if (broken == BAD_MARKS) marks = 0x2000000000000003;
    if (broken == BAD_MARK_BACK) marks = 4;
    append(&idx, sequences, 8);
    append(&idx, marks, 8);
    append(&idx, broken == BAD_SIZE_NEGATIVE ? -3 : 3, 4);
    append(&idx, 2, 4);
    append(&idx, broken == BAD_SIZE_LONG ? 9 : 1, 4);
    append(&idx, 0, 8);
    append(&idx, (broken == BAD_POINTER ? 2 : 3) * (long long)width + (broken == BAD_POINTER_ODD),
           8);
    append(&idx, 5 * (long long)width, 8);
    append(&idx, broken == BAD_FIRST_MARK, 8);
    append(&idx, broken == BAD_MARK_LARGE ? 4 : 2, 8);
    if (broken == BAD_MARK_BACK) append(&idx, 1, 8);
    append(&idx, broken == BAD_LAST_MARK ? 2 : 3, 8);
    if (broken == BAD_LONGER) append(&idx, 0, 1);
    for (int i = 1; i <= 6; i++) {
        int token = i;
        if (i == 4 && broken == BAD_TOKEN) token = 257;
        if (i == 4 && broken == BAD_NEGATIVE_TOKEN) token = -1;
        append(&bin, token, width);
    }
    if (broken == BAD_BIN_LONGER) append(&bin, 0, width);
    write_bytes(f, "data.idx", idx.bytes, broken == BAD_CUT ? 20 : idx.n);
    write_bytes(f, "data.bin", bin.bytes, broken == BAD_BIN_CUT ? bin.n - 1 : bin.n);
    if (broken == BAD_NO_BIN) remove(text_path(f, "data.bin"));
}

static void open_data(void *folder)
{
    const char *path = text_path((TextFolder *)folder, "data");
    corpus_close(corpus_open(&path, 1, tokenizer_bytes(), 257));
}

static void test_indexed_dataset(void)
{
    static const char *const refused[BAD_COUNT][2] = {
        {NULL, NULL},
        {"another magic", "MMIDIDX"},
        {"version 2", "version 1"},
        {"type int64", "int64"},
        {"more sequences than there are", "damaged"},
        {"sequences that overflow", "damaged"},
        {"marks that overflow", "damaged"},
        {"a negative size", "sequence 0"},
        {"a size too large", "sequence 2"},
        {"a pointer back", "sequence 1"},
        {"an odd pointer", "sequence 1"},
        {"marks that begin at 1", "from 0"},
        {"marks that end early", "from 0"},
        {"a mark too large", "mark 1"},
        {"a mark back", "mark 2"},
        {"half a header", "MMIDIDX"},
        {"a longer index", "damaged"},
        {"a short .bin", "sequence 2"},
        {"a long .bin", "which has"},
        {"a token outside the vocabulary", "token 257"},
        {"a negative token", "token -1"},
        {"no .bin", "data.bin"},
    };
    TextFolder *f = open_folder("indexed_dataset");
    Tokenizer *t = tokenizer_bytes();
    const char *prefix = text_path(f, "data"), *half = text_path(f, "data.idx");
    for (size_t width = 2; width <= 4; width += 2) {
        write_index(f, width, 0);
        Corpus *c = corpus_open(&prefix, 1, t, 257);
        check_true(width == 2 ? "uint16: two documents of three sequences" : "int32: the same",
                   reads_as(c, "\1\2\3\4\5|\6|"));
        corpus_close(c);
        c = corpus_open(&half, 1, t, 257);
        check_true("named by its .idx", reads_as(c, "\1\2\3\4\5|\6|"));
        corpus_close(c);
    }
    for (int broken = 1; broken < BAD_COUNT; broken++) {
        write_index(f, 4, broken);
        check_dies(refused[broken][0], open_data, f, refused[broken][1]);
    }

    /* a written dataset is as the description says, and reads back the same */
    write_string(f, "text", "abc<|endoftext|>de");
    const char *text = text_path(f, "text");
    /* Megatron uses 16 bits for vocabularies below 65500 */
    for (size_t vocabulary = 65499; vocabulary <= 65500; vocabulary++) {
        size_t width = vocabulary < 65500 ? 2 : 4;
        Buffer expected = {"MMIDIDX\0", 9};
        append(&expected, 1, 8);
        append(&expected, width == 2 ? 8 : 4, 1);
        append(&expected, 2, 8);
        append(&expected, 3, 8); /* two sequences, three marks */
        append(&expected, 4, 4);
        append(&expected, 3, 4); /* "abc|", "de|" */
        append(&expected, 0, 8);
        append(&expected, 4 * (long long)width, 8);
        append(&expected, 0, 8);
        append(&expected, 1, 8);
        append(&expected, 2, 8);
        Corpus *c = corpus_open(&text, 1, t, vocabulary);
        corpus_write(c, prefix);
        corpus_close(c);
        Map idx = map_file(text_path(f, "data.idx"));
        check_true(width == 2 ? "the index of a written dataset, uint16" : "the same, int32",
                   idx.size == expected.n && !memcmp(idx.data, expected.bytes, expected.n));
        unmap_file(idx);
        c = corpus_open(&prefix, 1, t, 257);
        check_true("it reads as it was written", reads_as(c, "abc|de|"));
        corpus_close(c);
    }
    check_true("no temporary file is left",
               !file_exists(f->path, "data.bin.tmp") && !file_exists(f->path, "data.idx.tmp"));
    tokenizer_close(t);
    close_folder(f);
}

static void open_nothing(void *path)
{
    const char *paths[] = {(const char *)path};
    corpus_open(paths, 1, tokenizer_bytes(), 257);
}

static void open_with_small_vocabulary(void *path)
{
    const char *paths[] = {(const char *)path};
    Tokenizer *t = tokenizer_bytes();
    t->end_of_text = -1;
    corpus_open(paths, 1, t, 'd');
}

static void open_without_end_of_text(void *path)
{
    const char *paths[] = {(const char *)path};
    corpus_open(paths, 1, tokenizer_bytes(), 256);
}

static void write_nowhere(void *path)
{
    const char *paths[] = {(const char *)path};
    corpus_write(corpus_open(paths, 1, tokenizer_bytes(), 257), "/nonexistent/folder/data");
}

static void test_corpus_refuses(void)
{
    TextFolder *f = open_folder("corpus_refuses");
    write_string(f, "text", "abcd");
    write_string(f, "empty", "");
    const char *text = text_path(f, "text");
    check_dies("a path to nothing", open_nothing, (void *)text_path(f, "absent"), "absent");
    check_dies("an empty file", open_nothing, (void *)text_path(f, "empty"), "no text");
    check_dies("a token outside the model's vocabulary", open_with_small_vocabulary, (void *)text,
               "token 100");
    check_dies("<|endoftext|> outside of it", open_without_end_of_text, (void *)text, "256");
    check_dies("a folder to write to that is not there", write_nowhere, (void *)text,
               "/nonexistent");
    close_folder(f);
}

/* ---- Samples */

/* A corpus whose token number i is i. Its documents have these lengths, without <|endoftext|>. */
static Corpus *counting_corpus(TextFolder *f, const size_t *lengths, size_t n)
{
    size_t total = 0;
    for (size_t i = 0; i < n; i++) total += lengths[i];
    FILE *bin = fopen(text_path(f, "count.bin"), "wb");
    FILE *idx = fopen(text_path(f, "count.idx"), "wb");
    fwrite("MMIDIDX\0", 9, 1, idx);
    uint64_t head[3] = {1, n, n + 1}, at = 0, four = 4;
    fwrite(&head[0], 8, 1, idx);
    fwrite(&four, 1, 1, idx);
    fwrite(&head[1], 8, 2, idx);
    for (size_t i = 0; i < n; i++) fwrite(&lengths[i], 4, 1, idx);
    for (size_t i = 0; i < n; i++) {
        fwrite(&at, 8, 1, idx);
        at += 4 * lengths[i];
    }
    for (uint64_t i = 0; i <= n; i++) fwrite(&i, 8, 1, idx);
    for (uint32_t i = 0; i < total; i++) fwrite(&i, 4, 1, bin);
    fclose(bin);
    fclose(idx);
    Tokenizer *t = tokenizer_bytes();
    t->end_of_text = -1;
    const char *prefix = text_path(f, "count");
    Corpus *c = corpus_open(&prefix, 1, t, total);
    tokenizer_close(t);
    return c;
}

enum { DOCUMENTS = 60 };

static void test_samples(void)
{
    enum { T = 7 };
    TextFolder *f = open_folder("samples");
    size_t lengths[DOCUMENTS], total = 0, document_of[DOCUMENTS * 40];
    for (size_t i = 0; i < DOCUMENTS; i++) {
        lengths[i] = 1 + random_word(3, 0, 0, i) % 30;
        for (size_t j = 0; j < lengths[i]; j++) document_of[total++] = i;
    }
    /* after this the last piece of T tokens lacks its label */
    while (total % T) {
        lengths[DOCUMENTS - 1]++;
        document_of[total++] = DOCUMENTS - 1;
    }
    Corpus *c = counting_corpus(f, lengths, DOCUMENTS);
    Dataset *d = dataset_open(c, 0, 0, T, 42);
    size_t samples = total / T - 1;
    check_equal("samples in an epoch: (tokens - 1) / T", (double)d->samples, (double)samples);

    int *all = (int *)xcalloc(3 * samples * (T + 1), sizeof(int));
    for (size_t n = 0; n < 3 * samples; n++) dataset_sample(d, n, all + n * (T + 1));
    for (int epoch = 0; epoch < 3; epoch++) {
        const int *first = all + (size_t)epoch * samples * (T + 1);
        int *seen = (int *)xcalloc(total, sizeof(int)), *heads = (int *)xcalloc(total, sizeof(int));
        size_t twice = 0, jumps = 0, headless = 0, in_order = 0, neighbours = 0;
        for (size_t n = 0; n < samples; n++) {
            const int *s = first + n * (T + 1);
            heads[s[0]] = 1;
            for (size_t t = 0; t < T; t++) {
                twice += seen[s[t]] > 0;
                seen[s[t]] = 1;
                /* A token is followed by the next one of its document. At a document's end
                 * another document begins. */
                size_t a = (size_t)s[t], b = (size_t)s[t + 1];
                int ends = a + 1 == total || document_of[a + 1] != document_of[a];
                int begins = b == 0 || document_of[b - 1] != document_of[b];
                jumps += ends ? !begins : b != a + 1;
                neighbours += ends && b == a + 1;
            }
            in_order += n + 1 < samples && s[T] == s[T + 1];
        }
        for (size_t n = 0; n < samples; n++) headless += !heads[first[n * (T + 1) + T]];
        check_equal("tokens that are inputs twice in an epoch", (double)twice, 0);
        check_equal("breaks within a document", (double)jumps, 0);
        check_equal("labels at the end that open no other sample: the last", (double)headless, 1);
        check_true("samples are shuffled", in_order < samples / 5);
        check_true("documents are shuffled", neighbours < DOCUMENTS / 5);
        free(seen);
        free(heads);
    }
    check_true("epochs differ",
               memcmp(all, all + samples * (T + 1), samples * (T + 1) * sizeof(int)) != 0);

    /* samples can be read in any order, as after a resume; another seed gives another order */
    Dataset *again = dataset_open(c, 0, 0, T, 42), *other = dataset_open(c, 0, 0, T, 43);
    size_t wrong = 0, equal = 0;
    for (uint32_t i = 0; i < 100; i++) {
        size_t n = random_word(5, 0, 0, i) % (3 * samples);
        int s[T + 1];
        dataset_sample(again, n, s);
        wrong += memcmp(s, all + n * (T + 1), sizeof(s)) != 0;
        dataset_sample(other, n, s);
        equal += memcmp(s, all + n * (T + 1), sizeof(s)) == 0;
    }
    check_equal("samples that depend on what was read before", (double)wrong, 0);
    check_true("another seed, other samples", equal < 10);
    dataset_close(again);
    dataset_close(other);
    dataset_close(d);
    free(all);
    corpus_close(c);
    close_folder(f);
}

typedef struct {
    Dataset *dataset;
    const int *expected;
    size_t first, n, wrong;
} Reader;

static void *read_samples(void *arg)
{
    Reader *r = (Reader *)arg;
    int s[9];
    for (size_t i = 0; i < r->n; i++) {
        /* several epochs, in a different order for each thread */
        size_t n = (r->first + i * 7) % r->n;
        dataset_sample(r->dataset, n, s);
        r->wrong += memcmp(s, r->expected + n * 9, sizeof(s)) != 0;
    }
    return NULL;
}

static void test_samples_from_threads(void)
{
    TextFolder *f = open_folder("samples_from_threads");
    size_t lengths[3] = {50, 31, 20}, n;
    Corpus *c = counting_corpus(f, lengths, 3);
    Dataset *d = dataset_open(c, 0, 0, 8, 1);
    n = 1000 * d->samples + 1; /* not a multiple of 7 */
    int *expected = (int *)xcalloc(n * 9, sizeof(int));
    for (size_t i = 0; i < n; i++) dataset_sample(d, i, expected + i * 9);
    pthread_t thread[4];
    Reader reader[4];
    size_t wrong = 0;
    for (size_t i = 0; i < 4; i++) {
        Reader r = {d, expected, i * 101, n, 0};
        reader[i] = r;
        if (pthread_create(&thread[i], NULL, read_samples, &reader[i])) die("no thread");
    }
    for (size_t i = 0; i < 4; i++) {
        pthread_join(thread[i], NULL);
        wrong += reader[i].wrong;
    }
    check_equal("wrong samples when four threads read at once", (double)wrong, 0);
    free(expected);
    dataset_close(d);
    corpus_close(c);
    close_folder(f);
}

static void open_too_long(void *corpus) { dataset_open((Corpus *)corpus, 0, 0, 101, 1); }
static void open_too_little_held_out(void *corpus) { dataset_open((Corpus *)corpus, 5, 1, 5, 1); }

static void test_held_out(void)
{
    TextFolder *f = open_folder("held_out");
    size_t lengths[3] = {50, 31, 20};
    Corpus *c = counting_corpus(f, lengths, 3);
    /* 30 % of 101 tokens are 30, so the cut is inside a document */
    for (int held_out = 0; held_out < 2; held_out++) {
        Dataset *d = dataset_open(c, 30, held_out, 1, 9);
        int s[2], seen[101] = {0}, wrong = 0;
        for (size_t n = 0; n < d->samples; n++) {
            dataset_sample(d, n, s);
            seen[s[0]] = seen[s[1]] = 1;
        }
        for (int i = 0; i < 101; i++) wrong += seen[i] != (held_out ? i >= 71 : i < 71);
        check_equal(held_out ? "tokens held out" : "tokens to train on", (double)d->tokens,
                    held_out ? 30 : 71);
        check_equal("tokens in the wrong part", wrong, 0);
        dataset_close(d);
    }
    check_dies("too few tokens", open_too_long, c, "101 tokens, but a sample of 101 needs 102");
    check_dies("too few held out", open_too_little_held_out, c, "held-out text has 5 tokens");
    Dataset *d = dataset_open(c, 0, 0, 100, 1); /* exactly enough */
    check_equal("one sample of all tokens", (double)d->samples, 1);
    dataset_close(d);
    corpus_close(c);

    /* The cut lies just before or just behind an <|endoftext|>, or inside the last document, which
     * has none of its own in the file. */
    Tokenizer *t = tokenizer_bytes();
    write_string(f, "text", "abc<|endoftext|>def");
    const char *text = text_path(f, "text");
    c = corpus_open(&text, 1, t, 257);
    for (int cut = 3; cut <= 6; cut++) {
        Dataset *left = dataset_open(c, 100 * (8 - cut) / 8., 0, (size_t)cut - 1, 1);
        Dataset *right = dataset_open(c, 100 * (8 - cut) / 8., 1, (size_t)(8 - cut) - 1, 1);
        size_t ends = 0;
        int s[8];
        dataset_sample(left, 0, s);
        for (int i = 0; i < cut; i++) ends += s[i] == 256;
        check_equal("<|endoftext|> left of the cut", (double)ends, cut > 3);
        dataset_sample(right, 0, s);
        for (int i = 0; i < 8 - cut; i++) ends += s[i] == 256;
        check_equal("and in all", (double)ends, 2);
        dataset_close(left);
        dataset_close(right);
    }
    corpus_close(c);
    tokenizer_close(t);
    close_folder(f);
}

/* 12000 shuffles of 5 elements have 120 possible orders. Chi squared has mean 119 and deviation
 * 15.4; 200 is 5 deviations above the mean. */
static void test_shuffle(void)
{
    size_t x[1000], seen[1000] = {0}, count[3125] = {0}, orders = 0, missing = 0;
    double chi_squared = 0;
    shuffle(x, 1000, 1, SITE_SHUFFLE_DOCUMENTS, 0);
    for (size_t i = 0; i < 1000; i++) seen[x[i] % 1000]++;
    for (size_t i = 0; i < 1000; i++) missing += seen[i] != 1;
    check_equal("elements that a permutation of 1000 misses or repeats", (double)missing, 0);
    for (uint32_t epoch = 0; epoch < 12000; epoch++) {
        shuffle(x, 5, 2, SITE_SHUFFLE_DOCUMENTS, epoch);
        count[x[0] + 5 * (x[1] + 5 * (x[2] + 5 * (x[3] + 5 * x[4])))]++;
    }
    for (size_t i = 0; i < 3125; i++)
        if (count[i]) {
            orders++;
            chi_squared += ((double)count[i] - 100) * ((double)count[i] - 100) / 100;
        }
    check_equal("orders of 5 elements that occur", (double)orders, 120);
    check("chi squared of how often they do", chi_squared, 200);
}

/* ---- Chapter 9's texts */

static void test_detokenise(void)
{
    Map map = map_file(REFERENCE "/detokenise.jsonl");
    size_t cases = 0, wrong = 0, miscounted = 0;
    for (const char *line = map.data, *end; line < map.data + map.size; line = end + 1, cases++) {
        end = (const char *)memchr(line, '\n', (size_t)(map.data + map.size - line));
        Json json = json_parse(line, (size_t)(end - line), REFERENCE "/detokenise.jsonl");
        const JsonValue *text = json_get(&json, json.value, "text");
        const JsonValue *expected = json_get(&json, json.value, "expected");
        char *copy = (char *)xcalloc(text->length + 1, 1);
        memcpy(copy, text->string, text->length);
        miscounted += wikitext_original_tokens(copy, text->length) !=
                      json_get(&json, json.value, "words")->number;
        size_t n = wikitext_detokenise(copy, text->length);
        int ok = n == expected->length && !memcmp(copy, expected->string, n);
        if (!ok) printf("    %.*s\n", (int)(end - line), line);
        wrong += !ok;
        free(copy);
        json_free(&json);
    }
    check_true("more than 140 cases were read", cases > 140);
    check_equal("texts detokenised otherwise than by Python", (double)wrong, 0);
    check_equal("texts whose words are counted otherwise", (double)miscounted, 0);
    unmap_file(map);
    /* There is no closing bracket: the text must not be searched for it again and again. */
    char *many = (char *)xcalloc(1 << 20, 1);
    memset(many, '(', 1 << 20);
    check_equal("a million opening brackets", (double)wikitext_detokenise(many, 1 << 20), 1 << 20);
    free(many);
}

static void test_windows(void)
{
    size_t wrong = 0, blind = 0, sparse = 0, bad_count = 0, texts = 0;
    for (size_t T = 1; T <= 9; T++)
        for (size_t o = 1; o <= T; o++)
            for (size_t n = 2; n < 40; n++, texts++) {
                int text[40], tokens[10], times[40] = {0};
                real weight[9];
                for (size_t i = 0; i < n; i++) text[i] = (int)i;
                size_t count = window_count(n - 1, o);
                /* the count as Megatron computes it */
                double rest = n - 1 > o ? (double)(n - 1 - o) : 0;
                bad_count += (double)count != ceil(rest / (double)o) + 1;
                for (size_t i = 0; i < count; i++) {
                    window_fill(tokens, weight, text, n, i, T, o, -1);
                    for (size_t t = 0; t < T; t++) {
                        if (weight[t] == 0) continue;
                        if (weight[t] != 1 || tokens[t + 1] != (int)(i * o + t + 1)) wrong++;
                        else times[tokens[t + 1]]++;
                        sparse += t < T - o && i > 0; /* with too little text before it */
                    }
                    for (size_t t = 0; t <= T; t++)
                        blind += tokens[t] != (i * o + t < n ? (int)(i * o + t) : -1);
                }
                for (size_t i = 1; i < n; i++) wrong += times[i] != 1;
            }
    check_equal("texts and windows tried", (double)texts, 45 * 38);
    check_equal("targets not scored exactly once", (double)wrong, 0);
    check_equal("targets scored with too little before them", (double)sparse, 0);
    check_equal("wrong tokens in windows", (double)blind, 0);
    check_equal("wrong counts of windows", (double)bad_count, 0);
    check_equal("windows of a text of one token", (double)window_count(0, 32), 1);

    enum { N = 270330, LENGTH = 1024 };
    int *text = (int *)xcalloc(N, sizeof(int)), tokens[LENGTH + 1];
    real weight[LENGTH];
    size_t windows = window_count(N - 1, 32), empty = 0;
    double scored = 0;
    for (size_t i = 0; i < windows; i++) {
        double sum = 0;
        window_fill(tokens, weight, text, N, i, LENGTH, 32, 0);
        for (size_t t = 0; t < LENGTH; t++) sum += (double)weight[t];
        empty += sum == 0;
        scored += sum;
    }
    check_equal("[P52] windows of WikiText-103", (double)windows, 8448);
    check_equal("[P52] that score nothing", (double)empty, 31);
    check_equal("[P51] targets scored", scored, 270329);
    free(text);
}

static void open_lambada(void *path)
{
    Tokenizer *t = tokenizer_bytes();
    lambada_open((const char *)path, t);
}

static void test_lambada(void)
{
    static const char *const bad[][3] = {
        {"not JSON", "{\"text\": \"a b\"}\n{\"text\": \"a b\n", "line 2"},
        {"no text", "{\"text\": \"a b\"}\n\n{\"txt\": \"a b\"}\n", "line 3"},
        {"a number", "{\"text\": 5}", "line 1: expected"},
        {"an array", "[\"text\"]", "line 1: expected"},
        {"one word", "{\"text\": \" word \"}\n", "two words"},
        {"no word", "{\"text\": \" \"}\n", "two words"},
        {"no lines", "\n \n", "no examples"},
    };
    TextFolder *f = open_folder("lambada");
    Tokenizer *t = tokenizer_bytes();
    write_string(f, "l",
                 "{\"text\": \"So she saw.\\n The  sea \"}\r\n"
                 "\n"
                 "{\"n\": 1, \"text\": \"\\u3000a b\\u00a0c\"}");
    Lambada l = lambada_open(text_path(f, "l"), t);
    /* context and label; each byte is a token */
    const char *first = "So she saw.\n The sea", *second = "a b c";
    check_equal("examples", (double)l.n, 2);
    check_equal("context of the first: the text before its last word, stripped",
                (double)l.example[0].context, 16);
    check_equal("label: the word, with one blank before it", (double)l.example[0].label, 4);
    check_equal("context of the second: between white space of other kinds",
                (double)l.example[1].context, 3);
    check_equal("label", (double)l.example[1].label, 2);

    int tokens[33];
    real weight[32];
    size_t wrong = 0;
    for (size_t i = 0; i < 20; i++) wrong += l.tokens.id[l.example[0].first + i] != first[i];
    for (size_t i = 0; i < 5; i++) wrong += l.tokens.id[l.example[1].first + i] != second[i];
    check_equal("wrong tokens", (double)wrong, 0);
    lambada_fill(tokens, weight, &l, 0, 32, -7);
    for (int i = 0; i < 33; i++) wrong += tokens[i] != (i < 20 ? first[i] : -7);
    /* the labels are tokens 16..19 */
    for (int i = 0; i < 32; i++) wrong += weight[i] != (i >= 15 && i < 19);
    check_equal("wrong tokens or weights of an example", (double)wrong, 0);
    lambada_fill(tokens, weight, &l, 0, 9, -7); /* too long for 9: its last 10 tokens */
    for (int i = 0; i < 10; i++) wrong += tokens[i] != first[10 + i];
    for (int i = 0; i < 9; i++) wrong += weight[i] != (i >= 5);
    check_equal("and of one that is longer than a window", (double)wrong, 0);
    lambada_close(&l);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        write_string(f, "bad", bad[i][1]);
        check_dies(bad[i][0], open_lambada, (void *)text_path(f, "bad"), bad[i][2]);
    }
    tokenizer_close(t);
    close_folder(f);
}

#define SHARED "../shared/data"

/* The paper's own numbers, where its data is at hand [P51, P52, P53, P55]. */
static void test_benchmark_texts(void)
{
    if (access(SHARED "/gpt2_tokenizer/vocab.json", F_OK)) {
        skip("there is no " SHARED);
        return;
    }
    Tokenizer *t = tokenizer_open(SHARED "/gpt2_tokenizer");
    check_equal("GPT-2's vocabulary", (double)t->vocabulary, 50257);
    check_equal("its <|endoftext|>", t->end_of_text, 50256);

    Map map = map_file(SHARED "/wikitext103_test.txt");
    char *text = (char *)xcalloc(map.size, 1);
    Tokens tokens = {NULL, 0, 0};
    memcpy(text, map.data, map.size);
    check_equal("[P51] WikiText-103's original tokens",
                (double)wikitext_original_tokens(text, map.size), 245566);
    encode(&tokens, t, text, map.size);
    check_equal("tokens before detokenising", (double)tokens.n, 285234);
    check_true("they decode to the text", round_trips(t, text, map.size));
    tokens.n = 0;
    encode(&tokens, t, text, wikitext_detokenise(text, map.size));
    check_equal("[P51] tokens", (double)tokens.n, 270330);
    check_equal("[P52] windows", (double)window_count(tokens.n - 1, 32), 8448);
    unmap_file(map);
    free(text);
    free(tokens.id);

    Lambada l = lambada_open(SHARED "/lambada_test.jsonl", t);
    size_t labels[6] = {0}, longest = 0;
    for (size_t i = 0; i < l.n; i++) {
        labels[min_size(l.example[i].label, 5)]++;
        longest = max_size(longest, l.example[i].context + l.example[i].label);
    }
    check_equal("[P55] LAMBADA's examples", (double)l.n, 5153);
    check_equal("[P55] labels of one token", (double)labels[1], 4013);
    check_equal("of two", (double)labels[2], 913);
    check_equal("of three", (double)labels[3], 208);
    check_equal("of four", (double)labels[4], 16);
    check_equal("of five", (double)labels[5], 3);
    check_equal("the longest example", (double)longest, 224);
    lambada_close(&l);
    tokenizer_close(t);
}

/* ---- Chapter 14: JSON, checkpoints ----------------------------------------------------------- */

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Runs body(arg) in a child process. Returns 1 if it exits 1 after exactly one line on stderr. It
 * is for long lists of bad input, of which check_dies() would print a row each. */
static int is_refused(void (*body)(void *), void *arg)
{
    int ends[2], status = 0, lines = 0;
    char text[1024], last = 0;
    fflush(stdout);
    if (pipe(ends)) return 0;
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        alarm(60);
#ifdef _OPENMP
        omp_set_num_threads(1); /* a child does not have its parent's threads */
#endif
        body(arg);
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t n; (n = read(ends[0], text, sizeof text)) > 0; last = text[n - 1])
        for (ssize_t i = 0; i < n; i++) lines += text[i] == '\n';
    close(ends[0]);
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 1 && lines == 1 && last == '\n';
}

typedef struct {
    const char *text;
    size_t size;
} Text;

static void parse_text(void *arg)
{
    const Text *t = (const Text *)arg;
    /* no byte more: a sanitizer sees a read beyond the end */
    char *copy = (char *)xcalloc(t->size, 1);
    memcpy(copy, t->text, t->size);
    json_parse(copy, t->size, "t");
}

static const char json_sample[] =
    " {\"a\": [1, -0, 2.5e-3, 1E+2, 0.1], \"b\" : {\"\": null},\r\n\t\"c\": [true, false, [], {}],"
    "\"d\\u0041\\n\\\\\\/\": "
    "\"\\ud83d\\ude00\\u00e9\\b\\f\\r\\t\\\"\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\"} ";

static void test_json(void)
{
    Json j = json_parse(json_sample, sizeof json_sample - 1, "sample");
    const JsonValue *v = j.value, *a = json_get(&j, v, "a"), *b = json_get(&j, v, "b");
    const JsonValue *c = json_get(&j, v, "c");
    const JsonValue *d = json_get(&j, v, "dA\n\\/");
    check_true("the root is an object of 4 members",
               v->type == JSON_OBJECT && v->length == 4 && !v->key);
    check_equal("values in all", (double)v->end, 15);
    check_true("numbers", a && a->length == 5 && a[1].number == 1 && a[2].number == 0 &&
                              signbit(a[2].number) && a[3].number == 2.5e-3 && a[4].number == 100 &&
                              a[5].number == 0.1);
    check_true("a null under the empty key", b && b[1].type == JSON_NULL && b[1].key && !*b[1].key);
    check_true("true, false, [] and {}", c && c->length == 4 && c[1].type == JSON_TRUE &&
                                             c[2].type == JSON_FALSE && c[3].type == JSON_ARRAY &&
                                             !c[3].length && c[4].type == JSON_OBJECT);
    check_true("siblings are reached by end", a && b && c && d && j.value + a->end == b &&
                                                  j.value + b->end == c && j.value + c->end == d &&
                                                  d->end == v->end);
    check_true(
        "escapes and UTF-8",
        d &&
            !strcmp(d->string,
                    "\xF0\x9F\x98\x80\xC3\xA9\b\f\r\t\"\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80") &&
            d->length == strlen(d->string));
    check_true("absent members", !json_get(&j, v, "x") && !json_get(&j, a, "x") &&
                                     json_integer(&j, v, "x", 1, 9, 7) == 7);
    json_free(&j);

    size_t refused = 0;
    for (size_t n = 0; n < sizeof json_sample - 2; n++) {
        Text t = {json_sample, n};
        refused += (size_t)is_refused(parse_text, &t);
    }
    check_equal("the sample, cut at every byte, is refused", (double)refused,
                sizeof json_sample - 2);

    /* clang-format off */
    static const char *const bad[] = {
        "", " ", "nul", "nulll", "True", "01", "-", "+1", ".5", "1.", "1e", "1e+", "0x1", "1e999",
        "-1e999", "NaN", "Infinity", "[1,]", "[,1]", "[1 2]", "[1", "]", "{\"a\":1,}", "{\"a\" 1}",
        "{\"a\"}", "{a:1}", "{1:1}", "{\"a\":1 \"b\":2}", "{\"a\":1,\"a\":2}",
        "{\"a\":1,\"\\u0061\":2}", "{} {}", "1 x", "\"", "\"\\", "\"\\x\"", "\"\\u12\"",
        "\"\\u12g4\"", "\"\\ud800\"", "\"\\ud800x\"", "\"\\ud800\\n\"", "\"\\ud800\\u0041\"",
        "\"\\udc00\"", "\"\\u0000\"", "\"\n\"", "\"\x01\"", "\"\x80\"", "\"\xC3\"", "\"\xC0\xAF\"",
        "\"\xE0\x80\x80\"", "\"\xED\xA0\x80\"", "\"\xF4\x90\x80\x80\"", "\"\xF8\x88\x80\x80\x80\"",
        "\"\xFF\"", "\xEF\xBB\xBF{}", "'a'", "// x\n1", "[1]]", "\v1"};
    /* clang-format on */
    size_t n_bad = sizeof bad / sizeof *bad;
    refused = 0;
    for (size_t i = 0; i < n_bad; i++) {
        Text t = {bad[i], strlen(bad[i])};
        int ok = is_refused(parse_text, &t);
        if (!ok) printf("    accepted or with more than a line: %s\n", bad[i]);
        refused += (size_t)ok;
    }
    check_equal("malformed texts are refused", (double)refused, (double)n_bad);

    enum { DEEP = 100000 };
    char *deep = (char *)xcalloc(2 * DEEP, 1);
    memset(deep, '[', DEEP);
    memset(deep + DEEP, ']', DEEP);
    Text all = {deep, 2 * DEEP}, edge = {deep + DEEP - 40, 80}, over = {deep + DEEP - 41, 82};
    check_dies("100,000 levels deep", parse_text, &all, "levels deep");
    check_dies("41 levels deep", parse_text, &over, "levels deep");
    j = json_parse(edge.text, edge.size, "edge");
    check_equal("40 levels are not too deep", (double)j.value[0].end, 40);
    json_free(&j);
    free(deep);

    /* 100,001 members, two with one key. Comparing each with each would take 5e9
     * comparisons, which are minutes. */
    size_t size = 0;
    char *text = NULL;
    FILE *out = open_memstream(&text, &size);
    for (int i = 0; i < 100000; i++)
        fprintf(out, "%s\"a rather long common beginning %d\":0", i ? "," : "{", i ^ 21845);
    fprintf(out, ",\"a rather long common beginning %d\":0}", 777);
    fclose(out);
    Text many = {text, size};
    double begin = seconds();
    check_dies("one key twice among 100,001", parse_text, &many, "beginning 777\" occurs twice");
    /* measured: 0.06 s, and 0.4 s under sanitizers */
    check("seconds it took", seconds() - begin, 5);
    free(text);
}

/* json_parse() reads back what json_write_string() writes. */
static void test_json_strings(void)
{
    char s[300], *text = NULL;
    size_t size = 0, n = 0;
    for (int c = 1; c < 128; c++) s[n++] = (char)c;
    memcpy(s + n, "\xC3\xA9\xF0\x9F\x98\x80", 7);
    FILE *out = open_memstream(&text, &size);
    json_write_string(out, s, strlen(s));
    fclose(out);
    Json j = json_parse(text, size, "strings");
    check_true("all ASCII and some UTF-8 come back", !strcmp(j.value[0].string, s));
    json_free(&j);
    free(text);
    out = open_memstream(&text, &size);
    json_write_string(out, "a\xFF\xC3", 3);
    fclose(out);
    check_true("bytes that are not UTF-8 become U+FFFD", !strcmp(text, "\"a\\ufffd\\ufffd\""));
    free(text);
}

/* ---- A place for files, and writers of files that are independent of chapter 14's ------------ */

static char *make_folder_in(char path[PATH_MAX], const char *parent)
{
    mkdir(parent, 0777);
    join_path(path, parent, "checkpoint_XXXXXX");
    if (!mkdtemp(path)) die("cannot create %s: %s", path, strerror(errno));
    return path;
}

static char *make_checkpoint_folder(char path[PATH_MAX]) { return make_folder_in(path, SCRATCH); }

static void remove_checkpoint_folder(const char *path)
{
    if (run_command("rm -rf '%s'", path)) die("cannot remove %s", path);
}

static void put_file(const char *folder, const char *name, const void *data, size_t n)
{
    char path[PATH_MAX];
    FILE *f = fopen(join_path(path, folder, name), "wb");
    if (!f || fwrite(data, 1, n, f) != n || fclose(f))
        die("cannot write %s: %s", path, strerror(errno));
}

/* Writes a safetensors file of this header and n bytes of data. */
static void put_safetensors(const char *folder, const char *name, const char *header,
                            const void *data, size_t n)
{
    uint64_t length = strlen(header);
    char *all = (char *)xcalloc(8 + length + n, 1);
    for (int i = 0; i < 8; i++) all[i] = (char)(length >> 8 * i);
    memcpy(all + 8, header, length);
    if (n) memcpy(all + 8 + length, data, n);
    put_file(folder, name, all, 8 + length + n);
    free(all);
}

static void open_quietly(void *path)
{
    Safetensors s = safetensors_open((const char *)path);
    safetensors_close(&s);
}

/* ---- safetensors ----------------------------------------------------------------------------- */

#define ENTRY(name, shape, begin, end)                                                             \
    "\"" name "\":{\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end "]}"

static void test_safetensors(void)
{
    char folder[PATH_MAX], path[PATH_MAX];
    float data[16];
    make_checkpoint_folder(folder);
    join_path(path, folder, "t.safetensors");
    for (int i = 0; i < 16; i++) data[i] = (float)i;

    put_safetensors(
        folder, "t.safetensors",
        "{\"__metadata__\":{\"a\":\"b\"}," ENTRY("transformer.y", "[3,2]", 16, 40) "," ENTRY(
            "empty", "[0,7]", 16, 16) "," ENTRY("x", "[4]", 0, 16) "," ENTRY("scalar", "[]", 40,
                                                                             44) "}  ",
        data, 44);
    Safetensors s = safetensors_open(path);
    const StoredTensor *y = find_stored(&s, "y");
    check_equal("tensors", (double)s.tensors, 4);
    check_true("a shape", y && y->dims == 2 && y->shape[0] == 3 && y->shape[1] == 2 && y->n == 6 &&
                              y->dtype == F32);
    check_equal("an element", y ? (double)stored_value(y, 5) : NAN, 9);
    check_true("names without their prefix",
               y && find_stored(&s, "transformer.y") == y && !find_stored(&s, "z"));
    check_equal(
        "a scalar",
        find_stored(&s, "scalar") ? (double)stored_value(find_stored(&s, "scalar"), 0) : NAN, 10);
    safetensors_close(&s);

    static const struct {
        const char *what, *header, *message;
        size_t bytes;
    } bad[] = {
        {"no JSON", "\x80\x02", "not valid JSON", 0},
        {"an array for a header", "[]", "no object", 0},
        {"an empty header", "", "not valid JSON", 0},
        {"data without tensors", "{}", "belong to no tensor", 4},
        {"data behind the last tensor", "{" ENTRY("x", "[4]", 0, 16) "}", "4 bytes at its end", 20},
        {"data too short", "{" ENTRY("x", "[4]", 0, 16) "}", "no range of the 12 bytes", 12},
        {"a hole at the start", "{" ENTRY("x", "[2]", 8, 16) "}", "hole", 16},
        {"a hole between", "{" ENTRY("x", "[1]", 0, 4) "," ENTRY("y", "[2]", 8, 16) "}", "hole",
         16},
        {"an overlap", "{" ENTRY("x", "[3]", 0, 12) "," ENTRY("y", "[2]", 8, 16) "}", "overlaps",
         16},
        {"the same place twice", "{" ENTRY("x", "[4]", 0, 16) "," ENTRY("y", "[4]", 0, 16) "}",
         "overlaps", 16},
        {"begin behind end", "{" ENTRY("x", "[4]", 16, 0) "}", "no range", 16},
        {"one offset", "{\"x\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[16]}}",
         "no range", 16},
        {"three offsets", "{\"x\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,8,16]}}",
         "2 numbers at most", 16},
        {"no offsets", "{\"x\":{\"dtype\":\"F32\",\"shape\":[4]}}", "has no \"data_offsets\"", 16},
        {"a negative offset", "{" ENTRY("x", "[4]", -16, 0) "}", "whole numbers", 16},
        {"a fraction", "{" ENTRY("x", "[4.5]", 0, 18) "}", "whole numbers", 18},
        {"a shape in words", "{" ENTRY("x", "[\"4\"]", 0, 16) "}", "whole numbers", 16},
        {"a nested shape", "{" ENTRY("x", "[[4]]", 0, 16) "}", "whole numbers", 16},
        {"a shape that is a number", "{" ENTRY("x", "4", 0, 16) "}", "has no \"shape\"", 16},
        {"nine dimensions", "{" ENTRY("x", "[1,1,1,1,1,1,1,1,1]", 0, 4) "}", "8 numbers at most",
         4},
        {"shape and offsets disagree", "{" ENTRY("x", "[5]", 0, 16) "}",
         "but shape and type make 20", 16},
        {"2^80 elements", "{" ENTRY("x", "[1099511627776,1099511627776]", 0, 16) "}",
         "more than 2^64", 16},
        {"2^64 bytes", "{" ENTRY("x", "[2147483648,2147483648]", 0, 0) "}", "more than 2^64", 0},
        {"an overflow to zero", "{" ENTRY("x", "[4294967296,4294967296,4]", 0, 0) "}",
         "more than 2^64", 0},
        {"an unknown type", "{\"x\":{\"dtype\":\"F13\",\"shape\":[4],\"data_offsets\":[0,16]}}",
         "F13", 16},
        {"a type that is a number", "{\"x\":{\"dtype\":32,\"shape\":[4],\"data_offsets\":[0,16]}}",
         "no \"dtype\"", 16},
        {"an entry that is no object", "{\"x\":7}", "no \"dtype\"", 0},
        {"a name twice", "{" ENTRY("x", "[1]", 0, 4) "," ENTRY("x", "[1]", 4, 8) "}",
         "occurs twice", 8},
        {"a name with and without prefix",
         "{" ENTRY("x", "[1]", 0, 4) "," ENTRY("transformer.x", "[1]", 4, 8) "}", "there twice", 8},
        {"a name of two lines", "{" ENTRY("x\\ny", "[5]", 0, 16) "}", "x?y", 16},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        put_safetensors(folder, "t.safetensors", bad[i].header, data, bad[i].bytes);
        check_dies(bad[i].what, open_quietly, path, bad[i].message);
    }
    put_file(folder, "t.safetensors", "1234567", 7);
    check_dies("7 bytes", open_quietly, path, "has only 7 bytes");
    put_file(folder, "t.safetensors", "\3\0\0\0\0\0\0\0{}", 10);
    check_dies("a header longer than the file", open_quietly, path, "header would have 3 bytes");
    put_file(folder, "t.safetensors", "\0\0\0\0\0\0\0\x80{}", 10);
    check_dies("a header of 2^63 bytes", open_quietly, path,
               "header would have 9223372036854775808");
    put_file(folder, "t.safetensors", "", 0);
    check_dies("an empty file", open_quietly, path, "has only 0 bytes");
    check_dies("a folder without a model", open_quietly, folder, "holds no model.safetensors");
    check_dies("no such file", open_quietly, join_path(path, folder, "none"), "cannot open");
    remove_checkpoint_folder(folder);
}

static void test_shards(void)
{
    char folder[PATH_MAX];
    float data[4] = {1, 2, 3, 4};
    make_checkpoint_folder(folder);
    put_safetensors(folder, "one", "{" ENTRY("transformer.x", "[2]", 0, 8) "}", data, 8);
    put_safetensors(folder, "two",
                    "{" ENTRY("transformer.y", "[1]", 0, 4) "," ENTRY("z", "[1]", 4, 8) "}",
                    data + 2, 8);
    static const struct {
        const char *what, *map, *message;
    } index[] = {
        {"", "\"transformer.x\":\"one\",\"z\":\"two\",\"transformer.y\":\"two\"", NULL},
        {"a tensor that is in no shard",
         "\"transformer.x\":\"one\",\"z\":\"two\",\"transformer.y\":\"two\",\"q\":\"two\"",
         "q is not in two"},
        {"a tensor in the other shard",
         "\"transformer.x\":\"one\",\"z\":\"one\",\"transformer.y\":\"two\"", "z is not in one"},
        {"a tensor missing in the index", "\"transformer.x\":\"one\",\"z\":\"two\"",
         "tensor y is not in"},
        {"a tensor twice in the index",
         "\"transformer.x\":\"one\",\"z\":\"two\",\"y\":\"two\",\"transformer.y\":\"two\"",
         "is not in two"},
        {"a shard that is not there", "\"x\":\"three\"", "cannot open"},
        {"a way out of the folder", "\"x\":\"../one\"", "not in a file of the same folder"},
        {"an absolute path", "\"x\":\"/etc/passwd\"", "not in a file of the same folder"},
        {"the folder itself", "\"x\":\".\"", "not in a file of the same folder"},
        {"no file name", "\"x\":\"\"", "not in a file of the same folder"},
        {"a file name of two lines", "\"x\":\"a\\nb\"", "not in a file of the same folder"},
        {"a number for a file name", "\"x\":1", "not in a file of the same folder"},
        {"no tensors", "", "no \"weight_map\""},
    };
    for (size_t i = 0; i < sizeof index / sizeof *index; i++) {
        char text[512];
        snprintf(text, sizeof text, "{\"metadata\":{},\"weight_map\":{%s}}", index[i].map);
        put_file(folder, "model.safetensors.index.json", text, strlen(text));
        if (index[i].message) {
            check_dies(index[i].what, open_quietly, folder, index[i].message);
            continue;
        }
        Safetensors s = safetensors_open(folder);
        check_true("three tensors of two shards", s.files == 2 && s.tensors == 3 &&
                                                      stored_value(find_stored(&s, "x"), 1) == 2 &&
                                                      stored_value(find_stored(&s, "y"), 0) == 3 &&
                                                      stored_value(find_stored(&s, "z"), 0) == 4);
        safetensors_close(&s);
    }
    put_file(folder, "model.safetensors.index.json", "[]", 2);
    check_dies("an index that is no object", open_quietly, folder, "no \"weight_map\"");
    remove_checkpoint_folder(folder);
}

/* Every value of the 16-bit types, against the definition of floating-point numbers. */
static void test_stored_types(void)
{
    static uint16_t halves[65536];
    static double doubles[3] = {0.1, -1e300, 1e-300};
    for (int i = 0; i < 65536; i++) halves[i] = (uint16_t)i;
    StoredTensor t;
    memset(&t, 0, sizeof t);
    t.data = (const char *)halves;
    int wrong_f16 = 0, wrong_bf16 = 0;
    for (size_t i = 0; i < 65536; i++)
        for (int bf16 = 0; bf16 < 2; bf16++) {
            int fraction_bits = bf16 ? 7 : 10, exponent_bits = bf16 ? 8 : 5, bias = bf16 ? 127 : 15;
            int exponent = (int)i >> fraction_bits & ((1 << exponent_bits) - 1);
            int fraction = (int)i & ((1 << fraction_bits) - 1);
            double expected = exponent ? ldexp(1 + ldexp(fraction, -fraction_bits), exponent - bias)
                                       : ldexp(fraction, 1 - bias - fraction_bits);
            if (exponent == (1 << exponent_bits) - 1) expected = fraction ? NAN : INFINITY;
            if (i >> 15) expected = -expected;
            t.dtype = bf16 ? BF16 : F16;
            double seen = (double)stored_value(&t, i);
            int equal = isnan(expected) ? isnan(seen)
                                        : seen == expected && !signbit(seen) == !signbit(expected);
            if (bf16) wrong_bf16 += !equal;
            else wrong_f16 += !equal;
        }
    check_equal("F16: wrong values of 65,536", wrong_f16, 0);
    check_equal("BF16: wrong values of 65,536", wrong_bf16, 0);
    t.dtype = F64;
    t.data = (const char *)doubles;
    check_equal("F64 is rounded to real", (double)stored_value(&t, 0), (double)(real)0.1);
    check_equal("F64 beyond float is infinite", (double)stored_value(&t, 1),
                sizeof(real) == 8 ? -1e300 : -INFINITY);
}

/* ---- config.json ----------------------------------------------------------------------------- */

static void read_config_quietly(void *folder)
{
    int tied;
    read_config((const char *)folder, &tied);
}

static void test_config(void)
{
    char folder[PATH_MAX];
    int tied = 0;
    make_checkpoint_folder(folder);
    Config c = make_config(3, 24, 4, 10, 77);
    c.F = 50;
    c.gelu = GELU_ERF;
    c.eps = (real)1e-6;
    c.embd_pdrop = (real)0.2;
    c.attn_pdrop = 0;
    c.resid_pdrop = (real)0.3;
    size_t size;
    char *text = config_text(&size, &c, 76);
    put_file(folder, "config.json", text, size);
    Config d = read_config(folder, &tied);
    check_true("a configuration comes back",
               d.L == 3 && d.C == 24 && d.H == 4 && d.F == 50 && d.P == 10 && d.V == 77 && tied);
    check_true("with its real numbers", d.gelu == GELU_ERF && d.eps == c.eps &&
                                            d.embd_pdrop == c.embd_pdrop && d.attn_pdrop == 0 &&
                                            d.resid_pdrop == c.resid_pdrop);
    check_true("written short", strstr(text, "\"layer_norm_epsilon\": 1e-06,") &&
                                    strstr(text, "\"embd_pdrop\": 0.2,") &&
                                    strstr(text, "\"eos_token_id\": 76,") &&
                                    strstr(text, "\"activation_function\": \"gelu\""));
    free(text);
    text = config_text(&size, &c, -1);
    check_true("without an end of text",
               strstr(text, "\"bos_token_id\": null,") && !strstr(text, "tokenizer_class"));
    free(text);
    text = config_text(&size, &c, 50256);
    check_true("with GPT-2's", strstr(text, "\"tokenizer_class\": \"GPT2TokenizerFast\",") != NULL);
    free(text);

#define SHAPE "\"model_type\":\"gpt2\",\"n_layer\":2,\"n_embd\":8,\"n_head\":2,\"vocab_size\":12"
    static const struct {
        const char *what, *text, *message;
    } config[] = {
        {"the default values", "{" SHAPE ",\"n_positions\":4}", NULL},
        {"n_ctx, null for 4C",
         "{" SHAPE ",\"n_ctx\":4,\"n_inner\":null,\"activation_function\":\"gelu_pytorch_tanh\","
         "\"reorder_and_upcast_attn\":true,\"scale_attn_weights\":true}",
         NULL},
        {"no positions", "{" SHAPE "}", "\"n_positions\" is missing"},
        {"no model_type",
         "{\"n_layer\":2,\"n_embd\":8,\"n_head\":2,\"vocab_size\":12,\"n_positions\":4}",
         "model_type"},
        {"no n_head",
         "{\"model_type\":\"gpt2\",\"n_layer\":2,\"n_embd\":8,\"vocab_size\":12,\"n_positions\":4}",
         "\"n_head\" is missing"},
        {"another model", "{\"model_type\":\"llama\"}", "is not \"gpt2\""},
        {"no object", "[\"gpt2\"]", "is not \"gpt2\""},
        {"an unknown activation",
         "{" SHAPE ",\"n_positions\":4,\"activation_function\":\"re\\nlu\"}", "is re?lu"},
        {"a number for an activation", "{" SHAPE ",\"n_positions\":4,\"activation_function\":1}",
         "no string"},
        {"scaling by layer",
         "{" SHAPE ",\"n_positions\":4,\"scale_attn_by_inverse_layer_idx\":true}", "inverse_layer"},
        {"no scaling", "{" SHAPE ",\"n_positions\":4,\"scale_attn_weights\":false}",
         "scale_attn_weights"},
        {"a flag in words", "{" SHAPE ",\"n_positions\":4,\"scale_attn_weights\":\"yes\"}",
         "neither true nor false"},
        {"2^21 positions", "{" SHAPE ",\"n_positions\":2097152}", "from 1 to 1048576"},
        {"no positions at all", "{" SHAPE ",\"n_positions\":0}", "from 1 to"},
        {"half a position", "{" SHAPE ",\"n_positions\":4.5}", "an integer was expected"},
        {"a width of -1", "{" SHAPE ",\"n_positions\":4,\"n_inner\":-1}", "from 1 to"},
        {"epsilon 0", "{" SHAPE ",\"n_positions\":4,\"layer_norm_epsilon\":0}",
         "layer_norm_epsilon"},
        {"dropout 1", "{" SHAPE ",\"n_positions\":4,\"attn_pdrop\":1}", "attn_pdrop"},
        {"8 is no multiple of 3",
         "{\"model_type\":\"gpt2\",\"n_layer\":2,\"n_embd\":8,\"n_head\":3,\"vocab_size\":12,\"n_"
         "positions\":4}",
         "no multiple"},
    };
    for (size_t i = 0; i < sizeof config / sizeof *config; i++) {
        put_file(folder, "config.json", config[i].text, strlen(config[i].text));
        if (config[i].message) {
            check_dies(config[i].what, read_config_quietly, folder, config[i].message);
            continue;
        }
        d = read_config(folder, &tied);
        check_true(config[i].what, d.L == 2 && d.C == 8 && d.F == 32 && d.P == 4 &&
                                       d.gelu == GELU_TANH && d.eps == (real)1e-5 &&
                                       d.embd_pdrop == (real)0.1);
    }
    remove_checkpoint_folder(folder);
}

/* ---- Whole models -------------------------------------------------------------------------------
 *
 * The oracle is a list of tensors with random values, written by the plainest code. */

typedef struct {
    char name[NAME_SIZE];
    size_t dims, shape[2], n;
    float *x; /* row by row, as in the file */
} Plain;

typedef struct {
    Config config;
    Plain *tensor;
    size_t n;
} PlainModel;

static void add_plain(PlainModel *m, const char *name, size_t rows, size_t cols)
{
    Plain *p = &m->tensor[m->n++];
    snprintf(p->name, sizeof p->name, "%s", name);
    p->dims = cols ? 2 : 1;
    p->shape[0] = rows;
    p->shape[1] = cols;
    p->n = rows * (cols ? cols : 1);
    p->x = (float *)xcalloc(p->n, sizeof(float));
    real *x = random_reals(p->n, 1100 + (uint32_t)m->n, 1);
    for (size_t i = 0; i < p->n; i++) p->x[i] = (float)x[i];
    p->x[0] = 1e-45f; /* the smallest subnormal number */
    p->x[p->n - 1] = -0.0f;
    free(x);
}

/* The tensors of Hugging Face's GPT-2, from its documentation, not from the table `specs`. */
static PlainModel plain_model(Config c)
{
    /* clang-format off */
    static const char *const parts[] = {
        "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias",
        "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias",
        "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"};
    size_t C = c.C, F = c.F;
    size_t shapes[12][2] = {{C, 0}, {C, 0}, {C, 3 * C}, {3 * C, 0}, {C, C}, {C, 0},
                            {C, 0}, {C, 0}, {C, F},     {F, 0},     {F, C}, {C, 0}};
    /* clang-format on */
    PlainModel m = {c, NULL, 0};
    m.tensor = (Plain *)xcalloc(12 * c.L + 4, sizeof *m.tensor);
    add_plain(&m, "wte.weight", c.V, C);
    add_plain(&m, "wpe.weight", c.P, C);
    for (size_t l = 0; l < c.L; l++)
        for (int i = 0; i < 12; i++) {
            char name[NAME_SIZE];
            snprintf(name, sizeof name, "h.%zu.%s", l, parts[i]);
            add_plain(&m, name, shapes[i][0], shapes[i][1]);
        }
    add_plain(&m, "ln_f.weight", C, 0);
    add_plain(&m, "ln_f.bias", C, 0);
    return m;
}

static void free_plain(PlainModel *m)
{
    for (size_t i = 0; i < m->n; i++) free(m->tensor[i].x);
    free(m->tensor);
}

static const Plain *find_plain(const PlainModel *m, const char *name)
{
    for (size_t i = 0; i < m->n; i++)
        if (!strcmp(m->tensor[i].name, name)) return &m->tensor[i];
    return NULL;
}

/* Weights, first and second moments must not be taken for each other, so the moments are -1 and 2
 * times the weights. */
static float factor(const char *prefix)
{
    if (*prefix == 'm') return -1;
    if (*prefix == 'v') return 2;
    return 1;
}

static int is_times(const char *data, const Plain *p, float factor)
{
    for (size_t i = 0; i < p->n; i++) {
        float x = factor * p->x[i];
        if (memcmp(data + 4 * i, &x, 4)) return 0;
    }
    return 1;
}

/* Writes all tensors with this prefix, and with `second` all again with that one. skip names a
 * tensor to leave out. extra is the beginning of one more entry of the header, whose
 * extra_bytes of data are zero. */
static void put_model(const char *folder, const char *file, const PlainModel *m, const char *prefix,
                      const char *second, const char *skip, const char *extra, size_t extra_bytes)
{
    char *header = NULL, *data = NULL;
    size_t header_size, data_size, at = 0;
    FILE *h = open_memstream(&header, &header_size), *d = open_memstream(&data, &data_size);
    fprintf(h, "{\"__metadata__\":{\"step\":\"12\",\"rate\":\"0.5\",\"odd\":\"1 \"}");
    for (int pass = 0; pass < (second ? 2 : 1); pass++)
        for (size_t i = 0; i < m->n; i++) {
            const Plain *p = &m->tensor[i];
            if (skip && !strcmp(skip, p->name)) continue;
            const char *begin = pass ? second : prefix;
            fprintf(h, ",\"%s%s\":{\"dtype\":\"F32\",\"shape\":[%zu", begin, p->name, p->shape[0]);
            if (p->dims == 2) fprintf(h, ",%zu", p->shape[1]);
            fprintf(h, "],\"data_offsets\":[%zu,%zu]}", at, at + 4 * p->n);
            for (size_t e = 0; e < p->n; e++) {
                float x = factor(begin) * p->x[e];
                fwrite(&x, 4, 1, d);
            }
            at += 4 * p->n;
        }
    if (extra) fprintf(h, ",%s,\"data_offsets\":[%zu,%zu]}", extra, at, at + extra_bytes);
    for (size_t i = 0; i < extra_bytes; i++) fputc(0, d);
    fprintf(h, "}");
    fclose(h);
    fclose(d);
    put_safetensors(folder, file, header, data, data_size);
    free(header);
    free(data);
}

static void put_config(const char *folder, const Config *c)
{
    size_t size;
    char *text = config_text(&size, c, -1);
    put_file(folder, "config.json", text, size);
    free(text);
}

/* A rank that has tensors only: for loading and saving. Arrays of it are the caller's to make. */
static Rank rank_of_tensors(const Config *c, Layout s, const Comm *world)
{
    Rank k;
    memset(&k, 0, sizeof k);
    k.config = *c;
    k.layout = s;
    k.world = *world;
    k.tensors = list_tensors(NULL, &k.elements, c, s, world->rank);
    k.tensor = (Tensor *)xcalloc(k.tensors, sizeof *k.tensor);
    list_tensors(k.tensor, NULL, c, s, world->rank);
    k.weights = (act *)device_calloc(k.elements * sizeof(act));
    return k;
}

/* A run of ranks that loads from one folder and saves to another. */
typedef struct {
    Layout layout;
    const PlainModel *model; /* what must be loaded */
    const char *from, *to;
    const Metadata *fact;
    /* wrong: elements that differ; padding: elements of padding that are not zero */
    size_t facts, wrong, padding;
    int master, moments;
} LoadSave;

static void count_wrong(LoadSave *job, const Tensor *list, size_t n, const act *weights,
                        const real *other, float times, int r)
{
    size_t wrong = 0, padding = 0;
    for (size_t i = 0; i < n; i++) {
        char name[NAME_SIZE];
        const Tensor *t = &list[i];
        const Plain *p = find_plain(job->model, tensor_name(name, t));
        for (size_t row = 0; row < t->local_rows; row++)
            for (size_t col = 0; col < t->local_cols; col++) {
                size_t at = t->offset + row * t->local_cols + col;
                size_t y = row < unpadded_rows(t, r) ? whole_row(t, r, row) : 0;
                size_t x = whole_col(t, r) + col;
                float seen = weights ? (float)weights[at] : (float)other[at], expected;
                if (row >= unpadded_rows(t, r)) {
                    padding += seen != 0;
                    continue;
                }
                expected = times * p->x[t->spec->conv1d ? x * p->shape[1] + y : y * t->cols + x];
                wrong += memcmp(&seen, &expected, sizeof seen) != 0;
            }
    }
    __atomic_add_fetch(&job->wrong, wrong, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&job->padding, padding, __ATOMIC_SEQ_CST);
}

static void load_save_rank(Comm *world, void *arg)
{
    LoadSave *job = (LoadSave *)arg;
    Config c;
    Safetensors model = open_model(&c, job->from);
    Rank k = rank_of_tensors(&c, job->layout, world);
    if (job->master) k.master = (real *)device_calloc(k.elements * sizeof(real));
    if (job->moments) k.m = (real *)device_calloc(k.elements * sizeof(real));
    if (job->moments) k.v = (real *)device_calloc(k.elements * sizeof(real));
    int r = tp_rank(job->layout, world->rank);
    if (job->moments) {
        Safetensors trainer = open_trainer(job->from, &c);
        load_rank(&k, &model, &trainer);
        safetensors_close(&trainer);
        count_wrong(job, k.tensor, k.tensors, NULL, k.m, factor("m."), r);
        count_wrong(job, k.tensor, k.tensors, NULL, k.v, factor("v."), r);
    } else load_rank(&k, &model, NULL);
    count_wrong(job, k.tensor, k.tensors, k.weights, NULL, factor(""), r);
    if (k.master) count_wrong(job, k.tensor, k.tensors, NULL, k.master, factor(""), r);
    /* a save must write the masters, so the weights are zeroed */
    if (k.master) device_zero(k.weights, k.elements * sizeof *k.weights);
    if (job->to) save_checkpoint(&k, job->to, NULL, -1, job->fact, job->facts);
    safetensors_close(&model);
    device_free(k.weights);
    device_free(k.master);
    device_free(k.m);
    device_free(k.v);
    free(k.tensor);
}

static void load_save(void *arg)
{
    LoadSave *job = (LoadSave *)arg;
    run_ranks(world_size(job->layout), load_save_rank, job);
}

static void load_alone(void *folder)
{
    Layout one = {1, 1, 1};
    Comm world;
    Config c;
    Safetensors model = open_model(&c, (const char *)folder);
    memset(&world, 0, sizeof world);
    Rank k = rank_of_tensors(&c, one, &world);
    load_rank(&k, &model, NULL);
}

/* V is a prime. With four tensor ranks, one holds only padding. Heads are 17 wide, so
 * that blocks of 64 do not end with a head. The token embedding is large enough to be
 * copied by several threads. */
static Config odd_config(void)
{
    Config c = make_config(4, 68, 4, 7, 1031);
    c.F = 132;
    return c;
}

static void test_checkpoint_layouts(void)
{
    static const int sizes[3] = {1, 2, 4};
    static const Metadata facts[] = {
        {"step", "1234567890123"}, {"loss \"scale\"", "65536.5"}, {"note", "a\nb"}};
    char root[PATH_MAX], from[PATH_MAX], to[PATH_MAX];
    make_checkpoint_folder(root);
    PlainModel model = plain_model(odd_config());
    join_path(from, root, "from");
    mkdir(from, 0777);
    put_config(from, &model.config);
    put_model(from, "model.safetensors", &model, "transformer.", NULL, NULL, NULL, 0);
    put_model(from, "trainer.safetensors", &model, "m.", "v.", NULL, NULL, 0);

    size_t wrong = 0, padding = 0, differ = 0, again = 0;
    for (int i = 0; i < 10; i++) {
        Layout layout = {sizes[i % 3], sizes[i / 3 % 3], 1};
        if (i == 9) {
            layout.tp = 2;
            layout.pp = 2;
            layout.dp = 2;
        }
        LoadSave job = {layout, &model, from, join_path(to, root, "to"), facts, 3, 0, 0, i & 1, 1};
        load_save(&job);
        wrong += job.wrong;
        padding += job.padding;

        char path[PATH_MAX]; /* compare the saved tensors with the plain model */
        Safetensors saved[2] = {safetensors_open(to),
                                safetensors_open(join_path(path, to, "trainer.safetensors"))};
        for (size_t j = 0; j < 3 * model.n; j++) {
            static const char *const prefix[3] = {"transformer.", "m.", "v."};
            char name[NAME_SIZE];
            const Plain *p = &model.tensor[j % model.n];
            snprintf(name, sizeof name, "%s%.40s", prefix[j / model.n], p->name);
            const StoredTensor *t = find_stored(&saved[j >= model.n], name);
            if (!t || t->dtype != F32 || t->n != p->n ||
                !is_times(t->data, p, factor(prefix[j / model.n])))
                differ++;
        }
        differ += saved[0].tensors != model.n || saved[1].tensors != 2 * model.n;
        check_true("facts come back",
                   metadata_count(&saved[1], "step") == 1234567890123 &&
                       metadata_number(&saved[1], "loss \"scale\"", 0, 1e6) == 65536.5 &&
                       !strcmp(find_metadata(&saved[1], "note"), "a\nb"));
        safetensors_close(&saved[0]);
        safetensors_close(&saved[1]);

        /* and load it in another layout */
        Layout other = {sizes[(i + 1) % 3], sizes[(i / 3 + 1) % 3], 1};
        LoadSave back = {other, &model, to, NULL, NULL, 0, 0, 0, 0, 1};
        load_save(&back);
        again += back.wrong + back.padding;
    }
    check_equal("loaded in 10 layouts: elements that differ in a bit", (double)wrong, 0);
    check_equal("padding that is not zero", (double)padding, 0);
    check_equal("saved in 10 layouts: tensors that differ", (double)differ, 0);
    check_equal("loaded again in other layouts: elements that differ", (double)again, 0);

    Map map = map_file(join_path(to, root, "to/model.safetensors"));
    uint64_t length;
    memcpy(&length, map.data, 8);
    check_equal("the data begins on a cache line", (double)((8 + length) % 64), 0);
    check_true("names begin with transformer.",
               memmem(map.data, length,
                      "{\"__metadata__\":{\"format\":\"pt\"},\"transformer.wte.weight\"",
                      56) == map.data + 8);
    unmap_file(map);
    free_plain(&model);
    remove_checkpoint_folder(root);
}

static void open_model_quietly(void *folder)
{
    Config c;
    open_model(&c, (const char *)folder);
}

static void open_trainer_quietly(void *folder)
{
    Config c = make_config(1, 8, 2, 4, 12);
    Safetensors s = open_trainer((const char *)folder, &c);
    metadata_count(&s, "step");
    metadata_number(&s, "rate", 0.25, 0.75);
    safetensors_close(&s);
}

static void read_odd_fact(void *folder)
{
    Config c = make_config(1, 8, 2, 4, 12);
    Safetensors s = open_trainer((const char *)folder, &c);
    metadata_number(&s, "odd", 0, 2);
}

static void read_half_count(void *folder)
{
    Config c = make_config(1, 8, 2, 4, 12);
    Safetensors s = open_trainer((const char *)folder, &c);
    metadata_count(&s, "rate");
}

static void read_missing_fact(void *folder)
{
    Config c = make_config(1, 8, 2, 4, 12);
    Safetensors s = open_trainer((const char *)folder, &c);
    find_metadata(&s, "seed");
}

/* What the folder of a model may hold, and what it may not. */
static void test_model_folders(void)
{
    char folder[PATH_MAX];
    Config c;
    make_checkpoint_folder(folder);
    PlainModel m = plain_model(make_config(1, 8, 2, 4, 12));
    static const struct {
        const char *what, *skip, *extra;
        size_t bytes;
        const char *message;
    } folders[] = {
        {"all tensors", NULL, NULL, 0, NULL},
        {"with mask buffers", NULL, "\"h.0.attn.bias\":{\"dtype\":\"U8\",\"shape\":[1,1,4,4]", 16,
         NULL},
        {"with masked_bias", NULL, "\"h.0.attn.masked_bias\":{\"dtype\":\"F16\",\"shape\":[]", 2,
         NULL},
        {"a missing tensor", "h.0.mlp.c_fc.bias", NULL, 0,
         "h.0.mlp.c_fc.bias [32] of config.json is missing"},
        {"an unknown tensor", NULL, "\"h.0.attn.rotary\":{\"dtype\":\"F32\",\"shape\":[2]", 8,
         "h.0.attn.rotary has no place"},
        {"a layer too many", NULL, "\"h.1.ln_1.bias\":{\"dtype\":\"F32\",\"shape\":[8]", 32,
         "h.1.ln_1.bias has no place"},
        {"a transposed matrix", "h.0.mlp.c_fc.weight",
         "\"h.0.mlp.c_fc.weight\":{\"dtype\":\"F32\",\"shape\":[32,8]", 1024,
         "is [32, 8], but config.json asks for [8, 32]"},
        {"another number of dimensions", "ln_f.bias",
         "\"ln_f.bias\":{\"dtype\":\"F32\",\"shape\":[8,1]", 32, "is [8, 1]"},
        {"whole numbers", "ln_f.bias", "\"ln_f.bias\":{\"dtype\":\"I32\",\"shape\":[8]", 32,
         "is of type I32"},
        {"an untied head", NULL, "\"lm_head.weight\":{\"dtype\":\"F32\",\"shape\":[12,8]", 384,
         "untied"},
        {"a head of another size", NULL, "\"lm_head.weight\":{\"dtype\":\"F32\",\"shape\":[0]", 0,
         "untied"},
    };
    put_config(folder, &m.config);
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        put_model(folder, "model.safetensors", &m, "", NULL, folders[i].skip, folders[i].extra,
                  folders[i].bytes);
        if (folders[i].message)
            check_dies(folders[i].what, open_model_quietly, folder, folders[i].message);
        else {
            Safetensors s = open_model(&c, folder);
            check_true(folders[i].what, s.tensors == m.n + (folders[i].extra != NULL));
            safetensors_close(&s);
        }
    }

    /* zero, like the extra tensor of put_model(): so the head equals wte */
    float *wte = m.tensor[0].x;
    memset(wte, 0, 4 * m.tensor[0].n);
    put_model(folder, "model.safetensors", &m, "", NULL, NULL,
              "\"lm_head.weight\":{\"dtype\":\"F32\",\"shape\":[12,8]", 384);
    static const char untied[] =
        "{\"model_type\":\"gpt2\",\"n_layer\":1,\"n_embd\":8,\"n_head\":2,\"vocab_size\":12,"
        "\"n_positions\":4,\"tie_word_embeddings\":false}";
    put_file(folder, "config.json", untied, sizeof untied - 1);
    Safetensors s = open_model(&c, folder);
    check_true("a head that equals wte", find_stored(&s, "lm_head.weight") != NULL);
    safetensors_close(&s);
    put_model(folder, "model.safetensors", &m, "", NULL, NULL, NULL, 0);
    check_dies("untied by config.json, without a head", open_model_quietly, folder,
               "lm_head.weight is missing");

    put_config(folder, &m.config);
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        float *x = m.tensor[10].x;
        x[17] = bad[i];
        put_model(folder, "model.safetensors", &m, "", NULL, NULL, NULL, 0);
        check_dies(i ? "a weight that is infinite" : "a weight that is NaN", load_alone, folder,
                   m.tensor[10].name);
        x[17] = 0;
    }

    check_dies("a model is no checkpoint", open_trainer_quietly, folder,
               "holds no trainer.safetensors");
    put_model(folder, "trainer.safetensors", &m, "m.", "v.", NULL, NULL, 0);
    open_trainer_quietly(folder);
    check_dies("a fact with a blank", read_odd_fact, folder, "\"odd\" is \"1 \"");
    check_dies("a count of 0.5", read_half_count, folder, "not whole");
    check_dies("a missing fact", read_missing_fact, folder, "no \"seed\"");
    put_model(folder, "trainer.safetensors", &m, "m.", NULL, NULL, NULL, 0);
    check_dies("no second moments", open_trainer_quietly, folder,
               "v.wte.weight [12, 8] of config.json is missing");
    put_model(folder, "trainer.safetensors", &m, "m.", "v.", NULL,
              "\"w.x\":{\"dtype\":\"F32\",\"shape\":[1]", 4);
    check_dies("an unknown moment", open_trainer_quietly, folder, "w.x is no moment");
    free_plain(&m);
    remove_checkpoint_folder(folder);
}

/* ---- Saving over what is there --------------------------------------------------------------- */

static void check_folder_quietly(void *dir) { check_save_folder((const char *)dir, NULL); }

static void check_from_within(void *dir)
{
    if (!chdir((const char *)dir)) check_save_folder(".", ".");
}

typedef struct {
    Config config;
    const char *dir;
    real value;   /* of every weight and moment */
    int exchange; /* 0: as on a system that cannot exchange folders */
    int ready;    /* a pipe to tell that a save is done */
} Save;

/* Saves with one rank. Without exchange it does what save_checkpoint() does where
 * exchange_folders() fails. */
static void save_value(Comm *world, void *arg)
{
    Save *job = (Save *)arg;
    Layout one = {1, 1, 1};
    Rank k = rank_of_tensors(&job->config, one, world);
    real *x = (real *)xcalloc(k.elements, sizeof *x);
    Metadata fact = {"value", ""};
    snprintf(fact.value, sizeof fact.value, "%.17g", (double)job->value);
    for (size_t i = 0; i < k.elements; i++) x[i] = job->value;
    act_upload(k.weights, x, k.elements);
    k.m = x;
    k.v = x;
    if (job->exchange || access(job->dir, F_OK)) save_checkpoint(&k, job->dir, NULL, -1, &fact, 1);
    else {
        SavePaths p = save_paths(job->dir), there = p;
        snprintf(there.dir, PATH_MAX, "%.4000s.next", p.dir);
        save_checkpoint(&k, there.dir, NULL, -1, &fact, 1);
        delete_folder(p.tmp, NULL);
        rename(there.dir, p.tmp);
        step_aside(&p);
        delete_folder(p.old, p.dir);
    }
    device_free(k.weights);
    free(x);
    free(k.tensor);
}

/* The value that all elements of the checkpoint in dir have; NaN if they differ. */
static double saved_value(const char *dir)
{
    Config c;
    Safetensors model = open_model(&c, dir), trainer = open_trainer(dir, &c);
    double value = metadata_number(&trainer, "value", -1e9, 1e9);
    for (size_t i = 0; i < model.tensors; i++)
        for (size_t e = 0; e < model.tensor[i].n; e++)
            value = stored_value(&model.tensor[i], e) == value ? value : NAN;
    for (size_t i = 0; i < trainer.tensors; i++)
        for (size_t e = 0; e < trainer.tensor[i].n; e++)
            value = stored_value(&trainer.tensor[i], e) == value ? value : NAN;
    safetensors_close(&model);
    safetensors_close(&trainer);
    return value;
}

static int holds(const char *folder, const char *name, const char *content)
{
    char path[PATH_MAX];
    if (!file_exists(folder, name)) return 0;
    Map map = map_file(join_path(path, folder, name));
    int same = map.size == strlen(content) && !memcmp(map.data, content, map.size);
    unmap_file(map);
    return same;
}

static void save_too_large(void *arg)
{
    Save *job = (Save *)arg;
    /* largest size of a file, in bytes: acts like a full disk */
    struct rlimit limit = {20000, 20000};
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    job->value = 9;
    run_ranks(1, save_value, job);
}

static void save_nan(void *arg)
{
    Save *job = (Save *)arg;
    job->value = NAN;
    run_ranks(1, save_value, job);
}

static void test_save_folders(void)
{
    if (!have_forked_threads()) return;
    char root[PATH_MAX], dir[PATH_MAX], other[PATH_MAX], linked[PATH_MAX], path[PATH_MAX];
    make_checkpoint_folder(root);
    join_path(dir, root, "run");
    join_path(other, root, "other");
    join_path(linked, root, "link");
    Save job = {make_config(1, 32, 2, 4, 12), dir, 1, 1, -1};

    check_save_folder(dir, NULL);
    check_true("a folder that is not there is good, and not created",
               !file_exists(root, "run") && !file_exists(root, "run.tmp"));
    mkdir(dir, 0777);
    check_save_folder(dir, NULL);
    run_ranks(1, save_value, &job);
    check_equal("the first checkpoint, into an empty folder", saved_value(dir), 1);
    check_dies("a checkpoint that is not this run's", check_folder_quietly, dir,
               "--resume this one");
    check_save_folder(dir, dir);
    join_path(path, root, "./run/");
    check_save_folder(path, dir);

    put_file(dir, "notes.txt", "mine", 4);
    check_dies("the working folder", check_from_within, dir, "is the working folder");
    check_dies("a folder with other files", check_folder_quietly, dir,
               "holds notes.txt already: save to a new folder");
    check_save_folder(dir, dir);
    if (symlink("run", linked)) die("cannot create %s: %s", linked, strerror(errno));
    for (int exchange = 0; exchange < 2; exchange++) {
        job.value = (real)(2 + exchange);
        job.exchange = exchange;
        job.dir = exchange ? linked : dir;
        run_ranks(1, save_value, &job);
        check_equal(exchange ? "saved through a link, by exchange" : "saved by stepping aside",
                    saved_value(dir), 2 + exchange);
        check_true("the user's own file has come along", holds(dir, "notes.txt", "mine"));
        check_true("nothing else is left",
                   !file_exists(root, "run.tmp") && !file_exists(root, "run.old"));
    }
    check_true("the link is still one", readlink(linked, path, sizeof path) == 3);

    check_dies("a disk that is too small", save_too_large, &job,
               "File too large; an earlier checkpoint is as it was");
    check_true("what had been written is deleted", !file_exists(root, "run.tmp"));
    check_dies("weights that are NaN", save_nan, &job, "not saved");
    check_equal("the last checkpoint is whole", saved_value(dir), 3);
    check_save_folder(dir, dir);
    check_true("what was left behind is cleared away", !file_exists(root, "run.tmp"));

    mkdir(other, 0777);
    put_file(other, "model.safetensors", "mine", 4);
    check_dies("somebody's model", check_folder_quietly, other, "holds model.safetensors already");
    check_true("is not touched", holds(other, "model.safetensors", "mine"));
    check_dies("a file", check_folder_quietly, join_path(path, root, "run/notes.txt"),
               "cannot be opened as a folder");
    check_dies("no name", check_folder_quietly, (void *)"", "name of a folder");
    check_dies("a folder that cannot be created", check_folder_quietly,
               join_path(path, root, "no/run"), "cannot create");
    rename(other, join_path(path, root, "run.tmp"));
    put_file(path, "poem.txt", "mine", 4);
    join_path(other, root, "run");
    rename(other, join_path(path, root, "kept"));
    check_dies("somebody's run.tmp", check_folder_quietly, other, "there is poem.txt in it");
    check_true("is not touched either",
               holds(join_path(path, root, "run.tmp"), "poem.txt", "mine") &&
                   holds(path, "model.safetensors", "mine"));
    job.dir = other;
    check_dies("nor is it later", save_nan, &job, "cannot delete");
    check_true("the poem is still there", holds(path, "poem.txt", "mine"));
    remove_checkpoint_folder(path);

    join_path(path, root, "kept");
    rename(path, join_path(linked, root, "run.old"));
    recover_checkpoint(other);
    check_true("a .old without a .tmp is not our business", !file_exists(root, "run"));
    mkdir(join_path(path, root, "run.tmp"), 0777);
    recover_checkpoint(other);
    check_equal("an interrupted swap is undone", saved_value(other), 3);
    remove_checkpoint_folder(root);
}

/* Saves the values 1, 2, 3, .. for ever. Writes a byte to the pipe after each. */
static void save_for_ever(Save *job)
{
    for (job->value = 1;; job->value++) {
        run_ranks(1, save_value, job);
        if (write(job->ready, "x", 1) != 1) _exit(1);
    }
}

/* Can the file system exchange folders? Linux's own file systems can. */
static int can_exchange(const char *root)
{
    char a[PATH_MAX], b[PATH_MAX];
    mkdir(join_path(a, root, "a"), 0777);
    mkdir(join_path(b, root, "b"), 0777);
    int can = !exchange_folders(a, b);
    rmdir(a);
    rmdir(b);
    return can;
}

/* A program that saves again and again is killed at arbitrary moments. Then its last complete
 * checkpoint must be there, or the one that it was about to save. Where folders can be exchanged, a
 * checkpoint is there at every moment. */
static void test_save_killed(void)
{
    if (!have_forked_threads()) return;
    char root[PATH_MAX], dir[PATH_MAX];
    int lost = 0, kills = 0, absent = 0;
    /* in memory, since a disk would only be slower */
    const char *memory = access("/dev/shm", W_OK) ? SCRATCH : "/dev/shm";
    for (int trial = 0; trial < 30; trial++) {
        int ends[2], done = 0;
        char c;
        make_folder_in(root, memory);
        if (pipe(ends)) die("cannot make a pipe: %s", strerror(errno));
        Save job = {make_config(1, 32, 2, 4, 12), join_path(dir, root, "run"), 0, trial & 1,
                    ends[1]};
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) save_for_ever(&job);
        close(ends[1]);
        for (int i = 0; i < 2; i++)
            done += read(ends[0], &c, 1) == 1; /* without exchange the first save needs no swap */
        int atomic = job.exchange && can_exchange(root);
        for (double end = seconds() + 4e-4 * trial; seconds() < end;)
            absent += atomic && access(dir, F_OK);
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        while (read(ends[0], &c, 1) == 1) done++;
        close(ends[0]);
        kills++;
        recover_checkpoint(dir);
        double value = file_exists(root, "run") ? saved_value(dir) : NAN;
        lost += !(value == done || value == done + 1);
        remove_checkpoint_folder(root);
    }
    check_equal("kills", kills, 30);
    check_equal("checkpoints lost or torn", lost, 0);
    check_equal("looks at a moment without any", absent, 0);
}

/* ---- info ------------------------------------------------------------------------------------ */

static void test_info(void)
{
    char folder[PATH_MAX], path[PATH_MAX];
    make_checkpoint_folder(folder);
    PlainModel m = plain_model(make_config(2, 8, 2, 4, 12));
    put_config(folder, &m.config);
    put_model(folder, "model.safetensors", &m, "transformer.", NULL, NULL, NULL, 0);
    for (int json = 0; json < 2; json++) {
        fflush(stdout);
        int saved = dup(STDOUT_FILENO);
        int fd = open(join_path(path, folder, "out"), O_RDWR | O_CREAT | O_TRUNC, 0600);
        dup2(fd, STDOUT_FILENO);
        print_info(folder, json);
        fflush(stdout);
        dup2(saved, STDOUT_FILENO);
        close(saved);
        close(fd);
        Map map = map_file(path);
        if (!json) {
            check_true("the shape in words", memmem(map.data, map.size, "[8, 24]", 7) &&
                                                 memmem(map.data, map.size, "28 tensors", 10));
        } else {
            Json j = json_parse(map.data, map.size, path);
            const JsonValue *totals = json_get(&j, j.value, "totals");
            const JsonValue *config = json_get(&j, j.value, "config");
            const JsonValue *tensors = json_get(&j, j.value, "tensors");
            size_t parameters = 12 * 8 + 4 * 8 + 2 * (12 * 64 + 13 * 8) + 2 * 8; /* [P42] */
            check_true("the same as JSON", totals && config && tensors && tensors->length == 28);
            check_equal("parameters",
                        (double)json_integer(&j, config, "parameters", 0, 1 << 30, -1),
                        (double)parameters);
            check_equal("elements", (double)json_integer(&j, totals, "elements", 0, 1 << 30, -1),
                        (double)parameters);
            check_true("in the file's order",
                       !strcmp(json_get(&j, tensors + 1, "name")->string, "wte.weight"));
            json_free(&j);
        }
        unmap_file(map);
    }
    free_plain(&m);
    remove_checkpoint_folder(folder);
}

/* ---- Files of other programs, where shared/fixtures is at hand ------------------------------- */

static void test_fixtures(void)
{
    static const char root[] = "../shared/fixtures";
    static const char *const models[] = {"h01_safetensors", "h02_safetensors_noprefix"};
    char path[PATH_MAX], folder[PATH_MAX];
    if (access(root, F_OK)) {
        skip("../shared/fixtures is not here");
        return;
    }
    for (int i = 0; i < 2; i++) {
        Config c;
        char line[512], name[256], shape[64], hash[128];
        int wrong = 0, tensors = 0;
        snprintf(folder, sizeof folder, "%s/hf/%s", root, models[i]);
        Safetensors s = open_model(&c, folder);
        snprintf(path, sizeof path, "%s/expected/%s.tsv", root, models[i]);
        FILE *table = fopen(path, "r");
        while (table && fgets(line, sizeof line, table) &&
               sscanf(line, "%255s %63s %127s", name, shape, hash) == 3) {
            snprintf(path, sizeof path, "%s/expected/blobs/%s.bin", root, hash);
            Map blob = map_file(path);
            const StoredTensor *t = find_stored(&s, name);
            wrong += !t || t->n * 4 != blob.size;
            for (size_t e = 0; t && e < t->n && 4 * e < blob.size; e++) {
                float expected, seen = (float)stored_value(t, e);
                memcpy(&expected, blob.data + 4 * e, 4);
                wrong += memcmp(&seen, &expected, 4) != 0;
            }
            tensors++;
            unmap_file(blob);
        }
        if (table) fclose(table);
        check_equal(models[i], tensors, 52);
        check_equal("    values that differ", wrong, 0);
        safetensors_close(&s);
    }
    int refused = 0, seen = 0;
    DIR *stream = opendir(join_path(folder, root, "malformed"));
    for (struct dirent *entry; stream && (entry = readdir(stream));) {
        int number = entry->d_name[0] == 'b' ? atoi(entry->d_name + 1) : 0;
        char one[PATH_MAX];
        if (number < 140 || number > 174) continue; /* the others are for convert.c */
        int ok = is_refused(load_alone, join_path(one, folder, entry->d_name));
        if (!ok) printf("    not refused in one line: %s\n", entry->d_name);
        refused += ok;
        seen++;
    }
    if (stream) closedir(stream);
    check("malformed fixtures found, at least 20", 20, seen);
    check_equal("malformed fixtures refused", refused, seen);
}

/* ---- Planner ------------------------------------------------------------------------------------
 *
 * The paper's numbers [P5, P6, P8-P10, P14, P17, P18, P21-P23, P40, P42-P50, P56-P62]. */

static RankOptions plan_case(const char *preset, int tp, int pp, int dp, size_t batch, size_t micro,
                             int recompute)
{
    RankOptions in;
    memset(&in, 0, sizeof in);
    in.config = find_preset(preset);
    in.layout.tp = tp;
    in.layout.pp = pp;
    in.layout.dp = dp;
    in.micro_batch = micro;
    in.micro_batches = batch / micro / (size_t)dp;
    in.seq = in.config.P;
    in.recompute = recompute;
    return in;
}

/* Model j of Table 1 on 2^j tensor ranks and dp replicas, as the paper ran it. */
static RankOptions scaling_case(int j, int dp)
{
    static const char *const name[4] = {"1.2B", "2.5B", "4.2B", "8.3B-scaling"};
    return plan_case(name[j], 1 << j, 1, dp, 8 * (size_t)dp, 8, 1);
}

static void test_plan_parameters(void)
{
    static const char *const name[6] = {"355M", "1.2B", "2.5B", "4.2B", "8.3B", "8.3B-scaling"};
    static const double exact[6] = {355788800,  1213479936, 2490408960,
                                    4199109120, 8317040640, 8317040640};
    static const double per_rank[4] = {355788800, 178493440, 89845760, 45521920};
    static const double padded[4] = {50304, 50432, 50688, 51200};
    for (int i = 0; i < 6; i++) {
        RankOptions in = plan_case(name[i], 1, 1, 1, 1, 1, 0);
        double l = (double)in.config.L, h = (double)in.config.C;
        char what[64];
        snprintf(what, sizeof what, "P42 parameters of %s", name[i]);
        check_equal(what, make_plan(&in).parameters, exact[i]);
        double formula = 12 * l * h * h * (1 + 13 / (12 * h) + (51200 + 1024) / (12 * l * h));
        check("P43 the formula lacks 2h, off by (rounding of 1e10: 2e-6)",
              fabs(exact[i] - formula - 2 * h), 1e-5);
    }
    RankOptions in = plan_case("8.3B", 8, 1, 1, 8, 8, 0);
    Plan plan = make_plan(&in);
    check_equal("P44 8.3B, t=8: parameters of a rank", plan.parameters_per_rank, 1043549184);
    check_equal("P44 sum over the tensor ranks / P, rounded", round(plan.replication * 1e5),
                100377);
    for (int i = 0; i < 4; i++) {
        in = plan_case("355M", 1 << i, 1, 1, 1, 1, 0);
        check_equal("P44 355M, t=1,2,4,8: parameters of a rank", make_plan(&in).parameters_per_rank,
                    per_rank[i]);
        check_equal("P14 50,257 tokens padded", (double)padded_vocab(50257, 1 << i), padded[i]);
    }
    check_equal("P14 dummy tokens at t=8", (double)padded_vocab(50257, 8) - 50257, 943);
    check_equal("P14 tokens of a rank at t=8", (double)padded_vocab(50257, 8) / 8, 6400);
    /* Two stages: both hold the token embedding, padded to 384 x 8. The shapes are counted by hand:
     * C 8, F 32, T 4, L 2. */
    in.config = make_config(2, 8, 2, 4, 300);
    in.layout.tp = 1;
    in.layout.pp = 2;
    in.seq = 4;
    plan = make_plan(&in);
    check_equal("stage 0: 384 padded tokens, positions, one layer", plan.parameters_per_rank,
                384 * 8 + 4 * 8 +
                    (2 * 8 + 24 * 8 + 24 + 8 * 8 + 8 + 2 * 8 + 32 * 8 + 32 + 8 * 32 + 8));
    check_equal("parameters without padding", plan.parameters,
                300 * 8 + 4 * 8 +
                    2 * (2 * 8 + 24 * 8 + 24 + 8 * 8 + 8 + 2 * 8 + 32 * 8 + 32 + 8 * 32 + 8) +
                    2 * 8);
}

/* Runs a reduce-scatter and an all-gather of `n` numbers step by step, as a ring does. `sent`
 * counts the numbers that rank 0 sends in each half. `right` is 1 if all ranks end with the sum. */
static void ring(int t, int n, int sent[2], int *right)
{
    static int x[8][1680];
    int part = n / t;
    sent[0] = sent[1] = 0;
    for (int r = 0; r < t; r++)
        for (int i = 0; i < n; i++) x[r][i] = (r + 1) * (i + 1);
    for (int half = 0; half < 2; half++)
        for (int step = 0; step < t - 1; step++) {
            static int wire[8][1680];
            for (int r = 0; r < t; r++) { /* all send first, then all receive */
                int chunk = (r - step + half + 2 * t) % t;
                memcpy(wire[r], x[r] + chunk * part, (size_t)part * sizeof(int));
                if (r == 0) sent[half] += part;
            }
            for (int r = 0; r < t; r++) {
                int from = (r + t - 1) % t, chunk = (from - step + half + 2 * t) % t;
                for (int i = 0; i < part; i++)
                    x[r][chunk * part + i] = (half ? 0 : x[r][chunk * part + i]) + wire[from][i];
            }
        }
    *right = 1;
    for (int r = 0; r < t; r++)
        for (int i = 0; i < n; i++) *right &= x[r][i] == t * (t + 1) / 2 * (i + 1);
}

static double count_calls(const Message *list, size_t n, const char *group, const char *op,
                          size_t elements)
{
    double calls = 0;
    for (size_t i = 0; i < n; i++)
        if (!strcmp(list[i].group, group) && !strcmp(list[i].op, op) &&
            list[i].elements == elements)
            calls += (double)list[i].count;
    return calls;
}

static void test_plan_messages(void)
{
    static const double share[3] = {1.0, 1.5, 1.75};
    Message list[MAX_MESSAGES];
    for (int i = 0; i < 3; i++) {
        Message m = {"tp", "all_reduce", "", "", (size_t)2 << i, 1, 1680, REAL_ARRAY};
        int sent[2], right;
        ring(2 << i, 1680, sent, &right);
        check_true("a ring of 2, 4, 8 ranks sums", right);
        check_equal("P8 an all-reduce sends 1, 1.5, 1.75 N", elements_sent(&m), share[i] * 1680);
        check_equal("P59 so do reduce-scatter and all-gather, counted", sent[0] + sent[1],
                    share[i] * 1680);
    }

    RankOptions in = scaling_case(3, 1), plain = in;
    plain.recompute = 0;
    size_t n = list_messages(list, &plain, 0), bsh = 8 * 1024 * 3072, bs = 8 * 1024;
    check_equal("P6 4l+2 all-reduces of b*s*h, l=72", count_calls(list, n, "tp", "all_reduce", bsh),
                290);
    check_equal("P17 cross entropy: one MAX of b*s",
                count_calls(list, n, "tp", "all_reduce_max", bs), 1);
    check_equal("P17 cross entropy: two SUM of b*s", count_calls(list, n, "tp", "all_reduce", bs),
                2);
    double moved = 0;
    for (size_t i = 0; i < n; i++)
        if (strstr(list[i].what, "cross entropy"))
            moved += (double)(list[i].count * list[i].elements);
    check_equal("P18 cross entropy moves 24,576 numbers", moved, 24576);
    check_equal("P6 plan, without recomputation", make_plan(&plain).all_reduces_per_iteration, 290);
    check_equal("P6 plan, with recomputation: 6l+2", make_plan(&in).all_reduces_per_iteration, 434);
    for (size_t i = 0; i < n; i++) {
        if (list[i].elements != bsh) continue;
        check_equal("P9 message of b*s*h, fp16, bytes", 2.0 * (double)list[i].elements, 50331648);
        check_equal("P9 a rank of eight sends of it, bytes", 2 * elements_sent(&list[i]), 88080384);
        check_equal("P10 a layer's four, elements", 4 * elements_sent(&list[i]), 176160768);
    }
    /* P5: one more layer needs four more all-reduces. */
    RankOptions deeper = plain;
    deeper.config.L++;
    check_equal("P5 all-reduces of one layer", make_plan(&deeper).all_reduces_per_iteration - 290,
                4);
    RankOptions alone = plan_case("1.2B", 1, 1, 1, 8, 8, 0);
    check_equal("one rank says nothing", (double)list_messages(list, &alone, 0), 0);

    /* 8.3B, d=64, fp16: 4.109 GB of gradients [paper.md §3]. The arena's
     * alignment may add a little. */
    in = scaling_case(3, 64);
    n = list_messages(list, &in, 0);
    for (size_t i = 0; i < n; i++)
        if (!strcmp(list[i].group, "dp"))
            check("gradients sent, fp16, GB: off 4.109 by",
                  fabs(elements_sent(&list[i]) * 2e-9 - 4.109), 5e-4);
    size_t arena;
    list_tensors(NULL, &arena, &in.config, in.layout, 0);
    check_equal("one all-reduce of gradients", count_calls(list, n, "dp", "all_reduce", arena), 1);

    /* Four stages of the tiny shape (L 4, C 128, V 257 -> 512 padded), t=2, d=2, 2
     * micro-batches of 3 x 64 tokens. */
    in = plan_case("tiny", 2, 4, 2, 12, 3, 1);
    size_t message = 3 * 64 * 128, tied = 512 / 2 * 128;
    /* each of 2 micro-batches has 6 for a layer, 1 for the embedding's g, 1 for the logits' f */
    const double in_stage[4] = {14, 12, 12, 14};
    const double sends[4] = {2, 4, 4, 2}, pair[4] = {1, 0, 0, 1}, loss[4] = {0, 0, 0, 2};
    for (int s = 0; s < 4; s++) {
        n = list_messages(list, &in, s);
        check_equal("tp all-reduces of a stage", count_calls(list, n, "tp", "all_reduce", message),
                    in_stage[s]);
        check_equal("sends of a stage", count_calls(list, n, "pp", "send", message), sends[s]);
        check_equal("receives of a stage", count_calls(list, n, "pp", "recv", message), sends[s]);
        check_equal("all-reduces of tied embedding",
                    count_calls(list, n, "embedding", "all_reduce", tied), pair[s]);
        check_equal("largest logits are asked for",
                    count_calls(list, n, "tp", "all_reduce_max", 3 * 64), loss[s]);
    }
    Plan plan = make_plan(&in);
    check_equal("a micro-batch meets 6l+2 on all stages", plan.all_reduces_per_iteration, 26);
    /* The first stage sends most. With t=2 and d=2 a ring sends n numbers for n. Of a layer's
     * parameters, 12CC + 7C are halved (among them the biases of QKV and of the MLP's first layer),
     * and 6C are not. All are multiples of the arena's 64. */
    size_t sharded = 12 * 128 * 128 + 7 * 128, layer = sharded / 2 + 6 * 128;
    size_t parameters = tied + 64 * 128 + layer;
    check_equal("it sends on the first stage", plan.busiest_stage, 0);
    check_equal("elements it sends, and two doubles by ring over 16", plan.bytes_sent_per_rank,
                (double)((14 + 2) * message + tied + parameters) * sizeof(act) +
                    2 * 8 * 2 * 15.0 / 16);
}

/* The numbers of one of the paper's tables. */
typedef struct {
    double value[MAX_ROWS][MAX_CELLS];
} Cells;

static Cells table_cells(const char *key)
{
    Cells cells;
    const Table *t = tables;
    memset(&cells, 0, sizeof cells);
    while (strcmp(t->key, key)) t++;
    for (int r = 0; r < MAX_ROWS && t->label[r]; r++) {
        TableRow row;
        row.n = 0;
        t->fill(&row, t->label[r], r);
        for (size_t c = 0; c < row.n; c++) cells.value[r][c] = row.cell[c].x;
    }
    return cells;
}

static void test_plan_flops(void)
{
    static const double implied[4][2] = {{39, 2.40}, {74.1, 4.14}, {127.9, 7.89}, {240.2, 14.78}};
    static const double table_2_seconds[3] = {1.085, 2.863, 2.648};
    static const double table_2_pflops[3] = {1.51, 3.92, 13.8};
    static const double efficiency[4] = {100, 82, 58.5, 37.25};
    static const double head_1 = 96, head_2[3] = {64, 96, 128}, head_7[3] = {192, 128, 96};
    RankOptions one = plan_case("1.2B", 1, 1, 1, 8, 8, 1);
    RankOptions all = plan_case("8.3B", 8, 1, 64, 512, 8, 1);
    Plan plan = make_plan(&one), plan_all = make_plan(&all);
    check("P46 F(8,1024,40,1536) = 8.6329e13, off by", fabs(plan.flops_per_iteration - 8.6329e13),
          5e8);
    check("P46 F(512,1024,72,3072) = 3.6594e16, off by",
          fabs(plan_all.flops_per_iteration - 3.6594e16), 5e11);
    check("P46 formula = products counted",
          fabs(plan_all.flops_formula / plan_all.flops_per_iteration - 1), 1e-14);
    check("P46 2.214 s at 39 TFLOP/s, off by", fabs(plan.v100_seconds - 2.214), 6e-4);
    one.recompute = 0;
    /* A layer's forward pass takes 24Bsh^2 + 4Bs^2h, the logits take 2BshV; all
     * passes take three times that. */
    double h = 1536, rows = 8 * 1024, layer = 24 * rows * h * h + 4 * rows * 1024 * h;
    double count = 3 * (40 * layer + 2 * rows * h * 51200);
    check("without recomputation, off by", fabs(make_plan(&one).flops_per_iteration / count - 1),
          1e-14);
    check("formula, without recomputation, off by", fabs(make_plan(&one).flops_formula / count - 1),
          1e-14);
    RankOptions padded = plan_case("124M", 8, 1, 1, 1, 1, 0); /* 50,257 tokens become 51,200 */
    plan = make_plan(&padded);
    check("padding costs 6BsC for each of 943 tokens, off by",
          fabs((plan.flops_per_iteration - plan.flops_formula) / (6.0 * 1024 * 768 * 943) - 1),
          1e-5);

    Cells t1 = table_cells("table1"), t2 = table_cells("table2"), t4 = table_cells("figure4");
    Cells t5 = table_cells("figure5"), t7 = table_cells("table7"), t8 = table_cells("table8");
    Cells total = table_cells("totals");
    check_equal("P47 tokens of an epoch", total.value[0][0], 35917398016);
    check_equal("P47 tokens of 300,000 iterations", total.value[0][1], 157286400000);
    check_equal("P47 epochs, rounded", round(total.value[0][2] * 1e3), 4379);
    check_equal("P48 15.1 PFLOP/s are", round(total.value[0][3] * 1e3), 756);
    check_equal("P48 74% are, PFLOP/s", round(total.value[0][4] * 100), 1478);
    for (int r = 0; r < 4; r++) {
        check_equal("P45 Table 1: h/heads", t1.value[r][2], head_1);
        check_equal("P49 Table 8: efficiency", t8.value[r][1], efficiency[r]);
        check("P50 Figure 5 x 39 TF, off by", fabs(t5.value[r][4] * 1e3 - implied[r][0]), 0.06);
        check("P50 Figure 5 x 39 TF, with data parallelism, off by",
              fabs(t5.value[r][9] - implied[r][1]), 0.006);
        check_equal("P18 logits a gather would move", t4.value[r][8], 419430400);
    }
    check_equal("Figure 4: bytes sent for a layer of 8.3B [calc]", t4.value[3][6], 352321536);
    for (int r = 0; r < 3; r++) {
        check_equal("P45 Table 2: h/heads", t2.value[r][3], head_2[r]);
        check_equal("P45 Table 7: h/heads", t7.value[r][0], head_7[r]);
        check("Table 2: seconds an iteration, off by", fabs(t2.value[r][7] - table_2_seconds[r]),
              6e-4);
        check("Table 2: PFLOP/s, off by", fabs(t2.value[r][9] - table_2_pflops[r]),
              r == 2 ? 0.06 : 0.006);
    }
}

/* The projection against separate arithmetic: seconds = products / rate + (4l+2 or 6l+2) ring
 * all-reduces of b*s*h. With the constants of NVIDIA's v1.0 this gives 94.6 / 87.3 / 79.4%
 * (published: 90.7 / 86.5 / 79.6). */
static void test_plan_projection(void)
{
    static const double hidden[4] = {1536, 1920, 2304, 3072}, layers[4] = {40, 54, 64, 72};
    /* 62.4 TFLOP/s, 130 GB/s, recomputed */
    static const double v1_gpu[4] = {1, 0.946, 0.873, 0.794};
    for (int r = 0; r < 4; r++) {
        RankOptions in = scaling_case(r, 1), plain = in;
        Machine v1 = {62.4e12, 130e9, 1, 15e-6, 16, 2}, h200 = {560e12, 365e9, 1, 15e-6, 8, 2};
        double h = hidden[r], l = layers[r], t = 1 << r, rows = 8 * 1024;
        /* attention scores are counted in full */
        double work = rows * (6 * (12 * l * h * h + 51200 * h) + 6 * l * h * 1024 * 2);
        double compute = work / (t * 560e12), talk = 0;
        if (r > 0) talk = (4 * l + 2) * (2 * (t - 1) / t * 2 * rows * h / 365e9 + 15e-6);
        plain.recompute = 0;
        double flops = flops_exact(&plain.config, 1 << r, 8, 1024, 0);
        /* The formula leaves out the three messages of the cross entropy: 45 us of
         * latency, and little else. */
        check("H200 seconds, relative to arithmetic",
              fabs(project(&plain, &h200, flops, 0) / (compute + talk) - 1), 1e-3);
        flops = flops_exact(&in.config, 1 << r, 8, 1024, 1);
        double efficiency = flops / (t * 62.4e12) / project(&in, &v1, flops, 0);
        check("V100 efficiency, off by", fabs(efficiency - v1_gpu[r]), 4e-3);
    }
    /* Bubble: four stages, eight micro-batches and free messages take 1.375 times as long. */
    RankOptions deep = plan_case("8.3B", 1, 4, 1, 8, 1, 1);
    Machine free_talk = {1e12, 1e30, 1e30, 0, 64, 2};
    double bubble = make_plan(&deep).bubble;
    check("bubble of 3/8 in time, off by", fabs(project(&deep, &free_talk, 4e12, bubble) - 1.375),
          1e-12);
}

static void test_plan_memory(void)
{
    RankOptions in = plan_case("1.2B", 1, 1, 1, 8, 8, 0);
    Plan plan = make_plan(&in);
    double layer = 8.0 * 1024 * 1536;
    check("P58 1.2B: 34 + 5as/h = 87.33, off by",
          fabs(megatron_activation_bytes(&in.config, 1, 8, 1024, 0) / layer - 87.33), 5e-3);
    check("P58 1.2B: 43.96 GB stored, off by", fabs(plan.paper_activation_bytes / 1e9 - 43.96),
          5e-3);
    in.recompute = 1;
    plan = make_plan(&in);
    check("P58 1.2B: 1.007 GB recomputed, off by", fabs(plan.paper_activation_bytes / 1e9 - 1.007),
          5e-4);
    check("1.2B: 20 bytes a parameter are 24.27 GB, off by", fabs(plan.paper_bytes / 1e9 - 24.27),
          5e-3);
    check("1.2B: weights, relative to bytes of a parameter (alignment)",
          fabs(plan.weights_bytes / sizeof(act) / 1213479936 - 1), 1e-6);
    double parts = plan.weights_bytes + plan.gradient_bytes + plan.moment_bytes + plan.master_bytes;
    check_equal("a rank's memory is its parts", plan.bytes_per_rank, parts + plan.activation_bytes);
    check_equal("two moments", plan.moment_bytes / sizeof(real),
                2 * plan.weights_bytes / sizeof(act));
    check_equal("activations are chapter 8's", plan.activation_bytes,
                (double)activation_bytes(&in.config, in.layout, 0, 8, 1024, 1, 1));
    in = scaling_case(3, 1);
    layer = 8.0 * 1024 * 3072;
    check("8.3B, t=8: 10 + 24/8 + 5as/(8h) = 19.67, off by",
          fabs(megatron_activation_bytes(&in.config, 8, 8, 1024, 0) / layer - 19.67), 5e-3);
    in = plan_case("8.3B", 8, 4, 1, 64, 1, 1);
    size_t last = activation_bytes(&in.config, in.layout, 24, 1, 1024, 1, 64);
    size_t first = activation_bytes(&in.config, in.layout, 0, 1, 1024, 1, 64);
    plan = make_plan(&in);
    check_true("the first of four stages keeps most activations", first > last);
    check_equal("it is the one that is planned", plan.activation_bytes, (double)first);
    double weights = 7424.0 * 3072 + 18 * (12.0 * 3072 * 3072 / 8 + 7.0 * 3072 / 8 + 6 * 3072);
    check_equal("its weights: 6400 tokens, 1024 positions, 18 layers",
                plan.weights_bytes / sizeof(act), weights);
    in = scaling_case(3, 64);
    plan = make_plan(&in);
    check("300,000 iterations in days by P61, off by",
          fabs(plan.v100_days * plan.v100_efficiency -
               8 * 157286400000. * 8317040640 / (512 * 39e12) / 86400),
          1e-9);
    check_equal("P60 ZeRO, 7.5B on 64, GB: stage 0", zero_bytes(0, 64) * 7.5, 120);
    check_equal("P60 ZeRO stage 1", zero_bytes(1, 64) * 7.5, 31.40625);
    check_equal("P60 ZeRO stage 2", zero_bytes(2, 64) * 7.5, 16.640625);
    check_equal("P60 ZeRO stage 3", zero_bytes(3, 64) * 7.5, 1.875);
    check("P61 GPT-3: 33.9 days, off by", fabs(training_days(300e9, 175e9, 1024, 140e12) - 33.9),
          0.06);
    check("P61 1T parameters (450 G tokens, 3072 GPUs, 163 TF): 83.2, off by",
          fabs(training_days(450e9, 1e12, 3072, 163e12) - 83.2), 0.06);
}

/* P62: cp ranks share the 2cp chunks of a sequence. Rank r takes chunks r and 2cp-1-r. Under a
 * causal mask all have equal work. */
static void test_plan_zigzag(void)
{
    for (int cp = 2; cp <= 8; cp *= 2) {
        int entries[8] = {0}, chunk = 4, unequal = 0;
        for (int q = 0; q < 2 * cp * chunk; q++) {
            int c = q / chunk;
            /* a query sees itself and all tokens before it */
            entries[c < cp ? c : 2 * cp - 1 - c] += q + 1;
        }
        for (int r = 1; r < cp; r++) unequal += entries[r] != entries[0];
        check_equal("P62 zigzag: ranks whose causal work differs", unequal, 0);
    }
}

static void test_plan_groups(void)
{
    static const int tp[8] = {0, 0, 1, 1, 2, 2, 3, 3}, dp[8] = {0, 1, 0, 1, 0, 1, 0, 1};
    Layout eight = {2, 1, 4}, paper = {8, 1, 64};
    int wrong = 0, members[64] = {0}, replicas[8] = {0};
    for (int r = 0; r < 8; r++) wrong += tp_color(eight, r) != tp[r] || dp_color(eight, r) != dp[r];
    check_equal("P22 world 8, t=2: {0,1}{2,3}{4,5}{6,7}, {0,2,4,6}{1,3,5,7}", wrong, 0);
    for (int r = 0; r < 512; r++) {
        members[tp_color(paper, r)]++;
        replicas[dp_color(paper, r)]++;
        wrong += tp_color(paper, r) != r / 8; /* tensor groups are neighbours */
        /* counted from 1: ranks 1, 9, .., 505 */
        wrong += (dp_color(paper, r) == dp_color(paper, 0)) != (r % 8 == 0);
    }
    for (int g = 0; g < 64; g++) wrong += members[g] != 8;
    for (int g = 0; g < 8; g++) wrong += replicas[g] != 64;
    check_equal("P22, P23 512 ranks: 64 groups of 8, 8 of 64, the first 1, 9, .., 505", wrong, 0);
    /* With stages: a stage is a block of t*d ranks; a pipeline takes one rank of each stage. */
    Layout cube = {2, 3, 4};
    for (int r = 0; r < 24; r++) wrong += pp_rank(cube, r) != r / 8 || pp_color(cube, r) != r % 8;
    for (int r = 0; r < 24; r++)
        for (int q = 0; q < 24; q++) {
            int same = q == r || (r % 8 == q % 8 && r / 8 != 1 && q / 8 != 1);
            wrong += (embedding_color(cube, r) == embedding_color(cube, q)) != same;
        }
    check_equal("stages, pipelines, embedding pairs of 2 x 3 x 4", wrong, 0);
}

/* The loss of a model that has learnt nothing. x is a LayerNorm's output with |x|^2 = h, and token
 * embeddings are N(0, 0.02). So logits are N(0, 0.0004 h), and log sum exp is ln V + 0.0002 h. The
 * mean over 32 rows deviates by 3.1e-3/sqrt(32) = 5.5e-4. */
static void test_initial_loss(void)
{
    enum { V = 51200, SAMPLES = 32 };
    real *z = (real *)xcalloc(V, sizeof *z);
    double mean = 0;
    check_equal("P21 ln 51,200, rounded", round(log(51200) * 1e6), 10843495);
    for (int row = 0; row < SAMPLES; row++) {
        double sum = 0;
        random_normals(z, 7, SITE_SAMPLE, (size_t)row * V, V);
        for (int i = 0; i < V; i++) sum += exp(0.02 * sqrt(1024) * (double)z[i]);
        mean += log(sum) / SAMPLES;
    }
    check("P21 initial loss, h=1024: 11.0483, off by", fabs(mean - (log(51200) + 0.0002 * 1024)),
          2.5e-3);
    free(z);
    /* P40, on weights of init_params(). They are 276,480 or more, so one sigma is 0.13%. */
    static const size_t depth[2] = {24, 72};
    static const double std[2] = {0.0028868, 0.0016667};
    for (int i = 0; i < 2; i++) {
        Config c = make_config(depth[i], 48, 2, 8, 64);
        Layout one = {1, 1, 1};
        size_t elements, n = list_tensors(NULL, &elements, &c, one, 0), drawn = 0;
        Tensor *list = (Tensor *)xcalloc(n, sizeof *list);
        act *w = (act *)xcalloc(elements, sizeof *w);
        double squares = 0;
        list_tensors(list, NULL, &c, one, 0);
        init_params(w, list, n, &c, 1, 0);
        for (size_t j = 0; j < n; j++) {
            if (!strstr(list[j].spec->name, "c_proj.weight")) continue;
            for (size_t e = 0; e < list[j].n; e++)
                squares += (double)w[list[j].offset + e] * w[list[j].offset + e];
            drawn += list[j].n;
        }
        double measured = sqrt(squares / (double)drawn);
        check("P40 deviation of output projections, N=24, 72: off by", fabs(measured / std[i] - 1),
              0.006);
        free(list);
        free(w);
    }
}

/* A second simulator of another kind. Time runs in ticks; each pass takes tf or tb ticks (v=1
 * only). An idle stage starts what its rule allows, and a backward pass first if it may not hold
 * more. Returns the length in ticks. */
static int tick_pipeline(int gpipe, int p, int m, int tf, int tb, int *peak)
{
    int forward[8] = {0}, backward[8] = {0}, busy[8] = {0}, kind[8] = {0}, t = 0;
    for (int i = 0; i < p; i++) peak[i] = 0;
    for (; backward[0] < m; t++) {
        int start[8] = {0};
        for (int i = 0; i < p; i++) {
            if (busy[i]) continue;
            int may_f = forward[i] < m && (i == 0 || forward[i - 1] > forward[i]);
            int limit = gpipe ? m : p - i;
            int started = forward[i] - backward[i];
            int may_b = backward[i] < forward[i] && (i == p - 1 || backward[i + 1] > backward[i]);
            if (gpipe) may_b = may_b && forward[i] == m;
            if (may_b && (started == limit || forward[i] == m)) start[i] = 2;
            else if (may_f && started < limit) start[i] = 1;
        }
        for (int i = 0; i < p; i++) {
            if (start[i]) {
                busy[i] = start[i] == 1 ? tf : tb;
                kind[i] = start[i];
            }
            int held = forward[i] - backward[i] + 1;
            if (kind[i] == 1 && busy[i] && held > peak[i]) peak[i] = held;
        }
        for (int i = 0; i < p; i++) {
            if (!busy[i]) continue;
            busy[i]--;
            if (busy[i]) continue;
            if (kind[i] == 1) forward[i]++;
            else backward[i]++;
        }
    }
    return t;
}

static void test_plan_pipeline(void)
{
    size_t in_flight[8], gpipe[4];
    check_equal("P56 1F1B, p=4, m=8", simulate_pipeline(in_flight, ONE_F_ONE_B, 4, 8, 1, 1, 2),
                0.375);
    check_equal("P56 interleaved, v=2, p=4, m=8",
                simulate_pipeline(in_flight, ONE_F_ONE_B, 4, 8, 2, 1, 2), 0.1875);
    check_equal("P56 1F1B, p=8, m=64", simulate_pipeline(in_flight, ONE_F_ONE_B, 8, 64, 1, 1, 2),
                0.109375);
    simulate_pipeline(in_flight, ONE_F_ONE_B, 4, 8, 1, 1, 2);
    simulate_pipeline(gpipe, GPIPE, 4, 8, 1, 1, 2);
    for (size_t i = 0; i < 4; i++) {
        check_equal("P57 1F1B in flight: 4, 3, 2, 1", (double)in_flight[i], 4 - (double)i);
        check_equal("P57 GPipe in flight: m", (double)gpipe[i], 8);
    }
    double gap = 0, tick_gap = 0;
    int wrong = 0, runs = 0;
    for (int p = 1; p <= 8; p++)
        for (int m = 1; m <= 24; m++)
            for (int tb = 1; tb <= 3; tb++) {
                double ideal = m * (1.0 + tb);
                for (int g = 0; g < 2; g++) {
                    int peak[8];
                    double x = simulate_pipeline(in_flight, g ? GPIPE : ONE_F_ONE_B, (size_t)p,
                                                 (size_t)m, 1, 1, tb);
                    gap = worse(gap, fabs(x - (p - 1.0) / m));
                    runs++;
                    tick_gap = worse(tick_gap,
                                     fabs(x - (tick_pipeline(g, p, m, 1, tb, peak) / ideal - 1)));
                    for (int i = 0; i < p; i++) {
                        int expected = g || m < p - i ? m : p - i;
                        wrong += in_flight[i] != (size_t)expected || peak[i] != expected;
                    }
                }
                for (int v = 2; v <= 4 && m % p == 0; v++) {
                    double x = simulate_pipeline(in_flight, ONE_F_ONE_B, (size_t)p, (size_t)m,
                                                 (size_t)v, 1, tb);
                    gap = worse(gap, fabs(x - (p - 1.0) / (v * m)));
                    runs++;
                    for (int i = 0; i < p; i++) {
                        int warm = 2 * (p - i - 1) + (v - 1) * p + 1;
                        wrong += in_flight[i] != (size_t)(warm < m * v ? warm : m * v);
                    }
                }
            }
    check_true("P56 all cases of the grid ran", runs > 1100);
    check("P56 bubble against (p-1)/(v m), largest gap", gap, 3e-14);
    check("P56 bubble against a second simulator, in ticks, largest gap", tick_gap, 3e-14);
    check_equal("P57 peaks that are not min(p-i, m), or min(warm-up + 1, v m)", wrong, 0);

    RankOptions in = plan_case("8.3B", 2, 4, 2, 16, 1, 0);
    Plan plan = make_plan(&in);
    check_equal("plan: m = B/(b d)", plan.micro_batches, 8);
    check_equal("plan: bubble", plan.bubble, 0.375);
    check_equal("plan: bubble by formula", plan.bubble_formula, 0.375);
    check_equal("plan: bubble interleaved", plan.bubble_interleaved, 0.1875);
    check_equal("plan: in flight", plan.in_flight, 4);
}

static void bad_plan(void *arg) { check_plan((const RankOptions *)arg); }

static void test_plan_refuses(void)
{
    RankOptions good = plan_case("8.3B", 8, 1, 64, 512, 8, 1), in;
    check_plan(&good); /* 512 ranks, as in the paper */
    in = good;
    in.micro_batches = 0;
    check_dies("no micro-batches", bad_plan, &in, "--batch 0");
    in = good;
    in.micro_batch = 0;
    check_dies("no micro-batch", bad_plan, &in, "--micro-batch 0");
    in = good;
    in.micro_batch = (size_t)1 << 58;
    check_dies("micro-batch that overflows", bad_plan, &in, "--micro-batch");
    in = good;
    in.layout.tp = 5;
    check_dies("tp that does not divide the heads", bad_plan, &in, "--tp 5");
    in = good;
    in.layout.pp = 5;
    check_dies("pp that does not divide the layers", bad_plan, &in, "--pp 5");
    in = good;
    in.layout.dp = 0;
    check_dies("no data ranks", bad_plan, &in, "--dp 0");
    in = good;
    in.seq = 1025;
    check_dies("more tokens than positions", bad_plan, &in, "--seq 1025");
    in = good;
    in.micro_batches = 65537;
    check_dies("too many micro-batches", bad_plan, &in, "65537 micro-batches");
    in = good;
    in.config.C = (size_t)24 << 40;
    in.config.F = 4 * in.config.C;
    check_dies("a model whose bytes overflow", bad_plan, &in, "too large to plan");
    in = good;
    in.config.L = (size_t)72 << 40;
    check_dies("layers without end", bad_plan, &in, "too large to plan");
    in = plan_case("tiny", 1, 1, 1, 1, 1, 0);
    in.config = make_config(1000000000, 1, 1, 1, 1);
    in.seq = 1;
    check_dies("layers without end, of nothing", bad_plan, &in, "too large to plan");
}

static void test_plan(void)
{
    test_plan_parameters();
    test_plan_messages();
    test_plan_flops();
    test_plan_projection();
    test_plan_memory();
    test_plan_zigzag();
    test_plan_groups();
    test_initial_loss();
    test_plan_pipeline();
    test_plan_refuses();
}

/* ---- Running a small model in any layout ----------------------------------------------------- */

typedef struct {
    Config config;
    Layout layout;
    size_t batch, micro_batch, steps;
    int recompute, threads; /* threads: of OpenMP, 0 for the default */
    Optimizer optimizer;
    /* results */
    double loss[8], norm[8];
    int skipped[8], peak[MAX_RANKS];
    /* Whole tensors, laid out as one rank has them: gradients of step 1, weights before, after. */
    real *grad, *initial, *weights;
    Trace trace[MAX_RANKS];
    /* a replicated element is not equal, bit for bit, on another rank */
    int replicas_differ;
    Rank *first; /* valid during the run */
} Training;

static const Layout ONE_RANK = {1, 1, 1};

static Optimizer test_optimizer(void)
{
    Optimizer o = {1e-3, 1e-5, 2, 100, DECAY_PAPER, 0.9, 0.999, 1e-8, 0.01, 1, 1};
    return o;
}

static Training make_training(Layout layout)
{
    Training t;
    memset(&t, 0, sizeof t);
    t.config = awkward_config();
    t.layout = layout;
    t.batch = 8;
    t.micro_batch = 1;
    t.steps = 3;
    t.optimizer = test_optimizer();
    return t;
}

/* Finds this tensor in the list of whole tensors. */
static const Tensor *find_whole(const Tensor *whole, size_t n, const Tensor *t)
{
    for (size_t i = 0; i < n; i++)
        if (whole[i].spec == t->spec && whole[i].layer == t->layer) return &whole[i];
    return NULL;
}

/* Copies this rank's slices into whole arrays. With `compare` it compares instead;
 * returns 1 if any differ. */
static int gather(real *out, const act *arena, const Rank *k, int compare)
{
    int differ = 0;
    size_t n = list_tensors(NULL, NULL, &k->config, ONE_RANK, 0);
    Tensor *whole = (Tensor *)xcalloc(n, sizeof *whole);
    list_tensors(whole, NULL, &k->config, ONE_RANK, 0);
    for (size_t i = 0; i < k->tensors; i++) {
        const Tensor *t = &k->tensor[i], *w = find_whole(whole, n, t);
        int r = tp_rank(k->layout, k->world.rank);
        for (size_t row = 0; row < unpadded_rows(t, r); row++)
            for (size_t col = 0; col < t->local_cols; col++) {
                real *to = out + w->offset + whole_row(t, r, row) * t->cols + whole_col(t, r) + col;
                const act *from = arena + t->offset + row * t->local_cols + col;
                if (compare) differ |= memcmp(to, from, sizeof *to) != 0;
                else if (t->counted && k->dp.rank == 0) *to = *from;
            }
    }
    free(whole);
    return differ;
}

/* Makes biases and LayerNorms non-trivial: every weight moves by 0.1 N(0,1). Each number is drawn
 * by its index in the whole tensor, as the weights are. */
static void perturb(Rank *k)
{
    for (size_t i = 0; i < k->tensors; i++) {
        const Tensor *t = &k->tensor[i];
        for (size_t row = 0; row < unpadded_rows(t, k->tp.rank); row++)
            for (size_t col = 0; col < t->local_cols; col++) {
                real z = 0;
                size_t index =
                    whole_row(t, k->tp.rank, row) * t->cols + whole_col(t, k->tp.rank) + col;
                random_normals(&z, 99, (uint32_t)(t->layer * 100 + (size_t)(t->spec - specs)),
                               index, 1);
                k->weights[t->offset + row * t->local_cols + col] += (real)0.1 * z;
            }
    }
}

/* Tokens depend only on the place of their sequence in the run. */
static void feed_test(void *source, Rank *k, MicroBatch *mb, size_t i)
{
    const Training *t = (const Training *)source;
    size_t micro_batches = t->batch / t->micro_batch / (size_t)t->layout.dp;
    int *tokens = (int *)xcalloc(k->B * (k->T + 1), sizeof *tokens);
    mb->sequence = ((size_t)k->dp.rank * micro_batches + i) * k->B;
    for (size_t n = 0; n < k->B * (k->T + 1); n++)
        tokens[n] = (int)(random_word(7, SITE_SAMPLE, k->step, mb->sequence * (k->T + 1) + n) %
                          k->config.V);
    set_tokens(k, mb, tokens, NULL);
    free(tokens);
}

static RankOptions training_options(const Training *t)
{
    RankOptions o = {
        t->config,   t->layout, t->micro_batch, t->batch / t->micro_batch / (size_t)t->layout.dp,
        t->config.P, 1,         t->recompute,   1234};
    return o;
}

static void training_rank(Comm *world, void *arg)
{
    Training *t = (Training *)arg;
    RankOptions o = training_options(t);
    Rank *k = rank_create(world, &o);
    Progress p = {0, 0, 0, make_loss_scaler(t->optimizer.loss_scale)};
#ifdef _OPENMP
    if (t->threads) omp_set_num_threads(t->threads);
#endif
    init_params(k->weights, k->tensor, k->tensors, &k->config, 1234, k->tp.rank);
    perturb(k);
    gather(t->initial, k->weights, k, 0);
    for (size_t step = 0; step < t->steps; step++) {
        if (step == 0)
            k->world.trace = k->tp.trace = k->pp.trace = k->dp.trace = k->embedding.trace =
                &t->trace[world->rank];
        StepResult r = train_step(k, &t->optimizer, &p, o.micro_batches, feed_test, t);
        k->world.trace = k->tp.trace = k->pp.trace = k->dp.trace = k->embedding.trace = NULL;
        if (world->rank == 0) {
            t->loss[step] = r.loss;
            t->norm[step] = r.grad_norm;
            t->skipped[step] = r.skipped;
        }
        if (step == 0) gather(t->grad, k->gradients, k, 0);
    }
    t->peak[world->rank] = k->peak_in_flight;
    gather(t->weights, k->weights, k, 0);
    barrier(world);
    if (gather(t->weights, k->weights, k, 1))
        __atomic_store_n(&t->replicas_differ, 1, __ATOMIC_RELAXED);
    barrier(world);
    rank_free(k);
}

/* The number of elements of the whole arrays. */
static size_t whole_size(const Config *c)
{
    size_t elements;
    list_tensors(NULL, &elements, c, ONE_RANK, 0);
    return elements;
}

static void run_training(Training *t)
{
    size_t n = whole_size(&t->config);
    t->grad = (real *)xcalloc(n, sizeof(real));
    t->initial = (real *)xcalloc(n, sizeof(real));
    t->weights = (real *)xcalloc(n, sizeof(real));
    run_ranks(world_size(t->layout), training_rank, t);
}

static void free_training(Training *t)
{
    FREE(t->grad, t->initial, t->weights);
    for (int r = 0; r < MAX_RANKS; r++) free(t->trace[r].event);
}

/* The largest relative error of any tensor, and that tensor's name. */
static double worst_tensor(char name[NAME_SIZE], const real *a, const real *b, const Config *c)
{
    size_t n = list_tensors(NULL, NULL, c, ONE_RANK, 0);
    double worst = 0;
    Tensor *whole = (Tensor *)xcalloc(n, sizeof *whole);
    list_tensors(whole, NULL, c, ONE_RANK, 0);
    for (size_t i = 0; i < n; i++) {
        double e =
            relative_error(a + whole[i].offset, b + whole[i].offset, whole[i].rows * whole[i].cols);
        if (is_worse(worst, e)) tensor_name(name, &whole[i]);
        worst = worse(worst, e);
    }
    free(whole);
    return worst;
}

/* ---- Chapters 2 and 12 ----------------------------------------------------------------------- */

typedef struct {
    int wrong;
    size_t n;
} Collected;

/* noinline: the value must be rounded before it is added. */
__attribute__((noinline)) static real contribution(int rank, size_t i)
{
    return (real)sin(1 + rank * 1.7 + (double)i * 0.37) * (real)pow(10, rank % 3);
}

static void collectives_rank(Comm *world, void *arg)
{
    Collected *result = (Collected *)arg;
    size_t n = result->n;
    int size = world->size, me = world->rank, wrong = 0;
    real *x = (real *)xcalloc(n + 1, sizeof *x);
    real *all = (real *)xcalloc(n * (size_t)size + 1, sizeof *all);
    for (size_t i = 0; i < n; i++) x[i] = contribution(me, i);
    x[n] = 42; /* nothing may write behind the end */
    all_gather(world, all, x, n, REAL_ARRAY);
    for (size_t i = 0; i < n * (size_t)size; i++)
        wrong |= all[i] != contribution((int)(i / n), i % n);
    all_reduce(world, x, n, REAL_ARRAY, SUM);
    for (size_t i = 0; i < n; i++) {
        /* in rank order: the same bits on all ranks and in every run */
        real sum = contribution(0, i);
        for (int r = 1; r < size; r++) sum += contribution(r, i);
        wrong |= x[i] != sum;
        x[i] = contribution(me, i);
    }
    all_reduce(world, x, n, REAL_ARRAY, MAX);
    for (size_t i = 0; i < n; i++) {
        real max = contribution(0, i);
        for (int r = 1; r < size; r++) max = contribution(r, i) > max ? contribution(r, i) : max;
        wrong |= x[i] != max;
        x[i] = contribution(me, i);
    }
    broadcast(world, x, n, REAL_ARRAY, size - 1);
    for (size_t i = 0; i < n; i++) wrong |= x[i] != contribution(size - 1, i);
    /* a ring: everyone sends before anyone receives */
    for (int round = 0; round < 3 && size > 1; round++) {
        for (size_t i = 0; i < n; i++) x[i] = contribution(me + round, i);
        send(world, x, n, REAL_ARRAY, (me + 1) % size);
        recv(world, x, n, REAL_ARRAY, (me + size - 1) % size);
        for (size_t i = 0; i < n; i++)
            wrong |= x[i] != contribution((me + size - 1) % size + round, i);
    }
    double d = me + 1;
    all_reduce(world, &d, 1, DOUBLE_ARRAY, SUM);
    wrong |= d != size * (size + 1) / 2.0;
    Comm odd = comm_split(world, me % 2, "odd"); /* every other rank */
    wrong |= odd.rank != me / 2 || odd.size != (size + 1 - me % 2) / 2;
    d = me;
    all_reduce(&odd, &d, 1, DOUBLE_ARRAY, MAX);
    wrong |= d != (size - 1 - me % 2) / 2 * 2 + me % 2;
    comm_free(&odd);
    wrong |= x[n] != 42;
    if (wrong) __atomic_store_n(&result->wrong, 1, __ATOMIC_RELAXED);
    free(x);
    free(all);
}

static void test_collectives(void)
{
    static const int ranks[] = {1, 2, 3, 4, 8};
    static const size_t sizes[] = {1, 2, 7, 1000};
    for (size_t r = 0; r < 5; r++)
        for (size_t s = 0; s < 4; s++) {
            char what[80];
            Collected c = {0, sizes[s]};
            run_ranks(ranks[r], collectives_rank, &c);
            snprintf(what, sizeof what, "%d ranks, %zu elements: all collectives exact", ranks[r],
                     sizes[s]);
            check_true(what, !c.wrong);
        }
}

static void disagreeing_rank(Comm *world, void *arg)
{
    real x[8] = {0};
    (void)arg;
    all_reduce(world, x, world->rank == 2 ? 7 : 8, REAL_ARRAY, SUM);
}

static void disagreeing_order(Comm *world, void *arg)
{
    real x[8] = {0};
    (void)arg;
    if (world->rank == 1) broadcast(world, x, 8, REAL_ARRAY, 0);
    else all_reduce(world, x, 8, REAL_ARRAY, SUM);
}

static void start_disagreement(void *arg)
{
    run_ranks(3, arg ? disagreeing_order : disagreeing_rank, NULL);
}

static void test_disagreement(void)
{
    if (!have_forked_threads()) return;
    int order = 1;
    check_dies("ranks that disagree on a length", start_disagreement, NULL, "of 7");
    check_dies("ranks that disagree on the operation", start_disagreement, &order, "broadcast");
}

/* ---- f, g and the blocks: P1, P5-P7, P17 ----------------------------------------------------- */

static void f_and_g_rank(Comm *world, void *arg)
{
    Collected *result = (Collected *)arg;
    Rank k;
    memset(&k, 0, sizeof k);
    k.tp = *world;
    act x[5], sum[5];
    int wrong = 0;
    for (int pass = 0; pass < 4; pass++) {
        for (size_t i = 0; i < 5; i++) {
            x[i] = contribution(world->rank, i);
            sum[i] = contribution(0, i);
            for (int r = 1; r < world->size; r++) sum[i] += contribution(r, i);
        }
        if (pass == 0) f_forward(&k, x, 5);
        if (pass == 1) f_backward(&k, x, 5);
        if (pass == 2) g_forward(&k, x, 5);
        if (pass == 3) g_backward(&k, x, 5);
        for (size_t i = 0; i < 5; i++)
            wrong |= x[i] != (pass == 0 || pass == 3 ? contribution(world->rank, i) : sum[i]);
    }
    if (wrong) __atomic_store_n(&result->wrong, 1, __ATOMIC_RELAXED);
}

static void test_f_and_g(void)
{
    Collected c = {0, 5};
    run_ranks(4, f_and_g_rank, &c);
    check_true("f: identity forward, sum backward; g: the reverse [P1]", !c.wrong);
}

/* Counts calls of `op` in a group, at an operation (NULL: any), in a layer (-2: any). */
static double count_events(const Trace *trace, const char *group, const char *op,
                           const char *operation, int layer)
{
    size_t n = 0;
    for (size_t i = 0; i < trace->n; i++) {
        const Event *e = &trace->event[i];
        n += !strcmp(e->group, group) && !strcmp(e->op, op) &&
             (!operation || !strcmp(e->place.operation, operation)) &&
             (layer == -2 || e->place.layer == layer);
    }
    return (double)n;
}

static void test_message_counts(void)
{
    for (int recompute = 0; recompute < 2; recompute++) {
        Layout two = {2, 1, 1};
        Training t = make_training(two);
        t.steps = 1;
        t.batch = t.micro_batch = 2;
        t.recompute = recompute;
        run_training(&t);
        const Trace *trace = &t.trace[0];
        double L = (double)t.config.L, scalars = 0, logits = 0;
        check_equal(recompute ? "all-reduces a layer, recomputed: 6"
                              : "all-reduces a layer: 4 [P5]",
                    count_events(trace, "tp", "all_reduce", NULL, 2), recompute ? 6 : 4);
        double all = count_events(trace, "tp", "all_reduce", NULL, -2) -
                     count_events(trace, "tp", "all_reduce", "cross entropy", -2);
        check_equal(recompute ? "all-reduces an iteration, recomputed: 6l+2 [P6]"
                              : "all-reduces an iteration: 4l+2 [P6]",
                    all, (recompute ? 6 : 4) * L + 2);
        check_equal("cross entropy: MAX all-reduces [P17]",
                    count_events(trace, "tp", "all_reduce_max", "cross entropy", -2), 1);
        check_equal("cross entropy: SUM all-reduces [P17]",
                    count_events(trace, "tp", "all_reduce", "cross entropy", -2), 2);
        check_equal("gathers of logits", count_events(trace, "tp", "all_gather", NULL, -2), 0);
        for (size_t i = 0; i < trace->n; i++)
            if (!strcmp(trace->event[i].place.operation, "cross entropy"))
                scalars += (double)trace->event[i].elements;
        logits = 2 * (double)(t.config.P * t.config.V);
        check_equal("cross entropy moves 3 b s scalars [P17, P18]", scalars,
                    3 * 2 * (double)t.config.P);
        check("  share of the logits' number", scalars / logits, 3 / (double)t.config.V);
        /* All messages of a layer have b s h elements; none stands between f and g [P7]. */
        for (size_t i = 0; i < trace->n; i++)
            if (trace->event[i].place.layer >= 0 &&
                trace->event[i].elements != 2 * t.config.P * t.config.C)
                scalars = NAN;
        check_true("a layer's messages are of b s h elements each [P7]", !isnan(scalars));
        free_training(&t);
    }
}

static void test_trace_is_plan(void)
{
    static const Layout layouts[] = {{1, 1, 1}, {2, 1, 1}, {1, 2, 1}, {1, 1, 2},
                                     {2, 2, 2}, {4, 2, 1}, {1, 4, 2}};
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++)
        for (int recompute = 0; recompute < 2; recompute++) {
            Training t = make_training(layouts[i]);
            char what[96];
            int agrees = 1;
            t.steps = 1;
            t.recompute = recompute;
            run_training(&t);
            RankOptions in = {
                t.config,   t.layout, t.micro_batch, t.batch / t.micro_batch / (size_t)t.layout.dp,
                t.config.P, 1,        recompute,     0};
            for (int r = 0; r < world_size(t.layout); r++)
                agrees &= trace_agrees(&t.trace[r], &in, pp_rank(t.layout, r));
            snprintf(what, sizeof what, "tp %d pp %d dp %d%s: every rank's messages are the plan's",
                     t.layout.tp, t.layout.pp, t.layout.dp, recompute ? ", recomputed" : "");
            check_true(what, agrees);
            free_training(&t);
        }
}

/* ---- Every layout against one rank: P12, P15, P27, P29, P30 ---------------------------------- */

/* In float, sums of up to a few hundred terms are added in another order, through 4 layers and
 * back: this makes some 10 epsilon of the norm. */
static const double LAYOUT_BOUND = sizeof(real) == 4 ? 3e-6 : 4e-14;

static void compare_layout(const Training *one, Layout s, size_t micro_batch, int recompute)
{
    Training t = make_training(s);
    char what[192], label[96], name[NAME_SIZE] = "-";
    t.micro_batch = micro_batch;
    t.recompute = recompute;
    run_training(&t);
    snprintf(label, sizeof label, "tp %d pp %d dp %d, %zu a pass%s", s.tp, s.pp, s.dp, micro_batch,
             recompute ? ", recomputed" : "");
    double worst_loss = 0;
    for (size_t i = 0; i < t.steps; i++) {
        double e = fabs(t.loss[i] / one->loss[i] - 1), n = fabs(t.norm[i] / one->norm[i] - 1);
        worst_loss = worse(worst_loss, e);
        worst_loss = worse(worst_loss, n);
    }
    snprintf(what, sizeof what, "%s: losses, norms", label);
    check(what, worst_loss, LAYOUT_BOUND / 10); /* the rounding errors of many rows average out */
    double grad = worst_tensor(name, t.grad, one->grad, &t.config);
    snprintf(what, sizeof what, "  gradients; worst %s", name);
    check(what, grad, LAYOUT_BOUND);
    /* Adam divides by sqrt(v). Where a gradient is nearly 0, as that of the key biases,
     * rounding noise alone makes steps of size lr. So single weights are compared by
     * their absolute difference. */
    double moved = 0;
    for (size_t i = 0; i < whole_size(&t.config); i++)
        moved = worse(moved, fabs((double)t.weights[i] - (double)one->weights[i]));
    double rms = relative_error(t.weights, one->weights, whole_size(&t.config));
    check("  weights after 3 steps", rms, 10 * LAYOUT_BOUND);
    check("  largest difference of one weight", moved,
          sizeof(real) == 4 ? t.optimizer.lr / 2 : 1.6e-12);
    check_true("  replicas are equal, bit for bit", !t.replicas_differ);
    free_training(&t);
}

static void test_layouts(void)
{
    Training one = make_training(ONE_RANK);
    one.micro_batch = 8;
    run_training(&one);
    for (int tp = 1; tp <= 4; tp *= 2)
        for (int pp = 1; pp <= 4; pp *= 2)
            for (int dp = 1; dp <= 4; dp *= 2) {
                Layout s = {tp, pp, dp};
                if (tp * pp * dp > 8) continue;
                compare_layout(&one, s, dp == 4 ? 1 : 2, (tp + pp + dp) % 2);
            }
    /* The norm of the gathered gradient counts every element once [P27]. */
    double sum = 0, clipped;
    for (size_t i = 0; i < whole_size(&one.config); i++) sum += (double)one.grad[i] * one.grad[i];
    check("norm of the whole gradient [P27]", fabs(one.norm[0] / sqrt(sum) - 1), LAYOUT_BOUND);
    clipped = one.norm[0] * fmin(one.optimizer.clip / (one.norm[0] + 1e-6), 1);
    check("clipped norm [P28]", clipped, 1);
    check_true("the first update has lr 0 and changes nothing [P33]",
               learning_rate(&one.optimizer, 0) == 0);
    free_training(&one);
}

/* The rows of the whole [Q; K; V] that each rank holds, counted by hand for 6
 * heads of 2 on 3 ranks [P11]. */
static void test_qkv_rows(void)
{
    Config c = make_config(1, 12, 6, 4, 9);
    Layout s = {3, 1, 1};
    static const size_t expected[3][12] = {{0, 1, 2, 3, 12, 13, 14, 15, 24, 25, 26, 27},
                                           {4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31},
                                           {8, 9, 10, 11, 20, 21, 22, 23, 32, 33, 34, 35}};
    for (int r = 0; r < 3; r++) {
        Tensor list[N_SPECS];
        size_t n = list_tensors(list, NULL, &c, s, r);
        int right = 1, found = 0;
        for (size_t i = 0; i < n; i++) {
            if (list[i].spec->split != QKV) continue;
            found++;
            for (size_t row = 0; row < 12; row++)
                right &=
                    list[i].local_rows == 12 && whole_row(&list[i], r, row) == expected[r][row];
        }
        check_true("rows of [Q_r; K_r; V_r], weight and bias [P11]", right && found == 2);
    }
}

/* Each rank looks up the tokens that it owns. The sum over ranks equals the serial lookup, bit for
 * bit, and the joined gradients of the slices equal the serial gradient [P15]. Megatron's own test
 * sizes: 17 sequences, 48 tokens, hidden 16. */
static void test_parallel_embedding(void)
{
    enum { N = 17 * 5, V = 48, C = 16 };
    int tokens[N];
    act whole[N * C], sum[N * C], part[N * C], joined[V * C], dwhole[V * C];
    real *w = random_reals(V * C, 1, 1), *dx = random_reals(N * C, 2, 1);
    for (size_t i = 0; i < N; i++) tokens[i] = (int)(random_word(1, 2, 3, i) % V);
    token_embedding_forward(whole, tokens, w, N, C, 0, V);
    memset(dwhole, 0, sizeof dwhole);
    token_embedding_backward(dwhole, dx, tokens, N, C, 0, V);
    for (size_t t = 2; t <= 8; t *= 2) {
        char what[64];
        memset(sum, 0, sizeof sum);
        memset(joined, 0, sizeof joined);
        for (size_t r = 0; r < t; r++) {
            token_embedding_forward(part, tokens, w + r * V / t * C, N, C, r * V / t, V / t);
            for (size_t i = 0; i < N * C; i++) sum[i] += part[i];
            token_embedding_backward(joined + r * V / t * C, dx, tokens, N, C, r * V / t, V / t);
        }
        snprintf(what, sizeof what, "%zu slices of the vocabulary: forward, backward [P15]", t);
        check_true(what, !memcmp(sum, whole, sizeof sum) && !memcmp(joined, dwhole, sizeof joined));
    }
    free(w);
    free(dx);
}

/* ---- Bit for bit: recomputation, repeated runs, thread counts: P13, P26 ---------------------- */

static int same_bits(const Training *a, const Training *b)
{
    size_t bytes = whole_size(&a->config) * sizeof(real);
    return !memcmp(a->grad, b->grad, bytes) && !memcmp(a->weights, b->weights, bytes) &&
           !memcmp(a->loss, b->loss, sizeof a->loss);
}

static void test_bit_equal(void)
{
    static const Layout layouts[] = {{1, 1, 1}, {2, 2, 1}, {2, 1, 2}};
    for (size_t i = 0; i < 3; i++) {
        Training a = make_training(layouts[i]), b = a, c = a, d = a;
        a.threads = 1;
        b.threads = 2;
        c.threads = 3;
        d.recompute = 1;
        a.micro_batch = b.micro_batch = c.micro_batch = d.micro_batch = 2;
        run_training(&a);
        run_training(&b);
        run_training(&c);
        run_training(&d);
        char what[96];
        snprintf(what, sizeof what, "tp %d pp %d dp %d: 1, 2 and 3 OpenMP threads", layouts[i].tp,
                 layouts[i].pp, layouts[i].dp);
        check_true(what, same_bits(&a, &b) && same_bits(&a, &c));
        check_true("  with and without recomputation, dropout on [P26]", same_bits(&a, &d));
        free_training(&a);
        free_training(&b);
        free_training(&c);
        free_training(&d);
    }
    Training one = make_training(ONE_RANK);
    one.steps = 0;
    run_training(&one);
    for (int t = 2; t <= 4; t *= 2) {
        Layout s = {t, 1, 1};
        Training many = make_training(s);
        many.steps = 0;
        run_training(&many);
        check_true(t == 2 ? "initial weights: tp 2 = tp 1 [P13]"
                          : "initial weights: tp 4 = tp 1 [P13]",
                   !memcmp(one.initial, many.initial, whole_size(&one.config) * sizeof(real)));
        free_training(&many);
    }
    free_training(&one);
}

/* ---- Whole model: finite differences, initial values ----------------------------------------- */

/* The loss of the awkward model with dropout, after the weights of one tensor moved by `shift`
 * along `direction`. */
typedef struct {
    Training t;
    size_t tensor;
    double shift, loss;
    real *direction;
} Shifted;

static void shifted_rank(Comm *world, void *arg)
{
    Shifted *s = (Shifted *)arg;
    RankOptions o = training_options(&s->t);
    Rank *k = rank_create(world, &o);
    init_params(k->weights, k->tensor, k->tensors, &k->config, 1234, 0);
    perturb(k);
    const Tensor *t = &k->tensor[s->tensor];
    for (size_t i = 0; i < t->rows * t->cols; i++)
        k->weights[t->offset + i] += (real)s->shift * s->direction[i];
    MicroBatch *mb = &k->flight[0];
    feed_test(&s->t, k, mb, 0);
    stage_forward(k, mb);
    s->loss = sum_losses(k, mb) / (double)(k->B * k->T);
    rank_free(k);
}

/* In double, a 5-point rule of step 1e-3 gives the directional derivative with an error of about
 * 1e-12 + eps/1e-3. In float the error is the rounding of the losses over the step: 1e-6/1e-2. */
static void test_model_finite_differences(void)
{
    const double h = sizeof(real) == 8 ? 1e-3 : 2e-2, bound = sizeof(real) == 8 ? 5e-10 : 5e-4;
    Training base = make_training(ONE_RANK);
    base.steps = 1;
    base.batch = base.micro_batch = 4;
    base.config.L = 2;
    Training kinds[2] = {base, base};
    kinds[1].config.gelu = GELU_ERF;
    for (int kind = 0; kind < 2; kind++) {
        Training *t = &kinds[kind];
        size_t n = list_tensors(NULL, NULL, &t->config, ONE_RANK, 0);
        Tensor *list = (Tensor *)xcalloc(n, sizeof *list);
        list_tensors(list, NULL, &t->config, ONE_RANK, 0);
        run_training(t);
        for (size_t i = 0; i < n; i += 1 + (sizeof(real) == 4) * 4) {
            Shifted s = {*t, i, 0, 0, random_reals(list[i].n, (uint32_t)i, 1)};
            static const double weight[4] = {1, -8, 8, -1}, places[4] = {-2, -1, 1, 2};
            double slope = 0, expected = 0, norm = 0;
            char what[96], name[NAME_SIZE];
            for (size_t e = 0; e < list[i].rows * list[i].cols; e++)
                norm += (double)s.direction[e] * s.direction[e];
            for (size_t e = 0; e < list[i].rows * list[i].cols; e++) {
                s.direction[e] /= (real)sqrt(norm);
                expected += (double)t->grad[list[i].offset + e] * s.direction[e];
            }
            for (int p = 0; p < 4; p++) {
                s.shift = places[p] * h;
                run_ranks(1, shifted_rank, &s);
                slope += weight[p] * s.loss / (12 * h);
            }
            double size = 0;
            for (size_t e = 0; e < list[i].rows * list[i].cols; e++)
                size += (double)t->grad[list[i].offset + e] * t->grad[list[i].offset + e];
            snprintf(what, sizeof what, "%s: slope of the loss%s", tensor_name(name, &list[i]),
                     kind ? " (erf)" : "");
            check(what, fabs(slope - expected) / sqrt(size), bound);
            free(s.direction);
        }
        free(list);
        free_training(t);
    }
}

static void initial_rank(Comm *world, void *arg)
{
    Training *t = (Training *)arg;
    RankOptions o = training_options(t);
    Rank *k = rank_create(world, &o);
    init_params(k->weights, k->tensor, k->tensors, &k->config, 1234, 0);
    for (size_t i = 0; i < k->tensors; i++) {
        const Tensor *s = &k->tensor[i];
        double sum = 0, n = (double)(s->rows * s->cols);
        if (s->spec->init < INIT_NORMAL || s->layer > 0) continue;
        for (size_t e = 0; e < s->rows * s->cols; e++)
            sum += pow((double)k->weights[s->offset + e], 2);
        /* 24 layers: 0.0028868 [P40] */
        double std = s->spec->init == INIT_SCALED ? 0.02 / sqrt(48) : 0.02;
        char what[160], name[NAME_SIZE];
        snprintf(what, sizeof what, "%s: standard deviation %.7f [P40]", tensor_name(name, s),
                 sqrt(sum / n));
        check(what, fabs(sqrt(sum / n) / std - 1), 5 / sqrt(2 * n)); /* 5 sigma of its estimate */
    }
    MicroBatch *mb = &k->flight[0];
    feed_test(t, k, mb, 0);
    k->training = 0;
    stage_forward(k, mb);
    /* ln V + half the variance of the logits, where the variance is 0.02^2 C = 0.0004 C [P21] */
    double N = (double)(k->B * k->T);
    double expected = log((double)k->config.V) + 0.0002 * (double)k->config.C;
    check("initial loss is near ln V + 0.0002 h [P21]", fabs(sum_losses(k, mb) / N - expected),
          0.02);
    rank_free(k);
}

static void test_initial_model(void)
{
    Training t = make_training(ONE_RANK);
    t.config = make_config(24, 64, 4, 64, 5003);
    t.batch = t.micro_batch = 8;
    run_ranks(1, initial_rank, &t);
}

/* ---- Dropout: P25 ---------------------------------------------------------------------------- */

static void test_masks(void)
{
    Config c = awkward_config();
    Layout s = {2, 1, 1};
    Rank k[2];
    MicroBatch mb;
    int equal = 1, differ = 0;
    memset(k, 0, sizeof k);
    memset(&mb, 0, sizeof mb);
    for (int r = 0; r < 2; r++) {
        shape_rank(&k[r], &c, s, r, 2, c.P, 0);
        k[r].tp.rank = r;
        k[r].training = 1;
        k[r].seed = 5;
        k[r].step = 3;
    }
    for (size_t i = 0; i < 2 * c.P * c.C; i++)
        for (int site = SITE_EMBEDDING; site <= SITE_MLP_OUTPUT; site++)
            if (site != SITE_ATTENTION)
                equal &= dropout_factor(replicated_dropout(&k[0], site, 1, &mb), i) ==
                         dropout_factor(replicated_dropout(&k[1], site, 1, &mb), i);
    for (size_t i = 0; i < k[0].Hp * c.P * c.P; i++)
        differ += dropout_factor(attention_dropout(&k[0], 1, &mb), i) !=
                  dropout_factor(attention_dropout(&k[1], 1, &mb), i);
    check_true("residual masks are equal on all tensor ranks [P25]", equal);
    /* two independent masks of p = 0.1 differ in 2 * 0.1 * 0.9 of the places */
    double share = differ / (double)(k[0].Hp * c.P * c.P);
    check("attention masks of two ranks differ in 18% [P25]", fabs(share - 0.18),
          5 * sqrt(0.18 * 0.82 / (double)(k[0].Hp * c.P * c.P)));
    k[1].step = 4;
    int changed = 0;
    for (size_t i = 0; i < 1000; i++)
        changed += dropout_factor(replicated_dropout(&k[0], SITE_MLP_OUTPUT, 1, &mb), i) !=
                   dropout_factor(replicated_dropout(&k[1], SITE_MLP_OUTPUT, 1, &mb), i);
    check_true("the next step has other masks", changed > 100);
    changed = 0;
    for (size_t i = 0; i < 1000; i++)
        changed += dropout_factor(replicated_dropout(&k[0], SITE_MLP_OUTPUT, 1, &mb), i) !=
                   dropout_factor(replicated_dropout(&k[0], SITE_MLP_OUTPUT, 2, &mb), i);
    check_true("the next layer has other masks", changed > 100);
}

/* ---- Chapter 6: P31, P33-P39 ----------------------------------------------------------------- */

static void test_learning_rate(void)
{
    Optimizer paper = {1.5e-4, 1e-5, 3000, 300000, DECAY_PAPER, 0.9, 0.999, 1e-8, 0.01, 1, 1};
    Optimizer megatron = paper;
    megatron.decay = DECAY_MEGATRON;
    const Optimizer *both[2] = {&paper, &megatron};
    for (int i = 0; i < 2; i++) {
        check_equal("lr(0) [P33]", learning_rate(both[i], 0), 0);
        check("lr(1) = 5e-8 [P33]", fabs(learning_rate(both[i], 1) / 5e-8 - 1), 1e-12);
        check("lr(1500) = 7.5e-5 [P33]", fabs(learning_rate(both[i], 1500) / 7.5e-5 - 1), 1e-12);
        check("lr(3000) = 1.5e-4 [P33]", fabs(learning_rate(both[i], 3000) / 1.5e-4 - 1), 1e-12);
        check_equal("lr(400000) is the floor", learning_rate(both[i], 400000), 1e-5);
    }
    check("Megatron: lr(150000) = 7.735581e-5 [P34]",
          fabs(learning_rate(&megatron, 150000) - 7.735581e-5), 5e-12);
    check("Megatron: lr(250000) = 1.125805e-5 [P34]",
          fabs(learning_rate(&megatron, 250000) - 1.125805e-5), 5e-12);
    check_true("Megatron: the floor is reached at 253,123 [P34]",
               learning_rate(&megatron, 253122) > 1e-5 && learning_rate(&megatron, 253123) == 1e-5);
    Optimizer cosine = paper;
    cosine.decay = DECAY_COSINE;
    check("cosine: lr(151500) is halfway between peak and floor",
          fabs(learning_rate(&cosine, 151500) - 8e-5), 5e-12);
    check("cosine: lr(300000) is the floor", fabs(learning_rate(&cosine, 300000) - 1e-5), 5e-12);
    check("paper: lr(151500) = 7.5e-5 [P35]", fabs(learning_rate(&paper, 151500) - 7.5e-5), 5e-12);
}

static void test_loss_scaler(void)
{
    LossScaler s = make_loss_scaler(0);
    static const double expected[4] = {0x1p32, 0x1p31, 0x1p30, 0x1p29};
    for (int i = 0; i < 4; i++) {
        loss_scaler_update(&s, 1);
        check_equal("scale after an overflow [P36]", s.scale, expected[i]);
    }
    s = make_loss_scaler(0);
    int skipped[4000] = {0}, n = 0;
    for (int i = 0; i < 3100; i++) {
        int overflow = s.scale > 0x1p18;
        if (overflow) skipped[n++] = i;
        loss_scaler_update(&s, overflow);
    }
    check_true("overflow above 2^18: skips at 0 .. 14 [P37]",
               n > 15 && skipped[0] == 0 && skipped[14] == 14 && skipped[15] == 1015);
    check_true("  then at 1015, 1016, and two in every 1002 [P37]",
               n == 21 && skipped[16] == 1016 && skipped[17] == 2017 && skipped[18] == 2018 &&
                   skipped[19] == 3019);
    s = make_loss_scaler(0);
    double before = s.scale;
    int doubled[8] = {0};
    n = 0;
    for (int i = 0; i < 3000; i++, before = s.scale) {
        loss_scaler_update(&s, 0);
        if (s.scale == 2 * before) doubled[n++] = i;
    }
    check_true("no overflow: doubles at 999, 1999, 2999 [P38]",
               n == 3 && doubled[0] == 999 && doubled[1] == 1999 && doubled[2] == 2999);
    s = make_loss_scaler(8);
    loss_scaler_update(&s, 1);
    loss_scaler_update(&s, 1);
    loss_scaler_update(&s, 1);
    check_equal("a fixed scale stays", s.scale, 8);
}

static void poisoned_rank(Comm *world, void *arg)
{
    Training *t = (Training *)arg;
    RankOptions o = training_options(t);
    Rank *k = rank_create(world, &o);
    if (world->rank == t->skipped[0]) k->gradients[k->tensor[4].offset] = (act)INFINITY;
    t->peak[world->rank] = !isfinite(gradient_norm(k));
    rank_free(k);
}

/* An overflow on any rank skips the step on all; the learning rate's clock stands still [P39]. */
static void test_overflow(void)
{
    Layout s = {2, 2, 1};
    for (int r = 0; r < 4; r++) {
        Training t = make_training(s);
        t.skipped[0] = r;
        run_ranks(4, poisoned_rank, &t);
        check_true("one rank's infinity makes every rank's norm infinite [P39]",
                   t.peak[0] && t.peak[1] && t.peak[2] && t.peak[3]);
    }
    Training t = make_training(s);
    /* in float every step overflows; in double none does: the dynamic scale begins at 2^32 */
    t.optimizer.loss_scale = sizeof(real) == 4 ? 0x1p134 : 0;
    t.optimizer.warmup = 0;
    run_training(&t);
    if (sizeof(real) == 4) {
        check_true("steps are skipped", t.skipped[0] && t.skipped[1] && t.skipped[2]);
        check_true("and leave the weights as they were, bit for bit",
                   !memcmp(t.initial, t.weights, whole_size(&t.config) * sizeof(real)));
    } else {
        Training plain = make_training(s);
        plain.optimizer.warmup = 0;
        run_training(&plain);
        check_true("a loss scale of 2^32 changes nothing in the weights, bit for bit",
                   !memcmp(plain.weights, t.weights, whole_size(&t.config) * sizeof(real)));
        free_training(&plain);
    }
    free_training(&t);
}

static void test_decay_groups(void)
{
    int wrong = 0;
    for (int i = 0; i < N_SPECS; i++) {
        const char *name = specs[i].name;
        int none = strstr(name, "bias") || strstr(name, "ln_") ? 1 : 0;
        wrong |= specs[i].decay == none;
    }
    check_true("decay: matrices and embeddings; none: biases and LayerNorm [P31]", !wrong);
}

static void test_in_flight(void)
{
    Layout s = {1, 4, 1};
    Training t = make_training(s);
    t.steps = 1;
    run_training(&t); /* 8 micro-batches of 1 */
    for (int i = 0; i < 4; i++) {
        char what[64];
        snprintf(what, sizeof what, "stage %d holds at most %d micro-batches [P57]", i, 4 - i);
        check_equal(what, t.peak[i], 4 - i);
    }
    free_training(&t);
}

/* A rank allocates as many bytes as the plan says. */
static void memory_rank(Comm *world, void *arg)
{
    Training *t = (Training *)arg;
    RankOptions o = training_options(t);
    Rank *k = rank_create(world, &o);
    double placed = 0;
    double planned = (double)activation_bytes(&t->config, t->layout, world->rank, t->micro_batch,
                                              t->config.P, t->recompute, o.micro_batches);
    Arena again = {(char *)k->activations, 0};
    carve_activations(k, k->flight, &again, 1);
    placed = (double)again.used;
    if (placed != planned) __atomic_store_n(&t->replicas_differ, 1, __ATOMIC_RELAXED);
    rank_free(k);
}

static void test_memory(void)
{
    static const Layout layouts[] = {{1, 1, 1}, {2, 1, 1}, {1, 4, 1}, {2, 2, 2}};
    for (size_t i = 0; i < 4; i++) {
        Training t = make_training(layouts[i]);
        t.recompute = i % 2;
        run_ranks(world_size(layouts[i]), memory_rank, &t);
        check_true("activations take as many bytes as planned", !t.replicas_differ);
    }
}

/* ---- PyTorch ------------------------------------------------------------------------------------
 *
 * Golden tensors, made by dev/reference/golden.py with transformers' GPT2LMHeadModel. */

typedef struct {
    const char *folder;
    Layout layout;
    Safetensors golden;
    double loss[4], norm, clip;
    real *grad, *after, *logits; /* whole tensors; (B, T, V) */
} Golden;

/* The values of a golden tensor as reals. */
static real *golden_values(const Golden *g, const char *name, size_t *n)
{
    const StoredTensor *t = find_stored(&g->golden, name);
    if (!t) die("%s: golden tensor %s is missing", g->folder, name);
    real *x = (real *)xcalloc(t->n, sizeof *x);
    if (t->dtype == I32)
        for (size_t i = 0; i < t->n; i++) {
            int32_t id;
            memcpy(&id, t->data + 4 * i, 4);
            x[i] = (real)id;
        }
    else
        for (size_t i = 0; i < t->n; i++) x[i] = stored_value(t, i);
    if (n) *n = t->n;
    return x;
}

static void feed_golden(void *source, Rank *k, MicroBatch *mb, size_t i)
{
    const Golden *g = (const Golden *)source;
    real *x = golden_values(g, "tokens", NULL);
    int *tokens = (int *)xcalloc(k->B * (k->T + 1), sizeof *tokens);
    size_t first = ((size_t)k->dp.rank * (2 / k->B / (size_t)k->dp.size) + i) * k->B;
    for (size_t n = 0; n < k->B * (k->T + 1); n++) tokens[n] = (int)x[first * (k->T + 1) + n];
    mb->sequence = first;
    set_tokens(k, mb, tokens, NULL);
    free(x);
    free(tokens);
}

/* Three steps of AdamW with a constant learning rate, as in golden.py. */
static void golden_rank(Comm *world, void *arg)
{
    Golden *g = (Golden *)arg;
    Config c;
    Safetensors model = open_model(&c, g->folder);
    size_t T = find_stored(&g->golden, "tokens")->shape[1] - 1;
    real *clip = golden_values(g, "clip", NULL);
    c.embd_pdrop = c.attn_pdrop = c.resid_pdrop = 0;
    RankOptions o = {c, g->layout, 1, 2 / (size_t)g->layout.dp, T, 1, 0, 1};
    if (g->layout.pp == 1 && g->layout.dp == 1) {
        o.micro_batch = 2;
        o.micro_batches = 1;
    }
    Optimizer a = {1e-3, 1e-3, 0, 1, DECAY_PAPER, 0.9, 0.999, 1e-8, 0.01, clip[0], 1};
    Progress p = {0, 0, 0, make_loss_scaler(1)};
    Rank *k = rank_create(world, &o);
    load_rank(k, &model, NULL);
    for (int step = 0; step < 3; step++) {
        StepResult r = train_step(k, &a, &p, o.micro_batches, feed_golden, g);
        if (world->rank == 0) g->loss[step] = r.loss;
        if (world->rank == 0 && step == 0) g->norm = r.grad_norm;
        if (step == 0) gather(g->grad, k->gradients, k, 0);
    }
    gather(g->after, k->weights, k, 0);
    free(clip);
    safetensors_close(&model);
    rank_free(k);
}

/* The logits of the first step, and the greedy continuation with the cache. */
static void golden_logits_rank(Comm *world, void *arg)
{
    Golden *g = (Golden *)arg;
    Config c;
    Safetensors model = open_model(&c, g->folder);
    size_t T = find_stored(&g->golden, "tokens")->shape[1] - 1, n;
    RankOptions o = {c, g->layout, 2, 1, T, 0, 0, 1};
    Rank *k = rank_create(world, &o);
    load_rank(k, &model, NULL);
    feed_golden(g, k, &k->flight[0], 0);
    stage_forward(k, &k->flight[0]);
    act *logits = k->flight[0].logits;
    for (size_t row = 0; row < 2 * T; row++)
        for (size_t v = 0; v < k->valid; v++)
            g->logits[row * c.V + k->v0 + v] = logits[row * k->Vp + v];
    rank_free(k);

    real *expected = golden_values(g, "generate", &n);
    RankOptions one = {c, g->layout, 1, 1, c.P, 0, 0, 1};
    k = rank_create(world, &one);
    load_rank(k, &model, NULL);
    Generator *generator = generator_create(k);
    Sampler greedy = {0, 0, 1, 0};
    Tokens text = {NULL, 0, 0};
    int same = 1;
    for (size_t i = 0; i < 4; i++) push_token(&text, (int)expected[i]);
    generate(generator, &text, n - 4, &greedy, -1, NULL, NULL);
    for (size_t i = 0; i < n; i++) same &= text.id[i] == (int)expected[i];
    if (world->rank == 0) g->loss[3] = same;
    generator_free(generator);
    free(text.id);
    free(expected);
    safetensors_close(&model);
    rank_free(k);
}

/* PyTorch's own float results differ from its double ones by 2e-6 of the norm in gradients, and by
 * 1e-7 in the weights after 3 steps. In double only the golden files' rounding to float remains:
 * half an epsilon of each element. */
static void test_golden(void)
{
    static const char *const folders[] = {"dev/reference/golden/tanh", "dev/reference/golden/erf"};
    static const Layout layouts[] = {{1, 1, 1}, {2, 1, 1}, {1, 1, 2}, {2, 1, 2}};
    const double grad_bound = sizeof(real) == 4 ? 1e-5 : 6e-8;
    const double logit_bound = sizeof(real) == 4 ? 2e-6 : 6e-8;
    for (int f = 0; f < 2; f++)
        for (int l = 0; l < 4; l++) {
            Golden g;
            char path[PATH_MAX], what[128];
            Config c;
            memset(&g, 0, sizeof g);
            g.folder = folders[f];
            g.layout = layouts[l];
            g.golden = safetensors_open(join_path(path, folders[f], "golden.safetensors"));
            Safetensors model = open_model(&c, folders[f]);
            safetensors_close(&model);
            size_t n = list_tensors(NULL, NULL, &c, ONE_RANK, 0), rows, elements = whole_size(&c);
            real *loss = golden_values(&g, "loss3", NULL);
            real *norm = golden_values(&g, "grad_norm", NULL);
            real *logits = golden_values(&g, "logits", &rows);
            g.grad = (real *)xcalloc(elements, sizeof(real));
            g.after = (real *)xcalloc(elements, sizeof(real));
            g.logits = (real *)xcalloc(rows, sizeof(real));
            run_ranks(world_size(g.layout), golden_rank, &g);
            snprintf(what, sizeof what, "%s tp %d dp %d: losses of 3 steps",
                     strrchr(g.folder, '/') + 1, g.layout.tp, g.layout.dp);
            double worst = 0;
            for (int i = 0; i < 3; i++) worst = worse(worst, fabs(g.loss[i] / (double)loss[i] - 1));
            check(what, worst, sizeof(real) == 4 ? 1e-6 : 6e-8);
            check("  norm of the gradient", fabs(g.norm / (double)norm[0] - 1),
                  sizeof(real) == 4 ? 1e-6 : 6e-8);
            Tensor *whole = (Tensor *)xcalloc(n, sizeof *whole);
            list_tensors(whole, NULL, &c, ONE_RANK, 0);
            double worst_of[2] = {0, 0}; /* gradients, weights after 3 steps */
            for (size_t i = 0; i < n; i++) {
                char name[NAME_SIZE], key[NAME_SIZE + 16];
                const Tensor *t = &whole[i];
                size_t size = t->rows * t->cols;
                real *seen = (real *)xcalloc(size, sizeof *seen);
                tensor_name(name, t);
                for (int after = 0; after < 2; after++) {
                    const real *mine = (after ? g.after : g.grad) + t->offset;
                    snprintf(key, sizeof key, "%s.%s", after ? "after3" : "grad", name);
                    real *expected = golden_values(&g, key, NULL);
                    for (size_t r = 0; r < t->rows; r++) /* in Hugging Face's order */
                        for (size_t col = 0; col < t->cols; col++)
                            seen[t->spec->conv1d && t->cols > 1 ? col * t->rows + r
                                                                : r * t->cols + col] =
                                mine[r * t->cols + col];
                    /* The gradient of the key bias is zero but for rounding, because softmax
                     * ignores what all keys have in common. Adam makes steps of size lr out of that
                     * rounding, in PyTorch's float as well. */
                    if (after && t->spec->field == offsetof(Layer, qkv_b) && t->spec->in_layer)
                        for (size_t e = c.C; e < 2 * c.C; e++) seen[e] = expected[e];
                    double e = relative_error(seen, expected, size);
                    worst_of[after] = worse(worst_of[after], e);
                    free(expected);
                }
                free(seen);
            }
            check("  gradients, worst tensor", worst_of[0], grad_bound);
            check("  weights after 3 steps, worst tensor", worst_of[1],
                  sizeof(real) == 4 ? 1e-6 : 6e-8);
            if (g.layout.dp == 1) {
                run_ranks(world_size(g.layout), golden_logits_rank, &g);
                check("  logits", relative_error(g.logits, logits, rows), logit_bound);
                check_true("  greedy continuation, with a cache of keys and values",
                           g.loss[3] == 1);
            }
            FREE(whole, loss, norm, logits, g.grad, g.after, g.logits);
            safetensors_close(&g.golden);
        }
}

/* ---- The fixtures of ../shared, where they are ----------------------------------------------- */

typedef struct {
    const char *folder;
    int tp;
    size_t T;
    const int *tokens;
    real *logits; /* (T, V) */
} Fixture;

static void fixture_rank(Comm *world, void *arg)
{
    Fixture *f = (Fixture *)arg;
    Config c;
    Safetensors model = open_model(&c, f->folder);
    Layout s = {f->tp, 1, 1};
    RankOptions o = {c, s, 1, 1, f->T, 0, 0, 1};
    Rank *k = rank_create(world, &o);
    int *tokens = (int *)xcalloc(f->T + 1, sizeof *tokens); /* the last is only a target */
    memcpy(tokens, f->tokens, f->T * sizeof *tokens);
    load_rank(k, &model, NULL);
    set_tokens(k, &k->flight[0], tokens, NULL);
    stage_forward(k, &k->flight[0]);
    for (size_t row = 0; row < f->T; row++)
        for (size_t v = 0; v < k->valid; v++)
            f->logits[row * c.V + k->v0 + v] = k->flight[0].logits[row * k->Vp + v];
    free(tokens);
    safetensors_close(&model);
    rank_free(k);
}

static void test_fixture_logits(void)
{
    static const char *const folders[] = {"../shared/fixtures/hf/h01_safetensors",
                                          "../shared/fixtures/hf/h02_safetensors_noprefix"};
    /* h02 holds h01's weights rounded to fp16, an error of half of 2^-10, through four layers */
    static const double bounds[] = {1e-5, 2e-3};
    if (access(folders[0], F_OK)) {
        skip("no ../shared/fixtures");
        return;
    }
    Map tokens = map_file("../shared/fixtures/expected/tiny4_tokens.i32");
    Map logits = map_file("../shared/fixtures/expected/tiny4_logits_fp32model.f32");
    size_t n = logits.size / 4;
    real *expected = (real *)xcalloc(n, sizeof *expected), *seen = (real *)xcalloc(n, sizeof *seen);
    for (size_t i = 0; i < n; i++)
        expected[i] = (real)((const float *)(const void *)logits.data)[i];
    for (int f = 0; f < 2; f++)
        for (int tp = 1; tp <= 4; tp *= 2) {
            Fixture fixture = {folders[f], tp, 32, (const int *)(const void *)tokens.data, seen};
            char what[96];
            memset(seen, 0, n * sizeof *seen);
            run_ranks(tp, fixture_rank, &fixture);
            snprintf(what, sizeof what, "%s at tp %d: logits", strrchr(folders[f], '/') + 1, tp);
            check(what, relative_error(seen, expected, n), bounds[f]);
        }
    free(expected);
    free(seen);
    unmap_file(tokens);
    unmap_file(logits);
}

/* ---- Chapters 9 and 10 --------------------------------------------------------------------------
 *
 * Windows against single targets, the cache against whole passes, drawing tokens. */

typedef struct {
    int tp;
    size_t B;
    Tokens text;
    double brute, sliding, disjoint, cached; /* three losses; the largest difference of logits */
    Tokens generated;
} Scored;

static Config scored_config(void) { return make_config(2, 32, 4, 24, 300); }

static Rank *scored_model(Comm *world, int tp, size_t B)
{
    Layout s = {tp, 1, 1};
    RankOptions o = {scored_config(), s, B, 1, 24, 0, 0, 1};
    Rank *k = rank_create(world, &o);
    init_params(k->weights, k->tensor, k->tensors, &k->config, 77, k->tp.rank);
    perturb(k);
    return k;
}

/* The mean loss over all targets, with one pass for each. The window of a target is chosen as the
 * paper describes it, and only the target's own weight is 1. */
static double brute_force_loss(Rank *k, const Tokens *text, size_t overlap)
{
    size_t T = k->T, targets = text->n - 1;
    int *tokens = (int *)xcalloc(k->B * (T + 1), sizeof *tokens);
    real *weight = (real *)xcalloc(k->B * T, sizeof *weight);
    double sum = 0;
    for (size_t target = 0; target < targets; target++) { /* the target is text[target + 1] */
        size_t start = target < T ? 0 : ((target - T) / overlap + 1) * overlap;
        memset(weight, 0, k->B * T * sizeof *weight);
        for (size_t t = 0; t <= T; t++) tokens[t] = start + t < text->n ? text->id[start + t] : 299;
        weight[target - start] = 1;
        set_tokens(k, &k->flight[0], tokens, weight);
        stage_forward(k, &k->flight[0]);
        sum += sum_losses(k, &k->flight[0]);
    }
    free(tokens);
    free(weight);
    all_reduce(&k->tp, &sum, 1, DOUBLE_ARRAY, SUM);
    return sum / (double)targets;
}

static void scored_rank(Comm *world, void *arg)
{
    Scored *s = (Scored *)arg;
    Rank *k = scored_model(world, s->tp, s->B);
    double brute = brute_force_loss(k, &s->text, 5);
    double sliding = text_loss(k, &s->text, 5, SIZE_MAX, 299, NULL).loss;
    double disjoint = text_loss(k, &s->text, 24, SIZE_MAX, 299, NULL).loss;
    rank_free(k);
    k = scored_model(world, s->tp, 1);
    Generator *g = generator_create(k);
    double worst = 0;
    real *once = (real *)xcalloc(k->config.V, sizeof *once);
    /* the whole prefix at once, against half of it and then one token at a time */
    for (size_t n = 1; n <= 24; n++) {
        g->cache.past = 0;
        generator_read(g, s->text.id, n);
        memcpy(once, g->logits, k->config.V * sizeof *once);
        g->cache.past = 0;
        if (n > 1) generator_read(g, s->text.id, n / 2 + (n == 2));
        for (size_t i = g->cache.past; i < n; i++) generator_read(g, s->text.id + i, 1);
        double e = relative_error(g->logits, once, k->config.V);
        worst = worse(worst, e);
    }
    Sampler sampler = {0.9, 20, 0.95, 5};
    Tokens text = {NULL, 0, 0};
    push_token(&text, 3);
    /* longer than T: the text is read again when the cache is full */
    generate(g, &text, 60, &sampler, -1, NULL, NULL);
    if (world->rank == 0) {
        s->brute = brute;
        s->sliding = sliding;
        s->disjoint = disjoint;
        s->cached = worst;
        s->generated = text;
    } else free(text.id);
    generator_free(g);
    free(once);
    rank_free(k);
}

static void test_scores(void)
{
    /* The mean of 116 losses is summed in double, so that rounding errors average out. Single
     * logits do not have this advantage. */
    const double bound = sizeof(real) == 4 ? 4e-8 : 2e-15;
    const double logit_bound = sizeof(real) == 4 ? 4e-6 : 1e-14;
    Scored first;
    memset(&first, 0, sizeof first);
    for (int tp = 1; tp <= 4; tp *= 2) {
        Scored s;
        char what[96];
        memset(&s, 0, sizeof s);
        s.tp = tp;
        s.B = tp == 2 ? 3 : 1;
        for (size_t i = 0; i < 117; i++)
            push_token(&s.text, (int)(random_word(3, SITE_SAMPLE, 0, i) % 299));
        run_ranks(tp, scored_rank, &s);
        snprintf(what, sizeof what,
                 "tp %d: overlapping windows against one pass for each target [P52]", tp);
        check(what, fabs(s.sliding / s.brute - 1), bound);
        snprintf(what, sizeof what, "  token by token with the cache, against whole prefixes");
        check(what, s.cached, logit_bound);
        if (tp == 1) {
            first = s;
            check_true("  windows without overlap give another loss",
                       fabs(s.disjoint / s.sliding - 1) > 1e-4);
            continue;
        }
        check("  loss against tp 1", fabs(s.sliding / first.sliding - 1), bound);
        check_true("  draws the same tokens as tp 1",
                   s.generated.n == 61 &&
                       !memcmp(s.generated.id, first.generated.id, 61 * sizeof(int)));
        free(s.text.id);
        free(s.generated.id);
    }
    free(first.text.id);
    free(first.generated.id);
}

static int by_value(const void *a, const void *b)
{
    return *(const double *)a < *(const double *)b ? 1 : -1;
}

/* Frequencies of drawn tokens against probabilities that are computed in the plain
 * way: sort, cut, normalise. */
static void check_sampler(const char *what, Sampler s)
{
    enum { V = 12, DRAWS = 20000 };
    real z[V];
    double p[V], sorted[V], total = 0, mass = 0, cut = 0, chi = 0;
    size_t count[V] = {0}, kept = 0;
    Candidate heap[V];
    for (size_t i = 0; i < V; i++) {
        z[i] = (real)(2 * sin(3.0 * (double)i));
        p[i] = exp((double)z[i] / s.temperature);
        total += p[i];
    }
    for (size_t i = 0; i < V; i++) {
        p[i] /= total;
        sorted[i] = p[i];
    }
    qsort(sorted, V, sizeof *sorted, by_value);
    while (kept < V && (s.top_k == 0 || kept < s.top_k) && (kept == 0 || mass < s.top_p)) {
        cut = sorted[kept];
        mass += cut;
        kept++;
    }
    for (size_t i = 0; i < DRAWS; i++) count[sample_token(z, V, &s, i, heap)]++;
    for (size_t i = 0; i < V; i++) {
        double expected = p[i] >= cut ? p[i] / mass * DRAWS : 0;
        if (expected == 0) chi += count[i] ? INFINITY : 0;
        else chi += ((double)count[i] - expected) * ((double)count[i] - expected) / expected;
    }
    /* chi^2 has kept - 1 degrees of freedom: 5 sigma */
    check(what, chi, (double)kept + 5 * sqrt(2 * (double)kept));
}

static void test_sampler(void)
{
    Sampler all = {1, 0, 1, 1}, cold = {0.5, 0, 1, 2}, k5 = {1, 5, 1, 3}, p7 = {1, 0, 0.7, 4};
    Sampler both = {1.3, 6, 0.8, 5}, one = {1, 0, 0, 6};
    real z[3] = {1, 3, 3};
    Candidate heap[3];
    Sampler greedy = {0, 0, 1, 0};
    check_sampler("all tokens: chi^2 of 20,000 draws", all);
    check_sampler("temperature 0.5", cold);
    check_sampler("top-k 5", k5);
    check_sampler("top-p 0.7", p7);
    check_sampler("temperature 1.3, top-k 6, top-p 0.8", both);
    check_sampler("top-p 0: the most probable token", one);
    check_equal("temperature 0: the first of the most probable",
                sample_token(z, 3, &greedy, 0, heap), 1);
}

/* ---- The program itself, run as a user runs it ----------------------------------------------- */

static int file_equal(const char *a, const char *b)
{
    Map x = map_file(a), y = map_file(b);
    int equal = x.size == y.size && !memcmp(x.data, y.data, x.size);
    unmap_file(x);
    unmap_file(y);
    return equal;
}

static int same_checkpoint(const char *a, const char *b)
{
    static const char *const names[] = {"model.safetensors", "trainer.safetensors", "config.json"};
    char x[PATH_MAX], y[PATH_MAX];
    int same = 1;
    for (int i = 0; i < 3; i++)
        same &= file_exists(a, names[i]) && file_exists(b, names[i]) &&
                file_equal(join_path(x, a, names[i]), join_path(y, b, names[i]));
    return same;
}

/* Writes a text to train on that has something to learn. */
static void write_sentences(const char *path)
{
    static const char *const words[] = {"the ", "cat ",  "dog ",  "sat ",  "on ",
                                        "a ",   "mat. ", "log; ", "ran\n", "to "};
    FILE *f = fopen(path, "w");
    if (!f) die("cannot write %s", path);
    for (uint64_t i = 0; i < 4000; i++) fputs(words[random_word(1, SITE_SAMPLE, 0, i) % 10], f);
    fclose(f);
}

static const char SMALL_RUN[] =
    "--layers 2 --hidden 32 --heads 4 --seq 16 --batch 4 --lr 1e-2 --steps 30";

/* A run saves every step and is killed at random moments. Resumed each time, it ends with
 * the same bytes as an undisturbed run. A run can also be resumed in another layout,
 * whose sums round differently. */
static void test_resume(void)
{
    char a[PATH_MAX], b[PATH_MAX];
    snprintf(a, sizeof a, "%s/whole", SCRATCH);
    snprintf(b, sizeof b, "%s/killed", SCRATCH);
    check_equal(
        "an undisturbed run",
        run_command(
            "./megatron_gpt2 train --data %s/text.txt %s --save %s --tp 2 2>/dev/null >/dev/null",
            SCRATCH, SMALL_RUN, a),
        0);
    /* 13 steps, then the other 17 */
    run_command("./megatron_gpt2 train --data %s/text.txt %s --steps 13 --decay-steps 30 "
                "--save %s/half --tp 2 >/dev/null 2>&1",
                SCRATCH, "--layers 2 --hidden 32 --heads 4 --seq 16 --batch 4 --lr 1e-2", SCRATCH);
    run_command("./megatron_gpt2 train --data %s/text.txt --resume %s/half --steps 30 --tp 2 "
                ">/dev/null 2>&1",
                SCRATCH, SCRATCH);
    snprintf(b, sizeof b, "%s/half", SCRATCH);
    /* both checkpoints remember 30 steps, although one command line said 13 */
    check_true("13 steps, saved, and 17 more: the same bytes", same_checkpoint(a, b));

    snprintf(b, sizeof b, "%s/killed", SCRATCH);
    int kills = 0, attempts = 0;
    for (int finished = 0; !finished && attempts < 200; attempts++) {
        int begun = file_exists(b, "config.json");
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            int null = open("/dev/null", O_WRONLY);
            dup2(null, 1);
            dup2(null, 2);
            char data[PATH_MAX];
            snprintf(data, sizeof data, "%s/text.txt", SCRATCH);
            if (begun)
                execl("./megatron_gpt2", "megatron_gpt2", "train", "--data", data, "--resume", b,
                      "--save-every", "1", "--tp", "2", (char *)NULL);
            execl("./megatron_gpt2", "megatron_gpt2", "train", "--data", data, "--layers", "2",
                  "--hidden", "32", "--heads", "4", "--seq", "16", "--batch", "4", "--lr", "1e-2",
                  "--steps", "30", "--save", b, "--save-every", "1", "--tp", "2", (char *)NULL);
            _exit(127);
        }
        usleep(3000 + random_word(11, SITE_SAMPLE, 0, (uint64_t)attempts) %
                          (kills < 20 ? 40000 : 4000000));
        int status = 0;
        if (waitpid(child, &status, WNOHANG) == 0) {
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
            kills++;
        }
        finished = WIFEXITED(status) && WEXITSTATUS(status) == 0;
        /* the run failed: the kill before it has destroyed the checkpoint */
        if (WIFEXITED(status) && WEXITSTATUS(status) != 0) {
            check_true("a killed run can be resumed", 0);
            return;
        }
    }
    printf("    (killed %d times)\n", kills);
    check_true("killed at random moments and resumed: the same bytes", same_checkpoint(a, b));

    int status = run_command(
        "./megatron_gpt2 train --data %s/text.txt --resume %s/whole --save %s/other --steps 34 "
        "--pp 2 --dp 2 >/dev/null 2>&1",
        SCRATCH, SCRATCH, SCRATCH);
    check_equal("saved at tp 2, resumed at pp 2 x dp 2", status, 0);
}

/* Ctrl-C saves after the current step. Meanwhile no other run may save to the same folder. */
static void test_interrupt(void)
{
    char data[PATH_MAX], dir[PATH_MAX], number[32], a[PATH_MAX], b[PATH_MAX];
    join_path(data, SCRATCH, "text.txt");
    join_path(dir, SCRATCH, "long");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        int null = open("/dev/null", O_WRONLY);
        dup2(null, 1);
        dup2(null, 2);
        execl("./megatron_gpt2", "megatron_gpt2", "train", "--data", data, "--layers", "1",
              "--hidden", "16", "--heads", "2", "--seq", "8", "--batch", "2", "--steps",
              "100000000", "--save", dir, "--save-every", "1", (char *)NULL);
        _exit(127);
    }
    for (int i = 0; i < 1000 && !file_exists(dir, "config.json"); i++) usleep(10000);
    int second = run_command(
        "./megatron_gpt2 train --data %s --resume %s 2>&1 | grep -q 'another run'", data, dir);
    kill(child, SIGINT);
    int status = 0;
    waitpid(child, &status, 0);
    check_equal("a second run may not save to the same folder", second, 0);
    check_true("Ctrl-C ends a run with exit status 0",
               WIFEXITED(status) && WEXITSTATUS(status) == 0);
    Config c;
    Safetensors model = open_model(&c, dir), trainer = open_trainer(dir, &c);
    size_t steps = metadata_count(&trainer, "step");
    safetensors_close(&model);
    safetensors_close(&trainer);
    snprintf(number, sizeof number, "%zu", steps);
    run_command("./megatron_gpt2 train --data %s --layers 1 --hidden 16 --heads 2 --seq 8 "
                "--batch 2 --steps %s --decay-steps 100000000 --save %s2 > /dev/null 2>&1",
                data, number, dir);
    snprintf(a, sizeof a, "%s/long/model.safetensors", SCRATCH);
    snprintf(b, sizeof b, "%s/long2/model.safetensors", SCRATCH);
    check_true("and saves the step under way, as a run of as many steps does",
               steps > 0 && file_equal(a, b));
}

/* The program learns, evaluates the model and generates from it. */
static void test_learns(void)
{
    char line[4096];
    double loss = NAN, valid = NAN, ppl = NAN, narrow = NAN;
    int status = run_command("./megatron_gpt2 train --data %s/text.txt --layers 2 --hidden 32 "
                             "--heads 4 --seq 32 --batch 8 --lr 1e-2 --dropout 0 --steps 500 "
                             "--eval-every 500 --valid-percent 10 --tp 2 --json --save %s/learnt "
                             "2>/dev/null | tail -1 > %s/line",
                             SCRATCH, SCRATCH, SCRATCH);
    check_equal("train", status, 0);
    FILE *f = NULL;
    char path[PATH_MAX];
    f = fopen(join_path(path, SCRATCH, "line"), "r");
    if (f && fgets(line, sizeof line, f)) {
        Json json = json_parse(line, strlen(line), "the last line");
        const JsonValue *v = json_get(&json, json.value, "loss");
        const JsonValue *w = json_get(&json, json.value, "val_loss");
        if (v && w) {
            loss = v->number;
            valid = w->number;
        }
        json_free(&json);
    }
    if (f) fclose(f);
    /* Ten words are equally probable: ln 10 / 4 = 0.58 nats a byte. The
     * loss begins at ln 257 = 5.5. */
    check("training loss, from 5.5", loss, 0.85);
    check("held-out loss", valid, 0.85);
    for (int i = 0; i < 2; i++) {
        run_command("./megatron_gpt2 eval --model %s/learnt --data %s/text.txt --overlap %d "
                    "--limit 60 --json 2>/dev/null > %s/line",
                    SCRATCH, SCRATCH, i ? 32 : 4, SCRATCH);
        f = fopen(join_path(path, SCRATCH, "line"), "r");
        if (f && fgets(line, sizeof line, f)) {
            Json json = json_parse(line, strlen(line), "the line");
            const JsonValue *v = json_get(&json, json.value, "ppl");
            if (v && i) ppl = v->number;
            if (v && !i) narrow = v->number;
            json_free(&json);
        }
        if (f) fclose(f);
    }
    /* P54 is expected, but not guaranteed, and no bound can be derived: in this text only the
     * beginning of the current word helps. In several builds the two values were from 2.5%
     * apart to 0.1% the other way round. The choice of 5% finds a model that long contexts
     * harm, and nothing finer. */
    check("perplexity with contexts of 28 and more against windows without overlap [P54]", narrow,
          1.05 * ppl);
    status = run_command("./megatron_gpt2 generate --model %s/learnt --prompt 'the cat ' "
                         "--tokens 40 --temperature 0 2>/dev/null > %s/text1; "
                         "./megatron_gpt2 generate --model %s/learnt --prompt 'the cat ' "
                         "--tokens 40 --temperature 0 --tp 4 2>/dev/null > %s/text2; "
                         "cmp %s/text1 %s/text2",
                         SCRATCH, SCRATCH, SCRATCH, SCRATCH, SCRATCH, SCRATCH);
    check_equal("generates the same text at tp 1 and 4", status, 0);
}

/* Wrong use: exit 2 and one line. Bad input: exit 1 and one line. */
static void test_command_line(void)
{
    /* clang-format off */
    static const struct {
        const char *arguments;
        int status;
        const char *message;
    } cases[] = {
        {"", 2, "a command is expected"},
        {"fly", 2, "no command fly"},
        {"fly'\n'away", 2, "fly?away"},
        {"train", 2, "needs --data"},
        {"train --data x --prompt y", 2, "no option --prompt"},
        {"train --data x --bogus", 2, "knows no --bogus"},
        {"train --data x --steps 1.5", 2, "whole number"},
        {"train --data x --steps -1", 2, "whole number"},
        {"train --data x --lr nan", 2, "a number"},
        {"train --data x --lr 1 --lr 2", 2, "given twice"},
        {"train --data x --steps", 2, "needs N"},
        {"train --data /nonexistent", 1, "/nonexistent"},
        {"train --data megatron_gpt2.c --tp 3", 1, "does not divide 4 heads"},
        {"train --data megatron_gpt2.c --pp 3 --batch 9", 1, "does not divide 4 layers"},
        {"train --data megatron_gpt2.c --dp 3", 1, "no multiple"},
        {"train --data megatron_gpt2.c --hidden 130", 1, "no multiple of --heads"},
        {"train --data megatron_gpt2.c --config 9B", 1, "9B is not known"},
        {"train --data megatron_gpt2.c --init a --resume b", 1, "exclude each other"},
        {"train --data megatron_gpt2.c --init a --layers 2", 1, "cannot be combined"},
        {"train --data megatron_gpt2.c --tokenizer dev/reference/bpe --vocab 300", 1,
         "larger --vocab"},
        {"train --data megatron_gpt2.c --lr 1e-7 --min-lr 1e-5", 1, "above --lr"},
        {"train --data megatron_gpt2.c --eval-every 5 --valid-percent 0.001", 1,
         "larger --valid-percent"},
        {"train --data megatron_gpt2.c --save doc", 1, "save to a new folder"},
        {"train --data megatron_gpt2.c --lr-decay linear", 1, "megatron or cosine"},
        {"eval --model dev/reference/golden/tanh", 2, "exactly one"},
        {"eval --model dev/reference/golden/tanh --data megatron_gpt2.c", 1, "tokenizer"},
        {"eval --data megatron_gpt2.c", 2, "needs --model"},
        {"eval --model dev/reference --data megatron_gpt2.c", 1, "config.json"},
        {"eval --model dev/reference/golden/tanh --lambada x --overlap 3", 2, "running text"},
        {"generate --model doc", 1, "config.json"},
        {"tokenize a", 2, "two operands"},
        {"tokenize a b c", 2, "too many"},
        {"info", 2, "one operand"},
        {"info Makefile", 1, "no safetensors file"},
        {"train --config 8.3B --batch 1024 --data README.md", 1, "takes"},
        {"plan --paper --tp 2", 2, "cannot be combined"},
        {"plan --peak 3", 2, "go together"},
        {"plan --tp 65", 2, "1 to 64"},
        {"plan --batch 7 --dp 2", 1, "no multiple"},
    };
    /* clang-format on */
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char line[4096] = "", path[PATH_MAX];
        int status =
            run_command("./megatron_gpt2 %s 2> %s/line > /dev/null", cases[i].arguments, SCRATCH);
        FILE *f = fopen(join_path(path, SCRATCH, "line"), "r");
        size_t n = f ? fread(line, 1, sizeof line - 1, f) : 0;
        if (f) fclose(f);
        int ok = status == cases[i].status && n && strchr(line, '\n') == line + n - 1 &&
                 strstr(line, cases[i].message);
        check_true(cases[i].arguments, ok);
        if (!ok)
            printf("      exit %d, expected %d and \"%s\"; got: %s\n", status, cases[i].status,
                   cases[i].message, line);
    }
    check_equal("--help", run_command("./megatron_gpt2 --help > /dev/null"), 0);
    check_equal("train --help", run_command("./megatron_gpt2 train --help > /dev/null"), 0);
    check_equal("--help > /dev/full",
                run_command("./megatron_gpt2 --help > /dev/full 2> /dev/null"), 1);
    check_equal(
        "a log on a full disk",
        run_command("./megatron_gpt2 train --data %s/text.txt %s --log /dev/full > /dev/null 2>&1",
                    SCRATCH, SMALL_RUN),
        1);
    check_equal(
        "a pipe is no text file, and is not waited for",
        run_command(
            "mkfifo %s/pipe; timeout 20 ./megatron_gpt2 train --data %s/pipe > /dev/null 2>&1",
            SCRATCH, SCRATCH),
        1);
    check_equal(
        "a last word that does not fit is not scored by its end",
        run_command("echo '{\"text\": \"one aaaaaaaa\"}' > %s/l.jsonl; "
                    "./megatron_gpt2 train --data %s/text.txt %s --save %s/tiny > /dev/null 2>&1; "
                    "./megatron_gpt2 eval --model %s/tiny --lambada %s/l.jsonl --seq 2 2>&1 | "
                    "grep -q 'do not fit'",
                    SCRATCH, SCRATCH, SMALL_RUN, SCRATCH, SCRATCH, SCRATCH),
        0);
    check_equal(
        "a run that diverges says so",
        run_command("./megatron_gpt2 train --data %s/text.txt --lr 1000 --min-lr 1000 --warmup 0 "
                    "--weight-decay 1000 --steps 200 --seq 16 --layers 1 2>&1 > /dev/null | "
                    "grep -q diverged",
                    SCRATCH),
        0);
    check_equal(
        "a tokenizer under OpenAI's names goes on with the model",
        run_command("cd %s && mkdir old && cp ../dev/reference/bpe/vocab.json old/encoder.json && "
                    "cp ../dev/reference/bpe/merges.txt old/vocab.bpe && "
                    "../megatron_gpt2 train --data text.txt --tokenizer old --layers 1 --hidden 8 "
                    "--heads 2 --seq 8 --steps 1 --save one && "
                    "mv one/vocab.json one/encoder.json && mv one/merges.txt one/vocab.bpe && "
                    "../megatron_gpt2 train --data text.txt --init one --steps 1 --save two && "
                    "cmp two/vocab.json old/encoder.json && cmp two/merges.txt old/vocab.bpe",
                    SCRATCH),
        0);
    check_equal("a full disk is an error",
                run_command("./megatron_gpt2 plan > /dev/full 2>/dev/null"), 1);
}

/* README or doc/ names every option. */
static void test_help_is_documented(void)
{
    int missing = 0;
    for (int i = 0; i < N_OPTIONS; i++)
        if (run_command("grep -qFe '%s' README.md doc/*.md", options[i].name)) {
            printf("      %s is in no page\n", options[i].name);
            missing++;
        }
    check_equal("options that README and doc/ do not name", missing, 0);
}

/* The numbers of Appendix E, where the paper's data is at hand. */
static void test_paper_data(void)
{
    if (access("../shared/data/wikitext103_test.txt", F_OK)) {
        skip("no ../shared/data");
        return;
    }
    run_command("./megatron_gpt2 train --data ../shared/data/tinyshakespeare.txt "
                "--tokenizer ../shared/data/gpt2_tokenizer --layers 1 --hidden 32 --heads 2 "
                "--seq 1024 --batch 1 --steps 1 --save %s/positions > /dev/null 2>&1",
                SCRATCH);
    int status = run_command("./megatron_gpt2 eval --model %s/positions --wikitext "
                             "../shared/data/wikitext103_test.txt --limit 0 --json | "
                             "grep -q '\"tokens\": 270330, \"targets\": 270329, \"windows\": 8448, "
                             "\"original_tokens\": 245566'",
                             SCRATCH);
    check_equal("WikiText-103: 245,566 original tokens, 270,329 targets, 8,448 windows [P51]",
                status, 0);
    status = run_command(
        "./megatron_gpt2 eval --model %s/positions --lambada ../shared/data/lambada_test.jsonl "
        "--limit 0 --json | "
        "grep -q '\"examples\": 5153, \"label_tokens\": \\[4013, 913, 208, 16, 3, 0\\]'",
        SCRATCH);
    check_equal("LAMBADA: 5,153 examples; last words of 1 .. 5 tokens 4013 913 208 16 3 [P55]",
                status, 0);
}

/* ---- More of chapters 2 and 12 --------------------------------------------------------------- */

/* A longer message after a short one needs a larger mailbox. Several in a row arrive in order. */
static void growing_messages_rank(Comm *world, void *arg)
{
    static const size_t sizes[] = {1, 1000, 3, 100000, 100001};
    int wrong = 0;
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        real *x = (real *)xcalloc(sizes[s], sizeof *x);
        if (world->rank == 0) {
            for (size_t i = 0; i < sizes[s]; i++) x[i] = contribution((int)s, i);
            send(world, x, sizes[s], REAL_ARRAY, 1);
        } else {
            recv(world, x, sizes[s], REAL_ARRAY, 0);
            for (size_t i = 0; i < sizes[s]; i++) wrong |= x[i] != contribution((int)s, i);
        }
        free(x);
    }
    if (wrong) __atomic_store_n((int *)arg, 1, __ATOMIC_RELAXED);
}

static void disagreeing_type(Comm *world, void *arg)
{
    double x[8] = {0}; /* room for either type */
    (void)arg;
    all_reduce(world, x, 8, world->rank == 1 ? DOUBLE_ARRAY : REAL_ARRAY, SUM);
}

static void short_message(Comm *world, void *arg)
{
    real x[8] = {0};
    (void)arg;
    if (world->rank == 0) send(world, x, 7, REAL_ARRAY, 1);
    else recv(world, x, 8, REAL_ARRAY, 0);
}

static void start_type(void *arg)
{
    (void)arg;
    run_ranks(2, disagreeing_type, NULL);
}
static void start_short_message(void *arg)
{
    (void)arg;
    run_ranks(2, short_message, NULL);
}

static void test_messages(void)
{
    if (!have_forked_threads()) return;
    int wrong = 0;
    run_ranks(2, growing_messages_rank, &wrong);
    check_true("messages of 1, 1000, 3, 100,000 and 100,001 elements arrive whole", !wrong);
    check_dies("ranks that disagree on a type", start_type, NULL, "ranks disagree");
    check_dies("a message shorter than what is received", start_short_message, NULL, "receives");
}

/* A trace of any length, with the bytes of each type. */
static void test_record(void)
{
    Trace trace = {NULL, 0, 0};
    Place place;
    Comm c = {0, 1, NULL, "tp", 0, &place, &trace};
    int wrong = 0;
    memset(&place, 0, sizeof place);
    place.layer = 3;
    for (size_t i = 0; i < 5000; i++) record(&c, "op", i, i % 2 ? DOUBLE_ARRAY : REAL_ARRAY);
    for (size_t i = 0; i < trace.n; i++)
        wrong += trace.event[i].elements != i ||
                 trace.event[i].bytes != i * (i % 2 ? sizeof(double) : sizeof(real)) ||
                 trace.event[i].place.layer != 3 || strcmp(trace.event[i].group, "tp");
    check_equal("5000 events are recorded", (double)trace.n, 5000);
    check_equal("  events of wrong elements, bytes, group or place", wrong, 0);
    check_true("  the array has room for them", trace.capacity >= trace.n);
    free(trace.event);
}

/* ---- More of chapter 5 ----------------------------------------------------------------------- */

/* The distribution of each tensor follows from its name, and no two tensors
 * draw the same numbers [P40]. */
static void test_initial_tensors(void)
{
    Config c = make_config(6, 32, 4, 40, 100);
    size_t elements, n = list_tensors(NULL, &elements, &c, ONE_RANK, 0), worst_pair[2] = {0, 0};
    Tensor *list = (Tensor *)xcalloc(n, sizeof *list);
    act *w = (act *)xcalloc(elements, sizeof *w);
    double worst_std = 0, worst_correlation = 0;
    int wrong = 0, unaligned = 0;
    list_tensors(list, NULL, &c, ONE_RANK, 0);
    init_params(w, list, n, &c, 1234, 0);
    for (size_t i = 0; i < n; i++) {
        char name[NAME_SIZE];
        size_t size = list[i].rows * list[i].cols;
        const act *x = w + list[i].offset;
        tensor_name(name, &list[i]);
        unaligned += list[i].offset % 64 != 0;
        int bias = strstr(name, ".bias") != NULL, norm = strstr(name, "ln_") != NULL;
        if (bias || norm) {
            for (size_t e = 0; e < size; e++) wrong += x[e] != (bias ? 0 : 1);
            continue;
        }
        double std = strstr(name, "c_proj") ? 0.02 / sqrt(2.0 * 6) : 0.02, sum = 0;
        for (size_t e = 0; e < size; e++) sum += (double)x[e] * x[e];
        worst_std =
            worse(worst_std, fabs(sqrt(sum / (double)size) / std - 1) * sqrt(2.0 * (double)size));
        for (size_t j = 0; j < i; j++) {
            tensor_name(name, &list[j]);
            if (strstr(name, ".bias") || strstr(name, "ln_")) continue;
            size_t common = min_size(size, list[j].rows * list[j].cols);
            double xy = 0, xx = 0, yy = 0;
            for (size_t e = 0; e < common; e++) {
                double a = x[e], b = w[list[j].offset + e];
                xy += a * b;
                xx += a * a;
                yy += b * b;
            }
            double r = fabs(xy) / sqrt(xx * yy) * sqrt((double)common);
            if (is_worse(worst_correlation, r)) {
                worst_pair[0] = j;
                worst_pair[1] = i;
            }
            worst_correlation = worse(worst_correlation, r);
        }
    }
    check_equal("tensors that do not begin on a cache line", unaligned, 0);
    check_equal("biases that are not 0, LayerNorms that are not 1", wrong, 0);
    check("standard deviations 0.02, c_proj / sqrt(2L), in sigmas [P40]", worst_std, 5);
    printf("    (most alike: tensors %zu and %zu)\n", worst_pair[0], worst_pair[1]);
    /* 325 pairs: the largest is near 3; 5 has a chance of 2e-4 */
    check("correlation of any two tensors, in sigmas", worst_correlation, 5);
    act *other = (act *)xcalloc(elements, sizeof *other);
    init_params(other, list, n, &c, 1235, 0);
    double xy = 0, xx = 0;
    for (size_t e = 0; e < c.V * c.C; e++) {
        xy += (double)w[e] * other[e];
        xx += (double)w[e] * w[e];
    }
    check("  with another seed, in sigmas", fabs(xy) / xx * sqrt((double)(c.V * c.C)), 5);
    FREE(other, list, w);
}

/* OpenAI's sizes: the numbers of parameters are public, and a head is 64 wide. */
static void test_presets(void)
{
    static const struct {
        const char *name;
        double parameters;
    } known[] = {{"124M", 124439808}, {"774M", 774030080}, {"1558M", 1557611200}};
    for (int i = 0; i < 3; i++) {
        Config c = find_preset(known[i].name);
        check_equal(known[i].name, (double)count_parameters(&c), known[i].parameters);
        check_equal("  size of a head", (double)(c.C / c.H), 64);
    }
}

static void cut_mlp(void *arg)
{
    Config c = make_config(2, 32, 4, 8, 300);
    Layout s = {4, 1, 1};
    c.F = 126;
    check_layout(&c, *(int *)arg ? ONE_RANK : s);
}

static void test_layout_refuses(void)
{
    int one = 0;
    check_dies("an MLP that --tp does not divide", cut_mlp, &one, "MLP width 126");
}

/* ---- More of chapter 3 ----------------------------------------------------------------------- */

/* Each site has its own probability, and its own stream in every layer. */
static void test_dropout_sites(void)
{
    enum { LAYERS = 100 };
    Config c = awkward_config();
    Rank k;
    MicroBatch mb;
    int shared = 0;
    uint32_t site[3 * LAYERS + 1];
    c.embd_pdrop = (real)0.25;
    c.attn_pdrop = (real)0.5;
    c.resid_pdrop = (real)0.125;
    memset(&k, 0, sizeof k);
    memset(&mb, 0, sizeof mb);
    shape_rank(&k, &c, ONE_RANK, 0, 2, c.P, 0);
    k.training = 1;
    check_equal("embd_pdrop: embedding", replicated_dropout(&k, SITE_EMBEDDING, 0, &mb).p, 0.25);
    check_equal("attn_pdrop: attention", attention_dropout(&k, 1, &mb).p, 0.5);
    check_equal("resid_pdrop: attention's output",
                replicated_dropout(&k, SITE_ATTENTION_OUTPUT, 1, &mb).p, 0.125);
    check_equal("resid_pdrop: MLP's output", replicated_dropout(&k, SITE_MLP_OUTPUT, 1, &mb).p,
                0.125);
    site[0] = replicated_dropout(&k, SITE_EMBEDDING, 0, &mb).site;
    for (size_t l = 0; l < LAYERS; l++) {
        site[3 * l + 1] = attention_dropout(&k, l, &mb).site;
        site[3 * l + 2] = replicated_dropout(&k, SITE_ATTENTION_OUTPUT, l, &mb).site;
        site[3 * l + 3] = replicated_dropout(&k, SITE_MLP_OUTPUT, l, &mb).site;
    }
    for (int i = 0; i < 3 * LAYERS + 1; i++)
        for (int j = 0; j < i; j++) shared += site[i] == site[j];
    check_equal("pairs of sites, in 100 layers, that share their masks", shared, 0);
    k.seed = 17;
    k.step = 4;
    check_true("the rank's seed and step draw",
               replicated_dropout(&k, SITE_EMBEDDING, 0, &mb).seed == 17 &&
                   attention_dropout(&k, 1, &mb).step == 4);
    k.training = 0;
    check_true("no dropout outside training",
               replicated_dropout(&k, SITE_EMBEDDING, 0, &mb).p == 0 &&
                   attention_dropout(&k, 0, &mb).p == 0);
}

/* rstd = 1 / sqrt(variance + eps) with the model's own eps, in all three LayerNorms. */
static double rstd_error(const real *rstd, const act *x, size_t N, size_t C, double eps)
{
    double worst = 0;
    for (size_t n = 0; n < N; n++) {
        double mean = 0, variance = 0;
        for (size_t i = 0; i < C; i++) mean += (double)x[n * C + i] / (double)C;
        for (size_t i = 0; i < C; i++)
            variance += ((double)x[n * C + i] - mean) * ((double)x[n * C + i] - mean) / (double)C;
        double e = fabs((double)rstd[n] * sqrt(variance + eps) - 1);
        worst = worse(worst, e);
    }
    return worst;
}

static void eps_rank(Comm *world, void *arg)
{
    Training *t = (Training *)arg;
    RankOptions o = training_options(t);
    Rank *k = rank_create(world, &o);
    MicroBatch *mb = &k->flight[0];
    init_params(k->weights, k->tensor, k->tensors, &k->config, 1234, 0);
    perturb(k);
    feed_test(t, k, mb, 0);
    stage_forward(k, mb);
    size_t N = k->B * k->T, C = k->config.C, last = k->depth - 1;
    const Saved *a = &mb->layer[last];
    /* the variance is a sum of C = 36 terms; with a root and a division this makes at most C U */
    check("first LayerNorm: rstd with eps 0.5", rstd_error(a->rstd1, a->x, N, C, 0.5), 36 * U);
    check("second", rstd_error(a->rstd2, a->res, N, C, 0.5), 36 * U);
    check("last", rstd_error(mb->rstdf, mb->layer[k->depth].x, N, C, 0.5), 36 * U);
    rank_free(k);
}

static void test_eps(void)
{
    Training t = make_training(ONE_RANK);
    t.batch = t.micro_batch = 2;
    t.config.eps = (real)0.5;
    run_ranks(1, eps_rank, &t);
}

/* The logits of all tokens are -1080, far below the padding's 0. In every
 * layout the loss is ln V [P16]. */
static void low_logits_rank(Comm *world, void *arg)
{
    Training *t = (Training *)arg;
    RankOptions o = training_options(t);
    Rank *k = rank_create(world, &o);
    MicroBatch *mb = &k->flight[0];
    double worst = 0;
    init_params(k->weights, k->tensor, k->tensors, &k->config, 1234, k->tp.rank);
    feed_test(t, k, mb, 0);
    for (size_t i = 0; i < k->valid * k->config.C; i++) k->w.wte[i] = -1;
    for (size_t i = 0; i < k->config.C; i++) {
        k->w.lnf_g[i] = 0;
        k->w.lnf_b[i] = 30;
    }
    stage_forward(k, mb);
    for (size_t n = 0; n < k->B * k->T; n++) {
        double e = fabs((double)mb->loss[n] / log((double)k->config.V) - 1);
        worst = worse(worst, e);
    }
    if (world->rank == 0) t->norm[0] = worst;
    rank_free(k);
}

static void test_low_logits(void)
{
    for (int tp = 1; tp <= 4; tp *= 2) {
        Layout s = {tp, 1, 1};
        Training t = make_training(s);
        char what[64];
        t.batch = t.micro_batch = 2;
        run_ranks(tp, low_logits_rank, &t);
        snprintf(what, sizeof what, "tp %d: logits below the padding's: ln V", tp);
        check(what, t.norm[0], 8 * U); /* a logarithm, a subtraction */
    }
}

/* ---- More of chapter 8 ----------------------------------------------------------------------- */

/* A target that does not count adds nothing, even where its loss is infinite. */
static void uncounted_rank(Comm *world, void *arg)
{
    Training *t = (Training *)arg;
    RankOptions o = training_options(t);
    Rank *k = rank_create(world, &o);
    MicroBatch *mb = &k->flight[0];
    for (size_t n = 0; n < k->B * k->T; n++) {
        mb->weight[n] = 0;
        mb->loss[n] = (real)INFINITY;
    }
    mb->weight[3] = 1;
    mb->loss[3] = 2;
    mb->weight[5] = (real)0.5;
    mb->loss[5] = 3;
    check_equal("targets that count: 2 and 0.5 times 3", sum_losses(k, mb), 3.5);
    rank_free(k);
}

static void test_sum_losses(void)
{
    Training t = make_training(ONE_RANK);
    run_ranks(1, uncounted_rank, &t);
}

/* ---- More of chapter 6 ----------------------------------------------------------------------- */

static void test_learning_rate_ends(void)
{
    Optimizer o = {1.5e-4, 0, 3000, 300000, DECAY_MEGATRON, 0.9, 0.999, 1e-8, 0.01, 1, 1};
    /* num_iters = min(k, end - warmup) - warmup: the cosine stops 2 warm-ups before it reaches 0 */
    double last = 1.5e-4 / 2 * (cos(M_PI * 294000 / 300000) + 1);
    check("Megatron without a floor: lr(297000)", fabs(learning_rate(&o, 297000) / last - 1),
          1e-12);
    check("Megatron without a floor: lr(300000) is the same",
          fabs(learning_rate(&o, 300000) / last - 1), 1e-12);
    o.decay = DECAY_COSINE;
    o.decay_steps = 3000;
    check_equal("a decay that ends with the warm-up: the peak stays", learning_rate(&o, 4000),
                1.5e-4);
}

static void test_loss_scaler_floor(void)
{
    LossScaler s = make_loss_scaler(0);
    s.scale = 2;
    for (int i = 0; i < 5; i++) loss_scaler_update(&s, 1);
    check_equal("the scale never falls below 1 [P36]", s.scale, 1);
}

/* One update with eps far above all gradients is w -= lr g c / (|g| c + eps), where g is the
 * unscaled gradient and c the factor of clipping. */
static void test_one_update(void)
{
    static const Layout layouts[] = {{1, 1, 1}, {2, 2, 2}};
    static const double clips[] = {0.1, 1e6, 0};
    for (int l = 0; l < 2; l++)
        for (int i = 0; i < 3; i++) {
            Training t = make_training(layouts[l]);
            Optimizer o = {100, 100, 0, 1, DECAY_PAPER, 0.9, 0.999, 1, 0, clips[i], 1024};
            char what[96];
            t.steps = 1;
            t.optimizer = o;
            run_training(&t);
            size_t n = whole_size(&t.config);
            double c = clips[i] > 0 ? fmin(clips[i] / (t.norm[0] + 1e-6), 1) : 1, difference = 0;
            double norm = 0, squares = 0;
            for (size_t e = 0; e < n; e++) {
                double g = (double)t.grad[e] / 1024, step = -100 * g * c / (fabs(g) * c + 1);
                double d = (double)t.weights[e] - (double)t.initial[e] - step;
                difference += d * d;
                norm += step * step;
                squares += g * g;
            }
            snprintf(what, sizeof what, "tp %d pp %d dp %d, clip %g: one update", layouts[l].tp,
                     layouts[l].pp, layouts[l].dp, clips[i]);
            /* weights of norm ~30 are rounded once; the step has norm ~10 */
            check(what, sqrt(difference / norm), 64 * U);
            check("  the norm is that of unscaled gradients", fabs(t.norm[0] / sqrt(squares) - 1),
                  LAYOUT_BOUND);
            free_training(&t);
        }
}

/* The dynamic loss scale starts far too large. Steps are skipped, and the scale is halved from the
 * second one on, until a step fits. Only then the weights move, and the clocks of Adam and of the
 * learning rate begin. The counts of steps and of samples go on all the time [P36, P39]. */
typedef struct {
    Training t;
    int skipped, updates, wrong_lr, wrong_scale, wrong_masks, wrong_count, moved_early, moved,
        negative;
} Dynamic;

static void dynamic_rank(Comm *world, void *arg)
{
    Dynamic *d = (Dynamic *)arg;
    Training *t = &d->t;
    RankOptions o = training_options(t);
    Rank *k = rank_create(world, &o);
    Progress p = {0, 0, 0, make_loss_scaler(0)};
    size_t bytes = k->elements * sizeof(act);
    act *before = (act *)xcalloc(1, bytes);
    /* gradients overflow; in double, the squares of gradients do */
    double scale = sizeof(real) == 4 ? 0x1p134 : 0x1p520;
    int hysteresis = 2, updates = 0;
    p.scaler.scale = scale;
    init_params(k->weights, k->tensor, k->tensors, &k->config, 1234, k->tp.rank);
    perturb(k);
    for (int step = 0; step < 30; step++) {
        memcpy(before, k->weights, bytes);
        StepResult r = train_step(k, &t->optimizer, &p, o.micro_batches, feed_test, t);
        int moved = memcmp(before, k->weights, bytes) != 0;
        int lr = learning_rate(&t->optimizer, (size_t)updates) > 0;
        if (world->rank == 0) {
            d->wrong_scale += r.loss_scale != scale;
            d->wrong_lr += r.lr != learning_rate(&t->optimizer, (size_t)updates);
            d->skipped += r.skipped;
            /* the masks change with each step, also with a skipped one */
            d->wrong_masks += k->step != (uint32_t)step;
            d->moved_early += moved && (r.skipped || !lr);
            d->moved += moved;
        }
        if (r.skipped) { /* the second overflow halves the scale, and so does each later one */
            if (hysteresis == 1) scale /= 2;
            else hysteresis--;
        } else updates++;
        if (world->rank == 0)
            d->wrong_count += p.step != (size_t)step + 1 || p.updates != (size_t)updates ||
                              p.samples != ((size_t)step + 1) * t->batch;
    }
    for (size_t e = 0; e < k->elements && world->rank == 0; e++) d->negative += k->v[e] < 0;
    if (world->rank == 0) d->updates = updates;
    free(before);
    rank_free(k);
}

static void test_dynamic_scale(void)
{
    Layout s = {2, 1, 2};
    Dynamic d;
    memset(&d, 0, sizeof d);
    d.t = make_training(s);
    d.t.optimizer.loss_scale = 0;
    d.t.optimizer.warmup = 5;
    run_ranks(4, dynamic_rank, &d);
    check_true("some steps are skipped, and then some are not", d.skipped >= 3 && d.updates >= 3);
    check_equal("steps with another scale than expected [P36]", d.wrong_scale, 0);
    check_equal("steps with another learning rate than that of the updates [P39]", d.wrong_lr, 0);
    check_equal("steps with the masks of another step", d.wrong_masks, 0);
    check_equal("steps with other counts of steps, updates, samples", d.wrong_count, 0);
    check_equal("steps that moved the weights though skipped, or at lr 0", d.moved_early, 0);
    check_equal("second moments that are negative", d.negative, 0);
    check_equal("all other updates did", d.moved, d.updates - 1);
}

/* ---- More of chapters 9 and 10 --------------------------------------------------------------- */

/* The logits of the token after `text`, by a whole pass with an empty cache. */
static const real *logits_after(Generator *g, const int *text, size_t n)
{
    g->cache.past = 0;
    generator_read(g, text, n);
    return g->logits;
}

static int greatest(const real *z, size_t n)
{
    size_t best = 0;
    for (size_t i = 1; i < n; i++) best = z[i] > z[best] ? i : best;
    return (int)best;
}

/* LAMBADA examples whose last words are right or wrong by construction. The label tokens of example
 * e are the most probable tokens, but for those whose bit in pattern[e] is 0. One example is longer
 * than T + 1, and the last pass is not full. */
enum { LAMBADA_N = 7, LAMBADA_T = 24, LAMBADA_V = 300 };
static const struct {
    size_t context, label;
    unsigned pattern;
} lambada_cases[LAMBADA_N] = {{5, 1, 1},  {9, 3, 7},  {1, 2, 2}, {40, 2, 3},
                              {12, 3, 5}, {22, 3, 7}, {7, 1, 0}};

typedef struct {
    int tp;
    size_t B, seq_after;
    Accuracy accuracy;
    int ties;
} LambadaRun;

static void lambada_rank(Comm *world, void *arg)
{
    LambadaRun *run = (LambadaRun *)arg;
    Rank *k = scored_model(world, run->tp, 1);
    Generator *g = generator_create(k);
    LambadaExample example[LAMBADA_N];
    Lambada l = {{NULL, 0, 0}, example, LAMBADA_N, LAMBADA_N};
    for (size_t e = 0; e < LAMBADA_N; e++) {
        size_t first = l.tokens.n, n = lambada_cases[e].context + lambada_cases[e].label;
        size_t cut = n > LAMBADA_T + 1 ? n - (LAMBADA_T + 1) : 0;
        for (size_t i = 0; i < lambada_cases[e].context; i++)
            push_token(&l.tokens, (int)(random_word(5, SITE_SAMPLE, (uint32_t)e, i) % LAMBADA_V));
        for (size_t i = 0; i < lambada_cases[e].label; i++) {
            int best = greatest(
                logits_after(g, l.tokens.id + first + cut, l.tokens.n - first - cut), LAMBADA_V);
            push_token(&l.tokens,
                       lambada_cases[e].pattern >> i & 1 ? best : (best + 1) % LAMBADA_V);
        }
        LambadaExample made = {first, lambada_cases[e].context, lambada_cases[e].label};
        example[e] = made;
    }
    generator_free(g);
    rank_free(k);
    k = scored_model(world, run->tp, run->B);
    Accuracy a = lambada_accuracy(k, &l, SIZE_MAX, 299, NULL);

    /* Equal logits, on one rank and on several: the first token counts. */
    MicroBatch *mb = &k->flight[0];
    size_t rows[2] = {0, 1};
    int id[2];
    for (size_t v = 0; v < 2 * k->Vp; v++) mb->logits[v] = 0;
    for (size_t v = 0; v < k->valid; v++)
        mb->logits[k->Vp + v] = k->v0 + v >= 7 && (k->v0 + v) % 10 == 7 ? 1 : 0;
    most_probable(k, mb, rows, 2, id);
    if (world->rank == 0) {
        run->accuracy = a;
        run->seq_after = k->T;
        run->ties = id[0] == 0 && id[1] == 7;
    }
    free(l.tokens.id);
    rank_free(k);
}

static void test_lambada_accuracy(void)
{
    size_t correct = 0, last = 0;
    for (size_t e = 0; e < LAMBADA_N; e++) {
        unsigned all = (1u << lambada_cases[e].label) - 1;
        correct += lambada_cases[e].pattern == all;
        last += lambada_cases[e].pattern >> (lambada_cases[e].label - 1) & 1;
    }
    for (int tp = 1; tp <= 4; tp *= 2)
        for (size_t B = 1; B <= 3; B += 2) {
            LambadaRun run = {tp, B, 0, {0, 0, 0}, 0};
            char what[96];
            run_ranks(tp, lambada_rank, &run);
            snprintf(what, sizeof what, "tp %d, %zu a pass: whole last words right", tp, B);
            check_equal(what, (double)run.accuracy.correct, (double)correct);
            check_equal("  last tokens right", (double)run.accuracy.last_correct, (double)last);
            check_equal("  examples", (double)run.accuracy.examples, LAMBADA_N);
            check_equal("  the rank's T is as before", (double)run.seq_after, LAMBADA_T);
            check_true("  of equal logits the first token counts", run.ties);
        }
}

/* Generation against whole passes: a prompt longer than T; a text that is read again when all T
 * positions are full; the end of a document; a second text with the same generator. */
typedef struct {
    int tp, wrong, emitted, stopped, second;
} Generation;

/* A limit on windows: the last pass is filled up with copies, which must not count. */
static void limited_rank(Comm *world, void *arg)
{
    Scored *s = (Scored *)arg;
    Rank *k = scored_model(world, 1, s->B);
    double *loss = s->B == 1 ? &s->brute : &s->sliding;
    *loss = 0;
    for (size_t limit = 1; limit <= 5; limit++) {
        Score score = text_loss(k, &s->text, 5, limit, 299, NULL);
        /* T targets in the first window, 5 in each later one */
        if (score.targets != 24 + 5 * (limit - 1)) *loss = NAN;
        *loss += score.loss;
    }
    /* Inference keeps one layer's activations, whatever the depth. */
    s->disjoint = k->flight[0].layer[0].ln1 == k->flight[0].layer[1].ln1 &&
                  k->flight[0].layer[0].x != k->flight[0].layer[1].x;
    rank_free(k);
}

static void test_limited_windows(void)
{
    Scored s;
    memset(&s, 0, sizeof s);
    for (size_t i = 0; i < 117; i++)
        push_token(&s.text, (int)(random_word(3, SITE_SAMPLE, 0, i) % 299));
    s.B = 1;
    run_ranks(1, limited_rank, &s);
    s.B = 3;
    run_ranks(1, limited_rank, &s);
    check("1 to 5 windows, 3 a pass against 1 a pass", fabs(s.sliding / s.brute - 1),
          sizeof(real) == 4 ? 4e-8 : 2e-15);
    check_true("inference: layers share their memory, but for their inputs", s.disjoint == 1);
    free(s.text.id);
}

static void count_token(void *arg, int id)
{
    (void)id;
    ++*(int *)arg;
}

static void generation_rank(Comm *world, void *arg)
{
    Generation *r = (Generation *)arg;
    const size_t T = LAMBADA_T;
    Rank *k = scored_model(world, r->tp, 1);
    Generator *g = generator_create(k);
    Candidate heap[LAMBADA_V];
    int wrong = 0, emitted = 0, stopped, second;
    static const size_t prompts[] = {1, 20, 23, 24, 31};
    for (int p = 0; p < 5; p++) {
        Sampler s = {p % 2 ? 1.5 : 0, 0, 1, 9};
        Tokens text = {NULL, 0, 0};
        size_t n = prompts[p], begin = n > T ? n - T : 0;
        for (size_t i = 0; i < n; i++)
            push_token(&text, (int)(random_word(6, SITE_SAMPLE, (uint32_t)p, i) % LAMBADA_V));
        generate(g, &text, 40, &s, -1, count_token, &emitted);
        wrong += text.n != n + 40;
        /* text[begin .. i-1] stands at positions 0 .. i-1-begin */
        for (size_t i = n; i < n + 40; i++) {
            if (i - begin > T) begin = i - (T + 1) / 2;
            wrong += text.id[i] != sample_token(logits_after(g, text.id + begin, i - begin),
                                                LAMBADA_V, &s, i, heap);
        }
        free(text.id);
    }
    Tokens text = {NULL, 0, 0};
    Sampler greedy = {0, 0, 1, 0};
    push_token(&text, 3);
    int first = greatest(logits_after(g, text.id, 1), LAMBADA_V), before = emitted;
    generate(g, &text, 40, &greedy, first, count_token, &emitted);
    stopped = text.n == 2 && text.id[1] == first && emitted == before;
    text.n = 1;
    generate(g, &text, 1, &greedy, -1, NULL, NULL); /* the cache of the text before must be gone */
    second = text.id[1] == first;
    if (world->rank == 0) {
        r->wrong = wrong;
        r->emitted = before;
        r->stopped = stopped;
        r->second = second;
    }
    free(text.id);
    generator_free(g);
    rank_free(k);
}

static void test_generation(void)
{
    for (int tp = 1; tp <= 4; tp *= 4) {
        Generation r = {tp, 0, 0, 0, 0};
        char what[96];
        run_ranks(tp, generation_rank, &r);
        snprintf(what, sizeof what, "tp %d: tokens that a whole pass would not draw, of 200", tp);
        check_equal(what, r.wrong, 0);
        check_equal("  each token is emitted", r.emitted, 200);
        check_true("  <|endoftext|> ends the text, and is not emitted", r.stopped);
        check_true("  a second text begins at position 0", r.second);
    }
}

static void test_sampler_ties(void)
{
    real z[9] = {0, 1, 1, 0, 1, 1, 1, 0, 1};
    Sampler s = {1, 3, 1, 8};
    Candidate heap[9];
    int seen[9] = {0}, wrong = 0;
    for (size_t i = 0; i < 200; i++) seen[sample_token(z, 9, &s, i, heap)]++;
    for (int i = 0; i < 9; i++) wrong += (seen[i] > 0) != (i == 1 || i == 2 || i == 4);
    check_equal("top-k 3 of six equal tokens: the first three", wrong, 0);
    check_equal("the exponent of a perplexity is capped at 20", perplexity(50), exp(20));
    check_equal("  and only there", perplexity(3), exp(3));
}

/* ---- More of chapter 16 ---------------------------------------------------------------------- */

/* trace_agrees() sees a message too many, one too long and one too few. Its
 * reports go to /dev/null. */
static void test_trace_disagrees(void)
{
    Layout s = {2, 1, 2};
    Training t = make_training(s);
    t.steps = 1;
    run_training(&t);
    size_t micro_batches = t.batch / t.micro_batch / (size_t)s.dp;
    RankOptions in = {t.config, s, t.micro_batch, micro_batches, t.config.P, 1, 0, 0};
    Trace *trace = &t.trace[0];
    int agrees[5], saved = dup(STDERR_FILENO), null = open("/dev/null", O_WRONLY);
    fflush(stderr);
    dup2(null, STDERR_FILENO);
    agrees[0] = trace_agrees(trace, &in, 0);
    trace->event[2].elements++;
    agrees[1] = trace_agrees(trace, &in, 0);
    trace->event[2].elements--;
    trace->n--;
    agrees[2] = trace_agrees(trace, &in, 0);
    trace->n++;
    const char *group = trace->event[2].group;
    trace->event[2].group = "pp";
    agrees[3] = trace_agrees(trace, &in, 0);
    trace->event[2].group = group;
    Comm extra = {0, 2, NULL, "pp", 0, NULL, trace};
    record(&extra, "send", 5, ACT); /* of a kind that the plan does not have */
    agrees[4] = trace_agrees(trace, &in, 0);
    dup2(saved, STDERR_FILENO);
    close(saved);
    close(null);
    check_true("a trace as it is agrees with the plan", agrees[0]);
    check_true("one element more is seen", !agrees[1]);
    check_true("one message less is seen", !agrees[2]);
    check_true("another group is seen", !agrees[3]);
    check_true("a message of an unknown kind is seen", !agrees[4]);
    free_training(&t);
}

static double number_of(const Json *json, const JsonValue *object, const char *key)
{
    const JsonValue *v = json_get(json, object, key);
    return v && v->type == JSON_NUMBER ? v->number : NAN;
}

/* `trace --json` has the events and totals of each stage, numbers layers over all stages, counts
 * bytes by type, and gives a place for every message. */
static void test_trace_output(void)
{
    static const Layout layouts[] = {{2, 1, 1}, {2, 2, 2}, {1, 4, 1}};
    for (int i = 0; i < 3; i++) {
        Layout s = layouts[i];
        char path[PATH_MAX], what[96];
        int m = 8 / s.dp / 2, depth = 4 / s.pp;
        check_equal("trace",
                    run_command("./megatron_gpt2 trace --hidden 32 --heads 4 --seq 8 --batch 8 "
                                "--micro-batch 2 --tp %d --pp %d --dp %d --json 2>/dev/null "
                                "> %s/new_trace",
                                s.tp, s.pp, s.dp, SCRATCH),
                    0);
        Map map = map_file(join_path(path, SCRATCH, "new_trace"));
        Json json = json_parse(map.data, map.size, "the trace");
        const JsonValue *events = json_get(&json, json.value, "events");
        const JsonValue *totals = json_get(&json, json.value, "totals");
        int wrong = !events || !totals, wrong_totals = 0, n[64] = {0}, attention = 0, mlp = 0;
        for (const JsonValue *e = events + 1; !wrong && e < json.value + events->end;
             e = json.value + e->end) {
            int stage = (int)number_of(&json, e, "stage");
            int layer = (int)number_of(&json, e, "layer");
            const char *group = json_get(&json, e, "group")->string;
            const char *where = json_get(&json, e, "where")->string;
            double size = !strcmp(group, "world") ? 8 : 4;
            n[stage]++;
            attention += !strcmp(where, "attention");
            mlp += !strcmp(where, "mlp");
            wrong += number_of(&json, e, "bytes") != size * number_of(&json, e, "elements");
            wrong += layer != -1 && layer / depth != stage;
            wrong += (layer >= 0) != (!strcmp(where, "attention") || !strcmp(where, "mlp"));
            wrong += !strcmp(where, "-") ||
                     (!strcmp(group, "embedding") && strcmp(where, "tied embedding")) ||
                     (!strcmp(group, "pp") && strcmp(where, "pipeline")) ||
                     (!strcmp(group, "dp") && strcmp(where, "data parallel"));
        }
        int stage = 0;
        for (const JsonValue *e = totals + 1; !wrong && e < json.value + totals->end;
             e = json.value + e->end, stage++) {
            const JsonValue *layers = json_get(&json, e, "layers");
            const JsonValue *agrees = json_get(&json, e, "agrees_with_plan");
            RankOptions in = plan_case("tiny", s.tp, s.pp, s.dp, 8, 2, 0);
            Message list[MAX_MESSAGES];
            size_t calls = 0;
            in.config = make_config(4, 32, 4, 8, 257);
            in.seq = 8;
            for (size_t j = 0, count = list_messages(list, &in, stage); j < count; j++)
                calls += list[j].count;
            wrong_totals += !agrees || agrees->type != JSON_TRUE ||
                            number_of(&json, e, "stage") != stage || (size_t)n[stage] != calls;
            wrong_totals += !layers || layers->length != (s.tp > 1 ? (size_t)depth : 0);
            int layer = stage * depth;
            for (const JsonValue *l = layers + 1; layers && l < json.value + layers->end;
                 l = json.value + l->end, layer++)
                wrong_totals += number_of(&json, l, "layer") != layer ||
                                number_of(&json, l, "calls") != 4 * m ||
                                number_of(&json, l, "elements") != 4 * m * 2 * 8 * 32;
        }
        snprintf(what, sizeof what, "tp %d pp %d dp %d: events of wrong layer, bytes or place",
                 s.tp, s.pp, s.dp);
        check_equal(what, wrong, 0);
        check_equal("  wrong totals", wrong_totals, 0);
        check_equal("  messages of attention: one forward, one backward, in each layer [P5]",
                    attention, s.tp > 1 ? 2 * 4 * m : 0);
        check_equal("  and of the MLP", mlp, s.tp > 1 ? 2 * 4 * m : 0);
        check_equal("  stages", stage, s.pp);
        json_free(&json);
        unmap_file(map);
    }
}

/* ---- More of chapter 17 ---------------------------------------------------------------------- */

/* Parses options as from a command line, its words separated by single blanks. They stay in
 * `line`. */
static Options options_of(char *line)
{
    static char program[] = "megatron_gpt2";
    char *argv[64] = {program};
    int argc = 1;
    Options o;
    for (char *word = strtok(line, " "); word; word = strtok(NULL, " ")) argv[argc++] = word;
    parse_options(&o, argc, argv);
    return o;
}

/* The paper's settings for training [§4.2], and sizes that follow from each other. */
static void test_defaults(void)
{
    char train[] = "train --data x", one[] = "train --data x --batch 12 --dp 3";
    char stages[] = "train --data x --batch 12 --dp 3 --pp 2";
    char as_given[] = "train --data x --batch 12 --dp 3 --pp 2 --micro-batch 2";
    char erf[] = "train --data x --activation gelu --dropout 0.25";
    char plain[] = "train --data x --seed 5";
    Options o = options_of(train);
    check_true("AdamW: 1.5e-4, betas 0.9 0.999, eps 1e-8, decay 0.01 [P31, P32]",
               o.optimizer.lr == 1.5e-4 && o.optimizer.beta1 == 0.9 && o.optimizer.beta2 == 0.999 &&
                   o.optimizer.eps == 1e-8 && o.optimizer.weight_decay == 0.01);
    check_true("clip 1, cosine as in the paper, seed 1234 [P28, P35]",
               o.optimizer.clip == 1 && !strcmp(o.lr_decay, "paper") && o.seed == 1234);
    check_true("batch 8, 1000 steps, loss scale 1, one rank",
               o.batch == 8 && o.steps == 1000 && o.optimizer.loss_scale == 1 && o.tp == 1 &&
                   o.pp == 1 && o.dp == 1);
    o = options_of(one);
    check_equal("micro-batch of 12 sequences on 3 data ranks", (double)micro_batch_size(&o), 4);
    o = options_of(stages);
    check_equal("  with stages", (double)micro_batch_size(&o), 1);
    o = options_of(as_given);
    check_equal("  as given", (double)micro_batch_size(&o), 2);
    TrainCommand t;
    memset(&t, 0, sizeof t);
    o = options_of(erf);
    prepare_model(&t, &o);
    const Config *c = &t.run.ranks.config;
    check_true("--activation gelu is erf", c->gelu == GELU_ERF);
    check_true("--dropout holds at all sites", c->embd_pdrop == (real)0.25 &&
                                                   c->attn_pdrop == (real)0.25 &&
                                                   c->resid_pdrop == (real)0.25);
    tokenizer_close(t.tokenizer);
    memset(&t, 0, sizeof t);
    o = options_of(plain);
    prepare_model(&t, &o);
    check_true("the model's own: tanh, dropout 0.1, 257 tokens, 64 positions",
               c->gelu == GELU_TANH && c->embd_pdrop == (real)0.1 && c->attn_pdrop == (real)0.1 &&
                   c->resid_pdrop == (real)0.1 && c->V == 257 && o.seq == 64);
    tokenizer_close(t.tokenizer);
}

/* All that a run must remember comes back from a checkpoint unchanged. */
typedef struct {
    Options o;
    const Progress *progress;
} SavedRun;

static void save_run_rank(Comm *world, void *arg)
{
    SavedRun *s = (SavedRun *)arg;
    RankOptions o = {make_config(1, 8, 2, 4, 257), ONE_RANK, 1, 1, 4, 1, 0, 1};
    Rank *k = rank_create(world, &o);
    TrainCommand t;
    memset(&t, 0, sizeof t);
    t.o = &s->o;
    t.text_tokens = 777;
    t.tokenizer = tokenizer_bytes();
    save_run(&t.run, k, s->progress);
    tokenizer_close(t.tokenizer);
    rank_free(k);
}

static void test_run_state(void)
{
    char saved[512], resumed[256];
    snprintf(saved, sizeof saved,
             "train --data x --seq 3 --batch 5 --steps 60 --lr 0.5 --min-lr 0.25 --warmup 7 "
             "--decay-steps 71 --lr-decay cosine --beta1 0.5 --beta2 0.75 --adam-eps 0.125 "
             "--weight-decay 3 --clip 2 --loss-scale 0 --seed 9 --valid-percent 11 "
             "--save %s/new_state",
             SCRATCH);
    snprintf(resumed, sizeof resumed, "train --data x --resume %s/new_state --clip 4", SCRATCH);
    const Progress p = {50, 40, 123, {8, 1, 1, 49, 17}};
    SavedRun s = {options_of(saved), &p};
    run_ranks(1, save_run_rank, &s);
    TrainCommand t;
    char path[PATH_MAX];
    Config c = make_config(1, 8, 2, 4, 257);
    snprintf(path, sizeof path, "%s/new_state", SCRATCH);
    Options o = options_of(resumed);
    memset(&t, 0, sizeof t);
    t.trainer = open_trainer(path, &c);
    t.run.progress.scaler = make_loss_scaler(1);
    resume_run(&t, &o);
    const Progress *q = &t.run.progress;
    check_true("steps 50, updates 40, samples 123, 777 tokens of text",
               q->step == 50 && q->updates == 40 && q->samples == 123 && t.text_tokens == 777);
    check_true("loss scale 8, dynamic, one overflow from halving, at 49, the last at 17",
               q->scaler.scale == 8 && q->scaler.dynamic == 1 && q->scaler.hysteresis == 1 &&
                   q->scaler.iteration == 49 && q->scaler.last_overflow == 17);
    check_true("sequence, batch, steps, seed, held-out share",
               o.seq == 3 && o.batch == 5 && o.steps == 60 && o.seed == 9 && o.valid_percent == 11);
    check_true("learning rate and its course",
               o.optimizer.lr == 0.5 && o.optimizer.min_lr == 0.25 && o.optimizer.warmup == 7 &&
                   o.optimizer.decay_steps == 71 && !strcmp(o.lr_decay, "cosine"));
    check_true("AdamW, dynamic scaling",
               o.optimizer.beta1 == 0.5 && o.optimizer.beta2 == 0.75 && o.optimizer.eps == 0.125 &&
                   o.optimizer.weight_decay == 3 && o.optimizer.loss_scale == 0);
    check_equal("what the command line says goes before", o.optimizer.clip, 4);
    Optimizer a = make_optimizer(&o);
    check_true("all of it reaches the optimizer",
               a.lr == 0.5 && a.min_lr == 0.25 && a.warmup == 7 && a.decay_steps == 71 &&
                   a.decay == DECAY_COSINE && a.beta1 == 0.5 && a.beta2 == 0.75 && a.eps == 0.125 &&
                   a.weight_decay == 3 && a.clip == 4 && a.loss_scale == 0);
    safetensors_close(&t.trainer);
}

/* A log that is continued after step 3 loses its later steps and its half line. A
 * new run appends to a log. */
static void test_log(void)
{
    static const char before[] =
        "{\"step\": 1, \"loss\": 5}\n{\"step\": 2, \"loss\": 4}\nnoise\n{\"step\": 3, "
        "\"loss\": 3}\n{\"step\": 4, \"loss\": 2}\n{\"step\": 3, \"lo";
    static const char *const after[2] = {
        "{\"step\": 1, \"loss\": 5}\n{\"step\": 2, \"loss\": 4}\n{\"step\": 3, \"loss\": 3}\nend\n",
        NULL};
    char path[PATH_MAX], appended[sizeof before + 8];
    snprintf(appended, sizeof appended, "%send\n", before);
    for (int fresh = 0; fresh < 2; fresh++) {
        FILE *f = fopen(join_path(path, SCRATCH, "new_log"), "w");
        if (!f) die("cannot write %s", path);
        fwrite(before, 1, sizeof before - 1, f);
        fclose(f);
        f = open_log(path, fresh ? 0 : 3);
        fputs("end\n", f);
        fclose(f);
        const char *expected = fresh ? appended : after[0];
        Map map = map_file(path);
        check_true(fresh ? "a new run appends to its log"
                         : "a resumed run's log holds the steps up to 3, once each",
                   map.size == strlen(expected) && !memcmp(map.data, expected, map.size));
        unmap_file(map);
    }
    run_command("rm -f %s/new_log", SCRATCH);
    FILE *f = open_log(path, 3);
    fclose(f);
    check_true("a resumed run without a log begins one", access(path, F_OK) == 0);
}

/* Draws a straight line from 15 down to 2, two steps for each column. Each column must have one
 * star, on the line; labels are 14 equal steps. */
static void test_curve(void)
{
    enum { N = 144, W = 72, H = 14 };
    Curve curve;
    char path[PATH_MAX], line[256];
    double top = NAN, bottom = NAN, label;
    int wrong = 0, stars = 0, rows = 0;
    memset(&curve, 0, sizeof curve);
    for (int i = 0; i < N; i++) {
        curve.sum[i / 2] += 15 - 13.0 * (i / 2) / (W - 1) + (i % 2 ? 0.01 : -0.01);
        curve.n[i / 2]++;
    }
    fflush(stdout);
    int saved = dup(STDOUT_FILENO);
    int file = open(join_path(path, SCRATCH, "new_curve"), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    dup2(file, STDOUT_FILENO);
    draw_curve(&curve, 0, N);
    fflush(stdout);
    dup2(saved, STDOUT_FILENO);
    close(saved);
    close(file);
    FILE *f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f)) {
        char *bar = strchr(line, '|');
        if (!bar || sscanf(line, "%lf", &label) != 1) continue;
        if (rows == 0) top = label;
        bottom = label;
        int y = H - 1 - rows; /* rows are one apart: 2 .. 15 */
        rows++;
        for (int x = 0; x < W && bar[1 + x] >= ' '; x++) {
            double value = 15 - 13.0 * x / (W - 1), height = value - 2;
            int star = bar[1 + x] == '*';
            stars += star;
            /* numbers are floats: 15 has an error of 1e-6 */
            wrong += star && !(fabs(height - y) <= 0.5 + 1e-6);
        }
    }
    if (f) fclose(f);
    check_equal("rows", rows, H);
    check_equal("the highest column's mean", top, 15);
    check_equal("the lowest", bottom, 2);
    check_equal("stars: one a column", stars, W);
    check_equal("  that are not on the line", wrong, 0);
}

/* Runs the program with --json and keeps the numbers `key` of each line; NaN where a line has none.
 * Returns the number of lines. */
static size_t run_lines(const char *command, const char *const key[3], double value[][3],
                        size_t most)
{
    char path[PATH_MAX], line[4096];
    size_t n = 0;
    if (run_command("./megatron_gpt2 %s --json 2>/dev/null > %s/new_lines", command, SCRATCH))
        return 0;
    FILE *f = fopen(join_path(path, SCRATCH, "new_lines"), "r");
    while (f && n < most && fgets(line, sizeof line, f)) {
        Json json = json_parse(line, strlen(line), "a line");
        for (int i = 0; i < 3; i++) value[n][i] = number_of(&json, json.value, key[i]);
        json_free(&json);
        n++;
    }
    if (f) fclose(f);
    return n;
}

/* In several layouts the program reads the same samples in the same order, and has the same
 * held-out loss. Losses differ by the rounding of float sums, and by what AdamW makes of it: some
 * steps of lr 1e-4 in weights that hardly matter. */
static void test_program_layouts(void)
{
    static const char *const layouts[] = {"",
                                          "--tp 2",
                                          "--dp 2",
                                          "--dp 2 --micro-batch 1",
                                          "--micro-batch 1",
                                          "--pp 2 --micro-batch 2",
                                          "--dp 4 --recompute",
                                          "--tp 2 --pp 2 --dp 2"};
    static const char *const key[3] = {"loss", "grad_norm", "val_loss"};
    double first[6][3], value[6][3];
    char command[512];
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
        double worst = 0;
        snprintf(command, sizeof command,
                 "train --data %s/text.txt --layers 2 --hidden 32 --heads 4 --seq 16 --batch 4 "
                 "--lr 1e-4 --steps 5 --valid-percent 1 --eval-every 3 %s",
                 SCRATCH, layouts[i]);
        size_t n = run_lines(command, key, i ? value : first, 6);
        if (i == 0)
            check_true("held-out losses at step 3 and at the end",
                       n == 5 && isnan(first[0][2]) && first[2][2] > 0 && isnan(first[3][2]) &&
                           first[4][2] > 0);
        for (size_t s = 0; s < n && i; s++)
            for (int j = 0; j < 3; j++) {
                if (isnan(first[s][j]) && isnan(value[s][j])) continue;
                worst = worse(worst, fabs(value[s][j] / first[s][j] - 1));
            }
        if (i) check(layouts[i], n == 5 ? worst : NAN, 1e-5);
    }
    /* At lr 0 the held-out loss must not change, because it has no dropout. Measuring it must not
     * disturb training, which has dropout. */
    static const char base[] =
        "--layers 2 --hidden 32 --heads 4 --seq 16 --batch 4 --steps 4 --valid-percent 5";
    snprintf(command, sizeof command,
             "train --data %s/text.txt %s --lr 0 --min-lr 0 --eval-every 1", SCRATCH, base);
    size_t n = run_lines(command, key, value, 6);
    check_true("lr 0: the same held-out loss at each step",
               n == 4 && value[0][2] > 0 && value[1][2] == value[0][2] &&
                   value[2][2] == value[0][2] && value[3][2] == value[0][2]);
    check_true("  but other losses", value[1][0] != value[0][0]);
    snprintf(command, sizeof command, "train --data %s/text.txt %s --lr 0 --min-lr 0", SCRATCH,
             base);
    size_t m = run_lines(command, key, first, 6);
    int same = m == n;
    for (size_t s = 0; s < m && s < n; s++)
        same &= first[s][0] == value[s][0] && first[s][1] == value[s][1];
    check_true("measuring it does not change training", same);
    /* The default warm-up: a hundredth of --decay-steps. */
    static const char *const rate[3] = {"lr", "step", "loss_scale"};
    snprintf(command, sizeof command, "train --data %s/text.txt %s --lr 0.5 --decay-steps 200",
             SCRATCH, base);
    n = run_lines(command, rate, value, 6);
    check_true("--decay-steps 200: a warm-up of 2 steps",
               n == 4 && value[0][0] == 0 && value[1][0] == 0.25 && value[2][0] == 0.5);
    check_true("  steps count from 1", value[0][1] == 1 && value[3][1] == 4);
    /* A text of a's that ends with b's: the b's are held out, so training never learns them. */
    char path[PATH_MAX];
    FILE *f = fopen(join_path(path, SCRATCH, "new_ab"), "w");
    if (!f) die("cannot write %s", path);
    for (int i = 0; i < 2200; i++) fputc(i < 2000 ? 'a' : 'b', f);
    fclose(f);
    double last[20][3];
    snprintf(command, sizeof command,
             "train --data %s/new_ab --layers 2 --hidden 32 --heads 4 --seq 16 --batch 4 "
             "--lr 1e-2 --steps 20 --valid-percent 10 --eval-every 20",
             SCRATCH);
    n = run_lines(command, key, last, 20);
    check("what was trained is known", n == 20 ? last[19][0] : NAN, 1);
    check("  what was held out is not: of ln 257 = 5.5 nats it costs most",
          n == 20 ? 3 / last[19][2] : NAN, 1);
}

/* --seed draws the weights and the masks. With one sample of text, and the weights of --init,
 * nothing else is drawn. */
static void test_seeds(void)
{
    static const char *const key[3] = {"loss", "lr", "step"};
    double value[4][3];
    char command[512], path[PATH_MAX];
    FILE *f = fopen(join_path(path, SCRATCH, "new_sentence"), "w");
    if (!f) die("cannot write %s", path);
    fputs("just one sentence", f); /* 17 bytes and <|endoftext|>: one sample of 16 + 1 */
    fclose(f);
    for (int i = 0; i < 4; i++) { /* i & 1 is the seed; i < 2 starts with new weights */
        char start[256];
        if (i < 2)
            snprintf(start, sizeof start,
                     "--layers 2 --hidden 32 --heads 4 --seq 16 --dropout 0 --save %s/seed%d",
                     SCRATCH, i);
        else snprintf(start, sizeof start, "--init %s/seed0 --dropout 0.5", SCRATCH);
        snprintf(command, sizeof command,
                 "train --data %s/new_sentence %s --batch 1 --steps 1 --seed %d", SCRATCH, start,
                 5 + i % 2);
        if (run_lines(command, key, &value[i], 1) != 1) value[i][0] = NAN;
    }
    check_true("another seed, other weights",
               value[0][0] > 0 && value[1][0] > 0 && value[0][0] != value[1][0]);
    check_true("another seed, other masks",
               value[2][0] > 0 && value[3][0] > 0 && value[2][0] != value[3][0]);
}

/* Every option differs from its default, and scaling is dynamic. 13 steps and 17 more end with the
 * same bytes as 30, and their log has the same lines. */
static void test_resume_options(void)
{
    char a[PATH_MAX], b[PATH_MAX], settings[512];
    snprintf(a, sizeof a, "%s/options_whole", SCRATCH);
    snprintf(b, sizeof b, "%s/options_half", SCRATCH);
    snprintf(settings, sizeof settings,
             "--layers 2 --hidden 32 --heads 4 --seq 16 --batch 4 --lr 1e-2 --min-lr 2e-3 "
             "--warmup 6 --decay-steps 40 --lr-decay cosine --beta1 0.8 --beta2 0.95 "
             "--adam-eps 1e-6 --weight-decay 0.1 --clip 0.5 --loss-scale 0 --seed 77 "
             "--valid-percent 20 --dropout 0.2");
    check_equal("30 steps",
                run_command("./megatron_gpt2 train --data %s/text.txt %s --steps 30 --save %s "
                            "--log %s/log_a >/dev/null 2>&1",
                            SCRATCH, settings, a, SCRATCH),
                0);
    check_equal("13 steps",
                run_command("./megatron_gpt2 train --data %s/text.txt %s --steps 13 --save %s "
                            "--log %s/log_b >/dev/null 2>&1",
                            SCRATCH, settings, b, SCRATCH),
                0);
    check_equal("17 more",
                run_command("./megatron_gpt2 train --data %s/text.txt --resume %s --steps 30 "
                            "--log %s/log_b >/dev/null 2>&1",
                            SCRATCH, b, SCRATCH),
                0);
    check_true("every option off its default, resumed: the same bytes", same_checkpoint(a, b));
    check_equal("and the same log, but for the speed",
                run_command("for f in log_a log_b; do sed 's/, \"tokens_per_second\": [0-9.e+]*//' "
                            "%s/$f > %s/$f.s; done; "
                            "cmp -s %s/log_a.s %s/log_b.s && test $(wc -l < %s/log_a.s) = 30",
                            SCRATCH, SCRATCH, SCRATCH, SCRATCH, SCRATCH),
                0);
}

/* eval and generate from the command line: Appendix E's division by T_o - 1, windows of 32 new
 * targets, LAMBADA's counts. */
static void test_eval_output(void)
{
    static const char *const key[3] = {"loss", "ppl", "adjusted_ppl"};
    static const char *const counts[3] = {"targets", "original_tokens", "windows"};
    double value[1][3] = {{NAN, NAN, NAN}}, count[1][3] = {{NAN, NAN, NAN}};
    char command[512], path[PATH_MAX];
    run_command("./megatron_gpt2 train --data %s/text.txt --layers 1 --hidden 32 --heads 2 "
                "--seq 48 --batch 1 --steps 1 --save %s/evaluated >/dev/null 2>&1",
                SCRATCH, SCRATCH);
    FILE *f = fopen(join_path(path, SCRATCH, "new_wiki"), "w");
    if (!f) die("cannot write %s", path);
    for (int i = 0; i < 97; i++) fprintf(f, "%c ", 'a' + i * 7 % 26);
    fputs("x @-@ y\n", f); /* 100 words; 198 bytes, the last of which are x-y */
    fclose(f);
    f = fopen(join_path(path, SCRATCH, "new_lambada"), "w");
    if (!f) die("cannot write %s", path);
    for (int i = 1; i <= 7; i++) /* " abc": 4 bytes, 4 tokens */
        fprintf(f, "{\"text\": \"some words %.*s\"}\n", i, "abcdefg");
    fclose(f);
    snprintf(command, sizeof command, "eval --model %s/evaluated --wikitext %s/new_wiki", SCRATCH,
             SCRATCH);
    check_equal("eval --wikitext", (double)run_lines(command, key, value, 1), 1);
    run_lines(command, counts, count, 1);
    check_equal("targets", count[0][0], 197);
    check_equal("original tokens", count[0][1], 100);
    check_equal("windows: 32 new targets in each [P52]", count[0][2], 7);
    check("perplexity = exp(loss)", fabs(value[0][1] / exp(value[0][0]) - 1),
          1e-7); /* a loss near 5.5 is printed with nine digits */
    check("adjusted: exp of the sum / (T_o - 1) [P51]",
          fabs(value[0][2] / exp(value[0][0] * 197 / 99) - 1), 1e-7);
    check_equal(
        "eval --lambada: last words of 2, 3, 4, 5 tokens, three of more",
        run_command(
            "./megatron_gpt2 eval --model %s/evaluated --lambada %s/new_lambada --limit 0 --json "
            "2>/dev/null | grep -qF '[0, 1, 1, 1, 1, 3]'",
            SCRATCH, SCRATCH),
        0);
    check_equal(
        "generate: --top-p 0 and --top-k 1 are --temperature 0",
        run_command(
            "g='./megatron_gpt2 generate --model %s/evaluated --prompt the --tokens 30 --json'; "
            "$g --temperature 0 > %s/g0 2>/dev/null; "
            "$g --top-p 0 > %s/g1 2>/dev/null; "
            "$g --top-k 1 > %s/g2 2>/dev/null; "
            "cmp -s %s/g0 %s/g1 && cmp -s %s/g0 %s/g2 && ! $g 2>/dev/null | cmp -s %s/g0 -",
            SCRATCH, SCRATCH, SCRATCH, SCRATCH, SCRATCH, SCRATCH, SCRATCH, SCRATCH, SCRATCH),
        0);
}

/* ---- convert ------------------------------------------------------------------------------------
 *
 * The program is run, and its outputs are read with chapter 14 and with its own inspect. */

/* Runs ./convert with these arguments. Returns its exit status. convert_output is what it wrote to
 * stdout, convert_error what it wrote to stderr; the next call overwrites both. */
static const char *convert_output, *convert_error;

__attribute__((format(printf, 1, 2))) static int run_convert(const char *format, ...)
{
    static char output[1 << 20], error[1 << 14];
    char arguments[2048], path[PATH_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(arguments, sizeof arguments, format, args);
    va_end(args);
    int status =
        run_command("./convert %s >%s/convert.out 2>%s/convert.err", arguments, SCRATCH, SCRATCH);
    for (int i = 0; i < 2; i++) {
        Map map = map_file(join_path(path, SCRATCH, i ? "convert.err" : "convert.out"));
        char *to = i ? error : output;
        size_t n = min_size(map.size, (i ? sizeof error : sizeof output) - 1);
        memcpy(to, map.data, n);
        to[n] = 0;
        unmap_file(map);
    }
    convert_output = output;
    convert_error = error;
    return status;
}

static int have_convert(void)
{
    if (!access("./convert", X_OK)) return 1;
    skip("./convert is not built: there is no zlib");
    return 0;
}

/* Did convert write exactly one line to stderr, which contains these words? */
static int says(const char *words)
{
    const char *end = strchr(convert_error, '\n');
    return end && !end[1] && strstr(convert_error, words) != NULL;
}

/* Counts the names in a folder that begin with `prefix`. */
static size_t count_names(const char *folder, const char *prefix)
{
    size_t n = 0;
    DIR *stream = opendir(folder);
    for (struct dirent *entry; stream && (entry = readdir(stream));)
        n += !strncmp(entry->d_name, prefix, strlen(prefix)) && strcmp(entry->d_name, ".") &&
             strcmp(entry->d_name, "..");
    if (stream) closedir(stream);
    return n;
}

/* CRC-32, bit by bit. */
static uint32_t plain_crc(const unsigned char *data, size_t n)
{
    uint32_t crc = 0xFFFFFFFF;
    for (size_t i = 0; i < n; i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320 : 0);
    }
    return ~crc;
}

/* Rounds x to a type with this number of bits behind the point and this smallest exponent: to
 * nearest, ties to even. */
static double round_to_bits(double x, int bits, int smallest)
{
    int exponent;
    frexp(x, &exponent); /* |x| in [0.5, 1) * 2^exponent */
    double step = ldexp(1, (exponent - 1 > smallest ? exponent - 1 : smallest) - bits);
    return rint(x / step) * step;
}

/* Writes a float in the bytes of a type, by the definition of the formats. Returns their number. */
static size_t put_rounded(unsigned char *to, float x, const char *dtype)
{
    uint32_t bits;
    if (!strcmp(dtype, "F16")) {
        double y = round_to_bits((double)x, 10, -14), magnitude = fabs(y);
        int exponent;
        frexp(magnitude, &exponent);
        exponent = exponent - 1 < -14 || magnitude == 0 ? -15 : exponent - 1;
        double fraction =
            exponent < -14 ? magnitude * 0x1p24 : ldexp(magnitude, 10 - exponent) - 1024;
        bits = (uint32_t)(exponent + 15) << 10 | (uint32_t)fraction | (signbit(x) ? 0x8000u : 0);
        to[0] = (unsigned char)bits;
        to[1] = (unsigned char)(bits >> 8);
        return 2;
    }
    float y = !strcmp(dtype, "BF16") ? (float)round_to_bits((double)x, 7, -126) : x;
    if (y == 0) y = copysignf(0, x);
    memcpy(&bits, &y, 4);
    if (!strcmp(dtype, "BF16")) {
        to[0] = (unsigned char)(bits >> 16);
        to[1] = (unsigned char)(bits >> 24);
        return 2;
    }
    memcpy(to, &bits, 4);
    return 4;
}

/* How Megatron stores a model. This is the oracle: one element at a time, by the
 * description of the formats. */
typedef struct {
    const PlainModel *m;
    size_t tp, pp;
    int version;
    const char *dtype;
} Cut;

/* The row of the whole model's [Q; K; V] that is row i on tensor rank r. */
static size_t cut_qkv_row(const Cut *c, size_t r, size_t i)
{
    const Config *m = &c->m->config;
    size_t D = m->C / m->H, heads = m->H / c->tp, n = 0;
    for (size_t a = 0; a < 3; a++)
        for (size_t b = 0; b < heads; b++)
            for (size_t d = 0; d < D; d++, n++)
                if (c->version == 0 && n == i) return a * m->C + (r * heads + b) * D + d;
    n = 0;
    for (size_t b = 0; b < heads; b++)
        for (size_t x = 0; x < 3 * D; x++, n++) {
            size_t part = c->version == 1 ? x % 3 : x / D, d = c->version == 1 ? x / 3 : x % D;
            if (n == i) return part * m->C + (r * heads + b) * D + d;
        }
    return 0;
}

static const struct {
    const char *megatron, *hf;
    char split; /* Whole, Rows, Columns, Qkv */
} cut_names[] = {
    {"input_layernorm", "ln_1", 'W'},
    {"self_attention.query_key_value", "attn.c_attn", 'Q'},
    {"self_attention.dense", "attn.c_proj", 'C'},
    {"post_attention_layernorm", "ln_2", 'W'},
    {"mlp.dense_h_to_4h", "mlp.c_fc", 'R'},
    {"mlp.dense_4h_to_h", "mlp.c_proj", 'C'},
};

/* CRC-32 and shape of one tensor of a rank, by Megatron's name. Returns 0 if the
 * rank should not have it. */
static int cut_tensor(uint32_t *crc, size_t shape[2], size_t *dims, const Cut *c, size_t r,
                      size_t stage, const char *name)
{
    const Config *m = &c->m->config;
    const Plain *p = NULL;
    char hf[64], kind[16], split = 'W';
    size_t layer, depth = m->L / c->pp;
    size_t padded = (m->V + 128 * c->tp - 1) / (128 * c->tp) * (128 * c->tp);
    int used = 0;
    if (!strcmp(name, stage ? "word_embeddings_for_head.weight"
                            : "language_model.embedding.word_embeddings.weight")) {
        p = stage && stage + 1 < c->pp ? NULL : find_plain(c->m, "wte.weight");
        split = 'V';
    } else if (!strcmp(name, "language_model.embedding.position_embeddings.weight") && stage == 0)
        p = find_plain(c->m, "wpe.weight");
    else if (sscanf(name, "language_model.encoder.final_layernorm.%15s", kind) == 1 &&
             stage + 1 == c->pp) {
        snprintf(hf, sizeof hf, "ln_f.%s", kind);
        p = find_plain(c->m, hf);
    } else if (sscanf(name, "language_model.encoder.layers.%zu.%n", &layer, &used) == 1 && used &&
               layer < depth)
        for (size_t i = 0; i < 6; i++) {
            size_t n = strlen(cut_names[i].megatron);
            if (strncmp(name + used, cut_names[i].megatron, n) || name[used + (int)n] != '.')
                continue;
            snprintf(hf, sizeof hf, "h.%zu.%s.%s", stage * depth + layer, cut_names[i].hf,
                     name + used + n + 1);
            p = find_plain(c->m, hf);
            split = cut_names[i].split;
        }
    if (!p) return 0;
    int turned = p->dims == 2 && p->name[0] == 'h';
    size_t rows = turned ? p->shape[1] : p->shape[0];
    size_t cols = turned ? p->shape[0] : p->shape[1];
    if (p->dims == 1) cols = 1;
    /* the bias is added once, after the sum over ranks */
    if (p->dims == 1 && split == 'C') split = 'W';
    size_t mine = rows;
    if (split == 'V') mine = padded / c->tp;
    if (split == 'R' || split == 'Q') mine = rows / c->tp;
    size_t width = split == 'C' ? cols / c->tp : cols, n = 0;
    unsigned char *bytes = (unsigned char *)xcalloc(mine * width, 4);
    for (size_t i = 0; i < mine; i++)
        for (size_t j = 0; j < width; j++) {
            size_t y = i;
            if (split == 'V') y = min_size(r * mine + i, m->V - 1);
            if (split == 'R') y = r * mine + i;
            if (split == 'Q') y = cut_qkv_row(c, r, i);
            size_t x = split == 'C' ? r * width + j : j;
            n += put_rounded(bytes + n, p->x[turned ? x * rows + y : y * cols + x], c->dtype);
        }
    *crc = plain_crc(bytes, n);
    *dims = p->dims;
    shape[0] = mine;
    shape[1] = width;
    free(bytes);
    return 1;
}

/* Compares every tensor of a Megatron checkpoint, as `convert inspect` sees it, with the oracle.
 * Returns 1 if all agree. */
static int is_cut_like(const Cut *c, const char *folder)
{
    if (run_convert("inspect %s --json", folder)) return 0;
    Json json = json_parse(convert_output, strlen(convert_output), "inspect");
    const JsonValue *files = json_get(&json, json.value, "files");
    const JsonValue *version = json_get(&json, json.value, "checkpoint_version");
    size_t rank = 0, seen = 0, wanted = 12 * c->m->config.L + 4 + (c->pp > 1);
    int good = c->version ? version->number == c->version : version->type == JSON_NULL;
    for (const JsonValue *f = files + 1; f < json.value + files->end;
         f = json.value + f->end, rank++) {
        const JsonValue *tensors = json_get(&json, f, "tensors");
        for (const JsonValue *t = tensors + 1; t < json.value + tensors->end;
             t = json.value + t->end, seen++) {
            uint32_t crc;
            size_t shape[2], dims;
            const JsonValue *seen_shape = json_get(&json, t, "shape");
            char text[16];
            if (!cut_tensor(&crc, shape, &dims, c, rank % c->tp, rank / c->tp,
                            json_get(&json, t, "name")->string))
                good = 0;
            else {
                snprintf(text, sizeof text, "%08x", (unsigned)crc);
                good &= seen_shape->length == dims && seen_shape[1].number == (double)shape[0] &&
                        (dims == 1 || seen_shape[2].number == (double)shape[1]);
                good &= !strcmp(json_get(&json, t, "crc32")->string, text) &&
                        !strcmp(json_get(&json, t, "dtype")->string, c->dtype);
            }
        }
    }
    good &= rank == c->tp * c->pp && seen == wanted * c->tp;
    json_free(&json);
    return good;
}

/* Does a folder of Hugging Face's hold this model, rounded to a type, bit for bit? */
static int is_model_like(const PlainModel *m, const char *dtype, const char *folder)
{
    Config c;
    Safetensors s = open_model(&c, folder);
    int good = c.L == m->config.L && c.C == m->config.C && c.H == m->config.H &&
               c.F == m->config.F && c.P == m->config.P && c.V == m->config.V &&
               c.gelu == m->config.gelu && c.eps == m->config.eps && s.tensors == m->n;
    for (size_t i = 0; i < m->n; i++) {
        const Plain *p = &m->tensor[i];
        const StoredTensor *t = find_stored(&s, p->name);
        unsigned char *bytes = (unsigned char *)xcalloc(p->n, 4);
        size_t n = 0;
        for (size_t e = 0; e < p->n; e++) n += put_rounded(bytes + n, p->x[e], dtype);
        good &= !strcmp(dtype_name[t->dtype], dtype) && t->bytes == n && !memcmp(t->data, bytes, n);
        free(bytes);
    }
    safetensors_close(&s);
    return good;
}

static uint32_t next_random(uint64_t *state, uint32_t below)
{
    return random_word(77, SITE_SAMPLE, 5, (*state)++) % below;
}

/* Random models are cut in random ways, for every order of Q, K, V and every type. The
 * written files must be as the oracle says. Converted to another cut and back, they must
 * be the model, bit for bit. */
static void test_convert_round_trip(void)
{
    static const char *const dtypes[] = {"keep", "fp32", "fp16", "bf16"};
    static const char *const types[] = {"F32", "F32", "F16", "BF16"};
    uint64_t draw = 0;
    char hf[PATH_MAX], name[128];
    if (!have_convert()) return;
    for (int round = 0; round < 24; round++) {
        size_t tp = 1u << next_random(&draw, 3), pp = 1u << next_random(&draw, 3);
        size_t D = 1 + next_random(&draw, 7);
        size_t H = tp * (1 + next_random(&draw, 3)), L = pp * (1 + next_random(&draw, 2));
        Config c = make_config(L, H * D, H, 2 + next_random(&draw, 9), 3 + next_random(&draw, 300));
        c.F = tp * (1 + next_random(&draw, 90));
        c.gelu = next_random(&draw, 2) ? GELU_ERF : GELU_TANH;
        c.eps = next_random(&draw, 2) ? (real)1e-5 : (real)1e-6;
        int type = (int)next_random(&draw, 4), version = (int)next_random(&draw, 4);
        int other = (int)next_random(&draw, 4);
        PlainModel m = plain_model(c);
        /* also numbers that are subnormal in fp16, and numbers that vanish there */
        for (size_t i = 0; i < m.n; i++)
            for (size_t e = 0; e < m.tensor[i].n; e++)
                m.tensor[i].x[e] *= ldexpf(1, -(int)(e % 29));
        make_checkpoint_folder(hf);
        put_model(hf, "model.safetensors", &m, "transformer.", NULL, NULL, NULL, 0);
        put_config(hf, &c);
        snprintf(name, sizeof name, "L%zu H%zu D%zu V%zu tp %zu pp %zu version %d %s: written", L,
                 H, D, c.V, tp, pp, version, types[type]);
        int status = run_convert("%s %s/a --tp %zu --pp %zu --qkv-version %d --dtype %s", hf, hf,
                                 tp, pp, version, dtypes[type]);
        char path[PATH_MAX];
        Cut cut = {&m, tp, pp, version, types[type]}, again = {&m, 1, L, other, types[type]};
        check_true(name,
                   status == 0 && !*convert_error && is_cut_like(&cut, join_path(path, hf, "a")));
        status = run_convert("%s/a %s/b --to megatron --pp %zu --qkv-version %d", hf, hf, L, other);
        check_true("  cut once more", status == 0 && is_cut_like(&again, join_path(path, hf, "b")));
        status = run_convert("%s/b/release %s/c", hf, hf);
        check_true("  and back",
                   status == 0 && is_model_like(&m, types[type], join_path(path, hf, "c")));
        free_plain(&m);
        remove_checkpoint_folder(hf);
    }
}

/* ---- Checkpoints of every era -------------------------------------------------------------------
 *
 * As PyTorch has written them: dev/reference/make_checkpoints.py. */

/* For every line of cases.tsv: the file becomes the model, bit for bit, with the logits that
 * transformers computes in float64; or it is refused for the reason in the line. PyTorch's float
 * logits are off by 2e-7 to 4e-7. */
static void test_convert_own(void)
{
    static const char folder[] = "dev/reference/checkpoints";
    char path[PATH_MAX], out[PATH_MAX], line[512], name[128], type[16], told[256];
    Config c;
    if (!have_convert()) return;
    Safetensors model = open_model(&c, join_path(path, folder, "model"));
    Safetensors answers = safetensors_open(join_path(path, folder, "expected.safetensors"));
    PlainModel m = plain_model(c);
    for (size_t i = 0; i < m.n; i++)
        for (size_t e = 0; e < m.tensor[i].n; e++)
            m.tensor[i].x[e] = (float)stored_value(find_stored(&model, m.tensor[i].name), e);
    size_t n = c.P * c.V, cases = 0;
    real *expected = (real *)xcalloc(n, sizeof *expected), *seen = (real *)xcalloc(n, sizeof *seen);
    FILE *list = fopen(join_path(path, folder, "cases.tsv"), "r");
    join_path(out, SCRATCH, "own");
    for (; list && fgets(line, sizeof line, list); cases++) {
        if (sscanf(line, "%127[^\t]\t%15[^\t]\t%255[^\n]", name, type, told) != 3)
            die("cases.tsv: %s", line);
        int refused = !strcmp(type, "refused");
        int status =
            run_convert("%s/%s %s %s", folder, name, out, refused ? "--vocab-size 8" : told);
        int good = refused ? status == 1 && says(told) && !count_names(SCRATCH, "own")
                           : status == 0 && !*convert_error && is_model_like(&m, type, out);
        check_true(name, good);
        if (good && !refused) {
            char key[32];
            snprintf(key, sizeof key, "logits.%s", type);
            for (size_t i = 0; i < n; i++)
                expected[i] = (real)stored_value(find_stored(&answers, key), i);
            Fixture fixture = {out, 2, c.P,
                               (const int *)(const void *)find_stored(&answers, "tokens")->data,
                               seen};
            memset(seen, 0, n * sizeof *seen);
            run_ranks(2, fixture_rank, &fixture);
            check("  logits at tp 2", relative_error(seen, expected, n), 1e-6);
        } else if (!good) printf("      it says: %s\n", convert_error);
        run_command("rm -rf %s", out);
    }
    check_true("more than 30 cases", cases > 30);
    if (list) fclose(list);
    free(expected);
    free(seen);
    free_plain(&m);
    safetensors_close(&model);
    safetensors_close(&answers);
}

/* ---- ../shared/fixtures ---------------------------------------------------------------------- */

static const char fixtures[] = "../shared/fixtures";

/* Does the folder hold every tensor of the list, with the values of its file, and no others?
 * lm_head is the token embedding. */
static int is_expected(const char *folder, const char *tsv)
{
    char path[PATH_MAX], line[512], name[128], shape[64], digest[80], seen[64];
    Config c;
    Safetensors s = open_model(&c, folder);
    size_t n = 0;
    int good = 1;
    snprintf(path, sizeof path, "%s/%s", fixtures, tsv);
    FILE *f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f)) {
        if (sscanf(line, "%127s %63s %79s", name, shape, digest) != 3) continue;
        int head = !strcmp(name, "lm_head.weight");
        const StoredTensor *t = find_stored(&s, head ? "wte.weight" : name);
        snprintf(path, sizeof path, "%s/expected/blobs/%s.bin", fixtures, digest);
        Map blob = map_file(path);
        if (!t) good = 0;
        else {
            snprintf(seen, sizeof seen, t->dims == 2 ? "%zux%zu" : "%zu", t->shape[0], t->shape[1]);
            good &= !strcmp(seen, shape) && blob.size == 4 * t->n;
            for (size_t i = 0; good && i < t->n; i++) {
                float x = (float)stored_value(t, i);
                good &= !memcmp(&x, blob.data + 4 * i, 4);
            }
        }
        unmap_file(blob);
        n += !head;
    }
    good &= f != NULL && n == s.tensors;
    if (f) fclose(f);
    safetensors_close(&s);
    return good;
}

static void test_convert_fixtures(void)
{
    char path[PATH_MAX], out[PATH_MAX];
    static const char *const groups[] = {"fixtures", "odd", "hf_to_megatron"};
    if (!have_convert()) return;
    if (access(fixtures, F_OK)) {
        skip("no ../shared/fixtures");
        return;
    }
    Map text = map_file(join_path(path, fixtures, "manifest.json"));
    Json json = json_parse(text.data, text.size, "manifest.json");
    make_checkpoint_folder(path);
    for (int g = 0; g < 3; g++) {
        const JsonValue *list = json_get(&json, json.value, groups[g]);
        for (const JsonValue *f = list + 1; f < json.value + list->end; f = json.value + f->end) {
            const JsonValue *kind = json_get(&json, f, "kind");
            const JsonValue *name = json_get(&json, f, g == 1 ? "id" : "name");
            const JsonValue *place = json_get(&json, f, "path");
            const JsonValue *config = json_get(&json, f, "needs_config");
            const JsonValue *vocab = json_get(&json, f, "vocab_size");
            char settings[512] = "", in[PATH_MAX * 2];
            snprintf(out, sizeof out, "%.4000s/%.60s", path, name->string);
            if (kind && !strcmp(kind->string, "hf")) snprintf(settings, sizeof settings, "--to hf");
            else if (config && config->type == JSON_STRING)
                snprintf(settings, sizeof settings, "--config %s/%s", fixtures, config->string);
            else if (g < 2)
                snprintf(settings, sizeof settings, "--vocab-size %d",
                         vocab ? (int)vocab->number : 12);
            snprintf(in, sizeof in, "%s/%s%s", fixtures, g == 2 ? "hf_to_megatron_real/" : "",
                     g == 2 ? name->string : place->string);
            if (g == 2 && access(in, F_OK)) continue; /* too large to be kept */
            int status = run_convert("%s %s %s", in, out, settings);
            if (g < 2)
                check_true(name->string,
                           status == 0 && is_expected(out, json_get(&json, f, "expected")->string));
            else { /* these hold h04 as fp16: the same bytes as if we had rounded it */
                char other[PATH_MAX];
                snprintf(other, sizeof other, "%.4000s/reference", path);
                if (!file_exists(path, "reference"))
                    run_convert("%s/hf/h04_pytorch_bin_fp32 %s --to hf --dtype fp16", fixtures,
                                other);
                check_true(name->string,
                           status == 0 &&
                               !run_command("cmp -s %s/model.safetensors %s/model.safetensors", out,
                                            other));
            }
        }
    }
    int status = run_convert("%s/megatron/m10_zip_fp16_v3 %s/untold", fixtures, path);
    check_true("nobody tells how many tokens are real", status == 1 && says("--vocab-size"));
    status = run_convert("%s/megatron/m10_zip_fp16_v3 %s/other --tokenizer dev/reference/bpe",
                         fixtures, path);
    check_true("a tokenizer of another model", status == 1 && says("384 rows"));
    json_free(&json);
    unmap_file(text);
    remove_checkpoint_folder(path);
}

/* What is wrong with each malformed file: words of the reason that convert must give. */
static const char *const refusals[][2] = {
    {"b02", "more bytes are announced"},
    {"b03", "cut short"},
    {"b05", "1001"},
    {"b06", "little-endian"},
    {"b08", "git-lfs"},
    {"b09", "count of 3"},
    {"b11", "count of 18446744073709551615"},
    {"b12", "not in the list"},
    {"b14", "belongs to no tensor"},
    {"b20", "beyond"},
    {"b21", "offset of a tensor"},
    {"b23", "beyond"},
    {"b24", "beyond"},
    {"b26", "1 strides"},
    {"b27", "2^64 bytes"},
    {"b29", "count of"},
    {"b30", "unknown type"},
    {"b32", "persistent id"},
    {"b33", "persistent id"},
    {"b41", "no mark"},
    {"b42", "number 7"},
    {"b44", "PROTO"},
    {"b45", "0xff"},
    {"b47", "INST"},
    {"b48", "2147483647"},
    {"b50", "too often"},
    {"b51", "contains itself"},
    {"b53", "key without a value"},
    {"b54", "LONG4"},
    {"b56", "cannot be a key"},
    {"b57", "UTF-8"},
    {"b60", "end record"},
    {"b62", "outside"},
    {"b63", "too small"},
    {"b65", "is missing"},
    {"b66", "28 bytes"},
    {"b68", "outside"},
    {"b69", "points to"},
    {"b71", "checksum"},
    {"b72", "encrypted"},
    {"b74", "byteorder"},
    {"b75", "8388608"},
    {"b77", "outside"},
    {"b78", "TorchScript"},
    {"b80", "no mp_rank_"},
    {"b81", "out of a folder"},
    {"b83", "inflate"},
    {"b84", "symbolic link"},
    {"b86", "out of a folder"},
    {"b90", "h.0.mlp.c_proj.bias is missing"},
    {"b92", "has the key"},
    {"b93", "[16, 8]"},
    {"b95", "NaN"},
    {"b96", "infinite"},
    {"b98", "h.1.ln_1.weight is missing"},
    {"b99", "checkpoint_version"},
    {"b101", "checkpoint_version"},
    {"b102", "checkpoint_version"},
    {"b104", "no multiple"},
    {"b105", "num_attention_heads"},
    {"b107", "swiglu"},
    {"b108", "position_embedding_type"},
    {"b110", "apply_residual_connection_post_layernorm"},
    {"b111", "normalization"},
    {"b113", "2 tensor ranks"},
    {"b114", "output_layer"},
    {"b116", "too large for F16"},
    {"b117", "opaque"},
    {"b119", "--checkpoint-version"},
    {"b120", "2 tensor ranks"},
    {"b122", "[15, 8]"},
    {"b123", "differs"},
    {"b125", "iteration"},
    {"b126", "copy"},
    {"b128", "neighbours"},
    {"b129", "differs"},
    {"b131", "iteration"},
    {"b132", "iteration"},
    {"b134", "iteration"},
    {"b135", "no mp_rank_"},
    {"b140", "5 bytes"},
    {"b141", "header"},
    {"b143", "JSON"},
    {"b144", "JSON"},
    {"b146", "overlaps"},
    {"b147", "data_offsets"},
    {"b149", "shape and type"},
    {"b150", "F13"},
    {"b152", "2^64"},
    {"b153", "levels"},
    {"b155", "12 bytes"},
    {"b156", "h.0.mlp.c_fc.bias is missing"},
    {"b158", "untied"},
    {"b159", "twice"},
    {"b161", "same folder"},
    {"b162", "same folder"},
    {"b164", "is not in"},
    {"b165", "n_head"},
    {"b167", "n_layer"},
    {"b168", "n_embd"},
    {"b170", "model_type"},
    {"b171", "[8, 31]"},
    {"b173", "scale_attn_by_inverse_layer_idx"},
    {"b174", "n_embd"},
};

static void test_convert_malformed(void)
{
    char path[PATH_MAX], id[16], what[128];
    if (!have_convert()) return;
    if (access(fixtures, F_OK)) {
        skip("no ../shared/fixtures");
        return;
    }
    snprintf(path, sizeof path, "%s/malformed", fixtures);
    DIR *stream = opendir(path);
    for (struct dirent *entry; stream && (entry = readdir(stream));) {
        const char *reason = NULL, *name = entry->d_name;
        if (*name != 'b') continue;
        snprintf(id, sizeof id, "%.*s", (int)min_size(strcspn(name, "_"), 15), name);
        for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++)
            if (!strcmp(refusals[i][0], id)) reason = refusals[i][1];
        snprintf(path, sizeof path, "%s/malformed/%s", fixtures, name);
        double start = now();
        int status = run_convert("%s %s/refused --vocab-size 12 --dtype %s%s", path, SCRATCH,
                                 strcmp(id, "b116") ? "keep" : "fp16",
                                 file_exists(path, "config.json") ? " --to hf" : "");
        snprintf(what, sizeof what, "%s: %s", id, reason ? reason : "a new one");
        check_true(what, status == 1 && reason && says(reason) &&
                             !count_names(SCRATCH, "refused") && now() - start < 5);
        if (!reason || !says(reason)) printf("      it says: %s\n", convert_error);
    }
    if (stream) closedir(stream);
}

/* A small checkpoint of our own, for the tests that follow. */
static PlainModel small_checkpoint(char folder[PATH_MAX])
{
    PlainModel m = plain_model(make_config(2, 16, 4, 8, 257));
    make_checkpoint_folder(folder);
    put_model(folder, "model.safetensors", &m, "transformer.", NULL, NULL, NULL, 0);
    put_config(folder, &m.config);
    if (run_convert("%s %s/megatron --tp 2", folder, folder))
        die("convert does not work: %s", convert_error);
    return m;
}

/* A damaged file is refused with one line, or it still is a model. Nothing else may happen. */
static void test_convert_damage(void)
{
    char folder[PATH_MAX], path[PATH_MAX];
    uint64_t draw = 100000;
    size_t wrong = 0, refused = 0;
    if (!have_convert()) return;
    PlainModel m = small_checkpoint(folder);
    snprintf(path, sizeof path, "%.4000s/megatron/release/mp_rank_01/model_optim_rng.pt", folder);
    Map map = map_file(path);
    char *bytes = (char *)xcalloc(map.size, 1);
    for (int round = 0; round < 120; round++) {
        size_t n = map.size, hits = 1 + next_random(&draw, 4);
        memcpy(bytes, map.data, n);
        /* near the pickle or the directory, where damage matters most, or anywhere */
        for (size_t i = 0; i < hits; i++) {
            size_t range = next_random(&draw, 3);
            size_t at = next_random(&draw, range == 2 ? (uint32_t)n : 2500);
            bytes[range == 1 ? n - 1 - at : at] = (char)next_random(&draw, 256);
        }
        if (next_random(&draw, 5) == 0) n = next_random(&draw, (uint32_t)n);
        put_file(folder, "damaged.pt", bytes, n);
        run_command("mv %s/damaged.pt %s", folder, path);
        run_command("rm -rf %s/out", folder);
        int status = run_convert("%s/megatron %s/out", folder, folder);
        refused += status == 1;
        if (status == 0) wrong += *convert_error != 0;
        else wrong += status != 1 || !says("convert: ") || count_names(folder, "out.");
    }
    check_equal("120 damaged files: otherwise than refused in one line, or read", (double)wrong, 0);
    check_true("most were refused", refused > 80);
    unmap_file(map);
    free(bytes);
    free_plain(&m);
    remove_checkpoint_folder(folder);
}

/* Writes a pickle's string: `start`, filled up to n bytes. */
static void put_text(FILE *f, const char *start, size_t n)
{
    size_t length = strlen(start);
    fputc('X', f);
    fwrite(&n, 4, 1, f);
    fputs(start, f);
    for (size_t i = length; i < n; i++) fputc('a', f);
}

/* Files of one or two megabytes that could keep us busy for a minute. Larger ones of
 * their kind could for hours. */
static void test_convert_bombs(void)
{
    static const char head[] =
        "\x80\2\x8a\nl\xfc\x9c"
        "F\xf9 j\xa8P\x19.\x80\2M\xe9\3.\x80\2}X\r\0\0\0little_endian\x88s.\x80\2";
    static const char *const what[] = {"20000 keys that are one long string",
                                       "20000 storages with one long name",
                                       "60000 tensors that are one storage"};
    static const char *const reasons[] = {"a key of 1048576 bytes", "persistent id",
                                          "but are views of only"};
    enum { LONG = 1 << 20 };
    char folder[PATH_MAX], path[PATH_MAX], copy[PATH_MAX], name[16];
    if (!have_convert()) return;
    make_checkpoint_folder(folder);
    for (int kind = 0; kind < 3; kind++) {
        FILE *f = fopen(join_path(path, folder, "bomb.pt"), "wb");
        if (!f) die("cannot create %s", path);
        uint64_t n = LONG / 2;
        fwrite(head, 1, sizeof head - 1, f);
        if (kind == 0) {
            fputs("}(", f);
            put_text(f, "", LONG);
            fwrite("q\0N", 1, 3, f);
            for (int i = 1; i < 20000; i++) fwrite("h\0N", 1, 3, f);
            fputs("u.", f);
        } else { /* memo 0: a persistent id; 1: the arguments of a tensor */
            fputs(kind == 1 ? "](" : "}(", f);
            if (kind == 2) {
                put_text(f, "x", 1);
                fputs("ctorch._utils\n_rebuild_tensor_v2\n(", f);
            }
            fputc('(', f);
            put_text(f, "storage", 7);
            fputs("ctorch\nHalfStorage\n", f);
            put_text(f, "0", kind == 1 ? LONG : 1);
            put_text(f, "cpu", 3);
            fputc('J', f);
            fwrite(&n, 4, 1, f);
            fwrite("tq\0Q", 1, 4, f);
            for (int i = 1; kind == 1 && i < 20000; i++) fwrite("h\0Q", 1, 3, f);
            if (kind == 2) {
                fwrite("K\0J", 1, 3, f);
                fwrite(&n, 4, 1, f);
                fputs("\x85K\1\x85tq\1R", f);
                for (int i = 0; i < 60000; i++) {
                    snprintf(name, sizeof name, "%05d", i);
                    put_text(f, name, 5);
                    fputs("ctorch._utils\n_rebuild_tensor_v2\nh\1R", f);
                }
            }
            fputs(kind == 1 ? "e." : "u.", f);
        }
        fputs("\x80\2](", f);
        put_text(f, "0", 1);
        fputs("e.", f);
        fwrite(&n, 8, 1, f);
        for (size_t i = 0; i < LONG; i++) fputc(0, f);
        fclose(f);
        double start = now();
        int status = run_convert("inspect %s", path);
        check_true(what[kind], status == 1 && says(reasons[kind]) && now() - start < 5);
        if (!says(reasons[kind])) printf("      it says: %s\n", convert_error);
    }
    for (int rank = 0; rank < 8; rank++) { /* eight ranks of a million objects each */
        snprintf(path, sizeof path, "%.4000s/bomb/mp_rank_%02d", folder, rank);
        run_command("mkdir -p %s", path);
        FILE *f = fopen(join_path(copy, path, "model_optim_rng.pt"), "wb");
        if (!f) die("cannot create %s", copy);
        fwrite(head, 1, sizeof head - 1, f);
        fputs("}(", f);
        put_text(f, "model", 5);
        fputc('}', f);
        put_text(f, "x", 1);
        fputc('(', f);
        for (int i = 0; i < 1000000; i++) fputc('N', f);
        fputs("tu.\x80\2].", f);
        fputc(rank, f);
        fclose(f);
    }
    int status = run_convert("inspect %s/bomb", folder);
    check_true("eight million objects", status == 1 && says("more objects"));
    remove_checkpoint_folder(folder);
}

static void test_convert_options(void)
{
    static const struct {
        const char *arguments, *reason;
        int status;
    } wrong[] = {
        {"%s", "IN and OUT", 2},
        {"%s %s/o x", "one argument too many", 2},
        {"%s %s/o --what", "knows no", 2},
        {"%s %s/o --to pt", "hf or megatron", 2},
        {"%s %s/o --dtype fp8", "fp16", 2},
        {"%s %s/o --tp 0", "--tp 0", 2},
        {"%s %s/o --tp 1.5", "--tp 1.5", 2},
        {"%s %s/o --tp 2 --tp 2", "twice", 2},
        {"%s %s/o --tp", "needs", 2},
        {"%s %s/o --to hf --tp 2", "--tp is for", 2},
        {"%s %s/o --qkv-version 1.5", "--qkv-version", 2},
        {"%s %s/o --keep-padding --vocab-size 3", "exclude", 2},
        {"%s %s/o --pickle", "--pickle", 2},
        {"inspect %s --force", "--force", 2},
        {"inspect", "inspect needs IN", 2},
        {"inspect %s --pickle --json", "exclude", 2},
        {"%s %s/o --tp 3", "does not divide 4 heads", 1},
        {"%s %s/o --pp 3", "does not divide 2 layers", 1},
        {"%s %s/o --tokenizer /", "vocab.json", 1},
        {"%s %s/o --tokenizer dev/reference/bpe", "257 rows", 1},
        {"%s %s/o --keep-padding", "for reading", 2},
        {"%s %s/o --checkpoint-version 1", "for reading", 2},
        {"%s %s/o --shard-size 9", "for writing", 2},
        {"%s %s/o --to hf --vocab-size 258", "257", 1},
        {"%s/nothing %s/o", "cannot open", 1},
        {"%s/config.json %s/o", "neither a zip archive nor", 1},
        {"%s %s/absent/o", "cannot create", 1},
        {"%s %s/megatron", "exists already", 1},
        {"%s %s/megatron/release --force", "no model to replace", 1},
        {"%s %s/config.json --force", "no model to replace", 1},
    };
    char folder[PATH_MAX], arguments[4 * PATH_MAX], what[128], path[PATH_MAX];
    if (!have_convert()) return;
    PlainModel m = small_checkpoint(folder);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        const char *rest = wrong[i].arguments; /* every %s stands for the folder */
        *arguments = 0;
        for (const char *at = strstr(rest, "%s"); at; at = strstr(rest, "%s")) {
            strncat(arguments, rest, (size_t)(at - rest));
            strcat(arguments, folder);
            rest = at + 2;
        }
        strcat(arguments, rest);
        int status = run_convert("%s", arguments);
        snprintf(what, sizeof what, "convert %s", wrong[i].arguments);
        check_true(what, status == wrong[i].status && says(wrong[i].reason) &&
                             !count_names(folder, "o") && count_names(folder, "megatron") == 1);
    }
    run_command("touch %s/megatron/release/mine", folder);
    check_equal("--force replaces a checkpoint",
                run_convert("%s %s/megatron --force", folder, folder), 0);
    check_true("  with another cut", file_exists(folder, "megatron/release/mp_rank_00") &&
                                         !file_exists(folder, "megatron/release/mp_rank_01"));
    check_true("  keeps the old one, and what the user has put there",
               file_exists(folder, "megatron.old/release/mine") &&
                   count_names(folder, "megatron") == 2);
    check_true("  which must be moved away first",
               run_convert("%s %s/megatron --force", folder, folder) == 1 &&
                   says("megatron.old is there") && count_names(folder, "megatron") == 2);

    check_equal("one rank's folder alone",
                run_convert("%s/megatron/release/mp_rank_00 %s/back", folder, folder), 0);
    check_true("  is the model", is_model_like(&m, "F32", join_path(path, folder, "back")));
    check_equal(
        "its file alone",
        run_convert("%s/megatron/release/mp_rank_00/model_optim_rng.pt %s/alone", folder, folder),
        0);
    check_true("  is the model", is_model_like(&m, "F32", join_path(path, folder, "alone")));
    Config c;
    check_equal("--keep-padding",
                run_convert("%s/megatron %s/padded --keep-padding", folder, folder), 0);
    Safetensors s = open_model(&c, join_path(path, folder, "padded"));
    const StoredTensor *wte = find_stored(&s, "wte.weight");
    check_true("  keeps 384 rows, the last of which are the last token's",
               c.V == 384 && !memcmp(wte->data + 256 * 16 * 4, wte->data + 383 * 16 * 4, 64));
    safetensors_close(&s);
    check_equal("--vocab-size 200",
                run_convert("%s/megatron %s/fewer --vocab-size 200 --tokenizer dev/reference/bpe",
                            folder, folder),
                0);
    s = open_model(&c, join_path(path, folder, "fewer"));
    check_true("  keeps 200", c.V == 200 && find_stored(&s, "wte.weight")->shape[0] == 200);
    safetensors_close(&s);
    check_true("  --tokenizer copies two files",
               file_exists(path, "vocab.json") && file_exists(path, "merges.txt"));

    check_equal("--json",
                run_convert("%s %s/json --json --to megatron --dtype bf16", folder, folder), 0);
    Json json = json_parse(convert_output, strlen(convert_output), "--json");
    check_equal("  parameters", json_number(&json, json.value, "parameters", 0, 1e18, -1),
                (double)count_parameters(&m.config));
    json_free(&json);
    check_equal("inspect Hugging Face's folder", run_convert("inspect %s --json", folder), 0);
    json = json_parse(convert_output, strlen(convert_output), "inspect");
    check_true("  has no version",
               json_get(&json, json.value, "checkpoint_version")->type == JSON_NULL);
    json_free(&json);
    check_equal("inspect --pickle", run_convert("inspect %s/megatron --pickle", folder), 0);
    check_true("  lists calls",
               strstr(convert_output, "REDUCE") &&
                   strstr(convert_output, "torch._utils._rebuild_tensor_v2 is known: a tensor"));
    check_equal(
        "megatron_gpt2 loads what convert wrote",
        run_command(
            "./megatron_gpt2 generate --model %s/back --prompt ab --tokens 3 >/dev/null 2>&1",
            folder),
        0);
    free_plain(&m);
    remove_checkpoint_folder(folder);
}

/* Converts while SIGCHLD is ignored, as a program that calls convert may have set it. Sends SIGTERM
 * after some milliseconds, if not 0. Returns the exit status, or 128 if a signal ended it. */
static int stop_convert(const char *in, const char *out, unsigned after)
{
    char path[PATH_MAX];
    int status;
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGCHLD, SIG_IGN);
        alarm(60);
        if (!freopen(join_path(path, SCRATCH, "convert.err"), "w", stdout) || dup2(1, 2) < 0)
            _exit(3);
        execl("./convert", "convert", in, out, "--to", "hf", (char *)NULL);
        _exit(3);
    }
    if (after) {
        usleep(1000 * after);
        kill(pid, SIGTERM);
    }
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

/* However a conversion ends, OUT is whole or not there, and nothing else is left behind. */
static void test_convert_ends(void)
{
    char folder[PATH_MAX], path[PATH_MAX], out[PATH_MAX];
    int right = 1;
    if (!have_convert()) return;
    PlainModel m = plain_model(make_config(2, 256, 4, 64, 4000));
    make_checkpoint_folder(folder);
    put_model(folder, "model.safetensors", &m, "", NULL, NULL, NULL, 0);
    put_config(folder, &m.config);
    check_equal("SIGCHLD is ignored", stop_convert(folder, join_path(out, folder, "a"), 0), 0);
    check_true("  and OUT is whole", is_model_like(&m, "F32", out));
    check_true(
        "  or not there, as the status says",
        stop_convert(join_path(path, folder, "config.json"), join_path(out, folder, "b"), 0) == 1 &&
            !count_names(folder, "b"));
    join_path(out, folder, "x");
    for (unsigned delay = 1; delay <= 31; delay += 2) { /* before, during and after the work */
        int status = stop_convert(folder, out, delay), whole = file_exists(folder, "x");
        right &= count_names(folder, "x") == (size_t)whole &&
                 (whole ? is_model_like(&m, "F32", out) : status != 0);
        run_command("rm -rf %s/x*", folder);
    }
    check_true("SIGTERM at any time", right);
    check_equal("of four that write to one OUT, one succeeds",
                run_command("test $(for i in 1 2 3 4; do { ./convert %s %s/y --to hf 2>/dev/null | "
                            "grep -c written: & } done | grep -c 1) = 1",
                            folder, folder),
                0);
    check_true("  and it is whole", count_names(folder, "y") == 1 &&
                                        is_model_like(&m, "F32", join_path(path, folder, "y")));
    free_plain(&m);
    remove_checkpoint_folder(folder);
}

static unsigned char *put_bytes(unsigned char *to, uint64_t x, int n)
{
    for (; n-- > 0; x >>= 8) *to++ = (unsigned char)x;
    return to;
}

/* Writes a local header; or, with `at`, the directory's entry for the header at that place. */
static unsigned char *put_zip_header(unsigned char *to, const char *name, size_t size, uint32_t crc,
                                     const size_t *at)
{
    to = put_bytes(to, at ? 0x02014B50 : 0x04034B50, 4);
    if (at) to = put_bytes(to, 20, 2); /* version that made it */
    to = put_bytes(to, 20, 2);         /* version needed */
    to = put_bytes(to, 0, 8);          /* flags, stored, time */
    to = put_bytes(to, crc, 4);
    to = put_bytes(to, size, 4); /* stored */
    to = put_bytes(to, size, 4); /* inflated */
    to = put_bytes(to, strlen(name), 2);
    to = put_bytes(to, 0, 2);
    if (at) {
        to = put_bytes(to, 0, 10);
        to = put_bytes(to, *at, 4);
    }
    memcpy(to, name, strlen(name));
    return to + strlen(name);
}

/* Writes the record that says where the directory is. */
static unsigned char *put_zip_end(unsigned char *to, size_t entries, size_t length,
                                  size_t directory)
{
    to = put_bytes(to, 0x06054B50, 4);
    to = put_bytes(to, 0, 4);
    to = put_bytes(to, entries, 2); /* on this disk, and on all */
    to = put_bytes(to, entries, 2);
    to = put_bytes(to, length, 4);
    to = put_bytes(to, directory, 4);
    return put_bytes(to, 0, 2);
}

/* Archives that no writer makes: one member lies inside another; a directory is longer than its
 * count says. In what convert itself writes, the data are aligned and have the right checksum. */
static void test_convert_zip(void)
{
    unsigned char zip[512], *inner, *at, *directory;
    static const char model[] = "release/mp_rank_00/model_optim_rng.pt";
    char folder[PATH_MAX], path[PATH_MAX];
    if (!have_convert()) return;
    PlainModel m = small_checkpoint(folder);
    for (int what = 0; what < 3; what++) {
        size_t zero = 0, place = 31, n = 30 + strlen(model);
        inner = put_zip_header(zip, "a", what == 0 ? n : 0, 0, NULL);
        directory = put_zip_header(inner, model, 0, 0, NULL);
        at = put_zip_header(directory, "a", what == 0 ? n : 0, 0, &zero);
        at = put_zip_header(at, model, 0, 0, &place);
        size_t length = (size_t)(at - directory);
        at = put_zip_end(at, what == 1 ? 1 : 2, length, (size_t)(directory - zip));
        put_file(folder, "odd.zip", zip, (size_t)(at - zip));
        int status = run_convert("%s/odd.zip %s/o", folder, folder);
        static const char *const reasons[] = {"overlaps another", "more entries",
                                              "neither a zip archive nor"};
        check_true(reasons[what], status == 1 && says(reasons[what]));
    }
    snprintf(path, sizeof path, "%.4000s/megatron/release/mp_rank_01/model_optim_rng.pt", folder);
    Map map = map_file(path);
    const unsigned char *local = (const unsigned char *)map.data;
    uint32_t crc = 0, size = 0;
    memcpy(&crc, local + 14, 4);
    memcpy(&size, local + 18, 4);
    size_t start = 30u + local[26] + local[28] + 256u * local[29];
    check_true("data begin at a multiple of 64, with their checksum",
               start % 64 == 0 && start + size < map.size && crc == plain_crc(local + start, size));
    unmap_file(map);
    free_plain(&m);
    remove_checkpoint_folder(folder);
}

/* Writes a pickle from a program. Each character is an instruction, except 'text' for a string, #7;
 * for a number, and @module name; for a global. */
static void put_pickle(FILE *f, const char *program)
{
    fputs("\x80\2", f);
    for (const char *at = program; *at; at++) {
        int end = *at == '\'' ? '\'' : ';';
        if (*at != '\'' && *at != '#' && *at != '@') {
            fputc(*at, f);
            continue;
        }
        const char *word = at + 1;
        at = strchr(word, end);
        uint32_t n = (uint32_t)(end == ';' ? atoi(word) : at - word);
        if (word[-1] == '@')
            fprintf(f, "c%.*s\n%.*s\n", (int)strcspn(word, " "), word,
                    (int)(at - strchr(word, ' ') - 1), strchr(word, ' ') + 1);
        else {
            fputc(end == ';' ? 'J' : 'X', f);
            fwrite(&n, 4, 1, f);
            if (end != ';') fwrite(word, 1, n, f);
        }
    }
    fputc('.', f);
}

/* Writes a legacy file of torch's: this object, and a storage '0' of n floats. */
static void put_legacy(const char *folder, const char *name, const char *object, uint32_t n)
{
    char path[PATH_MAX];
    FILE *f = fopen(join_path(path, folder, name), "wb");
    if (!f) die("cannot write %s", path);
    fwrite("\x80\2\x8A\x0A\x6C\xFC\x9C\x46\xF9\x20\x6A\xA8\x50\x19.", 1, 15, f);
    put_pickle(f, "#1001;");
    put_pickle(f, "}'little_endian'\x88s");
    put_pickle(f, object);
    put_pickle(f, n ? "]'0'a" : "]");
    uint64_t count = n;
    if (n) fwrite(&count, 8, 1, f);
    for (uint32_t i = 0; i < n; i++) {
        float x = (float)(i + 1);
        fwrite(&x, 4, 1, f);
    }
    if (fclose(f)) die("cannot write %s", path);
}

#define TENSOR(n, place)                                                                           \
    "@torch._utils _rebuild_tensor_v2;(('storage'@torch FloatStorage;'0''cpu'#" #n ";tQ" place     \
    "\x89@collections OrderedDict;)RtR"

/* Changes a byte in the pickle of a file that convert wrote, and sets the file's checksum to 0,
 * which means unknown. */
static void patch_pickle(const char *path, const char *seen, size_t n, size_t at, char byte)
{
    FILE *f = fopen(path, "r+b");
    Map map = map_file(path);
    const char *found = (const char *)memmem(map.data, map.size, seen, n);
    const char *end = map.data + map.size;
    const char *entry = (const char *)memmem(map.data, map.size, "PK\1\2", 4);
    while (entry && memcmp(entry + 46, "archive/data.pkl", 16)) {
        entry += 4;
        entry = (const char *)memmem(entry, (size_t)(end - entry), "PK\1\2", 4);
    }
    if (!f || !found || !entry) die("%s is not what this test expects", path);
    fseek(f, found - map.data + (long)at, SEEK_SET);
    fputc(byte, f);
    fseek(f, entry - map.data + 16, SEEK_SET);
    fwrite("\0\0\0", 1, 4, f);
    unmap_file(map);
    fclose(f);
}

/* Files whose content contradicts itself, or asks for too much. */
static void test_convert_lies(void)
{
    static const struct {
        const char *object;
        uint32_t n;
        const char *reason;
    } lies[] = {
        {"}'a'" TENSOR(6, "#0;(#2;#3;t(#0;#1;t") "s", 6, "overlaps itself"},
        {"}'a'" TENSOR(6, "#7;(#0;t(#1;t") "s", 6, "beyond the 6 elements"},
        {"}(#1;#2;#1;#3;u", 0, "one integer twice"},
    };
    static const char swiglu[] = "X\x28\0\0\0apply_residual_connection_post_layernorm\x89";
    char folder[PATH_MAX], path[PATH_MAX], object[4096];
    unsigned char *zip;
    if (!have_convert()) return;
    PlainModel m = small_checkpoint(folder);
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        put_legacy(folder, "lie.pt", lies[i].object, lies[i].n);
        check_true(lies[i].reason,
                   run_convert("inspect %s/lie.pt", folder) == 1 && says(lies[i].reason));
    }
    /* one tensor under nine names */
    snprintf(object, sizeof object, "}'a'%sq%cs", TENSOR(1000, "#0;(#1000;t(#1;t"), 1);
    for (char name = 'b'; name <= 'i'; name++)
        snprintf(object + strlen(object), 16, "'%c'h%cs", name, 1);
    put_legacy(folder, "many.pt", object, 1000);
    check_true("a storage of many tensors",
               run_convert("inspect %s/many.pt", folder) == 1 && says("but are views of"));

    snprintf(path, sizeof path, "%.4000s/megatron/release/mp_rank_00/model_optim_rng.pt", folder);
    patch_pickle(path, "openai_gelu", 11, 10, 'x');
    check_true("args without openai_gelu are of a time of the tanh formula only",
               run_convert("%s/megatron %s/q", folder, folder) == 0 &&
                   is_model_like(&m, "F32", join_path(path, folder, "q")));
    snprintf(path, sizeof path, "%.4000s/megatron/release/mp_rank_01/model_optim_rng.pt", folder);
    patch_pickle(path, swiglu, sizeof swiglu - 1, sizeof swiglu - 2, '\x88');
    check_true("the second rank's args tell of another model",
               run_convert("%s/megatron %s/o", folder, folder) == 1 && says("post_layernorm"));

    size_t nodes = 500000; /* in each of 12 files; together more than a checkpoint can have */
    char *junk = (char *)xcalloc(nodes + 64, 1);
    snprintf(junk, 64, "}'model'}s'junk'(");
    size_t n = strlen(junk);
    memset(junk + n, '}', nodes);
    memcpy(junk + n + nodes, "ts", 3);
    put_legacy(folder, "junk.pt", junk, 0);
    free(junk);
    run_command("cd %s && for i in 00 01 02 03 04 05 06 07 08 09 10 11; do mkdir -p "
                "junk/mp_rank_$i; ln junk.pt "
                "junk/mp_rank_$i/model_optim_rng.pt; done",
                folder);
    check_true("objects beyond measure",
               run_convert("%s/junk %s/o", folder, folder) == 1 && says("more objects"));

    size_t bytes = 70000, zero = 0; /* these bytes claim to inflate to 70 MB */
    zip = (unsigned char *)xcalloc(bytes + 512, 1);
    static const char model[] = "release/mp_rank_00/model_optim_rng.pt";
    unsigned char *directory = put_zip_header(zip, model, bytes, 0, NULL) + bytes;
    unsigned char *at = put_zip_header(directory, model, bytes, 0, &zero);
    zip[8] = directory[10] = 8;
    put_bytes(directory + 24, 1000 * bytes, 4);
    at = put_zip_end(at, 1, (size_t)(at - directory), (size_t)(directory - zip));
    put_file(folder, "bomb.zip", zip, (size_t)(at - zip));
    free(zip);
    check_true("an archive that inflates beyond measure",
               run_convert("%s/bomb.zip %s/o", folder, folder) == 1 && says("far more bytes"));

    run_command("rm -rf %s/megatron", folder);
    run_convert("%s %s/megatron", folder, folder);
    snprintf(path, sizeof path, "%.4000s/megatron/%s", folder, model);
    Map map = map_file(path);
    zip = (unsigned char *)xcalloc(map.size + 1024, 1);
    snprintf(path, sizeof path, "345M/%s", model);
    at = put_zip_header(zip, path, map.size, 0, NULL);
    memcpy(at, map.data, map.size);
    size_t second = (size_t)(at + map.size - zip);
    directory = put_zip_header(zip + second, "README", 0, 0, NULL);
    at = put_zip_header(put_zip_header(directory, path, map.size, 0, &zero), "README", 0, 0,
                        &second);
    at = put_zip_end(at, 2, (size_t)(at - directory), (size_t)(directory - zip));
    put_file(folder, "beside.zip", zip, (size_t)(at - zip));
    unmap_file(map);
    free(zip);
    check_true("an archive with something beside the checkpoint",
               run_convert("%s/beside.zip %s/p", folder, folder) == 0 &&
                   is_model_like(&m, "F32", join_path(path, folder, "p")));

    uint32_t nan = 0xFFFFFFFF;
    memcpy(&m.tensor[3].x[5], &nan, 4);
    put_model(folder, "model.safetensors", &m, "", NULL, NULL, NULL, 0);
    check_true("a NaN that rounding would make 0",
               run_convert("%s %s/o --to hf --dtype bf16", folder, folder) == 1 && says("NaN"));
    check_equal("nothing is written", (double)count_names(folder, "o"), 0);
    free_plain(&m);
    remove_checkpoint_folder(folder);
}

/* Processor time of all commands so far. */
static double command_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_CHILDREN, &u);
    return (double)u.ru_utime.tv_sec + 1e-6 * (double)u.ru_utime.tv_usec;
}

/* Four times as many tensors take about four times as long, not sixteen times. */
static void test_convert_many(void)
{
    char folder[PATH_MAX], path[PATH_MAX];
    double seconds_of[2][2];
    if (!have_convert()) return;
    for (int more = 0; more < 2; more++) {
        size_t names = more ? 60000 : 15000;
        PlainModel m = plain_model(make_config(more ? 4096 : 1024, 2, 1, 2, 3));
        make_checkpoint_folder(folder);
        put_config(folder, &m.config);
        put_model(folder, "model.safetensors", &m, "", NULL, NULL, NULL, 0);
        double start = command_seconds();
        run_command("./convert %s %s/o --to hf >%s/said", folder, folder, folder);
        seconds_of[0][more] = command_seconds() - start;
        check_true("many layers", file_exists(folder, "o"));
        free_plain(&m);

        char *object = (char *)xcalloc(names + 20, 24);
        FILE *f = fopen(join_path(path, folder, "pytorch_model.bin.index.json"), "w");
        size_t n = (size_t)sprintf(object, "}'a'%sq%cs(", TENSOR(1, "#0;(#1;t(#1;t"), 1);
        fprintf(f, "{\"weight_map\": {\"a\": \"x.bin\"");
        for (size_t i = 0; i < names; i++) {
            n += (size_t)sprintf(object + n, "'%zu'h%c", i, 1);
            fprintf(f, ", \"%zu\": \"x.bin\"", i);
        }
        fprintf(f, "}}");
        fclose(f);
        strcpy(object + n, "u");
        put_legacy(folder, "x.bin", object, 1);
        free(object);
        start = command_seconds();
        run_command("rm %s/model.safetensors; ./convert inspect %s >%s/said", folder, folder,
                    folder);
        seconds_of[1][more] = command_seconds() - start;
        remove_checkpoint_folder(folder);
    }
    check("layers: time of 4096 to that of 1024", seconds_of[0][1] / seconds_of[0][0], 9);
    check("an index: time of 60,000 names to that of 15,000", seconds_of[1][1] / seconds_of[1][0],
          9);
}

/* A model that is larger than --shard-size becomes several files with an index. */
static void test_convert_shards(void)
{
    char folder[PATH_MAX], path[PATH_MAX];
    if (!have_convert()) return;
    PlainModel m = plain_model(make_config(5, 128, 2, 16, 3000));
    make_checkpoint_folder(folder);
    put_model(folder, "model.safetensors", &m, "", NULL, NULL, NULL, 0);
    put_config(folder, &m.config);
    check_equal("--shard-size 1", run_convert("%s %s/cut --to hf --shard-size 1", folder, folder),
                0);
    check_true("  makes several files",
               count_names(join_path(path, folder, "cut"), "model-0000") >= 3 &&
                   !file_exists(path, "model.safetensors"));
    check_true("  of one model", is_model_like(&m, "F32", path));
    check_equal("  that can be joined", run_convert("%s/cut %s/whole --to hf", folder, folder), 0);
    check_true("  again", is_model_like(&m, "F32", join_path(path, folder, "whole")));
    free_plain(&m);
    remove_checkpoint_folder(folder);
}

/* A forward pass after conversion: a Megatron file of another era, with another order of Q, K, V,
 * gives PyTorch's logits. */
static void test_convert_logits(void)
{
    if (!have_convert()) return;
    if (access("../shared/fixtures", F_OK)) {
        skip("no ../shared/fixtures");
        return;
    }
    check_equal("convert",
                run_convert("../shared/fixtures/megatron/m02_legacy_fp32_v0 %s/m02 "
                            "--config ../shared/fixtures/configs/tiny4_config.json",
                            SCRATCH),
                0);
    Map tokens = map_file("../shared/fixtures/expected/tiny4_tokens.i32");
    Map logits = map_file("../shared/fixtures/expected/tiny4_logits_fp32model.f32");
    size_t n = logits.size / 4;
    char folder[PATH_MAX];
    real *expected = (real *)xcalloc(n, sizeof *expected), *seen = (real *)xcalloc(n, sizeof *seen);
    for (size_t i = 0; i < n; i++)
        expected[i] = (real)((const float *)(const void *)logits.data)[i];
    Fixture fixture = {join_path(folder, SCRATCH, "m02"), 2, 32,
                       (const int *)(const void *)tokens.data, seen};
    run_ranks(2, fixture_rank, &fixture);
    check("logits at tp 2", relative_error(seen, expected, n), 1e-5);
    free(expected);
    free(seen);
    unmap_file(tokens);
    unmap_file(logits);
}

/* ---- The table of tests ---------------------------------------------------------------------- */

typedef struct {
    const char *name, *about;
    void (*run)(void);
    int in_float, in_double; /* worth running in this build */
} Test;

/* clang-format off */
static const Test tests[] = {
    {"exponential",        "where it ends", test_exponential, 1, 0},
    {"functions",          "bounds of e^x, gelu, gelu' in ulp", test_functions, 1, 0},
    {"all_floats",         "the same for every float from 2^-26 to 128; takes minutes, runs only "
                           "when named", test_all_floats, 0, 0},
    {"gelu",               "P41", test_gelu, 1, 1},
    {"philox_and_dropout", "known answers; masks", test_philox_and_dropout, 1, 0},
    {"matmul",             "all strides, shapes that do not divide", test_matmul, 1, 1},
    {"linear",             "and its gradients", test_linear, 1, 1},
    {"split_gemm",         "P2 P3 P4", test_split_gemm, 1, 1},
    {"embedding",          "and its gradients", test_embedding, 1, 1},
    {"layernorm",          "and its gradients", test_layernorm, 1, 1},
    {"attention",          "and its gradients; with a cache", test_attention, 1, 1},
    {"cross_entropy",      "P16 P19 P20 P21", test_cross_entropy, 1, 1},
    {"adamw",              "P32", test_adamw, 1, 1},
    {"reductions",         "sums of squares, reduce_slice", test_reductions, 1, 1},
    {"threads",            "operators do not depend on the number of threads", test_threads, 1, 0},
    {"json",               "values, and every malformed text refused", test_json, 1, 0},
    {"json_strings",       "escapes and UTF-8, written and read", test_json_strings, 1, 0},
    {"encode_reference",   "BPE against Hugging Face's", test_encode_reference, 1, 0},
    {"encode_brute_force", "against rescanning for the lowest rank", test_encode_brute_force, 1, 0},
    {"encode_any_bytes",   "what is decoded is what was encoded", test_encode_any_bytes, 1, 0},
    {"encode_long_word",   "a word of a megabyte", test_encode_long_word, 1, 0},
    {"tokenizer_refuses",  "malformed vocab.json, merges.txt", test_tokenizer_refuses, 1, 0},
    {"corpus_of_files",    "text files and folders", test_corpus_of_files, 1, 0},
    {"indexed_dataset",    "Megatron's .bin and .idx, written and read",
                           test_indexed_dataset, 1, 0},
    {"corpus_refuses",     "malformed datasets", test_corpus_refuses, 1, 0},
    {"samples",            "every token once an epoch", test_samples, 1, 0},
    {"samples_from_threads", "ranks may read at once", test_samples_from_threads, 1, 0},
    {"held_out",           "the end of the text", test_held_out, 1, 0},
    {"shuffle",            "is a permutation", test_shuffle, 1, 0},
    {"detokenise",         "against a Python transliteration", test_detokenise, 1, 0},
    {"windows",            "P52 P53", test_windows, 1, 0},
    {"lambada",            "P55", test_lambada, 1, 0},
    {"benchmark_texts",    "P51 P55, with ../shared/data", test_benchmark_texts, 1, 0},
    {"safetensors",        "every malformed file refused", test_safetensors, 1, 0},
    {"shards",             "files with an index", test_shards, 1, 0},
    {"stored_types",       "F64 F32 F16 BF16 exact", test_stored_types, 1, 0},
    {"config",             "config.json read and refused", test_config, 1, 0},
    {"checkpoint_layouts", "saved in one layout, loaded in another", test_checkpoint_layouts, 1, 1},
    {"model_folders",      "what a model folder must hold", test_model_folders, 1, 0},
    {"save_folders",       "where saving is refused", test_save_folders, 1, 0},
    {"save_killed",        "a kill during a save loses nothing", test_save_killed, 1, 0},
    {"info",               "human and JSON", test_info, 1, 0},
    {"fixtures",           "folders of ../shared", test_fixtures, 1, 0},
    {"plan",               "P8 P9 P10 P14 P18 P22 P23 P40 P42 P43 P44 P45 P46 P47 P48 P49 P50 "
                           "P56 P57 P58 P59 P60 P61 P62", test_plan, 1, 0},
    {"collectives",        "all_reduce, all_gather, broadcast, send, recv, comm_split; exact",
                           test_collectives, 1, 0},
    {"disagreement",       "ranks that disagree die and say who", test_disagreement, 1, 0},
    {"f_and_g",            "P1", test_f_and_g, 1, 0},
    {"message_counts",     "P5 P6 P7 P17 P18", test_message_counts, 1, 0},
    {"trace_is_plan",      "every rank's messages are what plan lists", test_trace_is_plan, 1, 0},
    {"layouts",            "P12 P15 P27 P28 P29 P30: t x p x d against one rank",
                           test_layouts, 1, 1},
    {"qkv_rows",           "P11: rank r holds [Q_r; K_r; V_r]", test_qkv_rows, 1, 0},
    {"parallel_embedding", "P15", test_parallel_embedding, 1, 0},
    {"bit_equal",          "P13 P26: runs, threads, recomputation", test_bit_equal, 1, 0},
    {"model_slopes",       "the model's gradients against finite differences",
                           test_model_finite_differences, 1, 1},
    {"initial_model",      "P21 P40", test_initial_model, 1, 0},
    {"masks",              "P25; of P24, seeds per rank, there is nothing: see attention_dropout",
                           test_masks, 1, 0},
    {"learning_rate",      "P33 P34 P35", test_learning_rate, 1, 0},
    {"loss_scaler",        "P36 P37 P38", test_loss_scaler, 1, 0},
    {"overflow",           "P39", test_overflow, 1, 1},
    {"decay_groups",       "P31", test_decay_groups, 1, 0},
    {"in_flight",          "P57", test_in_flight, 1, 0},
    {"memory",             "the plan's bytes are those allocated", test_memory, 1, 0},
    {"golden",             "PyTorch's logits, losses, gradients, weights", test_golden, 1, 1},
    {"fixture_logits",     "PyTorch's logits of ../shared/fixtures", test_fixture_logits, 1, 1},
    {"scores",             "P52: windows, cache, the same tokens for every tp", test_scores, 1, 1},
    {"sampler",            "temperature, top-k, top-p", test_sampler, 1, 0},
    {"command_line",       "wrong use and bad input", test_command_line, 1, 0},
    {"documented",         "every option is in README or doc", test_help_is_documented, 1, 0},
    {"learns",             "P54: train, eval, generate", test_learns, 1, 0},
    {"resume",             "saved, killed, resumed: the same bytes", test_resume, 1, 0},
    {"interrupt",          "Ctrl-C; two runs, one folder", test_interrupt, 1, 0},
    {"messages",           "mailboxes that grow; disagreement on types and lengths",
                           test_messages, 1, 0},
    {"record",             "a trace of any length", test_record, 1, 0},
    {"initial_tensors",    "P40: each tensor by its name; no two alike",
                           test_initial_tensors, 1, 0},
    {"presets",            "OpenAI's sizes", test_presets, 1, 0},
    {"layout_refuses",     "cuts that do not divide", test_layout_refuses, 1, 0},
    {"dropout_sites",      "probabilities and streams", test_dropout_sites, 1, 0},
    {"eps",                "the model's own, in all LayerNorms", test_eps, 1, 1},
    {"low_logits",         "P16: below the padding's", test_low_logits, 1, 1},
    {"sum_losses",         "targets that do not count", test_sum_losses, 1, 0},
    {"learning_rate_ends", "P34", test_learning_rate_ends, 1, 0},
    {"loss_scaler_floor",  "P36", test_loss_scaler_floor, 1, 0},
    {"one_update",         "P28: what clipping and scaling make of one step",
                           test_one_update, 1, 1},
    {"dynamic_scale",      "P36 P39: a run that begins with overflows", test_dynamic_scale, 1, 1},
    {"lambada_accuracy",   "against examples right by construction", test_lambada_accuracy, 1, 1},
    {"limited_windows",    "--limit; copies that fill up a pass", test_limited_windows, 1, 1},
    {"generation",         "beyond T, against whole passes", test_generation, 1, 1},
    {"sampler_ties",       "equal logits; the cap of perplexity", test_sampler_ties, 1, 0},
    {"trace_disagrees",    "wrong traces are seen", test_trace_disagrees, 1, 0},
    {"trace_output",       "trace --json", test_trace_output, 1, 0},
    {"defaults",           "P28 P31 P32 P35", test_defaults, 1, 0},
    {"run_state",          "what a checkpoint remembers of a run", test_run_state, 1, 0},
    {"log",                "after a resume", test_log, 1, 0},
    {"curve",              "the picture of the losses", test_curve, 1, 0},
    {"program_layouts",    "P30: train in every layout", test_program_layouts, 1, 0},
    {"seeds",              "--seed draws weights and masks", test_seeds, 1, 0},
    {"resume_options",     "every option off its default", test_resume_options, 1, 0},
    {"eval_output",        "P51 P52: adjusted perplexity, counts", test_eval_output, 1, 0},
    {"convert_round_trip", "random models, splits, versions, types: bit-equal",
                           test_convert_round_trip, 1, 0},
    {"convert_own",        "checkpoints of every era that PyTorch has written",
                           test_convert_own, 1, 0},
    {"convert_fixtures",   "every checkpoint of ../shared/fixtures", test_convert_fixtures, 1, 0},
    {"convert_malformed",  "every malformed one is refused in one line",
                           test_convert_malformed, 1, 0},
    {"convert_damage",     "truncated and altered files", test_convert_damage, 1, 0},
    {"convert_bombs",      "small files that ask for much work", test_convert_bombs, 1, 0},
    {"convert_options",    "options and refusals of the command line", test_convert_options, 1, 0},
    {"convert_ends",       "signals, and several at once", test_convert_ends, 1, 0},
    {"convert_zip",        "what a zip file may not do", test_convert_zip, 1, 0},
    {"convert_lies",       "what a file may not say", test_convert_lies, 1, 0},
    {"convert_many",       "no time that grows with the square", test_convert_many, 1, 0},
    {"convert_shards",     "what shards must agree on", test_convert_shards, 1, 0},
    {"convert_logits",     "PyTorch's logits after a conversion", test_convert_logits, 1, 0},
    {"twin_operators",     "CUDA against the CPU: every operator", test_twin_operators, 1, 1},
    {"twin_models",        "CUDA against the CPU: whole models, in every layout",
                           test_twin_models, 1, 1},
    {"paper_data",         "P51 P55, with ../shared/data", test_paper_data, 1, 0},
};
/* clang-format on */
enum { N_TESTS = sizeof tests / sizeof *tests };

/* Is it the test's name, or one of its P-numbers? */
static int names_test(const char *word, const Test *t)
{
    const char *place = strstr(t->about, word);
    size_t n = strlen(word);
    return !strcmp(word, t->name) ||
           (word[0] == 'P' && place && !(place[n] >= '0' && place[n] <= '9'));
}

static int wanted(const Test *t, int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (names_test(argv[i], t)) return 1;
    return argc == 1 && (sizeof(real) == 4 ? t->in_float : t->in_double);
}

int main(int argc, char **argv)
{
    int passed = 0, failed = 0, skipped = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    spin_briefly(argv);
    if (argc > 1 && !strcmp(argv[1], "--list")) {
        for (int i = 0; i < N_TESTS; i++) printf("%-20s %s\n", tests[i].name, tests[i].about);
        return 0;
    }
    for (int a = 1; a < argc; a++) {
        int known = 0;
        for (int i = 0; i < N_TESTS; i++) known |= names_test(argv[a], &tests[i]);
        if (!known) die("there is no test %s; --list names them", argv[a]);
    }
    if (run_command("rm -rf %s && mkdir %s", SCRATCH, SCRATCH))
        die("cannot make the folder %s", SCRATCH);
    char path[PATH_MAX];
    write_sentences(join_path(path, SCRATCH, "text.txt"));
    for (int i = 0; i < N_TESTS; i++) {
        if (!wanted(&tests[i], argc, argv)) continue;
        double start = now();
        checks = failures = skips = 0;
        printf("%s (%s)\n", tests[i].name, tests[i].about);
        tests[i].run();
        printf("  %s: %d checks, %d failed, %.2f s\n", failures ? "FAILED" : "ok", checks, failures,
               now() - start);
        failed += failures > 0;
        skipped += skips > 0 && !checks;
        passed += failures == 0 && checks > 0;
        if (!checks && !skips) {
            failed++;
            printf("  FAILED: %s checked nothing\n", tests[i].name);
        }
    }
    run_command("rm -rf %s", SCRATCH);
    printf("%s: %d passed, %d failed, %d skipped\n",
           sizeof(real) == 4 ? "test_gpt2" : "test_gpt2_double", passed, failed, skipped);
    return failed > 0;
}

#endif /* TWIN_SOURCE */
