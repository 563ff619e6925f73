"""Opens a cadre checkpoint in Hugging Face transformers and compares logits: fp32, 1e-4 absolute.

    python3 -m venv venv && venv/bin/pip install torch transformers
    venv/bin/python tests/parity/transformers_logits.py MODEL_DIR build/dev/tests/dump_logits [TEXT]

MODEL_DIR is a checkpoint directory (runs/NAME/checkpoints/step-NNNNNN). Nothing is downloaded. Exit status 1 where an
element differs by more than 1e-4, or where the tokenizers disagree on the text.
"""
import subprocess
import sys
import tempfile

import numpy
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "It was the opinion of Emma that the whale, which the LORD had made, was no 1 man's to sell. "


def main():
    directory, program = sys.argv[1:3]
    text = sys.argv[3] if len(sys.argv) > 3 else TEXT * 4
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).eval()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids) != text:
        sys.exit("the text does not come back from the tokenizer")
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    with tempfile.NamedTemporaryFile() as out:
        subprocess.run([program, directory, out.name, *map(str, ids)], check=True)
        ours = numpy.fromfile(out.name, dtype=numpy.float32).reshape(theirs.shape)
    difference = numpy.abs(ours - theirs).max()
    agree = (ours.argmax(1) == theirs.argmax(1)).mean()
    print(
        f"transformers {transformers.__version__}, torch {torch.__version__}: {type(model).__name__}, {len(ids)} tokens, "
        f"{theirs.shape[1]} logits each; largest difference {difference:.2e} (logits up to {numpy.abs(theirs).max():.1f}), "
        f"same best token {100 * agree:.1f} %"
    )
    sys.exit(0 if difference <= 1e-4 else 1)


main()
