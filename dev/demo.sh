#!/bin/sh
# make demo: the main job on what every copy of the project has, its own text, in about a minute on two cores.
set -e
cd "$(dirname "$0")/.."
run() { echo; echo "\$ $*"; "$@"; }

rm -rf demo demo.tmp demo.lock
echo "Training the configuration \"tiny\" (4 layers, hidden 128, 4 heads) on this project's own text, as bytes,"
echo "with the paper's tensor parallelism: 2 ranks, each a thread that stands for a GPU."
run ./megatron_gpt2 train --data doc megatron_gpt2.c test_gpt2.c --config tiny --tp 2 \
    --batch 16 --steps 1600 --lr 2e-3 --min-lr 2e-4 --warmup 50 --dropout 0 --decay-steps 2000 --save demo
echo; echo "The checkpoint knows nothing of ranks. It goes on with pipeline parallelism, 2 stages:"
run ./megatron_gpt2 train --data doc megatron_gpt2.c test_gpt2.c --resume demo --pp 2 --micro-batch 4 \
    --steps 2000
echo; echo "And writes:"
echo; echo "\$ ./megatron_gpt2 generate --model demo --prompt \"The paper\" --tokens 300 --temperature 0.7"
./megatron_gpt2 generate --model demo --prompt "The paper" --tokens 300 --temperature 0.7
cat <<END

demo/ is a model in Hugging Face layout. Three things to try next:

  ./megatron_gpt2 plan --config 8.3B --tp 8           what the paper's largest model takes
  ./megatron_gpt2 trace --tp 2 --layers 2             every message of one training step, and its place in the paper
  ./megatron_gpt2 train --data YOUR.txt --tp 2 --steps 2000 --lr 1e-3 --eval-every 200 --save mine
END
