#!/bin/sh
# The program as a user meets it: exit statuses, one clear line for each mistake, and a small run from text to text.
#   tests/cli_test.sh PATH_TO_CADRE
set -u
cadre=$1
[ -x "$cadre" ] || { echo "usage: $0 PATH_TO_CADRE"; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

complain() {
    echo "FAILED: $1"
    failures=$((failures + 1))
}

# expect STATUS TEXT -- COMMAND...: the exit status, and on stderr one line that holds TEXT.
expect() {
    wanted=$1 text=$2
    shift 3
    "$@" >"$work/out" 2>"$work/err" </dev/null
    got=$?
    [ $got -eq "$wanted" ] || complain "$* ended with $got instead of $wanted: $(cat "$work/err")"
    [ -z "$text" ] || grep -qiF -- "$text" "$work/err" || complain "$* did not say \"$text\" but: $(cat "$work/err")"
    if [ "$wanted" -ne 0 ]; then
        lines=$(grep -c '^cadre' "$work/err")
        [ "$lines" -eq 1 ] || complain "$* said $lines error lines: $(cat "$work/err")"
    fi
}

i=0
while [ $i -lt 1500 ]; do
    echo "The keeper of lamp number $i walks along the harbour, and the river waits."
    [ $((i % 6)) -ne 5 ] || echo
    i=$((i + 1))
done >"$work/text.txt"

expect 2 'the nearest known one is train' -- "$cadre" trian
expect 2 'the nearest known one is --temperature' -- "$cadre" generate --temprature 1
expect 2 'the nearest known one is train.steps' -- "$cadre" train --train.step 3
expect 2 'unknown preset "demos"; the nearest known one is demo' -- "$cadre" train --model.preset demos
expect 2 'num_experts_per_tok 9 is more than num_experts 8' -- "$cadre" train --model.num_experts_per_tok 9
expect 2 'not a multiple of num_key_value_heads' -- "$cadre" train --model.num_key_value_heads 3
expect 2 'not a multiple of num_attention_heads' -- "$cadre" train --model.hidden_size 100
expect 2 'parameters; at most' -- "$cadre" inspect --preset tiny --model.hidden_size 1048576 --model.num_hidden_layers 4096 \
    --model.moe_intermediate_size 1048576 --model.num_experts 65536
expect 2 'data.train is not set' -- "$cadre" train --run.directory "$work/none"
expect 2 'must be a whole number' -- "$cadre" train --train.steps 1.5
expect 2 'optim.epsilon' -- "$cadre" train --optim.epsilon 0
expect 2 '--threads is 0 to 4096, not 5000' -- "$cadre" generate --model "$work/absent" --prompt x --threads 5000
expect 2 'wants a value' -- "$cadre" train --train.steps
expect 2 'it is cpu or cuda' -- "$cadre" train --device gpu --data.train "$work/text.txt" --run.directory "$work/none"
expect 2 'it is cpu or cuda' -- "$cadre" eval --device gpu --model "$work/none"
if "$cadre" inspect --preset tiny --device cuda >"$work/plan" 2>&1; then # with CUDA or its model: planned whether there is a device or not
    "$cadre" train --model.preset tiny --device cuda --dry-run --ranks 2 --layout.expert 2 >"$work/plan" 2>&1 &&
        grep -q 'mesh: 2 ranks' "$work/plan" && grep -q 'memory of rank 0, on its device' "$work/plan" ||
        complain "a dry run for two devices: $(cat "$work/plan")"
    expect 2 'the device takes models of at most 1024 experts, not 3000' -- "$cadre" inspect --preset tiny --model.num_experts 3000 --device cuda
    expect 2 'the device takes heads of at most 1536 numbers, not 2048' -- "$cadre" inspect --preset tiny --model.head_dim 2048 --device cuda
else
    grep -q 'built without CUDA' "$work/plan" || complain "inspect --device cuda: $(cat "$work/plan")"
fi
expect 1 'no such file' -- "$cadre" train --data.train "$work/absent.txt" --run.directory "$work/none"
expect 1 'no such file' -- "$cadre" train --config "$work/absent.ini"
expect 1 'no such directory' -- "$cadre" generate --model "$work/absent" --prompt x
expect 2 '--model DIR is missing' -- "$cadre" eval
expect 2 'name a directory' -- "$cadre" inspect
: >"$work/empty.txt"
expect 1 'is empty' -- "$cadre" train --data.train "$work/empty.txt" --run.directory "$work/none"
head -c 3000 "$cadre" >"$work/binary.txt"
expect 1 'is not' -- "$cadre" train --data.train "$work/binary.txt" --run.directory "$work/none"
echo "too short" >"$work/short.txt"
expect 1 'one sequence needs' -- "$cadre" train --model.preset tiny --data.train "$work/short.txt" --run.directory "$work/none"
printf '[train]\nstpes = 3\n' >"$work/bad.ini"
expect 2 'unknown key train.stpes; the nearest known one is train.steps' -- "$cadre" train --config "$work/bad.ini"
printf '[train]\nstpes = 3\nseed = 1\n' >"$work/bad.ini"
expect 2 'unknown key train.stpes; the nearest known one is train.steps' -- "$cadre" train --config "$work/bad.ini"

# Names that are not UTF-8, or would be two lines.
other="$work/caf$(printf '\351')"
cp "$work/text.txt" "$other.txt"
expect 0 '' -- "$cadre" tokenize --data "$other.txt" --out "$other" --vocab-size 300 --json
grep -q '"vocab_size":300' "$work/out" || complain "a corpus with a name that is not UTF-8: $(cat "$work/out")"
expect 1 'no such file' -- "$cadre" tokenize --data "$work/two
lines.txt" --out "$work/none"
[ "$(wc -l <"$work/err")" -eq 1 ] || complain "a name of two lines: $(cat "$work/err")"
mkdir "$work/odd"
printf '{"model_type":"two\\nlines"}' >"$work/odd/config.json"
expect 1 'two?lines' -- "$cadre" inspect "$work/odd"
if [ -c /dev/full ]; then
    "$cadre" help >/dev/full 2>"$work/err" && complain "help to a full output ended with 0"
fi
printf 'a\000b' >"$work/zero"
"$cadre" generate --model "$work/odd" <"$work/zero" 2>"$work/err" && complain "a prompt with a zero byte was taken"
grep -q 'the prompt is no text: byte 1 is zero' "$work/err" || complain "a prompt with a zero byte: $(cat "$work/err")"
"$cadre" tokenize --model "$work/odd" <"$work" >/dev/null 2>"$work/err" && complain "a directory was tokenized"

run="$work/run"
expect 0 '' -- "$cadre" train --model.preset tiny --data.train "$work/text.txt" --run.directory "$run" \
    --data.vocab_size 300 --train.steps 8 --train.sample_every_steps 8
[ "$(cat "$work/out")" = "$run" ] || complain "train printed $(cat "$work/out")"
for file in config.ini metrics.jsonl samples.txt checkpoints/step-000008/config.json \
    checkpoints/step-000008/model.safetensors checkpoints/step-000008/tokenizer.json \
    checkpoints/step-000008/training/state.json; do
    [ -s "$run/$file" ] || complain "$file was not written"
done
[ "$(ls "$run/tensorboard" | wc -l)" -eq 1 ] || complain "no TensorBoard events"
expect 0 'is complete' -- "$cadre" train --config "$run/config.ini"
[ ! -e "$run/trace.json" ] || complain "train wrote a trace that nobody asked for"
expect 0 'attention grad ' -- "$cadre" train --config "$run/config.ini" --run.directory "$work/profiled" --train.steps 3 --profile
grep -q '^experts  .* GFLOP/s .*%$' "$work/err" || complain "train --profile printed no table: $(cat "$work/err")"
grep -q '^optimizer  .* GB/s .*%$' "$work/err" || complain "train --profile printed no bytes: $(cat "$work/err")"
[ "$(cat "$work/out")" = "$work/profiled" ] || complain "train --profile printed $(cat "$work/out") on stdout"
[ "$(grep -c '"name":"step","ph":"X"' "$work/profiled/trace.json")" -eq 3 ] || complain "trace.json does not hold 3 steps"
expect 0 'no step was left' -- "$cadre" train --config "$work/profiled/config.ini" --profile
expect 2 'model.hidden_size' -- "$cadre" train --config "$run/config.ini" --model.hidden_size 128

# What a run has learnt from stays what it goes on with; how it computes may change; a name may be long and odd.
odd="$work/it's & odd ; text=a"
mkdir "$odd"
cp "$work/text.txt" "$odd/text.txt"
long="$odd/text.txt,$odd/text.txt,$odd/text.txt,$odd/text.txt,$odd/text.txt,$odd/text.txt"
set -- --model.preset tiny "--data.train=$long" --data.vocab_size 300 --train.precision=fp32 --run.directory "$odd/run"
expect 1 'the same command goes on' -- "$cadre" train "$@" --train.steps=100000 --max-minutes 0.01
sed -n 's/^  cadre //p' "$work/err" >"$work/command"
saved=$(sed -n 's/^{"step":\([0-9]*\),"tokens".*/\1/p' "$odd/run/metrics.jsonl" | tail -n 1)
sed "s/--train.steps=[0-9]*/--train.steps=$saved/; s/--max-minutes 0.01//" "$work/command" >"$work/shorter"
grep -q -- "--train.steps=$saved " "$work/shorter" || complain "the command printed has no steps: $(cat "$work/command")"
expect 0 'complete' -- sh -c "'$cadre' $(cat "$work/shorter")"
expect 0 'resume ' -- "$cadre" train --config "$odd/run/config.ini" --train.steps $((saved + 2)) --run.kernels portable --run.graph no
"$cadre" train "$@" --train.steps=$((saved + 4)) >"$work/out" 2>&- || complain "train without stderr ended with $?"
[ "$(grep -vc '^{' "$odd/run/metrics.jsonl")" -eq 0 ] || complain "metrics.jsonl holds $(grep -v '^{' "$odd/run/metrics.jsonl")"
echo "A line that was not there." >>"$odd/text.txt"
expect 2 'was made of other text' -- "$cadre" train "$@" --train.steps=$((saved + 6))
rm -rf "$odd/run/data"
expect 2 'is of another text' -- "$cadre" train "$@" --train.steps=$((saved + 6))
expect 0 '' -- "$cadre" tokenize --data "$work/text.txt" --vocab-size 400 --out "$work/other"
cp -r "$run" "$work/mixed"
cp "$work/other"/* "$work/mixed/data"
expect 1 'the model knows' -- "$cadre" eval --model "$work/mixed"

# Files so short that none of their text is held out.
mkdir "$work/short"
for i in 1 2 3 4 5 6; do head -c 3000 "$work/text.txt" >"$work/short/$i.txt"; done
set -- --model.preset tiny --data.train "$work/short/*.txt" --data.vocab_size 300 --run.directory "$work/unheld"
expect 0 '' -- "$cadre" train "$@" --train.steps 4
expect 0 'resume ' -- "$cadre" train "$@" --train.steps 6

expect 0 '' -- "$cadre" generate --model "$run" --prompt 'The keeper' --max-tokens 20 --seed 3
cp "$work/out" "$work/first"
grep -q '^The keeper' "$work/first" || complain "generate did not begin with its prompt"
expect 0 '' -- "$cadre" generate --model "$run" --prompt 'The keeper' --max-tokens 20 --seed 3
cmp -s "$work/out" "$work/first" || complain "the same seed wrote another text"
expect 0 '' -- "$cadre" generate --model "$run" --prompt 'The keeper' --max-tokens 20 --seed 3 --kernels portable --json
grep -q '"precision":"fp32"' "$work/out" || complain "named kernels wrote $(cat "$work/out")"
expect 0 '' -- "$cadre" generate --model "$run" --prompt 'The keeper' --max-tokens 20 --seed 3 --precision bf16 --json
grep -q '"precision":"bf16"' "$work/out" || complain "generate in bf16 wrote $(cat "$work/out")"
expect 2 'auto, fp32 or bf16' -- "$cadre" generate --model "$run" --prompt x --precision fp8
expect 0 '' -- "$cadre" eval --model "$run" --json
grep -q '"bits_per_byte":' "$work/out" || complain "eval --json printed $(cat "$work/out")"
expect 0 '' -- "$cadre" eval --model "$run" --data "$work/text.txt" --experts
grep -q 'rows of each expert' "$work/out" || complain "eval --experts printed no table"
expect 0 '' -- "$cadre" inspect "$run"
grep -q 'goes on from\|nothing is left' "$work/out" || complain "inspect did not say what a resume would do"
expect 0 '' -- "$cadre" inspect --verify "$run"
grep -q 'every byte' "$work/out" || complain "inspect --verify did not verify"
expect 0 '' -- "$cadre" train --model.preset tiny --data.train "$work/text.txt" --run.directory "$work/islands" \
    --data.vocab_size 300 --train.steps 4 --diloco.sync_steps 2
expect 0 '' -- "$cadre" inspect --tensors "$work/islands"
grep -q '^islands  *1, each' "$work/out" || complain "inspect did not say how many islands there are"
grep -q '^  w\.model\.norm\.weight .* island-0\.safetensors' "$work/out" || complain "inspect did not list an island's weights"
expect 1 'holds neither config.json nor a checkpoint' -- "$cadre" inspect "$work"
expect 0 '' -- "$cadre" inspect --preset 4b-moe --json
grep -q '"parameters":' "$work/out" || complain "inspect --preset printed $(cat "$work/out")"
expect 0 '' -- "$cadre" tokenize --model "$run" --text 'The keeper' --json
expect 0 '' -- "$cadre" train --model.preset tiny --dry-run
grep -q 'exchange back grad' "$work/out" || complain "--dry-run printed no schedule"

# Figures, not tests: only that they come, name their roof, and that nonsense is refused.
expect 0 '' -- "$cadre" bench train --preset tiny --rounds 2 --precision fp32 --json
grep -q '"name":"train".*"roof_gflops":.*"event_ms":{' "$work/out" || complain "bench train printed $(cat "$work/out")"
expect 0 '' -- "$cadre" bench attention --rounds 1 --precision bf16 --sequence-length 64
grep -q 'backward .*% of' "$work/out" || complain "bench attention printed $(cat "$work/out")"
expect 0 '' -- "$cadre" bench train --preset tiny --rounds 2 --precision fp32 --json --peer "echo '{\"tokens_per_s\": 1000}'"
grep -q '"ratio":' "$work/out" || complain "bench --peer printed $(cat "$work/out")"
expect 0 '' -- "$cadre" bench moe --rounds 1 --precision fp32 --cases '64 experts top-8 of 128, forward'
grep -q '64 experts top-8 of 128, forward .*% of' "$work/out" && [ "$(wc -l < "$work/out")" -eq 1 ] || complain "bench --cases printed $(cat "$work/out")"
expect 0 '' -- "$cadre" bench attention --rounds 1 --precision fp32 --sequence-length 64 --cases backward
[ "$(grep -c backward "$work/out")" -eq 1 ] && [ "$(wc -l < "$work/out")" -eq 1 ] || complain "bench --cases printed $(cat "$work/out")"
expect 0 '' -- "$cadre" bench decode --preset tiny --rounds 1 --json
[ "$(grep -c '"precision":"bf16"' "$work/out")" -eq 3 ] && [ "$(wc -l < "$work/out")" -eq 6 ] || complain "bench decode printed $(cat "$work/out")"
[ "$(grep -c '"name":"decode","case":"tiny, a prompt of 255 tokens",.*"gflops":.*"roof_gflops":.*"share":.*"tokens_per_s":.*"ms_per_token":' "$work/out")" -eq 2 ] ||
    complain "bench decode printed of a prompt: $(cat "$work/out")"
[ "$(grep -c '"case":"tiny, a token after [0-9]*",.*"gb_per_s":.*"roof_gb_per_s":.*"share":.*"device":.*"tokens_per_s":.*"bytes_per_token":[1-9]' "$work/out")" -eq 4 ] ||
    complain "bench decode printed of tokens: $(cat "$work/out")"
# Two blocks of keys and values of 127 tokens more: 2 heads of 16, in four bytes.
more=$(sed -n 's/.*"precision":"fp32".*"bytes_per_token":\([0-9]*\).*/\1/p' "$work/out" | { read -r first; read -r last; echo $((last - first)); })
[ "$more" -eq $((127 * 2 * 2 * 2 * 16 * 4)) ] || complain "bench decode counted the bytes of contexts as $(cat "$work/out")"
expect 0 '' -- "$cadre" bench decode --preset tiny --rounds 1 --precision fp32 --sequence-length 40 --cases 'token after 40'
grep -q '^decode  *tiny, a token after 40 .* GB/s .*% of .* tokens/s$' "$work/out" && [ "$(wc -l < "$work/out")" -eq 1 ] ||
    complain "bench decode --cases printed $(cat "$work/out")"
expect 2 'leaves no position for a token after it: tiny has 256' -- "$cadre" bench decode --preset tiny --sequence-length 256
expect 2 'no name of a case holds "none"' -- "$cadre" bench decode --preset tiny --cases none
expect 2 'nearest known word is decode' -- "$cadre" bench decod
[ "$(awk '/^MemTotal:/ { print $2 }' /proc/meminfo)" -gt 70000000 ] || # of 93 GiB
    expect 1 'GiB of tensors of 4b-moe in fp32' -- "$cadre" bench decode --preset 4b-moe --precision fp32
expect 2 'no name of a case holds "none"' -- "$cadre" bench moe --cases none
expect 2 'no name of a case holds "none"' -- "$cadre" bench attention --cases none
expect 2 'cases is for cadre bench gemm, moe, attention and decode' -- "$cadre" bench roof --cases gemm
expect 2 'nearest known word is gemm' -- "$cadre" bench gem
expect 2 'fp32, bf16 or both' -- "$cadre" bench moe --precision fp8
expect 2 'rounds' -- "$cadre" bench roof --rounds 0
expect 1 'peer' -- "$cadre" bench train --preset tiny --rounds 1 --precision fp32 --peer false

# A damaged checkpoint is one line, and nothing is written with it.
printf 'x' | dd of="$run/checkpoints/step-000008/model.safetensors" bs=1 seek=5000 conv=notrunc 2>/dev/null
expect 1 'is damaged' -- "$cadre" generate --model "$run/checkpoints/step-000008" --prompt x

[ $failures -eq 0 ] && echo "cli: all as expected"
exit $failures
