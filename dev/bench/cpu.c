/* cpu.c - how fast megatron_gpt2.c is on this CPU. dev/bench/cpu.sh runs it; README.md has more.
 *
 *     cpu turns ROUNDS COMMAND..   lets workers work in turns, and prints what they print; round 0
 *                                  only warms up
 *     cpu peak COMMAND ARG..       runs it, and prints the peak of its memory in bytes
 *
 * The others are workers. A worker does one turn's work for each line on stdin. Then it prints
 * `done`, or `round` if the next turn begins a new round:
 *
 *     cpu ceilings PART MB      registers' and memory's speed, over arrays of MB
 *     cpu sgemm ours|openblas CONFIG[+head]/M..
 *                               the products of linear layers at M rows; a turn for each CONFIG/M
 *     cpu step PART ROW CONFIG B MB T HEADS TP PP DP [watch]
 *                               training steps: on each data rank MB micro-batches of B sequences;
 *                               watch: the time of every operator, too
 *     cpu attention B H D T..   forward and backward; a turn for each T
 *     cpu generate CONFIG TOKENS
 *                               with a cache of keys and values
 *     cpu info                  no turns: the compiler, and how many threads there are
 *
 * A record is a line of name=value pairs: ms is the time of one call or step, work its FLOPs, bytes
 * or tokens. */

#define main gpt2_main
#define PROGRAM "cpu"
#include "../../build/watched.c" /* megatron_gpt2.c; stopwatch.sed makes it */
#undef main
#include "bench.h"
#ifdef __clang__
#define COMPILER "clang "
#else
#define COMPILER "gcc "
#endif
#include <dlfcn.h>
#include <sys/resource.h>
#include <sys/wait.h>

/* How long measurements are repeated, in seconds: SHORT for a product or attention, LONG for
 * steps. */
static const double SHORT = 0.02, LONG = 0.3;
static volatile double sink; /* results go here, so that the compiler keeps their loops */

static int threads(void)
{
#ifdef _OPENMP
    return cores();
#else
    return 1;
#endif
}

static void use_threads(int n)
{
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

/* Prints a record with a text as value. Blanks become underscores. */
static void print_text(const char *kind, const char *name, const char *text)
{
    printf("kind=%s name=%s text=", kind, name);
    for (; *text; text++) putchar(*text == ' ' ? '_' : *text);
    putchar('\n');
}

static size_t number(const char *text)
{
    char *end;
    const unsigned long n = strtoul(text, &end, 10);
    if (n == 0 || *end) usage_error("'%s' is no number from 1 on", text);
    return n;
}

static double least(double a, double b) { return a < b ? a : b; }

static real *random_reals(size_t n)
{
    real *x = scratch(n);
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) x[i] = (real)(uniform(random_word(1, SITE_SAMPLE, 1, i)) - 0.5);
    return x;
}

/* How many calls take `seconds`, if one call takes `one`. */
static size_t calls_for(double seconds, double one)
{
    return one > 0 ? (size_t)least(ceil(seconds / one), 1000) : 1;
}

/* ---- Ceilings -------------------------------------------------------------------------------- */

enum {
    CHAINS = 12,
    FMA_LOOPS = 10000000,
    PASSES = 4
}; /* chains of multiply-adds in registers, which hide each other's latency */

static double fma_loop(void)
{
    vec t[CHAINS], by = {0}, plus = {0};
    double sum = 0;
    for (int j = 0; j < LANES; j++) {
        by[j] = (real)0.999;
        plus[j] = (real)(1e-3 * (j + 1));
    }
    for (int i = 0; i < CHAINS; i++) t[i] = plus + (real)i;
    for (int n = 0; n < FMA_LOOPS; n++)
        for (int i = 0; i < CHAINS; i++) t[i] = t[i] * by + plus;
    for (int i = 0; i < CHAINS; i++)
        for (int j = 0; j < LANES; j++) sum += t[i][j];
    return sum;
}

/* Reads from four places at once, because one stream alone does not keep the memory busy. */
static double read_loop(const real *x, size_t n)
{
    enum { STREAMS = 4 };
    vec s[STREAMS] = {{0}};
    const size_t length = n / STREAMS / LANES * LANES;
    for (size_t i = 0; i < length; i += LANES)
        for (size_t j = 0; j < STREAMS; j++) s[j] += *(const loose_vec *)(x + j * length + i);
    return (double)((s[0] + s[1]) + (s[2] + s[3]))[0];
}

static void ceilings(const char *part, size_t megabytes)
{
    static const char *const name[] = {"fma", "copy", "read"};
    const size_t n = (megabytes << 20) / sizeof(real);
    real *from = random_reals(n), *to = random_reals(n);
    for (const char *word = NULL; await_turn(word); word = "round")
        for (int all = 0; all < 1 + (threads() > 1); all++)
            for (int what = 0; what < 3; what++) {
                const int P = all ? threads() : 1;
                const size_t share = n / (size_t)P;
                const double bytes = (double)share * P * PASSES * sizeof(real);
                const double work[] = {2.0 * CHAINS * LANES * FMA_LOOPS * P, 2 * bytes, bytes};
                const double start = now();
                double sum = 0;
#pragma omp parallel for num_threads(P) schedule(static) reduction(+ : sum)
                for (int p = 0; p < P; p++)
                    for (int pass = 0; pass < (what ? PASSES : 1); pass++) {
                        const size_t begin = share * (size_t)p;
                        if (what == 0) sum += fma_loop();
                        if (what == 1) memcpy(to + begin, from + begin, share * sizeof *to);
                        if (what == 2) sum += read_loop(from + begin, share);
                    }
                printf("part=%s name=%s who=ceiling threads=%d ms=%.6g work=%.6g\n", part,
                       name[what], P, 1e3 * (now() - start), work[what]);
                sink += sum;
            }
}

/* ---- Products -------------------------------------------------------------------------------- */

enum { ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112 }; /* constants of CBLAS */
typedef void (*Sgemm)(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a,
                      int lda, const float *b, int ldb, float beta, float *c, int ldc);

/* One of a linear layer's three products, as our operators call matmul:
 * y = x w', dx = dy w, dw += dy' x. */
typedef struct {
    int kind;
    size_t N, I, O;
    real *x, *w, *dy, *out;
    Sgemm openblas; /* NULL: our matmul */
} Product;

static void run_product(const Product *p)
{
    const int N = (int)p->N, I = (int)p->I, O = (int)p->O;
    Sgemm f = p->openblas;
    if (p->kind == 0 && f)
        f(ROW_MAJOR, PLAIN, TRANSPOSED, N, O, I, 1, p->x, I, p->w, I, 0, p->out, O);
    else if (p->kind == 0) linear_forward(p->out, p->x, p->w, NULL, p->N, p->I, p->O);
    else if (p->kind == 1 && f)
        f(ROW_MAJOR, PLAIN, PLAIN, N, I, O, 1, p->dy, O, p->w, I, 0, p->out, I);
    else if (p->kind == 1) linear_backward(p->out, NULL, NULL, p->dy, p->x, p->w, p->N, p->I, p->O);
    else if (f) f(ROW_MAJOR, TRANSPOSED, PLAIN, O, I, N, 1, p->dy, O, p->x, I, 1, p->out, I);
    else linear_backward(NULL, p->out, NULL, p->dy, p->x, p->w, p->N, p->I, p->O);
}

/* |ours - openblas| / |openblas| for the same product; both start from zeros. */
static double product_error(Product p, size_t n)
{
    Product ours = p;
    double difference = 0, norm = 0;
    ours.openblas = NULL;
    ours.out = scratch(n);
    memset(ours.out, 0, n * sizeof *ours.out);
    memset(p.out, 0, n * sizeof *p.out);
    run_product(&ours);
    run_product(&p);
    for (size_t i = 0; i < n; i++) {
        const double b = (double)p.out[i], d = (double)ours.out[i] - b;
        difference += d * d;
        norm += b * b;
    }
    free(ours.out);
    return sqrt(difference / norm);
}

/* Returns cblas_sgemm, or NULL if OpenBLAS is not installed. */
static void *openblas_open(void (**set_threads)(int))
{
    const char *asked = getenv("OPENBLAS_CORETYPE");
#if defined __x86_64__
    if (__builtin_cpu_supports("avx512f"))
        setenv("OPENBLAS_CORETYPE", "SKYLAKEX", 0); /* otherwise newer CPUs get AVX2 kernels */
#endif
    void *library = dlopen("libopenblas.so.0", RTLD_NOW);
    if (!library) library = dlopen("libopenblas.so", RTLD_NOW);
    if (!library) {
        print_text("note", "sgemm:", "OpenBLAS is not measured, there is no libopenblas.so.0");
        return NULL;
    }
    char *(*corename)(void) = (char *(*)(void))dlsym(library, "openblas_get_corename");
    *set_threads = (void (*)(int))dlsym(library, "openblas_set_num_threads");
    if (!dlsym(library, "cblas_sgemm") || !corename || !*set_threads)
        die("libopenblas has no cblas_sgemm");
    printf("kind=info name=openblas text=its_kernels_for_%s%s\n", corename(),
           asked ? ",_as_OPENBLAS_CORETYPE_says" : "");
    return dlsym(library, "cblas_sgemm");
}

/* How often a turn calls each layer's products, with 1 thread and with all; 0: not known yet. */
typedef size_t Calls[5][3][2];

/* One turn: all layers of a shape CONFIG[+head]/M. The first turn also compares the products with
 * OpenBLAS's. */
static void sgemm_turn(const char *shape, Product p, Calls calls, void (*set_threads)(int))
{
    static const char *const names[] = {"forward", "dX", "dW"};
    const int first = calls[0][0][0] == 0;
    char config[32];
    const char *slash = strchr(shape, '/'), *plus = strchr(shape, '+');
    if (!slash) usage_error("'%s' is not CONFIG/M", shape);
    snprintf(config, sizeof config, "%.*s", (int)strcspn(shape, "+/"), shape);
    const size_t M = number(slash + 1);
    const Config c = find_preset(config);
    const struct {
        const char *name;
        size_t I, O;
    } layers[] = {{"qkv", c.C, 3 * c.C},
                  {"proj", c.C, c.C},
                  {"fc", c.C, c.F},
                  {"out", c.F, c.C},
                  {"head", c.C, padded_vocab(c.V, 1)}};
    for (size_t l = 0; l < (plus ? 5 : 4); l++)
        for (p.kind = 0; p.kind < 3; p.kind++) {
            p.N = M;
            p.I = layers[l].I;
            p.O = layers[l].O;
            const size_t made[] = {p.N * p.O, p.N * p.I, p.O * p.I}, n = made[p.kind];
            const double flops = 2.0 * (double)p.N * (double)p.I * (double)p.O;
            if (first && p.openblas)
                printf("kind=error name=%s/%zu/%s/%s value=%.3g\n", config, M, layers[l].name,
                       names[p.kind], product_error(p, n));
            memset(p.out, 0, n * sizeof *p.out);
            for (int all = 0; all < 1 + (threads() > 1); all++) {
                const int P = all ? threads() : 1;
                if (set_threads) set_threads(P);
                use_threads(P);
                size_t *often = &calls[l][p.kind][all];
                double start = now();
                if (*often != 1)
                    run_product(&p); /* warms up the caches; call 0 gives the number of calls */
                if (*often == 0) *often = calls_for(SHORT, now() - start);
                start = now();
                for (size_t i = 0; i < *often; i++) run_product(&p);
                printf("part=sgemm name=%s/%zu/%s/%s who=%s threads=%d ms=%.6g work=%.6g\n", config,
                       M, layers[l].name, names[p.kind], set_threads ? "openblas" : "ours", P,
                       1e3 * (now() - start) / (double)*often, flops);
            }
        }
}

static void sgemm(const char *who, char **shape, int shapes)
{
    void (*set_threads)(int) = NULL;
    /* Room for the head's logits and weights, and for 4096 x 4096. */
    const size_t large = (size_t)50304 * 1024;
    Product p = {0, 0, 0, 0, NULL, NULL, NULL, NULL, NULL};
    if (!strcmp(who, "openblas")) {
        p.openblas = (Sgemm)openblas_open(&set_threads);
        if (!p.openblas) return;
    }
    p.x = random_reals(large);
    p.w = random_reals(large);
    p.dy = random_reals(large);
    p.out = random_reals(large);
    Calls *calls = (Calls *)xcalloc((size_t)shapes, sizeof *calls);
    int turn = 0;
    for (const char *word = NULL; await_turn(word); word = turn ? "done" : "round") {
        sgemm_turn(shape[turn], p, calls[turn], set_threads);
        turn = (turn + 1) % shapes;
    }
}

/* ---- Training steps -------------------------------------------------------------------------- */

typedef struct {
    const char *part, *row;
    RankOptions ranks;
    int watched; /* 1: print the operators' times, too */
    int over;
    size_t steps; /* how many in a turn */
} Steps;

/* One step under the stopwatch: prints rank 0's time of every operator, and of all together. */
static void watch_step(Rank *k, const Steps *s, Progress *progress, int *tokens)
{
    watch.on = 1;
    watch.parts = 0;
    watch.repeated = 0;
    const double start = now();
    train_step(k, &bench_optimizer, progress, s->ranks.micro_batches, feed_same, tokens);
    const double all = now() - start - watch.repeated;
    watch.on = 0;
    for (size_t i = 0; i < watch.parts; i++)
        printf("part=breakdown name=%s op=%zu operator=%s product=%d ms=%.6g\n", s->row, i,
               watch.part[i].name, watch.part[i].product, 1e3 * watch.part[i].seconds);
    printf("part=breakdown name=%s operator=all product=0 ms=%.6g\n", s->row, 1e3 * all);
}

static void step_rank(Comm *world, void *arg)
{
    Steps *s = (Steps *)arg;
    const Config *c = &s->ranks.config;
    Progress progress = {0, 0, 0, make_loss_scaler(1)};
    StepResult r = {0, 0, 0, 0, 0};
    Rank *k = rank_create(world, &s->ranks);
    const double targets = (double)(k->B * s->ranks.micro_batches * (size_t)k->dp.size * k->T);
    int *tokens = random_tokens(k->B * (k->T + 1), c->V);
    init_params(k->weights, k->tensor, k->tensors, c, 1, k->tp.rank);
    for (const char *word = NULL;; word = "round") {
        if (world->rank == 0) s->over = !await_turn(word);
        barrier(world);
        if (s->over) break;
        const double start = now();
        for (size_t i = 0; i < s->steps; i++)
            r = train_step(k, &bench_optimizer, &progress, s->ranks.micro_batches, feed_same,
                           tokens);
        barrier(world);
        if (world->rank > 0) continue;
        const double one = (now() - start) / (double)s->steps;
        if (!isfinite(r.loss)) die("the loss became %g", r.loss);
        printf("part=%s name=%s who=ours ms=%.6g work=%.6g parameters=%zu\n", s->part, s->row,
               1e3 * one, targets, count_parameters(c));
        if (s->watched) watch_step(k, s, &progress, tokens);
        if (!word) s->steps = calls_for(LONG, one);
    }
    free(tokens);
    rank_free(k);
}

/* ---- Attention, generation ------------------------------------------------------------------- */

static void attention(size_t B, size_t H, size_t D, char **length, int lengths)
{
    const Dropout none = {0, 0, 0, 0, 0, H};
    int turn = 0;
    for (const char *word = NULL; await_turn(word); word = turn ? "done" : "round") {
        const size_t T = number(length[turn]), n = B * T * H * D;
        real *qkv = random_reals(3 * n), *dout = random_reals(n), *out = scratch(n);
        real *dqkv = scratch(3 * n);
        real *lse = scratch(B * T * H), *delta = scratch(B * T * H);
        for (int all = 0; all < 1 + (threads() > 1); all++) {
            use_threads(all ? threads() : 1);
            double start = 0, forward = 0, both = 0;
            size_t calls = 1;
            for (size_t i = 0; i <= calls; i++) { /* call 0 tells how many more to make */
                start = now();
                attention_forward(out, lse, qkv, B, T, H, D, none);
                const double middle = now() - start;
                attention_backward(dqkv, delta, dout, out, lse, qkv, B, T, H, D, none);
                if (i == 0) calls = calls_for(5 * SHORT, now() - start);
                else {
                    forward += middle;
                    both += now() - start;
                }
            }
            printf("part=attention name=%zu who=ours threads=%d ms=%.6g forward=%.6g\n", T,
                   all ? threads() : 1, 1e3 * both / (double)calls, 1e3 * forward / (double)calls);
        }
        free(qkv);
        free(dout);
        free(out);
        free(dqkv);
        free(lse);
        free(delta);
        turn = (turn + 1) % lengths;
    }
}

typedef struct {
    const char *name;
    RankOptions ranks;
    size_t tokens;
} Generation;

static void generation_rank(Comm *world, void *arg)
{
    const Generation *s = (const Generation *)arg;
    const Config *c = &s->ranks.config;
    const Sampler greedy = {0, 0, 1, 1};
    Rank *k = rank_create(world, &s->ranks);
    init_params(k->weights, k->tensor, k->tensors, c, 1, 0);
    Generator *g = generator_create(k);
    for (const char *word = NULL; await_turn(word); word = "round") {
        Tokens text = {NULL, 0, 0};
        push_token(&text, 0); /* with a prompt of one token, every token costs the same */
        const double start = now();
        generate(g, &text, s->tokens, &greedy, -1, NULL, NULL);
        /* A token reads so many bytes. */
        const double bytes = (double)(count_parameters(c) - c->P * c->C) * sizeof(act);
        printf("part=generate name=%s who=ours ms=%.6g work=%.6g\n", s->name,
               1e3 * (now() - start) / (double)s->tokens, bytes);
        free(text.id);
    }
    generator_free(g);
    rank_free(k);
}

/* ---- The conductor --------------------------------------------------------------------------- */

typedef struct {
    FILE *in, *out; /* what the worker writes and what it reads; in == NULL: it has ended */
    pid_t pid;
} Worker;

static Worker worker_start(char *command)
{
    int from[2], to[2];
    if (pipe(from) || pipe(to)) die("no pipe: %s", strerror(errno));
    for (int i = 0; i < 2; i++) {
        fcntl(from[0], F_SETFD, FD_CLOEXEC);
        fcntl(to[1], F_SETFD, FD_CLOEXEC);
    }
    Worker w = {fdopen(from[0], "r"), fdopen(to[1], "w"), fork()};
    if (w.pid < 0 || !w.in || !w.out) die("cannot start a worker: %s", strerror(errno));
    if (w.pid == 0) {
        dup2(to[0], 0);
        dup2(from[1], 1);
        close(to[0]);
        close(from[1]);
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(127);
    }
    close(to[0]);
    close(from[1]);
    return w;
}

/* Gives w a turn and prints what it says. Returns 1 if its round goes on. */
static int worker_turn(Worker *w, int round)
{
    char line[4096];
    fputc('\n', w->out);
    fflush(w->out);
    while (fgets(line, sizeof line, w->in)) {
        if (!strcmp(line, "round\n")) return 0;
        if (!strcmp(line, "done\n")) return 1;
        printf("round=%d %s", round, line);
    }
    w->in = NULL;
    return 0;
}

/* The workers change places in every round. After a turn all wait until the idle threads of the
 * last worker have stopped spinning: OpenBLAS's spin for 26 ms. */
static void turns(int rounds, char **command, int n)
{
    enum { MAX_WORKERS = 16 };
    Worker w[MAX_WORKERS];
    int more[MAX_WORKERS];
    if (n > MAX_WORKERS) usage_error("%d workers: %d are possible", n, MAX_WORKERS);
    signal(SIGPIPE, SIG_IGN);
    for (int i = 0; i < n; i++) w[i] = worker_start(command[i]);
    for (int round = 0; round <= rounds; round++) {
        int left;
        for (int i = 0; i < n; i++) more[i] = 1;
        do {
            left = 0;
            for (int i = 0; i < n; i++) {
                const int at = (i + round) % n;
                if (!more[at] || !w[at].in) continue;
                left += more[at] = worker_turn(&w[at], round);
                usleep(40000);
            }
        } while (left > 0);
        fflush(stdout);
    }
    for (int i = 0; i < n; i++) {
        int status;
        fclose(w[i].out);
        if (waitpid(w[i].pid, &status, 0) != w[i].pid || status == 0) continue;
        print_text("note", "FAILED:", command[i]);
    }
}

static void peak(char **command)
{
    int status;
    struct rusage usage;
    const pid_t pid = fork();
    if (pid == 0) {
        if (freopen("/dev/null", "w", stdout)) execvp(command[0], command);
        _exit(127);
    }
    if (pid < 0 || wait4(pid, &status, 0, &usage) != pid || status != 0)
        die("'%s' failed", command[0]);
    printf("kind=memory name=peak value=%.0f\n", 1024.0 * (double)usage.ru_maxrss);
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    if (argc > 3 && !strcmp(what, "turns")) turns((int)number(argv[2]), argv + 3, argc - 3);
    else if (argc > 2 && !strcmp(what, "peak")) peak(argv + 2);
    else if (argc == 2 && !strcmp(what, "info")) {
        char count[16];
        snprintf(count, sizeof count, "%d", threads());
        print_text("info", "compiler", COMPILER __VERSION__);
        print_text("info", "threads", count);
    } else { /* a worker */
        spin_briefly(argv);
        if (argc == 4 && !strcmp(what, "ceilings")) ceilings(argv[2], number(argv[3]));
        else if (argc > 3 && !strcmp(what, "sgemm")) sgemm(argv[2], argv + 3, argc - 3);
        else if (argc >= 12 && !strcmp(what, "step")) {
            Config c = find_preset(argv[4]);
            c.embd_pdrop = c.attn_pdrop = c.resid_pdrop = 0;
            c.H = number(argv[8]);
            const Layout layout = {(int)number(argv[9]), (int)number(argv[10]),
                                   (int)number(argv[11])};
            const RankOptions ranks = {
                c, layout, number(argv[5]), number(argv[6]), number(argv[7]), 1, 0, 1};
            Steps s = {argv[2], argv[3], ranks, argc > 12, 0, 1};
            check_layout(&c, layout);
            run_ranks(world_size(layout), step_rank, &s);
        } else if (argc > 5 && !strcmp(what, "attention"))
            attention(number(argv[2]), number(argv[3]), number(argv[4]), argv + 5, argc - 5);
        else if (argc == 4 && !strcmp(what, "generate")) {
            const Config c = find_preset(argv[2]);
            const RankOptions ranks = {c, {1, 1, 1}, 1, 1, c.P, 0, 0, 1};
            Generation s = {argv[2], ranks, number(argv[3])};
            run_ranks(1, generation_rank, &s);
        } else usage_error("see the top of dev/bench/cpu.c");
    }
    if (fflush(stdout) || ferror(stdout)) die("cannot write to stdout: %s", strerror(errno));
    return 0;
}
