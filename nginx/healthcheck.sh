#!/bin/sh
# Whether this instance answers, for Docker's HEALTHCHECK. Any answer of the admin listener counts:
# it comes from a worker. Works with what both base images have.
listen=${TIDEGATE_ADMIN_LISTEN:-127.0.0.1:8081}
scheme=http
[ -z "${TIDEGATE_ADMIN_TLS_CERT:-}" ] || scheme=https

case $listen in
    unix:*)
        set -- --unix-socket "${listen#unix:}" "$scheme://localhost/healthz"
        ;;
    *)
        port=${listen##*:}
        host=${listen%"$port"}
        host=${host%:}
        case $host in
            '' | '*' | 0.0.0.0) host=127.0.0.1 ;;
            '[::]') host='[::1]' ;;
        esac
        set -- "$scheme://$host:$port/healthz"
        ;;
esac

if command -v curl >/dev/null; then
    exec curl --silent --insecure --max-time 3 --output /dev/null "$@"
fi
if [ "$scheme" = http ] && [ -n "${port:-}" ] && command -v bash >/dev/null; then
    host=${host#[}
    exec timeout 3 bash -c '
        exec 3<>"/dev/tcp/$0/$1" || exit 1
        printf "GET /healthz HTTP/1.0\r\n\r\n" >&3
        read -r line <&3
        case $line in HTTP/*) exit 0 ;; *) exit 1 ;; esac
    ' "${host%]}" "$port"
fi
# Neither: the master at least has to be alive.
exec kill -0 "$(cat "${TIDEGATE_RUN_DIR:-/run/tidegate}/nginx.pid")"
