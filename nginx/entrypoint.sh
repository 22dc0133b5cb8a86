#!/bin/sh
# Starts the OpenResty side of Tidegate: finds the binary (OpenResty's, or Debian's nginx with its
# Lua module), writes the configuration for this machine into the run directory, and becomes nginx.
#
# It works as any user, with a read-only root file system, and from a plain checkout. All that is
# set by the environment is listed in docs/data-plane.md.
set -eu

fail() {
    echo "tidegate: $*" >&2
    exit 1
}

say() {
    echo "tidegate: $*" >&2
}

home=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
run=${TIDEGATE_RUN_DIR:-/run/tidegate}
state=${TIDEGATE_STATE_DIR:-/var/lib/tidegate}
conf_dir=${TIDEGATE_CONF_DIR:-/etc/tidegate/conf.d}
admin_listen=${TIDEGATE_ADMIN_LISTEN:-127.0.0.1:8081}
token_file=${TIDEGATE_ADMIN_TOKEN_FILE:-}
session_secret_file=${TIDEGATE_SESSION_SECRET_FILE:-}
tls_cert=${TIDEGATE_ADMIN_TLS_CERT:-}
tls_key=${TIDEGATE_ADMIN_TLS_KEY:-}
tls_client_ca=${TIDEGATE_ADMIN_TLS_CLIENT_CA:-}
lease_ttl=${TIDEGATE_LEASE_TTL:-5}
dict_size=${TIDEGATE_DICT_SIZE:-64m}
workers=${TIDEGATE_WORKERS:-auto}
http_port=${TIDEGATE_HTTP_PORT:-80}
worker_connections=${TIDEGATE_WORKER_CONNECTIONS:-8192}
max_held=${TIDEGATE_MAX_HELD:-4096}
shutdown_timeout=${TIDEGATE_WORKER_SHUTDOWN_TIMEOUT:-240s}
error_log=${TIDEGATE_ERROR_LOG:-stderr}
access_log=${TIDEGATE_ACCESS_LOG:-off}
error_page=${TIDEGATE_ERROR_PAGE:-$home/error.html}
status_password_file=${TIDEGATE_STATUS_PASSWORD_FILE:-}
ca_bundle=${TIDEGATE_CA_BUNDLE:-}
user=${TIDEGATE_USER:-}

# As root, with a user to run as: start anew as that user. Master and workers have to be the same
# user, since a worker tells its master to reload; the ports below 1024 are a capability.
if [ -n "$user" ] && [ "$(id -u)" = 0 ] && [ "$(id -un)" != "$user" ]; then
    id -u -- "$user" >/dev/null 2>&1 || fail "TIDEGATE_USER $user does not exist"
    command -v setpriv >/dev/null || fail "TIDEGATE_USER needs setpriv (util-linux), not found"
    mkdir -p -- "$run" "$state"
    chown -R -- "$user" "$run" "$state"
    set -- --reuid "$user" --regid "$(id -g -- "$user")" --init-groups
    if setpriv --inh-caps +net_bind_service --ambient-caps +net_bind_service true 2>/dev/null; then
        set -- "$@" --inh-caps +net_bind_service --ambient-caps +net_bind_service
    fi
    exec setpriv "$@" /bin/sh "$0"
fi

# Values become part of nginx's configuration: nothing in them may end a word there.
check() { # NAME VALUE PATTERN-OF-ALLOWED-CHARACTERS
    case $2 in
        *[!$3]*) fail "$1 is '$2'; only these characters are possible: $3" ;;
    esac
}
path_chars='A-Za-z0-9._/@+:,=-'
for pair in "TIDEGATE_RUN_DIR=$run" "TIDEGATE_STATE_DIR=$state" "TIDEGATE_CONF_DIR=$conf_dir" \
    "TIDEGATE_ADMIN_TOKEN_FILE=$token_file" \
    "TIDEGATE_SESSION_SECRET_FILE=$session_secret_file" "TIDEGATE_ADMIN_TLS_CERT=$tls_cert" \
    "TIDEGATE_ADMIN_TLS_KEY=$tls_key" "TIDEGATE_ADMIN_TLS_CLIENT_CA=$tls_client_ca" \
    "TIDEGATE_ERROR_PAGE=$error_page" "TIDEGATE_STATUS_PASSWORD_FILE=$status_password_file" \
    "TIDEGATE_CA_BUNDLE=$ca_bundle" "directory=$home"; do
    check "${pair%%=*}" "${pair#*=}" "$path_chars"
done
check TIDEGATE_ADMIN_LISTEN "$admin_listen" '][A-Za-z0-9._/:*-'
check TIDEGATE_LEASE_TTL "$lease_ttl" '0-9.'
check TIDEGATE_DICT_SIZE "$dict_size" '0-9kKmMgG'
check TIDEGATE_WORKERS "$workers" '0-9auto'
check TIDEGATE_HTTP_PORT "$http_port" '0-9'
check TIDEGATE_WORKER_CONNECTIONS "$worker_connections" '0-9'
check TIDEGATE_MAX_HELD "$max_held" '0-9'
check TIDEGATE_WORKER_SHUTDOWN_TIMEOUT "$shutdown_timeout" '0-9smhd'
check TIDEGATE_ERROR_LOG "$error_log" 'A-Za-z0-9._/ -'
check TIDEGATE_ACCESS_LOG "$access_log" 'A-Za-z0-9._/ -'

# The admin API changes where traffic goes: beyond this machine it is never without a token.
case $admin_listen in
    unix:*|localhost:*|127.*:*|'[::1]:'*) ;;
    *)
        if [ -z "${TIDEGATE_ADMIN_TOKEN:-}" ] && [ -z "$token_file" ]; then
            fail "TIDEGATE_ADMIN_LISTEN is $admin_listen, which others can reach, and there is no" \
                "token: set TIDEGATE_ADMIN_TOKEN_FILE (or TIDEGATE_ADMIN_TOKEN), or listen on" \
                "127.0.0.1:8081 or unix:/path"
        fi
        ;;
esac
for pair in "TIDEGATE_ADMIN_TOKEN_FILE=$token_file" \
    "TIDEGATE_SESSION_SECRET_FILE=$session_secret_file" \
    "TIDEGATE_STATUS_PASSWORD_FILE=$status_password_file"; do
    file=${pair#*=}
    [ -n "$file" ] || continue
    [ -e "$file" ] || fail "${pair%%=*} $file is not there for user $(id -u): mount the secret, or mend the path"
    [ -r "$file" ] || fail "${pair%%=*} $file cannot be read by user $(id -u)"
    grep -q '[^[:space:]]' "$file" || fail "${pair%%=*} $file is empty"
done

# A directory has a page for each status it likes, and error.html for the others.
error_pages=
if [ -d "$error_page" ]; then
    error_pages=$error_page
    error_page=$error_pages/error.html
    [ -f "$error_page" ] || error_page=$home/error.html
fi

admin_tls=
if [ -n "$tls_cert$tls_key" ]; then
    [ -r "$tls_cert" ] || fail "TIDEGATE_ADMIN_TLS_CERT '$tls_cert' cannot be read"
    [ -r "$tls_key" ] || fail "TIDEGATE_ADMIN_TLS_KEY '$tls_key' cannot be read"
    admin_tls="ssl_certificate \"$tls_cert\"; ssl_certificate_key \"$tls_key\";"
    if [ -n "$tls_client_ca" ]; then
        [ -r "$tls_client_ca" ] \
            || fail "TIDEGATE_ADMIN_TLS_CLIENT_CA '$tls_client_ca' cannot be read"
        admin_tls="$admin_tls ssl_client_certificate \"$tls_client_ca\"; ssl_verify_client on;"
    fi
    admin_listen_line="$admin_listen ssl"
elif [ -n "$tls_client_ca" ]; then
    fail "TIDEGATE_ADMIN_TLS_CLIENT_CA needs TIDEGATE_ADMIN_TLS_CERT and TIDEGATE_ADMIN_TLS_KEY"
else
    admin_listen_line=$admin_listen
fi

# OpenResty has Lua built in; Debian's nginx loads it, and so may any other that was built so.
binary=${TIDEGATE_NGINX:-}
if [ -z "$binary" ] && [ -x /usr/local/openresty/bin/openresty ]; then
    binary=/usr/local/openresty/bin/openresty
elif [ -z "$binary" ]; then
    binary=$(command -v openresty || command -v nginx || echo /usr/sbin/nginx)
fi
check TIDEGATE_NGINX "$binary" "$path_chars"
[ -x "$binary" ] || fail "neither OpenResty nor nginx is installed: there is no $binary"
modules=
built=$("$binary" -V 2>&1)
case $built in
    # As nginx tells how it was configured: the module's directory, whatever its version.
    *--add-module=*ngx_lua*|*--add-module=*lua-nginx-module*) ;;
    *)
        for module in ndk_http_module ngx_http_lua_module; do
            if [ -f "/usr/lib/nginx/modules/$module.so" ]; then
                modules="$modules load_module /usr/lib/nginx/modules/$module.so;"
            fi
        done
        case $modules in
            *ngx_http_lua_module*) ;;
            *) fail "$binary has no Lua module; on Debian: apt-get install libnginx-mod-http-lua lua-cjson" ;;
        esac
        ;;
esac

# TCP routes and passthrough need Lua in the stream part, and sockets whose paths the system takes.
stream=false
case $built in
    *--with-stream_ssl_preread_module*)
        case $built in
            *--add-module=*stream_lua*|*--add-module=*stream-lua-nginx-module*) stream=true ;;
        esac
        ;;
esac
if [ "$stream" = true ] && [ "${#run}" -gt 98 ]; then
    say "no TCP routes and no passthrough: the path of TIDEGATE_RUN_DIR is longer than 98 characters"
    stream=false
fi

# What this build can do, as the agent hears it: "http_v2", "http_v3", "stream_ssl_preread" …
features=$("$binary" -V 2>&1 | tr ' ' '\n' \
    | sed -n 's/^--with-\([a-z0-9_]*\)_module$/"\1"/p' | sort -u | paste -sd, -)

user_line=
if [ "$(id -u)" = 0 ]; then
    user_line="user root;"
fi

case $lease_ttl in
    *.*.*) fail "TIDEGATE_LEASE_TTL is '$lease_ttl', expected seconds" ;;
    *[1-9]*) ;;
    *) fail "TIDEGATE_LEASE_TTL is '$lease_ttl', expected seconds above 0: else it never lapses" ;;
esac
case ${dict_size%[kKmMgG]} in
    '' | *[!0-9]*) fail "TIDEGATE_DICT_SIZE is '$dict_size', expected a number with k, m or g: 64m" ;;
esac
# Pointers, counters and the list of probes take a quarter of the membership's room each.
number=${dict_size%[kKmMgG]}
unit=${dict_size#"$number"}
case $unit in
    [gG]) number=$((number * 1048576)) ;;
    [mM]) number=$((number * 1024)) ;;
    [kK]) ;;
    *) number=$((number / 1024)) ;;
esac
[ "$number" -ge 64 ] || fail "TIDEGATE_DICT_SIZE is $dict_size; at least 64k is needed"
pointer_size=$((number / 4))
[ "$pointer_size" -ge 1024 ] || pointer_size=1024

case $access_log in
    off) access_log_line=off ;;
    stdout) access_log_line="/dev/stdout tidegate" ;;
    *) access_log_line="$access_log tidegate" ;;
esac

umask 077
for pair in "TIDEGATE_RUN_DIR=$run" "TIDEGATE_STATE_DIR=$state"; do
    directory=${pair#*=}
    if ! mkdir -p -- "$directory" || [ ! -w "$directory" ]; then
        fail "${pair%%=*} $directory cannot be written to by user $(id -u): give it that owner," \
            "or mount a volume there"
    fi
done
mkdir -p -- "$run/temp" "$state/site" "$state/trust"
: >"$run/emerg.log"
rm -rf -- "$state"/site/*.staging "$state"/site/*.old "$state"/site/*.new
rm -f -- "$run/conf.d" "$run/trust"
ln -s "$home/conf.d" "$run/conf.d"
ln -s "$state/trust" "$run/trust"
case $admin_listen in
    # What a killed nginx has left; a socket that somebody serves is not taken away.
    unix:*)
        if [ -S "${admin_listen#unix:}" ] && ! grep -qF -- "${admin_listen#unix:}" /proc/net/unix; then
            rm -f -- "${admin_listen#unix:}"
        fi
        ;;
esac

# Listeners of the TLS port's connections that the stream part passes on; a site includes them.
rm -f -- "$run/tls.sock" "$run/raw.sock"
for http2 in "" " http2"; do
    {
        echo "listen unix:$run/tls.sock ssl$http2 proxy_protocol;"
        echo "set_real_ip_from unix:;"
        echo "real_ip_header proxy_protocol;"
    } >"$run/tls${http2:+-http2}.inc"
done
echo "listen unix:$run/raw.sock proxy_protocol;" >"$run/raw.inc"

mkdir -p -- "$state/site/builtin"
sed "s|@HTTP_PORT@|$http_port|g" "$home/builtin.conf" >"$state/site/builtin/00-builtin.conf"
# What a site does not set itself, it takes from here; one of an older version does not know yet.
for limit in "main worker_processes $workers" "events worker_connections $worker_connections"; do
    directive=${limit#* }
    echo "$directive;" >"$run/${directive% *}.inc"
    for site in "$state"/site/*/; do
        file=${site}00-default.${limit%% *}
        [ -s "$file" ] || echo "include ${directive% *}.inc;" >"$file"
    done
done
[ -L "$state/site/current" ] || ln -s builtin "$state/site/current"

# What request ids begin with, so that no two instances and no two starts make the same.
start_id=$(od -A n -N 8 -t x1 /dev/urandom | tr -d ' \n')

stream_part=
if [ "$stream" = true ]; then
    stream_part=$home/stream.conf
fi
# shellcheck disable=SC2086 # no word where there is no stream part; paths have no blanks (check)
cat -- "$home/nginx.conf" $stream_part | sed -e "s|@MODULES@|$modules|g" \
    -e "s|@USER@|$user_line|g" \
    -e "s|@SHUTDOWN_TIMEOUT@|$shutdown_timeout|g" \
    -e "s|@RUN@|$run|g" \
    -e "s|@STATE@|$state|g" \
    -e "s|@HOME@|$home|g" \
    -e "s|@BINARY@|$binary|g" \
    -e "s|@FEATURES@|$features|g" \
    -e "s|@CA_BUNDLE@|$ca_bundle|g" \
    -e "s|@ERROR_LOG@|$error_log|g" \
    -e "s|@ACCESS_LOG@|$access_log_line|g" \
    -e "s|@POINTER_SIZE@|${pointer_size}k|g" \
    -e "s|@DICT_SIZE@|$dict_size|g" \
    -e "s|@TOKEN_FILE@|$token_file|g" \
    -e "s|@SESSION_SECRET_FILE@|$session_secret_file|g" \
    -e "s|@LEASE_TTL@|$lease_ttl|g" \
    -e "s|@MAX_HELD@|$max_held|g" \
    -e "s|@ERROR_PAGE@|$error_page|g" \
    -e "s|@ERROR_PAGES@|$error_pages|g" \
    -e "s|@STATUS_PASSWORD_FILE@|$status_password_file|g" \
    -e "s|@ADMIN_LISTEN@|$admin_listen_line|g" \
    -e "s|@ADMIN_TLS@|$admin_tls|g" \
    -e "s|@CONF_DIR@|$conf_dir|g" \
    -e "s|@STREAM@|$stream|g" \
    -e "s|@START_ID@|$start_id|g" \
    >"$run/nginx.conf"

# A site that was good may not load any more (a certificate is gone, a port is taken away). Then
# the one before it serves, and at worst the built-in one: never nothing.
loads() {
    sed 's|require("tidegate.init").start|require("tidegate.init").test|' \
        "$run/nginx.conf" >"$run/test.conf"
    "$binary" -t -p "$run/" -e stderr -c "$run/test.conf" >"$run/test.conf.out" 2>&1
}
current=$(readlink "$state/site/current")
for fallback in "$(readlink "$state/site/previous" || echo builtin)" builtin; do
    if [ "$current" = builtin ] || loads; then
        break
    fi
    cat -- "$run/test.conf.out" >&2
    say "the site $current does not load; trying $fallback"
    ln -s "$fallback" "$state/site/current.new"
    mv -T -- "$state/site/current.new" "$state/site/current"
    current=$fallback
done

ulimit -n "$(ulimit -Hn)" 2>/dev/null || true
umask 022
exec "$binary" -p "$run/" -e stderr -c "$run/nginx.conf"
