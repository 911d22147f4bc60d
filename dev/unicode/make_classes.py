#!/usr/bin/env python3
"""Writes a table into megatron_gpt2.c: the class of every Unicode code point, for the patterns
\\p{L}, \\p{N} and \\s of GPT-2's pre-tokeniser.

    python3 dev/unicode/make_classes.py megatron_gpt2.c

\\p{L} are the general categories L*, \\p{N} the categories N*, and \\s is White_Space, as
in Python's `regex` module and in Hugging Face's tokenizers. Python's unicodedata knows the version
of its day; the committed table is of 16.0, the version of tokenizers 0.2x, made with
`pip install unicodedata2==16.0.0`.
"""
import sys
import textwrap

try:
    import unicodedata2 as unicodedata
except ImportError:
    import unicodedata

BEGIN = "/* clang-format off */ /* make_classes.py writes from here .. */\n"
END = "/* .. to here. */ /* clang-format on */\n"

# White_Space (PropList.txt; unchanged since Unicode 6.3). str.isspace() is no substitute: it adds
# U+001C..U+001F.
WHITE_SPACE = {*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029,
               0x202F, 0x205F, 0x3000}
OTHER, LETTER, NUMBER, SPACE = range(4)  # the order of CLASS_OTHER .. in megatron_gpt2.c


def class_of(code):
    if code in WHITE_SPACE:
        return SPACE
    return {"L": LETTER, "N": NUMBER}.get(unicodedata.category(chr(code))[0], OTHER)


if len(sys.argv) != 2:
    sys.exit(__doc__)
path = sys.argv[1]
with open(path, encoding="utf-8") as f:
    source = f.read()
if source.count(BEGIN) != 1 or source.count(END) != 1:
    sys.exit(f"{path}: the two comments between which the table goes are expected once each")

starts, last = [], None
for code in range(0x110000):
    if class_of(code) != last:
        last = class_of(code)
        starts.append(f"0x{code << 2 | last:X},")
table = f"""static const uint32_t class_starts[] = {{ /* Unicode {unicodedata.unidata_version} */
{textwrap.fill(" ".join(starts), 100, initial_indent="    ", subsequent_indent="    ")}
}};
"""
before, after = source.split(BEGIN)
with open(path, "w", encoding="utf-8") as f:
    f.write(before + BEGIN + table + END + after.split(END)[1])
