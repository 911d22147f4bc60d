# megatron_gpt2.c with a stopwatch around every call of an operator, for cpu.c:
#
#     sed -f stopwatch.sed megatron_gpt2.c > watched.c
#
# Calls are indented. Prototypes and definitions begin in the first column, and stay.
/^typedef struct Tensor Tensor;/a\
#include "dev/bench/stopwatch.h"
/^ /s/\([^A-Za-z0-9_]\)linear_forward(/\1watched_linear_forward(/g
/^ /s/\([^A-Za-z0-9_]\)linear_backward(/\1watched_linear_backward(/g
/^ /s/\([^A-Za-z0-9_]\)linear_gelu_forward(/\1watched_linear_gelu_forward(/g
/^ /s/\([^A-Za-z0-9_]\)gelu_linear_backward(/\1watched_gelu_linear_backward(/g
/^ /s/\([^A-Za-z0-9_]\)token_embedding_forward(/\1watched_token_embedding_forward(/g
/^ /s/\([^A-Za-z0-9_]\)token_embedding_backward(/\1watched_token_embedding_backward(/g
/^ /s/\([^A-Za-z0-9_]\)position_embedding_forward(/\1watched_position_embedding_forward(/g
/^ /s/\([^A-Za-z0-9_]\)position_embedding_backward(/\1watched_position_embedding_backward(/g
/^ /s/\([^A-Za-z0-9_]\)layernorm_forward(/\1watched_layernorm_forward(/g
/^ /s/\([^A-Za-z0-9_]\)layernorm_backward(/\1watched_layernorm_backward(/g
/^ /s/\([^A-Za-z0-9_]\)bias_dropout_add_forward(/\1watched_bias_dropout_add_forward(/g
/^ /s/\([^A-Za-z0-9_]\)bias_dropout_add_layernorm_forward(/\1watched_bias_dropout_add_layernorm_forward(/g
/^ /s/\([^A-Za-z0-9_]\)bias_dropout_add_backward(/\1watched_bias_dropout_add_backward(/g
/^ /s/\([^A-Za-z0-9_]\)attention_forward(/\1watched_attention_forward(/g
/^ /s/\([^A-Za-z0-9_]\)attention_backward(/\1watched_attention_backward(/g
/^ /s/\([^A-Za-z0-9_]\)attention_cached_forward(/\1watched_attention_cached_forward(/g
/^ /s/\([^A-Za-z0-9_]\)logits_max(/\1watched_logits_max(/g
/^ /s/\([^A-Za-z0-9_]\)logits_sum_exp(/\1watched_logits_sum_exp(/g
/^ /s/\([^A-Za-z0-9_]\)cross_entropy_loss(/\1watched_cross_entropy_loss(/g
/^ /s/\([^A-Za-z0-9_]\)cross_entropy_backward(/\1watched_cross_entropy_backward(/g
/^ /s/\([^A-Za-z0-9_]\)adamw(/\1watched_adamw(/g
/^ /s/\([^A-Za-z0-9_]\)sum_squares(/\1watched_sum_squares(/g
/^ /s/\([^A-Za-z0-9_]\)reduce_slice(/\1watched_reduce_slice(/g
/^ /s/\([^A-Za-z0-9_]\)device_zero(/\1watched_device_zero(/g
