#!/bin/sh
# cadre launch with commands that only pretend: they fail, refuse, hang, leave processes behind, or use fewer ranks.
#   tests/supervisor_test.sh PATH_TO_CADRE
set -u
[ $# -eq 1 ] && [ -x "$1" ] || { echo "usage: $0 PATH_TO_CADRE"; exit 2; }
cadre=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0
run=$work/run

complain() {
    echo "FAILED: $1"
    failures=$((failures + 1))
}

fresh() {
    rm -rf "$run" "$work/count" "$work/left" "$work/words"
    mkdir -p "$run/checkpoints"
}

# launch STATUS TEXT OPTIONS... -- COMMAND: its exit status, and TEXT in what it says; one line of failure at most.
launch() {
    wanted=$1 text=$2
    shift 2
    timeout -k 5 60 "$cadre" launch --pause 0.02 "$@" >"$work/out" 2>"$work/err" </dev/null
    got=$?
    [ $got -eq "$wanted" ] || complain "$* ended with $got instead of $wanted: $(cat "$work/err")"
    [ -z "$text" ] || grep -q -- "$text" "$work/err" || complain "$* did not say \"$text\": $(cat "$work/err")"
    lines=$(grep -c '^cadre launch:' "$work/err")
    [ "$lines" -eq $((wanted != 0)) ] || complain "$*: $lines lines of failure: $(cat "$work/err")"
}

attempts() { # how many there were
    wc -l <"$work/count"
}

expect() { # TEXT IS WANTED
    [ "$2" = "$3" ] || complain "$1: $2 instead of $3"
}

events() { # of launch.jsonl, by name
    sed -n 's/.*"event":"\([^"]*\)".*/\1/p' "$run/launch.jsonl" | tr '\n' ' '
}

is_running() {
    case $(ps -o stat= -p "$1" 2>/dev/null) in '' | Z*) return 1 ;; esac
}

# job BODY: a command that counts its calls ($n) and knows $run and $work.
job() {
    cat >"$work/job" <<JOB
#!/bin/sh
run=$run work=$work
echo "\$*" >>"$work/count"
n=\$(wc -l <"$work/count")
$1
JOB
    chmod +x "$work/job"
}

# ---- failing and succeeding --------------------------------------------------------------------------------------------------

fresh
job '[ $n -ge 4 ]'
launch 0 'exit status 1 after' --directory "$run" -- "$work/job"
expect "attempts of a job that fails three times" "$(attempts)" 4
expect "its events" "$(events)" "start end start end start end start end "
sed -n 2p "$run/launch.jsonl" | grep -q '"attempt":1,"ranks":null,"step":null,"exit_status":1,"seconds":' || complain "$(cat "$run/launch.jsonl")"

fresh
job 'exit 1'
launch 1 '4 failures without progress, no checkpoint yet; the last: exit status 1' --restarts 3 --directory "$run" -- "$work/job"
expect "attempts of one that always fails" "$(attempts)" 4

fresh # each attempt gets further, so that three failures in a row are none too many
job 'mkdir $run/checkpoints/step-00000$n $run/checkpoints/step-000999.tmp-1; [ $n -ge 6 ]'
launch 0 'newest checkpoint step 5; again in 0.02 s' --restarts 0 --directory "$run" -- "$work/job"
expect "attempts of one that makes progress" "$(attempts)" 6

fresh
job 'kill -9 $$'
launch 1 'signal 9 (Killed)' --restarts 1 --directory "$run" -- "$work/job"
grep -q '"signal":9' "$run/launch.jsonl" || complain "no signal in $(cat "$run/launch.jsonl")"

fresh
job 'exit 2'
launch 2 'exit status 2, a mistake in the call' --directory "$run" -- "$work/job"
expect "attempts of a mistake in the call" "$(attempts)" 1

# ---- where the run is --------------------------------------------------------------------------------------------------------

fresh
job 'exit 0'
launch 0 '' -- "$work/job" train --run.directory="$run"
[ -s "$run/launch.jsonl" ] || complain "--run.directory= of the command is not found"
rm "$run/launch.jsonl"
printf '[run]\ndirectory = %s\n' "$run" >"$work/run.ini"
launch 0 '' -- "$work/job" train --config "$work/run.ini"
[ -s "$run/launch.jsonl" ] || complain "the directory in the command's --config is not found"

# ---- bad calls ---------------------------------------------------------------------------------------------------------------

launch 2 'no command' --restarts 2
launch 2 'no command' --restarts 2 --
launch 2 'unknown flag --restart; the nearest known one is --restarts' --restart 2 -- true
launch 2 'must be a number' --restarts few -- true
launch 2 'name it: --directory' -- true
launch 2 'cannot start .*/none' --directory "$run" -- "$work/none"
launch 2 'has no -n N' --directory "$run" --min-ranks 2 -- true
launch 2 'more than the 4 ranks' --directory "$run" --min-ranks 5 -- mpirun -n 4 true
launch 2 'wants --ranks N' --directory "$run" -- true '{ranks}'
launch 2 'wants --hosts FILE' --directory "$run" -- true '{hosts}'
launch 2 'wants {hosts}' --directory "$run" --hosts "$work/job" -- true
launch 2 'hosts.none.*No such file' --directory "$run" --hosts "$work/hosts.none" -- true '{hosts}'
echo 'node1/slots=3' >"$work/hosts"
launch 2 'hosts line 1: "node1/slots=3"' --directory "$run" --hosts "$work/hosts" -- true '{hosts}'
printf 'node1 slots=2\n$(reboot)\n' >"$work/hosts"
launch 2 'hosts line 2' --directory "$run" --hosts "$work/hosts" -- true '{hosts}'

# ---- fewer ranks -------------------------------------------------------------------------------------------------------------

fresh # fails with 8, is refused with 7, runs with 6; the job is called mpirun
job 'case $2 in 8) exit 1 ;; 7) exit 2 ;; esac'
mv "$work/job" "$work/mpirun"
launch 0 '7 ranks do not fit; trying 6' --min-ranks 4 --directory "$run" -- nice -n 1 "$work/mpirun" -n 8 x
expect "ranks tried" "$(cut -d ' ' -f 2 "$work/count" | tr '\n' ' ')" "8 8 7 6 "

fresh
job 'exit 1'
launch 1 'failures without progress' --restarts 3 --directory "$run" -- "$work/job" --ntasks=8
expect "without --min-ranks" "$(tr '\n' ' ' <"$work/count")" "--ntasks=8 --ntasks=8 --ntasks=8 --ntasks=8 "
fresh
job '[ $1 = x3y ]'
launch 0 '' --ranks 4 --min-ranks 2 --directory "$run" -- "$work/job" 'x{ranks}y'
expect "{ranks}" "$(tr '\n' ' ' <"$work/count")" "x4y x4y x3y "
fresh
job '[ $n -lt 3 ] || exit 2; exit 1'
launch 2 'no number of ranks from here down to 3' --ranks 4 --min-ranks 3 --directory "$run" -- "$work/job" '{ranks}'

# ---- hosts -------------------------------------------------------------------------------------------------------------------

fresh # b does not answer at the second start
printf '# the machines\na slots=2\nb:3\nc\n' >"$work/hosts"
job 'cp "$2" "$work/hosts.$n"; touch "$work/down"; [ $n -ge 2 ]'
rm -f "$work/down"
launch 0 'b does not answer' --hosts "$work/hosts" --min-ranks 2 --probe "[ {host} != b ] || [ ! -e $work/down ]" --directory "$run" -- \
    "$work/job" '{ranks}' '{hosts}'
expect "slots of those that answer" "$(cut -d ' ' -f 1 "$work/count" | tr '\n' ' ')" "6 3 "
expect "host file" "$(tr '\n' ' ' <"$work/hosts.2")" "a slots=2 c "
fresh
launch 1 'slots on the hosts that answer, 6 wanted' --restarts 2 --hosts "$work/hosts" --probe '[ {host} = a ]' --directory "$run" -- \
    "$work/job" '{ranks}' '{hosts}'
[ ! -e "$work/count" ] || complain "started on too few hosts"

# ---- signals and what stays ----------------------------------------------------------------------------------------------------

# begin OPTIONS: in the background, until the job has begun.
begin() {
    timeout -k 5 60 "$cadre" launch --pause 0.02 --directory "$run" "$@" >"$work/out" 2>"$work/err" </dev/null &
    guard=$!
    tries=0
    while [ ! -s "$work/left" ] && [ $tries -lt 500 ]; do
        sleep 0.02
        tries=$((tries + 1))
    done
    supervisor=$(ps -o pid= --ppid $guard | tr -d ' ')
}

ended() { # WHAT STATUS SECONDS
    since=$(date +%s)
    wait $guard
    got=$?
    [ $got -eq "$2" ] || complain "$1: ended with $got instead of $2: $(cat "$work/err")"
    [ $(($(date +%s) - since)) -le "$3" ] || complain "$1: took longer than $3 s"
    sleep 0.1
    for pid in $(cat "$work/left"); do
        ! is_running "$pid" || complain "$1: process $pid is still there"
    done
}

fresh # a job that saves and leaves
job 'trap "mkdir $run/checkpoints/step-000007; exit 1" TERM; echo $$ >$work/left; while :; do sleep 0.05; done'
begin -- "$work/job"
kill -TERM "$supervisor"
ended "SIGTERM" 1 5
grep -q 'stopped, newest checkpoint step 7; the same command goes on' "$work/err" || complain "SIGTERM: $(cat "$work/err")"
expect "attempts after SIGTERM" "$(attempts)" 1

fresh # one that ignores it, stopped twice
job 'trap "" TERM USR1; sleep 50 & echo $$ $! >$work/left; while :; do sleep 1; done'
begin -- "$work/job"
kill -USR1 "$supervisor"
sleep 0.3
kill -TERM "$supervisor"
ended "two signals to a job that ignores them" 1 10

fresh # during the pause
job 'echo $$ >$work/left; exit 1'
timeout -k 5 60 "$cadre" launch --pause 30 --directory "$run" -- "$work/job" >"$work/out" 2>"$work/err" </dev/null &
guard=$!
tries=0
until grep -q 'again in 30 s' "$work/err" || [ $tries -gt 500 ]; do
    sleep 0.02
    tries=$((tries + 1))
done
kill -TERM "$(ps -o pid= --ppid $guard | tr -d ' ')"
ended "SIGTERM between two attempts" 1 5

fresh # what a failed job leaves: another group, another session, one that is stopped, one that ignores SIGTERM
job 'setsid sleep 50 & echo $! >$work/left; (trap "" TERM; echo $(sh -c "echo \$PPID") >>$work/left; while :; do sleep 1; done) &
    sleep 50 & echo $! >>$work/left; kill -STOP $!; (setsid sh -c "sleep 50 & echo \$! >>$work/left" &); sleep 0.3; exit 1'
launch 1 'failures without progress' --restarts 0 --directory "$run" -- "$work/job"
expect "left behind" "$(wc -l <"$work/left")" 4
for pid in $(cat "$work/left"); do
    ! is_running "$pid" || complain "a failed job left process $pid"
    ! ps -o stat= -p "$pid" | grep -q Z || complain "process $pid is a zombie"
done

fresh # the supervisor is killed
job 'echo $$ >$work/left; while :; do sleep 0.05; done'
begin -- "$work/job"
kill -9 "$supervisor"
ended "kill -9 of the supervisor" 137 5 2>/dev/null

[ $failures -eq 0 ] && echo "supervisor: all as expected"
exit $failures
