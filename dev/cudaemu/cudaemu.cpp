/* cudaemu.cpp - the engine behind cudaemu.h: fibers, blocks, warps, memory, streams, matrix
 * products.
 *
 *     1 messages   2 fibers   3 blocks and warps   4 launches   5 memory   6 streams and events
 *     7 copies   8 devices   9 matrix products   10 cuBLAS and cuBLASLt
 *
 * One OS thread runs a block from start to end, so blocks need no locks. Several OS threads may run
 * kernels at the same time. README.md explains the whole design. */
#include "cudaemu.h"

#include <assert.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <algorithm>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
#define CUDAEMU_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(CUDAEMU_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define CUDAEMU_UCONTEXT 1
#endif
#ifdef CUDAEMU_UCONTEXT
#include <ucontext.h>
#endif

__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

namespace cudaemu
{

#ifdef CUDACHECK
#define PROGRAM "cudacheck"
/* Unused bytes behind each shared variable. An access there is an error that the checker
 * reports. */
constexpr size_t SHARED_GAP = 128;
#else
#define PROGRAM "cudaemu"
constexpr size_t SHARED_GAP = 32; /* ASan watches them */
#endif
constexpr int MAX_THREADS = 1024; /* in a block */
/* Most bytes of shared memory in a block: by default, and with cudaFuncSetAttribute. */
constexpr size_t SHARED_DEFAULT = 48 << 10, SHARED_OPTIN = 227 << 10;
constexpr size_t SHARED_ROOM = 2 * SHARED_OPTIN; /* for variables and the gaps between */
constexpr size_t DEVICE_MEMORY = (size_t)16 << 30;
constexpr size_t LT_WORKSPACE = 1 << 16; /* bytes that each product of cuBLASLt asks for */
constexpr int POISON = 0xFF; /* bytes of fresh memory: as float, bf16 or fp16 each is a NaN */

/* cudacheck.cpp, the checker, includes this file and is told what happens. Without it these calls
 * are nothing. */
#ifdef CUDACHECK
#define CHECKED(call) call
#else
#define CHECKED(call) ((void)0)
#endif

/* ---- 1. Messages ----------------------------------------------------------------------------- */

struct Block;
struct Thread;
static __thread Block *block; /* the block that this OS thread runs, or null */
static __thread Thread *self; /* the running CUDA thread of that block */

/* Writes "kernel k (f.cu:12), block (..), thread (..): ", or "" outside kernels. */
static void describe_running(char *text, size_t size);

void fail(Site at, const char *format, ...)
{
    char message[1024], running[512], place[256] = "";
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    describe_running(running, sizeof running);
    if (at.file) snprintf(place, sizeof place, "%s:%d: ", at.file, at.line);
    static int spoken; /* if several ranks fail, only the first prints its line; the others wait */
    while (__atomic_exchange_n(&spoken, 1, __ATOMIC_SEQ_CST)) pause();
    fflush(stdout);
    fprintf(stderr, "%s: %s%s%s\n", PROGRAM, place, running, message);
    _exit(1); /* not exit(), because other ranks still run */
}

/* ---- 2. Fibers: stacks of their own within one OS thread ------------------------------------- */

constexpr size_t STACK = 256 << 10; /* address space; the system adds pages when they are touched */

struct Fiber {
    void *sp;           /* address of the saved registers while the fiber does not run */
    char *stack;        /* lowest address; the page below it is a guard */
    const void *bottom; /* ASan's data: the stack, its size, and its fake stack */
    size_t size;
    void *fake;
#ifdef CUDAEMU_UCONTEXT
    ucontext_t context;
#endif
};

static void fiber_main(); /* never returns */

#ifndef CUDAEMU_UCONTEXT
extern "C" void cudaemu_switch(void **save, void *load) __asm__("cudaemu_switch");
#ifdef __x86_64__
/* Pushes the registers that a function must preserve (System V ABI), swaps the stack pointers, and
 * pops the same registers. */
__asm__(".text\n.p2align 4\n.globl cudaemu_switch\ncudaemu_switch:\n"
        "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
        "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
        "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
constexpr int FRAME = 8, /* words between the new stack pointer and the top */
    ENTRY = 6;           /* position of the return address */
#else
/* The same for AAPCS64: x19-x30 and the low halves of v8-v15. */
__asm__(".text\n.p2align 4\n.globl cudaemu_switch\ncudaemu_switch:\n"
        "sub sp,sp,#160\n"
        "stp x19,x20,[sp]\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\n"
        "stp x25,x26,[sp,#48]\nstp x27,x28,[sp,#64]\nstp x29,x30,[sp,#80]\n"
        "stp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\n"
        "stp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\n"
        "mov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
        "ldp x19,x20,[sp]\nldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\nldp x25,x26,[sp,#48]\nldp "
        "x27,x28,[sp,#64]\n"
        "ldp x29,x30,[sp,#80]\nldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\nldp "
        "d12,d13,[sp,#128]\nldp d14,d15,[sp,#144]\n"
        "add sp,sp,#160\nret\n");
constexpr int FRAME = 20, ENTRY = 11;
#endif
#endif

static Fiber *fiber_new(int number)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *base = (char *)mmap(nullptr, page + STACK, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) fail({nullptr, 0}, "out of memory for the stack of a CUDA thread");
    mprotect(base, page, PROT_NONE);
    Fiber *f = new Fiber();
    f->stack = base + page;
    f->bottom = f->stack;
    /* Neighbouring stacks start at different offsets. Otherwise they would all compete for the same
     * few cache lines. */
    f->size = STACK - (size_t)(number % 32) * 320;
#ifdef CUDAEMU_UCONTEXT
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = f->size;
    f->context.uc_link = nullptr;
    makecontext(&f->context, fiber_main, 0);
#else
    void **frame = (void **)(f->stack + f->size) - FRAME;
    memset(frame, 0, FRAME * sizeof *frame);
    frame[ENTRY] = (void *)fiber_main; /* the first switch returns into fiber_main */
    f->sp = frame;
#endif
    return f;
}

static void fiber_delete(Fiber *f)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
#ifdef CUDAEMU_ASAN
    ASAN_UNPOISON_MEMORY_REGION(f->stack, STACK);
#endif
    munmap(f->stack - page, page + STACK);
    delete f;
}

#ifdef CUDAEMU_ASAN
static __thread Fiber *previous; /* the fiber that switched to the running one */

static void fiber_entered(void *fake)
{
    __sanitizer_finish_switch_fiber(fake, &previous->bottom, &previous->size);
}
#endif

static void fiber_switch(Fiber *from, Fiber *to)
{
#ifdef CUDAEMU_ASAN
    previous = from;
    __sanitizer_start_switch_fiber(&from->fake, to->bottom, to->size);
#endif
#ifdef CUDAEMU_UCONTEXT
    swapcontext(&from->context, &to->context);
#else
    cudaemu_switch(&from->sp, to->sp);
#endif
#ifdef CUDAEMU_ASAN
    fiber_entered(from->fake);
#endif
}

/* ---- 3. Blocks and warps: one OS thread's state, and the scheduler --------------------------- */

struct AsyncCopy {
    void *shared;
    const void *global;
    bool valid;
    Site at;
};

struct Thread {
    Fiber *fiber;
    uint3 index;
    int number, lane, warp;
    bool done;
    const char *waits_in; /* the operation it waits in, or null */
    Site waits_at;
    std::vector<AsyncCopy> copies; /* cp.async copies that have not arrived, */
    std::vector<size_t> groups;    /* and how many of them belong to each commit */
};

/* Lanes of a warp that wait in the same operation, with the same mask. */
struct Meeting {
    unsigned mask, came;
    Combine combine;
    const char *name;
    Site at;
    void *slots[32];
};

struct Warp {
    unsigned live; /* lanes that exist and are still in the kernel */
    std::vector<Meeting *> meetings;
};

struct Launch {
    Config config;
    void (*call)(void *bound); /* runs the kernel with its bound arguments */
    std::shared_ptr<void> bound;
    size_t bound_size;
    int device;
    size_t dynamic_allowed; /* bytes of dynamic shared memory that cudaFuncSetAttribute allowed */
};

struct SharedVariable {
    const void *tag;
    const char *name;
    char *at;
    size_t size;
    Site declared;
};

#ifdef CUDACHECK
static void check_end(); /* an OS thread that has run blocks ends */
#endif

struct Block {
    Launch *launch;
    Thread threads[MAX_THREADS];
    Warp warps[MAX_THREADS / 32];
    int count, started, exited; /* numbers of threads */
    Thread *ready[MAX_THREADS]; /* a ring of threads that are ready to run */
    unsigned ready_head, ready_tail;
    int barrier_came, barrier_votes, barrier_result;
    Thread *barrier_waiting[MAX_THREADS];
    Site barrier_at;
    Fiber host; /* the OS thread's own stack */
    Fiber *running;
    std::vector<Fiber *> fibers, idle;
    std::vector<Meeting *> spare;
    char *memory; /* shared memory: the dynamic part, then variables in order of appearance */
    size_t used, charged; /* bytes with and without gaps */
    std::vector<SharedVariable> variables;
    char fault_stack[32768]; /* stack for on_fault, as the thread's own may be full */
    ~Block()
    {
        CHECKED(check_end());
        for (Fiber *f : fibers) fiber_delete(f);
        for (Meeting *m : spare) delete m;
        free(memory);
    }
};

#ifdef CUDACHECK
static void check_block(Block *b); /* the block's first thread is about to run */
static void check_pause();         /* the running thread stops to wait, or leaves the kernel */
static void check_barrier();       /* all threads of the block have met */
static void check_lanes(unsigned mask);
static void check_fence();
static void check_quiet(bool on); /* accesses are the engine's own, from now on or no longer */
static void check_shared(const SharedVariable &v);
static void check_copy_issued(const AsyncCopy &c, const void *pc);
static void check_copy_landed(const AsyncCopy &c);
#endif

static std::string name_thread(const Thread *t)
{
    char text[64];
    snprintf(text, sizeof text, "thread (%u,%u,%u)", t->index.x, t->index.y, t->index.z);
    return text;
}

static void describe_running(char *text, size_t size)
{
    text[0] = 0;
    if (!block || !block->launch) return;
    const Config &c = block->launch->config;
    size_t n = (size_t)snprintf(text, size, "kernel %s (launched at %s:%d), block (%u,%u,%u)",
                                c.name, c.at.file, c.at.line, blockIdx.x, blockIdx.y, blockIdx.z);
    if (n < size)
        snprintf(text + n, size - n, "%s%s: ", self ? ", " : "",
                 self ? name_thread(self).c_str() : "");
}

static void in_kernel(const char *what, Site at)
{
    if (!self) fail(at, "%s called outside a kernel", what);
}

int lane() { return self ? self->lane : 0; }

static void wake(Thread *t)
{
    t->waits_in = nullptr;
    block->ready[block->ready_tail++ % MAX_THREADS] = t;
}

static void run_on(Thread *t)
{
    self = t;
    threadIdx = t->index;
}

/* All remaining threads wait for threads that will never come. */
[[noreturn]] static void deadlock()
{
    Thread *first = nullptr, *other = nullptr;
    for (int i = 0; i < block->count; i++) {
        Thread *t = &block->threads[i];
        if (t->done) continue;
        if (!first) first = t;
        else if (!other &&
                 (t->waits_at.line != first->waits_at.line || t->waits_in != first->waits_in))
            other = t;
    }
    self = first;
    if (!other)
        fail(first->waits_at, "%s: the other threads it waits for never come", first->waits_in);
    fail(first->waits_at, "%s waits for threads that never come: %s waits in %s at %s:%d",
         first->waits_in, name_thread(other).c_str(), other->waits_in, other->waits_at.file,
         other->waits_at.line);
}

/* Lets another thread of the block run. Returns when the calling thread has been woken. */
static void wait_in(const char *name, Site at)
{
    Block *b = block;
    Fiber *from = b->running;
    self->waits_in = name;
    self->waits_at = at;
    CHECKED(check_pause());
    if (b->ready_head != b->ready_tail) {
        Thread *t = b->ready[b->ready_head++ % MAX_THREADS];
        run_on(t);
        b->running = t->fiber;
    } else if (b->started < b->count) { /* a new fiber runs the next threads */
        if (b->idle.empty()) {
            b->fibers.push_back(fiber_new((int)b->fibers.size()));
            b->idle.push_back(b->fibers.back());
        }
        b->running = b->idle.back();
        b->idle.pop_back();
    } else {
        deadlock();
    }
    fiber_switch(from, b->running);
}

static void meet(Warp *w, Meeting *m) /* all lanes have come */
{
    CHECKED(check_quiet(true));
    m->combine(m->slots, m->came, m->at);
    CHECKED(check_quiet(false));
    w->meetings.erase(std::find(w->meetings.begin(), w->meetings.end(), m));
    block->spare.push_back(m);
}

static void wake_meeting(const Thread *last, const Meeting *m)
{
    Thread *first = &block->threads[last->warp * 32];
    for (unsigned l = 0; l < 32; l++)
        if (m->came >> l & 1 && first + l != last) wake(first + l);
}

/* The running thread leaves the kernel. If a warp operation waited only for this thread, it goes
 * on. If a barrier waits for it, that is an error. */
static void leave()
{
    Thread *t = self;
    CHECKED(check_pause());
    t->done = true;
    block->exited++;
    if (block->barrier_came)
        fail(block->barrier_at,
             "divergent __syncthreads: this thread leaves the kernel while %s waits",
             name_thread(block->barrier_waiting[0]).c_str());
    Warp *w = &block->warps[t->warp];
    w->live &= ~(1u << t->lane);
    for (size_t i = w->meetings.size(); i-- > 0;) {
        Meeting *m = w->meetings[i];
        if (m->came != (m->mask & w->live)) continue;
        wake_meeting(t, m);
        meet(w, m);
    }
}

/* Runs threads of the block that have not started yet, one after the other while none has to wait.
 * So a kernel without barriers is a plain loop. Then it switches to a thread that is ready. */
static void fiber_main()
{
    Fiber *me = block->running;
#ifdef CUDAEMU_ASAN
    fiber_entered(nullptr);
#endif
    for (;;) {
        Block *b = block;
        while (b->started < b->count && b->ready_head == b->ready_tail) {
            Thread *t = &b->threads[b->started++];
            t->fiber = me;
            run_on(t);
            b->launch->call(b->launch->bound.get());
            leave();
        }
        b->idle.push_back(me);
        if (b->ready_head != b->ready_tail) {
            Thread *t = b->ready[b->ready_head++ % MAX_THREADS];
            run_on(t);
            b->running = t->fiber;
        } else if (b->exited == b->count) {
            self = nullptr;
            b->running = &b->host;
        } else {
            deadlock();
        }
        if (b->running == me) b->idle.pop_back();
        else fiber_switch(me, b->running);
    }
}

static void run_block(Block *b)
{
    b->started = b->exited = 0;
    b->ready_head = b->ready_tail = 0;
    b->barrier_came = 0;
    b->variables.clear();
    b->charged = b->launch->config.shared;
    b->used = (b->charged + SHARED_GAP + 127) / 128 * 128;
#ifdef CUDAEMU_ASAN
    ASAN_POISON_MEMORY_REGION(b->memory + b->charged, SHARED_ROOM - b->charged);
    ASAN_UNPOISON_MEMORY_REGION(b->memory, b->charged);
#endif
    if (b->charged) memset(b->memory, POISON, b->charged);
    CHECKED(check_block(b));
    CHECKED(check_shared(
        {nullptr, "dynamic shared memory", b->memory, b->charged, b->launch->config.at}));
    for (int i = 0; i < b->count; i += 32) {
        int lanes = b->count - i;
        b->warps[i / 32].live = lanes >= 32 ? 0xFFFFFFFFu : (1u << lanes) - 1;
    }
    for (int i = 0; i < b->count; i++) {
        Thread *t = &b->threads[i];
        t->done = false;
        t->copies.clear();
        t->groups.clear();
    }
    if (b->fibers.empty()) {
        b->fibers.push_back(fiber_new(0));
        b->idle.push_back(b->fibers.back());
    }
    b->running = b->idle.back();
    b->idle.pop_back();
    fiber_switch(&b->host, b->running);
}

/* The running thread enters the block-wide barrier. Every thread must come, and to the same
 * barrier. */
int barrier(bool predicate, Site at)
{
    in_kernel("__syncthreads", at);
    Block *b = block;
    if (b->exited) {
        const Thread *gone = b->threads;
        while (!gone->done) gone++;
        fail(at, "divergent __syncthreads: %s has left the kernel", name_thread(gone).c_str());
    }
    if (!b->barrier_came) {
        b->barrier_at = at;
        b->barrier_votes = 0;
    } else if (at.line != b->barrier_at.line || strcmp(at.file, b->barrier_at.file))
        fail(at, "divergent __syncthreads: %s waits in the one at %s:%d",
             name_thread(b->barrier_waiting[0]).c_str(), b->barrier_at.file, b->barrier_at.line);
    b->barrier_votes += predicate;
    b->barrier_waiting[b->barrier_came] = self;
    b->barrier_came++;
    if (b->barrier_came < b->count) {
        wait_in("__syncthreads", at);
    } else {
        b->barrier_came = 0;
        b->barrier_result = b->barrier_votes;
        CHECKED(check_barrier());
        for (int i = 0; i < b->count - 1; i++) wake(b->barrier_waiting[i]);
    }
    return b->barrier_result;
}

void warp(unsigned mask, void *slot, Combine combine, const char *name, Site at)
{
    in_kernel(name, at);
    Thread *t = self;
    Warp *w = &block->warps[t->warp];
    if (!(mask >> t->lane & 1))
        fail(at, "%s: the mask %08x does not hold the calling lane %d", name, mask, t->lane);
    Meeting *m = nullptr;
    for (Meeting *k : w->meetings)
        if (k->mask == mask) m = k;
    if (!m) {
        if (block->spare.empty()) block->spare.push_back(new Meeting);
        m = block->spare.back();
        block->spare.pop_back();
        *m = {mask, 0, combine, name, at, {}};
        w->meetings.push_back(m);
    } else if (m->combine != combine || m->at.line != at.line || strcmp(m->at.file, at.file)) {
        fail(at, "%s: lane %d of mask %08x waits in %s at %s:%d", name, __builtin_ctz(m->came),
             mask, m->name, m->at.file, m->at.line);
    }
    m->came |= 1u << t->lane;
    m->slots[t->lane] = slot;
    if (m->came != (mask & w->live)) {
        wait_in(name, at);
    } else {
        wake_meeting(t, m);
        meet(w, m);
    }
}

void sync_lanes(void *const *, unsigned mask, Site)
{
    CHECKED(check_lanes(mask));
    (void)mask;
}

void fence()
{
    in_kernel("__threadfence", {nullptr, 0});
    CHECKED(check_fence());
}

static void *shared_alloc(Block *b, size_t size, Site at)
{
    size_t dynamic = b->launch->config.shared, allowed = b->launch->dynamic_allowed;
    size_t limit = allowed && dynamic <= allowed ? SHARED_OPTIN : SHARED_DEFAULT;
    b->charged += size;
    if (b->charged > limit)
        fail(at, "%zu bytes of shared memory, %zu of them dynamic; this kernel may have %zu",
             b->charged, dynamic, limit);
    if (b->used + size + SHARED_GAP > SHARED_ROOM) fail(at, "too many shared variables");
    char *p = b->memory + b->used;
    b->used = (b->used + size + SHARED_GAP + 127) / 128 * 128;
#ifdef CUDAEMU_ASAN
    ASAN_UNPOISON_MEMORY_REGION(p, size);
#endif
    memset(p, POISON, size);
    return p;
}

void *shared(const void *tag, size_t size, const char *name, Site at)
{
    in_kernel("__shared__ variable", at);
    Block *b = block;
    for (const SharedVariable &v : b->variables)
        if (v.tag == tag) return v.at;
    char *p = (char *)shared_alloc(b, size, at);
    b->variables.push_back({tag, name, p, size, at});
    CHECKED(check_shared(b->variables.back()));
    return p;
}

void *dynamic_shared(size_t align, Site at)
{
    in_kernel("extern __shared__ variable", at);
    if (align > 128) fail(at, "alignment %zu of dynamic shared memory", align);
    return block->memory;
}

void copy_async(void *to, const void *from, bool valid, Site at)
{
    in_kernel("cp.async", at);
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16)
        fail(at, "cp.async: both addresses must be multiples of 16");
    self->copies.push_back({to, from, valid, at});
    CHECKED(check_copy_issued(self->copies.back(), __builtin_return_address(0)));
}

void copy_async_commit()
{
    in_kernel("cp.async.commit_group", {nullptr, 0});
    size_t before = 0;
    for (size_t n : self->groups) before += n;
    self->groups.push_back(self->copies.size() - before);
}

void copy_async_wait(int pending)
{
    in_kernel("cp.async.wait_group", {nullptr, 0});
    Thread *t = self;
    size_t landing = 0;
    size_t groups = t->groups.size() > (size_t)pending ? t->groups.size() - (size_t)pending : 0;
    for (size_t g = 0; g < groups; g++) landing += t->groups[g];
    for (size_t i = 0; i < landing; i++) {
        const AsyncCopy &c = t->copies[i];
        if (c.valid) memcpy(c.shared, c.global, 16);
        else memset(c.shared, 0, 16);
        CHECKED(check_copy_landed(c));
    }
    t->copies.erase(t->copies.begin(), t->copies.begin() + (ptrdiff_t)landing);
    t->groups.erase(t->groups.begin(), t->groups.begin() + (ptrdiff_t)groups);
}

/* ---- 4. Launches ----------------------------------------------------------------------------- */

static std::mutex attributes_lock;
/* By kernel: the dynamic shared memory that cudaFuncSetAttribute allowed. */
static auto &max_dynamic_shared = *new std::map<const void *, size_t>();

#ifdef CUDAEMU_ASAN
static void watch_faults(Block *) {} /* ASan reports faults itself */
#else
/* A kernel touched memory that it does not have, or its stack's guard page. Prints the line, then
 * lets the default action end the program. */
static void on_fault(int signal, siginfo_t *info, void *)
{
    struct sigaction standard = {};
    standard.sa_handler = SIG_DFL;
    sigaction(signal, &standard, nullptr);
    if (!block || !block->running)
        return; /* no kernel runs: the instruction runs again and ends the program */
    const char *stack = block->running->stack, *p = (const char *)info->si_addr;
    fail({nullptr, 0},
         p >= stack - 65536 && p < stack ? "its stack overflows" : "memory fault at address %p",
         info->si_addr);
}

static void watch_faults(Block *b)
{
    stack_t alternative = {};
    alternative.ss_sp = b->fault_stack;
    alternative.ss_size = sizeof b->fault_stack;
    sigaltstack(&alternative, nullptr);
    for (int signal : {SIGSEGV, SIGBUS}) {
        struct sigaction old, ours = {};
        ours.sa_sigaction = on_fault;
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
        if (!sigaction(signal, nullptr, &old) && old.sa_handler == SIG_DFL)
            sigaction(signal, &ours, nullptr);
    }
}
#endif

/* The state of one OS thread that runs blocks. It is kept from launch to launch. */
static Block *this_block()
{
    static __thread Block
        *mine; /* a plain pointer, as the thread's other destructors may still run kernels */
    static thread_local struct Owner {
        ~Owner()
        {
            delete mine;
            mine = nullptr;
        }
    } owner;
    (void)&owner;
    if (!mine) {
        mine = new Block();
        mine->memory = (char *)aligned_alloc(128, SHARED_ROOM);
        if (!mine->memory) fail({nullptr, 0}, "out of memory");
        watch_faults(mine);
    }
    return mine;
}

static void run_launch(Launch *launch)
{
    const Config &c = launch->config;
    Block *b = this_block(), *outer = block;
    if (outer) fail(c.at, "a kernel launches a kernel");
    block = b;
    b->launch = launch;
    b->count = (int)(c.block.x * c.block.y * c.block.z);
    blockDim = c.block;
    gridDim = c.grid;
    int i = 0;
    for (unsigned z = 0; z < c.block.z; z++)
        for (unsigned y = 0; y < c.block.y; y++)
            for (unsigned x = 0; x < c.block.x; x++, i++) {
                Thread *t = &b->threads[i];
                t->index = {x, y, z};
                t->number = i;
                t->lane = i % 32;
                t->warp = i / 32;
            }
    for (unsigned z = 0; z < c.grid.z; z++)
        for (unsigned y = 0; y < c.grid.y; y++)
            for (unsigned x = 0; x < c.grid.x; x++) {
                blockIdx = {x, y, z};
                run_block(b);
            }
    b->launch = nullptr;
    block = nullptr;
}

static int stream_device(cudaStream_t stream);
static uint64_t enqueue(cudaStream_t stream, const char *what, Site at, std::function<void()> work);
static thread_local int current_device;

void submit(const Config &c, const void *kernel, void (*call)(void *), std::shared_ptr<void> bound,
            size_t bound_size)
{
    dim3 b = c.block, g = c.grid;
    uint64_t threads = (uint64_t)b.x * b.y * b.z;
    if (threads == 0 || threads > MAX_THREADS || b.x > 1024 || b.y > 1024 || b.z > 64)
        fail(c.at, "kernel %s: a block of (%u,%u,%u) threads; it may have 1 to 1024, z at most 64",
             c.name, b.x, b.y, b.z);
    if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 0x7FFFFFFF || g.y > 65535 || g.z > 65535)
        fail(c.at,
             "kernel %s: a grid of (%u,%u,%u) blocks; x is 1 to 2^31-1, y and z are 1 to 65535",
             c.name, g.x, g.y, g.z);
    size_t allowed = 0;
    {
        std::lock_guard<std::mutex> hold(attributes_lock);
        auto a = max_dynamic_shared.find(kernel);
        if (a != max_dynamic_shared.end()) allowed = a->second;
    }
    if (c.shared > SHARED_DEFAULT && c.shared > allowed)
        fail(c.at,
             "kernel %s: %zu bytes of dynamic shared memory; more than 48 KB need "
             "cudaFuncSetAttribute"
             "(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), at most 227 KB",
             c.name, c.shared);
    int device = stream_device(c.stream);
    if (device != current_device)
        fail(c.at, "kernel %s: its stream belongs to device %d, but the current device is %d",
             c.name, device, current_device);
    auto launch =
        std::make_shared<Launch>(Launch{c, call, std::move(bound), bound_size, device, allowed});
    enqueue(c.stream, c.name, c.at, [launch] { run_launch(launch.get()); });
}

cudaError_t set_max_dynamic_shared(const void *kernel, int attribute, int value)
{
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || (size_t)value > SHARED_OPTIN) return cudaErrorInvalidValue;
    std::lock_guard<std::mutex> hold(attributes_lock);
    max_dynamic_shared[kernel] = (size_t)value;
    return cudaSuccess;
}

cudaError_t max_active_blocks(int *blocks, const void *, int threads, size_t shared_bytes)
{
    if (threads < 1 || threads > MAX_THREADS) return cudaErrorInvalidValue;
    *blocks = std::min(2048 / threads, 32);
    if (shared_bytes) *blocks = std::min(*blocks, (int)((228 << 10) / (shared_bytes + 1024)));
    return cudaSuccess;
}

/* ---- 5. Memory ------------------------------------------------------------------------------- */

struct Allocation {
    size_t size;
    int device; /* -1: host memory of cudaMallocHost */
    Site at;
    char *base;
};
#ifdef CUDACHECK
/* Allocates device memory at addresses that were never used before. */
static char *check_allocate(size_t size, int device, Site at);
static void check_free(const Allocation &a, Site at);
#endif
static std::mutex memory_lock;
/* The key is the address after the last byte: p lies in the first allocation whose end is beyond p.
 * This and other state is never destroyed, because other ranks may still run while the program
 * exits. */
static auto &allocations = *new std::map<const char *, Allocation>();
static size_t device_used[64];

static const Allocation *find_allocation(const void *p) /* the caller holds memory_lock */
{
    auto a = allocations.upper_bound((const char *)p);
    return a != allocations.end() && (const char *)p >= a->second.base ? &a->second : nullptr;
}

/* Checks that p..p+size lies in one live allocation of some device. */
static void need_device(const void *p, size_t size, const char *what, Site at)
{
    if (!size) return;
    std::lock_guard<std::mutex> hold(memory_lock);
    const Allocation *a = find_allocation(p);
    if (!a || a->device < 0) fail(at, "%s: %p is no device memory", what, p);
    if ((const char *)p + size > a->base + a->size)
        fail(at, "%s: %zu bytes from %p pass the end of an allocation of %zu bytes (%s:%d) by %zu",
             what, size, p, a->size, a->at.file, a->at.line,
             (size_t)((const char *)p + size - (a->base + a->size)));
}

static void need_host(const void *p, size_t size, const char *what, Site at)
{
    if (!size) return;
    if (!p) fail(at, "%s: null host pointer", what);
    std::lock_guard<std::mutex> hold(memory_lock);
    const Allocation *a = find_allocation(p);
    if (a && a->device >= 0) fail(at, "%s: %p is device memory, not the host's", what, p);
    if (a && (const char *)p + size > a->base + a->size)
        fail(at, "%s: %zu bytes from %p pass the end of a host allocation of %zu bytes (%s:%d)",
             what, size, p, a->size, a->at.file, a->at.line);
}

static cudaError_t allocate(void **p, size_t size, int device, Site at)
{
    *p = nullptr;
    if (!size) return cudaSuccess;
    std::lock_guard<std::mutex> hold(memory_lock);
    if (device >= 0 && (size > DEVICE_MEMORY || device_used[device] + size > DEVICE_MEMORY))
        return cudaErrorMemoryAllocation;
#ifdef CUDACHECK
    char *base = device >= 0 ? check_allocate(size, device, at) : (char *)malloc(size);
#else
    char *base = (char *)aligned_alloc(256, (size + 255) / 256 * 256);
#endif
    if (!base) return cudaErrorMemoryAllocation;
    memset(base, POISON, size);
#ifdef CUDAEMU_ASAN
    ASAN_POISON_MEMORY_REGION(base + size, (size + 255) / 256 * 256 - size);
#endif
    allocations[base + size] = {size, device, at, base};
    if (device >= 0) device_used[device] += size;
    *p = base;
    return cudaSuccess;
}

static void deallocate(void *p, bool of_device, const char *what, Site at)
{
    if (!p) return;
    std::lock_guard<std::mutex> hold(memory_lock);
    const Allocation *a = find_allocation(p);
    if (!a || a->base != p || (a->device >= 0) != of_device)
        fail(at, "%s: %p was not allocated, or is freed already", what, p);
    if (of_device) device_used[a->device] -= a->size;
    memset(a->base, POISON, a->size);
#ifdef CUDAEMU_ASAN
    ASAN_UNPOISON_MEMORY_REGION(a->base, (a->size + 255) / 256 * 256);
#endif
    const char *end = a->base + a->size;
#ifdef CUDACHECK
    if (of_device) check_free(*a, at);
    else free(p);
#else
    free(p);
#endif
    allocations.erase(end);
}

/* ---- 6. Streams and events ------------------------------------------------------------------- */

static std::mutex peers_lock;
static bool peer_enabled[64][64]; /* [device][peer]: kernels on device may use memory of peer */

static bool lazy()
{
    static const bool on = [] {
        const char *e = getenv("CUDAEMU_ASYNC");
#ifdef CUDACHECK
        if (!e) return true;
#endif
        return e && atoi(e);
    }();
    return on;
}

static int device_count()
{
    static const int count = [] {
        const char *e = getenv("CUDAEMU_DEVICES");
        int n = e ? atoi(e) : 1;
        if (n < 1 || n > 64) fail({nullptr, 0}, "CUDAEMU_DEVICES=%s: 1 to 64 are possible", e);
        return n;
    }();
    return count;
}

} // namespace cudaemu
using namespace cudaemu;

struct CUstream_st {
    int index; /* position in the list of all streams */
    int device;
    bool blocking; /* ordered with the device's default stream */
    bool busy;     /* an OS thread is running the first piece of work */
    bool destroyed;
    std::deque<std::function<void()>> work;
    uint64_t enqueued, done; /* how many pieces of work, so far */
};

/* A record of an event marks a place in a stream: after its first `count` pieces of work. */
struct Record {
    cudaStream_t stream;
    uint64_t count;
    timespec when;
    std::vector<uint64_t> clock; /* for the checker: how much of each stream is done here */
};
struct CUevent_st {
    int device;
    std::shared_ptr<Record> last; /* null: never recorded */
};

namespace cudaemu
{

/* Streams live as long as the program, because an event may outlive its stream. */
static std::mutex streams_lock;
static auto &streams_moved = *new std::condition_variable();
static auto &streams = *new std::vector<std::unique_ptr<CUstream_st>>();

static cudaStream_t new_stream(int device, bool blocking) /* with streams_lock held */
{
    streams.emplace_back(
        new CUstream_st{(int)streams.size(), device, blocking, false, false, {}, 0, 0});
    return streams.back().get();
}

static cudaStream_t default_stream(int device) /* with streams_lock held */
{
    static cudaStream_t of_device[64];
    if (!of_device[device]) of_device[device] = new_stream(device, true);
    return of_device[device];
}

static cudaStream_t resolve(cudaStream_t stream)
{
    std::lock_guard<std::mutex> hold(streams_lock);
    return stream ? stream : default_stream(current_device);
}

static int stream_device(cudaStream_t stream) { return stream ? stream->device : current_device; }

/* Runs the stream's work, one piece after the other, until `count` pieces are done. If another OS
 * thread is running that work, waits for it. A piece that waits for another stream's event runs
 * that stream in turn. This cannot go in circles, as an event is recorded before it can be waited
 * for. */
static void drain(cudaStream_t s, uint64_t count)
{
    std::unique_lock<std::mutex> hold(streams_lock);
    while (s->done < count) {
        if (s->busy) {
            streams_moved.wait(hold);
            continue;
        }
        s->busy = true;
        std::function<void()> work = std::move(s->work.front());
        s->work.pop_front();
        hold.unlock();
        work();
        work = nullptr;
        hold.lock();
        s->busy = false;
        s->done++;
        streams_moved.notify_all();
    }
}

static uint64_t done_count(cudaStream_t s)
{
    std::lock_guard<std::mutex> hold(streams_lock);
    return s->done;
}

static std::shared_ptr<Record> last_record(cudaEvent_t event)
{
    std::lock_guard<std::mutex> hold(streams_lock);
    return event->last;
}

#ifdef CUDACHECK
/* Wraps work, which is piece number `count` of the stream. So the checker knows when it runs and
 * which work it comes after. */
static std::function<void()> check_work(cudaStream_t s, uint64_t count, const char *what, Site at,
                                        std::function<void()> work);
static void check_recorded(Record *r); /* called by the record's piece of work */
/* Stream s goes on after the record, or after what `of` has done. */
static void check_waited(cudaStream_t s, const Record &r);
static void check_joined(cudaStream_t s, cudaStream_t of);
/* The host goes on after the record, or after what the stream has done. */
static void check_synchronized(const Record &r);
static void check_synchronized(cudaStream_t s);
#endif

static void push(cudaStream_t s, std::function<void()> work) /* with streams_lock held */
{
    s->work.push_back(std::move(work));
    s->enqueued++;
}

/* Puts work at the end of a stream; returns its number in that stream. The default stream waits for
 * all blocking streams of its device, and they wait for it. */
static uint64_t enqueue(cudaStream_t stream, const char *what, Site at, std::function<void()> work)
{
    if (block) fail(at, "%s: called inside a kernel", what);
    cudaStream_t s = resolve(stream);
    if (s->destroyed) fail(at, "%s: the stream has been destroyed", what);
    uint64_t count;
    {
        std::lock_guard<std::mutex> hold(streams_lock);
        cudaStream_t first = default_stream(s->device);
        auto wait_for = [s](cudaStream_t other) {
            if (!other->enqueued) return;
            uint64_t upto = other->enqueued;
            push(s, [s, other, upto] {
                drain(other, upto);
                CHECKED(check_joined(s, other));
                (void)s;
            });
        };
        if (s == first) {
            for (auto &other : streams)
                if (other.get() != s && other->device == s->device && other->blocking)
                    wait_for(other.get());
        } else if (s->blocking) {
            wait_for(first);
        }
        CHECKED(work = check_work(s, s->enqueued + 1, what, at, std::move(work)));
        push(s, std::move(work));
        count = s->enqueued;
    }
    if (!lazy()) drain(s, count);
    return count;
}

static void synchronize_device(int device)
{
    std::vector<std::pair<cudaStream_t, uint64_t>> all;
    {
        std::lock_guard<std::mutex> hold(streams_lock);
        for (auto &s : streams)
            if (s->device == device) all.emplace_back(s.get(), s->enqueued);
    }
    for (auto &s : all) {
        drain(s.first, s.second);
        CHECKED(check_synchronized(s.first));
    }
}

} // namespace cudaemu

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    std::lock_guard<std::mutex> hold(streams_lock);
    *stream = new_stream(current_device, !(flags & cudaStreamNonBlocking));
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream)
{
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    cudaStream_t s = resolve(stream);
    uint64_t count;
    {
        std::lock_guard<std::mutex> hold(streams_lock);
        count = s->enqueued;
    }
    drain(s, count);
    CHECKED(check_synchronized(s));
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    uint64_t count;
    {
        std::lock_guard<std::mutex> hold(streams_lock);
        stream->destroyed = true;
        count = stream->enqueued;
    }
    drain(stream, count); /* the real function only promises to finish the work at some time */
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    cudaStream_t s = resolve(stream);
    uint64_t done, count;
    {
        std::lock_guard<std::mutex> hold(streams_lock);
        done = s->done;
        count = s->enqueued;
    }
    if (done < count) {
        drain(s, done + 1); /* a caller who polls a lazy stream must see progress */
        return cudaErrorNotReady;
    }
    CHECKED(check_synchronized(s));
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned)
{
    *event = new CUevent_st();
    (*event)->device = current_device;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    return cudaEventCreateWithFlags(event, cudaEventDefault);
}
cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    delete event; /* a stream that waits for its record still holds the record */
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    cudaStream_t s = resolve(stream);
    if (event->device != s->device)
        fail({nullptr, 0}, "cudaEventRecord: an event of device %d in a stream of device %d",
             event->device, s->device);
    auto record = std::make_shared<Record>();
    record->stream = s;
    uint64_t count = enqueue(s, "cudaEventRecord", {nullptr, 0}, [record] {
        clock_gettime(CLOCK_MONOTONIC, &record->when);
        CHECKED(check_recorded(record.get()));
    });
    std::lock_guard<std::mutex> hold(streams_lock);
    record->count = count;
    event->last = record;
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned)
{
    cudaStream_t s = resolve(stream);
    uint64_t count;
    {
        std::lock_guard<std::mutex> hold(streams_lock);
        std::shared_ptr<Record> record = event->last;
        if (!record) return cudaSuccess;
        push(s, [s, record] {
            drain(record->stream, record->count);
            CHECKED(check_waited(s, *record));
            (void)s;
        });
        count = s->enqueued;
    }
    if (!lazy()) drain(s, count);
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    std::shared_ptr<Record> record = last_record(event);
    if (!record) return cudaSuccess;
    drain(record->stream, record->count);
    CHECKED(check_synchronized(*record));
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event)
{
    std::shared_ptr<Record> record = last_record(event);
    if (!record) return cudaSuccess;
    uint64_t done = done_count(record->stream);
    if (done < record->count) {
        drain(record->stream, done + 1); /* a caller who polls must see progress */
        return cudaErrorNotReady;
    }
    CHECKED(check_synchronized(*record));
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end)
{
    std::shared_ptr<Record> a = last_record(start), b = last_record(end);
    if (!a || !b) return cudaErrorInvalidValue;
    if (done_count(a->stream) < a->count || done_count(b->stream) < b->count)
        return cudaErrorNotReady;
    *milliseconds = (float)((double)(b->when.tv_sec - a->when.tv_sec) * 1e3 +
                            (double)(b->when.tv_nsec - a->when.tv_nsec) * 1e-6);
    return cudaSuccess;
}

/* ---- 7. Allocating and copying --------------------------------------------------------------- */

cudaError_t cudaMalloc(void **p, size_t size, Site at)
{
    return allocate(p, size, current_device, at);
}
cudaError_t cudaMallocAsync(void **p, size_t size, cudaStream_t stream, Site at)
{
    return allocate(p, size, stream_device(stream), at);
}
cudaError_t cudaFree(void *p, Site at)
{
    if (!p) return cudaSuccess;
    int device;
    {
        std::lock_guard<std::mutex> hold(memory_lock);
        const Allocation *a = find_allocation(p);
        device = a ? a->device : -1;
    }
    if (device >= 0) synchronize_device(device); /* as the real function does */
    deallocate(p, true, "cudaFree", at);
    return cudaSuccess;
}
cudaError_t cudaFreeAsync(void *p, cudaStream_t stream, Site at)
{
    enqueue(stream, "cudaFreeAsync", at, [=] { deallocate(p, true, "cudaFreeAsync", at); });
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **p, size_t size, unsigned, Site at)
{
    return allocate(p, size, -1, at);
}
cudaError_t cudaMallocHost(void **p, size_t size, Site at) { return allocate(p, size, -1, at); }
cudaError_t cudaFreeHost(void *p, Site at)
{
    deallocate(p, false, "cudaFreeHost", at);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *free, size_t *total)
{
    std::lock_guard<std::mutex> hold(memory_lock);
    *total = DEVICE_MEMORY;
    *free = DEVICE_MEMORY - device_used[current_device];
    return cudaSuccess;
}

namespace cudaemu
{
#ifdef CUDACHECK
enum Touch { READS, COPIES, WRITES };
/* A copy or a product uses device memory. peers: memory of another device needs peer access. */
static void check_range(const void *p, size_t size, Touch touch, bool peers, const char *what);
/* `to` is now as well written as `from`. */
static void check_copied(void *to, const void *from, size_t size);
static void check_host(const void *p, size_t size, Touch touch, cudaStream_t s, uint64_t count,
                       Site at);
#endif

static bool is_device(const void *p)
{
    std::lock_guard<std::mutex> hold(memory_lock);
    const Allocation *a = find_allocation(p);
    return a && a->device >= 0;
}

static void copy(void *to, const void *from, size_t size, cudaMemcpyKind kind, cudaStream_t stream,
                 const char *what, Site at)
{
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind == cudaMemcpyDefault) {
        to_device = is_device(to);
        from_device = is_device(from);
    }
    auto need_to = to_device ? need_device : need_host;
    auto need_from = from_device ? need_device : need_host;
    need_to(to, size, what, at);
    need_from(from, size, what, at);
    stream = resolve(stream);
    uint64_t count = enqueue(stream, what, at, [=] {
        need_to(to, size, what, at); /* it may have been freed since */
        need_from(from, size, what, at);
#ifdef CUDACHECK
        if (from_device) check_range(from, size, COPIES, false, what);
        if (to_device) check_range(to, size, WRITES, false, what);
        if (to_device && from_device) check_copied(to, from, size);
#endif
        memmove(to, from, size);
    });
#ifdef CUDACHECK
    if (!from_device) check_host(from, size, READS, stream, count, at);
    if (!to_device) check_host(to, size, WRITES, stream, count, at);
#endif
    (void)count;
}
} // namespace cudaemu

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream, Site at)
{
    copy(to, from, size, kind, stream, "cudaMemcpyAsync", at);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind kind, Site at)
{
    copy(to, from, size, kind, nullptr, "cudaMemcpy", at);
    if (is_device(to) && is_device(from))
        return cudaSuccess; /* the real function does not wait either */
    return cudaStreamSynchronize(nullptr);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device,
                                size_t size, cudaStream_t stream, Site at)
{
    {
        std::lock_guard<std::mutex> hold(memory_lock);
        const Allocation *t = find_allocation(to), *f = find_allocation(from);
        if (size && (!t || t->device != to_device))
            fail(at, "cudaMemcpyPeer: %p is not on device %d", to, to_device);
        if (size && (!f || f->device != from_device))
            fail(at, "cudaMemcpyPeer: %p is not on device %d", from, from_device);
    }
    copy(to, from, size, cudaMemcpyDeviceToDevice, stream, "cudaMemcpyPeer", at);
    return cudaSuccess;
}
cudaError_t cudaMemcpyPeer(void *to, int to_device, const void *from, int from_device, size_t size,
                           Site at)
{
    return cudaMemcpyPeerAsync(to, to_device, from, from_device, size, nullptr, at);
}
cudaError_t cudaMemsetAsync(void *p, int byte, size_t size, cudaStream_t stream, Site at)
{
    need_device(p, size, "cudaMemset", at);
    enqueue(stream, "cudaMemset", at, [=] {
        need_device(p, size, "cudaMemset", at);
        CHECKED(check_range(p, size, WRITES, true, "cudaMemset"));
        memset(p, byte, size);
    });
    return cudaSuccess;
}
cudaError_t cudaMemset(void *p, int byte, size_t size, Site at)
{
    return cudaMemsetAsync(p, byte, size, nullptr, at);
}

/* ---- 8. Devices ------------------------------------------------------------------------------ */

namespace cudaemu
{
static thread_local cudaError_t last_error;
static cudaError_t error(cudaError_t e) { return last_error = e; }
} // namespace cudaemu

cudaError_t cudaSetDevice(int device)
{
    if (device < 0 || device >= device_count()) return error(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device)
{
    *device = current_device;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *count)
{
    *count = device_count();
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device)
{
    if (device < 0 || device >= device_count()) return error(cudaErrorInvalidDevice);
    *p = {};
    snprintf(p->name, sizeof p->name, "emulated on the CPU");
    p->totalGlobalMem = DEVICE_MEMORY;
    p->sharedMemPerBlock = SHARED_DEFAULT;
    p->sharedMemPerBlockOptin = SHARED_OPTIN;
    p->sharedMemPerMultiprocessor = 228 << 10;
    p->regsPerBlock = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = MAX_THREADS;
    p->maxThreadsPerMultiProcessor = 2048;
    p->multiProcessorCount = 4; /* few, so that grids that fill the GPU have few blocks */
    p->major = 9;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7FFFFFFF;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->l2CacheSize = 50 << 20;
    p->memoryBusWidth = 5120;
    p->unifiedAddressing = 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device)
{
    cudaDeviceProp p;
    cudaError_t e = cudaGetDeviceProperties(&p, device);
    if (e) return e;
    switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize()
{
    synchronize_device(current_device);
    return cudaSuccess;
}
cudaError_t cudaDeviceReset() { return cudaDeviceSynchronize(); }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer)
{
    if (device < 0 || device >= device_count() || peer < 0 || peer >= device_count())
        return error(cudaErrorInvalidDevice);
    *can = device != peer;
    return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned)
{
    if (peer < 0 || peer >= device_count() || peer == current_device)
        return error(cudaErrorInvalidDevice);
    std::lock_guard<std::mutex> hold(peers_lock);
    if (peer_enabled[current_device][peer]) return error(cudaErrorPeerAccessAlreadyEnabled);
    peer_enabled[current_device][peer] = true;
    return cudaSuccess;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError()
{
    cudaError_t e = last_error;
    last_error = cudaSuccess;
    return e;
}
const char *cudaGetErrorString(cudaError_t e)
{
    switch (e) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorPeerAccessAlreadyEnabled: return "peer access is already enabled";
    case cudaErrorPeerAccessNotEnabled: return "peer access has not been enabled";
    case cudaErrorNotReady: return "device not ready";
    }
    return "unknown error";
}
const char *cudaGetErrorName(cudaError_t e)
{
    switch (e) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorPeerAccessAlreadyEnabled: return "cudaErrorPeerAccessAlreadyEnabled";
    case cudaErrorPeerAccessNotEnabled: return "cudaErrorPeerAccessNotEnabled";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    }
    return "cudaErrorUnknown";
}
cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = 13000;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { return cudaRuntimeGetVersion(version); }

/* ---- 9. Matrix products ---------------------------------------------------------------------- */

namespace cudaemu
{

#if defined(__AVX512F__)
constexpr int VECTOR = 16;
#elif defined(__AVX__)
constexpr int VECTOR = 8;
#else
constexpr int VECTOR = 4;
#endif
typedef float Floats __attribute__((vector_size(VECTOR * sizeof(float)), aligned(sizeof(float))));
/* The tile of the product that the innermost loop keeps in registers. */
constexpr int TILE_M = 2 * VECTOR, TILE_N = 4;

static size_t type_size(cudaDataType t) { return t == CUDA_R_32F ? 4 : 2; }

static float load(const void *p, cudaDataType t, size_t i)
{
    switch (t) {
    case CUDA_R_32F: return ((const float *)p)[i];
    case CUDA_R_16F: return half_to_float(((const uint16_t *)p)[i]);
    default: return bf16_to_float(((const uint16_t *)p)[i]);
    }
}

static void store(void *p, cudaDataType t, size_t i, float x)
{
    switch (t) {
    case CUDA_R_32F: ((float *)p)[i] = x; break;
    case CUDA_R_16F: ((uint16_t *)p)[i] = half_from_float(x); break;
    default: ((uint16_t *)p)[i] = bf16_from_float(x);
    }
}

/* A column-major matrix in memory. */
struct Matrix {
    void *p;
    cudaDataType type;
    size_t rows, cols, ld;
    Matrix plus(size_t elements) const
    {
        return {(char *)p + elements * type_size(type), type, rows, cols, ld};
    }
    float at(size_t i, size_t j) const { return load(p, type, i + j * ld); }
};

/* Copies m, or its transpose, to floats in bands of `tile` rows. The order is band, column, row;
 * the last band is padded with zeros. */
static void pack(std::vector<float> &to, const Matrix &m, bool transposed, size_t rows, size_t cols,
                 size_t tile)
{
    size_t bands = (rows + tile - 1) / tile;
    to.assign(bands * tile * cols, 0.0f);
    for (size_t b = 0; b < bands; b++) {
        size_t n = std::min(tile, rows - b * tile);
        float *band = &to[b * tile * cols];
        if (transposed)
            for (size_t r = 0; r < n; r++)
                for (size_t c = 0; c < cols; c++) band[c * tile + r] = m.at(c, b * tile + r);
        else
            for (size_t c = 0; c < cols; c++)
                for (size_t r = 0; r < n; r++) band[c * tile + r] = m.at(b * tile + r, c);
    }
}

/* sum (TILE_M x TILE_N) += a b, over k columns of a band of A and of a band of B. */
static void multiply_tile(float *sum, const float *a, const float *b, size_t k)
{
    Floats s00{}, s01{}, s10{}, s11{}, s20{}, s21{}, s30{}, s31{};
    for (size_t i = 0; i < k; i++, a += TILE_M, b += TILE_N) {
        Floats a0 = *(const Floats *)a, a1 = *(const Floats *)(a + VECTOR);
        s00 += a0 * b[0];
        s01 += a1 * b[0];
        s10 += a0 * b[1];
        s11 += a1 * b[1];
        s20 += a0 * b[2];
        s21 += a1 * b[2];
        s30 += a0 * b[3];
        s31 += a1 * b[3];
    }
    Floats *s = (Floats *)sum;
    s[0] += s00;
    s[1] += s01;
    s[2] += s10;
    s[3] += s11;
    s[4] += s20;
    s[5] += s21;
    s[6] += s30;
    s[7] += s31;
}

struct Epilogue {
    cublasLtEpilogue_t kind;
    void *bias; /* the bias, or the place for its gradient */
    cudaDataType bias_type;
    Matrix aux;
};

/* The tanh form of GELU, as in cuBLASLt, and its derivative. */
static float gelu(float x)
{
    return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
}
static float gelu_derivative(float x)
{
    float t = tanhf(0.7978845608f * (x + 0.044715f * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * 0.7978845608f * (1 + 3 * 0.044715f * x * x);
}

/* D (m,n) = epilogue(alpha op(A) (m,k) op(B) (k,n) + beta C). */
static void multiply(bool ta, bool tb, size_t m, size_t n, size_t k, float alpha, const Matrix &a,
                     const Matrix &b, float beta, const Matrix &c, const Matrix &d,
                     const Epilogue &e)
{
    /* Products are summed in groups of so many, and the sums are added up. That rounds less and
     * stays in the cache. */
    constexpr size_t CHUNK = 256;
    static thread_local std::vector<float> pa, pb;
    pack(pa, a, ta, m, k, TILE_M);
    pack(pb, b, !tb, n, k, TILE_N);
    bool bias = e.kind == CUBLASLT_EPILOGUE_BIAS || e.kind == CUBLASLT_EPILOGUE_GELU_BIAS ||
                e.kind == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    bool activate = e.kind == CUBLASLT_EPILOGUE_GELU || e.kind == CUBLASLT_EPILOGUE_GELU_BIAS ||
                    e.kind == CUBLASLT_EPILOGUE_GELU_AUX ||
                    e.kind == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    bool keep = e.kind == CUBLASLT_EPILOGUE_GELU_AUX || e.kind == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    bool derive = e.kind == CUBLASLT_EPILOGUE_DGELU || e.kind == CUBLASLT_EPILOGUE_DGELU_BGRAD;
    std::vector<float> gradient(e.kind == CUBLASLT_EPILOGUE_DGELU_BGRAD ? m : 0);
    for (size_t j0 = 0; j0 < n; j0 += TILE_N)
        for (size_t i0 = 0; i0 < m; i0 += TILE_M) {
            float sum[TILE_N][TILE_M] = {};
            for (size_t l = 0; l < k; l += CHUNK)
                multiply_tile(sum[0], &pa[i0 * k + l * TILE_M], &pb[j0 * k + l * TILE_N],
                              std::min(CHUNK, k - l));
            for (size_t j = j0; j < std::min(n, j0 + TILE_N); j++)
                for (size_t i = i0; i < std::min(m, i0 + TILE_M); i++) {
                    float x = alpha * sum[j - j0][i - i0];
                    if (beta != 0) x += beta * c.at(i, j);
                    if (bias) x += load(e.bias, e.bias_type, i);
                    if (keep) store(e.aux.p, e.aux.type, i + j * e.aux.ld, x);
                    if (activate) x = gelu(x);
                    if (derive) x *= gelu_derivative(e.aux.at(i, j));
                    if (!gradient.empty()) gradient[i] += x;
                    store(d.p, d.type, i + j * d.ld, x);
                }
        }
    for (size_t i = 0; i < gradient.size(); i++) store(e.bias, e.bias_type, i, gradient[i]);
    if (e.kind == CUBLASLT_EPILOGUE_BGRADA || e.kind == CUBLASLT_EPILOGUE_BGRADB) {
        bool of_a = e.kind == CUBLASLT_EPILOGUE_BGRADA;
        for (size_t i = 0; i < (of_a ? m : n); i++) {
            float sum = 0;
            for (size_t l = 0; l < k; l++) {
                if (of_a) sum += ta ? a.at(l, i) : a.at(i, l);
                else sum += tb ? b.at(i, l) : b.at(l, i);
            }
            store(e.bias, e.bias_type, i, sum);
        }
    }
}

struct Product {
    bool ta, tb;
    size_t m, n, k;
    float alpha, beta;
    Matrix a, b, c, d;
    long long stride_a, stride_b, stride_c, stride_d, stride_aux;
    int batch;
    Epilogue e;
};

/* Calls f(matrix or vector, name, whether it is written) for all that batch number i of the product
 * uses. */
template <class F> static void for_operands(const Product &p, int i, F f)
{
    auto of = [i](long long stride) { return (size_t)(stride * i); };
    bool derives = p.e.kind == CUBLASLT_EPILOGUE_DGELU || p.e.kind == CUBLASLT_EPILOGUE_DGELU_BGRAD;
    bool gradient = p.e.kind >= CUBLASLT_EPILOGUE_DGELU_BGRAD;
    f(p.a.plus(of(p.stride_a)), "A", false);
    f(p.b.plus(of(p.stride_b)), "B", false);
    if (p.beta != 0) f(p.c.plus(of(p.stride_c)), "C", false);
    if (p.e.aux.p) f(p.e.aux.plus(of(p.stride_aux)), "aux", !derives);
    if (p.e.bias) {
        size_t n = p.e.kind == CUBLASLT_EPILOGUE_BGRADB ? p.n : p.m;
        f(Matrix{p.e.bias, p.e.bias_type, n, 1, n}, "bias", gradient);
    }
    f(p.d.plus(of(p.stride_d)), "D", true);
}

static void need_product(const Product &p, const char *what, Site at)
{
    for (int i = 0; i < p.batch; i += std::max(1, p.batch - 1))
        for_operands(p, i, [&](const Matrix &x, const char *name, bool) {
            char text[128];
            snprintf(text, sizeof text, "%s: matrix %s", what, name);
            if (x.ld < x.rows)
                fail(at, "%s has %zu rows but a leading dimension of %zu", text, x.rows, x.ld);
            if (x.rows && x.cols)
                need_device(x.p, ((x.cols - 1) * x.ld + x.rows) * type_size(x.type), text, at);
        });
}

static void submit_product(const Product &p, const char *what, cudaStream_t stream, Site at)
{
    need_product(p, what, at);
    enqueue(stream, what, at, [p, what, at] {
        need_product(p, what, at);
        for (int i = 0; i < p.batch; i++) {
#ifdef CUDACHECK
            for_operands(p, i, [&](const Matrix &x, const char *name, bool written) {
                for (size_t j = 0; j < x.cols; j++)
                    check_range(x.plus(j * x.ld).p, x.rows * type_size(x.type),
                                written ? WRITES : READS, true, name);
            });
#endif
            auto of = [i](long long stride) { return (size_t)(stride * i); };
            Epilogue e = p.e;
            if (e.aux.p) e.aux = e.aux.plus(of(p.stride_aux));
            multiply(p.ta, p.tb, p.m, p.n, p.k, p.alpha, p.a.plus(of(p.stride_a)),
                     p.b.plus(of(p.stride_b)), p.beta, p.c.plus(of(p.stride_c)),
                     p.d.plus(of(p.stride_d)), e);
        }
    });
}

static bool is_float_type(cudaDataType t)
{
    return t == CUDA_R_32F || t == CUDA_R_16F || t == CUDA_R_16BF;
}

} // namespace cudaemu

/* ---- 10. cuBLAS and cuBLASLt ----------------------------------------------------------------- */

struct cublasContext {
    int device;
    cudaStream_t stream;
};
struct cublasLtContext {
};
struct cublasLtMatmulDescOpaque {
    int ta, tb, epilogue, bias_type, aux_type;
    void *bias, *aux;
    int64_t aux_ld, aux_stride;
};
struct cublasLtMatrixLayoutOpaque {
    cudaDataType type;
    uint64_t rows, cols;
    int64_t ld, stride;
    int batch;
};
struct cublasLtMatmulPreferenceOpaque {
    uint64_t workspace; /* most working space of a product, in bytes */
};

cublasStatus_t cublasCreate(cublasHandle_t *handle)
{
    *handle = new cublasContext{current_device, nullptr};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy(cublasHandle_t handle)
{
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream)
{
    if (stream && stream->device != handle->device) return CUBLAS_STATUS_INVALID_VALUE;
    handle->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetWorkspace(cublasHandle_t, void *, size_t) { return CUBLAS_STATUS_SUCCESS; }
const char *cublasGetStatusString(cublasStatus_t status)
{
    switch (status) {
    case CUBLAS_STATUS_SUCCESS: return "success";
    case CUBLAS_STATUS_NOT_INITIALIZED: return "the library was not initialized";
    case CUBLAS_STATUS_INVALID_VALUE: return "an invalid value was given";
    case CUBLAS_STATUS_NOT_SUPPORTED: return "not supported";
    }
    return "unknown status";
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t ta,
                                          cublasOperation_t tb, int m, int n, int k,
                                          const void *alpha, const void *a, cudaDataType a_type,
                                          int lda, long long stride_a, const void *b,
                                          cudaDataType b_type, int ldb, long long stride_b,
                                          const void *beta, void *c, cudaDataType c_type, int ldc,
                                          long long stride_c, int batch, cublasComputeType_t,
                                          cublasGemmAlgo_t, Site at)
{
    if (m < 0 || n < 0 || k < 0 || batch < 0 || !handle || handle->device != current_device)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (lda < std::max(1, ta ? k : m) || ldb < std::max(1, tb ? n : k) || ldc < std::max(1, m))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (!is_float_type(a_type) || a_type != b_type || !is_float_type(c_type) ||
        (c_type != a_type && c_type != CUDA_R_32F))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (!m || !n || !batch) return CUBLAS_STATUS_SUCCESS;
    Product p = {};
    p.ta = ta;
    p.tb = tb;
    p.m = (size_t)m;
    p.n = (size_t)n;
    p.k = (size_t)k;
    p.batch = batch;
    p.alpha = *(const float *)alpha;
    p.beta = *(const float *)beta;
    p.a = {(void *)a, a_type, ta ? p.k : p.m, ta ? p.m : p.k, (size_t)lda};
    p.b = {(void *)b, b_type, tb ? p.n : p.k, tb ? p.k : p.n, (size_t)ldb};
    p.c = p.d = {c, c_type, p.m, p.n, (size_t)ldc};
    p.stride_a = stride_a;
    p.stride_b = stride_b;
    p.stride_c = p.stride_d = stride_c;
    p.e.kind = CUBLASLT_EPILOGUE_DEFAULT;
    submit_product(p, "cublasGemm", handle->stream, at);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb,
                            int m, int n, int k, const void *alpha, const void *a,
                            cudaDataType a_type, int lda, const void *b, cudaDataType b_type,
                            int ldb, const void *beta, void *c, cudaDataType c_type, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t algo, Site at)
{
    return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, a, a_type, lda, 0, b, b_type,
                                      ldb, 0, beta, c, c_type, ldc, 0, 1, compute, algo, at);
}
cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t handle, cublasOperation_t ta,
                                         cublasOperation_t tb, int m, int n, int k,
                                         const float *alpha, const float *a, int lda,
                                         long long stride_a, const float *b, int ldb,
                                         long long stride_b, const float *beta, float *c, int ldc,
                                         long long stride_c, int batch, Site at)
{
    return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, a, CUDA_R_32F, lda, stride_a,
                                      b, CUDA_R_32F, ldb, stride_b, beta, c, CUDA_R_32F, ldc,
                                      stride_c, batch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT, at);
}
cublasStatus_t cublasSgemm(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m,
                           int n, int k, const float *alpha, const float *a, int lda,
                           const float *b, int ldb, const float *beta, float *c, int ldc, Site at)
{
    return cublasSgemmStridedBatched(handle, ta, tb, m, n, k, alpha, a, lda, 0, b, ldb, 0, beta, c,
                                     ldc, 0, 1, at);
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
    *handle = new cublasLtContext();
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t,
                                        cudaDataType_t scale)
{
    if (scale != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
    *desc = new cublasLtMatmulDescOpaque();
    (*desc)->epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    (*desc)->bias_type = (*desc)->aux_type = -1; /* the type of D */
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc)
{
    delete desc;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void *value, size_t size)
{
    void *field = nullptr;
    size_t need = 4;
    switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA: field = &desc->ta; break;
    case CUBLASLT_MATMUL_DESC_TRANSB: field = &desc->tb; break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE: field = &desc->epilogue; break;
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: field = &desc->bias_type; break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE: field = &desc->aux_type; break;
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
        field = &desc->bias;
        need = 8;
        break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
        field = &desc->aux;
        need = 8;
        break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
        field = &desc->aux_ld;
        need = 8;
        break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE:
        field = &desc->aux_stride;
        need = 8;
        break;
    default: return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    if (size != need) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(field, value, size);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t ld)
{
    *layout = new cublasLtMatrixLayoutOpaque{type, rows, cols, ld, 0, 1};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout)
{
    delete layout;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute,
                                                const void *value, size_t size)
{
    if (attribute == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT && size == 4)
        memcpy(&layout->batch, value, 4);
    else if (attribute == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET && size == 8)
        memcpy(&layout->stride, value, 8);
    else return CUBLAS_STATUS_INVALID_VALUE;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference)
{
    *preference = new cublasLtMatmulPreferenceOpaque();
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference)
{
    delete preference;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void *value, size_t size)
{
    if (size != (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES ? 8 : 4))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)
        memcpy(&preference->workspace, value, size);
    return CUBLAS_STATUS_SUCCESS;
}

namespace cudaemu
{
/* Fills in everything but the pointers, alpha and beta. Returns whether cuBLASLt could do it. */
static cublasStatus_t lt_product(Product *p, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                 cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                 cublasLtMatrixLayout_t d)
{
    if (!desc || !a || !b || !c || !d) return CUBLAS_STATUS_INVALID_VALUE;
    *p = {};
    p->ta = desc->ta;
    p->tb = desc->tb;
    p->m = d->rows;
    p->n = d->cols;
    p->k = p->ta ? a->rows : a->cols;
    auto matrix = [](cublasLtMatrixLayout_t l) {
        return Matrix{nullptr, l->type, l->rows, l->cols, (size_t)l->ld};
    };
    p->a = matrix(a);
    p->b = matrix(b);
    p->c = matrix(c);
    p->d = matrix(d);
    p->stride_a = a->stride;
    p->stride_b = b->stride;
    p->stride_c = c->stride;
    p->stride_d = d->stride;
    p->batch = d->batch;
    if ((p->ta ? a->cols : a->rows) != p->m || (p->tb ? b->cols : b->rows) != p->k ||
        (p->tb ? b->rows : b->cols) != p->n || c->rows != p->m || c->cols != p->n || !p->m ||
        !p->n || !p->k)
        return CUBLAS_STATUS_INVALID_VALUE;
    for (cublasLtMatrixLayout_t l : {a, b, c, d}) {
        if (!is_float_type(l->type)) return CUBLAS_STATUS_NOT_SUPPORTED;
        if (l->ld < (int64_t)l->rows || l->batch != d->batch) return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (a->type != b->type || c->type != d->type || (d->type != a->type && d->type != CUDA_R_32F))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    p->e.kind = (cublasLtEpilogue_t)desc->epilogue;
    p->stride_aux = desc->aux_stride;
    bool bias = false, aux = false;
    switch (p->e.kind) {
    case CUBLASLT_EPILOGUE_DEFAULT:
    case CUBLASLT_EPILOGUE_GELU: break;
    case CUBLASLT_EPILOGUE_BIAS:
    case CUBLASLT_EPILOGUE_GELU_BIAS:
    case CUBLASLT_EPILOGUE_BGRADA:
    case CUBLASLT_EPILOGUE_BGRADB: bias = true; break;
    case CUBLASLT_EPILOGUE_GELU_AUX:
    case CUBLASLT_EPILOGUE_DGELU: aux = true; break;
    case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
    case CUBLASLT_EPILOGUE_DGELU_BGRAD: bias = aux = true; break;
    default: return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    if (bias) {
        p->e.bias = desc->bias;
        p->e.bias_type = desc->bias_type < 0 ? d->type : (cudaDataType)desc->bias_type;
        if (!p->e.bias) return CUBLAS_STATUS_INVALID_VALUE;
        if (p->e.bias_type != d->type && p->e.bias_type != CUDA_R_32F)
            return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    if (aux) {
        cudaDataType type = desc->aux_type < 0 ? d->type : (cudaDataType)desc->aux_type;
        p->e.aux = {desc->aux, type, p->m, p->n, (size_t)desc->aux_ld};
        if (!desc->aux || desc->aux_ld < (int64_t)p->m) return CUBLAS_STATUS_INVALID_VALUE;
        if (desc->aux_ld % 8 || (uintptr_t)desc->aux % 16)
            return CUBLAS_STATUS_NOT_SUPPORTED; /* as documented */
        if (type != d->type) return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    return CUBLAS_STATUS_SUCCESS;
}
} // namespace cudaemu

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t *results,
                                              int *returned)
{
    Product p;
    *returned = 0;
    if (!handle || !preference || requested < 1) return CUBLAS_STATUS_INVALID_VALUE;
    cublasStatus_t status = lt_product(&p, desc, a, b, c, d);
    if (status) return status;
    /* CUDAEMU_LT=off: cuBLASLt refuses everything, to test how the program works without it. */
    if (getenv("CUDAEMU_LT") && !strcmp(getenv("CUDAEMU_LT"), "off"))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    size_t workspace = std::min(preference->workspace, (uint64_t)LT_WORKSPACE);
    results[0] = {{(int)workspace}, workspace, CUBLAS_STATUS_SUCCESS, 1.0f};
    *returned = 1;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                              cublasLtMatrixLayout_t b_layout, const void *beta, const void *c,
                              cublasLtMatrixLayout_t c_layout, void *d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algo,
                              void *workspace, size_t workspace_size, cudaStream_t stream, Site at)
{
    Product p;
    if (!handle) return CUBLAS_STATUS_INVALID_VALUE;
    size_t needs = algo ? (size_t)algo->id : 0;
    if (workspace_size < needs || (uintptr_t)workspace % 16) return CUBLAS_STATUS_INVALID_VALUE;
    cublasStatus_t status = lt_product(&p, desc, a_layout, b_layout, c_layout, d_layout);
    if (status) return status;
    p.alpha = *(const float *)alpha;
    p.beta = *(const float *)beta;
    p.a.p = (void *)a;
    p.b.p = (void *)b;
    p.c.p = (void *)c;
    p.d.p = d;
    if (p.beta != 0 && !c) return CUBLAS_STATUS_INVALID_VALUE;
    /* A caller who still relies on the old contents will notice. */
    if (needs) cudaMemsetAsync(workspace, POISON, needs, stream, at);
    submit_product(p, "cublasLtMatmul", stream, at);
    return CUBLAS_STATUS_SUCCESS;
}
