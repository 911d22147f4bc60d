#!/usr/bin/env python3
"""Writes classes.h: what each Unicode code point is to the patterns \\p{L}, \\p{N} and \\s of GPT-2's pre-tokeniser.

    python3 make_classes.py > classes.h

\\p{L} are the general categories L*, \\p{N} the categories N*, and \\s is the property White_Space, as in Python's
`regex` module and in Hugging Face's tokenizers. Python's unicodedata knows the version of its day; the committed
table is of 16.0, the version of tokenizers 0.2x, made with `pip install unicodedata2==16.0.0`.
"""
try:
    import unicodedata2 as unicodedata
except ImportError:
    import unicodedata

# White_Space (PropList.txt; unchanged since Unicode 6.3). str.isspace() is no substitute: it adds U+001C..U+001F.
WHITE_SPACE = {*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}
OTHER, LETTER, NUMBER, SPACE = range(4)


def class_of(code):
    if code in WHITE_SPACE:
        return SPACE
    return {"L": LETTER, "N": NUMBER}.get(unicodedata.category(chr(code))[0], OTHER)


starts, last = [], None
for code in range(0x110000):
    if class_of(code) != last:
        last = class_of(code)
        starts.append(f"0x{code << 2 | last:X},")

print(f"""/* Made by make_classes.py from Unicode {unicodedata.unidata_version}: do not edit.
 *
 * Entry i says that from code point class_starts[i] >> 2 up to the next entry's, characters are of class
 * class_starts[i] & 3. After the last entry come only characters of its class, OTHER. */
enum {{ CLASS_OTHER = {OTHER}, CLASS_LETTER = {LETTER}, CLASS_NUMBER = {NUMBER}, CLASS_SPACE = {SPACE} }};

static const uint32_t class_starts[] = {{""")
line = "   "
for start in starts:
    if len(line) + 1 + len(start) > 118:
        print(line)
        line = "   "
    line += " " + start
print(line)
print("};")
