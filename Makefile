# megatron_gpt2: make; make demo; make test. No more than a C compiler and make is needed.

CC      ?= cc
OPT     ?= -O3
WARN     = -Wall -Wextra -Wshadow
# No -ffast-math: sums are reassociated only where the code says so. Products may be fused with sums.
CFLAGS  ?= -std=c11 $(OPT) $(MARCH) $(OPENMP) $(SIMD) $(WARN) -fno-math-errno -fno-trapping-math -ffp-contract=fast
LDLIBS   = -lm -lpthread

# $(call try,FLAG): the flag, if the compiler can build a program with it.
try      = $(shell f=$$(mktemp) && echo 'int main(void){return 0;}' | $(CC) $(1) -x c - -o $$f 2>/dev/null && echo '$(1)'; rm -f $$f)
MARCH   := $(if $(MARCH),$(MARCH),$(call try,-march=native))
OPENMP  := $(if $(filter undefined,$(origin OPENMP)),$(call try,-fopenmp),$(OPENMP))
SIMD    := $(if $(OPENMP),,$(call try,-fopenmp-simd)) # without OpenMP each rank is one thread, but loops vectorise
WARN    += $(if $(OPENMP),,-Wno-unknown-pragmas)

SOURCE   = megatron_gpt2.c

# For another machine than this one, CC builds and RUN runs (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user):
# make test CC=aarch64-linux-gnu-gcc CUDA=off RUN="qemu-aarch64 -L /usr/aarch64-linux-gnu"
# What was built goes to build/, and in its place comes a script that runs it: tests start programs, and these others.
AS_SCRIPT = $(if $(RUN),@mkdir -p build && mv $@ build/$@ && chmod +x build/$@ && \
            printf '\043!/bin/sh\nGOMP_SPINCOUNT=10000 exec $(RUN) "$(CURDIR)/build/$@" "$$@"\n' >$@ && chmod +x $@)

# convert needs zlib (Debian: zlib1g-dev) to inflate and check zip files; without it the rest is built all the same.
ZLIB    := $(shell f=$$(mktemp) && printf '\043include <zlib.h>\nint main(void){return !zlibVersion();}' | $(CC) -x c - -o $$f -lz 2>/dev/null && echo convert; rm -f $$f)

# ---- The CUDA twin. make cuda builds the program for NVIDIA GPUs, PRECISION=fp32 (exact, the default), tf32, bf16 or
# fp16: for those of compute capability 8.0 and 9.0, and as PTX for what comes after them. CUDAFLAGS="-Xptxas -v" reports
# what registers and shared memory each kernel takes.

NVCC      := $(or $(NVCC),$(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null))
PRECISION ?= fp32
ARCH      ?= -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=[sm_90,compute_90]
NVCCFLAGS ?= -O3 -std=c++17 $(ARCH) -Xcompiler -Wall,-Wextra,-Wno-unused-function$(if $(OPENMP),$(comma)$(OPENMP),$(comma)-Wno-unknown-pragmas)
CUDALIBS   = -lcublas -lcublasLt -lm -lpthread
comma     := ,

# make test compares it with the .c: on an NVIDIA GPU where there are one and nvcc, else the same kernels on the CPU, run
# by dev/cudaemu, which needs a C++ compiler only. CUDA=gpu, emu or off forces. make megatron_gpt2_emu builds the GPU
# program for that emulator: slow, but with all commands.

CUDA    := $(or $(CUDA),$(if $(and $(NVCC),$(shell nvidia-smi -L 2>/dev/null)),gpu,$(if $(shell command -v $(CXX)),emu,off)))
TWIN     = megatron_gpt2.cu test_gpt2.c $(SOURCE)
EMULATOR = dev/cudaemu/cudaemu.cpp dev/cudaemu/cudaemu.h
EMUFLAGS = -std=gnu++17 $(OPT) -O2 $(MARCH) -Wall -Wextra -Wno-unused-function -Wno-unknown-pragmas -I.
TWINS    = $(if $(filter gpu emu,$(CUDA)),test_twin_fp32 test_twin_bf16 test_twin_fp16)
SAY_CUDA = $(if $(TWINS),./test_twin_fp32 device,echo "CUDA: NOT TESTED ($(if $(filter off,$(CUDA)),CUDA=off or no C++ compiler was found,CUDA=$(CUDA) is not gpu emu or off))")
precision = -DPRECISION_$(shell echo $* | tr a-z A-Z)

all: megatron_gpt2 $(ZLIB)

megatron_gpt2: $(SOURCE)
	$(CC) $(CFLAGS) $(EXTRA) -o $@ megatron_gpt2.c $(LDLIBS)
	$(AS_SCRIPT)

convert: convert.c $(SOURCE)
	$(CC) $(CFLAGS) $(EXTRA) -o $@ convert.c $(LDLIBS) -lz
	$(AS_SCRIPT)

test_gpt2: test_gpt2.c $(SOURCE)
	$(CC) $(CFLAGS) $(EXTRA) -o $@ test_gpt2.c $(LDLIBS)
	$(AS_SCRIPT)

# The same tests with every real number a double: finite differences, and layouts to the last digits.
test_gpt2_double: test_gpt2.c $(SOURCE)
	$(CC) $(CFLAGS) $(EXTRA) -DREAL=double -o $@ test_gpt2.c $(LDLIBS)
	$(AS_SCRIPT)

cuda: megatron_gpt2.cu $(SOURCE)
	$(if $(filter fp32 tf32 bf16 fp16,$(PRECISION)),,$(error PRECISION=$(PRECISION) is not known; there are fp32 tf32 bf16 fp16))
	$(if $(NVCC),,$(error nvcc was not found: install NVIDIA's CUDA toolkit, or say where it is by NVCC=..; without it `make` builds the program for the CPU, and `make test` tries the kernels there))
	$(NVCC) $(NVCCFLAGS) $(CUDAFLAGS) -DPRECISION_$(shell echo $(PRECISION) | tr a-z A-Z) -o megatron_gpt2_cuda megatron_gpt2.cu $(CUDALIBS)

# Trains, saves, resumes and generates, in about a minute.
demo: megatron_gpt2
	sh dev/demo.sh

TESTS = test_gpt2 test_gpt2_double
test: megatron_gpt2 $(ZLIB) $(TESTS) $(TWINS)
	@$(SAY_CUDA)
	@for t in $(TESTS); do ./$$t || exit; done
	@$(SAY_CUDA)

# The twin's tests; dev/cudaemu's sed turns <<<..>>> into calls, and its engine runs them.
build/megatron_gpt2_emu.cpp: megatron_gpt2.cu dev/cudaemu/cu2cpp.sed
	@mkdir -p build
	sed -f dev/cudaemu/cu2cpp.sed megatron_gpt2.cu > $@

build/cudaemu.o: $(EMULATOR)
	@mkdir -p build
	$(CXX) $(EMUFLAGS) $(EXTRA) -c -o $@ dev/cudaemu/cudaemu.cpp

megatron_gpt2_emu: build/megatron_gpt2_emu.cpp build/cudaemu.o $(SOURCE)
	$(CXX) $(EMUFLAGS) -DPRECISION_$(shell echo $(PRECISION) | tr a-z A-Z) -o $@ build/megatron_gpt2_emu.cpp build/cudaemu.o $(LDLIBS)

# CUDA=gpu after emu, or the other way round, must build anew.
build/for_$(CUDA):
	@mkdir -p build && rm -f build/for_* && touch $@

ifeq ($(CUDA),gpu)
test_twin_%: $(TWIN) build/for_$(CUDA)
	$(NVCC) $(NVCCFLAGS) $(precision) -DTWIN_SOURCE='"megatron_gpt2.cu"' -x cu test_gpt2.c -o $@ $(CUDALIBS)
else
test_twin_%: build/megatron_gpt2_emu.cpp build/cudaemu.o $(TWIN) build/for_$(CUDA)
	$(CXX) $(EMUFLAGS) $(EXTRA) $(precision) -DTWIN_SOURCE='"build/megatron_gpt2_emu.cpp"' -o $@ -x c++ test_gpt2.c \
	    -x none build/cudaemu.o $(LDLIBS)
endif

# The kernels under the emulator's checker: races, missing barriers, reads out of bounds or of what nobody wrote, missing
# order between streams. First the emulator and the checker themselves: every planted bug must be found, and no twin.
CHECK    = CXX="$(CXX)" sh dev/cudaemu/check.sh build/check_$(1) test_gpt2.c -w \
           -DTWIN_SOURCE='"build/megatron_gpt2_emu.cpp"' -DPRECISION_$(2)
check: build/megatron_gpt2_emu.cpp $(TWIN)
	CXX="$(CXX)" sh dev/cudaemu/test.sh
	$(call CHECK,fp32,FP32)
	$(call CHECK,bf16,BF16)
	build/check_fp32 operators >build/record
	build/check_fp32 models >build/record
	build/check_bf16 operators >build/record
	build/check_bf16 models >build/record
	@echo "check: all kernels of the twin, nothing to report"

# Sanitizers: memory and undefined behaviour; races between ranks (without OpenMP, whose runtime they cannot see).
SANITIZE = -O1 -g -fno-omit-frame-pointer
debug:
	$(MAKE) -B test OPT="$(SANITIZE)" OPENMP= EXTRA="-fsanitize=address,undefined -fno-sanitize-recover=undefined $(EXTRA)"
debug-threads: # the emulator has threads of its own: make check sees races there. Doubles race no other way than floats
	$(MAKE) -B test TESTS=test_gpt2 CUDA=off OPT="$(SANITIZE)" OPENMP= EXTRA="-fsanitize=thread $(EXTRA)"

# Time and memory, dev/bench/*.sh: make bench; make bench BENCH=convert BENCHFLAGS=--json
BENCH   ?= $(filter-out first $(if $(filter gpu,$(CUDA)),,gpu),$(patsubst dev/bench/%.sh,%,$(wildcard dev/bench/*.sh)))
bench: all build/bench_cpu
	@for part in $(BENCH); do sh dev/bench/$$part.sh $(BENCHFLAGS) || exit 1; done

build/watched.c: megatron_gpt2.c dev/bench/stopwatch.sed
	@mkdir -p build
	sed -f dev/bench/stopwatch.sed megatron_gpt2.c > $@

build/bench_%: dev/bench/%.c dev/bench/bench.h dev/bench/stopwatch.h build/watched.c $(SOURCE)
	$(CC) $(CFLAGS) $(EXTRA) -I. -o $@ $< $(LDLIBS) -ldl

# Random input for every reader, FUZZ_SECONDS for each; needs clang and its fuzzer's runtime.
fuzz:
	sh dev/fuzz/run.sh

format:
	clang-format -i megatron_gpt2.c megatron_gpt2.cu convert.c test_gpt2.c dev/fuzz/fuzz.c

clean:
	rm -rf build test_twin_* megatron_gpt2 megatron_gpt2_cuda megatron_gpt2_emu convert test_gpt2 test_gpt2_double
	rm -rf demo demo.lock test_scratch test_scratch_double bench_scratch fuzz_scratch

.PHONY: all cuda demo test check debug debug-threads fuzz bench format clean
