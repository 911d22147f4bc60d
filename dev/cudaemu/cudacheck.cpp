/* cudacheck.cpp - the emulator with a checker for kernels. It does the work of compute-sanitizer,
 * without a GPU.
 *
 *     sed -f cu2cpp.sed program.cu > program.cpp
 *     g++ -std=gnu++17 -O1 -g -DCUDACHECK -fno-sanitize-recover=all -c program.cpp \
 *         -fsanitize=thread,bounds,alignment,signed-integer-overflow,shift,integer-divide-by-zero
 *     g++ -std=gnu++17 -O2 -c cudacheck.cpp
 *     objcopy --redefine-sym memcpy=__tsan_memcpy --redefine-sym memmove=__tsan_memmove \
 *         --redefine-sym memset=__tsan_memset program.o
 *     g++ program.o cudacheck.o -lpthread
 *
 * -fsanitize=thread makes the compiler call __tsan_read4(p) and the like at every access. The
 * program is linked without the sanitizer's library, so these calls come here. Each granule of 2
 * bytes of device and shared memory has a shadow cell: which thread wrote the granule last, and
 * which threads have read it since. There are three errors: an access outside the memory, a read of
 * unwritten memory, and an access that nothing orders after those in the cell. The checker reports
 * an error with both source lines and ends the program with status 1.
 *
 *     1 places in the source   2 clocks of streams   3 shadow   4 accesses
 *     5 what the engine tells   6 what the compiler calls: accesses, atomics, undefined
 * behaviour */
#define CUDACHECK 1
#include "cudaemu.cpp"

#include <dlfcn.h>
#include <link.h>
#include <string>

extern "C" char __executable_start[], end[]; /* set by the linker: begin and end of the program */

namespace cudaemu
{

/* ---- 1. Places in the source ----------------------------------------------------------------- */

static __thread bool quiet; /* accesses are made by the engine, not by the program */

static const uintptr_t image_base = [] {
    Dl_info info = {};
    dladdr((void *)fail, &info);
    return (uintptr_t)info.dli_fbase;
}();

/* A return address as 32 bits: its distance from the start of the program. */
static uint32_t pack_pc(const void *pc) { return (uint32_t)((uintptr_t)pc - image_base); }

/* "file:line" of a packed return address. Among inlined functions it is the innermost one outside
 * cudaemu.h. */
static std::string place(uint32_t pc)
{
    char program[1024], command[2048], line[4096];
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    if (!pc || n <= 0) return "unknown place";
    program[n] = 0;
    /* Whether addresses in the file are absolute. */
    bool fixed = ((const ElfW(Ehdr) *)image_base)->e_type == ET_EXEC;
    /* -1: the address is in the call, not in what follows it. */
    unsigned long address = pc + (fixed ? image_base : 0) - 1;
    snprintf(command, sizeof command, "addr2line -is -e '%s' %#lx 2>/dev/null", program, address);
    FILE *f = popen(command, "r");
    std::string first, found; /* line by line, from the innermost function out */
    while (f && fgets(line, sizeof line, f)) {
        line[strcspn(line, " \n")] = 0; /* a discriminator may follow */
        if (first.empty()) first = line;
        if (found.empty() && !strstr(line, "cudaemu.h:") && !strstr(line, "/c++/")) found = line;
    }
    if (f) pclose(f);
    if (first.empty() || first[0] == '?') {
        snprintf(line, sizeof line, "%s+%#lx (build with -g, and install addr2line)", program,
                 address + 1);
        return line;
    }
    return found.empty() ? first : found;
}

static std::string text(const char *format, ...) __attribute__((format(printf, 1, 2)));
static std::string text(const char *format, ...)
{
    char line[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    return line;
}

/* ---- 2. Clocks: which pieces of the streams' work come before which -------------------------- */

typedef std::vector<uint64_t>
    Clock; /* for each stream, how many pieces of its work are known to be done */

static void join(Clock &to, const Clock &from)
{
    if (to.size() < from.size()) to.resize(from.size());
    for (size_t i = 0; i < from.size(); i++) to[i] = std::max(to[i], from[i]);
}
static void join(Clock &to, int stream, uint64_t count)
{
    if (to.size() <= (size_t)stream) to.resize((size_t)stream + 1);
    to[(size_t)stream] = std::max(to[(size_t)stream], count);
}

struct Work { /* a kernel, copy or product that has run or is running */
    const char *what;
    Site at;
    int stream, device;
    uint64_t count;
};

/* Only one piece of work runs at a time, even if several OS threads run work. So the shadow needs
 * no locks. */
static auto &running_lock = *new std::mutex();
static auto &clock_lock = *new std::mutex();
static auto &works = *new std::vector<Work>(1); /* by number; 0 means none */
/* By stream: which work its next piece of work comes after. */
static auto &clocks = *new std::vector<Clock>();
/* The same for the host. All its threads count as one. */
static auto &host_clock = *new std::shared_ptr<const Clock>(new Clock());
static uint32_t running; /* number of the running work */
static Clock running_clock;

static Clock &clock_of(int stream) /* the caller holds clock_lock */
{
    if (clocks.size() <= (size_t)stream) clocks.resize((size_t)stream + 1);
    return clocks[(size_t)stream];
}

static bool comes_before_running(uint32_t work)
{
    static struct {
        uint32_t running, work;
    } known[1024]; /* pairs of which the answer is known to be yes */
    auto &k = known[work % 1024];
    if (k.running == running && k.work == work) return true;
    const Work &w = works[work];
    if ((size_t)w.stream >= running_clock.size() || running_clock[(size_t)w.stream] < w.count)
        return false;
    k.running = running;
    k.work = work;
    return true;
}

static std::string name_work(uint32_t number)
{
    const Work &w = works[number];
    if (!w.at.file) return w.what;
    return text("%s (%s:%d)", w.what, w.at.file, w.at.line);
}

/* ---- 3. Shadow: what has happened to each granule of memory ---------------------------------- */

/* Bytes. For single bytes only bounds are checked, and whether they have been written. */
constexpr size_t GRANULE = 2;
constexpr size_t ARENA = (size_t)1 << 36; /* address space; each address is used once */
constexpr size_t PAGE = 1 << 16;          /* allocations start at a page; a free page follows */
constexpr size_t LINE = 128;              /* bytes of shared memory that belong to one variable */

/* Flags of an access. ATOMIC: by an atomic operation. LANDING: by a cp.async that was not waited
 * for yet. WHOLE, for a cell's write: the cell stands for a whole word, and the next cell is
 * unused. */
enum { ATOMIC = 1, LANDING = 2, WHOLE = 4 };

/* `who` has 26 bits for the work, 16 for the block, 10 for the thread and 12 for the phase: how
 * many barriers the block has passed. In shared memory a running number of the block replaces work
 * and block. Counters wrap: a conflict may be missed if equal numbers are far apart. */
struct Access {
    uint64_t who; /* 0: nobody */
    uint32_t pc;
    uint16_t epoch; /* how often the lane has passed __syncwarp */
    uint16_t flags;
};
constexpr int THREAD_SHIFT = 12, BLOCK_SHIFT = 22, WORK_SHIFT = 38;
static int thread_of(const Access &a) { return (int)(a.who >> THREAD_SHIFT & 1023); }

struct Cell {
    Access write;
    Access read[2]; /* two readers since then, of different blocks or warps if possible */
};

struct Tracked {
    char *base;
    size_t size;
    int device;
    bool freed;
    Site allocated_at, freed_at;
};

static char *arena;           /* the address space of device memory */
static Cell *arena_cells;     /* its shadow */
static uint32_t *arena_pages; /* for each page: the number of its allocation */
static size_t arena_used = PAGE;
static Tracked *tracked; /* allocations by number, from 1 */
static uint32_t tracked_count;

static void *reserve(size_t size)
{
    void *p = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        fail({nullptr, 0}, "the checker needs %zu GB of address space: see ulimit -v", size >> 30);
    return p;
}

/* What the checker keeps for each OS thread that runs blocks. */
struct Watch {
    Cell cells[SHARED_ROOM / GRANULE]; /* shadow of its shared memory */
    uint8_t lines[SHARED_ROOM / LINE]; /* which variable each line belongs to: its number + 1 */
    SharedVariable variables[255];
    size_t count;           /* of the variables */
    uint64_t shared_serial; /* the block's number among all that this OS thread has run */
    uint64_t global_base;   /* `who` of the block's thread 0 in phase 0 */
    unsigned phase;
    uint32_t block_number;
    bool fenced;   /* __threadfence was called */
    bool acquired; /* it has seen an atomic operation of a fenced block */
    uint16_t epoch[MAX_THREADS];
    /* For each thread and each lane of its warp: up to which epoch of that lane the thread comes
     * after it. */
    uint16_t seen[MAX_THREADS][32];
    uintptr_t statics[2]; /* the program's own variables */
    uintptr_t locals[2];  /* this OS thread's thread-local ones */
    /* A write that may race with another thread's write. If both write the same value, it is
     * harmless. */
    struct {
        char *p;
        size_t size;
        unsigned char before[16];
        Access ours, theirs;
        bool shared;
        int missing; /* a Conflict */
    } doubt;
};
static __thread Watch *watch;

/* Blocks of the running work that did __threadfence and then an atomic operation. A block that sees
 * such an atomic comes after them. */
static auto &released = *new std::vector<bool>(65536);
static bool any_released;

/* ---- 4. Accesses ----------------------------------------------------------------------------- */

enum Kind { READ = 0, WRITE = 1, UPDATE = 2 }; /* UPDATE: an atomic read and write */
static const char *const kind_name[] = {"read", "write", "atomic update"};

[[noreturn]] static void report(const char *kind, const std::string &what, uint32_t pc,
                                const std::string &more = "")
{
    static int spoken;
    while (__atomic_exchange_n(&spoken, 1, __ATOMIC_SEQ_CST)) pause();
    quiet = true;
    fflush(stdout);
    fprintf(stderr, "cudacheck: [%s] %s\n", kind, what.c_str());
    if (pc) fprintf(stderr, "    at %s\n", place(pc).c_str());
    if (!pc && running) fprintf(stderr, "    at %s\n", name_work(running).c_str());
    if (block && block->launch && self) {
        const Config &c = block->launch->config;
        fprintf(stderr, "    by %s of block (%u,%u,%u)\n", name_thread(self).c_str(), blockIdx.x,
                blockIdx.y, blockIdx.z);
        if (!more.empty()) fprintf(stderr, "    %s\n", more.c_str());
        fprintf(stderr, "    kernel %s (launched at %s:%d) on device %d\n", c.name, c.at.file,
                c.at.line, block->launch->device);
    } else if (!more.empty()) {
        fprintf(stderr, "    %s\n", more.c_str());
    }
    _exit(1);
}

static std::string bytes(size_t n) { return text("%zu byte%s", n, n == 1 ? "" : "s"); }

static Access me(bool shared, uint32_t pc, unsigned flags)
{
    if (!self) return {(uint64_t)running << WORK_SHIFT, pc, 0, (uint16_t)flags};
    uint64_t base = shared ? watch->shared_serial << BLOCK_SHIFT : watch->global_base;
    return {base | (uint64_t)self->number << THREAD_SHIFT | (watch->phase & 0xFFF), pc,
            watch->epoch[self->number], (uint16_t)flags};
}

enum Conflict { NONE, LANES, THREADS, BLOCKS, WORKS };

/* What is missing to order `before` before the running thread's access `now`. */
static Conflict conflict_apart(const Access &before, const Access &now, bool shared)
{
    uint64_t difference = before.who ^ now.who;
    if (difference >> BLOCK_SHIFT) {
        if (shared) return NONE; /* an earlier block's */
        if (difference >> WORK_SHIFT)
            return comes_before_running((uint32_t)(before.who >> WORK_SHIFT)) ? NONE : WORKS;
        if (before.flags & now.flags & ATOMIC) return NONE;
        return watch->acquired && released[before.who >> BLOCK_SHIFT & 0xFFFF] ? NONE : BLOCKS;
    }
    if (difference & 0xFFF) return NONE; /* a barrier lies between */
    if (before.flags & now.flags & ATOMIC) return NONE;
    int other = thread_of(before);
    if (other / 32 != self->warp) return THREADS;
    return (int16_t)(watch->seen[self->number][other % 32] - before.epoch) >= 0 ? NONE : LANES;
}
static inline Conflict conflict(const Access &before, const Access &now, bool shared)
{
    if (!before.who || !((before.who ^ now.who) >> THREAD_SHIFT))
        return NONE; /* nobody yet, or the same thread */
    return conflict_apart(before, now, shared);
}

static std::string other_side(const Access &other, const char *did, Conflict c)
{
    std::string by;
    if (c == WORKS) {
        uint32_t work = (uint32_t)(other.who >> WORK_SHIFT);
        by = name_work(work) + text(" in another stream, or not waited for");
    } else if (block && block->launch) {
        int t = thread_of(other);
        by = name_thread(&block->threads[t]);
        if (c == BLOCKS)
            by += text(" of block number %u", (unsigned)(other.who >> BLOCK_SHIFT & 0xFFFF));
    }
    return text("against the %s at ", did) + (other.pc ? place(other.pc) : "the call") + " by " +
           by;
}

static std::string where_is(const void *p, bool shared)
{
    if (shared) {
        size_t line = (size_t)((const char *)p - block->memory) / LINE;
        const SharedVariable &v = watch->variables[watch->lines[line] - 1u];
        return text("byte %zu of %s (%s, %s:%d)", (size_t)((const char *)p - v.at),
                    bytes(v.size).c_str(), v.name, v.declared.file, v.declared.line);
    }
    const Tracked &t = tracked[arena_pages[(size_t)((const char *)p - arena) / PAGE]];
    return text("byte %zu of %s allocated at %s:%d", (size_t)((const char *)p - t.base),
                bytes(t.size).c_str(), t.allocated_at.file, t.allocated_at.line);
}

[[noreturn]] static void report_race(const void *p, size_t size, bool shared, Kind now,
                                     const Access &ours, const Access &theirs, const char *did,
                                     Conflict c)
{
    static const char *const missing[] = {"", "without __syncwarp or __syncthreads between them",
                                          "without __syncthreads between them",
                                          "by threads of different blocks, which nothing orders",
                                          "by work that nothing orders: no stream, event or wait"};
    report(c == WORKS ? "stream-order" : "race",
           text("%s and %s of the same %s memory %s: %s of %s", did, kind_name[now],
                shared ? "shared" : "global", missing[c], bytes(size).c_str(),
                where_is(p, shared).c_str()),
           ours.pc, other_side(theirs, did, c));
}

/* The doubtful write has been done by now. Reports a race if it changed anything. */
static void settle_doubt()
{
    auto &d = watch->doubt;
    if (!d.p) return;
    char *p = d.p;
    d.p = nullptr;
    if (!memcmp(p, d.before, d.size)) return; /* the same value: harmless, and common */
    report_race(p, d.size, d.shared, WRITE, d.ours, d.theirs, "write", (Conflict)d.missing);
}

/* How far apart two readers are: 1 for other lanes, 2 for other warps, 3 for other blocks. */
static int distance(const Access &a, const Access &b)
{
    uint64_t difference = a.who ^ b.who;
    if (difference >> BLOCK_SHIFT) return 3;
    return difference >> (THREAD_SHIFT + 5) ? 2 : 1;
}

[[noreturn]] static void report_landing(Kind kind, const Access &now, const Access &w, char *p,
                                        bool shared)
{
    report("cp.async",
           text("%s of memory that cp.async still writes, with no wait since: %s", kind_name[kind],
                where_is(p, shared).c_str()),
           now.pc, other_side(w, "cp.async", THREADS));
}

/* The access `now` reaches what the cell stands for, a part of p .. p + size. */
static void touch(Cell *cell, Kind kind, const Access &now, char *p, size_t size, bool shared)
{
    Access &w = cell->write, *r = cell->read;
    if (kind == READ && r[0].who == now.who &&
        r[0].flags == now.flags) { /* read again, and nobody has written since */
        r[0] = now;
        return;
    }
    if (w.flags & LANDING && w.who >> BLOCK_SHIFT == now.who >> BLOCK_SHIFT)
        report_landing(kind, now, w, p, shared);
    Conflict c = conflict(w, now, shared);
    if (c != NONE) {
        if (kind != WRITE || size > 16 || c == WORKS)
            report_race(p, size, shared, kind, now, w, "write", c);
        auto &d = watch->doubt;
        if (!d.p) {
            d.p = p;
            d.size = size;
            d.ours = now;
            d.theirs = w;
            d.shared = shared;
            d.missing = c;
            memcpy(d.before, p, size);
        }
    }
    if (kind == READ) {
        /* A reader that comes before this one can be forgotten: whoever comes after this one comes
         * after both. Of three readers without any order, keep two that are far apart. A write that
         * conflicts with any of the three then conflicts with one that is kept. */
        if (!r[0].who || conflict(r[0], now, shared) == NONE) r[0] = now;
        else if (!r[1].who || conflict(r[1], now, shared) == NONE) r[1] = now;
        else if (distance(r[0], r[1]) < distance(r[0], now)) r[1] = now;
        return;
    }
    for (int i = 0; i < 2; i++) {
        if (!r[i].who) continue;
        c = conflict(r[i], now, shared);
        if (c != NONE) report_race(p, size, shared, kind, now, r[i], "read", c);
        r[i].who = 0;
    }
    uint16_t whole = w.flags & WHOLE;
    w = now;
    w.flags |= whole;
}

/* If one cell stands for a whole word, gives both halves a cell of their own again. */
static void split_word(Cell *even)
{
    if (!(even->write.flags & WHOLE)) return;
    even->write.flags &= (uint16_t)~WHOLE;
    even[1] = even[0];
}

/* The access `now` reaches all of p .. p + size; `cells` begins with the cell of p's granule.
 * strict: what is read must have been written. If the two granules of a 4-byte word are accessed
 * together, one cell stands for both. */
static void touch_all(Cell *cells, Kind kind, const Access &now, char *p, size_t size, bool shared,
                      bool strict)
{
    size_t n = ((uintptr_t)p % GRANULE + size + GRANULE - 1) / GRANULE;
    size_t odd = (uintptr_t)p / GRANULE % 2, unwritten = 0;
    Cell *end = cells + n;
    if (odd) split_word(cells - 1);
    if ((odd + n) % 2) split_word(end - 1);
    if (kind != WRITE && strict)
        for (Cell *c = cells; c < end; c++) {
            bool whole = c->write.flags & WHOLE;
            if (!c->write.who || (shared && (c->write.who ^ now.who) >> BLOCK_SHIFT))
                unwritten += whole ? 2 : 1;
            c += whole;
        }
    if (unwritten && (size <= 16 || unwritten == n)) /* a large structure may have padding */
        report("uninitialised",
               text("%s of %s that nobody has written%s: %s", kind_name[kind], bytes(size).c_str(),
                    shared ? " yet (is a barrier missing?)" : "", where_is(p, shared).c_str()),
               now.pc);
    if (size == 1) { /* the granule's other byte may belong to another thread */
        if (kind != READ) cells->write.who = now.who;
        return;
    }
    for (Cell *c = cells; c < end; c++) {
        bool whole = c->write.flags & WHOLE, even = ((size_t)(c - cells) + odd) % 2 == 0;
        touch(c, kind, now, p, size, shared);
        if (whole) {
            c++;
        } else if (kind != READ && even && c + 1 < end) {
            touch(c + 1, kind, now, p, size, shared);
            c->write.flags |= WHOLE;
            c++;
        }
    }
}

static Cell *global_cells(const char *p, size_t size, const char *doing, bool peers, uint32_t pc)
{
    uint32_t *page = &arena_pages[(size_t)(p - arena) / PAGE], number = page[0];
    auto it = [&] { return text("%s of %s ", doing, bytes(size).c_str()); };
    if (!number && page[-1]) { /* in the gap between two allocations */
        const Tracked &t = tracked[page[-1]];
        report("bounds",
               it() + text("%s behind the end: ", bytes((size_t)(p - t.base) - t.size).c_str()) +
                   text("byte %zu of %s allocated at %s:%d", (size_t)(p - t.base),
                        bytes(t.size).c_str(), t.allocated_at.file, t.allocated_at.line),
               pc);
    }
    if (!number)
        report("bounds", it() + text("at %p, where nothing is allocated", (const void *)p), pc);
    const Tracked &t = tracked[number];
    if (p + size > t.base + t.size)
        report("bounds", it() + "behind the end: " + where_is(p, false), pc);
    if (t.freed)
        report("use-after-free",
               it() + text("of memory freed at %s:%d: ", t.freed_at.file, t.freed_at.line) +
                   where_is(p, false),
               pc);
    int device = works[running].device;
    if (peers && t.device != device && !peer_enabled[device][t.device])
        report("peer",
               it() +
                   text("on device %d by device %d, which has no peer access to it: ", t.device,
                        device) +
                   where_is(p, false),
               pc);
    return arena_cells + (size_t)(p - arena) / GRANULE;
}

static Cell *shared_cells(const char *p, size_t size, const char *doing, uint32_t pc)
{
    size_t offset = (size_t)(p - block->memory);
    uint8_t line = watch->lines[offset / LINE];
    if (line) {
        const SharedVariable &v = watch->variables[line - 1u];
        if (p + size <= v.at + v.size) return &watch->cells[offset / GRANULE];
    }
    for (size_t l = offset / LINE + 1; !line && l > 0; l--) line = watch->lines[l - 1];
    if (!line)
        report("bounds",
               text("%s of %s of shared memory, of which the block has none", doing,
                    bytes(size).c_str()),
               pc);
    const SharedVariable &v = watch->variables[line - 1u];
    report("bounds",
           text("%s of %s behind the end: byte %zu of %s (shared %s, %s:%d)", doing,
                bytes(size).c_str(), (size_t)(p - v.at), bytes(v.size).c_str(), v.name,
                v.declared.file, v.declared.line),
           pc);
}

/* Host memory that copies may still read or write, because the host has not waited for them. */
struct Pending {
    const char *begin, *end;
    Touch touch;
    int stream;
    uint64_t count;
    Site at;
};
/* Used with clock_lock held. All of its memory lies in pending_from .. pending_to. */
static auto &pending = *new std::vector<Pending>();
static const char *pending_from, *pending_to;

static void bound_pending()
{
    const char *from = nullptr, *to = nullptr;
    for (const Pending &h : pending) {
        if (!from || h.begin < from) from = h.begin;
        to = std::max(to, h.end);
    }
    __atomic_store_n(&pending_from, from, __ATOMIC_RELAXED);
    __atomic_store_n(&pending_to, to, __ATOMIC_RELAXED);
}

static void host_access(const char *p, size_t size, Kind kind, const void *pc)
{
    if ((size_t)(p - arena) < ARENA && arena)
        report("device-memory",
               text("%s of %s of device memory by the host: %p", kind_name[kind],
                    bytes(size).c_str(), (const void *)p),
               pack_pc(pc));
    if (p >= __atomic_load_n(&pending_to, __ATOMIC_RELAXED) ||
        p + size <= __atomic_load_n(&pending_from, __ATOMIC_RELAXED))
        return;
    std::lock_guard<std::mutex> hold(clock_lock);
    for (const Pending &h : pending)
        if (p < h.end && p + size > h.begin && (h.touch == WRITES || kind != READ))
            report(
                "stream-order",
                text("%s of %s by the host, which has not waited for the copy that %s them (%s:%d)",
                     kind_name[kind], bytes(size).c_str(), h.touch == WRITES ? "writes" : "reads",
                     h.at.file, h.at.line),
                pack_pc(pc));
}

static bool within(const char *p, const uintptr_t range[2])
{
    return (uintptr_t)p - range[0] < range[1] - range[0];
}

/* An access of the running CUDA thread to memory outside its own stack. */
static void kernel_access(char *p, size_t size, Kind kind, unsigned flags, uint32_t pc)
{
    if (watch->doubt.p) settle_doubt();
    if ((size_t)(p - block->memory) < SHARED_ROOM) {
        Cell *cells = shared_cells(p, size, kind_name[kind], pc);
        touch_all(cells, kind, me(true, pc, flags), p, size, true, true);
    } else if ((size_t)(p - arena) < ARENA) {
        Cell *cells = global_cells(p, size, kind_name[kind], true, pc);
        if (kind == UPDATE) {
            if (watch->fenced) {
                released[watch->block_number & 0xFFFF] = true;
                any_released = true;
            }
            if (any_released) watch->acquired = true;
        }
        touch_all(cells, kind, me(false, pc, flags), p, size, false, true);
    } else {
        const char *bound = (const char *)block->launch->bound.get();
        if ((size_t)(p - bound) < block->launch->bound_size || within(p, watch->statics)) return;
        report("host-memory",
               text("%s of %s at %p, which is no device memory%s", kind_name[kind],
                    bytes(size).c_str(), (void *)p, (uintptr_t)p < 4096 ? ": a null pointer" : ""),
               pc);
    }
}

/* Called for every access of the program that the compiler saw. */
static inline void access(const void *address, size_t size, Kind kind, unsigned flags,
                          const void *pc)
{
    char *p = (char *)address;
    if (!self) return host_access(p, size, kind, pc);
    if ((size_t)(p - block->running->stack) < STACK || within(p, watch->locals) || quiet || !size)
        return;
    kernel_access(p, size, kind, flags, pack_pc(pc));
}

/* ---- 5. What the engine tells ---------------------------------------------------------------- */

static std::function<void()> check_work(cudaStream_t s, uint64_t count, const char *what, Site at,
                                        std::function<void()> work)
{
    std::shared_ptr<const Clock> known;
    {
        std::lock_guard<std::mutex> hold(clock_lock);
        known = host_clock;
    }
    return [=] {
        std::lock_guard<std::mutex> alone(running_lock);
        {
            std::lock_guard<std::mutex> hold(clock_lock);
            join(clock_of(s->index), *known);
            running_clock = clock_of(s->index);
        }
        if (works.size() >> (64 - WORK_SHIFT))
            fail({nullptr, 0}, "the checker has seen too many launches");
        running = (uint32_t)works.size();
        works.push_back({what, at, s->index, s->device, count});
        if (any_released) released.assign(released.size(), false);
        any_released = false;
        work();
        running = 0;
        std::lock_guard<std::mutex> hold(clock_lock);
        join(clock_of(s->index), s->index, count);
    };
}

static void check_recorded(Record *r) { r->clock = running_clock; }
static void check_waited(cudaStream_t s, const Record &r)
{
    std::lock_guard<std::mutex> hold(clock_lock);
    join(clock_of(s->index), r.clock);
}
static void check_joined(cudaStream_t s, cudaStream_t of)
{
    std::lock_guard<std::mutex> hold(clock_lock);
    Clock known = clock_of(of->index);
    join(clock_of(s->index), known);
}
static void host_learns(const Clock &clock) /* the caller holds clock_lock */
{
    auto next = std::make_shared<Clock>(*host_clock);
    join(*next, clock);
    host_clock = next;
    auto is_done = [&](const Pending &h) {
        return (size_t)h.stream < next->size() && (*next)[(size_t)h.stream] >= h.count;
    };
    pending.erase(std::remove_if(pending.begin(), pending.end(), is_done), pending.end());
    bound_pending();
}
static void check_synchronized(const Record &r)
{
    std::lock_guard<std::mutex> hold(clock_lock);
    host_learns(r.clock);
}
static void check_synchronized(cudaStream_t s)
{
    std::lock_guard<std::mutex> hold(clock_lock);
    host_learns(clock_of(s->index));
}
static void check_host(const void *p, size_t size, Touch touch, cudaStream_t s, uint64_t count,
                       Site at)
{
    std::lock_guard<std::mutex> hold(clock_lock);
    pending.push_back({(const char *)p, (const char *)p + size, touch, s->index, count, at});
    bound_pending();
}

static char *check_allocate(size_t size, int device, Site at)
{
    if (!arena) {
        arena_cells = (Cell *)reserve(ARENA / GRANULE * sizeof(Cell));
        arena_pages = (uint32_t *)reserve(ARENA / PAGE * sizeof *arena_pages);
        tracked = (Tracked *)reserve(ARENA / PAGE * sizeof *tracked);
        arena = (char *)reserve(ARENA);
    }
    size_t pages = (size + PAGE - 1) / PAGE;
    if (arena_used + (pages + 1) * PAGE > ARENA)
        fail(at, "the checker has used up its addresses for device memory");
    char *base = arena + arena_used;
    tracked[++tracked_count] = {base, size, device, false, at, {nullptr, 0}};
    for (size_t i = 0; i < pages; i++) arena_pages[arena_used / PAGE + i] = tracked_count;
    arena_used += (pages + 1) * PAGE;
    return base;
}
static void check_free(const Allocation &a, Site at)
{
    size_t offset = (size_t)(a.base - arena), size = (a.size + PAGE - 1) / PAGE * PAGE;
    Tracked &t = tracked[arena_pages[offset / PAGE]];
    t.freed = true;
    t.freed_at = at;
    madvise(a.base, size, MADV_DONTNEED);
    madvise(arena_cells + offset / GRANULE, size / GRANULE * sizeof(Cell), MADV_DONTNEED);
}

static void check_range(const void *p, size_t size, Touch touch, bool peers, const char *what)
{
    if (!size) return;
    Kind kind = touch == WRITES ? WRITE : READ;
    std::string doing = text("%s by %s", kind_name[kind], what);
    Cell *cells = global_cells((const char *)p, size, doing.c_str(), peers, 0);
    touch_all(cells, kind, me(false, 0, 0), (char *)p, size, false, touch == READS);
}
static void check_copied(void *to, const void *from, size_t size)
{
    Cell *t = arena_cells + (size_t)((char *)to - arena) / GRANULE;
    const Cell *f = arena_cells + (size_t)((const char *)from - arena) / GRANULE;
    for (size_t i = 0; i < (size + GRANULE - 1) / GRANULE; i++) {
        bool second = ((uintptr_t)from / GRANULE + i) % 2;
        const Cell &from_cell =
            second && f[(ptrdiff_t)i - 1].write.flags & WHOLE ? f[(ptrdiff_t)i - 1] : f[i];
        if (from_cell.write.who) continue;
        split_word(t + i - ((uintptr_t)to / GRANULE + i) % 2);
        t[i].write.who = 0;
    }
}

static Watch *new_watch()
{
    Watch *w = (Watch *)reserve(sizeof(Watch));
    for (uint16_t &e : w->epoch) e = 1; /* seen[][] is 0: no thread comes after another yet */
    w->statics[0] = (uintptr_t)__executable_start;
    w->statics[1] = (uintptr_t)end;
    dl_iterate_phdr(
        [](dl_phdr_info *info, size_t, void *arg) {
            Watch *to = (Watch *)arg;
            for (int i = 0; i < info->dlpi_phnum; i++)
                if (info->dlpi_phdr[i].p_type == PT_TLS && info->dlpi_tls_data) {
                    to->locals[0] = (uintptr_t)info->dlpi_tls_data;
                    to->locals[1] = to->locals[0] + info->dlpi_phdr[i].p_memsz;
                }
            return 1; /* the first entry is the program itself */
        },
        w);
    return w;
}

static void check_end()
{
    if (watch) munmap(watch, sizeof *watch);
    watch = nullptr;
}

static void check_block(Block *b)
{
    if (!watch) watch = new_watch();
    Watch *w = watch;
    w->shared_serial++;
    w->phase = 0;
    w->fenced = w->acquired = false;
    w->block_number = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    w->global_base = (uint64_t)running << WORK_SHIFT;
    w->global_base |= (uint64_t)(w->block_number & 0xFFFF) << BLOCK_SHIFT;
    for (size_t i = 0; i < w->count; i++)
        memset(w->lines + (size_t)(w->variables[i].at - b->memory) / LINE, 0,
               (w->variables[i].size + LINE - 1) / LINE);
    w->count = 0;
}
static void check_shared(const SharedVariable &v)
{
    if (!v.size) return;
    if (watch->count == 255) fail(v.declared, "more than 255 shared variables");
    watch->variables[watch->count++] = v;
    memset(watch->lines + (size_t)(v.at - block->memory) / LINE, (int)watch->count,
           (v.size + LINE - 1) / LINE);
}
static void check_pause() { settle_doubt(); }
static void check_barrier()
{
    settle_doubt();
    watch->phase++;
}
static void check_fence() { watch->fenced = true; }
static void check_quiet(bool on) { quiet = on; }

/* The lanes of mask have met in __syncwarp. Each now comes after everything that any of them has
 * done or comes after. */
static void check_lanes(unsigned mask)
{
    int first = self->warp * 32;
    uint16_t joined[32];
    bool any = false;
    for (int l = 0; l < 32; l++) {
        if (!(mask >> l & 1)) continue;
        for (int k = 0; k < 32; k++) {
            uint16_t seen = watch->seen[first + l][k];
            if (!any || (int16_t)(seen - joined[k]) > 0) joined[k] = seen;
        }
        any = true;
    }
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1) joined[l] = watch->epoch[first + l]++;
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1) memcpy(watch->seen[first + l], joined, sizeof joined);
}

static void check_copy_issued(const AsyncCopy &c, const void *pc)
{
    settle_doubt();
    if (!((size_t)((char *)c.shared - block->memory) < SHARED_ROOM))
        report("bounds", "cp.async to what is not shared memory", pack_pc(pc));
    if (c.valid) access(c.global, 16, READ, 0, pc);
    access(c.shared, 16, WRITE, LANDING, pc);
}
static void check_copy_landed(const AsyncCopy &c)
{
    Cell *cells = &watch->cells[(size_t)((char *)c.shared - block->memory) / GRANULE];
    for (size_t i = 0; i < 16 / GRANULE; i++) {
        Access &w = cells[i].write;
        uint16_t whole = w.flags & WHOLE;
        w = me(true, w.pc, whole);
        i += whole ? 1 : 0;
    }
}
} // namespace cudaemu

/* ---- 6. What the compiler calls -------------------------------------------------------------- */

#define HERE __builtin_return_address(0)
#define ACCESSES(size)                                                                             \
    void __tsan_read##size(void *p) { access(p, size, READ, 0, HERE); }                            \
    void __tsan_write##size(void *p) { access(p, size, WRITE, 0, HERE); }                          \
    void __tsan_unaligned_read##size(void *p) { access(p, size, READ, 0, HERE); }                  \
    void __tsan_unaligned_write##size(void *p) { access(p, size, WRITE, 0, HERE); }                \
    void __tsan_volatile_read##size(void *p) { access(p, size, READ, 0, HERE); }                   \
    void __tsan_volatile_write##size(void *p) { access(p, size, WRITE, 0, HERE); }
#define FETCH(bits, T, name, builtin)                                                              \
    T __tsan_atomic##bits##_fetch_##name(volatile T *p, T v, int)                                  \
    {                                                                                              \
        access((void *)p, sizeof(T), UPDATE, ATOMIC, HERE);                                        \
        return builtin(p, v, __ATOMIC_SEQ_CST);                                                    \
    }
#define ATOMICS(bits, T)                                                                           \
    T __tsan_atomic##bits##_load(const volatile T *p, int)                                         \
    {                                                                                              \
        access((const void *)p, sizeof(T), READ, ATOMIC, HERE);                                    \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                               \
    }                                                                                              \
    void __tsan_atomic##bits##_store(volatile T *p, T v, int)                                      \
    {                                                                                              \
        access((void *)p, sizeof(T), WRITE, ATOMIC, HERE);                                         \
        __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                  \
    }                                                                                              \
    T __tsan_atomic##bits##_exchange(volatile T *p, T v, int)                                      \
    {                                                                                              \
        access((void *)p, sizeof(T), UPDATE, ATOMIC, HERE);                                        \
        return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                        \
    }                                                                                              \
    FETCH(bits, T, add, __atomic_fetch_add)                                                        \
    FETCH(bits, T, sub, __atomic_fetch_sub)                                                        \
    FETCH(bits, T, and, __atomic_fetch_and)                                                        \
    FETCH(bits, T, or, __atomic_fetch_or)                                                          \
    FETCH(bits, T, xor, __atomic_fetch_xor)                                                        \
    FETCH(bits, T, nand, __atomic_fetch_nand)                                                      \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile T *p, T *compare, T v, int, int)    \
    {                                                                                              \
        access((void *)p, sizeof(T), UPDATE, ATOMIC, HERE);                                        \
        return __atomic_compare_exchange_n(p, compare, v, false, __ATOMIC_SEQ_CST,                 \
                                           __ATOMIC_SEQ_CST);                                      \
    }                                                                                              \
    int __tsan_atomic##bits##_compare_exchange_weak(volatile T *p, T *compare, T v, int, int)      \
    {                                                                                              \
        access((void *)p, sizeof(T), UPDATE, ATOMIC, HERE);                                        \
        return __atomic_compare_exchange_n(p, compare, v, false, __ATOMIC_SEQ_CST,                 \
                                           __ATOMIC_SEQ_CST);                                      \
    }                                                                                              \
    T __tsan_atomic##bits##_compare_exchange_val(volatile T *p, T compare, T v, int, int)          \
    {                                                                                              \
        access((void *)p, sizeof(T), UPDATE, ATOMIC, HERE);                                        \
        __atomic_compare_exchange_n(p, &compare, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);    \
        return compare;                                                                            \
    }

extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void *p, size_t size) { access(p, size, READ, 0, HERE); }
void __tsan_write_range(void *p, size_t size) { access(p, size, WRITE, 0, HERE); }
void __tsan_vptr_read(void **) {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)

/* objcopy renames the program's memcpy etc. to these; newer compilers do so themselves. */
void *__tsan_memcpy(void *to, const void *from, size_t size)
{
    access(from, size, READ, 0, HERE);
    access(to, size, WRITE, 0, HERE);
    return memcpy(to, from, size);
}
void *__tsan_memmove(void *to, const void *from, size_t size)
{
    access(from, size, READ, 0, HERE);
    access(to, size, WRITE, 0, HERE);
    return memmove(to, from, size);
}
void *__tsan_memset(void *to, int byte, size_t size)
{
    access(to, size, WRITE, 0, HERE);
    return memset(to, byte, size);
}

/* -fsanitize=bounds,alignment,..: the compiler calls these on an error and passes the place. */
struct UbsanPlace {
    const char *file;
    uint32_t line, column;
};
#define UNDEFINED(name, kind, what)                                                                \
    void __ubsan_handle_##name##_abort(const UbsanPlace *at, ...)                                  \
    {                                                                                              \
        report(kind, text(what ": %s:%u", at->file, at->line), pack_pc(HERE));                     \
    }
UNDEFINED(out_of_bounds, "bounds", "index outside an array")
UNDEFINED(type_mismatch_v1, "misaligned", "address without the alignment of its type")
UNDEFINED(alignment_assumption, "misaligned", "address without the alignment it was said to have")
UNDEFINED(add_overflow, "overflow", "sum of integers overflows")
UNDEFINED(sub_overflow, "overflow", "difference of integers overflows")
UNDEFINED(mul_overflow, "overflow", "product of integers overflows")
UNDEFINED(negate_overflow, "overflow", "negation of an integer overflows")
UNDEFINED(divrem_overflow, "overflow", "division by zero, or of the least integer by -1")
UNDEFINED(shift_out_of_bounds, "overflow", "shift by too much, or of a negative number")
}
