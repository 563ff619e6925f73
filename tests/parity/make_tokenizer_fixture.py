"""Makes tests/fixtures/tokenizer.json and tokenizer_ids.txt: what Hugging Face's `tokenizers` gives on our tokenizer.

    python3 -m venv venv && venv/bin/pip install tokenizers
    venv/bin/python tests/parity/make_tokenizer_fixture.py build/dev/tests/tokenizer_test

The test program writes a megabyte of mixed scripts and a tokenizer learnt on a part of it; the ids that Hugging Face's
library gives for the text are kept as hashes, 4096 ids each, after the sizes of text and ids.
"""
import pathlib
import subprocess
import sys
import tempfile

import tokenizers

CHUNK_IDS = 4096


def fnv1a(ids):
    value = 0xCBF29CE484222325
    for i in ids:
        for byte in i.to_bytes(4, "little"):
            value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def main():
    program = sys.argv[1]
    target = pathlib.Path(__file__).resolve().parent.parent / "fixtures"
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([program, "--write-fixture", work], check=True)
        text = (pathlib.Path(work) / "text.txt").read_bytes().decode("utf-8")
        json = (pathlib.Path(work) / "tokenizer.json").read_text("utf-8")
    ids = tokenizers.Tokenizer.from_str(json).encode(text, add_special_tokens=False).ids
    lines = [str(len(text.encode("utf-8"))), str(len(ids))]
    lines += ["%016x" % fnv1a(ids[i : i + CHUNK_IDS]) for i in range(0, len(ids), CHUNK_IDS)]
    (target / "tokenizer.json").write_text(json, "utf-8")
    (target / "tokenizer_ids.txt").write_text("\n".join(lines) + "\n")
    print(f"tokenizers {tokenizers.__version__}: {len(ids)} ids of {lines[0]} bytes")


main()
