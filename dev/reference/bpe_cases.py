#!/usr/bin/env python3
"""Writes bpe/: a small tokenizer, and texts with the tokens that they must become. test_gpt2.c reads them.

    pip install regex tokenizers && python3 bpe_cases.py

The encoder below is the slow, plain one of the GPT-2 paper's release: a regular expression and a rescan of the word
for every merge. Where Hugging Face's `tokenizers` is installed, each case is checked against it as well. No case has
characters younger than Unicode 14, so that every version of both packages agrees.
"""
import json
import os
import random

import regex

OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bpe")
END = "<|endoftext|>"
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

LEARN = """
The miller's daughter wasn't at the mill when the wind turned. She'd gone down to the river, where they're mending
the weir, and I've heard that she'll stay there until the water falls. "Don't wait," she said, "I'm not going to be
back before the bells." The wind came from the north and the north wind brings rain; the rain brings the river over
its banks, and then nobody can cross the bridge. In the year 1907 the river rose 12 feet in 3 days, in 1953 it rose
15 feet, and in 2002 it carried the bridge away. They built another one of stone, and another one of iron, and the
iron one stands. What the water wants the water takes. There was an old man who measured the river each morning and
wrote the numbers into a book: 100, 104, 119, 127, 133. He'd say that the numbers were a kind of weather, and that
whoever reads them well enough will know the rain before the rain knows itself. The children laughed at this. But
when the river came they ran to him, and they asked him: how high, how long, how fast? He looked at his book and he
said, it'll stop at the third step of the church. It stopped at the third step of the church.

    A program is a text for a reader.  The machine is one of the readers, and the least demanding one.
    for (i = 0; i < n; i++) { sum += x[i] * y[i]; }     return sum;
    if (a == b || c != d) { print("equal"); } else { print("different"); }

Le café est près de la rivière; l'été, les élèves y vont à pied. Die Brücke über den Fluß ist für Fußgänger geöffnet.
Река течёт на север, и ветер с реки холодный. Ο ποταμός ρέει προς τη θάλασσα. 河の水は海へ流れる。川の上に橋がある。
""" + "the river and the bridge, the wind and the rain. " * 3

PIECES = [
    "the", "The", " the", "river", " bridges", "I'm", "they're", "we've", "she'll", "he'd", "it's", "don't", "DON'T",
    "'s", "'S", "'", "''", " '", "' ", "'t", "'re", "'r", "'l", "'ll", "'v", "'lls", "'d've", "\u2019s", "'\u017f",
    " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n", "\n ", "\v", "\f", "\u00a0", "\u3000", "\u0085", "\u2028",
    "\u2029", "\u200b", "\u202f", "\u1680", "\ufeff", "\x1c", "\x1f", "\x7f", "\x01", " \u00a0", "\u3000 ",
    "\u2003",
    "0", "7", "42", " 1907", "3.14", "1,000", "\u0663\u0664", "\u0967", "\u00b2", "x\u00b2", "\u00bd", "\u2167",
    "\u3007", "\u2460", "\U0001d7d8", "\u0e51", "\U00010107", "\u2075\u2086",
    "caf\u00e9", "cafe\u0301", "\u0301", "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0639\u0631\u0628\u064a",
    "\u05e9\u05dc\u05d5\u05dd", "\u6cb3\u306e\u6c34", "\ud55c\uad6d", "\u0420\u0435\u043a\u0430",
    "\u03c0\u03bf\u03c4", "\u00df", "\u00c4", "\u01c5", "\u02b0", "\u00aa", "\U00020000",
    "\U0001d400", "\u1e9e", "\uac00", "\u10d0",
    "\U0001f30a", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\ue000",
    "!", "?!", "...", "\u2026", "\u2014", "\u00ab", "\u00bb", "\u20ac", "\u00b0", "\u00d7", "+", "$", "_", "#",
    "==", "||", "(", ")", "{ ", "}", "<|", "|>", "endoftext", "<|endoftext|", END,
    " " + END, END + " ", "\ufffd", "\uffff",
]


def alphabet():
    """byte -> the character that stands for it in the files"""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


LETTER = alphabet()


def spell(word):
    return [LETTER[b] for b in word.encode("utf-8")]


def merge(symbols, pair):
    out, i = [], 0
    while i < len(symbols):
        if tuple(symbols[i:i + 2]) == pair:
            out.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out


def learn(text, count):
    words, merges = [spell(w) for w in WORDS.findall(text)], []
    while len(merges) < count:
        pairs = {}
        for w in words:
            for pair in zip(w, w[1:]):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        words = [merge(w, best) for w in words]
    return merges


def encode(text, vocabulary, ranks):
    ids = []
    for i, part in enumerate(text.split(END)):
        ids += [vocabulary[END]] if i else []
        for word in WORDS.findall(part):
            symbols = spell(word)
            while True:
                known = [p for p in zip(symbols, symbols[1:]) if p in ranks]
                if not known:
                    break
                symbols = merge(symbols, min(known, key=ranks.get))
            ids += [vocabulary[s] for s in symbols]
    return ids


def check_against_hugging_face(folder, cases):
    try:
        from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    except ImportError:
        print("tokenizers is not installed: its check is skipped")
        return
    other = Tokenizer(models.BPE.from_file(f"{folder}/vocab.json", f"{folder}/merges.txt"))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.add_special_tokens([AddedToken(END, special=True)])
    for text, ids in cases:
        assert other.encode(text).ids == ids, (text, ids, other.encode(text).ids)
    print(f"tokenizers agrees on {len(cases)} cases")


def detokenise(s):
    """WikiText's tokens back into text: the rules of Megatron-LM's tasks/zeroshot_gpt2 in their order [App. E]."""
    import re
    for old, new in [("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")]:
        s = s.replace(old, new)
    for sign in ":;.!?,":
        s = s.replace(f" {sign} ", f"{sign} ")
    for a, b in ["()", "[]", "{}", '""', "''"]:
        a, not_b, b = re.escape(a), "[^" + re.escape(b) + "]", re.escape(b)
        s = re.sub(rf"({a})\s*({not_b}*?)\s*({b})", r"\1\2\3", s)
    for old, new in [("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \u00b0 ", "\u00b0"), (" \n", "\n"),
                     ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]:
        s = s.replace(old, new)
    return s


WIKI = [
    " \n = The Old Mill = \n \n The mill 's wheel is 3 @.@ 5 m wide , and the weirs ' walls are low . \n",
    " = = Floods = = \n \n = = = 1907 = = = \n \n = = = = Damage = = = = \n",
    " a well @-@ known river ( in flood ) , [ 12 ]\n",
    'He said , " It will stop . " and " so it did "',
    "the ' high ' mark , the ' low ' one ; at 12 \u00b0 C : cold ! why ? \n",
    "( ( nested ) outer )", "( no end", "no begin )", "()( )(   )", "(\u00a0a\u3000)", "[\x1c b \x85]",
    '"', '" "', '" a', "' a ' b ' c '", "{ x } { y", " N N N ", "1 @,@ 000 @,@ 000", "= = = = = =", "s 's ' s '",
    " \n \n  \n ", "a , , b", " , ", "", " ", "\n", "the dogs ' tails , N cats 's paws \u00b0 \u00b0 ",
    "( a \n b ) \" c \n d \"", "''' ' '", "(a) [b] {c} \"d\" 'e'",
]
SIGNS = [
    "a", "s", "N", " ", " ", " ", "'", '"', "(", ")", "[", "]", "{", "}", "=", "@-@", "@,@", ".", ",", ";", "\n",
    "\u00b0", "\u00a0", "'s",
]


def main():
    os.makedirs(OUT, exist_ok=True)
    merges = learn(LEARN, 420)
    tokens = [*sorted(LETTER.values()), *dict.fromkeys("".join(p) for p in merges), END]
    vocabulary, ranks = {t: i for i, t in enumerate(tokens)}, {p: i for i, p in enumerate(merges)}
    with open(f"{OUT}/vocab.json", "w", encoding="utf-8") as f:
        json.dump(vocabulary, f, ensure_ascii=False, separators=(",", ":"))
        f.write("\n")
    with open(f"{OUT}/merges.txt", "w", encoding="utf-8") as f:
        f.write("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))

    rng = random.Random(1909)
    texts = ["", *PIECES, "a" * 300, "the" * 99, " " * 65, "\n" * 33 + "x", "ab " * 40, "1" * 50, "=" * 77]
    texts += [LEARN[:400]]
    texts += ["".join(rng.choices(PIECES, k=rng.randint(2, 12))) for _ in range(190)]
    cases = [(t, encode(t, vocabulary, ranks)) for t in dict.fromkeys(texts)]
    check_against_hugging_face(OUT, cases)
    with open(f"{OUT}/cases.jsonl", "w", encoding="utf-8") as f:
        for text, ids in cases:
            f.write(json.dumps({"text": text, "ids": ids}, ensure_ascii=False, separators=(",", ":")) + "\n")

    wiki = WIKI + ["".join(rng.choices(SIGNS, k=rng.randint(5, 30))) for _ in range(120)]
    with open(f"{OUT}/detokenise.jsonl", "w", encoding="utf-8") as f:
        for text in dict.fromkeys(wiki):
            case = {"text": text, "expected": detokenise(text), "words": len(text.strip().split(" "))}
            f.write(json.dumps(case, separators=(",", ":")) + "\n")
    print(len(tokens), "tokens,", len(merges), "merges,", len(cases), "cases,",
          sum(os.path.getsize(f"{OUT}/{n}") for n in os.listdir(OUT)), "bytes")


if __name__ == "__main__":
    main()
