/* bench.h - what cpu.c and gpu.cu share: a model's tokens, the optimiser, and taking turns with
 * other programs. C11 and C++17; included after megatron_gpt2.c or .cu. */

static const Optimizer bench_optimizer = {
    1e-4, 0, 0, 1000000, DECAY_PAPER, 0.9, 0.999, 1e-8, 0.01, 1, 1,
};

/* n tokens, on the host. */
static int *random_tokens(size_t n, size_t V)
{
    int *tokens = (int *)xcalloc(n, sizeof *tokens);
    for (size_t i = 0; i < n; i++) tokens[i] = (int)(random_word(1, SITE_SAMPLE, 0, i) % V);
    return tokens;
}

/* A Feed that gives the same tokens for every micro-batch: source (B * T + 1). */
static void feed_same(void *source, Rank *k, MicroBatch *mb, size_t i)
{
    mb->sequence = i * k->B;
    set_tokens(k, mb, (const int *)source, NULL);
}

/* Prints word, unless it is NULL, and waits for a line on stdin. Meanwhile others work. Returns 0
 * at the end of stdin. */
static int await_turn(const char *word)
{
    int c;
    if (word) puts(word);
    fflush(stdout);
    do c = getchar();
    while (c != '\n' && c != EOF);
    return c != EOF;
}
