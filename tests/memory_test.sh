#!/bin/sh
# Peak memory of a training process against what `cadre inspect` says beforehand: within ten percent; where saves are asynchronous,
# at most so much.
#   tests/memory_test.sh PATH_TO_CADRE
set -eu
cadre=$1
[ -x "$cadre" ] || { echo "usage: $0 PATH_TO_CADRE"; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

i=0
while [ $i -lt 4000 ]; do
    echo "Line $i speaks of rivers, of stones and of the harbour at $((i * 7919 % 1000))."
    i=$((i + 1))
done >"$work/text.txt"

number() { # KEY in the last JSON object read
    sed -n "s/.*\"$1\":\([0-9.e+]*\).*/\1/p"
}
check() { # LEAST, the share of what was planned that must have been needed, then SETTINGS
    least=$1
    shift
    planned=$("$cadre" inspect --preset bench --json "$@" | number total_bytes)
    peak=$("$cadre" train --model.preset bench --data.train "$work/text.txt" --run.directory "$work/run" --json --quiet \
        --train.steps 2 --train.eval_every_steps 0 --train.eval_tokens 512 "$@" | number peak_bytes)
    rm -rf "$work/run"
    echo "planned $planned, peak $peak: $*"
    awk -v planned="$planned" -v peak="$peak" -v least="$least" \
        'BEGIN { exit !(peak > 0 && peak < 1.1 * planned && peak > least * planned) }'
}
small="--model.num_hidden_layers 3 --model.vocab_size 4096 --train.batch_sequences 4"
# shellcheck disable=SC2086 # a list of words
check 0.9 $small --train.precision fp32 --checkpoint.mode sync
# shellcheck disable=SC2086
check 0.9 $small --train.precision bf16 --train.recompute block --checkpoint.mode sync
# A save beside training keeps room for a copy of everything, and takes of it what is not written before the next update.
# shellcheck disable=SC2086
check 0.5 $small --train.precision fp32 --checkpoint.mode async --checkpoint.every_steps 1
