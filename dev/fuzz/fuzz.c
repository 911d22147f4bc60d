/* fuzz.c - feeds all readers with any bytes. libFuzzer alters an input again and again, and keeps
 * what reaches new code.
 *
 *     make fuzz                                             every target for FUZZ_SECONDS
 *     FUZZ_TARGET=json FUZZ_SHOW=1 fuzz_scratch/fuzz FILE   one input again, with its messages
 *
 * Both programs are included whole, and a target goes the whole way: from files, through all
 * checks, to the last value of the last tensor. Three things are replaced by macros, so that a
 * million inputs can follow each other in a process:
 *
 *     _exit, by which die() ends the program, jumps back instead
 *     memory is listed, so that what die() leaves behind can be freed, and counted: more than MOST
 *         bytes are a finding
 *     a mapped file becomes a copy of exactly its size, so that the address sanitizer sees the byte
 *         behind it
 *
 * An input may stand for several files: a line "%%" separates them. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <sanitizer/asan_interface.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zlib.h>

/* ---- What is replaced ------------------------------------------------------------------------ */

enum { MOST = 200 << 20, MOST_BLOCKS = 1 << 20 };

static struct {
    void *p;
    size_t size;
} fuzz_block[MOST_BLOCKS];
static size_t fuzz_blocks, fuzz_bytes;
static jmp_buf fuzz_back;
static const char *fuzz_promise; /* the finding if a reader fails now; NULL: it may fail */

__attribute__((noreturn)) static void fuzz_finding(const char *what)
{
    dprintf(2, "FINDING: %s\n", what);
    abort();
}

__attribute__((noreturn)) static void fuzz_exit(void)
{
    if (fuzz_promise) fuzz_finding(fuzz_promise);
    longjmp(fuzz_back, 1);
}

static void *fuzz_keep(void *p, size_t size)
{
    fuzz_bytes += size;
    if (fuzz_blocks == MOST_BLOCKS || fuzz_bytes > MOST) fuzz_finding("too much memory");
    fuzz_block[fuzz_blocks].p = p;
    fuzz_block[fuzz_blocks++].size = size;
    return p;
}

static void fuzz_forget(void *p)
{
    size_t i = fuzz_blocks;
    while (p && i > 0 && fuzz_block[i - 1].p != p) i--;
    if (!p || !i) return; /* memory of the C library, as open_memstream()'s */
    fuzz_bytes -= fuzz_block[i - 1].size;
    fuzz_block[i - 1] = fuzz_block[--fuzz_blocks];
}

static void *fuzz_calloc(size_t n, size_t size)
{
    if (size && n > MOST / size) fuzz_finding("too large a block of memory");
    return fuzz_keep(calloc(n, size), n * size);
}

static void *fuzz_realloc(void *p, size_t size)
{
    if (size > MOST) fuzz_finding("too large a block of memory");
    fuzz_forget(p);
    return fuzz_keep(realloc(p, size), size);
}

static void fuzz_free(void *p)
{
    fuzz_forget(p);
    free(p);
}

static char *fuzz_strdup(const char *s) { return strcpy(fuzz_calloc(strlen(s) + 1, 1), s); }

static void *fuzz_mmap(size_t n, int protection, int fd)
{
    char *p = fuzz_calloc(n, 1);
    if (!(protection & PROT_WRITE) && pread(fd, p, n, 0) != (ssize_t)n)
        fuzz_finding("an input cannot be read");
    return p; /* a map to be written is of a new file, full of zeros */
}

/* zlib is compiled without the address sanitizer, so its arguments are checked here. */
static void fuzz_touch(const void *p, size_t n)
{
    if (__asan_region_is_poisoned((void *)p, n)) fuzz_finding("zlib would leave its memory");
}

static unsigned long fuzz_crc32(unsigned long crc, const Bytef *p, size_t n)
{
    fuzz_touch(p, n);
    return crc32_z(crc, p, n);
}

static int fuzz_inflate(z_stream *s, int flush)
{
    fuzz_touch(s->next_in, s->avail_in);
    fuzz_touch(s->next_out, s->avail_out);
    return inflate(s, flush);
}

#define crc32_z(crc, p, n) fuzz_crc32(crc, p, n)
#define inflate(s, flush) fuzz_inflate(s, flush)
#define _exit(status) ((void)(status), fuzz_exit())
#define pause() break /* a thread that dies second waits in a loop for the program's end */
#define calloc(n, size) fuzz_calloc(n, size)
#define realloc(p, size) fuzz_realloc(p, size)
#define free(p) fuzz_free(p)
#define strdup(s) fuzz_strdup(s)
#define mmap(at, n, protection, flags, fd, offset) fuzz_mmap(n, protection, fd)
#define munmap(p, n) fuzz_free(p)
#define posix_fallocate(fd, offset, n) ((void)(fd), (void)(n), 0) /* nothing is written there */

#define CONVERT_MAIN convert_main
#include "../../convert.c"

/* ---- Readers --------------------------------------------------------------------------------- */

static FILE *nowhere;
static char scratch_folder[64], shape[PATH_MAX];

static char *scratch_path(char path[PATH_MAX], const char *name)
{
    return join_path(path, scratch_folder, name);
}

static void promise(int kept, const char *what)
{
    if (!kept) fuzz_finding(what);
}

/* Gathers all tensors, as a conversion does, for files of one arrangement. */
static void gather(const Model *m, const Choices *o, const Arrangement *a)
{
    for (int rank = 0; rank < a->layout.tp * a->layout.pp; rank++) {
        size_t n;
        Tensor *list = list_rank(&n, &m->config, a, rank);
        for (size_t i = 0; i < n; i++) {
            Output out = {output_dtype(o, m, &list[i]), 0, 0};
            write_tensor("", fileno(nowhere), &out, &list[i], a, tp_rank(a->layout, rank), m, 1);
        }
        free(list);
    }
}

/* Checks, without the programs' own functions, that what a file announces lies inside it. */
static void check_zip(const Zip *z)
{
    for (size_t i = 0; i < z->members; i++) {
        const Member *m = &z->member[i];
        promise((size_t)(m->end - z->map.data) < z->map.size &&
                    m->packed < (size_t)(m->end - m->start),
                "a member is not in its archive");
    }
}

static void check_views(const TensorFile *file)
{
    for (size_t i = 0; i < file->views && file->pickle.storages; i++) {
        const View *v = &file->view[i];
        size_t last = v->offset;
        for (size_t d = 0; d < v->t.dims; d++) last += (v->t.shape[d] - 1) * v->stride[d];
        promise(!v->t.n || last < file->pickle.storage[v->storage].n,
                "a tensor is not in its storage");
    }
}

/* Inspects a checkpoint of any kind, then converts it, also back into Megatron's form for up to 2 x
 * 2 ranks. */
static void read_checkpoint(const char *path)
{
    Source s;
    Model m;
    Choices o;
    struct stat st;
    memset(&o, 0, sizeof o);
    o.dtype = "keep";
    o.keep_padding = 1;
    o.checkpoint_version = -1;
    source_open(&s, path, scratch_folder, stat(path, &st) || st.st_size % 4 ? NULL : nowhere);
    identify_all(&s);
    check_zip(&s.archive);
    for (size_t i = 0; i < s.files; i++) {
        check_zip(&s.file[i].zip);
        check_views(&s.file[i]);
    }
    if (!s.folder && !find_argument(&s.file[0], "num_layers")) o.config = shape;
    Emitter e = make_emitter(stdout, 1);
    print_arguments(&e, &s.file[0]);
    for (size_t i = 0; i < s.files; i++) print_views(&e, &s.file[i]);
    model_open(&m, &s, &o);
    int tp = m.config.H % 2 || m.config.F % 2 ? 1 : 2;
    int pp = m.config.L % 2 ? 1 : 2;
    Arrangement hugging_face = {{1, 1, 1}, 0, 1, m.config.V};
    Arrangement megatron = {{tp, pp, 1}, 1, 0, padded_vocab(m.config.V, tp)};
    gather(&m, &o, &hugging_face);
    o.dtype = "fp16";
    gather(&m, &o, &megatron);
    model_close(&m);
    source_close(&s);
}

/* Reads a model's folder as training and generation do, and the state of a run if it is there. */
static void read_model(const char *path)
{
    Config c;
    size_t n;
    Safetensors s = open_model(&c, path);
    Tensor *list = list_model(&n, &c);
    char name[NAME_SIZE];
    for (size_t i = 0; i < n; i++) {
        real *slice = (real *)xcalloc(list[i].n, sizeof *slice);
        read_slice(slice, find_stored(&s, stored_name(name, WEIGHTS, &list[i])), &list[i], 0);
        free(slice);
    }
    if (file_exists(path, "trainer.safetensors")) {
        Safetensors trainer = open_trainer(path, &c);
        metadata_count(&trainer, "step");
        safetensors_close(&trainer);
    }
    free(list);
    safetensors_close(&s);
}

static void read_info(const char *path) { print_info(path, 1); }

/* Writes a value as JSON; returns the index of the next value. */
static size_t write_json(FILE *f, const Json *json, size_t i)
{
    static const char *const words[] = {
        [JSON_NULL] = "null", [JSON_TRUE] = "true", [JSON_FALSE] = "false"};
    const JsonValue *v = &json->value[i];
    if (v->type == JSON_STRING) json_write_string(f, v->string, v->length);
    else if (v->type == JSON_NUMBER) fprintf(f, "%.17g", v->number);
    else if (v->type != JSON_ARRAY && v->type != JSON_OBJECT) fputs(words[v->type], f);
    else {
        fputc(v->type == JSON_ARRAY ? '[' : '{', f);
        for (size_t at = i + 1; at < v->end;) {
            if (at > i + 1) fputc(',', f);
            if (v->type == JSON_OBJECT) {
                json_write_string(f, json->value[at].key, strlen(json->value[at].key));
                fputc(':', f);
            }
            at = write_json(f, json, at);
        }
        fputc(v->type == JSON_ARRAY ? ']' : '}', f);
    }
    return v->end;
}

/* Writes a document that was accepted, and reads it again: nothing may have changed. */
static void read_json(const char *path)
{
    Map map = map_file(path);
    Json first = json_parse(map.data, map.size, path), second;
    char *text[2];
    size_t size[2];
    FILE *f = open_memstream(&text[0], &size[0]);
    write_json(f, &first, 0);
    fclose(f);
    fuzz_promise = "JSON that we have written is refused";
    second = json_parse(text[0], size[0], path);
    f = open_memstream(&text[1], &size[1]);
    write_json(f, &second, 0);
    fclose(f);
    promise(size[0] == size[1] && !memcmp(text[0], text[1], size[0]),
            "JSON that we have written reads otherwise");
    free(text[0]);
    free(text[1]);
    json_free(&first);
    json_free(&second);
    unmap_file(map);
}

/* Does the same with a config.json. */
static void read_shape_of(const char *path)
{
    static const Layout one = {1, 1, 1};
    int tied;
    char *text[2];
    size_t size[2];
    Config c = read_config_file(path, &tied);
    promise(count_parameters(&c) < 1ull << 51 &&
                list_tensors(NULL, NULL, &c, one, 0) == 12 * c.L + 4,
            "its size");
    text[0] = config_text(&size[0], &c, -1);
    fuzz_promise = "a config.json that we have written is refused";
    FILE *f = fopen(path, "wb");
    fwrite(text[0], 1, size[0], f);
    fclose(f);
    c = read_config_file(path, &tied);
    text[1] = config_text(&size[1], &c, -1);
    promise(!strcmp(text[0], text[1]), "a config.json that we have written reads otherwise");
    free(text[0]);
    free(text[1]);
}

/* Encodes a text; its tokens must make the same text again. */
static void read_tokenizer(const char *folder)
{
    char path[PATH_MAX];
    Tokens tokens = {NULL, 0, 0};
    Tokenizer *t = tokenizer_open(folder);
    Map text = map_file(join_path(path, folder, "text"));
    encode(&tokens, t, text.data, text.size);
    size_t at = 0, n;
    for (size_t i = 0; i < tokens.n; at += n, i++) {
        const char *bytes = decode(&n, t, tokens.id[i]);
        promise(n && n <= text.size - at && !memcmp(bytes, text.data + at, n),
                "tokens do not make their text");
    }
    promise(at == text.size, "tokens do not make all of their text");
    free(tokens.id);
    unmap_file(text);
    tokenizer_close(t);
}

static void read_all(Tokens *out, const char *path, const Tokenizer *t)
{
    Corpus *c = corpus_open(&path, 1, t, t->vocabulary);
    corpus_tokens(out, c);
    corpus_close(c);
}

/* Writes a text or an indexed dataset, reads it again, and draws samples from it. */
static void read_corpus(const char *path)
{
    enum { T = 3 };
    char copy[PATH_MAX];
    Tokenizer *t = tokenizer_bytes();
    Tokens tokens[2] = {{NULL, 0, 0}, {NULL, 0, 0}};
    int sample[T + 1];
    Corpus *c = corpus_open(&path, 1, t, t->vocabulary);
    snprintf(copy, sizeof copy, "%.4000s.copy", path);
    corpus_write(c, copy);
    read_all(&tokens[0], path, t);
    fuzz_promise = "a dataset that we have written is refused";
    read_all(&tokens[1], copy, t);
    promise(tokens[0].n == tokens[1].n &&
                !memcmp(tokens[0].id, tokens[1].id, tokens[0].n * sizeof(int)),
            "a dataset that we have written reads otherwise");
    fuzz_promise = NULL;
    for (int held_out = 0; held_out < 2; held_out++) {
        Dataset *d = dataset_open(c, 40, held_out, T, 1);
        for (size_t n = 0; n < 2 * d->samples; n += 1 + d->samples / 64) { /* two epochs */
            dataset_sample(d, n, sample);
            for (int i = 0; i <= T; i++)
                promise((size_t)sample[i] < t->vocabulary, "a sample of no tokens");
        }
        dataset_close(d);
    }
    free(tokens[0].id);
    free(tokens[1].id);
    corpus_close(c);
    tokenizer_close(t);
}

static void read_lambada(const char *path)
{
    enum { T = 5 };
    int tokens[T + 1];
    real weight[T];
    Tokenizer *t = tokenizer_bytes();
    Lambada l = lambada_open(path, t);
    for (size_t i = 0; i < l.n; i++) lambada_fill(tokens, weight, &l, i, T, 0);
    lambada_close(&l);
    tokenizer_close(t);
}

static void read_wikitext(const char *path)
{
    Map map = map_file(path);
    char *text = (char *)xcalloc(map.size, 1);
    memcpy(text, map.data, map.size);
    wikitext_original_tokens(text, map.size);
    promise(wikitext_detokenise(text, map.size) <= map.size, "a text grows");
    free(text);
    unmap_file(map);
}

/* ---- Targets --------------------------------------------------------------------------------- */

enum { PARTS = 4, READERS = 3 };

/* Where the files of an input go, and the path that is opened. */
typedef struct {
    const char *path, *file[PARTS];
} Files;

#define RANK "/model_optim_rng.pt"
/* clang-format off */
static const Files checkpoints[PARTS] = {
    {"one.pt", {"one.pt"}},
    {"tp", {"tp/mp_rank_00" RANK, "tp/mp_rank_01" RANK}},
    {"bin", {"bin/config.json", "bin/pytorch_model.bin.index.json", "bin/a"}},
    {"grid", {"grid/mp_rank_00_000" RANK, "grid/mp_rank_01_000" RANK, "grid/mp_rank_00_001" RANK,
              "grid/mp_rank_01_001" RANK}}};
static const Files models[PARTS] = {
    {"one", {"one"}},
    {"whole", {"whole/config.json", "whole/model.safetensors"}},
    {"run", {"run/config.json", "run/model.safetensors", "run/trainer.safetensors"}},
    {"cut", {"cut/config.json", "cut/model.safetensors.index.json", "cut/a", "cut/b"}}};
static const Files single[PARTS] = {{"one", {"one"}}};
static const Files tokenizers[PARTS] = {
    [2] = {"bpe", {"bpe/vocab.json", "bpe/merges.txt", "bpe/text"}}};
static const Files datasets[PARTS] = {{"text", {"text"}}, {"data", {"data.idx", "data.bin"}}};

static const struct {
    const char *name;
    const Files *files; /* by the number of files in an input */
    void (*reader[READERS])(const char *path);
} targets[] = {
    {"pickle", checkpoints, {read_checkpoint}},
    {"zip", checkpoints, {read_checkpoint}},
    {"safetensors", models, {read_info, read_model, read_checkpoint}},
    {"json", single, {read_json}},
    {"config", single, {read_shape_of}},
    {"tokenizer", tokenizers, {read_tokenizer}},
    {"dataset", datasets, {read_corpus, read_lambada, read_wikitext}},
};
/* clang-format on */
enum { N_TARGETS = sizeof targets / sizeof *targets };

static size_t target;

/* The shape of the models in corpus/, for checkpoints that do not tell it. */
static const char shape_text_of_seeds[] =
    "{\"model_type\": \"gpt2\", \"n_ctx\": 3, \"n_layer\": 1, \"n_embd\": 4, "
    "\"n_head\": 2, \"n_inner\": 8, \"vocab_size\": 5}";

/* Makes the folders above a file. */
static void make_folders(const char *name)
{
    char path[PATH_MAX];
    scratch_path(path, name);
    for (char *c = strchr(path + strlen(scratch_folder) + 1, '/'); c; c = strchr(c + 1, '/')) {
        *c = 0;
        mkdir(path, 0700);
        *c = '/';
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    const char *name = getenv("FUZZ_TARGET"), *folder = getenv("TMPDIR");
    (void)argc;
    (void)argv;
    while (target < N_TARGETS && (!name || strcmp(targets[target].name, name))) target++;
    snprintf(scratch_folder, sizeof scratch_folder, "%.40s/fuzz.XXXXXX", folder ? folder : "/tmp");
    nowhere = fopen("/dev/null", "w");
    if (target == N_TARGETS || !nowhere || !mkdtemp(scratch_folder)) {
        fprintf(stderr, "set FUZZ_TARGET to one of:");
        for (int i = 0; i < N_TARGETS; i++) fprintf(stderr, " %s", targets[i].name);
        fprintf(stderr, ", and TMPDIR to a folder\n");
        exit(1);
    }
    /* this does not silence libFuzzer, which writes to file 2 by itself */
    if (!getenv("FUZZ_SHOW")) {
        stdout = nowhere;
        stderr = nowhere;
    }
    write_text(scratch_folder, "shape.json", shape_text_of_seeds);
    scratch_path(shape, "shape.json");
    for (int i = 0; i < PARTS; i++)
        for (int j = 0; j < PARTS; j++)
            if (targets[target].files[i].file[j]) make_folders(targets[target].files[i].file[j]);
    return 0;
}

/* Cuts an input into files; returns how many there are. */
static size_t split(Map part[PARTS], const char *data, size_t size)
{
    size_t n = 0;
    for (const char *end = data + size, *line; n < PARTS; data = line + 4) {
        line = n + 1 < PARTS ? (const char *)memmem(data, (size_t)(end - data), "\n%%\n", 4) : NULL;
        part[n].data = data;
        part[n++].size = (size_t)((line ? line : end) - data);
        if (!line) break;
    }
    return n;
}

static void run_reader(void (*reader)(const char *path), const char *path)
{
    fuzz_promise = NULL;
    if (!setjmp(fuzz_back)) {
        reader(path);
        promise(!fuzz_blocks, "memory is not given back");
    }
    while (fuzz_blocks) fuzz_free(fuzz_block[fuzz_blocks - 1].p);
}

/* libFuzzer's own mutator: it makes several changes of any kind. */
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);

/* Every second input differs from its parent in one byte only, and mostly by 1. Wrong sizes and
 * offsets look like that, and libFuzzer alone hardly ever leaves all other bytes as they were. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed)
{
    uint64_t draw = seed * 0x9E3779B97F4A7C15;
    uint8_t *byte = data + (draw >> 24) % (size ? size : 1);
    if (!size || draw >> 63) return LLVMFuzzerMutate(data, size, most);
    switch (draw >> 60) {
    case 0: *byte = 0; break;
    case 1: *byte = 0xFF; break;
    case 2: *byte ^= 0x80; break;
    case 3:
    case 4: --*byte; break;
    default: ++*byte;
    }
    return size;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    Map part[PARTS];
    char path[PATH_MAX];
    size_t n = split(part, (const char *)data, size);
    const Files *files = &targets[target].files[n - 1];
    if (!files->path) return 0;
    for (size_t i = 0; i < n; i++) {
        int fd = open(scratch_path(path, files->file[i]), O_WRONLY | O_CREAT | O_TRUNC, 0600);
        if (fd < 0 || write(fd, part[i].data, part[i].size) != (ssize_t)part[i].size || close(fd))
            fuzz_finding("cannot write an input to TMPDIR");
    }
    for (int i = 0; i < READERS && targets[target].reader[i]; i++)
        run_reader(targets[target].reader[i], scratch_path(path, files->path));
    return 0;
}
