"""GPT-2 in PyTorch, as gpu_peer.py and cpu_peer.py train it: tied embeddings, SDPA, GeLU's tanh form."""
import torch.nn.functional as F
from torch import nn

CONFIGS = {"tiny": (4, 128, 64, 384), "124M": (12, 768, 1024, 50304), "355M": (24, 1024, 1024, 51200)}  # L C T V


class Block(nn.Module):
    def __init__(self, C, H, dropout):
        super().__init__()
        self.H, self.ln1, self.ln2, self.drop = H, nn.LayerNorm(C), nn.LayerNorm(C), nn.Dropout(dropout)
        self.qkv, self.proj, self.fc, self.out = (nn.Linear(*s) for s in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.H, C // self.H).transpose(1, 2) for z in self.qkv(self.ln1(x)).split(C, dim=2))
        att = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.drop.p)
        x = x + self.drop(self.proj(att.transpose(1, 2).reshape(B, T, C)))
        return x + self.drop(self.out(F.gelu(self.fc(self.ln2(x)), approximate="tanh")))


class GPT2(nn.Module):
    def __init__(self, L, C, T, V, dropout=0.0, H=None):
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(V, C), nn.Embedding(T, C), nn.Dropout(dropout)
        self.block, self.lnf = nn.ModuleList(Block(C, H or C // 64, dropout) for _ in range(L)), nn.LayerNorm(C)
        for name, w in self.named_parameters():
            if w.dim() == 2:
                nn.init.normal_(w, std=0.02 / ((2 * L) ** 0.5 if "proj" in name or "out" in name else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(w)

    def forward(self, tokens, targets):
        x = self.drop(self.wte(tokens) + self.wpe.weight[:tokens.shape[1]])
        for block in self.block:
            x = block(x)
        return F.cross_entropy((self.lnf(x) @ self.wte.weight.t()).flatten(0, 1), targets.flatten())
