/* stopwatch.h - a stopwatch around every operator. stopwatch.sed makes a copy of megatron_gpt2.c,
 * which includes this file before chapter 3, and in which every call of an operator f is a call of
 * watched_f. It takes times only in the thread that has set watch.on.
 *
 * A linear layer's time is split into its products and the rest. The bias's gradient is then a call
 * of its own. Where GeLU is fused into the product, the product runs a second time, alone and
 * outside the measured time; the rest is the difference. */

enum { WATCHED = 64 };

typedef struct {
    const char *name;
    int product; /* 1: only a matrix product, which may add a bias */
    double seconds;
} Watched;

typedef struct {
    int on;
    double began, repeated; /* the start, and seconds spent on repeated products */
    Watched part[WATCHED];
    size_t parts;
    real *space[2]; /* where repeated products go */
    size_t room[2];
} Watch;

static _Thread_local Watch watch;
static double now(void); /* chapter 13 */

static void watch_add(const char *name, int product, double seconds)
{
    size_t i = 0;
    while (i < watch.parts && strcmp(watch.part[i].name, name)) i++;
    assert(i < WATCHED);
    if (i == watch.parts) watch.part[watch.parts++] = (Watched){name, product, 0};
    watch.part[i].seconds += seconds;
}

static void watch_start(void)
{
    if (watch.on) watch.began = now();
}

static void watch_stop(const char *name, int product)
{
    if (watch.on) watch_add(name, product, now() - watch.began);
}

/* Room for n numbers. */
static real *watch_space(int i, size_t n)
{
    if (n > watch.room[i]) {
        device_free(watch.space[i]);
        watch.space[i] = (real *)device_calloc(n * sizeof(real));
        watch.room[i] = n;
    }
    return watch.space[i];
}

/* A fused operator took `fused` seconds. Its products alone ran from watch.began until now. */
static void watch_split(const char *product, const char *rest, double fused)
{
    const double alone = now() - watch.began;
    watch_add(product, 1, alone);
    watch_add(rest, 0, fused - alone);
    watch.repeated += alone;
}

static void watched_linear_backward(act *dx, act *dw, act *db, const act *dy, const act *x,
                                    const act *w, size_t N, size_t I, size_t O)
{
    watch_start();
    linear_backward(dx, dw, watch.on ? NULL : db, dy, x, w, N, I, O);
    watch_stop("linear_backward:products", 1);
    if (!watch.on || !db) return;
    watch_start();
    linear_backward(NULL, NULL, db, dy, x, w, N, I, O);
    watch_stop("linear_backward:bias", 0);
}

static void watched_linear_gelu_forward(act *y, act *pre, const act *x, const act *w, const act *b,
                                        size_t N, size_t I, size_t O, Gelu kind)
{
    watch_start();
    linear_gelu_forward(y, pre, x, w, b, N, I, O, kind);
    if (!watch.on) return;
    const double fused = now() - watch.began;
    real *again = watch_space(0, N * O);
    watch_start();
    linear_forward(again, x, w, NULL, N, I, O);
    watch_split("linear_gelu_forward:product", "linear_gelu_forward:bias+GeLU", fused);
}

static void watched_gelu_linear_backward(act *dpre, act *dw, const act *dz, const act *y,
                                         const act *pre, const act *w, size_t N, size_t I, size_t O,
                                         Gelu kind)
{
    watch_start();
    gelu_linear_backward(dpre, dw, dz, y, pre, w, N, I, O, kind);
    if (!watch.on) return;
    const double fused = now() - watch.began;
    real *again = watch_space(0, N * I), *dw_again = watch_space(1, O * I);
    watch_start();
    linear_backward(again, dw_again, NULL, dz, y, w, N, I, O);
    watch_split("gelu_linear_backward:products", "gelu_linear_backward:GeLU", fused);
}

static double watched_sum_squares(const act *x, size_t n)
{
    watch_start();
    const double sum = sum_squares(x, n);
    watch_stop("sum_squares", 0);
    return sum;
}

/* Operators without a function of their own above. */
#define WATCH(f, product, ...) (watch_start(), f(__VA_ARGS__), watch_stop(#f, product))
#define watched_linear_forward(...) WATCH(linear_forward, 1, __VA_ARGS__)
#define watched_token_embedding_forward(...) WATCH(token_embedding_forward, 0, __VA_ARGS__)
#define watched_token_embedding_backward(...) WATCH(token_embedding_backward, 0, __VA_ARGS__)
#define watched_position_embedding_forward(...) WATCH(position_embedding_forward, 0, __VA_ARGS__)
#define watched_position_embedding_backward(...) WATCH(position_embedding_backward, 0, __VA_ARGS__)
#define watched_layernorm_forward(...) WATCH(layernorm_forward, 0, __VA_ARGS__)
#define watched_layernorm_backward(...) WATCH(layernorm_backward, 0, __VA_ARGS__)
#define watched_bias_dropout_add_forward(...) WATCH(bias_dropout_add_forward, 0, __VA_ARGS__)
#define watched_bias_dropout_add_layernorm_forward(...)                                            \
    WATCH(bias_dropout_add_layernorm_forward, 0, __VA_ARGS__)
#define watched_bias_dropout_add_backward(...) WATCH(bias_dropout_add_backward, 0, __VA_ARGS__)
#define watched_attention_forward(...) WATCH(attention_forward, 0, __VA_ARGS__)
#define watched_attention_backward(...) WATCH(attention_backward, 0, __VA_ARGS__)
#define watched_attention_cached_forward(...) WATCH(attention_cached_forward, 0, __VA_ARGS__)
#define watched_logits_max(...) WATCH(logits_max, 0, __VA_ARGS__)
#define watched_logits_sum_exp(...) WATCH(logits_sum_exp, 0, __VA_ARGS__)
#define watched_cross_entropy_loss(...) WATCH(cross_entropy_loss, 0, __VA_ARGS__)
#define watched_cross_entropy_backward(...) WATCH(cross_entropy_backward, 0, __VA_ARGS__)
#define watched_adamw(...) WATCH(adamw, 0, __VA_ARGS__)
#define watched_reduce_slice(...) WATCH(reduce_slice, 0, __VA_ARGS__)
#define watched_device_zero(...) WATCH(device_zero, 0, __VA_ARGS__)
