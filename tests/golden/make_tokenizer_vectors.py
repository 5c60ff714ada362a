#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/tokenizer/vectors.bin: what Hugging Face `tokenizers` makes of many strings.

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install tokenizers
    /tmp/venv/bin/python tests/golden/make_tokenizer_vectors.py

Strings come from a fixed seed: text of many scripts, code, numbers, white space, combining marks, emoji, control
characters, special tokens and pieces of them, random code points, and broken UTF-8. Then every code point of Unicode in
a few surroundings, which settles that two regex engines agree about classes.

Format, little-endian, read in order by engine/text/tokenizer_vectors_test.cc:
    magic "MRTV0001"
    records until the end of the file, each a u8 kind and then
        0, a text:      u32 bytes, the text as given (broken UTF-8 still broken); u32 number of ids; the ids as u16 if there
                        are at most 96, else their hash; hash of the ids decoded with special tokens skipped
        1, a decoding:  u32 number of ids, the ids as u16; u32 bytes, the decoded text, special tokens skipped
        2, code points: u8 bytes, the surrounding with {0} for the character; u32 first code point; u32 number of ids; hash
                        of the ids. The text is 4,096 code points (surrogates left out), each in the surrounding.
    hash: u64 FNV-1a over bytes, ids as u32.
Broken UTF-8 reaches the tokenizer as Python's errors="replace" would hand it over.
"""

import pathlib
import random
import struct
import sys
import unicodedata

import tokenizers

ROOT = pathlib.Path(__file__).resolve().parents[2]
COUNT = 24000

WORDS = (
    "the The THE of and a to in is don't it's we'll I'm can't fox falcon otter story Once upon code codes Compute "
    "hello world naïve café Straße ÇA ñandú ångström Привет мир ΑΒΓ αβγ שלום مرحبا नमस्ते สวัสดี 안녕하세요 "
    "你好 毕老师 東京 こんにちは カタカナ ﾊﾝｶｸ 苍鹭 ｆｕｌｌ ǅ ﬁ ı İ ß ẞ"
).split()
CODE = [
    "int main(int argc, char** argv) {\n\treturn 0;\n}\n", "def f(x):\n    return x ** 2  # square\n",
    "SELECT * FROM t WHERE id=42;", "<div class=\"a\">&nbsp;</div>", "{\"a\": [1, 2.5, null]}", "a->b.c(d[e], f);",
    "#include <vector>\r\n", "x_y.zip", "--flag=value", "$HOME/bin:/usr/bin", "C:\\dir\\file.txt", "https://a.b/c?d=e&f=g#h",
    "^[a-z]+(?!\\S)$", "@user #tag", "\\frac{1}{2}", "0x1F 1e-9 3.14159 1_000_000",
]
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "🏠", "❤️", "☃", "🧑🏿‍🚀", "🏳️‍🌈", "#️⃣", "🫠"]
MARKS = ["\u0301", "\u0308", "\u0323", "\u20dd", "\u0e47", "\u093c", "\u0651", "\ufe0f", "\u200d", "\u200c", "\u3099"]
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\n\n", "\v", "\f", "\u00a0", "\u1680", "\u180e", "\u2003", "\u2028",
          "\u2029", "\u202f", "\u205f", "\u3000", "\u0085", "\u200b", "\ufeff"]
DIGITS = ["0", "7", "12", "345", "6789", "01234", "٣", "४", "５", "½", "Ⅷ", "²", "⑨", "一", "𝟘"]
PUNCT = list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + ["«", "»", "—", "…", "「", "」", "。", "，", "！", "？", "｜", "▁", "€", "°",
                                                          "±", "→", "∑", "©", "^^^", "***", "---", "...", "://", "!!"]
CONTROLS = ["\x00", "\x01", "\x1b", "\x7f", "\x80", "\x9f", "\u200e", "\u202e", "\ue000", "\U000f0000", "\uffff", "\ufffd"]


def random_code_point(rng):
    while True:
        c = rng.choice([rng.randrange(0x80), rng.randrange(0x800), rng.randrange(0x3000, 0xA000), rng.randrange(0x10000),
                        rng.randrange(0x110000)])
        if not 0xD800 <= c < 0xE000:
            return chr(c)


def random_text(rng, specials):
    """A string of one theme or of all."""
    word = lambda: rng.choice(WORDS)
    makers = [
        word, lambda: " " + word(), lambda: word() + rng.choice(PUNCT), lambda: rng.choice(PUNCT), lambda: rng.choice(SPACES),
        lambda: rng.choice(DIGITS), lambda: str(rng.randrange(10 ** rng.randrange(1, 12))), lambda: rng.choice(EMOJI),
        lambda: word() + rng.choice(MARKS) * rng.randrange(1, 4), lambda: rng.choice(MARKS), lambda: rng.choice(CODE),
        lambda: rng.choice(CONTROLS), lambda: random_code_point(rng), lambda: rng.choice(specials),
        lambda: (lambda s: s[:rng.randrange(len(s) + 1)])(rng.choice(specials)),
        lambda: rng.choice(SPACES) * rng.randrange(1, 6), lambda: rng.choice("abAB^ \n1.") * rng.randrange(1, 80),
        lambda: "".join(chr(rng.randrange(97, 123)) for _ in range(rng.randrange(1, 60))),
        lambda: "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(rng.randrange(1, 12))),
        lambda: "".join(chr(rng.randrange(0x3040, 0x3100)) for _ in range(rng.randrange(1, 12))),
        lambda: unicodedata.normalize(rng.choice(["NFC", "NFD", "NFKD"]), word()),
    ]
    theme = rng.sample(makers, rng.choice([1, 2, 3, 5, len(makers)]))
    return "".join(rng.choice(theme)() for _ in range(rng.choice([1, 1, 2, 3, 4, 6, 8, 12, 20])))


def broken(rng, text):
    """The bytes of a string, damaged."""
    data = bytearray(text.encode())
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        action = rng.randrange(4)
        if action == 0 and data:
            del data[at:at + rng.randrange(1, 3)]
        elif action == 1:
            data[at:at] = bytes([rng.choice([0x80, 0xBF, 0xC0, 0xC1, 0xC3, 0xE0, 0xED, 0xF0, 0xF4, 0xF5, 0xFE, 0xFF])])
        elif action == 2:
            data[at:at] = rng.choice([b"\xed\xa0\x80", b"\xc0\x80", b"\xf0\x82\x82\xac", b"\xf4\x90\x80\x80", b"\xe2\x82",
                                      b"\xf0\x9f\x98", b"\xed\xbf\xbf", b"\xf8\x88\x80\x80\x80"])
        elif data:
            data[min(at, len(data) - 1)] = rng.randrange(256)
    return bytes(data)


def pack_ids(ids):
    return struct.pack(f"<{len(ids)}I", *ids)


def fnv1a(data):
    h = 0xCBF29CE484222325
    for byte in data:
        h = (h ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return h


def main():
    path = ROOT / "deploy/demo/model/tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    specials = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    rng = random.Random(20240607)
    out = bytearray(b"MRTV0001")
    seen = set()
    broken_count = 0
    while len(seen) < COUNT:
        text = random_text(rng, specials)
        data = broken(rng, text) if rng.random() < 0.15 else text.encode()
        if data in seen or len(data) > 600:
            continue
        seen.add(data)
        given = data.decode(errors="replace")
        broken_count += given.encode() != data
        ids = tokenizer.encode(given, add_special_tokens=False).ids
        decoded = tokenizer.decode(ids, skip_special_tokens=True).encode()
        out += struct.pack("<BI", 0, len(data)) + data + struct.pack("<I", len(ids))
        out += struct.pack(f"<{len(ids)}H", *ids) if len(ids) <= 96 else struct.pack("<Q", fnv1a(pack_ids(ids)))
        out += struct.pack("<Q", fnv1a(decoded))
    # Decoding of ids that no text encodes to: shuffled, so that characters break.
    for _ in range(2000):
        ids = [rng.randrange(tokenizer.get_vocab_size()) if rng.random() < 0.4 else rng.randrange(18, 280)
               for _ in range(rng.randrange(1, 12))]
        decoded = tokenizer.decode(ids, skip_special_tokens=True).encode()
        out += struct.pack(f"<BI{len(ids)}H", 1, len(ids), *ids)
        out += struct.pack("<I", len(decoded)) + decoded
    # Every code point, 4,096 to a text, in surroundings that tell the classes apart.
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for form in ("{0}", "a{0}b ", "1{0}2", ".{0}. ", " {0} \n", "{0}\u0301{0}", "！{0}\n\n"):
        for start in range(0, len(points), 4096):
            # Plane 4 to 13 are unassigned: one surrounding is enough.
            if form != "{0}" and 0x40000 <= ord(points[start]) < 0xE0000:
                continue
            text = "".join(form.format(c) for c in points[start:start + 4096])
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            out += bytes([2, len(form.encode())]) + form.encode()
            out += struct.pack("<IIQ", ord(points[start]), len(ids), fnv1a(pack_ids(ids)))
    target = ROOT / "tests/data/tokenizer/vectors.bin"
    target.write_bytes(out)
    print(f"{target}: {len(out)} bytes, {COUNT} strings, {broken_count} of them broken UTF-8, tokenizers "
          f"{tokenizers.__version__}", file=sys.stderr)


if __name__ == "__main__":
    main()
