#!/bin/sh
# A Taskwire worker in sh and curl. Put your work into `run`; CODEBASES=my-project CAPABILITIES=build ./worker.sh
# The open stream keeps its claims alive, however long `run` takes.
run() { printf '{"bytes":%d}' "$(wc -c)"; } # the task's JSON on stdin, a JSON result on stdout; non-zero: failed
server=${TASKWIRE_SERVER:-http://127.0.0.1:8000} me=${WORKER_ID:-$(uname -n)-$$-$(date +%s)} answer=$(mktemp)
ask() { # $1 path, $2 fields. Until there is an answer: claim_id and claim_epoch make it safe to repeat.
  until code=$(printf '{"worker_id":"%s",%s}' "$me" "$2" | curl -s -m 30 --retry 5 -o "$answer" -w '%{http_code}' \
    -H 'Content-Type: application/json' --data-binary @- "$server/v1/tasks/$1") && [ "$code" -lt 500 ]; do sleep 3; done
}
take() {
  ask "$1/claim" "\"claim_id\":\"$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')\""
  [ "$code" = 200 ] || return 0 # most often 409: somebody was faster
  fence=\"claim_epoch\":$(grep -Eo '"([^"\\]|\\.)*"|[][{}]|[0-9]+' "$answer" | awk '/^[[{]/ {d++} /^[]}]/ {d--}
    d == 1 && key == "\"claim_epoch\"" && /^[0-9]/ {print; exit} {key = $0}') # d == 1: metadata may have such a key, too
  if result=$(run <"$answer"); then ask "$1/complete" "$fence,\"result\":$result"; else code=500; fi
  case $code in 200 | 404 | 409) ;; *) ask "$1/fail" "$fence,\"error\":\"run failed\"" ;; esac
}
bye() { curl -s -m 5 -o "$answer" -X POST "$server/v1/agent/workers/$me/unregister"; }
trap 'kill $!; bye; rm "$answer"' EXIT; trap 'exit 0' INT TERM; bye # what a crashed namesake held is free again
while :; do # curl gives up after 65 s without a byte; the keepalives come every 30 s
  curl -fsSN -y 65 -Y 1 -H "X-Codebases: $CODEBASES" -H "X-Capabilities: $CAPABILITIES" \
    "$server/v1/worker/tasks/stream?worker_id=$me" </dev/null | { while IFS= read -r line; do case $line in
      'event: '*) event=${line#event: } ;;
      'data: '*'"reconnect":false'*) if [ "$event" = error ]; then echo "$line" >&2; exit 3; fi ;;
      'data: '*'"task_id":"'*) id=${line##*\"task_id\":\"}; if [ "$event" = task_available ]; then take "${id%%\"*}"; fi ;;
    esac; done; [ -n "$event" ]; } & wait $!
  case $? in 0) delay=1 ;; 3) trap - EXIT; exit 1 ;; *) delay=$((${delay:-1} < 40 ? ${delay:-1} * 2 : 60)) ;; esac
  sleep "$delay" & wait $!
done
