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

test: megatron_gpt2 $(ZLIB) test_gpt2 test_gpt2_double
	./test_gpt2
	./test_gpt2_double

# Sanitizers: memory and undefined behaviour; races between ranks (without OpenMP, whose runtime they cannot see).
SANITIZE = -O1 -g -fno-omit-frame-pointer
debug:
	$(MAKE) -B test OPT="$(SANITIZE)" OPENMP= EXTRA="-fsanitize=address,undefined -fno-sanitize-recover=undefined $(EXTRA)"
debug-threads:
	$(MAKE) -B test OPT="$(SANITIZE)" OPENMP= EXTRA="-fsanitize=thread $(EXTRA)"

# Time and memory, dev/bench/*.sh: make bench; make bench BENCH=convert BENCHFLAGS=--json
BENCH   ?= $(patsubst dev/bench/%.sh,%,$(wildcard dev/bench/*.sh))
bench: all
	@for part in $(BENCH); do sh dev/bench/$$part.sh $(BENCHFLAGS) || exit 1; done

format:
	clang-format -i megatron_gpt2.c convert.c test_gpt2.c

clean:
	rm -rf megatron_gpt2 convert test_gpt2 test_gpt2_double demo demo.lock test_scratch test_scratch_double bench_scratch

.PHONY: all demo test debug debug-threads bench format clean
