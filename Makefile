# megatron_gpt2: make; make demo; make test. No more than a C compiler and make is needed.

CC      ?= cc
OPT     ?= -O3
WARN     = -Wall -Wextra -Wshadow
# No -ffast-math: sums are reassociated only where the code says so. Products may be fused with sums.
CFLAGS  ?= -std=c11 $(OPT) $(MARCH) $(OPENMP) $(WARN) -fno-math-errno -fno-trapping-math -ffp-contract=fast
LDLIBS   = -lm -lpthread

# $(call try,FLAG): the flag, if the compiler can build a program with it.
try      = $(shell f=$$(mktemp) && echo 'int main(void){return 0;}' | $(CC) $(1) -x c - -o $$f 2>/dev/null && echo '$(1)'; rm -f $$f)
MARCH   := $(if $(MARCH),$(MARCH),$(call try,-march=native))
OPENMP  := $(if $(filter undefined,$(origin OPENMP)),$(call try,-fopenmp),$(OPENMP))

WARN    += $(if $(OPENMP),,-Wno-unknown-pragmas) # without OpenMP each rank is one thread

SOURCE   = megatron_gpt2.c dev/unicode/classes.h

# convert needs zlib (Debian: zlib1g-dev) to inflate and check zip files; without it the rest is built all the same.
ZLIB    := $(shell f=$$(mktemp) && printf '\043include <zlib.h>\nint main(void){return !zlibVersion();}' | $(CC) -x c - -o $$f -lz 2>/dev/null && echo convert; rm -f $$f)

# ---- The CUDA twin. make test compares it with the .c: on an NVIDIA GPU where there are one and nvcc, else the same
# kernels on the CPU, run by dev/cudaemu, which needs a C++ compiler only. CUDA=gpu, emu or off forces.

NVCC    := $(or $(NVCC),$(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null))
CUDA    := $(or $(CUDA),$(if $(and $(NVCC),$(shell nvidia-smi -L 2>/dev/null)),gpu,$(if $(shell command -v $(CXX)),emu,off)))
TWIN     = megatron_gpt2.cu test_gpt2.c $(SOURCE)
EMULATOR = dev/cudaemu/cudaemu.cpp dev/cudaemu/cudaemu.h
EMUFLAGS = -std=gnu++17 $(OPT) -O2 $(MARCH) -Wall -Wextra -Wno-unused-function -Wno-unknown-pragmas -I. \
           -DGPT2_OPERATORS='"build/megatron_gpt2_emu.cpp"'
TWINS    = $(if $(filter gpu emu,$(CUDA)),test_twin_fp32 test_twin_bf16 test_twin_fp16)
SAY_CUDA = $(if $(TWINS),./test_twin_fp32 device,echo "CUDA: NOT TESTED ($(if $(filter off,$(CUDA)),no C++ compiler was found, or CUDA=off,CUDA=$(CUDA) is not gpu emu or off))")
precision = -DPRECISION_$(shell echo $* | tr a-z A-Z)

all: megatron_gpt2 $(ZLIB)

megatron_gpt2: $(SOURCE)
	$(CC) $(CFLAGS) $(EXTRA) -o $@ megatron_gpt2.c $(LDLIBS)

convert: convert.c $(SOURCE)
	$(CC) $(CFLAGS) $(EXTRA) -o $@ convert.c $(LDLIBS) -lz

test_gpt2: test_gpt2.c $(SOURCE)
	$(CC) $(CFLAGS) $(EXTRA) -o $@ test_gpt2.c $(LDLIBS)

# The same tests with every real number a double: finite differences, and layouts to the last digits.
test_gpt2_double: test_gpt2.c $(SOURCE)
	$(CC) $(CFLAGS) $(EXTRA) -DREAL=double -o $@ test_gpt2.c $(LDLIBS)

# Trains, saves, resumes and generates, in about a minute.
demo: megatron_gpt2
	sh dev/demo.sh

test: megatron_gpt2 $(ZLIB) test_gpt2 test_gpt2_double $(TWINS)
	@$(SAY_CUDA)
	./test_gpt2
	./test_gpt2_double
	@$(SAY_CUDA)

# The twin's tests; dev/cudaemu's sed turns <<<..>>> into calls, and its engine runs them.
build/megatron_gpt2_emu.cpp: megatron_gpt2.cu dev/cudaemu/cu2cpp.sed
	@mkdir -p build
	sed -f dev/cudaemu/cu2cpp.sed megatron_gpt2.cu > $@

build/cudaemu.o: $(EMULATOR)
	@mkdir -p build
	$(CXX) $(EMUFLAGS) $(EXTRA) -c -o $@ dev/cudaemu/cudaemu.cpp

ifeq ($(CUDA),gpu)
test_twin_%: $(TWIN)
	$(NVCC) $(NVCCFLAGS) $(precision) -DTWIN_SOURCE='"megatron_gpt2.cu"' -x cu test_gpt2.c -o $@ $(CUDALIBS)
else
test_twin_%: build/megatron_gpt2_emu.cpp build/cudaemu.o $(TWIN)
	$(CXX) $(EMUFLAGS) $(EXTRA) $(precision) -DTWIN_SOURCE='"build/megatron_gpt2_emu.cpp"' -o $@ -x c++ test_gpt2.c \
	    -x none build/cudaemu.o $(LDLIBS)
endif

# Sanitizers: memory and undefined behaviour; races between ranks (without OpenMP, whose runtime they cannot see).
SANITIZE = -O1 -g -fno-omit-frame-pointer
debug:
	$(MAKE) -B test OPT="$(SANITIZE)" OPENMP= EXTRA="-fsanitize=address,undefined -fno-sanitize-recover=undefined $(EXTRA)"
debug-threads:
	$(MAKE) -B test OPT="$(SANITIZE)" OPENMP= EXTRA="-fsanitize=thread $(EXTRA)"

format:
	clang-format -i megatron_gpt2.c convert.c test_gpt2.c

clean:
	rm -rf build test_twin_* megatron_gpt2 convert test_gpt2 test_gpt2_double demo demo.lock test_scratch test_scratch_double

.PHONY: all demo test debug debug-threads format clean
