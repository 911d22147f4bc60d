#!/bin/sh
# From a zip like NVIDIA's megatron_lm_345m to generated text: the commands of doc/convert.md, on a file of the same
# layout and size. Its weights are those of one training step, so what it writes is noise. Wants GPT-2's tokenizer,
# a Python with torch (Debian: python3-torch), 12 GB of memory and 8 GB of disk.
#
#     [PYTHON=/usr/bin/python3] sh dev/ngc_like.sh TOKENIZER [FOLDER]
set -e
tokenizer=$(cd "${1:?name the folder with vocab.json and merges.txt of GPT-2}" && pwd) folder=${2:-ngc_like}
python=${PYTHON:-python3}
"$python" -c "import numpy, torch" || { echo "PYTHON=.. must name a Python that has torch"; exit 1; }
cd "$(dirname "$0")/.."
run() { echo; echo "\$ $*"; "$@"; }

mkdir "$folder"
run ./megatron_gpt2 train --config 355M --tokenizer "$tokenizer" --data doc --batch 1 --steps 1 --save "$folder/model"
run "$python" dev/reference/make_checkpoints.py --ngc "$folder/model" "$folder/megatron_lm_345m_like.zip"
run ./convert "$folder/megatron_lm_345m_like.zip" "$folder/gpt2_345m" --tokenizer "$tokenizer"
run ./megatron_gpt2 generate --model "$folder/gpt2_345m" --prompt "In a shocking finding, scientists" --tokens 32
# What came through Megatron's names and layout is the model itself, rounded to fp16.
run ./convert "$folder/model" "$folder/half" --dtype fp16 --to hf
run cmp "$folder/half/model.safetensors" "$folder/gpt2_345m/model.safetensors"
echo; echo "equal, bit for bit; $folder can be deleted"
