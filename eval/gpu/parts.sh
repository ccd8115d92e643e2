# The parts of run.sh, each with a time limit and a log. A part that fails or hangs does not stop the others.
# Needs WORK (a separate folder), OUT, BUDGET (seconds for all parts together) and PYTHON; times are SECONDS since start.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
GRACE=5 # seconds to end in, after the limit

left() { echo $((BUDGET - SECONDS)); }

note() { # NAME STATUS SECONDS LIMIT WHY
    printf '%s\t%s\t%s\t%s\t%s\n' "$@" >>"$WORK/parts.tsv"
    echo "run: $1: $2${5:+ ($5)}, $3 s of $4" >&2
}

# part NAME LIMIT COMMAND...: writes its output to $WORK/parts/NAME/log, and may write results to $WORK/parts/NAME/*.json.
part() {
    local name=$1 limit=$2 began=$SECONDS code=0 took
    shift 2
    mkdir -p "$WORK/parts/$name"
    if ((limit > $(left))); then limit=$(left); fi
    if ((limit < 3)); then
        note "$name" skipped 0 "$limit" "no time was left"
        return 0
    fi
    # In a separate shell, which cannot print that a process was killed.
    (
        timeout --signal=INT --kill-after=$GRACE "$limit" "$@" >"$WORK/parts/$name/log" 2>&1 </dev/null
        exit $?
    ) 2>/dev/null || code=$?
    took=$((SECONDS - began))
    case $code in
        0) note "$name" ok $took "$limit" "" ;;
        124 | 137) if ((took >= limit)); then
                note "$name" "time limit" $took "$limit" ""
            else
                note "$name" failed $took "$limit" "exit status $code"
            fi ;;
        *) note "$name" failed $took "$limit" "exit status $code" ;;
    esac
    gather
}

skip() { # NAME WHY
    note "$1" skipped 0 0 "$2"
}

# Collects the results so far in few files, so that a run that is ended from outside leaves them.
gather() {
    "$PYTHON" "$here/summary.py" "$WORK" "$OUT" >/dev/null || echo "run: no summary could be written" >&2
}
