#!/bin/sh
# Stands in for the OCI runtime in the tests of the owner of a container.
while [ $# -gt 0 ]; do
    case $1 in
        --root) shift; bundle=${1%/state/test} ;;
        --log | --log-format | --bundle | --process) shift ;;
        --pid-file) shift; pid_file=$1 ;;
        create | start | exec | kill | pause | resume | update | delete) verb=$1 ;;
    esac
    id=$1
    shift
done
echo "$verb" >>"$bundle/calls"
case $verb in
    create)
        mkfifo "$bundle/go"
        (read -r _ <"$bundle/go"; . "$bundle/does") </dev/null >/dev/null 2>&1 &
        echo $! >"$pid_file" ;;
    start)
        echo >"$bundle/go"
        [ -e "$bundle/start-late" ] && . "$bundle/start-late" ;;
    exec)
        (. "$bundle/exec-does") </dev/null >/dev/null 2>&1 &
        echo $! >"$pid_file" ;;
    pause) [ -e "$bundle/pause-does" ] && . "$bundle/pause-does" ;;
esac
exit 0
