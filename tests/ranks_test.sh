#!/bin/sh
# Several ranks as a user starts them: the same run in every layout, stopped and gone on with, killed, misconfigured, without
# room on the disk.
#   tests/ranks_test.sh PATH_TO_CADRE PATH_TO_MPIEXEC [short]
set -u
[ $# -ge 2 ] && [ -x "$1" ] && [ -x "$2" ] || { echo "usage: $0 PATH_TO_CADRE PATH_TO_MPIEXEC [short]"; exit 2; }
cadre=$(cd "$(dirname "$1")" && pwd)/$(basename "$1") mpiexec=$2 course=${3:-long}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0
tiny="--model.preset tiny --model.num_experts 6 --train.precision fp32 --train.batch_sequences 8 --run.threads 1
    --data.train $work/text.txt"
short="$tiny --train.micro_batch_sequences 4 --train.steps 12 --train.eval_every_steps 6 --checkpoint.every_steps 5 --checkpoint.keep 9"
long="$tiny --train.steps 60 --train.batch_sequences 16 --train.sequence_length 128"

# More ranks than processors, as root in a container, without MPI's remarks; leaks of MPI's own are not ours.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_btl_base_warn_component_unused=0
export ASAN_OPTIONS="${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0"
open_mpi=$("$mpiexec" --version 2>&1 | grep -c 'Open MPI\|OpenRTE')

# ---- tools -----------------------------------------------------------------------------------------------------------------

complain() {
    echo "FAILED: $1"
    failures=$((failures + 1))
}

part() {
    now=$(date +%s)
    [ -z "${part_name:-}" ] || echo "$part_name: $((now - part_begin)) s"
    part_name=$1 part_begin=$now
}

# What runs as a rank: leaves its pid in pids/RANK, and goes to its own directory where there is one, places/RANK.
cat >"$work/rank" <<EOF
#!/bin/sh
rank=\${OMPI_COMM_WORLD_RANK:-\${PMI_RANK:-0}}
echo \$\$ >"$work/pids/\$rank"
[ ! -d "$work/places/\$rank" ] || cd "$work/places/\$rank"
[ -z "\${FILE_BLOCKS:-}" ] || ulimit -f "\$FILE_BLOCKS"
exec "\$@"
EOF
chmod +x "$work/rank"
mkdir "$work/pids"

# ours N TEXT WHAT: N lines of our own on stderr, and one of them holds TEXT.
ours() {
    count=$(grep -c '^cadre' "$work/err")
    [ "$count" -eq "$1" ] || complain "$3: $count lines instead of $1: $(cat "$work/err")"
    [ -z "$2" ] || grep '^cadre' "$work/err" | grep -q -- "$2" || complain "$3 did not say \"$2\": $(cat "$work/err")"
}

# run STATUS TEXT COMMAND...: the exit status, and unless it is 0 one line that holds TEXT.
run() {
    wanted=$1 text=$2
    shift 2
    timeout -k 5 60 "$@" >"$work/out" 2>"$work/err" </dev/null
    got=$?
    [ $got -eq "$wanted" ] || complain "$* ended with $got instead of $wanted: $(cat "$work/err")"
    if [ "$wanted" -eq 0 ]; then ours 0 '' "$*"; else ours 1 "$text" "$*"; fi
}

# train N DIRECTORY WORDS...
train() {
    count=$1 directory=$2
    shift 2
    if [ "$count" -eq 1 ]; then
        run 0 '' "$cadre" train "$@" --run.directory "$work/$directory"
    else
        run 0 '' "$mpiexec" -n "$count" "$cadre" train "$@" --run.directory "$work/$directory"
    fi
}

losses() { # of a metrics.jsonl: "step loss" and "step held-out loss"
    sed -n 's/.*"step":\([0-9]*\),.*"loss":\([^,}]*\).*/\1 \2/p; s/.*"step":\([0-9]*\),"valid_loss":\([^,}]*\).*/\1v \2/p' "$1"
}

# compare DIRECTORY REFERENCE LIMIT WHAT [STEPS]: every loss and held-out loss, of the first so many steps. Later on a token whose
# experts are a close call goes another way in another layout, and from there on differences grow.
compare() {
    losses "$work/$1/metrics.jsonl" | awk -v steps="${5:-1000000}" '$1 + 0 <= steps' >"$work/a"
    losses "$work/$2/metrics.jsonl" | awk -v steps="${5:-1000000}" '$1 + 0 <= steps' >"$work/b"
    worst=$(paste -d ' ' "$work/a" "$work/b" | awk '
        $1 != $3 || !($2 > 0) || !($4 > 0) { print "other steps"; bad = 1; exit }
        { d = $2 > $4 ? $2 / $4 - 1 : $4 / $2 - 1; if (d > most) most = d }
        END { if (!bad) printf "%.1e", most }')
    [ -s "$work/a" ] || worst="other steps"
    awk -v worst="$worst" -v limit="$3" 'BEGIN { exit !(worst ~ /^[0-9]/ && worst + 0 <= limit + 0) }' ||
        complain "$4: losses differ: $worst"
    echo "$4: losses within $worst"
}

without_times() {
    sed 's/"\(step_time_ms\|tokens_per_s\|flops_share\|waited_ms\)":[^,]*,//g' "$work/$1/metrics.jsonl"
}

expect_twins() { # DIRECTORY DIRECTORY [resumed]: the same to the last bit; but a step's comm_bytes hold some of the step before
    without_times "$1" | sed "${3:+s/\"comm_bytes\":[0-9]*,//}" >"$work/a"
    without_times "$2" | sed "${3:+s/\"comm_bytes\":[0-9]*,//}" >"$work/b"
    cmp -s "$work/a" "$work/b" || complain "$1 and $2 have other metrics"
    for file in $(cd "$work/$1/checkpoints/step-000012" && find . -name '*.safetensors'); do
        one=$(sha256sum <"$work/$1/checkpoints/step-000012/$file") two=$(sha256sum <"$work/$2/checkpoints/step-000012/$file")
        [ "$one" = "$two" ] || complain "$1 and $2 have another $file"
    done
}

# begin DIRECTORY STEP WORDS...: four ranks in the background until they have taken that step.
begin() {
    directory=$1 step=$2
    shift 2
    rm -f "$work/pids"/*
    "$mpiexec" -n 4 "$work/rank" "$cadre" train "$@" --run.directory "$work/$directory" >"$work/out" 2>"$work/err" </dev/null &
    job=$!
    tries=0
    until grep -q "^{\"step\":$step," "$work/$directory/metrics.jsonl" 2>/dev/null; do
        sleep 0.03
        tries=$((tries + 1))
        if [ $tries -gt 1000 ] || ! kill -0 $job 2>/dev/null; then
            complain "step $step did not come: $(cat "$work/err")"
            break
        fi
    done
}

await_checkpoint() { # DIRECTORY: a save is done when it is done, however many steps that takes
    tries=0
    until [ -n "$(find "$work/$1/checkpoints" -maxdepth 1 -name 'step-[0-9]*' ! -name '*.*' 2>/dev/null)" ]; do
        sleep 0.03
        tries=$((tries + 1))
        [ $tries -lt 1000 ] || { complain "$1: no checkpoint came"; break; }
    done
    sleep 0.2 # and all ranks know of it
}

is_running() { # PID: and not ended without its parent having taken note
    case $(ps -o stat= -p "$1" 2>/dev/null) in '' | Z*) return 1 ;; esac
}

# end_of WHAT: the job begun ends within 30 s, with a failure, and none of its ranks stays.
end_of() {
    since=$(date +%s.%N) tries=0
    while kill -0 $job 2>/dev/null && [ $tries -lt 1000 ]; do
        sleep 0.03
        tries=$((tries + 1))
    done
    seconds=$(echo "$since $(date +%s.%N)" | awk '{ printf "%.2f", $2 - $1 }')
    [ $tries -lt 1000 ] || { complain "$1: the job does not end"; kill -9 $job; }
    wait $job
    got=$?
    [ $got -ne 0 ] || complain "$1: ended with 0"
    for file in "$work/pids"/*; do
        tries=0
        while is_running "$(cat "$file")" && [ $tries -lt 100 ]; do
            sleep 0.03
            tries=$((tries + 1))
        done
        [ $tries -lt 100 ] || complain "$1: rank ${file##*/} is still there"
    done
    echo "$1: ended with $got after $seconds s"
}

# expect_told RANK: MPICH's starter may end the others before they can tell, and says so itself.
expect_told() {
    if [ "$open_mpi" -eq 0 ] && ! grep -q '^cadre' "$work/err" && grep -q 'BAD TERMINATION' "$work/err"; then
        echo "kill -9 of rank $1: told by the starter only"
        return
    fi
    ours 1 "^cadre train: rank $1 (pid $(cat "$work/pids/$1") on host .*) is gone; the same command goes on from " "kill -9"
    path=$(sed -n 's/^cadre train: .* goes on from //p' "$work/err")
    [ -d "$path" ] || complain "the checkpoint to go on from is not there: $path"
}

expect_saved() { # WHAT
    ours 1 'interrupted' "$1"
    [ "$(grep -c 'stopped and saved' "$work/err")" -eq 1 ] || complain "$1: $(cat "$work/err")"
    saved=$(sed -n 's/^stopped and saved at step \([0-9]*\) .*/\1/p' "$work/err")
    [ -d "$work/killed/checkpoints/$(printf 'step-%06d' "${saved:-0}")" ] || complain "$1: nothing was saved"
}

number() { # KEY in a JSON object read
    sed -n "s/.*\"$1\":\([0-9.e+-]*\).*/\1/p"
}

i=0
while [ $i -lt 1500 ]; do
    echo "The keeper of lamp number $i walks along the harbour, and the river waits $((i * 7919 % 1000)) days."
    [ $((i % 6)) -ne 5 ] || echo
    i=$((i + 1))
done >"$work/text.txt"

# ---- the same run in every layout ------------------------------------------------------------------------------------------

# shellcheck disable=SC2086 # lists of words, here and below
layout() { # N WORDS
    train "$1" "layout" $short $2
    compare layout one 1e-5 "$1 ranks, $2"
    rm -rf "$work/layout"
}

part layouts
# shellcheck disable=SC2086
train 1 one $short
if [ "$course" = long ]; then
    layout 2 "--layout.replicate 2 --layout.zero 0"
    layout 3 "--layout.expert 3 --layout.zero 3"
    layout 4 "--layout.expert 4 --layout.zero 1"
    layout 6 "--layout.shard 3 --layout.expert 2 --layout.zero 2"
    layout 8 "--layout.replicate 2 --layout.shard 2 --layout.expert 2 --layout.zero 3"
    [ "$(grep -c '^warning: .* leave 4 of 8 ranks without work' "$work/err")" -eq 1 ] || complain "8 ranks: $(cat "$work/err")"
fi
# shellcheck disable=SC2086
train 4 four $short --layout.shard 2 --layout.expert 2 --layout.zero 3
compare four one 1e-5 "4 ranks, --layout.shard 2 --layout.expert 2 --layout.zero 3"
# shellcheck disable=SC2086
train 4 twin $short --layout.shard 2 --layout.expert 2 --layout.zero 3
expect_twins four twin

# ---- stopped with four, gone on with three, then one -----------------------------------------------------------------------

part elastic
rm -rf "$work/twin/checkpoints/step-000010" "$work/twin/checkpoints/step-000012"
# shellcheck disable=SC2086
train 3 twin $short --layout.shard 3
grep -q 'resume  from .*step-000005' "$work/err" || complain "three ranks did not go on from step 5: $(cat "$work/err")"
rm -rf "$work/twin/checkpoints/step-000012"
# shellcheck disable=SC2086
train 1 twin $short
grep -q 'resume  from .*step-000010' "$work/err" || complain "one rank did not go on from step 10: $(cat "$work/err")"
compare twin one 1e-5 "4 ranks, from step 5 on 3, from step 10 on 1"
run 0 '' "$cadre" generate --model "$work/four" --prompt 'The keeper' --max-tokens 10
grep -q '^The keeper' "$work/out" || complain "generate from a checkpoint of four ranks wrote $(cat "$work/out")"
run 0 '' "$cadre" eval --model "$work/four" --json
number loss <"$work/out" >"$work/a"
losses "$work/four/metrics.jsonl" | sed -n 's/^12v //p' >>"$work/a"
awk '{ v[NR] = $1 } END { d = v[1] / v[2] - 1; exit !(NR == 2 && d < 1e-5 && d > -1e-5) }' "$work/a" ||
    complain "eval of a checkpoint of four ranks: $(cat "$work/a")"

# ---- gone on with below stage 3, where some rows are whole on every rank --------------------------------------------------------

part again
for way in "--layout.expert 2 --layout.zero 1" "--layout.replicate 2 --layout.zero 0"; do
    # shellcheck disable=SC2086
    {
        train 2 whole $short $way
        train 2 parted $short $way
        rm -rf "$work/parted/checkpoints/step-000010" "$work/parted/checkpoints/step-000012"
        train 2 parted $short $way
    }
    grep -q 'resume  from .*step-000005' "$work/err" || complain "$way: did not go on from step 5: $(cat "$work/err")"
    expect_twins whole parted resumed
    rm -rf "$work/whole" "$work/parted"
done

# ---- islands ---------------------------------------------------------------------------------------------------------------

part islands
meet="$short --diloco.replicas 2 --diloco.sync_steps 4" # sent after 4, 6, 8, ..., applied a step later; saved in between
meet="$meet --diloco.fragments 2 --checkpoint.every_steps 4 --train.verify_steps 4 --train.batch_sequences 12 --train.micro_batch_sequences 6"
# shellcheck disable=SC2086
{
    train 2 isles $meet
    train 2 again $meet
    expect_twins isles again
    [ "$(grep -c '"event":"outer"' "$work/isles/metrics.jsonl")" -eq 4 ] || complain "islands: $(grep outer "$work/isles/metrics.jsonl")"
    rm -rf "$work/again/checkpoints/step-000012" "$work/again/checkpoints/step-000008"
    train 2 again $meet # a fragment was sent after the fourth step, and is mixed in after the fifth
    grep -q 'resume  from .*step-000004' "$work/err" || complain "islands did not go on from step 4: $(cat "$work/err")"
    expect_twins isles again
    rm -rf "$work/again/checkpoints/step-000012" "$work/again/checkpoints/step-000008"
    train 6 again $meet --diloco.replicas 3 --layout.shard 2
    rm -rf "$work/again/checkpoints/step-000012"
    train 1 again $meet --diloco.replicas 1
    rm -rf "$work/again/checkpoints/step-000012"
    train 1 again $short --checkpoint.every_steps 4 --train.batch_sequences 12 --train.micro_batch_sequences 6
    grep -q 'resume  from .*step-000008' "$work/err" || complain "one island's run did not go on without islands: $(cat "$work/err")"
    train 4 squares $meet --layout.shard 2
    compare squares isles 1e-3 "two islands of two ranks, beside two of one"
    run 0 '' "$cadre" eval --model "$work/isles" --json
    number loss <"$work/out" >"$work/a"
    losses "$work/isles/metrics.jsonl" | sed -n 's/^12v //p' >>"$work/a"
    awk '{ v[NR] = $1 } END { d = v[1] / v[2] - 1; exit !(NR == 2 && d < 1e-5 && d > -1e-5) }' "$work/a" ||
        complain "eval of the weights that islands share: $(cat "$work/a")"
    begin killed 6 $long --diloco.replicas 2 --diloco.sync_steps 4 --diloco.fragments 2 --layout.shard 2
    kill -TERM "$(cat "$work/pids/3")" # of the second island
    end_of "SIGTERM to the second island"
    expect_saved "SIGTERM to the second island"
    begin killed 20 $long --diloco.replicas 2 --diloco.sync_steps 4 --diloco.fragments 2 --layout.shard 2
    kill -9 "$(cat "$work/pids/2")"
    end_of "kill -9 in the second island"
    expect_told 2
    rm -rf "$work/killed"
}

# ---- a rank is killed, or asked to stop ------------------------------------------------------------------------------------

part stopped
# shellcheck disable=SC2086
if [ "$course" = long ]; then
    begin killed 3 $long --layout.shard 2 --layout.expert 2
    kill -TERM "$(cat "$work/pids/2")"
    end_of "SIGTERM to rank 2"
    expect_saved "SIGTERM to rank 2"
    begin killed 12 $long --layout.shard 4
    kill -USR1 $job
    end_of "SIGUSR1 to $(basename "$mpiexec")"
    expect_saved "SIGUSR1"
    if [ "$open_mpi" -gt 0 ]; then # it waits so long before the signal, and as long again before it kills
        export OMPI_MCA_odls_base_sigkill_timeout=5
        begin killed 20 $long --train.steps 100000 --checkpoint.every_steps 1000
        kill -TERM $job
        end_of "SIGTERM to $(basename "$mpiexec")"
        expect_saved "SIGTERM to $(basename "$mpiexec")"
        unset OMPI_MCA_odls_base_sigkill_timeout
        rm -rf "$work/killed"
    fi
fi

# shellcheck disable=SC2086
run 1 interrupted "$mpiexec" -n 2 "$cadre" train $long --train.steps 100000 --max-minutes 0.03 --run.directory "$work/killed"
expect_saved "--max-minutes"
rm -rf "$work/killed"

part killed
killed="$long --train.steps 240" # on a fast machine the first one is far on before it is killed
# shellcheck disable=SC2086
begin killed 18 $killed --layout.shard 2 --layout.expert 2
await_checkpoint killed
kill -9 "$(cat "$work/pids/2")"
end_of "kill -9 of rank 2"
expect_told 2
# shellcheck disable=SC2086
if [ "$course" = long ]; then
    said=$(sed -n 's/^{"step":\([0-9]*\),.*/\1/p' "$work/killed/metrics.jsonl" | tail -n 1)
    begin killed $((said + 3)) $killed --layout.shard 4 --layout.zero 3
    kill -9 "$(cat "$work/pids/0")"
    end_of "kill -9 of rank 0"
    expect_told 0
    train 4 killed $killed --layout.shard 2 --layout.expert 2
    train 1 alone $killed
    compare killed alone 1e-4 "twice killed and gone on with" 150
    rm -rf "$work/killed" "$work/alone"
fi

# ---- ranks that do not fit together ----------------------------------------------------------------------------------------

# refused STATUS TEXT WORDS...: of mpiexec; before anything is written.
refused() {
    status=$1 text=$2
    shift 2
    run "$status" "$text" "$mpiexec" "$@"
    [ ! -e "$work/none" ] || complain "$*: something was written"
    rm -rf "$work/none"
}

part refused
into="--run.directory $work/none"
# shellcheck disable=SC2086
{
    refused 2 'rank 1 has other settings than rank 0' -n 1 "$cadre" train $short $into : -n 3 "$cadre" train $short $into --optim.lr 0.5
    refused 2 'rank 2: .*unknown key optim.lrr' -n 2 "$cadre" train $short $into : -n 1 "$cadre" train $short $into --optim.lrr 1
    refused 2 'run.timeout_seconds is 0 or at least 1' -n 2 "$cadre" train $short $into --run.timeout_seconds 0.5
    refused 2 '--max-minutes is at least 0' -n 2 "$cadre" train $short $into --max-minutes=-1
    refused 2 'unknown flag --nope' -n 4 "$cadre" train $short $into --nope
    refused 2 'rank 1: its --help' -n 1 "$cadre" train $short $into : -n 1 "$cadre" train --help
    refused 2 'layout.shard 3 does not divide the 4 ranks started; possible: --layout.shard 4' -n 4 "$cadre" train $short $into --layout.shard 3
    refused 2 'layout.expert 4, but the model has 3 experts; possible: ' -n 4 "$cadre" train $short $into \
        --model.num_experts 3 --layout.expert 4
    meet="$short --diloco.replicas 2"
    refused 2 'they never meet: set --diloco.sync_steps' -n 2 "$cadre" train $meet $into
    meet="$meet --diloco.sync_steps 10"
    refused 2 '3 ranks cannot make diloco.replicas 2 islands of the same size; start 2' -n 3 "$cadre" train $meet $into
    refused 2 'diloco.overlap_steps 5: a fragment must have arrived' -n 2 "$cadre" train $meet $into --diloco.fragments 2 --diloco.overlap_steps 5
    refused 2 'diloco.fragments 9: the model has 2 blocks.*at most 3' -n 2 "$cadre" train $meet $into --diloco.fragments 9
    refused 2 'is not a multiple of diloco.replicas 3' -n 3 "$cadre" train $meet $into --diloco.replicas 3
    refused 2 'layout.zero 0 has every rank of an island send' -n 4 "$cadre" train $meet $into --layout.zero 0
    refused 2 'diloco.outer_lr 0 would never move' -n 2 "$cadre" train $meet $into --diloco.outer_lr 0
    refused 2 'rank 1 has other settings than rank 0' -n 1 "$cadre" train $meet $into : -n 1 "$cadre" train $meet $into --diloco.wire fp8
    refused 0 '' -n 3 "$cadre" train --help
    [ "$(grep -c -- '--layout.expert' "$work/out")" -eq 1 ] || complain "--help of three ranks is not printed once"
    refused 0 '' -n 2 "$cadre" train $short $into --dry-run --ranks 8 --layout.shard 2 --layout.expert 2
    cp "$work/out" "$work/a"
    run 0 '' "$cadre" train $short $into --dry-run --ranks 8 --layout.shard 2 --layout.expert 2
    cmp -s "$work/out" "$work/a" || complain "--dry-run is another when two ranks are started"
    grep -q '8 ranks: replicate 2 x shard 2 x expert 2' "$work/out" || complain "--dry-run prints no mesh: $(cat "$work/out")"
}

part places
mkdir -p "$work/places/0" "$work/places/1"
# shellcheck disable=SC2086
run 1 'rank 1: .*No such file.*must be on a file system that all ranks share' "$mpiexec" -n 2 "$work/rank" "$cadre" train $short --run.directory here
echo "Another text. Nothing of it is in the first one, and it is learnt from by nobody but the second rank." >"$work/other.txt"
for i in 1 2 3 4 5 6; do cat "$work/other.txt" "$work/other.txt" >"$work/a" && cp "$work/a" "$work/other.txt"; done
# shellcheck disable=SC2086
train 1 places/1/here $short --data.train "$work/other.txt" --train.steps 1
# shellcheck disable=SC2086
run 2 'rank 1 has other data than rank 0' "$mpiexec" -n 2 "$work/rank" "$cadre" train $short --run.directory here
[ ! -e "$work/places/0/here/checkpoints" ] || complain "other data: a checkpoint was written"
rm -rf "$work/places"

# ---- no room for a checkpoint ----------------------------------------------------------------------------------------------

part "full disk"
if [ "$open_mpi" -gt 0 ]; then # others keep large files of their own
    # shellcheck disable=SC2086
    run 1 'model.safetensors.*File too large' env FILE_BLOCKS=400 OMPI_MCA_btl=self,tcp "$mpiexec" -n 4 "$work/rank" "$cadre" train \
        $short --train.steps 17 --layout.shard 2 --layout.expert 2 --run.directory "$work/four"
    [ "$(ls "$work/four/checkpoints" | tail -n 1)" = step-000012 ] ||
        complain "full disk: there are $(ls "$work/four/checkpoints")"
    # shellcheck disable=SC2086
    train 4 four $short --train.steps 17 --layout.shard 4
    grep -q 'resume  from .*step-000012' "$work/err" || complain "full disk: the checkpoint before is not resumed from"
fi

# ---- memory ----------------------------------------------------------------------------------------------------------------

if [ "$course" = long ]; then
    part memory
    wide="$tiny --model.num_hidden_layers 8 --model.num_experts 32 --model.moe_intermediate_size 256 --train.steps 2
        --train.eval_every_steps 0 --train.eval_tokens 512 --json --quiet"
    # shellcheck disable=SC2086
    train 1 wide1 $wide
    whole=$(number peak_bytes <"$work/out")
    # shellcheck disable=SC2086
    train 4 wide4 $wide --layout.shard 4 --layout.zero 3
    share=$(number peak_bytes <"$work/out")
    rm -rf "$work/wide1" "$work/wide4"
    awk -v whole="$whole" -v share="$share" 'BEGIN {
        printf "peak of one rank %.0f MiB, of each of four %.0f MiB: %.2f\n", whole / 1048576, share / 1048576, share / whole
        exit !(share > 0 && share < 0.5 * whole) }' || complain "four ranks take as much memory as one"
fi

part end
[ $failures -eq 0 ] && echo "ranks: all as expected"
exit $failures
